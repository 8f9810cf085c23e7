//! Whatever a superuser, a replica or half a restore leaves in the tables, whoever meets it settles it.

use pg_claims_tests::{TestDb, backend_pid, json, sqlstate, wait_until, wait_until_blocked};
use postgres::Client;
use serde_json::Value;

use crate::support::*;
use crate::worker::{PRELOAD, is_free, served};

/// How often the audit tells of a repair.
fn repairs(c: &mut Client) -> i64 {
    count(c, "SELECT count(*) FROM session_lifecycle_events WHERE event_type = 'repaired'")
}

/// Ways in which an acquisition stays open that no session holds; SD-1 is s1's before.
const ORPHANS: [(&str, &str); 4] = [
    ("the session was deleted", "DELETE FROM claude_sessions WHERE session_id = 's1'"),
    (
        "the session let go",
        "UPDATE claude_sessions SET sd_id = NULL, claim_id = NULL, claimed_at = NULL, status = 'idle'
          WHERE session_id = 's1'",
    ),
    (
        "the session holds another SD",
        "UPDATE claude_sessions SET sd_id = 'SD-2', claim_id = nextval('sd_claims_claim_id_seq') WHERE session_id = 's1';
         INSERT INTO sd_claims (claim_id, sd_id, session_id)
         SELECT claim_id, sd_id, session_id FROM claude_sessions WHERE session_id = 's1'",
    ),
    ("the sessions were truncated", "TRUNCATE claude_sessions"),
];

/// SD-1 is open in the history, and nobody holds it.
fn orphaned(how: &str) -> (TestDb, Client) {
    let (db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    as_replica(&mut c, how);
    for session in ["s1", "s2", "s3"] {
        register(&mut c, session);
    }
    (db, c)
}

/// History and sessions agree; what the audit lacks of writes past the triggers is not asked.
fn assert_settled(c: &mut Client) {
    let wrong = "
        SELECT count(*) FROM (
            SELECT FROM sd_claims h WHERE released_at IS NULL
               AND NOT EXISTS (SELECT FROM claude_sessions s WHERE s.claim_id = h.claim_id
                                  AND s.sd_id = h.sd_id AND s.session_id = h.session_id)
             UNION ALL
            SELECT FROM claude_sessions s WHERE sd_id IS NOT NULL
               AND NOT EXISTS (SELECT FROM sd_claims h WHERE s.claim_id = h.claim_id
                                  AND s.sd_id = h.sd_id AND s.session_id = h.session_id
                                  AND h.released_at IS NULL)) wrong";
    assert_eq!(count(c, wrong), 0);
}

#[test]
fn whoever_wants_an_sd_that_nobody_holds_gets_it() {
    type Verb = (&'static str, fn(&mut Client) -> Value);
    let verbs: [Verb; 5] = [
        ("claim_sd", |c| claim(c, "SD-1", "s2")),
        ("claim_sd by the one who had it", |c| claim(c, "SD-1", "s1")),
        ("takeover_sd", |c| json(c, "SELECT takeover_sd('SD-1', 's2', 'urgent')", &[])),
        ("claim_next_sd", |c| json(c, "SELECT claim_next_sd('s2')", &[])),
        ("by hand", |c| {
            c.batch_execute("UPDATE claude_sessions SET sd_id = 'SD-1' WHERE session_id = 's2'")
                .unwrap();
            serde_json::json!({ "success": true, "sd_id": "SD-1" })
        }),
    ];
    for (state, how) in ORPHANS {
        for (name, verb) in &verbs {
            let (_db, mut c) = orphaned(how);
            let answer = verb(&mut c);
            assert_eq!(answer["success"], true, "{name} where {state}: {answer}");
            assert_eq!(answer["sd_id"], "SD-1", "{name} where {state}: {answer}");
            assert_settled(&mut c);
            assert_eq!(repairs(&mut c), 1, "{name} where {state}");
        }
    }
}

#[test]
fn a_repair_tells_what_was_wrong_and_is_rolled_back_with_the_claim() {
    let (_db, mut c) = orphaned(ORPHANS[0].1);
    let orphan = count(&mut c, "SELECT claim_id FROM sd_claims");
    c.batch_execute("BEGIN").unwrap();
    granted(&mut c, "SD-1", "s2");
    c.batch_execute("ROLLBACK").unwrap();
    assert_eq!(repairs(&mut c), 0);
    granted(&mut c, "SD-1", "s2");
    let event = c
        .query_one(
            "SELECT session_id, sd_id, claim_id, reason, detail FROM session_lifecycle_events
              WHERE event_type = 'repaired'",
            &[],
        )
        .unwrap();
    assert_eq!(event.get::<_, String>(0), "s1");
    assert_eq!(event.get::<_, String>(1), "SD-1");
    assert_eq!(event.get::<_, i64>(2), orphan);
    assert_eq!(event.get::<_, String>(3), "the acquisition was open, and no session held it");
    assert_eq!(event.get::<_, Value>(4)["done"], "the acquisition is closed");
    let end = "SELECT release_reason || (released_at >= claimed_at) FROM sd_claims ORDER BY claim_id LIMIT 1";
    assert_eq!(value(&mut c, end).as_deref(), Some("repairedtrue"));
}

#[test]
fn two_that_meet_an_orphan_at_once_settle_it_once() {
    let (db, mut c) = orphaned(ORPHANS[0].1);
    let mut first = db.connect();
    first.batch_execute("BEGIN").unwrap();
    granted(&mut first, "SD-1", "s2");
    let mut second = db.connect();
    let pid = backend_pid(&mut second);
    let waiting = std::thread::spawn(move || claim(&mut second, "SD-1", "s3"));
    wait_until_blocked(&db, pid);
    first.batch_execute("COMMIT").unwrap();
    assert_eq!(waiting.join().unwrap()["claimed_by"], "s2");
    assert_eq!(repairs(&mut c), 1);
    assert_settled(&mut c);
}

#[test]
fn an_orphan_under_an_open_guard_is_not_closed_behind_its_back() {
    let (db, mut c) = coordinated();
    let claim_id = granted(&mut c, "SD-1", "s1");
    let mut guarding = db.connect();
    guarding.batch_execute("BEGIN").unwrap();
    guarding.query("SELECT assert_claim('SD-1', 's1', $1)", &[&claim_id]).unwrap();
    as_replica(&mut c, ORPHANS[1].1);
    let next = json(&mut c, "SELECT claim_next_sd('s2')", &[]);
    assert_eq!(next["sd_id"], "SD-2", "the queue waits for nobody: {next}");
    guarding.batch_execute("COMMIT").unwrap();
    release(&mut c, "s2");
    granted(&mut c, "SD-1", "s2");
}

/// Ways in which a session holds what the history does not have open; SD-1 is s1's.
const UNKNOWN: [(&str, &str); 3] = [
    ("it was closed", "UPDATE sd_claims SET released_at = claimed_at, release_reason = 'x'"),
    ("it was deleted", "DELETE FROM sd_claims"),
    ("the history was truncated", "TRUNCATE sd_claims"),
];

fn unknown_to_history(how: &str) -> (TestDb, Client, i64) {
    let (db, mut c) = coordinated();
    let claim_id = granted(&mut c, "SD-1", "s1");
    as_replica(&mut c, how);
    (db, c, claim_id)
}

#[test]
fn a_holder_unknown_to_the_history_goes_on_holding() {
    type Verb = (&'static str, fn(&mut Client, i64));
    let verbs: [Verb; 3] = [
        ("claim_sd", |c, claim_id| {
            let answer = claim(c, "SD-1", "s1");
            assert_eq!(answer["already_owned"], true, "{answer}");
            assert_eq!(answer["claim_id"], claim_id, "{answer}");
        }),
        ("claim_next_sd", |c, claim_id| {
            let answer = json(c, "SELECT claim_next_sd('s1')", &[]);
            assert_eq!(answer["claim_id"], claim_id, "{answer}");
        }),
        ("assert_claim", |c, claim_id| {
            c.query("SELECT assert_claim('SD-1', 's1', $1)", &[&claim_id]).unwrap();
        }),
    ];
    for (state, how) in UNKNOWN {
        for (name, verb) in &verbs {
            let (_db, mut c, claim_id) = unknown_to_history(how);
            assert_eq!(claim(&mut c, "SD-1", "s2")["claimed_by"], "s1", "{name} where {state}");
            verb(&mut c, claim_id);
            assert_settled(&mut c);
            assert_eq!(repairs(&mut c), 1, "{name} where {state}");
            assert_eq!(release(&mut c, "s1")["claim_id"], claim_id);
            granted(&mut c, "SD-1", "s2");
        }
    }
}

#[test]
fn a_claim_unknown_to_the_history_ends_like_any_other() {
    type Verb = (&'static str, fn(&mut Client));
    let verbs: [Verb; 6] = [
        ("release_sd", |c| assert_eq!(release(c, "s1")["success"], true)),
        ("end_session", |c| assert_eq!(json(c, "SELECT end_session('s1')", &[])["success"], true)),
        ("switch", |c| assert!(granted(c, "SD-2", "s1") > 0)),
        ("takeover_sd", |c| {
            let answer = json(c, "SELECT takeover_sd('SD-1', 's2', 'urgent')", &[]);
            assert_eq!(answer["success"], true, "{answer}");
        }),
        ("reaped", |c| {
            age_heartbeat(c, "s1", "1 day");
            let answer = json(c, "SELECT cleanup_stale_sessions()", &[]);
            assert_eq!(answer["stale_sessions_cleaned"], 1, "{answer}");
        }),
        ("by hand", |c| {
            c.batch_execute("UPDATE claude_sessions SET sd_id = NULL WHERE session_id = 's1'")
                .unwrap();
        }),
    ];
    for (state, how) in UNKNOWN {
        for (name, verb) in &verbs {
            let (_db, mut c, claim_id) = unknown_to_history(how);
            verb(&mut c);
            assert_settled(&mut c);
            assert_eq!(repairs(&mut c), 1, "{name} where {state}");
            let known = c
                .query_one(
                    "SELECT released_at IS NOT NULL FROM sd_claims WHERE claim_id = $1",
                    &[&claim_id],
                )
                .unwrap();
            assert!(known.get::<_, bool>(0), "{name} where {state}");
        }
    }
}

#[test]
fn an_acquisition_that_is_another_one_in_the_history_is_not_touched() {
    let (_db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    let others = granted(&mut c, "SD-2", "s2");
    // s1 holds SD-1 by the number of s2's acquisition.
    as_replica(
        &mut c,
        &format!("UPDATE claude_sessions SET claim_id = {others} WHERE session_id = 's1'"),
    );
    assert_eq!(release(&mut c, "s1")["success"], true);
    let open = "SELECT session_id FROM sd_claims WHERE released_at IS NULL AND sd_id = 'SD-2'";
    assert_eq!(value(&mut c, open).as_deref(), Some("s2"), "s2's claim was closed");
    granted(&mut c, "SD-1", "s3");
    assert_settled(&mut c);
}

/// The writes by which a session in replica mode, where triggers do not fire, ends or renames a claimed SD.
const FINISHED: [(&str, &str); 3] = [
    ("completed", "UPDATE strategic_directives_v2 SET status = 'completed' WHERE sd_id = 'SD-1'"),
    ("deleted", "DELETE FROM strategic_directives_v2 WHERE sd_id = 'SD-1'"),
    ("renamed", "UPDATE strategic_directives_v2 SET sd_id = 'SD-X' WHERE sd_id = 'SD-1'"),
];

#[test]
fn what_a_replica_did_to_a_claimed_sd_is_noticed_by_whoever_comes_next() {
    type Verb = (&'static str, fn(&mut Client, &str));
    let verbs: [Verb; 5] = [
        ("update_session_heartbeat", |c, reason| {
            let answer = beat(c, "s1");
            assert_eq!(answer["lost_claim"]["reason"], reason, "{answer}");
            assert!(answer["sd_id"].is_null(), "{answer}");
        }),
        ("heartbeat_sessions", |c, reason| {
            let answer = json(c, "SELECT heartbeat_sessions('{s1,s2}')", &[]);
            assert_eq!(answer["sessions"][0]["lost_claim"]["reason"], reason, "{answer}");
        }),
        ("claim_sd by the holder", |c, _| {
            let answer = claim(c, "SD-1", "s1");
            assert_eq!(answer["success"], false, "{answer}");
        }),
        ("claim_next_sd by the holder", |c, _| {
            let answer = json(c, "SELECT claim_next_sd('s1')", &[]);
            assert_eq!(answer["already_owned"], false, "{answer}");
            assert_ne!(answer["sd_id"], "SD-1", "{answer}");
        }),
        ("cleanup_stale_sessions", |c, _| {
            json(c, "SELECT cleanup_stale_sessions()", &[]);
        }),
    ];
    for (state, how) in FINISHED {
        let reason = if state == "completed" { "sd_completed" } else { "sd_deleted" };
        for (name, verb) in &verbs {
            // On a connection that has called a function before, and on one that has not.
            for warm in [false, true] {
                let (db, mut c) = coordinated();
                granted(&mut c, "SD-1", "s1");
                as_replica(&mut c, how);
                let mut next = db.connect();
                if warm {
                    beat(&mut next, "s2");
                }
                verb(&mut next, reason);
                let held =
                    value(&mut c, "SELECT sd_id FROM claude_sessions WHERE session_id = 's1'");
                assert_ne!(held.as_deref(), Some("SD-1"), "{name} where it was {state}");
                let end = "SELECT release_reason FROM sd_claims WHERE sd_id = 'SD-1'";
                assert_eq!(value(&mut c, end).as_deref(), Some(reason), "{name}, {state}");
            }
        }
    }
}

#[test]
fn a_refusal_of_a_finished_sd_lets_its_holder_go() {
    let (_db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    as_replica(&mut c, FINISHED[0].1);
    assert_eq!(claim(&mut c, "SD-1", "s2")["error"], "sd_terminal_status");
    assert_eq!(beat(&mut c, "s1")["lost_claim"]["reason"], "sd_completed");
    assert_in_step(&mut c);
}

#[test]
fn a_heartbeat_does_not_wait_for_the_backlog_to_look_at_it() {
    let (db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    beat(&mut c, "s1");
    let mut ddl = db.connect();
    ddl.batch_execute("BEGIN; LOCK TABLE strategic_directives_v2").unwrap();
    c.batch_execute("SET lock_timeout = '5s'").unwrap();
    assert_eq!(beat(&mut c, "s1")["success"], true);
    assert_eq!(json(&mut c, "SELECT heartbeat_sessions('{s1}')", &[])["success"], true);
    let mut fresh = db.connect();
    fresh.batch_execute("SET lock_timeout = '5s'").unwrap();
    assert_eq!(beat(&mut fresh, "s1")["success"], true);
}

#[test]
fn functions_called_by_a_replica_leave_everything_in_step() {
    let (_db, mut c) = coordinated();
    c.batch_execute("SET session_replication_role = replica").unwrap();
    granted(&mut c, "SD-1", "s1");
    granted(&mut c, "SD-2", "s1");
    release(&mut c, "s1");
    granted(&mut c, "SD-3", "s2");
    age_heartbeat(&mut c, "s2", "1 day");
    granted(&mut c, "SD-3", "s3");
    json(&mut c, "SELECT end_session('s3')", &[]);
    c.batch_execute("RESET session_replication_role").unwrap();
    assert_in_step(&mut c);
    assert_eq!(repairs(&mut c), 0);
}

#[test]
fn the_worker_settles_what_nobody_meets() {
    for (name, settings) in [("settle-preloaded", vec![PRELOAD]), ("settle-dynamic", vec![])] {
        let (_server, mut c) = served(name, &settings);
        for (sd, session) in [("SD-1", "s1"), ("SD-2", "s2"), ("SD-3", "s3")] {
            granted(&mut c, sd, session);
        }
        as_replica(&mut c, "DELETE FROM claude_sessions WHERE session_id = 's1'");
        as_replica(&mut c, "DELETE FROM sd_claims WHERE session_id = 's2'");
        as_replica(
            &mut c,
            "UPDATE strategic_directives_v2 SET status = 'cancelled' WHERE sd_id = 'SD-3'",
        );
        wait_until("the worker to settle it", || repairs(&mut c) == 2 && is_free(&mut c, "SD-3"));
        assert_settled(&mut c);
        assert_eq!(claim(&mut c, "SD-2", "s3")["claimed_by"], "s2");
        assert_eq!(beat(&mut c, "s3")["lost_claim"]["reason"], "sd_cancelled");
    }
}

#[test]
fn under_repeatable_read_a_contradiction_is_settled_or_the_transaction_is_to_be_tried_again() {
    for isolation in ["REPEATABLE READ", "SERIALIZABLE"] {
        let (_db, mut c) = orphaned(ORPHANS[0].1);
        c.batch_execute(&format!("BEGIN ISOLATION LEVEL {isolation}")).unwrap();
        let answer = c.query_one("SELECT claim_sd('SD-1', 's2')", &[]);
        match answer {
            Ok(row) => {
                assert_eq!(row.get::<_, Value>(0)["success"], true);
                c.batch_execute("COMMIT").unwrap();
                assert_settled(&mut c);
            }
            Err(error) => assert_eq!(sqlstate(&error), "40001"),
        }
    }
}

#[test]
fn moments_without_end_that_a_replica_wrote_keep_nobody_from_anything() {
    for harm in [
        "UPDATE claude_sessions SET claimed_at = '-infinity' WHERE session_id = 's1'",
        "UPDATE claude_sessions SET claimed_at = 'infinity' WHERE session_id = 's1'",
        "UPDATE claude_sessions SET silent_until = 'infinity' WHERE session_id = 's1'",
        "UPDATE claude_sessions SET stale_after = '-1 day' WHERE session_id = 's1'",
        "UPDATE claude_sessions SET claimed_at = '-infinity' WHERE session_id = 's1'; DELETE FROM sd_claims",
        "UPDATE claude_sessions SET claimed_at = 'infinity' WHERE session_id = 's1'; DELETE FROM sd_claims",
    ] {
        for end in [
            "SELECT release_sd('s1')",
            "SELECT end_session('s1')",
            "SELECT takeover_sd('SD-1', 's2', 'urgent')",
            "SELECT claim_sd('SD-2', 's1')",
            "UPDATE claude_sessions SET sd_id = NULL WHERE session_id = 's1'",
            "DELETE FROM claude_sessions WHERE session_id = 's1'",
            "UPDATE strategic_directives_v2 SET status = 'completed' WHERE sd_id = 'SD-1'",
        ] {
            let (_db, mut c) = coordinated();
            granted(&mut c, "SD-1", "s1");
            as_replica(&mut c, harm);
            c.batch_execute(
                "SELECT * FROM v_active_sessions; SELECT * FROM v_sd_next; SELECT sd_next()",
            )
            .unwrap();
            let beats = json(&mut c, "SELECT heartbeat_sessions('{s1,s2,s3}')", &[]);
            assert_eq!(beats["success"], true, "{harm}: {beats}");
            register(&mut c, "s1");
            c.batch_execute(end).unwrap_or_else(|error| panic!("{end} after {harm}: {error:?}"));
            assert_settled(&mut c);
        }
    }
}

#[test]
fn a_replicated_session_belongs_to_the_role_of_its_name() {
    let (db, mut c) = coordinated();
    let (owner, other) = (db.role("owner"), db.role("other"));
    for role in [&owner, &other] {
        json(&mut c, "SELECT grant_coordination($1, 'worker')", &[role]);
    }
    // The number is that of another role here, as it comes from another server.
    as_replica(
        &mut c,
        &format!(
            "INSERT INTO claude_sessions (session_id, owner_role, owner_oid)
             VALUES ('r1', '{owner}', '{other}'::regrole), ('r2', 'no such role', '{other}'::regrole)"
        ),
    );
    assert_eq!(beat(&mut db.connect_as(&owner), "r1")["success"], true);
    for session in ["r1", "r2"] {
        let call = format!("SELECT release_sd('{session}')");
        let error = db.connect_as(&other).query(&call, &[]).unwrap_err();
        assert_eq!(sqlstate(&error), "42501");
    }
    as_replica(
        &mut c,
        &format!(
            "UPDATE claude_sessions SET owner_oid = '{other}'::regrole WHERE session_id = 'r1'"
        ),
    );
    json(&mut c, "SELECT cleanup_stale_sessions()", &[]);
    assert_eq!(beat(&mut db.connect_as(&owner), "r1")["success"], true);
}

#[test]
fn a_replicated_binding_is_seen_at_once() {
    let (_db, mut c) = coordinated();
    c.batch_execute(
        "CREATE TABLE items (key text PRIMARY KEY, status text); INSERT INTO items VALUES ('I-1')",
    )
    .unwrap();
    as_replica(
        &mut c,
        "INSERT INTO directive_binding (bound_table, key_columns, status_column, terminal_statuses, bound_by)
         VALUES ('items', '{key}', 'status', '{completed}', 'somebody')",
    );
    assert_eq!(json(&mut c, "SELECT claim_next_sd('s1')", &[])["sd_id"], "I-1");
    assert_eq!(count(&mut c, "SELECT count(*) FROM v_directives"), 1);
    // The triggers on the table are for coordination_repair().
    let kinds =
        "SELECT string_agg(DISTINCT kind, ' ' ORDER BY kind) FROM coordination_repair(false)";
    assert_eq!(value(&mut c, kinds).as_deref(), Some("index trigger"));
    assert_eq!(count(&mut c, "SELECT count(*) FROM coordination_repair()"), 0);
    c.batch_execute("UPDATE items SET status = 'completed'").unwrap();
    assert_in_step(&mut c);
}
