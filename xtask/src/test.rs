//! Running every test.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use pg_claims_tests::{
    ENV_PG_CONFIG, ENV_SOCKET_DIR, ENV_WORK_DIR, Installation, Server, ServerUser,
};

use crate::layout::Layout;
use crate::lock::Lock;
use crate::progress;
use crate::setup::{self, Choice};

/// What the tests need of a server: room for their connections, and no waiting for the disk.
const SETTINGS: [&str; 5] = [
    "max_connections = 400",
    "fsync = off",
    "full_page_writes = off",
    "shared_buffers = 128MB",
    "log_statement = 'none'",
];

/// Tests that run at once: some of them bring 64 connections along.
const TEST_THREADS: usize = 4;

/// Sets up every chosen server, then tests the rules alone and the extension on each server.
pub fn run(layout: &Layout, choices: &[Choice], arguments: &[String]) -> Result<()> {
    let _lock = Lock::take(layout)?;
    let interrupted = stop_on_interrupt()?;
    let mut results = Vec::new();

    progress::step("testing the rules that need no server");
    let rules = cargo_test(layout, "pg_claims-core", arguments, &[])?;
    results.push(("the rules".to_owned(), rules));

    for choice in choices {
        if interrupted.load(Ordering::Relaxed) {
            bail!("interrupted");
        }
        let installation = setup::run(layout, choice)?;
        progress::step(format_args!("testing on {choice}"));
        let passed = on_server(layout, &installation, arguments)?;
        results.push((choice.to_string(), passed));
    }

    println!();
    for (what, passed) in &results {
        println!("{what}: {}", if *passed { "passed" } else { "FAILED" });
    }
    if results.iter().any(|(_, passed)| !passed) {
        bail!("some tests failed");
    }
    Ok(())
}

/// An interrupt goes to the whole group of processes: the test runner ends by it, and this program
/// goes on to stop the server.
fn stop_on_interrupt() -> Result<Arc<AtomicBool>> {
    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&interrupted);
    ctrlc::set_handler(move || flag.store(true, Ordering::Relaxed))
        .context("could not watch for an interrupt")?;
    Ok(interrupted)
}

fn on_server(layout: &Layout, installation: &Installation, arguments: &[String]) -> Result<bool> {
    let server = Server::create(installation, &layout.servers().join("test-server"), &SETTINGS)?;
    let work_dir = layout.servers().join("test-work");
    ServerUser::create_shared_dir(&work_dir)?;
    let environment = [
        (ENV_PG_CONFIG, installation.pg_config()),
        (ENV_SOCKET_DIR, server.socket_dir()),
        (ENV_WORK_DIR, work_dir.as_path()),
    ];
    cargo_test(layout, "pg_claims-tests", arguments, &environment)
}

fn cargo_test(
    layout: &Layout,
    package: &str,
    arguments: &[String],
    environment: &[(&str, &Path)],
) -> Result<bool> {
    let status = Command::new(env!("CARGO"))
        .args(["test", "--quiet", "--package", package, "--"])
        .args(arguments)
        .envs(environment.iter().copied())
        // A failed assertion says what it found; a backtrace through the runner says nothing more.
        .env("RUST_BACKTRACE", "0")
        .env("RUST_TEST_THREADS", TEST_THREADS.to_string())
        .current_dir(layout.root())
        .status()
        .context("could not run cargo test")?;
    Ok(status.success())
}
