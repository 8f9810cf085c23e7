//! The comparisons.

use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::listen::{self, Listening, Sending};
use super::pgbench::Side;
use super::plan::{buffers, explain, wal, whole_scans};
use super::report::Goal;
use super::work::Work;
use super::{
    ASYNCHRONOUS, BEATING, Bench, CLIENTS, DURABLE, connect, filled, load, scripts, vacuum,
};

/// A claim and a release in the tables that the extension is compared with.
const BARE_CYCLES: Work = Work::Cycles("floor.sd_claims");
const PEER_CYCLES: Work = Work::Cycles("peer.sd_claims");
const REFUSALS: Work = Work::Refusals("sd_claims");

impl Bench {
    pub(super) fn heartbeats_on_the_board(&mut self) -> Result<()> {
        let sessions = self.sizes.sessions;
        let database = filled(&self.server, "board", sessions, 0)?;
        let mut client = connect(&self.server, database)?;
        load::beat_all(&mut client)?;
        let side = |script, options| Side {
            server: &self.server,
            database,
            script,
            work: Work::Other,
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
                work: Work::Other,
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
        let side = |script, work| Side::asynchronous(&self.server, database, script, work);
        let peer_cycle = |claim| scripts::peer_cycle(claim, sessions, CLIENTS);
        let rates = self.plan.in_vacuumed_turns(&[
            Side::cycle(&self.server, database, sessions),
            side(scripts::floor_cycle(sessions, CLIENTS), BARE_CYCLES),
            side(peer_cycle("claim_sd_with_all_checks"), PEER_CYCLES),
            side(peer_cycle("claim_sd"), PEER_CYCLES),
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
        let side = |script, work| Side {
            server: &self.server,
            database,
            script,
            work,
            clients: BEATING,
            options: DURABLE,
        };
        let rates = self.plan.in_turns(&[
            side(scripts::refusal(sessions, held), REFUSALS),
            side(scripts::floor_select(sessions, held), Work::Other),
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
        let small = filled(&self.server, "few", few, few / 2)?;
        let big = filled(&self.server, "many", many, many / 2)?;
        // Of the half that nobody holds.
        let cycle = |database, count: usize| Side::cycle(&self.server, database, count - count / 2);
        let cycles = self.plan.in_vacuumed_turns(&[cycle(big, many), cycle(small, few)])?;
        // Of the other one.
        let side = |database, script, work| Side {
            server: &self.server,
            database,
            script,
            work,
            clients: CLIENTS,
            options: DURABLE,
        };
        let refusal =
            |database, count: usize| side(database, scripts::refusal(count, count / 2), REFUSALS);
        let select = |database, count: usize| {
            side(database, scripts::floor_select(count, count / 2), Work::Other)
        };
        let refusals = self.plan.in_vacuumed_turns(&[
            refusal(big, many),
            refusal(small, few),
            select(big, many),
            select(small, few),
        ])?;
        let theirs = format!("with {few}");
        let what = format!("claim and release with {many} SDs and sessions");
        self.find(5, &what, [&cycles[0], &cycles[1]], "/s", &theirs, Goal::AtLeast(0.85));
        let what = format!("refusal with {many} SDs and sessions");
        self.find(5, &what, [&refusals[0], &refusals[1]], "/s", &theirs, Goal::AtLeast(0.85));
        let what = format!("bare SELECT by key of {many} sessions");
        self.find(5, &what, [&refusals[2], &refusals[3]], "/s", &format!("of {few}"), Goal::None);
        Ok(())
    }

    pub(super) fn views(&mut self) -> Result<()> {
        self.view_of_one()?;
        let view = self.sizes.view;
        let database = filled(&self.server, "view", view, view / 2)?;
        let mut client = connect(&self.server, database)?;
        // As in production, each has its place on the board.
        load::beat_all(&mut client)?;
        vacuum(&mut client)?;
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
            let plan = explain(&mut client, "ANALYZE, TIMING OFF", sql)?;
            plan["Execution Time"].as_f64().context("EXPLAIN told no time")
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

    /// One SD's session among many and among few.
    fn view_of_one(&mut self) -> Result<()> {
        let (few, many) = (self.sizes.few, self.sizes.many);
        let big = filled(&self.server, "many", many, many / 2)?;
        let small = filled(&self.server, "few", few, few / 2)?;
        let (mut whole, mut touched) = ([0; 2], [0.0; 2]);
        for (side, (database, count)) in [(big, many), (small, few)].into_iter().enumerate() {
            let mut client = connect(&self.server, database)?;
            let sql = format!("SELECT * FROM v_active_sessions WHERE sd_id = 'SD-{count}'");
            // The first time the connection also looks up what the functions need to know.
            ensure!(client.query(&sql, &[])?.len() == 1, "SD-{count} has no session in {database}");
            let plan = explain(&mut client, "ANALYZE, BUFFERS", &sql)?;
            whole[side] = whole_scans(&plan["Plan"]);
            touched[side] = buffers(&plan["Plan"])?;
        }
        // One and none, so that the ratio says how many more there are.
        self.find_once(
            6,
            &format!("scans without an index for one SD's session of {many}, plus 1"),
            [whole[0] as f64 + 1.0, 1.0],
            "",
            "none, plus 1",
            Goal::AtMost(1.0),
        );
        self.find_once(
            6,
            &format!("pages touched for one SD's session of {many}"),
            touched,
            "",
            &format!("of {few}"),
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
        let side = |script, work| Side::asynchronous(&self.server, database, script, work);
        let rates = self.plan.in_vacuumed_turns(&[
            side(scripts::next(many, CLIENTS), Work::CYCLES),
            side(scripts::floor_next(many, CLIENTS), BARE_CYCLES),
        ])?;
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
        let cycle = scripts::cycle(sessions, CLIENTS);
        let bare_cycle = scripts::floor_cycle(sessions, CLIENTS);
        let beat = scripts::heartbeat(sessions);
        let bare_beat = scripts::floor_heartbeat(sessions);
        let none = Goal::None;
        let cases = [
            ("claims", with_board, "held", cycle, Work::CYCLES, goal),
            ("the bare writes", with_board, "held_bare", bare_cycle, BARE_CYCLES, none),
            ("heartbeats on the board", with_board, "held_board", beat.clone(), Work::Other, goal),
            ("heartbeats on the table", without, "held", beat, Work::Other, goal),
            ("bare UPDATEs", without, "held_bare", bare_beat, Work::Other, none),
        ];
        let mut found = Vec::new();
        for (what, server, name, script, work, goal) in cases {
            let database = filled(server, name, sessions, 0)?;
            let mut client = connect(server, database)?;
            // The first heartbeats, which seek a place on the board, are none of those before.
            load::beat_all(&mut client)?;
            vacuum(&mut client)?;
            let side = Side::asynchronous(server, database, script, work);
            let before = self.plan.in_turns(std::slice::from_ref(&side))?;
            let mut holder = connect(server, database)?;
            holder.batch_execute(
                "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM claude_sessions",
            )?;
            // Under load for as long as the snapshot is held.
            side.run(&self.plan.folder, seconds)?;
            let after = self.plan.in_turns(std::slice::from_ref(&side))?;
            holder.batch_execute("COMMIT")?;
            // Autovacuum would do it while the next case is measured.
            vacuum(&mut client)?;
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
            self.find_once(10, &what, seen.sizes, "MB", "before", Goal::None);
        }
        Ok(())
    }

    pub(super) fn listeners(&mut self) -> Result<()> {
        let sessions = self.sizes.sessions;
        let database = filled(&self.server, "notify", sessions, 0)?;
        let listening = Listening::begin(&self.server, database, self.sizes.listeners)?;
        let side = Side::cycle(&self.server, database, sessions);
        let mut admin = connect(&self.server, database)?;
        let mut events = || -> Result<u64> {
            let count = "SELECT count(*) FROM session_lifecycle_events";
            Ok(admin.query_one(count, &[])?.get::<_, i64>(0).try_into()?)
        };
        let mut control = connect(&self.server, database)?;
        let (mut heard, mut all) = ([0; 3], [0; 3]);
        let mut bytes_per_second = 0.0;
        let rates = self.plan.measure(3, |how| {
            // What the last run has left to be heard is not this one's.
            listening.settle(&mut control)?;
            listen::set_notify(&mut control, database, ["on", "off", "off"][how])?;
            let before = (listening.events(), listening.bytes(), events()?);
            let begin = Instant::now();
            let sending = match how {
                2 => Some(Sending::begin(&self.server, database, bytes_per_second)?),
                _ => None,
            };
            let rate = side.run(&self.plan.folder, self.plan.seconds);
            sending.map_or(Ok(()), Sending::stop)?;
            if how == 0 {
                let bytes = (listening.bytes() - before.1) as f64;
                bytes_per_second = bytes / begin.elapsed().as_secs_f64();
            }
            heard[how] += listening.events() - before.0;
            all[how] += events()? - before.2;
            rate
        })?;
        listening.settle(&mut control)?;
        listening.stop()?;
        ensure!(heard[1] == 0, "events were announced in spite of pg_claims.notify = off");
        let what = format!(
            "claim and release with {} listeners, each of whom meanwhile heard of {} of {} events",
            self.sizes.listeners, heard[0], all[0]
        );
        let off = "pg_claims.notify off";
        self.find(11, &what, [&rates[0], &rates[1]], "/s", off, Goal::AtLeast(0.9));
        let what = "claim and release with notify off while a client sends the listeners as many bytes by bare NOTIFY";
        self.find(11, what, [&rates[2], &rates[1]], "/s", off, Goal::None);
        Ok(())
    }
}
