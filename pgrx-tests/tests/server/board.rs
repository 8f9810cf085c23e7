//! Heartbeats in shared memory: who is answered from there, and with what.

use std::thread;
use std::time::{Duration, Instant};

use pg_claims_tests::{Server, json, sqlstate};
use postgres::Client;
use serde_json::Value;

use crate::support::*;
use crate::worker::{PRELOAD, connect, served};

/// A server of its own with a board, and no worker unless the settings say so.
pub fn boarded(name: &str, settings: &[&str]) -> (Server, Client) {
    let mut all = vec![PRELOAD, "pg_claims.worker = off", "autovacuum = off"];
    all.extend(settings);
    served(name, &all)
}

/// Whether the server has a board also where the library is not preloaded.
pub fn needs_no_preloading(c: &mut Client) -> bool {
    count(c, "SELECT current_setting('server_version_num')::bigint") >= 170_000
}

/// What the table says of the session's last heartbeat, and what counts.
pub fn heartbeats(c: &mut Client, session: &str) -> (f64, f64) {
    let row = c
        .query_one(
            "SELECT EXTRACT(EPOCH FROM heartbeat_at)::float8,
                    EXTRACT(EPOCH FROM latest_heartbeat(tableoid, session_id, heartbeat_at))::float8
               FROM claude_sessions WHERE session_id = $1",
            &[&session],
        )
        .unwrap();
    (row.get(0), row.get(1))
}

/// Whether the session's heartbeats are answered by the board: they write nothing.
pub fn is_on_board(c: &mut Client, session: &str) -> bool {
    c.batch_execute("BEGIN READ ONLY").unwrap();
    let answer = c.query("SELECT update_session_heartbeat($1)", &[&session]);
    c.batch_execute("ROLLBACK").unwrap();
    match answer {
        Ok(rows) => {
            let answer: Value = rows[0].get(0);
            assert_eq!(answer["success"], true, "{answer}");
            true
        }
        Err(error) => {
            assert_eq!(sqlstate(&error), "25006");
            false
        }
    }
}

/// Where each session's row is: elsewhere once it has been written.
pub fn places(c: &mut Client) -> Option<String> {
    value(c, "SELECT string_agg(ctid::text, ' ' ORDER BY session_id) FROM claude_sessions")
}

pub fn entries(c: &mut Client) -> i64 {
    count(c, "SELECT entries FROM heartbeat_board()")
}

#[test]
fn a_heartbeat_on_the_board_writes_nothing_and_counts_everywhere() {
    let (server, mut c) = boarded("board", &[]);
    let claim_id = granted(&mut c, "SD-1", "s1");
    assert!(!is_on_board(&mut c, "s1"), "a claim has been made since");
    let by_table = beat(&mut c, "s1");
    let (written, _) = heartbeats(&mut c, "s1");
    let by_board = beat(&mut c, "s1");
    let many = json(&mut c, "SELECT heartbeat_sessions('{s1}')", &[]);
    assert!(is_on_board(&mut c, "s1"));
    assert!(!writes_wal(&mut c, "SELECT update_session_heartbeat('s1')"));
    assert!(!writes_wal(&mut c, "SELECT heartbeat_sessions('{s1}')"));
    assert!(writes_wal(&mut c, "SELECT report_progress('s2')"), "such as goes to the table");
    for (key, expected) in by_table.as_object().unwrap() {
        if key != "heartbeat_at" {
            assert_eq!(&by_board[key], expected, "{key}");
            assert_eq!(&many["sessions"][0][key], expected, "{key}");
        }
    }
    assert_eq!(by_board["claim_id"], claim_id);
    assert!(by_board["heartbeat_at"].as_str() > by_table["heartbeat_at"].as_str());
    let (in_table, counts) = heartbeats(&mut c, "s1");
    assert_eq!(in_table, written);
    assert!(counts > in_table);

    // As old as the table has it, the session would be stale for everybody.
    c.batch_execute("ALTER SYSTEM SET pg_claims.stale_after = '1s'").unwrap();
    c.batch_execute("SELECT pg_reload_conf()").unwrap();
    thread::sleep(Duration::from_millis(1200));
    beat(&mut c, "s1");
    let mut other = connect(&server, "postgres");
    assert_eq!(
        value(&mut other, "SELECT computed_status FROM v_active_sessions WHERE session_id = 's1'"),
        Some("active".into())
    );
    assert_eq!(claim(&mut other, "SD-1", "s2")["claimed_by"], "s1");
    assert_eq!(json(&mut other, "SELECT is_sd_claimed('SD-1')", &[])["claimed"], true);
    assert_eq!(
        value(&mut other, "SELECT eligibility FROM v_sd_next WHERE sd_id = 'SD-1'"),
        Some("claimed".into())
    );
    json(&mut other, "SELECT declare_conflict('SD-1', 'SD-2', 'files')", &[]);
    assert_eq!(claim(&mut other, "SD-2", "s2")["error"], "conflict");
    assert_eq!(
        json(&mut other, "SELECT cleanup_stale_sessions()", &[])["stale_sessions_cleaned"],
        0
    );
    server.discard().unwrap();
}

#[test]
fn the_board_never_answers_with_what_is_no_longer_so() {
    let (server, mut c) = boarded("board-truth", &[]);
    let mut other = connect(&server, "postgres");
    let on_board = |c: &mut Client, session: &str| {
        beat(c, session);
        assert!(is_on_board(c, session));
    };
    let first = granted(&mut c, "SD-1", "s1");
    on_board(&mut c, "s1");
    // A claim by name.
    assert_eq!(
        json(&mut c, "SELECT update_session_heartbeat('s1', $1)", &[&(first + 1)])["error"],
        "claim_lost"
    );
    // A switch, a release, a takeover, by hand.
    let second = granted(&mut other, "SD-2", "s1");
    assert_eq!(beat(&mut c, "s1")["claim_id"], second);
    on_board(&mut c, "s1");
    release(&mut other, "s1");
    assert_eq!(beat(&mut c, "s1")["claim_id"], Value::Null);
    granted(&mut other, "SD-1", "s1");
    on_board(&mut c, "s1");
    json(&mut other, "SELECT takeover_sd('SD-1', 's2', 'mine')", &[]);
    // Told as long as it has claimed nothing else.
    for _ in 0..2 {
        assert_eq!(beat(&mut c, "s1")["lost_claim"]["taken_over_by"], "s2");
    }
    on_board(&mut c, "s2");
    other.batch_execute("UPDATE claude_sessions SET sd_id = NULL WHERE session_id = 's2'").unwrap();
    assert_eq!(beat(&mut c, "s2")["lost_claim"]["reason"], "direct_write");
    // Completing the SD, the reaper.
    granted(&mut other, "SD-3", "s3");
    on_board(&mut c, "s3");
    other
        .batch_execute(
            "UPDATE strategic_directives_v2 SET status = 'completed' WHERE sd_id = 'SD-3'",
        )
        .unwrap();
    assert_eq!(beat(&mut c, "s3")["lost_claim"]["reason"], "sd_completed");
    granted(&mut other, "SD-4", "s3");
    on_board(&mut c, "s3");
    // Setting the heartbeat back by hand counts although the board had a later one.
    age_heartbeat(&mut other, "s3", "1 hour");
    assert_eq!(
        json(&mut other, "SELECT cleanup_stale_sessions()", &[])["stale_sessions_cleaned"],
        1
    );
    assert_eq!(beat(&mut c, "s3")["lost_claim"]["reason"], "reaped");
    // What is rolled back never was.
    granted(&mut other, "SD-5", "s3");
    on_board(&mut c, "s3");
    let held = beat(&mut c, "s3")["claim_id"].clone();
    other.batch_execute("BEGIN").unwrap();
    release(&mut other, "s3");
    granted(&mut other, "SD-6", "s3");
    assert_eq!(beat(&mut other, "s3")["sd_id"], "SD-6", "in its own transaction");
    other.batch_execute("ROLLBACK").unwrap();
    assert_eq!(beat(&mut c, "s3")["claim_id"], held);
    // Writes that no ordinary trigger sees, and a trigger of the user's that ends the claim while the
    // session beats.
    granted(&mut other, "SD-7", "s2");
    on_board(&mut c, "s2");
    other
        .batch_execute(
            "SET session_replication_role = replica;
             UPDATE claude_sessions SET sd_id = NULL, claim_id = NULL, claimed_at = NULL, status = 'idle' WHERE session_id = 's2';
             UPDATE sd_claims SET released_at = now(), release_reason = 'by hand' WHERE session_id = 's2' AND released_at IS NULL;
             UPDATE strategic_directives_v2 SET is_working_on = false, active_session_id = NULL WHERE sd_id = 'SD-7';
             RESET session_replication_role",
        )
        .unwrap();
    assert_eq!(beat(&mut c, "s2")["claim_id"], Value::Null);
    granted(&mut other, "SD-7", "s2");
    other
        .batch_execute(
            "CREATE FUNCTION let_go() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN UPDATE public.claude_sessions SET sd_id = NULL WHERE session_id = 's2'; RETURN NULL; END $$;
             CREATE TRIGGER let_go AFTER UPDATE OF heartbeat_at ON claude_sessions FOR EACH ROW
             WHEN (NEW.session_id = 's2' AND NEW.sd_id IS NOT NULL) EXECUTE FUNCTION let_go()",
        )
        .unwrap();
    beat(&mut c, "s2");
    assert_eq!(beat(&mut c, "s2")["claim_id"], Value::Null);
    other.batch_execute("DROP TRIGGER let_go ON claude_sessions").unwrap();
    granted(&mut other, "SD-7", "s2");
    release(&mut other, "s2");
    // A session that is deleted, truncated, ended, or given to another role.
    on_board(&mut c, "s3");
    json(&mut other, "SELECT end_session('s3')", &[]);
    assert_eq!(beat(&mut c, "s3")["error"], "session_released");
    for session in ["s4", "s5"] {
        register(&mut other, session);
    }
    on_board(&mut c, "s4");
    other.batch_execute("DELETE FROM claude_sessions WHERE session_id = 's4'").unwrap();
    assert_eq!(beat(&mut c, "s4")["error"], "session_not_found");
    register(&mut other, "s4");
    on_board(&mut c, "s4");
    other.batch_execute("CREATE ROLE somebody LOGIN; UPDATE claude_sessions SET owner_role = 'somebody' WHERE session_id = 's4'").unwrap();
    other.batch_execute("SELECT grant_coordination('somebody', 'worker')").unwrap();
    let mut somebody = server.config("postgres").user("somebody").connect(postgres::NoTls).unwrap();
    on_board(&mut somebody, "s4");
    on_board(&mut c, "s5");
    let error = somebody.query("SELECT update_session_heartbeat('s5')", &[]).unwrap_err();
    assert_eq!(sqlstate(&error), "42501");
    let error = somebody.query("SELECT heartbeat_sessions('{s4,s5}')", &[]).unwrap_err();
    assert_eq!(sqlstate(&error), "42501");
    other.batch_execute("TRUNCATE claude_sessions, sd_claims").unwrap();
    for session in ["s4", "s5"] {
        assert_eq!(beat(&mut c, session)["error"], "session_not_found");
    }
    register(&mut other, "s2");
    on_board(&mut c, "s2");
    other.batch_execute("DROP EXTENSION pg_claims; CREATE EXTENSION pg_claims").unwrap();
    assert_eq!(beat(&mut c, "s2")["error"], "session_not_found");
    server.discard().unwrap();
}

/// A heartbeat that begins after a takeover was answered must not be told that the claim is held.
#[test]
fn a_heartbeat_after_a_takeover_is_told_and_one_before_it_wins() {
    let (server, mut c) = boarded("board-race", &["pg_claims.stale_after = 1s"]);
    let mut beating = connect(&server, "postgres");
    let mut taking = connect(&server, "postgres");
    let (mut won, mut lost) = (0, 0);
    for round in 0..40 {
        let held = granted(&mut c, "SD-1", "s1");
        beat(&mut beating, "s1");
        // Just about when the lease ends, sooner or later by some microseconds.
        let begin = Instant::now();
        let at = Duration::from_millis(1000);
        let (beaten, taken) = thread::scope(|scope| {
            let beating = &mut beating;
            let beats = scope.spawn(move || {
                let mut answers = Vec::new();
                while begin.elapsed() < at - Duration::from_millis(3) {
                    std::hint::spin_loop();
                }
                for _ in 0..20 {
                    let started = Instant::now();
                    answers.push((started, beat(beating, "s1")));
                }
                answers
            });
            let taking = &mut taking;
            let takes = scope.spawn(move || {
                while begin.elapsed()
                    < at + Duration::from_micros(200 * (round % 20)) - Duration::from_millis(2)
                {
                    std::hint::spin_loop();
                }
                let answer = claim(taking, "SD-1", "s2");
                (answer, Instant::now())
            });
            (beats.join().unwrap(), takes.join().unwrap())
        });
        let (answer, answered) = taken;
        if answer["success"] == true {
            lost += 1;
            for (started, beat) in beaten.iter().filter(|(started, _)| *started > answered) {
                assert_eq!(beat["lost_claim"]["claim_id"], held, "{started:?} {answered:?} {beat}");
            }
        } else {
            won += 1;
            assert_eq!(answer["claimed_by"], "s1", "{answer}");
            assert!(beaten.iter().all(|(_, beat)| beat["claim_id"] == held));
        }
        release(&mut c, "s1");
        release(&mut c, "s2");
    }
    eprintln!("the heartbeat won {won}, lost {lost}");
    server.discard().unwrap();
}

#[test]
fn a_heartbeat_on_the_table_reads_no_more_behind_an_old_snapshot_than_a_bare_update() {
    let (server, mut c) = boarded("board-none-held", &["pg_claims.max_sessions = 0"]);
    register(&mut c, "s1");
    let mut holder = connect(&server, "postgres");
    holder
        .batch_execute(
            "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM claude_sessions",
        )
        .unwrap();
    for _ in 0..5_000 {
        assert_eq!(beat(&mut c, "s1")["success"], true);
    }
    // By the same index, and with the same condition. Past the extension's triggers, which a heartbeat's own write fires.
    c.batch_execute(
        "CREATE TABLE bare (LIKE claude_sessions INCLUDING ALL) WITH (fillfactor = 70);
         CREATE FUNCTION bare() RETURNS jsonb LANGUAGE sql AS $$
             UPDATE bare SET heartbeat_at = clock_timestamp() WHERE session_id = 's1';
             SELECT '{}'::jsonb $$;
         INSERT INTO bare SELECT * FROM claude_sessions",
    )
    .unwrap();
    for _ in 0..5_000 {
        c.batch_execute("SELECT bare()").unwrap();
    }
    // In a hundred there is one that finds its page full, and enters a new place into the index. One of three hundreds may
    // have read the catalogue anew.
    let mut read = |call: &str| {
        let mut most = || (0..100).map(|_| pages(&mut c, call)).max().unwrap();
        (0..3).map(|_| most()).min().unwrap()
    };
    let (beats, updates) = (read("update_session_heartbeat('s1')"), read("bare()"));
    assert!(beats <= updates + 20, "{beats} pages for a heartbeat, {updates} for a bare UPDATE");
    holder.batch_execute("COMMIT").unwrap();
    server.discard().unwrap();
}

#[test]
fn a_full_board_and_none_at_all_leave_heartbeats_to_the_table() {
    let (server, mut c) = boarded("board-full", &["pg_claims.max_sessions = 16"]);
    assert_eq!(count(&mut c, "SELECT capacity FROM heartbeat_board()"), 16);
    for n in 0..100 {
        let session = format!("session-{n}");
        register(&mut c, &session);
        assert_eq!(beat(&mut c, &session)["success"], true);
    }
    assert_eq!(entries(&mut c), 16, "as many as it is made for");
    let refused = count(&mut c, "SELECT board_refused FROM v_worker_health");
    assert_eq!(refused, 84);
    let told =
        value(&mut c, "SELECT detail FROM coordination_check() WHERE name = 'heartbeat_board'")
            .unwrap();
    assert_eq!(
        told,
        "the heartbeat board, made for 16 sessions, had no room for 84 heartbeats, which went to claude_sessions"
    );
    let (before, _) = heartbeats(&mut c, "session-99");
    assert_eq!(beat(&mut c, "session-99")["success"], true);
    assert!(heartbeats(&mut c, "session-99").0 > before);
    // What is too long for the board beats in the table as well.
    let long = "長".repeat(100);
    register(&mut c, &long);
    assert_eq!(beat(&mut c, &long)["session_id"], long.as_str());
    assert!(!is_on_board(&mut c, &long));
    server.discard().unwrap();
    let (server, mut c) = boarded("board-none", &["pg_claims.max_sessions = 0"]);
    assert_eq!(count(&mut c, "SELECT count(*) FROM heartbeat_board()"), 0);
    beat(&mut c, "s1");
    assert!(!is_on_board(&mut c, "s1"));
    server.discard().unwrap();
}

#[test]
fn without_preloading_there_is_a_board_where_the_server_can_make_one() {
    let (server, mut c) = served("board-late", &["pg_claims.worker = off"]);
    let can = needs_no_preloading(&mut c);
    assert_eq!(count(&mut c, "SELECT count(*) FROM heartbeat_board()"), i64::from(can));
    beat(&mut c, "s1");
    assert_eq!(is_on_board(&mut c, "s1"), can);
    let mut other = connect(&server, "postgres");
    assert_eq!(is_on_board(&mut other, "s1"), can, "the first call of a connection");
    server.discard().unwrap();
}

#[test]
fn a_prepared_transaction_is_waited_for() {
    let (server, mut c) = boarded("board-prepared", &["max_prepared_transactions = 5"]);
    let held = granted(&mut c, "SD-1", "s1");
    beat(&mut c, "s1");
    c.batch_execute("BEGIN").unwrap();
    release(&mut c, "s1");
    c.batch_execute("PREPARE TRANSACTION 'release'").unwrap();
    c.batch_execute("SET lock_timeout = '100ms'").unwrap();
    let error = c.query("SELECT update_session_heartbeat('s1')", &[]).unwrap_err();
    assert_eq!(sqlstate(&error), "55P03");
    c.batch_execute("COMMIT PREPARED 'release'").unwrap();
    let told = beat(&mut c, "s1");
    assert_ne!(told["claim_id"], held, "{told}");
    server.discard().unwrap();
}
