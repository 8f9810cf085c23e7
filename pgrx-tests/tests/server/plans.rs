//! Plans are kept, and read by index.

use std::sync::{Arc, Mutex};

use pg_claims_tests::TestDb;
use postgres::{Client, NoTls};

use crate::support::*;

const ROWS: i64 = 100_000;

fn crowded() -> (TestDb, Client) {
    let db = TestDb::new();
    let mut c = db.connect();
    // As restored from a dump, so that filling does not take minutes.
    c.batch_execute(&format!(
        "INSERT INTO strategic_directives_v2 (sd_id, title, is_working_on, active_session_id, created_at)
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
         ANALYZE"
    ))
    .unwrap();
    (db, c)
}

/// A connection that writes down the plan of every statement that its functions and triggers run.
struct Observed {
    client: Client,
    plans: Arc<Mutex<Vec<String>>>,
}

impl Observed {
    fn new(db: &TestDb) -> Self {
        let plans = Arc::new(Mutex::new(Vec::new()));
        let heard = Arc::clone(&plans);
        let mut client = db
            .config()
            .notice_callback(move |notice| heard.lock().unwrap().push(notice.message().to_owned()))
            .connect(NoTls)
            .unwrap();
        client
            .batch_execute(
                "LOAD 'auto_explain'; SET auto_explain.log_nested_statements = on;
                 SET auto_explain.log_level = 'notice'; SET auto_explain.log_min_duration = 0",
            )
            .unwrap();
        Self { client, plans }
    }

    /// The plans that `sql` runs.
    fn plans_of(&mut self, sql: &str) -> Vec<String> {
        self.plans.lock().unwrap().clear();
        self.client.simple_query(sql).unwrap();
        let mut plans = self.plans.lock().unwrap().clone();
        // Where the extension is, a backend reads once and after a change, not for every call.
        plans.retain(|plan| {
            !plan.contains("FROM pg_catalog.pg_") && !plan.contains("directive_binding")
        });
        plans
    }
}

#[test]
fn the_claim_path_reads_by_index() {
    let (db, _c) = crowded();
    let mut observed = Observed::new(&db);
    for (call, statements) in [
        // A refusal looks once.
        ("SELECT claim_sd('SD-2', 'session-1')", 1),
        // A claim looks, locks, looks again, opens, grants; history, audit and mirror follow.
        ("SELECT claim_sd('SD-1', 'session-1')", 7),
        ("SELECT claim_sd('SD-1', 'session-1')", 2),
        ("SELECT claim_sd('SD-3', 'session-1')", 9),
        ("SELECT update_session_heartbeat('session-1')", 1),
        ("SELECT release_sd('session-1')", 6),
        ("SELECT is_sd_claimed('SD-2')", 1),
        ("SELECT register_session('session-1')", 2),
        ("UPDATE strategic_directives_v2 SET status = 'completed' WHERE sd_id = 'SD-4'", 6),
        ("SELECT * FROM v_active_sessions WHERE sd_id = 'SD-2'", 0),
        ("SELECT * FROM v_active_sessions WHERE session_id = 'session-2'", 0),
        ("SELECT end_session('session-6')", 7),
    ] {
        let plans = observed.plans_of(call);
        for plan in &plans {
            assert!(!plan.contains("Seq Scan"), "{call}:\n{plan}");
        }
        // The call itself is a statement too.
        let nested = plans.len().saturating_sub(1);
        assert_eq!(nested, statements, "{call}:\n{}", plans.join("\n"));
    }
}

#[test]
fn plans_are_kept_for_all_parameters() {
    let (db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    let mut observed = Observed::new(&db);
    // From the sixth execution on the server may use one plan for all parameters.
    for _ in 0..5 {
        observed.plans_of("SELECT claim_sd('SD-1', 's2')");
    }
    let plans = observed.plans_of("SELECT claim_sd('SD-1', 's2')");
    let look = plans.iter().find(|plan| plan.contains("claude_sessions")).unwrap();
    assert!(look.contains("= $1"), "planned for one value only:\n{look}");
    assert!(!look.contains("'s2'::text") && !look.contains("'SD-1'"), "{look}");
}

#[test]
fn a_uuid_key_and_an_alias_are_found_by_index() {
    let (db, mut c) = coordinated();
    c.batch_execute(&format!(
        "CREATE TABLE jobs (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), legacy_id varchar(40), is_working_on boolean);
         INSERT INTO jobs (legacy_id) SELECT 'L-' || n FROM generate_series(1, {ROWS}) n;
         SELECT bind_directives('jobs', '{{id,legacy_id}}');
         ANALYZE"
    ))
    .unwrap();
    let id = value(&mut c, "SELECT id FROM jobs WHERE legacy_id = 'L-77'").unwrap();
    let mut observed = Observed::new(&db);
    for call in [
        "SELECT claim_sd('L-77', 's1')".to_owned(),
        format!("SELECT claim_sd('{id}', 's2')"),
        "SELECT release_sd('s1')".into(),
    ] {
        for plan in observed.plans_of(&call) {
            // Three sessions are read as a whole, rightly; 100,000 jobs must not be.
            assert!(!plan.contains("Seq Scan on jobs"), "{call}:\n{plan}");
        }
    }
    assert_in_step(&mut c);
}
