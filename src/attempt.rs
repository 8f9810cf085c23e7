//! What may fail without failing the transaction: parts of its work, and looking for shared memory.

use std::panic::AssertUnwindSafe;

use pgrx::pg_sys::panic::{CaughtError, ErrorReport};
use pgrx::pg_sys::{self, PgTryBuilder};
use pgrx::{PgLogLevel, PgSqlErrorCode};

use crate::error::Result;
use crate::error_context;

/// Does `work` for all items at once or, where that fails, for the halves of them, so that an item that fails
/// is told to `failed`, with the error's message, and keeps no other from being done. What fails is rolled back: what `work` tells
/// anybody but the database it must tell through what it returns.
pub fn each_or_halves<T, R>(
    items: &[T],
    work: &impl Fn(&[T]) -> Result<R>,
    done: &mut impl FnMut(R),
    failed: &mut impl FnMut(&T, String),
) {
    if items.is_empty() {
        return;
    }
    match attempt(|| work(items)) {
        Ok(result) => done(result),
        Err(message) => match items {
            [item] => failed(item, message),
            _ => {
                let (first, second) = items.split_at(items.len() / 2);
                each_or_halves(first, work, done, failed);
                each_or_halves(second, work, done, failed);
            }
        },
    }
}

/// Does `work` in a subtransaction, which is rolled back if it fails; then the answer is the error's message.
/// Failures that are not about the work itself go on as errors.
fn attempt<R>(work: impl FnOnce() -> Result<R>) -> Result<R, String> {
    in_subtransaction(work)
        .map_err(|error| if ends_all(&error) { error.rethrow() } else { message_of(&error) })
}

/// The error's message.
pub fn message_of(error: &CaughtError) -> String {
    match error {
        CaughtError::PostgresError(report)
        | CaughtError::ErrorReport(report)
        | CaughtError::RustPanic { ereport: report, .. } => report.message().to_owned(),
    }
}

/// Does `work`, which finds or makes shared memory and touches nothing else. Also outside of a transaction, and in
/// parallel mode, where the server allows no subtransaction. Must not be called with a lock of the server's on
/// shared memory held.
pub fn on_shared_memory<R>(work: impl FnOnce() -> R) -> Result<R, CaughtError> {
    use pg_sys::ResourceReleasePhase::{
        RESOURCE_RELEASE_AFTER_LOCKS, RESOURCE_RELEASE_BEFORE_LOCKS, RESOURCE_RELEASE_LOCKS,
    };
    // SAFETY: what has begun when an error comes is undone as the abort of a transaction does: locks on shared
    // memory and what is mapped; the latter belongs to an owner of its own, until it is there to stay.
    unsafe {
        let (context, owner) = (pg_sys::CurrentMemoryContext, pg_sys::CurrentResourceOwner);
        let own = pg_sys::ResourceOwnerCreate(owner, c"pg_claims".as_ptr());
        pg_sys::CurrentResourceOwner = own;
        let outcome = caught(|| Ok(work()));
        if outcome.is_err() {
            pg_sys::LWLockReleaseAll();
        }
        pg_sys::MemoryContextSwitchTo(context);
        for phase in
            [RESOURCE_RELEASE_BEFORE_LOCKS, RESOURCE_RELEASE_LOCKS, RESOURCE_RELEASE_AFTER_LOCKS]
        {
            pg_sys::ResourceOwnerRelease(own, phase, false, owner.is_null());
        }
        pg_sys::CurrentResourceOwner = owner;
        pg_sys::ResourceOwnerDelete(own);
        outcome
    }
}

fn in_subtransaction<R>(work: impl FnOnce() -> Result<R>) -> Result<R, CaughtError> {
    // SAFETY: what the server's own languages do around a block that handles errors: the memory context and
    // the resource owner are those from before, whichever way it ends.
    let (context, owner) = unsafe {
        let before = (pg_sys::CurrentMemoryContext, pg_sys::CurrentResourceOwner);
        pg_sys::BeginInternalSubTransaction(std::ptr::null());
        pg_sys::MemoryContextSwitchTo(before.0);
        before
    };
    let outcome = caught(|| {
        let result = work()?;
        // SAFETY: the subtransaction is the one from above; may raise an error.
        unsafe { pg_sys::ReleaseCurrentSubTransaction() };
        Ok(result)
    });
    // SAFETY: as above.
    unsafe {
        if outcome.is_err() {
            pg_sys::MemoryContextSwitchTo(context);
            pg_sys::RollbackAndReleaseCurrentSubTransaction();
        }
        pg_sys::MemoryContextSwitchTo(context);
        pg_sys::CurrentResourceOwner = owner;
    }
    outcome
}

/// Does `work` and catches what it raises. Nothing is undone: `work` must leave nothing behind but memory.
pub fn caught<R>(work: impl FnOnce() -> Result<R>) -> Result<R, CaughtError> {
    let stack = error_context::Stack::now();
    // Neither the closure nor what it borrows is used again after a failure.
    PgTryBuilder::new(AssertUnwindSafe(|| Ok(work().unwrap_or_else(|error| raise(error.into())))))
        .catch_others(Err)
        .catch_rust_panic(Err)
        .execute()
        .inspect_err(|_| stack.restore())
}

/// Whether an error is not about the one thing that was being done: the call is to end, the server lacks something,
/// the whole transaction can do nothing or must be tried again, a lock that all need was not to be had, or this is
/// a bug.
pub fn ends_all(error: &CaughtError) -> bool {
    let (CaughtError::PostgresError(report) | CaughtError::ErrorReport(report)) = error else {
        return true;
    };
    ends_all_with(report.sql_error_code())
}

/// The same of an error with this code.
pub fn ends_all_with(code: PgSqlErrorCode) -> bool {
    use PgSqlErrorCode::{
        ERRCODE_INSUFFICIENT_RESOURCES, ERRCODE_INVALID_TRANSACTION_STATE,
        ERRCODE_LOCK_NOT_AVAILABLE, ERRCODE_OPERATOR_INTERVENTION, ERRCODE_TRANSACTION_ROLLBACK,
    };
    // The first two of five characters of six bits each.
    let class = |code: PgSqlErrorCode| code as i32 & 0xfff;
    let classes = [
        ERRCODE_INVALID_TRANSACTION_STATE,
        ERRCODE_TRANSACTION_ROLLBACK,
        ERRCODE_INSUFFICIENT_RESOURCES,
        ERRCODE_OPERATOR_INTERVENTION,
    ];
    code == ERRCODE_LOCK_NOT_AVAILABLE || classes.iter().any(|known| class(*known) == class(code))
}

fn raise(report: ErrorReport) -> ! {
    report.report(PgLogLevel::ERROR);
    unreachable!("an error is raised")
}
