//! Conflicts, a person's stop sign, and an operator's force.

use std::sync::Barrier;
use std::thread;

use pg_claims_tests::{backend_pid, hint, json, message, sqlstate, wait_until_blocked};
use postgres::Client;
use serde_json::Value;

use crate::support::*;

fn declare(c: &mut Client, a: &str, b: &str) {
    let answer = json(c, "SELECT declare_conflict($1, $2, 'same_files')", &[&a, &b]);
    assert_eq!(answer["success"], true, "{answer}");
}

#[test]
fn a_conflict_with_what_a_live_session_holds_refuses_the_claim() {
    let (_db, mut c) = coordinated();
    declare(&mut c, "SD-2", "SD-1");
    granted(&mut c, "SD-1", "s1");
    let refusal = claim(&mut c, "SD-2", "s2");
    assert_eq!(refusal["error"], "conflict", "{refusal}");
    assert_eq!(refusal["sd_id"], "SD-2");
    assert_eq!(refusal["conflict_type"], "same_files");
    assert_eq!(refusal["conflicting_sd"], "SD-1");
    assert_eq!(refusal["conflicting_session"], "s1");
    assert_eq!(
        value(&mut c, "SELECT sd_start('SD-2', 's2')").unwrap().lines().next().unwrap(),
        "❌ SD-2 is in conflict (same_files) with SD-1, which s1 has claimed"
    );
    // By hand it is refused as well.
    let error = c
        .batch_execute("UPDATE claude_sessions SET sd_id = 'SD-2' WHERE session_id = 's2'")
        .unwrap_err();
    assert_eq!(sqlstate(&error), "55000");
    assert!(message(&error).contains("conflict (same_files) with SD-1"));
    // The session that holds the one may switch to the other.
    assert_eq!(claim(&mut c, "SD-2", "s1")["released_sd"], "SD-1");
    assert_eq!(claim(&mut c, "SD-1", "s2")["error"], "conflict");
    // A stale session blocks nobody.
    age_heartbeat(&mut c, "s1", "1 hour");
    granted(&mut c, "SD-1", "s2");
    assert_in_step(&mut c);
}

#[test]
fn a_conflict_that_is_resolved_or_only_a_warning_refuses_nothing() {
    let (_db, mut c) = coordinated();
    declare(&mut c, "SD-1", "SD-2");
    granted(&mut c, "SD-1", "s1");
    assert_eq!(json(&mut c, "SELECT resolve_conflict('SD-2', 'SD-1')", &[])["success"], true);
    assert_eq!(
        json(&mut c, "SELECT resolve_conflict('SD-2', 'SD-1')", &[])["error"],
        "no_conflict"
    );
    granted(&mut c, "SD-2", "s2");
    json(&mut c, "SELECT declare_conflict('SD-1', 'SD-3', 'taste', 'warning')", &[]);
    granted(&mut c, "SD-3", "s3");
    // Declared while both are held it evicts nobody.
    declare(&mut c, "SD-1", "SD-2");
    assert_eq!(beat(&mut c, "s2")["sd_id"], "SD-2");
    let on_record =
        "SELECT count(*) FROM sd_conflict_matrix WHERE sd_id_a = 'SD-1' AND sd_id_b = 'SD-2'";
    assert_eq!(count(&mut c, on_record), 2);
    for (call, code) in [
        ("declare_conflict('SD-1', 'SD-1', 'x')", "22023"),
        ("declare_conflict('SD-1', 'SD-2', ' ')", "22023"),
        ("declare_conflict('SD-1', 'SD-2', 'x', 'fatal')", "22023"),
        ("declare_conflict(NULL, 'SD-2', 'x')", "22023"),
    ] {
        let error = c.batch_execute(&format!("SELECT {call}")).unwrap_err();
        assert_eq!(sqlstate(&error), code, "{call}");
    }
    assert_eq!(
        json(&mut c, "SELECT declare_conflict('SD-1', 'X', 'x')", &[])["error"],
        "sd_not_found"
    );
}

#[test]
fn of_two_claims_in_conflict_at_one_instant_exactly_one_wins() {
    let (db, mut c) = coordinated();
    declare(&mut c, "SD-1", "SD-2");
    let mut clients = [db.connect(), db.connect()];
    for round in 0..100 {
        let start = Barrier::new(2);
        let answers: Vec<Value> = thread::scope(|scope| {
            let claims: Vec<_> = clients
                .iter_mut()
                .zip([("SD-1", "s1"), ("SD-2", "s2")])
                .map(|(client, (sd, session))| {
                    let start = &start;
                    scope.spawn(move || {
                        start.wait();
                        claim(client, sd, session)
                    })
                })
                .collect();
            claims.into_iter().map(|claim| claim.join().unwrap()).collect()
        });
        let won = answers.iter().filter(|answer| answer["success"] == true).count();
        assert_eq!(won, 1, "round {round}: {answers:#?}");
        let lost = answers.iter().find(|answer| answer["success"] == false).unwrap();
        assert_eq!(lost["error"], "conflict", "{lost}");
        assert!(lost["conflicting_session"].is_string());
        for session in ["s1", "s2"] {
            release(&mut c, session);
        }
    }
    assert_in_step(&mut c);
}

#[test]
fn three_sds_in_conflict_with_each_other_do_not_deadlock() {
    let (db, mut c) = coordinated();
    for (a, b) in [("SD-1", "SD-2"), ("SD-3", "SD-2"), ("SD-3", "SD-1")] {
        declare(&mut c, a, b);
    }
    let mut clients = [db.connect(), db.connect(), db.connect()];
    for _ in 0..50 {
        let start = Barrier::new(3);
        let won: usize = thread::scope(|scope| {
            let claims: Vec<_> = clients
                .iter_mut()
                .zip(1..)
                .map(|(client, n)| {
                    let start = &start;
                    scope.spawn(move || {
                        start.wait();
                        claim(client, &format!("SD-{n}"), &format!("s{n}"))["success"] == true
                    })
                })
                .collect();
            claims.into_iter().map(|claim| usize::from(claim.join().unwrap())).sum()
        });
        assert_eq!(won, 1);
        for n in 1..=3 {
            release(&mut c, &format!("s{n}"));
        }
    }
}

#[test]
fn under_a_snapshot_a_conflict_that_came_since_is_a_serialization_failure() {
    for level in ["REPEATABLE READ", "SERIALIZABLE"] {
        let (db, mut c) = coordinated();
        declare(&mut c, "SD-1", "SD-2");
        let mut old = db.connect();
        old.batch_execute(&format!("BEGIN ISOLATION LEVEL {level}; SELECT 1 FROM claude_sessions"))
            .unwrap();
        granted(&mut c, "SD-1", "s1");
        let error = old.query("SELECT claim_sd('SD-2', 's2')", &[]).unwrap_err();
        assert_eq!(sqlstate(&error), "40001", "{level}");
        assert_in_step(&mut c);
    }
}

#[test]
fn a_conflict_that_is_being_declared_is_seen_by_the_claim_that_waited() {
    let (db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    c.batch_execute("BEGIN").unwrap();
    declare(&mut c, "SD-1", "SD-2");
    let mut other = db.connect();
    let pid = backend_pid(&mut other);
    let claiming = thread::spawn(move || claim(&mut other, "SD-2", "s2"));
    wait_until_blocked(&db, pid);
    c.batch_execute("COMMIT").unwrap();
    assert_eq!(claiming.join().unwrap()["error"], "conflict");
}

#[test]
fn a_refusal_for_a_conflict_or_a_hold_writes_nothing() {
    let (_db, mut c) = coordinated();
    declare(&mut c, "SD-1", "SD-2");
    granted(&mut c, "SD-1", "s1");
    json(&mut c, "SELECT hold_sd('SD-3', 'wait for legal')", &[]);
    c.batch_execute("BEGIN READ ONLY").unwrap();
    assert_eq!(claim(&mut c, "SD-2", "s2")["error"], "conflict");
    assert_eq!(claim(&mut c, "SD-3", "s2")["error"], "held");
    assert_eq!(value(&mut c, "SELECT pg_current_xact_id_if_assigned()"), None);
    c.batch_execute("COMMIT").unwrap();
}

#[test]
fn a_stop_sign_keeps_an_sd_from_being_claimed() {
    let (db, mut c) = coordinated();
    let held = granted(&mut c, "SD-1", "s1");
    let answer = json(&mut c, "SELECT hold_sd('SD-1', 'wait for legal')", &[]);
    assert_eq!(answer["claimed_by"], "s1", "{answer}");
    assert_eq!(answer["held_by"], "postgres");
    // Who has it keeps it, until it is released or goes stale.
    assert_eq!(beat(&mut c, "s1")["claim_id"], held);
    age_heartbeat(&mut c, "s1", "1 hour");
    let refusal = claim(&mut c, "SD-1", "s2");
    assert_eq!(refusal["error"], "held", "{refusal}");
    assert_eq!(refusal["reason"], "wait for legal");
    assert!(refusal["held_at"].is_string());
    let error = c
        .batch_execute("UPDATE claude_sessions SET sd_id = 'SD-1' WHERE session_id = 's2'")
        .unwrap_err();
    assert_eq!(sqlstate(&error), "55000");
    assert!(hint(&error).contains("unhold_sd()"));
    assert_eq!(json(&mut c, "SELECT unhold_sd('SD-1')", &[])["success"], true);
    assert_eq!(json(&mut c, "SELECT unhold_sd('SD-1')", &[])["error"], "not_held");
    assert_eq!(claim(&mut c, "SD-1", "s2")["success"], true);
    assert_eq!(json(&mut c, "SELECT hold_sd('X', 'why')", &[])["error"], "sd_not_found");
    for bad in ["NULL", "' '"] {
        let error = c.batch_execute(&format!("SELECT hold_sd('SD-1', {bad})")).unwrap_err();
        assert_eq!(sqlstate(&error), "22023");
    }
    let copy = pg_claims_tests::TestDb::empty();
    json(&mut c, "SELECT hold_sd('SD-4', 'also there')", &[]);
    declare(&mut c, "SD-5", "SD-6");
    copy.psql(&db.dump());
    let mut restored = copy.connect();
    assert_eq!(claim(&mut restored, "SD-4", "s3")["error"], "held");
    granted(&mut restored, "SD-5", "s3");
    assert_eq!(claim(&mut restored, "SD-6", "s1")["error"], "conflict");
}

#[test]
fn an_operator_takes_over_from_a_live_session_with_a_reason_that_is_told() {
    let (_db, mut c) = coordinated();
    let lost = granted(&mut c, "SD-1", "s1");
    for bad in ["NULL", "''", "' '"] {
        let error =
            c.batch_execute(&format!("SELECT takeover_sd('SD-1', 's2', {bad})")).unwrap_err();
        assert_eq!(sqlstate(&error), "22023", "{bad}");
    }
    let answer = json(&mut c, "SELECT takeover_sd('SD-1', 's2', 'production is down')", &[]);
    assert_eq!(answer["success"], true, "{answer}");
    assert_eq!(answer["took_over"]["session_id"], "s1");
    let told = beat(&mut c, "s1");
    assert_eq!(told["lost_claim"]["claim_id"], lost);
    assert_eq!(told["lost_claim"]["reason"], "production is down");
    assert_eq!(told["lost_claim"]["taken_over_by"], "s2");
    assert_eq!(events(&mut c, "s1"), ["registered", "claimed", "taken_over"]);
    let audit = "SELECT actor || ': ' || reason FROM session_lifecycle_events WHERE event_type = 'taken_over'";
    assert_eq!(value(&mut c, audit).as_deref(), Some("postgres: production is down"));
    // Free, its own, unknown, ended: as a claim.
    assert_eq!(
        json(&mut c, "SELECT takeover_sd('SD-1', 's2', 'again')", &[])["already_owned"],
        true
    );
    assert_eq!(json(&mut c, "SELECT takeover_sd('SD-2', 's3', 'mine')", &[])["success"], true);
    assert_eq!(json(&mut c, "SELECT takeover_sd('X', 's3', 'mine')", &[])["error"], "sd_not_found");
    assert_in_step(&mut c);
}

#[test]
fn force_waits_for_a_guard_and_the_owner_s_heartbeats_do_not() {
    let (db, mut c) = coordinated();
    let held = granted(&mut c, "SD-1", "s1");
    c.batch_execute("BEGIN").unwrap();
    c.query("SELECT assert_claim('SD-1', 's1', $1)", &[&held]).unwrap();
    let mut operator = db.connect();
    let pid = backend_pid(&mut operator);
    let taking = thread::spawn(move || {
        json(&mut operator, "SELECT takeover_sd('SD-1', 's2', 'urgent')", &[])
    });
    wait_until_blocked(&db, pid);
    let mut beating = db.connect();
    beating.batch_execute("SET lock_timeout = '1ms'").unwrap();
    assert_eq!(beat(&mut beating, "s1")["claim_id"], held);
    c.batch_execute("COMMIT").unwrap();
    assert_eq!(taking.join().unwrap()["success"], true);
    assert_in_step(&mut c);
}

#[test]
fn only_operators_declare_stop_and_force() {
    let (db, mut c) = coordinated();
    let worker = db.role("worker");
    json(&mut c, "SELECT grant_coordination($1, 'worker')", &[&worker]);
    let mut w = db.connect_as(&worker);
    for call in [
        "declare_conflict('SD-1', 'SD-2', 'x')",
        "resolve_conflict('SD-1', 'SD-2')",
        "hold_sd('SD-1', 'x')",
        "unhold_sd('SD-1')",
        "takeover_sd('SD-1', 's1', 'x')",
        "guard_table('sd_claims', 'sd_id')",
    ] {
        let error = w.batch_execute(&format!("SELECT {call}")).unwrap_err();
        assert_eq!(sqlstate(&error), "42501", "{call}");
    }
}
