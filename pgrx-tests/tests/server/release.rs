//! Releasing.

use pg_claims_tests::json;

use crate::support::*;

#[test]
fn a_release_clears_everything() {
    let (_db, mut c) = coordinated();
    let claim_id = granted(&mut c, "SD-1", "s1");
    let answer = release(&mut c, "s1");
    assert_eq!(answer["success"], true);
    assert_eq!(answer["released_sd"], "SD-1");
    assert_eq!(answer["reason"], "manual");
    assert_eq!(answer["claim_id"], claim_id);
    let stored = value(&mut c, "SELECT to_jsonb(released_at) FROM sd_claims").unwrap();
    let told: chrono::DateTime<chrono::Utc> =
        answer["released_at"].as_str().unwrap().parse().unwrap();
    assert_eq!(stored.trim_matches('"').parse::<chrono::DateTime<chrono::Utc>>().unwrap(), told);
    let row = "SELECT concat_ws('|', sd_id, claim_id, claimed_at, track, status) FROM claude_sessions WHERE session_id = 's1'";
    assert_eq!(value(&mut c, row).as_deref(), Some("idle"));
    assert_in_step(&mut c);
    assert_eq!(release(&mut c, "s1")["error"], "no_claim");
}

#[test]
fn any_reason_will_do() {
    let (_db, mut c) = coordinated();
    let longest = "because ".repeat(125);
    for reason in ["not in any list", "Überfällig ☃", "", "   ", "line\nbreak", longest.as_str()]
    {
        granted(&mut c, "SD-1", "s1");
        let answer = json(&mut c, "SELECT release_sd('s1', $1)", &[&reason]);
        assert_eq!(answer["success"], true, "{reason:?}");
        let expected = if reason.trim().is_empty() { "manual" } else { reason };
        assert_eq!(answer["reason"], expected);
        let stored =
            value(&mut c, "SELECT release_reason FROM sd_claims ORDER BY claim_id DESC LIMIT 1");
        assert_eq!(stored.as_deref(), Some(expected));
    }
    granted(&mut c, "SD-1", "s1");
    assert_eq!(json(&mut c, "SELECT release_sd('s1', NULL)", &[])["reason"], "manual");
    assert_in_step(&mut c);
}

#[test]
fn a_claim_id_releases_exactly_that_acquisition() {
    let (_db, mut c) = coordinated();
    let first = granted(&mut c, "SD-1", "s1");
    release(&mut c, "s1");
    let second = granted(&mut c, "SD-1", "s1");

    let late = json(&mut c, "SELECT release_sd('s1', 'late', $1)", &[&first]);
    assert_eq!(late["error"], "claim_lost");
    assert_eq!(late["lost_claim"]["claim_id"], first);
    assert_eq!(late["lost_claim"]["held_by"], "s1");
    assert_eq!(beat(&mut c, "s1")["claim_id"], second, "the newer claim stays");

    let foreign = json(&mut c, "SELECT release_sd('s2', 'not mine', $1)", &[&second]);
    assert_eq!(foreign["error"], "claim_lost");
    assert!(foreign.get("lost_claim").is_none(), "it never was that session's: {foreign}");

    let named = json(&mut c, "SELECT release_sd('s1', 'done', $1)", &[&second]);
    assert_eq!(named["success"], true);
    assert_in_step(&mut c);
}

#[test]
fn a_release_after_a_takeover_says_what_happened() {
    let (_db, mut c) = coordinated();
    let lost = granted(&mut c, "SD-1", "s1");
    age_heartbeat(&mut c, "s1", "10 minutes");
    granted(&mut c, "SD-1", "s2");
    let late = json(&mut c, "SELECT release_sd('s1', 'done', $1)", &[&lost]);
    assert_eq!(late["error"], "claim_lost");
    assert_eq!(late["lost_claim"]["taken_over_by"], "s2");
    assert_eq!(late["lost_claim"]["reason"], "taken_over");
    assert_eq!(release(&mut c, "s1")["error"], "no_claim");
    assert_eq!(claim(&mut c, "SD-1", "s3")["claimed_by"], "s2");
}

#[test]
fn unknown_and_ended_sessions_are_told_so() {
    let (_db, mut c) = coordinated();
    assert_eq!(release(&mut c, "nobody")["error"], "session_not_found");
    json(&mut c, "SELECT end_session('s1')", &[]);
    assert_eq!(release(&mut c, "s1")["error"], "session_released");
    assert_eq!(json(&mut c, "SELECT end_session('nobody')", &[])["error"], "session_not_found");
}

#[test]
fn there_is_one_release_sd() {
    let (_db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    // An untyped literal would be "not unique" with two overloads.
    c.batch_execute("SELECT release_sd('s1')").unwrap();
    let overloads = "SELECT count(*) FROM (SELECT proname FROM pg_proc p
        JOIN pg_depend d ON d.objid = p.oid AND d.classid = 'pg_proc'::regclass AND d.deptype = 'e'
        GROUP BY proname HAVING count(*) > 1) overloaded";
    assert_eq!(count(&mut c, overloads), 0);
}

#[test]
fn ending_a_session_releases_and_is_idempotent() {
    let (_db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    let ended = json(&mut c, "SELECT end_session('s1', 'logout')", &[]);
    assert_eq!(ended["released_sd"], "SD-1");
    assert_eq!(ended["status"], "released");
    assert_in_step(&mut c);
    let again = json(&mut c, "SELECT end_session('s1')", &[]);
    assert_eq!(again["success"], true);
    assert_eq!(events(&mut c, "s1"), ["registered", "claimed", "released", "ended"]);
    assert_eq!(count(&mut c, "SELECT count(*) FROM v_active_sessions WHERE session_id = 's1'"), 0);

    let back = register(&mut c, "s1");
    assert_eq!(back["resumed"], true);
    assert_eq!(back["status"], "idle");
    assert_eq!(claim(&mut c, "SD-1", "s1")["success"], true);
}

#[test]
fn completing_cancelling_deferring_deleting_and_truncating_release() {
    let (_db, mut c) = coordinated();
    for (n, finish) in [
        "UPDATE strategic_directives_v2 SET status = 'completed' WHERE sd_id = 'SD-1'",
        "UPDATE strategic_directives_v2 SET status = 'Cancelled' WHERE sd_id = 'SD-2'",
        "UPDATE strategic_directives_v2 SET status = 'deferred' WHERE sd_id = 'SD-3'",
        "DELETE FROM strategic_directives_v2 WHERE sd_id = 'SD-4'",
        "TRUNCATE strategic_directives_v2",
    ]
    .into_iter()
    .enumerate()
    {
        granted(&mut c, &format!("SD-{}", n + 1), "s1");
        c.batch_execute(finish).unwrap();
        assert_eq!(beat(&mut c, "s1")["sd_id"], serde_json::Value::Null, "{finish}");
        assert_in_step(&mut c);
    }
    let reasons: Vec<String> = c
        .query("SELECT release_reason FROM sd_claims ORDER BY claim_id", &[])
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert_eq!(
        reasons,
        ["sd_completed", "sd_cancelled", "sd_deferred", "sd_deleted", "sd_deleted"]
    );
}

#[test]
fn finishing_rolls_back_with_its_release() {
    let (_db, mut c) = coordinated();
    let claim_id = granted(&mut c, "SD-1", "s1");
    c.batch_execute(
        "BEGIN; UPDATE strategic_directives_v2 SET status = 'completed' WHERE sd_id = 'SD-1'; ROLLBACK",
    )
    .unwrap();
    assert_eq!(beat(&mut c, "s1")["claim_id"], claim_id);
    assert_in_step(&mut c);
}

#[test]
fn a_session_that_an_operator_ended_is_told_what_it_lost() {
    let (db, mut c) = coordinated();
    let worker = db.role("worker");
    json(&mut c, "SELECT grant_coordination($1, 'worker')", &[&worker]);
    let mut w = db.connect_as(&worker);
    register(&mut w, "theirs");
    let held = granted(&mut w, "SD-1", "theirs");
    json(&mut c, "SELECT end_session('theirs', 'maintenance')", &[]);
    register(&mut w, "theirs");
    let told = beat(&mut w, "theirs");
    assert_eq!(told["lost_claim"]["claim_id"], held, "{told}");
    assert_eq!(told["lost_claim"]["reason"], "maintenance");
}

#[test]
fn a_release_that_collides_with_an_unrelated_unique_index_says_so_and_changes_nothing() {
    let (_db, mut c) = coordinated();
    c.batch_execute(
        "CREATE TABLE mine (key text PRIMARY KEY, slot integer, is_working_on boolean NOT NULL DEFAULT false);
         CREATE UNIQUE INDEX one_free_a_slot ON mine (slot) WHERE NOT is_working_on;
         INSERT INTO mine VALUES ('A', 1);
         SELECT bind_directives('mine', '{key}')",
    )
    .unwrap();
    let held = granted(&mut c, "A", "s1");
    c.batch_execute("INSERT INTO mine VALUES ('B', 1)").unwrap();
    let error = c.query("SELECT release_sd('s1')", &[]).unwrap_err();
    assert_eq!(pg_claims_tests::sqlstate(&error), "23505");
    assert!(pg_claims_tests::message(&error).contains("one_free_a_slot"));
    assert_eq!(beat(&mut c, "s1")["claim_id"], held);
    assert_in_step(&mut c);
}
