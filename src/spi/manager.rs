//! The heartbeat manager: for which connections the server beats.
//!
//! A connection is its process, by number and start: numbers are reused.

use chrono::{DateTime, TimeDelta, Utc};
use pg_claims_core::age;
use pg_claims_core::manager::Managed;
use pgrx::datum::DatumWithOid;
use pgrx::pg_sys;
use pgrx::pg_sys::BuiltinOid::{FLOAT8OID, INT4OID, TEXTOID, TIMESTAMPTZOID};
use pgrx::spi::SpiTupleTable;

use super::row::Row;
use super::statement::{Db, Statement, required};
use crate::error::Result;
use crate::pg::time;
use crate::{guc, service};

/// A connection, by the process that serves it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connection {
    pid: i32,
    start: DateTime<Utc>,
}

impl Connection {
    /// The caller's.
    pub fn own() -> Self {
        // SAFETY: both are set when the process starts and never change.
        unsafe {
            Self {
                pid: pg_sys::MyProcPid,
                start: time::from_microseconds(pg_sys::MyStartTimestamp),
            }
        }
    }
}

const MANAGED: &str = "session_id, last_success_at, consecutive_failures, last_error,
                       given_up_at IS NOT NULL";

fn read_managed(row: &SpiTupleTable<'_>) -> Result<Managed> {
    Ok(Managed {
        session_id: row.required_text(1, "heartbeat_connections.session_id")?,
        last_success: row.instant(2)?,
        consecutive_failures: required(row.get(3)?, "heartbeat_connections.consecutive_failures")?,
        last_error: row.text(4)?,
        given_up: row.flag(5)?,
    })
}

static FIND: Statement = Statement::new(
    |c| {
        format!(
            "SELECT {MANAGED} FROM {}.heartbeat_connections
              WHERE backend_pid = $1 AND backend_start = $2",
            c.schema
        )
    },
    &[INT4OID, TIMESTAMPTZOID],
);

/// The heartbeat of a connection, if there is one.
pub fn find(db: &Db<'_>, connection: Connection) -> Result<Option<Managed>> {
    let arguments = [connection.pid.into(), time::to_server(connection.start)?.into()];
    db.first_row(&FIND, &arguments)?.map(|row| read_managed(&row)).transpose()
}

static START: Statement = Statement::new(
    |c| {
        format!(
            "INSERT INTO {}.heartbeat_connections
                    (backend_pid, backend_start, session_id, last_attempt_at, last_success_at,
                     server_since)
             VALUES ($1, $2, $3, $4, $4, $5)
             ON CONFLICT (backend_pid, backend_start) DO UPDATE
                SET session_id = EXCLUDED.session_id, started_at = EXCLUDED.started_at,
                    last_attempt_at = EXCLUDED.last_attempt_at,
                    last_success_at = EXCLUDED.last_success_at,
                    consecutive_failures = 0, last_error = NULL, given_up_at = NULL",
            c.schema
        )
    },
    &[INT4OID, TIMESTAMPTZOID, TEXTOID, TIMESTAMPTZOID, TIMESTAMPTZOID],
);

/// Begins to beat for the connection, whose first heartbeat was recorded at `beat_at`.
pub fn start(
    db: &Db<'_>,
    connection: Connection,
    session_id: &str,
    beat_at: DateTime<Utc>,
) -> Result<()> {
    let arguments = [
        connection.pid.into(),
        time::to_server(connection.start)?.into(),
        session_id.into(),
        time::to_server(beat_at)?.into(),
        service::run().map(time::to_server).transpose()?.into(),
    ];
    db.run(&START, &arguments)?;
    Ok(())
}

static STOP: Statement = Statement::new(
    |c| {
        format!(
            "DELETE FROM {}.heartbeat_connections WHERE backend_pid = $1 AND backend_start = $2
          RETURNING session_id",
            c.schema
        )
    },
    &[INT4OID, TIMESTAMPTZOID],
);

/// Stops beating for the connection. Returns the session that it was for.
pub fn stop(db: &Db<'_>, connection: Connection) -> Result<Option<String>> {
    let arguments = [connection.pid.into(), time::to_server(connection.start)?.into()];
    match db.first_row(&STOP, &arguments)? {
        Some(row) => row.text(1),
        None => Ok(None),
    }
}

static FORGET_SESSION: Statement = Statement::new(
    |c| format!("DELETE FROM {}.heartbeat_connections WHERE session_id = $1", c.schema),
    &[TEXTOID],
);

/// Stops beating for a session that has ended, on whatever connection.
pub fn forget_session(db: &Db<'_>, session_id: &str) -> Result<()> {
    db.run(&FORGET_SESSION, &[session_id.into()])?;
    Ok(())
}

/// A heartbeat that is due.
#[derive(Debug)]
pub struct Due {
    /// The connection.
    pub connection: Connection,
    /// Its session.
    pub session_id: String,
}

/// How much of the interval must have passed: the worker comes at intervals of its own, and a
/// heartbeat that it found a moment too early would have to wait for the next.
const DUE_AT: f64 = 0.9;

/// Whether the connection `c` is there. The server's own list decides, not a time-out.
const IS_THERE: &str = "EXISTS (SELECT FROM pg_catalog.pg_stat_activity a
                                 WHERE a.pid = c.backend_pid
                                   AND a.backend_start = c.backend_start)";

static DUE: Statement = Statement::new(
    |c| {
        format!(
            "SELECT c.backend_pid, c.backend_start, c.session_id
               FROM {x}.heartbeat_connections c
               LEFT JOIN {x}.claude_sessions s ON s.session_id = c.session_id
              WHERE c.given_up_at IS NULL AND {IS_THERE}
                AND (c.last_attempt_at IS NULL
                     OR c.last_attempt_at
                        <= pg_catalog.clock_timestamp()
                           - pg_catalog.make_interval(secs => {DUE_AT} * {INTERVAL}))
              ORDER BY c.session_id",
            x = c.schema
        )
    },
    &[FLOAT8OID, FLOAT8OID, FLOAT8OID, FLOAT8OID],
);

/// The interval of a connection's heartbeat in seconds: the setting ($1) or, where that would be too
/// long for its session's lease (its own within the limits $3 and $4, or the usual $2), a third of
/// that.
const INTERVAL: &str = "LEAST($1, CASE WHEN s.stale_after IS NULL THEN $2
                               ELSE GREATEST($3, LEAST($4, EXTRACT(EPOCH FROM s.stale_after)::float8)) END / 3)";

static INTERVAL_OF: Statement = Statement::new(
    |c| {
        format!(
            "SELECT {INTERVAL} FROM (VALUES (1)) AS one
               LEFT JOIN {}.claude_sessions s ON s.session_id = $5",
            c.schema
        )
    },
    &[FLOAT8OID, FLOAT8OID, FLOAT8OID, FLOAT8OID, TEXTOID],
);

/// The interval of the heartbeat that the server gives, or would give, for a session.
pub fn interval_of(db: &Db<'_>, session_id: Option<&str>) -> Result<TimeDelta> {
    let [setting, usual, shortest, longest] = intervals();
    let arguments = [setting, usual, shortest, longest, session_id.into()];
    let seconds = required(db.run(&INTERVAL_OF, &arguments)?.first().get(1)?, "an interval")?;
    Ok(milliseconds(seconds))
}

fn milliseconds(seconds: f64) -> TimeDelta {
    TimeDelta::milliseconds((seconds * 1000.0) as i64)
}

static SHORTEST: Statement = Statement::new(
    |c| {
        format!(
            "SELECT pg_catalog.min({INTERVAL})
               FROM {x}.heartbeat_connections c
               LEFT JOIN {x}.claude_sessions s ON s.session_id = c.session_id
              WHERE c.given_up_at IS NULL",
            x = c.schema
        )
    },
    &[FLOAT8OID, FLOAT8OID, FLOAT8OID, FLOAT8OID],
);

/// The shortest interval of all heartbeats, if there are any.
pub fn shortest_interval(db: &Db<'_>) -> Result<Option<TimeDelta>> {
    let seconds: Option<f64> = db.run(&SHORTEST, &intervals())?.first().get(1)?;
    Ok(seconds.map(milliseconds))
}

fn intervals<'a>() -> [DatumWithOid<'a>; 4] {
    let rules = guc::lease_rules();
    [guc::heartbeat_interval(), rules.stale_after, rules.min_stale_after, rules.max_stale_after]
        .map(|time| age::seconds(time).into())
}

/// The connections whose heartbeat is due.
pub fn due(db: &Db<'_>) -> Result<Vec<Due>> {
    read_connections(db.run(&DUE, &intervals())?)
}

static ALL: Statement = Statement::new(
    |c| {
        format!(
            "SELECT c.backend_pid, c.backend_start, c.session_id
               FROM {x}.heartbeat_connections c
              WHERE c.given_up_at IS NULL AND {IS_THERE}",
            x = c.schema
        )
    },
    &[],
);

/// All connections that are beaten for, due or not.
pub fn all(db: &Db<'_>) -> Result<Vec<Due>> {
    read_connections(db.run(&ALL, &[])?)
}

fn read_connections(mut rows: SpiTupleTable<'_>) -> Result<Vec<Due>> {
    let mut found = Vec::new();
    while rows.next().is_some() {
        let connection = Connection {
            pid: required(rows.get(1)?, "heartbeat_connections.backend_pid")?,
            start: rows.required_instant(2, "heartbeat_connections.backend_start")?,
        };
        let session_id = rows.required_text(3, "heartbeat_connections.session_id")?;
        found.push(Due { connection, session_id });
    }
    Ok(found)
}

// Whoever has the row is noting a heartbeat, too, and may take its time.
static SUCCEEDED: Statement = Statement::new(
    |c| {
        format!(
            "WITH free AS MATERIALIZED (
                 SELECT backend_pid, backend_start FROM {x}.heartbeat_connections
                  WHERE backend_pid = $1 AND backend_start = $2
                    FOR NO KEY UPDATE SKIP LOCKED)
             UPDATE {x}.heartbeat_connections c
                SET last_attempt_at = pg_catalog.clock_timestamp(), last_success_at = $3,
                    consecutive_failures = 0, last_error = NULL
               FROM free
              WHERE c.backend_pid = free.backend_pid AND c.backend_start = free.backend_start",
            x = c.schema
        )
    },
    &[INT4OID, TIMESTAMPTZOID, TIMESTAMPTZOID],
);

/// Remembers that the connection's heartbeat was recorded.
pub fn succeeded(db: &Db<'_>, connection: Connection, at: DateTime<Utc>) -> Result<()> {
    let arguments = [
        connection.pid.into(),
        time::to_server(connection.start)?.into(),
        time::to_server(at)?.into(),
    ];
    db.run(&SUCCEEDED, &arguments)?;
    Ok(())
}

static FAILED: Statement = Statement::new(
    |c| {
        format!(
            "UPDATE {}.heartbeat_connections
                SET last_attempt_at = pg_catalog.clock_timestamp(),
                    consecutive_failures = consecutive_failures + 1, last_error = $3,
                    given_up_at = CASE WHEN consecutive_failures + 1 >= $4
                                       THEN pg_catalog.clock_timestamp() END
              WHERE backend_pid = $1 AND backend_start = $2",
            c.schema
        )
    },
    &[INT4OID, TIMESTAMPTZOID, TEXTOID, INT4OID],
);

/// Counts a failure; after too many in a row the connection's heartbeat is given up.
pub fn failed(db: &Db<'_>, connection: Connection, error: &str) -> Result<()> {
    let arguments = [
        connection.pid.into(),
        time::to_server(connection.start)?.into(),
        error.into(),
        guc::max_heartbeat_failures().into(),
    ];
    db.run(&FAILED, &arguments)?;
    Ok(())
}

static ENDED: Statement = Statement::new(
    |c| {
        format!(
            "SELECT c.backend_pid, c.backend_start, c.session_id
               FROM {}.heartbeat_connections c
              WHERE NOT {IS_THERE}",
            c.schema
        )
    },
    &[],
);

/// The connections that have ended.
pub fn ended(db: &Db<'_>) -> Result<Vec<Due>> {
    read_connections(db.run(&ENDED, &[])?)
}

// Others of this run of the server count; what was left by an earlier one has ended as well.
static FORGET: Statement = Statement::new(
    |c| {
        format!(
            "DELETE FROM {x}.heartbeat_connections c
              WHERE c.backend_pid = $1 AND c.backend_start = $2
          RETURNING c.server_since IS NOT DISTINCT FROM $3,
                    EXISTS (SELECT FROM {x}.heartbeat_connections o
                             WHERE o.session_id = c.session_id AND o.server_since = $3
                               AND (o.backend_pid, o.backend_start)
                                   <> (c.backend_pid, c.backend_start))",
            x = c.schema
        )
    },
    &[INT4OID, TIMESTAMPTZOID, TIMESTAMPTZOID],
);

/// What follows from a connection's end for the claim of its session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Consequence {
    /// None: the setting asks for none, or somebody else has seen to it.
    None,
    /// None although the setting asks for its release, for this reason.
    Kept(&'static str),
    /// It is to be released.
    Release,
}

/// Forgets a connection that has ended, in this run of the server or an earlier one.
pub fn forget(db: &Db<'_>, ended: &Due, run: DateTime<Utc>) -> Result<Consequence> {
    let connection = ended.connection;
    let arguments = [
        connection.pid.into(),
        time::to_server(connection.start)?.into(),
        time::to_server(run)?.into(),
    ];
    let Some(row) = db.first_row(&FORGET, &arguments)? else {
        return Ok(Consequence::None);
    };
    let (is_of_this_run, is_served) = (row.flag(1)?, row.flag(2)?);
    Ok(if guc::on_disconnect() != guc::OnDisconnect::Release {
        Consequence::None
    } else if !is_of_this_run {
        Consequence::Kept("it was the server's restart that ended it")
    } else if is_served {
        Consequence::Kept("another connection beats for the session")
    } else {
        Consequence::Release
    })
}
