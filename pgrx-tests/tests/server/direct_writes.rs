//! What an operator writes by hand in psql keeps every mirror right, or is refused with a reason.

use pg_claims_tests::{detail, hint, sqlstate};
use serde_json::Value;

use crate::support::*;

#[test]
fn a_session_inserted_with_an_sd_holds_it() {
    let (_db, mut c) = coordinated();
    c.batch_execute(
        "INSERT INTO claude_sessions (session_id, sd_id, track) VALUES ('by-hand', 'SD-1', 'x')",
    )
    .unwrap();
    assert_in_step(&mut c);
    let refusal = claim(&mut c, "SD-1", "s1");
    assert_eq!(refusal["claimed_by"], "by-hand");
    assert_eq!(events(&mut c, "by-hand"), ["registered", "claimed"]);
    assert_eq!(value(&mut c, "SELECT track FROM sd_claims").as_deref(), Some("x"));
}

#[test]
fn several_rows_in_one_statement_are_each_made_whole() {
    let (_db, mut c) = coordinated();
    c.batch_execute(
        "INSERT INTO claude_sessions (session_id, sd_id)
         SELECT 'many-' || n, 'SD-' || n FROM generate_series(1, 5) n;
         UPDATE claude_sessions SET sd_id = NULL WHERE session_id LIKE 'many-%';
         UPDATE claude_sessions SET sd_id = replace(session_id, 'many-', 'SD-') WHERE session_id LIKE 'many-%'",
    )
    .unwrap();
    assert_in_step(&mut c);
    assert_eq!(count(&mut c, "SELECT count(*) FROM sd_claims WHERE released_at IS NULL"), 5);
    let error = c
        .batch_execute("UPDATE claude_sessions SET sd_id = 'SD-9' WHERE session_id LIKE 'many-%'")
        .unwrap_err();
    assert_eq!(sqlstate(&error), "23505");
    assert_in_step(&mut c);
}

#[test]
fn moving_a_session_from_one_sd_to_another_moves_everything() {
    let (_db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    c.batch_execute("UPDATE claude_sessions SET sd_id = 'SD-2' WHERE session_id = 's1'").unwrap();
    assert_in_step(&mut c);
    assert_eq!(claim(&mut c, "SD-1", "s2")["success"], true);
    assert_eq!(claim(&mut c, "SD-2", "s3")["claimed_by"], "s1");
    assert_eq!(events(&mut c, "s1"), ["registered", "claimed", "switched"]);
}

#[test]
fn setting_a_status_that_does_not_work_releases() {
    for (status, last_event) in [("idle", "released"), ("released", "ended")] {
        let (_db, mut c) = coordinated();
        granted(&mut c, "SD-1", "s1");
        c.execute("UPDATE claude_sessions SET status = $1 WHERE session_id = 's1'", &[&status])
            .unwrap();
        assert_in_step(&mut c);
        let row = "SELECT concat_ws('|', sd_id, claim_id, status) FROM claude_sessions WHERE session_id = 's1'";
        assert_eq!(value(&mut c, row).as_deref(), Some(status));
        assert_eq!(events(&mut c, "s1").last().map(String::as_str), Some(last_event));
        assert_eq!(claim(&mut c, "SD-1", "s2")["success"], true, "nobody holds it twice");
        assert_in_step(&mut c);
    }
}

#[test]
fn an_upsert_of_idle_that_leaves_the_sd_in_place_does_not_let_two_hold_it() {
    let (_db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    c.batch_execute(
        "INSERT INTO claude_sessions (session_id, status) VALUES ('s1', 'idle')
         ON CONFLICT (session_id) DO UPDATE SET status = 'idle'",
    )
    .unwrap();
    assert_eq!(claim(&mut c, "SD-1", "s2")["success"], true);
    assert_in_step(&mut c);
    assert_eq!(count(&mut c, "SELECT count(*) FROM claude_sessions WHERE sd_id = 'SD-1'"), 1);
}

#[test]
fn clearing_the_sd_releases() {
    let (_db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    c.batch_execute(
        "UPDATE claude_sessions SET sd_id = NULL, release_reason = 'operator says so' WHERE session_id = 's1'",
    )
    .unwrap();
    assert_in_step(&mut c);
    let closed = "SELECT concat_ws('|', session_id, release_reason) FROM sd_claims";
    assert_eq!(value(&mut c, closed).as_deref(), Some("s1|operator says so"));
    granted(&mut c, "SD-1", "s1");
    c.batch_execute("UPDATE claude_sessions SET sd_id = NULL WHERE session_id = 's1'").unwrap();
    assert_in_step(&mut c);
    let last = "SELECT release_reason FROM sd_claims ORDER BY claim_id DESC LIMIT 1";
    assert_eq!(value(&mut c, last).as_deref(), Some("direct_write"));
}

#[test]
fn deleting_a_session_releases_and_its_history_stays() {
    let (_db, mut c) = coordinated();
    let claim_id = granted(&mut c, "SD-1", "s1");
    c.batch_execute("DELETE FROM claude_sessions WHERE session_id = 's1'").unwrap();
    assert_in_step(&mut c);
    let closed = "SELECT concat_ws('|', claim_id, session_id, release_reason) FROM sd_claims";
    assert_eq!(value(&mut c, closed), Some(format!("{claim_id}|s1|session_deleted")));
    assert_eq!(events(&mut c, "s1"), ["registered", "claimed", "released", "ended"]);
    assert_eq!(claim(&mut c, "SD-1", "s2")["success"], true);
}

#[test]
fn a_taken_sd_is_refused_naming_its_owner() {
    let (_db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    for write in [
        "UPDATE claude_sessions SET sd_id = 'SD-1' WHERE session_id = 's2'",
        "INSERT INTO claude_sessions (session_id, sd_id) VALUES ('new', 'SD-1')",
    ] {
        let error = c.batch_execute(write).unwrap_err();
        assert_eq!(sqlstate(&error), "23505", "{write}");
        assert!(detail(&error).contains("\"s1\""), "{}", detail(&error));
        assert!(hint(&error).contains("claim_sd()"));
    }
    assert_in_step(&mut c);
}

#[test]
fn half_claims_and_lies_are_refused() {
    let (_db, mut c) = coordinated();
    let claim_id = granted(&mut c, "SD-1", "s1");
    let next = claim_id + 1;
    for (write, code) in [
        ("UPDATE claude_sessions SET sd_id = 'SD-404' WHERE session_id = 's2'".to_owned(), "23503"),
        (format!("UPDATE claude_sessions SET claim_id = {next} WHERE session_id = 's1'"), "428C9"),
        (format!("UPDATE claude_sessions SET sd_id = 'SD-2', claim_id = {next} WHERE session_id = 's2'"), "428C9"),
        (format!("INSERT INTO claude_sessions (session_id, sd_id, claim_id, claimed_at) VALUES ('x', 'SD-2', {next}, now())"), "428C9"),
        ("UPDATE claude_sessions SET claimed_at = now() WHERE session_id = 's1'".into(), "428C9"),
        ("UPDATE claude_sessions SET sd_id = 'SD-2', status = 'released' WHERE session_id = 's2'".into(), "23514"),
        ("UPDATE claude_sessions SET sd_id = 'SD-2', status = 'idle' WHERE session_id = 's1'".into(), "23514"),
        ("INSERT INTO claude_sessions (session_id, sd_id, status) VALUES ('x', 'SD-2', 'released')".into(), "23514"),
        ("UPDATE claude_sessions SET session_id = 'renamed' WHERE session_id = 's1'".into(), "0A000"),
        ("UPDATE claude_sessions SET status = 'stale' WHERE session_id = 's1'".into(), "23514"),
        ("INSERT INTO claude_sessions (session_id) VALUES (' ')".into(), "22023"),
        ("UPDATE strategic_directives_v2 SET sd_id = 'SD-X' WHERE sd_id = 'SD-1'".into(), "55006"),
        ("TRUNCATE claude_sessions".into(), "55006"),
        ("TRUNCATE sd_claims".into(), "55006"),
        ("DELETE FROM sd_claims".into(), "55000"),
        ("UPDATE sd_claims SET released_at = now(), release_reason = 'x'".into(), "55000"),
        ("INSERT INTO sd_claims (sd_id, session_id) VALUES ('SD-3', 's3')".into(), "55000"),
        ("UPDATE strategic_directives_v2 SET status = 'completed' WHERE sd_id = 'SD-4';
          UPDATE claude_sessions SET sd_id = 'SD-4' WHERE session_id = 's2'".into(), "23514"),
    ] {
        let error = c.batch_execute(&write).unwrap_err();
        assert_eq!(sqlstate(&error), code, "{write}: {error}");
        assert_in_step(&mut c);
        assert_eq!(beat(&mut c, "s1")["claim_id"], claim_id, "{write}");
    }
}

#[test]
fn an_unclaimed_key_may_change_and_an_ended_session_may_be_revived_by_hand() {
    let (_db, mut c) = coordinated();
    c.batch_execute("UPDATE strategic_directives_v2 SET sd_id = 'SD-X' WHERE sd_id = 'SD-1'")
        .unwrap();
    assert_eq!(claim(&mut c, "SD-X", "s1")["success"], true);
    c.batch_execute(
        "UPDATE claude_sessions SET status = 'released' WHERE session_id = 's2';
         UPDATE claude_sessions SET status = 'idle' WHERE session_id = 's2'",
    )
    .unwrap();
    assert_eq!(events(&mut c, "s2"), ["registered", "ended", "resumed"]);
    assert_eq!(claim(&mut c, "SD-2", "s2")["success"], true);
}

#[test]
fn a_statement_that_writes_every_column_unchanged_changes_nothing() {
    let (_db, mut c) = coordinated();
    let claim_id = granted(&mut c, "SD-1", "s1");
    let before = events(&mut c, "s1");
    c.batch_execute(
        "UPDATE claude_sessions SET id = id, session_id = session_id, sd_id = sd_id, track = track,
                tty = tty, claimed_at = claimed_at, status = status, claim_id = claim_id",
    )
    .unwrap();
    assert_eq!(beat(&mut c, "s1")["claim_id"], claim_id);
    assert_eq!(events(&mut c, "s1"), before);
    assert_in_step(&mut c);
}

#[test]
fn history_of_ended_claims_may_be_pruned_by_hand() {
    let (_db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    release(&mut c, "s1");
    granted(&mut c, "SD-2", "s1");
    assert_eq!(c.execute("DELETE FROM sd_claims WHERE released_at IS NOT NULL", &[]).unwrap(), 1);
    assert_eq!(beat(&mut c, "s1")["lost_claim"], Value::Null);
    assert_eq!(claim(&mut c, "SD-2", "s2")["claimed_by"], "s1");
}

#[test]
fn an_upsert_that_updates_or_leaves_out_the_row_claims_only_what_it_writes() {
    let (_db, mut c) = coordinated();
    granted(&mut c, "SD-2", "s2");
    for (upsert, holds) in [
        ("ON CONFLICT DO NOTHING", None),
        ("ON CONFLICT (session_id) DO UPDATE SET tty = 'x'", None),
        ("ON CONFLICT (session_id) DO UPDATE SET sd_id = EXCLUDED.sd_id", Some("SD-1")),
        // Once more, as a client does that saves what it knows.
        (
            "ON CONFLICT (session_id) DO UPDATE SET sd_id = EXCLUDED.sd_id, hostname = 'h'",
            Some("SD-1"),
        ),
    ] {
        c.batch_execute(&format!(
            "INSERT INTO claude_sessions (session_id, sd_id) VALUES ('s1', 'SD-1') {upsert}"
        ))
        .unwrap();
        assert_in_step(&mut c);
        assert_eq!(beat(&mut c, "s1")["sd_id"].as_str(), holds, "{upsert}");
    }
    assert_eq!(count(&mut c, "SELECT count(*) FROM sd_claims WHERE sd_id = 'SD-1'"), 1);
    release(&mut c, "s1");
    assert_eq!(claim(&mut c, "SD-1", "s3")["success"], true);
}

#[test]
fn a_row_that_brings_its_own_dates_is_treated_like_any_other() {
    let (_db, mut c) = coordinated();
    c.batch_execute(
        "INSERT INTO claude_sessions (session_id, sd_id, created_at) VALUES ('dated', 'SD-1', now() - interval '1 year');
         INSERT INTO strategic_directives_v2 (sd_id, is_working_on, active_session_id, created_at)
         VALUES ('SD-OLD', true, 'ghost', now() - interval '1 year')",
    )
    .unwrap();
    assert_in_step(&mut c);
    assert_eq!(events(&mut c, "dated"), ["registered", "claimed"]);
    let error = c
        .batch_execute(
            "INSERT INTO claude_sessions (session_id, sd_id, claim_id, claimed_at, status, created_at)
             VALUES ('forged', 'SD-2', 999, now(), 'active', now() - interval '1 year')",
        )
        .unwrap_err();
    assert_eq!(sqlstate(&error), "428C9");
    assert_in_step(&mut c);
}

#[test]
fn a_claim_by_hand_is_a_sign_of_life() {
    let (_db, mut c) = coordinated();
    age_heartbeat(&mut c, "s1", "1 day");
    c.batch_execute("UPDATE claude_sessions SET sd_id = 'SD-1' WHERE session_id = 's1'").unwrap();
    assert_eq!(claim(&mut c, "SD-1", "s2")["claimed_by"], "s1");
}

#[test]
fn what_is_missing_or_infinite_is_refused_by_the_table() {
    let (_db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    for (write, code) in [
        ("INSERT INTO claude_sessions (session_id, status) VALUES ('n', NULL)", "23502"),
        ("INSERT INTO claude_sessions (session_id) VALUES (NULL)", "23502"),
        ("UPDATE claude_sessions SET status = NULL WHERE session_id = 's1'", "23502"),
        ("UPDATE claude_sessions SET heartbeat_at = 'infinity' WHERE session_id = 's1'", "23514"),
        ("UPDATE claude_sessions SET heartbeat_at = '-infinity' WHERE session_id = 's1'", "23514"),
        ("UPDATE claude_sessions SET silent_until = 'infinity' WHERE session_id = 's1'", "23514"),
    ] {
        let error = c.batch_execute(write).unwrap_err();
        assert_eq!(sqlstate(&error), code, "{write}: {error:?}");
    }
    assert_in_step(&mut c);
}

#[test]
fn the_loser_of_a_write_by_hand_is_told_by_its_next_heartbeat() {
    let (_db, mut c) = coordinated();
    for (end, reason) in [
        ("UPDATE claude_sessions SET sd_id = NULL WHERE session_id = 's1'", "direct_write"),
        (
            "UPDATE strategic_directives_v2 SET status = 'completed' WHERE sd_id = 'SD-1'",
            "sd_completed",
        ),
        ("DELETE FROM strategic_directives_v2 WHERE sd_id = 'SD-2'", "sd_deleted"),
    ] {
        let sd = if reason == "sd_deleted" { "SD-2" } else { "SD-1" };
        let lost = granted(&mut c, sd, "s1");
        c.batch_execute(end).unwrap();
        let heartbeat = beat(&mut c, "s1");
        assert_eq!(heartbeat["lost_claim"]["claim_id"], lost, "{end}: {heartbeat}");
        assert_eq!(heartbeat["lost_claim"]["reason"], reason);
        assert_in_step(&mut c);
    }
    granted(&mut c, "SD-3", "s1");
    release(&mut c, "s1");
    assert!(beat(&mut c, "s1").get("lost_claim").is_none(), "it let go itself");
}

#[test]
fn a_switch_is_one_event_that_tells_of_both_sides() {
    let (_db, mut c) = coordinated();
    let first = granted(&mut c, "SD-1", "s1");
    let second = granted(&mut c, "SD-2", "s1");
    let event = pg_claims_tests::json(
        &mut c,
        "SELECT to_jsonb(e) FROM session_lifecycle_events e WHERE event_type = 'switched'",
        &[],
    );
    assert_eq!(event["sd_id"], "SD-2");
    assert_eq!(event["claim_id"], second);
    assert_eq!(event["reason"], "switched");
    assert!(event["held_seconds"].is_number(), "{event}");
    assert_eq!(event["detail"]["released_sd"], "SD-1");
    assert_eq!(event["detail"]["released_claim_id"], first);
}

#[test]
fn a_release_by_hand_is_dated_by_the_server_and_told_to_the_session() {
    let (_db, mut c) = coordinated();
    let held = granted(&mut c, "SD-1", "s1");
    c.batch_execute(
        "UPDATE claude_sessions SET sd_id = NULL, claim_id = NULL, claimed_at = NULL, status = 'idle', released_at = 'infinity'
          WHERE session_id = 's1'",
    )
    .unwrap();
    let dated = format!(
        "SELECT released_at BETWEEN now() - interval '1 minute' AND now() + interval '1 minute' FROM sd_claims WHERE claim_id = {held}"
    );
    assert_eq!(value(&mut c, &dated).as_deref(), Some("true"));
    assert_eq!(beat(&mut c, "s1")["lost_claim"]["claim_id"], held);
    assert_in_step(&mut c);
}

#[test]
fn ids_that_no_function_takes_do_not_get_in_by_hand() {
    let (_db, mut c) = coordinated();
    for bad in ["E'bad\\nid'", "E'\\u00a0'"] {
        let insert = format!("INSERT INTO strategic_directives_v2 (sd_id) VALUES ({bad})");
        assert_eq!(sqlstate(&c.batch_execute(&insert).unwrap_err()), "22023", "{bad}");
        let claim = format!("UPDATE claude_sessions SET sd_id = {bad} WHERE session_id = 's1'");
        assert_eq!(sqlstate(&c.batch_execute(&claim).unwrap_err()), "22023", "{bad}");
    }
    // History is not made up by hand either.
    let history = "INSERT INTO sd_claims (sd_id, session_id, released_at, release_reason) VALUES ('SD-1', 's1', now(), 'x')";
    assert_eq!(sqlstate(&c.batch_execute(history).unwrap_err()), "55000");
}
