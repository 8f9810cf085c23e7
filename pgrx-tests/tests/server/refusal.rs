//! A refusal costs a look: no transaction id, no WAL, no lock that outlives it.

use postgres::Client;

use crate::support::*;

/// Asserts that `sql` writes nothing: its transaction gets no id, and no WAL comes of it.
fn assert_writes_nothing(c: &mut Client, sql: &str) {
    c.batch_execute("BEGIN").unwrap();
    // Who first reads a row that another has written notes on its page that it is committed, which
    // can be WAL, where pages have checksums. That is not the statement's, and it is not repeated:
    // what the statement wrote it would write each time.
    let writes_each_time = (0..3).all(|_| writes_wal(c, sql));
    assert!(!writes_each_time, "writes WAL: {sql}");
    let assigned = value(c, "SELECT pg_current_xact_id_if_assigned()");
    assert_eq!(assigned, None, "assigns a transaction id: {sql}");
    c.batch_execute("ROLLBACK").unwrap();
}

#[test]
fn refusals_and_questions_write_nothing() {
    let (_db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    c.batch_execute("UPDATE strategic_directives_v2 SET status = 'completed' WHERE sd_id = 'SD-5'")
        .unwrap();
    c.batch_execute("VACUUM ANALYZE").unwrap();
    for sql in [
        "SELECT claim_sd('SD-1', 's2')",
        "SELECT sd_start('SD-1', 's2')",
        "SELECT claim_sd('SD-404', 's2')",
        "SELECT claim_sd('SD-5', 's2')",
        "SELECT claim_sd('SD-1', 'nobody')",
        "SELECT release_sd('s2')",
        "SELECT release_sd('s1', 'late', 0)",
        "SELECT update_session_heartbeat('nobody')",
        "SELECT is_sd_claimed('SD-1')",
        "SELECT count(*) FROM v_active_sessions",
    ] {
        assert_writes_nothing(&mut c, sql);
    }
    assert!(writes_wal(&mut c, "SELECT claim_sd('SD-2', 's2')"), "a claim is not counted");
}

#[test]
fn a_refusal_works_in_a_read_only_transaction() {
    let (_db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    c.batch_execute("BEGIN READ ONLY").unwrap();
    assert_eq!(claim(&mut c, "SD-1", "s2")["claimed_by"], "s1");
    let error = c.query_one("SELECT claim_sd('SD-2', 's2')", &[]).unwrap_err();
    assert_eq!(pg_claims_tests::sqlstate(&error), "25006");
    c.batch_execute("ROLLBACK").unwrap();
}
