//! The comparisons.

use std::time::Instant;

use anyhow::{Context, Result, ensure};

use postgres::Client;
use serde_json::Value;

use super::listen::{self, Listening};
use super::pgbench::Side;
use super::report::Goal;
use super::{
    ASYNCHRONOUS, BEATING, Bench, CLIENTS, DURABLE, connect, explain, filled, load, scripts,
};

impl Bench {
    pub(super) fn heartbeats_on_the_board(&mut self) -> Result<()> {
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
        self.find(1, what, [&rates[0], &rates[1]], "/s", "no-op C function", Goal::AtLeast(0.8));
        self.find(1, what, [&rates[0], &rates[2]], "/s", "durable bare UPDATE", Goal::AtLeast(8.0));
        let mut client = connect(&self.server, database)?;
        let bytes = [
            wal(&mut client, &scripts::heartbeat(sessions))?,
            wal(&mut client, &scripts::floor_heartbeat(sessions))?,
        ];
        self.find_once(
            1,
            "WAL of a heartbeat on the board",
            bytes,
            "bytes",
            "bare UPDATE",
            Goal::None,
        );
        Ok(())
    }

    pub(super) fn heartbeats_on_the_table(&mut self) -> Result<()> {
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
            self.find(2, &what, [&rates[0], &rates[1]], "/s", "bare UPDATE", Goal::AtLeast(0.9));
        }
        let mut client = connect(&self.table_server, database)?;
        let bytes = [
            wal(&mut client, &scripts::heartbeat(sessions))?,
            wal(&mut client, &scripts::floor_heartbeat(sessions))?,
        ];
        self.find_once(
            2,
            "WAL of a heartbeat on the table",
            bytes,
            "bytes",
            "bare UPDATE",
            Goal::None,
        );
        Ok(())
    }

    pub(super) fn cycles(&mut self) -> Result<()> {
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
            side(scripts::peer_cycle("claim_sd_with_all_checks", sessions, CLIENTS)),
            side(scripts::peer_cycle("claim_sd", sessions, CLIENTS)),
        ])?;
        let what = "claim and release";
        self.find(3, what, [&rates[0], &rates[1]], "/s", "the bare writes", Goal::AtLeast(0.85));
        let twice = Goal::AtLeast(2.0);
        self.find(3, what, [&rates[0], &rates[2]], "/s", "PL/pgSQL with the same checks", twice);
        self.find(3, what, [&rates[0], &rates[3]], "/s", "PL/pgSQL with few checks", twice);
        let bare = "the bare writes of a claim and a release";
        self.find(3, bare, [&rates[1], &rates[3]], "/s", "PL/pgSQL with few checks", Goal::None);
        let mut client = connect(&self.server, database)?;
        let bytes = [
            wal(&mut client, &scripts::cycle(sessions, CLIENTS))?,
            wal(&mut client, &scripts::floor_cycle(sessions, CLIENTS))?,
        ];
        let what = "WAL of a claim and a release";
        self.find_once(3, what, bytes, "bytes", "the bare writes", Goal::None);
        Ok(())
    }

    pub(super) fn refusals(&mut self) -> Result<()> {
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
            [&rates[0], &rates[1]],
            "/s",
            "bare SELECT by key",
            Goal::AtLeast(0.5),
        );
        Ok(())
    }

    pub(super) fn growth(&mut self) -> Result<()> {
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
        self.find(5, &what, [&cycles[0], &cycles[1]], "/s", &theirs, Goal::AtLeast(0.85));
        let what = format!("refusal with {many} SDs and sessions");
        self.find(5, &what, [&refusals[0], &refusals[1]], "/s", &theirs, Goal::AtLeast(0.85));
        Ok(())
    }

    pub(super) fn views(&mut self) -> Result<()> {
        let view = self.sizes.view;
        let big = filled(&self.server, "many", self.sizes.many, self.sizes.few / 2)?;
        let mut client = connect(&self.server, big)?;
        let plan = explain(
            &mut client,
            "EXPLAIN (FORMAT JSON) SELECT * FROM v_active_sessions WHERE sd_id = 'SD-77'",
        )?;
        let scans = plan.to_string().matches("Seq Scan").count() as f64;
        // One and none, so that the ratio says how many more there are.
        self.find_once(
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
        let times = self.plan.measure(2, |side| {
            let sql = [whole, bare][side];
            let plan =
                explain(&mut client, &format!("EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) {sql}"))?;
            plan[0]["Execution Time"].as_f64().context("EXPLAIN told no time")
        })?;
        let what = format!("v_active_sessions of {view}");
        self.find(
            6,
            &what,
            [&times[0], &times[1]],
            "ms",
            "bare scan with the same ages",
            Goal::AtMost(2.0),
        );
        Ok(())
    }

    pub(super) fn reaping(&mut self) -> Result<()> {
        let reaped = self.sizes.reaped;
        let database = filled(&self.server, "reap", reaped, reaped)?;
        let mut client = connect(&self.server, database)?;
        // The worker would be first.
        client.batch_execute("ALTER DATABASE reap SET pg_claims.auto_reap = off")?;
        let mut client = connect(&self.server, database)?;
        let works = [
            format!("SELECT cleanup_stale_sessions(NULL, {reaped})"),
            scripts::floor_reaping_of_sessions(),
            scripts::floor_reaping(),
        ];
        let times = self.plan.measure(works.len(), |side| {
            load::make_stale(&mut client, reaped)?;
            let begin = Instant::now();
            client.batch_execute(&works[side])?;
            let took = begin.elapsed().as_secs_f64() * 1000.0;
            load::check_all_ended(&mut client, side == 0)?;
            Ok(took)
        })?;
        let what = format!("reaping {reaped} stale claims");
        let thrice = Goal::AtMost(3.0);
        self.find(7, &what, [&times[0], &times[1]], "ms", "one UPDATE and INSERT", thrice);
        self.find(7, &what, [&times[0], &times[2]], "ms", "all that it writes, at once", thrice);
        let bare = "all that it writes, at once";
        self.find(7, bare, [&times[2], &times[1]], "ms", "one UPDATE and INSERT", Goal::None);
        Ok(())
    }

    pub(super) fn queue(&mut self) -> Result<()> {
        let many = self.sizes.many;
        let database = filled(&self.server, "queue", many, 0)?;
        let side = |script| Side {
            server: &self.server,
            database,
            script,
            clients: CLIENTS,
            options: ASYNCHRONOUS,
        };
        let sides = [side(scripts::next(many, CLIENTS)), side(scripts::floor_next(many, CLIENTS))];
        let mut admin = connect(&self.server, database)?;
        let rates = self.plan.measure(sides.len(), |turn| {
            // Tables of this size are vacuumed so seldom, and for so long, that one side would pay for the other.
            admin.batch_execute("VACUUM ANALYZE")?;
            sides[turn].run(&self.plan.folder, self.plan.seconds)
        })?;
        let what = format!("claim_next_sd and release with {many} SDs");
        self.find(
            8,
            &what,
            [&rates[0], &rates[1]],
            "/s",
            "SKIP LOCKED and the bare writes",
            Goal::AtLeast(0.7),
        );
        Ok(())
    }

    pub(super) fn held_snapshot(&mut self) -> Result<()> {
        let (sessions, seconds) = (self.sizes.sessions, self.sizes.held_seconds);
        let goal = Goal::AtLeast(0.9);
        let with_board = &self.server;
        let without = &self.table_server;
        let cases = [
            ("claims", with_board, "held", scripts::cycle(sessions, CLIENTS), goal),
            (
                "the bare writes",
                with_board,
                "held_bare",
                scripts::floor_cycle(sessions, CLIENTS),
                Goal::None,
            ),
            ("heartbeats on the board", with_board, "held", scripts::heartbeat(sessions), goal),
            ("heartbeats on the table", without, "held", scripts::heartbeat(sessions), goal),
            ("bare UPDATEs", without, "held_bare", scripts::floor_heartbeat(sessions), Goal::None),
        ];
        let mut found = Vec::new();
        for (what, server, name, script, goal) in cases {
            let database = filled(server, name, sessions, 0)?;
            let side = Side { server, database, script, clients: CLIENTS, options: ASYNCHRONOUS };
            let before = self.plan.in_turns(std::slice::from_ref(&side))?;
            let mut holder = connect(server, database)?;
            holder.batch_execute(
                "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM claude_sessions",
            )?;
            // Under load for as long as the snapshot is held.
            side.run(&self.plan.folder, seconds)?;
            let after = self.plan.in_turns(std::slice::from_ref(&side))?;
            holder.batch_execute("COMMIT")?;
            found.push((what, after, before, goal));
        }
        for (what, after, before, goal) in found {
            let what = format!("{what} after a snapshot was held for {seconds} s");
            self.find(9, &what, [&after[0], &before[0]], "/s", "before", goal);
        }
        Ok(())
    }

    pub(super) fn fleet(&mut self) -> Result<()> {
        let (fleet, seconds) = (self.sizes.fleet, self.sizes.held_seconds);
        for group in [50, 1] {
            let database = filled(&self.server, "fleet", fleet, 0)?;
            let seen = load::fleet(&self.server, database, fleet, group, seconds)?;
            let how = if group == 1 { "singly".into() } else { format!("in groups of {group}") };
            let what =
                format!("size of {fleet} beating sessions, {how}, after {seconds} s ({seen})");
            self.find_once(10, &what, seen.sizes, "MB", "before", Goal::AtMost(1.2));
        }
        Ok(())
    }

    pub(super) fn listeners(&mut self) -> Result<()> {
        let sessions = self.sizes.sessions;
        let database = filled(&self.server, "notify", sessions, 0)?;
        let listening = Listening::begin(&self.server, database, self.sizes.listeners)?;
        let side = Side {
            server: &self.server,
            database,
            script: scripts::cycle(sessions, CLIENTS),
            clients: CLIENTS,
            options: ASYNCHRONOUS,
        };
        let mut admin = connect(&self.server, database)?;
        let mut events = || -> Result<u64> {
            let count = "SELECT count(*) FROM session_lifecycle_events";
            Ok(admin.query_one(count, &[])?.get::<_, i64>(0).try_into()?)
        };
        let mut control = connect(&self.server, database)?;
        let (mut heard, mut all) = ([0; 2], [0; 2]);
        let rates = self.plan.measure(2, |notify| {
            // What the last run has left to be heard is not this one's.
            listening.settle(&mut control)?;
            listen::set_notify(&mut control, database, ["on", "off"][notify])?;
            let before = (listening.events(), events()?);
            let rate = side.run(&self.plan.folder, self.plan.seconds)?;
            heard[notify] += listening.events() - before.0;
            all[notify] += events()? - before.1;
            Ok(rate)
        })?;
        listening.settle(&mut control)?;
        listening.stop()?;
        ensure!(heard[1] == 0, "events were announced in spite of pg_claims.notify = off");
        let what = format!(
            "claim and release with {} listeners, each of whom meanwhile heard of {} of {} events",
            self.sizes.listeners, heard[0], all[0]
        );
        self.find(
            11,
            &what,
            [&rates[0], &rates[1]],
            "/s",
            "pg_claims.notify off",
            Goal::AtLeast(0.9),
        );
        Ok(())
    }
}

/// How many bytes of WAL a script's statements write, apart from their commits: the median of many times,
/// for the first time that a page is written after a checkpoint it is there as a whole.
fn wal(client: &mut Client, script: &str) -> Result<f64> {
    let mut all = Vec::new();
    for n in 1..=101 {
        let mut bytes = 0.0;
        for line in script.lines().filter(|line| !line.starts_with('\\')) {
            let sql = line.replace(":n", &n.to_string()).replace(":c", &n.to_string());
            let plan = explain(client, &format!("EXPLAIN (ANALYZE, WAL, FORMAT JSON) {sql}"))?;
            bytes += wal_of(&plan[0]["Plan"])?;
        }
        all.push(bytes);
    }
    all.sort_by(f64::total_cmp);
    Ok(all[all.len() / 2])
}

/// What a plan wrote. Its topmost node counts what ran within it; a data-modifying CTE that nothing reads
/// runs after that, and counts for itself.
fn wal_of(plan: &Value) -> Result<f64> {
    let bytes = |node: &Value| node["WAL Bytes"].as_f64().context("EXPLAIN told no WAL");
    let text = plan.to_string();
    let mut sum = bytes(plan)?;
    for part in plan["Plans"].as_array().into_iter().flatten() {
        let cte = part["Subplan Name"].as_str().and_then(|name| name.strip_prefix("CTE "));
        if cte.is_some_and(|cte| !text.contains(&format!("\"CTE Name\":\"{cte}\""))) {
            sum += bytes(part)?;
        }
    }
    Ok(sum)
}
