//! The triggers on guarded tables.

use pgrx::prelude::*;

use super::{Row, Side, may_restore, reads_dump, row, run, text_of};
use crate::error::{ClaimError, Result};
use crate::spi::{guard, intent};

/// A row of an SD can be written only by a transaction that has asserted the claim on it. Looks at
/// what this process remembers, and runs no statement.
#[pg_trigger]
pub fn check_guarded_write<'a>(trigger: &'a PgTrigger<'a>) -> Row<'a> {
    run(|| {
        let arguments = trigger.extra_args()?;
        let [column] = arguments.as_slice() else {
            return Err(ClaimError::Corrupt { what: "the guard's argument" });
        };
        // A side that the operation has not has no SD either.
        check(trigger, Side::Old, column)?;
        check(trigger, Side::New, column)?;
        Ok(row::unchanged(trigger))
    })
}

fn check(trigger: &PgTrigger<'_>, side: Side, column: &str) -> Result<()> {
    match text_of(trigger, side, column)? {
        // A row of no SD, or none at all.
        None => Ok(()),
        Some(sd_id) if guard::is_asserted(&sd_id) || is_mirror_write(&sd_id) => Ok(()),
        Some(_) if is_restored_by_owner(trigger) => Ok(()),
        Some(sd_id) => Err(ClaimError::Unguarded { sd_id, table: trigger.table_name()? }),
    }
}

/// Whether a dump's rows are being restored, by somebody who may take the guard off.
fn is_restored_by_owner(trigger: &PgTrigger<'_>) -> bool {
    // SAFETY: in a trigger the server gives a valid relation; asks about this backend's roles.
    reads_dump()
        && unsafe {
            let relation = trigger.trigger_data().tg_relation;
            may_restore((*(*relation).rd_rel).relowner)
        }
}

/// Where the guarded table is the backlog itself: the extension's own write of who works on the SD.
fn is_mirror_write(sd_id: &str) -> bool {
    intent::mirrored().is_some_and(|(mirrored, _)| mirrored == sd_id)
}

/// No row trigger sees a TRUNCATE.
#[pg_trigger]
pub fn refuse_guarded_truncate<'a>(trigger: &'a PgTrigger<'a>) -> Row<'a> {
    run(|| Err(ClaimError::GuardedTruncate { table: trigger.table_name()? }))
}
