//! Reaping by hand, which is the worker's code: never a live session, always under the row's lock.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pg_claims_tests::{backend_pid, json, sqlstate, wait_until_blocked};
use postgres::Client;

use crate::support::*;

fn cleanup(c: &mut Client) -> i64 {
    let answer = json(c, "SELECT cleanup_stale_sessions()", &[]);
    assert_eq!(answer["success"], true, "{answer}");
    assert!(answer["cleaned_at"].is_string());
    answer["stale_sessions_cleaned"].as_i64().unwrap()
}

#[test]
fn only_stale_sessions_are_reaped_with_one_event_each() {
    let (_db, mut c) = coordinated();
    let dead = granted(&mut c, "SD-1", "s1");
    granted(&mut c, "SD-2", "s2");
    age_heartbeat(&mut c, "s1", "301 seconds");
    age_heartbeat(&mut c, "s2", "290 seconds");
    assert_eq!(cleanup(&mut c), 1);
    assert_eq!(cleanup(&mut c), 0);
    assert_eq!(events(&mut c, "s1"), ["registered", "claimed", "stale", "reaped"]);
    assert_eq!(events(&mut c, "s2"), ["registered", "claimed"]);
    let history = format!("SELECT release_reason FROM sd_claims WHERE claim_id = {dead}");
    assert_eq!(value(&mut c, &history).as_deref(), Some("reaped"));
    assert_in_step(&mut c);
    // The session itself lives on: whoever comes back is told, and can claim again.
    let told = beat(&mut c, "s1");
    assert_eq!(told["lost_claim"]["claim_id"], dead);
    assert_eq!(told["lost_claim"]["held_by"], serde_json::Value::Null);
    granted(&mut c, "SD-1", "s1");
}

#[test]
fn a_threshold_only_makes_the_reaper_more_patient() {
    let (_db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    age_heartbeat(&mut c, "s1", "400 seconds");
    granted(&mut c, "SD-2", "s2");
    age_heartbeat(&mut c, "s2", "200 seconds");
    let with = |c: &mut Client, threshold: i32| {
        json(c, "SELECT cleanup_stale_sessions($1)", &[&threshold])["stale_sessions_cleaned"]
            .as_i64()
            .unwrap()
    };
    assert_eq!(with(&mut c, 600), 0);
    assert_eq!(with(&mut c, 1), 1, "a live session was reaped");
    for bad in ["-1, 100", "NULL, 0", "NULL, NULL", "NULL, 100001"] {
        let error = c.batch_execute(&format!("SELECT cleanup_stale_sessions({bad})")).unwrap_err();
        assert_eq!(sqlstate(&error), "22023", "{bad}");
    }
}

#[test]
fn a_batch_is_a_batch_and_what_is_locked_does_not_hold_up_the_rest() {
    let (db, mut c) = coordinated();
    for n in 1..=3 {
        granted(&mut c, &format!("SD-{n}"), &format!("s{n}"));
        age_heartbeat(&mut c, &format!("s{n}"), "1 hour");
    }
    // One session is being written by somebody, another one's SD is being edited.
    let mut writer = db.connect();
    writer
        .batch_execute("BEGIN; UPDATE claude_sessions SET metadata = '{}' WHERE session_id = 's1'")
        .unwrap();
    let mut editor = db.connect();
    editor
        .batch_execute("BEGIN; UPDATE strategic_directives_v2 SET title = 'x' WHERE sd_id = 'SD-2'")
        .unwrap();
    c.batch_execute("SET lock_timeout = '1ms'").unwrap();
    let one = "SELECT cleanup_stale_sessions(NULL, 1)";
    assert_eq!(json(&mut c, one, &[])["stale_sessions_cleaned"], 1);
    assert_eq!(json(&mut c, one, &[])["stale_sessions_cleaned"], 0);
    writer.batch_execute("ROLLBACK").unwrap();
    editor.batch_execute("ROLLBACK").unwrap();
    assert_eq!(cleanup(&mut c), 2);
    assert_in_step(&mut c);
}

#[test]
fn a_heartbeat_that_commits_while_the_reaper_runs_wins() {
    let (db, mut c) = coordinated();
    let held = granted(&mut c, "SD-1", "s1");
    age_heartbeat(&mut c, "s1", "1 hour");
    // The reaper waits after it has looked, and before it has ended anything.
    let mut gate = db.connect();
    gate.batch_execute("BEGIN; LOCK TABLE sd_claims IN SHARE ROW EXCLUSIVE MODE").unwrap();
    let mut reaper = db.connect();
    let pid = backend_pid(&mut reaper);
    let reaping = thread::spawn(move || cleanup(&mut reaper));
    wait_until_blocked(&db, pid);
    assert_eq!(beat(&mut c, "s1")["claim_id"], held);
    gate.batch_execute("ROLLBACK").unwrap();
    assert_eq!(reaping.join().unwrap(), 0);
    assert_eq!(beat(&mut c, "s1")["claim_id"], held);
    assert_in_step(&mut c);
}

#[test]
fn reaper_and_finisher_at_once_end_a_claim_once() {
    let (db, mut c) = coordinated();
    let mut finisher = db.connect();
    let mut reaper = db.connect();
    for _ in 0..50 {
        c.batch_execute("UPDATE strategic_directives_v2 SET status = 'draft'").unwrap();
        granted(&mut c, "SD-1", "s1");
        age_heartbeat(&mut c, "s1", "1 hour");
        thread::scope(|scope| {
            scope.spawn(|| {
                finisher
                    .batch_execute("UPDATE strategic_directives_v2 SET status = 'completed' WHERE sd_id = 'SD-1'")
                    .unwrap();
            });
            scope.spawn(|| cleanup(&mut reaper));
        });
        assert_in_step(&mut c);
    }
}

#[test]
fn a_session_that_beats_through_a_thousand_runs_of_the_reaper_is_never_reaped() {
    let (db, mut c) = coordinated();
    for session in ["s1", "s2"] {
        json(&mut c, "SELECT register_session($1)", &[&session]);
    }
    let held = granted(&mut c, "SD-1", "s1");
    c.batch_execute(&format!("ALTER DATABASE {} SET pg_claims.stale_after = '1s'", db.name()))
        .unwrap();
    let stop = AtomicBool::new(false);
    let mut beating = db.connect();
    let mut reaping = db.connect();
    let began = Instant::now();
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                assert_eq!(beat(&mut beating, "s1")["claim_id"], held);
                thread::sleep(Duration::from_millis(20));
            }
        });
        let mut runs = 0;
        // Well beyond its lease as well.
        while runs < 1000 || began.elapsed() < Duration::from_secs(3) {
            assert_eq!(cleanup(&mut reaping), 0, "run {runs}");
            runs += 1;
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(beat(&mut c, "s1")["claim_id"], held);
    assert_in_step(&mut c);
}

#[test]
fn a_heartbeat_in_the_future_is_neither_immortal_nor_instantly_stale() {
    let (_db, mut c) = coordinated();
    let held = granted(&mut c, "SD-1", "s1");
    age_heartbeat(&mut c, "s1", "-4 hours");
    // The claim that meets it sets it right, or else the reaper.
    assert_eq!(claim(&mut c, "SD-1", "s2")["heartbeat_age_human"], "0s ago");
    let lease = "SELECT seconds_until_stale BETWEEN 290 AND 300 AND computed_status = 'active' FROM v_active_sessions WHERE session_id = 's1'";
    assert_eq!(value(&mut c, lease).as_deref(), Some("true"));
    age_heartbeat(&mut c, "s1", "-4 hours");
    assert_eq!(cleanup(&mut c), 0);
    assert_eq!(value(&mut c, lease).as_deref(), Some("true"));
    assert_eq!(beat(&mut c, "s1")["claim_id"], held);
    age_heartbeat(&mut c, "s1", "301 seconds");
    assert_eq!(cleanup(&mut c), 1);
}

#[test]
fn the_delay_keeps_a_stale_session_s_sd_for_it_alone() {
    let (db, mut c) = coordinated();
    let held = granted(&mut c, "SD-1", "s1");
    c.batch_execute(&format!("ALTER DATABASE {} SET pg_claims.reclaim_delay = '60s'", db.name()))
        .unwrap();
    let mut c = db.connect();
    age_heartbeat(&mut c, "s1", "310 seconds");
    assert_eq!(cleanup(&mut c), 0);
    let refusal = claim(&mut c, "SD-1", "s2");
    assert_eq!(refusal["error"], "already_claimed", "{refusal}");
    assert!(refusal["kept_until"].is_string(), "{refusal}");
    assert!(refusal["message"].as_str().unwrap().contains("stale, kept for it until"));
    // It is seen to be stale meanwhile, and told once.
    let status = "SELECT computed_status FROM v_active_sessions WHERE session_id = 's1'";
    assert_eq!(value(&mut c, status).as_deref(), Some("stale"));
    assert_eq!(cleanup(&mut c), 0);
    assert_eq!(events(&mut c, "s1"), ["registered", "claimed", "stale"]);
    assert_eq!(json(&mut c, "SELECT claim_sd('SD-1', 's1')", &[])["claim_id"], held);
    // Stale again and beyond the delay, it goes to whoever asks.
    age_heartbeat(&mut c, "s1", "361 seconds");
    assert_eq!(claim(&mut c, "SD-1", "s2")["took_over"]["session_id"], "s1");
    age_heartbeat(&mut c, "s2", "361 seconds");
    assert_eq!(cleanup(&mut c), 1);
    assert_in_step(&mut c);
}

#[test]
fn a_claim_that_beats_for_ever_ends_and_is_warned_of_before() {
    let (db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    c.batch_execute(&format!("ALTER DATABASE {} SET pg_claims.max_claim_age = '1h'", db.name()))
        .unwrap();
    let mut c = db.connect();
    let age = |c: &mut Client, by: &str| {
        // As only a restored row can be: claimed_at is the server's to write.
        c.batch_execute(&format!(
            "ALTER TABLE claude_sessions DISABLE TRIGGER USER;
             UPDATE claude_sessions SET claimed_at = claimed_at - interval '{by}' WHERE sd_id IS NOT NULL;
             ALTER TABLE claude_sessions ENABLE TRIGGER USER"
        ))
        .unwrap();
        beat(c, "s1");
    };
    age(&mut c, "47 minutes");
    assert_eq!(cleanup(&mut c), 0);
    assert_eq!(events(&mut c, "s1"), ["registered", "claimed"]);
    age(&mut c, "2 minutes");
    assert_eq!(cleanup(&mut c), 0);
    assert_eq!(cleanup(&mut c), 0);
    assert_eq!(events(&mut c, "s1"), ["registered", "claimed", "max_age_warning"]);
    age(&mut c, "12 minutes");
    // Patience is for the silent.
    let patient = json(&mut c, "SELECT cleanup_stale_sessions(300)", &[]);
    assert_eq!(patient["stale_sessions_cleaned"], 1);
    let lost = beat(&mut c, "s1");
    assert_eq!(lost["lost_claim"]["reason"], "max_claim_age", "{lost}");
    assert_in_step(&mut c);
}

#[test]
fn a_trigger_that_refuses_one_release_is_told_and_does_not_keep_the_others() {
    let (_db, mut c) = coordinated();
    let sessions = ["s1", "s2", "s3"];
    let stale_again = |c: &mut Client| {
        for (session, sd) in sessions.iter().zip(["SD-1", "SD-2", "SD-3"]) {
            granted(c, sd, session);
            age_heartbeat(c, session, "1 hour");
        }
    };
    for refused in ["SD-1", "SD-2", "SD-3"] {
        stale_again(&mut c);
        refuse_release_of(&mut c, refused);
        // As clients do that put each statement into a savepoint, too.
        c.batch_execute("BEGIN; SAVEPOINT s").unwrap();
        let answer = json(&mut c, "SELECT cleanup_stale_sessions()", &[]);
        c.batch_execute("RELEASE s; COMMIT").unwrap();
        assert_eq!(answer["stale_sessions_cleaned"], 2, "{answer}");
        assert_eq!(answer["success"], false);
        assert_eq!(answer["failed"], 1);
        let failures = answer["failures"].as_array().unwrap();
        assert_eq!(failures.len(), 1);
        assert_eq!(failures[0]["sd_id"], refused);
        assert_eq!(failures[0]["session_id"], refused.replace("SD-", "s"));
        assert_eq!(failures[0]["error"], "this SD stays taken");
        assert_in_step(&mut c);
        assert_eq!(
            value(&mut c, "SELECT string_agg(sd_id, ' ') FROM v_directives WHERE is_working_on")
                .as_deref(),
            Some(refused)
        );
        c.batch_execute("DROP FUNCTION refuse() CASCADE").unwrap();
        assert_eq!(cleanup(&mut c), 1);
    }
    // Each claim ended once, also those that were ended again after it had been rolled back.
    assert_eq!(
        count(&mut c, "SELECT count(*) FROM session_lifecycle_events WHERE event_type = 'reaped'"),
        9
    );
}

#[test]
fn an_error_that_is_not_about_one_claim_fails_the_whole_call() {
    let (_db, mut c) = coordinated();
    for n in 1..=3 {
        granted(&mut c, &format!("SD-{n}"), &format!("s{n}"));
        age_heartbeat(&mut c, &format!("s{n}"), "1 hour");
    }
    let reaped = "SELECT count(*) FROM session_lifecycle_events WHERE event_type = 'reaped'";
    // Such as a statement_timeout, a shutdown, a serialization failure, a lack of memory.
    for state in ["57014", "57P01", "40001", "53200"] {
        c.batch_execute(&format!(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN RAISE 'not now' USING ERRCODE = '{state}'; END $$;
             CREATE TRIGGER refuse BEFORE UPDATE ON strategic_directives_v2 FOR EACH ROW
             WHEN (OLD.sd_id = 'SD-2') EXECUTE FUNCTION refuse()"
        ))
        .unwrap();
        let error = c.batch_execute("SELECT cleanup_stale_sessions()").unwrap_err();
        assert_eq!(sqlstate(&error), state);
        assert_eq!(count(&mut c, reaped), 0);
        c.batch_execute("DROP FUNCTION refuse() CASCADE").unwrap();
    }
    assert_eq!(cleanup(&mut c), 3);
    assert_in_step(&mut c);
}
