//! One step of a worker's work: a transaction that may fail and must not take long.

use std::ffi::CStr;
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use pgrx::pg_sys;
use pgrx::pg_sys::PgTryBuilder;

use super::process;
use crate::attempt::message_of;
use crate::error::{ClaimError, Result};
use crate::error_context;
use crate::spi::{Db, health, installation};

/// How long a transaction may take: what a trigger of the user's does in it must not keep the
/// heartbeats of others.
pub const STEP_LIMIT: Duration = Duration::from_secs(5);

/// Runs `work` in a transaction, if the worker serves this database; counts its failure.
pub fn step<R>(
    run: &mut health::Run,
    what: &CStr,
    work: impl FnOnce(&Db<'_>) -> Result<R>,
) -> Option<R> {
    match try_step(STEP_LIMIT, what, work) {
        Ok(done) => Some(done),
        Err(error) => {
            note(run, error);
            None
        }
    }
}

/// Counts a failure, and tells the log.
pub fn note(run: &mut health::Run, error: String) {
    pgrx::log!("pg_claims worker: {error}");
    run.errors += 1;
    run.last_error = Some(error);
}

/// Runs `work` in a transaction, which is rolled back if it fails or takes longer than `limit`. Fails where
/// the worker does not serve this database: the extension may be dropped and a dump restored between two steps.
pub fn try_step<R>(
    limit: Duration,
    what: &CStr,
    work: impl FnOnce(&Db<'_>) -> Result<R>,
) -> std::result::Result<R, String> {
    try_look(limit, what, |db| {
        let served = installation::serve().ok_or(ClaimError::NotInUse)?;
        if !served.keep() {
            process::give_way();
        }
        db.refuse_foreign_code()?;
        let done = work(db)?;
        if served.still() { Ok(done) } else { Err(ClaimError::NotInUse) }
    })
}

/// The same whether or not the worker serves this database; `work` must not write.
pub fn try_look<R>(
    limit: Duration,
    what: &CStr,
    work: impl FnOnce(&Db<'_>) -> Result<R>,
) -> std::result::Result<R, String> {
    process::working_on(what);
    pgrx::check_for_interrupts!();
    let stack = error_context::Stack::now();
    // Neither the closure nor what it borrows is used again after a failure.
    let attempt = AssertUnwindSafe(|| {
        // SAFETY: no transaction is open in a worker between two steps.
        unsafe {
            pg_sys::SetCurrentStatementStartTimestamp();
            pg_sys::StartTransactionCommand();
            pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot());
        }
        let deadline = process::Deadline::after(limit);
        let done = Db::within(work).map_err(|error| error.to_string())?;
        // SAFETY: the snapshot and the transaction are those from above.
        unsafe {
            pg_sys::PopActiveSnapshot();
            pg_sys::CommitTransactionCommand();
        }
        // Only now: what is deferred runs at the commit.
        drop(deadline);
        Ok(done)
    });
    let outcome = PgTryBuilder::new(attempt)
        .catch_others(|error| Err(message_of(&error)))
        .catch_rust_panic(|error| Err(message_of(&error)))
        .execute();
    if outcome.is_err() {
        stack.restore();
        // SAFETY: ends the transaction whichever way it failed, as the server does for a session.
        unsafe { pg_sys::AbortCurrentTransaction() };
    }
    outcome
}
