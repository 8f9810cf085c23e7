//! What the executor needs of a table that is written.
//!
//! A statement makes it anew each time: it copies the triggers, reads the text of each constraint and of each trigger's
//! condition, and compiles them. That costs more than the write. Here a backend keeps it for each table until the
//! server says that a table or a function has changed.

use std::cell::RefCell;
use std::ffi::CStr;
use std::mem::ManuallyDrop;

use pgrx::pg_sys::{self, EState, MemoryContext, ResultRelInfo};
use pgrx::{PgMemoryContexts, PgTupleDesc};

use super::{Table, executor};
use crate::error::{ClaimError, Result};
use crate::spi::catalog::CodeVersion;
use crate::spi::intent::{Intent, Meaning};
use crate::spi::statement::Db;

/// What the executor needs of one table. Nothing in it stays open or pinned between two writes.
pub struct Target {
    table: pg_sys::Oid,
    /// What it was made of.
    made_of: CodeVersion,
    /// All that the server has made for it lives in this one's memory.
    pub(super) state: *mut EState,
    pub(super) relation: *mut ResultRelInfo,
    /// The columns that are updated, as the server wants to know them, and by their positions.
    updated: *mut *mut pg_sys::Bitmapset,
    updated_columns: Vec<usize>,
    /// The columns' defaults, compiled, by the columns' positions.
    defaults: Vec<(usize, *mut pg_sys::ExprState)>,
    /// The BEFORE triggers that are not the extension's own.
    before_triggers: Vec<BeforeTrigger>,
    /// The indexes' ids: they are open only while they are written.
    indexes: Vec<pg_sys::Oid>,
    are_indexes_open: bool,
    /// The columns of writes for which all is compiled.
    compiled_for: Vec<Vec<usize>>,
    /// Generated columns are computed as the first write needed them.
    may_be_kept: bool,
}

thread_local! {
    /// One of each table, but for those in use: a trigger may write the table whose write has set it off. They end with the
    /// process.
    static KEPT: RefCell<ManuallyDrop<Vec<Target>>> =
        const { RefCell::new(ManuallyDrop::new(Vec::new())) };
    /// Memory of targets that an error has left behind, which is given back when the next one is asked for.
    static LEFT: RefCell<Vec<MemoryContext>> = const { RefCell::new(Vec::new()) };
}

impl Target {
    /// The target of a table, for one write of these columns, by their positions; none are named for an insert. What it
    /// compiles, it compiles with the rights of the extension's owner: the server asks then who may call which function, and
    /// evaluates what is constant.
    pub fn of(
        db: &Db<'_>,
        table: &Table,
        updated: impl Iterator<Item = usize> + Clone,
    ) -> Result<Self> {
        LEFT.take().into_iter().for_each(|memory| {
            // SAFETY: nobody has it any more: its target was dropped, and the transaction of that has ended or rolled it
            // back, with all that was open.
            unsafe { pg_sys::MemoryContextDelete(memory) }
        });
        let kept = KEPT.with_borrow_mut(|all| {
            let at = all.iter().position(|target| target.table == table.oid())?;
            Some(all.swap_remove(at))
        });
        let mut target = match kept.filter(|kept| kept.made_of.is_current()) {
            Some(kept) => kept,
            None => {
                // Also of tables that are not there any more.
                let is_old = |target: &mut Self| !target.made_of.is_current();
                drop(KEPT.with_borrow_mut(|all| all.extract_if(.., is_old).collect::<Vec<_>>()));
                db.take_rights()?;
                Self::make(table)
            }
        };
        // Constraints and conditions of triggers are compiled by the first write of these columns.
        if !target.compiled_for.iter().any(|columns| columns.iter().copied().eq(updated.clone())) {
            db.take_rights()?;
            target.compiled_for.push(updated.clone().collect());
        }
        target.begin(table, updated)?;
        Ok(target)
    }

    fn make(table: &Table) -> Self {
        // SAFETY: the table is open. What is made lives in memory of its own, until the target is dropped.
        unsafe {
            let state =
                PgMemoryContexts::TopMemoryContext.switch_to(|_| pg_sys::CreateExecutorState());
            let mut target = Self {
                table: table.oid(),
                // First: what changes meanwhile must not be lost.
                made_of: CodeVersion::now(),
                state,
                relation: std::ptr::null_mut(),
                updated: std::ptr::null_mut(),
                updated_columns: Vec::new(),
                defaults: Vec::new(),
                before_triggers: Vec::new(),
                indexes: Vec::new(),
                are_indexes_open: false,
                compiled_for: Vec::new(),
                may_be_kept: true,
            };
            PgMemoryContexts::For((*state).es_query_cxt).switch_to(|_| target.fill(table));
            target
        }
    }

    /// # Safety
    /// In the memory of the target, which has nothing yet but its state.
    unsafe fn fill(&mut self, table: &Table) {
        // SAFETY: as promised; the table is open.
        unsafe {
            let entry = node::<pg_sys::RangeTblEntry>(pg_sys::NodeTag::T_RangeTblEntry);
            (*entry).rtekind = pg_sys::RTEKind::RTE_RELATION;
            (*entry).relid = table.oid();
            (*entry).relkind = (*(*table.relation).rd_rel).relkind;
            (*entry).rellockmode = pg_sys::RowExclusiveLock as i32;
            self.updated = executor::init_range_table(self.state, entry);
            self.relation = node::<ResultRelInfo>(pg_sys::NodeTag::T_ResultRelInfo);
            pg_sys::InitResultRelInfo(self.relation, table.relation, 1, std::ptr::null_mut(), 0);
            // Where AFTER triggers look for it.
            (*self.state).es_opened_result_relations =
                pg_sys::lappend(std::ptr::null_mut(), self.relation.cast());
            pg_sys::ExecOpenIndices(self.relation, true);
            self.are_indexes_open = true;
            let (count, indexes) = {
                let relation = &*self.relation;
                (relation.ri_NumIndices as usize, relation.ri_IndexRelationDescs)
            };
            self.indexes = (0..count).map(|at| (**indexes.add(at)).rd_id).collect();
            for at in 0..count {
                // Or the first write would compile them that has an entry to make.
                let index = &mut **(*self.relation).ri_IndexRelationInfo.add(at);
                index.ii_ExpressionsState =
                    pg_sys::ExecPrepareExprList(index.ii_Expressions, self.state);
                index.ii_PredicateState = pg_sys::ExecPrepareQual(index.ii_Predicate, self.state);
            }
            self.defaults = defaults_of(self.state, table.relation);
            self.before_triggers = sort_triggers(self.relation, table.extension);
            let constraints = (*(*table.relation).rd_att).constr;
            self.may_be_kept = constraints.is_null() || !(*constraints).has_generated_stored;
        }
    }

    fn begin(&mut self, table: &Table, updated: impl Iterator<Item = usize> + Clone) -> Result<()> {
        // SAFETY: the table is open, and stays so for the write.
        unsafe {
            let form = &*(*table.relation).rd_rel;
            if form.relrowsecurity
                && pg_sys::check_enable_rls(table.oid(), pg_sys::Oid::INVALID, true)
                    == pg_sys::CheckEnableRlsResult::RLS_ENABLED as i32
            {
                return Err(ClaimError::RowSecurity { table: table.name() });
            }
            (*self.relation).ri_RelationDesc = table.relation;
            (*self.state).es_output_cid = pg_sys::GetCurrentCommandId(true);
            if !self.updated_columns.iter().copied().eq(updated.clone()) {
                pg_sys::bms_free(*self.updated);
                let offset = pg_sys::FirstLowInvalidHeapAttributeNumber;
                *self.updated = PgMemoryContexts::For((*self.state).es_query_cxt).switch_to(|_| {
                    updated.clone().fold(std::ptr::null_mut(), |columns, position| {
                        pg_sys::bms_add_member(columns, position as i32 - offset)
                    })
                });
                self.updated_columns = updated.collect();
            }
            // A function may have been replaced, and what it kept of its last call is gone.
            let triggers = (*self.relation).ri_TrigDesc;
            if !triggers.is_null() {
                let count = (*triggers).numtriggers as usize;
                std::ptr::write_bytes((*self.relation).ri_TrigFunctions, 0, count);
            }
        }
        Ok(())
    }

    /// Opens the indexes to be written.
    pub fn open_indexes(&mut self) {
        if std::mem::replace(&mut self.are_indexes_open, true) {
            return;
        }
        for (at, index) in self.indexes.iter().enumerate() {
            // SAFETY: the index is there as long as its table has not changed.
            unsafe {
                let mode = pg_sys::RowExclusiveLock as pg_sys::LOCKMODE;
                *(*self.relation).ri_IndexRelationDescs.add(at) = pg_sys::index_open(*index, mode);
            }
        }
    }

    /// Does a write with all that the server's triggers do about it.
    pub fn write<R>(
        &mut self,
        fires: Fires,
        work: impl FnOnce(&mut Self) -> Result<R>,
    ) -> Result<R> {
        let _meaning = Meaning::to(Intent::Own);
        if !fires.before && !fires.after {
            return work(self);
        }
        // SAFETY: what is begun is ended; after an error that unwinds the server's abort does it.
        unsafe {
            pg_sys::AfterTriggerBeginQuery();
            let done = work(self);
            pg_sys::AfterTriggerEndQuery(self.state);
            done
        }
    }

    /// Whether a column that is not given a value has a default.
    pub fn has_default_unless(&self, is_given: impl Fn(usize) -> bool) -> bool {
        self.defaults.iter().any(|(position, _)| !is_given(*position))
    }

    /// Gives the columns their defaults that the row is not given a value for.
    ///
    /// # Safety
    /// `row` must be one of the table's.
    pub unsafe fn fill_defaults(
        &self,
        row: *mut pg_sys::TupleTableSlot,
        is_given: impl Fn(usize) -> bool,
    ) {
        for (position, default) in self.defaults.iter().filter(|(position, _)| !is_given(*position))
        {
            // SAFETY: as promised; compiled in this very memory. The row is copied before that of the expressions goes.
            unsafe {
                let Some(evaluate) = (**default).evalfunc else { continue };
                let mut context = (*self.state).es_per_tuple_exprcontext;
                if context.is_null() {
                    context = pg_sys::MakePerTupleExprContext(self.state);
                }
                let mut is_null = false;
                let value =
                    PgMemoryContexts::For((*context).ecxt_per_tuple_memory).switch_to(|_| {
                        // An error of the server's becomes one of Rust's, as for every other function.
                        pg_sys::ffi::pg_guard_ffi_boundary(|| {
                            evaluate(*default, context, &mut is_null)
                        })
                    });
                *(*row).tts_values.add(position - 1) = value;
                *(*row).tts_isnull.add(position - 1) = is_null;
            }
        }
    }

    /// Computes the generated columns of a row that is to be written, and checks the table's constraints on it.
    ///
    /// # Safety
    /// `row` must be one of the table's.
    pub unsafe fn check(&self, row: *mut pg_sys::TupleTableSlot, command: pg_sys::CmdType::Type) {
        // SAFETY: as promised.
        unsafe {
            let table = &*(*self.relation).ri_RelationDesc;
            let constraints = (*table.rd_att).constr;
            if !constraints.is_null() {
                if (*constraints).has_generated_stored {
                    executor::compute_generated(self.state, self.relation, row, command);
                }
                pg_sys::ExecConstraints(self.relation, row, self.state);
            }
            if (*table.rd_rel).relispartition {
                pg_sys::ExecPartitionCheck(self.relation, row, self.state, true);
            }
        }
    }

    /// Which triggers this write may fire.
    pub fn fires(&self, command: pg_sys::CmdType::Type) -> Fires {
        // SAFETY: null, or as the server has made it.
        let all = unsafe { (*self.relation).ri_TrigDesc.as_ref() };
        let after = all.is_some_and(|all| match command {
            pg_sys::CmdType::CMD_UPDATE => {
                all.trig_update_after_row
                    || all.trig_update_after_statement
                    || all.trig_update_old_table
                    || all.trig_update_new_table
            }
            _ => {
                all.trig_insert_after_row
                    || all.trig_insert_after_statement
                    || all.trig_insert_new_table
            }
        });
        Fires { before: self.has_before_trigger(command), after }
    }

    /// Whether somebody's BEFORE trigger is there that an insert, or this update, may fire. The extension's own let its
    /// writes pass, so that the server need not lock the row and call them for nothing.
    fn has_before_trigger(&self, command: pg_sys::CmdType::Type) -> bool {
        let kind = pg_sys::TRIGGER_TYPE_BEFORE
            | if command == pg_sys::CmdType::CMD_UPDATE {
                pg_sys::TRIGGER_TYPE_UPDATE
            } else {
                pg_sys::TRIGGER_TYPE_INSERT
            };
        let offset = pg_sys::FirstLowInvalidHeapAttributeNumber;
        self.before_triggers.iter().any(|trigger| {
            // SAFETY: asks about a set of the server's.
            let is_updated = |column: &i16| unsafe {
                pg_sys::bms_is_member(i32::from(*column) - offset, *self.updated)
            };
            trigger.kind & kind == kind
                && (command != pg_sys::CmdType::CMD_UPDATE
                    || trigger.columns.is_empty()
                    || trigger.columns.iter().any(is_updated))
        })
    }

    /// What the AFTER triggers for each statement are to see of the rows that are written.
    pub fn transition(
        &self,
        command: pg_sys::CmdType::Type,
    ) -> *mut pg_sys::TransitionCaptureState {
        // SAFETY: a query of AFTER triggers has begun. Null where none wants to see any.
        unsafe {
            pg_sys::MakeTransitionCaptureState((*self.relation).ri_TrigDesc, self.table, command)
        }
    }

    /// Gives back what the write has opened.
    fn close(&mut self) {
        // SAFETY: nobody uses what the write has made: slots, the triggers' rows.
        unsafe {
            if std::mem::replace(&mut self.are_indexes_open, false) {
                executor::close_indexes(self.relation);
            }
            let (state, relation) = (&mut *self.state, &mut *self.relation);
            if !state.es_tupleTable.is_null() {
                pg_sys::ExecResetTupleTable(state.es_tupleTable, true);
                state.es_tupleTable = std::ptr::null_mut();
                relation.ri_TrigOldSlot = std::ptr::null_mut();
                relation.ri_TrigNewSlot = std::ptr::null_mut();
                relation.ri_ReturningSlot = std::ptr::null_mut();
            }
            let cascaded =
                std::mem::replace(&mut state.es_trig_target_relations, std::ptr::null_mut());
            for at in 0..cascaded.as_ref().map_or(0, |all| all.length) {
                let other = pg_sys::list_nth(cascaded, at).cast::<ResultRelInfo>();
                pg_sys::table_close((*other).ri_RelationDesc, pg_sys::NoLock as pg_sys::LOCKMODE);
            }
            let row = state.es_per_tuple_exprcontext;
            if !row.is_null() && !(*(*row).ecxt_per_tuple_memory).isReset {
                pg_sys::MemoryContextReset((*row).ecxt_per_tuple_memory);
            }
        }
    }

    /// The write is done: what may serve the next one is kept.
    pub fn done(mut self) {
        // SAFETY: made by `make`. Where a foreign key has passed the write on, there is more than of this table.
        let has_cascaded = unsafe { !(*self.state).es_trig_target_relations.is_null() };
        if !self.may_be_kept || has_cascaded {
            return;
        }
        self.close();
        let older = KEPT.with_borrow_mut(|all| {
            let older = all.iter().position(|target| target.table == self.table);
            let older = older.map(|at| all.swap_remove(at));
            all.push(self);
            older
        });
        drop(older);
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        // SAFETY: made by `make`, and dropped once.
        unsafe {
            if std::thread::panicking() {
                // The server may still be using it until the transaction or savepoint has been rolled back.
                LEFT.with_borrow_mut(|left| left.push((*self.state).es_query_cxt));
            } else {
                self.close();
                pg_sys::FreeExecutorState(self.state);
            }
        }
    }
}

/// Which triggers a write may fire.
#[derive(Clone, Copy)]
pub struct Fires {
    /// BEFORE triggers that are not the extension's own.
    pub before: bool,
    /// AFTER triggers.
    pub after: bool,
}

/// A BEFORE trigger.
struct BeforeTrigger {
    /// What it is fired by, as the server has it.
    kind: u32,
    /// The columns of which one must be updated, if it is not any.
    columns: Vec<i16>,
}

/// The one AFTER trigger of the extension's that has nothing to do for a write of its own: the heartbeat that it writes is
/// never earlier than the last one.
const SET_BACK: &CStr = c"claude_sessions_set_back_trigger";

/// The BEFORE triggers of others. Where there is none, nobody changes what the extension writes: then those of its own
/// triggers that would let it pass are taken out of this copy of the table's.
///
/// # Safety
/// The server must have made `relation`, and not have used it yet.
unsafe fn sort_triggers(
    relation: *mut ResultRelInfo,
    extension: pg_sys::Oid,
) -> Vec<BeforeTrigger> {
    // SAFETY: both lists have as many elements as the server says. What the server has of each trigger besides is filled
    // when it is first used.
    unsafe {
        let Some(copy) = (*relation).ri_TrigDesc.as_mut() else { return Vec::new() };
        let all = std::slice::from_raw_parts_mut(copy.triggers, copy.numtriggers as usize);
        let is_before =
            |trigger: &pg_sys::Trigger| trigger.tgtype as u32 & pg_sys::TRIGGER_TYPE_BEFORE != 0;
        let is_own = |trigger: &pg_sys::Trigger| {
            pg_sys::getExtensionOfObject(pg_sys::ProcedureRelationId, trigger.tgfoid) == extension
        };
        let of_others = all.iter().filter(|trigger| is_before(trigger) && !is_own(trigger));
        let of_others: Vec<_> = of_others
            .map(|trigger| BeforeTrigger {
                kind: trigger.tgtype as u32,
                columns: match usize::try_from(trigger.tgnattr) {
                    Ok(count) if count > 0 => {
                        std::slice::from_raw_parts(trigger.tgattr, count).to_vec()
                    }
                    _ => Vec::new(),
                },
            })
            .collect();
        if of_others.is_empty() {
            let mut count = 0;
            for at in 0..all.len() {
                let trigger = all[at];
                let passes = is_before(&trigger) || CStr::from_ptr(trigger.tgname) == SET_BACK;
                if !(passes && is_own(&trigger)) {
                    all[count] = trigger;
                    count += 1;
                }
            }
            copy.numtriggers = count as i32;
        }
        of_others
    }
}

/// The columns' defaults, compiled, by the columns' positions.
///
/// # Safety
/// The table must be open.
unsafe fn defaults_of(
    state: *mut EState,
    table: pg_sys::Relation,
) -> Vec<(usize, *mut pg_sys::ExprState)> {
    // SAFETY: as promised.
    unsafe {
        let columns = PgTupleDesc::from_pg_unchecked((*table).rd_att);
        let has_none = |at: &usize| {
            columns.get(*at).is_none_or(|column| column.attisdropped || column.attgenerated != 0)
        };
        let default_of = |at: usize| {
            let default = pg_sys::build_column_default(table, at as i32 + 1);
            let is_there = !default.is_null();
            is_there.then(|| (at + 1, pg_sys::ExecPrepareExpr(default.cast(), state)))
        };
        (0..columns.len()).filter(|at| !has_none(at)).filter_map(default_of).collect()
    }
}

/// A zeroed node.
unsafe fn node<T>(tag: pg_sys::NodeTag) -> *mut T {
    // SAFETY: every node begins with its tag.
    unsafe {
        let node = pg_sys::palloc0(size_of::<T>()).cast::<T>();
        *node.cast::<pg_sys::NodeTag>() = tag;
        node
    }
}
