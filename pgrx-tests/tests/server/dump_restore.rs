//! Claims, history, tokens and the binding survive dump and restore.

use pg_claims_tests::{TestDb, json};

use crate::support::*;

const EVERYTHING: &str = "
    SELECT jsonb_build_object(
        'sessions', (SELECT jsonb_agg(to_jsonb(s) ORDER BY session_id) FROM claude_sessions s),
        'claims', (SELECT jsonb_agg(to_jsonb(c) ORDER BY claim_id) FROM sd_claims c),
        'events', (SELECT jsonb_agg(to_jsonb(e) ORDER BY event_id) FROM session_lifecycle_events e),
        'binding', (SELECT jsonb_agg(to_jsonb(b)) FROM directive_binding b),
        'directives', (SELECT jsonb_agg(to_jsonb(d) ORDER BY sd_id) FROM v_directives d))";

fn restored(db: &TestDb, source: &mut postgres::Client) -> (TestDb, postgres::Client) {
    let copy = TestDb::empty();
    copy.psql(&db.dump());
    let mut c = copy.connect();
    assert_eq!(json(&mut c, EVERYTHING, &[]), json(source, EVERYTHING, &[]));
    assert_in_step(&mut c);
    (copy, c)
}

fn some_history(c: &mut postgres::Client, sds: [&str; 3]) -> i64 {
    granted(c, sds[0], "s1");
    release(c, "s1");
    granted(c, sds[1], "s1");
    age_heartbeat(c, "s1", "1 hour");
    granted(c, sds[1], "s2");
    json(c, "SELECT end_session('s3')", &[]);
    granted(c, sds[2], "s1")
}

#[test]
fn the_own_backlog_survives() {
    let (db, mut source) = coordinated();
    let last = some_history(&mut source, ["SD-1", "SD-2", "SD-3"]);
    let (_copy, mut c) = restored(&db, &mut source);
    assert_eq!(claim(&mut c, "SD-3", "s2")["claimed_by"], "s1");
    assert!(granted(&mut c, "SD-4", "s2") > last, "tokens do not repeat");
    assert_eq!(claim(&mut c, "SD-5", "s3")["error"], "session_released");
    c.batch_execute("UPDATE strategic_directives_v2 SET status = 'completed' WHERE sd_id = 'SD-3'")
        .unwrap();
    assert_in_step(&mut c);
}

#[test]
fn a_bound_backlog_of_the_very_name_of_the_own_one_survives() {
    let db = TestDb::empty();
    let mut source = db.connect();
    source
        .batch_execute(
            "CREATE TABLE strategic_directives_v2 (id serial PRIMARY KEY, sd_key varchar(50), legacy_id varchar(50),
                 status varchar(50), is_working_on boolean, active_session_id text);
             INSERT INTO strategic_directives_v2 (sd_key, legacy_id) VALUES ('K-1', 'L-1'), ('K-2', NULL), (NULL, 'L-3');
             CREATE EXTENSION pg_claims;
             SELECT bind_directives('strategic_directives_v2', '{sd_key,legacy_id}')",
        )
        .unwrap();
    for session in ["s1", "s2", "s3"] {
        register(&mut source, session);
    }
    let last = some_history(&mut source, ["K-1", "K-2", "L-3"]);
    let (copy, mut c) = restored(&db, &mut source);
    assert_eq!(claim(&mut c, "L-3", "s2")["claimed_by"], "s1");
    assert!(granted(&mut c, "L-1", "s2") > last);
    c.batch_execute(
        "UPDATE strategic_directives_v2 SET status = 'completed' WHERE legacy_id = 'L-3'",
    )
    .unwrap();
    assert_in_step(&mut c);
    // And once more: what was restored can be dumped.
    let (_again, mut c) = restored(&copy, &mut c);
    release(&mut c, "s2");
    c.batch_execute("SELECT unbind_directives(); DROP EXTENSION pg_claims").unwrap();
    assert_eq!(count(&mut c, "SELECT count(*) FROM strategic_directives_v2"), 3);
}

#[test]
fn privileges_survive() {
    let (db, mut source) = coordinated();
    let worker = db.role("worker");
    json(&mut source, "SELECT grant_coordination($1, 'worker')", &[&worker]);
    register(&mut db.connect_as(&worker), "theirs");
    let (copy, mut c) = restored(&db, &mut source);
    granted(&mut copy.connect_as(&worker), "SD-1", "theirs");
    let error = copy.connect_as(&worker).query("SELECT end_session('s1')", &[]).unwrap_err();
    assert_eq!(pg_claims_tests::sqlstate(&error), "42501");
    assert_in_step(&mut c);
    // The copy's privileges must go before the role can.
    drop(copy);
}
