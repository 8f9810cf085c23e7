//! Heartbeats and what they decide.

use pg_claims_tests::{json, own_server, wait_until};
use serde_json::Value;

use crate::support::*;

#[test]
fn a_heartbeat_says_what_the_session_holds() {
    let (_db, mut c) = coordinated();
    let idle = beat(&mut c, "s1");
    assert_eq!(idle["success"], true);
    assert_eq!(idle["sd_id"], Value::Null);
    let held = granted(&mut c, "SD-1", "s1");
    let busy = json(&mut c, "SELECT update_session_heartbeat('s1', $1)", &[&held]);
    assert_eq!(busy["sd_id"], "SD-1");
    assert_eq!(busy["claim_id"], held);
    assert_eq!(busy["session_id"], "s1");
    assert!(busy.get("lost_claim").is_none());
}

#[test]
fn heartbeats_never_move_backwards_also_in_a_long_transaction() {
    let (_db, mut c) = coordinated();
    c.batch_execute("BEGIN; SELECT pg_sleep(0.01)").unwrap();
    let first = value(
        &mut c,
        "SELECT (update_session_heartbeat('s1')->>'heartbeat_at')::timestamptz > now()",
    );
    assert_eq!(first.as_deref(), Some("true"), "not the transaction's start");
    c.batch_execute("COMMIT").unwrap();

    c.batch_execute("UPDATE claude_sessions SET heartbeat_at = clock_timestamp() + interval '1 minute' WHERE session_id = 's1'")
        .unwrap();
    let stored = "SELECT heartbeat_at FROM claude_sessions WHERE session_id = 's1'";
    let before = value(&mut c, stored);
    beat(&mut c, "s1");
    claim(&mut c, "SD-1", "s1");
    register(&mut c, "s1");
    assert_eq!(value(&mut c, stored), before);
}

#[test]
fn a_heartbeat_under_a_lost_claim_is_refused_and_says_who_has_it() {
    let (_db, mut c) = coordinated();
    let lost = granted(&mut c, "SD-1", "s1");
    age_heartbeat(&mut c, "s1", "1 hour");
    let now = granted(&mut c, "SD-1", "s2");
    let late = json(&mut c, "SELECT update_session_heartbeat('s1', $1)", &[&lost]);
    assert_eq!(late["success"], false);
    assert_eq!(late["error"], "claim_lost");
    assert_eq!(late["lost_claim"]["taken_over_by"], "s2");
    assert_eq!(late["lost_claim"]["held_by"], "s2");
    assert!(late["lost_claim"]["released_at"].is_string());
    // Without the claim id the session's life is recorded, and the loss is told as well.
    assert_eq!(beat(&mut c, "s1")["lost_claim"]["claim_id"], lost);
    assert_eq!(beat(&mut c, "s2")["claim_id"], now);
    // A claim of its own begins a new chapter.
    granted(&mut c, "SD-2", "s1");
    assert!(beat(&mut c, "s1").get("lost_claim").is_none());
}

#[test]
fn a_heartbeat_revives_a_session_whose_sd_nobody_took() {
    let (_db, mut c) = coordinated();
    let held = granted(&mut c, "SD-1", "s1");
    age_heartbeat(&mut c, "s1", "1 hour");
    assert_eq!(beat(&mut c, "s1")["claim_id"], held);
    assert_eq!(claim(&mut c, "SD-1", "s2")["claimed_by"], "s1");
}

#[test]
fn unknown_and_ended_sessions_have_no_heartbeat() {
    let (_db, mut c) = coordinated();
    assert_eq!(beat(&mut c, "nobody")["error"], "session_not_found");
    json(&mut c, "SELECT end_session('s1')", &[]);
    assert_eq!(beat(&mut c, "s1")["error"], "session_released");
    let error = c.batch_execute("UPDATE claude_sessions SET heartbeat_at = NULL").unwrap_err();
    assert_eq!(pg_claims_tests::sqlstate(&error), "23502", "a NULL heartbeat would be immortal");
}

#[test]
fn heartbeats_fire_no_trigger() {
    let (_db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    // If one of the triggers fired, the heartbeat would fail.
    c.batch_execute(
        "CREATE FUNCTION trap() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'fired'; END $$;
         CREATE TRIGGER trap AFTER UPDATE OF sd_id, claim_id, status ON claude_sessions
             FOR EACH ROW EXECUTE FUNCTION trap()",
    )
    .unwrap();
    assert_eq!(beat(&mut c, "s1")["success"], true);
    assert_eq!(claim(&mut c, "SD-1", "s1")["already_owned"], true);
    assert!(c.query("SELECT release_sd('s1')", &[]).is_err(), "the trap works");
}

#[test]
fn heartbeats_are_hot() {
    // On a server of its own, without a worker: an open transaction of anybody's keeps pages from being
    // pruned for as long as it lasts, which on a busy machine may be long.
    let settings =
        ["fsync = off", "autovacuum = off", "pg_claims.worker = off", "pg_claims.max_sessions = 0"];
    let server = own_server("hot", &settings);
    let mut c = server.config("postgres").connect(postgres::NoTls).unwrap();
    c.batch_execute("CREATE EXTENSION pg_claims").unwrap();
    backlog(&mut c);
    for session in ["s1", "s2", "s3"] {
        register(&mut c, session);
        granted(&mut c, &session.replace('s', "SD-"), session);
    }
    let counted = |c: &mut postgres::Client| -> (i64, i64) {
        let row = c
            .query_one(
                "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'claude_sessions'",
                &[],
            )
            .unwrap();
        (row.get(0), row.get(1))
    };
    const BEATS: i64 = 3_000;
    for _ in 0..BEATS / 3 {
        for session in ["s1", "s2", "s3"] {
            assert_eq!(beat(&mut c, session)["success"], true);
        }
        // As a host with many sessions beats, and the worker.
        let many = json(&mut c, "SELECT heartbeat_sessions('{s1,s2,s3}')", &[]);
        assert_eq!(many["success"], true, "{many}");
    }
    wait_until("the heartbeats to be counted", || counted(&mut c).0 >= BEATS);
    let (updates, hot) = counted(&mut c);
    assert!(hot as f64 / updates as f64 > 0.99, "{hot} of {updates} updates were HOT");
}

#[test]
fn the_client_s_clock_and_zone_have_no_say() {
    let (_db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    for zone in ["Asia/Tokyo", "America/Los_Angeles", "UTC"] {
        c.batch_execute(&format!("SET timezone = '{zone}'; SET datestyle = 'SQL, DMY'")).unwrap();
        beat(&mut c, "s1");
        let age = "SELECT heartbeat_age_seconds < 30 AND heartbeat_at <= clock_timestamp() FROM v_active_sessions WHERE session_id = 's1'";
        assert_eq!(value(&mut c, age).as_deref(), Some("true"), "{zone}");
    }
    // What a session calls takes no point in time: there is nothing that a clock could be wrong in.
    let takes_a_time = "
        SELECT count(*) FROM pg_proc p JOIN pg_depend d ON d.classid = 'pg_proc'::regclass AND d.objid = p.oid
          JOIN pg_extension e ON e.oid = d.refobjid AND e.extname = 'pg_claims' AND d.deptype = 'e'
         WHERE p.prosecdef AND p.proargtypes::oid[] && ARRAY['timestamptz'::regtype::oid, 'timestamp'::regtype::oid]";
    assert_eq!(count(&mut c, takes_a_time), 0);
}

#[test]
fn stale_is_never_stored() {
    let (_db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    let error = c
        .batch_execute("UPDATE claude_sessions SET status = 'stale' WHERE session_id = 's1'")
        .unwrap_err();
    assert_eq!(pg_claims_tests::sqlstate(&error), "23514");
    age_heartbeat(&mut c, "s1", "1 hour");
    let both =
        "SELECT status || ' ' || computed_status FROM v_active_sessions WHERE session_id = 's1'";
    assert_eq!(value(&mut c, both).as_deref(), Some("active stale"));
}

#[test]
fn announced_silence_counts_for_view_claim_and_question_alike() {
    let (_db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    age_heartbeat(&mut c, "s1", "10 minutes");
    c.batch_execute("UPDATE claude_sessions SET silent_until = clock_timestamp() + interval '5 minutes' WHERE session_id = 's1'")
        .unwrap();
    let status = "SELECT computed_status FROM v_active_sessions WHERE session_id = 's1'";
    assert_eq!(value(&mut c, status).as_deref(), Some("active"));
    assert_eq!(claim(&mut c, "SD-1", "s2")["error"], "already_claimed");
    assert_eq!(json(&mut c, "SELECT is_sd_claimed('SD-1')", &[])["claimed"], true);
    c.batch_execute(
        "UPDATE claude_sessions SET silent_until = clock_timestamp() WHERE session_id = 's1'",
    )
    .unwrap();
    assert_eq!(value(&mut c, status).as_deref(), Some("stale"));
    assert_eq!(claim(&mut c, "SD-1", "s2")["success"], true);
}

#[test]
fn the_view_has_its_columns_in_order_and_numbers_for_ages() {
    let (_db, mut c) = coordinated();
    let columns: Vec<String> = c
        .query(
            "SELECT attname::text FROM pg_attribute WHERE attrelid = 'v_active_sessions'::regclass AND attnum > 0 ORDER BY attnum",
            &[],
        )
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect();
    let expected = "id session_id sd_id sd_title track tty pid hostname codebase claimed_at heartbeat_at status \
        metadata created_at heartbeat_age_seconds heartbeat_age_minutes seconds_until_stale computed_status \
        claim_duration_minutes heartbeat_age_human claim_id silent_until stale_at owner_role updated_at \
        stale_after progress_at progress_note progress_age_seconds reclaimable_at";
    assert_eq!(columns.join(" "), expected);

    granted(&mut c, "SD-1", "s1");
    age_heartbeat(&mut c, "s1", "90 seconds");
    c.batch_execute("SET pg_claims.stale_after = '300s'").unwrap();
    let row = c
        .query_one(
            "SELECT sd_title, computed_status, heartbeat_age_human,
                    heartbeat_age_seconds BETWEEN 90 AND 100, heartbeat_age_minutes BETWEEN 1.5 AND 1.7,
                    seconds_until_stale BETWEEN 200 AND 210, claim_duration_minutes BETWEEN 0 AND 1,
                    pg_typeof(heartbeat_age_seconds) = 'numeric'::regtype,
                    pg_typeof(seconds_until_stale) = 'numeric'::regtype
               FROM v_active_sessions WHERE session_id = 's1'",
            &[],
        )
        .unwrap();
    assert_eq!(row.get::<_, &str>(0), "Directive 1");
    assert_eq!(row.get::<_, &str>(1), "active");
    assert_eq!(row.get::<_, &str>(2), "1m ago");
    for position in 3..9 {
        assert!(row.get::<_, bool>(position), "column {position}");
    }
}
