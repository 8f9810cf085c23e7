//! A guard that is held open for long, while everything else goes on.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pg_claims_tests::{TestDb, backend_pid, json, wait_until};
use postgres::Client;

use crate::support::*;

/// How long the guard is held, in seconds: longer for a measurement than in everyday tests.
const SECONDS: &str = "PG_CLAIMS_GUARD_SECONDS";

/// Calls again and again until it is over. Whatever waited for the guard would fail.
fn keep_on(db: &TestDb, over: &AtomicBool, mut work: impl FnMut(&mut Client)) -> usize {
    let mut client = db.connect();
    client.batch_execute("SET lock_timeout = '2s'").unwrap();
    let mut times = 0;
    while !over.load(Ordering::Relaxed) {
        work(&mut client);
        times += 1;
    }
    times
}

#[test]
fn a_guard_that_is_held_for_long_holds_up_nobody() {
    let seconds = std::env::var(SECONDS).map_or(8, |given| given.parse().unwrap());
    let (db, mut c) = coordinated();
    c.batch_execute(&format!(
        "ALTER DATABASE {} SET pg_claims.stale_after = '1s';
         CREATE TABLE work (sd_id text, done text); SELECT guard_table('work', 'sd_id')",
        db.name()
    ))
    .unwrap();
    let held = granted(&mut c, "SD-1", "s1");
    let mut guard = db.connect();
    let pid = backend_pid(&mut guard);
    guard.batch_execute("BEGIN").unwrap();
    guard.query("SELECT assert_claim('SD-1', 's1', $1)", &[&held]).unwrap();
    guard.batch_execute("INSERT INTO work VALUES ('SD-1', 'half')").unwrap();

    let over = AtomicBool::new(false);
    let begin = Instant::now();
    thread::scope(|scope| {
        let (db, over) = (&db, &over);
        let beats = scope.spawn(move || {
            keep_on(db, over, |c| {
                // In the second half it is silent, and its lease runs out.
                if begin.elapsed() < Duration::from_secs(seconds / 2) {
                    assert_eq!(beat(c, "s1")["claim_id"], held);
                    json(c, "SELECT heartbeat_sessions('{s1,s2}')", &[]);
                } else {
                    assert_eq!(beat(c, "s2")["success"], true);
                }
            })
        });
        let views = scope.spawn(move || {
            keep_on(db, over, |c| {
                for view in ["v_active_sessions", "v_sd_next", "v_directives"] {
                    let seen = format!("SELECT count(*) FROM {view} WHERE sd_id = 'SD-1'");
                    assert_eq!(count(c, &seen), 1, "{view}");
                }
            })
        });
        let refusals = scope.spawn(move || {
            keep_on(db, over, |c| {
                let refusal = claim(c, "SD-1", "s2");
                assert_eq!(refusal["claimed_by"], "s1", "{refusal}");
                let queued = json(c, "SELECT claim_next_sd('s2')", &[]);
                assert_ne!(queued["sd_id"], "SD-1");
                release(c, "s2");
            })
        });
        let upkeep = scope.spawn(move || {
            keep_on(db, over, |c| {
                json(c, "SELECT cleanup_stale_sessions()", &[]);
                json(c, "SELECT prune_history()", &[]);
                for table in ["claude_sessions", "sd_claims", "strategic_directives_v2", "work"] {
                    c.batch_execute(&format!("VACUUM ANALYZE {table}")).unwrap();
                }
            })
        });
        let waiting = scope.spawn(move || {
            keep_on(db, over, |c| {
                let blocked = c
                    .query(
                        "SELECT query FROM pg_stat_activity WHERE $1 = ANY (pg_blocking_pids(pid))",
                        &[&pid],
                    )
                    .unwrap();
                let blocked: Vec<String> = blocked.iter().map(|row| row.get(0)).collect();
                assert!(blocked.is_empty(), "{blocked:?}");
            })
        });
        let threads = [&beats, &views, &refusals, &upkeep, &waiting];
        while begin.elapsed() < Duration::from_secs(seconds)
            && threads.iter().all(|thread| !thread.is_finished())
        {
            thread::sleep(Duration::from_millis(20));
        }
        over.store(true, Ordering::Relaxed);
        for (what, thread) in [
            ("heartbeats", beats),
            ("views", views),
            ("refusals", refusals),
            ("upkeep", upkeep),
            ("looks for who waits", waiting),
        ] {
            let times = thread.join().unwrap();
            eprintln!("{what}: {times} in {seconds} s");
            assert!(times > 0, "{what}");
        }
    });

    // It is long stale, and yet its work arrives.
    assert_eq!(claim(&mut db.connect(), "SD-1", "s2")["guarded"], true);
    guard.batch_execute("COMMIT").unwrap();
    assert_eq!(count(&mut c, "SELECT count(*) FROM work"), 1);
    let mut other = db.connect();
    wait_until("the claim to be reaped", || {
        json(&mut other, "SELECT cleanup_stale_sessions()", &[]);
        value(&mut other, "SELECT sd_id FROM claude_sessions WHERE session_id = 's1'").is_none()
    });
    assert_in_step(&mut c);
}
