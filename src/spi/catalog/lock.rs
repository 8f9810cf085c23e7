//! Locking the backlog that the catalogue names, which may be another one by the time that the lock is granted.

use std::rc::Rc;

use super::{Catalog, doubt, known};
use crate::error::{ClaimError, Result};
use crate::pg::lock::{self, Mode};
use crate::spi::directive::{self, Backlog};
use crate::spi::statement::Db;

/// How often somebody locks what the catalogue names and finds that it has named something else meanwhile. Each time
/// whatever was locked stays locked, so that it cannot change much more often than once.
pub const MOST_TRIES: u32 = 20;

/// Takes the locks that a change of the backlog excludes, and learns of a change that was waited
/// for. Held until the transaction ends, as every writer of a table holds its lock. First the
/// backlog, then the claims, which is the order of a change of the backlog and of whoever finishes
/// an SD.
pub fn lock_backlog(db: &Db<'_>) -> Result<()> {
    lock_all(db, Mode::RowShare, true)?;
    Ok(())
}

/// The catalogue, with the backlog as it is now, and stays as far as the lock of a reader can keep it.
/// An error where it has code that must not run with the extension's rights, which the server does already
/// when it plans a statement.
pub fn usable_backlog(db: &Db<'_>) -> Result<Rc<Catalog>> {
    let catalog = lock_all(db, Mode::AccessShare, false)?;
    if let Some(backlog) = &catalog.backlog {
        backlog.usable()?;
    }
    Ok(catalog)
}

/// Keeps everybody else from making, ending and finishing claims until the transaction ends, in the order of
/// [`lock_backlog`]. Heartbeats touch neither table and go on.
pub fn exclude_claims(db: &Db<'_>) -> Result<()> {
    let catalog = db.catalog()?;
    if let Some(backlog) = &catalog.backlog {
        lock::relation(backlog.table_oid, Mode::ShareRowExclusive);
    }
    lock::relation(catalog.sd_claims, Mode::ShareRowExclusive);
    Ok(())
}

/// The same without waiting: false where somebody keeps readers off the backlog, or it cannot be used. The lock stays
/// until the transaction ends.
pub fn try_usable_backlog(db: &Db<'_>) -> Result<bool> {
    let catalog = db.catalog()?;
    let Some(backlog) = &catalog.backlog else { return Ok(false) };
    Ok(backlog.usable().is_ok() && try_lock_to_read(backlog) && known().is_some())
}

fn try_lock_to_read(backlog: &Backlog) -> bool {
    std::iter::once(&backlog.table_oid)
        .chain(&backlog.partitions)
        .all(|table| lock::try_relation(*table, Mode::AccessShare))
}

/// Whether the backlog says that an SD can go on being held, where that takes neither a statement nor a wait: `None`
/// where only a statement can tell.
pub fn is_unfinished_as_known(sd_id: &str) -> Result<Option<bool>> {
    let Some(catalog) = known().filter(|catalog| catalog.is_own_backlog_in_use) else {
        return Ok(None);
    };
    match &catalog.backlog {
        Some(backlog) if try_lock_to_read(backlog) => {
            directive::is_unfinished_as_known(&catalog, sd_id)
        }
        // A heartbeat waits for no work.
        _ => Ok(Some(true)),
    }
}

fn lock_all(db: &Db<'_>, mode: Mode, with_claims: bool) -> Result<Rc<Catalog>> {
    for _ in 0..MOST_TRIES {
        pgrx::check_for_interrupts!();
        let catalog = db.catalog()?;
        if let Some(backlog) = &catalog.backlog {
            lock::relation(backlog.table_oid, mode);
            // Planning a statement looks at each, and would wait for whoever is changing one.
            backlog.partitions.iter().for_each(|partition| lock::relation(*partition, mode));
        }
        if with_claims {
            lock::relation(catalog.sd_claims, Mode::RowExclusive);
        }
        // Whoever was waited for may have changed it.
        doubt();
        let now = db.catalog()?;
        if Rc::ptr_eq(&now, &catalog) || has_same_backlog(&now, &catalog) {
            return Ok(now);
        }
    }
    // Whoever keeps one snapshot may go on seeing a backlog that is gone.
    Err(ClaimError::Serialization)
}

fn has_same_backlog(one: &Catalog, other: &Catalog) -> bool {
    match (&one.backlog, &other.backlog) {
        (Some(one), Some(other)) => {
            one.table_oid == other.table_oid && one.partitions == other.partitions
        }
        (None, None) => true,
        _ => false,
    }
}
