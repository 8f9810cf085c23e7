//! session_lifecycle_events: the audit.

use std::ffi::CString;

use chrono::TimeDelta;
use pgrx::pg_sys::BuiltinOid::{FLOAT8OID, INT8OID, JSONBOID, TEXTOID};

use super::numbers::{self, Kind};
use super::statement::{Db, Statement};
use super::table::layout::events as column;
use super::table::{Name, NewRow, Table};
use super::time;
use crate::error::{ClaimError, Result};
use crate::identity;
use crate::jsonb::Jsonb;
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
    Repaired,
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
            Self::Repaired => "repaired",
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
                    (event_type, session_id, sd_id, claim_id, actor, reason, held_seconds, detail, event_id)
             VALUES ($1, $2, $3, $4, $5::name, $6, pg_catalog.round($7::numeric, 3), $8, $9)",
            c.schema
        )
    },
    &[TEXTOID, TEXTOID, TEXTOID, INT8OID, TEXTOID, TEXTOID, FLOAT8OID, JSONBOID, INT8OID],
);

/// Records an event as done by the calling role, at this moment.
pub fn record(db: &Db<'_>, event: Event<'_>) -> Result<()> {
    wake::at_commit();
    let table = Table::to_write(db, Name::Events)?;
    if table.may_be_written() {
        return record_directly(db, &table, event);
    }
    db.run(
        &RECORD,
        &[
            event.event_type.name().into(),
            event.session_id.into(),
            event.sd_id.into(),
            event.claim_id.into(),
            identity::caller().name().into(),
            event.reason.into(),
            event.held.map(pg_claims_core::age::seconds).into(),
            Jsonb::of(&event.detail)?.into(),
            numbers::next(db, Kind::Event)?.into(),
        ],
    )?;
    Ok(())
}

fn record_directly(db: &Db<'_>, table: &Table, event: Event<'_>) -> Result<()> {
    let actor = CString::new(identity::caller().name())
        .map_err(|_| ClaimError::Corrupt { what: "pg_authid" })?;
    table.insert(
        &NewRow::default()
            .set(column::EVENT_ID, numbers::next(db, Kind::Event)?)
            .set(column::EVENT_TYPE, event.event_type.name())
            .set(column::SESSION_ID, event.session_id)
            .set(column::SD_ID, event.sd_id)
            .set(column::CLAIM_ID, event.claim_id)
            .set(column::OCCURRED_AT, time::to_server(time::now())?)
            .set_name(column::ACTOR, &actor)
            .set(column::REASON, event.reason)
            .set_seconds(column::HELD_SECONDS, event.held)
            .set(column::DETAIL, Jsonb::of(&event.detail)?),
    );
    Ok(())
}
