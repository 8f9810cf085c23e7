//! session_lifecycle_events: the audit.

use std::ffi::CString;

use chrono::TimeDelta;

use super::numbers::{self, Kind};
use super::statement::Db;
use super::table::layout::events as column;
use super::table::{Name, NewRow, Table};
use crate::error::{ClaimError, Result};
use crate::identity;
use crate::jsonb::Jsonb;
use crate::pg::time;
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

/// Records an event as done by the calling role, at this moment.
pub fn record(db: &Db<'_>, event: Event<'_>) -> Result<()> {
    wake::at_commit();
    let actor = CString::new(identity::caller().name())
        .map_err(|_| ClaimError::Corrupt { what: "pg_authid" })?;
    Table::to_write(db, Name::Events)?.insert(
        db,
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
    )
}
