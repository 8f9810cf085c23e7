//! The background worker: reaps, announces, beats, and keeps out of everybody's way.

use std::io::Write;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use pg_claims_tests::{Server, json, own_server, wait_until};
use postgres::{Client, NoTls};
use serde_json::Value;

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

/// psql with a connection of its own that has run `sql` and then waits for more.
fn psql(server: &Server, sql: &str) -> Child {
    let mut child = server
        .client_program("psql", "postgres")
        .args(["-X", "-q"])
        .env("PGAPPNAME", "the client")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let stdin = child.stdin.as_mut().unwrap();
    writeln!(stdin, "{sql}; SELECT 'done';").unwrap();
    let mut observer = connect(server, "postgres");
    wait_until("psql to have come so far", || {
        count(
            &mut observer,
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'the client' AND query = 'SELECT ''done'';' AND state = 'idle'",
        ) == 1
    });
    child
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

fn launcher(c: &mut Client) -> i32 {
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
fn a_client_killed_without_a_word_loses_its_sd() {
    let (server, mut c) = served("killed-client", &[PRELOAD, "pg_claims.stale_after = 2s"]);
    let mut client = psql(&server, "SELECT claim_sd('SD-1', 's1'); SELECT start_heartbeat('s1')");
    // It beats for as long as the client lives, well beyond its lease.
    let start = Instant::now();
    wait_until("more than a lease to pass", || {
        assert!(!is_free(&mut c, "SD-1"), "a session that beats was reaped");
        start.elapsed() > Duration::from_secs(4)
    });
    client.kill().unwrap();
    client.wait().unwrap();
    wait_until("the dead client's SD to be free", || is_free(&mut c, "SD-1"));
    assert_eq!(events(&mut c, "s1").last().unwrap(), "reaped");
    assert_eq!(count(&mut c, "SELECT count(*) FROM heartbeat_connections"), 0);
    assert_in_step(&mut c);
}

/// Terminates a backend and waits until it has gone.
fn terminate(c: &mut Client, pid: i32) {
    let told: bool = c.query_one("SELECT pg_terminate_backend($1)", &[&pid]).unwrap().get(0);
    assert!(told, "there is no backend {pid}");
    wait_until("the backend to have gone", || {
        // Within a transaction as well.
        let gone = "SELECT pg_stat_clear_snapshot(), NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1)";
        c.query_one(gone, &[&pid]).unwrap().get(1)
    });
}

#[test]
fn a_terminated_backend_s_claim_is_released_at_once_if_so_set() {
    let (server, mut c) = served("disconnect", &["pg_claims.on_disconnect = release"]);
    let mut holder = connect(&server, "postgres");
    granted(&mut holder, "SD-1", "s1");
    assert_eq!(json(&mut holder, "SELECT start_heartbeat('s1')", &[])["success"], true);
    // Another connection beats for the same session: the end of one is not the session's.
    let mut second = connect(&server, "postgres");
    assert_eq!(json(&mut second, "SELECT start_heartbeat('s1')", &[])["success"], true);
    drop(second);
    wait_until("the connection that ended to be forgotten", || {
        count(&mut c, "SELECT count(*) FROM heartbeat_connections") == 1
    });
    assert!(!is_free(&mut c, "SD-1"));
    let pid = pg_claims_tests::backend_pid(&mut holder);
    terminate(&mut c, pid);
    wait_until("the claim to be released", || is_free(&mut c, "SD-1"));
    let reason = "SELECT release_reason FROM sd_claims WHERE sd_id = 'SD-1'";
    assert_eq!(value(&mut c, reason).as_deref(), Some("connection_ended"));
    assert_eq!(beat(&mut c, "s1")["lost_claim"]["reason"], "connection_ended");
    assert_in_step(&mut c);
}

#[test]
fn a_connection_of_an_earlier_run_of_the_server_does_not_keep_a_claim() {
    let (server, mut c) = served("disconnect-mixed", &["pg_claims.on_disconnect = release"]);
    let mut holder = connect(&server, "postgres");
    granted(&mut holder, "SD-1", "s1");
    json(&mut holder, "SELECT start_heartbeat('s1')", &[]);
    let pid = pg_claims_tests::backend_pid(&mut holder);
    // The worker finds all at once; some come after the holder's, in the order of numbers or of places.
    c.batch_execute(
        "BEGIN;
         LOCK TABLE heartbeat_connections IN SHARE ROW EXCLUSIVE MODE;
         INSERT INTO heartbeat_connections (backend_pid, backend_start, session_id, server_since)
         SELECT 2000000000 + n, now() - interval '1 day', 's1', now() - interval '2 days'
           FROM generate_series(1, 200) n",
    )
    .unwrap();
    terminate(&mut c, pid);
    c.batch_execute("COMMIT").unwrap();
    wait_until("all connections to be forgotten", || {
        count(&mut c, "SELECT count(*) FROM heartbeat_connections") == 0
    });
    wait_until("the claim to be released", || is_free(&mut c, "SD-1"));
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

/// The events that arrive on the channel within `time`.
fn notices(c: &mut Client, time: Duration) -> Vec<Value> {
    events_in(&messages(c, time))
}

fn events_in(messages: &[String]) -> Vec<Value> {
    let lines = messages.iter().flat_map(|message| message.lines());
    lines.map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The messages that arrive on the channel within `time`.
fn messages(c: &mut Client, time: Duration) -> Vec<String> {
    use postgres::fallible_iterator::FallibleIterator;
    let mut notices = c.notifications();
    let mut arrived = Vec::new();
    let mut iter = notices.timeout_iter(time);
    while let Some(notice) = iter.next().unwrap() {
        assert_eq!(notice.channel(), "pg_claims");
        arrived.push(notice.payload().to_owned());
    }
    arrived
}

#[test]
fn listeners_hear_of_each_event_once_in_order_within_a_second_of_the_commit() {
    let (server, mut c) = served("listen", &[]);
    let mut listener = connect(&server, "postgres");
    listener.batch_execute("LISTEN pg_claims").unwrap();
    notices(&mut listener, Duration::from_millis(1500));
    granted(&mut c, "SD-1", "s1");
    let heard = notices(&mut listener, Duration::from_millis(1000));
    assert_eq!(heard.len(), 1, "{heard:?}");
    assert_eq!(heard[0]["event"], "claimed");
    assert_eq!(heard[0]["session_id"], "s1");
    assert_eq!(heard[0]["sd_id"], "SD-1");
    age_heartbeat(&mut c, "s1", "1 hour");
    claim(&mut c, "SD-1", "s2");
    claim(&mut c, "SD-2", "s2");
    json(&mut c, "SELECT release_sd('s2', $1)", &[&"x".repeat(20_000)]);
    granted(&mut c, "SD-3", "s3");
    age_heartbeat(&mut c, "s3", "1 hour");
    wait_until("the stale session to be reaped", || is_free(&mut c, "SD-3"));
    let heard = notices(&mut listener, Duration::from_millis(1500));
    let told: Vec<_> = heard.iter().map(|n| n["event"].as_str().unwrap().to_owned()).collect();
    assert_eq!(
        told,
        ["taken_over", "claimed", "switched", "released", "claimed", "stale", "reaped"],
        "{heard:?}"
    );
    let ids: Vec<_> = heard.iter().map(|n| n["id"].as_i64().unwrap()).collect();
    assert!(ids.is_sorted(), "{ids:?}");
    // Turned off, nothing is said, and turned on again not what was kept silent.
    c.batch_execute("ALTER SYSTEM SET pg_claims.notify = off").unwrap();
    c.batch_execute("SELECT pg_reload_conf()").unwrap();
    wait_until("the worker to have ended", || worker_pids(&mut c, "pg_claims worker").is_empty());
    granted(&mut c, "SD-4", "s1");
    let place = "SELECT count(*) FROM lifecycle_events_since() WHERE sd_id = 'SD-4'";
    wait_until("the event to be in order", || count(&mut c, place) == 1);
    assert!(notices(&mut listener, Duration::from_millis(500)).is_empty());
    c.batch_execute("ALTER SYSTEM RESET pg_claims.notify").unwrap();
    c.batch_execute("SELECT pg_reload_conf()").unwrap();
    wait_until("the worker to have ended", || worker_pids(&mut c, "pg_claims worker").is_empty());
    release(&mut c, "s1");
    let heard = notices(&mut listener, Duration::from_millis(1500));
    assert_eq!(heard.len(), 1, "{heard:?}");
    assert_eq!(heard[0]["event"], "released");
}

#[test]
fn many_events_at_once_share_messages() {
    let (server, mut c) = served("listen-many", &[]);
    let mut listener = connect(&server, "postgres");
    listener.batch_execute("LISTEN pg_claims").unwrap();
    // In one transaction each, so that they become visible at once.
    for (count, expected) in [(50, 50), (60, 2)] {
        notices(&mut listener, Duration::from_millis(1500));
        c.batch_execute("BEGIN").unwrap();
        for _ in 0..count / 2 {
            granted(&mut c, "SD-1", "s1");
            release(&mut c, "s1");
        }
        c.batch_execute("COMMIT").unwrap();
        let messages = messages(&mut listener, Duration::from_millis(1500));
        let events = events_in(&messages);
        assert_eq!(events.len(), count);
        assert!(events.is_sorted_by_key(|event| event["id"].as_i64().unwrap()), "{events:?}");
        assert_eq!(messages.len(), expected, "{messages:?}");
    }
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
fn failures_of_the_server_s_heartbeat_are_counted_and_end_it() {
    let (server, mut c) = served("failures", &["pg_claims.max_heartbeat_failures = 3"]);
    let mut own = connect(&server, "postgres");
    let started = json(&mut own, "SELECT start_heartbeat('s1')", &[]);
    assert_eq!(
        started,
        serde_json::json!({ "success": true, "sessionId": "s1", "intervalMs": 1000 })
    );
    let activity = |own: &mut Client| json(own, "SELECT is_heartbeat_active()", &[]);
    let first = activity(&mut own)["lastSuccessfulHeartbeat"].clone();
    wait_until("the server to beat", || activity(&mut own)["lastSuccessfulHeartbeat"] != first);
    let stats = json(&mut own, "SELECT get_heartbeat_stats()", &[]);
    assert_eq!(stats["healthy"], true, "{stats}");
    assert_eq!(stats["sessionId"], "s1");
    // A trigger of the operator's makes each heartbeat of this session fail.
    c.batch_execute(
        "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no more'; END $$;
         CREATE TRIGGER fail BEFORE UPDATE ON claude_sessions FOR EACH ROW WHEN (OLD.session_id = 's1') EXECUTE FUNCTION fail()",
    )
    .unwrap();
    let mut counted = Vec::new();
    wait_until("the heartbeat to be given up", || {
        let now = activity(&mut own);
        let failures = now["consecutiveFailures"].as_i64().unwrap();
        if counted.last() != Some(&failures) {
            counted.push(failures);
        }
        now["active"] == false
    });
    assert_eq!(counted.last(), Some(&3), "{counted:?}");
    let stats = json(&mut own, "SELECT get_heartbeat_stats()", &[]);
    assert_eq!(stats["lastError"], "no more", "{stats}");
    assert_eq!(stats["healthy"], false);
    c.batch_execute("DROP TRIGGER fail ON claude_sessions").unwrap();
    // Started again, it counts from nothing.
    assert_eq!(json(&mut own, "SELECT start_heartbeat('s1')", &[])["success"], true);
    assert_eq!(activity(&mut own)["consecutiveFailures"], 0);
    assert_eq!(json(&mut own, "SELECT stop_heartbeat()", &[])["stoppedSession"], "s1");
    assert_eq!(activity(&mut own)["active"], false);
}

#[test]
fn a_connection_is_one_session_s_or_nobody_s() {
    let (server, mut c) = served("pooled", &[]);
    let mut own = connect(&server, "postgres");
    assert_eq!(json(&mut own, "SELECT start_heartbeat('s1')", &[])["success"], true);
    assert_eq!(json(&mut own, "SELECT start_heartbeat('s1')", &[])["success"], true);
    assert_eq!(json(&mut own, "SELECT get_heartbeat_stats()", &[])["healthy"], true);
    let refused = json(&mut own, "SELECT start_heartbeat('s2')", &[]);
    assert_eq!(refused["success"], false, "{refused}");
    assert!(refused["message"].as_str().unwrap().contains("\"s1\""));
    assert!(refused["hint"].as_str().unwrap().contains("pooler"));
    // As a pooler would have it: another session by the same connection.
    granted(&mut own, "SD-1", "s2");
    let stats = json(&mut own, "SELECT get_heartbeat_stats()", &[]);
    assert_eq!(stats["healthy"], false, "{stats}");
    assert!(stats["warning"].as_str().unwrap().contains("\"s2\""), "{stats}");
    // A number that is used again is not the same connection.
    c.batch_execute(
        "UPDATE heartbeat_connections SET backend_start = backend_start - interval '1 second'",
    )
    .unwrap();
    wait_until("the connection to be forgotten", || {
        count(&mut c, "SELECT count(*) FROM heartbeat_connections") == 0
    });
    // A session that ends takes its heartbeat along.
    assert_eq!(json(&mut own, "SELECT start_heartbeat('s1')", &[])["success"], true);
    json(&mut c, "SELECT end_session('s1')", &[]);
    assert_eq!(json(&mut own, "SELECT is_heartbeat_active()", &[])["active"], false);
}

#[test]
fn a_heartbeat_goes_on_through_the_session_s_own_long_transaction() {
    let (server, mut c) = served("long-transaction", &["pg_claims.stale_after = 2s"]);
    let mut own = connect(&server, "postgres");
    json(&mut own, "SELECT start_heartbeat('s1')", &[]);
    own.batch_execute("BEGIN").unwrap();
    granted(&mut own, "SD-1", "s1");
    let start = Instant::now();
    wait_until("more than a lease to pass", || start.elapsed() > Duration::from_secs(5));
    assert_eq!(json(&mut own, "SELECT is_heartbeat_active()", &[])["consecutiveFailures"], 0);
    own.batch_execute("COMMIT").unwrap();
    // It was as good as alive: nobody could have taken it, and it beats again at once.
    wait_until("the server to beat again", || {
        value(&mut c, "SELECT computed_status FROM v_active_sessions WHERE session_id = 's1'")
            .as_deref()
            == Some("active")
    });
    assert!(!is_free(&mut c, "SD-1"));
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
