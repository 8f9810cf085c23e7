//! The background workers.
//!
//! One **launcher** for the server, connected to no database, so that it blocks no `DROP DATABASE`.
//! It starts a **database worker** where there is something to do: at intervals in a database with
//! open claims, at once when a transaction there has recorded events. A database worker does its
//! work, waits a moment for more, and ends.
//!
//! With `shared_preload_libraries` the server starts the launcher; without, the first transaction
//! that needs it does. Launcher, workers and sessions speak through a small piece of shared memory
//! (see `control`), which needs no preloading either.

mod child;
mod connections;
mod control;
mod database;
mod launcher;
mod process;
mod round;
mod settle;
mod step;
pub mod wake;

use std::ffi::CStr;
use std::time::Duration;

use pgrx::bgworkers::{BackgroundWorkerBuilder, BgWorkerStartTime};
use pgrx::pg_sys;

/// What `pg_stat_activity` shows as the launcher's `backend_type`.
const LAUNCHER_TYPE: &CStr = c"pg_claims launcher";

/// How soon the server restarts a launcher that was terminated or has failed.
const RESTART_AFTER: Duration = Duration::from_secs(1);

/// Prepares the process; when the library is preloaded, has the server start the launcher.
pub fn init() {
    wake::init();
    // SAFETY: a flag that the server sets while it loads libraries.
    if unsafe { pg_sys::process_shared_preload_libraries_in_progress } {
        launcher_worker().load();
    }
}

fn launcher_worker() -> BackgroundWorkerBuilder {
    BackgroundWorkerBuilder::new("pg_claims launcher")
        .set_type("pg_claims launcher")
        .set_library("pg_claims")
        .set_function("pg_claims_launcher_main")
        .enable_spi_access()
        // Not on a standby; after a promotion at once.
        .set_start_time(BgWorkerStartTime::RecoveryFinished)
        .set_restart_time(Some(RESTART_AFTER))
}
