//! After a session's row was written: the claim history and the audit.

use pgrx::PgSqlErrorCode;
use pgrx::prelude::*;

use super::{Row, is_restoring, row, run_on_own_table, session_rows};
use crate::error::ClaimError;
use crate::spi::{Db, claim, installation, order, session, time};

#[pg_trigger]
pub fn record_claim_history<'a>(trigger: &'a PgTrigger<'a>) -> Row<'a> {
    run_on_own_table(trigger, || {
        let (old, new) = session_rows(trigger)?;
        Db::within(|db| match (&old, &new) {
            (None, Some(_)) if is_restoring() => Ok(()),
            (old, new) => {
                installation::note_use(db)?;
                match (old, new) {
                    (None, Some(new)) => claim::follow_insert(db, new),
                    (Some(old), Some(new)) => claim::follow_update(db, old, new),
                    (Some(old), None) => claim::follow_delete(db, old),
                    (None, None) => Ok(()),
                }
            }
        })?;
        Ok(None)
    })
}

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
    run_on_own_table(trigger, || {
        if claim::is_opening() || (trigger.old().is_none() && is_restoring()) {
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
