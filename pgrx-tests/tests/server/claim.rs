//! Claiming: what is granted, and what must never happen again.

use pg_claims_tests::{json, sqlstate};
use serde_json::{Value, json as literal};

use crate::support::*;

#[test]
fn a_free_sd_is_granted_with_a_fencing_token() {
    let (_db, mut c) = coordinated();
    let answer = json(&mut c, "SELECT claim_sd('SD-1', 's1', 'backend')", &[]);
    let claimed_at = answer["claimed_at"].clone();
    let claim_id = answer["claim_id"].clone();
    assert!(claimed_at.is_string() && claim_id.is_i64(), "{answer}");
    assert_eq!(
        answer,
        literal!({
            "success": true, "sd_id": "SD-1", "session_id": "s1", "track": "backend",
            "claimed_at": claimed_at, "claim_id": claim_id, "already_owned": false,
        })
    );
    assert_in_step(&mut c);
}

#[test]
fn an_owner_that_told_nothing_about_itself_still_blocks_and_is_named() {
    let (_db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    let refusal = claim(&mut c, "SD-1", "s2");
    assert_eq!(refusal["error"], "already_claimed");
    assert_eq!(refusal["claimed_by"], "s1");
    assert_eq!(refusal["tty"], Value::Null);
    assert_eq!(refusal["hostname"], Value::Null);
    assert_eq!(refusal["codebase"], Value::Null);
}

#[test]
fn a_refusal_tells_all_that_the_owner_told() {
    let (_db, mut c) = coordinated();
    json(
        &mut c,
        "SELECT register_session('s1', 'dev-machine', 'win-1234', 4321, '/code/leo')",
        &[],
    );
    let claim_id = granted(&mut c, "SD-1", "s1");
    age_heartbeat(&mut c, "s1", "45 seconds");
    let refusal = claim(&mut c, "SD-1", "s2");
    let age = refusal["heartbeat_age_seconds"].as_f64().unwrap();
    assert!((45.0..60.0).contains(&age), "{refusal}");
    assert_eq!(refusal["claimed_by"], "s1");
    assert_eq!(refusal["hostname"], "dev-machine");
    assert_eq!(refusal["tty"], "win-1234");
    assert_eq!(refusal["codebase"], "/code/leo");
    assert_eq!(refusal["claim_id"], claim_id);
    assert!(refusal["claimed_at"].is_string());
    assert!(refusal["message"].as_str().unwrap().contains("s1"), "{refusal}");
}

#[test]
fn a_stale_owner_never_blocks_and_learns_who_took_over() {
    let (_db, mut c) = coordinated();
    let lost = granted(&mut c, "SD-1", "s1");
    age_heartbeat(&mut c, "s1", "301 seconds");
    let answer = claim(&mut c, "SD-1", "s2");
    assert_eq!(answer["success"], true, "{answer}");
    assert_eq!(answer["took_over"]["session_id"], "s1");
    assert_eq!(answer["took_over"]["claim_id"], lost);
    assert!(answer["claim_id"].as_i64().unwrap() > lost, "tokens only grow: {answer}");
    assert_in_step(&mut c);

    let heartbeat = beat(&mut c, "s1");
    assert_eq!(heartbeat["sd_id"], Value::Null);
    assert_eq!(heartbeat["lost_claim"]["claim_id"], lost);
    assert_eq!(heartbeat["lost_claim"]["taken_over_by"], "s2");
    assert_eq!(heartbeat["lost_claim"]["reason"], "taken_over");
    assert_eq!(events(&mut c, "s1"), ["registered", "claimed", "taken_over"]);
    assert_eq!(
        value(
            &mut c,
            "SELECT detail->>'taken_over_by' FROM session_lifecycle_events WHERE event_type = 'taken_over'"
        ),
        Some("s2".into())
    );
}

#[test]
fn an_owner_just_below_the_threshold_is_live_for_the_claim_and_for_the_view() {
    let (_db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    age_heartbeat(&mut c, "s1", "290 seconds");
    assert_eq!(claim(&mut c, "SD-1", "s2")["error"], "already_claimed");
    let status = "SELECT computed_status FROM v_active_sessions WHERE session_id = 's1'";
    assert_eq!(value(&mut c, status).as_deref(), Some("active"));
    age_heartbeat(&mut c, "s1", "10 seconds");
    assert_eq!(value(&mut c, status).as_deref(), Some("stale"));
    assert_eq!(claim(&mut c, "SD-1", "s2")["success"], true);
}

#[test]
fn unknown_and_ended_sessions_cannot_claim() {
    let (_db, mut c) = coordinated();
    assert_eq!(claim(&mut c, "SD-1", "nobody")["error"], "session_not_found");
    json(&mut c, "SELECT end_session('s1')", &[]);
    assert_eq!(claim(&mut c, "SD-1", "s1")["error"], "session_released");
    assert_eq!(count(&mut c, "SELECT count(*) FROM sd_claims"), 0);
}

#[test]
fn unknown_and_finished_sds_cannot_be_claimed() {
    let (_db, mut c) = coordinated();
    assert_eq!(claim(&mut c, "SD-404", "s1")["error"], "sd_not_found");
    for status in ["completed", "cancelled", "deferred"] {
        c.execute(
            "UPDATE strategic_directives_v2 SET status = $1 WHERE sd_id = 'SD-2'",
            &[&status],
        )
        .unwrap();
        let refusal = claim(&mut c, "SD-2", "s1");
        assert_eq!(refusal["error"], "sd_terminal_status");
        assert_eq!(refusal["status"], status);
    }
    assert_eq!(count(&mut c, "SELECT count(*) FROM sd_claims"), 0);
}

#[test]
fn claiming_again_changes_nothing_but_the_heartbeat() {
    let (_db, mut c) = coordinated();
    let claim_id = granted(&mut c, "SD-1", "s1");
    age_heartbeat(&mut c, "s1", "100 seconds");
    let row = "SELECT to_jsonb(s) - 'heartbeat_at' FROM claude_sessions s WHERE session_id = 's1'";
    let before = value(&mut c, row);
    let written =
        "SELECT (SELECT count(*) FROM sd_claims) + (SELECT count(*) FROM session_lifecycle_events)";
    let rows_before = count(&mut c, written);

    let again = claim(&mut c, "SD-1", "s1");
    assert_eq!(again["success"], true);
    assert_eq!(again["already_owned"], true);
    assert_eq!(again["claim_id"], claim_id);
    assert_eq!(value(&mut c, row), before);
    assert_eq!(count(&mut c, written), rows_before);
    let age = value(
        &mut c,
        "SELECT heartbeat_age_seconds < 60 FROM v_active_sessions WHERE session_id = 's1'",
    );
    assert_eq!(age.as_deref(), Some("true"));
}

#[test]
fn a_session_that_went_stale_revives_by_claiming_again_what_nobody_took() {
    let (_db, mut c) = coordinated();
    let claim_id = granted(&mut c, "SD-1", "s1");
    age_heartbeat(&mut c, "s1", "1 hour");
    let again = claim(&mut c, "SD-1", "s1");
    assert_eq!(again["already_owned"], true);
    assert_eq!(again["claim_id"], claim_id);
    assert_eq!(claim(&mut c, "SD-1", "s2")["error"], "already_claimed");
}

#[test]
fn a_switch_ends_the_old_claim_on_both_sides() {
    let (_db, mut c) = coordinated();
    let first = granted(&mut c, "SD-1", "s1");
    let answer = claim(&mut c, "SD-2", "s1");
    assert_eq!(answer["released_sd"], "SD-1");
    assert!(answer["claim_id"].as_i64().unwrap() > first);
    assert_in_step(&mut c);
    let working =
        "SELECT string_agg(sd_id, ',' ORDER BY sd_id) FROM v_directives WHERE is_working_on";
    assert_eq!(value(&mut c, working).as_deref(), Some("SD-2"));
    assert_eq!(claim(&mut c, "SD-1", "s2")["success"], true);
}

#[test]
fn a_refused_switch_keeps_what_the_session_holds() {
    let (_db, mut c) = coordinated();
    let held = granted(&mut c, "SD-1", "s1");
    granted(&mut c, "SD-2", "s2");
    assert_eq!(claim(&mut c, "SD-2", "s1")["error"], "already_claimed");
    assert_eq!(claim(&mut c, "SD-404", "s1")["error"], "sd_not_found");
    assert_eq!(beat(&mut c, "s1")["claim_id"], held);
    assert_in_step(&mut c);
}

#[test]
fn the_text_for_people_reads_to_the_letter() {
    let (_db, mut c) = coordinated();
    json(
        &mut c,
        "SELECT register_session('session_abc123_tty1_1234', 'dev-machine', 'win-1234')",
        &[],
    );
    granted(&mut c, "SD-1", "session_abc123_tty1_1234");
    age_heartbeat(&mut c, "session_abc123_tty1_1234", "95 seconds");
    assert_eq!(
        value(&mut c, "SELECT sd_start('SD-1', 's1')").as_deref(),
        Some(
            "❌ SD-1 is already claimed\n   Session: session_abc123_tty1_1234\n   Heartbeat: 1m ago\n   Hostname: dev-machine\n   TTY: win-1234"
        )
    );
    let started = value(&mut c, "SELECT sd_start('SD-2', 's1')").unwrap();
    assert!(
        started
            .starts_with("✅ SD-2 is claimed\n   Title: Directive 2\n   Session: s1\n   Claim: "),
        "{started}"
    );
    assert_in_step(&mut c);
}

#[test]
fn asking_does_not_claim_and_agrees_with_the_claim() {
    let (_db, mut c) = coordinated();
    let ask = "SELECT is_sd_claimed('SD-1', $1)";
    assert_eq!(json(&mut c, ask, &[&None::<&str>]), literal!({ "claimed": false }));
    granted(&mut c, "SD-1", "s1");
    let status = json(&mut c, ask, &[&"s2"]);
    assert_eq!(status["claimed"], true);
    assert_eq!(status["claimedBy"], "s1");
    assert_eq!(json(&mut c, ask, &[&"s1"])["claimed"], false);
    age_heartbeat(&mut c, "s1", "301 seconds");
    let stale = json(&mut c, ask, &[&"s2"]);
    assert_eq!(stale["claimed"], false, "a claim would succeed: {stale}");
    assert_eq!(stale["claimedBy"], "s1");
    assert_eq!(claim(&mut c, "SD-1", "s2")["success"], true);
}

#[test]
fn a_trigger_that_has_the_session_switch_leaves_no_claim_that_is_over() {
    let (_db, mut owner) = coordinated();
    owner
        .batch_execute(
            "CREATE TABLE theirs (key text PRIMARY KEY, is_working_on boolean, active_session_id text);
             INSERT INTO theirs VALUES ('A'), ('B');
             CREATE FUNCTION switch() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
               IF NEW.key = 'A' AND NEW.is_working_on AND NOT COALESCE(OLD.is_working_on, false)
               THEN PERFORM public.claim_sd('B', 's1'); END IF; RETURN NULL; END $$;
             CREATE TRIGGER switch AFTER UPDATE ON theirs FOR EACH ROW EXECUTE FUNCTION switch();
             SELECT bind_directives('theirs', '{key}')",
        )
        .unwrap();
    let error = owner.batch_execute("SELECT claim_sd('A', 's1')").unwrap_err();
    assert_eq!(sqlstate(&error), "09000");
    assert_in_step(&mut owner);
}
