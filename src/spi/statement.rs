//! Statements whose plans are kept for the life of the backend, one each.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::HashMap;
use std::ffi::CStr;
use std::rc::Rc;

use pgrx::Spi;
use pgrx::datum::DatumWithOid;
use pgrx::pg_sys::{self, BuiltinOid, PgOid};
use pgrx::spi::{OwnedPreparedStatement, SpiClient, SpiTupleTable};

use super::catalog::{self, Catalog};
use super::installation;
use super::intent::{Intent, Meaning};
use crate::error::{ClaimError, Result};
use crate::error_context::KeepsContext;
use crate::identity::{ActingAs, Role};
use crate::local_settings::LocalSettings;
use crate::pg::backend;
use crate::service;
use crate::worker::wake;

/// A statement: its text, which depends on where the extension and its backlog are, and the types
/// of its parameters.
pub struct Statement {
    text: fn(&Catalog) -> String,
    parameters: &'static [BuiltinOid],
}

impl Statement {
    /// Declares a statement.
    pub const fn new(text: fn(&Catalog) -> String, parameters: &'static [BuiltinOid]) -> Self {
        Self { text, parameters }
    }
}

thread_local! {
    /// Kept plans by the address of their statement: one each, however often the tables change. A plan that is
    /// replaced while it runs, further up the stack, is freed when it has ended.
    static PLANS: RefCell<HashMap<usize, Rc<Kept>>> = RefCell::new(HashMap::new());
    /// The same for questions to the server's catalogues, by their text, which never changes.
    static QUESTIONS: RefCell<HashMap<&'static str, Rc<OwnedPreparedStatement>>> =
        RefCell::new(HashMap::new());
}

/// A kept plan.
struct Kept {
    plan: OwnedPreparedStatement,
    /// Its text, which is that of the statement until the catalogue says something else.
    text: String,
    /// Whether that has been looked at since the catalogue changed last.
    is_current: Cell<bool>,
    /// How often it has run since.
    runs: Cell<u32>,
}

/// The server plans the first few executions for themselves and then decides on one plan for all, which it
/// keeps until the statistics change. Until then a table may still be so small that reading all of it
/// seems as good as an index.
const DECIDING_RUNS: u32 = 8;

/// The catalogue has changed: a plan is prepared anew where its statement has another text by now. Where it has not,
/// the server itself sees to it that the plan fits the tables as they are.
pub(super) fn doubt_plans() {
    PLANS.with_borrow(|plans| plans.values().for_each(|kept| kept.is_current.set(false)));
}

/// A setting of the server's, and its value for a while.
type Setting = (&'static CStr, &'static CStr);

/// The planner uses indexes where it can.
const BY_INDEX: Setting = (c"enable_seqscan", c"off");
/// A plan is not compiled: that takes longer than a look by an index.
const UNCOMPILED: Setting = (c"jit", c"off");
/// PostgreSQL 18 crashes otherwise (18.4 still does). When it locks a row that has changed meanwhile it looks at the row
/// again. With that it frees the memory by which it prunes partitions, and goes on using it.
const UNPRUNED: Setting = (c"enable_partition_pruning", c"off");
/// The server plans once for all arguments.
const PLANNED_ONCE: Setting = (c"plan_cache_mode", c"force_generic_plan");

/// What a statement is run with that looks up rows one by one.
const LOOKED_UP: &[Setting] = if cfg!(feature = "pg18") {
    &[BY_INDEX, UNCOMPILED, UNPRUNED]
} else {
    &[BY_INDEX, UNCOMPILED]
};

/// A connection to the server's programming interface.
pub struct Db<'conn> {
    client: &'conn SpiClient<'conn>,
    rights: Rights,
}

/// Where the rights come from that statements need, and writes of tables on which others have code.
pub enum Rights {
    /// From whoever connects: a trigger that has taken them, or the worker.
    Given,
    /// From the owner of this function, from the first moment on at which they are needed.
    OfOwner { function: pg_sys::Oid, acting: OnceCell<ActingAs> },
}

impl Rights {
    /// Those of the owner of the function that runs, taken when they are needed.
    pub fn of_owner(function: pg_sys::Oid) -> Self {
        Self::OfOwner { function, acting: OnceCell::new() }
    }
}

impl Db<'_> {
    /// Connects for the length of `work`, with the rights of the owner of `function`, which is the one that runs: one
    /// connection serves a whole call. Whoever calls a function that does so uses the extension. Not on a standby.
    pub fn connect<R>(function: pg_sys::Oid, work: impl FnOnce(&Db<'_>) -> Result<R>) -> Result<R> {
        check_may_write()?;
        let _acting = ActingAs::extension_owner(function)?;
        Self::call(Rights::Given, work)
    }

    /// The same for a function that grants and revokes: it writes none of the extension's tables, and so is there to set
    /// right what keeps all others from doing so.
    pub fn administer<R>(
        function: pg_sys::Oid,
        work: impl FnOnce(&Db<'_>) -> Result<R>,
    ) -> Result<R> {
        check_may_write()?;
        Self::look(function, work)
    }

    /// The same for a function that only looks, on a standby as well: from that alone nobody's lease begins to
    /// count, and the worker does not begin its work.
    pub fn look<R>(function: pg_sys::Oid, work: impl FnOnce(&Db<'_>) -> Result<R>) -> Result<R> {
        wake::keep();
        let _acting = ActingAs::extension_owner(function)?;
        let _context = KeepsContext::new();
        Spi::connect(|client| work(&Db { client, rights: Rights::Given }))
    }

    /// As [`Db::connect`], for a function that may get by with reading and writing the extension's tables row by row, and
    /// so with no rights but the caller's: taking others, with a search_path, is a good part of what such a call costs, so
    /// the first statement does, or the first write of a table on which others have code. In such a function nothing else
    /// may depend on the current role, the search_path or another setting, and nobody acts as anybody but by
    /// [`Db::act_as`].
    pub fn connect_for<R>(
        function: pg_sys::Oid,
        work: impl FnOnce(&Db<'_>) -> Result<R>,
    ) -> Result<R> {
        check_may_write()?;
        Self::call(Rights::of_owner(function), work)
    }

    /// Connects with the rights that whoever does so has already: a trigger, the worker.
    ///
    /// What a trigger does is part of somebody's write, such as that of a dump that is being restored, and by itself no use
    /// of the extension.
    pub fn within<R>(work: impl FnOnce(&Db<'_>) -> Result<R>) -> Result<R> {
        Self::within_with(Rights::Given, work)
    }

    /// The same with the rights that a trigger may need, whose write is the extension's.
    pub fn within_with<R>(rights: Rights, work: impl FnOnce(&Db<'_>) -> Result<R>) -> Result<R> {
        check_may_write()?;
        let _context = KeepsContext::new();
        Spi::connect(|client| work(&Db { client, rights }))
    }

    /// A call of one of the functions.
    fn call<R>(rights: Rights, work: impl FnOnce(&Db<'_>) -> Result<R>) -> Result<R> {
        wake::keep();
        let _context = KeepsContext::new();
        Spi::connect(|client| {
            let db = Db { client, rights };
            installation::note_use(&db)?;
            db.refuse_foreign_code()?;
            work(&db)
        })
    }

    /// Sees to it that what follows has the rights of the extension's owner, as each statement has.
    pub(super) fn take_rights(&self) -> Result<()> {
        if let Rights::OfOwner { function, acting } = &self.rights
            && acting.get().is_none()
        {
            let owner = ActingAs::extension_owner(*function)?;
            acting.get_or_init(|| owner);
        }
        Ok(())
    }

    /// Acts as the owner of a bound backlog until that is dropped.
    pub fn act_as(&self, owner: Role, search_path: &CStr) -> Result<ActingAs> {
        // First, or the next statement would take them and run with more than that owner's.
        self.take_rights()?;
        Ok(ActingAs::table_owner(owner.0, search_path))
    }

    /// Error 42501 where an ordinary role's code is on one of the extension's tables: whoever writes there would run it
    /// with the rights of the extension's owner.
    pub fn refuse_foreign_code(&self) -> Result<()> {
        match &self.catalog()?.foreign_code {
            None => Ok(()),
            Some(code) => Err(ClaimError::ForeignCode { code: code.clone() }),
        }
    }

    /// Where the extension and its backlog are, as far as this backend knows by now.
    pub fn catalog(&self) -> Result<Rc<Catalog>> {
        catalog::current(self)
    }

    /// Runs a kept statement.
    pub fn run(
        &self,
        statement: &'static Statement,
        arguments: &[DatumWithOid<'_>],
    ) -> Result<SpiTupleTable<'_>> {
        self.take_rights()?;
        // The catalogue comes first: reading it anew may forget the plans.
        let catalog = self.catalog()?;
        let kept = self.plan_of(statement, &catalog)?;
        let is_deciding = kept.runs.get() < DECIDING_RUNS;
        let _by_index = is_deciding.then(|| LocalSettings::keeping_others(&[BY_INDEX]));
        if is_deciding {
            kept.runs.set(kept.runs.get() + 1);
        }
        let _meaning = Meaning::to(Intent::Own);
        // `select` on a mutating plan takes a fresh snapshot and assigns no transaction id.
        Ok(self.client.select(&kept.plan, None, arguments)?)
    }

    fn plan_of(&self, statement: &'static Statement, catalog: &Catalog) -> Result<Rc<Kept>> {
        let key = std::ptr::from_ref(statement).addr();
        // The borrow ends before any SQL runs: a trigger may come back here.
        let kept = PLANS.with_borrow(|plans| plans.get(&key).map(Rc::clone));
        if let Some(kept) = &kept
            && kept.is_current.get()
        {
            return Ok(Rc::clone(kept));
        }
        let text = (statement.text)(catalog);
        if let Some(kept) = kept
            && kept.text == text
        {
            kept.is_current.set(true);
            kept.runs.set(0);
            return Ok(kept);
        }
        let parameters: Vec<PgOid> =
            statement.parameters.iter().map(|oid| PgOid::BuiltIn(*oid)).collect();
        let plan = self.client.prepare_mut(text.as_str(), &parameters)?.keep();
        let kept = Rc::new(Kept { plan, text, is_current: Cell::new(true), runs: Cell::new(0) });
        let replaced = PLANS.with_borrow_mut(|plans| plans.insert(key, Rc::clone(&kept)));
        drop(replaced);
        Ok(kept)
    }

    /// Runs a kept statement that may look up many things one by one, and mostly looks up few.
    ///
    /// By an index each, whatever the plan. And not compiled: that would take longer than the look.
    pub fn run_by_index(
        &self,
        statement: &'static Statement,
        arguments: &[DatumWithOid<'_>],
    ) -> Result<SpiTupleTable<'_>> {
        // Before the settings, or these would be put back with the rights.
        self.take_rights()?;
        let _looked_up = LocalSettings::keeping_others(LOOKED_UP);
        self.run(statement, arguments)
    }

    /// Runs a kept statement that returns at most one row that matters.
    pub fn first_row(
        &self,
        statement: &'static Statement,
        arguments: &[DatumWithOid<'_>],
    ) -> Result<Option<SpiTupleTable<'_>>> {
        let rows = self.run(statement, arguments)?;
        Ok((!rows.is_empty()).then(|| rows.first()))
    }

    /// Asks the server's catalogues. Each vacuum of one of the extension's tables has every connection do so
    /// again, and planning takes several times as long as the answer.
    pub fn ask(
        &self,
        question: &'static str,
        arguments: &[DatumWithOid<'_>],
    ) -> Result<SpiTupleTable<'_>> {
        self.take_rights()?;
        let kept = QUESTIONS.with_borrow(|questions| questions.get(question).map(Rc::clone));
        let kept = match kept {
            Some(kept) => kept,
            None => {
                let types: Vec<PgOid> = arguments.iter().map(|a| PgOid::from(a.oid())).collect();
                let kept = Rc::new(self.client.prepare_mut(question, &types)?.keep());
                QUESTIONS.with_borrow_mut(|questions| questions.insert(question, Rc::clone(&kept)));
                kept
            }
        };
        let _planned_once = LocalSettings::keeping_others(&[BY_INDEX, UNCOMPILED, PLANNED_ONCE]);
        Ok(self.client.select(&*kept, None, arguments)?)
    }

    /// Runs a statement once, without keeping a plan: definitions.
    pub fn run_once(
        &self,
        text: &str,
        arguments: &[DatumWithOid<'_>],
    ) -> Result<SpiTupleTable<'_>> {
        self.take_rights()?;
        let types: Vec<PgOid> = arguments.iter().map(|a| PgOid::from(a.oid())).collect();
        let plan = self.client.prepare_mut(text, &types)?;
        Ok(self.client.select(&plan, None, arguments)?)
    }
}

/// An error on a standby and in a parallel query, neither of which may write. The server's own error would name some
/// statement of the extension's that the caller does not know.
fn check_may_write() -> Result<()> {
    if service::is_in_recovery() {
        return Err(ClaimError::Standby);
    }
    if backend::is_parallel() { Err(ClaimError::Parallel) } else { Ok(()) }
}

/// A column that must not be NULL.
pub fn required<T>(value: Option<T>, what: &'static str) -> Result<T> {
    value.ok_or(ClaimError::Corrupt { what })
}
