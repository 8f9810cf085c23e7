//! Catching up on events: each once, in the order in which they became visible; and pruning them.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use pg_claims_tests::{TestDb, json, wait_until};
use postgres::Client;

use crate::support::*;

/// Puts in order what has become visible, as the worker does.
fn settle(c: &mut Client) {
    json(c, "SELECT cleanup_stale_sessions()", &[]);
}

/// What comes after `place`: the place, the kind and the session.
fn since(c: &mut Client, place: i64) -> Vec<(i64, String, String)> {
    c.query("SELECT id, event_type, session_id FROM lifecycle_events_since($1)", &[&place])
        .unwrap()
        .iter()
        .map(|row| (row.get(0), row.get(1), row.get(2)))
        .collect()
}

#[test]
fn an_event_that_commits_late_comes_after_those_that_were_read_already() {
    let (db, mut c) = coordinated();
    settle(&mut c);
    let last = since(&mut c, 0).last().unwrap().0;
    // The earlier number is committed later.
    let mut slow = db.connect();
    slow.batch_execute("BEGIN").unwrap();
    granted(&mut slow, "SD-1", "s1");
    granted(&mut c, "SD-2", "s2");
    settle(&mut c);
    let read = since(&mut c, last);
    assert_eq!(read.len(), 1, "{read:?}");
    assert_eq!(read[0].2, "s2");
    slow.batch_execute("COMMIT").unwrap();
    settle(&mut c);
    let rest = since(&mut c, read[0].0);
    assert_eq!(rest.len(), 1, "{rest:?}");
    assert_eq!(rest[0].2, "s1");
    // What was rolled back is not waited for.
    slow.batch_execute("BEGIN").unwrap();
    granted(&mut slow, "SD-3", "s3");
    slow.batch_execute("ROLLBACK").unwrap();
    granted(&mut c, "SD-4", "s3");
    // Only once every transaction has ended that can have drawn its number, anywhere on the server.
    wait_until("the number to be given up", || {
        settle(&mut c);
        count(&mut c, "SELECT cardinality(gaps_first)::bigint FROM event_frontier") == 0
    });
    assert_eq!(since(&mut c, rest[0].0).len(), 1);
    // A limit, from the oldest on.
    let limited = "SELECT count(*) FROM lifecycle_events_since(p_limit => 2)";
    assert_eq!(count(&mut c, limited), 2);
}

#[test]
fn a_client_that_was_away_reads_everything_exactly_once_under_load() {
    let (db, mut c) = coordinated();
    for n in 0..8 {
        register(&mut c, &format!("busy-{n}"));
    }
    let stop = AtomicBool::new(false);
    let mut reader = db.connect();
    let mut settler = db.connect();
    let mut read: Vec<(i64, String, String)> = Vec::new();
    let mut follow = |read: &mut Vec<_>| {
        let place = read.last().map_or(0, |(id, ..): &(i64, String, String)| *id);
        read.extend(since(&mut reader, place));
    };
    thread::scope(|scope| {
        for n in 0..8 {
            let mut busy = db.connect();
            scope.spawn(move || {
                for round in 0..40 {
                    busy.batch_execute("BEGIN").unwrap();
                    claim(&mut busy, &format!("SD-{n}"), &format!("busy-{n}"));
                    release(&mut busy, &format!("busy-{n}"));
                    let end = if (round + n) % 3 == 0 { "ROLLBACK" } else { "COMMIT" };
                    busy.batch_execute(end).unwrap();
                }
            });
        }
        let stop = &stop;
        scope.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                settle(&mut settler);
            }
        });
        for _ in 0..200 {
            follow(&mut read);
        }
        stop.store(true, Ordering::Relaxed);
    });
    settle(&mut c);
    follow(&mut read);
    let places: HashSet<i64> = read.iter().map(|(id, ..)| *id).collect();
    assert_eq!(places.len(), read.len(), "an event came twice");
    assert_eq!(read.len() as i64, count(&mut c, "SELECT count(*) FROM session_lifecycle_events"));
    // Of one session, claimed and released take turns.
    for n in 1..8 {
        let session = format!("busy-{n}");
        let kinds: Vec<&str> = read
            .iter()
            .filter(|(_, kind, of)| *of == session && kind != "registered")
            .map(|(_, kind, _)| kind.as_str())
            .collect();
        assert!(kinds.chunks(2).all(|pair| pair == ["claimed", "released"]), "{kinds:?}");
    }
}

#[test]
fn catching_up_survives_dump_and_restore() {
    let (db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    settle(&mut c);
    let before = since(&mut c, 0);
    // Committed, and not put in order yet.
    granted(&mut c, "SD-2", "s2");
    let copy = TestDb::empty();
    copy.psql(&db.dump());
    let mut c = copy.connect();
    assert_eq!(since(&mut c, 0), before);
    settle(&mut c);
    let after = since(&mut c, before.last().unwrap().0);
    assert_eq!(after.len(), 1, "{after:?}");
    assert_eq!(after[0].2, "s2");
}

#[test]
fn history_is_pruned_in_batches_and_an_open_claim_never() {
    let (_db, mut c) = coordinated();
    let old_open = granted(&mut c, "SD-9", "s3");
    for _ in 0..30 {
        granted(&mut c, "SD-1", "s1");
        release(&mut c, "s1");
    }
    register(&mut c, "gone");
    json(&mut c, "SELECT end_session('gone')", &[]);
    settle(&mut c);
    // All of that is a hundred days old.
    c.batch_execute(
        "ALTER TABLE sd_claims DISABLE TRIGGER USER;
         UPDATE sd_claims SET claimed_at = claimed_at - interval '100 days', released_at = released_at - interval '100 days';
         ALTER TABLE sd_claims ENABLE TRIGGER USER;
         UPDATE session_lifecycle_events SET occurred_at = occurred_at - interval '100 days';
         UPDATE claude_sessions SET heartbeat_at = heartbeat_at - interval '100 days', updated_at = updated_at - interval '100 days',
                released_at = released_at - interval '100 days' WHERE session_id = 'gone'",
    )
    .unwrap();
    let recent = granted(&mut c, "SD-2", "s2");
    release(&mut c, "s2");
    let prune = |c: &mut Client, batch: i32| json(c, "SELECT prune_history($1)", &[&batch]);
    // Off: nothing is removed.
    c.batch_execute("SET pg_claims.history_retention = 0").unwrap();
    assert_eq!(prune(&mut c, 1000)["claims_removed"], 0);
    c.batch_execute("RESET pg_claims.history_retention").unwrap();
    let first = prune(&mut c, 10);
    assert!((1..=10).contains(&first["claims_removed"].as_i64().unwrap()), "{first}");
    while prune(&mut c, 10)["claims_removed"] != 0 {}
    prune(&mut c, 1000);
    let kept: Vec<i64> = c
        .query("SELECT claim_id FROM sd_claims ORDER BY claim_id", &[])
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert_eq!(kept, [old_open, recent]);
    assert_eq!(count(&mut c, "SELECT count(*) FROM claude_sessions WHERE session_id = 'gone'"), 0);
    let old = "SELECT count(*) FROM session_lifecycle_events WHERE occurred_at < now() - interval '90 days'";
    assert_eq!(count(&mut c, old), 0);
    assert_eq!(beat(&mut c, "s3")["claim_id"], old_open);
    // Catching up goes on from what is kept.
    settle(&mut c);
    assert_eq!(since(&mut c, 0).len(), 2);
}
