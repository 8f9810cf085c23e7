//! Sessions: reading, registering, letting go of an SD, ending.

use chrono::{DateTime, Utc};
use pg_claims_core::session::SessionState;
use pgrx::JsonB;
use pgrx::datum::Interval;
use pgrx::pg_sys::BuiltinOid::{BOOLOID, INT4OID, INT8OID, INTERVALOID, JSONBOID, OIDOID, TEXTOID};
use pgrx::spi::SpiTupleTable;

use super::claim::Ending;
use super::row::Row;
use super::statement::{Db, Statement, required};
use crate::error::Result;
use crate::identity::Role;

/// What a decision about a session needs to know of it.
#[derive(Debug, Clone)]
pub struct Session {
    pub session_id: String,
    pub status: String,
    pub owner_role: Role,
    /// The SD it holds and the fencing token of that acquisition.
    pub claim: Option<(String, i64)>,
}

impl Session {
    /// Whether the session has ended.
    pub fn is_released(&self) -> bool {
        self.status == "released"
    }
}

static FIND: Statement = Statement::new(
    |c| {
        format!(
            "SELECT session_id, status, owner_role::oid, sd_id, claim_id
               FROM {}.claude_sessions WHERE session_id = $1",
            c.schema
        )
    },
    &[TEXTOID],
);

/// The session, if it was ever registered.
pub fn find(db: &Db<'_>, session_id: &str) -> Result<Option<Session>> {
    db.first_row(&FIND, &[session_id.into()])?.map(|row| read_session(&row)).transpose()
}

pub(super) fn read_session(row: &SpiTupleTable<'_>) -> Result<Session> {
    Ok(Session {
        session_id: row.required_text(1, "claude_sessions.session_id")?,
        status: row.required_text(2, "claude_sessions.status")?,
        owner_role: row.role(3, "claude_sessions.owner_role")?,
        claim: row.text(4)?.zip(row.bigint(5)?),
    })
}

/// What a session says of itself when it registers.
#[derive(Debug)]
pub struct Registration<'a> {
    pub session_id: &'a str,
    pub hostname: Option<&'a str>,
    pub tty: Option<&'a str>,
    pub pid: Option<i32>,
    pub codebase: Option<&'a str>,
    pub metadata: JsonB,
    /// A lease of its own; zero gives it up for the usual one.
    pub stale_after: Option<Interval>,
}

// What a new registration does not mention stays; metadata merges at its top level. The owner's
// role is compared again in the statement, because the row may have come in between.
static REGISTER: Statement = Statement::new(
    |c| {
        format!(
            "INSERT INTO {x}.claude_sessions AS s
                    (session_id, hostname, tty, pid, codebase, metadata, owner_role, stale_after)
             VALUES ($1, $2, $3, $4, $5, $6, $7, NULLIF($9, interval '0'))
             ON CONFLICT (session_id) DO UPDATE
                SET hostname = COALESCE(EXCLUDED.hostname, s.hostname),
                    tty = COALESCE(EXCLUDED.tty, s.tty),
                    pid = COALESCE(EXCLUDED.pid, s.pid),
                    codebase = COALESCE(EXCLUDED.codebase, s.codebase),
                    metadata = s.metadata OPERATOR(pg_catalog.||) EXCLUDED.metadata,
                    stale_after = CASE WHEN $9 IS NULL THEN s.stale_after ELSE EXCLUDED.stale_after END,
                    status = CASE s.status WHEN 'released' THEN 'idle' ELSE s.status END,
                    released_at = CASE s.status WHEN 'released' THEN NULL ELSE s.released_at END,
                    release_reason = CASE s.status WHEN 'released' THEN NULL ELSE s.release_reason END,
                    heartbeat_at = GREATEST(s.heartbeat_at, pg_catalog.clock_timestamp()),
                    updated_at = pg_catalog.clock_timestamp()
              WHERE s.owner_role = $7 OR $8
          RETURNING {STATE}",
            x = c.schema
        )
    },
    &[TEXTOID, TEXTOID, TEXTOID, INT4OID, TEXTOID, JSONBOID, OIDOID, BOOLOID, INTERVALOID],
);

// Of the row `s`.
const STATE: &str =
    "s.session_id, s.status, s.sd_id, s.claim_id, s.hostname, s.tty, s.pid, s.codebase,
                     s.metadata, s.heartbeat_at, s.created_at,
                     EXTRACT(EPOCH FROM s.stale_after)::float8";

fn read_state(row: &SpiTupleTable<'_>) -> Result<SessionState> {
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
        metadata: required(row.get::<JsonB>(9)?, "claude_sessions.metadata")?.0,
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
) -> Result<Option<SessionState>> {
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
        ],
    )?
    .map(|row| read_state(&row))
    .transpose()
}

/// The acquisition that a statement is to end, locked before its session: a guard may hold it for
/// long, and who waits for that must not hold up the session's heartbeats.
fn acquisition_first(schema: &str, claim_id: &str) -> String {
    format!(
        "WITH ending AS MATERIALIZED (
             SELECT claim_id FROM {schema}.sd_claims WHERE claim_id = {claim_id} FOR NO KEY UPDATE)"
    )
}

static LET_GO: Statement = Statement::new(
    |c| {
        format!(
            "{first}
             UPDATE {x}.claude_sessions s
                SET sd_id = NULL, claim_id = NULL, claimed_at = NULL, track = NULL,
                    status = 'idle', silent_until = NULL,
                    lost_claim_id = CASE WHEN $4 THEN s.claim_id END, lost_to = NULL,
                    released_at = pg_catalog.clock_timestamp(), release_reason = $3,
                    updated_at = pg_catalog.clock_timestamp()
               FROM (VALUES (1)) AS one LEFT JOIN ending ON true
              WHERE s.session_id = $1 AND s.claim_id = $2
          RETURNING s.released_at",
            x = c.schema,
            first = acquisition_first(&c.schema, "$2"),
        )
    },
    &[TEXTOID, INT8OID, TEXTOID, BOOLOID],
);

/// Ends exactly the acquisition `claim_id`. `None` when the session does not hold it (any more).
/// `unasked` says that not the session itself asked for it, so that its next heartbeat is told.
pub fn let_go(
    db: &Db<'_>,
    session_id: &str,
    claim_id: i64,
    reason: &str,
    unasked: bool,
) -> Result<Option<DateTime<Utc>>> {
    let arguments = [session_id.into(), claim_id.into(), reason.into(), unasked.into()];
    let _ending = Ending::new();
    db.first_row(&LET_GO, &arguments)?
        .map(|row| row.required_instant(1, "claude_sessions.released_at"))
        .transpose()
}

static END: Statement = Statement::new(
    |c| {
        format!(
            "{first}
             UPDATE {x}.claude_sessions s
                SET sd_id = NULL, claim_id = NULL, claimed_at = NULL, track = NULL,
                    status = 'released', silent_until = NULL,
                    lost_claim_id = CASE WHEN $4 THEN s.claim_id END, lost_to = NULL,
                    released_at = pg_catalog.clock_timestamp(), release_reason = $3,
                    updated_at = pg_catalog.clock_timestamp()
               FROM (VALUES (1)) AS one LEFT JOIN ending ON true
              WHERE s.session_id = $1 AND s.status <> 'released'
                AND s.claim_id IS NOT DISTINCT FROM $2
          RETURNING {STATE}",
            x = c.schema,
            first = acquisition_first(&c.schema, "$2"),
        )
    },
    &[TEXTOID, INT8OID, TEXTOID, BOOLOID],
);

/// Ends the session while it holds `claim_id` (or nothing). `None` when that has changed. `unasked` as
/// for [`let_go`].
pub fn end(
    db: &Db<'_>,
    session_id: &str,
    claim_id: Option<i64>,
    reason: &str,
    unasked: bool,
) -> Result<Option<SessionState>> {
    let arguments = [session_id.into(), claim_id.into(), reason.into(), unasked.into()];
    let _ending = Ending::new();
    db.first_row(&END, &arguments)?.map(|row| read_state(&row)).transpose()
}

static TRY_HOLD: Statement = Statement::new(
    |c| {
        format!(
            "SELECT 1 FROM {}.claude_sessions WHERE session_id = $1 AND claim_id = $2
                FOR NO KEY UPDATE SKIP LOCKED",
            c.schema
        )
    },
    &[TEXTOID, INT8OID],
);

/// Locks a session that holds `claim_id`, unless somebody else is writing it.
pub fn try_hold(db: &Db<'_>, session_id: &str, claim_id: i64) -> Result<bool> {
    Ok(db.first_row(&TRY_HOLD, &[session_id.into(), claim_id.into()])?.is_some())
}

static STATE_OF: Statement = Statement::new(
    |c| format!("SELECT {STATE} FROM {}.claude_sessions s WHERE s.session_id = $1", c.schema),
    &[TEXTOID],
);

/// The session as it is.
pub fn state(db: &Db<'_>, session_id: &str) -> Result<Option<SessionState>> {
    db.first_row(&STATE_OF, &[session_id.into()])?.map(|row| read_state(&row)).transpose()
}

static HOLDER: Statement = Statement::new(
    |c| {
        format!(
            "SELECT session_id, status, owner_role::oid, sd_id, claim_id
               FROM {}.claude_sessions
              WHERE sd_id = $1 AND sd_id IS NOT NULL AND status = 'active'",
            c.schema
        )
    },
    &[TEXTOID],
);

/// The session that holds an SD, live or stale.
pub fn holder(db: &Db<'_>, sd_id: &str) -> Result<Option<Session>> {
    db.first_row(&HOLDER, &[sd_id.into()])?.map(|row| read_session(&row)).transpose()
}

static HOLDERS: Statement = Statement::new(
    |c| {
        format!(
            "SELECT session_id, status, owner_role::oid, sd_id, claim_id
               FROM {}.claude_sessions
              WHERE sd_id IS NOT NULL AND status = 'active' ORDER BY sd_id LIMIT 1",
            c.schema
        )
    },
    &[],
);

/// One session that holds an SD, if any does.
pub fn any_holder(db: &Db<'_>) -> Result<Option<Session>> {
    db.first_row(&HOLDERS, &[])?.map(|row| read_session(&row)).transpose()
}

static HOLDERS_OF_NOTHING: Statement = Statement::new(
    |c| {
        format!(
            "SELECT session_id, status, owner_role::oid, sd_id, claim_id
               FROM {x}.claude_sessions s
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
    db.first_row(&HOLDERS_OF_NOTHING, &[])?.map(|row| read_session(&row)).transpose()
}
