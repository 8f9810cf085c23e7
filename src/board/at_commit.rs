//! What the board is to be told once a transaction has been committed.

use std::cell::RefCell;
use std::ffi::c_void;

use pgrx::pg_sys;

thread_local! {
    static WANTED: RefCell<Vec<Box<dyn FnOnce()>>> = const { RefCell::new(Vec::new()) };
}

/// Asks the server to tell how transactions end.
pub fn init() {
    // SAFETY: runs once per process; the callback lives as long as the library.
    unsafe { pg_sys::RegisterXactCallback(Some(transaction_ends), std::ptr::null_mut()) };
}

/// Does `work`, which must not fail, once the transaction has been committed. Not at all within a savepoint,
/// which may yet be rolled back by itself, and in a transaction that is prepared.
pub fn at_commit(work: impl FnOnce() + 'static) {
    // SAFETY: reads a variable of this process's.
    if unsafe { pg_sys::GetCurrentTransactionNestLevel() } == 1 {
        WANTED.with_borrow_mut(|wanted| wanted.push(Box::new(work)));
    }
}

#[pgrx::pg_guard]
unsafe extern "C-unwind" fn transaction_ends(
    event: pg_sys::XactEvent::Type,
    _argument: *mut c_void,
) {
    use pg_sys::XactEvent::{XACT_EVENT_ABORT, XACT_EVENT_COMMIT, XACT_EVENT_PREPARE};
    match event {
        XACT_EVENT_COMMIT => WANTED.take().into_iter().for_each(|work| work()),
        XACT_EVENT_ABORT | XACT_EVENT_PREPARE => WANTED.with_borrow_mut(Vec::clear),
        _ => {}
    }
}
