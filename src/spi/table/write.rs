//! Locking and writing rows.

use std::ffi::CStr;

use chrono::TimeDelta;
use pgrx::pg_sys::TM_Result;
use pgrx::{IntoDatum, PgMemoryContexts, pg_sys};

use super::known::{Entry, Rows};
use super::layout::{claims, sessions};
use super::{Snapshot, Table, TableRow};
use crate::error::{ClaimError, Result};
use crate::spi::time;

/// What to do about a row that another transaction is writing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// Wait until that ends.
    Block,
    /// Pass it by.
    Skip,
}

/// What came of locking a row.
pub enum Lock {
    /// It is locked until the transaction ends. The row as it is by now.
    Held(TableRow),
    /// Another transaction is writing it.
    Busy,
    /// It was deleted, or moved to another partition.
    Gone,
}

/// Values for some of a table's columns.
#[derive(Default)]
pub struct NewRow {
    /// By position, from 1 on.
    values: Vec<(usize, Option<pg_sys::Datum>)>,
}

impl NewRow {
    /// Gives a column a value.
    pub fn set(mut self, position: usize, value: impl IntoDatum) -> Self {
        self.values.push((position, value.into_datum()));
        self
    }

    /// Gives a column of type name a value; what is too long for it is cut, as the server does.
    pub fn set_name(mut self, position: usize, value: &CStr) -> Self {
        // SAFETY: the server copies the null-terminated string into a name of its own.
        let name = unsafe {
            let name = pg_sys::palloc0(size_of::<pg_sys::NameData>()).cast::<pg_sys::NameData>();
            pg_sys::namestrcpy(name, value.as_ptr());
            name
        };
        self.values.push((position, Some(pg_sys::Datum::from(name))));
        self
    }

    /// Gives a numeric column a time in seconds, to the millisecond.
    pub fn set_seconds(mut self, position: usize, time: Option<TimeDelta>) -> Self {
        const HALF: TimeDelta = TimeDelta::microseconds(500);
        let number = time.map(|time| {
            let milliseconds = (time + HALF).num_milliseconds();
            // SAFETY: makes a number of its own.
            unsafe { pg_sys::int64_div_fast_to_numeric(milliseconds, 3) }
        });
        self.values.push((position, number.map(pg_sys::Datum::from)));
        self
    }

    /// # Safety
    /// `slot` must have as many columns as the table, filled, and the values' types must be theirs.
    unsafe fn fill(&self, slot: *mut pg_sys::TupleTableSlot) {
        for (position, value) in &self.values {
            // SAFETY: as promised.
            unsafe {
                *(*slot).tts_values.add(position - 1) = value.unwrap_or(pg_sys::Datum::null());
                *(*slot).tts_isnull.add(position - 1) = value.is_none();
            }
        }
    }
}

/// Neither a read-only transaction nor a parallel worker may write.
///
/// # Safety
/// In a transaction.
unsafe fn check_may_write(command: &CStr) {
    // SAFETY: as promised; the server raises an error that names the command.
    unsafe {
        pg_sys::PreventCommandIfReadOnly(command.as_ptr());
        pg_sys::PreventCommandIfParallelMode(command.as_ptr());
    }
}

impl Table {
    /// Locks a row that was found, against everything but foreign keys' looks.
    pub fn lock(&self, snapshot: &Snapshot, row: &TableRow, wait: Wait) -> Result<Lock> {
        let keeps_snapshot = time::has_transaction_snapshot();
        let mut flags = pg_sys::TUPLE_LOCK_FLAG_LOCK_UPDATE_IN_PROGRESS;
        if !keeps_snapshot {
            flags |= pg_sys::TUPLE_LOCK_FLAG_FIND_LAST_VERSION;
        }
        let locked = self.empty_row();
        let mut failure = pg_sys::TM_FailureData::default();
        // SAFETY: the row's place is one that the snapshot shows; the slot is one of the table's.
        let result = unsafe {
            check_may_write(c"SELECT FOR NO KEY UPDATE");
            let mut place = *row.place();
            pg_sys::table_tuple_lock(
                self.relation,
                &mut place,
                snapshot.raw,
                locked.slot,
                pg_sys::GetCurrentCommandId(false),
                pg_sys::LockTupleMode::LockTupleNoKeyExclusive,
                match wait {
                    Wait::Block => pg_sys::LockWaitPolicy::LockWaitBlock,
                    Wait::Skip => pg_sys::LockWaitPolicy::LockWaitSkip,
                },
                flags as u8,
                &mut failure,
            )
        };
        match result {
            TM_Result::TM_Ok => {
                // SAFETY: the slot has been filled.
                unsafe { pg_sys::slot_getallattrs(locked.slot) };
                Ok(Lock::Held(locked))
            }
            TM_Result::TM_WouldBlock => Ok(Lock::Busy),
            TM_Result::TM_Updated | TM_Result::TM_Deleted if keeps_snapshot => {
                Err(ClaimError::Serialization)
            }
            // By this transaction as well: what it has deleted or changed since the look.
            _ => Ok(Lock::Gone),
        }
    }

    /// Waits for whoever has locked or written the row since it was read, without locking it. Returns whether there
    /// was anybody to wait for.
    pub fn await_writer(&self, row: &TableRow) -> bool {
        let Some(writer) = row.writer() else {
            return false;
        };
        // SAFETY: the table is open, and the row's place is set.
        unsafe {
            let lock = pg_sys::XLTW_Oper::XLTW_Lock;
            pg_sys::XactLockTableWait(writer, self.relation, row.place(), lock);
        }
        true
    }

    /// Gives a row that was found some new values, unless another transaction has changed it since: then
    /// false. Waits for one that is just doing so.
    pub fn update(&self, snapshot: &Snapshot, row: &TableRow, new: &NewRow) -> bool {
        self.update_checked(snapshot, row, new, Uniqueness::Required) != Update::Outdated
    }

    /// The same, but tells where an SD may have only one such row and has another, or may come to have one.
    pub fn try_update(&self, snapshot: &Snapshot, row: &TableRow, new: &NewRow) -> Update {
        self.update_checked(snapshot, row, new, Uniqueness::Told)
    }

    fn update_checked(
        &self,
        snapshot: &Snapshot,
        row: &TableRow,
        new: &NewRow,
        uniqueness: Uniqueness,
    ) -> Update {
        let written = self.empty_row();
        let mut failure = pg_sys::TM_FailureData::default();
        let mut lock_mode = pg_sys::LockTupleMode::LockTupleNoKeyExclusive;
        // SAFETY: both slots are of this table and its columns have been taken apart; the old row stays
        // in memory until the new one has been made of it. The values are of the columns' types.
        let (result, indexes) = unsafe {
            check_may_write(c"UPDATE");
            pg_sys::CheckCmdReplicaIdentity(self.relation, pg_sys::CmdType::CMD_UPDATE);
            let columns = (*(*self.relation).rd_att).natts as usize;
            (*written.slot).tts_values.copy_from_nonoverlapping((*row.slot).tts_values, columns);
            (*written.slot).tts_isnull.copy_from_nonoverlapping((*row.slot).tts_isnull, columns);
            // As every statement leaves them behind.
            for position in &self.known.dropped {
                *(*written.slot).tts_isnull.add(position - 1) = true;
            }
            new.fill(written.slot);
            pg_sys::ExecStoreVirtualTuple(written.slot);
            let mut indexes = Indexes::default();
            let mut place = *row.place();
            let result = pg_sys::table_tuple_update(
                self.relation,
                &mut place,
                written.slot,
                pg_sys::GetCurrentCommandId(true),
                snapshot.raw,
                std::ptr::null_mut(),
                true,
                &mut failure,
                &mut lock_mode,
                &mut indexes,
            );
            (result, indexes)
        };
        if result != TM_Result::TM_Ok {
            return Update::Outdated;
        }
        let is_unique = only_summarizing(indexes).is_none_or(|only_summarizing| {
            // SAFETY: the slot holds the row as it was written.
            unsafe { self.insert_index_entries(Some(row), &written, only_summarizing, uniqueness) }
        });
        if is_unique { Update::Done } else { Update::Contested }
    }

    /// Adds a row; columns without a value become NULL. Waits for a transaction that is just adding one of the
    /// same key, and is an error if there is one.
    pub fn insert(&self, new: &NewRow) {
        self.insert_checked(new, Uniqueness::Required);
    }

    /// The same, but where an SD may have only one such row waits for nobody: false where it has another, or may
    /// come to have one. Then the new one must be deleted again.
    pub fn try_insert(&self, new: &NewRow) -> bool {
        self.insert_checked(new, Uniqueness::Told)
    }

    fn insert_checked(&self, new: &NewRow, uniqueness: Uniqueness) -> bool {
        let written = self.empty_row();
        // SAFETY: the slot is of this table, and all its columns are filled.
        unsafe {
            check_may_write(c"INSERT");
            let columns = (*(*self.relation).rd_att).natts as usize;
            std::slice::from_raw_parts_mut((*written.slot).tts_isnull, columns).fill(true);
            new.fill(written.slot);
            pg_sys::ExecStoreVirtualTuple(written.slot);
            pg_sys::simple_table_tuple_insert(self.relation, written.slot);
            self.insert_index_entries(None, &written, false, uniqueness)
        }
    }

    /// False where that may leave two rows with one key, which only [`Uniqueness::Told`] allows.
    ///
    /// # Safety
    /// `row` must just have been written, in the place of `old` if there is one.
    unsafe fn insert_index_entries(
        &self,
        old: Option<&TableRow>,
        row: &TableRow,
        only_summarizing: bool,
        uniqueness: Uniqueness,
    ) -> bool {
        let mut is_unique = true;
        // SAFETY: as promised. Writing has made a tuple of the columns; they are taken apart again.
        unsafe {
            pg_sys::slot_getallattrs(row.slot);
            // A B-tree does not summarize.
            let entries = self.known.entries.iter().filter(|_| !only_summarizing);
            for entry in entries.filter(|entry| entry.has(row)) {
                is_unique &= self.insert_index_entry(old, row, entry, uniqueness);
            }
            if self.known.has_other_indexes {
                self.insert_other_index_entries(row, old.is_some(), only_summarizing);
            }
        }
        is_unique
    }

    /// # Safety
    /// `row` must just have been written, in the place of `old` if there is one, and `entry` be one of the
    /// table's.
    unsafe fn insert_index_entry(
        &self,
        old: Option<&TableRow>,
        row: &TableRow,
        entry: &Entry,
        uniqueness: Uniqueness,
    ) -> bool {
        let mut values = [pg_sys::Datum::null(); pg_sys::INDEX_MAX_KEYS as usize];
        let mut are_null = [false; pg_sys::INDEX_MAX_KEYS as usize];
        // Where the old version has the same key in the index there is nothing to be checked: the server's
        // check would visit every version of the row that anybody may still see.
        let is_unchanged = old.is_some_and(|old| entry.keeps_key(old, row));
        let check = match uniqueness {
            // An index that is just being built may lack the old version, and would then let another row have
            // the key.
            _ if (is_unchanged && entry.is_valid) || !entry.is_unique => {
                pg_sys::IndexUniqueCheck::UNIQUE_CHECK_NO
            }
            // Two rows with one primary key could not be told apart any more.
            Uniqueness::Told if entry.rows != Rows::All => {
                pg_sys::IndexUniqueCheck::UNIQUE_CHECK_PARTIAL
            }
            _ => pg_sys::IndexUniqueCheck::UNIQUE_CHECK_YES,
        };
        // SAFETY: as promised; a B-tree asks for no more of its description than that there is one.
        unsafe {
            for (at, column) in entry.columns.iter().enumerate() {
                values[at] = *(*row.slot).tts_values.add(column - 1);
                are_null[at] = *(*row.slot).tts_isnull.add(column - 1);
            }
            let mut info = pg_sys::IndexInfo {
                type_: pg_sys::NodeTag::T_IndexInfo,
                ..pg_sys::IndexInfo::default()
            };
            let mode = pg_sys::RowExclusiveLock as pg_sys::LOCKMODE;
            let index = pg_sys::index_open(entry.index, mode);
            let is_satisfied = pg_sys::index_insert(
                index,
                values.as_mut_ptr(),
                are_null.as_mut_ptr(),
                row.place(),
                self.relation,
                check,
                is_unchanged,
                &mut info,
            );
            pg_sys::index_close(index, pg_sys::NoLock as pg_sys::LOCKMODE);
            // The server's answer says something only where it has checked.
            check != pg_sys::IndexUniqueCheck::UNIQUE_CHECK_PARTIAL || is_satisfied
        }
    }

    /// Those of the indexes that only the executor knows how to write.
    ///
    /// # Safety
    /// `row` must just have been written.
    unsafe fn insert_other_index_entries(
        &self,
        row: &TableRow,
        is_update: bool,
        _only_summarizing: bool,
    ) {
        // SAFETY: the server reads no more of the description than its table and its indexes; that is
        // zeroed memory with a node's tag, like one that it makes itself. What is made here is freed
        // with the executor's state, at the latest when the transaction ends.
        unsafe {
            let state = pg_sys::CreateExecutorState();
            PgMemoryContexts::For((*state).es_query_cxt).switch_to(|_| {
                let target = pg_sys::palloc0(size_of::<pg_sys::ResultRelInfo>())
                    .cast::<pg_sys::ResultRelInfo>();
                (*target).type_ = pg_sys::NodeTag::T_ResultRelInfo;
                (*target).ri_RelationDesc = self.relation;
                pg_sys::ExecOpenIndices(target, false);
                self.leave_out_known(&mut *target);
                pg_sys::ExecInsertIndexTuples(
                    target,
                    row.slot,
                    state,
                    is_update,
                    false,
                    std::ptr::null_mut(),
                    std::ptr::null_mut(),
                    #[cfg(not(any(feature = "pg14", feature = "pg15")))]
                    _only_summarizing,
                );
                pg_sys::ExecCloseIndices(target);
            });
            pg_sys::FreeExecutorState(state);
        }
    }

    /// Closes the indexes that have had their entries.
    ///
    /// # Safety
    /// The table's indexes must be open in `target`.
    unsafe fn leave_out_known(&self, target: &mut pg_sys::ResultRelInfo) {
        let mut kept = 0;
        for at in 0..target.ri_NumIndices as usize {
            // SAFETY: as promised; both lists have that many elements.
            unsafe {
                let index = *target.ri_IndexRelationDescs.add(at);
                if self.known.entries.iter().any(|entry| entry.index == (*index).rd_id) {
                    pg_sys::index_close(index, pg_sys::RowExclusiveLock as pg_sys::LOCKMODE);
                    continue;
                }
                *target.ri_IndexRelationDescs.add(kept) = index;
                *target.ri_IndexRelationInfo.add(kept) = *target.ri_IndexRelationInfo.add(at);
            }
            kept += 1;
        }
        target.ri_NumIndices = kept as i32;
    }
}

impl Entry {
    /// Whether the index has this row.
    fn has(&self, row: &TableRow) -> bool {
        match self.rows {
            Rows::All => true,
            Rows::Holding => !row.is_null(sessions::SD_ID) && row.says(sessions::STATUS, "active"),
            Rows::Open => row.is_null(claims::RELEASED_AT),
        }
    }

    /// Whether the index has this row's old version as well, with the same key.
    fn keeps_key(&self, old: &TableRow, row: &TableRow) -> bool {
        // No update here changes the primary key.
        self.is_primary
            || (self.is_on_texts
                && self.has(old)
                && self.columns.iter().all(|column| row.is_same(old, *column)))
    }
}

/// What is done about keys that another row has already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Uniqueness {
    /// It is an error; whoever is just writing such a row is waited for.
    Required,
    /// Of an SD's one claim and its one open acquisition it is told, as far as that can be known without
    /// waiting.
    Told,
}

/// What came of an update.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Update {
    /// The row is as it was to be.
    Done,
    /// Another transaction has changed it; nothing was written.
    Outdated,
    /// It is as it was to be, but must not stay so: another row has its key, or may come to have it.
    Contested,
}

/// What of the indexes an update has to write.
#[cfg(any(feature = "pg14", feature = "pg15"))]
type Indexes = bool;
#[cfg(not(any(feature = "pg14", feature = "pg15")))]
type Indexes = pg_sys::TU_UpdateIndexes::Type;

/// Whether it is only those that summarize; `None` where it is none at all.
#[cfg(any(feature = "pg14", feature = "pg15"))]
fn only_summarizing(indexes: Indexes) -> Option<bool> {
    indexes.then_some(false)
}
#[cfg(not(any(feature = "pg14", feature = "pg15")))]
fn only_summarizing(indexes: Indexes) -> Option<bool> {
    use pg_sys::TU_UpdateIndexes::{TU_None, TU_Summarizing};
    (indexes != TU_None).then_some(indexes == TU_Summarizing)
}
