//! Building the extension and installing it into a server's tree.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use nix::unistd::{AccessFlags, access};
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
    detach_installed(pg_config)?;
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
    for file in installed_files(pg_config)? {
        let mode = fs::metadata(&file)?.permissions().mode();
        fs::set_permissions(&file, Permissions::from_mode(mode | 0o444))
            .with_context(|| format!("could not change the mode of {}", file.display()))?;
    }
    Ok(())
}

/// Replaces what is installed by copies. cargo-pgrx writes into the files that are there; a server
/// that has loaded the library, such as the demo's, would see its code change and crash.
fn detach_installed(pg_config: &Path) -> Result<()> {
    for file in installed_files(pg_config)? {
        let copy = file.with_extension("detached");
        fs::copy(&file, &copy)
            .and_then(|_| fs::rename(&copy, &file))
            .with_context(|| format!("could not replace {}", file.display()))?;
    }
    Ok(())
}

/// The extension's files in the tree of `pg_config`.
fn installed_files(pg_config: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for folder in install_folders(pg_config)? {
        for entry in
            fs::read_dir(&folder).with_context(|| format!("could not read {}", folder.display()))?
        {
            let entry = entry?;
            let name = entry.file_name();
            if ["pg_claims.", "pg_claims--"]
                .iter()
                .any(|start| name.as_encoded_bytes().starts_with(start.as_bytes()))
            {
                files.push(entry.path());
            }
        }
    }
    Ok(files)
}

/// Where installing writes to.
fn install_folders(pg_config: &Path) -> Result<[PathBuf; 2]> {
    let ask = |option: &str| -> Result<PathBuf> {
        let output = Command::new(pg_config).arg(option).output()?;
        Ok(PathBuf::from(String::from_utf8(output.stdout)?.trim()))
    };
    Ok([ask("--pkglibdir")?, ask("--sharedir")?.join("extension")])
}

/// cargo-pgrx wants a configuration that names the server, although it is told on the command line.
pub fn pgrx_home(layout: &Layout, feature: &str, pg_config: &Path) -> Result<PathBuf> {
    let home = layout.target().join("pgrx").join(feature);
    fs::create_dir_all(&home)?;
    let pg_config = pg_config.to_str().context("the path of pg_config is not UTF-8")?;
    let mut servers = toml::Table::new();
    servers.insert(feature.into(), pg_config.into());
    let mut config = toml::Table::new();
    config.insert("configs".into(), servers.into());
    let file = home.join("config.toml");
    let config = config.to_string();
    // Only if it differs: pgrx's build script watches the file, and would build all anew.
    if !fs::read_to_string(&file).is_ok_and(|found| found == config) {
        fs::write(&file, config).with_context(|| format!("could not write {}", file.display()))?;
    }
    Ok(home)
}

fn check_writable(pg_config: &Path) -> Result<()> {
    for folder in install_folders(pg_config)? {
        if access(&folder, AccessFlags::W_OK).is_err() {
            bail!(
                "{} cannot be written: the extension cannot be installed into that PostgreSQL; run \
                 as a user who may, or use --pg 15, 16 or 18",
                folder.display()
            );
        }
    }
    Ok(())
}
