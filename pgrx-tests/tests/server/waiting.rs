//! What a claim waits for, and what lock_timeout and cancel do to it.

use std::thread;

use pg_claims_tests::{TestDb, backend_pid, json, sqlstate, wait_until_blocked};
use postgres::Client;
use serde_json::Value;

use crate::support::*;

/// Runs `claim_sd` in a thread and returns once it waits for a lock.
fn blocked_claim(
    db: &TestDb,
    sd: &'static str,
    session: &'static str,
) -> (i32, thread::JoinHandle<Result<Value, postgres::Error>>) {
    blocked(db, move |client| {
        client.query_one("SELECT claim_sd($1, $2)", &[&sd, &session]).map(|row| row.get(0))
    })
}

fn blocked<R: Send + 'static>(
    db: &TestDb,
    work: impl FnOnce(&mut Client) -> R + Send + 'static,
) -> (i32, thread::JoinHandle<R>) {
    let mut client = db.connect();
    let pid = backend_pid(&mut client);
    let waiting = thread::spawn(move || work(&mut client));
    wait_until_blocked(db, pid);
    (pid, waiting)
}

#[test]
fn a_claim_waits_for_an_uncommitted_one_and_is_refused_naming_its_owner() {
    let (db, mut winner) = coordinated();
    json(&mut winner, "SELECT register_session('s1', 'host-1', 'tty-1')", &[]);
    winner.batch_execute("BEGIN").unwrap();
    granted(&mut winner, "SD-1", "s1");
    let (_, loser) = blocked_claim(&db, "SD-1", "s2");
    winner.batch_execute("COMMIT").unwrap();
    let refusal = loser.join().unwrap().unwrap();
    assert_eq!(refusal["error"], "already_claimed");
    assert_eq!(refusal["claimed_by"], "s1");
    assert_eq!(refusal["hostname"], "host-1");
    assert_eq!(refusal["tty"], "tty-1");
    assert_in_step(&mut winner);
}

/// A claim of `s2`, which holds `SD-2`, that waits for `by_hand`, which goes past the triggers: it neither locks the
/// SD nor says so in the backlog. Returns what comes of the claim once that is committed.
fn claim_past(by_hand: &str) -> (TestDb, Client, Result<Value, postgres::Error>) {
    let (db, mut first) = coordinated();
    first
        .batch_execute(&format!("SET session_replication_role = replica; BEGIN; {by_hand}"))
        .unwrap();
    granted(&mut db.connect(), "SD-2", "s2");
    let (_, second) = blocked_claim(&db, "SD-1", "s2");
    first.batch_execute("COMMIT; RESET session_replication_role").unwrap();
    let claimed = second.join().unwrap();
    (db, first, claimed)
}

#[test]
fn the_unique_index_stops_a_claim_of_what_is_being_claimed_past_the_triggers() {
    let (db, mut first, claimed) = claim_past(
        "UPDATE claude_sessions SET sd_id = 'SD-1', claim_id = 77, claimed_at = now(), status = 'active'
          WHERE session_id = 's1'",
    );
    assert_eq!(sqlstate(&claimed.unwrap_err()), "23505");
    let held = "SELECT string_agg(sd_id, ',') FROM claude_sessions WHERE session_id = 's2'";
    assert_eq!(value(&mut first, held).as_deref(), Some("SD-2"));
    // Now that it can be seen, the refusal names it.
    let refusal = claim(&mut db.connect(), "SD-1", "s2");
    assert_eq!(refusal["error"], "already_claimed", "{refusal}");
    assert_eq!(refusal["claimed_by"], "s1");
}

#[test]
fn a_claim_settles_an_acquisition_that_was_opened_past_the_triggers_while_it_waited() {
    let (_db, mut first, claimed) =
        claim_past("INSERT INTO sd_claims (claim_id, sd_id, session_id) VALUES (77, 'SD-1', 's1')");
    let claimed = claimed.unwrap();
    assert_eq!(claimed["success"], true, "{claimed}");
    assert_eq!(claimed["released_sd"], "SD-2");
    let end = "SELECT release_reason FROM sd_claims WHERE claim_id = 77";
    assert_eq!(value(&mut first, end).as_deref(), Some("repaired"));
    let holders = "SELECT string_agg(session_id, ',') FROM sd_claims
                    WHERE sd_id = 'SD-1' AND released_at IS NULL";
    assert_eq!(value(&mut first, holders).as_deref(), Some("s2"));
}

#[test]
fn a_claim_gets_the_sd_when_the_one_before_it_rolls_back() {
    let (db, mut first) = coordinated();
    first.batch_execute("BEGIN").unwrap();
    granted(&mut first, "SD-1", "s1");
    let (_, second) = blocked_claim(&db, "SD-1", "s2");
    first.batch_execute("ROLLBACK").unwrap();
    assert_eq!(second.join().unwrap().unwrap()["success"], true);
    assert_in_step(&mut first);
}

#[test]
fn lock_timeout_ends_the_wait_and_leaves_nothing_behind() {
    let (db, mut winner) = coordinated();
    winner.batch_execute("BEGIN").unwrap();
    granted(&mut winner, "SD-1", "s1");
    let mut loser = db.connect();
    loser.batch_execute("SET lock_timeout = '20ms'").unwrap();
    let error = loser.query_one("SELECT claim_sd('SD-1', 's2')", &[]).unwrap_err();
    assert_eq!(sqlstate(&error), "55P03");
    winner.batch_execute("COMMIT").unwrap();
    assert_eq!(events(&mut winner, "s2"), ["registered"]);
    assert_in_step(&mut winner);
}

#[test]
fn cancelling_ends_the_wait_and_leaves_nothing_behind() {
    let (db, mut winner) = coordinated();
    winner.batch_execute("BEGIN").unwrap();
    granted(&mut winner, "SD-1", "s1");
    let (pid, loser) = blocked_claim(&db, "SD-1", "s2");
    winner.execute("SELECT pg_cancel_backend($1)", &[&pid]).unwrap();
    assert_eq!(sqlstate(&loser.join().unwrap().unwrap_err()), "57014");
    winner.batch_execute("COMMIT").unwrap();
    assert_eq!(events(&mut winner, "s2"), ["registered"]);
    assert_in_step(&mut winner);
}

#[test]
fn the_loser_of_an_open_race_can_go_on_beating_and_keeps_what_it_holds() {
    let (db, mut winner) = coordinated();
    let held = granted(&mut winner, "SD-2", "s2");
    winner.batch_execute("BEGIN").unwrap();
    granted(&mut winner, "SD-1", "s1");
    let (_, loser) = blocked_claim(&db, "SD-1", "s2");
    // From another connection, as a heartbeat does; it must not wait for the claim's wait.
    let mut other = db.connect();
    other.batch_execute("SET lock_timeout = '1ms'").unwrap();
    assert_eq!(beat(&mut other, "s2")["claim_id"], held);
    winner.batch_execute("COMMIT").unwrap();
    assert_eq!(loser.join().unwrap().unwrap()["claimed_by"], "s1");
    assert_eq!(beat(&mut winner, "s2")["claim_id"], held);
}

#[test]
fn a_refusal_by_a_live_owner_waits_for_nobody() {
    let (db, mut owner) = coordinated();
    granted(&mut owner, "SD-1", "s1");
    // The owner's session row and the SD's row are both locked by open work.
    owner
        .batch_execute(
            "BEGIN; UPDATE claude_sessions SET metadata = '{}' WHERE session_id = 's1';
             UPDATE strategic_directives_v2 SET title = 'edited' WHERE sd_id = 'SD-1'",
        )
        .unwrap();
    let mut other = db.connect();
    other.batch_execute("SET lock_timeout = '1ms'").unwrap();
    assert_eq!(claim(&mut other, "SD-1", "s2")["claimed_by"], "s1");
    assert_eq!(count(&mut other, "SELECT count(*) FROM v_active_sessions"), 3);
    owner.batch_execute("ROLLBACK").unwrap();
}

#[test]
fn a_heartbeat_that_commits_first_wins_against_a_takeover() {
    let (db, mut owner) = coordinated();
    let held = granted(&mut owner, "SD-1", "s1");
    age_heartbeat(&mut owner, "s1", "10 minutes");
    owner.batch_execute("BEGIN").unwrap();
    assert_eq!(beat(&mut owner, "s1")["claim_id"], held);
    let (_, taker) = blocked_claim(&db, "SD-1", "s2");
    owner.batch_execute("COMMIT").unwrap();
    assert_eq!(taker.join().unwrap().unwrap()["claimed_by"], "s1");
    assert_eq!(beat(&mut owner, "s1")["claim_id"], held);
    assert_in_step(&mut owner);
}

#[test]
fn a_heartbeat_that_rolls_back_does_not_save_the_claim() {
    let (db, mut owner) = coordinated();
    granted(&mut owner, "SD-1", "s1");
    age_heartbeat(&mut owner, "s1", "10 minutes");
    owner.batch_execute("BEGIN").unwrap();
    beat(&mut owner, "s1");
    let (_, taker) = blocked_claim(&db, "SD-1", "s2");
    owner.batch_execute("ROLLBACK").unwrap();
    let answer = taker.join().unwrap().unwrap();
    assert_eq!(answer["took_over"]["session_id"], "s1", "{answer}");
    assert_in_step(&mut owner);
}

#[test]
fn a_claim_waits_for_an_open_completion_and_is_then_refused() {
    let (db, mut finisher) = coordinated();
    finisher
        .batch_execute(
            "BEGIN; UPDATE strategic_directives_v2 SET status = 'completed' WHERE sd_id = 'SD-1'",
        )
        .unwrap();
    let (_, claimer) = blocked_claim(&db, "SD-1", "s1");
    finisher.batch_execute("COMMIT").unwrap();
    assert_eq!(claimer.join().unwrap().unwrap()["error"], "sd_terminal_status");
    assert_in_step(&mut finisher);
}

#[test]
fn a_claim_waits_for_an_open_deletion_and_is_then_refused() {
    let (db, mut deleter) = coordinated();
    deleter
        .batch_execute("BEGIN; DELETE FROM strategic_directives_v2 WHERE sd_id = 'SD-1'")
        .unwrap();
    let (_, claimer) = blocked_claim(&db, "SD-1", "s1");
    deleter.batch_execute("COMMIT").unwrap();
    assert_eq!(claimer.join().unwrap().unwrap()["error"], "sd_not_found");
    assert_in_step(&mut deleter);
}

#[test]
fn a_claim_that_waited_does_not_go_to_a_session_that_ended_meanwhile() {
    let (db, mut first) = coordinated();
    first.batch_execute("BEGIN").unwrap();
    granted(&mut first, "SD-1", "s1");
    let (_, second) = blocked_claim(&db, "SD-1", "s2");
    let mut other = db.connect();
    json(&mut other, "SELECT end_session('s2')", &[]);
    first.batch_execute("ROLLBACK").unwrap();
    assert_eq!(second.join().unwrap().unwrap()["error"], "session_released");
    assert_in_step(&mut first);
}

#[test]
fn a_session_that_claims_twice_at_once_holds_one_sd() {
    let (db, mut first) = coordinated();
    first.batch_execute("BEGIN").unwrap();
    granted(&mut first, "SD-1", "s1");
    // The same session by another connection: its row is being written.
    let (_, second) = blocked_claim(&db, "SD-2", "s1");
    first.batch_execute("COMMIT").unwrap();
    let answer = second.join().unwrap().unwrap();
    assert_eq!(answer["success"], true, "{answer}");
    assert_eq!(answer["released_sd"], "SD-1", "{answer}");
    assert_in_step(&mut first);
    assert_eq!(count(&mut first, "SELECT count(*) FROM sd_claims"), 2);
}

#[test]
fn a_release_that_waited_leaves_a_newer_claim_alone() {
    let (db, mut first) = coordinated();
    let old = granted(&mut first, "SD-1", "s1");
    first.batch_execute("BEGIN").unwrap();
    let new = granted(&mut first, "SD-2", "s1");
    // Found SD-1, as that is what is committed, and waits for it.
    let (_, late) = blocked(&db, |client| release(client, "s1"));
    first.batch_execute("COMMIT").unwrap();
    let answer = late.join().unwrap();
    assert_eq!(answer["error"], "claim_lost", "{answer}");
    assert_eq!(answer["claim_id"], old);
    assert_eq!(answer["lost_claim"]["reason"], "switched");
    assert_eq!(beat(&mut first, "s1")["claim_id"], new);
    assert_in_step(&mut first);
}

#[test]
fn a_write_by_hand_waits_for_an_open_claim_and_is_refused_naming_its_owner() {
    let (db, mut winner) = coordinated();
    winner.batch_execute("BEGIN").unwrap();
    granted(&mut winner, "SD-1", "s1");
    let (_, by_hand) = blocked(&db, |client| {
        client.batch_execute("UPDATE claude_sessions SET sd_id = 'SD-1' WHERE session_id = 's2'")
    });
    winner.batch_execute("COMMIT").unwrap();
    let error = by_hand.join().unwrap().unwrap_err();
    assert_eq!(sqlstate(&error), "23505");
    assert!(pg_claims_tests::detail(&error).contains("\"s1\""));
    assert_in_step(&mut winner);
}

#[test]
fn binding_keeps_claims_out_but_not_heartbeats() {
    let (db, mut binder) = coordinated();
    let held = granted(&mut binder, "SD-1", "s1");
    binder
        .batch_execute(
            "CREATE TABLE mine (key text PRIMARY KEY, is_working_on boolean);
             INSERT INTO mine SELECT sd_id FROM strategic_directives_v2;
             BEGIN; SELECT bind_directives('mine', '{key}')",
        )
        .unwrap();
    let mut other = db.connect();
    other.batch_execute("SET lock_timeout = '1ms'").unwrap();
    assert_eq!(beat(&mut other, "s1")["claim_id"], held);
    let (_, claimer) = blocked_claim(&db, "SD-2", "s2");
    binder.batch_execute("COMMIT").unwrap();
    // The claim that waited lands in the backlog that was bound meanwhile.
    assert_eq!(claimer.join().unwrap().unwrap()["success"], true);
    assert_eq!(
        value(
            &mut binder,
            "SELECT string_agg(key, ',' ORDER BY key) FROM mine WHERE is_working_on"
        )
        .as_deref(),
        Some("SD-1,SD-2")
    );
    assert_in_step(&mut binder);
}

#[test]
fn a_claim_that_waited_for_a_binding_knows_the_sds_of_the_new_backlog() {
    let (db, mut binder) = coordinated();
    binder
        .batch_execute(
            "CREATE TABLE mine (key text PRIMARY KEY, is_working_on boolean);
             INSERT INTO mine VALUES ('M-1');
             BEGIN; SELECT bind_directives('mine', '{key}')",
        )
        .unwrap();
    let (_, claimer) = blocked_claim(&db, "M-1", "s2");
    binder.batch_execute("COMMIT").unwrap();
    let answer = claimer.join().unwrap().unwrap();
    assert_eq!(answer["success"], true, "{answer}");
    assert_in_step(&mut binder);
}

#[test]
fn a_catalogue_that_changes_while_the_mirror_is_written_is_read_with_the_extension_s_rights() {
    let (db, mut c) = coordinated();
    let tenant = db.role("tenant");
    c.batch_execute(&format!(
        "CREATE TABLE theirs (key text PRIMARY KEY, title text, is_working_on boolean);
         INSERT INTO theirs VALUES ('A');
         ALTER TABLE theirs OWNER TO {tenant};
         SELECT bind_directives('theirs', '{{key}}')"
    ))
    .unwrap();
    granted(&mut c, "A", "s1");
    // The mirror is right already, so that no trigger of the extension's comes to read the catalogue.
    c.batch_execute(
        "SET session_replication_role = replica; UPDATE theirs SET is_working_on = false;
         RESET session_replication_role",
    )
    .unwrap();
    let mut changer = db.connect();
    // Lets rows be locked, and not written.
    changer.batch_execute("BEGIN; CREATE INDEX ON theirs (title)").unwrap();
    let (_, released) = blocked(&db, |client| release(client, "s1"));
    changer.batch_execute("COMMIT").unwrap();
    assert_eq!(released.join().unwrap()["success"], true);
    assert_in_step(&mut c);
    c.batch_execute("SELECT unbind_directives(); DROP TABLE theirs").unwrap();
}

#[test]
fn nobody_is_evicted_for_a_claim_that_is_refused_in_the_end() {
    let (db, mut c) = coordinated();
    let held = granted(&mut c, "SD-1", "s1");
    age_heartbeat(&mut c, "s1", "1 hour");
    c.batch_execute("BEGIN").unwrap();
    json(&mut c, "SELECT end_session('s2')", &[]);
    let (_, taker) = blocked_claim(&db, "SD-1", "s2");
    c.batch_execute("COMMIT").unwrap();
    assert_eq!(taker.join().unwrap().unwrap()["error"], "session_released");
    assert_eq!(beat(&mut c, "s1")["claim_id"], held);
    assert_in_step(&mut c);
}

#[test]
fn a_column_that_changes_its_type_while_binding_waits_is_seen() {
    let (db, mut c) = coordinated();
    c.batch_execute("CREATE TABLE mine (key text PRIMARY KEY, status text); INSERT INTO mine VALUES ('M-1', 'open')")
        .unwrap();
    let mut changer = db.connect();
    changer.batch_execute("BEGIN; ALTER TABLE mine ALTER status TYPE char(10)").unwrap();
    let (_, binder) = blocked(&db, |client| {
        client.query("SELECT bind_directives('mine', '{key}')", &[]).map(|_| ())
    });
    changer.batch_execute("COMMIT").unwrap();
    assert_eq!(sqlstate(&binder.join().unwrap().unwrap_err()), "42804");
}

#[test]
fn a_lock_that_was_waited_for_may_come_with_a_changed_catalogue() {
    let (db, mut c) = coordinated();
    let tenant = db.role("tenant");
    c.batch_execute(&format!(
        "CREATE TABLE theirs (key text PRIMARY KEY, is_working_on boolean);
         INSERT INTO theirs VALUES ('A'), ('B');
         ALTER TABLE theirs OWNER TO {tenant};
         SELECT bind_directives('theirs', '{{key}}')"
    ))
    .unwrap();
    granted(&mut c, "A", "s1");
    let mut changer = db.connect();
    changer
        .batch_execute("BEGIN; LOCK TABLE theirs IN EXCLUSIVE MODE; CREATE INDEX ON claude_sessions (hostname)")
        .unwrap();
    let (_, switch) = blocked_claim(&db, "B", "s1");
    changer.batch_execute("COMMIT").unwrap();
    assert_eq!(switch.join().unwrap().unwrap()["released_sd"], "A");
    assert_in_step(&mut c);
    // The table must go before its owner can.
    c.batch_execute("SELECT unbind_directives()").unwrap_err();
    release(&mut c, "s1");
    c.batch_execute("SELECT unbind_directives(); DROP TABLE theirs").unwrap();
}

#[test]
fn an_sd_that_was_replaced_while_a_claim_waited_is_locked_like_any_other() {
    let (db, mut c) = coordinated();
    json(&mut c, "SELECT declare_conflict('SD-1', 'SD-2', 'files')", &[]);
    let mut replacer = db.connect();
    replacer
        .batch_execute(
            "BEGIN; DELETE FROM strategic_directives_v2 WHERE sd_id = 'SD-1';
             INSERT INTO strategic_directives_v2 (sd_id, title) VALUES ('SD-1', 'another')",
        )
        .unwrap();
    // Another SD that must not be worked on at once is being claimed, so that the claim waits once more after its lock.
    let mut opponent = db.connect();
    opponent.batch_execute("BEGIN").unwrap();
    granted(&mut opponent, "SD-2", "s2");
    let (pid, claimer) = blocked_claim(&db, "SD-1", "s1");
    replacer.batch_execute("COMMIT").unwrap();
    let opponent_pid = backend_pid(&mut opponent);
    pg_claims_tests::wait_until("the claim to wait for the other one", || {
        c.query_one("SELECT $2 = ANY (pg_blocking_pids($1))", &[&pid, &opponent_pid])
            .unwrap()
            .get(0)
    });
    let mut finisher = db.connect();
    finisher.batch_execute("SET lock_timeout = '20ms'").unwrap();
    let error = finisher
        .batch_execute(
            "UPDATE strategic_directives_v2 SET status = 'completed' WHERE sd_id = 'SD-1'",
        )
        .unwrap_err();
    assert_eq!(sqlstate(&error), "55P03", "the SD is not locked");
    opponent.batch_execute("ROLLBACK").unwrap();
    assert_eq!(claimer.join().unwrap().unwrap()["success"], true);
    assert_in_step(&mut c);
}

#[test]
fn binding_another_table_and_releasing_do_not_deadlock() {
    let (db, mut c) = coordinated();
    c.batch_execute(
        "CREATE TABLE one (key text PRIMARY KEY, is_working_on boolean);
         CREATE TABLE two (key text PRIMARY KEY, is_working_on boolean);
         INSERT INTO one VALUES ('A'); INSERT INTO two VALUES ('A');
         SELECT bind_directives('one', '{key}')",
    )
    .unwrap();
    granted(&mut c, "A", "s1");
    let mut reader = db.connect();
    reader.batch_execute("BEGIN; SELECT FROM two").unwrap();
    let (_, binder) =
        blocked(&db, |client| client.batch_execute("SELECT bind_directives('two', '{key}')"));
    let (_, releaser) = blocked(&db, |client| release(client, "s1"));
    reader.batch_execute("COMMIT").unwrap();
    binder.join().unwrap().unwrap();
    assert_eq!(releaser.join().unwrap()["success"], true);
    assert_in_step(&mut c);
}

#[test]
fn a_claim_begins_after_the_session_s_last_one_ended_whatever_came_in_between() {
    let (db, mut c) = coordinated();
    // Between saying when it begins and giving it to its session.
    c.batch_execute(
        "CREATE FUNCTION pause() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
           IF NEW.sd_id = 'SD-2' THEN PERFORM pg_advisory_xact_lock(77); END IF;
           RETURN NEW; END $$;
         CREATE TRIGGER pause BEFORE INSERT ON sd_claims FOR EACH ROW EXECUTE FUNCTION pause()",
    )
    .unwrap();
    let mut holder = db.connect();
    holder.batch_execute("SELECT pg_advisory_lock(77)").unwrap();
    let mut claiming = db.connect();
    let pid = backend_pid(&mut claiming);
    let claim = std::thread::spawn(move || granted(&mut claiming, "SD-2", "s1"));
    wait_until_blocked(&db, pid);
    granted(&mut c, "SD-3", "s1");
    release(&mut c, "s1");
    holder.batch_execute("SELECT pg_advisory_unlock(77)").unwrap();
    claim.join().unwrap();
    let overlapping = "SELECT count(*) FROM sd_claims a JOIN sd_claims b USING (session_id)
                        WHERE a.claim_id <> b.claim_id AND a.claimed_at <= b.claimed_at
                          AND b.claimed_at < COALESCE(a.released_at, 'infinity')";
    assert_eq!(count(&mut c, overlapping), 0);
    assert_in_step(&mut c);
}
