//! What is derived may not be written, nor emptied.

use pgrx::PgSqlErrorCode;
use pgrx::prelude::*;

use super::{Row, is_restoring, row, run_on_own_table};
use crate::error::ClaimError;
use crate::pg::time;
use crate::spi::intent::{self, Intent};
use crate::spi::{Db, installation, order, session};

/// Before a statement that writes rows of a dump, of which the worker must not touch any until all are there.
#[pg_trigger]
pub fn begin_restoring<'a>(trigger: &'a PgTrigger<'a>) -> Row<'a> {
    run_on_own_table(trigger, || {
        if is_restoring() {
            let table = trigger.table_name()?;
            Db::within(|db| {
                installation::begin_restoring(db)?;
                if table == "event_frontier" { order::forget_frontier(db) } else { Ok(()) }
            })?;
        }
        Ok(None)
    })
}

/// An open acquisition begins and ends with its session's row only.
#[pg_trigger]
pub fn protect_open_claim<'a>(trigger: &'a PgTrigger<'a>) -> Row<'a> {
    if intent::is(&Intent::History) {
        return Ok(row::unchanged(trigger));
    }
    run_on_own_table(trigger, || {
        if trigger.old().is_none() && is_restoring() {
            return Ok(row::unchanged(trigger));
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
    run_on_own_table(trigger, || {
        let table = trigger.table_name()?;
        if time::has_transaction_snapshot() {
            return Err(ClaimError::NeedsReadCommitted { what: "truncate sessions or claims" });
        }
        match Db::within(session::any_holder)? {
            None => Ok(None),
            Some(holder) => Err(ClaimError::DirectWrite {
                code: PgSqlErrorCode::ERRCODE_OBJECT_IN_USE,
                message: format!("cannot truncate \"{table}\" while SDs are claimed"),
                detail: holder.sd_id.map(|sd_id| {
                    format!("Session \"{}\" holds SD \"{sd_id}\".", holder.session_id)
                }),
                hint: "Use DELETE, which releases claims row by row, or release them first.",
            }),
        }
    })
}
