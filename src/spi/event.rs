//! session_lifecycle_events: the audit.

use chrono::TimeDelta;
use pgrx::JsonB;
use pgrx::pg_sys::BuiltinOid::{FLOAT8OID, INT8OID, JSONBOID, TEXTOID};

use super::statement::{Db, Statement};
use crate::error::Result;
use crate::identity;
use crate::worker::wake;

/// What happened to a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventType {
    Registered,
    Resumed,
    Claimed,
    Switched,
    Released,
    TakenOver,
    Stale,
    Reaped,
    MaxAgeWarning,
    Ended,
}

impl EventType {
    /// Its name in the audit.
    pub fn name(self) -> &'static str {
        match self {
            Self::Registered => "registered",
            Self::Resumed => "resumed",
            Self::Claimed => "claimed",
            Self::Switched => "switched",
            Self::Released => "released",
            Self::TakenOver => "taken_over",
            Self::Stale => "stale",
            Self::Reaped => "reaped",
            Self::MaxAgeWarning => "max_age_warning",
            Self::Ended => "ended",
        }
    }
}

/// One line of the audit.
#[derive(Debug)]
pub struct Event<'a> {
    pub event_type: EventType,
    pub session_id: &'a str,
    pub sd_id: Option<&'a str>,
    pub claim_id: Option<i64>,
    pub reason: Option<&'a str>,
    /// How long the acquisition lasted that ends with this event.
    pub held: Option<TimeDelta>,
    pub detail: serde_json::Value,
}

static RECORD: Statement = Statement::new(
    |c| {
        format!(
            "INSERT INTO {}.session_lifecycle_events
                    (event_type, session_id, sd_id, claim_id, actor, reason, held_seconds, detail)
             VALUES ($1, $2, $3, $4, $5::name, $6, pg_catalog.round($7::numeric, 3), $8)",
            c.schema
        )
    },
    &[TEXTOID, TEXTOID, TEXTOID, INT8OID, TEXTOID, TEXTOID, FLOAT8OID, JSONBOID],
);

/// Records an event as done by the calling role, at this moment.
pub fn record(db: &Db<'_>, event: Event<'_>) -> Result<()> {
    wake::at_commit();
    db.run(
        &RECORD,
        &[
            event.event_type.name().into(),
            event.session_id.into(),
            event.sd_id.into(),
            event.claim_id.into(),
            identity::caller()?.name().into(),
            event.reason.into(),
            event.held.map(pg_claims_core::age::seconds).into(),
            JsonB(event.detail).into(),
        ],
    )?;
    Ok(())
}
