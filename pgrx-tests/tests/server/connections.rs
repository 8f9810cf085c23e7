//! Heartbeats that the server gives for a connection, and what follows from its end.

use std::io::Write;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use pg_claims_tests::{Server, json, wait_until};
use postgres::Client;

use crate::board::{heartbeats, places};
use crate::support::*;
use crate::worker::{PRELOAD, connect, is_free, served};

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
fn failures_of_the_server_s_heartbeat_are_counted_and_end_it() {
    // In the table, where a trigger can make them fail.
    let settings = ["pg_claims.max_heartbeat_failures = 3", "pg_claims.max_sessions = 0"];
    let (server, mut c) = served("failures", &settings);
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
fn the_server_s_own_heartbeats_do_not_write_the_session() {
    let (server, mut c) = served("board-connection", &[PRELOAD]);
    granted(&mut c, "SD-1", "s1");
    json(&mut c, "SELECT start_heartbeat('s1')", &[]);
    let beaten_again = |c: &mut Client| {
        let (_, before) = heartbeats(c, "s1");
        wait_until("the server's next heartbeat", || heartbeats(c, "s1").1 > before);
    };
    // The first one may have gone to the table.
    beaten_again(&mut c);
    beaten_again(&mut c);
    let (in_table, _) = heartbeats(&mut c, "s1");
    let before = places(&mut c);
    beaten_again(&mut c);
    assert_eq!(places(&mut c), before);
    assert_eq!(heartbeats(&mut c, "s1").0, in_table);
    let noted = "SELECT EXTRACT(EPOCH FROM last_success_at)::float8 FROM heartbeat_connections";
    let noted: f64 = c.query_one(noted, &[]).unwrap().get(0);
    assert!(noted > in_table, "the heartbeat on the board is not noted for the connection");
    server.discard().unwrap();
}

#[test]
fn a_connection_that_keeps_the_note_of_its_heartbeats_locked_holds_nobody_up() {
    let (server, mut c) = served("board-held", &[PRELOAD]);
    let mut own = connect(&server, "postgres");
    json(&mut own, "SELECT start_heartbeat('s1')", &[]);
    own.batch_execute("BEGIN; SELECT force_heartbeat('s1')").unwrap();
    for _ in 0..3 {
        let (_, before) = heartbeats(&mut c, "s1");
        wait_until("the server's next heartbeat", || heartbeats(&mut c, "s1").1 > before);
    }
    let errors = "SELECT errors, last_error FROM v_worker_health";
    let row = c.query_one(errors, &[]).unwrap();
    assert_eq!(row.get::<_, i64>(0), 0, "{:?}", row.get::<_, Option<&str>>(1));
    server.discard().unwrap();
}

#[test]
fn a_connection_that_has_ended_is_not_beaten_for_even_if_its_claim_cannot_be_released() {
    let (server, mut c) =
        served("ended-connection", &[PRELOAD, "pg_claims.on_disconnect = release"]);
    let mut own = connect(&server, "postgres");
    granted(&mut own, "SD-1", "s1");
    json(&mut own, "SELECT start_heartbeat('s1')", &[]);
    let (_, first) = heartbeats(&mut c, "s1");
    wait_until("the server to beat", || heartbeats(&mut c, "s1").1 > first);
    c.batch_execute(
        "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'not now'; END $$;
         CREATE TRIGGER fail BEFORE UPDATE ON claude_sessions FOR EACH ROW EXECUTE FUNCTION fail()",
    )
    .unwrap();
    drop(own);
    let errors =
        |c: &mut Client| count(c, "SELECT COALESCE(max(errors), 0)::bigint FROM v_worker_health");
    let failed_again = |c: &mut Client| {
        let before = errors(c);
        wait_until("the release to fail", || errors(c) > before);
    };
    failed_again(&mut c);
    let (_, last) = heartbeats(&mut c, "s1");
    // A heartbeat is due each second, and so is each further attempt.
    for _ in 0..3 {
        failed_again(&mut c);
    }
    assert_eq!(heartbeats(&mut c, "s1").1, last);
    server.discard().unwrap();
}
