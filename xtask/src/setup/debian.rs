//! Debian's packages.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use nix::unistd::geteuid;

use super::run_visibly;
use crate::progress;

/// What building needs; libclang-dev is for the bindings to the server's headers.
pub const BUILD: [&str; 2] = ["build-essential", "libclang-dev"];

/// Installs those of `packages` that are missing.
pub fn ensure(packages: &[&str]) -> Result<()> {
    let missing: Vec<_> = packages.iter().copied().filter(|name| !is_installed(name)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    progress::step(format_args!("missing Debian packages: {}", missing.join(" ")));
    if let Some(server) = missing.iter().find_map(|name| server_version(name)) {
        progress::note(format_args!(
            "the package may make and start a server of its own ({server}/main); it is not used \
             here, and `pg_dropcluster --stop {server} main` removes it"
        ));
    }
    let by_hand =
        format!("apt-get update && apt-get install --no-install-recommends {}", missing.join(" "));
    if which("apt-get").is_none() {
        bail!("there is no apt-get here; install the equivalents of: {}", missing.join(" "));
    }
    let prefix: &[&str] = if geteuid().is_root() {
        &["env"]
    } else if sudo_works() {
        &["sudo", "-n", "env"]
    } else {
        bail!("they cannot be installed without root; as root run: {by_hand}");
    };
    let apt = |arguments: &[&str]| {
        // Behind sudo, which passes no variables on.
        let command = ["DEBIAN_FRONTEND=noninteractive", "apt-get"];
        let words: Vec<_> = prefix.iter().chain(&command).chain(arguments).collect();
        let [program, rest @ ..] = words.as_slice() else { bail!("no command") };
        run_visibly(Command::new(program).args(rest), "apt-get")
    };
    let done = apt(&["update", "-qq"]).and_then(|()| {
        let unknown: Vec<_> = missing.iter().copied().filter(|name| !has_candidate(name)).collect();
        if !unknown.is_empty() {
            bail!(
                "apt-get offers no {}, which Debian 12 has; elsewhere try --pg 16, --pg 18 or \
                 --pg-config PATH",
                unknown.join(" ")
            );
        }
        let mut arguments = vec!["install", "-y", "-qq", "--no-install-recommends"];
        arguments.extend(&missing);
        apt(&arguments)
    });
    done.with_context(|| {
        format!("could not install {}; is there a network? By hand: {by_hand}", missing.join(" "))
    })
}

/// Whether a package is installed, by dpkg's own word.
fn is_installed(package: &str) -> bool {
    Command::new("dpkg-query")
        .args(["-W", "-f=${db:Status-Status}", package])
        .stderr(Stdio::null())
        .output()
        .is_ok_and(|output| output.stdout == b"installed")
}

/// The version in the name of a server's package.
fn server_version(package: &str) -> Option<&str> {
    package.strip_prefix("postgresql-").filter(|rest| rest.bytes().all(|b| b.is_ascii_digit()))
}

/// Whether the package lists offer a package.
fn has_candidate(package: &str) -> bool {
    // In English, to be read here.
    let policy = Command::new("apt-cache").args(["policy", package]).env("LC_ALL", "C").output();
    policy.is_ok_and(|output| {
        let text = String::from_utf8_lossy(&output.stdout);
        text.contains("Candidate:") && !text.contains("Candidate: (none)")
    })
}

/// The program of that name on the PATH.
pub fn which(program: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|file| file.is_file())
}

fn sudo_works() -> bool {
    Command::new("sudo")
        .args(["-n", "true"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}
