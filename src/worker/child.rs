//! A database worker as the launcher sees it: a process that it has started.

use std::time::{Duration, Instant};

use pgrx::bgworkers::{BackgroundWorkerBuilder, BgWorkerStartTime};
use pgrx::pg_sys;

use super::control::Slot;
use crate::pg::backend;

/// A database worker that was started.
pub struct Child {
    handle: *mut pg_sys::BackgroundWorkerHandle,
    /// How often it had got on when that was last seen to change, and when that was.
    turns: u32,
    since: Instant,
}

impl Child {
    /// Starts a worker for a database. `None` where no slot of `max_worker_processes` is free. Its
    /// start and its end wake the caller.
    pub fn start(slot: &Slot, database: pg_sys::Oid) -> Option<Self> {
        slot.set_worker_latch(std::ptr::null_mut());
        slot.set_running(true);
        let builder = BackgroundWorkerBuilder::new("pg_claims worker")
            .set_type("pg_claims worker")
            .set_library("pg_claims")
            .set_function("pg_claims_worker_main")
            .enable_spi_access()
            .set_start_time(BgWorkerStartTime::RecoveryFinished)
            .set_restart_time(None)
            .set_argument(Some(pg_sys::Datum::from(database.to_u32())))
            .set_notify_pid(backend::pid());
        let mut worker = pg_sys::BackgroundWorker::from(&builder);
        let mut handle = std::ptr::null_mut();
        // SAFETY: both are valid; the server copies the description, and sets the handle, which it
        // allocates in the launcher's own memory, where it succeeds.
        if unsafe { pg_sys::RegisterDynamicBackgroundWorker(&mut worker, &mut handle) } {
            return Some(Self { handle, turns: slot.turns(), since: Instant::now() });
        }
        slot.set_running(false);
        None
    }

    /// Whether it has ended, or will never start.
    pub fn has_ended(&self) -> bool {
        let mut pid = 0;
        // SAFETY: the handle is the server's, from `start`.
        let status = unsafe { pg_sys::GetBackgroundWorkerPid(self.handle, &mut pid) };
        !matches!(
            status,
            pg_sys::BgwHandleStatus::BGWH_STARTED | pg_sys::BgwHandleStatus::BGWH_NOT_YET_STARTED
        )
    }

    /// Terminates it if it has not got on for `limit`.
    pub fn terminate_if_stuck(&mut self, slot: &Slot, limit: Duration) {
        let turns = slot.turns();
        if turns != self.turns {
            (self.turns, self.since) = (turns, Instant::now());
        }
        if self.since.elapsed() < limit {
            return;
        }
        self.since = Instant::now();
        pgrx::log!("pg_claims: terminating a worker that has not got on for {limit:?}");
        // SAFETY: the handle is the server's, from `start`; without effect on a worker that has ended.
        unsafe { pg_sys::TerminateBackgroundWorker(self.handle) };
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: allocated by the server in `start`, and used nowhere else.
        unsafe { pg_sys::pfree(self.handle.cast()) };
    }
}
