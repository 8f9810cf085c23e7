//! What the board is to be told once a transaction has been committed.

use std::cell::RefCell;
use std::collections::BTreeMap;

use pgrx::pg_sys;

use super::Place;
use super::memory::Board;
use crate::pg::backend::savepoint_depth;
use crate::pg::transaction::{self, End, SavepointEnd};

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
    transaction::at_end(transaction_ends);
    transaction::at_savepoint_end(savepoint_ends);
}

/// Does `work`, which must touch nothing but the board, once the transaction has been committed. Not at all
/// where it, or a savepoint around this, is rolled back; nor where it is prepared, as nobody tells of its end.
pub fn at_commit(work: impl FnOnce() + 'static) {
    if Board::get().is_some() {
        let wanted = Wanted { depth: savepoint_depth(), work: Box::new(work) };
        WANTED.with_borrow_mut(|all| all.push(wanted));
    }
}

/// Forgets the session, which the board has, once the transaction has been committed or prepared; for this
/// process, at once. Others go on seeing it, as this may yet be rolled back.
pub fn forget(table: pg_sys::Oid, session_id: String) {
    let depth = savepoint_depth();
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

fn transaction_ends(end: End) {
    match end {
        End::Commit => {
            remove_forgotten();
            WANTED.take().into_iter().for_each(|wanted| (wanted.work)());
        }
        End::Prepare => {
            WANTED.with_borrow_mut(Vec::clear);
            remove_forgotten();
        }
        End::Abort => {
            WANTED.with_borrow_mut(Vec::clear);
            FORGOTTEN.with_borrow_mut(BTreeMap::clear);
        }
        End::PreCommit => {}
    }
}

fn savepoint_ends(end: SavepointEnd) {
    let depth = savepoint_depth();
    let stays = |said_at: &mut i32| {
        if end.is_rolled_back {
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
