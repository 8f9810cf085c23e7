//! Where the extension and its backlog are.
//!
//! The extension works in any schema and on a backlog of any name, so the text of its statements
//! depends on both. Each backend reads that once and keeps it until the server says that one of
//! the tables concerned has changed.

use std::cell::{Cell, RefCell};
use std::ffi::{CStr, c_void};
use std::rc::Rc;

use pgrx::pg_sys;

use super::directive::{Backlog, Columns};
use super::row::Row;
use super::statement::{self, Db, required};
use super::table::{AllKnown, Known, Name};
use super::time;
use crate::error::{ClaimError, Result};
use crate::identity::Unacting;

/// Where the extension and its backlog are.
#[derive(Debug, Clone, PartialEq)]
pub struct Catalog {
    /// The extension; another one after it was dropped and created again.
    pub extension: pg_sys::Oid,
    /// Its schema, quoted for use in SQL.
    pub schema: String,
    /// The sessions.
    pub sessions: pg_sys::Oid,
    /// The claim history, which a change of the backlog locks.
    pub sd_claims: pg_sys::Oid,
    /// The extension's own backlog, unless the schema had a table of that name before.
    pub own_backlog: Option<pg_sys::Oid>,
    /// The backlog in use.
    pub backlog: Option<Backlog>,
    /// Whether the backlog in use is the extension's own, with its own columns.
    pub is_own_backlog_in_use: bool,
    /// The extension's own tables, in the order of [`Name::ALL`].
    tables: AllKnown,
    /// Where fencing tokens come from.
    pub claim_ids: pg_sys::Oid,
    /// Where the numbers of events come from.
    pub event_ids: pg_sys::Oid,
    /// The relations whose change makes this wrong.
    watched: Watched,
}

/// The backlog in use, its view, and each of the extension's own tables.
type Watched = [pg_sys::Oid; 2 + Name::ALL.len()];

const UNKNOWN: Watched = [pg_sys::Oid::INVALID; 2 + Name::ALL.len()];

impl Catalog {
    /// Whether the backlog is the extension's own table, whatever has become of that.
    pub fn uses_own_backlog(&self) -> bool {
        let backlog = self.backlog.as_ref().map(|backlog| backlog.table_oid);
        backlog.is_some() && backlog == self.own_backlog
    }

    /// What is known of a table of the extension's own, if it is there, and whole.
    pub fn table(&self, name: Name) -> Option<&Rc<Known>> {
        self.tables[name as usize].as_ref()
    }
}

thread_local! {
    static CURRENT: RefCell<Option<Rc<Catalog>>> = const { RefCell::new(None) };
    static CHANGED: Cell<bool> = const { Cell::new(true) };
    /// How often one of the relations has changed, as far as this backend has heard.
    static CHANGES: Cell<u64> = const { Cell::new(0) };
    /// Whether the catalogue was read on a snapshot that a transaction keeps.
    static IS_OLD: Cell<bool> = const { Cell::new(false) };
    /// All invalid while the catalogue is being read: then every change counts.
    static WATCHED: Cell<Watched> = const { Cell::new(UNKNOWN) };
    /// The partitions of the backlog in use, which are watched as well: of a backlog that has changed they are left
    /// behind for good, as the callback may be looking at them.
    static PARTITIONS: Cell<&'static [pg_sys::Oid]> = const { Cell::new(&[]) };
}

/// Asks the server to report changed relations and renamed schemas.
pub fn watch() {
    // SAFETY: runs once per process, in _PG_init; the callbacks live as long as the library, which
    // is never unloaded, and do nothing but set a flag.
    unsafe {
        pg_sys::CacheRegisterRelcacheCallback(Some(relation_changed), pg_sys::Datum::null());
        pg_sys::RegisterXactCallback(Some(transaction_ends), std::ptr::null_mut());
        pg_sys::CacheRegisterSyscacheCallback(
            pg_sys::SysCacheIdentifier::NAMESPACEOID as i32,
            Some(schema_changed),
            pg_sys::Datum::null(),
        );
    }
}

// The server calls these while it processes invalidations, also while a transaction aborts: they
// must neither allocate nor raise an error.
extern "C-unwind" fn relation_changed(_: pg_sys::Datum, relation: pg_sys::Oid) {
    let watched = WATCHED.get();
    let any = pg_sys::Oid::INVALID;
    if relation == any
        || watched == UNKNOWN
        || watched.contains(&relation)
        || PARTITIONS.get().contains(&relation)
    {
        CHANGED.set(true);
        CHANGES.set(CHANGES.get() + 1);
    }
}

unsafe extern "C-unwind" fn transaction_ends(event: pg_sys::XactEvent::Type, _: *mut c_void) {
    use pg_sys::XactEvent::{XACT_EVENT_ABORT, XACT_EVENT_COMMIT, XACT_EVENT_PREPARE};
    let ends = [XACT_EVENT_ABORT, XACT_EVENT_COMMIT, XACT_EVENT_PREPARE];
    if ends.contains(&event) && IS_OLD.replace(false) {
        CHANGED.set(true);
    }
}

/// How often one of the relations has changed, as far as this backend has heard.
pub fn changes() -> u64 {
    CHANGES.get()
}

extern "C-unwind" fn schema_changed(_: pg_sys::Datum, _: i32, _: u32) {
    CHANGED.set(true);
}

/// The catalogue, if it has been read and has not changed since.
pub fn known() -> Option<Rc<Catalog>> {
    if CHANGED.get() { None } else { CURRENT.with_borrow(Clone::clone) }
}

/// The catalogue, read anew if it has changed.
pub fn current(db: &Db<'_>) -> Result<Rc<Catalog>> {
    if let Some(current) = known() {
        return Ok(current);
    }
    // Also while this acts as the backlog's owner, who may not read it all.
    db.take_rights()?;
    let _rights = Unacting::new();
    // Reset first: a change that arrives while reading must not be lost. And set again, also by an error
    // that unwinds, unless all of it has been read.
    let reading = Reading::new();
    WATCHED.set(UNKNOWN);
    match read(db) {
        Ok(catalog) => {
            // Read on a snapshot that may be older than the change that it was read for: it is read
            // again after the transaction.
            IS_OLD.set(time::has_transaction_snapshot());
            let catalog = adopt(catalog);
            reading.done();
            Ok(catalog)
        }
        Err(error) => Err(error),
    }
}

/// The catalogue is being read; what this backend knew of it counts no more until that is done.
struct Reading {
    is_done: bool,
}

impl Reading {
    fn new() -> Self {
        CHANGED.set(false);
        Self { is_done: false }
    }

    fn done(mut self) {
        self.is_done = true;
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        if !self.is_done {
            CHANGED.set(true);
        }
    }
}

fn adopt(catalog: Catalog) -> Rc<Catalog> {
    WATCHED.set(catalog.watched);
    if let Some(current) = CURRENT.with_borrow(Clone::clone)
        && *current == catalog
    {
        return current;
    }
    statement::forget_plans();
    let partitions = catalog.backlog.as_ref().map_or(&[][..], |backlog| &backlog.partitions);
    if partitions != PARTITIONS.get() {
        PARTITIONS.set(partitions.to_vec().leak());
    }
    let catalog = Rc::new(catalog);
    CURRENT.set(Some(Rc::clone(&catalog)));
    catalog
}

/// Takes the locks that a change of the backlog excludes, and learns of a change that was waited
/// for. Held until the transaction ends, as every writer of a table holds its lock. First the
/// backlog, then the claims, which is the order of a change of the backlog and of whoever finishes
/// an SD.
pub fn lock_backlog(db: &Db<'_>) -> Result<()> {
    lock(db, pg_sys::RowShareLock, true)?;
    Ok(())
}

/// The catalogue, with the backlog as it is now, and stays as far as the lock of a reader can keep it.
/// An error where it has code that must not run with the extension's rights, which the server does already
/// when it plans a statement.
pub fn usable_backlog(db: &Db<'_>) -> Result<Rc<Catalog>> {
    let catalog = lock(db, pg_sys::AccessShareLock, false)?;
    if let Some(backlog) = &catalog.backlog {
        backlog.usable()?;
    }
    Ok(catalog)
}

fn lock(db: &Db<'_>, mode: u32, with_claims: bool) -> Result<Rc<Catalog>> {
    loop {
        let catalog = db.catalog()?;
        // SAFETY: locks relations by their ids; waits like any statement and may raise an error,
        // which unwinds as usual. An id that is gone is locked without harm.
        unsafe {
            if let Some(backlog) = &catalog.backlog {
                pg_sys::LockRelationOid(backlog.table_oid, mode as i32);
                // Planning a statement looks at each, and would wait for whoever is changing one.
                for partition in &backlog.partitions {
                    pg_sys::LockRelationOid(*partition, mode as i32);
                }
            }
            if with_claims {
                pg_sys::LockRelationOid(catalog.sd_claims, pg_sys::RowExclusiveLock as i32);
            }
        }
        let now = db.catalog()?;
        if Rc::ptr_eq(&now, &catalog) || has_same_backlog(&now, &catalog) {
            return Ok(now);
        }
    }
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

/// The sequence of the table's identity column, whatever it is called: the schema may have had one of the usual
/// name before. Invalid where there is none any more.
fn identity_of(db: &Db<'_>, table: pg_sys::Oid) -> Result<pg_sys::Oid> {
    let rows = db.ask(
        "SELECT d.objid FROM pg_catalog.pg_depend d
          WHERE d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass
            AND d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass
            AND d.refobjid = $1 AND d.refobjsubid > 0 AND d.deptype = 'i'",
        &[table.into()],
    )?;
    let found = if rows.is_empty() { None } else { rows.first().get(1)? };
    Ok(found.unwrap_or(pg_sys::Oid::INVALID))
}

fn read(db: &Db<'_>) -> Result<Catalog> {
    const EXTENSION: &str = "
        SELECT e.oid, pg_catalog.quote_ident(n.nspname),
               pg_catalog.to_regclass(pg_catalog.format('%I.sd_claims', n.nspname))::oid,
               pg_catalog.to_regclass(pg_catalog.format('%I.claude_sessions', n.nspname))::oid,
               pg_catalog.to_regclass(pg_catalog.format('%I.v_directives', n.nspname))::oid,
               (SELECT c.oid
                  FROM pg_catalog.pg_class c
                  JOIN pg_catalog.pg_depend d
                    ON d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.objid = c.oid
                   AND d.refclassid = 'pg_catalog.pg_extension'::pg_catalog.regclass
                   AND d.refobjid = e.oid AND d.deptype = 'e'
                 WHERE c.relnamespace = n.oid AND c.relkind = 'r'
                   -- By its trigger, should it have been renamed; which it has not at installation.
                   AND (c.relname = 'strategic_directives_v2'
                        OR EXISTS (SELECT FROM pg_catalog.pg_trigger t
                                    WHERE t.tgrelid = c.oid AND t.tgname = 'pg_claims_finished'))),
               n.oid, e.extowner
          FROM pg_catalog.pg_extension e
          JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace
         WHERE e.extname = 'pg_claims'";
    let rows = db.ask(EXTENSION, &[])?;
    if rows.is_empty() {
        return Err(ClaimError::NotInstalled);
    }
    let row = rows.first();
    let oid = |position| -> Result<Option<pg_sys::Oid>> { Ok(row.get(position)?) };
    let extension = required(oid(1)?, "pg_extension")?;
    let extension_owner = required(oid(8)?, "pg_extension")?;
    let schema = row.required_text(2, "pg_namespace")?;
    let sd_claims = required(oid(3)?, "sd_claims")?;
    let sessions = required(oid(4)?, "claude_sessions")?;
    let view = oid(5)?.unwrap_or(pg_sys::Oid::INVALID);
    let own_backlog = oid(6)?;
    let backlog = Backlog::read(db, &schema, own_backlog)?;
    let bound = backlog.as_ref().map_or(pg_sys::Oid::INVALID, |b| b.table_oid);
    let namespace = required(oid(7)?, "pg_namespace")?;
    let in_schema = |name: &CStr| {
        // SAFETY: looks the name up in the catalogue; invalid where there is none.
        unsafe { pg_sys::get_relname_relid(name.as_ptr(), namespace) }
    };
    let oids = Name::ALL.map(|name| match name {
        Name::Sessions => sessions,
        Name::Claims => sd_claims,
        Name::Directives => own_backlog.unwrap_or(pg_sys::Oid::INVALID),
        Name::Events => in_schema(c"session_lifecycle_events"),
        Name::Holds => in_schema(c"sd_holds"),
        Name::Conflicts => in_schema(c"sd_conflict_matrix"),
    });
    let tables = Known::look(db, oids)?;
    let is_own_backlog_in_use = tables[Name::Directives as usize].is_some()
        && backlog.as_ref().is_some_and(|backlog| {
            Some(backlog.table_oid) == own_backlog
                && backlog.columns == Columns::own()
                // Written directly it is written with the extension's rights: not where it is another
                // role's, which may have put code of its own into an index of any name.
                && backlog.owner == extension_owner
                && backlog.usable().is_ok()
        });
    let mut watched = [view, bound].into_iter().chain(oids);
    Ok(Catalog {
        extension,
        schema,
        sessions,
        sd_claims,
        own_backlog,
        backlog,
        is_own_backlog_in_use,
        tables,
        claim_ids: identity_of(db, oids[Name::Claims as usize])?,
        event_ids: identity_of(db, oids[Name::Events as usize])?,
        watched: UNKNOWN.map(|unknown| watched.next().unwrap_or(unknown)),
    })
}
