//! After a session's row was written: the claim history and the audit.

use chrono::{DateTime, Utc};
use pg_claims_core::age;
use pgrx::PgSqlErrorCode;
use pgrx::datum::TimestampWithTimeZone;
use pgrx::prelude::*;
use serde_json::json;

use super::{Row, SessionRow, is_restored, run, session_rows};
use crate::error::{ClaimError, Result};
use crate::spi::event::{self, Event, EventType};
use crate::spi::{Db, claim, session, time};

#[pg_trigger]
pub fn record_claim_history<'a>(trigger: &'a PgTrigger<'a>) -> Row<'a> {
    run(|| {
        let (old, new) = session_rows(trigger)?;
        Db::connect(|db| match (&old, &new) {
            (None, Some(new)) if is_restored(new.created_at) => Ok(()),
            (None, Some(new)) => inserted(db, new),
            (Some(old), Some(new)) => updated(db, old, new),
            (Some(old), None) => deleted(db, old),
            (None, None) => Ok(()),
        })?;
        Ok(None)
    })
}

fn inserted(db: &Db<'_>, new: &SessionRow) -> Result<()> {
    event::record(db, plain(EventType::Registered, &new.session_id, None))?;
    match new.claim() {
        Some((sd_id, claim_id)) => began(db, new, sd_id, claim_id, EventType::Claimed, json!({})),
        None => Ok(()),
    }
}

fn updated(db: &Db<'_>, old: &SessionRow, new: &SessionRow) -> Result<()> {
    let reason = new.release_reason.as_deref();
    match (old.claim(), new.claim()) {
        (before, now) if before == now => {}
        (None, Some((sd_id, claim_id))) => {
            began(db, new, sd_id, claim_id, EventType::Claimed, json!({}))?;
        }
        (Some((given_up, _)), Some((sd_id, claim_id))) => {
            ended(db, old, time::now(), "switched", None, None)?;
            let detail = json!({ "released_sd": given_up });
            began(db, new, sd_id, claim_id, EventType::Switched, detail)?;
        }
        (Some((_, claim_id)), None) => {
            let lost = new.lost_claim_id == Some(claim_id);
            let event_type = match (lost, &new.lost_to) {
                (true, Some(_)) => EventType::TakenOver,
                (true, None) => EventType::Reaped,
                (false, _) => EventType::Released,
            };
            let taken_over_by = new.lost_to.as_deref().filter(|_| lost);
            let at = new.released_at.unwrap_or_else(time::now);
            ended(db, old, at, reason.unwrap_or("released"), taken_over_by, Some(event_type))?;
        }
        (None, None) => {}
    }
    match (old.status.as_str(), new.status.as_str()) {
        ("released", "released") => Ok(()),
        ("released", _) => event::record(db, plain(EventType::Resumed, &new.session_id, None)),
        (_, "released") => event::record(db, plain(EventType::Ended, &new.session_id, reason)),
        _ => Ok(()),
    }
}

fn deleted(db: &Db<'_>, old: &SessionRow) -> Result<()> {
    const REASON: &str = "session_deleted";
    if old.claim().is_some() {
        ended(db, old, time::now(), REASON, None, Some(EventType::Released))?;
    }
    if old.status == "released" {
        return Ok(());
    }
    event::record(db, plain(EventType::Ended, &old.session_id, Some(REASON)))
}

fn plain<'a>(event_type: EventType, session_id: &'a str, reason: Option<&'a str>) -> Event<'a> {
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

fn began(
    db: &Db<'_>,
    new: &SessionRow,
    sd_id: &str,
    claim_id: i64,
    event_type: EventType,
    detail: serde_json::Value,
) -> Result<()> {
    let event = Event {
        sd_id: Some(sd_id),
        claim_id: Some(claim_id),
        detail,
        ..plain(event_type, &new.session_id, None)
    };
    event::record(db, event)
}

/// Closes the acquisition that `old` held; a switch has an event of its own for both sides.
fn ended(
    db: &Db<'_>,
    old: &SessionRow,
    at: DateTime<Utc>,
    reason: &str,
    taken_over_by: Option<&str>,
    event_type: Option<EventType>,
) -> Result<()> {
    let Some((sd_id, claim_id)) = old.claim() else {
        return Ok(());
    };
    claim::close(db, claim_id, at, reason, taken_over_by)?;
    let Some(event_type) = event_type else {
        return Ok(());
    };
    let detail = match taken_over_by {
        Some(session_id) => json!({ "taken_over_by": session_id }),
        None => json!({}),
    };
    let event = Event {
        sd_id: Some(sd_id),
        claim_id: Some(claim_id),
        held: old.claimed_at.map(|claimed_at| age::age(claimed_at, at)),
        detail,
        ..plain(event_type, &old.session_id, Some(reason))
    };
    event::record(db, event)
}

/// An open acquisition begins and ends with its session's row only.
#[pg_trigger]
pub fn protect_open_claim<'a>(trigger: &'a PgTrigger<'a>) -> Row<'a> {
    run(|| {
        let (old, new) = (trigger.old(), trigger.new());
        if claim::is_opening() {
            return Ok(new.or(old).map(|tuple| tuple.into_owned()));
        }
        if let (None, Some(tuple)) = (&old, &new) {
            let claimed_at = tuple.get_by_name::<TimestampWithTimeZone>("claimed_at")?;
            if claimed_at.is_some_and(|at| is_restored(time::from_server(at))) {
                return Ok(new.map(|tuple| tuple.into_owned()));
            }
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
