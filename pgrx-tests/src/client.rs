//! Talking to the server.

use std::thread;
use std::time::{Duration, Instant};

use postgres::Client;
use postgres::error::DbError;
use postgres::types::ToSql;
use serde_json::Value;

use crate::TestDb;

/// How long a condition is awaited before the test fails; far above what any takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// The one jsonb value that `sql` returns.
pub fn json(client: &mut Client, sql: &str, parameters: &[&(dyn ToSql + Sync)]) -> Value {
    match client.query_one(sql, parameters) {
        Ok(row) => row.get(0),
        Err(error) => panic!("{sql}: {error:?}"),
    }
}

fn reported(error: &postgres::Error) -> &DbError {
    error.as_db_error().unwrap_or_else(|| panic!("not an error of the server's: {error:?}"))
}

/// The five characters of the server's error.
pub fn sqlstate(error: &postgres::Error) -> &str {
    reported(error).code().code()
}

/// The server's message.
pub fn message(error: &postgres::Error) -> &str {
    reported(error).message()
}

/// The server's DETAIL, or nothing.
pub fn detail(error: &postgres::Error) -> &str {
    reported(error).detail().unwrap_or_default()
}

/// The server's HINT, or nothing.
pub fn hint(error: &postgres::Error) -> &str {
    reported(error).hint().unwrap_or_default()
}

/// The process that serves this connection.
pub fn backend_pid(client: &mut Client) -> i32 {
    client.query_one("SELECT pg_backend_pid()", &[]).unwrap().get(0)
}

/// Waits until `condition` holds; fails the test if that takes longer than anything should.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "waited in vain for {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// Waits until the backend `pid` waits for a lock.
pub fn wait_until_blocked(db: &TestDb, pid: i32) {
    let mut observer = db.connect();
    wait_until("a backend to wait for a lock", || {
        observer.query_one("SELECT cardinality(pg_blocking_pids($1)) > 0", &[&pid]).unwrap().get(0)
    });
}
