//! Locking and writing rows.

use std::ffi::CStr;

use chrono::TimeDelta;
use pgrx::pg_sys::TM_Result;
use pgrx::{IntoDatum, PgTupleDesc, pg_sys};

use super::layout::Index;
use super::target::{Fires, Target};
use super::{Snapshot, Table, TableRow, executor};
use crate::error::{ClaimError, Result};
use crate::pg::time;
use crate::spi::statement::Db;

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
        if time::is_read_only() {
            pg_sys::PreventCommandIfReadOnly(command.as_ptr());
        }
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

    /// Gives a row that was found some new values, as a statement of the server's would, and returns it as it was written:
    /// BEFORE triggers may have their own way. `None` where another transaction has changed it since; who is just doing
    /// so is waited for. An error where a trigger suppresses the write.
    pub fn update(
        &self,
        db: &Db<'_>,
        snapshot: &Snapshot,
        row: &TableRow,
        new: &NewRow,
    ) -> Result<Option<TableRow>> {
        // SAFETY: asks for the rules of the table, which is open.
        unsafe {
            check_may_write(c"UPDATE");
            pg_sys::CheckCmdReplicaIdentity(self.relation, pg_sys::CmdType::CMD_UPDATE);
        }
        let mut target = Target::of(db, self, new.values.iter().map(|(position, _)| *position))?;
        // A trigger is fired for what is going to be written, and the server locks the row for it as well.
        let fires = target.fires(pg_sys::CmdType::CMD_UPDATE);
        if fires.before && !self.lock_unchanged(snapshot, row)? {
            target.done();
            return Ok(None);
        }
        let written = self.empty_row();
        // SAFETY: both slots are of this table and its columns have been taken apart; the old row stays in memory until the
        // new one has been made of it. The values are of the columns' types.
        let is_written = unsafe {
            let columns = (*(*self.relation).rd_att).natts as usize;
            let (old, slot) = (row.slot, written.slot);
            (*slot).tts_values.copy_from_nonoverlapping((*old).tts_values, columns);
            (*slot).tts_isnull.copy_from_nonoverlapping((*old).tts_isnull, columns);
            // As every statement leaves them behind.
            let descriptor = PgTupleDesc::from_pg_unchecked((*self.relation).rd_att);
            for (at, _) in descriptor.iter().enumerate().filter(|(_, column)| column.attisdropped) {
                *(*slot).tts_isnull.add(at) = true;
            }
            new.fill(slot);
            pg_sys::ExecStoreVirtualTuple(slot);
            (*slot).tts_tableOid = self.oid();
            target.write(fires, |target| {
                self.update_row(target, snapshot, *row.place(), slot, fires)
            })?
        };
        target.done();
        Ok(is_written.then(|| written.taken_apart()))
    }

    /// # Safety
    /// `slot` must have the row as it is to be, for the one at `place`.
    unsafe fn update_row(
        &self,
        target: &mut Target,
        snapshot: &Snapshot,
        mut place: pg_sys::ItemPointerData,
        slot: *mut pg_sys::TupleTableSlot,
        fires: Fires,
    ) -> Result<bool> {
        const COMMAND: pg_sys::CmdType::Type = pg_sys::CmdType::CMD_UPDATE;
        let (state, relation) = (target.state, target.relation);
        // SAFETY: as promised; the target is the table's, for this very update.
        unsafe {
            if fires.before {
                // Or a trigger could drop one that is written afterwards.
                target.open_indexes();
                pg_sys::ExecBSUpdateTriggers(state, relation);
                if !executor::before_update(state, relation, &mut place, slot) {
                    return Err(ClaimError::WriteRefused { table: self.name() });
                }
            }
            // Constraints may ask for it; a trigger may have put another tuple there.
            (*slot).tts_tableOid = self.oid();
            target.check(slot, COMMAND);
            let mut failure = pg_sys::TM_FailureData::default();
            let mut lock_mode = pg_sys::LockTupleMode::LockTupleNoKeyExclusive;
            let mut indexes = executor::Indexes::default();
            let result = pg_sys::table_tuple_update(
                self.relation,
                &mut place,
                slot,
                (*state).es_output_cid,
                snapshot.raw,
                std::ptr::null_mut(),
                true,
                &mut failure,
                &mut lock_mode,
                &mut indexes,
            );
            match result {
                TM_Result::TM_Ok => {}
                TM_Result::TM_SelfModified => {
                    return Err(ClaimError::ChangedByTrigger { table: self.name() });
                }
                _ if time::has_transaction_snapshot() => return Err(ClaimError::Serialization),
                _ => return Ok(false),
            }
            let (has_entries, only_summarizing) = executor::needs_indexes(indexes);
            let mut recheck = std::ptr::null_mut();
            if has_entries {
                target.open_indexes();
                recheck =
                    executor::insert_index_entries(state, relation, slot, true, only_summarizing);
            }
            if fires.after {
                let transition = target.transition(COMMAND);
                executor::after_update(state, relation, &mut place, slot, recheck, transition);
                pg_sys::ExecASUpdateTriggers(state, relation, transition);
            }
        }
        Ok(true)
    }

    /// Locks a row that was found; false where another transaction has changed it since.
    fn lock_unchanged(&self, snapshot: &Snapshot, row: &TableRow) -> Result<bool> {
        Ok(match self.lock(snapshot, row, Wait::Block)? {
            // SAFETY: both have been set.
            Lock::Held(now) => unsafe { pg_sys::ItemPointerEquals(now.place(), row.place()) },
            Lock::Busy | Lock::Gone => false,
        })
    }

    /// Adds a row, as a statement of the server's would; columns without a value get their default. Waits for a transaction
    /// that is just adding one of the same key, and is an error if there is one, or where a trigger suppresses the write.
    pub fn insert(&self, db: &Db<'_>, new: &NewRow) -> Result<()> {
        self.insert_unless(db, None, new).map(drop)
    }

    /// The same, but false where another row has the same key in a unique index.
    pub fn insert_unless_there(&self, db: &Db<'_>, unique: Index, new: &NewRow) -> Result<bool> {
        self.insert_unless(db, Some(self.known.index(unique)), new)
    }

    fn insert_unless(
        &self,
        db: &Db<'_>,
        unique: Option<pg_sys::Oid>,
        new: &NewRow,
    ) -> Result<bool> {
        // SAFETY: asks about this transaction.
        unsafe { check_may_write(c"INSERT") };
        let mut target = Target::of(db, self, std::iter::empty())?;
        let is_given = |position| new.values.iter().any(|(given, _)| *given == position);
        if target.has_default_unless(is_given) {
            // Somebody has given it a default since.
            db.take_rights()?;
        }
        let written = self.empty_row();
        // SAFETY: the slot is of this table, and all its columns are filled.
        let is_written = unsafe {
            let columns = (*(*self.relation).rd_att).natts as usize;
            std::slice::from_raw_parts_mut((*written.slot).tts_isnull, columns).fill(true);
            new.fill(written.slot);
            target.fill_defaults(written.slot, is_given);
            pg_sys::ExecStoreVirtualTuple(written.slot);
            (*written.slot).tts_tableOid = self.oid();
            let fires = target.fires(pg_sys::CmdType::CMD_INSERT);
            target.write(fires, |target| self.insert_row(target, written.slot, unique, fires))?
        };
        target.done();
        Ok(is_written)
    }

    /// # Safety
    /// `slot` must have the row.
    unsafe fn insert_row(
        &self,
        target: &mut Target,
        slot: *mut pg_sys::TupleTableSlot,
        unique: Option<pg_sys::Oid>,
        fires: Fires,
    ) -> Result<bool> {
        const COMMAND: pg_sys::CmdType::Type = pg_sys::CmdType::CMD_INSERT;
        let (state, relation) = (target.state, target.relation);
        // SAFETY: as promised; the target is the table's, for this very insert.
        unsafe {
            if fires.before {
                target.open_indexes();
                pg_sys::ExecBSInsertTriggers(state, relation);
                if !pg_sys::ExecBRInsertTriggers(state, relation, slot) {
                    return Err(ClaimError::WriteRefused { table: self.name() });
                }
            }
            (*slot).tts_tableOid = self.oid();
            target.check(slot, COMMAND);
            target.open_indexes();
            if let Some(unique) = unique {
                let mut rival = pg_sys::ItemPointerData::default();
                if !executor::has_no_rival(state, relation, slot, unique, &mut rival) {
                    // One that the snapshot does not show would be told as if it were not there.
                    if time::has_transaction_snapshot()
                        && self.at(&Snapshot::take(), rival).is_none()
                    {
                        return Err(ClaimError::Serialization);
                    }
                    return Ok(false);
                }
            }
            let (cid, bulk) = ((*state).es_output_cid, std::ptr::null_mut());
            pg_sys::table_tuple_insert(self.relation, slot, cid, 0, bulk);
            let recheck = executor::insert_index_entries(state, relation, slot, false, false);
            if fires.after {
                let transition = target.transition(COMMAND);
                pg_sys::ExecARInsertTriggers(state, relation, slot, recheck, transition);
                pg_sys::ExecASInsertTriggers(state, relation, transition);
            }
        }
        Ok(true)
    }
}
