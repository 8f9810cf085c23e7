//! A refusal costs a look: no transaction id, no WAL, no lock that outlives it.

use pg_claims_tests::TestDb;
use postgres::Client;

use crate::support::*;

/// Asserts that `sql` writes nothing: its transaction gets no id and the WAL does not grow.
fn assert_writes_nothing(db: &TestDb, client: &mut Client, sql: &str) {
    // Once before, so that plans are made and hint bits set.
    client.simple_query(sql).unwrap();
    let mut transaction = client.transaction().unwrap();
    let wal = |client: &mut Client| -> String {
        client.query_one("SELECT pg_current_wal_insert_lsn()::text", &[]).unwrap().get(0)
    };
    let mut quiet = Vec::new();
    let mut observer = db.connect();
    // Other databases of the same server write too: one quiet try of many is proof enough, because
    // what this statement wrote it would write every time.
    for _ in 0..200 {
        let before = wal(&mut observer);
        transaction.simple_query(sql).unwrap();
        let after = wal(&mut observer);
        quiet.push(before == after);
        if before == after {
            break;
        }
    }
    assert!(quiet.contains(&true), "writes WAL: {sql}");
    let assigned: Option<String> =
        transaction.query_one("SELECT pg_current_xact_id_if_assigned()::text", &[]).unwrap().get(0);
    assert_eq!(assigned, None, "assigns a transaction id: {sql}");
    transaction.rollback().unwrap();
}

#[test]
fn refusals_and_questions_write_nothing() {
    let (db, mut c) = coordinated();
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
        assert_writes_nothing(&db, &mut c, sql);
    }
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
