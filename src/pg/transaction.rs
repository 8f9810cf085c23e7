//! Hearing how transactions and savepoints end.

use std::ffi::c_void;

use pgrx::pg_sys;

/// How a transaction ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It is about to be committed: the last moment at which something may fail.
    PreCommit,
    Commit,
    Abort,
    Prepare,
}

/// A savepoint that ends.
#[derive(Debug, Clone, Copy)]
pub struct SavepointEnd {
    pub is_rolled_back: bool,
    pub savepoint: pg_sys::SubTransactionId,
    /// What is around it.
    pub parent: pg_sys::SubTransactionId,
}

/// Has `hook` be called when a transaction ends. It may fail before the commit only: what has ended cannot be rolled back
/// any more.
pub fn at_end(hook: fn(End)) {
    // SAFETY: the hook lives as long as the library, which is never unloaded.
    unsafe { pg_sys::RegisterXactCallback(Some(transaction_ends), hook as *mut c_void) };
}

/// Has `hook` be called when a savepoint ends. It must not fail.
pub fn at_savepoint_end(hook: fn(SavepointEnd)) {
    // SAFETY: as above.
    unsafe { pg_sys::RegisterSubXactCallback(Some(savepoint_ends), hook as *mut c_void) };
}

#[pgrx::pg_guard]
unsafe extern "C-unwind" fn transaction_ends(event: pg_sys::XactEvent::Type, hook: *mut c_void) {
    let end = match event {
        pg_sys::XactEvent::XACT_EVENT_PRE_COMMIT => End::PreCommit,
        pg_sys::XactEvent::XACT_EVENT_COMMIT => End::Commit,
        pg_sys::XactEvent::XACT_EVENT_ABORT => End::Abort,
        pg_sys::XactEvent::XACT_EVENT_PREPARE => End::Prepare,
        _ => return,
    };
    // SAFETY: `at_end` has given the server such a function.
    let hook = unsafe { std::mem::transmute::<*mut c_void, fn(End)>(hook) };
    hook(end);
}

#[pgrx::pg_guard]
unsafe extern "C-unwind" fn savepoint_ends(
    event: pg_sys::SubXactEvent::Type,
    savepoint: pg_sys::SubTransactionId,
    parent: pg_sys::SubTransactionId,
    hook: *mut c_void,
) {
    let is_rolled_back = match event {
        pg_sys::SubXactEvent::SUBXACT_EVENT_COMMIT_SUB => false,
        pg_sys::SubXactEvent::SUBXACT_EVENT_ABORT_SUB => true,
        _ => return,
    };
    // SAFETY: `at_savepoint_end` has given the server such a function.
    let hook = unsafe { std::mem::transmute::<*mut c_void, fn(SavepointEnd)>(hook) };
    hook(SavepointEnd { is_rolled_back, savepoint, parent });
}
