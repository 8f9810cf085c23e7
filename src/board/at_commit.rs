//! What the board is to be told once a transaction has been committed.

use std::cell::RefCell;
use std::ffi::c_void;

use pgrx::pg_sys;

use super::memory::Board;

/// Something to be done once the transaction, or the savepoint at this depth of it, is committed.
struct Wanted {
    depth: i32,
    work: Box<dyn FnOnce()>,
}

thread_local! {
    static WANTED: RefCell<Vec<Wanted>> = const { RefCell::new(Vec::new()) };
}

/// Asks the server to tell how transactions and savepoints end.
pub fn init() {
    // SAFETY: runs once per process; the callbacks live as long as the library.
    unsafe {
        pg_sys::RegisterXactCallback(Some(transaction_ends), std::ptr::null_mut());
        pg_sys::RegisterSubXactCallback(Some(savepoint_ends), std::ptr::null_mut());
    }
}

/// Does `work`, which must touch nothing but the board, once the transaction has been committed. Not at all
/// where it, or a savepoint around this, is rolled back; nor where it is prepared, as nobody tells of its end.
pub fn at_commit(work: impl FnOnce() + 'static) {
    if Board::get().is_some() {
        let wanted = Wanted { depth: depth(), work: Box::new(work) };
        WANTED.with_borrow_mut(|all| all.push(wanted));
    }
}

/// 1 outside of any savepoint.
fn depth() -> i32 {
    // SAFETY: reads a variable of this process's.
    unsafe { pg_sys::GetCurrentTransactionNestLevel() }
}

#[pgrx::pg_guard]
unsafe extern "C-unwind" fn transaction_ends(
    event: pg_sys::XactEvent::Type,
    _argument: *mut c_void,
) {
    use pg_sys::XactEvent::{XACT_EVENT_ABORT, XACT_EVENT_COMMIT, XACT_EVENT_PREPARE};
    match event {
        XACT_EVENT_COMMIT => WANTED.take().into_iter().for_each(|wanted| (wanted.work)()),
        XACT_EVENT_ABORT | XACT_EVENT_PREPARE => WANTED.with_borrow_mut(Vec::clear),
        _ => {}
    }
}

#[pgrx::pg_guard]
unsafe extern "C-unwind" fn savepoint_ends(
    event: pg_sys::SubXactEvent::Type,
    _savepoint: pg_sys::SubTransactionId,
    _parent: pg_sys::SubTransactionId,
    _argument: *mut c_void,
) {
    use pg_sys::SubXactEvent::{SUBXACT_EVENT_ABORT_SUB, SUBXACT_EVENT_COMMIT_SUB};
    let depth = depth();
    WANTED.with_borrow_mut(|all| match event {
        // From here on it is a matter of what is around the savepoint.
        SUBXACT_EVENT_COMMIT_SUB => {
            all.iter_mut().for_each(|wanted| wanted.depth = wanted.depth.min(depth - 1));
        }
        SUBXACT_EVENT_ABORT_SUB => all.retain(|wanted| wanted.depth < depth),
        _ => {}
    });
}
