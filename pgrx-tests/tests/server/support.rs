//! What most tests begin with.

use pg_claims_tests::{Server, TestDb, contradictions, json, own_server};
use postgres::{Client, NoTls};
use serde_json::Value;

/// A database with the backlog `SD-1` … `SD-9` and the sessions `s1` … `s3`, none of which has told
/// anything about itself.
pub fn coordinated() -> (TestDb, Client) {
    let db = TestDb::new();
    let mut client = db.connect();
    backlog(&mut client);
    for session in ["s1", "s2", "s3"] {
        register(&mut client, session);
    }
    (db, client)
}

/// The same on a server of its own, without `s3`.
pub fn coordinated_server(name: &str, settings: &[&str]) -> (Server, Client) {
    let server = own_server(name, settings);
    let mut client = connect_to(&server);
    client.batch_execute("CREATE EXTENSION pg_claims").unwrap();
    backlog(&mut client);
    for session in ["s1", "s2"] {
        register(&mut client, session);
    }
    (server, client)
}

/// A connection to a server's own database.
pub fn connect_to(server: &Server) -> Client {
    server.config("postgres").connect(NoTls).unwrap()
}

/// SDs `SD-1` … `SD-9` in the extension's own backlog.
pub fn backlog(client: &mut Client) {
    client
        .batch_execute(
            "INSERT INTO strategic_directives_v2 (sd_id, title)
             SELECT 'SD-' || n, 'Directive ' || n FROM generate_series(1, 9) n",
        )
        .unwrap();
}

pub fn register(client: &mut Client, session: &str) -> Value {
    json(client, "SELECT register_session($1)", &[&session])
}

pub fn claim(client: &mut Client, sd: &str, session: &str) -> Value {
    json(client, "SELECT claim_sd($1, $2)", &[&sd, &session])
}

pub fn release(client: &mut Client, session: &str) -> Value {
    json(client, "SELECT release_sd($1)", &[&session])
}

pub fn beat(client: &mut Client, session: &str) -> Value {
    json(client, "SELECT update_session_heartbeat($1)", &[&session])
}

/// Claims and returns the fencing token.
pub fn granted(client: &mut Client, sd: &str, session: &str) -> i64 {
    let answer = claim(client, sd, session);
    assert_eq!(answer["success"], true, "{answer}");
    answer["claim_id"].as_i64().unwrap()
}

/// Makes a session's last heartbeat that much older.
pub fn age_heartbeat(client: &mut Client, session: &str, by: &str) {
    let updated = client
        .execute(
            "UPDATE claude_sessions SET heartbeat_at = heartbeat_at - $2::text::interval
              WHERE session_id = $1",
            &[&session, &by],
        )
        .unwrap();
    assert_eq!(updated, 1);
}

/// Runs `sql` as a replica: none of the triggers fires but those that always do.
pub fn as_replica(client: &mut Client, sql: &str) {
    client
        .batch_execute(&format!(
            "SET session_replication_role = replica; {sql}; RESET session_replication_role"
        ))
        .unwrap();
}

/// A trigger of the user's that does not let the SD go.
pub fn refuse_release_of(client: &mut Client, sd: &str) {
    let when = format!("OLD.sd_id = '{sd}' AND NOT NEW.is_working_on");
    refuse(client, "this SD stays taken", "strategic_directives_v2", &when);
}

/// A trigger of the user's that keeps a session's row from being written.
pub fn refuse_writes_of(client: &mut Client, session: &str) {
    refuse(client, "not this one", "claude_sessions", &format!("OLD.session_id = '{session}'"));
}

fn refuse(client: &mut Client, message: &str, table: &str, when: &str) {
    client
        .batch_execute(&format!(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN RAISE EXCEPTION '{message}'; END $$;
             CREATE TRIGGER refuse BEFORE UPDATE ON {table} FOR EACH ROW
             WHEN ({when}) EXECUTE FUNCTION refuse()"
        ))
        .unwrap();
}

/// One value as text, NULL as `None`.
pub fn value(client: &mut Client, sql: &str) -> Option<String> {
    let row = client.query_one(&format!("SELECT ({sql})::text"), &[]).unwrap();
    row.get(0)
}

pub fn count(client: &mut Client, sql: &str) -> i64 {
    client.query_one(sql, &[]).unwrap().get(0)
}

/// The audit of a session: event types in order.
pub fn events(client: &mut Client, session: &str) -> Vec<String> {
    client
        .query(
            "SELECT event_type FROM session_lifecycle_events WHERE session_id = $1 ORDER BY event_id",
            &[&session],
        )
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect()
}

/// Asserts that sessions, claim history and backlog tell one story, whatever happened before.
pub fn assert_in_step(client: &mut Client) {
    let disagreements = contradictions(client).unwrap();
    assert!(disagreements.is_empty(), "{disagreements:#?}");
}

/// Whether a statement writes WAL, whichever functions and triggers do. Counted is what this
/// connection writes, not what others of the server do meanwhile.
pub fn writes_wal(c: &mut Client, sql: &str) -> bool {
    let plan = c.query(&format!("EXPLAIN (ANALYZE, WAL) {sql}"), &[]).unwrap();
    plan.iter().any(|row| row.get::<_, String>(0).contains("WAL:"))
}

/// How many pages a call reads, whichever functions and triggers do.
pub fn pages(c: &mut Client, call: &str) -> u64 {
    let plan =
        c.query(&format!("EXPLAIN (ANALYZE, BUFFERS, TIMING OFF) SELECT {call}"), &[]).unwrap();
    let lines: Vec<String> = plan.iter().map(|row| row.get(0)).collect();
    let buffers = lines.iter().map(|line| line.trim()).find(|line| line.starts_with("Buffers:"));
    let counts = buffers.unwrap_or_else(|| panic!("{lines:#?}"));
    ["hit=", "read="]
        .iter()
        .filter_map(|kind| {
            counts.split(kind).nth(1)?.split_whitespace().next()?.parse::<u64>().ok()
        })
        .sum()
}
