//! Waiting for others, and giving way to them.
//!
//! # The order of locks
//!
//! Every path takes its locks in this order, and holds them until its transaction ends:
//!
//! 1. the backlog's relation, then that of `sd_claims`
//! 2. the SDs' rows in the backlog, by their ids
//! 3. the pairs of SDs in conflict, by their numbers; the stop signs
//! 4. the acquisitions in `sd_claims`
//! 5. the sessions' rows
//! 6. events; the frontier of their order last
//!
//! A guard (`assert_claim`) locks its acquisition only. Its transaction may then do what it likes, such as
//! release the claim, which begins with the SD. So whoever is to end an acquisition first waits for its guards,
//! and for whoever writes its session, with nothing of these locked; then it takes the locks in order. By that
//! time somebody may have come who is in the way, but that takes microseconds.
//!
//! Who writes a row by hand has locked it before anything of the extension's runs: an SD that is finished or
//! deleted, a session that is written by UPDATE or DELETE. Such a transaction cannot keep to the order. Nor can
//! one that calls several functions, as each of them begins anew.
//!
//! So whoever waits here while it may hold what somebody else needs gives way: should that other one come to
//! wait for it, directly or by a detour, it ends its own transaction with error 40001, long before the server's
//! `deadlock_timeout` would make one of them a victim. A transaction that guards a claim gives way to nobody but
//! other guards. So it can always finish.

use std::any::Any;
use std::cell::Cell;
use std::ffi::c_int;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicI32, Ordering};

use pgrx::pg_sys::panic::CaughtError;
use pgrx::{PgSqlErrorCode, pg_sys};

use super::guard;
use crate::error::{ClaimError, Result};

unsafe extern "C-unwind" {
    // Of utils/timeout.h, which pgrx does not bind.
    fn RegisterTimeout(id: c_int, handler: unsafe extern "C-unwind" fn()) -> c_int;
    fn enable_timeout_after(id: c_int, delay_ms: c_int);
    fn disable_timeout(id: c_int, keep_indicator: bool);
}

/// Has the server choose a number for a timer that is new.
const ANY_TIMER: c_int = c_int::MAX;

/// The number of this process's timer, once it has one, and its milliseconds. A signal's handler reads them.
static TIMER: AtomicI32 = AtomicI32::new(0);
static PERIOD: AtomicI32 = AtomicI32::new(0);

thread_local! {
    static IS_GIVING_WAY: Cell<bool> = const { Cell::new(false) };
}

/// Has the server look for a deadlock now, and then again.
unsafe extern "C-unwind" fn look_again() {
    // SAFETY: runs in the handler of the timer's signal, where the server allows both.
    unsafe {
        pg_sys::CheckDeadLockAlert();
        enable_timeout_after(TIMER.load(Ordering::Relaxed), PERIOD.load(Ordering::Relaxed));
    }
}

/// This process looks for a deadlock again and again while it waits for a lock, until this is dropped, on an
/// error as well.
struct Watch {
    logs_waits: bool,
}

impl Watch {
    fn new() -> Self {
        IS_GIVING_WAY.set(true);
        // SAFETY: the process's own timers and variables. The server writes a line to its log each time it has
        // looked, where that is asked for.
        unsafe {
            if TIMER.load(Ordering::Relaxed) == 0 {
                TIMER.store(RegisterTimeout(ANY_TIMER, look_again), Ordering::Relaxed);
            }
            // Whoever comes to wait for this one looks for the first time after so long.
            PERIOD.store((pg_sys::DeadlockTimeout / 4).clamp(1, 50), Ordering::Relaxed);
            let logs_waits = std::ptr::replace(&raw mut pg_sys::log_lock_waits, false);
            enable_timeout_after(TIMER.load(Ordering::Relaxed), PERIOD.load(Ordering::Relaxed));
            Self { logs_waits }
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        IS_GIVING_WAY.set(false);
        // SAFETY: as above.
        unsafe {
            disable_timeout(TIMER.load(Ordering::Relaxed), false);
            pg_sys::log_lock_waits = self.logs_waits;
        }
    }
}

/// Does `work`, which waits for a lock. Should whoever is waited for come to wait for this transaction, it ends
/// with error 40001.
pub fn giving_way<R>(work: impl FnOnce() -> Result<R>) -> Result<R> {
    if IS_GIVING_WAY.get() {
        return work();
    }
    let watch = Watch::new();
    let outcome = catch_unwind(AssertUnwindSafe(work));
    drop(watch);
    match outcome {
        Ok(result) => result,
        Err(error) if is_deadlock(&*error) => Err(ClaimError::GaveWay),
        Err(error) => resume_unwind(error),
    }
}

/// The same, but a transaction that guards a claim does not give way.
pub fn giving_way_unless_guarding<R>(work: impl FnOnce() -> Result<R>) -> Result<R> {
    if guard::is_guarding() { work() } else { giving_way(work) }
}

fn is_deadlock(error: &(dyn Any + Send)) -> bool {
    matches!(
        error.downcast_ref(),
        Some(CaughtError::PostgresError(report))
            if report.sql_error_code() == PgSqlErrorCode::ERRCODE_T_R_DEADLOCK_DETECTED
    )
}
