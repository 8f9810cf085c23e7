//! The extension's own tables, row by row, on the paths that are taken all the time.
//!
//! A statement costs more than what it does: the server starts a plan, checks rights, and reads the text
//! of constraints and of triggers' conditions anew. Here rows are found by an index and written one by
//! one, with the functions that the server's executor calls, and by its rules: a look takes a snapshot; a
//! write finds out what a concurrent transaction has made of the row; where the transaction keeps one
//! snapshot, a change that this does not show is error 40001.
//!
//! A write fires all triggers, keeps all constraints and fills all indexes, the user's as well as the extension's. It goes
//! by no rule and no policy.

mod executor;
mod known;
pub mod layout;
mod places;
mod read;
mod snapshot;
mod target;
mod write;

use std::rc::Rc;

use pgrx::{PgTupleDesc, pg_sys};

use super::catalog::{self, Catalog};
use super::statement::Db;
use crate::error::{ClaimError, Result};
use layout::Layout;

pub use known::{AllKnown, Known};
pub use places::{init, remember};
pub use read::{Key, TableRow};
pub use snapshot::Snapshot;
pub use write::{Lock, NewRow, Wait};

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
    /// The extension that it belongs to.
    extension: pg_sys::Oid,
    relation: pg_sys::Relation,
    /// Whether a write may run code that is neither the server's nor the extension's.
    runs_others_code: bool,
}

impl Table {
    /// Opens it to be read.
    pub fn to_read(db: &Db<'_>, name: Name) -> Result<Self> {
        Self::open(db, name, pg_sys::AccessShareLock)
    }

    /// Opens it for rows to be locked or written. Whatever code of others is on it runs with the rights of the
    /// extension's owner, as by a statement.
    pub fn to_write(db: &Db<'_>, name: Name) -> Result<Self> {
        let table = Self::open(db, name, pg_sys::RowExclusiveLock)?;
        if table.runs_others_code {
            db.take_rights()?;
        }
        Ok(table)
    }

    /// Opens a bound backlog for rows to be written whose places are remembered. With the rights of whoever does so, who has
    /// locked it already. `None` where it is no plain table, or has rules: only statements go by them.
    pub fn to_write_bound(catalog: &Catalog, table: pg_sys::Oid) -> Option<Self> {
        let known = Rc::new(Known::without_indexes(table));
        let table = Self::open_relation(catalog, known, pg_sys::RowExclusiveLock)?;
        // SAFETY: the table is open.
        let form = unsafe { &*(*table.relation).rd_rel };
        (form.relkind as u8 == pg_sys::RELKIND_RELATION && !form.relhasrules).then_some(table)
    }

    /// Opens it to be read as it is known. `None` where it is known no more.
    pub fn to_read_as_known(catalog: &Rc<Catalog>, name: Name) -> Option<Self> {
        let table = Self::open_known(catalog, name, pg_sys::AccessShareLock)?;
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
            let Some(mut table) = Self::open_known(&catalog, name, mode) else {
                catalog::doubt();
                continue;
            };
            // Whoever was waited for may have changed it; from here on nobody can. It counts what it is like: that
            // the catalogue is read once more, for whatever reason, does not mean that this has changed.
            if catalog::known().is_none() && catalog::is_still(&catalog, name, &table.known) {
                // Whose code is on it may have changed.
                table.runs_others_code = true;
                return Ok(table);
            }
            let now = db.catalog()?;
            let is_so = |now: &Rc<Known>| Rc::ptr_eq(now, &table.known) || **now == *table.known;
            if now.table(name).is_some_and(is_so) {
                table.runs_others_code = now.runs_others_code(name) || catalog::is_old();
                return Ok(table);
            }
        }
        // Whoever keeps one snapshot may go on seeing a table that is gone.
        Err(ClaimError::Serialization)
    }

    /// `None` where it is not there any more.
    fn open_known(catalog: &Catalog, name: Name, mode: u32) -> Option<Self> {
        let mut table = Self::open_relation(catalog, Rc::clone(catalog.table(name)?), mode)?;
        table.runs_others_code = catalog.runs_others_code(name);
        Some(table)
    }

    fn open_relation(catalog: &Catalog, known: Rc<Known>, mode: u32) -> Option<Self> {
        // SAFETY: null if there is no such table any more; closed on drop, or by the server when the
        // transaction aborts.
        let relation = unsafe { pg_sys::try_relation_open(known.oid, mode as pg_sys::LOCKMODE) };
        if relation.is_null() {
            return None;
        }
        Some(Self { known, extension: catalog.extension, relation, runs_others_code: true })
    }

    /// The table.
    pub fn oid(&self) -> pg_sys::Oid {
        self.known.oid
    }

    /// The position of a column of that name, if it is of that very type.
    pub fn position_of(&self, column: &str, of_type: pg_sys::Oid) -> Option<usize> {
        // SAFETY: the table is open, and its description stays while it is.
        let columns = unsafe { PgTupleDesc::from_pg_unchecked((*self.relation).rd_att) };
        let is_it = |known: &pg_sys::FormData_pg_attribute| {
            !known.attisdropped && known.atttypid == of_type && known.name() == column
        };
        columns.iter().position(is_it).map(|at| at + 1)
    }

    /// Its name.
    fn name(&self) -> String {
        // SAFETY: the table is open.
        unsafe { pgrx::name_data_to_str(&(*(*self.relation).rd_rel).relname).to_owned() }
    }

    /// Whether a write may run code that is neither the server's nor the extension's: triggers, constraints, defaults,
    /// what an index says.
    pub fn runs_others_code(&self) -> bool {
        self.runs_others_code
    }

    /// Whether it has all indexes by which it is read.
    pub fn has_all_indexes(&self) -> bool {
        self.known.has_all_spare_indexes()
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
