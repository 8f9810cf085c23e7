//! Building the extension and installing it into a server's tree.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use pg_claims_tests::Installation;

use super::{major_version, run_visibly};
use crate::layout::Layout;
use crate::progress;

/// Builds pg_claims in release and installs it.
pub fn install(layout: &Layout, cargo_pgrx: &Path, server: &Installation) -> Result<()> {
    let pg_config = server.pg_config();
    let feature = format!("pg{}", major_version(pg_config)?);
    let build = layout.target().join("build").join(&feature);
    check_writable(pg_config)?;
    let first = if build.exists() { "" } else { " (about two minutes the first time)" };
    progress::step(format_args!("building pg_claims for {feature}{first}"));
    let home = pgrx_home(layout, &feature, pg_config)?;
    // A folder of its own for each server: cargo-pgrx passes other flags than plain cargo, and
    // sharing one would build everything anew each time.
    run_visibly(
        Command::new(cargo_pgrx)
            .args(["pgrx", "install", "--release", "--no-default-features", "--features", &feature])
            .arg("--pg-config")
            .arg(pg_config)
            .env("CARGO_TARGET_DIR", &build)
            .env("PGRX_HOME", &home)
            .current_dir(layout.root()),
        "cargo pgrx install",
    )?;
    // Whatever the umask: the server runs as another user.
    for option in ["--pkglibdir", "--sharedir"] {
        let output = Command::new(pg_config).arg(option).output()?;
        let folder = String::from_utf8(output.stdout)?;
        let files = match option {
            "--pkglibdir" => format!("{}/pg_claims*", folder.trim()),
            _ => format!("{}/extension/pg_claims*", folder.trim()),
        };
        run_visibly(
            Command::new("sh").args(["-c", &format!("chmod a+r {files}")]),
            "chmod on the installed files",
        )?;
    }
    Ok(())
}

/// cargo-pgrx wants a configuration that names the server, although it is told on the command line.
pub fn pgrx_home(layout: &Layout, feature: &str, pg_config: &Path) -> Result<std::path::PathBuf> {
    let home = layout.target().join("pgrx").join(feature);
    fs::create_dir_all(&home)?;
    let pg_config = pg_config.to_str().context("the path of pg_config is not UTF-8")?;
    let mut servers = toml::Table::new();
    servers.insert(feature.into(), pg_config.into());
    let mut config = toml::Table::new();
    config.insert("configs".into(), servers.into());
    fs::write(home.join("config.toml"), config.to_string())?;
    Ok(home)
}

fn check_writable(pg_config: &Path) -> Result<()> {
    let output = Command::new(pg_config).arg("--sharedir").output()?;
    let share = String::from_utf8(output.stdout)?;
    let writable = Command::new("test").arg("-w").arg(share.trim()).status()?.success();
    if !writable {
        bail!(
            "{} is not writable: the extension cannot be installed into that PostgreSQL; run as a user who may, or use --pg 15, 16 or 18",
            share.trim()
        );
    }
    Ok(())
}
