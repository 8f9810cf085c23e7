//! From a fresh machine to an installed extension. Every step does nothing where nothing is to do.

mod debian;
pub mod extension;
mod pypi;
mod schema;
mod source;
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
    /// Debian's version, built with assertions.
    WithAssertions,
    /// One that is there already.
    PgConfig(PathBuf),
}

impl std::fmt::Display for Choice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Version(version) => write!(f, "PostgreSQL {version}"),
            Self::WithAssertions => write!(f, "PostgreSQL {DEBIAN_VERSION} with assertions"),
            Self::PgConfig(path) => write!(f, "{}", path.display()),
        }
    }
}

/// The version that Debian 12 provides.
pub const DEBIAN_VERSION: u16 = tree::VERSION;

/// The name of Debian's version with assertions.
const WITH_ASSERTIONS: &str = "15-assert";

/// The versions that the set-up can provide.
const PROVIDED: [u16; 3] = [DEBIAN_VERSION, 16, 18];

impl Choice {
    /// The choice when nothing was said.
    pub const DEFAULT: Self = Self::Version(DEBIAN_VERSION);
}

/// Reads the name of one of the servers that the set-up can provide.
pub fn provided(text: &str) -> Result<Choice, String> {
    let text = text.trim();
    if text == WITH_ASSERTIONS {
        return Ok(Choice::WithAssertions);
    }
    let version = text.parse().ok().filter(|version| PROVIDED.contains(version));
    version.map(Choice::Version).ok_or_else(|| {
        format!(
            "the set-up can provide 15, {WITH_ASSERTIONS}, 16 and 18; for any other use --pg-config PATH"
        )
    })
}

/// Provides a PostgreSQL without the extension; enough for clippy and the documentation.
pub fn server(layout: &Layout, choice: &Choice) -> Result<Installation> {
    debian::ensure(&packages(choice)).with_context(|| format!("{choice} cannot be set up"))?;
    let pg_config = match choice {
        Choice::Version(DEBIAN_VERSION) => tree::relocated_debian(layout)?,
        Choice::Version(version) => pypi::server(layout, *version)?,
        Choice::WithAssertions => source::with_assertions(layout)?,
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
        Choice::WithAssertions => packages.extend(source::PACKAGES),
        Choice::PgConfig(_) => {}
    }
    packages
}

/// Installs Debian packages that a tool needs.
pub fn ensure_packages(names: &[&str]) -> Result<()> {
    debian::ensure(names)
}

/// Provides a PostgreSQL with the extension, built in release.
pub fn run(layout: &Layout, choice: &Choice) -> Result<Installation> {
    let installation = server(layout, choice)?;
    extension::install(layout, &installation)?;
    Ok(installation)
}

/// Builds the extension in release and installs it into the PostgreSQL of `pg_config`, which is looked for on the
/// PATH if it is a mere name.
pub fn install(layout: &Layout, pg_config: &Path) -> Result<()> {
    let pg_config = match pg_config.to_str() {
        Some(name) if !name.contains('/') => debian::which(name)
            .with_context(|| format!("there is no {name} on the PATH; use --pg-config PATH"))?,
        _ => pg_config.to_owned(),
    };
    let installation = run(layout, &Choice::PgConfig(pg_config))?;
    println!(
        "\nInstalled for {}. As a superuser, in each database that is to have it: CREATE EXTENSION pg_claims;",
        installation.pg_config().display()
    );
    Ok(())
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

#[cfg(test)]
mod tests {
    use super::{Choice, provided};

    #[test]
    fn servers_that_the_set_up_provides_are_chosen_by_name() {
        assert_eq!(provided("15"), Ok(Choice::Version(15)));
        assert_eq!(provided(" 18 "), Ok(Choice::Version(18)));
        assert_eq!(provided("15-assert"), Ok(Choice::WithAssertions));
        for other in ["17", "16-assert", "assert", ""] {
            assert!(provided(other).unwrap_err().contains("15-assert"), "{other}");
        }
    }
}
