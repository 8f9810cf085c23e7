//! `cargo xtask bench`: what the extension costs, compared with what it cannot do without.
//!
//! Both sides of a comparison run on one server, most of them in turns; [`method`] tells how each is
//! measured. A goal that is missed is told as missed.

mod chart;
mod compare;
mod cpu;
mod listen;
mod load;
mod method;
mod pgbench;
mod plan;
mod report;
mod scripts;
mod users;
mod work;

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use pg_claims_tests::{Server, ServerUser};
use postgres::{Client, NoTls};

use crate::interrupt;
use crate::layout::Layout;
use crate::lock::Lock;
use crate::progress;
use crate::setup::{self, Choice};
use pgbench::Plan;
use report::{Finding, Goal, Measured};

/// What was asked for.
pub struct Options {
    /// Whether only to see that all of it works.
    pub quick: bool,
    /// The comparisons to run; all if there are none.
    pub only: Vec<u8>,
}

/// How much there is of everything.
struct Sizes {
    sessions: usize,
    few: usize,
    many: usize,
    view: usize,
    reaped: usize,
    fleet: usize,
    held_seconds: u64,
    listeners: usize,
}

const FULL: Sizes = Sizes {
    sessions: 20_000,
    few: 1_000,
    many: 1_000_000,
    view: 100_000,
    reaped: 10_000,
    fleet: 100_000,
    held_seconds: 300,
    listeners: 100,
};

const QUICK: Sizes = Sizes {
    sessions: 400,
    few: 200,
    many: 2_000,
    view: 1_000,
    reaped: 100,
    fleet: 500,
    held_seconds: 2,
    listeners: 5,
};

const SETTINGS: [&str; 10] = [
    "shared_preload_libraries = 'pg_claims'",
    "pg_claims.restart_grace = off",
    // Twice as many as beat in any comparison and more: a database that is dropped keeps its places for a while.
    "pg_claims.max_sessions = 400000",
    "shared_buffers = 2GB",
    "max_wal_size = 8GB",
    "checkpoint_timeout = 1h",
    "max_connections = 300",
    "autovacuum_naptime = 5s",
    "jit = off",
    "log_statement = 'none'",
];

/// What differs on the other server.
const SETTINGS_WITHOUT_BOARD: [&str; 1] = ["pg_claims.max_sessions = 0"];

const ASYNCHRONOUS: &str = "-c synchronous_commit=off";
const DURABLE: &str = "-c synchronous_commit=on";

/// Clients of a comparison of claims.
const CLIENTS: usize = 8;

/// Clients of a comparison of heartbeats.
const BEATING: usize = 2;

/// One of the comparisons.
type Comparison = fn(&mut Bench) -> Result<()>;

struct Bench {
    sizes: &'static Sizes,
    plan: Plan,
    /// With a heartbeat board.
    server: Server,
    /// Without one.
    table_server: Server,
    findings: Vec<Finding>,
}

/// Whether this program was built in [`PROFILE`], as its clients must be.
pub const IS_OPTIMISED: bool = !cfg!(debug_assertions);

/// The profile of Cargo.toml for that: no other command waits for it to be built.
const PROFILE: &str = "clients";

/// Replaces this program by itself, built in [`PROFILE`], with the same arguments.
pub fn run_optimised(layout: &Layout) -> Result<()> {
    progress::step("building the benchmark's clients (a minute or two the first time)");
    let error = Command::new(env!("CARGO"))
        .args(["run", "--quiet", "--profile", PROFILE, "--package", "xtask", "--manifest-path"])
        .arg(layout.root().join("Cargo.toml"))
        .arg("--")
        .args(std::env::args_os().skip(1))
        .exec();
    Err(error).context("could not run cargo")
}

/// Sets up, compares, prints the table and writes the report.
pub fn run(layout: &Layout, choice: &Choice, options: &Options) -> Result<()> {
    let _lock = Lock::take(layout)?;
    interrupt::watch()?;
    let installation = setup::run(layout, choice)?;
    let sizes = if options.quick { &QUICK } else { &FULL };
    let work_dir = layout.servers().join("bench");
    Server::remove_leftovers(&installation, &work_dir)?;
    ServerUser::create_shared_dir(&work_dir)?;
    progress::step("starting throw-away servers");
    // The later of two lines counts.
    let without_board = [&SETTINGS[..], &SETTINGS_WITHOUT_BOARD].concat();
    let folder = work_dir.join("scripts");
    ServerUser::create_shared_dir(&folder)?;
    let mut bench = Bench {
        sizes,
        plan: Plan {
            folder,
            seconds: if options.quick { 1 } else { 8 },
            rounds: if options.quick { 1 } else { 5 },
        },
        server: Server::create(&installation, &work_dir.join("board"), &SETTINGS)?,
        table_server: Server::create(&installation, &work_dir.join("table"), &without_board)?,
        findings: Vec::new(),
    };
    let begin = Instant::now();
    let comparisons: [(u8, Comparison); 13] = [
        (1, Bench::heartbeats_on_the_board),
        (2, Bench::heartbeats_on_the_table),
        (3, Bench::cycles),
        (4, Bench::refusals),
        (5, Bench::growth),
        (6, Bench::views),
        (7, Bench::reaping),
        (8, Bench::queue),
        (9, Bench::held_snapshot),
        (10, Bench::fleet),
        (11, Bench::listeners),
        (12, Bench::bound_backlog),
        (13, Bench::triggers),
    ];
    for (number, compare) in comparisons {
        if options.only.is_empty() || options.only.contains(&number) {
            progress::step(format_args!("comparison {number}"));
            compare(&mut bench)?;
            drop_databases(&bench.server)?;
            drop_databases(&bench.table_server)?;
            interrupt::check()?;
        }
    }
    let table = report::table(&bench.findings);
    println!("\n{table}");
    let is_part = options.quick || !options.only.is_empty();
    let folder = if is_part { layout.target().join("bench") } else { layout.root().join("docs") };
    bench.write(&folder, &table, begin.elapsed().as_secs() / 60)?;
    if is_part {
        println!("A part, or a quick run: its numbers say nothing.");
    }
    bench.server.discard()?;
    bench.table_server.discard()
}

impl Bench {
    fn find(
        &mut self,
        number: u8,
        what: &str,
        measured: [&Measured; 2],
        unit: &str,
        against: &str,
        goal: Goal,
    ) {
        let told = |rate: f64| {
            if rate < 100.0 { format!("{rate:.2} {unit}") } else { format!("{rate:.0} {unit}") }
        };
        let finding = Finding {
            number,
            what: what.into(),
            ours: told(measured[0].median()),
            against: against.into(),
            theirs: told(measured[1].median()),
            ratios: measured[0].ratio_to(measured[1]),
            goal,
        };
        progress::note(format_args!(
            "{what}: {}, {against}: {} (ratio {:.2}, goal {goal})",
            finding.ours,
            finding.theirs,
            finding.ratio()
        ));
        self.findings.push(finding);
    }

    /// The same for what is measured once.
    fn find_once(
        &mut self,
        number: u8,
        what: &str,
        values: [f64; 2],
        unit: &str,
        against: &str,
        goal: Goal,
    ) {
        let [ours, other] = values.map(Measured::once);
        self.find(number, what, [&ours, &other], unit, against, goal);
    }

    fn write(&self, folder: &Path, table: &str, minutes: u64) -> Result<()> {
        let mut client = connect(&self.server, "postgres")?;
        let versions = client.query_one(
            "SELECT version(), default_version FROM pg_available_extensions WHERE name = 'pg_claims'",
            &[],
        )?;
        let (server, extension): (String, String) = (versions.get(0), versions.get(1));
        fs::create_dir_all(folder)?;
        fs::write(folder.join("benchmarks.svg"), chart::chart(&self.findings))?;
        let text = format!(
            "# Benchmarks\n\nWritten by `cargo xtask bench`, which took {minutes} minutes. Trust the ratios: both sides of each ran on\n\
             one server. How each was measured is told below.\n\n{table}\n\
             ![How each ratio stands to its goal](benchmarks.svg)\n\n## How\n\n{method}",
            method = method::text(self.sizes, &self.plan, &server, &extension),
        );
        fs::write(folder.join("benchmarks.md"), text)?;
        println!("Written: benchmarks.md and benchmarks.svg in {}", folder.display());
        Ok(())
    }
}

fn connect(server: &Server, database: &str) -> Result<Client> {
    server.config(database).connect(NoTls).context("could not connect")
}

/// Removes what a comparison has made: else, while the next one is measured, workers would go on looking
/// for stale sessions there, and autovacuum cleaning up.
fn drop_databases(server: &Server) -> Result<()> {
    let mut admin = connect(server, "postgres")?;
    let ours =
        "SELECT datname::text FROM pg_database WHERE NOT datistemplate AND datname <> 'postgres'";
    for row in admin.query(ours, &[])? {
        let name: String = row.get(0);
        admin.batch_execute(&format!("DROP DATABASE {name} WITH (FORCE)"))?;
    }
    Ok(())
}

/// Removes what earlier work has left behind, and writes everything to disk, so that whoever comes next
/// pays for neither.
fn vacuum(client: &mut Client) -> Result<()> {
    client.batch_execute("VACUUM (ANALYZE)")?;
    client.batch_execute("CHECKPOINT")?;
    Ok(())
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(120);
    while !is_so()? {
        ensure!(Instant::now() < end, "waited in vain for {what}");
        thread::sleep(Duration::from_millis(300));
    }
    Ok(())
}

/// A new database of that name with so many sessions and SDs, of which the last `held` hold each other; and
/// the same in the tables that are compared with.
fn filled<'a>(server: &Server, name: &'a str, count: usize, held: usize) -> Result<&'a str> {
    let mut admin = connect(server, "postgres")?;
    admin.batch_execute(&format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)"))?;
    admin.batch_execute(&format!("CREATE DATABASE {name}"))?;
    // Whoever holds an SD must live until the end, without beating. Set ahead of the extension, as a worker
    // that is there already would not hear of it. All others have the default lease, after half of
    // which the board is written to the table.
    if held > 0 {
        admin.batch_execute(&format!("ALTER DATABASE {name} SET pg_claims.stale_after = '1d'"))?;
    }
    let mut client = connect(server, name)?;
    client.batch_execute("CREATE EXTENSION pg_claims")?;
    client.batch_execute(include_str!("floor.sql"))?;
    let first_held = count - held;
    client.batch_execute(&format!(
        "SET session_replication_role = replica;
         INSERT INTO strategic_directives_v2 (sd_id, title, sequence_rank, is_working_on, active_session_id)
         SELECT 'SD-' || n, 'Directive ' || n, n, n > {first_held}, CASE WHEN n > {first_held} THEN 'session-' || n END
           FROM generate_series(1, {count}) n;
         INSERT INTO sd_claims (claim_id, sd_id, session_id)
         SELECT n, 'SD-' || n, 'session-' || n FROM generate_series({first_held} + 1, {count}) n;
         SELECT setval('sd_claims_claim_id_seq', {count});
         INSERT INTO claude_sessions (session_id, sd_id, claim_id, claimed_at, status)
         SELECT 'session-' || n, CASE WHEN n > {first_held} THEN 'SD-' || n END,
                CASE WHEN n > {first_held} THEN n END, CASE WHEN n > {first_held} THEN clock_timestamp() END,
                CASE WHEN n > {first_held} THEN 'active' ELSE 'idle' END
           FROM generate_series(1, {count}) n;
         INSERT INTO floor.claude_sessions SELECT * FROM claude_sessions;
         INSERT INTO floor.strategic_directives_v2 SELECT * FROM strategic_directives_v2;
         INSERT INTO peer.claude_sessions SELECT * FROM claude_sessions;
         INSERT INTO peer.strategic_directives_v2 SELECT * FROM strategic_directives_v2;
         RESET session_replication_role"
    ))?;
    vacuum(&mut client)?;
    Ok(name)
}
