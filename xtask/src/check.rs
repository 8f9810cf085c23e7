//! Formatting, clippy, documentation.

use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::layout::Layout;
use crate::lock::Lock;
use crate::progress;
use crate::setup::{self, Choice};

/// Runs all checks; each must pass without a warning.
pub fn run(layout: &Layout) -> Result<()> {
    let _lock = Lock::take(layout)?;
    // The extension's build reads a server's headers.
    let server = setup::server(layout, &Choice::DEFAULT)?;
    let steps: [&[&str]; 3] = [
        &["fmt", "--all", "--check"],
        &["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"],
        &["doc", "--workspace", "--no-deps", "--document-private-items"],
    ];
    for step in steps {
        progress::step(format_args!("cargo {}", step.join(" ")));
        let status = Command::new(env!("CARGO"))
            .args(step)
            .env("CARGO_TARGET_DIR", layout.target().join("build/check"))
            .env("PGRX_PG_CONFIG_PATH", server.pg_config())
            .env("RUSTDOCFLAGS", "-D warnings")
            .current_dir(layout.root())
            .status()
            .context("could not run cargo")?;
        if !status.success() {
            bail!("cargo {} failed", step.join(" "));
        }
    }
    Ok(())
}
