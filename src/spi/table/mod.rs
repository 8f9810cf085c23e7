//! Direct access to the extension's own tables, on the paths that are taken all the time.
//!
//! A statement costs more than what it does: the server starts a plan, checks rights, and reads the text
//! of constraints and of triggers' conditions anew. Here rows are found by an index and written one by
//! one, with the functions that the server's executor calls, and by its rules: a look takes a snapshot; a
//! write finds out what a concurrent transaction has made of the row; where the transaction keeps one
//! snapshot, a change that this does not show is error 40001.
//!
//! A direct write fires no trigger and checks no constraint. So a table is written directly only while it
//! is as the extension made it ([`Table::may_be_written`]), by callers that do what its triggers would do.
//! Otherwise they use statements. As no code of anybody else's runs then, nobody's rights matter.

mod known;
pub mod layout;
mod places;
mod read;
mod snapshot;
mod write;

use std::rc::Rc;

use pgrx::pg_sys;

use super::catalog::{self, Catalog};
use super::statement::Db;
use super::time;
use crate::error::{ClaimError, Result};
use crate::service;
use layout::Layout;

pub use known::{AllKnown, Known};
pub use places::init;
pub use read::{Key, TableRow};
pub use snapshot::Snapshot;
pub use write::{Lock, NewRow, Update, Wait};

/// One of the tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Name {
    Sessions,
    Claims,
    Events,
    Holds,
    Conflicts,
    Directives,
}

impl Name {
    /// All of them, in their order.
    pub const ALL: [Self; 6] = [
        Self::Sessions,
        Self::Claims,
        Self::Events,
        Self::Holds,
        Self::Conflicts,
        Self::Directives,
    ];

    /// What the table is like.
    pub fn layout(self) -> &'static Layout {
        match self {
            Self::Sessions => &layout::sessions::LAYOUT,
            Self::Claims => &layout::claims::LAYOUT,
            Self::Events => &layout::events::LAYOUT,
            Self::Holds => &layout::holds::LAYOUT,
            Self::Conflicts => &layout::conflicts::LAYOUT,
            Self::Directives => &layout::directives::LAYOUT,
        }
    }
}

/// A table, open for the length of a call. Its lock stays until the transaction ends.
pub struct Table {
    known: Rc<Known>,
    relation: pg_sys::Relation,
}

impl Table {
    /// Opens it to be read.
    pub fn to_read(db: &Db<'_>, name: Name) -> Result<Self> {
        Self::open(db, name, pg_sys::AccessShareLock)
    }

    /// Opens it for rows to be locked or written.
    pub fn to_write(db: &Db<'_>, name: Name) -> Result<Self> {
        Self::open(db, name, pg_sys::RowExclusiveLock)
    }

    /// Opens it to be written, if it is known already and may be written directly. Not on a standby: there whoever
    /// connects is told.
    pub fn to_write_directly(name: Name) -> Option<Self> {
        if service::is_in_recovery() {
            return None;
        }
        let table = Self::open_as_known(&catalog::known()?, name, pg_sys::RowExclusiveLock)?;
        table.may_be_written().then_some(table)
    }

    /// Opens it to be read as it is known. `None` where it is known no more.
    pub fn to_read_as_known(catalog: &Rc<Catalog>, name: Name) -> Option<Self> {
        Self::open_as_known(catalog, name, pg_sys::AccessShareLock)
    }

    /// `None` where it is known no more.
    fn open_as_known(catalog: &Rc<Catalog>, name: Name, mode: u32) -> Option<Self> {
        let table = Self::open_known(catalog, name, mode)?;
        // Whoever was waited for may have changed it; from here on nobody can.
        catalog::known().is_some_and(|now| Rc::ptr_eq(&now, catalog)).then_some(table)
    }

    fn open(db: &Db<'_>, name: Name, mode: u32) -> Result<Self> {
        for _ in 0..catalog::MOST_TRIES {
            pgrx::check_for_interrupts!();
            let catalog = db.catalog()?;
            if catalog.table(name).is_none() {
                return Err(ClaimError::Corrupt { what: name.layout().name });
            }
            let Some(table) = Self::open_known(&catalog, name, mode) else {
                catalog::doubt();
                continue;
            };
            // Whoever was waited for may have changed it; from here on nobody can. It counts what it is like: that
            // the catalogue is read once more, for whatever reason, does not mean that this has changed.
            if catalog::known().is_none() && catalog::is_still(db, &catalog, name, &table.known)? {
                return Ok(table);
            }
            let now = db.catalog()?;
            let is_so = |now: &Rc<Known>| Rc::ptr_eq(now, &table.known) || **now == *table.known;
            if now.table(name).is_some_and(is_so) {
                return Ok(table);
            }
        }
        // Whoever keeps one snapshot may go on seeing a table that is gone.
        Err(ClaimError::Serialization)
    }

    /// `None` where it is not there any more.
    fn open_known(catalog: &Catalog, name: Name, mode: u32) -> Option<Self> {
        let known = Rc::clone(catalog.table(name)?);
        // SAFETY: null if there is no such table any more; closed on drop, or by the server when the
        // transaction aborts.
        let relation = unsafe { pg_sys::try_relation_open(known.oid, mode as pg_sys::LOCKMODE) };
        if relation.is_null() {
            return None;
        }
        Some(Self { known, relation })
    }

    /// The table.
    pub fn oid(&self) -> pg_sys::Oid {
        self.known.oid
    }

    /// Whether the table is as the extension made it, with all indexes by which it is read.
    pub fn is_as_made(&self) -> bool {
        self.known.is_as_made && self.known.has_all_spare_indexes()
    }

    /// Whether the table may be written directly: it has just the triggers and constraints that the
    /// extension made, and those are in force.
    pub fn may_be_written(&self) -> bool {
        self.known.is_as_made
            // What was read in such a transaction may be older than the table; and only a statement tells
            // a claim that its snapshot does not show.
            && !time::has_transaction_snapshot()
            && !time::is_replica()
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        // After an error the abort of the transaction or savepoint does it.
        if !std::thread::panicking() {
            // SAFETY: opened by `open`, and closed once. Keeps the lock.
            unsafe { pg_sys::relation_close(self.relation, pg_sys::NoLock as pg_sys::LOCKMODE) };
        }
    }
}
