//! Waking the worker when a transaction has been committed that recorded events.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use pgrx::pg_sys;

use super::control::{self, Attached, Found};
use super::launcher_worker;
use crate::pg::backend;
use crate::pg::transaction::{self, End};
use crate::{guc, service};

/// How long a session waits before it looks for a launcher again that is being started …
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(20);

/// … or that could not be.
const TRY_AGAIN_AFTER: Duration = Duration::from_secs(1);

thread_local! {
    /// Whether the transaction has done something that the worker is to know of.
    static WANTED: Cell<bool> = const { Cell::new(false) };
    /// Whether this process is a worker itself.
    static IS_WORKER: Cell<bool> = const { Cell::new(false) };
    /// When this process last looked for the launcher, and what came of it.
    static LOOKED: Cell<Option<(Instant, Result<(), NoWorker>)>> = const { Cell::new(None) };
    /// Whether something was committed while the launcher was not there yet.
    static UNTOLD: Cell<bool> = const { Cell::new(false) };
    static WAKES_AT_EXIT: Cell<bool> = const { Cell::new(false) };
}

/// Asks the server to tell how transactions end.
pub(super) fn init() {
    transaction::at_end(transaction_ends);
}

/// This process does the work itself and need not wake anybody.
pub(super) fn is_worker() {
    IS_WORKER.set(true);
}

/// Whether this process is a worker.
pub fn is_this_worker() -> bool {
    IS_WORKER.get()
}

/// Wakes the worker when the transaction has been committed.
pub fn at_commit() {
    WANTED.set(true);
}

/// Wakes the worker when this process ends.
pub fn at_exit() {
    if !WAKES_AT_EXIT.replace(true) {
        // SAFETY: the callback lives as long as the library, and what it touches is detached later.
        unsafe { pg_sys::before_shmem_exit(Some(process_ends), pg_sys::Datum::from(0)) };
    }
}

fn transaction_ends(end: End) {
    if !WANTED.get() || IS_WORKER.get() {
        return;
    }
    match end {
        // The last moment at which something may fail.
        End::PreCommit => keep(),
        // Also after an abort: the worker may have passed by what the transaction held. And once it
        // is prepared: nobody wakes the worker when it is committed, so that it must come by itself
        // until then.
        End::Commit | End::Abort | End::Prepare => {
            WANTED.set(false);
            wake();
        }
    }
}

extern "C-unwind" fn process_ends(_code: i32, _: pg_sys::Datum) {
    wake();
}

/// Neither allocates nor fails.
fn wake() {
    match control::attached() {
        Some(control) => control.wake(backend::database()),
        None => UNTOLD.set(true),
    }
}

/// Why there is no worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoWorker {
    /// `pg_claims.worker` is off.
    SwitchedOff,
    /// The server is a standby.
    InRecovery,
    /// No slot is free among `max_worker_processes`.
    NoSlot,
}

impl NoWorker {
    /// For people.
    pub fn reason(self) -> &'static str {
        match self {
            Self::SwitchedOff => "pg_claims.worker is off",
            Self::InRecovery => "the server is a standby",
            Self::NoSlot => "no background worker slot is free",
        }
    }
}

/// Finds the launcher, or starts it: each call of a function does, so that the first one after a
/// restart brings the worker back. All but free where it is found already.
pub fn keep() {
    if control::attached().is_none() && !IS_WORKER.get() {
        // Whoever needs to know asks.
        ensure().unwrap_or_default();
    }
}

/// Whether a worker serves this database, or will: there may be more databases than the launcher keeps in mind.
pub fn is_served() -> bool {
    let may_serve = |control: Rc<Attached>| control.may_serve(backend::database());
    ensure().is_ok() && control::attached().is_none_or(may_serve)
}

/// Finds the launcher, or starts it, or says why there is none.
pub fn ensure() -> Result<(), NoWorker> {
    if !guc::worker() {
        return Err(NoWorker::SwitchedOff);
    }
    if service::is_in_recovery() {
        return Err(NoWorker::InRecovery);
    }
    if let Some(control) = control::attached() {
        return if control.is_starved() { Err(NoWorker::NoSlot) } else { Ok(()) };
    }
    // A launcher that is being started is not there at once, and a server without a free slot
    // should not be asked at every call.
    if let Some((at, outcome)) = LOOKED.get()
        && at.elapsed() < if outcome.is_ok() { LOOK_AGAIN_AFTER } else { TRY_AGAIN_AFTER }
    {
        return outcome;
    }
    let outcome = match control::find() {
        Found::Ready(handle) => match control::attach(handle) {
            Some(control) if control.is_starved() => Err(NoWorker::NoSlot),
            _ => Ok(()),
        },
        Found::Starting => Ok(()),
        Found::Nothing => {
            launcher_worker().load_dynamic().map(|_| ()).map_err(|_| NoWorker::NoSlot)
        }
    };
    LOOKED.set(Some((Instant::now(), outcome)));
    if control::attached().is_some() && UNTOLD.replace(false) {
        wake();
    }
    outcome
}
