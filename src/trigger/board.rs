//! Keeping the heartbeat board in step with the sessions.

use chrono::{DateTime, Utc};
use pgrx::PgSqlErrorCode;
use pgrx::prelude::*;

use super::{Row, SessionTuple, Side, run};
use crate::board::{self, Place};
use crate::error::{ClaimError, Result};
use crate::pg::time;
use crate::spi::intent::{self, Intent};
use crate::spi::row::Row as _;
use crate::spi::table::layout::sessions as column;

/// Forgets the heartbeats of a session whose heartbeat was set back, or which was deleted; after a TRUNCATE, of
/// all.
#[pg_trigger]
pub fn forget_heartbeat<'a>(trigger: &'a PgTrigger<'a>) -> Row<'a> {
    run(|| {
        let new = SessionTuple::of(trigger, Side::New);
        let before = SessionTuple::of(trigger, Side::Old);
        new.as_ref().map_or(Ok(()), |new| check_finite(before.as_ref(), new))?;
        let table = trigger.relid()?;
        let Some(session_id) = id_in(trigger, Side::Old)? else {
            board::forget_all(table);
            return Ok(None);
        };
        let place = Place::of(table, &session_id);
        if let Some(new) = new {
            let old = SessionTuple::of(trigger, Side::Old);
            let old = old.map_or(Ok(None), |old| old.instant(column::HEARTBEAT_AT))?;
            let new = new.instant(column::HEARTBEAT_AT)?;
            // What the extension itself writes was the last heartbeat when it wrote it: one that has
            // come since is none that it sets back.
            let counts = if intent::is(&Intent::Own) { old } else { old.max(on_board(place)) };
            if new >= counts {
                return Ok(None);
            }
        }
        place.forget();
        Ok(None)
    })
}

fn on_board(place: Place<'_>) -> Option<DateTime<Utc>> {
    place.latest().map(time::from_microseconds)
}

fn id_in(trigger: &PgTrigger<'_>, side: Side) -> Result<Option<String>> {
    SessionTuple::of(trigger, side).map_or(Ok(None), |row| row.text(column::SESSION_ID))
}

/// An infinite heartbeat would be immortal, or stale for ever. One that was there before, written by a replica, keeps
/// nobody from writing the rest.
pub(super) fn check_finite(old: Option<&SessionTuple>, new: &SessionTuple) -> Result<()> {
    for (column, position) in
        [("heartbeat_at", column::HEARTBEAT_AT), ("silent_until", column::SILENT_UNTIL)]
    {
        let at = new.column::<TimestampWithTimeZone>(position)?;
        let before = old.map_or(Ok(None), |old| old.column::<TimestampWithTimeZone>(position))?;
        if at != before && at.is_some_and(|at| at.is_infinity() || at.is_neg_infinity()) {
            return Err(ClaimError::DirectWrite {
                code: PgSqlErrorCode::ERRCODE_CHECK_VIOLATION,
                message: format!("{column} of a session must not be infinite"),
                detail: None,
                hint: "Give a moment.",
            });
        }
    }
    Ok(())
}
