//! Sessions: reading, registering, letting go of an SD, ending.

mod owner;
mod row;
mod write;

use chrono::{DateTime, Utc};
use pg_claims_core::session::SessionState;
use pgrx::datum::Interval;
use pgrx::pg_sys::BuiltinOid::{BOOLOID, INT4OID, INTERVALOID, JSONBOID, OIDOID, TEXTOID};
use pgrx::spi::SpiTupleTable;

use super::guard;
use super::row::Row;
use super::statement::{Db, Statement, required};
use super::table::layout::Index;
use super::table::layout::sessions as column;
use super::table::{Key, Name, Snapshot, Table};
use super::wait;
use crate::error::Result;
use crate::identity::Role;
use crate::jsonb::Jsonb;
use crate::pg::time;

pub use owner::{assign, follow_renames};
pub use row::Session;
pub use write::{Held, change, hold};

/// The session, if it was ever registered.
pub fn find(db: &Db<'_>, session_id: &str) -> Result<Option<Session>> {
    find_by(db, column::BY_SESSION_ID, session_id)
}

/// The same, and whether another transaction is writing it.
pub fn find_contested(db: &Db<'_>, session_id: &str) -> Result<Option<(Session, bool)>> {
    let table = Table::to_read(db, Name::Sessions)?;
    let snapshot = Snapshot::take();
    let found = table.find(&snapshot, column::BY_SESSION_ID, Key::Text(session_id));
    found.map(|row| Ok((Session::read(&row)?, row.is_contested()))).transpose()
}

/// Waits for whoever is writing the session, such as a heartbeat or a claim of its own in an open transaction,
/// without locking anything. Returns whether there was anybody to wait for.
pub fn await_writer(db: &Db<'_>, session_id: &str) -> Result<bool> {
    let table = Table::to_read(db, Name::Sessions)?;
    let snapshot = Snapshot::take();
    match table.find(&snapshot, column::BY_SESSION_ID, Key::Text(session_id)) {
        Some(row) if row.is_contested() => {
            wait::giving_way_unless_guarding(|| Ok(table.await_writer(&row)))
        }
        _ => Ok(false),
    }
}

/// Whether another transaction is writing the session.
pub fn is_contested(db: &Db<'_>, session_id: &str) -> Result<bool> {
    let table = Table::to_read(db, Name::Sessions)?;
    let snapshot = Snapshot::take();
    let row = table.find(&snapshot, column::BY_SESSION_ID, Key::Text(session_id));
    Ok(row.is_some_and(|row| row.is_contested()))
}

/// The session that holds an SD, live or stale.
pub fn holder(db: &Db<'_>, sd_id: &str) -> Result<Option<Session>> {
    find_by(db, column::BY_SD_ID, sd_id)
}

/// The same, also where it came or went since the snapshot that this transaction keeps.
pub fn latest_holder(db: &Db<'_>, sd_id: &str) -> Result<Option<Session>> {
    let table = Table::to_read(db, Name::Sessions)?;
    let snapshot = Snapshot::take_latest();
    let found = table.find(&snapshot, column::BY_SD_ID, Key::Text(sd_id));
    found.map(|row| Session::read(&row)).transpose()
}

fn find_by(db: &Db<'_>, index: Index, key: &str) -> Result<Option<Session>> {
    let table = Table::to_read(db, Name::Sessions)?;
    // Kept until the row has been read.
    let snapshot = Snapshot::take();
    let found = table.find(&snapshot, index, Key::Text(key));
    found.map(|row| Session::read(&row)).transpose()
}

/// What a session says of itself when it registers.
#[derive(Debug)]
pub struct Registration<'a> {
    pub session_id: &'a str,
    pub hostname: Option<&'a str>,
    pub tty: Option<&'a str>,
    pub pid: Option<i32>,
    pub codebase: Option<&'a str>,
    pub metadata: Jsonb,
    /// A lease of its own; zero gives it up for the usual one.
    pub stale_after: Option<Interval>,
}

// What a new registration does not mention stays; metadata merges at its top level. The owner's
// role is compared again in the statement, because the row may have come in between.
static REGISTER: Statement = Statement::new(
    |c| {
        format!(
            "INSERT INTO {x}.claude_sessions AS s
                    (session_id, hostname, tty, pid, codebase, metadata, owner_role, owner_oid, stale_after)
             VALUES ($1, $2, $3, $4, $5, $6, $10::name, $7, NULLIF($9, interval '0'))
             ON CONFLICT (session_id) DO UPDATE
                SET hostname = COALESCE(EXCLUDED.hostname, s.hostname),
                    tty = COALESCE(EXCLUDED.tty, s.tty),
                    pid = COALESCE(EXCLUDED.pid, s.pid),
                    codebase = COALESCE(EXCLUDED.codebase, s.codebase),
                    metadata = s.metadata OPERATOR(pg_catalog.||) EXCLUDED.metadata,
                    stale_after = CASE WHEN $9 IS NULL THEN s.stale_after ELSE EXCLUDED.stale_after END,
                    -- After a rename.
                    owner_role = CASE WHEN s.owner_oid = $7 THEN EXCLUDED.owner_role ELSE s.owner_role END,
                    status = CASE s.status WHEN 'released' THEN 'idle' ELSE s.status END,
                    released_at = CASE s.status WHEN 'released' THEN NULL ELSE s.released_at END,
                    release_reason = CASE s.status WHEN 'released' THEN NULL ELSE s.release_reason END,
                    heartbeat_at = GREATEST(s.heartbeat_at, pg_catalog.clock_timestamp()),
                    updated_at = pg_catalog.clock_timestamp()
              WHERE s.owner_oid = $7 OR $8
          RETURNING {STATE}",
            x = c.schema
        )
    },
    &[TEXTOID, TEXTOID, TEXTOID, INT4OID, TEXTOID, JSONBOID, OIDOID, BOOLOID, INTERVALOID, TEXTOID],
);

// Of the row `s`.
const STATE: &str =
    "s.session_id, s.status, s.sd_id, s.claim_id, s.hostname, s.tty, s.pid, s.codebase,
                     s.metadata, s.heartbeat_at, s.created_at,
                     EXTRACT(EPOCH FROM s.stale_after)::float8";

fn read_state(row: &SpiTupleTable<'_>) -> Result<SessionState<Jsonb>> {
    Ok(SessionState {
        success: true,
        session_id: row.required_text(1, "claude_sessions.session_id")?,
        status: row.required_text(2, "claude_sessions.status")?,
        sd_id: row.text(3)?,
        claim_id: row.bigint(4)?,
        hostname: row.text(5)?,
        tty: row.text(6)?,
        pid: row.get(7)?,
        codebase: row.text(8)?,
        metadata: required(row.get(9)?, "claude_sessions.metadata")?,
        heartbeat_at: row.required_instant(10, "claude_sessions.heartbeat_at")?,
        created_at: row.required_instant(11, "claude_sessions.created_at")?,
        stale_after_seconds: row.get(12)?,
        resumed: None,
        released_sd: None,
    })
}

/// Registers the session, or refreshes it. `None` when it belongs to another role than
/// `owner_role` and the caller is not `privileged`.
pub fn register(
    db: &Db<'_>,
    session: Registration<'_>,
    owner_role: Role,
    privileged: bool,
) -> Result<Option<SessionState<Jsonb>>> {
    db.first_row(
        &REGISTER,
        &[
            session.session_id.into(),
            session.hostname.into(),
            session.tty.into(),
            session.pid.into(),
            session.codebase.into(),
            session.metadata.into(),
            owner_role.0.into(),
            privileged.into(),
            session.stale_after.into(),
            owner_role.name().into(),
        ],
    )?
    .map(|row| read_state(&row))
    .transpose()
}

/// Ends exactly the acquisition `claim_id`. `None` when the session does not hold it (any more).
/// `unasked` says that not the session itself asked for it, so that its next heartbeat is told. The SD must be
/// locked.
pub fn let_go(
    db: &Db<'_>,
    session_id: &str,
    claim_id: i64,
    reason: &str,
    unasked: bool,
) -> Result<Option<DateTime<Utc>>> {
    // A guard may hold it for long, and who waits for that must not hold up the session's heartbeats.
    guard::exclude(db, claim_id)?;
    let changed = change(db, session_id, |session| {
        let held = session.claim_id == Some(claim_id);
        held.then(|| session.without_claim(time::now(), reason, unasked))
    })?;
    Ok(changed.and_then(|session| session.released_at))
}

/// Ends the session while it holds `claim_id` (or nothing). `None` when that has changed. `unasked` as
/// for [`let_go`].
pub fn end(
    db: &Db<'_>,
    session_id: &str,
    claim_id: Option<i64>,
    reason: &str,
    unasked: bool,
) -> Result<Option<SessionState<Jsonb>>> {
    if let Some(claim_id) = claim_id {
        guard::exclude(db, claim_id)?;
    }
    let changed = change(db, session_id, |session| {
        let is_as_seen = !session.is_released() && session.claim_id == claim_id;
        is_as_seen.then(|| Session {
            status: "released".into(),
            ..session.without_claim(time::now(), reason, unasked)
        })
    })?;
    if changed.is_none() { Ok(None) } else { state(db, session_id) }
}

static STATE_OF: Statement = Statement::new(
    |c| format!("SELECT {STATE} FROM {}.claude_sessions s WHERE s.session_id = $1", c.schema),
    &[TEXTOID],
);

/// The session as it is.
pub fn state(db: &Db<'_>, session_id: &str) -> Result<Option<SessionState<Jsonb>>> {
    db.first_row(&STATE_OF, &[session_id.into()])?.map(|row| read_state(&row)).transpose()
}

static HOLDERS: Statement = Statement::new(
    |c| {
        format!(
            "SELECT * FROM {}.claude_sessions
              WHERE sd_id IS NOT NULL AND status = 'active' ORDER BY sd_id LIMIT 1",
            c.schema
        )
    },
    &[],
);

/// One session that holds an SD, if any does.
pub fn any_holder(db: &Db<'_>) -> Result<Option<Session>> {
    db.first_row(&HOLDERS, &[])?.map(|row| Session::read(&row)).transpose()
}

static HOLDERS_OF_NOTHING: Statement = Statement::new(
    |c| {
        format!(
            "SELECT s.* FROM {x}.claude_sessions s
              WHERE sd_id IS NOT NULL AND status = 'active'
                AND NOT EXISTS (SELECT FROM {x}.v_directives d WHERE d.sd_id = s.sd_id)
              ORDER BY sd_id LIMIT 1",
            x = c.schema
        )
    },
    &[],
);

/// One session that holds an SD which the backlog does not have, if any does.
pub fn any_holder_of_nothing(db: &Db<'_>) -> Result<Option<Session>> {
    db.first_row(&HOLDERS_OF_NOTHING, &[])?.map(|row| Session::read(&row)).transpose()
}
