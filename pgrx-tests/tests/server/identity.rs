//! Who a session is: the id that it gives, and nothing else.

use pg_claims_tests::json;
use serde_json::json as literal;

use crate::support::*;

#[test]
fn two_sessions_of_one_terminal_host_and_pid_stay_two() {
    let (_db, mut c) = coordinated();
    for session in ["left", "right"] {
        json(&mut c, "SELECT register_session($1, 'host', 'tty1', 4321, '/code')", &[&session]);
    }
    granted(&mut c, "SD-1", "left");
    assert_eq!(claim(&mut c, "SD-1", "right")["claimed_by"], "left");
    assert_eq!(claim(&mut c, "SD-2", "right")["success"], true);
    assert_eq!(beat(&mut c, "left")["sd_id"], "SD-1");
    assert_eq!(count(&mut c, "SELECT count(*) FROM v_active_sessions WHERE tty = 'tty1'"), 2);
}

#[test]
fn one_session_on_another_terminal_host_and_pid_stays_one() {
    let (_db, mut c) = coordinated();
    json(&mut c, "SELECT register_session('mover', 'host-a', 'tty1', 1)", &[]);
    let held = granted(&mut c, "SD-1", "mover");
    let moved = json(&mut c, "SELECT register_session('mover', 'host-b', 'tty2', 2)", &[]);
    assert_eq!(moved["claim_id"], held, "registering again evicts nobody, not even itself");
    assert_eq!(moved["hostname"], "host-b");
    assert_eq!(moved["pid"], 2);
    assert_eq!(
        count(&mut c, "SELECT count(*) FROM v_active_sessions WHERE session_id = 'mover'"),
        1
    );
    assert_eq!(events(&mut c, "mover"), ["registered", "claimed"]);
    assert_in_step(&mut c);
}

#[test]
fn a_pid_that_is_reused_says_nothing() {
    let (_db, mut c) = coordinated();
    json(&mut c, "SELECT register_session('old', 'host', NULL, 77)", &[]);
    let held = granted(&mut c, "SD-1", "old");
    json(&mut c, "SELECT register_session('new', 'host', NULL, 77)", &[]);
    assert_eq!(claim(&mut c, "SD-1", "new")["claimed_by"], "old");
    assert_eq!(beat(&mut c, "old")["claim_id"], held);
}

#[test]
fn metadata_is_merged_and_what_is_not_told_stays() {
    let (_db, mut c) = coordinated();
    json(
        &mut c,
        "SELECT register_session('m', 'host', 'tty', 1, '/code', '{\"a\": 1, \"b\": {\"x\": 1}}')",
        &[],
    );
    let merged =
        json(&mut c, "SELECT register_session('m', p_metadata => '{\"b\": 2, \"c\": null}')", &[]);
    assert_eq!(merged["metadata"], literal!({"a": 1, "b": 2, "c": null}));
    assert_eq!(merged["hostname"], "host");
    assert_eq!(merged["tty"], "tty");
    assert_eq!(merged["codebase"], "/code");
    assert_eq!(json(&mut c, "SELECT register_session('m')", &[])["metadata"], merged["metadata"]);
}

#[test]
fn what_is_returned_is_what_was_stored() {
    let (_db, mut c) = coordinated();
    let told = json(
        &mut c,
        "SELECT register_session('r', 'host', 'tty', 9, '/code', '{\"k\": \"v\"}')",
        &[],
    );
    let stored = json(
        &mut c,
        "SELECT to_jsonb(s) FROM (SELECT session_id, status, sd_id, claim_id, hostname, tty, pid, codebase,
                metadata FROM claude_sessions WHERE session_id = 'r') s",
        &[],
    );
    for (key, value) in stored.as_object().unwrap() {
        assert_eq!(&told[key], value, "{key}");
    }
    let same = c
        .query_one(
            "SELECT heartbeat_at = $1::text::timestamptz AND created_at = $2::text::timestamptz
               FROM claude_sessions WHERE session_id = 'r'",
            &[&told["heartbeat_at"].as_str(), &told["created_at"].as_str()],
        )
        .unwrap();
    assert!(same.get::<_, bool>(0));
}

#[test]
fn a_late_attempt_under_a_reused_name_is_matched_by_claim_id() {
    let (_db, mut c) = coordinated();
    register(&mut c, "worker");
    let first = granted(&mut c, "SD-1", "worker");
    json(&mut c, "SELECT end_session('worker')", &[]);
    register(&mut c, "worker");
    let second = granted(&mut c, "SD-1", "worker");
    age_heartbeat(&mut c, "worker", "200 seconds");

    let late = json(&mut c, "SELECT update_session_heartbeat('worker', $1)", &[&first]);
    assert_eq!(late["success"], false);
    assert_eq!(late["error"], "claim_lost");
    let aged =
        "SELECT heartbeat_age_seconds >= 200 FROM v_active_sessions WHERE session_id = 'worker'";
    assert_eq!(value(&mut c, aged).as_deref(), Some("true"), "it kept nobody alive");
    let late = json(&mut c, "SELECT release_sd('worker', 'late', $1)", &[&first]);
    assert_eq!(late["error"], "claim_lost");
    assert_eq!(
        json(&mut c, "SELECT update_session_heartbeat('worker', $1)", &[&second])["success"],
        true
    );
}

#[test]
fn metadata_keeps_every_digit() {
    let (_db, mut c) = coordinated();
    let given =
        r#"{"big": 123456789012345678901234567890, "money": 1.10, "huge": 1e400, "tiny": 1e-400}"#;
    for _ in 0..2 {
        c.query(&format!("SELECT register_session('m', p_metadata => '{given}')"), &[]).unwrap();
        let same = value(
            &mut c,
            &format!(
                "SELECT metadata::text = '{given}'::jsonb::text FROM claude_sessions WHERE session_id = 'm'"
            ),
        );
        assert_eq!(same.as_deref(), Some("true"));
    }
    let told =
        value(&mut c, &format!("SELECT register_session('m')->'metadata' = '{given}'::jsonb"));
    assert_eq!(told.as_deref(), Some("true"));
}

#[test]
fn a_session_that_comes_back_has_no_end() {
    let (_db, mut c) = coordinated();
    json(&mut c, "SELECT end_session('s1', 'logout')", &[]);
    register(&mut c, "s1");
    let end =
        "SELECT concat(released_at, release_reason) FROM claude_sessions WHERE session_id = 's1'";
    assert_eq!(value(&mut c, end).as_deref(), Some(""));
}
