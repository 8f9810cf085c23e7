//! The extension's own backlog, found and written row by row.

use std::rc::Rc;

use crate::error::Result;
use crate::spi::catalog::Catalog;
use crate::spi::row::Row;
use crate::spi::statement::Db;
use crate::spi::table::layout::directives as column;
use crate::spi::table::{Key, Lock, Name, Snapshot, Table, TableRow, Wait};

use super::Found;
use super::mirror::write_as_owner;
use super::mirror_row::MirrorRow;

/// The SD of that id.
pub fn find(db: &Db<'_>, sd_id: &str) -> Result<Option<Found>> {
    let table = Table::to_read(db, Name::Directives)?;
    let snapshot = Snapshot::take();
    let Some(row) = table.find(&snapshot, column::BY_SD_ID, Key::Text(sd_id)) else {
        return Ok(None);
    };
    let status = row.text(column::STATUS)?;
    Ok(Some(Found {
        sd_id: row.required_text(column::SD_ID, "strategic_directives_v2.sd_id")?,
        is_terminal: is_terminal(db, status.as_deref())?,
        status,
        says_free: says_free(&row)?,
    }))
}

/// Whether the backlog has the SD, unfinished, as far as this backend knows the table. `None` where it does not.
pub fn is_unfinished_as_known(catalog: &Rc<Catalog>, sd_id: &str) -> Result<Option<bool>> {
    let Some(table) = Table::to_read_as_known(catalog, Name::Directives) else { return Ok(None) };
    let snapshot = Snapshot::take();
    let Some(row) = table.find(&snapshot, column::BY_SD_ID, Key::Text(sd_id)) else {
        return Ok(Some(false));
    };
    Ok(Some(!is_terminal_in(catalog, row.text(column::STATUS)?.as_deref())))
}

/// Whether a status is one of a finished SD.
pub fn is_terminal(db: &Db<'_>, status: Option<&str>) -> Result<bool> {
    Ok(is_terminal_in(&*db.catalog()?, status))
}

fn is_terminal_in(catalog: &Catalog, status: Option<&str>) -> bool {
    let mut terminal =
        catalog.backlog.iter().flat_map(|backlog| &backlog.columns.terminal_statuses);
    status.is_some_and(|status| terminal.any(|terminal| terminal.eq_ignore_ascii_case(status)))
}

/// Whether the SD's row says that nobody works on it.
pub fn says_free(row: &TableRow) -> Result<bool> {
    Ok(!row.flag(column::IS_WORKING_ON)? && row.is_null(column::ACTIVE_SESSION_ID))
}

/// Locks the SD until the transaction ends.
pub fn lock(db: &Db<'_>, sd_id: &str, wait: Wait) -> Result<Lock> {
    let table = Table::to_write(db, Name::Directives)?;
    let snapshot = Snapshot::take();
    let Some(row) = table.find(&snapshot, column::BY_SD_ID, Key::Text(sd_id)) else {
        return Ok(Lock::Gone);
    };
    Ok(match table.lock(&snapshot, &row, wait)? {
        Lock::Held(row) if row.text(column::SD_ID)?.as_deref() != Some(sd_id) => Lock::Gone,
        lock => lock,
    })
}

/// Locks an SD that was found, unless another transaction is writing it.
pub fn try_lock_found(db: &Db<'_>, snapshot: &Snapshot, found: &TableRow) -> Result<Lock> {
    let table = Table::to_write(db, Name::Directives)?;
    let lock = table.lock(snapshot, found, Wait::Skip)?;
    if let Lock::Held(row) = &lock {
        let sd_id = row.required_text(column::SD_ID, "strategic_directives_v2.sd_id")?;
        table.remember(Key::Text(&sd_id), row);
    }
    Ok(lock)
}

/// Makes the SD's row say that `session_id` works on it, or nobody. False where a trigger of the user's has had its own
/// way.
pub fn sync(db: &Db<'_>, sd_id: &str, session_id: Option<&str>) -> Result<bool> {
    loop {
        pgrx::check_for_interrupts!();
        let table = Table::to_write(db, Name::Directives)?;
        let snapshot = Snapshot::take();
        let Some(row) = table.find(&snapshot, column::BY_SD_ID, Key::Text(sd_id)) else {
            return Ok(true);
        };
        let write = || MirrorRow::OWN.write(db, &table, &snapshot, &row, session_id);
        let says = if table.runs_others_code() { write_as_owner(db, write) } else { write() };
        if let Some(says) = says? {
            return Ok(says);
        }
    }
}
