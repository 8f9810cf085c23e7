//! One row of the backlog and who works on its SD, written by the executor's parts.

use pgrx::pg_sys;

use super::Backlog;
use crate::error::{ClaimError, Result};
use crate::spi::row::Row;
use crate::spi::statement::Db;
use crate::spi::table::layout::directives;
use crate::spi::table::{Key, NewRow, Snapshot, Table, TableRow};

/// Where a row tells who works on the SD: the columns' positions.
pub struct MirrorRow {
    is_working_on: Option<usize>,
    active_session_id: Option<usize>,
}

impl MirrorRow {
    /// In the extension's own backlog.
    pub const OWN: Self = Self {
        is_working_on: Some(directives::IS_WORKING_ON),
        active_session_id: Some(directives::ACTIVE_SESSION_ID),
    };

    /// In a bound backlog. `None` where its columns have other types than the extension's own.
    fn bound(table: &Table, backlog: &Backlog) -> Option<Self> {
        let position = |column: &Option<String>, of_type| match column {
            Some(column) => table.position_of(column, of_type).map(Some),
            None => Some(None),
        };
        Some(Self {
            is_working_on: position(&backlog.columns.is_working_on, pg_sys::BOOLOID)?,
            active_session_id: position(&backlog.columns.active_session_id, pg_sys::TEXTOID)?,
        })
    }

    /// Makes the row say that `session_id` works on the SD, or nobody. Whether it says so then: a trigger of the user's may
    /// have its own way. `None` where another transaction has changed the row since it was found.
    pub fn write(
        &self,
        db: &Db<'_>,
        table: &Table,
        snapshot: &Snapshot,
        row: &TableRow,
        session_id: Option<&str>,
    ) -> Result<Option<bool>> {
        if self.says(row, session_id)? {
            return Ok(Some(true));
        }
        let mut new = NewRow::default();
        if let Some(position) = self.is_working_on {
            new = new.set(position, session_id.is_some());
        }
        if let Some(position) = self.active_session_id {
            new = new.set(position, session_id);
        }
        match table.update(db, snapshot, row, &new) {
            Ok(Some(written)) => self.says(&written, session_id).map(Some),
            Ok(None) => Ok(None),
            Err(ClaimError::WriteRefused { .. }) => Ok(Some(false)),
            Err(error) => Err(error),
        }
    }

    fn says(&self, row: &TableRow, session_id: Option<&str>) -> Result<bool> {
        if let Some(position) = self.is_working_on
            && (row.is_null(position) || row.flag(position)? != session_id.is_some())
        {
            return Ok(false);
        }
        Ok(match self.active_session_id {
            Some(position) => row.text(position)?.as_deref() == session_id,
            None => true,
        })
    }
}

/// Writes the row of a bound backlog that this transaction has locked, with the rights of whoever acts. Whether it says so
/// then; `None` where only a statement can write it, or find it.
pub fn sync_locked(db: &Db<'_>, sd_id: &str, session_id: Option<&str>) -> Result<Option<bool>> {
    let catalog = db.catalog()?;
    let Some(backlog) = &catalog.backlog else { return Ok(None) };
    let Some(table) = Table::to_write_bound(&catalog, backlog.table_oid) else { return Ok(None) };
    let Some(columns) = MirrorRow::bound(&table, backlog) else { return Ok(None) };
    let snapshot = Snapshot::take();
    match table.recall(&snapshot, Key::Text(sd_id)) {
        Some(row) => columns.write(db, &table, &snapshot, &row, session_id),
        None => Ok(None),
    }
}
