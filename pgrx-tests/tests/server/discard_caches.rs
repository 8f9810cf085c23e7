//! The server may forget what it knows of its catalogues at any moment. Built with assertions it can be told to do
//! so at every opportunity; then whoever kept a part of what it forgot reads wiped memory, and whoever waits for
//! nothing to change waits for ever.

use pg_claims_tests::{TestDb, json, sqlstate};
use postgres::Client;

use crate::support::*;

/// A connection for which the server forgets all the time. `None` where the server was not built for that, which is
/// then what it says.
fn forgetting(db: &TestDb) -> Option<Client> {
    let mut c = db.connect();
    let asked = c.batch_execute("SET debug_discard_caches = 1");
    if value(&mut c, "SELECT current_setting('debug_assertions')").as_deref() == Some("on") {
        asked.unwrap();
        // Each call takes seconds, and not for ever.
        c.batch_execute("SET statement_timeout = '900s'").unwrap();
        return Some(c);
    }
    assert_eq!(sqlstate(&asked.unwrap_err()), "22023");
    None
}

#[test]
fn every_call_ends_and_is_right_whatever_the_server_forgets() {
    let (db, mut c) = coordinated();
    let Some(mut f) = forgetting(&db) else { return };
    let f = &mut f;
    assert_eq!(beat(f, "s1")["success"], true);
    let held = granted(f, "SD-1", "s1");
    assert_eq!(claim(f, "SD-1", "s2")["claimed_by"], "s1");
    assert_eq!(json(f, "SELECT heartbeat_sessions('{s1}')", &[])["sessions"][0]["claim_id"], held);
    assert_eq!(release(f, "s1")["released_sd"], "SD-1");
    assert_in_step(&mut c);
}

#[test]
fn what_is_written_by_hand_is_made_whole_whatever_the_server_forgets() {
    let (db, mut c) = coordinated();
    let Some(mut f) = forgetting(&db) else { return };
    let f = &mut f;
    json(f, "SELECT register_session('f1')", &[]);
    f.batch_execute("UPDATE claude_sessions SET sd_id = 'SD-3' WHERE session_id = 'f1'").unwrap();
    assert_in_step(&mut c);
    f.batch_execute(
        "INSERT INTO strategic_directives_v2 (sd_id, title, is_working_on) VALUES ('SD-10', repeat('x', 100000), true)",
    )
    .unwrap();
    f.batch_execute("UPDATE strategic_directives_v2 SET status = 'completed' WHERE sd_id = 'SD-3'")
        .unwrap();
    assert_in_step(&mut c);
    assert_eq!(count(&mut c, "SELECT count(*) FROM claude_sessions WHERE sd_id IS NOT NULL"), 0);
}

#[test]
fn the_queue_and_the_reaper_end_whatever_the_server_forgets() {
    let (db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    age_heartbeat(&mut c, "s1", "1 hour");
    let Some(mut f) = forgetting(&db) else { return };
    let f = &mut f;
    assert_eq!(json(f, "SELECT claim_next_sd('s2')", &[])["sd_id"], "SD-1");
    age_heartbeat(&mut c, "s2", "1 hour");
    let reaped = json(f, "SELECT cleanup_stale_sessions()", &[]);
    assert_eq!(reaped["stale_sessions_cleaned"], 1, "{reaped}");
    for view in ["v_active_sessions", "v_sd_next", "v_directives"] {
        f.batch_execute(&format!("SELECT * FROM {view}")).unwrap();
    }
    assert_in_step(&mut c);
}

#[test]
fn a_backlog_is_bound_and_used_whatever_the_server_forgets() {
    let (db, mut c) = coordinated();
    c.batch_execute(
        "CREATE TABLE items (key text PRIMARY KEY, title text, status text, is_working_on boolean, active_session_id text);
         INSERT INTO items VALUES ('I-1'), ('I-2')",
    )
    .unwrap();
    let Some(mut f) = forgetting(&db) else { return };
    let f = &mut f;
    json(f, "SELECT bind_directives('items', '{key}')", &[]);
    granted(f, "I-1", "s1");
    f.batch_execute("UPDATE items SET is_working_on = true, active_session_id = 'liar'").unwrap();
    assert_in_step(&mut c);
}
