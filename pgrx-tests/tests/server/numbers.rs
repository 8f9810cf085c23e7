//! No number comes again: of a claim, of an event, of a place in the order of events.

use std::collections::HashSet;
use std::thread;

use pg_claims_tests::{Stop, TestDb, json, sqlstate, wait_until};
use postgres::Client;

use crate::support::*;

/// The three sequences, however they are called.
const SEQUENCES: [(&str, &str); 3] = [
    ("sd_claims", "claim_id"),
    ("session_lifecycle_events", "event_id"),
    ("lifecycle_event_positions", "position"),
];

/// A number that no server gives out that accepts writes since 2026-02: all are greater.
const EARLY: i64 = 31 * 86_400_000 * 1024;

/// Up to which JSON clients know whole numbers exactly.
const EXACT: i64 = 1 << 53;

/// Puts in order what has become visible.
fn settle(c: &mut Client) {
    json(c, "SELECT cleanup_stale_sessions()", &[]);
    // Where a worker serves the database, it is the one to do so.
    wait_until("all events to have their places", || {
        let without = "SELECT count(*) FROM session_lifecycle_events e
                        WHERE NOT EXISTS (SELECT FROM lifecycle_event_positions p WHERE p.event_id = e.event_id)";
        count(c, without) == 0
    });
}

fn numbers(c: &mut Client, table: &str, column: &str) -> Vec<i64> {
    let all = format!("SELECT {column} FROM {table} ORDER BY {column}");
    c.query(&all, &[]).unwrap().iter().map(|row| row.get(0)).collect()
}

/// All numbers that the tables hold, of each kind.
fn all_numbers(c: &mut Client) -> [Vec<i64>; 3] {
    SEQUENCES.map(|(table, column)| numbers(c, table, column))
}

/// Claims and releases, with its events put in order, and returns the fencing token.
fn work(c: &mut Client, sd: &str, session: &str) -> i64 {
    let token = granted(c, sd, session);
    release(c, session);
    settle(c);
    token
}

/// Everything that `after` has and `before` has not is above all of `before`.
fn assert_above(before: &[Vec<i64>; 3], after: &[Vec<i64>; 3], what: &str) {
    for (n, (table, _)) in SEQUENCES.iter().enumerate() {
        let old: HashSet<i64> = before[n].iter().copied().collect();
        let greatest = before[n].last().copied().unwrap_or(0);
        let new: Vec<i64> = after[n].iter().copied().filter(|id| !old.contains(id)).collect();
        assert!(!new.is_empty(), "{what}: nothing new in {table}");
        assert!(new.iter().all(|id| *id > greatest), "{what}, {table}: {new:?} after {greatest}");
    }
}

fn set_back(c: &mut Client, to: i64) {
    for (table, column) in SEQUENCES {
        c.query_one(
            "SELECT setval(pg_get_serial_sequence($1::text, $2::text), $3::bigint)",
            &[&table, &column, &to],
        )
        .unwrap();
    }
}

#[test]
fn all_numbers_are_above_the_floor_and_exact_in_json() {
    let (_db, mut c) = coordinated();
    work(&mut c, "SD-1", "s1");
    // By statements as well, and by hand.
    c.batch_execute("BEGIN ISOLATION LEVEL SERIALIZABLE").unwrap();
    granted(&mut c, "SD-2", "s2");
    c.batch_execute("COMMIT; UPDATE claude_sessions SET sd_id = 'SD-3' WHERE session_id = 's3'")
        .unwrap();
    settle(&mut c);
    for (n, ids) in all_numbers(&mut c).iter().enumerate() {
        assert!(ids.len() >= 3, "{:?}: {ids:?}", SEQUENCES[n]);
        let outside = |id: &&i64| **id <= EARLY || **id >= EXACT;
        assert_eq!(ids.iter().find(outside), None, "{:?}", SEQUENCES[n]);
    }
}

#[test]
fn a_sequence_that_was_set_back_gives_no_number_again() {
    let (db, mut c) = coordinated();
    work(&mut c, "SD-1", "s1");
    let mut other = db.connect();
    work(&mut other, "SD-2", "s2");
    type SetBack = fn(&mut Client);
    let ways: [(&str, SetBack); 4] = [
        ("setval", |c| set_back(c, 1)),
        ("nothing left in the tables", |c| {
            c.batch_execute(
                "DELETE FROM sd_claims; DELETE FROM lifecycle_event_positions;
                 DELETE FROM session_lifecycle_events",
            )
            .unwrap();
            set_back(c, 1);
        }),
        ("emptied, with the sequences begun anew", |c| {
            c.batch_execute(
                "TRUNCATE sd_claims, lifecycle_event_positions, session_lifecycle_events
                 RESTART IDENTITY",
            )
            .unwrap();
        }),
        ("begun anew", |c| {
            c.batch_execute(
                "ALTER SEQUENCE sd_claims_claim_id_seq RESTART;
                 ALTER SEQUENCE session_lifecycle_events_event_id_seq RESTART;
                 ALTER SEQUENCE lifecycle_event_positions_position_seq RESTART",
            )
            .unwrap();
        }),
    ];
    for (what, set_back) in ways {
        let before = all_numbers(&mut c);
        set_back(&mut c);
        // Two connections have drawn numbers before; the third draws its first.
        for c in [&mut other, &mut c, &mut db.connect()] {
            work(c, "SD-3", "s3");
            assert_above(&before, &all_numbers(c), what);
        }
    }
    assert_in_step(&mut c);
}

#[test]
fn numbers_set_back_among_those_of_this_run_are_refused_or_lifted() {
    let (db, mut c) = coordinated();
    work(&mut c, "SD-1", "s1");
    for _ in 0..5 {
        granted(&mut c, "SD-2", "s2");
        release(&mut c, "s2");
    }
    let before = numbers(&mut c, "sd_claims", "claim_id");
    let back = "SELECT setval('sd_claims_claim_id_seq', $1)";
    // A connection that has drawn knows better.
    c.query_one(back, &[&before[0]]).unwrap();
    assert!(granted(&mut c, "SD-3", "s3") > *before.last().unwrap());
    // Any other is refused by the primary key until it is past those that are there, and nothing is lost.
    c.query_one(back, &[&before[0]]).unwrap();
    let mut fresh = db.connect();
    let all = "SELECT string_agg(h::text, ' ' ORDER BY claim_id) FROM sd_claims h";
    let kept = value(&mut c, all);
    let error = fresh.query("SELECT claim_sd('SD-4', 's1')", &[]).unwrap_err();
    assert_eq!(sqlstate(&error), "23505");
    assert_eq!(value(&mut c, all), kept);
    // The way out that is there for operators.
    let passed = json(&mut c, "SELECT advance_numbers()", &[]);
    assert!(granted(&mut fresh, "SD-4", "s1") > passed["claim_id"].as_i64().unwrap());
    assert_in_step(&mut c);
}

#[test]
fn a_connection_with_numbers_in_reserve_neither_repeats_nor_mixes_them() {
    let (db, mut c) = coordinated();
    work(&mut c, "SD-1", "s1");
    c.batch_execute(
        "ALTER SEQUENCE sd_claims_claim_id_seq CACHE 20;
         ALTER SEQUENCE session_lifecycle_events_event_id_seq CACHE 20;
         ALTER SEQUENCE lifecycle_event_positions_position_seq CACHE 20",
    )
    .unwrap();
    let mut clients = [db.connect(), db.connect(), c];
    let mut last = 0;
    let mut cursor = 0;
    let mut told: Vec<String> = Vec::new();
    for round in 0..30 {
        if round == 15 {
            set_back(&mut clients[0], 1);
        }
        if round == 20 {
            clients[0].batch_execute("ALTER SEQUENCE sd_claims_claim_id_seq CACHE 1").unwrap();
        }
        let client = &mut clients[round % 3];
        let token = granted(client, "SD-2", "s2");
        assert!(token > last, "round {round}: {token} after {last}");
        last = token;
        release(client, "s2");
        // Whoever follows the order misses none of them, though another connection has gone past its numbers.
        settle(client);
        let read = client
            .query(
                "SELECT id, event_type FROM lifecycle_events_since($1) WHERE session_id = 's2'",
                &[&cursor],
            )
            .unwrap();
        for row in read {
            assert!(row.get::<_, i64>(0) > cursor);
            cursor = row.get(0);
            told.push(row.get(1));
        }
    }
    assert_eq!(told[0], "registered");
    assert!(told[1..].chunks(2).all(|pair| pair == ["claimed", "released"]), "{told:?}");
    assert_eq!(told.len(), 61);
    assert_in_step(&mut clients[0]);
}

#[test]
fn many_connections_that_jump_at_once_get_numbers_of_their_own() {
    let (server, mut c) = coordinated_server("jump", &["max_connections = 60"]);
    for n in 0..24 {
        register(&mut c, &format!("busy-{n}"));
        c.execute("INSERT INTO strategic_directives_v2 (sd_id) VALUES ($1)", &[&format!("J-{n}")])
            .unwrap();
    }
    for (what, set_back) in [("a restart", false), ("set back", true)] {
        if set_back {
            self::set_back(&mut c, 1);
        } else {
            drop(c);
            server.stop(Stop::Fast).unwrap();
            server.start().unwrap();
            c = connect_to(&server);
        }
        let before = all_numbers(&mut c);
        let start = std::sync::Barrier::new(24);
        let drawn: Vec<Vec<i64>> = thread::scope(|scope| {
            let threads: Vec<_> = (0..24)
                .map(|n| {
                    let mut client = connect_to(&server);
                    let start = &start;
                    scope.spawn(move || {
                        let (sd, session) = (format!("J-{n}"), format!("busy-{n}"));
                        start.wait();
                        let mut tokens = Vec::new();
                        for round in 0..10 {
                            let isolation =
                                ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"][n % 3];
                            let begin = format!("BEGIN ISOLATION LEVEL {isolation}; SAVEPOINT s");
                            client.batch_execute(&begin).unwrap();
                            let claimed =
                                client.query_one("SELECT claim_sd($1, $2)", &[&sd, &session]);
                            let done = claimed.and_then(|claimed| {
                                // The token counts even if the client rolls this claim back: nobody else may ever get it.
                                let answer: serde_json::Value = claimed.get(0);
                                tokens.push(answer["claim_id"].as_i64().unwrap());
                                client.query_one("SELECT release_sd($1)", &[&session])?;
                                let end = ["ROLLBACK TO SAVEPOINT s; COMMIT", "COMMIT"];
                                client.batch_execute(end[usize::from(round > 0)])
                            });
                            if let Err(error) = done {
                                assert_eq!(sqlstate(&error), "40001", "{error:?}");
                                client.batch_execute("ROLLBACK").unwrap();
                            }
                        }
                        tokens
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        for tokens in &drawn {
            assert!(!tokens.is_empty(), "{what}");
            assert!(tokens.windows(2).all(|pair| pair[0] < pair[1]), "{what}: {tokens:?}");
        }
        let all: Vec<i64> = drawn.concat();
        let distinct: HashSet<i64> = all.iter().copied().collect();
        assert_eq!(distinct.len(), all.len(), "{what}: a token came twice");
        settle(&mut c);
        assert_above(&before, &all_numbers(&mut c), what);
        assert_in_step(&mut c);
    }
}

#[test]
fn a_jump_that_is_rolled_back_is_not_taken_back_and_blocks_nobody() {
    let (db, mut c) = coordinated();
    let before = work(&mut c, "SD-1", "s1");
    set_back(&mut c, 1);
    let mut open = db.connect();
    open.batch_execute("BEGIN").unwrap();
    let jumped = granted(&mut open, "SD-2", "s2");
    assert!(jumped > before);
    // While that transaction is open others jump as well, and draw.
    let mut other = db.connect();
    other.batch_execute("SET lock_timeout = '5s'").unwrap();
    let next = granted(&mut other, "SD-3", "s3");
    assert!(next > jumped);
    open.batch_execute("ROLLBACK").unwrap();
    assert!(granted(&mut open, "SD-2", "s2") > next);
}

#[test]
fn a_crash_that_forgets_claims_repeats_no_number() {
    // Nobody makes anything durable before the crash.
    let settings = [
        "synchronous_commit = off",
        "wal_writer_delay = 10s",
        "wal_writer_flush_after = 100MB",
        "pg_claims.worker = off",
    ];
    let (server, mut c) = coordinated_server("forgets", &settings);
    settle(&mut c);
    c.batch_execute("CHECKPOINT").unwrap();
    let mut forgotten = false;
    for _ in 0..3 {
        let before = all_numbers(&mut c);
        for _ in 0..50 {
            granted(&mut c, "SD-1", "s1");
            release(&mut c, "s1");
        }
        settle(&mut c);
        let mut told = all_numbers(&mut c);
        assert_above(&before, &told, "before the crash");
        // The worker makes all durable now and then: of the last ones some are not.
        for _ in 0..50 {
            told[0].push(granted(&mut c, "SD-1", "s1"));
            release(&mut c, "s1");
        }
        server.crash().unwrap();
        drop(c);
        server.start().unwrap();
        c = connect_to(&server);
        let kept = all_numbers(&mut c);
        forgotten |= told[0].iter().any(|id| !kept[0].contains(id));
        work(&mut c, "SD-2", "s2");
        let mut kept = all_numbers(&mut c);
        for (kept, told) in kept.iter_mut().zip(&told) {
            let told: HashSet<i64> = told.iter().copied().collect();
            kept.retain(|id| !told.contains(id));
        }
        assert_above(&told, &kept, "after the crash");
    }
    assert!(forgotten, "the server forgot nothing");
    assert_in_step(&mut c);
}

#[test]
fn an_older_copy_of_the_data_folder_goes_on_above_all() {
    let (server, mut c) = coordinated_server("copied", &[]);
    work(&mut c, "SD-1", "s1");
    drop(c);
    // A snapshot of the disk.
    server.stop(Stop::Fast).unwrap();
    let copy = server.copy("copied-earlier").unwrap();
    server.start().unwrap();
    let mut c = connect_to(&server);
    for _ in 0..50 {
        granted(&mut c, "SD-2", "s2");
        release(&mut c, "s2");
    }
    settle(&mut c);
    let gone = all_numbers(&mut c);
    drop(c);
    server.stop(Stop::Immediate).unwrap();
    copy.start().unwrap();
    let mut c = connect_to(&copy);
    let kept = all_numbers(&mut c);
    work(&mut c, "SD-2", "s2");
    let new = all_numbers(&mut c);
    assert_above(&kept, &new, "in the copy");
    for n in 0..3 {
        let new: Vec<i64> = new[n].iter().copied().filter(|id| !kept[n].contains(id)).collect();
        assert!(new.iter().all(|id| id > gone[n].last().unwrap()), "{:?}", SEQUENCES[n]);
    }
    assert_in_step(&mut c);
}

#[test]
fn a_dump_sets_no_number_back() {
    let (db, mut c) = coordinated();
    let early = work(&mut c, "SD-1", "s1");
    let dump = db.dump();
    for (table, column) in SEQUENCES {
        let sequence = value(&mut c, &format!("pg_get_serial_sequence('{table}', '{column}')"));
        let sequence = sequence.unwrap().replace("public.", "");
        let told = dump.lines().find(|line| line.contains(&sequence));
        assert_eq!(told, None, "a dump must not set it");
    }
    // The database lives on, and the older dump takes its place.
    let late = work(&mut c, "SD-2", "s2");
    let lived = all_numbers(&mut c);
    let copy = TestDb::empty();
    copy.psql(&dump);
    let mut c = copy.connect();
    let restored = all_numbers(&mut c);
    let next = work(&mut c, "SD-3", "s3");
    assert!(early < late && late < next, "{early}, {late}, {next}");
    assert_above(&restored, &all_numbers(&mut c), "in the restored database");
    for n in 0..3 {
        let new =
            all_numbers(&mut c)[n].iter().copied().filter(|id| !restored[n].contains(id)).min();
        assert!(new > lived[n].last().copied(), "{:?}", SEQUENCES[n]);
    }
    assert_in_step(&mut c);
}

#[test]
fn numbers_of_a_clock_that_was_ahead_are_not_met_again() {
    let (db, mut c) = coordinated();
    work(&mut c, "SD-1", "s1");
    // As a machine gave them out whose clock is an hour ahead.
    let ahead = 3_600_000_i64 * 1024;
    for (table, column) in SEQUENCES {
        c.batch_execute(&format!(
            "SELECT setval(pg_get_serial_sequence('{table}', '{column}'), max({column}) + {ahead}) FROM {table}"
        ))
        .unwrap();
    }
    let mut source = db.connect();
    work(&mut source, "SD-2", "s2");
    let copy = TestDb::empty();
    copy.psql(&db.dump());
    let mut c = copy.connect();
    let restored = all_numbers(&mut c);
    work(&mut c, "SD-3", "s3");
    assert_above(&restored, &all_numbers(&mut c), "after a restore");
    // Whoever follows reads what came after the restore.
    let greatest = *restored[2].last().unwrap();
    let read = "SELECT count(*) FROM lifecycle_events_since($1) WHERE session_id = 's3'";
    assert_eq!(c.query_one(read, &[&greatest]).unwrap().get::<_, i64>(0), 2);
    assert_in_step(&mut c);
}

#[test]
fn an_operator_lifts_the_numbers_above_tables_that_somebody_else_has_filled() {
    let (db, mut c) = coordinated();
    let operator = db.role("operator");
    json(&mut c, "SELECT grant_coordination($1, 'operator')", &[&operator]);
    let mut worker = db.connect();
    let before = work(&mut worker, "SD-1", "s1");
    // Rows of another server's, with numbers that this one has not drawn.
    let foreign = before + 3_600_000 * 1024;
    c.batch_execute(&format!(
        "SET session_replication_role = replica;
         INSERT INTO sd_claims (claim_id, sd_id, session_id, released_at, release_reason)
         VALUES ({foreign}, 'SD-9', 's9', now(), 'manual');
         INSERT INTO session_lifecycle_events (event_id, event_type, session_id, actor)
         VALUES ({foreign}, 'registered', 's9', 'postgres');
         INSERT INTO lifecycle_event_positions (position, event_id) VALUES ({foreign}, {foreign});
         RESET session_replication_role"
    ))
    .unwrap();
    let mut by = db.connect_as(&operator);
    let passed = json(&mut by, "SELECT advance_numbers()", &[]);
    assert_eq!(passed["success"], true);
    for kind in ["claim_id", "event_id", "position"] {
        assert!(passed[kind].as_i64().unwrap() >= foreign, "{passed}");
    }
    let filled = all_numbers(&mut c);
    // Also those who have drawn before.
    let next = work(&mut worker, "SD-1", "s1");
    assert!(next > passed["claim_id"].as_i64().unwrap());
    assert_above(&filled, &all_numbers(&mut c), "after advance_numbers()");
    // Above the present as well, where the tables are behind: by at most what the clock has gone on.
    let again = json(&mut by, "SELECT advance_numbers()", &[]);
    let twice = json(&mut by, "SELECT advance_numbers()", &[]);
    for kind in ["claim_id", "event_id", "position"] {
        assert!(again[kind].as_i64() >= passed[kind].as_i64(), "{passed}, {again}");
        assert!(twice[kind].as_i64() >= again[kind].as_i64(), "{again}, {twice}");
        assert!(twice[kind].as_i64().unwrap() < EXACT);
    }
    let worker = db.role("worker");
    json(&mut c, "SELECT grant_coordination($1, 'worker')", &[&worker]);
    let error = db.connect_as(&worker).query("SELECT advance_numbers()", &[]).unwrap_err();
    assert_eq!(sqlstate(&error), "42501");
}

#[test]
fn a_great_gap_is_given_up_and_costs_nothing_to_look_into() {
    let (db, mut c) = coordinated();
    work(&mut c, "SD-1", "s1");
    let gaps = "SELECT cardinality(gaps_first)::bigint FROM event_frontier";
    wait_until("the gaps to be given up", || {
        settle(&mut c);
        count(&mut c, gaps) == 0
    });
    // A transaction that may yet use a number from before.
    let mut slow = db.connect();
    slow.batch_execute("BEGIN").unwrap();
    granted(&mut slow, "SD-2", "s2");
    json(&mut c, "SELECT advance_numbers()", &[]);
    granted(&mut c, "SD-3", "s3");
    settle(&mut c);
    assert!(count(&mut c, gaps) > 0);
    granted(&mut c, "SD-4", "s1");
    let looked = pages(&mut c, "cleanup_stale_sessions()");
    assert!(looked < 2000, "{looked} pages");
    // It comes late, and is read.
    let cursor = count(&mut c, "SELECT max(position) FROM lifecycle_event_positions");
    slow.batch_execute("COMMIT").unwrap();
    settle(&mut c);
    let read = c
        .query("SELECT event_type, session_id FROM lifecycle_events_since($1)", &[&cursor])
        .unwrap();
    let read: Vec<(String, String)> = read.iter().map(|row| (row.get(0), row.get(1))).collect();
    assert!(read.contains(&("claimed".into(), "s2".into())), "{read:?}");
    wait_until("the gaps to be given up", || {
        settle(&mut c);
        count(&mut c, gaps) == 0
    });
}
