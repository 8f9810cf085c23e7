//! Where the extension and its backlog are.
//!
//! The extension works in any schema and on a backlog of any name, so the text of its statements
//! depends on both. Each backend reads that once and keeps it until the server says that one of
//! the tables concerned has changed.

mod lock;

pub use lock::{
    MOST_TRIES, exclude_claims, is_unfinished_as_known, lock_backlog, try_usable_backlog,
    usable_backlog,
};

use std::cell::{Cell, RefCell};
use std::ffi::CStr;
use std::rc::Rc;

use pgrx::{IntoDatum, pg_sys};

use super::directive::{Backlog, Columns};
use super::foreign;
use super::numbers::{Kind, Source};
use super::row::Row;
use super::statement::{self, Db, required};
use super::table::{AllKnown, Known, Name};
use crate::error::{ClaimError, Result};
use crate::identity::Unacting;
use crate::pg::transaction::{self, End};
use crate::pg::{backend, time};

/// Where the extension and its backlog are.
#[derive(Debug, Clone, PartialEq)]
pub struct Catalog {
    /// The extension; another one after it was dropped and created again.
    pub extension: pg_sys::Oid,
    /// A trigger of an ordinary role's on one of its tables, described.
    pub foreign_code: Option<String>,
    /// Its tables whose writes may run code that is neither the server's nor the extension's.
    with_others_code: Vec<pg_sys::Oid>,
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
    /// Where numbers come from, in the order of [`Kind::ALL`].
    pub numbers: [Source; Kind::ALL.len()],
    /// The relations whose change makes this wrong.
    watched: Watched,
}

/// The extension's tables that only statements read and write: nobody's code may come to be on them.
const FURTHER: [&CStr; 6] = [
    c"lifecycle_event_positions",
    c"event_frontier",
    c"installation",
    c"heartbeat_connections",
    c"worker_health",
    c"directive_binding",
];

/// The backlog in use, its view, and each of the extension's own tables.
type Watched = [pg_sys::Oid; 2 + Name::ALL.len() + FURTHER.len()];

const UNKNOWN: Watched = [pg_sys::Oid::INVALID; 2 + Name::ALL.len() + FURTHER.len()];

impl Catalog {
    /// Whether the backlog is the extension's own table, whatever has become of that.
    pub fn uses_own_backlog(&self) -> bool {
        let backlog = self.backlog.as_ref().map(|backlog| backlog.table_oid);
        backlog.is_some() && backlog == self.own_backlog
    }

    /// Whether a write of a table of the extension's own may run code that is neither the server's nor the extension's.
    pub fn runs_others_code(&self, name: Name) -> bool {
        self.table(name).is_none_or(|known| self.with_others_code.contains(&known.oid))
    }

    /// What is known of a table of the extension's own, if it is there, and whole.
    pub fn table(&self, name: Name) -> Option<&Rc<Known>> {
        self.tables[name as usize].as_ref()
    }
}

thread_local! {
    static CURRENT: RefCell<Option<Rc<Catalog>>> = const { RefCell::new(None) };
    static CHANGED: Cell<bool> = const { Cell::new(true) };
    /// Whether the server has forgotten everything since the catalogue was read, as it does when it has lost count of
    /// what changed: anything may have changed then.
    static FORGOTTEN: Cell<bool> = const { Cell::new(false) };
    /// Whose turn it was when the catalogue was read: the time at which the client's statement began. 0 where
    /// somebody has waited for a lock since.
    static READ_FOR: Cell<i64> = const { Cell::new(0) };
    /// How often one of the relations has changed, as far as this backend has heard.
    static CHANGES: Cell<u64> = const { Cell::new(0) };
    /// The same of them and of any function, operator, type or constraint.
    static CHANGES_OF_CODE: Cell<u64> = const { Cell::new(0) };
    /// How often the server has forgotten everything.
    static TIMES_FORGOTTEN: Cell<u64> = const { Cell::new(0) };
    /// Whether the catalogue was read on a snapshot that a transaction keeps.
    static IS_OLD: Cell<bool> = const { Cell::new(false) };
    /// All invalid while the catalogue is being read: then every change counts.
    static WATCHED: Cell<Watched> = const { Cell::new(UNKNOWN) };
    /// The partitions of the backlog in use, which are watched as well.
    static PARTITIONS: RefCell<Vec<pg_sys::Oid>> = const { RefCell::new(Vec::new()) };
    /// The server's hashes of the sequences that numbers come from, by which it tells of their change.
    static SEQUENCES: Cell<[u32; Kind::ALL.len()]> = const { Cell::new([0; Kind::ALL.len()]) };
}

/// Asks the server to report changed relations and renamed schemas.
pub fn watch() {
    transaction::at_end(transaction_ends);
    // SAFETY: runs once per process, in _PG_init; the callbacks live as long as the library, which
    // is never unloaded, and do nothing but set a flag.
    unsafe {
        pg_sys::CacheRegisterRelcacheCallback(Some(relation_changed), pg_sys::Datum::null());
        pg_sys::CacheRegisterSyscacheCallback(
            pg_sys::SysCacheIdentifier::NAMESPACEOID as i32,
            Some(schema_changed),
            pg_sys::Datum::null(),
        );
        // What the tables' constraints, defaults and triggers' conditions are compiled from.
        for cache in [
            pg_sys::SysCacheIdentifier::PROCOID,
            pg_sys::SysCacheIdentifier::OPEROID,
            pg_sys::SysCacheIdentifier::TYPEOID,
            pg_sys::SysCacheIdentifier::CONSTROID,
        ] {
            pg_sys::CacheRegisterSyscacheCallback(
                cache as i32,
                Some(code_changed),
                pg_sys::Datum::null(),
            );
        }
        pg_sys::CacheRegisterSyscacheCallback(
            pg_sys::SysCacheIdentifier::SEQRELID as i32,
            Some(sequence_changed),
            pg_sys::Datum::null(),
        );
    }
}

// The server calls these while it processes invalidations, also while a transaction aborts: they
// must neither allocate nor raise an error.
extern "C-unwind" fn relation_changed(_: pg_sys::Datum, relation: pg_sys::Oid) {
    let watched = WATCHED.get();
    if relation == pg_sys::Oid::INVALID {
        FORGOTTEN.set(true);
        TIMES_FORGOTTEN.set(TIMES_FORGOTTEN.get() + 1);
        CHANGES.set(CHANGES.get() + 1);
    } else if watched == UNKNOWN
        || watched.contains(&relation)
        || PARTITIONS.with(|all| all.try_borrow().is_ok_and(|all| all.contains(&relation)))
    {
        CHANGED.set(true);
        CHANGES.set(CHANGES.get() + 1);
        CHANGES_OF_CODE.set(CHANGES_OF_CODE.get() + 1);
    }
}

fn transaction_ends(end: End) {
    if end != End::PreCommit {
        // With the transaction go its locks.
        doubt();
        if IS_OLD.replace(false) {
            CHANGED.set(true);
        }
    }
}

/// How often one of the relations has changed, as far as this backend has heard.
pub fn changes() -> u64 {
    CHANGES.get()
}

/// What code on the tables is made of, as it was at a moment: the tables, and anybody's functions, operators, types and
/// constraints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CodeVersion {
    changes: u64,
    times_forgotten: u64,
    statement: i64,
}

impl CodeVersion {
    /// That of now.
    pub fn now() -> Self {
        Self {
            changes: CHANGES_OF_CODE.get(),
            times_forgotten: TIMES_FORGOTTEN.get(),
            statement: backend::statement(),
        }
    }

    /// Whether all is still so. That the server has forgotten everything since, which it may do at any moment, says nothing
    /// within one statement of the client's, as for the catalogue itself.
    pub fn is_current(&self) -> bool {
        let now = Self::now();
        let is_same_turn = self.statement == now.statement && READ_FOR.get() == now.statement;
        self.changes == now.changes && (self.times_forgotten == now.times_forgotten || is_same_turn)
    }
}

extern "C-unwind" fn code_changed(_: pg_sys::Datum, _: i32, hash: u32) {
    // 0 stands for all of them; that the relations are forgotten as well is told by itself.
    if hash != 0 {
        CHANGES_OF_CODE.set(CHANGES_OF_CODE.get() + 1);
    }
}

extern "C-unwind" fn schema_changed(_: pg_sys::Datum, _: i32, schema: u32) {
    // 0 stands for all of them.
    if schema == 0 {
        FORGOTTEN.set(true);
    } else {
        CHANGED.set(true);
    }
}

extern "C-unwind" fn sequence_changed(_: pg_sys::Datum, _: i32, hash: u32) {
    let any = 0;
    if hash == any || WATCHED.get() == UNKNOWN || SEQUENCES.get().contains(&hash) {
        CHANGED.set(true);
    }
}

/// The catalogue, if it has been read and has not changed since.
pub fn known() -> Option<Rc<Catalog>> {
    if CHANGED.get() || FORGOTTEN.get() { None } else { CURRENT.with_borrow(Clone::clone) }
}

/// The catalogue as far as it is known to a statement of the client's for which it has been read: that the server has
/// forgotten everything since, which it may do at any moment, does not have it read all the time. Whoever has waited
/// for a lock looks again.
fn known_to_statement() -> Option<Rc<Catalog>> {
    if CHANGED.get() || (FORGOTTEN.get() && READ_FOR.get() != backend::statement()) {
        return None;
    }
    CURRENT.with_borrow(Clone::clone)
}

/// Whether the catalogue shows less than what the server itself goes by: it was read on a snapshot that this transaction
/// keeps.
pub fn is_old() -> bool {
    IS_OLD.get()
}

/// Has the catalogue be read again if anything may have changed: after waiting for a lock.
pub fn doubt() {
    READ_FOR.set(0);
}

/// Whether `table` is still what is known of it, if all that is to be doubted is that the server has forgotten
/// everything. The catalogue itself is not read for that.
pub fn is_still(catalog: &Catalog, name: Name, table: &Known) -> bool {
    if CHANGED.get() {
        return false;
    }
    let oids =
        Name::ALL.map(|name| catalog.table(name).map_or(pg_sys::Oid::INVALID, |known| known.oid));
    let is_so = Known::look(oids)[name as usize].as_deref() == Some(table);
    if !is_so {
        doubt();
    }
    is_so
}

/// The table of sessions that goes with `function`, which is one of the extension's. Takes no lock, so that it can be
/// told whatever is locked: where the catalogue is not known, or not any more, the table is looked up beside the
/// function.
pub fn sessions_of(function: pg_sys::Oid) -> Option<pg_sys::Oid> {
    if !CHANGED.get()
        && !FORGOTTEN.get()
        && let Some(known) = CURRENT.with_borrow(|now| now.as_ref().map(|now| now.sessions))
    {
        return Some(known);
    }
    backend::relation(c"claude_sessions", backend::schema_of(function))
}

/// The catalogue, read anew if it has changed.
pub fn current(db: &Db<'_>) -> Result<Rc<Catalog>> {
    if let Some(current) = known_to_statement() {
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
            READ_FOR.set(backend::statement());
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
        FORGOTTEN.set(false);
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
    SEQUENCES.set(catalog.numbers.map(|source| {
        let sequence = source.sequence.into_datum().unwrap_or(pg_sys::Datum::null());
        let (cache, none) = (pg_sys::SysCacheIdentifier::SEQRELID as i32, pg_sys::Datum::null());
        // SAFETY: computes a hash of the key.
        unsafe { pg_sys::GetSysCacheHashValue(cache, sequence, none, none, none) }
    }));
    if let Some(current) = CURRENT.with_borrow(Clone::clone)
        && *current == catalog
    {
        return current;
    }
    statement::doubt_plans();
    let partitions = catalog.backlog.as_ref().map(|backlog| backlog.partitions.clone());
    // The callback cannot come in between: nothing else runs while this is put in place.
    drop(PARTITIONS.replace(partitions.unwrap_or_default()));
    let catalog = Rc::new(catalog);
    CURRENT.set(Some(Rc::clone(&catalog)));
    catalog
}

/// The sequences of the tables' identity columns, whatever they are called: the schema may have had one of the
/// usual name before. Invalid where there is none any more.
fn sources_of(db: &Db<'_>, tables: [pg_sys::Oid; 3]) -> Result<[Source; 3]> {
    let mut rows = db.ask(
        "SELECT d.refobjid, d.objid, s.seqcache
           FROM pg_catalog.pg_depend d JOIN pg_catalog.pg_sequence s ON s.seqrelid = d.objid
          WHERE d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass
            AND d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass
            AND d.refobjid IN ($1, $2, $3) AND d.refobjsubid > 0 AND d.deptype = 'i'",
        &tables.map(Into::into),
    )?;
    let mut sources = tables.map(Source::none);
    while rows.next().is_some() {
        let table = required(rows.get(1)?, "pg_depend")?;
        if let Some(source) = sources.iter_mut().find(|source| source.table == table) {
            source.sequence = required(rows.get(2)?, "pg_depend")?;
            source.is_cached = rows.required_bigint(3, "pg_sequence")? > 1;
        }
    }
    Ok(sources)
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
    let in_schema =
        |name: &CStr| backend::relation(name, namespace).unwrap_or(pg_sys::Oid::INVALID);
    let oids = Name::ALL.map(|name| match name {
        Name::Sessions => sessions,
        Name::Claims => sd_claims,
        Name::Directives => own_backlog.unwrap_or(pg_sys::Oid::INVALID),
        Name::Events => in_schema(c"session_lifecycle_events"),
        Name::Holds => in_schema(c"sd_holds"),
        Name::Conflicts => in_schema(c"sd_conflict_matrix"),
    });
    let tables = Known::look(oids);
    let is_own_backlog_in_use = tables[Name::Directives as usize].is_some()
        && backlog.as_ref().is_some_and(|backlog| {
            Some(backlog.table_oid) == own_backlog
                && backlog.columns == Columns::own()
                // Row by row it is written with the extension's rights: not where it is another
                // role's, which may have put code of its own into an index of any name.
                && backlog.owner == extension_owner
                && backlog.usable().is_ok()
        });
    let code = foreign::code(db)?;
    let mut watched = [view, bound].into_iter().chain(oids).chain(FURTHER.map(in_schema));
    Ok(Catalog {
        extension,
        foreign_code: code.of_ordinary_role,
        with_others_code: code.tables,
        schema,
        sessions,
        sd_claims,
        own_backlog,
        backlog,
        is_own_backlog_in_use,
        tables,
        numbers: sources_of(
            db,
            [
                oids[Name::Claims as usize],
                oids[Name::Events as usize],
                in_schema(c"lifecycle_event_positions"),
            ],
        )?,
        watched: UNKNOWN.map(|unknown| watched.next().unwrap_or(unknown)),
    })
}
