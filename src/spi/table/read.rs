//! Finding rows by an index.

use std::convert::Infallible;
use std::ffi::CStr;

use chrono::{DateTime, TimeDelta, Utc};
use pgrx::datum::{Interval, TimestampWithTimeZone};
use pgrx::{FromDatum, IntoDatum, PgMemoryContexts, pg_sys};

use super::layout::{Index, SpareIndex};
use super::{Snapshot, Table, places};
use crate::error::{ClaimError, Result};
use crate::identity::Role;
use crate::pg::time;
use crate::spi::row::Row;

/// What an index is asked for: the value of its first column.
#[derive(Debug, Clone, Copy)]
pub enum Key<'a> {
    /// A text.
    Text(&'a str),
    /// A bigint.
    Bigint(i64),
}

impl Key<'_> {
    fn datum(self) -> Option<pg_sys::Datum> {
        match self {
            Self::Text(text) => text.into_datum(),
            Self::Bigint(number) => number.into_datum(),
        }
    }

    fn equality(self) -> pg_sys::Oid {
        pg_sys::Oid::from(match self {
            Self::Text(_) => pg_sys::F_TEXTEQ,
            Self::Bigint(_) => pg_sys::F_INT8EQ,
        })
    }
}

/// How an index is read.
enum Way<'a> {
    /// From the first entry on.
    InOrder,
    /// What has this key in a B-tree.
    Equal(Key<'a>),
    /// What may have this key in a hash index.
    Hashed(Key<'a>),
}

impl Table {
    /// The last row with this key in the index that the snapshot shows.
    pub fn find(&self, snapshot: &Snapshot, index: Index, key: Key<'_>) -> Option<TableRow> {
        let Some(column) = self.known.key_of(index) else {
            return self.find_where(snapshot, index, key, |_| true);
        };
        let row = self.recall(snapshot, key).filter(|row| row.has(column, key));
        let row = row.or_else(|| self.find_where(snapshot, index, key, |_| true))?;
        self.remember(key, &row);
        Some(row)
    }

    /// Has the row with this primary key be looked for in its place first, by this transaction.
    pub fn remember(&self, key: Key<'_>, row: &TableRow) {
        // SAFETY: the row's place is set.
        places::remember(self.known.oid, key, unsafe { *row.place() });
    }

    /// The row with this key where this transaction has found it, if it is still there.
    pub fn recall(&self, snapshot: &Snapshot, key: Key<'_>) -> Option<TableRow> {
        self.at(snapshot, places::recall(self.known.oid, key)?)
    }

    /// The row at a place, if the snapshot shows that one.
    pub(super) fn at(
        &self,
        snapshot: &Snapshot,
        mut place: pg_sys::ItemPointerData,
    ) -> Option<TableRow> {
        let row = self.empty_row();
        // SAFETY: the table is open and has kept its lock since the place was found; the slot is one of
        // the table's.
        unsafe {
            if !pg_sys::table_tuple_fetch_row_version(
                self.relation,
                &mut place,
                snapshot.raw,
                row.slot,
            ) {
                return None;
            }
            pg_sys::slot_getallattrs(row.slot);
        }
        Some(row)
    }

    /// The last of them in the index that meets the condition.
    pub fn find_where(
        &self,
        snapshot: &Snapshot,
        index: Index,
        key: Key<'_>,
        condition: impl Fn(&TableRow) -> bool,
    ) -> Option<TableRow> {
        let row = self.empty_row();
        let found = self.scan(snapshot, self.known.index(index), Way::Equal(key), &row, |row| {
            Ok::<_, Infallible>(condition(row))
        });
        found.unwrap_or_else(|never| match never {}).then_some(row)
    }

    /// Whether the table has not had a row since it was made or last emptied. Then no index need be asked, of
    /// which even an empty one takes as long as many a search. But SERIALIZABLE goes by what was looked for
    /// in an index.
    pub fn is_bare(&self) -> bool {
        if time::has_transaction_snapshot() {
            return false;
        }
        // SAFETY: the table is open. Nobody can empty it while it is, and what a snapshot shows has its page.
        unsafe {
            pg_sys::RelationGetNumberOfBlocksInFork(self.relation, pg_sys::ForkNumber::MAIN_FORKNUM)
                == 0
        }
    }

    /// Whether there is such an index.
    pub fn has(&self, index: SpareIndex) -> bool {
        self.known.spare_index(index).is_some()
    }

    /// Whether there is a row that meets the condition, of those that the index may have this key for. No
    /// where there is no such index.
    pub fn any(
        &self,
        snapshot: &Snapshot,
        index: SpareIndex,
        key: Key<'_>,
        condition: impl Fn(&TableRow) -> Result<bool>,
    ) -> Result<bool> {
        let Some(by) = self.known.spare_index(index) else {
            return Ok(false);
        };
        let way = if index.is_hashed() { Way::Hashed(key) } else { Way::Equal(key) };
        self.scan(snapshot, by, way, &self.empty_row(), condition)
    }

    /// Visits rows in the order of an index, until `is_it`, which may look at other tables, says to stop.
    /// `None` where there is no such index.
    pub fn walk(
        &self,
        snapshot: &Snapshot,
        index: SpareIndex,
        mut is_it: impl FnMut(&TableRow) -> Result<bool>,
    ) -> Option<Result<bool>> {
        let by = self.known.spare_index(index)?;
        // There may be any number of rows: what the server allocates for one goes with it, but for what
        // statements answer.
        let mut context = PgMemoryContexts::new("pg_claims row");
        Some(self.scan(snapshot, by, Way::InOrder, &self.empty_row(), |row| {
            // SAFETY: what is returned is not the server's memory.
            unsafe {
                let answer = context.switch_to(|_| is_it(row));
                context.reset();
                answer
            }
        }))
    }

    /// Reads what an index leads to into `row`, until `is_it` says that this is it.
    fn scan<E>(
        &self,
        snapshot: &Snapshot,
        by: pg_sys::Oid,
        way: Way<'_>,
        row: &TableRow,
        mut is_it: impl FnMut(&TableRow) -> std::result::Result<bool, E>,
    ) -> std::result::Result<bool, E> {
        let key = match way {
            Way::InOrder => None,
            Way::Equal(key) => Some((pg_sys::BTEqualStrategyNumber, key)),
            Way::Hashed(key) => Some((pg_sys::HTEqualStrategyNumber, key)),
        };
        // From the end where it is one row that is looked for, as entries of one key are in the order of
        // their places, and the newest version of a row is mostly at the last one: an old snapshot of
        // somebody else's may keep many.
        let direction = match way {
            Way::InOrder => pg_sys::ScanDirection::ForwardScanDirection,
            Way::Equal(_) | Way::Hashed(_) => pg_sys::ScanDirection::BackwardScanDirection,
        };
        // SAFETY: table and index are open while they are scanned, with the snapshot that is active;
        // the slot is one of the table's. The index is one on a text or a bigint, as the key is.
        unsafe {
            let mode = pg_sys::AccessShareLock as pg_sys::LOCKMODE;
            let by = pg_sys::index_open(by, mode);
            let mut scan_keys = [pg_sys::ScanKeyData::default()];
            let count = i32::from(key.is_some());
            if let Some((strategy, key)) = key {
                let Some(argument) = key.datum() else {
                    pg_sys::index_close(by, mode);
                    return Ok(false);
                };
                pg_sys::ScanKeyEntryInitialize(
                    &mut scan_keys[0],
                    0,
                    1,
                    strategy as pg_sys::StrategyNumber,
                    pg_sys::Oid::INVALID,
                    *(*by).rd_indcollation,
                    key.equality(),
                    argument,
                );
            }
            #[cfg(not(feature = "pg18"))]
            let scan = pg_sys::index_beginscan(self.relation, by, snapshot.raw, count, 0);
            #[cfg(feature = "pg18")]
            let scan = pg_sys::index_beginscan(
                self.relation,
                by,
                snapshot.raw,
                std::ptr::null_mut(),
                count,
                0,
            );
            pg_sys::index_rescan(scan, scan_keys.as_mut_ptr(), count, std::ptr::null_mut(), 0);
            let mut found = Ok(false);
            while matches!(found, Ok(false))
                && pg_sys::index_getnext_slot(scan, direction, row.slot)
            {
                pg_sys::slot_getallattrs(row.slot);
                found = is_it(row);
            }
            pg_sys::index_endscan(scan);
            pg_sys::index_close(by, mode);
            found
        }
    }

    pub(super) fn empty_row(&self) -> TableRow {
        // SAFETY: the table is open; the slot is dropped by `TableRow`.
        TableRow { slot: unsafe { pg_sys::table_slot_create(self.relation, std::ptr::null_mut()) } }
    }
}

/// A row of a table.
pub struct TableRow {
    /// All its columns have been taken apart.
    pub(super) slot: *mut pg_sys::TupleTableSlot,
}

impl TableRow {
    /// A column, by its position from 1 on.
    fn get<T: FromDatum>(&self, position: usize) -> Option<T> {
        // SAFETY: the layout's positions are those of the table's columns, and so are the types that
        // are asked for; the slot keeps the row in memory, and what is made of it is a copy.
        unsafe {
            let value = *(*self.slot).tts_values.add(position - 1);
            let is_null = *(*self.slot).tts_isnull.add(position - 1);
            T::from_datum(value, is_null)
        }
    }

    /// Whether the column is NULL.
    pub fn is_null(&self, position: usize) -> bool {
        // SAFETY: as for `get`.
        unsafe { *(*self.slot).tts_isnull.add(position - 1) }
    }

    /// The row, after it was written: that has made a tuple of its columns.
    pub(super) fn taken_apart(self) -> Self {
        // SAFETY: the slot has been filled.
        unsafe { pg_sys::slot_getallattrs(self.slot) };
        self
    }

    /// Whether a column says so.
    pub fn says(&self, position: usize, text: &str) -> bool {
        self.get::<&str>(position) == Some(text)
    }

    /// Whether the column has this value.
    fn has(&self, position: usize, key: Key<'_>) -> bool {
        match key {
            Key::Text(text) => self.says(position, text),
            Key::Bigint(number) => self.get::<i64>(position) == Some(number),
        }
    }

    /// A column of type jsonb as the server writes it, if it is not NULL.
    pub fn json_text(&self, position: usize) -> Option<String> {
        if self.is_null(position) {
            return None;
        }
        // SAFETY: a function of the server's that takes jsonb, which the column is, and makes a text of its own.
        unsafe {
            let value = *(*self.slot).tts_values.add(position - 1);
            let written = pgrx::direct_function_call_as_datum(pg_sys::jsonb_out, &[Some(value)])?;
            let text = CStr::from_ptr(written.cast_mut_ptr());
            Some(text.to_string_lossy().into_owned())
        }
    }

    /// A name that is never NULL.
    pub fn required_name(&self, position: usize, what: &'static str) -> Result<String> {
        let name = self.get::<&CStr>(position).ok_or(ClaimError::Corrupt { what })?;
        Ok(name.to_string_lossy().into_owned())
    }

    /// The transaction that has locked or written the row since it was read, and has not ended, unless it is this
    /// one. `None` also where there may be several; whoever writes the row will see.
    pub(super) fn writer(&self) -> Option<pg_sys::TransactionId> {
        // SAFETY: the slot holds a row as it lies in its page, which stays there while the slot has it. What
        // others write there meanwhile is read or not.
        unsafe {
            let mut is_copy = false;
            let tuple = pg_sys::ExecFetchSlotHeapTuple(self.slot, false, &mut is_copy);
            let header = (*tuple).t_data;
            let flags = u32::from((*header).t_infomask);
            let writer = (*header).t_choice.t_heap.t_xmax;
            let key_shared = pg_sys::HEAP_XMAX_KEYSHR_LOCK;
            let locks = key_shared | pg_sys::HEAP_XMAX_EXCL_LOCK;
            let is_none = flags & (pg_sys::HEAP_XMAX_INVALID | pg_sys::HEAP_XMAX_IS_MULTI) != 0
                // A foreign key's look.
                || flags & (pg_sys::HEAP_XMAX_LOCK_ONLY | locks)
                    == pg_sys::HEAP_XMAX_LOCK_ONLY | key_shared
                || is_copy
                || pg_sys::TransactionIdIsCurrentTransactionId(writer)
                || !pg_sys::TransactionIdIsInProgress(writer);
            (!is_none).then_some(writer)
        }
    }

    /// Whether another transaction, which has not ended, has locked or written the row since it was read.
    pub fn is_contested(&self) -> bool {
        self.writer().is_some()
    }

    /// Where it is.
    pub(super) fn place(&self) -> pg_sys::ItemPointer {
        // SAFETY: the slot is valid as long as this is.
        unsafe { &raw mut (*self.slot).tts_tid }
    }
}

impl Drop for TableRow {
    fn drop(&mut self) {
        // After an error the abort of the transaction or savepoint does it.
        if !std::thread::panicking() {
            // SAFETY: made by `empty_row`, and dropped once.
            unsafe { pg_sys::ExecDropSingleTupleTableSlot(self.slot) };
        }
    }
}

impl Row for TableRow {
    fn text(&self, position: usize) -> Result<Option<String>> {
        Ok(self.get::<String>(position))
    }

    fn bigint(&self, position: usize) -> Result<Option<i64>> {
        Ok(self.get::<i64>(position))
    }

    fn instant(&self, position: usize) -> Result<Option<DateTime<Utc>>> {
        Ok(self.get::<TimestampWithTimeZone>(position).map(time::from_server))
    }

    fn time(&self, position: usize) -> Result<Option<TimeDelta>> {
        Ok(self.get::<Interval>(position).map(|interval| time::from_interval(&interval)))
    }

    fn role(&self, position: usize) -> Result<Role> {
        Ok(self.get::<pg_sys::Oid>(position).map_or(Role::NOBODY, Role))
    }

    fn flag(&self, position: usize) -> Result<bool> {
        Ok(self.get::<bool>(position).unwrap_or(false))
    }
}
