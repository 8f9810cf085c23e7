//! Which SD a session gets from the queue: order, affinity, and many at once.

use std::sync::Barrier;
use std::thread;

use pg_claims_tests::{TestDb, json, sqlstate};
use postgres::Client;
use serde_json::Value;

use crate::queue::*;
use crate::support::*;

#[test]
fn the_queue_goes_by_priority_rank_and_age() {
    let (_db, mut c) = with_backlog(
        "('soon', 'soon', NULL, NULL, NULL), ('low', 'low', 1, NULL, NULL),
         ('medium', 'Medium', 1, NULL, NULL), ('older', 'high', NULL, NULL, NULL),
         ('newer', 'HIGH', NULL, NULL, NULL), ('ranked 2', 'high', 2, NULL, NULL),
         ('ranked 10', 'P1', 10, NULL, NULL), ('critical', 'critical', 99, NULL, NULL),
         ('done', 'critical', 1, NULL, NULL)",
    );
    c.batch_execute(
        "UPDATE strategic_directives_v2 SET status = 'Completed' WHERE sd_id = 'done';
         UPDATE strategic_directives_v2 SET created_at = created_at - interval '1 day' WHERE sd_id = 'older'",
    )
    .unwrap();
    let order = ["critical", "ranked 2", "ranked 10", "older", "newer", "medium", "low", "soon"];
    assert_eq!(queue(&mut c), order);
    assert_eq!(
        texts(&mut c, "SELECT queue_position || ' ' || sd_id FROM v_sd_next LIMIT 2"),
        ["1 critical", "2 ranked 2"]
    );
    for expected in order {
        let answer = next(&mut c, "s1");
        assert_eq!(answer["sd_id"], expected, "{answer}");
        assert_eq!(answer["queue_reason"], "order");
        assert_eq!(answer["title"], format!("Title of {expected}"));
        assert_eq!(answer["already_owned"], false);
        finish(&mut c, expected);
    }
    let answer = next(&mut c, "s1");
    assert_eq!(answer["error"], "queue_empty", "{answer}");
    assert_eq!(answer["message"], "the backlog has no unfinished SD");
    assert_in_step(&mut c);
}

#[test]
fn a_track_has_a_queue_of_its_own() {
    let (_db, mut c) = with_backlog(
        "('A-1', 'low', NULL, 'A', NULL), ('B-1', 'critical', NULL, 'B', NULL), ('none', 'critical', NULL, NULL, NULL)",
    );
    let answer = json(&mut c, "SELECT claim_next_sd('s1', 'A')", &[]);
    assert_eq!(answer["sd_id"], "A-1", "{answer}");
    let empty = json(&mut c, "SELECT claim_next_sd('s2', 'A')", &[]);
    assert_eq!(empty["message"], "no SD in track A can be claimed now: 1 claimed");
    // The claim's track is the SD's own, unless one is asked for.
    let answer = json(&mut c, "SELECT claim_next_sd('s2')", &[]);
    assert_eq!((&answer["sd_id"], &answer["track"]), (&"B-1".into(), &"B".into()));
}

#[test]
fn who_holds_an_sd_is_given_that_again() {
    let (_db, mut c) =
        with_backlog("('SD-1', 'low', NULL, 'A', NULL), ('SD-2', 'high', NULL, 'B', NULL)");
    let held = granted(&mut c, "SD-1", "s1");
    for track in [None, Some("B")] {
        let answer = json(&mut c, "SELECT claim_next_sd('s1', $1)", &[&track]);
        assert_eq!(answer["claim_id"], held, "{answer}");
        assert_eq!(answer["already_owned"], true);
        assert_eq!(answer["queue_reason"], Value::Null);
        assert_eq!(answer["title"], "Title of SD-1");
    }
}

#[test]
fn what_the_queue_gives_is_the_first_that_its_view_shows_as_available() {
    for seed in 1..=4 {
        let db = TestDb::new();
        let mut c = db.connect();
        c.batch_execute(&format!(
            r#"SELECT setseed(0.{seed});
               CREATE FUNCTION pick(text[]) RETURNS text LANGUAGE sql
                   RETURN $1[1 + floor(random() * cardinality($1))::integer];
               INSERT INTO strategic_directives_v2 (sd_id, status, priority, sequence_rank, track, dependencies,
                                                    parent_sd_id)
               SELECT 'SD-' || n, pick('{{draft,draft,draft,active,Completed,deferred}}'),
                      pick('{{critical,high,medium,low,P2,odd}}'), pick('{{1,2,3,NULL}}')::integer,
                      pick('{{A,B,NULL}}'),
                      replace(pick(ARRAY['[]', '[]', '[]', '[]', '[]', '["?"]', '["?", "?"]', 'null', '"?"', '[7]', '[null]', '[true]',
                                          '[{{"$serde_json::private::Number": "x"}}]',
                                          repeat('[', 200) || repeat(']', 200)]), '?',
                              'SD-' || ceil(random() * 60))::jsonb,
                      CASE WHEN random() < 0.2 THEN 'SD-' || ceil(random() * 60) END
                 FROM generate_series(1, 60) n;
               SELECT hold_sd('SD-' || n, 'wait') FROM generate_series(1, 60, 9) n;
               SELECT declare_conflict('SD-' || n, 'SD-' || n + 7, 'files') FROM generate_series(1, 50, 3) n;
               SELECT register_session('s-' || n) FROM generate_series(1, 60) n"#
        ))
        .unwrap_or_else(|error| panic!("{error:?}"));
        let mut given = 0;
        for n in 1..=60 {
            let track = [None, Some("A"), Some("B")][n % 3];
            let first = c
                .query_opt(
                    "SELECT sd_id FROM v_sd_queue
                      WHERE eligibility = 'available' AND ($1::text IS NULL OR track = $1)
                      ORDER BY priority_order, rank, created_at, sd_id LIMIT 1",
                    &[&track],
                )
                .unwrap()
                .map(|row| row.get::<_, String>(0));
            let session = format!("s-{n}");
            let answer = json(&mut c, "SELECT claim_next_sd($1, $2)", &[&session, &track]);
            assert_eq!(answer["sd_id"].as_str(), first.as_deref(), "seed {seed}: {answer}");
            given += usize::from(first.is_some());
            match n % 4 {
                // Some are done, which frees others; some owners die; one in four goes on.
                0 => c
                    .batch_execute(
                        "UPDATE strategic_directives_v2 SET status = 'completed'
                          WHERE sd_id = (SELECT max(sd_id) FROM claude_sessions)",
                    )
                    .unwrap(),
                1 => age_heartbeat(&mut c, &session, "1 hour"),
                2 => {
                    json(&mut c, "SELECT release_sd($1)", &[&session]);
                }
                _ => {}
            }
        }
        assert!(given > 15, "seed {seed}: only {given} were given");
    }
}

#[test]
fn an_acquisition_that_nobody_holds_does_not_keep_the_rest() {
    let (_db, mut c) =
        with_backlog("('SD-1', 'high', NULL, NULL, NULL), ('SD-2', 'low', NULL, NULL, NULL)");
    c.batch_execute(
        "SET session_replication_role = replica;
         INSERT INTO sd_claims (claim_id, sd_id, session_id) VALUES (77, 'SD-1', 'gone');
         RESET session_replication_role",
    )
    .unwrap();
    assert_eq!(next(&mut c, "s1")["sd_id"], "SD-1", "it is closed, and the SD is given out");
    assert_eq!(next(&mut c, "s2")["sd_id"], "SD-2");
}

#[test]
fn the_queue_does_without_its_indexes() {
    let (_db, mut c) = with_backlog(
        r#"('part', 'low', 1, NULL, NULL), ('whole', 'high', 1, NULL, NULL), ('late', 'high', 2, NULL, '["low"]'),
           ('low', 'low', 2, NULL, NULL)"#,
    );
    c.batch_execute(
        "UPDATE strategic_directives_v2 SET parent_sd_id = 'whole' WHERE sd_id = 'part';
         DROP INDEX strategic_directives_v2_parent_idx",
    )
    .unwrap();
    assert_eq!(next(&mut c, "s1")["sd_id"], "part");
    c.batch_execute("DROP INDEX strategic_directives_v2_queue_idx").unwrap();
    assert_eq!(next(&mut c, "s2")["sd_id"], "low");
    finish(&mut c, "part");
    assert_eq!(next(&mut c, "s1")["sd_id"], "whole");
}

#[test]
fn a_session_that_cannot_be_acted_for_gets_nothing() {
    let (db, mut c) =
        with_backlog("('SD-1', 'low', 1, NULL, NULL), ('SD-2', 'low', 2, NULL, NULL)");
    assert_eq!(next(&mut c, "nobody")["error"], "session_not_found");
    json(&mut c, "SELECT end_session('s3')", &[]);
    assert_eq!(next(&mut c, "s3")["error"], "session_released");
    let worker = db.role("worker");
    json(&mut c, "SELECT grant_coordination($1, 'worker')", &[&worker]);
    let mut w = db.connect_as(&worker);
    let error = w.query("SELECT claim_next_sd('s1')", &[]).unwrap_err();
    assert_eq!(sqlstate(&error), "42501");
    register(&mut w, "mine");
    assert_eq!(next(&mut w, "mine")["sd_id"], "SD-1");
    for (call, code) in [
        ("claim_next_sd(NULL)", "22023"),
        ("sd_next(p_limit => 0)", "22023"),
        ("sd_next(p_width => 19)", "22023"),
    ] {
        let error = c.batch_execute(&format!("SELECT {call}")).unwrap_err();
        assert_eq!(sqlstate(&error), code, "{call}");
    }
    let error = c.batch_execute("BEGIN READ ONLY; SELECT claim_next_sd('s1')").unwrap_err();
    assert_eq!(sqlstate(&error), "25006");
}

#[test]
fn what_a_session_lost_to_the_reaper_comes_first() {
    let (_db, mut c) = with_backlog(
        "('SD-1', 'low', NULL, NULL, NULL), ('SD-2', 'critical', NULL, NULL, NULL), ('SD-3', 'high', NULL, NULL, NULL)",
    );
    let reap = |c: &mut Client, session: &str| {
        age_heartbeat(c, session, "1 hour");
        json(c, "SELECT cleanup_stale_sessions()", &[]);
    };
    granted(&mut c, "SD-1", "s1");
    reap(&mut c, "s1");
    let answer = next(&mut c, "s1");
    assert_eq!((&answer["sd_id"], &answer["queue_reason"]), (&"SD-1".into(), &"lost".into()));
    reap(&mut c, "s1");
    // Somebody else has worked on it since: it is one like any other.
    granted(&mut c, "SD-1", "s2");
    release(&mut c, "s2");
    let answer = next(&mut c, "s1");
    assert_eq!((&answer["sd_id"], &answer["queue_reason"]), (&"SD-2".into(), &"order".into()));
    release(&mut c, "s1");
    // What an operator took away does not come first either.
    granted(&mut c, "SD-1", "s1");
    c.batch_execute("UPDATE claude_sessions SET sd_id = NULL WHERE session_id = 's1'").unwrap();
    assert!(beat(&mut c, "s1")["lost_claim"].is_object());
    assert_eq!(given(&mut c, "s1"), "SD-2");
    release(&mut c, "s1");
    // Nor what keeps it from being claimed now, nor one of another track.
    granted(&mut c, "SD-1", "s1");
    reap(&mut c, "s1");
    json(&mut c, "SELECT hold_sd('SD-1', 'wait')", &[]);
    assert_eq!(given(&mut c, "s1"), "SD-2");
    assert_in_step(&mut c);
}

#[test]
fn a_place_gets_back_what_it_worked_on_last() {
    let (_db, mut c) = with_backlog(
        "('SD-1', 'critical', NULL, NULL, NULL), ('SD-2', 'high', NULL, NULL, NULL),
         ('SD-3', 'low', NULL, NULL, NULL), ('SD-4', 'low', NULL, NULL, NULL)",
    );
    register_at(&mut c, "a1", "alpha");
    register_at(&mut c, "a2", "alpha");
    register_at(&mut c, "b1", "beta");
    for (sd, session) in [("SD-3", "a1"), ("SD-4", "b1")] {
        granted(&mut c, sd, session);
        release(&mut c, session);
    }
    let answer = next(&mut c, "a2");
    assert_eq!((&answer["sd_id"], &answer["queue_reason"]), (&"SD-3".into(), &"affinity".into()));
    assert_eq!(given(&mut c, "b1"), "SD-4");
    // Without a host, or without a code base, there is no place.
    assert_eq!(given(&mut c, "s1"), "SD-1");
    for session in ["a2", "b1", "s1"] {
        release(&mut c, session);
    }
    // The last to work on it counts.
    granted(&mut c, "SD-3", "b1");
    release(&mut c, "b1");
    let answer = next(&mut c, "a1");
    assert_eq!((&answer["sd_id"], &answer["queue_reason"]), (&"SD-1".into(), &"order".into()));
    release(&mut c, "a1");
    c.batch_execute("SET pg_claims.affinity = off").unwrap();
    let answer = next(&mut c, "b1");
    assert_eq!((&answer["sd_id"], &answer["queue_reason"]), (&"SD-1".into(), &"order".into()));
    c.batch_execute("RESET pg_claims.affinity").unwrap();
    let recorded = "SELECT string_agg(coalesce(queue_reason, 'asked'), ' ' ORDER BY claim_id) FROM sd_claims WHERE session_id IN ('a2', 'a1')";
    assert_eq!(value(&mut c, recorded).as_deref(), Some("asked affinity order"));
}

#[test]
fn affinity_starves_nothing() {
    let (_db, mut c) = with_backlog(
        "('first', 'critical', NULL, NULL, NULL), ('second', 'high', NULL, NULL, NULL), ('familiar', 'low', NULL, NULL, NULL)",
    );
    register_at(&mut c, "a1", "alpha");
    granted(&mut c, "familiar", "a1");
    release(&mut c, "a1");
    let mut turn = |limit: usize| {
        for _ in 0..limit {
            assert_eq!(given(&mut c, "a1"), "familiar");
            release(&mut c, "a1");
        }
        let answer = next(&mut c, "a1");
        assert_eq!(answer["queue_reason"], "order", "{answer}");
        let sd = answer["sd_id"].as_str().unwrap().to_owned();
        finish(&mut c, &sd);
        sd
    };
    assert_eq!(turn(3), "first");
    assert_eq!(turn(3), "second");
}

#[test]
fn fifty_at_once_get_fifty_and_none_waits_for_another() {
    let (db, mut c) = with_backlog("('first', 'critical', NULL, NULL, NULL)");
    c.batch_execute(
        "INSERT INTO strategic_directives_v2 (sd_id) SELECT 'SD-' || n FROM generate_series(1, 49) n",
    )
    .unwrap();
    let start = Barrier::new(50);
    let mut given: Vec<String> = thread::scope(|scope| {
        let callers: Vec<_> = (0..50)
            .map(|n| {
                let (db, start) = (&db, &start);
                scope.spawn(move || {
                    let mut client = db.connect();
                    let session = format!("caller-{n}");
                    register(&mut client, &session);
                    // Nobody commits until everybody has an answer: a wait would never end.
                    client.batch_execute("SET lock_timeout = '10s'; BEGIN").unwrap();
                    start.wait();
                    let answer = client.query_one("SELECT claim_next_sd($1)", &[&session]);
                    // Also for one that failed, or the others would wait for it for ever.
                    start.wait();
                    client.batch_execute("COMMIT").unwrap();
                    let answer: Value = answer.unwrap().get(0);
                    assert_eq!(answer["success"], true, "{answer}");
                    answer["sd_id"].as_str().unwrap().to_owned()
                })
            })
            .collect();
        callers.into_iter().map(|caller| caller.join().unwrap()).collect()
    });
    given.sort();
    given.dedup();
    assert_eq!(given.len(), 50);
    assert_in_step(&mut c);
}

#[test]
fn an_sd_that_another_transaction_writes_is_busy() {
    let (db, mut c) = with_backlog("('SD-1', 'low', NULL, NULL, NULL)");
    c.batch_execute("BEGIN; UPDATE strategic_directives_v2 SET title = 'new'").unwrap();
    let mut other = db.connect();
    other.batch_execute("SET lock_timeout = '1ms'").unwrap();
    let answer = next(&mut other, "s1");
    assert_eq!(answer["message"], "no SD can be claimed now: 1 being written by others");
    c.batch_execute("COMMIT").unwrap();
    assert_eq!(given(&mut other, "s1"), "SD-1");
}

#[test]
fn two_calls_for_one_session_give_it_one_sd() {
    let (db, mut c) =
        with_backlog("('SD-1', 'low', 1, NULL, NULL), ('SD-2', 'low', 2, NULL, NULL)");
    let mut clients = [db.connect(), db.connect()];
    for round in 0..50 {
        let start = Barrier::new(2);
        let answers: Vec<Value> = thread::scope(|scope| {
            let calls: Vec<_> = clients
                .iter_mut()
                .map(|client| {
                    let start = &start;
                    scope.spawn(move || {
                        start.wait();
                        next(client, "s1")
                    })
                })
                .collect();
            calls.into_iter().map(|call| call.join().unwrap()).collect()
        });
        assert_eq!(answers[0]["claim_id"], answers[1]["claim_id"], "{round}: {answers:#?}");
        assert!(answers.iter().any(|answer| answer["already_owned"] == true));
        release(&mut c, "s1");
    }
    assert_in_step(&mut c);
}

#[test]
fn one_sd_that_cannot_be_written_does_not_keep_the_rest() {
    let (_db, mut c) =
        with_backlog("('bad', 'critical', NULL, NULL, NULL), ('SD-1', 'low', NULL, NULL, NULL)");
    c.batch_execute(
        "UPDATE strategic_directives_v2 SET title = NULL WHERE sd_id = 'bad';
         ALTER TABLE strategic_directives_v2 ADD CONSTRAINT titled CHECK (title IS NOT NULL) NOT VALID",
    )
    .unwrap();
    let error = c.query("SELECT claim_next_sd('s1')", &[]).unwrap_err();
    assert_eq!(sqlstate(&error), "23514");
    assert_eq!(given(&mut c, "s1"), "SD-1");
    // Where there is nothing else it is tried again.
    let error = c.query("SELECT claim_next_sd('s2')", &[]).unwrap_err();
    assert_eq!(sqlstate(&error), "23514");
}

#[test]
fn a_held_sd_that_the_backlog_has_lost_is_let_go_for_the_next_one() {
    let (_db, mut c) =
        with_backlog("('SD-1', 'low', NULL, NULL, NULL), ('SD-2', 'low', NULL, NULL, NULL)");
    granted(&mut c, "SD-1", "s1");
    c.batch_execute(
        "SET session_replication_role = replica; DELETE FROM strategic_directives_v2 WHERE sd_id = 'SD-1';
         RESET session_replication_role; SET statement_timeout = '5s'",
    )
    .unwrap();
    assert_eq!(next(&mut c, "s1")["sd_id"], "SD-2");
    assert_in_step(&mut c);
}

#[test]
fn affinity_of_many_places_tracks_and_claims_by_name_starves_nothing_either() {
    let (_db, mut c) = with_backlog(
        "('head', 'critical', NULL, 'A', NULL), ('named', 'low', NULL, 'A', NULL), ('FA', 'low', NULL, 'A', NULL),
         ('FB', 'low', NULL, 'B', NULL)",
    );
    c.batch_execute(
        "INSERT INTO strategic_directives_v2 (sd_id, priority, track)
         SELECT 'own-' || n, 'low', 'A' FROM generate_series(1, 10) n",
    )
    .unwrap();
    for n in 1..=10 {
        let session = format!("p{n}");
        register_at(&mut c, &session, &session);
        granted(&mut c, &format!("own-{n}"), &session);
        release(&mut c, &session);
    }
    // Many places: four calls in all.
    let mut reasons = Vec::new();
    for n in 1..=4 {
        let answer = next(&mut c, &format!("p{n}"));
        reasons.push(answer["queue_reason"].as_str().unwrap().to_owned());
        release(&mut c, &format!("p{n}"));
    }
    assert_eq!(reasons, ["affinity", "affinity", "affinity", "order"]);
    // Two tracks at one place: each has its own turns. Claims by name are none.
    register_at(&mut c, "x", "x");
    register_at(&mut c, "y", "x");
    for sd in ["FA", "FB"] {
        granted(&mut c, sd, "x");
        release(&mut c, "x");
    }
    let mut given = Vec::new();
    for _ in 0..4 {
        for (session, track) in [("x", "A"), ("x", "A"), ("y", "B")] {
            let answer = json(&mut c, "SELECT claim_next_sd($1, $2)", &[&session, &track]);
            given.push(answer["sd_id"].as_str().unwrap().to_owned());
            release(&mut c, session);
        }
        granted(&mut c, "named", "p1");
        release(&mut c, "p1");
    }
    let of_track_a = ["FA", "FA", "FA", "head", "head", "FA", "FA", "FA"];
    let of_a: Vec<_> = given.iter().filter(|sd| *sd != "FB").collect();
    assert_eq!(of_a[..4], of_track_a[..4], "{given:?}");
}

#[test]
fn the_queue_waits_for_nobody_s_conflict_heartbeat_or_completion() {
    let (db, mut c) = with_backlog(
        "('SD-1', 'high', 1, NULL, NULL), ('SD-2', 'high', 2, NULL, NULL), ('SD-3', 'high', 3, NULL, NULL)",
    );
    json(&mut c, "SELECT declare_conflict('SD-1', 'SD-2', 'files')", &[]);
    let mut other = db.connect();
    other.batch_execute("SET lock_timeout = '1ms'").unwrap();
    c.batch_execute("BEGIN").unwrap();
    assert_eq!(given(&mut c, "s1"), "SD-1");
    assert_eq!(given(&mut other, "s2"), "SD-3");
    c.batch_execute("ROLLBACK").unwrap();
    release(&mut other, "s2");
    // A stale owner that is writing its own row is alive after all.
    granted(&mut c, "SD-3", "s1");
    age_heartbeat(&mut c, "s1", "1 hour");
    c.batch_execute("BEGIN").unwrap();
    assert_eq!(beat(&mut c, "s1")["success"], true);
    for sd in ["SD-1", "SD-2"] {
        finish(&mut other, sd);
    }
    assert_eq!(next(&mut other, "s2")["error"], "queue_empty");
    c.batch_execute("UPDATE strategic_directives_v2 SET status = 'completed' WHERE sd_id = 'SD-3'")
        .unwrap();
    c.batch_execute("COMMIT").unwrap();
    assert_in_step(&mut c);
}

#[test]
fn a_lost_sd_of_another_track_is_not_given() {
    let (_db, mut c) =
        with_backlog("('SD-1', 'high', NULL, 'A', NULL), ('SD-2', 'low', NULL, 'B', NULL)");
    granted(&mut c, "SD-1", "s1");
    age_heartbeat(&mut c, "s1", "1 hour");
    json(&mut c, "SELECT cleanup_stale_sessions()", &[]);
    assert_eq!(json(&mut c, "SELECT claim_next_sd('s1', 'B')", &[])["sd_id"], "SD-2");
}
