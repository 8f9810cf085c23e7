//! Running every test.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use pg_claims_tests::{ENV_PG_CONFIG, ENV_SOCKET_DIR, ENV_WORK_DIR, Server, ServerUser};

use crate::interrupt;
use crate::layout::Layout;
use crate::lock::Lock;
use crate::progress;
use crate::setup::{self, Choice};

/// What the tests need of a server: room for their connections, and no waiting for the disk. What a
/// test makes stale must stay so until the test itself does something about it: nothing is reaped in
/// the background, and a server that has just started grants no grace. Tests of the worker and of
/// restarts start servers of their own.
const SETTINGS: [&str; 8] = [
    "pg_claims.worker = off",
    "pg_claims.restart_grace = off",
    // The board has tests of its own; most others look at the table.
    "pg_claims.max_sessions = 0",
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
    interrupt::watch()?;
    let mut results = Vec::new();

    progress::step("testing the rules that need no server");
    let rules = cargo_test(layout, "pg_claims-core", arguments, &[])?;
    results.push(("the rules".to_owned(), rules));

    for choice in choices {
        // What went wrong with one server says nothing about the next.
        let passed = on_choice(layout, choice, arguments, &[]);
        interrupt::check()?;
        let passed = passed.unwrap_or_else(|error| {
            eprintln!("\nerror: {error:#}");
            false
        });
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

/// Tests the extension on one server, with something more in the environment of the tests.
pub fn on_choice(
    layout: &Layout,
    choice: &Choice,
    arguments: &[String],
    more: &[(&str, String)],
) -> Result<bool> {
    let installation = setup::run(layout, choice)?.under_test();
    interrupt::check()?;
    progress::step(format_args!("testing on {choice}"));
    // Servers that single tests start: those of a killed run are still there.
    let work_dir = layout.servers().join("test-work");
    Server::remove_leftovers(&installation, &work_dir)?;
    ServerUser::create_shared_dir(&work_dir)?;
    let server = Server::create(&installation, &layout.servers().join("test-server"), &SETTINGS)?;
    let mut environment = vec![
        (ENV_PG_CONFIG, installation.pg_config()),
        (ENV_SOCKET_DIR, server.socket_dir()),
        (ENV_WORK_DIR, work_dir.as_path()),
    ];
    environment.extend(more.iter().map(|(variable, value)| (*variable, Path::new(value))));
    let passed = cargo_test(layout, "pg_claims-tests", arguments, &environment);
    // Servers of single tests have their logs read by those.
    let without_fault = server.discard().context("the tests' common server");
    Server::remove_leftovers(&installation, &work_dir)?;
    let passed = passed?;
    without_fault?;
    Ok(passed)
}

fn cargo_test(
    layout: &Layout,
    package: &str,
    arguments: &[String],
    environment: &[(&str, &Path)],
) -> Result<bool> {
    let mut command = Command::new(env!("CARGO"));
    command
        .args(["test", "--quiet", "--package", package, "--"])
        .args(arguments)
        .envs(environment.iter().copied())
        // A failed assertion says what it found; a backtrace through the runner says nothing more.
        .env("RUST_BACKTRACE", "0")
        .env("RUST_TEST_THREADS", TEST_THREADS.to_string())
        .current_dir(layout.root());
    Ok(interrupt::run_with_descendants(&mut command).context("cargo test")?.success())
}
