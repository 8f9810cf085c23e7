//! Every two verbs beside each other: who waits for whom, that nobody is ended by a deadlock, and that all tells one
//! story afterwards.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use pg_claims_tests::{TestDb, backend_pid, sqlstate};
use postgres::Client;

use crate::support::*;

/// A verb's name and its statement. Session s1 holds SD-1 and s2 SD-2; SD-8 is stopped, SD-6 and SD-7 are in
/// conflict. `{b}` is the backlog, `{k}` its key, `{held}` the claim on SD-1.
const VERBS: [(&str, &str); 28] = [
    ("claim", "SELECT claim_sd('SD-3', 's3')"),
    ("refused", "SELECT claim_sd('SD-1', 's3')"),
    ("next", "SELECT claim_next_sd('s3')"),
    ("switch", "SELECT claim_sd('SD-3', 's1')"),
    ("release", "SELECT release_sd('s1')"),
    ("end", "SELECT end_session('s1')"),
    ("takeover", "SELECT takeover_sd('SD-1', 's2', 'stuck')"),
    ("beat", "SELECT update_session_heartbeat('s1')"),
    ("beat all", "SELECT heartbeat_sessions('{s1,s2,s3}')"),
    ("extend", "SELECT extend_lease('s1', '10 minutes')"),
    ("progress", "SELECT report_progress('s1', 'half')"),
    ("register", "SELECT register_session('s1')"),
    ("assert", "SELECT assert_claim('SD-1', 's1', {held})"),
    ("hold", "SELECT hold_sd('SD-1', 'wait')"),
    ("unhold", "SELECT unhold_sd('SD-8')"),
    ("declare", "SELECT declare_conflict('SD-1', 'SD-3', 'same_files')"),
    ("resolve", "SELECT resolve_conflict('SD-6', 'SD-7')"),
    ("cleanup", "SELECT cleanup_stale_sessions()"),
    ("prune", "SELECT prune_history()"),
    ("complete", "UPDATE {b} SET status = 'completed' WHERE {k} = 'SD-1'"),
    ("delete", "DELETE FROM {b} WHERE {k} = 'SD-1'"),
    ("insert", "INSERT INTO {b} ({k}) VALUES ('SD-10')"),
    ("depend", "UPDATE {b} SET dependencies = '[\"SD-9\"]' WHERE {k} = 'SD-1'"),
    ("edit", "UPDATE {b} SET title = 'edited' WHERE {k} = 'SD-3'"),
    ("claim by hand", "UPDATE claude_sessions SET sd_id = 'SD-3' WHERE session_id = 's3'"),
    ("release by hand", "UPDATE claude_sessions SET sd_id = NULL WHERE session_id = 's1'"),
    ("delete session", "DELETE FROM claude_sessions WHERE session_id = 's1'"),
    (
        "look",
        "SELECT is_sd_claimed('SD-1'), (SELECT count(*) FROM v_active_sessions), (SELECT count(*) FROM v_sd_next)",
    ),
];

/// Who waits for an open transaction that has done the first one.
const WAITS: &str = "\
claim: claim, claim by hand, declare, edit, next, switch
next: claim, claim by hand, declare, edit, next, switch
switch: assert, beat, claim, claim by hand, complete, declare, delete, delete session, depend, edit, end, extend, hold, progress, register, release, release by hand, switch, takeover
release: assert, beat, complete, declare, delete, delete session, depend, end, extend, hold, progress, register, release, release by hand, switch, takeover
end: assert, beat, complete, declare, delete, delete session, depend, end, extend, hold, progress, register, release, release by hand, switch, takeover
takeover: assert, beat, complete, declare, delete, delete session, depend, end, extend, hold, progress, register, release, release by hand, switch, takeover
beat: beat, complete, delete, delete session, end, extend, progress, register, release, release by hand, switch, takeover
beat all: beat, claim, claim by hand, complete, delete, delete session, end, extend, next, progress, register, release, release by hand, switch, takeover
extend: beat, complete, delete, delete session, end, extend, progress, register, release, release by hand, switch, takeover
progress: beat, complete, delete, delete session, end, extend, progress, register, release, release by hand, switch, takeover
register: beat, complete, delete, delete session, end, extend, progress, register, release, release by hand, switch, takeover
assert: complete, delete, delete session, end, release, release by hand, switch, takeover
hold: complete, declare, delete, delete session, depend, end, hold, release, release by hand, switch, takeover
unhold: unhold
declare: claim, claim by hand, complete, declare, delete, delete session, depend, edit, end, hold, release, release by hand, switch, takeover
resolve: resolve
complete: assert, beat, complete, declare, delete, delete session, depend, end, extend, hold, progress, register, release, release by hand, switch, takeover
delete: assert, beat, complete, declare, delete, delete session, depend, end, extend, hold, progress, register, release, release by hand, switch, takeover
insert: insert
depend: complete, declare, delete, delete session, depend, end, hold, release, release by hand, switch, takeover
edit: claim, claim by hand, declare, edit, switch
claim by hand: claim, claim by hand, declare, edit, next, switch
release by hand: assert, beat, complete, declare, delete, delete session, depend, end, extend, hold, progress, register, release, release by hand, switch, takeover
delete session: assert, beat, complete, declare, delete, delete session, depend, end, extend, hold, progress, register, release, release by hand, switch, takeover
";

/// A transaction first runs one of `FIRST`. Then another connection runs one of `BESIDE`, and the transaction goes on.
const FIRST: [&str; 8] =
    ["assert", "extend", "register", "hold", "unhold", "declare", "claim", "claim by hand"];
const BESIDE: [&str; 11] = [
    "release",
    "end",
    "takeover",
    "switch",
    "next",
    "hold",
    "declare",
    "complete",
    "delete",
    "release by hand",
    "delete session",
];

/// A second step of the first transaction.
const SECOND: [(&str, &str); 4] = [
    ("release", "SELECT release_sd('s1')"),
    ("complete", "UPDATE {b} SET status = 'completed' WHERE {k} = 'SD-1'"),
    ("switch", "SELECT claim_sd('SD-4', 's1')"),
    ("beat", "SELECT update_session_heartbeat('s1')"),
];

/// The two connections and what they work on.
struct Stage {
    db: TestDb,
    observer: Client,
    first: Client,
    second: Option<Client>,
    pid: i32,
    table: &'static str,
    key: &'static str,
    held: i64,
}

impl Stage {
    fn new(table: &'static str, key: &'static str, prepare: &str) -> Self {
        let (db, mut observer) = coordinated();
        observer.batch_execute(prepare).unwrap();
        let mut second = db.connect();
        let pid = backend_pid(&mut second);
        Self { first: db.connect(), second: Some(second), db, observer, pid, table, key, held: 0 }
    }

    fn text(&self, sql: &str) -> String {
        sql.replace("{b}", self.table)
            .replace("{k}", self.key)
            .replace("{held}", &self.held.to_string())
    }

    fn reset(&mut self) {
        let reset = self.text(
            "DELETE FROM {b}; DELETE FROM claude_sessions; DELETE FROM sd_holds; DELETE FROM sd_conflict_matrix;
             SET session_replication_role = replica;
             DELETE FROM sd_claims; DELETE FROM session_lifecycle_events; DELETE FROM lifecycle_event_positions;
             SET session_replication_role = origin;
             INSERT INTO {b} ({k}) SELECT 'SD-' || n FROM generate_series(1, 9) n;
             SELECT register_session('s1'), register_session('s2'), register_session('s3');
             SELECT hold_sd('SD-8', 'wait'), declare_conflict('SD-6', 'SD-7', 'same_files');
             SELECT claim_sd('SD-2', 's2')",
        );
        self.observer.batch_execute(&reset).unwrap();
        self.held = granted(&mut self.observer, "SD-1", "s1");
    }

    /// Does `one` in an open transaction, `other` beside it, then `steps` in the first one and its end. Returns
    /// whether the other waited, and what became of both.
    fn draw(
        &mut self,
        level: &str,
        one: &str,
        other: &str,
        step: Option<&str>,
    ) -> (bool, Result<(), postgres::Error>, Result<(), postgres::Error>) {
        self.reset();
        let one = self.text(one);
        self.first.batch_execute(&format!("BEGIN ISOLATION LEVEL {level}; {one}")).unwrap();
        let mut second = self.second.take().unwrap();
        let other = format!("BEGIN ISOLATION LEVEL {level}; {}; COMMIT", self.text(other));
        let done = std::sync::Arc::new(AtomicBool::new(false));
        let is_done = done.clone();
        let beside = thread::spawn(move || {
            let outcome = second.batch_execute(&other);
            is_done.store(true, Ordering::Release);
            second.batch_execute("ROLLBACK").unwrap();
            (second, outcome)
        });
        let is_blocked = "SELECT cardinality(pg_blocking_pids($1)) > 0";
        let waits = loop {
            if done.load(Ordering::Acquire) {
                break false;
            }
            if self.observer.query_one(is_blocked, &[&self.pid]).unwrap().get(0) {
                break true;
            }
            thread::sleep(Duration::from_micros(300));
        };
        let step = step.map(|step| self.text(step) + ";").unwrap_or_default();
        let finished = self.first.batch_execute(&format!("{step} COMMIT"));
        self.first.batch_execute("ROLLBACK").unwrap();
        let (second, outcome) = beside.join().unwrap();
        self.second = Some(second);
        (waits, finished, outcome)
    }
}

/// Whether the reference names this error for the verb. It does where the session does not hold the claim any more, where a
/// write by hand comes too late, and where a kept snapshot is too old.
fn is_documented(outcome: &Result<(), postgres::Error>, level: &str, verb: &str) -> bool {
    let Err(error) = outcome else { return true };
    match sqlstate(error) {
        "55000" => verb == "assert" || verb == "claim by hand",
        "23503" | "23514" => verb == "claim by hand",
        "23505" => verb == "claim by hand" || verb == "insert",
        "40001" => level != "READ COMMITTED",
        _ => false,
    }
}

fn draw_all(stage: &mut Stage, level: &str) -> String {
    let mut waits = String::new();
    for (one, statement) in VERBS {
        let mut waiting = BTreeSet::new();
        for (other, beside) in VERBS {
            let (has_waited, finished, outcome) = stage.draw(level, statement, beside, None);
            assert!(finished.is_ok(), "{level}: {one}, then {other}: {finished:?}");
            assert!(
                is_documented(&outcome, level, other),
                "{level}: {other} beside {one}: {outcome:?}"
            );
            assert_in_step(&mut stage.observer);
            if has_waited {
                waiting.insert(other);
            }
        }
        if !waiting.is_empty() {
            let waiting: Vec<&str> = waiting.into_iter().collect();
            waits += &format!("{one}: {}\n", waiting.join(", "));
        }
    }
    waits
}

#[test]
fn every_two_verbs_can_be_drawn_against_each_other() {
    let mut stage = Stage::new("strategic_directives_v2", "sd_id", "");
    let waits = draw_all(&mut stage, "READ COMMITTED");
    assert_eq!(waits, WAITS, "{waits}");
    drop(stage.db);
}

const BOUND: &str =
    "CREATE TABLE mine (key text PRIMARY KEY, title text, status text, dependencies jsonb,
                                        is_working_on boolean, active_session_id text);
                     INSERT INTO mine SELECT 'SD-' || n FROM generate_series(1, 9) n;
                     SELECT bind_directives('mine', '{key}')";

#[test]
fn so_they_can_on_a_bound_backlog() {
    let mut stage = Stage::new("mine", "key", BOUND);
    let waits = draw_all(&mut stage, "READ COMMITTED");
    assert_eq!(waits, WAITS, "{waits}");
}

#[test]
fn so_they_can_under_a_snapshot() {
    let mut stage = Stage::new("strategic_directives_v2", "sd_id", "");
    draw_all(&mut stage, "REPEATABLE READ");
}

#[test]
fn a_transaction_can_go_on_after_others_have_begun_to_wait_for_it() {
    for (table, key, prepare) in [("strategic_directives_v2", "sd_id", ""), ("mine", "key", BOUND)]
    {
        let mut stage = Stage::new(table, key, prepare);
        for (one, statement) in VERBS.into_iter().filter(|(name, _)| FIRST.contains(name)) {
            for (step, then) in SECOND {
                for (other, beside) in VERBS.into_iter().filter(|(name, _)| BESIDE.contains(name)) {
                    let (has_waited, finished, outcome) =
                        stage.draw("READ COMMITTED", statement, beside, Some(then));
                    let what = format!("{table}: {one}, then {step}, beside {other}");
                    for outcome in [&finished, &outcome] {
                        let code = outcome.as_ref().err().map(sqlstate);
                        // Each may need a row that the other one has locked: then one of them gives way, with 40001.
                        let is_fine = code.is_none() || has_waited && code == Some("40001");
                        assert!(
                            is_fine || is_documented(outcome, "READ COMMITTED", other),
                            "{what}: {outcome:?}"
                        );
                    }
                    assert!(one != "assert" || finished.is_ok(), "{what}: {finished:?}");
                    assert_in_step(&mut stage.observer);
                }
            }
        }
    }
}
