//! Trying to break it: every function with arguments that nobody would give, and what sqlsmith thinks of.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use pg_claims_tests::{ENV_FUZZ_SECONDS, ENV_FUZZ_SEED, Installation, Server};
use postgres::NoTls;

use crate::interrupt;
use crate::layout::Layout;
use crate::lock::Lock;
use crate::progress;
use crate::setup::{self, Choice};
use crate::test;

/// The test that calls every function.
const EVERY_FUNCTION: &str = "fuzz::";

const DATABASE: &str = "smith";

/// What sqlsmith's server runs with. The log tells each error's SQLSTATE.
const SETTINGS: [&str; 5] = [
    "fsync = off",
    "shared_preload_libraries = 'pg_claims'",
    "log_line_prefix = '%m [%p] %e '",
    "log_statement = 'none'",
    "max_connections = 50",
];

/// As whom sqlsmith asks; a superuser could end the server.
const LEVELS: [&str; 3] = ["viewer", "worker", "operator"];

/// Runs for about so many seconds, half of them for each way. The seed makes it the same again.
pub fn run(layout: &Layout, choice: &Choice, seconds: u64, seed: Option<u64>) -> Result<()> {
    let _lock = Lock::take(layout)?;
    interrupt::watch()?;
    let half = (seconds / 2).max(1);
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()));
    progress::note(format_args!("seed {seed}; --seed makes it the same again"));
    let environment = [(ENV_FUZZ_SECONDS, half.to_string()), (ENV_FUZZ_SEED, seed.to_string())];
    let arguments = [EVERY_FUNCTION.to_owned(), "--nocapture".to_owned()];
    if !test::on_choice(layout, choice, &arguments, &environment)? {
        bail!("a function failed in a way that is not its own");
    }
    setup::ensure_packages(&["sqlsmith"])?;
    sqlsmith(layout, &setup::run(layout, choice)?, half, seed)
}

fn sqlsmith(layout: &Layout, installation: &Installation, seconds: u64, seed: u64) -> Result<()> {
    progress::step("sqlsmith");
    let root = layout.servers().join("fuzz");
    let server = Server::create(&installation.clone().under_test(), &root, &SETTINGS)?;
    server
        .config("postgres")
        .connect(NoTls)?
        .batch_execute(&format!("CREATE DATABASE {DATABASE}"))?;
    let mut client = server.config(DATABASE).connect(NoTls)?;
    client.batch_execute(
        "CREATE EXTENSION pg_claims;
         INSERT INTO strategic_directives_v2 (sd_id, title) SELECT 'SD-' || n, 'Directive ' || n FROM generate_series(1, 50) n",
    )?;
    for level in LEVELS {
        client.batch_execute(&format!(
            "CREATE ROLE {level} LOGIN; SELECT grant_coordination('{level}', '{level}');
             ALTER ROLE {level} SET statement_timeout = '2s'; ALTER ROLE {level} SET lock_timeout = '1s'"
        ))?;
    }
    let each = Duration::from_secs((seconds / LEVELS.len() as u64).max(1));
    for level in LEVELS {
        ask_as(&server, level, each, seed)?;
        interrupt::check()?;
    }
    client.batch_execute(
        "SELECT register_session('after'); INSERT INTO strategic_directives_v2 (sd_id) VALUES ('after');
         SELECT assert_claim('after', 'after', (claim_sd('after', 'after') ->> 'claim_id')::bigint)",
    )
    .context("nothing goes on working")?;
    let log = server.log()?;
    let ours: Vec<_> = log
        .lines()
        .filter(|line| line.contains("] XX000 ") && line.contains("pg_claims"))
        .take(10)
        .collect();
    let errors = log.lines().filter(|line| line.contains("ERROR:")).count();
    progress::note(format_args!("{errors} errors that the server told of"));
    server.discard().context("sqlsmith's server")?;
    if !ours.is_empty() {
        bail!("internal errors of the extension's:\n{}", ours.join("\n"));
    }
    Ok(())
}

fn ask_as(server: &Server, level: &str, time: Duration, seed: u64) -> Result<()> {
    let target =
        format!("host={} port=5432 dbname={DATABASE} user={level}", server.socket_dir().display());
    let mut smith = Command::new("sqlsmith")
        .arg(format!("--target={target}"))
        .arg(format!("--seed={}", seed % 1_000_000))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("could not run sqlsmith")?;
    let end = Instant::now() + time;
    // It goes on for ever, unless it has lost the server.
    let status = loop {
        if let Some(status) = smith.try_wait()? {
            break Some(status);
        }
        if Instant::now() >= end || interrupt::check().is_err() {
            smith.kill()?;
            smith.wait()?;
            break None;
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    match status {
        Some(status) => bail!("sqlsmith as {level} has ended before its time: {status}"),
        None => Ok(()),
    }
}
