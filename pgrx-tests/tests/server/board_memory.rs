//! Where the server cannot give the memory for the heartbeat board.

use std::fs::{Permissions, set_permissions};
use std::os::unix::fs::PermissionsExt;

use pg_claims_tests::{Server, Stop, json, wait_until};

use crate::board::{heartbeats, is_on_board, needs_no_preloading};
use crate::queue::texts;
use crate::support::*;
use crate::worker::{connect, is_free, served};

/// A server in which nobody has needed such memory yet, and that cannot make the file that it would be in. Small
/// pieces it takes from `spare`, if that is given.
fn without_memory(name: &str, spare: &[&str]) -> (Server, impl FnOnce()) {
    let settings = ["dynamic_shared_memory_type = mmap", "pg_claims.worker = off"];
    let (server, c) = served(name, &[&settings, spare].concat());
    drop(c);
    server.stop(Stop::Fast).unwrap();
    server.start().unwrap();
    let folder = server.data().join("pg_dynshmem");
    let could = std::fs::metadata(&folder).unwrap().permissions();
    set_permissions(&folder, Permissions::from_mode(0o500)).unwrap();
    (server, move || set_permissions(folder, could).unwrap())
}

#[test]
fn where_the_memory_cannot_be_made_all_works_on_the_table_until_it_can() {
    let (server, give_memory) = without_memory("board-memory", &[]);
    let mut c = connect(&server, "postgres");
    granted(&mut c, "SD-1", "s1");
    for _ in 0..2 {
        assert_eq!(beat(&mut c, "s1")["sd_id"], "SD-1");
        assert!(!is_on_board(&mut c, "s1"));
    }
    let (in_table, counts) = heartbeats(&mut c, "s1");
    assert_eq!(in_table, counts);
    // Also from another process, in a transaction that then goes on.
    let mut other = connect(&server, "postgres");
    other.batch_execute("BEGIN; CREATE TABLE kept (n integer)").unwrap();
    assert_eq!(claim(&mut other, "SD-1", "s2")["claimed_by"], "s1");
    assert_eq!(count(&mut other, "SELECT count(*) FROM v_active_sessions"), 3);
    other.batch_execute("COMMIT; SELECT FROM kept").unwrap();
    age_heartbeat(&mut c, "s1", "1 hour");
    assert_eq!(json(&mut c, "SELECT cleanup_stale_sessions()", &[])["stale_sessions_cleaned"], 1);
    assert!(is_free(&mut c, "SD-1"));
    let doctor = "SELECT status FROM coordination_check() WHERE name = 'heartbeat_board'";
    assert_eq!(value(&mut c, doctor).as_deref(), Some("warning"));

    give_memory();
    if needs_no_preloading(&mut c) {
        for c in [&mut c, &mut other] {
            wait_until("the board to be there", || {
                beat(c, "s2");
                is_on_board(c, "s2")
            });
        }
        assert_eq!(value(&mut c, doctor).as_deref(), Some("ok"));
    }
    granted(&mut c, "SD-1", "s1");
    assert_in_step(&mut c);
    server.discard().unwrap();
}

#[test]
fn where_there_is_memory_for_all_but_the_board_a_parallel_plan_sees_the_table() {
    let spare = ["min_dynamic_shared_memory = 4MB"];
    let (server, _give_memory) = without_memory("board-memory-parallel", &spare);
    let mut c = connect(&server, "postgres");
    granted(&mut c, "SD-1", "s1");
    beat(&mut c, "s1");
    assert!(!is_on_board(&mut c, "s1"));
    c.batch_execute(
        "SET parallel_setup_cost = 0; SET parallel_tuple_cost = 0;
         SET min_parallel_table_scan_size = 0; SET parallel_leader_participation = off",
    )
    .unwrap();
    let live = "SELECT count(*) FROM claude_sessions
                 WHERE latest_heartbeat(tableoid, session_id, heartbeat_at) IS NOT NULL";
    let plan = texts(&mut c, &format!("EXPLAIN (ANALYZE, COSTS OFF) {live}"));
    assert!(
        plan.iter().any(
            |line| line.contains("Workers Launched: 1") || line.contains("Workers Launched: 2")
        ),
        "{plan:#?}"
    );
    assert_eq!(count(&mut c, live), 3);
    assert_eq!(claim(&mut c, "SD-1", "s2")["claimed_by"], "s1");
    server.discard().unwrap();
}
