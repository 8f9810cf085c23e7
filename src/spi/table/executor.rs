//! The server's executor, whose functions differ between versions.
//!
//! # Safety
//! All of them take what [`Target`](super::target::Target) has made, for a table that is open, within a query of AFTER
//! triggers that has begun.

use pgrx::pg_sys;
use pgrx::pg_sys::{Bitmapset, EPQState, EState, ItemPointer, List, ResultRelInfo, TupleTableSlot};

/// What of the indexes an update has to write.
#[cfg(any(feature = "pg14", feature = "pg15"))]
pub type Indexes = bool;
#[cfg(not(any(feature = "pg14", feature = "pg15")))]
pub type Indexes = pg_sys::TU_UpdateIndexes::Type;

/// Whether an update has to write indexes, and whether only those that summarize.
#[cfg(any(feature = "pg14", feature = "pg15"))]
pub fn needs_indexes(indexes: Indexes) -> (bool, bool) {
    (indexes, false)
}
#[cfg(not(any(feature = "pg14", feature = "pg15")))]
pub fn needs_indexes(indexes: Indexes) -> (bool, bool) {
    use pg_sys::TU_UpdateIndexes::{TU_None, TU_Summarizing};
    (indexes != TU_None, indexes == TU_Summarizing)
}

/// Computes the stored generated columns of a row that is to be written.
pub unsafe fn compute_generated(
    state: *mut EState,
    target: *mut ResultRelInfo,
    row: *mut TupleTableSlot,
    command: pg_sys::CmdType::Type,
) {
    unsafe extern "C-unwind" {
        // No binding of pgrx's has it.
        fn ExecComputeStoredGenerated(
            target: *mut ResultRelInfo,
            state: *mut EState,
            row: *mut TupleTableSlot,
            command: pg_sys::CmdType::Type,
        );
    }
    // SAFETY: as promised; an error of the server's becomes one of Rust's, as for every other function.
    unsafe {
        pg_sys::ffi::pg_guard_ffi_boundary(|| {
            ExecComputeStoredGenerated(target, state, row, command);
        });
    }
}

/// Makes the one table of a range table that `state` is about, and returns where its updated columns are told.
pub unsafe fn init_range_table(
    state: *mut EState,
    entry: *mut pg_sys::RangeTblEntry,
) -> *mut *mut Bitmapset {
    // SAFETY: as promised; the entry is that of a table.
    unsafe {
        let entries = pg_sys::lappend(std::ptr::null_mut(), entry.cast());
        #[cfg(any(feature = "pg14", feature = "pg15"))]
        {
            pg_sys::ExecInitRangeTable(state, entries);
            &raw mut (*entry).updatedCols
        }
        #[cfg(not(any(feature = "pg14", feature = "pg15")))]
        {
            let mut rights: *mut List = std::ptr::null_mut();
            let right = pg_sys::addRTEPermissionInfo(&mut rights, entry);
            #[cfg(not(feature = "pg18"))]
            pg_sys::ExecInitRangeTable(state, entries, rights);
            #[cfg(feature = "pg18")]
            {
                let unpruned = pg_sys::bms_make_singleton(1);
                pg_sys::ExecInitRangeTable(state, entries, rights, unpruned);
            }
            &raw mut (*right).updatedCols
        }
    }
}

/// Runs the BEFORE UPDATE triggers, of which each may change the row. False where one suppresses the write.
pub unsafe fn before_update(
    state: *mut EState,
    target: *mut ResultRelInfo,
    place: ItemPointer,
    row: *mut TupleTableSlot,
) -> bool {
    let (none, no_tuple) = (std::ptr::null_mut(), std::ptr::null_mut());
    let mut recheck = EPQState::default();
    // SAFETY: as promised. The row is locked, so that the server finds it unchanged and rechecks nothing.
    unsafe {
        #[cfg(any(feature = "pg14", feature = "pg15"))]
        pg_sys::EvalPlanQualInit(&mut recheck, state, none, std::ptr::null_mut(), -1);
        #[cfg(not(any(feature = "pg14", feature = "pg15")))]
        pg_sys::EvalPlanQualInit(
            &mut recheck,
            state,
            none,
            std::ptr::null_mut(),
            -1,
            std::ptr::null_mut(),
        );
        #[cfg(feature = "pg14")]
        return pg_sys::ExecBRUpdateTriggers(state, &mut recheck, target, place, no_tuple, row);
        #[cfg(not(feature = "pg14"))]
        {
            let mut failure = pg_sys::TM_FailureData::default();
            #[cfg(feature = "pg15")]
            return pg_sys::ExecBRUpdateTriggers(
                state,
                &mut recheck,
                target,
                place,
                no_tuple,
                row,
                &mut failure,
            );
            #[cfg(not(feature = "pg15"))]
            {
                let mut result = pg_sys::TM_Result::TM_Ok;
                pg_sys::ExecBRUpdateTriggers(
                    state,
                    &mut recheck,
                    target,
                    place,
                    no_tuple,
                    row,
                    &mut result,
                    &mut failure,
                    #[cfg(feature = "pg18")]
                    false,
                )
            }
        }
    }
}

/// Queues the AFTER UPDATE triggers.
pub unsafe fn after_update(
    state: *mut EState,
    target: *mut ResultRelInfo,
    place: ItemPointer,
    row: *mut TupleTableSlot,
    recheck: *mut List,
    transition: *mut pg_sys::TransitionCaptureState,
) {
    // SAFETY: as promised.
    unsafe {
        pg_sys::ExecARUpdateTriggers(
            state,
            target,
            #[cfg(not(feature = "pg14"))]
            std::ptr::null_mut(),
            #[cfg(not(feature = "pg14"))]
            std::ptr::null_mut(),
            place,
            std::ptr::null_mut(),
            row,
            recheck,
            transition,
            #[cfg(not(feature = "pg14"))]
            false,
        );
    }
}

/// Enters a row that has been written into the indexes; returns those that are to be checked again when the
/// transaction ends.
pub unsafe fn insert_index_entries(
    state: *mut EState,
    target: *mut ResultRelInfo,
    row: *mut TupleTableSlot,
    is_update: bool,
    _only_summarizing: bool,
) -> *mut List {
    // SAFETY: as promised, with the indexes open.
    unsafe {
        pg_sys::ExecInsertIndexTuples(
            target,
            row,
            state,
            is_update,
            false,
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            #[cfg(not(any(feature = "pg14", feature = "pg15")))]
            _only_summarizing,
        )
    }
}

/// Whether no other row has this one's key in the unique index. Waits for whoever is just writing such a row.
/// Otherwise `conflict` is where that row is.
pub unsafe fn has_no_rival(
    state: *mut EState,
    target: *mut ResultRelInfo,
    row: *mut TupleTableSlot,
    index: pg_sys::Oid,
    conflict: ItemPointer,
) -> bool {
    // SAFETY: as promised, with the indexes open and described for such a look.
    unsafe {
        #[cfg(feature = "pg18")]
        let mut nowhere = pg_sys::ItemPointerData::default();
        #[cfg(feature = "pg18")]
        pg_sys::ItemPointerSetInvalid(&mut nowhere);
        pg_sys::ExecCheckIndexConstraints(
            target,
            row,
            state,
            conflict,
            #[cfg(feature = "pg18")]
            &mut nowhere,
            pg_sys::lappend_oid(std::ptr::null_mut(), index),
        )
    }
}

/// Closes the indexes, and keeps their locks until the transaction ends: it mostly writes the table again.
pub unsafe fn close_indexes(target: *mut ResultRelInfo) {
    // SAFETY: as promised, with the indexes open; both lists have as many elements.
    unsafe {
        for at in 0..(*target).ri_NumIndices as usize {
            let index = *(*target).ri_IndexRelationDescs.add(at);
            #[cfg(any(feature = "pg17", feature = "pg18"))]
            pg_sys::index_insert_cleanup(index, *(*target).ri_IndexRelationInfo.add(at));
            pg_sys::index_close(index, pg_sys::NoLock as pg_sys::LOCKMODE);
        }
    }
}
