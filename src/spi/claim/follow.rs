//! What follows from a session's row having been written: the claim history and the audit.

use chrono::{DateTime, Utc};
use pg_claims_core::age;
use serde_json::json;

use super::history::{Acquisition, End, close, open_as};
use super::{contradiction, look};
use crate::error::Result;
use crate::pg::time;
use crate::spi::event::{self, Event, EventType};
use crate::spi::intent::{self, Intent};
use crate::spi::session::Session;
use crate::spi::statement::Db;
use crate::spi::{heartbeat, manager};

/// The reason recorded for an acquisition that its session gave up for another.
const SWITCHED: &str = "switched";

/// The row is new.
pub fn follow_insert(db: &Db<'_>, new: &Session) -> Result<()> {
    event::record(db, of_session(EventType::Registered, new, None))?;
    match new.claim() {
        Some((sd_id, claim_id)) => {
            began(db, new, sd_id, claim_id)?;
            event::record(db, plain(EventType::Claimed, new, None))
        }
        None => Ok(()),
    }
}

/// The row says something else than before.
pub fn follow_update(db: &Db<'_>, old: &Session, new: &Session) -> Result<()> {
    let reason = new.release_reason.as_deref();
    match (old.claim(), new.claim()) {
        (before, now) if before == now => {}
        (None, Some((sd_id, claim_id))) => {
            began(db, new, sd_id, claim_id)?;
            event::record(db, plain(EventType::Claimed, new, None))?;
        }
        (Some((given_up, given_up_claim)), Some((sd_id, claim_id))) => {
            // At the moment at which the next one began.
            let at = new.claimed_at.unwrap_or_else(time::now);
            let given_up_acquisition = Acquisition {
                claim_id: given_up_claim,
                sd_id: given_up,
                session_id: &old.session_id,
            };
            if !close(db, given_up_acquisition, at, SWITCHED, None)? {
                let end = End { at, reason: SWITCHED, taken_over_by: None };
                contradiction::note_end(db, old, end)?;
            }
            began(db, new, sd_id, claim_id)?;
            let event = Event {
                held: old.claimed_at.map(|claimed_at| age::age(claimed_at, at)),
                detail: json!({ "released_sd": given_up, "released_claim_id": given_up_claim }),
                ..plain(EventType::Switched, new, Some(SWITCHED))
            };
            event::record(db, event)?;
        }
        (Some((_, claim_id)), None) => {
            let lost = new.lost_claim_id == Some(claim_id);
            let taken_over_by = new.lost_to.as_deref().filter(|_| lost);
            let at = new.released_at.unwrap_or_else(time::now);
            ended(db, old, at, reason.unwrap_or("released"), taken_over_by)?;
        }
        (None, None) => {}
    }
    match (old.status.as_str(), new.status.as_str()) {
        ("released", "released") => Ok(()),
        ("released", _) => event::record(db, of_session(EventType::Resumed, new, None)),
        (_, "released") => {
            manager::forget_session(db, &new.session_id)?;
            event::record(db, of_session(EventType::Ended, new, reason))
        }
        _ => Ok(()),
    }
}

/// The row is gone.
pub fn follow_delete(db: &Db<'_>, old: &Session) -> Result<()> {
    const REASON: &str = "session_deleted";
    ended(db, old, old.moment(), REASON, None)?;
    manager::forget_session(db, &old.session_id)?;
    if old.status == "released" {
        return Ok(());
    }
    event::record(db, of_session(EventType::Ended, old, Some(REASON)))
}

/// An event of what the session holds.
fn plain<'a>(event_type: EventType, row: &'a Session, reason: Option<&'a str>) -> Event<'a> {
    Event {
        sd_id: row.sd_id.as_deref(),
        claim_id: row.claim_id,
        ..of_session(event_type, row, reason)
    }
}

/// An event of the session alone.
fn of_session<'a>(event_type: EventType, row: &'a Session, reason: Option<&'a str>) -> Event<'a> {
    let session_id = &row.session_id;
    Event {
        event_type,
        session_id,
        sd_id: None,
        claim_id: None,
        reason,
        held: None,
        detail: json!({}),
    }
}

/// Opens the acquisition of a claim that was written by hand; claim_sd has opened its own.
fn began(db: &Db<'_>, new: &Session, sd_id: &str, claim_id: i64) -> Result<()> {
    if intent::is_granting(claim_id) {
        return Ok(());
    }
    if open_as(db, new)? {
        return Ok(());
    }
    Err(look(db, None, sd_id)?.claimed_by_another(sd_id))
}

/// Closes the acquisition that `old` held.
fn ended(
    db: &Db<'_>,
    old: &Session,
    at: DateTime<Utc>,
    reason: &str,
    taken_over_by: Option<&str>,
) -> Result<()> {
    let Some((sd_id, claim_id)) = old.claim() else {
        return Ok(());
    };
    let acquisition = Acquisition { claim_id, sd_id, session_id: &old.session_id };
    if !close(db, acquisition, at, reason, taken_over_by)? {
        contradiction::note_end(db, old, End { at, reason, taken_over_by })?;
    }
    let (event_type, detail) = match taken_over_by {
        Some(session_id) => (EventType::TakenOver, json!({ "taken_over_by": session_id })),
        None if intent::is(&Intent::Reap { claim_id }) => {
            let latest = heartbeat::latest_of(db, old)?;
            if old.stale_noted_for != Some(latest) {
                event::record(db, plain(EventType::Stale, old, None))?;
            }
            (EventType::Reaped, json!({}))
        }
        None => (EventType::Released, json!({})),
    };
    let event = Event {
        held: old.claimed_at.map(|claimed_at| age::age(claimed_at, at)),
        detail,
        ..plain(event_type, old, Some(reason))
    };
    event::record(db, event)
}
