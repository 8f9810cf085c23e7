//! The guard: work and claim share a transaction.

use std::io::Write;
use std::process::{Child, Stdio};
use std::thread;
use std::time::Duration;

use pg_claims_tests::{
    TestDb, backend_pid, detail, hint, json, message, sqlstate, wait_until, wait_until_blocked,
};
use postgres::Client;

use crate::support::*;

/// SD-1 held by s1, and a guarded table of the user's.
fn guarded() -> (TestDb, Client, i64) {
    let (db, mut c) = coordinated();
    c.batch_execute(
        "CREATE TABLE work (id bigint GENERATED ALWAYS AS IDENTITY, sd_id text, note text, claim_id bigint);
         SELECT guard_table('work', 'sd_id')",
    )
    .unwrap();
    let held = granted(&mut c, "SD-1", "s1");
    (db, c, held)
}

fn assert_claim(
    c: &mut Client,
    sd: &str,
    session: &str,
    claim: i64,
) -> Result<i64, postgres::Error> {
    c.query_one("SELECT assert_claim($1, $2, $3)", &[&sd, &session, &claim]).map(|row| row.get(0))
}

#[test]
fn a_claim_that_is_held_is_asserted_and_any_other_is_refused_with_the_facts() {
    let (_db, mut c, held) = guarded();
    assert_eq!(assert_claim(&mut c, "SD-1", "s1", held).unwrap(), held);
    let refused = |c: &mut Client, sd: &str, session: &str, claim: i64| {
        let error = assert_claim(c, sd, session, claim).unwrap_err();
        assert_eq!(sqlstate(&error), "55000", "{error:?}");
        assert!(hint(&error).contains("Stop this work"));
        detail(&error).to_owned()
    };
    assert_eq!(
        refused(&mut c, "SD-1", "s1", held + 100),
        format!("There never was a claim {}.", held + 100)
    );
    let others = format!("Claim {held} is that of session \"s1\" on SD \"SD-1\".");
    assert_eq!(refused(&mut c, "SD-2", "s1", held), others);
    assert_eq!(refused(&mut c, "SD-1", "s2", held), others);
    release(&mut c, "s1");
    let nobody = refused(&mut c, "SD-1", "s1", held);
    assert!(nobody.contains("(manual). Nobody has SD \"SD-1\" now."), "{nobody}");
    let next = granted(&mut c, "SD-1", "s2");
    let taken = refused(&mut c, "SD-1", "s1", held);
    assert!(taken.contains("Session \"s2\" has SD \"SD-1\" since "), "{taken}");
    assert!(taken.contains(&format!("(claim {next})")), "{taken}");
    for bad in ["NULL, 's1', 1", "'SD-1', '', 1", "'SD-1', 's1', NULL"] {
        let error = c.batch_execute(&format!("SELECT assert_claim({bad})")).unwrap_err();
        assert_eq!(sqlstate(&error), "22023", "{bad}");
    }
}

#[test]
fn another_role_s_claim_cannot_be_asserted() {
    let (db, mut c, held) = guarded();
    let worker = db.role("worker");
    json(&mut c, "SELECT grant_coordination($1, 'worker')", &[&worker]);
    let error = assert_claim(&mut db.connect_as(&worker), "SD-1", "s1", held).unwrap_err();
    assert_eq!(sqlstate(&error), "42501");
}

#[test]
fn an_open_guard_keeps_the_claim_and_nobody_waits_for_it() {
    let (db, mut c, held) = guarded();
    let mut worker = db.connect();
    worker.batch_execute("BEGIN").unwrap();
    assert_claim(&mut worker, "SD-1", "s1", held).unwrap();
    // It also writes the SD itself, as work does.
    worker
        .batch_execute("UPDATE strategic_directives_v2 SET title = 'in work' WHERE sd_id = 'SD-1'")
        .unwrap();
    age_heartbeat(&mut c, "s1", "1 hour");
    c.batch_execute("SET lock_timeout = '1ms'").unwrap();
    let refusal = claim(&mut c, "SD-1", "s2");
    assert_eq!(refusal["error"], "already_claimed", "{refusal}");
    assert_eq!(refusal["claimed_by"], "s1");
    assert_eq!(refusal["guarded"], true);
    assert!(refusal["message"].as_str().unwrap().contains("at work in an open transaction"));
    let text = value(&mut c, "SELECT sd_start('SD-1', 's2')").unwrap();
    assert!(text.ends_with("\n   At work: in an open transaction"), "{text}");
    assert_eq!(json(&mut c, "SELECT cleanup_stale_sessions()", &[])["stale_sessions_cleaned"], 0);
    assert_eq!(count(&mut c, "SELECT count(*) FROM v_active_sessions"), 3);
    assert_eq!(beat(&mut c, "s1")["claim_id"], held);
    granted(&mut c, "SD-2", "s2");
    assert_eq!(release(&mut c, "s2")["success"], true);
    age_heartbeat(&mut c, "s1", "1 hour");
    // Maintenance goes on as well.
    for maintenance in ["VACUUM sd_claims", "VACUUM claude_sessions", "ANALYZE"] {
        c.batch_execute(maintenance).unwrap();
    }
    worker.batch_execute("COMMIT").unwrap();
    assert_eq!(claim(&mut c, "SD-1", "s2")["took_over"]["session_id"], "s1");
    assert_in_step(&mut c);
}

#[test]
fn whoever_ends_the_claim_on_purpose_waits_for_the_guard() {
    for end in [
        "SELECT release_sd('s1')",
        "SELECT end_session('s1')",
        "UPDATE strategic_directives_v2 SET status = 'completed' WHERE sd_id = 'SD-1'",
        "DELETE FROM claude_sessions WHERE session_id = 's1'",
        "SELECT claim_sd('SD-2', 's1')",
    ] {
        let (db, mut c, held) = guarded();
        c.batch_execute("BEGIN").unwrap();
        assert_claim(&mut c, "SD-1", "s1", held).unwrap();
        let mut other = db.connect();
        let pid = backend_pid(&mut other);
        let ending = thread::spawn(move || other.batch_execute(end));
        wait_until_blocked(&db, pid);
        // Not so the session's heartbeats; a statement by hand has locked the row before anything
        // of the extension's runs.
        if end.starts_with("SELECT") || end.starts_with("UPDATE strategic") {
            let mut beating = db.connect();
            beating.batch_execute("SET lock_timeout = '1ms'").unwrap();
            assert_eq!(beat(&mut beating, "s1")["claim_id"], held, "{end}");
        }
        c.batch_execute("INSERT INTO work (sd_id, note) VALUES ('SD-1', 'still mine'); COMMIT")
            .unwrap();
        ending.join().unwrap().unwrap();
        let error = assert_claim(&mut c, "SD-1", "s1", held).unwrap_err();
        assert_eq!(sqlstate(&error), "55000", "{end}");
        assert_in_step(&mut c);
    }
}

#[test]
fn a_guard_that_meets_a_takeover_waits_and_is_then_refused() {
    let (db, mut c, held) = guarded();
    age_heartbeat(&mut c, "s1", "1 hour");
    c.batch_execute("BEGIN").unwrap();
    assert_eq!(claim(&mut c, "SD-1", "s2")["success"], true);
    let mut late = db.connect();
    let pid = backend_pid(&mut late);
    let asserting = thread::spawn(move || assert_claim(&mut late, "SD-1", "s1", held));
    wait_until_blocked(&db, pid);
    c.batch_execute("COMMIT").unwrap();
    let error = asserting.join().unwrap().unwrap_err();
    assert_eq!(sqlstate(&error), "55000");
    assert!(detail(&error).contains("\"s2\""));
}

#[test]
fn under_a_snapshot_a_claim_that_ended_since_is_a_serialization_failure() {
    for level in ["REPEATABLE READ", "SERIALIZABLE"] {
        let (db, mut c, held) = guarded();
        let mut old = db.connect();
        old.batch_execute(&format!("BEGIN ISOLATION LEVEL {level}; SELECT 1 FROM sd_claims"))
            .unwrap();
        release(&mut c, "s1");
        let error = assert_claim(&mut old, "SD-1", "s1", held).unwrap_err();
        assert_eq!(sqlstate(&error), "40001", "{level}");
    }
}

#[test]
fn rows_of_an_sd_can_be_written_only_under_its_claim() {
    let (_db, mut c, held) = guarded();
    let other = granted(&mut c, "SD-2", "s2");
    for write in [
        "INSERT INTO work (sd_id) VALUES ('SD-1')",
        "INSERT INTO work (sd_id) SELECT 'SD-1' FROM generate_series(1, 1000)",
        "INSERT INTO work (sd_id) VALUES ('SD-1') ON CONFLICT DO NOTHING",
    ] {
        let error = c.batch_execute(write).unwrap_err();
        assert_eq!(sqlstate(&error), "55000", "{write}");
        assert!(message(&error).contains("SD \"SD-1\" in table work"), "{error:?}");
        assert!(hint(&error).contains("assert_claim()"));
    }
    c.batch_execute("BEGIN").unwrap();
    assert_claim(&mut c, "SD-1", "s1", held).unwrap();
    c.batch_execute("INSERT INTO work (sd_id) SELECT 'SD-1' FROM generate_series(1, 1000); INSERT INTO work (sd_id) VALUES (NULL)").unwrap();
    // Another SD's rows need that SD's claim, also where a row moves there.
    for write in [
        "INSERT INTO work (sd_id) VALUES ('SD-2')",
        "UPDATE work SET sd_id = 'SD-2' WHERE sd_id = 'SD-1'",
    ] {
        c.batch_execute("SAVEPOINT a").unwrap();
        assert_eq!(sqlstate(&c.batch_execute(write).unwrap_err()), "55000", "{write}");
        c.batch_execute("ROLLBACK TO a").unwrap();
    }
    assert_claim(&mut c, "SD-2", "s2", other).unwrap();
    c.batch_execute("UPDATE work SET sd_id = 'SD-2' WHERE id <= 10; COMMIT").unwrap();
    // With the transaction its assertions are gone.
    for write in ["UPDATE work SET note = 'x'", "DELETE FROM work", "TRUNCATE work"] {
        assert_eq!(sqlstate(&c.batch_execute(write).unwrap_err()), "55000", "{write}");
    }
    c.batch_execute("DELETE FROM work WHERE sd_id IS NULL").unwrap();
    json(&mut c, "SELECT unguard_table('work')", &[]);
    c.batch_execute("UPDATE work SET note = 'x'; TRUNCATE work").unwrap();
    let error = c.batch_execute("SELECT unguard_table('work')").unwrap_err();
    assert_eq!(sqlstate(&error), "55000");
}

#[test]
fn an_assertion_that_is_rolled_back_was_none() {
    let (db, mut c, held) = guarded();
    c.batch_execute("BEGIN; SAVEPOINT a").unwrap();
    assert_claim(&mut c, "SD-1", "s1", held).unwrap();
    c.batch_execute(
        "SAVEPOINT b; INSERT INTO work (sd_id) VALUES ('SD-1'); RELEASE b; ROLLBACK TO a",
    )
    .unwrap();
    c.batch_execute("SAVEPOINT c").unwrap();
    let error = c.batch_execute("INSERT INTO work (sd_id) VALUES ('SD-1')").unwrap_err();
    assert_eq!(sqlstate(&error), "55000");
    c.batch_execute("ROLLBACK TO c").unwrap();
    // Its locks are gone as well.
    assert_eq!(release(&mut db.connect(), "s1")["success"], true);
    c.batch_execute("ROLLBACK").unwrap();
    // One that was released into its parent stays.
    let held = granted(&mut c, "SD-1", "s1");
    c.batch_execute("BEGIN; SAVEPOINT a").unwrap();
    assert_claim(&mut c, "SD-1", "s1", held).unwrap();
    c.batch_execute("RELEASE a; INSERT INTO work (sd_id) VALUES ('SD-1'); COMMIT").unwrap();
    assert_eq!(count(&mut c, "SELECT count(*) FROM work"), 1);
}

#[test]
fn partitions_copy_and_other_key_types_are_guarded_too() {
    let (db, mut c) = coordinated();
    c.batch_execute(
        "CREATE TABLE parts (sd varchar(40), n integer) PARTITION BY RANGE (n);
         CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (10);
         SELECT guard_table('parts', 'sd');
         CREATE TABLE parts_2 PARTITION OF parts FOR VALUES FROM (10) TO (20);
         CREATE TABLE parent (id integer PRIMARY KEY);
         CREATE TABLE child (sd text, parent integer REFERENCES parent ON DELETE CASCADE);
         INSERT INTO parent VALUES (1); INSERT INTO child VALUES ('SD-1', 1);
         SELECT guard_table('child', 'sd')",
    )
    .unwrap();
    let held = granted(&mut c, "SD-1", "s1");
    for write in [
        "INSERT INTO parts VALUES ('SD-1', 1)",
        "INSERT INTO parts_1 VALUES ('SD-1', 1)",
        "INSERT INTO parts_2 VALUES ('SD-1', 11)",
        "TRUNCATE parts_1",
        "DELETE FROM parent",
    ] {
        assert_eq!(sqlstate(&c.batch_execute(write).unwrap_err()), "55000", "{write}");
    }
    let copy = |c: &mut Client| -> Result<u64, postgres::Error> {
        let mut writer = c.copy_in("COPY parts FROM STDIN")?;
        for n in 0..20 {
            writeln!(writer, "SD-1\t{n}").unwrap();
        }
        writer.finish()
    };
    assert_eq!(sqlstate(&copy(&mut c).unwrap_err()), "55000");
    c.batch_execute("BEGIN").unwrap();
    assert_claim(&mut c, "SD-1", "s1", held).unwrap();
    assert_eq!(copy(&mut c).unwrap(), 20);
    // A row that moves to another partition.
    c.batch_execute("UPDATE parts SET n = 15 WHERE n = 5; DELETE FROM parent; COMMIT").unwrap();
    // A row can be named by any of the backlog's keys, as the assertion was.
    c.batch_execute(
        "CREATE TABLE mine (key uuid PRIMARY KEY DEFAULT gen_random_uuid(), legacy text);
         INSERT INTO mine (legacy) VALUES ('L-1');",
    )
    .unwrap();
    release(&mut c, "s1");
    c.batch_execute("SELECT bind_directives('mine', '{key,legacy}'); CREATE TABLE notes (sd uuid); SELECT guard_table('notes', 'sd')").unwrap();
    let held = granted(&mut c, "L-1", "s1");
    c.batch_execute("BEGIN").unwrap();
    assert_claim(&mut c, "L-1", "s1", held).unwrap();
    c.batch_execute("INSERT INTO notes SELECT key FROM mine; COMMIT").unwrap();
    assert_eq!(count(&mut db.connect(), "SELECT count(*) FROM notes"), 1);
}

#[test]
fn only_a_table_s_owner_can_guard_it_and_the_guard_goes_with_the_extension() {
    let (db, mut c, _) = guarded();
    let operator = db.role("operator");
    json(&mut c, "SELECT grant_coordination($1, 'operator')", &[&operator]);
    let mut o = db.connect_as(&operator);
    for call in ["guard_table('work', 'sd_id')", "unguard_table('work')"] {
        let error = o.batch_execute(&format!("SELECT {call}")).unwrap_err();
        assert_eq!(sqlstate(&error), "42501", "{call}");
    }
    for (call, code) in [
        ("guard_table('work', 'nothing')", "42703"),
        ("guard_table('v_directives', 'sd_id')", "42809"),
        ("guard_table('sd_claims', 'sd_id')", "42809"),
        ("guard_table(NULL, 'sd_id')", "22023"),
        ("guard_table('work', NULL)", "22023"),
    ] {
        let error = c.batch_execute(&format!("SELECT {call}")).unwrap_err();
        assert_eq!(sqlstate(&error), code, "{call}: {error:?}");
    }
    // A dump brings it along.
    let copy = TestDb::empty();
    copy.psql(&db.dump());
    let mut restored = copy.connect();
    let error = restored.batch_execute("INSERT INTO work (sd_id) VALUES ('SD-1')").unwrap_err();
    assert_eq!(sqlstate(&error), "55000");
    drop(restored);
    c.batch_execute(
        "DROP EXTENSION pg_claims; INSERT INTO work (sd_id) VALUES ('SD-1'); TRUNCATE work",
    )
    .unwrap();
}

#[test]
fn the_token_grows_also_across_a_crash() {
    let server = pg_claims_tests::own_server("tokens", &[]);
    let connect = || server.config("postgres").connect(postgres::NoTls).unwrap();
    let mut c = connect();
    c.batch_execute("CREATE EXTENSION pg_claims").unwrap();
    backlog(&mut c);
    register(&mut c, "s1");
    let mut last = 0;
    for _ in 0..3 {
        for _ in 0..3 {
            let token = granted(&mut c, "SD-1", "s1");
            assert!(token > last, "{token} after {last}");
            last = token;
            release(&mut c, "s1");
        }
        server.crash().unwrap();
        server.start().unwrap();
        c = connect();
    }
}

/// psql that is told what to do line by line.
struct Puppet(Child);

impl Puppet {
    fn new(db: &TestDb) -> Self {
        Self(
            db.psql_child(&["-X", "-q"])
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap(),
        )
    }

    fn say(&mut self, line: &str) {
        writeln!(self.0.stdin.as_mut().unwrap(), "{line}").unwrap();
    }

    fn signal(&self, signal: &str) {
        let pid = self.0.id().to_string();
        assert!(
            std::process::Command::new("kill").args([signal, &pid]).status().unwrap().success()
        );
    }
}

impl Drop for Puppet {
    fn drop(&mut self) {
        // Ends by itself once it has nothing more to read.
        drop(self.0.stdin.take());
        self.0.wait().unwrap();
    }
}

#[test]
fn a_paused_client_writes_nothing_after_its_claim_was_taken_over() {
    let (db, mut c, _) = guarded();
    release(&mut c, "s1");
    let mut taker = db.connect();
    let (mut refused, mut taken) = (0, 0);
    for round in 0..100_u64 {
        let held = granted(&mut c, "SD-1", "s1");
        let mut puppet = Puppet::new(&db);
        puppet.say("BEGIN;");
        puppet.say(&format!("SELECT assert_claim('SD-1', 's1', {held});"));
        puppet.say(&format!(
            "INSERT INTO work (sd_id, note, claim_id) VALUES ('SD-1', 'paused', {held});"
        ));
        puppet.say("COMMIT;");
        puppet.say(&format!(
            "UPDATE strategic_directives_v2 SET title = 'round {round}' WHERE sd_id = 'SD-9';"
        ));
        // Wherever it is by now.
        thread::sleep(Duration::from_micros(round * 7919 % 40_000));
        puppet.signal("-STOP");
        age_heartbeat(&mut c, "s1", "1 hour");
        let answer = claim(&mut taker, "SD-1", "s2");
        if answer["success"] == true {
            taken += 1;
            let next = answer["claim_id"].as_i64().unwrap();
            taker.batch_execute("BEGIN").unwrap();
            assert_claim(&mut taker, "SD-1", "s2", next).unwrap();
            taker
                .execute(
                    "INSERT INTO work (sd_id, note, claim_id) VALUES ('SD-1', 'taker', $1)",
                    &[&next],
                )
                .unwrap();
            taker.batch_execute("COMMIT").unwrap();
        } else {
            assert_eq!(answer["guarded"], true, "{answer}");
            refused += 1;
        }
        puppet.signal("-CONT");
        let title = format!(
            "SELECT title = 'round {round}' FROM strategic_directives_v2 WHERE sd_id = 'SD-9'"
        );
        wait_until("the paused client to have come to its end", || {
            value(&mut c, &title).as_deref() == Some("true")
        });
        drop(puppet);
        // Whatever was written was written under the claim that was held at that moment: the tokens
        // of successive rows never fall.
        let fallen = "SELECT count(*) FROM (SELECT claim_id, lag(claim_id) OVER (ORDER BY id) AS before FROM work) w WHERE claim_id < before";
        assert_eq!(count(&mut c, fallen), 0, "round {round}");
        for session in ["s1", "s2"] {
            release(&mut c, session);
        }
    }
    assert!(taken > 0, "the client was never paused before its transaction");
    assert_eq!(taken + refused, 100);
    assert_in_step(&mut c);
}
