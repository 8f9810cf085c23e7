//! PostgreSQL 15 with assertions, built from Debian's sources: it stops at faults that others survive by luck.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use nix::unistd::{User, geteuid};
use pg_claims_tests::ServerUser;

use super::{make_whole, run_visibly};
use crate::interrupt;
use crate::layout::Layout;
use crate::progress;

/// Debian's packages that building the server needs, beside those for the extension.
pub const PACKAGES: [&str; 1] = ["zlib1g-dev"];

/// Debian's source package, and the release that has it.
const SOURCE: &str = "postgresql-15";
const RELEASE: &str = "bookworm";

/// Where the sources come from unless the machine's own apt has a mirror of that release.
const MIRROR: &str = "http://deb.debian.org/debian";

/// Debian's keys, by which apt knows its own.
const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The user that apt downloads as when it is run by root.
const APT: &str = "_apt";

/// Assertions, with line numbers for whoever looks for the cause; without what tests do not use.
const OPTIONS: [&str; 5] =
    ["--enable-cassert", "--enable-debug", "CFLAGS=-O1 -g", "--without-icu", "--without-readline"];

/// The parts that are installed: the server, its tools, and extensions that tests look at tables with.
const PARTS: [&str; 3] = [".", "contrib/amcheck", "contrib/test_decoding"];

/// The `pg_config` of the server with assertions.
pub fn with_assertions(layout: &Layout) -> Result<PathBuf> {
    let folder = layout.servers().join("source-15-assert");
    let pg_config = folder.join("bin/pg_config");
    if pg_config.exists() {
        return Ok(pg_config);
    }
    if folder.to_str().is_none_or(|path| path.contains(char::is_whitespace)) {
        bail!(
            "PostgreSQL cannot be built in {}, whose name has spaces; move the checkout",
            folder.display()
        );
    }
    progress::step(
        "building PostgreSQL 15 with assertions from Debian's sources (five to nine minutes)",
    );
    make_whole(&folder, |unfinished| {
        let (work, downloads) = (unfinished.join("build"), unfinished.join("downloads"));
        for folder in [unfinished, &work, &downloads] {
            // Whatever the umask: apt downloads as a user of its own.
            ServerUser::create_shared_dir(folder)?;
        }
        let archive = fetch(&downloads)?;
        let staged = build(&work, &archive, &folder)?;
        for entry in fs::read_dir(&staged)? {
            let entry = entry?;
            fs::rename(entry.path(), unfinished.join(entry.file_name()))?;
        }
        fs::remove_dir_all(&downloads)?;
        fs::remove_dir_all(&work)?;
        Ok(())
    })?;
    Ok(pg_config)
}

/// Downloads the sources' archive into the folder, by apt with a list and a state of its own: the machine's stay as
/// they are, and it needs no rights.
fn fetch(folder: &Path) -> Result<PathBuf> {
    if !Path::new(KEYS).exists() {
        bail!(
            "there is no {KEYS}, by which apt knows Debian's sources; on Debian the package debian-archive-keyring has it"
        );
    }
    let mirror = mirror();
    progress::note(format_args!("fetching the sources of {SOURCE} ({RELEASE}) from {mirror}"));
    let list = folder.join("sources.list");
    fs::write(&list, format!("deb-src [signed-by={KEYS}] {mirror} {RELEASE} main\n"))?;
    let state = folder.join("apt");
    for part in ["state/lists/partial", "cache/archives/partial"] {
        fs::create_dir_all(state.join(part))?;
    }
    run_visibly(Command::new("chmod").args(["-R", "a+rX"]).arg(folder), "chmod on apt's folder")?;
    // Root does not download: apt becomes this user, who must be able to write there.
    if geteuid().is_root() && User::from_name(APT)?.is_some() {
        run_visibly(Command::new("chown").args(["-R", APT]).arg(folder), "chown on apt's folder")?;
    }
    let apt = |arguments: &[&str]| {
        let option = |name: &str, value: &Path| format!("{name}={}", value.display());
        run_visibly(
            Command::new("apt-get")
                .args(["-qq", "-o", &option("Dir::Etc::sourcelist", &list)])
                .args(["-o", "Dir::Etc::sourceparts=-"])
                .args(["-o", &option("Dir::State", &state.join("state"))])
                .args(["-o", &option("Dir::Cache", &state.join("cache"))])
                // The package lists of the machine's architecture are of no use here.
                .args(["-o", "Acquire::Languages=none"])
                .args(arguments)
                .current_dir(folder),
            "apt-get",
        )
    };
    apt(&["update"])
        .and_then(|()| apt(&["source", "--download-only", "--tar-only", SOURCE]))
        .with_context(|| {
            format!("could not fetch the sources of {SOURCE} from {mirror}; is there a network?")
        })?;
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.to_str().is_some_and(|path| path.contains(".orig.tar.")) {
            return Ok(path);
        }
    }
    bail!("apt-get left no archive in {}", folder.display())
}

/// The mirror of the release that the machine's own apt uses.
fn mirror() -> String {
    let codename = format!("Codename: {RELEASE}");
    let asked = Command::new("apt-get")
        .args(["indextargets", "--format", "$(REPO_URI)", "Identifier: Packages", &codename])
        .output();
    let known = asked.ok().and_then(|output| String::from_utf8(output.stdout).ok());
    known.as_deref().and_then(mirror_among).unwrap_or(MIRROR).to_owned()
}

/// The first that is of Debian itself: others call a release of their own by the same name.
fn mirror_among(uris: &str) -> Option<&str> {
    let uris = uris.lines().map(|uri| uri.trim().trim_end_matches('/'));
    uris.into_iter().find(|uri| uri.starts_with("http") && uri.ends_with("/debian"))
}

/// Builds the server for the folder `target`. Returns where it is staged.
fn build(work: &Path, archive: &Path, target: &Path) -> Result<PathBuf> {
    let sources = work.join("sources");
    fs::create_dir(&sources)?;
    run_visibly(
        Command::new("tar")
            .args(["-x", "--no-same-owner", "--strip-components=1", "-f"])
            .arg(archive)
            .arg("-C")
            .arg(&sources),
        "unpacking the sources",
    )?;
    let staging = work.join("staging");
    let mut prefix = std::ffi::OsString::from("--prefix=");
    prefix.push(target);
    progress::note("configure");
    run_quietly(
        Command::new("./configure").arg("--quiet").arg(prefix).args(OPTIONS),
        &sources,
        "configure",
    )?;
    let jobs = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    progress::note(format_args!("make, {jobs} jobs at once"));
    for part in PARTS {
        let make = |arguments: &[&str], what| {
            let mut command = Command::new("make");
            run_quietly(command.args(["-s", "-C", part]).args(arguments), &sources, what)
        };
        make(&[&format!("-j{jobs}")], "make")?;
        make(&["install", &format!("DESTDIR={}", staging.display())], "make install")?;
    }
    // The whole path of the target follows.
    Ok(staging.join(target.strip_prefix("/").unwrap_or(target)))
}

/// Runs a step of the build. It warns of much that is of no interest here: only a failure shows what it said.
fn run_quietly(command: &mut Command, sources: &Path, what: &str) -> Result<()> {
    let log = sources.join("build.log");
    let file = fs::File::create(&log)?;
    command
        .current_dir(sources)
        .stdin(std::process::Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        // Of a make that has called this program.
        .env_remove("MAKEFLAGS")
        .env_remove("MAKELEVEL");
    let status = interrupt::run(command).with_context(|| format!("could not run {what}"))?;
    if !status.success() {
        let said = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
        let from = said.lines().count().saturating_sub(30);
        let last: Vec<_> = said.lines().skip(from).collect();
        bail!("{what} failed ({status}); it said at last:\n{}", last.join("\n"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::mirror_among;

    #[test]
    fn a_mirror_of_debian_itself_is_chosen() {
        let known = "https://packages.example.org/apt/\nhttp://deb.debian.org/debian-security/\n\
                     http://mirror.example.org/debian/\nhttp://deb.debian.org/debian/\n";
        assert_eq!(mirror_among(known), Some("http://mirror.example.org/debian"));
        assert_eq!(mirror_among("mirror+file:/etc/apt/mirrors/debian.list\n"), None);
        assert_eq!(mirror_among(""), None);
    }
}
