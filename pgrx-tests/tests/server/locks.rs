//! The order of locks: who guards a claim can always finish, and nothing is decided or dated before the last wait.

use std::thread::{self, JoinHandle};

use pg_claims_tests::{TestDb, backend_pid, json, sqlstate, wait_until, wait_until_blocked};
use postgres::Client;

use crate::support::*;
use crate::worker::{connect, served};

type Outcome = Result<(), postgres::Error>;

/// Runs `sql` in a thread and returns once it waits for a lock.
fn waiting(db: &TestDb, mut client: Client, sql: &str) -> JoinHandle<(Client, Outcome)> {
    let pid = backend_pid(&mut client);
    let sql = sql.to_owned();
    let running = thread::spawn(move || {
        let outcome = client.batch_execute(&sql);
        (client, outcome)
    });
    wait_until_blocked(db, pid);
    running
}

/// The SQLSTATE, if it failed.
fn code(outcome: &Outcome) -> Option<String> {
    outcome.as_ref().err().map(|error| sqlstate(error).to_owned())
}

const BOUND: &str = "CREATE TABLE mine (key text PRIMARY KEY, title text, status text, is_working_on boolean,
                         active_session_id text);
                     INSERT INTO mine SELECT 'SD-' || n, 'Mine', 'draft' FROM generate_series(1, 9) n;
                     SELECT bind_directives('mine', '{key}')";

/// The backlog's table and its key, for the extension's own and for a bound one.
fn backlogs() -> [(&'static str, &'static str, &'static str); 2] {
    [("strategic_directives_v2", "sd_id", ""), ("mine", "key", BOUND)]
}

#[test]
fn who_guards_a_claim_can_always_finish() {
    for (table, key, prepare) in backlogs() {
        let completes = format!("UPDATE {table} SET status = 'completed' WHERE {key} = 'SD-1'");
        let enders = [
            "SELECT takeover_sd('SD-1', 's2', 'stuck')".to_owned(),
            "SELECT end_session('s1')".to_owned(),
            "SELECT release_sd('s1')".to_owned(),
            "SELECT claim_sd('SD-3', 's1')".to_owned(),
            completes.clone(),
            format!("UPDATE {table} SET status = 'completed'"),
            format!("DELETE FROM {table} WHERE {key} = 'SD-1'"),
            "UPDATE claude_sessions SET sd_id = NULL WHERE session_id = 's1'".to_owned(),
            "UPDATE claude_sessions SET sd_id = 'SD-4' WHERE session_id = 's1'".to_owned(),
            "DELETE FROM claude_sessions WHERE session_id = 's1'".to_owned(),
        ];
        let finishes = [
            "SELECT release_sd('s1')".to_owned(),
            completes,
            "SELECT claim_sd('SD-2', 's1')".to_owned(),
            format!("UPDATE {table} SET title = 'done' WHERE {key} = 'SD-1'"),
            "SELECT end_session('s1')".to_owned(),
            format!("DELETE FROM {table} WHERE {key} = 'SD-1'"),
            "SELECT report_progress('s1', 'nearly')".to_owned(),
        ];
        for ender in &enders {
            let (db, mut guard) = coordinated();
            guard.batch_execute(prepare).unwrap();
            for finish in &finishes {
                guard
                    .batch_execute(&format!(
                        "DELETE FROM {table};
                         INSERT INTO {table} ({key}, status) SELECT 'SD-' || n, 'draft' FROM generate_series(1, 9) n;
                         SELECT register_session('s1'), register_session('s2')"
                    ))
                    .unwrap();
                let held = granted(&mut guard, "SD-1", "s1");
                guard
                    .batch_execute(&format!("BEGIN; SELECT assert_claim('SD-1', 's1', {held})"))
                    .unwrap();
                let other = waiting(&db, db.connect(), ender);
                let finished = guard.batch_execute(&format!("{finish}; COMMIT"));
                assert_eq!(code(&finished), None, "{table}: {finish} beside {ender}");
                let (_, ended) = other.join().unwrap();
                let is_by_hand = !ender.starts_with("SELECT");
                // Who has locked a row by hand, which the guard then needs, gives way.
                assert!(
                    matches!(code(&ended).as_deref(), None | Some("40001"))
                        && (is_by_hand || ended.is_ok()),
                    "{table}: {ender} beside {finish}: {ended:?}"
                );
                assert_in_step(&mut guard);
                for session in ["s1", "s2"] {
                    release(&mut guard, session);
                }
            }
        }
    }
}

/// Two transactions that guard the claim of `s1` on `SD-1`, and its claim id.
fn two_guards() -> (TestDb, Client, Client, i64) {
    let (db, mut first) = coordinated();
    let held = granted(&mut first, "SD-1", "s1");
    let mut second = db.connect();
    for guard in [&mut first, &mut second] {
        guard.batch_execute(&format!("BEGIN; SELECT assert_claim('SD-1', 's1', {held})")).unwrap();
    }
    (db, first, second, held)
}

#[test]
fn several_transactions_guard_one_claim_at_once_and_both_write_the_sd() {
    let (db, mut first, second, held) = two_guards();
    let write = "UPDATE strategic_directives_v2 SET title = title || '+' WHERE sd_id = 'SD-1'";
    first.batch_execute(write).unwrap();
    let second = waiting(&db, second, write);
    first.batch_execute("COMMIT").unwrap();
    let (mut second, written) = second.join().unwrap();
    written.unwrap();
    second.batch_execute("COMMIT").unwrap();
    assert_eq!(beat(&mut first, "s1")["claim_id"], held);
}

#[test]
fn of_two_guards_that_end_the_claim_one_does_and_the_other_gives_way() {
    let (db, first, mut second, _) = two_guards();
    let first = waiting(&db, first, "SELECT release_sd('s1')");
    let released = second.batch_execute("SELECT release_sd('s1'); COMMIT");
    let (mut first, other) = first.join().unwrap();
    let codes = [code(&released), code(&other)];
    assert!(codes.contains(&None) && codes.contains(&Some("40001".into())), "{codes:?}");
    first.batch_execute("ROLLBACK").unwrap();
    assert_in_step(&mut first);
}

#[test]
fn a_session_that_is_written_in_an_open_transaction_can_then_let_its_claim_go() {
    for step in
        ["extend_lease('s1', '10 min')", "report_progress('s1', 'x')", "register_session('s1')"]
    {
        for ender in [
            "SELECT release_sd('s1')",
            "SELECT end_session('s1')",
            "SELECT claim_sd('SD-3', 's1')",
            "UPDATE claude_sessions SET sd_id = NULL WHERE session_id = 's1'",
        ] {
            let (db, mut owner) = coordinated();
            granted(&mut owner, "SD-1", "s1");
            owner.batch_execute(&format!("BEGIN; SELECT {step}")).unwrap();
            let other = waiting(&db, db.connect(), ender);
            owner.batch_execute("SELECT release_sd('s1'); COMMIT").unwrap();
            other.join().unwrap().1.unwrap();
            assert_in_step(&mut owner);
        }
    }
}

#[test]
fn a_row_that_waited_for_its_predecessor_s_deletion_says_that_nobody_works_on_it() {
    for level in ["READ COMMITTED", "REPEATABLE READ"] {
        for (table, key, prepare) in backlogs() {
            for insert in [
                format!("INSERT INTO {table} ({key}, title) VALUES ('SD-1', 'again')"),
                format!("INSERT INTO {table} ({key}) VALUES ('SD-1') ON CONFLICT DO NOTHING"),
                format!(
                    "INSERT INTO {table} ({key}) VALUES ('SD-1') ON CONFLICT ({key}) DO UPDATE SET title = 'kept'"
                ),
                format!(
                    "UPDATE {table} SET {key} = 'SD-1', is_working_on = true WHERE {key} = 'SD-9'"
                ),
            ] {
                let (db, mut deleter) = coordinated();
                deleter.batch_execute(prepare).unwrap();
                granted(&mut deleter, "SD-1", "s1");
                let mut writer = db.connect();
                writer
                    .batch_execute(&format!("BEGIN ISOLATION LEVEL {level}; SELECT 1 FROM {table}"))
                    .unwrap();
                deleter
                    .batch_execute(&format!("BEGIN; DELETE FROM {table} WHERE {key} = 'SD-1'"))
                    .unwrap();
                let writer = waiting(&db, writer, &format!("{insert}; COMMIT"));
                deleter.batch_execute("COMMIT").unwrap();
                let (mut writer, written) = writer.join().unwrap();
                let code = code(&written);
                assert!(
                    code.is_none()
                        || (level != "READ COMMITTED" && code.as_deref() == Some("40001")),
                    "{level}: {insert}: {written:?}"
                );
                writer.batch_execute("ROLLBACK").unwrap();
                assert_in_step(&mut writer);
                if code.is_none() {
                    granted(&mut writer, "SD-1", "s2");
                    assert_in_step(&mut writer);
                }
            }
        }
    }
}

#[test]
fn a_key_whose_uniqueness_is_deferred_is_looked_at_when_the_transaction_commits() {
    let (db, mut deleter) = coordinated();
    deleter
        .batch_execute(
            "CREATE TABLE mine (id integer PRIMARY KEY, key text NOT NULL UNIQUE DEFERRABLE INITIALLY DEFERRED,
                                is_working_on boolean);
             INSERT INTO mine VALUES (1, 'SD-1'); CREATE UNIQUE INDEX ON mine (key, id)",
        )
        .unwrap();
    if deleter.batch_execute("SELECT bind_directives('mine', '{key}')").is_err() {
        // Only a key whose uniqueness counts at once can be bound.
        return;
    }
    granted(&mut deleter, "SD-1", "s1");
    deleter.batch_execute("BEGIN; DELETE FROM mine").unwrap();
    let writer = waiting(&db, db.connect(), "INSERT INTO mine VALUES (2, 'SD-1')");
    deleter.batch_execute("COMMIT").unwrap();
    let (mut writer, written) = writer.join().unwrap();
    written.unwrap();
    assert_in_step(&mut writer);
}

#[test]
fn the_queue_judges_again_what_the_session_held_before_the_wait() {
    for write in [
        "UPDATE strategic_directives_v2 SET dependencies = '[\"SD-9\"]' WHERE sd_id = 'SD-1'",
        "UPDATE strategic_directives_v2 SET status = 'completed' WHERE sd_id = 'SD-1'",
        "DELETE FROM strategic_directives_v2 WHERE sd_id = 'SD-1'",
        "SELECT hold_sd('SD-1', 'wait')",
    ] {
        for prepare in
            ["", "UPDATE strategic_directives_v2 SET priority = 'low' WHERE sd_id <> 'SD-1'"]
        {
            let (db, mut first) = coordinated();
            first.batch_execute(prepare).unwrap();
            granted(&mut first, "SD-1", "s1");
            first.batch_execute(&format!("BEGIN; {write}; SELECT release_sd('s1')")).unwrap();
            let mut asking = db.connect();
            let pid = backend_pid(&mut asking);
            let next = thread::spawn(move || json(&mut asking, "SELECT claim_next_sd('s1')", &[]));
            wait_until_blocked(&db, pid);
            first.batch_execute("COMMIT").unwrap();
            let answer = next.join().unwrap();
            assert_eq!(answer["sd_id"], "SD-2", "{write}: {answer}");
            assert_in_step(&mut first);
        }
    }
}

#[test]
fn a_claim_on_an_old_snapshot_sees_what_has_stopped_the_sd_since() {
    for level in ["REPEATABLE READ", "SERIALIZABLE"] {
        for stop in [
            "SELECT hold_sd('SD-1', 'wait')",
            "SELECT declare_conflict('SD-1', 'SD-2', 'same_files'), claim_sd('SD-2', 's2')",
            "SELECT end_session('s1')",
            "UPDATE strategic_directives_v2 SET status = 'completed' WHERE sd_id = 'SD-1'",
        ] {
            for claim in [
                "SELECT claim_sd('SD-1', 's1')",
                "SELECT claim_next_sd('s1')",
                "UPDATE claude_sessions SET sd_id = 'SD-1' WHERE session_id = 's1'",
            ] {
                let (db, mut c) = coordinated();
                let mut old = db.connect();
                old.batch_execute(&format!(
                    "BEGIN ISOLATION LEVEL {level}; SELECT 1 FROM claude_sessions"
                ))
                .unwrap();
                c.batch_execute(stop).unwrap();
                let claimed = old.batch_execute(claim);
                let claimed = claimed.and_then(|()| old.batch_execute("COMMIT"));
                assert_eq!(
                    code(&claimed).as_deref(),
                    Some("40001"),
                    "{level}: {claim} after {stop}"
                );
            }
        }
    }
}

#[test]
fn times_are_those_after_the_wait() {
    let held_after = |c: &mut Client, sql: &str| {
        assert_eq!(value(c, sql).as_deref(), Some("true"), "{sql}");
    };
    // A switch that waits for a heartbeat of its session.
    let (db, mut beating) = coordinated();
    granted(&mut beating, "SD-1", "s1");
    beating.batch_execute("BEGIN; SELECT report_progress('s1', 'x')").unwrap();
    let switch = waiting(&db, db.connect(), "SELECT claim_sd('SD-2', 's1')");
    beating.batch_execute("CREATE TABLE moment AS SELECT clock_timestamp() AS at; COMMIT").unwrap();
    switch.join().unwrap().1.unwrap();
    held_after(
        &mut beating,
        "SELECT bool_and(claimed_at > at) FROM sd_claims, moment WHERE sd_id = 'SD-2'",
    );
    held_after(
        &mut beating,
        "SELECT bool_and(claimed_at > at) FROM claude_sessions, moment WHERE sd_id = 'SD-2'",
    );
    held_after(
        &mut beating,
        "SELECT (SELECT released_at FROM sd_claims WHERE sd_id = 'SD-1')
              = (SELECT claimed_at FROM sd_claims WHERE sd_id = 'SD-2')",
    );
    // Each of these ends a claim while a guard holds it.
    for ender in [
        "SELECT release_sd('s1')",
        "SELECT end_session('s1')",
        "SELECT takeover_sd('SD-1', 's2', 'stuck')",
        "UPDATE strategic_directives_v2 SET status = 'completed' WHERE sd_id = 'SD-1'",
        "UPDATE claude_sessions SET sd_id = NULL WHERE session_id = 's1'",
        "DELETE FROM claude_sessions WHERE session_id = 's1'",
    ] {
        let (db, mut guard) = coordinated();
        let held = granted(&mut guard, "SD-1", "s1");
        guard.batch_execute(&format!("BEGIN; SELECT assert_claim('SD-1', 's1', {held})")).unwrap();
        let other = waiting(&db, db.connect(), ender);
        guard
            .batch_execute("CREATE TABLE moment AS SELECT clock_timestamp() AS at; COMMIT")
            .unwrap();
        other.join().unwrap().1.unwrap();
        let after =
            format!("SELECT released_at > at FROM sd_claims, moment WHERE claim_id = {held}");
        held_after(&mut guard, &after);
        held_after(
            &mut guard,
            "SELECT coalesce(bool_and(n.claimed_at >= p.released_at), true)
               FROM sd_claims n JOIN sd_claims p USING (sd_id) WHERE p.claim_id < n.claim_id",
        );
    }
}

#[test]
fn a_clock_that_was_set_back_dates_nothing_before_what_came_first() {
    let (_db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    release(&mut c, "s1");
    // As if all that had happened an hour later.
    c.batch_execute(
        "UPDATE sd_claims SET claimed_at = claimed_at + interval '1 hour', released_at = released_at + interval '1 hour';
         UPDATE claude_sessions SET released_at = released_at + interval '1 hour' WHERE session_id = 's1';
         UPDATE claude_sessions SET heartbeat_at = heartbeat_at + interval '1 hour'",
    )
    .unwrap();
    for claim in [
        "SELECT claim_sd('SD-1', 's1')",
        "SELECT claim_sd('SD-1', 's2')",
        "UPDATE claude_sessions SET sd_id = 'SD-1' WHERE session_id = 's3'",
    ] {
        c.batch_execute(claim).unwrap();
        c.batch_execute("UPDATE claude_sessions SET sd_id = NULL WHERE sd_id IS NOT NULL").unwrap();
        c.batch_execute("UPDATE claude_sessions SET heartbeat_at = now() + interval '1 hour'")
            .unwrap();
    }
    let wrong = "SELECT count(*) FROM (
        SELECT claimed_at, released_at, lag(released_at) OVER (ORDER BY claim_id) AS before FROM sd_claims) c
         WHERE released_at < claimed_at OR claimed_at < before";
    assert_eq!(count(&mut c, wrong), 0);
    assert_eq!(count(&mut c, "SELECT count(*) FROM sd_claims"), 4);
}

#[test]
fn the_queue_passes_over_an_sd_only_for_a_failure_of_its_own() {
    let (db, mut c) = coordinated();
    c.batch_execute(
        "UPDATE strategic_directives_v2 SET priority = 'critical' WHERE sd_id = 'SD-1'",
    )
    .unwrap();
    let mut asking = db.connect();
    // The session's row is locked: a lock timeout, and a cancel.
    for (settings, cancels) in
        [("SET lock_timeout = '20ms'", false), ("SET lock_timeout = 0", true)]
    {
        c.batch_execute(
            "BEGIN; UPDATE claude_sessions SET metadata = '{}' WHERE session_id = 's1'",
        )
        .unwrap();
        asking.batch_execute(settings).unwrap();
        let pid = backend_pid(&mut asking);
        let next = thread::spawn(move || {
            let outcome = asking.batch_execute("SELECT claim_next_sd('s1')");
            (asking, outcome)
        });
        if cancels {
            wait_until_blocked(&db, pid);
            c.execute("SELECT pg_cancel_backend($1)", &[&pid]).unwrap();
        }
        let outcome;
        (asking, outcome) = next.join().unwrap();
        assert_eq!(code(&outcome).as_deref(), Some(if cancels { "57014" } else { "55P03" }));
        c.batch_execute("ROLLBACK").unwrap();
    }
    // A user's trigger raises one of these codes at each try to claim the SD. None of them says that the SD cannot be
    // claimed, so each reaches the caller. Then the codes run out, and the trigger fails for a reason that is the SD's
    // own: the queue passes it over.
    c.batch_execute(
        "CREATE SEQUENCE tries;
         CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
         $$ BEGIN
              RAISE EXCEPTION 'no' USING ERRCODE = (ARRAY['40001', '40P01', '55P03', '53200', 'P0001'])[nextval('tries')];
         END $$;
         CREATE TRIGGER refuse BEFORE UPDATE ON strategic_directives_v2 FOR EACH ROW
         WHEN (NEW.is_working_on AND NEW.sd_id = 'SD-1') EXECUTE FUNCTION refuse()",
    )
    .unwrap();
    for code_ in ["40001", "40P01", "55P03", "53200", "P0001"] {
        let outcome = asking.batch_execute("SELECT claim_next_sd('s1')");
        assert_eq!(code(&outcome).as_deref(), Some(code_), "{outcome:?}");
    }
    assert_eq!(json(&mut asking, "SELECT claim_next_sd('s1')", &[])["sd_id"], "SD-2");
}

#[test]
fn an_open_maintenance_call_keeps_nobody_from_events() {
    let (server, mut c) = served("open_maintenance", &[]);
    let mut open = connect(&server, "postgres");
    open.batch_execute("BEGIN; SELECT prune_history(), cleanup_stale_sessions()").unwrap();
    granted(&mut c, "SD-1", "s1");
    let has_its_place =
        "SELECT count(*) FROM lifecycle_events_since(0) e WHERE e.event_type = 'claimed'";
    wait_until("the claim's event to have its place", || count(&mut c, has_its_place) == 1);
    open.batch_execute("COMMIT").unwrap();
}

#[test]
fn without_a_worker_an_open_maintenance_call_is_passed_by() {
    let (db, mut c) = coordinated();
    let mut open = db.connect();
    open.batch_execute("BEGIN; SELECT prune_history(), cleanup_stale_sessions()").unwrap();
    c.batch_execute(
        "SET lock_timeout = '1ms';
         SELECT cleanup_stale_sessions(), prune_history(), claim_sd('SD-1', 's1'), release_sd('s1')",
    )
    .unwrap();
    open.batch_execute("COMMIT").unwrap();
}
