//! What the board is to be told once a transaction has been committed.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::c_void;

use pgrx::pg_sys;

use super::Place;
use super::memory::Board;

/// Something to be done once the transaction, or the savepoint at this depth of it, is committed.
struct Wanted {
    depth: i32,
    work: Box<dyn FnOnce()>,
}

thread_local! {
    static WANTED: RefCell<Vec<Wanted>> = const { RefCell::new(Vec::new()) };
    /// The sessions of each table that are to be forgotten, and how deep among savepoints that was said first.
    static FORGOTTEN: RefCell<BTreeMap<u32, BTreeMap<String, i32>>> =
        const { RefCell::new(BTreeMap::new()) };
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

/// Forgets the session, which the board has, once the transaction has been committed or prepared; for this
/// process, at once. Others go on seeing it, as this may yet be rolled back.
pub fn forget(table: pg_sys::Oid, session_id: String) {
    let depth = depth();
    FORGOTTEN.with_borrow_mut(|forgotten| {
        forgotten.entry(table.to_u32()).or_default().entry(session_id).or_insert(depth);
    });
}

/// Whether this transaction has had the session forgotten.
pub fn is_forgotten(table: pg_sys::Oid, session_id: &str) -> bool {
    FORGOTTEN.with_borrow(|forgotten| {
        forgotten.get(&table.to_u32()).is_some_and(|sessions| sessions.contains_key(session_id))
    })
}

fn remove_forgotten() {
    for (table, sessions) in FORGOTTEN.take() {
        for session_id in sessions.keys() {
            Place::of(pg_sys::Oid::from(table), session_id).remove();
        }
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
        XACT_EVENT_COMMIT => {
            remove_forgotten();
            WANTED.take().into_iter().for_each(|wanted| (wanted.work)());
        }
        XACT_EVENT_PREPARE => {
            WANTED.with_borrow_mut(Vec::clear);
            remove_forgotten();
        }
        XACT_EVENT_ABORT => {
            WANTED.with_borrow_mut(Vec::clear);
            FORGOTTEN.with_borrow_mut(BTreeMap::clear);
        }
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
    if event != SUBXACT_EVENT_COMMIT_SUB && event != SUBXACT_EVENT_ABORT_SUB {
        return;
    }
    let depth = depth();
    let stays = |said_at: &mut i32| {
        if event == SUBXACT_EVENT_ABORT_SUB {
            return *said_at < depth;
        }
        // From here on it is a matter of what is around the savepoint.
        *said_at = (*said_at).min(depth - 1);
        true
    };
    WANTED.with_borrow_mut(|all| all.retain_mut(|wanted| stays(&mut wanted.depth)));
    FORGOTTEN.with_borrow_mut(|forgotten| {
        forgotten.values_mut().for_each(|sessions| sessions.retain(|_, depth| stays(depth)));
    });
}
