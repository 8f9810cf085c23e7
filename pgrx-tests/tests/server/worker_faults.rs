//! What may go wrong around the worker: too many databases, lost wake-ups, hanging triggers.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pg_claims_tests::{Server, backend_pid, json, wait_until};
use postgres::Client;

use crate::support::*;
use crate::worker::{PRELOAD, connect, is_free, served, worker_pids};

/// A further database with the extension, nine SDs and the sessions `s1` … `s3`.
fn further(server: &Server, c: &mut Client, name: &str) -> Client {
    c.batch_execute(&format!("CREATE DATABASE {name}")).unwrap();
    let mut client = connect(server, name);
    client.batch_execute("CREATE EXTENSION pg_claims").unwrap();
    backlog(&mut client);
    for session in ["s1", "s2", "s3"] {
        register(&mut client, session);
    }
    client
}

/// Whether all events have their place in the order.
fn all_placed(c: &mut Client) -> bool {
    count(
        c,
        "SELECT count(*) FROM session_lifecycle_events e
          WHERE NOT EXISTS (SELECT FROM lifecycle_event_positions p WHERE p.event_id = e.event_id)",
    ) == 0
}

/// Far below the minute after which an idle database is visited in any case.
const SOON: Duration = Duration::from_secs(30);

#[test]
fn loaded_databases_do_not_starve_another() {
    let (server, mut a) = served("turns", &["pg_claims.stale_after = 8s"]);
    let mut b = further(&server, &mut a, "b");
    let mut c = further(&server, &mut b, "c");
    let mut own = connect(&server, "c");
    granted(&mut own, "SD-2", "s2");
    assert_eq!(json(&mut own, "SELECT start_heartbeat('s2')", &[])["success"], true);
    let stop = AtomicBool::new(false);
    let load = |mut client: Client| {
        while !stop.load(Ordering::Relaxed) {
            granted(&mut client, "SD-1", "s1");
            release(&mut client, "s1");
            thread::sleep(Duration::from_millis(50));
        }
    };
    let reaped = thread::scope(|scope| {
        for client in [connect(&server, "postgres"), connect(&server, "b")] {
            let load = &load;
            scope.spawn(move || load(client));
        }
        granted(&mut c, "SD-1", "s1");
        age_heartbeat(&mut c, "s1", "1 hour");
        let start = Instant::now();
        let mut reaped = false;
        // Well beyond the lease of the session that the server beats for.
        while start.elapsed() < Duration::from_secs(20) {
            reaped |= is_free(&mut c, "SD-1");
            let status = "SELECT computed_status FROM v_active_sessions WHERE session_id = 's2'";
            if value(&mut c, status).as_deref() != Some("active") {
                reaped = false;
                break;
            }
            thread::sleep(Duration::from_millis(50));
        }
        // Health is told also while the worker has no rest.
        let runs = value(
            &mut a,
            "SELECT runs > 3 AND last_run_at > now() - interval '10 seconds' FROM v_worker_health",
        );
        stop.store(true, Ordering::Relaxed);
        assert_eq!(runs.as_deref(), Some("true"));
        reaped
    });
    assert!(reaped, "the third database was not served");
    assert!(!is_free(&mut c, "SD-2"));
}

#[test]
fn a_setting_of_the_server_s_does_not_hide_the_launcher() {
    let (_server, mut c) = served("application-name", &[]);
    c.batch_execute("ALTER SYSTEM SET application_name = 'something else'").unwrap();
    c.batch_execute("SELECT pg_reload_conf()").unwrap();
    wait_until("the setting to have arrived", || {
        value(&mut c, "SELECT reset_val FROM pg_settings WHERE name = 'application_name'")
            .as_deref()
            == Some("something else")
    });
    for _ in 0..2 {
        granted(&mut c, "SD-1", "s1");
        age_heartbeat(&mut c, "s1", "1 hour");
        wait_until("the stale session to be reaped", || is_free(&mut c, "SD-1"));
    }
}

#[test]
fn what_the_worker_passed_by_is_done_when_it_is_free() {
    let (server, mut c) = served("frontier", &[]);
    wait_until("what was before to be placed", || all_placed(&mut c));
    for end in ["COMMIT", "ROLLBACK"] {
        let mut other = connect(&server, "postgres");
        // It holds the order of events until it ends, and has the worker look then.
        other
            .batch_execute(
                "BEGIN; SELECT FROM event_frontier FOR UPDATE; SELECT cleanup_stale_sessions()",
            )
            .unwrap();
        granted(&mut c, "SD-1", "s1");
        release(&mut c, "s1");
        wait_until("the worker to have given up", || {
            worker_pids(&mut c, "pg_claims worker").is_empty()
        });
        assert!(!all_placed(&mut c));
        other.batch_execute(end).unwrap();
        let start = Instant::now();
        wait_until("the events to be placed", || all_placed(&mut c));
        assert!(start.elapsed() < SOON, "nobody woke the worker");
    }
}

#[test]
fn what_is_committed_while_the_launcher_starts_is_done_soon() {
    // A standby that never comes: a commit that waits for it hangs before anybody can see it.
    let settings = [
        "pg_claims.worker = off",
        "synchronous_standby_names = 'nobody'",
        "synchronous_commit = local",
    ];
    let (server, mut c) = served("untold", &settings);
    let mut own = connect(&server, "postgres");
    let pid = backend_pid(&mut own);
    own.batch_execute("SET synchronous_commit = on; BEGIN; SELECT register_session('s4')").unwrap();
    thread::scope(|scope| {
        let commit = scope.spawn(move || own.batch_execute("COMMIT"));
        wait_until("the commit to hang", || {
            count(&mut c, "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'") > 0
        });
        c.batch_execute("ALTER SYSTEM SET pg_claims.worker = on").unwrap();
        c.batch_execute("SELECT pg_reload_conf()").unwrap();
        wait_until("the worker to have been there, and to have left", || {
            c.batch_execute("SELECT is_sd_claimed('SD-1')").unwrap();
            count(&mut c, "SELECT count(*) FROM v_worker_health WHERE runs > 0") > 0
                && worker_pids(&mut c, "pg_claims worker").is_empty()
        });
        assert_eq!(count(&mut c, "SELECT count(*) FROM claude_sessions"), 3);
        // It waits no longer, and is committed.
        c.execute("SELECT pg_cancel_backend($1)", &[&pid]).unwrap();
        commit.join().unwrap().unwrap();
    });
    let start = Instant::now();
    wait_until("the events to be placed", || all_placed(&mut c));
    assert!(start.elapsed() < SOON, "nobody told the worker, and it did not come by itself");
}

#[test]
fn a_database_worker_that_is_terminated_leaves_nothing_undone() {
    let (_server, mut c) = served("terminated", &[]);
    wait_until("what was before to be placed", || all_placed(&mut c));
    for _ in 0..10 {
        wait_until("the worker to have ended", || {
            worker_pids(&mut c, "pg_claims worker").is_empty()
        });
        granted(&mut c, "SD-1", "s1");
        release(&mut c, "s1");
        wait_until("a worker to be terminated, or to be done", || {
            let killed = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE backend_type = 'pg_claims worker'";
            count(&mut c, killed) > 0 || all_placed(&mut c)
        });
        let start = Instant::now();
        wait_until("the events to be placed", || all_placed(&mut c));
        assert!(start.elapsed() < SOON, "the work was forgotten");
    }
}

#[test]
fn events_of_a_prepared_transaction_are_placed_soon_after_its_commit() {
    let (_server, mut c) = served("prepared", &["max_prepared_transactions = 5"]);
    c.batch_execute(
        "BEGIN; SELECT claim_sd('SD-1', 's1'); SELECT release_sd('s1'); PREPARE TRANSACTION 'x'",
    )
    .unwrap();
    // An unrelated one goes on meanwhile.
    granted(&mut c, "SD-2", "s2");
    release(&mut c, "s2");
    wait_until("that to be placed", || all_placed(&mut c));
    c.batch_execute("COMMIT PREPARED 'x'").unwrap();
    let start = Instant::now();
    wait_until("the events to be placed", || all_placed(&mut c));
    assert!(start.elapsed() < SOON);
    assert_in_step(&mut c);
}

#[test]
fn any_call_brings_the_worker_back_after_a_restart() {
    for call in [
        "SELECT update_session_heartbeat('s1')",
        "SELECT claim_sd('SD-1', 's3')",
        "SELECT is_sd_claimed('SD-9')",
    ] {
        let (server, mut c) = served("brought-back", &[]);
        granted(&mut c, "SD-1", "s1");
        granted(&mut c, "SD-2", "s2");
        server.stop(pg_claims_tests::Stop::Fast).unwrap();
        server.start().unwrap();
        let mut c = connect(&server, "postgres");
        assert!(worker_pids(&mut c, "pg_claims launcher").is_empty(), "it is not preloaded");
        c.batch_execute(call).unwrap();
        age_heartbeat(&mut c, "s2", "1 hour");
        wait_until("the stale session to be reaped", || is_free(&mut c, "SD-2"));
    }
}

#[test]
fn nobody_promises_heartbeats_that_no_worker_can_give() {
    let (_server, mut c) = served("no-slot-at-all", &["max_worker_processes = 0"]);
    granted(&mut c, "SD-1", "s1");
    assert_eq!(json(&mut c, "SELECT start_heartbeat('s1')", &[])["error"], "no_worker");
    // One slot beside the server's own: the launcher is there, and can start no worker.
    let (_server, mut c) = served("no-second-slot", &["max_worker_processes = 2"]);
    wait_until("the launcher to have tried", || {
        granted(&mut c, "SD-1", "s1");
        release(&mut c, "s1");
        json(&mut c, "SELECT stop_heartbeat()", &[]);
        json(&mut c, "SELECT start_heartbeat('s1')", &[])["error"] == "no_worker"
    });
    assert_eq!(json(&mut c, "SELECT start_heartbeat('s2')", &[])["error"], "no_worker");
}

#[test]
fn a_short_lease_of_its_own_is_beaten_for_in_time() {
    let (server, mut c) = served(
        "short-lease",
        &[
            "pg_claims.heartbeat_interval = 30s",
            "pg_claims.reap_interval = 10s",
            "pg_claims.min_stale_after = 1s",
        ],
    );
    let mut own = connect(&server, "postgres");
    json(&mut own, "SELECT register_session('s1', p_stale_after => '4 seconds')", &[]);
    granted(&mut own, "SD-1", "s1");
    json(&mut own, "SELECT start_heartbeat('s1')", &[]);
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(15) {
        let status = "SELECT computed_status FROM v_active_sessions WHERE session_id = 's1'";
        assert_eq!(value(&mut c, status).as_deref(), Some("active"), "{:?}", start.elapsed());
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn nobody_beats_for_a_connection_that_has_ended() {
    let (server, mut c) = served("dead", &["pg_claims.stale_after = 2s"]);
    let mut own = connect(&server, "postgres");
    granted(&mut own, "SD-1", "s1");
    json(&mut own, "SELECT start_heartbeat('s1')", &[]);
    let pid = backend_pid(&mut own);
    let switch = |c: &mut Client, on: &str| {
        c.batch_execute(&format!("ALTER SYSTEM SET pg_claims.worker = {on}")).unwrap();
        c.batch_execute("SELECT pg_reload_conf()").unwrap();
        wait_until("the setting to have arrived", || {
            value(c, "SELECT current_setting('pg_claims.worker')").as_deref() == Some(on)
        });
        wait_until("the worker to have ended", || worker_pids(c, "pg_claims worker").is_empty());
    };
    switch(&mut c, "off");
    // By default a terminated backend's session goes stale.
    c.execute("SELECT pg_terminate_backend($1)", &[&pid]).unwrap();
    wait_until("it to be stale", || {
        value(&mut c, "SELECT computed_status FROM v_active_sessions WHERE session_id = 's1'")
            .as_deref()
            == Some("stale")
    });
    let heartbeat = "SELECT heartbeat_at FROM claude_sessions WHERE session_id = 's1'";
    let last = value(&mut c, heartbeat);
    c.batch_execute("ALTER SYSTEM SET pg_claims.worker = on").unwrap();
    c.batch_execute("SELECT pg_reload_conf()").unwrap();
    wait_until("it to be reaped", || is_free(&mut c, "SD-1"));
    assert_eq!(value(&mut c, heartbeat), last, "it was revived");
    assert_eq!(events(&mut c, "s1").last().unwrap(), "reaped");
}

#[test]
fn a_connection_that_comes_while_the_worker_begins_is_not_taken_for_one_that_has_ended() {
    let (server, mut c) = served("beginning", &[PRELOAD]);
    let mut holder = connect(&server, "postgres");
    wait_until("the worker to have ended", || worker_pids(&mut c, "pg_claims worker").is_empty());
    // The next worker looks who is there, and then waits.
    holder
        .batch_execute("BEGIN; LOCK TABLE heartbeat_connections IN ACCESS EXCLUSIVE MODE")
        .unwrap();
    c.batch_execute("SELECT cleanup_stale_sessions()").unwrap();
    wait_until("the worker to wait", || {
        let waiting = "SELECT count(*) FROM pg_stat_activity
                        WHERE backend_type = 'pg_claims worker' AND wait_event_type = 'Lock'";
        count(&mut c, waiting) > 0
    });
    // The test writes the row that start_heartbeat() would write: that call would wait for the lock, too.
    let mut own = connect(&server, "postgres");
    let pid = backend_pid(&mut own);
    let started = holder
        .execute(
            "INSERT INTO heartbeat_connections
                    (backend_pid, backend_start, session_id, last_attempt_at, last_success_at)
             SELECT pid, backend_start, 's1', '-infinity', '-infinity'
               FROM pg_stat_activity WHERE pid = $1",
            &[&pid],
        )
        .unwrap();
    assert_eq!(started, 1);
    holder.batch_execute("COMMIT").unwrap();
    wait_until("the worker to have beaten for it, or to have forgotten it", || {
        let untouched =
            "SELECT count(*) FROM heartbeat_connections WHERE last_success_at = '-infinity'";
        count(&mut c, untouched) == 0
    });
    assert_eq!(json(&mut own, "SELECT is_heartbeat_active()", &[])["active"], true);
}

#[test]
fn an_sd_whose_release_hangs_keeps_nobody_s_heartbeats() {
    let (server, mut c) = served("hanging", &[PRELOAD, "pg_claims.stale_after = 12s"]);
    c.batch_execute(
        "CREATE FUNCTION hang() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(3600); RETURN NEW; END $$;
         CREATE TRIGGER hang BEFORE UPDATE ON strategic_directives_v2 FOR EACH ROW WHEN (OLD.sd_id = 'SD-1' AND OLD.is_working_on) EXECUTE FUNCTION hang()",
    )
    .unwrap();
    let mut own = connect(&server, "postgres");
    granted(&mut own, "SD-2", "s2");
    assert_eq!(json(&mut own, "SELECT start_heartbeat('s2')", &[])["success"], true);
    granted(&mut c, "SD-1", "s1");
    age_heartbeat(&mut c, "s1", "1 hour");
    granted(&mut c, "SD-3", "s3");
    age_heartbeat(&mut c, "s3", "1 hour");
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(25) {
        let status = "SELECT computed_status FROM v_active_sessions WHERE session_id = 's2'";
        assert_eq!(value(&mut c, status).as_deref(), Some("active"), "{:?}", start.elapsed());
        thread::sleep(Duration::from_millis(50));
    }
    assert!(is_free(&mut c, "SD-3"), "the other dead session was not reaped");
    let told = "SELECT last_error FROM v_worker_health";
    assert!(value(&mut c, told).unwrap().contains("timeout"));
}

#[test]
fn a_crash_repeats_no_event_that_was_read() {
    // A commit that does not wait is durable after that time only.
    let (server, mut c) = served("repetition", &["fsync = on", "wal_writer_delay = 10s"]);
    let read = |c: &mut Client, after: i64| -> Vec<(i64, Option<i64>, String)> {
        c.query("SELECT id, claim_id, event_type FROM lifecycle_events_since($1)", &[&after])
            .unwrap()
            .iter()
            .map(|row| (row.get(0), row.get(1), row.get(2)))
            .collect()
    };
    granted(&mut c, "SD-1", "s1");
    wait_until("the events to be placed", || all_placed(&mut c));
    let before = read(&mut c, 0);
    server.crash().unwrap();
    server.start().unwrap();
    let mut c = connect(&server, "postgres");
    release(&mut c, "s1");
    wait_until("the events to be placed", || all_placed(&mut c));
    let after = read(&mut c, before.last().unwrap().0);
    assert_eq!(after.len(), 1, "{before:?} and then {after:?}");
    assert_eq!(after[0].2, "released");
}

#[test]
fn many_sds_whose_release_hangs_only_delay_the_others() {
    // More than a worker may spend without getting on.
    let (_server, mut c) = served("many-hanging", &[]);
    c.batch_execute(
        "CREATE FUNCTION hang() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(3600); RETURN NEW; END $$;
         CREATE TRIGGER hang BEFORE UPDATE ON strategic_directives_v2 FOR EACH ROW
           WHEN (OLD.sd_id LIKE 'H-%' AND OLD.is_working_on AND NOT NEW.is_working_on) EXECUTE FUNCTION hang();
         INSERT INTO strategic_directives_v2 (sd_id) SELECT 'H-' || n FROM generate_series(1, 30) n;
         SELECT register_session('h' || n) FROM generate_series(1, 30) n;
         SELECT claim_sd('H-' || n, 'h' || n) FROM generate_series(1, 30) n;
         SELECT claim_sd('SD-1', 's1')",
    )
    .unwrap();
    c.batch_execute("UPDATE claude_sessions SET heartbeat_at = heartbeat_at - interval '1 hour'")
        .unwrap();
    wait_until("the one behind them to be reaped", || is_free(&mut c, "SD-1"));
    wait_until("the failures to be told", || {
        value(&mut c, "SELECT errors > 10 FROM v_worker_health").as_deref() == Some("true")
    });
    wait_until("all events to be placed", || all_placed(&mut c));
}

#[test]
fn looking_without_finding_anything_writes_nothing() {
    let (_server, mut c) = served("frugal", &[]);
    granted(&mut c, "SD-1", "s1");
    wait_until("all events to be placed", || all_placed(&mut c));
    let next_xid = "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint";
    let runs = "SELECT runs FROM v_worker_health";
    let before = (count(&mut c, next_xid), count(&mut c, runs));
    let mut after = before;
    // Each run looks about ten times.
    wait_until("five more runs", || {
        after = (count(&mut c, next_xid), count(&mut c, runs));
        after.1 >= before.1 + 5
    });
    let transactions = after.0 - before.0;
    assert!(transactions <= 3 * (after.1 - before.1), "{transactions} transactions wrote");
}
