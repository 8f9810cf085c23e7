//! Since when the extension is in use in this database.
//!
//! From CREATE EXTENSION on nobody uses it until somebody calls one of its functions, or writes a session by
//! hand. In between a dump may be restored, of which the worker must not touch anything; a restore into a
//! database that was in use begins that time anew. Each backend remembers what it found, so that a call costs
//! a look at a variable.

use std::cell::Cell;

use chrono::{DateTime, Utc};
use pgrx::FromDatum;
use pgrx::datum::TimestampWithTimeZone;
use pgrx::pg_sys;

use super::extension::{self, Extension};
use super::numbers;
use super::row::Row;
use super::statement::{Db, Statement};
use crate::error::Result;
use crate::pg::lock::{Mode, Tag, Until};
use crate::pg::transaction::{self, End};
use crate::pg::{backend, time};
use crate::service;
use crate::worker::wake;

/// The position of `in_use_since` in `installation`.
const IN_USE_SINCE: i32 = 2;

/// What is known of the use of the extension in this database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InUse {
    /// There is no extension.
    NotInstalled,
    /// Nobody has used it since it was created or restored.
    NotYet,
    /// Somebody has, first at that moment.
    Since(DateTime<Utc>),
}

#[derive(Clone, Copy)]
enum Known {
    Nothing,
    /// Nobody had used it when that statement of the client's began.
    NotYet {
        statement: i64,
    },
    Since {
        at: DateTime<Utc>,
        /// Otherwise this very transaction is the first use, and may yet be rolled back.
        is_committed: bool,
    },
}

/// Where the use of the extension is written down.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Place {
    extension: pg_sys::Oid,
    /// The table `installation`.
    table: pg_sys::Oid,
}

thread_local! {
    static KNOWN: Cell<Known> = const { Cell::new(Known::Nothing) };
    /// Where that is written, once it was found.
    static PLACE: Cell<Option<Place>> = const { Cell::new(None) };
}

/// Asks the server to tell of changes of the table, and of how transactions end.
pub(super) fn watch() {
    // SAFETY: runs once per process, in _PG_init; the callbacks live as long as the library, which is never
    // unloaded, and do nothing but set variables.
    unsafe {
        pg_sys::CacheRegisterRelcacheCallback(Some(relation_changed), pg_sys::Datum::null());
    }
    transaction::at_end(|end| {
        if end != End::PreCommit {
            forget_uncommitted();
        }
    });
    transaction::at_savepoint_end(|end| {
        if end.is_rolled_back {
            forget_uncommitted();
        }
    });
}

// Called while the server processes invalidations: must neither allocate nor raise an error.
extern "C-unwind" fn relation_changed(_: pg_sys::Datum, relation: pg_sys::Oid) {
    let is_concerned = PLACE.get().is_none_or(|place| place.table == relation);
    if is_concerned || relation == pg_sys::Oid::INVALID {
        KNOWN.set(Known::Nothing);
        PLACE.set(None);
    }
}

fn forget_uncommitted() {
    if matches!(KNOWN.get(), Known::Since { is_committed: false, .. }) {
        KNOWN.set(Known::Nothing);
    }
}

/// Whether the extension is known to be in use, without looking.
fn is_known_in_use() -> bool {
    matches!(KNOWN.get(), Known::Since { .. })
}

/// Since when the extension is in use. Looks once; while nobody uses it, once for each statement of the
/// client's. Takes nobody's rights and no statement, so that the views' functions can ask, in a parallel
/// worker and on a standby as well.
pub fn in_use() -> InUse {
    let statement = backend::statement();
    match KNOWN.get() {
        Known::Since { at, .. } => InUse::Since(at),
        Known::NotYet { statement: then } if then == statement => InUse::NotYet,
        _ => look(statement),
    }
}

/// Looks, whatever was known.
fn look(statement: i64) -> InUse {
    let Some(place) = find() else { return InUse::NotInstalled };
    // Before the look: what changes meanwhile must not be lost.
    PLACE.set(Some(place));
    let (known, in_use) = match first_use(place.table) {
        None => return InUse::NotInstalled,
        Some(None) => (Known::NotYet { statement }, InUse::NotYet),
        Some(Some((at, is_committed))) => (Known::Since { at, is_committed }, InUse::Since(at)),
    };
    // Unless it was changed meanwhile: its further changes are not heard of.
    if PLACE.get() == Some(place) {
        KNOWN.set(known);
    }
    in_use
}

/// The extension and its table `installation`, in whatever schema.
fn find() -> Option<Place> {
    if let Some(place) = PLACE.get() {
        return Some(place);
    }
    let Extension { oid: extension, schema, .. } = extension::find()?;
    backend::relation(c"installation", schema).map(|table| Place { extension, table })
}

/// The earliest use that is recorded, and whether it is committed; the outer `None` where the table is gone.
#[expect(clippy::option_option, reason = "a table that is gone is not an empty one")]
fn first_use(table: pg_sys::Oid) -> Option<Option<(DateTime<Utc>, bool)>> {
    // SAFETY: reads a table as the server reads its catalogues. The latest snapshot, as a use that was
    // committed a moment ago counts for a transaction with an older one as well; in a parallel worker the
    // leader's, as it can take none.
    unsafe {
        let relation = pg_sys::try_relation_open(table, pg_sys::AccessShareLock as i32);
        if relation.is_null() {
            return None;
        }
        let columns = (*relation).rd_att;
        let snapshot = pg_sys::RegisterSnapshot(if backend::is_parallel() {
            pg_sys::GetActiveSnapshot()
        } else {
            pg_sys::GetLatestSnapshot()
        });
        let no_keys = std::ptr::null_mut();
        let scan =
            pg_sys::systable_beginscan(relation, pg_sys::InvalidOid, false, snapshot, 0, no_keys);
        let mut first: Option<(DateTime<Utc>, bool)> = None;
        loop {
            let tuple = pg_sys::systable_getnext(scan);
            if tuple.is_null() {
                break;
            }
            let mut is_null = true;
            let value = pg_sys::SPI_getbinval(tuple, columns, IN_USE_SINCE, &mut is_null);
            let Some(at) = TimestampWithTimeZone::from_datum(value, is_null) else { continue };
            let at = time::from_server(at);
            let writer = (*(*tuple).t_data).t_choice.t_heap.t_xmin;
            let is_committed = !pg_sys::TransactionIdIsCurrentTransactionId(writer);
            // A committed one first: it stays, whatever becomes of this transaction.
            if first.is_none_or(|(than, committed)| (!is_committed, at) < (!committed, than)) {
                first = Some((at, is_committed));
            }
        }
        pg_sys::systable_endscan(scan);
        pg_sys::UnregisterSnapshot(snapshot);
        pg_sys::relation_close(relation, pg_sys::AccessShareLock as i32);
        Some(first)
    }
}

// A row of its own, so that whoever else uses it first at the same time is not waited for.
static NOTE: Statement = Statement::new(
    |c| {
        format!(
            "INSERT INTO {x}.installation (installed_at, in_use_since)
             SELECT COALESCE(pg_catalog.min(installed_at), pg_catalog.clock_timestamp()),
                    pg_catalog.clock_timestamp()
               FROM {x}.installation
          RETURNING in_use_since",
            x = c.schema
        )
    },
    &[],
);

/// Somebody uses the extension: from now on the worker serves this database, once that is committed. All but
/// free where it is known.
pub fn note_use(db: &Db<'_>) -> Result<()> {
    if is_known_in_use() { Ok(()) } else { note_first_use(db) }
}

#[cold]
fn note_first_use(db: &Db<'_>) -> Result<()> {
    if backend::is_creating_extension()
        || backend::is_parallel()
        || wake::is_this_worker()
        || service::is_in_recovery()
        || time::is_read_only()
        || look(0) != InUse::NotYet
    {
        return Ok(());
    }
    // A dump has brought numbers along, and none of them may come again.
    numbers::lift_above_tables(db)?;
    let row = db.run(&NOTE, &[])?.first();
    let at = row.required_instant(1, "installation.in_use_since")?;
    KNOWN.set(Known::Since { at, is_committed: false });
    wake::at_commit();
    Ok(())
}

static FORGET: Statement = Statement::new(
    |c| format!("DELETE FROM {}.installation WHERE in_use_since IS NOT NULL", c.schema),
    &[],
);

/// A dump is being restored into a database that was in use: nobody uses it from now on, until somebody does
/// so again.
pub fn begin_restoring(db: &Db<'_>) -> Result<()> {
    let is_in_use = matches!(in_use(), InUse::Since(_));
    let Some(place) = find().filter(|_| is_in_use) else { return Ok(()) };
    db.run(&FORGET, &[])?;
    KNOWN.set(Known::Nothing);
    backend::invalidate(place.table);
    Ok(())
}

/// That the worker serves this database, as it was found at the beginning of a step.
#[derive(PartialEq, Eq)]
pub struct Served {
    place: Place,
    since: DateTime<Utc>,
}

/// Whether the worker serves this database.
pub fn serve() -> Option<Served> {
    let InUse::Since(since) = in_use() else { return None };
    find().map(|place| Served { place, since })
}

impl Served {
    /// Keeps everybody from dropping the extension until this transaction ends. Who drops one locks it before any of
    /// its tables, so that nobody waits in a circle. False where somebody has locked it, such as who binds a backlog.
    pub fn keep(&self) -> bool {
        Tag::of_object(pg_sys::ExtensionRelationId, self.place.extension)
            .try_acquire(Mode::AccessShare, Until::TransactionEnds)
    }

    /// Whether it still does: between any two statements somebody may have dropped the extension, or begun to
    /// restore a dump, of which the step then has seen and written what it must not. Where nobody had committed
    /// that by now, no statement can have seen it.
    pub fn still(&self) -> bool {
        // SAFETY: in a transaction; hears of what others have committed.
        unsafe { pg_sys::AcceptInvalidationMessages() };
        serve().as_ref() == Some(self)
    }
}
