//! Somebody declares a function PARALLEL SAFE that calls one of the extension's. The server then runs both in a parallel
//! worker.

use pg_claims_tests::{message, sqlstate};

use crate::support::*;
use crate::timeouts::{CALLS, prepare};

#[test]
fn no_call_in_a_parallel_worker_writes_or_breaks_anything() {
    let (_db, mut c) = coordinated();
    let held = prepare(&mut c);
    c.batch_execute(
        "CREATE TABLE many AS SELECT generate_series(1, 10) AS n; ALTER TABLE many SET (parallel_workers = 2);
         SET parallel_setup_cost = 0; SET parallel_tuple_cost = 0; SET min_parallel_table_scan_size = 0;
         SET parallel_leader_participation = off",
    )
    .unwrap();
    let mut refused = 0;
    for call in CALLS {
        c.batch_execute(&format!(
            "CREATE OR REPLACE FUNCTION call(integer) RETURNS bigint LANGUAGE sql PARALLEL SAFE AS
             $$ SELECT count(*) FROM (SELECT * FROM {call}) called $$"
        ))
        .unwrap();
        let sql = "SELECT sum(call(n)) FROM many WHERE n = 1";
        let plan = c.query(&format!("EXPLAIN {sql}"), &[]).unwrap();
        assert!(plan.iter().any(|row| row.get::<_, String>(0).contains("Gather")), "{call}");
        if let Err(error) = c.batch_execute(sql) {
            assert_eq!(sqlstate(&error), "25000", "{call}: {}", message(&error));
            refused += 1;
        }
    }
    assert!(refused > 20, "{refused} of {} calls were refused", CALLS.len());
    assert_eq!(beat(&mut c, "s1")["claim_id"], held);
    assert_eq!(count(&mut c, "SELECT count(*) FROM claude_sessions WHERE sd_id IS NOT NULL"), 1);
    assert_in_step(&mut c);
}
