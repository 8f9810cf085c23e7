//! Writing what a session holds. The triggers see to all that follows from it.

use super::Session;
use crate::error::{ClaimError, Result};
use crate::spi::intent::{Intent, Meaning};
use crate::spi::statement::Db;
use crate::spi::table::layout::sessions as column;
use crate::spi::table::{Key, Lock, Name, Snapshot, Table, TableRow, Wait};
use crate::spi::wait;

/// Writes what `change` makes of the session. `None` where there is no such session, or `change` wants nothing.
///
/// Waits for a transaction that is writing the session, and asks again with what that made of it.
pub fn change(
    db: &Db<'_>,
    session_id: &str,
    change: impl Fn(&Session) -> Option<Session>,
) -> Result<Option<Session>> {
    loop {
        pgrx::check_for_interrupts!();
        let table = Table::to_write(db, Name::Sessions)?;
        let snapshot = Snapshot::take();
        let Some(row) = table.find(&snapshot, column::BY_SESSION_ID, Key::Text(session_id)) else {
            return Ok(None);
        };
        let old = Session::read(&row)?;
        let Some(new) = change(&old) else {
            return Ok(None);
        };
        // What it is to be says when that was, which is after the wait.
        if row.is_contested() {
            wait::giving_way_unless_guarding(|| table.lock(&snapshot, &row, Wait::Block))?;
            continue;
        }
        if write(db, &table, &snapshot, &row, &new)? {
            return Ok(Some(new));
        }
    }
}

/// False where another transaction has changed the row since.
fn write(
    db: &Db<'_>,
    table: &Table,
    snapshot: &Snapshot,
    row: &TableRow,
    new: &Session,
) -> Result<bool> {
    let _meaning = Meaning::to(Intent::Session);
    Ok(table.update(db, snapshot, row, &new.written()?)?.is_some())
}

/// A session whose row this transaction has locked.
pub struct Held {
    pub session: Session,
    row: TableRow,
    snapshot: Snapshot,
    table: Table,
}

/// Locks the session's row until the transaction ends. `None` where there is no such session, or
/// somebody else is writing it and it was not to be waited for.
pub fn hold(db: &Db<'_>, session_id: &str, wait: Wait) -> Result<Option<Held>> {
    let table = Table::to_write(db, Name::Sessions)?;
    loop {
        pgrx::check_for_interrupts!();
        let snapshot = Snapshot::take();
        let Some(found) = table.find(&snapshot, column::BY_SESSION_ID, Key::Text(session_id))
        else {
            return Ok(None);
        };
        let mut lock = table.lock(&snapshot, &found, Wait::Skip)?;
        if matches!(lock, Lock::Busy) && wait == Wait::Block {
            lock = wait::giving_way_unless_guarding(|| table.lock(&snapshot, &found, wait))?;
        }
        match lock {
            Lock::Held(row) => {
                let session = Session::read(&row)?;
                if session.session_id != session_id {
                    continue;
                }
                return Ok(Some(Held { session, row, snapshot, table }));
            }
            Lock::Busy => return Ok(None),
            Lock::Gone => {}
        }
    }
}

impl Held {
    /// Writes the session as it is to be.
    pub fn write(self, db: &Db<'_>, new: &Session) -> Result<()> {
        if write(db, &self.table, &self.snapshot, &self.row, new)? {
            return Ok(());
        }
        // Nobody else can have changed it.
        Err(ClaimError::Corrupt { what: "claude_sessions" })
    }
}
