//! The numbers of claims, of events and of places in the order of events: drawn from sequences, and never
//! twice, whatever becomes of the sequence (see `core::numbers`).

use std::cell::Cell;

use chrono::{DateTime, Utc};
use pg_claims_core::numbers::{HIGHEST, above, floor_of};
use pgrx::{IntoDatum, pg_sys};

use super::catalog::Catalog;
use super::row::Row;
use super::statement::{Db, Statement};
use crate::error::{ClaimError, Result};
use crate::identity::AsOwner;
use crate::pg::lock::{Class, Mode, Tag, Until};
use crate::pg::time;
use crate::service;

/// What is numbered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Acquisitions: the number is the fencing token.
    Claim,
    /// Events.
    Event,
    /// Places in the order of events.
    Position,
}

impl Kind {
    /// All of them, in their order.
    pub const ALL: [Self; 3] = [Self::Claim, Self::Event, Self::Position];

    fn column(self) -> &'static str {
        match self {
            Self::Claim => "sd_claims.claim_id",
            Self::Event => "session_lifecycle_events.event_id",
            Self::Position => "lifecycle_event_positions.position",
        }
    }
}

/// Where numbers of one kind come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Source {
    /// The sequence; invalid where there is none.
    pub sequence: pg_sys::Oid,
    /// The table whose primary key they are.
    pub table: pg_sys::Oid,
    /// Whether each connection takes several at once (CACHE), to use them later.
    pub is_cached: bool,
}

impl Source {
    /// Of a table that has no sequence.
    pub fn none(table: pg_sys::Oid) -> Self {
        Self { sequence: pg_sys::Oid::INVALID, table, is_cached: false }
    }
}

/// What this connection knows of numbers that are past.
#[derive(Clone, Copy)]
struct Past {
    /// The extension that it knows this of.
    extension: pg_sys::Oid,
    /// Below it no number was ever drawn here.
    since_installation: i64,
    /// The least that may come next, of each kind: below it no number was drawn since the server accepts writes,
    /// nor by this connection.
    least: [i64; Kind::ALL.len()],
}

thread_local! {
    static PAST: Cell<Option<Past>> = const { Cell::new(None) };
    /// Whether this connection may have numbers in reserve.
    static HAS_RESERVE: Cell<bool> = const { Cell::new(false) };
}

unsafe extern "C-unwind" {
    // Of commands/sequence.h, which pgrx does not bind.
    fn nextval_internal(sequence: pg_sys::Oid, check_permissions: bool) -> i64;
    fn ResetSequenceCaches();
}

/// The next number: greater than all that were drawn here before, and than all that another server has drawn
/// from which this one took over.
pub fn next(db: &Db<'_>, kind: Kind) -> Result<i64> {
    let catalog = db.catalog()?;
    let past = past(db, &catalog)?;
    let mut number = draw(&catalog, kind)?;
    if number < past.least[kind as usize] {
        number = lift_and_draw(db, &catalog, kind, past, number)?;
    }
    if let Some(mut past) = PAST.get() {
        past.least[kind as usize] = number.saturating_add(1);
        PAST.set(Some(past));
    }
    Ok(number)
}

fn draw(catalog: &Catalog, kind: Kind) -> Result<i64> {
    let sequence = existing(catalog, kind)?.sequence;
    let has_reserve = catalog.numbers.iter().any(|source| source.is_cached);
    // Taken by an earlier transaction, or before another connection's, such a number would come too late: the
    // order of events gives up what no running transaction can have drawn, and a token would be lower than one
    // that was given out before it.
    if HAS_RESERVE.replace(has_reserve) || has_reserve {
        // SAFETY: frees this connection's reserves. Its currval() goes with them.
        unsafe { ResetSequenceCaches() };
    }
    // The order of events goes by this: a transaction has its number before it draws one. In a read-only one
    // the server refuses the drawing and says so better.
    if !time::is_read_only() {
        // SAFETY: within a transaction, as whoever draws is.
        unsafe { pg_sys::GetTopTransactionId() };
    }
    // SAFETY: an error is caught at the boundary and unwinds as usual.
    Ok(unsafe { pg_sys::ffi::pg_guard_ffi_boundary(|| nextval_internal(sequence, false)) })
}

fn existing(catalog: &Catalog, kind: Kind) -> Result<Source> {
    let source = catalog.numbers[kind as usize];
    if source.sequence == pg_sys::Oid::INVALID {
        return Err(ClaimError::Corrupt { what: kind.column() });
    }
    Ok(source)
}

static INSTALLED_AT: Statement =
    Statement::new(|c| format!("SELECT installed_at FROM {}.installation", c.schema), &[]);

/// What is past, as this connection knows it; read once and then kept.
fn past(db: &Db<'_>, catalog: &Catalog) -> Result<Past> {
    if let Some(past) = PAST.get()
        && past.extension == catalog.extension
    {
        return Ok(past);
    }
    let installed_at: Option<DateTime<Utc>> = match db.first_row(&INSTALLED_AT, &[])? {
        Some(row) => row.instant(1)?,
        None => None,
    };
    let started_at = service::run();
    let now = time::now();
    let since_installation = floor_of(installed_at.unwrap_or(now));
    let since_start = floor_of(started_at.unwrap_or(now)).max(since_installation);
    let least = [since_start; Kind::ALL.len()];
    let past = Past { extension: catalog.extension, since_installation, least };
    // A server that is only beginning does not know yet since when. Without the row, which a superuser may
    // have deleted or an old snapshot does not show, each number is lifted to the present: slow, and right.
    PAST.set((installed_at.is_some() && started_at.is_some()).then_some(past));
    Ok(past)
}

/// Lifts the sequence, of which `number` is too low, and draws.
fn lift_and_draw(
    db: &Db<'_>,
    catalog: &Catalog,
    kind: Kind,
    past: Past,
    number: i64,
) -> Result<i64> {
    let least = past.least[kind as usize];
    // A sequence that was never used here, or that somebody has set back. What was drawn since the start is
    // not known then, but that it was before now.
    let drawn = if number < past.since_installation { floor_of(time::now()) } else { least };
    let target = above(&[least, drawn, greatest(db, catalog, kind)?]);
    let mut number = number;
    while number < least {
        pgrx::check_for_interrupts!();
        lift(existing(catalog, kind)?, least, target);
        // Still too low where this connection has some in reserve.
        number = draw(catalog, kind)?;
    }
    Ok(number)
}

/// Sets a sequence to `target` unless the next number is at least `least` already.
///
/// Two who do so at once must not both set it, or the second one has the numbers come again that were drawn
/// after the first. So there is a lock, and a look under it. It is held for no longer than that, and nobody
/// waits for anything while holding it: the sequence itself is locked by whoever has drawn.
fn lift(source: Source, least: i64, target: i64) {
    let _lifting = Lifting::of(source.sequence);
    let _owner = AsOwner::of(source.sequence);
    if last_value(source.sequence).is_none_or(|last| last < least) {
        // SAFETY: a function of the server's that takes a sequence, a bigint and a boolean. It is logged, and
        // not undone with the transaction.
        unsafe {
            let arguments = [source.sequence.into_datum(), target.into_datum(), true.into_datum()];
            pgrx::direct_function_call_as_datum(pg_sys::setval3_oid, &arguments);
        }
    }
}

/// The number that was drawn last, by anybody; none from a sequence that begins.
fn last_value(sequence: pg_sys::Oid) -> Option<i64> {
    // SAFETY: a function of the server's that takes a sequence.
    unsafe { pgrx::direct_function_call(pg_sys::pg_sequence_last_value, &[sequence.into_datum()]) }
}

/// A sequence is being lifted until this is dropped; an error ends it with the transaction or savepoint.
struct Lifting(Tag);

impl Lifting {
    fn of(sequence: pg_sys::Oid) -> Self {
        let tag = Tag::of(Class::Numbers, u64::from(sequence.to_u32()) << 32);
        tag.acquire(Mode::Exclusive, Until::TransactionEnds);
        Self(tag)
    }
}

impl Drop for Lifting {
    fn drop(&mut self) {
        // After an error the abort of the transaction or savepoint does it.
        if !std::thread::panicking() {
            self.0.release(Mode::Exclusive, Until::TransactionEnds);
        }
    }
}

static PASSED: Statement = Statement::new(
    |c| {
        format!(
            "SELECT pg_catalog.max(scanned_to), pg_catalog.max(announced_to) FROM {}.event_frontier",
            c.schema
        )
    },
    &[],
);

/// The greatest number that the tables know, of rows that are gone or not committed as well as far as the
/// index still has them. Nothing below how far events have been put in order and announced would be seen.
fn greatest(db: &Db<'_>, catalog: &Catalog, kind: Kind) -> Result<i64> {
    let passed = match kind {
        Kind::Claim => None,
        Kind::Event | Kind::Position => {
            let row = db.run(&PASSED, &[])?.first();
            row.bigint(if kind == Kind::Event { 1 } else { 2 })?
        }
    };
    let in_index = last_in_index(catalog.numbers[kind as usize].table);
    Ok(in_index.into_iter().chain(passed).max().unwrap_or(0).min(HIGHEST))
}

/// The last entry of the primary key's index, whoever can see its row.
fn last_in_index(table: pg_sys::Oid) -> Option<i64> {
    const MODE: pg_sys::LOCKMODE = pg_sys::AccessShareLock as pg_sys::LOCKMODE;
    // SAFETY: table and index are open while they are scanned. Only the index is read, which gives its own
    // copy of the key; no snapshot is asked.
    unsafe {
        let table = pg_sys::try_relation_open(table, MODE);
        if table.is_null() {
            return None;
        }
        #[cfg(not(feature = "pg18"))]
        let key = pg_sys::RelationGetPrimaryKeyIndex(table);
        #[cfg(feature = "pg18")]
        let key = pg_sys::RelationGetPrimaryKeyIndex(table, false);
        let mut last = None;
        if key != pg_sys::Oid::INVALID {
            let index = pg_sys::index_open(key, MODE);
            if pg_sys::get_atttype(key, 1) == pg_sys::INT8OID {
                last = last_entry(table, index);
            }
            pg_sys::index_close(index, MODE);
        }
        pg_sys::relation_close(table, MODE);
        last
    }
}

/// # Safety
/// The table and its index must be open, and the index's first column be a bigint.
unsafe fn last_entry(table: pg_sys::Relation, index: pg_sys::Relation) -> Option<i64> {
    let mut values = [pg_sys::Datum::null(); pg_sys::INDEX_MAX_KEYS as usize];
    let mut are_null = [true; pg_sys::INDEX_MAX_KEYS as usize];
    // SAFETY: as promised. The entry is taken apart before the scan ends that keeps it.
    unsafe {
        let any = &raw mut pg_sys::SnapshotAnyData;
        #[cfg(not(feature = "pg18"))]
        let scan = pg_sys::index_beginscan(table, index, any, 0, 0);
        #[cfg(feature = "pg18")]
        let scan = pg_sys::index_beginscan(table, index, any, std::ptr::null_mut(), 0, 0);
        (*scan).xs_want_itup = true;
        pg_sys::index_rescan(scan, std::ptr::null_mut(), 0, std::ptr::null_mut(), 0);
        let backward = pg_sys::ScanDirection::BackwardScanDirection;
        if !pg_sys::index_getnext_tid(scan, backward).is_null() {
            pg_sys::index_deform_tuple(
                (*scan).xs_itup,
                (*scan).xs_itupdesc,
                values.as_mut_ptr(),
                are_null.as_mut_ptr(),
            );
        }
        pg_sys::index_endscan(scan);
    }
    (!are_null[0]).then(|| values[0].value() as i64)
}

/// Beyond which the next number of each kind is, in the order of [`Kind::ALL`].
pub type Passed = [i64; Kind::ALL.len()];

/// Lifts each sequence above the greatest number in its table and above what any server can have drawn before
/// this moment. Nothing where it is there already.
///
/// For tables that were filled by somebody else: by a restore, or by logical replication.
pub fn lift_above_tables(db: &Db<'_>) -> Result<Passed> {
    let catalog = db.catalog()?;
    let past = past(db, &catalog)?;
    let mut passed = [0; Kind::ALL.len()];
    for kind in Kind::ALL {
        // Drawn first, as for any number: that locks the sequence for the transaction.
        draw(&catalog, kind)?;
        let least = past.least[kind as usize]
            .max(floor_of(time::now()))
            .max(greatest(db, &catalog, kind)?.saturating_add(1));
        lift(existing(&catalog, kind)?, least, above(&[least]));
        let source = existing(&catalog, kind)?;
        let _owner = AsOwner::of(source.sequence);
        passed[kind as usize] = last_value(source.sequence).unwrap_or(0);
    }
    Ok(passed)
}
