//! What of the heartbeat board reaches the table, what stays over a shutdown, and what is forgotten.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use pg_claims_tests::{Stop, json, wait_until};

use crate::board::{boarded, entries, heartbeats, is_on_board, needs_no_preloading, places};
use crate::support::*;
use crate::worker::{PRELOAD, connect, is_free, launcher, served};

#[test]
fn the_worker_writes_the_board_to_the_table_and_clears_it() {
    let (server, mut c) = served("board-worker", &[PRELOAD, "pg_claims.stale_after = 4s"]);
    granted(&mut c, "SD-1", "s1");
    let begin = Instant::now();
    let mut written = Vec::new();
    let mut beats = 0;
    while begin.elapsed() < Duration::from_secs(8) {
        assert_eq!(beat(&mut c, "s1")["sd_id"], "SD-1");
        beats += 1;
        let (in_table, counts) = heartbeats(&mut c, "s1");
        assert!(counts - in_table < 4.0, "the table is more than a lease behind");
        if written.last() != Some(&in_table) {
            written.push(in_table);
        }
        thread::sleep(Duration::from_millis(50));
    }
    eprintln!("{beats} heartbeats, {} in the table", written.len());
    assert!(written.len() > 1, "never written");
    assert!(written.len() <= 6, "written too often: {written:?}");
    // What is over leaves nothing behind.
    json(&mut c, "SELECT end_session('s1')", &[]);
    c.batch_execute("DELETE FROM claude_sessions WHERE session_id = 's2'").unwrap();
    wait_until("the board to be cleared", || {
        json(&mut c, "SELECT cleanup_stale_sessions()", &[]);
        entries(&mut c) == 0
    });
    server.discard().unwrap();
}

#[test]
fn the_heartbeat_that_brings_a_session_onto_the_board_is_not_written_twice() {
    let (server, mut c) = boarded("board-first", &[]);
    granted(&mut c, "SD-1", "s1");
    beat(&mut c, "s1");
    json(&mut c, "SELECT heartbeat_sessions('{s2}')", &[]);
    assert!(is_on_board(&mut c, "s1") && is_on_board(&mut c, "s2"));
    let before = places(&mut c);
    json(&mut c, "SELECT cleanup_stale_sessions()", &[]);
    assert_eq!(places(&mut c), before);
    server.discard().unwrap();
}

#[test]
fn without_a_worker_cleaning_up_writes_all_of_the_board_once_and_clears_it() {
    let (server, mut c) = boarded("board-cron", &["pg_claims.stale_after = 1s"]);
    c.batch_execute("SELECT register_session('many-' || n) FROM generate_series(1, 1500) n")
        .unwrap();
    let behind = "SELECT count(*) FROM claude_sessions
                   WHERE latest_heartbeat(tableoid, session_id, heartbeat_at) - heartbeat_at >= '0.5 s'";
    wait_until("the table to be half a lease behind", || {
        c.batch_execute(
            "SELECT heartbeat_sessions(array_agg(session_id)) FROM claude_sessions
              WHERE session_id LIKE 'many-%'",
        )
        .unwrap();
        count(&mut c, behind) == 1500
    });
    // What comes to nothing leaves the board as it is.
    for undone in [
        "BEGIN; SELECT cleanup_stale_sessions(); ROLLBACK",
        "BEGIN; SAVEPOINT s; SELECT cleanup_stale_sessions(); ROLLBACK TO s; COMMIT",
    ] {
        c.batch_execute(undone).unwrap();
        assert_eq!(count(&mut c, behind), 1500, "{undone}");
    }
    // As clients do that put each statement into a savepoint.
    c.batch_execute("BEGIN; SAVEPOINT s; SELECT cleanup_stale_sessions(); RELEASE s; COMMIT")
        .unwrap();
    assert_eq!(count(&mut c, behind), 0);
    let before = places(&mut c);
    json(&mut c, "SELECT cleanup_stale_sessions()", &[]);
    assert_eq!(places(&mut c), before, "written again");

    c.batch_execute(
        "SELECT end_session(session_id) FROM claude_sessions WHERE session_id LIKE 'many-%'",
    )
    .unwrap();
    assert!(entries(&mut c) >= 1500);
    json(&mut c, "SELECT cleanup_stale_sessions()", &[]);
    assert_eq!(entries(&mut c), 0);
    server.discard().unwrap();
}

#[test]
fn without_a_worker_a_session_that_cannot_be_written_does_not_keep_the_others() {
    let (server, mut c) = boarded("board-refused", &["pg_claims.stale_after = 1s"]);
    let beat_all = "SELECT heartbeat_sessions(array_agg(session_id)) FROM claude_sessions
                     WHERE session_id LIKE 'many-%'";
    c.batch_execute("SELECT register_session('many-' || n) FROM generate_series(1, 20) n").unwrap();
    // From now on the board has them.
    c.batch_execute(beat_all).unwrap();
    refuse_writes_of(&mut c, "many-7");
    let behind = "SELECT string_agg(session_id, ' ') FROM claude_sessions
                   WHERE latest_heartbeat(tableoid, session_id, heartbeat_at) - heartbeat_at >= '0.5 s'";
    wait_until("the table to be half a lease behind", || {
        c.batch_execute(beat_all).unwrap();
        value(&mut c, behind).is_some_and(|behind| behind.split(' ').count() == 20)
    });
    let answer = json(&mut c, "SELECT cleanup_stale_sessions()", &[]);
    assert_eq!(answer["failed"], 1, "{answer}");
    assert_eq!(answer["failures"][0]["session_id"], "many-7");
    assert_eq!(answer["failures"][0]["sd_id"], serde_json::Value::Null);
    assert_eq!(answer["failures"][0]["error"], "not this one");
    assert_eq!(value(&mut c, behind).as_deref(), Some("many-7"));
    server.discard().unwrap();
}

#[test]
fn a_session_that_cannot_be_written_does_not_keep_what_is_over_on_the_board() {
    let (server, mut c) = served("board-stuck", &[PRELOAD, "pg_claims.stale_after = 2s"]);
    for session in ["s1", "s2"] {
        beat(&mut c, session);
    }
    refuse_writes_of(&mut c, "s1");
    wait_until("the worker to fail to write the session", || {
        beat(&mut c, "s1");
        value(&mut c, "SELECT errors > 0 FROM v_worker_health").as_deref() == Some("true")
    });
    assert_eq!(entries(&mut c), 2);
    json(&mut c, "SELECT end_session('s2')", &[]);
    wait_until("the board to be cleared of the other", || {
        beat(&mut c, "s1");
        entries(&mut c) == 1
    });
    server.discard().unwrap();
}

#[test]
fn the_table_is_behind_by_half_of_a_session_s_own_lease_at_the_most() {
    let (server, mut c) = boarded("board-own-lease", &["pg_claims.min_stale_after = 1s"]);
    c.batch_execute("SELECT register_session('short', p_stale_after => '2 s')").unwrap();
    wait_until("the table to be behind", || {
        for session in ["short", "s1"] {
            beat(&mut c, session);
        }
        let (in_table, counts) = heartbeats(&mut c, "short");
        counts - in_table > 1.0
    });
    let of_s1 = heartbeats(&mut c, "s1");
    json(&mut c, "SELECT cleanup_stale_sessions()", &[]);
    let (in_table, counts) = heartbeats(&mut c, "short");
    assert_eq!(in_table, counts);
    assert_eq!(heartbeats(&mut c, "s1"), of_s1, "with the usual lease it is not worth a write");
    // A lease that is changed counts from then on.
    c.batch_execute("UPDATE claude_sessions SET stale_after = NULL WHERE session_id = 'short'")
        .unwrap();
    wait_until("the table to be behind", || {
        beat(&mut c, "short");
        let (in_table, counts) = heartbeats(&mut c, "short");
        counts - in_table > 1.0
    });
    let before = heartbeats(&mut c, "short");
    json(&mut c, "SELECT cleanup_stale_sessions()", &[]);
    assert_eq!(heartbeats(&mut c, "short"), before);
    server.discard().unwrap();
}

#[test]
fn a_heartbeat_that_is_set_back_to_what_is_new_to_the_table_counts() {
    let (server, mut c) = boarded("board-between", &[]);
    wait_until("the table to be behind", || {
        beat(&mut c, "s1");
        let (in_table, counts) = heartbeats(&mut c, "s1");
        counts - in_table > 0.1
    });
    let (in_table, counts) = heartbeats(&mut c, "s1");
    // Whoever writes a whole row as it was read sets nothing back.
    c.batch_execute(
        "UPDATE claude_sessions SET heartbeat_at = heartbeat_at, tty = 'x' WHERE session_id = 's1'",
    )
    .unwrap();
    assert_eq!(heartbeats(&mut c, "s1"), (in_table, counts));
    c.batch_execute(
        "UPDATE claude_sessions SET heartbeat_at = heartbeat_at + interval '10 ms' WHERE session_id = 's1'",
    )
    .unwrap();
    let (set, counts_now) = heartbeats(&mut c, "s1");
    assert!(in_table < set && set < counts);
    assert_eq!(counts_now, set);
    server.discard().unwrap();
}

#[test]
fn a_full_queue_of_notifications_does_not_keep_stale_sessions() {
    let settings = ["pg_claims.worker = off", "max_notify_queue_pages = 64"];
    let (server, mut c) = served("notify-full", &[]);
    if !needs_no_preloading(&mut c) {
        // Before PostgreSQL 17 it has 8 gigabytes, always.
        return server.discard().unwrap();
    }
    server.discard().unwrap();
    let (server, mut c) = served("notify-full", &settings);
    let mut listener = connect(&server, "postgres");
    listener.batch_execute("LISTEN pg_claims").unwrap();
    listener.batch_execute("BEGIN").unwrap();
    let fill = "SELECT pg_notify('noise', repeat('x', 7900))";
    assert!((0..200).any(|_| c.batch_execute(fill).is_err()), "it takes in anything");
    granted(&mut c, "SD-1", "s1");
    age_heartbeat(&mut c, "s1", "1 hour");
    let cleanup = "SELECT cleanup_stale_sessions()";
    let answer = json(&mut c, cleanup, &[]);
    assert_eq!(answer["stale_sessions_cleaned"], 1, "{answer}");
    let unannounced = "SELECT count(*) FROM lifecycle_event_positions, event_frontier WHERE position > announced_to";
    assert!(count(&mut c, unannounced) > 0);
    listener.batch_execute("COMMIT").unwrap();
    wait_until("the events to be announced", || {
        json(&mut c, cleanup, &[]);
        count(&mut c, unannounced) == 0
    });
    server.discard().unwrap();
}

#[test]
fn a_session_that_is_put_back_by_hand_has_the_heartbeat_that_it_is_given() {
    let (server, mut c) = boarded("board-ghost", &[]);
    let delete = "DELETE FROM claude_sessions WHERE session_id = 's1'";
    let rename = "UPDATE claude_sessions SET session_id = 's1-renamed' WHERE session_id = 's1'";
    let (replica, origin) =
        ("SET session_replication_role = replica", "RESET session_replication_role");
    let put_back = "INSERT INTO claude_sessions SELECT * FROM kept";
    let ways: [&[&str]; 6] = [
        &[delete, put_back],
        &["BEGIN", delete, put_back, "COMMIT"],
        &["BEGIN", "SAVEPOINT s", delete, "RELEASE s", put_back, "COMMIT"],
        &[replica, delete, put_back, origin],
        // Nobody else may.
        &[replica, rename, put_back, origin],
        &["TRUNCATE claude_sessions, sd_claims", put_back],
    ];
    for way in ways {
        for _ in 0..2 {
            beat(&mut c, "s1");
        }
        let (in_table, counts) = heartbeats(&mut c, "s1");
        assert!(counts > in_table, "{way:?}");
        c.batch_execute(
            "DROP TABLE IF EXISTS kept;
             CREATE TABLE kept AS SELECT * FROM claude_sessions WHERE session_id = 's1'",
        )
        .unwrap();
        for step in way {
            c.batch_execute(step).unwrap();
        }
        assert_eq!(heartbeats(&mut c, "s1"), (in_table, in_table), "{way:?}");
    }
    server.discard().unwrap();
}

#[test]
fn what_is_rolled_back_or_set_right_costs_no_heartbeat() {
    let (server, mut c) = boarded("board-rollback", &[]);
    granted(&mut c, "SD-1", "s1");
    for _ in 0..2 {
        beat(&mut c, "s1");
    }
    let (in_table, counts) = heartbeats(&mut c, "s1");
    assert!(counts > in_table);
    c.batch_execute(
        "BEGIN; DELETE FROM claude_sessions WHERE session_id = 's1'; ROLLBACK;
         BEGIN; DELETE FROM claude_sessions WHERE session_id = 's1';
         INSERT INTO claude_sessions (session_id) VALUES ('s1'); ROLLBACK;
         BEGIN; UPDATE claude_sessions SET silent_until = now() WHERE session_id = 's1';
         SELECT cleanup_stale_sessions(); ROLLBACK",
    )
    .unwrap();
    assert_eq!(heartbeats(&mut c, "s1"), (in_table, counts));
    // A snapshot that does not know a session says nothing about it.
    let mut old = connect(&server, "postgres");
    old.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1 FROM claude_sessions")
        .unwrap();
    register(&mut c, "s4");
    for _ in 0..2 {
        beat(&mut c, "s4");
    }
    // So that its heartbeat is to be written at once.
    c.batch_execute("UPDATE claude_sessions SET silent_until = now() WHERE session_id = 's4'")
        .unwrap();
    let seen = heartbeats(&mut c, "s4");
    old.batch_execute("SELECT cleanup_stale_sessions(); COMMIT").unwrap();
    assert_eq!(heartbeats(&mut c, "s4"), seen);
    // Nor does a session that was over by then, and has come back since.
    register(&mut c, "s5");
    for _ in 0..2 {
        beat(&mut c, "s5");
    }
    json(&mut c, "SELECT end_session('s5')", &[]);
    old.batch_execute("BEGIN; SELECT cleanup_stale_sessions()").unwrap();
    register(&mut c, "s5");
    for _ in 0..2 {
        beat(&mut c, "s5");
    }
    let seen = heartbeats(&mut c, "s5");
    assert!(seen.1 > seen.0);
    old.batch_execute("COMMIT").unwrap();
    assert_eq!(heartbeats(&mut c, "s5"), seen);
    server.discard().unwrap();
}

#[test]
fn a_heartbeat_set_back_counts_at_once_in_its_transaction_and_elsewhere_once_committed() {
    let (server, mut c) = boarded("board-set-back", &["max_prepared_transactions = 5"]);
    let mut other = connect(&server, "postgres");
    for _ in 0..2 {
        beat(&mut c, "s1");
    }
    let seen = heartbeats(&mut c, "s1");
    assert!(seen.1 > seen.0);
    let set_back = "UPDATE claude_sessions SET heartbeat_at = heartbeat_at - interval '1 hour'
                     WHERE session_id = 's1'";
    let steps = [
        ("BEGIN", false),
        (set_back, true),
        ("ROLLBACK", false),
        ("BEGIN; SAVEPOINT a", false),
        (set_back, true),
        ("ROLLBACK TO a", false),
        ("SAVEPOINT b; SAVEPOINT c", false),
        (set_back, true),
        ("RELEASE c", true),
        ("ROLLBACK TO b", false),
        ("COMMIT", false),
        ("BEGIN; SAVEPOINT a", false),
        (set_back, true),
        ("RELEASE a", true),
    ];
    for (number, (step, is_set_back)) in steps.into_iter().enumerate() {
        c.batch_execute(step).unwrap();
        let (in_table, counts) = heartbeats(&mut c, "s1");
        assert_eq!(counts < seen.0, is_set_back, "{number}: {step}");
        assert_eq!(in_table == counts, is_set_back, "{number}: {step}");
        assert_eq!(heartbeats(&mut other, "s1"), seen, "{number}: {step}");
    }
    c.batch_execute("COMMIT").unwrap();
    let (in_table, counts) = heartbeats(&mut other, "s1");
    assert_eq!(in_table, counts);
    assert!(counts < seen.0);
    // Nobody tells the board when a prepared transaction is committed.
    for _ in 0..2 {
        beat(&mut c, "s1");
    }
    c.batch_execute(&format!("BEGIN; {set_back}; PREPARE TRANSACTION 'set back'")).unwrap();
    c.batch_execute("COMMIT PREPARED 'set back'").unwrap();
    let (in_table, counts) = heartbeats(&mut other, "s1");
    assert_eq!(in_table, counts);
    drop(other);
    server.discard().unwrap();
}

#[test]
fn without_preloading_a_shutdown_keeps_what_the_board_had_once() {
    let (server, mut c) = served("board-dynamic-restart", &["autovacuum = off"]);
    let has_board = needs_no_preloading(&mut c);
    let file = server.data().join("pg_stat/pg_claims.board");
    granted(&mut c, "SD-1", "s1");
    for _ in 0..2 {
        beat(&mut c, "s1");
    }
    let seen = heartbeats(&mut c, "s1");
    assert_eq!(seen.1 > seen.0, has_board);
    wait_until("the launcher to have got as far as to start a worker", || {
        value(&mut c, "SELECT last_run_at FROM v_worker_health").is_some()
    });
    server.stop(Stop::Fast).unwrap();
    let kept = file.exists().then(|| fs::read(&file).unwrap());
    assert_eq!(kept.is_some(), has_board);
    server.start().unwrap();
    let mut c = connect(&server, "postgres");
    assert_eq!(heartbeats(&mut c, "s1"), seen);
    assert!(!file.exists());
    // Which brings the launcher back.
    assert_eq!(beat(&mut c, "s1")["sd_id"], "SD-1");
    // What a launcher leaves that ends alone is nothing new, and may be about what has been forgotten since.
    age_heartbeat(&mut c, "s1", "1 hour");
    let pid = launcher(&mut c);
    if let Some(kept) = kept {
        fs::write(&file, kept).unwrap();
    }
    c.execute("SELECT pg_terminate_backend($1)", &[&pid]).unwrap();
    wait_until("the next launcher to have begun", || launcher(&mut c) != pid && !file.exists());
    let (in_table, counts) = heartbeats(&mut c, "s1");
    assert_eq!(in_table, counts);
    assert!(counts < seen.0);
    server.discard().unwrap();
}

#[test]
fn a_trigger_that_shortens_heartbeats_keeps_the_worker_from_nothing() {
    let (server, mut c) = served("board-shortened", &[PRELOAD, "autovacuum = off"]);
    c.batch_execute(
        "CREATE FUNCTION shorten() RETURNS trigger LANGUAGE plpgsql AS
         $$ BEGIN NEW.heartbeat_at := date_trunc('second', NEW.heartbeat_at); RETURN NEW; END $$;
         CREATE TRIGGER shorten BEFORE UPDATE ON claude_sessions
         FOR EACH ROW EXECUTE FUNCTION shorten()",
    )
    .unwrap();
    granted(&mut c, "SD-1", "s2");
    // The first one goes back to a time before the session was there, and one of the next onto the board.
    for _ in 0..3 {
        beat(&mut c, "s1");
    }
    let (in_table, counts) = heartbeats(&mut c, "s1");
    assert!(counts > in_table);
    // From now on its heartbeat is to be written, and is later than what the table will have.
    granted(&mut c, "SD-3", "s1");
    age_heartbeat(&mut c, "s2", "1 hour");
    wait_until("the stale session to be reaped", || is_free(&mut c, "SD-1"));
    server.discard().unwrap();
}

#[test]
fn a_shutdown_keeps_what_the_board_had_and_a_crash_costs_no_claim() {
    let (server, mut c) = boarded("board-restart", &["pg_claims.restart_grace = on"]);
    granted(&mut c, "SD-1", "s1");
    beat(&mut c, "s1");
    thread::sleep(Duration::from_millis(1100));
    beat(&mut c, "s1");
    let (in_table, counts) = heartbeats(&mut c, "s1");
    assert!(counts - in_table > 1.0);
    server.stop(Stop::Fast).unwrap();
    server.start().unwrap();
    let mut c = connect(&server, "postgres");
    assert_eq!(heartbeats(&mut c, "s1"), (in_table, counts));
    assert!(!server.data().join("pg_stat/pg_claims.board").exists());
    // Written where somebody does the worker's work.
    json(&mut c, "SELECT cleanup_stale_sessions()", &[]);
    assert_eq!(heartbeats(&mut c, "s1"), (counts, counts));
    assert_eq!(beat(&mut c, "s1")["sd_id"], "SD-1");
    // The lease would have ended long ago by what the table has.
    age_heartbeat(&mut c, "s1", "1 hour");
    let (aged, _) = heartbeats(&mut c, "s1");
    c.batch_execute("BEGIN").unwrap();
    beat(&mut c, "s1");
    c.batch_execute("ROLLBACK").unwrap();
    assert_eq!(heartbeats(&mut c, "s1").0, aged);
    assert!(heartbeats(&mut c, "s1").1 > aged, "a beat that was sent was sent");
    server.crash().unwrap();
    server.start().unwrap();
    let mut c = connect(&server, "postgres");
    assert_eq!(heartbeats(&mut c, "s1"), (aged, aged));
    assert_eq!(claim(&mut c, "SD-1", "s2")["claimed_by"], "s1", "it has one full lease");
    server.discard().unwrap();
}
