//! The main job, shown: two sessions race for one SD, one wins, the other learns who holds it.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::sync::Barrier;
use std::thread;

use anyhow::{Context, Result, anyhow, bail};
use pg_claims_tests::{Installation, Server};
use postgres::{Client, NoTls};

use crate::layout::Layout;
use crate::lock::Lock;
use crate::progress;
use crate::setup::{self, Choice};

const DATABASE: &str = "demo";

const BACKLOG: &str = "
INSERT INTO strategic_directives_v2 (sd_id, title, status, priority, track) VALUES
    ('SD-LEO-001', 'Sign in with a passkey',       'draft',     'high',     'backend'),
    ('SD-LEO-002', 'Export invoices as PDF',       'draft',     'medium',   'backend'),
    ('SD-LEO-003', 'Dark mode for the dashboard',  'draft',     'low',      'frontend'),
    ('SD-LEO-004', 'Nightly backup to cold store', 'draft',     'critical', 'infra'),
    ('SD-LEO-005', 'Retire the old importer',      'completed', 'medium',   'backend')";

const SESSIONS: &str = "
SELECT session_id, sd_id, sd_title, hostname, tty, computed_status, heartbeat_age_human
  FROM v_active_sessions ORDER BY session_id";

const QUEUE: &str = "
SELECT sd_id, title, status, priority, is_working_on, active_session_id
  FROM v_directives ORDER BY sd_id";

/// The two sessions of the race: id, host, terminal.
const RACERS: [(&str, &str, &str); 2] = [
    ("session_abc123_tty1_1234", "dev-machine", "tty1"),
    ("session_def456_win2_5678", "build-box", "win-5678"),
];

const CONTESTED: &str = "SD-LEO-001";

/// Sets up, starts the demo's server and runs the demo.
pub fn run(layout: &Layout, choice: &Choice) -> Result<()> {
    let lock = Lock::take(layout)?;
    let installation = setup::run(layout, choice)?;
    if Server::running(&installation, &root(layout))?.is_some() {
        progress::note("the server of an earlier demo goes, with all that is in it");
    }
    progress::step("starting a throw-away server");
    // Noted first: should this run be killed, `cargo xtask stop` finds what it started.
    std::fs::write(
        pg_config_note(layout),
        installation.pg_config().as_os_str().as_encoded_bytes(),
    )?;
    let mut server = Server::create(&installation, &root(layout), &["fsync = off"])?;
    drop(lock);
    connect(&server, "postgres")?.batch_execute(&format!("CREATE DATABASE {DATABASE}"))?;
    show(&server)?;
    server.keep();
    println!("\nThe server goes on running, on a socket of its own:");
    println!("  cargo xtask psql    opens psql on it");
    println!("  cargo xtask stop    stops and removes it");
    Ok(())
}

/// Replaces this program by psql on the demo's server.
pub fn psql(layout: &Layout, arguments: &[String]) -> Result<()> {
    let server = running(layout)?;
    let error = server.client_program_as_oneself("psql", DATABASE).args(arguments).exec();
    Err(error).context("could not run psql")
}

/// Stops and removes the demo's server.
pub fn stop(layout: &Layout) -> Result<()> {
    let _lock = Lock::take(layout)?;
    running(layout)?.discard()?;
    println!("The demo's server is stopped and removed.");
    Ok(())
}

fn running(layout: &Layout) -> Result<Server> {
    let none = "the demo's server is not running; start it with: cargo xtask demo";
    let Ok(pg_config) = std::fs::read_to_string(pg_config_note(layout)) else { bail!(none) };
    let installation = Installation::new(&PathBuf::from(pg_config))?;
    Server::running(&installation, &root(layout))?.context(none)
}

fn root(layout: &Layout) -> PathBuf {
    layout.servers().join("demo-server")
}

/// Remembers which PostgreSQL the demo's server is.
fn pg_config_note(layout: &Layout) -> PathBuf {
    layout.target().join("demo-pg-config")
}

fn connect(server: &Server, database: &str) -> Result<Client> {
    server.config(database).connect(NoTls).context("could not connect to the demo's server")
}

fn show(server: &Server) -> Result<()> {
    let mut operator = connect(server, DATABASE)?;
    heading("An operator installs the extension and writes a backlog");
    println!("CREATE EXTENSION pg_claims;");
    operator.batch_execute("CREATE EXTENSION pg_claims")?;
    operator.batch_execute(BACKLOG)?;
    table(server, QUEUE)?;

    heading("Two sessions register, each on a connection of its own, and start one SD at once");
    for (session, hostname, tty) in RACERS {
        operator.query(
            "SELECT register_session($1, $2, $3, NULL, '/work/leo')",
            &[&session, &hostname, &tty],
        )?;
    }
    let (winner, loser) = race(server)?;

    heading("What an operator sees meanwhile: SELECT … FROM v_active_sessions");
    table(server, SESSIONS)?;

    heading("What a program sees when it is refused: SELECT claim_sd(…)");
    let mut client = connect(server, DATABASE)?;
    println!("{}", pretty(&mut client, "SELECT claim_sd($1, $2)", &[&CONTESTED, &loser])?);

    heading("The winner releases the SD, and the other one claims it");
    println!("{}", pretty(&mut client, "SELECT release_sd($1, 'done')", &[&winner])?);
    let started: String =
        client.query_one("SELECT sd_start($1, $2)", &[&CONTESTED, &loser])?.get(0);
    println!("{started}");

    heading("The backlog follows by itself: SELECT … FROM v_directives");
    table(server, QUEUE)?;

    heading("What comes next, and who holds what: SELECT * FROM sd_next()");
    for line in client.query("SELECT * FROM sd_next(p_session_id => $1)", &[&loser])? {
        println!("{}", line.get::<_, String>(0));
    }
    Ok(())
}

/// Both start the SD at the same moment; prints what each sees. Returns the winner and the loser.
fn race(server: &Server) -> Result<(String, String)> {
    let start = Barrier::new(RACERS.len());
    let mut answers = thread::scope(|scope| {
        let running: Vec<_> = RACERS
            .iter()
            .map(|(session, ..)| {
                let start = &start;
                scope.spawn(move || -> Result<(String, String)> {
                    // Connect first, but meet the other one even if that fails.
                    let client = connect(server, DATABASE);
                    start.wait();
                    let answer: String = client?
                        .query_one("SELECT sd_start($1, $2)", &[&CONTESTED, session])?
                        .get(0);
                    Ok(((*session).to_owned(), answer))
                })
            })
            .collect();
        running
            .into_iter()
            .map(|thread| thread.join().map_err(|_| anyhow!("a racing thread panicked"))?)
            .collect::<Result<Vec<_>>>()
    })?;
    for (session, answer) in &answers {
        println!("{session}: SELECT sd_start('{CONTESTED}', '{session}');\n{answer}\n");
    }
    answers.sort_by_key(|(_, answer)| !answer.starts_with('✅'));
    match answers.as_slice() {
        [(winner, won), (loser, lost)] if won.starts_with('✅') && lost.starts_with('❌') => {
            Ok((winner.clone(), loser.clone()))
        }
        _ => bail!("the race did not end with one winner and one loser"),
    }
}

fn heading(text: &str) {
    println!("\n── {text}\n");
}

fn table(server: &Server, sql: &str) -> Result<()> {
    let output = server
        .client_program("psql", DATABASE)
        .args(["-X", "-P", "pager=off", "-c", sql])
        .output()
        .context("could not run psql")?;
    if !output.status.success() {
        bail!("psql failed: {}", String::from_utf8_lossy(&output.stderr));
    }
    println!("{}", String::from_utf8_lossy(&output.stdout).trim_end());
    Ok(())
}

fn pretty(
    client: &mut Client,
    sql: &str,
    parameters: &[&(dyn postgres::types::ToSql + Sync)],
) -> Result<String> {
    let answer: serde_json::Value = client.query_one(sql, parameters)?.get(0);
    Ok(serde_json::to_string_pretty(&answer)?)
}
