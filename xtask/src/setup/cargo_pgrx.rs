//! cargo-pgrx, at the version of pgrx that Cargo.lock pins, in a folder of the project's own.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use toml::Table;

use super::run_visibly;
use crate::layout::Layout;
use crate::progress;

/// The program, installed if it is not there or does not run.
pub fn ensure(layout: &Layout) -> Result<PathBuf> {
    let version = pinned_version(layout)?;
    let folder = layout.target().join("tools").join(format!("cargo-pgrx-{version}"));
    let program = folder.join("bin/cargo-pgrx");
    if answers(&program, &version) {
        return Ok(program);
    }
    progress::step(format_args!("installing cargo-pgrx {version} (about five minutes, once)"));
    run_visibly(
        Command::new(env!("CARGO"))
            .args(["install", "cargo-pgrx", "--locked", "--force", "--version", &version, "--root"])
            .arg(&folder)
            .env("CARGO_TARGET_DIR", layout.target().join("tools/build"))
            .current_dir(layout.root()),
        "cargo install cargo-pgrx",
    )
    .context("could not install cargo-pgrx; is there a network?")?;
    if !answers(&program, &version) {
        bail!("{} does not run as version {version}; remove it and try again", program.display());
    }
    Ok(program)
}

fn answers(program: &PathBuf, version: &str) -> bool {
    Command::new(program)
        .args(["pgrx", "--version"])
        .stderr(Stdio::null())
        .output()
        .is_ok_and(|output| String::from_utf8_lossy(&output.stdout).trim().ends_with(version))
}

fn pinned_version(layout: &Layout) -> Result<String> {
    let path = layout.root().join("Cargo.lock");
    let lock: Table = fs::read_to_string(&path)
        .with_context(|| format!("could not read {}", path.display()))?
        .parse()?;
    lock.get("package")
        .and_then(|packages| packages.as_array())
        .into_iter()
        .flatten()
        .find(|package| package.get("name").and_then(|name| name.as_str()) == Some("pgrx"))
        .and_then(|package| package.get("version")?.as_str())
        .map(str::to_owned)
        .context("Cargo.lock has no package pgrx")
}
