//! Keeping the heartbeat board in step with the sessions.

use pgrx::prelude::*;

use pgrx::heap_tuple::PgHeapTuple;
use pgrx::{PgSqlErrorCode, WhoAllocated};

use super::{Row, run};
use crate::board::Place;
use crate::error::{ClaimError, Result};

/// The table alone says when the session last beat, and answers its next heartbeat.
#[pg_trigger]
pub fn forget_heartbeat<'a>(trigger: &'a PgTrigger<'a>) -> Row<'a> {
    run(|| {
        if let Some(new) = trigger.new() {
            check_finite(&new)?;
        }
        let old = trigger.old();
        if let Some(session_id) =
            old.and_then(|row| super::column::<String, _>(&row, "session_id").ok()?)
        {
            Place::of(trigger.relid()?, &session_id).remove();
        }
        Ok(None)
    })
}

/// An infinite heartbeat would be immortal, or stale for ever.
pub fn check_finite<A: WhoAllocated>(row: &PgHeapTuple<'_, A>) -> Result<()> {
    for column in ["heartbeat_at", "silent_until"] {
        let at = super::column::<TimestampWithTimeZone, A>(row, column)?;
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
