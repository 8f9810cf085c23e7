//! A process keeps no more memory than it needs, however often the tables change.

use std::fs;

use pg_claims_tests::{backend_pid, json};
use postgres::Client;

use crate::support::*;
use crate::worker::{PRELOAD, connect, served, worker_pids};

/// The memory of a process that is nobody else's, in kB.
fn resident(pid: i32) -> i64 {
    let pages = fs::read_to_string(format!("/proc/{pid}/statm")).unwrap();
    let mut pages = pages.split_whitespace().skip(1).map(|n| n.parse::<i64>().unwrap());
    let (all, shared) = (pages.next().unwrap(), pages.next().unwrap());
    (all - shared) * 4
}

/// The memory that the server has given this connection, in kB.
fn given(c: &mut Client) -> i64 {
    count(c, "SELECT sum(total_bytes)::bigint / 1024 FROM pg_backend_memory_contexts")
}

/// Everything that a session does, on the own backlog or a bound one.
fn work(c: &mut Client) {
    granted(c, "SD-1", "s1");
    assert_eq!(claim(c, "SD-1", "s2")["claimed_by"], "s1");
    assert_eq!(beat(c, "s1")["success"], true);
    json(c, "SELECT heartbeat_sessions('{s1,s2}')", &[]);
    release(c, "s1");
    let next = json(c, "SELECT claim_next_sd('s2')", &[]);
    assert_eq!(next["success"], true, "{next}");
    release(c, "s2");
    c.batch_execute(
        "UPDATE claude_sessions SET sd_id = 'SD-2' WHERE session_id = 's3';
         UPDATE claude_sessions SET sd_id = NULL WHERE session_id = 's3';
         SELECT sd_next(); SELECT * FROM v_sd_queue; SELECT * FROM v_active_sessions;
         SELECT cleanup_stale_sessions()",
    )
    .unwrap();
}

/// The tables change in as many ways as they can and stay what they are.
fn change(other: &mut Client, backlog: &str) {
    other.batch_execute(&format!("REINDEX TABLE CONCURRENTLY {backlog}")).unwrap();
    other.batch_execute("REINDEX TABLE CONCURRENTLY claude_sessions").unwrap();
    other.batch_execute("VACUUM ANALYZE claude_sessions, sd_claims").unwrap();
    for table in ["claude_sessions", "sd_claims", backlog] {
        // Each by itself. One transaction that does both asks for more than it has already got, and whoever reads the table
        // and wants to write it cannot end before the transaction does.
        other
            .batch_execute(&format!(
                "CREATE TRIGGER passing AFTER UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION nothing()"
            ))
            .unwrap();
        other.batch_execute(&format!("DROP TRIGGER passing ON {table}")).unwrap();
    }
}

const NOTHING: &str =
    "CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'";

/// Before what is measured, and then: the first few times a process learns something.
const ROUNDS: [usize; 2] = [10, 20];

/// How much more a connection has after the second rounds than after the first ones, in kB. After each change it
/// does its work.
fn growth(c: &mut Client, mut change: impl FnMut()) -> (i64, i64) {
    let pid = backend_pid(c);
    let after = ROUNDS.map(|rounds| {
        for _ in 0..rounds {
            change();
            work(c);
        }
        (given(c), resident(pid))
    });
    (after[1].0 - after[0].0, after[1].1 - after[0].1)
}

fn assert_bounded((given, resident): (i64, i64)) {
    // A statement or two that first run late. If anything were left behind at each change, it would be several times that.
    assert!(given < 600 && resident < 3000, "{given} kB of the server's, {resident} kB in all");
}

#[test]
fn a_connection_does_not_grow_with_the_changes_of_the_own_backlog() {
    let (db, mut c) = coordinated();
    c.batch_execute(NOTHING).unwrap();
    let mut other = db.connect();
    assert_bounded(growth(&mut c, || change(&mut other, "strategic_directives_v2")));
}

const ITEMS: &str = "
    CREATE TABLE items (key text PRIMARY KEY, title text, status text, is_working_on boolean,
                        active_session_id text) PARTITION BY HASH (key);
    CREATE TABLE items_0 PARTITION OF items FOR VALUES WITH (MODULUS 2, REMAINDER 0);
    CREATE TABLE items_1 PARTITION OF items FOR VALUES WITH (MODULUS 2, REMAINDER 1);
    INSERT INTO items SELECT 'SD-' || n FROM generate_series(1, 9) n;
    SELECT bind_directives('items', '{key}')";

#[test]
fn a_connection_does_not_grow_with_the_changes_of_a_bound_backlog() {
    let (db, mut c) = coordinated();
    c.batch_execute(NOTHING).unwrap();
    c.batch_execute(ITEMS).unwrap();
    let mut other = db.connect();
    assert_bounded(growth(&mut c, || change(&mut other, "items")));
}

#[test]
fn a_connection_does_not_grow_with_the_changes_of_what_is_bound() {
    let (db, mut c) = coordinated();
    c.batch_execute(ITEMS).unwrap();
    let mut other = db.connect();
    // Every statement has another text after that, also of those that just run.
    let mut is_bound = true;
    assert_bounded(growth(&mut c, || {
        other
            .batch_execute(if is_bound {
                "SELECT unbind_directives()"
            } else {
                "SELECT bind_directives('items', '{key}')"
            })
            .unwrap();
        is_bound = !is_bound;
    }));
}

#[test]
fn a_backlog_may_be_bound_within_a_call_that_looks_at_it() {
    let (_db, mut c) = coordinated();
    c.batch_execute(ITEMS).unwrap();
    // The claim's own statement sets it off, and another claim after it.
    c.batch_execute(
        "CREATE FUNCTION meddle() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             IF NEW.release_reason = 'bind' THEN
                 PERFORM public.unbind_directives();
                 PERFORM public.claim_sd('SD-2', 's2');
                 PERFORM public.bind_directives('public.items', '{key}');
             END IF;
             RETURN NULL; END $$;
         CREATE TRIGGER meddle AFTER UPDATE ON claude_sessions FOR EACH ROW EXECUTE FUNCTION meddle()",
    )
    .unwrap();
    for _ in 0..3 {
        granted(&mut c, "SD-1", "s1");
        // Whether it is done or refused, the server lives and all is in step.
        let released = c.query("SELECT release_sd('s1', 'bind')", &[]);
        drop(released);
        assert_in_step(&mut c);
        for session in ["s1", "s2"] {
            release(&mut c, session);
        }
    }
}

#[test]
fn the_worker_does_not_grow_with_the_changes() {
    let (server, mut c) = served("bounded-worker", &[PRELOAD, "pg_claims.worker = on"]);
    c.batch_execute(NOTHING).unwrap();
    let mut measured = Vec::new();
    let mut changing = connect(&server, "postgres");
    // It ends after a while without anything to do; here there always is something.
    while measured.len() < 2 {
        for _ in 0..ROUNDS[measured.len()] {
            change(&mut changing, "strategic_directives_v2");
            work(&mut c);
        }
        let pids = worker_pids(&mut c, "pg_claims worker");
        let Some(pid) = pids.first() else { continue };
        match measured.last() {
            Some((before, _)) if before != pid => measured.clear(),
            _ => measured.push((*pid, resident(*pid))),
        }
    }
    let grown = measured[1].1 - measured[0].1;
    assert!(grown < 3000, "{grown} kB");
    server.discard().unwrap();
}
