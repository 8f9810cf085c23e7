//! What launcher and database workers share: being a process of the server's.

use std::ffi::{CStr, c_int};
use std::time::Duration;

use pgrx::pg_sys;

use super::wake;

unsafe extern "C-unwind" {
    // The server's own: ends the process at the next safe point, also in the middle of a statement.
    fn die(signal: c_int);
    // The server's own: notes that the settings are to be read anew.
    fn SignalHandlerForConfigReload(signal: c_int);
    // The server's own (utils/timeout.h): the time-out of a process's statement.
    fn enable_timeout_after(timeout: c_int, milliseconds: c_int);
    fn disable_timeout(timeout: c_int, keep_indicator: bool);
}

/// `STATEMENT_TIMEOUT` among the server's time-outs (utils/timeout.h), in all supported versions.
const STATEMENT_TIMEOUT: c_int = 3;

/// Takes the signals as the server's own processes do, and begins.
pub fn begin() {
    wake::is_worker();
    // SAFETY: called once, first thing in the process; the handlers are the server's own.
    unsafe {
        set_handler(libc::SIGTERM, die);
        set_handler(libc::SIGHUP, SignalHandlerForConfigReload);
        pg_sys::BackgroundWorkerUnblockSignals();
    }
}

unsafe fn set_handler(signal: c_int, handler: unsafe extern "C-unwind" fn(c_int)) {
    // SAFETY: the caller gives a handler that may run at any time.
    unsafe {
        #[cfg(feature = "pg18")]
        pg_sys::pqsignal_be(signal, Some(handler));
        #[cfg(not(feature = "pg18"))]
        pg_sys::pqsignal(signal, Some(handler));
    }
}

/// Waits until somebody wakes the process or the time has passed. Ends the process if it was asked
/// to end, and reads the settings anew if it was asked to. Returns whether it did the latter.
pub fn wait(time: Duration) -> bool {
    wait_for(time, pg_sys::WL_LATCH_SET)
}

/// The same, but waits for the whole time: whoever wakes the process meanwhile need not even
/// interrupt it.
pub fn pause(time: Duration) {
    wait_for(time, 0);
}

fn wait_for(time: Duration, further_events: u32) -> bool {
    let milliseconds = i64::try_from(time.as_millis()).unwrap_or(i64::MAX);
    let events = further_events | pg_sys::WL_TIMEOUT | pg_sys::WL_EXIT_ON_PM_DEATH;
    // SAFETY: the process's own latch.
    unsafe {
        pg_sys::WaitLatch(
            pg_sys::MyLatch,
            events as c_int,
            milliseconds,
            pg_sys::PG_WAIT_EXTENSION,
        );
        pg_sys::ResetLatch(pg_sys::MyLatch);
    }
    pgrx::check_for_interrupts!();
    reload_settings()
}

fn reload_settings() -> bool {
    // SAFETY: the flag is set by the signal handler; reading the settings is allowed between
    // transactions.
    unsafe {
        if (&raw const pg_sys::ConfigReloadPending).read_volatile() == 0 {
            return false;
        }
        (&raw mut pg_sys::ConfigReloadPending).write_volatile(0);
        pg_sys::ProcessConfigFile(pg_sys::GucContext::PGC_SIGHUP);
    }
    true
}

/// What `pg_stat_activity` shows the process doing.
pub fn working_on(what: &CStr) {
    // SAFETY: copies a null-terminated string.
    unsafe {
        pg_sys::pgstat_report_activity(pg_sys::BackendState::STATE_RUNNING, what.as_ptr());
    }
}

/// Shows the process waiting, and lets the server count what it has written: autovacuum goes by that.
pub fn idle() {
    // SAFETY: no transaction is open; a null pointer stands for no text.
    unsafe {
        pg_sys::pgstat_report_stat(false);
        pg_sys::pgstat_report_activity(pg_sys::BackendState::STATE_IDLE, std::ptr::null());
    }
}

/// Makes this transaction's commit wait until it is durable.
pub fn commit_durably() {
    set_locally(c"synchronous_commit", c"local");
}

/// Has this transaction give up soon where it would have to wait: sooner than who waits for it looks for a circle.
pub fn give_way() {
    set_locally(c"lock_timeout", c"100ms");
}

fn set_locally(name: &CStr, value: &CStr) {
    // SAFETY: null-terminated strings; local to the transaction.
    unsafe {
        pg_sys::set_config_option(
            name.as_ptr(),
            value.as_ptr(),
            pg_sys::GucContext::PGC_SUSET,
            pg_sys::GucSource::PGC_S_OVERRIDE,
            pg_sys::GucAction::GUC_ACTION_LOCAL,
            true,
            0,
            false,
        );
    }
}

/// Ends the statement that runs once the time is over, as `statement_timeout` does for a session.
pub struct Deadline;

impl Deadline {
    /// From now on.
    pub fn after(time: Duration) -> Self {
        let milliseconds = i32::try_from(time.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: the server registers this time-out in every process that has a database.
        unsafe {
            enable_timeout_after(STATEMENT_TIMEOUT, milliseconds);
        }
        Self
    }
}

impl Drop for Deadline {
    fn drop(&mut self) {
        // SAFETY: as above. A cancel that came too late must not hit the next statement.
        unsafe {
            disable_timeout(STATEMENT_TIMEOUT, false);
            (&raw mut pg_sys::QueryCancelPending).write_volatile(0);
        }
    }
}
