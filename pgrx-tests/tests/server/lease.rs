//! Leases: announced silence, leases of one's own, progress, heartbeats of many sessions.

use pg_claims_tests::{detail, hint, json, message, sqlstate};
use postgres::Client;
use serde_json::json;

use crate::support::*;

fn status(c: &mut Client, session: &str) -> String {
    let sql =
        format!("SELECT computed_status FROM v_active_sessions WHERE session_id = '{session}'");
    value(c, &sql).unwrap()
}

#[test]
fn announced_silence_keeps_a_busy_session_s_claim() {
    let (_db, mut c) = coordinated();
    let held = granted(&mut c, "SD-1", "s1");
    let answer = json(&mut c, "SELECT extend_lease('s1', '25 minutes')", &[]);
    assert_eq!(answer["success"], true, "{answer}");
    assert_eq!(answer["claim_id"], held);
    assert_eq!(answer["lease_expires_at"], answer["silent_until"]);
    // Twenty minutes later.
    c.batch_execute(
        "UPDATE claude_sessions SET heartbeat_at = heartbeat_at - interval '20 minutes',
                silent_until = silent_until - interval '20 minutes' WHERE session_id = 's1'",
    )
    .unwrap();
    assert_eq!(status(&mut c, "s1"), "active");
    let refusal = claim(&mut c, "SD-1", "s2");
    assert_eq!(refusal["error"], "already_claimed");
    assert!(refusal["silent_until"].is_string(), "{refusal}");
    assert!(refusal["message"].as_str().unwrap().contains("silent until"), "{refusal}");
    let text = value(&mut c, "SELECT sd_start('SD-1', 's2')").unwrap();
    assert_eq!(text.lines().count(), 6, "{text}");
    assert!(text.lines().last().unwrap().starts_with("   Silent until: "), "{text}");
    assert_eq!(json(&mut c, "SELECT cleanup_stale_sessions()", &[])["stale_sessions_cleaned"], 0);
    let seen = "SELECT silent_until = stale_at FROM v_active_sessions WHERE session_id = 's1'";
    assert_eq!(value(&mut c, seen).as_deref(), Some("true"));
    // Taken back, the usual lease counts again.
    assert_eq!(json(&mut c, "SELECT extend_lease('s1', '0')", &[])["silent_until"], json!(null));
    age_heartbeat(&mut c, "s1", "301 seconds");
    assert_eq!(claim(&mut c, "SD-1", "s2")["took_over"]["session_id"], "s1");
    assert_in_step(&mut c);
}

#[test]
fn silence_has_a_limit_whoever_writes_it() {
    let (_db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    for bad in ["'31 minutes'", "'1 month'", "'-1 second'", "NULL"] {
        let error = c.batch_execute(&format!("SELECT extend_lease('s1', {bad})")).unwrap_err();
        assert_eq!(sqlstate(&error), "22023", "{bad}");
        assert!(message(&error).contains("p_for"), "{error:?}");
        assert!(hint(&error).contains("pg_claims.max_silence"));
    }
    c.batch_execute(
        "UPDATE claude_sessions SET silent_until = '9999-01-01' WHERE session_id = 's1'",
    )
    .unwrap();
    age_heartbeat(&mut c, "s1", "29 minutes");
    assert_eq!(status(&mut c, "s1"), "active");
    age_heartbeat(&mut c, "s1", "2 minutes");
    assert_eq!(status(&mut c, "s1"), "stale");
    // A release takes the announcement along: it was for what was being done.
    let answer = release(&mut c, "s1");
    assert_eq!(answer["success"], true);
    let silent = "SELECT silent_until FROM claude_sessions WHERE session_id = 's1'";
    assert_eq!(value(&mut c, silent), None);
}

#[test]
fn extending_and_reporting_can_carry_the_claim_id_and_refuse_like_a_heartbeat() {
    let (_db, mut c) = coordinated();
    let old = granted(&mut c, "SD-1", "s1");
    let new = granted(&mut c, "SD-2", "s1");
    json(&mut c, "SELECT end_session('s3')", &[]);
    for call in ["extend_lease($1, '1 minute', $2)", "report_progress($1, 'half way', $2)"] {
        let mut ask = |session: &str, claim: Option<i64>| {
            json(&mut c, &format!("SELECT {call}"), &[&session, &claim])
        };
        assert_eq!(ask("s1", Some(new))["claim_id"], new);
        let late = ask("s1", Some(old));
        assert_eq!(late["error"], "claim_lost", "{late}");
        assert_eq!(late["lost_claim"]["reason"], "switched");
        assert_eq!(ask("nobody", None)["error"], "session_not_found");
        assert_eq!(ask("s3", None)["error"], "session_released");
    }
}

#[test]
fn progress_is_apart_from_life_and_both_are_seen() {
    let (_db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    let answer = json(&mut c, "SELECT report_progress('s1', 'tests pass')", &[]);
    assert_eq!(answer["progress_note"], "tests pass", "{answer}");
    // A zombie beats and gets nowhere.
    c.batch_execute("UPDATE claude_sessions SET progress_at = progress_at - interval '24 hours' WHERE session_id = 's1'")
        .unwrap();
    beat(&mut c, "s1");
    let row = c
        .query_one(
            "SELECT computed_status, progress_note, progress_age_seconds > 86000, heartbeat_age_seconds < 60
               FROM v_active_sessions WHERE session_id = 's1'",
            &[],
        )
        .unwrap();
    assert_eq!(row.get::<_, &str>(0), "active");
    assert_eq!(row.get::<_, &str>(1), "tests pass");
    assert!(row.get::<_, bool>(2) && row.get::<_, bool>(3));
    let refusal = claim(&mut c, "SD-1", "s2");
    assert_eq!(refusal["progress_note"], "tests pass", "{refusal}");
    assert!(refusal["progress_at"].is_string());
    let error = c.query("SELECT report_progress('s1', $1)", &[&"x".repeat(1001)]).unwrap_err();
    assert_eq!(sqlstate(&error), "22023");
}

#[test]
fn a_session_may_have_a_lease_of_its_own_within_the_operator_s_limits() {
    let (db, mut c) = coordinated();
    let answer = json(&mut c, "SELECT register_session('s1', p_stale_after => '20 minutes')", &[]);
    assert_eq!(answer["stale_after_seconds"], 1200.0, "{answer}");
    json(&mut c, "SELECT register_session('s2', p_stale_after => '30 seconds')", &[]);
    for session in ["s1", "s2", "s3"] {
        age_heartbeat(&mut c, session, "100 seconds");
    }
    let three = |c: &mut Client| ["s1", "s2", "s3"].map(|session| status(c, session));
    assert_eq!(three(&mut c), ["idle", "stale", "idle"]);
    age_heartbeat(&mut c, "s1", "1000 seconds");
    age_heartbeat(&mut c, "s3", "1000 seconds");
    assert_eq!(three(&mut c), ["idle", "stale", "stale"]);
    // A registration that does not mention it leaves it; zero gives it up.
    assert_eq!(register(&mut c, "s1")["stale_after_seconds"], 1200.0);
    let given_up = json(&mut c, "SELECT register_session('s1', p_stale_after => '0')", &[]);
    assert_eq!(given_up["stale_after_seconds"], json!(null));
    for bad in ["29 seconds", "61 minutes", "-1 hour"] {
        let error = c
            .batch_execute(&format!("SELECT register_session('s1', p_stale_after => '{bad}')"))
            .unwrap_err();
        assert_eq!(sqlstate(&error), "22023", "{bad}");
        assert!(hint(&error).contains("pg_claims.min_stale_after"));
    }
    // Limits that are tightened hold for the leases that are there.
    json(&mut c, "SELECT register_session('s1', p_stale_after => '1 hour')", &[]);
    age_heartbeat(&mut c, "s1", "700 seconds");
    c.batch_execute(&format!(
        "ALTER DATABASE {} SET pg_claims.max_stale_after = '10min'",
        db.name()
    ))
    .unwrap();
    assert_eq!(status(&mut c, "s1"), "idle");
    assert_eq!(status(&mut db.connect(), "s1"), "stale");
}

#[test]
fn one_call_beats_for_many_and_leaves_none_out_in_silence() {
    let (db, mut c) = coordinated();
    let held = granted(&mut c, "SD-1", "s1");
    let lost = granted(&mut c, "SD-2", "s2");
    age_heartbeat(&mut c, "s2", "1 hour");
    json(&mut c, "SELECT cleanup_stale_sessions()", &[]);
    register(&mut c, "ended");
    json(&mut c, "SELECT end_session('ended')", &[]);
    // s3 is being written by a transaction that goes on.
    let mut writer = db.connect();
    writer
        .batch_execute("BEGIN; UPDATE claude_sessions SET metadata = '{}' WHERE session_id = 's3'")
        .unwrap();
    for session in ["s1", "s2"] {
        age_heartbeat(&mut c, session, "1 minute");
    }
    c.batch_execute("SET lock_timeout = '1ms'").unwrap();
    let answer = json(&mut c, "SELECT heartbeat_sessions('{s2,nobody,s1,s3,ended,s1}')", &[]);
    writer.batch_execute("ROLLBACK").unwrap();
    assert_eq!(answer["success"], false);
    assert_eq!(answer["recorded"], 2);
    let sessions = answer["sessions"].as_array().unwrap();
    let told: Vec<_> = sessions
        .iter()
        .map(|s| (s["session_id"].as_str().unwrap(), s["error"].as_str().unwrap_or("fine")))
        .collect();
    assert_eq!(
        told,
        [
            ("s2", "fine"),
            ("nobody", "session_not_found"),
            ("s1", "fine"),
            ("s3", "session_busy"),
            ("ended", "session_released"),
        ]
    );
    assert_eq!(sessions[0]["lost_claim"]["claim_id"], lost, "{answer}");
    assert_eq!(sessions[2]["claim_id"], held);
    let fresh = "SELECT count(*) FROM v_active_sessions WHERE session_id IN ('s1', 's2') AND heartbeat_age_seconds < 30";
    assert_eq!(count(&mut c, fresh), 2);
    assert_eq!(
        json(&mut c, "SELECT heartbeat_sessions('{}')", &[]),
        json!({ "success": true, "recorded": 0, "sessions": [] })
    );
    for bad in ["NULL", "'{s1,NULL}'", "'{s1,\"\"}'"] {
        let error = c.batch_execute(&format!("SELECT heartbeat_sessions({bad})")).unwrap_err();
        assert_eq!(sqlstate(&error), "22023", "{bad}");
        assert!(message(&error).contains("p_session_ids"));
    }
}

#[test]
fn many_sessions_of_another_role_are_refused_as_a_whole() {
    let (db, mut c) = coordinated();
    let worker = db.role("worker");
    json(&mut c, "SELECT grant_coordination($1, 'worker')", &[&worker]);
    let mut w = db.connect_as(&worker);
    register(&mut w, "mine");
    age_heartbeat(&mut c, "mine", "1 minute");
    for call in [
        "heartbeat_sessions('{mine,s1}')",
        "extend_lease('s1', '1 minute')",
        "report_progress('s1')",
        "start_heartbeat('s1')",
        "force_heartbeat('s1')",
    ] {
        let error = w.batch_execute(&format!("SELECT {call}")).unwrap_err();
        assert_eq!(sqlstate(&error), "42501", "{call}");
        assert!(
            message(&error).contains("\"s1\"") && detail(&error).contains("postgres"),
            "{call}: {error:?}"
        );
    }
    let old = "SELECT heartbeat_age_seconds > 30 FROM v_active_sessions WHERE session_id = 'mine'";
    assert_eq!(value(&mut c, old).as_deref(), Some("true"), "half of it was done");
    for call in ["cleanup_stale_sessions()", "prune_history()"] {
        let error = w.batch_execute(&format!("SELECT {call}")).unwrap_err();
        assert_eq!(sqlstate(&error), "42501", "{call}");
    }
    assert_eq!(json(&mut w, "SELECT heartbeat_sessions('{mine}')", &[])["success"], true);
}

#[test]
fn without_a_worker_the_server_promises_no_heartbeats() {
    // The shared server has none.
    let (_db, mut c) = coordinated();
    let answer = json(&mut c, "SELECT start_heartbeat('s1')", &[]);
    assert_eq!(answer["success"], false, "{answer}");
    assert_eq!(answer["error"], "no_worker");
    assert!(answer["message"].as_str().unwrap().contains("pg_claims.worker is off"));
    assert_eq!(json(&mut c, "SELECT is_heartbeat_active()", &[])["active"], false);
    assert_eq!(
        json(&mut c, "SELECT stop_heartbeat()", &[]),
        json!({ "success": true, "stoppedSession": null })
    );
    let stats = json(&mut c, "SELECT get_heartbeat_stats()", &[]);
    assert_eq!(stats["isActive"], false);
    assert_eq!(stats["healthy"], false);
    assert_eq!(stats["intervalSeconds"], 30);
    assert_eq!(stats["maxConsecutiveFailures"], 3);
    let forced = json(&mut c, "SELECT force_heartbeat('s1')", &[]);
    assert_eq!(forced["success"], true, "{forced}");
}
