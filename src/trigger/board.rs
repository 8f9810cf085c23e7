//! Keeping the heartbeat board in step with the sessions.

use pgrx::prelude::*;

use pgrx::PgSqlErrorCode;

use super::{Row, SessionTuple, Side, run};
use crate::board::{self, Place};
use crate::error::{ClaimError, Result};
use crate::spi::row::Row as _;
use crate::spi::table::layout::sessions as column;

/// The table alone says when the session last beat, and answers its next heartbeat: at once for whoever has set it
/// back, and for the others once that is committed.
#[pg_trigger]
pub fn forget_heartbeat<'a>(trigger: &'a PgTrigger<'a>) -> Row<'a> {
    run(|| {
        if let Some(new) = SessionTuple::of(trigger, Side::New) {
            check_finite(&new)?;
        }
        if let Some(session_id) = session_of(trigger) {
            let table = trigger.relid()?;
            Place::of(table, &session_id).close();
            board::forget_at_commit(table, session_id);
        }
        Ok(None)
    })
}

/// The table answers the next heartbeats of a session that was changed or is gone, or of all. Their last
/// ones are kept: this may yet be rolled back.
#[pg_trigger]
pub fn close_on_board<'a>(trigger: &'a PgTrigger<'a>) -> Row<'a> {
    run(|| {
        match session_of(trigger) {
            Some(session_id) => Place::of(trigger.relid()?, &session_id).close(),
            None => board::close_all(trigger.relid()?),
        }
        Ok(None)
    })
}

/// A new session has not beaten as often as one of its id that was deleted. Once it is committed: the
/// deletion may yet be rolled back.
pub(super) fn forget_predecessor(table: pg_sys::Oid, session_id: &str) {
    if let Some(before) = Place::of(table, session_id).latest() {
        let session_id = session_id.to_owned();
        board::at_commit(move || Place::of(table, &session_id).remove_if_over(before));
    }
}

fn session_of(trigger: &PgTrigger<'_>) -> Option<String> {
    SessionTuple::of(trigger, Side::Old)?.text(column::SESSION_ID).ok()?
}

/// An infinite heartbeat would be immortal, or stale for ever.
pub(super) fn check_finite(row: &SessionTuple) -> Result<()> {
    for (column, position) in
        [("heartbeat_at", column::HEARTBEAT_AT), ("silent_until", column::SILENT_UNTIL)]
    {
        let at = row.column::<TimestampWithTimeZone>(position)?;
        if at.is_some_and(|at| at.is_infinity() || at.is_neg_infinity()) {
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
