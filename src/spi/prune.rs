//! Removing what is too old to be kept, and ending sessions that nobody comes back to.

use chrono::{DateTime, TimeDelta, Utc};
use pg_claims_core::age;
use pgrx::pg_sys::BuiltinOid::{FLOAT8OID, INT4OID, INT8OID, TIMESTAMPTZOID};

use super::heartbeat;
use super::row::Row;
use super::session;
use super::statement::{Db, Statement, required};
use crate::board::Place;
use crate::error::Result;
use crate::pg::time;

/// The reason recorded for a session that was ended because nothing was heard of it.
const SILENT: &str = "silent";

/// A stretch of a table's rows, in the order of their key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stretch {
    /// How many rows of it were removed.
    pub removed: i32,
    /// Where the next one begins; `None` when all that is old enough has been looked at.
    pub next: Option<i64>,
}

// By their key from the oldest on, which needs no index on the time: an acquisition that began after
// the limit cannot have ended before it, and neither can any that came later.
static CLAIMS: Statement = Statement::new(
    |c| {
        format!(
            "WITH stretch AS MATERIALIZED (
                 SELECT claim_id, claimed_at, released_at FROM {x}.sd_claims
                  WHERE claim_id > $1 ORDER BY claim_id LIMIT $3),
                  removed AS (
                 DELETE FROM {x}.sd_claims h USING stretch
                  WHERE h.claim_id = stretch.claim_id AND h.released_at < $2
              RETURNING 1)
             SELECT (SELECT pg_catalog.count(*)::integer FROM removed), pg_catalog.max(claim_id),
                    pg_catalog.count(*) < $3 OR pg_catalog.bool_or(claimed_at >= $2)
               FROM stretch",
            x = c.schema
        )
    },
    &[INT8OID, TIMESTAMPTZOID, INT4OID],
);

static EVENTS: Statement = Statement::new(
    |c| {
        format!(
            "WITH stretch AS MATERIALIZED (
                 SELECT p.position, p.event_id, e.occurred_at
                   FROM {x}.lifecycle_event_positions p
                   LEFT JOIN {x}.session_lifecycle_events e ON e.event_id = p.event_id
                  WHERE p.position > $1 ORDER BY p.position LIMIT $3),
                  places AS (
                 DELETE FROM {x}.lifecycle_event_positions p USING stretch
                  WHERE p.position = stretch.position
                    AND (stretch.occurred_at < $2 OR stretch.occurred_at IS NULL)
              RETURNING p.event_id),
                  removed AS (
                 DELETE FROM {x}.session_lifecycle_events e USING places
                  WHERE e.event_id = places.event_id
              RETURNING 1)
             SELECT (SELECT pg_catalog.count(*)::integer FROM removed), pg_catalog.max(position),
                    pg_catalog.count(*) < $3 OR pg_catalog.bool_or(occurred_at >= $2)
               FROM stretch",
            x = c.schema
        )
    },
    &[INT8OID, TIMESTAMPTZOID, INT4OID],
);

/// Removes acquisitions that ended before `limit`, among the next `size` after `from`.
pub fn claims(db: &Db<'_>, from: i64, limit: DateTime<Utc>, size: i32) -> Result<Stretch> {
    stretch(db, &CLAIMS, from, limit, size)
}

/// Removes events from before `limit`, among the next `size` in order after `from`. One that has no
/// place in the order yet is new, whatever its time.
pub fn events(db: &Db<'_>, from: i64, limit: DateTime<Utc>, size: i32) -> Result<Stretch> {
    stretch(db, &EVENTS, from, limit, size)
}

fn stretch(
    db: &Db<'_>,
    statement: &'static Statement,
    from: i64,
    limit: DateTime<Utc>,
    size: i32,
) -> Result<Stretch> {
    let arguments = [from.into(), time::to_server(limit)?.into(), size.into()];
    let row = db.run(statement, &arguments)?.first();
    let is_last = row.bigint(2)?.is_none() || row.flag(3)?;
    Ok(Stretch {
        removed: required(row.get(1)?, "a count")?,
        next: if is_last { None } else { row.bigint(2)? },
    })
}

static SESSIONS: Statement = Statement::new(
    |c| {
        format!(
            "WITH old AS MATERIALIZED (
                 SELECT session_id FROM {x}.claude_sessions
                  WHERE status = 'released' AND sd_id IS NULL
                    AND GREATEST(heartbeat_at, released_at, updated_at) < $1
                  LIMIT $2 FOR UPDATE SKIP LOCKED),
                  removed AS (
                 DELETE FROM {x}.claude_sessions s USING old WHERE s.session_id = old.session_id
              RETURNING 1)
             SELECT pg_catalog.count(*) FROM removed",
            x = c.schema
        )
    },
    &[TIMESTAMPTZOID, INT4OID],
);

/// Removes up to `size` sessions that ended before `limit`. Returns how many.
pub fn sessions(db: &Db<'_>, limit: DateTime<Utc>, size: i32) -> Result<i64> {
    let row = db.run(&SESSIONS, &[time::to_server(limit)?.into(), size.into()])?.first();
    row.required_bigint(1, "a count")
}

static SILENT_SESSIONS: Statement = Statement::new(
    |c| {
        format!(
            "SELECT session_id FROM {x}.claude_sessions
              WHERE status <> 'released' AND sd_id IS NULL
                AND {x}.lease_expires_at({latest}, silent_until, stale_after)
                    <= pg_catalog.clock_timestamp() - pg_catalog.make_interval(secs => $1)
              LIMIT $2 FOR NO KEY UPDATE SKIP LOCKED",
            x = c.schema,
            latest = heartbeat::latest(&c.schema, ""),
        )
    },
    &[FLOAT8OID, INT4OID],
);

fn silent_sessions(db: &Db<'_>, silence: TimeDelta, size: i32) -> Result<Vec<String>> {
    let mut rows = db.run(&SILENT_SESSIONS, &[age::seconds(silence).into(), size.into()])?;
    let mut silent = Vec::new();
    while rows.next().is_some() {
        silent.push(rows.required_text(1, "claude_sessions.session_id")?);
    }
    Ok(silent)
}

/// Ends up to `size` sessions that hold nothing and whose lease ended so long ago.
pub fn end_silent_sessions(db: &Db<'_>, silence: TimeDelta, size: i32) -> Result<usize> {
    // Those that beat until the board was closed to them do not come again; others may come then, which can
    // still beat there.
    let table = db.catalog()?.sessions;
    let closed = silent_sessions(db, silence, size)?;
    for session_id in &closed {
        Place::of(table, session_id).close();
    }
    let mut silent = silent_sessions(db, silence, size)?;
    silent.retain(|session_id| closed.contains(session_id));
    for session_id in &silent {
        session::end(db, session_id, None, SILENT, false)?;
    }
    Ok(silent.len())
}

static AHEAD: Statement = Statement::new(
    |c| {
        format!(
            "WITH ahead AS MATERIALIZED (
                 SELECT session_id FROM {x}.claude_sessions
                  WHERE sd_id IS NULL
                    AND heartbeat_at > pg_catalog.clock_timestamp() + interval '1 second'
                    FOR NO KEY UPDATE SKIP LOCKED)
             UPDATE {x}.claude_sessions s SET heartbeat_at = pg_catalog.clock_timestamp()
               FROM ahead WHERE s.session_id = ahead.session_id",
            x = c.schema
        )
    },
    &[],
);

/// Pulls heartbeats that lie in the future back to now, of sessions that hold nothing.
pub fn pull_back_heartbeats(db: &Db<'_>) -> Result<()> {
    db.run(&AHEAD, &[])?;
    Ok(())
}
