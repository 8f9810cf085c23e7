//! The triggers on the backlog, whichever table that is.

use pg_claims_core::id;
use pgrx::PgSqlErrorCode;
use pgrx::prelude::*;

use super::row::{self, Value};
use super::{Row, Side, is_restoring, run_as_owner, run_on_own_table, text_of};
use crate::error::{ClaimError, Result};
use crate::identity;
use crate::pg::time;
use crate::spi::catalog::{self, Catalog};
use crate::spi::directive::{self, Backlog};
use crate::spi::{Db, claim, intent, session};

/// An SD that is finished or deleted is released in the same transaction.
#[pg_trigger]
pub fn release_finished_directive<'a>(trigger: &'a PgTrigger<'a>) -> Row<'a> {
    run_as_owner(trigger, || {
        Db::within(|db| {
            let catalog = db.catalog()?;
            let Some(backlog) = in_use(&catalog, trigger)? else {
                return Ok(());
            };
            let Some(sd_id) = canonical_id(backlog, trigger, Side::Old)? else {
                return Ok(());
            };
            see_latest_claims(db, backlog, &sd_id)?;
            if trigger.new().is_none() {
                // A row that moves to another partition is deleted here and inserted there.
                return match claim::look(db, None, &sd_id)?.sd {
                    Some(sd) if sd.sd_id == sd_id => match sd.status.filter(|_| sd.is_terminal) {
                        Some(status) => {
                            release(db, &sd_id, &format!("sd_{}", status.to_ascii_lowercase()))
                        }
                        None => Ok(()),
                    },
                    _ => release(db, &sd_id, "sd_deleted"),
                };
            }
            if canonical_id(backlog, trigger, Side::New)?.as_ref() != Some(&sd_id) {
                return refuse_rename(db, sd_id);
            }
            match finished_status(backlog, trigger)? {
                Some(status) => release(db, &sd_id, &format!("sd_{status}")),
                None => Ok(()),
            }
        })?;
        Ok(None)
    })
}

/// TRUNCATE deletes every SD of the table, or of one partition.
#[pg_trigger]
pub fn release_truncated_directives<'a>(trigger: &'a PgTrigger<'a>) -> Row<'a> {
    run_as_owner(trigger, || {
        Db::within(|db| {
            let catalog = db.catalog()?;
            if in_use(&catalog, trigger)?.is_none() {
                return Ok(());
            }
            if time::has_transaction_snapshot() {
                return Err(ClaimError::NeedsReadCommitted { what: "truncate the backlog" });
            }
            while let Some(holder) = session::any_holder_of_nothing(db)? {
                if let Some(claim_id) = holder.claim_id {
                    session::let_go(db, &holder.session_id, claim_id, "sd_deleted", true)?;
                }
            }
            Ok(())
        })?;
        Ok(None)
    })
}

/// is_working_on and active_session_id are derived: whatever is written there by hand, also by a
/// client that saves whole rows, becomes what the claims say.
#[pg_trigger]
pub fn keep_directive_mirror<'a>(trigger: &'a PgTrigger<'a>) -> Row<'a> {
    match says_as_meant(trigger) {
        Ok(true) => return Ok(row::unchanged(trigger)),
        Ok(false) => {}
        Err(error) => error.raise(),
    }
    run_as_owner(trigger, || {
        if trigger.new().is_none() {
            return Ok(None);
        }
        let mirror = Db::within(|db| {
            let catalog = db.catalog()?;
            // A dump brings the claims along; they may come later.
            let Some(backlog) = in_use(&catalog, trigger)?.filter(|_| !is_restoring()) else {
                return Ok(None);
            };
            let Some(sd_id) = canonical_id(backlog, trigger, Side::New)? else {
                return Ok(None);
            };
            if trigger.old().is_none() && Some(trigger.relid()?) == catalog.own_backlog {
                // A bound table's ids are its owner's; ours are such that the functions take them.
                id::check(Some(&sd_id))
                    .map_err(|rule| ClaimError::InvalidId { argument: "sd_id", rule })?;
            }
            let session_id = match intent::mirrored() {
                Some((mirrored, session_id)) if mirrored == sd_id => session_id,
                _ => session::holder(db, &sd_id)?.map(|session| session.session_id),
            };
            Ok(Some((catalog, session_id)))
        })?;
        let Some((catalog, session_id)) = mirror else {
            return Ok(row::unchanged(trigger));
        };
        let columns = catalog.backlog.as_ref().map(|backlog| &backlog.columns);
        let mut values = Vec::new();
        if let Some(column) = columns.and_then(|columns| columns.is_working_on.as_deref()) {
            values.push((column, Value::Flag(session_id.is_some())));
        }
        if let Some(column) = columns.and_then(|columns| columns.active_session_id.as_deref()) {
            values.push((column, Value::Text(session_id)));
        }
        row::changed(trigger, values)
    })
}

/// Whether it is the extension that writes the mirror, and no trigger has had its way with it.
fn says_as_meant(trigger: &PgTrigger<'_>) -> Result<bool> {
    let (Some((sd_id, session_id)), Some(catalog)) = (intent::mirrored(), catalog::known()) else {
        return Ok(false);
    };
    let Some(backlog) = in_use(&catalog, trigger)? else { return Ok(false) };
    let table = trigger.relid()?;
    if (backlog.table_oid != table && !backlog.partitions.contains(&table))
        || canonical_id(backlog, trigger, Side::New)? != Some(sd_id)
    {
        return Ok(false);
    }
    let is_working_on = Some(if session_id.is_some() { "t" } else { "f" });
    let columns = &backlog.columns;
    for (column, what) in [
        (&columns.is_working_on, is_working_on),
        (&columns.active_session_id, session_id.as_deref()),
    ] {
        if let Some(column) = column
            && text_of(trigger, Side::New, column)?.as_deref() != what
        {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether somebody holds an SD may change while its row waits for others to be written: for one of the same key that
/// is being deleted. So it is looked at again when the row is there.
#[pg_trigger]
pub fn correct_directive_mirror<'a>(trigger: &'a PgTrigger<'a>) -> Row<'a> {
    run_as_owner(trigger, || {
        Db::within(|db| {
            let catalog = db.catalog()?;
            let Some(backlog) = in_use(&catalog, trigger)?.filter(|_| !is_restoring()) else {
                return Ok(());
            };
            match canonical_id(backlog, trigger, Side::New)? {
                Some(sd_id) => directive::correct(db, &sd_id),
                None => Ok(()),
            }
        })?;
        Ok(None)
    })
}

/// Whoever writes the binding gets the views that go with it.
#[pg_trigger]
pub fn rebuild_directives_view<'a>(trigger: &'a PgTrigger<'a>) -> Row<'a> {
    // Entered with the rights of whoever writes the row: in the functions those of the extension's owner.
    let writer = identity::current();
    run_on_own_table(trigger, || {
        // The view is the extension owner's, and shows what that role may read.
        if !identity::current().is_had_by(writer) {
            return Err(ClaimError::DirectWrite {
                code: PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
                message: "permission denied to bind a backlog by hand".into(),
                detail: Some(
                    "directive_binding is written by bind_directives() and unbind_directives()."
                        .into(),
                ),
                hint: "Call those, as an operator who owns the table.",
            });
        }
        Db::within(directive::rebuild_views)?;
        Ok(None)
    })
}

/// The backlog, if the trigger's table is the one in use: the extension's own table keeps its
/// triggers while another one is bound.
fn in_use<'c>(catalog: &'c Catalog, trigger: &PgTrigger<'_>) -> Result<Option<&'c Backlog>> {
    let is_own = Some(trigger.relid()?) == catalog.own_backlog;
    let backlog = catalog.backlog.as_ref();
    backlog.filter(|_| !is_own || catalog.uses_own_backlog()).map(Backlog::usable).transpose()
}

fn canonical_id(backlog: &Backlog, trigger: &PgTrigger<'_>, side: Side) -> Result<Option<String>> {
    for key in &backlog.columns.keys {
        let value = text_of(trigger, side, key)?;
        if value.is_some() {
            return Ok(value);
        }
    }
    Ok(None)
}

/// The new status in its usual spelling, if it is one in which an SD cannot be claimed.
fn finished_status(backlog: &Backlog, trigger: &PgTrigger<'_>) -> Result<Option<String>> {
    let Some(column) = &backlog.columns.status else {
        return Ok(None);
    };
    let status = text_of(trigger, Side::New, column)?.map(|status| status.to_ascii_lowercase());
    let terminal = &backlog.columns.terminal_statuses;
    Ok(status
        .filter(|status| terminal.iter().any(|terminal| terminal.eq_ignore_ascii_case(status))))
}

/// Under REPEATABLE READ and SERIALIZABLE a claim that was committed after the transaction's
/// snapshot is not seen. Where the backlog has mirror columns the claim has written the SD's row,
/// and the server itself reports the conflict. Where it has none, opening an acquisition does:
/// the unique index sees all claims, and one that the snapshot does not show is error 40001.
fn see_latest_claims(db: &Db<'_>, backlog: &Backlog, sd_id: &str) -> Result<()> {
    let c = &backlog.columns;
    let is_mirrored = c.is_working_on.is_some() || c.active_session_id.is_some();
    if is_mirrored {
        return Ok(());
    }
    claim::see_latest(db, sd_id)
}

fn release(db: &Db<'_>, sd_id: &str, reason: &str) -> Result<()> {
    // The SD's row is locked by the statement that fired the trigger, so nobody can claim it; a
    // further round means that its session was just being released.
    while let Some(holder) = session::holder(db, sd_id)? {
        if let Some(claim_id) = holder.claim_id {
            session::let_go(db, &holder.session_id, claim_id, reason, true)?;
        }
    }
    Ok(())
}

fn refuse_rename(db: &Db<'_>, sd_id: String) -> Result<()> {
    match session::holder(db, &sd_id)? {
        None => Ok(()),
        Some(holder) => Err(ClaimError::DirectWrite {
            code: PgSqlErrorCode::ERRCODE_OBJECT_IN_USE,
            message: format!("cannot change the key of SD \"{sd_id}\" while it is claimed"),
            detail: Some(format!("Session \"{}\" holds it.", holder.session_id)),
            hint: "Release it first, with release_sd().",
        }),
    }
}
