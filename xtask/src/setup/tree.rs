//! A copy of Debian's PostgreSQL below our own folder, so that installing the extension leaves the
//! system's tree clean. PostgreSQL finds its files relative to its programs, so a copy works.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::{make_whole, run_visibly};
use crate::layout::Layout;
use crate::progress;

/// The version that Debian 12 has.
pub const VERSION: u16 = 15;

/// Debian's packages of it: the server and its headers.
pub const PACKAGES: [&str; 2] = ["postgresql-15", "postgresql-server-dev-15"];

/// The `pg_config` of the copy of Debian's PostgreSQL.
pub fn relocated_debian(layout: &Layout) -> Result<PathBuf> {
    let folder = layout.servers().join(format!("debian-{VERSION}"));
    let system = PathBuf::from(format!("/usr/lib/postgresql/{VERSION}"));
    let pg_config = folder.join(format!("lib/postgresql/{VERSION}/bin/pg_config"));
    let wanted = version_of(&system.join("bin/pg_config"))?;
    if pg_config.exists() && version_of(&pg_config)? == wanted {
        return Ok(pg_config);
    }
    progress::step(format_args!("copying Debian's {} into {}", wanted.trim(), folder.display()));
    make_whole(&folder, |folder| {
        for part in ["lib", "share"] {
            let into = folder.join(part).join("postgresql");
            fs::create_dir_all(&into)?;
            run_visibly(
                Command::new("cp")
                    .arg("-aL")
                    .arg(format!("/usr/{part}/postgresql/{VERSION}"))
                    .arg(&into),
                "copying PostgreSQL",
            )?;
        }
        fs::create_dir_all(folder.join("include"))?;
        symlink("/usr/include/postgresql", folder.join("include/postgresql"))?;
        Ok(())
    })?;
    check_relocated(&folder, &pg_config)?;
    Ok(pg_config)
}

/// Installing must go into the copy.
fn check_relocated(folder: &Path, pg_config: &Path) -> Result<()> {
    for option in ["--pkglibdir", "--sharedir"] {
        let output = Command::new(pg_config).arg(option).output()?;
        let path = String::from_utf8_lossy(&output.stdout);
        if !Path::new(path.trim()).starts_with(folder) {
            bail!("{} {option} answers {}, outside of the copy", pg_config.display(), path.trim());
        }
    }
    Ok(())
}

fn version_of(pg_config: &Path) -> Result<String> {
    let output = Command::new(pg_config)
        .arg("--version")
        .output()
        .with_context(|| format!("could not run {}", pg_config.display()))?;
    Ok(String::from_utf8(output.stdout)?)
}
