//! After a session's row was written: the claim history and the audit.

use chrono::{DateTime, Utc};
use pg_claims_core::age;
use pgrx::PgSqlErrorCode;
use pgrx::prelude::*;
use serde_json::json;

use super::session::claimed_by_another;
use super::{Row, SessionRow, is_restoring, run, session_rows};
use crate::board::Place;
use crate::error::{ClaimError, Result};
use crate::spi::event::{self, Event, EventType};
use crate::spi::{Db, claim, manager, session, time};

/// The reason recorded for an acquisition that its session gave up for another.
const SWITCHED: &str = "switched";

#[pg_trigger]
pub fn record_claim_history<'a>(trigger: &'a PgTrigger<'a>) -> Row<'a> {
    run(|| {
        let (old, new) = session_rows(trigger)?;
        Db::connect(|db| match (&old, &new) {
            (None, Some(_)) if is_restoring() => Ok(()),
            (None, Some(new)) => inserted(db, new),
            (Some(old), Some(new)) => updated(db, old, new),
            (Some(old), None) => deleted(db, old),
            (None, None) => Ok(()),
        })?;
        Ok(None)
    })
}

fn inserted(db: &Db<'_>, new: &SessionRow) -> Result<()> {
    event::record(db, of_session(EventType::Registered, new, None))?;
    match new.claim() {
        Some((sd_id, claim_id)) => {
            began(db, new, sd_id, claim_id)?;
            event::record(db, plain(EventType::Claimed, new, None))
        }
        None => Ok(()),
    }
}

fn updated(db: &Db<'_>, old: &SessionRow, new: &SessionRow) -> Result<()> {
    let reason = new.release_reason.as_deref();
    match (old.claim(), new.claim()) {
        (before, now) if before == now => {}
        (None, Some((sd_id, claim_id))) => {
            began(db, new, sd_id, claim_id)?;
            event::record(db, plain(EventType::Claimed, new, None))?;
        }
        (Some((given_up, given_up_claim)), Some((sd_id, claim_id))) => {
            let at = time::now();
            claim::close(db, given_up_claim, at, SWITCHED, None)?;
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

fn deleted(db: &Db<'_>, old: &SessionRow) -> Result<()> {
    const REASON: &str = "session_deleted";
    ended(db, old, time::now(), REASON, None)?;
    manager::forget_session(db, &old.session_id)?;
    if old.status == "released" {
        return Ok(());
    }
    event::record(db, of_session(EventType::Ended, old, Some(REASON)))
}

/// An event of what the session holds.
fn plain<'a>(event_type: EventType, row: &'a SessionRow, reason: Option<&'a str>) -> Event<'a> {
    Event {
        sd_id: row.sd_id.as_deref(),
        claim_id: row.claim_id,
        ..of_session(event_type, row, reason)
    }
}

/// An event of the session alone.
fn of_session<'a>(
    event_type: EventType,
    row: &'a SessionRow,
    reason: Option<&'a str>,
) -> Event<'a> {
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
fn began(db: &Db<'_>, new: &SessionRow, sd_id: &str, claim_id: i64) -> Result<()> {
    if claim::is_granting(claim_id) {
        return Ok(());
    }
    let claimed_at = new.claimed_at.unwrap_or_else(time::now);
    if claim::open_as(db, claim_id, claimed_at, sd_id, &new.session_id, new.track.as_deref())? {
        return Ok(());
    }
    Err(claimed_by_another(&claim::look(db, None, sd_id)?, sd_id))
}

/// Closes the acquisition that `old` held.
fn ended(
    db: &Db<'_>,
    old: &SessionRow,
    at: DateTime<Utc>,
    reason: &str,
    taken_over_by: Option<&str>,
) -> Result<()> {
    let Some((_, claim_id)) = old.claim() else {
        return Ok(());
    };
    claim::close(db, claim_id, at, reason, taken_over_by)?;
    let (event_type, detail) = match taken_over_by {
        Some(session_id) => (EventType::TakenOver, json!({ "taken_over_by": session_id })),
        None if claim::reap::is_reaping(claim_id) => {
            let on_board = Place::of(db.catalog()?.sessions, &old.session_id).latest();
            let latest = old.heartbeat_at.max(on_board.map(time::from_microseconds));
            if old.stale_noted_for != latest {
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

/// An open acquisition begins and ends with its session's row only.
#[pg_trigger]
pub fn protect_open_claim<'a>(trigger: &'a PgTrigger<'a>) -> Row<'a> {
    run(|| {
        let (old, new) = (trigger.old(), trigger.new());
        if claim::is_opening() || (old.is_none() && is_restoring()) {
            return Ok(new.or(old).map(|tuple| tuple.into_owned()));
        }
        Err(ClaimError::DirectWrite {
            code: PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            message: "open claims are written through claude_sessions".into(),
            detail: Some("sd_claims is derived from claude_sessions by its triggers.".into()),
            hint: "Call claim_sd() or release_sd(), or write sd_id in claude_sessions.",
        })
    })
}

/// No row trigger sees a TRUNCATE.
#[pg_trigger]
pub fn refuse_truncate_while_claimed<'a>(trigger: &'a PgTrigger<'a>) -> Row<'a> {
    run(|| {
        let table = trigger.table_name()?;
        if time::has_transaction_snapshot() {
            return Err(ClaimError::NeedsReadCommitted { what: "truncate sessions or claims" });
        }
        match Db::connect(session::any_holder)? {
            None => Ok(None),
            Some(holder) => Err(ClaimError::DirectWrite {
                code: PgSqlErrorCode::ERRCODE_OBJECT_IN_USE,
                message: format!("cannot truncate \"{table}\" while SDs are claimed"),
                detail: holder.claim.map(|(sd_id, _)| {
                    format!("Session \"{}\" holds SD \"{sd_id}\".", holder.session_id)
                }),
                hint: "Use DELETE, which releases claims row by row, or release them first.",
            }),
        }
    })
}
