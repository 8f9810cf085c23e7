//! On a standby every function either works, as it only reads, or says that this is a standby.

use std::collections::BTreeSet;
use std::fs;

use pg_claims_tests::{Server, Stop, detail, hint, json, message, sqlstate};
use postgres::Client;

use crate::support::*;
use crate::worker::{PRELOAD, connect, served};

/// How a call fares where nothing can be written.
#[derive(Clone, Copy, PartialEq)]
enum Fares {
    /// It only reads.
    Works,
    /// It is an error.
    Fails,
    /// It answers why it does nothing.
    Answers(&'static str),
}
use Fares::{Answers, Fails, Works};

/// A call of each function that SQL sees.
const CALLS: &[(&str, Fares)] = &[
    ("advance_numbers()", Fails),
    (
        "assert_claim('SD-1', 's1', (SELECT claim_id FROM claude_sessions WHERE session_id = 's1'))",
        Fails,
    ),
    ("assign_sessions('postgres', 'pg_monitor')", Fails),
    ("bind_directives('items', '{sd_id}')", Fails),
    ("checked_limit(1)", Works),
    ("claim_next_sd('s2')", Fails),
    ("claim_reclaimable_at(now(), NULL, NULL, NULL)", Works),
    ("claim_sd('SD-2', 's2')", Fails),
    ("cleanup_stale_sessions()", Fails),
    ("coordination_check()", Works),
    ("coordination_repair()", Fails),
    ("coordination_repair(false)", Fails),
    ("declare_conflict('SD-1', 'SD-2', 'file', 'warning')", Fails),
    ("dependency_cycles()", Works),
    ("dependency_keys('[\"SD-1\"]')", Works),
    ("elapsed_minutes(now(), now())", Works),
    ("elapsed_seconds(now(), now())", Works),
    ("end_session('s1')", Fails),
    ("extend_lease('s1', '1 minute')", Fails),
    ("force_heartbeat('s1')", Fails),
    ("get_heartbeat_stats()", Works),
    ("grant_coordination('pg_monitor', 'viewer')", Fails),
    ("guard_table('items', 'sd_id')", Fails),
    ("heartbeat_age_human(now(), now())", Works),
    ("heartbeat_board()", Works),
    ("heartbeat_sessions('{s1,s2}')", Fails),
    ("hold_sd('SD-2', 'wait')", Fails),
    ("is_claim_live(now(), NULL, NULL, NULL, NULL)", Works),
    ("is_heartbeat_active()", Works),
    ("is_sd_claimed('SD-1')", Works),
    ("latest_heartbeat('claude_sessions'::regclass, 's1', now())", Works),
    ("lease_expires_at(now(), NULL, NULL, NULL)", Works),
    ("lifecycle_events_since()", Works),
    ("prune_history()", Fails),
    ("register_session('s9')", Fails),
    ("release_sd('s1')", Fails),
    ("report_progress('s1', 'half')", Fails),
    ("resolve_conflict('SD-1', 'SD-3')", Fails),
    ("sd_blockers('SD-1', '[]')", Works),
    ("sd_next()", Works),
    ("sd_start('SD-2', 's2')", Fails),
    ("start_heartbeat('s1')", Answers("the server is a standby")),
    ("stop_heartbeat()", Fails),
    ("takeover_sd('SD-1', 's2', 'urgent')", Fails),
    ("unbind_directives()", Fails),
    ("unguard_table('guarded')", Fails),
    ("unhold_sd('SD-4')", Fails),
    ("update_session_heartbeat('s1')", Fails),
    // Where nothing would be written even on the primary.
    ("claim_sd('SD-1', 's2')", Fails),
    ("claim_sd('SD-2', 'nobody')", Fails),
    ("release_sd('s2')", Fails),
    ("update_session_heartbeat('nobody')", Fails),
    ("heartbeat_sessions('{}')", Works),
    ("update_session_heartbeat('s1', 1)", Fails),
];

/// The function that a call is of.
fn function(call: &str) -> &str {
    call.split('(').next().unwrap()
}

fn assert_every_function_is_called(c: &mut Client) {
    let functions = c
        .query(
            "SELECT p.proname::text FROM pg_depend d JOIN pg_extension e ON e.oid = d.refobjid
               JOIN pg_proc p ON p.oid = d.objid
              WHERE e.extname = 'pg_claims' AND d.refclassid = 'pg_extension'::regclass
                AND d.classid = 'pg_proc'::regclass AND d.deptype = 'e'
                AND p.prorettype NOT IN ('trigger'::regtype, 'event_trigger'::regtype)",
            &[],
        )
        .unwrap();
    let functions: BTreeSet<String> = functions.iter().map(|row| row.get(0)).collect();
    let called = CALLS.iter().map(|(call, _)| function(call).to_owned()).collect();
    assert_eq!(functions, called);
}

fn prepared(name: &str, worker: &str) -> (Server, Client) {
    let (server, mut c) = served(name, &[PRELOAD, "restore_command = 'false'", worker]);
    c.batch_execute(
        "CREATE TABLE items (sd_id text PRIMARY KEY, title text, status text, priority text);
         CREATE TABLE guarded (sd_id text);
         SELECT guard_table('guarded', 'sd_id');
         SELECT hold_sd('SD-4', 'wait');
         SELECT declare_conflict('SD-1', 'SD-3', 'file', 'warning');",
    )
    .unwrap();
    granted(&mut c, "SD-1", "s1");
    assert_every_function_is_called(&mut c);
    (server, c)
}

#[test]
fn on_a_standby_each_function_works_or_says_that_it_is_one() {
    let (server, mut c) = prepared("standby-functions", "pg_claims.worker = on");
    // The board has both.
    for _ in 0..2 {
        json(&mut c, "SELECT heartbeat_sessions('{s1,s2}')", &[]);
    }
    drop(c);
    server.stop(Stop::Fast).unwrap();
    fs::write(server.data().join("standby.signal"), "").unwrap();
    server.start().unwrap();
    let mut c = connect(&server, "postgres");
    for &(call, fares) in CALLS {
        let answer = c.query(&format!("SELECT {call}"), &[]);
        match fares {
            Works => drop(answer.unwrap_or_else(|error| panic!("{call}: {error:?}"))),
            Answers(why) => {
                let answer: serde_json::Value = answer.unwrap()[0].get(0);
                assert_eq!(answer["success"], false, "{call}: {answer}");
                assert!(answer.to_string().contains(why), "{call}: {answer}");
            }
            Fails => {
                let error = answer.err().unwrap_or_else(|| panic!("{call} is answered"));
                assert_eq!(sqlstate(&error), "25006", "{call}");
                assert_eq!(message(&error), "this server is a standby", "{call}");
                assert!(detail(&error).contains("the primary"), "{call}");
                assert!(hint(&error).contains("Connect to the primary"), "{call}");
            }
        }
    }
    // A NULL or a wrong argument is the caller's own fault anywhere.
    let error = c.query("SELECT claim_sd(NULL, 's1')", &[]).unwrap_err();
    assert_eq!(sqlstate(&error), "22023");
    let relations =
        "SELECT c.relname::text FROM pg_depend d JOIN pg_extension e ON e.oid = d.refobjid
                       JOIN pg_class c ON c.oid = d.objid
                      WHERE e.extname = 'pg_claims' AND d.refclassid = 'pg_extension'::regclass
                        AND d.classid = 'pg_class'::regclass AND c.relkind IN ('r', 'v')";
    let relations = c.query(relations, &[]).unwrap();
    assert!(relations.len() > 10);
    for relation in relations {
        let name: String = relation.get(0);
        c.query(&format!("SELECT * FROM {name}"), &[]).unwrap_or_else(|e| panic!("{name}: {e:?}"));
    }
    drop(c);
    server.discard().unwrap();
}

#[test]
fn in_a_read_only_transaction_a_function_that_would_write_says_so() {
    // Or it would do what is to be done.
    let (server, mut c) = prepared("read-only-functions", "pg_claims.worker = off");
    let mut answered = Vec::new();
    for &(call, fares) in CALLS {
        c.batch_execute("BEGIN READ ONLY").unwrap();
        let answer = c.query(&format!("SELECT {call}"), &[]);
        c.batch_execute("ROLLBACK").unwrap();
        match answer {
            Ok(_) if fares == Works => {}
            Ok(_) => answered.push(call),
            Err(error) => {
                assert!(fares != Works, "{call}: {error:?}");
                assert_eq!(sqlstate(&error), "25006", "{call}");
                let message = message(&error);
                assert!(message.contains("read-only transaction"), "{call}: {message}");
            }
        }
    }
    assert_eq!(answered, WRITE_NOTHING_HERE);
    server.discard().unwrap();
}

/// Where these refuse, which needs no write.
const WRITE_NOTHING_HERE: [&str; 6] = [
    "start_heartbeat('s1')",
    "claim_sd('SD-1', 's2')",
    "claim_sd('SD-2', 'nobody')",
    "release_sd('s2')",
    "update_session_heartbeat('nobody')",
    "update_session_heartbeat('s1', 1)",
];
