//! A copy of Debian's PostgreSQL below our own folder, so that installing the extension leaves the
//! system's tree clean. PostgreSQL finds its files relative to its programs, so a copy works.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::{debian, make_whole, run_visibly};
use crate::layout::Layout;
use crate::progress;

/// The `pg_config` of the copy of Debian's PostgreSQL `version`.
pub fn relocated_debian(layout: &Layout, version: u16) -> Result<PathBuf> {
    let server = format!("postgresql-{version}");
    let headers = format!("postgresql-server-dev-{version}");
    if !debian::is_available(&server) {
        // On a fresh machine the package lists may never have been read.
        debian::ensure(&["ca-certificates"])?;
    }
    debian::ensure(&[&server, &headers]).with_context(|| {
        format!("{server} is Debian 12's; elsewhere use --pg 16, --pg 18 or --pg-config PATH")
    })?;
    let folder = layout.servers().join(format!("debian-{version}"));
    let system = PathBuf::from(format!("/usr/lib/postgresql/{version}"));
    let pg_config = folder.join(format!("lib/postgresql/{version}/bin/pg_config"));
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
                    .arg(format!("/usr/{part}/postgresql/{version}"))
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
