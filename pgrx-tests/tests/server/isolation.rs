//! The stricter isolation levels: a race ends in 40001, and reaches the client as such.

use pg_claims_tests::{json, sqlstate};

use crate::support::*;

const LEVELS: [&str; 2] = ["REPEATABLE READ", "SERIALIZABLE"];

#[test]
fn claims_refusals_switches_and_releases_work_at_every_level() {
    for level in ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"] {
        let (_db, mut c) = coordinated();
        c.batch_execute(&format!("SET default_transaction_isolation = '{level}'")).unwrap();
        granted(&mut c, "SD-1", "s1");
        assert_eq!(claim(&mut c, "SD-1", "s2")["claimed_by"], "s1");
        assert_eq!(claim(&mut c, "SD-2", "s1")["released_sd"], "SD-1");
        age_heartbeat(&mut c, "s1", "1 hour");
        assert_eq!(claim(&mut c, "SD-2", "s2")["took_over"]["session_id"], "s1");
        assert_eq!(release(&mut c, "s2")["success"], true);
        c.batch_execute("BEGIN").unwrap();
        granted(&mut c, "SD-3", "s3");
        assert_eq!(claim(&mut c, "SD-3", "s1")["claimed_by"], "s3");
        json(&mut c, "SELECT end_session('s3')", &[]);
        c.batch_execute("COMMIT").unwrap();
        assert_in_step(&mut c);
    }
}

#[test]
fn a_lost_race_is_a_serialization_failure() {
    for level in LEVELS {
        let (db, mut winner) = coordinated();
        let mut loser = db.connect();
        loser
            .batch_execute(&format!("BEGIN ISOLATION LEVEL {level}; SELECT 1 FROM claude_sessions"))
            .unwrap();
        granted(&mut winner, "SD-1", "s1");
        // The loser's snapshot still shows the SD free.
        let error = loser.query_one("SELECT claim_sd('SD-1', 's2')", &[]).unwrap_err();
        assert_eq!(sqlstate(&error), "40001", "{level}");
        loser.batch_execute("ROLLBACK").unwrap();
        // Tried again, as a client does, it is an answer.
        assert_eq!(claim(&mut loser, "SD-1", "s2")["claimed_by"], "s1");
        assert_in_step(&mut winner);
    }
}

#[test]
fn a_takeover_decided_on_an_old_snapshot_is_a_serialization_failure() {
    for level in LEVELS {
        let (db, mut owner) = coordinated();
        let held = granted(&mut owner, "SD-1", "s1");
        age_heartbeat(&mut owner, "s1", "1 hour");
        let mut taker = db.connect();
        taker
            .batch_execute(&format!("BEGIN ISOLATION LEVEL {level}; SELECT 1 FROM claude_sessions"))
            .unwrap();
        beat(&mut owner, "s1");
        let error = taker.query_one("SELECT claim_sd('SD-1', 's2')", &[]).unwrap_err();
        assert_eq!(sqlstate(&error), "40001", "{level}");
        taker.batch_execute("ROLLBACK").unwrap();
        assert_eq!(beat(&mut owner, "s1")["claim_id"], held);
        assert_in_step(&mut owner);
    }
}

#[test]
fn a_claim_is_undone_with_its_savepoint() {
    let (_db, mut c) = coordinated();
    let held = granted(&mut c, "SD-1", "s1");
    c.batch_execute("BEGIN; SAVEPOINT a").unwrap();
    granted(&mut c, "SD-2", "s1");
    c.batch_execute("ROLLBACK TO a").unwrap();
    assert_eq!(beat(&mut c, "s1")["claim_id"], held);
    c.batch_execute("COMMIT").unwrap();
    assert_in_step(&mut c);
}

#[test]
fn finishing_on_an_old_snapshot_never_leaves_a_finished_sd_claimed() {
    for level in LEVELS {
        for mirror in ["is_working_on boolean", "note text"] {
            for finish in [
                "UPDATE mine SET status = 'completed'",
                "DELETE FROM mine",
                "UPDATE mine SET key = 'renamed'",
            ] {
                let (db, mut c) = coordinated();
                c.batch_execute(&format!(
                    "CREATE TABLE mine (key text PRIMARY KEY, status text, {mirror});
                     INSERT INTO mine VALUES ('M-1', 'open');
                     SELECT bind_directives('mine', '{{key}}')"
                ))
                .unwrap();
                let mut finisher = db.connect();
                finisher
                    .batch_execute(&format!(
                        "BEGIN ISOLATION LEVEL {level}; SELECT 1 FROM claude_sessions"
                    ))
                    .unwrap();
                granted(&mut c, "M-1", "s1");
                let error = finisher.batch_execute(finish).unwrap_err();
                assert_eq!(sqlstate(&error), "40001", "{level}, {mirror}: {finish}: {error:?}");
                finisher.batch_execute("ROLLBACK").unwrap();
                assert_in_step(&mut c);
                // Without a claim in between it goes through.
                release(&mut c, "s1");
                finisher
                    .batch_execute(&format!("BEGIN ISOLATION LEVEL {level}; {finish}; COMMIT"))
                    .unwrap();
                assert_in_step(&mut c);
            }
        }
    }
}

#[test]
fn what_must_see_all_claims_wants_read_committed() {
    for level in LEVELS {
        let (_db, mut c) = coordinated();
        c.batch_execute("CREATE TABLE mine (key text PRIMARY KEY)").unwrap();
        for statement in [
            "SELECT bind_directives('mine', '{key}')",
            "SELECT unbind_directives()",
            "TRUNCATE claude_sessions",
            "TRUNCATE sd_claims",
            "TRUNCATE strategic_directives_v2",
        ] {
            c.batch_execute(&format!("BEGIN ISOLATION LEVEL {level}")).unwrap();
            let error = c.batch_execute(statement).unwrap_err();
            assert_eq!(sqlstate(&error), "0A000", "{statement}");
            assert!(pg_claims_tests::hint(&error).contains("READ COMMITTED"));
            c.batch_execute("ROLLBACK").unwrap();
        }
    }
}

#[test]
fn a_write_by_hand_that_loses_a_race_is_a_serialization_failure_too() {
    for level in LEVELS {
        for mirror in ["is_working_on boolean", "note text"] {
            let (db, mut c) = coordinated();
            c.batch_execute(&format!(
                "CREATE TABLE mine (key text PRIMARY KEY, {mirror}); INSERT INTO mine VALUES ('M-1');
                 SELECT bind_directives('mine', '{{key}}')"
            ))
            .unwrap();
            let mut loser = db.connect();
            loser
                .batch_execute(&format!(
                    "BEGIN ISOLATION LEVEL {level}; SELECT 1 FROM claude_sessions"
                ))
                .unwrap();
            granted(&mut c, "M-1", "s1");
            let error = loser
                .batch_execute("UPDATE claude_sessions SET sd_id = 'M-1' WHERE session_id = 's2'")
                .unwrap_err();
            assert_eq!(sqlstate(&error), "40001", "{level}, {mirror}");
            assert_in_step(&mut c);
        }
    }
}

/// Of a claim on SD-1 that finds a table empty, as it has been since it was made, and of `write`, which fills
/// it having seen no claim, one must fail. Nothing else that the claim reads is written by the other.
fn assert_one_fails(write: &str) {
    let (db, mut claims) = coordinated();
    let mut writes = db.connect();
    for client in [&mut claims, &mut writes] {
        client
            .batch_execute("BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT 1 FROM claude_sessions")
            .unwrap();
    }
    granted(&mut claims, "SD-1", "s1");
    let written = writes.batch_execute(&format!("{write}; COMMIT"));
    let failed = match (written, claims.batch_execute("COMMIT")) {
        (Err(failed), Ok(())) | (Ok(()), Err(failed)) => failed,
        both => panic!("{both:?}"),
    };
    assert_eq!(sqlstate(&failed), "40001");
}

#[test]
fn a_stop_sign_that_saw_no_claim_and_a_claim_that_saw_no_stop_sign_are_a_serialization_failure() {
    assert_one_fails(
        "INSERT INTO sd_holds (sd_id, reason, held_by) VALUES ('SD-1', 'wait', current_user)",
    );
}

#[test]
fn a_pair_that_saw_no_claim_and_a_claim_that_saw_no_pair_are_a_serialization_failure() {
    assert_one_fails(
        "INSERT INTO sd_conflict_matrix (sd_id_a, sd_id_b, conflict_type, declared_by)
         VALUES ('SD-1', 'SD-2', 'same_files', current_user)",
    );
}
