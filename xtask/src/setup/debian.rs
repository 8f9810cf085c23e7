//! Debian's packages.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::run_visibly;
use crate::progress;

/// What building needs; libssl-dev and pkg-config are for cargo-pgrx, libclang-dev for the
/// bindings to the server's headers.
pub const BUILD: [&str; 4] = ["build-essential", "pkg-config", "libssl-dev", "libclang-dev"];

/// Installs those of `packages` that are missing.
pub fn ensure(packages: &[&str]) -> Result<()> {
    let missing: Vec<_> = packages.iter().copied().filter(|name| !is_installed(name)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    progress::step(format_args!("missing Debian packages: {}", missing.join(" ")));
    let by_hand =
        format!("apt-get update && apt-get install --no-install-recommends {}", missing.join(" "));
    if which("apt-get").is_none() {
        bail!("there is no apt-get here; install the equivalents of: {}", missing.join(" "));
    }
    let prefix: &[&str] = if nix_is_root()? {
        &[]
    } else if sudo_works() {
        &["sudo", "-n"]
    } else {
        bail!("they cannot be installed without root; as root run: {by_hand}");
    };
    let apt = |arguments: &[&str]| {
        let words: Vec<_> = prefix.iter().chain(&["apt-get"]).chain(arguments).collect();
        let [program, rest @ ..] = words.as_slice() else { bail!("no command") };
        run_visibly(
            Command::new(program).args(rest).env("DEBIAN_FRONTEND", "noninteractive"),
            "apt-get",
        )
    };
    let done = apt(&["update", "-qq"]).and_then(|()| {
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

/// Whether a package can be installed from the configured sources.
pub fn is_available(package: &str) -> bool {
    is_installed(package)
        || Command::new("apt-cache").args(["policy", package]).output().is_ok_and(|output| {
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            text.contains("Candidate:") && !text.contains("Candidate: (none)")
        })
}

fn which(program: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|file| file.is_file())
}

fn nix_is_root() -> Result<bool> {
    let output = Command::new("id").arg("-u").output().context("could not run id")?;
    Ok(output.stdout.trim_ascii() == b"0")
}

fn sudo_works() -> bool {
    Command::new("sudo")
        .args(["-n", "true"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}
