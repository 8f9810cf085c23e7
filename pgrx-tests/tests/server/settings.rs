//! Settings: what decides liveness is not the worker's to change.

use pg_claims_tests::{json, sqlstate};
use postgres::NoTls;

use crate::support::*;

#[test]
fn the_threshold_is_300_seconds_and_has_a_unit_and_a_range() {
    let (_db, mut c) = coordinated();
    let row = c
        .query_one(
            "SELECT boot_val, unit, min_val, context FROM pg_settings WHERE name = 'pg_claims.stale_after'",
            &[],
        )
        .unwrap();
    let found: Vec<String> = (0..4).map(|position| row.get(position)).collect();
    assert_eq!(found, ["300", "s", "1", "superuser"]);
    for bad in ["0", "-1", "'soon'"] {
        let error = c.batch_execute(&format!("SET pg_claims.stale_after = {bad}")).unwrap_err();
        assert_eq!(sqlstate(&error), "22023", "{bad}");
    }
    // A misspelt name is an error once the library is loaded, not a silent no-op.
    let misspelt = c.batch_execute("SET pg_claims.stale_afer = 1");
    let version = value(&mut c, "SELECT current_setting('server_version_num')").unwrap();
    assert_eq!(misspelt.is_err(), version.as_str() >= "150000");
}

#[test]
fn an_operator_s_threshold_moves_view_claim_and_question_together() {
    let (db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    age_heartbeat(&mut c, "s1", "100 seconds");
    c.batch_execute(&format!("ALTER DATABASE {} SET pg_claims.stale_after = '90s'", db.name()))
        .unwrap();
    let mut c = db.connect();
    let status = "SELECT computed_status FROM v_active_sessions WHERE session_id = 's1'";
    assert_eq!(value(&mut c, status).as_deref(), Some("stale"));
    assert_eq!(json(&mut c, "SELECT is_sd_claimed('SD-1')", &[])["claimed"], false);
    assert_eq!(claim(&mut c, "SD-1", "s2")["success"], true);
}

#[test]
fn a_worker_cannot_change_what_decides_liveness() {
    let (db, mut owner) = coordinated();
    let worker = db.role("worker");
    json(&mut owner, "SELECT grant_coordination($1, 'worker')", &[&worker]);
    granted(&mut owner, "SD-1", "s1");
    age_heartbeat(&mut owner, "s1", "100 seconds");
    let refused = |c: &mut postgres::Client| {
        register(c, "greedy");
        assert_eq!(claim(c, "SD-1", "greedy")["error"], "already_claimed");
        let shown = value(c, "SELECT current_setting('pg_claims.stale_after')");
        assert_eq!(shown.as_deref(), Some("5min"));
    };
    // After the library was loaded: an error.
    let mut c = db.connect_as(&worker);
    refused(&mut c);
    for attempt in
        ["SET pg_claims.stale_after = 1", "SELECT set_config('pg_claims.stale_after', '1', false)"]
    {
        let error = c.batch_execute(attempt).unwrap_err();
        assert_eq!(sqlstate(&error), "42501", "{attempt}");
    }
    // Before: the server takes it for a setting that it does not know, and drops it on loading.
    let mut c = db.connect_as(&worker);
    c.batch_execute("SET pg_claims.stale_after = 1").unwrap();
    refused(&mut c);
    let mut config = db.config();
    let mut c = config.user(&worker).options("-c pg_claims.stale_after=1").connect(NoTls).unwrap();
    refused(&mut c);
    // And as a default of its own role.
    let mut c = db.connect_as(&worker);
    if c.batch_execute(&format!("ALTER ROLE {worker} SET pg_claims.stale_after = 1")).is_ok() {
        refused(&mut db.connect_as(&worker));
    }
}
