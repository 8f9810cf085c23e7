//! Plans are kept, and read by index.

use std::sync::{Arc, Mutex};

use pg_claims_tests::{TestDb, json};
use postgres::{Client, NoTls};

use crate::support::*;

const ROWS: i64 = 100_000;

/// Conflicts and stop signs of other SDs: of an empty table no index is worth its while.
const OTHERS: &str = "
    INSERT INTO sd_holds (sd_id, reason, held_by) SELECT 'Z-' || n, 'why', 'who' FROM generate_series(1, 10000) n;
    INSERT INTO sd_conflict_matrix (sd_id_a, sd_id_b, conflict_type, declared_by)
    SELECT 'Y-' || n, 'Z-' || n, 'kind', 'who' FROM generate_series(1, 10000) n;";

fn crowded() -> (TestDb, Client) {
    let db = TestDb::new();
    let mut c = db.connect();
    // As restored from a dump, so that filling does not take minutes.
    c.batch_execute(&format!(
        "SET check_function_bodies = off; SET row_security = off; SET client_min_messages = warning;
         INSERT INTO strategic_directives_v2 (sd_id, title, is_working_on, active_session_id, created_at)
         SELECT 'SD-' || n, 'Directive ' || n, n % 2 = 0, CASE WHEN n % 2 = 0 THEN 'session-' || n END, now() - interval '1 day'
           FROM generate_series(1, {ROWS}) n;
         INSERT INTO sd_claims (claim_id, sd_id, session_id, claimed_at)
         SELECT n, 'SD-' || n, 'session-' || n, now() - interval '1 day' FROM generate_series(2, {ROWS}, 2) n;
         SELECT setval('sd_claims_claim_id_seq', {ROWS});
         INSERT INTO claude_sessions (session_id, sd_id, claim_id, claimed_at, status, created_at)
         SELECT 'session-' || n, CASE WHEN n % 2 = 0 THEN 'SD-' || n END, CASE WHEN n % 2 = 0 THEN n END,
                CASE WHEN n % 2 = 0 THEN now() - interval '1 day' END,
                CASE WHEN n % 2 = 0 THEN 'active' ELSE 'idle' END, now() - interval '1 day'
           FROM generate_series(1, {ROWS}) n;
         {OTHERS}
         RESET check_function_bodies; RESET row_security; RESET client_min_messages;
         ANALYZE"
    ))
    .unwrap();
    (db, c)
}

/// A connection that hears of every plan the server makes, whichever function or trigger runs it.
pub struct Planner {
    client: Client,
    heard: Arc<Mutex<Vec<String>>>,
    /// The extension's tables and the backlog, as a plan names them.
    relations: Vec<String>,
}

impl Planner {
    /// `mode` is the server's plan_cache_mode: `force_custom_plan` plans each statement each time it
    /// runs, `force_generic_plan` and `auto` plan for all parameters and keep that.
    pub fn new(db: &TestDb, mode: &str, backlog: &str) -> Self {
        let heard = Arc::new(Mutex::new(Vec::new()));
        let hearing = Arc::clone(&heard);
        let mut client = db
            .config()
            .notice_callback(move |notice| {
                // The server breaks the text into lines wherever they are full.
                let words: Vec<_> =
                    notice.detail().unwrap_or_default().split_whitespace().collect();
                hearing.lock().unwrap().push(words.join(" "));
            })
            .connect(NoTls)
            .unwrap();
        let tables = ["claude_sessions", "sd_claims", "session_lifecycle_events", backlog];
        let relations = tables
            .iter()
            .map(|table| {
                let oid = value(&mut client, &format!("SELECT '{table}'::regclass::oid")).unwrap();
                format!(":relid {oid} ")
            })
            .collect();
        // Learns where the extension is, which is not part of a call's own cost.
        client.batch_execute("SELECT is_sd_claimed('no such SD')").unwrap();
        client
            .batch_execute(&format!(
                "SET plan_cache_mode = {mode}; SET debug_pretty_print = off; SET client_min_messages = log;
                 SET debug_print_plan = on"
            ))
            .unwrap();
        Self { client, heard, relations }
    }

    /// The plans that the server makes for `sql`, of statements on the tables that matter.
    pub fn plans_of(&mut self, sql: &str) -> Vec<String> {
        self.heard.lock().unwrap().clear();
        self.client.simple_query(sql).unwrap();
        let mut plans = self.heard.lock().unwrap().clone();
        plans.retain(|plan| self.relations.iter().any(|relation| plan.contains(relation)));
        plans
    }
}

/// The calls of the claim path, each with the number of statements that the extension runs on its tables for it.
const CALLS: [(&str, usize); 14] = [
    ("SELECT claim_sd('SD-2', 'session-1')", 0),
    ("SELECT claim_sd('SD-1', 'session-1')", 0),
    // Claiming again is a heartbeat.
    ("SELECT claim_sd('SD-1', 'session-1')", 0),
    // A switch also closes the old one, and its mirror.
    ("SELECT claim_sd('SD-3', 'session-1')", 0),
    ("SELECT update_session_heartbeat('session-1')", 0),
    ("SELECT release_sd('session-1')", 0),
    ("SELECT is_sd_claimed('SD-2')", 0),
    ("SELECT claim_next_sd('session-1')", 0),
    ("SELECT release_sd('session-1')", 0),
    ("SELECT register_session('session-1')", 1),
    ("UPDATE strategic_directives_v2 SET status = 'completed' WHERE sd_id = 'SD-4'", 1),
    ("SELECT * FROM v_active_sessions WHERE sd_id = 'SD-2'", 1),
    ("SELECT * FROM v_active_sessions WHERE session_id = 'session-2'", 1),
    ("SELECT end_session('session-6')", 1),
];

#[test]
fn the_claim_path_reads_by_index_and_runs_no_more_statements_than_it_needs() {
    let (db, _c) = crowded();
    let mut counts = Vec::new();
    for mode in ["force_custom_plan", "force_generic_plan"] {
        // A transaction that is rolled back, so that both modes see the same.
        let mut planner = Planner::new(&db, mode, "strategic_directives_v2");
        planner.client.batch_execute("BEGIN").unwrap();
        for (call, statements) in CALLS {
            let plans = planner.plans_of(call);
            for plan in &plans {
                assert!(!plan.contains("{SEQSCAN"), "{mode}: {call}:\n{plan}");
            }
            if mode == "force_custom_plan" {
                counts.push((call, plans.len(), statements));
            }
        }
        planner.client.batch_execute("ROLLBACK").unwrap();
    }
    counts.retain(|(_, ran, needed)| ran != needed);
    assert!(counts.is_empty(), "statements that ran, and that are needed: {counts:#?}");
}

#[test]
fn hot_statements_run_on_kept_plans() {
    let (db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    let mut planner = Planner::new(&db, "auto", "strategic_directives_v2");
    let calls = [
        "SELECT register_session('s2')",
        "SELECT extend_lease('s2', '1 minute')",
        "SELECT report_progress('s2', 'further')",
    ];
    // The first executions the server plans for their own parameters, to compare; then it keeps
    // one plan for all.
    let plans = |planner: &mut Planner| -> Vec<String> {
        calls.iter().flat_map(|call| planner.plans_of(call)).collect()
    };
    assert!(!plans(&mut planner).is_empty());
    for _ in 0..10 {
        plans(&mut planner);
    }
    let again = plans(&mut planner);
    assert!(again.is_empty(), "planned for each call:\n{}", again.join("\n\n"));
}

#[test]
fn within_a_transaction_the_catalogue_is_asked_once_and_not_by_each_call() {
    const CYCLES: i64 = 20;
    let (_db, mut c) = coordinated();
    let cycle = |c: &mut Client| {
        granted(c, "SD-1", "s1");
        assert_eq!(claim(c, "SD-1", "s2")["error"], "already_claimed");
        beat(c, "s1");
        release(c, "s1");
        assert_eq!(json(c, "SELECT claim_next_sd('s2')", &[])["success"], true);
        release(c, "s2");
    };
    let scans = |c: &mut Client| {
        count(c, "SELECT sum(seq_scan + idx_scan)::bigint FROM pg_stat_xact_sys_tables")
    };
    // The counts are those of one transaction. Plans are kept from the sixth time on.
    c.batch_execute("BEGIN").unwrap();
    for _ in 0..10 {
        cycle(&mut c);
    }
    assert!(scans(&mut c) > CYCLES, "nothing is counted");
    // What others do meanwhile may make every connection look anew, but not each time.
    let mut asked = (0..50).map(|_| {
        let before = scans(&mut c);
        let own = scans(&mut c) - before;
        for _ in 0..CYCLES {
            cycle(&mut c);
        }
        scans(&mut c) - before - 2 * own
    });
    assert!(asked.any(|times| times == 0), "the catalogue is asked by each call");
}

#[test]
fn a_uuid_key_and_an_alias_are_found_by_index() {
    let (db, mut c) = coordinated();
    c.batch_execute(&format!(
        "CREATE TABLE jobs (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), legacy_id varchar(40), is_working_on boolean);
         INSERT INTO jobs (legacy_id) SELECT 'L-' || n FROM generate_series(1, {ROWS}) n;
         {OTHERS}
         SELECT bind_directives('jobs', '{{id,legacy_id}}');
         ANALYZE"
    ))
    .unwrap();
    let id = value(&mut c, "SELECT id FROM jobs WHERE legacy_id = 'L-77'").unwrap();
    let mut planner = Planner::new(&db, "force_custom_plan", "jobs");
    // Three sessions the server rightly reads as a whole; 100,000 jobs it must not.
    let jobs = planner.relations[3].clone();
    for call in [
        "SELECT claim_sd('L-77', 's1')".to_owned(),
        format!("SELECT claim_sd('{id}', 's2')"),
        "SELECT release_sd('s1')".into(),
        "SELECT claim_sd('L-99', 's1')".into(),
    ] {
        let plans = planner.plans_of(&call);
        assert!(!plans.is_empty());
        for plan in plans.iter().filter(|plan| plan.contains(&jobs)) {
            let scans = plan.matches("{SEQSCAN").count() + plan.matches("{BITMAPHEAPSCAN").count();
            let of_sessions = plan.matches(&planner.relations[0]).count();
            assert!(scans <= of_sessions, "{call}:\n{plan}");
        }
    }
    assert_in_step(&mut c);
}
