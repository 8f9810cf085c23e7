//! Since when the server accepts writes, and which of its processes are there.

use std::cell::Cell;
use std::ffi::CStr;

use chrono::{DateTime, Utc};
use pgrx::pg_sys;

use crate::pg::time;

thread_local! {
    static SINCE: Cell<Option<DateTime<Utc>>> = const { Cell::new(None) };
}

/// Since when the server accepts writes: its start, the end of its recovery after a crash, or its
/// promotion. `None` on a standby, which does not.
///
/// The present moment while it is only beginning (or this is a single-user server).
pub fn since() -> Option<DateTime<Utc>> {
    if is_in_recovery() { None } else { Some(run().unwrap_or_else(time::now)) }
}

/// What tells this run of the server from any other: since when it accepts writes. `None` where it does not,
/// or is only beginning to.
///
/// The WAL writer is started at exactly that moment, and never again while the server runs: if it
/// is lost, so is every other process. A process that has seen it need not look again.
pub fn run() -> Option<DateTime<Utc>> {
    if let Some(since) = SINCE.get() {
        return Some(since);
    }
    if is_in_recovery() {
        return None;
    }
    let mut since = None;
    each_process(|process| {
        if process.st_backendType == pg_sys::BackendType::B_WAL_WRITER {
            since = Some(time::from_microseconds(process.st_proc_start_timestamp));
        }
    });
    SINCE.set(since);
    since
}

/// Whether the server is in recovery: it accepts no writes.
pub fn is_in_recovery() -> bool {
    // SAFETY: reads the server's shared state; no preconditions.
    unsafe { pg_sys::RecoveryInProgress() }
}

/// Calls `look` for every process of the server, whatever the caller's privileges.
pub fn each_process(mut look: impl FnMut(&pg_sys::PgBackendStatus)) {
    // SAFETY: the server takes a local copy of its list of processes, which lives until the end of
    // the transaction, or of the next one if none is open; positions count from 1, and one beyond the end
    // gives null. The copy is thrown away first, or a long transaction would never see a new process; and
    // afterwards, or who reads `pg_stat_activity` next would take a process that is new for one that is gone.
    unsafe {
        pg_sys::pgstat_clear_backend_activity_snapshot();
        for position in 1..=pg_sys::pgstat_fetch_stat_numbackends() {
            #[cfg(any(feature = "pg14", feature = "pg15"))]
            let entry = pg_sys::pgstat_fetch_stat_local_beentry(position);
            #[cfg(not(any(feature = "pg14", feature = "pg15")))]
            let entry = pg_sys::pgstat_get_local_beentry_by_index(position);
            if let Some(entry) = entry.as_ref() {
                look(&entry.backendStatus);
            }
        }
        pg_sys::pgstat_clear_backend_activity_snapshot();
    }
}

/// The name that a process gives itself (`application_name`).
pub fn name_of(process: &pg_sys::PgBackendStatus) -> Option<&str> {
    if process.st_appname.is_null() {
        return None;
    }
    // SAFETY: the server keeps a null-terminated string there, which lives as long as the entry.
    unsafe { CStr::from_ptr(process.st_appname) }.to_str().ok()
}
