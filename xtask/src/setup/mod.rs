//! From a fresh machine to an installed extension. Every step does nothing where nothing is to do.

mod cargo_pgrx;
mod debian;
pub mod extension;
mod pypi;
mod tree;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use pg_claims_tests::Installation;

use crate::interrupt;
use crate::layout::Layout;
use crate::progress;

/// Which PostgreSQL to use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Choice {
    /// A version that the set-up can provide.
    Version(u16),
    /// One that is there already.
    PgConfig(PathBuf),
}

impl std::fmt::Display for Choice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Version(version) => write!(f, "PostgreSQL {version}"),
            Self::PgConfig(path) => write!(f, "{}", path.display()),
        }
    }
}

/// The version that Debian 12 provides.
pub const DEBIAN_VERSION: u16 = tree::VERSION;

/// The versions that the set-up can provide.
const PROVIDED: [u16; 3] = [DEBIAN_VERSION, 16, 18];

/// Reads one of the versions that the set-up can provide.
pub fn provided_version(text: &str) -> Result<u16, String> {
    text.trim().parse().ok().filter(|version| PROVIDED.contains(version)).ok_or_else(|| {
        "the set-up can provide 15, 16 and 18; for any other use --pg-config PATH".to_owned()
    })
}

/// Provides a PostgreSQL without the extension; enough for clippy and the documentation.
pub fn server(layout: &Layout, choice: &Choice) -> Result<Installation> {
    debian::ensure(&packages(choice)).with_context(|| format!("{choice} cannot be set up"))?;
    let pg_config = match choice {
        Choice::Version(DEBIAN_VERSION) => tree::relocated_debian(layout)?,
        Choice::Version(version) => pypi::server(layout, *version)?,
        Choice::PgConfig(path) => {
            let path = std::path::absolute(path)?;
            progress::note(format_args!(
                "the extension goes into the PostgreSQL of {}; other servers of it will see it",
                path.display()
            ));
            path
        }
    };
    Installation::new(&pg_config)
}

/// The Debian packages that `choice` needs, to be named and installed at once.
fn packages(choice: &Choice) -> Vec<&'static str> {
    let mut packages = debian::BUILD.to_vec();
    match choice {
        Choice::Version(DEBIAN_VERSION) => packages.extend(tree::PACKAGES),
        Choice::Version(_) => packages.extend(pypi::packages()),
        Choice::PgConfig(_) => {}
    }
    packages
}

/// Provides a PostgreSQL with the extension, built in release.
pub fn run(layout: &Layout, choice: &Choice) -> Result<Installation> {
    let installation = server(layout, choice)?;
    let cargo_pgrx = cargo_pgrx::ensure(layout)?;
    extension::install(layout, &cargo_pgrx, &installation)?;
    Ok(installation)
}

/// The major version of the PostgreSQL that `pg_config` belongs to.
pub fn major_version(pg_config: &Path) -> Result<u16> {
    let output = Command::new(pg_config)
        .arg("--version")
        .output()
        .with_context(|| format!("could not run {}", pg_config.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let digits: String =
        text.chars().skip_while(|c| !c.is_ascii_digit()).take_while(char::is_ascii_digit).collect();
    digits.parse().with_context(|| format!("cannot read a version from \"{}\"", text.trim()))
}

/// Runs a command whose output the person should see, and fails if it does.
fn run_visibly(command: &mut Command, what: &str) -> Result<()> {
    let status = interrupt::run(command).with_context(|| format!("could not run {what}"))?;
    if !status.success() {
        bail!("{what} failed ({status})");
    }
    Ok(())
}

/// Makes `folder` by `make`, which fills a temporary one beside it: a killed run leaves nothing
/// half-done under the real name.
fn make_whole(folder: &Path, make: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let unfinished = folder.with_extension("unfinished");
    for leftover in [&unfinished, folder] {
        if leftover.exists() {
            std::fs::remove_dir_all(leftover)
                .with_context(|| format!("could not remove {}", leftover.display()))?;
        }
    }
    std::fs::create_dir_all(&unfinished)?;
    make(&unfinished)?;
    // Whatever the umask: the server runs as another user.
    run_visibly(
        Command::new("chmod").args(["-R", "a+rX"]).arg(&unfinished),
        "chmod on the new folder",
    )?;
    std::fs::rename(&unfinished, folder)?;
    progress::note(format_args!("made {}", folder.display()));
    Ok(())
}
