//! `cargo xtask bench`: what the extension costs, compared with what it cannot do without.
//!
//! Every comparison runs both sides on one server, in turns, and takes the median of each side. A goal
//! that is missed is told as missed.

mod load;
mod pgbench;
mod report;
mod scripts;

use std::fs;
use std::time::Instant;

use anyhow::{Context, Result};
use pg_claims_tests::{Server, ServerUser};
use postgres::{Client, NoTls};

use crate::interrupt;
use crate::layout::Layout;
use crate::lock::Lock;
use crate::progress;
use crate::setup::{self, Choice};
use pgbench::{Plan, Side};
use report::{Finding, Goal};

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
    "pg_claims.max_sessions = 200000",
    "shared_buffers = 2GB",
    "max_wal_size = 8GB",
    "checkpoint_timeout = 1h",
    "max_connections = 300",
    "autovacuum_naptime = 5s",
    "jit = off",
    "log_statement = 'none'",
];

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
    let mut without_board: Vec<&str> = SETTINGS.to_vec();
    without_board.push("pg_claims.max_sessions = 0");
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
    let comparisons: [(u8, Comparison); 11] = [
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
    ];
    for (number, compare) in comparisons {
        if options.only.is_empty() || options.only.contains(&number) {
            progress::step(format_args!("comparison {number}"));
            compare(&mut bench)?;
            interrupt::check()?;
        }
    }
    let table = report::table(&bench.findings);
    println!("\n{table}");
    if options.quick || !options.only.is_empty() {
        println!("A part, or a quick run: nothing was written, and its numbers say nothing.");
    } else {
        let minutes = begin.elapsed().as_secs() / 60;
        bench.write(layout, &table, minutes)?;
    }
    bench.server.discard()?;
    bench.table_server.discard()
}

impl Bench {
    fn find(
        &mut self,
        number: u8,
        what: &str,
        rates: [f64; 2],
        unit: &str,
        theirs: &str,
        goal: Goal,
    ) {
        let told = |rate: f64| {
            if rate < 100.0 { format!("{rate:.2} {unit}") } else { format!("{rate:.0} {unit}") }
        };
        let finding = Finding {
            number,
            what: what.into(),
            ours: told(rates[0]),
            theirs: format!("{theirs}: {}", told(rates[1])),
            ratio: rates[0] / rates[1],
            goal,
        };
        progress::note(format_args!(
            "{what}: {}, {} (ratio {:.2}, goal {goal})",
            finding.ours, finding.theirs, finding.ratio
        ));
        self.findings.push(finding);
    }

    fn heartbeats_on_the_board(&mut self) -> Result<()> {
        let sessions = self.sizes.sessions;
        let database = filled(&self.server, "board", sessions, 0)?;
        let mut client = connect(&self.server, database)?;
        client.batch_execute(
            "SELECT heartbeat_sessions(array_agg(session_id)) FROM claude_sessions",
        )?;
        let side = |script, options| Side {
            server: &self.server,
            database,
            script,
            clients: BEATING,
            options,
        };
        let rates = self.plan.in_turns(&[
            side(scripts::heartbeat(sessions), DURABLE),
            side(scripts::no_op(sessions), DURABLE),
            side(scripts::floor_heartbeat(sessions), DURABLE),
        ])?;
        let what = "heartbeat on the board";
        self.find(1, what, [rates[0], rates[1]], "/s", "no-op C function", Goal::AtLeast(0.8));
        self.find(1, what, [rates[0], rates[2]], "/s", "durable bare UPDATE", Goal::AtLeast(8.0));
        Ok(())
    }

    fn heartbeats_on_the_table(&mut self) -> Result<()> {
        let sessions = self.sizes.sessions;
        let database = filled(&self.table_server, "beats", sessions, 0)?;
        for (how, options) in [("durable", DURABLE), ("asynchronous", ASYNCHRONOUS)] {
            let side = |script| Side {
                server: &self.table_server,
                database,
                script,
                clients: BEATING,
                options,
            };
            let rates = self.plan.in_turns(&[
                side(scripts::heartbeat(sessions)),
                side(scripts::floor_heartbeat(sessions)),
            ])?;
            let what = format!("heartbeat on the table, {how}");
            self.find(2, &what, [rates[0], rates[1]], "/s", "bare UPDATE", Goal::AtLeast(0.9));
        }
        Ok(())
    }

    fn cycles(&mut self) -> Result<()> {
        let sessions = self.sizes.sessions;
        let database = filled(&self.server, "cycle", sessions, 0)?;
        let side = |script| Side {
            server: &self.server,
            database,
            script,
            clients: CLIENTS,
            options: ASYNCHRONOUS,
        };
        let rates = self.plan.in_turns(&[
            side(scripts::cycle(sessions, CLIENTS)),
            side(scripts::floor_cycle(sessions, CLIENTS)),
            side(scripts::peer_cycle(sessions, CLIENTS)),
        ])?;
        let what = "claim and release";
        self.find(3, what, [rates[0], rates[1]], "/s", "the bare writes", Goal::AtLeast(0.85));
        self.find(3, what, [rates[0], rates[2]], "/s", "PL/pgSQL", Goal::AtLeast(2.0));
        Ok(())
    }

    fn refusals(&mut self) -> Result<()> {
        let sessions = self.sizes.sessions;
        let held = sessions / 2;
        let database = filled(&self.server, "refusal", sessions, held)?;
        let side = |script| Side {
            server: &self.server,
            database,
            script,
            clients: BEATING,
            options: DURABLE,
        };
        let rates = self.plan.in_turns(&[
            side(scripts::refusal(sessions, held)),
            side(scripts::floor_select(sessions, held)),
        ])?;
        self.find(
            4,
            "refusal",
            [rates[0], rates[1]],
            "/s",
            "bare SELECT by key",
            Goal::AtLeast(0.5),
        );
        Ok(())
    }

    fn growth(&mut self) -> Result<()> {
        let (few, many) = (self.sizes.few, self.sizes.many);
        let held = few / 2;
        let small = filled(&self.server, "few", few, held)?;
        let big = filled(&self.server, "many", many, held)?;
        let side = |database, script, options| Side {
            server: &self.server,
            database,
            script,
            clients: CLIENTS,
            options,
        };
        // Of the SDs that nobody holds.
        let cycles = self.plan.in_turns(&[
            side(big, scripts::cycle(many - held, CLIENTS), ASYNCHRONOUS),
            side(small, scripts::cycle(few - held, CLIENTS), ASYNCHRONOUS),
        ])?;
        let refusals = self.plan.in_turns(&[
            side(big, scripts::refusal(many, held), DURABLE),
            side(small, scripts::refusal(few, held), DURABLE),
        ])?;
        let theirs = format!("with {few}");
        let what = format!("claim and release with {many} SDs and sessions");
        self.find(5, &what, [cycles[0], cycles[1]], "/s", &theirs, Goal::AtLeast(0.85));
        let what = format!("refusal with {many} SDs and sessions");
        self.find(5, &what, [refusals[0], refusals[1]], "/s", &theirs, Goal::AtLeast(0.85));
        Ok(())
    }

    fn views(&mut self) -> Result<()> {
        let view = self.sizes.view;
        let big = filled(&self.server, "many", self.sizes.many, self.sizes.few / 2)?;
        let mut client = connect(&self.server, big)?;
        let plan = explain(
            &mut client,
            "EXPLAIN (FORMAT JSON) SELECT * FROM v_active_sessions WHERE sd_id = 'SD-77'",
        )?;
        let scans = plan.to_string().matches("Seq Scan").count() as f64;
        // One and none, so that the ratio says how many more there are.
        self.find(
            6,
            "tables read whole for one SD's session, plus 1",
            [scans + 1.0, 1.0],
            "",
            "none, plus 1",
            Goal::AtMost(1.0),
        );

        let database = filled(&self.server, "view", view, view / 2)?;
        let mut client = connect(&self.server, database)?;
        let whole = "SELECT * FROM v_active_sessions";
        let bare = "SELECT id, session_id, sd_id, track, tty, pid, hostname, codebase, claimed_at, heartbeat_at,
                    status, metadata, created_at,
                    trunc(GREATEST(EXTRACT(EPOCH FROM clock_timestamp() - heartbeat_at), 0), 3),
                    trunc(GREATEST(EXTRACT(EPOCH FROM clock_timestamp() - heartbeat_at), 0) / 60, 2),
                    trunc(GREATEST(EXTRACT(EPOCH FROM heartbeat_at + interval '5 minutes' - clock_timestamp()), 0), 3),
                    CASE WHEN heartbeat_at < clock_timestamp() - interval '5 minutes' THEN 'stale' ELSE status END,
                    trunc(GREATEST(EXTRACT(EPOCH FROM clock_timestamp() - claimed_at), 0) / 60, 2),
                    trunc(EXTRACT(EPOCH FROM clock_timestamp() - heartbeat_at)) || 's ago'
               FROM floor.claude_sessions WHERE status <> 'released'";
        let times = self.plan.medians(2, |side| {
            let sql = [whole, bare][side];
            let plan =
                explain(&mut client, &format!("EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) {sql}"))?;
            plan[0]["Execution Time"].as_f64().context("EXPLAIN told no time")
        })?;
        let what = format!("v_active_sessions of {view}");
        self.find(
            6,
            &what,
            [times[0], times[1]],
            "ms",
            "bare scan with the same ages",
            Goal::AtMost(2.0),
        );
        Ok(())
    }

    fn reaping(&mut self) -> Result<()> {
        let reaped = self.sizes.reaped;
        let database = filled(&self.server, "reap", reaped, reaped)?;
        let mut client = connect(&self.server, database)?;
        // The worker would be first.
        client.batch_execute("ALTER DATABASE reap SET pg_claims.auto_reap = off")?;
        let mut client = connect(&self.server, database)?;
        let times = self.plan.medians(2, |side| {
            load::make_stale(&mut client, reaped)?;
            let work = if side == 0 {
                format!("SELECT cleanup_stale_sessions(NULL, {reaped})")
            } else {
                "WITH s AS (
                     UPDATE floor.claude_sessions
                        SET sd_id = NULL, claim_id = NULL, claimed_at = NULL, status = 'idle',
                            released_at = clock_timestamp(), release_reason = 'reaped', updated_at = clock_timestamp()
                      WHERE sd_id IS NOT NULL AND heartbeat_at < clock_timestamp() - interval '5 minutes'
                  RETURNING session_id)
                 INSERT INTO floor.session_lifecycle_events (event_type, session_id, actor, reason)
                 SELECT 'reaped', session_id, current_user, 'reaped' FROM s".into()
            };
            let begin = Instant::now();
            client.batch_execute(&work)?;
            let took = begin.elapsed().as_secs_f64() * 1000.0;
            load::check_all_ended(&mut client, side == 0)?;
            Ok(took)
        })?;
        let what = format!("reaping {reaped} stale claims");
        self.find(7, &what, [times[0], times[1]], "ms", "one UPDATE and INSERT", Goal::AtMost(3.0));
        Ok(())
    }

    fn queue(&mut self) -> Result<()> {
        let many = self.sizes.many;
        let database = filled(&self.server, "queue", many, 0)?;
        let side = |script| Side {
            server: &self.server,
            database,
            script,
            clients: CLIENTS,
            options: ASYNCHRONOUS,
        };
        let rates = self.plan.in_turns(&[side(scripts::next()), side(scripts::floor_next())])?;
        let what = format!("claim_next_sd and release with {many} SDs");
        self.find(
            8,
            &what,
            [rates[0], rates[1]],
            "/s",
            "SKIP LOCKED and the bare writes",
            Goal::AtLeast(0.7),
        );
        Ok(())
    }

    fn held_snapshot(&mut self) -> Result<()> {
        let (sessions, seconds) = (self.sizes.sessions, self.sizes.held_seconds);
        let cases = [
            ("claims", &self.server, "held", scripts::cycle(sessions, CLIENTS)),
            ("heartbeats on the board", &self.server, "held", scripts::heartbeat(sessions)),
            ("heartbeats on the table", &self.table_server, "held", scripts::heartbeat(sessions)),
        ];
        let mut found = Vec::new();
        for (what, server, name, script) in cases {
            let database = filled(server, name, sessions, 0)?;
            let side = Side { server, database, script, clients: CLIENTS, options: ASYNCHRONOUS };
            let before = self.plan.in_turns(std::slice::from_ref(&side))?[0];
            let mut holder = connect(server, database)?;
            holder.batch_execute(
                "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM claude_sessions",
            )?;
            // Under load for as long as the snapshot is held.
            side.run(&self.plan.folder, seconds)?;
            let after = self.plan.in_turns(std::slice::from_ref(&side))?[0];
            holder.batch_execute("COMMIT")?;
            found.push((what, [after, before]));
        }
        for (what, rates) in found {
            let what = format!("{what} after a snapshot was held for {seconds} s");
            self.find(9, &what, rates, "/s", "before", Goal::AtLeast(0.9));
        }
        Ok(())
    }

    fn fleet(&mut self) -> Result<()> {
        let (fleet, seconds) = (self.sizes.fleet, self.sizes.held_seconds);
        for group in [50, 1] {
            let database = filled(&self.server, "fleet", fleet, 0)?;
            let seen = load::fleet(&self.server, database, fleet, group, seconds)?;
            let how = if group == 1 { "singly".into() } else { format!("in groups of {group}") };
            let what =
                format!("size of {fleet} beating sessions, {how}, after {seconds} s ({seen})");
            self.find(10, &what, seen.sizes, "MB", "before", Goal::AtMost(1.2));
        }
        Ok(())
    }

    fn listeners(&mut self) -> Result<()> {
        let sessions = self.sizes.sessions;
        let database = filled(&self.server, "notify", sessions, 0)?;
        let listening = load::listen(&self.server, database, self.sizes.listeners)?;
        let side = Side {
            server: &self.server,
            database,
            script: scripts::cycle(sessions, CLIENTS),
            clients: CLIENTS,
            options: ASYNCHRONOUS,
        };
        let mut admin = connect(&self.server, database)?;
        let rates = self.plan.medians(2, |notify| {
            let value = ["on", "off"][notify];
            admin.batch_execute(&format!(
                "ALTER DATABASE {database} SET pg_claims.notify = {value}"
            ))?;
            side.run(&self.plan.folder, self.plan.seconds)
        })?;
        let heard = listening.stop();
        let what = format!(
            "claim and release with {} listeners, who heard {heard} messages",
            self.sizes.listeners
        );
        self.find(
            11,
            &what,
            [rates[0], rates[1]],
            "/s",
            "pg_claims.notify off",
            Goal::AtLeast(0.9),
        );
        Ok(())
    }

    fn write(&self, layout: &Layout, table: &str, minutes: u64) -> Result<()> {
        let mut client = connect(&self.server, "postgres")?;
        let version: String = client.query_one("SELECT version()", &[])?.get(0);
        let docs = layout.root().join("docs");
        fs::write(docs.join("benchmarks.svg"), report::chart(&self.findings))?;
        let text = format!(
            "# Benchmarks\n\nWritten by `cargo xtask bench`, which took {minutes} minutes. Trust the ratios: both sides of each ran on\n\
             one server, in turns of {seconds} s, {rounds} each; the number is the median.\n\n{table}\n\
             ![How each ratio stands to its goal](benchmarks.svg)\n\n## How\n\n\
             - Machine: {machine}.\n- Server: {version}, {settings}.\n\
             - Claims: {CLIENTS} clients, asynchronous commit; heartbeats: {BEATING} clients; pgbench with prepared statements.\n\
             - {sessions} sessions and as many SDs, unless said otherwise.\n\
             - The bare writes are the rows that a claim and a release write, as two statements with data-modifying\n  \
               CTEs on tables of the same columns and indexes, without any check. The PL/pgSQL is in\n  `xtask/src/bench/floor.sql`.\n\
             - The no-op is `octet_length()` of the same argument.\n",
            seconds = self.plan.seconds,
            rounds = self.plan.rounds,
            machine = load::machine(),
            settings = SETTINGS.join(", "),
            sessions = self.sizes.sessions,
        );
        fs::write(docs.join("benchmarks.md"), text)?;
        println!("Written: docs/benchmarks.md, docs/benchmarks.svg");
        Ok(())
    }
}

fn connect(server: &Server, database: &str) -> Result<Client> {
    server.config(database).connect(NoTls).context("could not connect")
}

fn explain(client: &mut Client, sql: &str) -> Result<serde_json::Value> {
    Ok(client.query_one(sql, &[])?.get(0))
}

/// A database of that name with so many sessions and SDs, of which the last `held` hold each other; and
/// the same in the tables that are compared with.
fn filled<'a>(server: &Server, name: &'a str, count: usize, held: usize) -> Result<&'a str> {
    let mut admin = connect(server, "postgres")?;
    if admin.query_opt("SELECT FROM pg_database WHERE datname = $1", &[&name])?.is_some() {
        if name != "fleet" {
            return Ok(name);
        }
        admin.batch_execute("DROP DATABASE fleet WITH (FORCE)")?;
    }
    admin.batch_execute(&format!("CREATE DATABASE {name}"))?;
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
    // Whoever holds an SD must live until the end, without beating.
    client.batch_execute(&format!("ALTER DATABASE {name} SET pg_claims.stale_after = '1d'"))?;
    client.batch_execute("VACUUM ANALYZE")?;
    client.batch_execute("CHECKPOINT")?;
    Ok(name)
}
