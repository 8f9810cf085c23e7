//! The background worker: reaps, comes back, and keeps out of everybody's way.

use std::time::{Duration, Instant};

use pg_claims_tests::{Server, json, own_server, wait_until};
use postgres::{Client, NoTls};

use crate::support::*;

/// A server of its own whose worker runs every second, with the extension in database `postgres`.
pub fn served(name: &str, settings: &[&str]) -> (Server, Client) {
    let mut all = vec![
        "fsync = off",
        "pg_claims.reap_interval = 1s",
        "pg_claims.heartbeat_interval = 1s",
        "pg_claims.restart_grace = off",
    ];
    all.extend(settings);
    let server = own_server(name, &all);
    let mut client = connect(&server, "postgres");
    client.batch_execute("CREATE EXTENSION pg_claims").unwrap();
    backlog(&mut client);
    for session in ["s1", "s2", "s3"] {
        register(&mut client, session);
    }
    (server, client)
}

pub const PRELOAD: &str = "shared_preload_libraries = 'pg_claims'";

pub fn connect(server: &Server, database: &str) -> Client {
    server.config(database).connect(NoTls).unwrap()
}

pub fn is_free(c: &mut Client, sd: &str) -> bool {
    let held = c.query("SELECT FROM claude_sessions WHERE sd_id = $1", &[&sd]).unwrap();
    held.is_empty()
}

pub fn worker_pids(c: &mut Client, kind: &str) -> Vec<i32> {
    c.query("SELECT pid FROM pg_stat_activity WHERE backend_type = $1", &[&kind])
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect()
}

pub fn launcher(c: &mut Client) -> i32 {
    let mut pids = Vec::new();
    wait_until("the launcher to be there", || {
        pids = worker_pids(c, "pg_claims launcher");
        pids.len() == 1
    });
    pids[0]
}

#[test]
fn a_stale_session_is_reaped_by_itself_with_and_without_preloading() {
    for (name, settings) in [("reap-preloaded", vec![PRELOAD]), ("reap-dynamic", vec![])] {
        let (_server, mut c) = served(name, &settings);
        let claim_id = granted(&mut c, "SD-1", "s1");
        granted(&mut c, "SD-2", "s2");
        age_heartbeat(&mut c, "s1", "1 hour");
        wait_until("the stale session to be reaped", || is_free(&mut c, "SD-1"));
        assert_eq!(events(&mut c, "s1"), ["registered", "claimed", "stale", "reaped"]);
        assert_in_step(&mut c);
        let lost = beat(&mut c, "s1");
        assert_eq!(lost["lost_claim"]["claim_id"], claim_id, "{lost}");
        assert_eq!(lost["lost_claim"]["reason"], "reaped");
        assert!(!is_free(&mut c, "SD-2"), "a live session was reaped");
        let health = "SELECT last_reaped IS NOT NULL AND last_duration_ms > 0 AND errors = 0 AND reaped = 1 AND lag_seconds = 0 FROM v_worker_health";
        wait_until("the run to be recorded", || value(&mut c, health).as_deref() == Some("true"));
    }
}

#[test]
fn the_worker_comes_back_however_often_it_is_terminated() {
    for (name, settings) in [("kill-preloaded", vec![PRELOAD]), ("kill-dynamic", vec![])] {
        let (_server, mut c) = served(name, &settings);
        for round in 0..10 {
            let pid = launcher(&mut c);
            c.execute("SELECT pg_terminate_backend($1)", &[&pid]).unwrap();
            wait_until("the launcher to be another one", || {
                let pids = worker_pids(&mut c, "pg_claims launcher");
                pids.len() == 1 && pids[0] != pid
            });
            if round % 3 == 0 {
                granted(&mut c, "SD-1", "s1");
                age_heartbeat(&mut c, "s1", "1 hour");
                wait_until("the stale session to be reaped", || is_free(&mut c, "SD-1"));
            }
        }
        assert_in_step(&mut c);
    }
}

#[test]
fn two_databases_are_served_a_third_is_left_alone_and_each_can_be_dropped() {
    let (server, mut c) = served("databases", &[PRELOAD]);
    c.batch_execute("CREATE DATABASE second").unwrap();
    c.batch_execute("CREATE DATABASE plain").unwrap();
    let mut second = connect(&server, "second");
    second.batch_execute("CREATE EXTENSION pg_claims").unwrap();
    backlog(&mut second);
    register(&mut second, "s1");
    granted(&mut second, "SD-1", "s1");
    age_heartbeat(&mut second, "s1", "1 hour");
    granted(&mut c, "SD-1", "s1");
    age_heartbeat(&mut c, "s1", "1 hour");
    wait_until("both to be reaped", || is_free(&mut c, "SD-1") && is_free(&mut second, "SD-1"));
    // Claims stay open, so that the worker comes every second.
    granted(&mut second, "SD-2", "s1");
    drop(second);
    let start = Instant::now();
    c.batch_execute("DROP DATABASE second").unwrap();
    assert!(start.elapsed() < Duration::from_secs(5), "the worker got in the way");
    c.batch_execute("DROP DATABASE plain").unwrap();
    // And the rest goes on.
    granted(&mut c, "SD-1", "s1");
    age_heartbeat(&mut c, "s1", "1 hour");
    wait_until("the stale session to be reaped", || is_free(&mut c, "SD-1"));
}

#[test]
fn the_server_stops_fast_while_the_worker_works() {
    let (server, mut c) = served("fast-stop", &[PRELOAD]);
    // The worker waits for a lock, in the middle of a statement.
    c.batch_execute("SET lock_timeout = 0; BEGIN; LOCK TABLE sd_claims").unwrap();
    let mut other = connect(&server, "postgres");
    age_heartbeat(&mut other, "s1", "1 second");
    let start = Instant::now();
    server.stop(pg_claims_tests::Stop::Fast).unwrap();
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    server.start().unwrap();
}

#[test]
fn one_claim_that_cannot_be_ended_does_not_keep_the_others() {
    let (_server, mut c) = served("poisoned", &[]);
    refuse_release_of(&mut c, "SD-1");
    for n in 1..=3 {
        granted(&mut c, &format!("SD-{n}"), &format!("s{n}"));
    }
    c.batch_execute("UPDATE claude_sessions SET heartbeat_at = heartbeat_at - interval '1 hour'")
        .unwrap();
    wait_until("the others to be reaped", || is_free(&mut c, "SD-2") && is_free(&mut c, "SD-3"));
    wait_until("the failure to be told", || {
        value(&mut c, "SELECT errors > 0 AND last_error = 'this SD stays taken' AND lag_seconds > 0 AND claims_due = 1 FROM v_worker_health")
            .as_deref() == Some("true")
    });
    assert!(!is_free(&mut c, "SD-1"));
    assert_in_step(&mut c);
    c.batch_execute("DROP TRIGGER refuse ON strategic_directives_v2").unwrap();
    wait_until("the last one to be reaped", || is_free(&mut c, "SD-1"));
}

#[test]
fn an_idle_database_is_left_in_peace_and_old_history_goes_by_itself() {
    let (_server, mut c) = served("idle", &["pg_claims.session_retention = 1h"]);
    // Registering has woken the worker; with nothing claimed it does not come back by itself.
    let runs = "SELECT runs FROM v_worker_health";
    wait_until("the worker to have been there", || value(&mut c, runs).is_some());
    wait_until("it to have ended", || worker_pids(&mut c, "pg_claims worker").is_empty());
    let before = value(&mut c, runs);
    let start = Instant::now();
    wait_until("several intervals to pass", || start.elapsed() > Duration::from_secs(4));
    assert_eq!(value(&mut c, runs), before);
    // Pruning comes by the hour: as if one had passed.
    granted(&mut c, "SD-1", "s1");
    release(&mut c, "s1");
    c.batch_execute(
        "UPDATE claude_sessions SET heartbeat_at = heartbeat_at - interval '2 hours' WHERE session_id = 's2';
         ALTER TABLE sd_claims DISABLE TRIGGER USER;
         UPDATE sd_claims SET released_at = released_at - interval '91 days';
         ALTER TABLE sd_claims ENABLE TRIGGER USER;
         UPDATE worker_health SET last_pruned_at = last_pruned_at - interval '61 minutes'",
    )
    .unwrap();
    register(&mut c, "one-more");
    wait_until("the claim to be pruned", || count(&mut c, "SELECT count(*) FROM sd_claims") == 0);
    wait_until("the silent session to be ended", || {
        value(&mut c, "SELECT status FROM claude_sessions WHERE session_id = 's2'").as_deref()
            == Some("released")
    });
    assert_eq!(events(&mut c, "s2"), ["registered", "ended"]);
    assert_eq!(register(&mut c, "s2")["resumed"], true);
}

#[test]
fn the_worker_follows_its_settings_without_a_restart() {
    let (_server, mut c) = served("settings", &["pg_claims.auto_reap = off"]);
    granted(&mut c, "SD-1", "s1");
    age_heartbeat(&mut c, "s1", "1 hour");
    wait_until("it to be noted", || events(&mut c, "s1").last().unwrap() == "stale");
    assert!(!is_free(&mut c, "SD-1"));
    c.batch_execute("ALTER SYSTEM SET pg_claims.auto_reap = on").unwrap();
    c.batch_execute("SELECT pg_reload_conf()").unwrap();
    wait_until("the stale session to be reaped", || is_free(&mut c, "SD-1"));
    assert_eq!(events(&mut c, "s1"), ["registered", "claimed", "stale", "reaped"]);
    // Off altogether: nothing runs, and the next claim takes over.
    c.batch_execute("ALTER SYSTEM SET pg_claims.worker = off").unwrap();
    c.batch_execute("SELECT pg_reload_conf()").unwrap();
    wait_until("the setting to have arrived", || {
        value(&mut c, "SELECT current_setting('pg_claims.worker')").as_deref() == Some("off")
    });
    wait_until("it to have ended", || worker_pids(&mut c, "pg_claims worker").is_empty());
    granted(&mut c, "SD-1", "s1");
    age_heartbeat(&mut c, "s1", "1 hour");
    let start = Instant::now();
    wait_until("several intervals to pass", || start.elapsed() > Duration::from_secs(3));
    assert!(!is_free(&mut c, "SD-1"));
    assert_eq!(claim(&mut c, "SD-1", "s2")["took_over"]["session_id"], "s1");
    assert_eq!(json(&mut c, "SELECT start_heartbeat('s2')", &[])["error"], "no_worker");
}

#[test]
fn a_server_without_a_free_slot_says_so_and_claims_go_on() {
    let (_server, mut c) = served("no-slot", &["max_worker_processes = 0"]);
    granted(&mut c, "SD-1", "s1");
    assert_eq!(claim(&mut c, "SD-1", "s2")["claimed_by"], "s1");
    assert_eq!(json(&mut c, "SELECT start_heartbeat('s1')", &[])["error"], "no_worker");
    age_heartbeat(&mut c, "s1", "1 hour");
    assert_eq!(json(&mut c, "SELECT cleanup_stale_sessions()", &[])["stale_sessions_cleaned"], 1);
}

#[test]
fn a_worker_that_is_stuck_is_ended_and_keeps_no_other_database() {
    // It counts as stuck after thirty intervals.
    let (server, mut c) = served("stuck", &[]);
    for database in ["hung", "hung_too"] {
        c.batch_execute(&format!("CREATE DATABASE {database}")).unwrap();
        let mut hung = connect(&server, database);
        hung.batch_execute(
            "CREATE EXTENSION pg_claims;
             INSERT INTO strategic_directives_v2 (sd_id) VALUES ('SD-1');
             SELECT register_session('s1'); SELECT claim_sd('SD-1', 's1');
             CREATE FUNCTION hang() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(3600); RETURN NEW; END $$;
             CREATE TRIGGER hang BEFORE UPDATE ON strategic_directives_v2 FOR EACH ROW EXECUTE FUNCTION hang();
             UPDATE claude_sessions SET heartbeat_at = heartbeat_at - interval '1 hour'",
        )
        .unwrap();
    }
    let hung = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'pg_claims worker' AND wait_event = 'PgSleep'";
    wait_until("both workers to hang", || count(&mut c, hung) == 2);
    granted(&mut c, "SD-1", "s1");
    age_heartbeat(&mut c, "s1", "1 hour");
    wait_until("this database's turn to come all the same", || is_free(&mut c, "SD-1"));
}
