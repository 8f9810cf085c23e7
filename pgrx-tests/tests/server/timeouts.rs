//! `statement_timeout` ends every call, whatever it waits for and however much it has to read.

use std::time::{Duration, Instant};

use pg_claims_tests::{json, message, sqlstate};
use postgres::Client;

use crate::support::*;

/// A call of every function with arguments that have it do its work.
pub const CALLS: &[&str] = &[
    "advance_numbers()",
    "assert_claim('SD-1', 's1', (SELECT id FROM known))",
    "assign_sessions('nobody', current_user)",
    "bind_directives('items', '{key}')",
    "checked_limit(1)",
    "claim_next_sd('s2')",
    "claim_reclaimable_at(now(), NULL, NULL, now())",
    "claim_sd('SD-1', 's2')",
    "claim_sd('SD-2', 's2')",
    "claim_sd('SD-3', 's1')",
    "cleanup_stale_sessions()",
    "coordination_check()",
    "coordination_repair()",
    "coordination_repair(false)",
    "declare_conflict('SD-1', 'SD-2', 'x')",
    "dependency_cycles()",
    "dependency_keys('[\"SD-1\"]')",
    "elapsed_minutes(now(), now())",
    "elapsed_seconds(now(), now())",
    "end_session('s1')",
    "extend_lease('s1', '1 minute')",
    "force_heartbeat('s1')",
    "get_heartbeat_stats()",
    "grant_coordination('pg_monitor', 'none')",
    "guard_table('items', 'key')",
    "heartbeat_age_human(now(), now())",
    "heartbeat_board()",
    "heartbeat_sessions('{s1,s2}')",
    "hold_sd('SD-1', 'because')",
    "is_claim_live(now(), NULL, NULL, now(), 1)",
    "is_heartbeat_active()",
    "is_sd_claimed('SD-1')",
    "latest_heartbeat('claude_sessions'::regclass, 's1', now())",
    "lease_expires_at(now(), NULL)",
    "lifecycle_events_since()",
    "prune_history()",
    "register_session('s1', 'host')",
    "register_session('new')",
    "release_sd('s1')",
    "report_progress('s1', 'half')",
    "resolve_conflict('SD-1', 'SD-2')",
    "sd_blockers('SD-1', '[\"SD-2\"]')",
    "sd_next()",
    "sd_start('SD-1', 's2')",
    "start_heartbeat('s1')",
    "stop_heartbeat()",
    "takeover_sd('SD-1', 's2', 'because')",
    "unbind_directives()",
    "unguard_table('items')",
    "unhold_sd('SD-1')",
    "update_session_heartbeat('s1')",
];

/// Makes the tables that the calls name, and claims `SD-1` for `s1`. Returns the claim id.
pub fn prepare(c: &mut Client) -> i64 {
    c.batch_execute(
        "CREATE TABLE items (key text PRIMARY KEY); SELECT guard_table('items', 'key');
         CREATE TABLE known (id bigint)",
    )
    .unwrap();
    let held = granted(c, "SD-1", "s1");
    c.execute("INSERT INTO known VALUES ($1)", &[&held]).unwrap();
    held
}

/// The extension's tables.
const TABLES: &str = "SELECT c.oid::regclass::text
      FROM pg_depend d JOIN pg_extension e ON e.oid = d.refobjid AND e.extname = 'pg_claims'
      JOIN pg_class c ON d.classid = 'pg_class'::regclass AND c.oid = d.objid
     WHERE d.deptype = 'e' AND c.relkind = 'r' ORDER BY 1";

/// Every function that is not a trigger's.
const FUNCTIONS: &str = "SELECT DISTINCT p.proname::text
      FROM pg_depend d JOIN pg_extension e ON e.oid = d.refobjid AND e.extname = 'pg_claims'
      JOIN pg_proc p ON d.classid = 'pg_proc'::regclass AND p.oid = d.objid
     WHERE d.deptype = 'e' AND p.prorettype NOT IN ('trigger'::regtype, 'event_trigger'::regtype)
     ORDER BY 1";

fn texts(c: &mut Client, sql: &str) -> Vec<String> {
    c.query(sql, &[]).unwrap().iter().map(|row| row.get(0)).collect()
}

/// Calls everything while `blocker` has an open transaction, and returns what the timeout has ended. What has been done is
/// rolled back each time.
fn ended_behind(c: &mut Client, blocker: &mut Client, locks: &str) -> Vec<&'static str> {
    // Should a call outlast its timeout, it goes on when the blocker is gone, and the COMMIT below fails.
    blocker.batch_execute("SET idle_in_transaction_session_timeout = '5min'; BEGIN").unwrap();
    blocker.batch_execute(locks).unwrap();
    let mut ended = Vec::new();
    for call in CALLS {
        let outcome = c.batch_execute(&format!(
            "BEGIN; SET LOCAL statement_timeout = '60ms'; SELECT * FROM {call}; ROLLBACK"
        ));
        if let Err(error) = outcome {
            assert_eq!(sqlstate(&error), "57014", "{call}: {}", message(&error));
            ended.push(*call);
            c.batch_execute("ROLLBACK").unwrap();
        }
    }
    blocker.batch_execute("COMMIT").expect("no call outlasts its timeout");
    ended
}

#[test]
fn a_call_that_waits_ends_with_its_timeout() {
    let (db, mut c) = coordinated();
    let held = prepare(&mut c);
    let mut called: Vec<String> =
        CALLS.iter().map(|call| call.split('(').next().unwrap().to_owned()).collect();
    called.dedup();
    assert_eq!(called, texts(&mut c, FUNCTIONS), "each function is called");
    let tables = texts(&mut c, TABLES);
    let mut blocker = db.connect();

    let exclusively = format!("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE", tables.join(", "));
    let ended = ended_behind(&mut c, &mut blocker, &exclusively);
    for call in ["claim_sd('SD-2', 's2')", "claim_next_sd('s2')", "sd_next()", "release_sd('s1')"] {
        assert!(ended.contains(&call), "{call} did not wait: {ended:?}");
    }
    let rows =
        "SELECT FROM claude_sessions FOR UPDATE; SELECT FROM strategic_directives_v2 FOR UPDATE;
                SELECT FROM sd_claims FOR UPDATE; SELECT FROM event_frontier FOR UPDATE;
                SELECT FROM installation FOR UPDATE";
    let ended = ended_behind(&mut c, &mut blocker, rows);
    for call in ["claim_sd('SD-2', 's2')", "release_sd('s1')", "hold_sd('SD-1', 'because')"] {
        assert!(ended.contains(&call), "{call} did not wait: {ended:?}");
    }
    // The server has undone each call that it ended, and the connection still works.
    assert_eq!(beat(&mut c, "s1")["claim_id"], held);
    assert_in_step(&mut c);
    granted(&mut c, "SD-2", "s2");
    release(&mut c, "s1");
    release(&mut c, "s2");
    assert_in_step(&mut c);
}

#[test]
fn a_call_that_has_much_to_read_ends_with_its_timeout() {
    let (_db, mut c) = coordinated();
    // Many SDs that wait for another, and sessions that are long dead: nobody is given any of these quickly.
    c.batch_execute(
        "INSERT INTO strategic_directives_v2 (sd_id, title, dependencies)
         SELECT 'B-' || n, 'Blocked ' || n, '[\"SD-9\"]' FROM generate_series(1, 20000) n;
         UPDATE strategic_directives_v2 SET status = 'completed' WHERE sd_id ~ '^SD-[1-8]$';
         SELECT register_session('dead-' || n) FROM generate_series(1, 400) n;
         INSERT INTO strategic_directives_v2 (sd_id) SELECT 'C-' || n FROM generate_series(1, 400) n;
         SELECT claim_sd('C-' || n, 'dead-' || n) FROM generate_series(1, 400) n;
         UPDATE claude_sessions SET heartbeat_at = now() - interval '1 day' WHERE session_id LIKE 'dead-%';
         SELECT hold_sd('SD-9', 'so that none is free')",
    )
    .unwrap();
    for call in [
        "claim_next_sd('s1')",
        "sd_next()",
        "count(*) FROM v_sd_queue",
        "cleanup_stale_sessions(p_batch_size => 400)",
        "coordination_check()",
        "coordination_repair()",
        "dependency_cycles()",
    ] {
        let mut timed = |timeout: &str| {
            c.batch_execute(&format!("BEGIN; SET LOCAL statement_timeout = '{timeout}'")).unwrap();
            let begin = Instant::now();
            let outcome = c.batch_execute(&format!("SELECT {call}"));
            let took = begin.elapsed();
            c.batch_execute("ROLLBACK").unwrap();
            (outcome, took)
        };
        let (outcome, _) = timed("0");
        outcome.unwrap_or_else(|error| panic!("{call}: {}", message(&error)));
        let (_, whole) = timed("0");
        let (outcome, cut) = timed(&format!("{}ms", (whole.as_millis() / 10).max(1)));
        let error = outcome.expect_err(call);
        assert_eq!(sqlstate(&error), "57014", "{call}");
        // Early in its work and not when that was done. On a machine with other work a part takes longer than it should.
        assert!(cut < whole * 3 / 4 + Duration::from_millis(20), "{call}: {cut:?} of {whole:?}");
    }
    assert_in_step(&mut c);
    json(&mut c, "SELECT unhold_sd('SD-9')", &[]);
    granted(&mut c, "SD-9", "s1");
}
