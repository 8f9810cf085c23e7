//! The heartbeat board answers whatever is locked and whatever has changed.

use std::thread;

use pg_claims_tests::{Server, backend_pid, json, wait_until};
use postgres::Client;

use crate::board::boarded;
use crate::support::*;
use crate::worker::connect;

const CHANGE: &str = "ALTER TABLE claude_sessions ADD COLUMN later text";

/// Does `meanwhile` while `change` waits for somebody who has read `table`, and lets it happen after that.
fn while_a_change_waits(
    server: &Server,
    table: &str,
    change: &'static str,
    meanwhile: impl FnOnce(),
) {
    let mut reader = connect(server, "postgres");
    reader.batch_execute(&format!("BEGIN; SELECT FROM {table} LIMIT 1")).unwrap();
    let mut changing = connect(server, "postgres");
    let pid = backend_pid(&mut changing);
    let changing = thread::spawn(move || changing.batch_execute(change));
    wait_until("the change to wait", || {
        count(&mut reader, &format!("SELECT cardinality(pg_blocking_pids({pid}))::bigint")) > 0
    });
    meanwhile();
    reader.batch_execute("COMMIT").unwrap();
    changing.join().unwrap().unwrap();
}

/// Sends every process more invalidations than the server keeps for it.
fn overflow_invalidations(c: &mut Client) {
    c.batch_execute(
        "DO $$ BEGIN FOR i IN 1..400 LOOP
             CREATE TEMPORARY TABLE passing (a integer, b text); DROP TABLE passing;
         END LOOP; END $$",
    )
    .unwrap();
}

/// Beats at once or not at all.
fn impatient(server: &Server) -> Client {
    let mut c = connect(server, "postgres");
    c.batch_execute("SET lock_timeout = '200ms'").unwrap();
    c
}

fn assert_beats(c: &mut Client, who: &str) {
    for call in ["update_session_heartbeat('s1')", "heartbeat_sessions('{s1,s2}')"] {
        match c.query_one(&format!("SELECT {call}"), &[]) {
            Ok(row) => {
                let answer: serde_json::Value = row.get(0);
                assert_eq!(answer["success"], true, "{who}: {call}: {answer}");
            }
            Err(error) => panic!("{who}: {call}: {error:?}"),
        }
    }
}

#[test]
fn heartbeats_on_the_board_wait_for_nobody_s_change_of_the_tables() {
    let (server, mut c) = boarded("board-locked", &[]);
    granted(&mut c, "SD-1", "s1");
    json(&mut c, "SELECT heartbeat_sessions('{s1,s2}')", &[]);
    let mut warm = impatient(&server);
    assert_beats(&mut warm, "warm");
    for (table, change) in [
        ("claude_sessions", CHANGE),
        ("directive_binding", "ALTER TABLE directive_binding ADD COLUMN later text"),
        ("strategic_directives_v2", "ALTER TABLE strategic_directives_v2 ADD COLUMN later text"),
        ("sd_claims", "ALTER TABLE sd_claims ADD COLUMN later text"),
    ] {
        while_a_change_waits(&server, table, change, || {
            assert_beats(&mut warm, "warm");
            assert_beats(&mut impatient(&server), "new");
            overflow_invalidations(&mut connect(&server, "postgres"));
            assert_beats(&mut warm, "warm, after invalidations");
            assert_beats(&mut warm, "warm, again");
            assert_beats(&mut impatient(&server), "new, after invalidations");
        });
        assert_beats(&mut warm, "warm, after the change");
    }
    server.discard().unwrap();
}

#[test]
fn the_worker_beats_on_the_board_while_the_sessions_are_locked() {
    let (server, mut c) = boarded("board-locked-worker", &["pg_claims.worker = on"]);
    granted(&mut c, "SD-1", "s1");
    let mut managed = connect(&server, "postgres");
    assert_eq!(json(&mut managed, "SELECT start_heartbeat('s1')", &[])["success"], true);
    // Answered by the board from the second one on.
    let beats = "SELECT last_success_at::text FROM heartbeat_connections";
    for _ in 0..2 {
        let before = value(&mut c, beats);
        wait_until("the worker to beat", || value(&mut c, beats) != before);
    }
    let table = value(&mut c, "SELECT 'claude_sessions'::regclass::oid").unwrap();
    let latest = format!("SELECT latest_heartbeat({table}, 's1', '-infinity')");
    while_a_change_waits(&server, "claude_sessions", CHANGE, || {
        // The first may have been under way.
        for _ in 0..2 {
            let before = value(&mut c, &latest);
            wait_until("the worker to beat on the board", || value(&mut c, &latest) > before);
        }
    });
    server.discard().unwrap();
}
