//! The heartbeat board in shared memory.
//!
//! With it a heartbeat is an atomic store: no statement, no WAL, no dead row, no commit. The rules of an
//! entry are those of [`pg_claims_core::board`]; here is where its memory comes from and who locks it.
//!
//! Whoever looks for a session's last heartbeat takes the later one of board and table
//! (`latest_heartbeat` in SQL). The worker writes the board to the table now and then.

mod at_commit;
mod control;
mod memory;
#[cfg(any(feature = "pg17", feature = "pg18"))]
mod on_demand;
mod saved;

use std::cell::Cell;

use pg_claims_core::board::{Entry, Fullness, Held, Key};
use pgrx::pg_sys;

use crate::pg::{backend, time};
pub use at_commit::at_commit;
use memory::Board;
pub use memory::keep_over_shutdown;

/// Asks the server for what the board needs, when the library is loaded.
pub fn init() {
    memory::init();
    at_commit::init();
}

thread_local! {
    static TIMES_CLOSED: Cell<u64> = const { Cell::new(0) };
}

/// How many times this process has closed entries.
pub fn times_closed() -> u64 {
    TIMES_CLOSED.get()
}

fn count_closed() {
    TIMES_CLOSED.set(TIMES_CLOSED.get() + 1);
}

/// A session's entry on the board.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    table: pg_sys::Oid,
    session_id: &'a str,
}

impl<'a> Place<'a> {
    /// The session of that id in the table of sessions that is `table`.
    pub fn of(table: pg_sys::Oid, session_id: &'a str) -> Self {
        Self { table, session_id }
    }

    fn key(self) -> Key<'a> {
        Key { database: database(), table: self.table.to_u32(), session_id: self.session_id }
    }

    /// Records a heartbeat of the session, on behalf of `owner` if that is given, while it holds `named` if that is.
    /// Answers with the heartbeat that counts and what the session holds. `None` where only the table
    /// can tell.
    pub fn beat(
        self,
        owner: Option<pg_sys::Oid>,
        named: Option<i64>,
        at: i64,
    ) -> Option<(i64, Held)> {
        let (key, owner) = (self.key(), owner.map(pg_sys::Oid::to_u32));
        let board = Board::get()?;
        board.shared(&key, |shelf, hash| shelf.find(&key, hash)?.beat(owner, named, at))
    }

    /// The session's last heartbeat on the board.
    pub fn latest(self) -> Option<i64> {
        if at_commit::is_forgotten(self.table, self.session_id) {
            return None;
        }
        let key = self.key();
        let board = Board::get()?;
        board.shared(&key, |shelf, hash| shelf.find(&key, hash).map(Entry::beat_at))
    }

    /// Lets the board answer the session's next heartbeats, with what the table has just said, and with the
    /// heartbeat that this transaction is writing there. The session's row must be locked, and this
    /// transaction must not have changed it otherwise. The table is to be behind by `most_lag` microseconds at
    /// the most.
    pub fn open(self, held: &Held, most_lag: i64, at: i64) {
        let key = self.key();
        let Some(board) = Board::get() else { return };
        let is_taken = board.exclusive(&key, |shelf, hash| {
            let entry = board.find_or_make(shelf, &key, hash);
            entry.is_some_and(|entry| entry.open(held, most_lag, at))
        });
        if !is_taken {
            board.count_refused();
            return;
        }
        let (table, session_id) = (self.table, self.session_id.to_owned());
        at_commit(move || Place::of(table, &session_id).written(at));
    }

    /// From now on the table answers, as what the session holds is about to change. Once its row is
    /// locked, and before its lease is looked at: a heartbeat that came before is seen, one that comes
    /// after waits.
    /// Returns whether the session is on the board.
    pub fn close(self) -> bool {
        count_closed();
        let key = self.key();
        let Some(board) = Board::get() else { return false };
        board.exclusive(&key, |shelf, hash| {
            let entry = shelf.find(&key, hash);
            entry.inspect(|entry| entry.close()).is_some()
        })
    }

    /// The same, and the session's heartbeats do not count any more: at once for this process, and for the others
    /// once the transaction is committed or prepared.
    pub fn forget(self) {
        if self.close() {
            at_commit::forget(self.table, self.session_id.to_owned());
        }
    }

    /// A heartbeat that lies in the future counts as given at `now`; the table answers the next one.
    pub fn pull_back(self, now: i64) {
        count_closed();
        let key = self.key();
        let Some(board) = Board::get() else { return };
        board.exclusive(&key, |shelf, hash| {
            if let Some(entry) = shelf.find(&key, hash) {
                entry.pull_back(now);
            }
        });
    }

    /// Forgets the session, which has been found to be over and to have had the heartbeat `at`. Should it
    /// have come back and beaten meanwhile, the table answers its next heartbeat instead.
    pub fn remove_if_over(self, at: i64) {
        count_closed();
        let key = self.key();
        let Some(board) = Board::get() else { return };
        board.exclusive(&key, |shelf, hash| match shelf.find(&key, hash) {
            Some(entry) if entry.is_closed() && entry.beat_at() <= at => {
                board.remove(shelf, &key, hash);
            }
            Some(entry) => entry.close(),
            None => {}
        });
    }

    /// Takes the entry away.
    fn remove(self) {
        let key = self.key();
        let Some(board) = Board::get() else { return };
        board.exclusive(&key, |shelf, hash| board.remove(shelf, &key, hash));
    }

    /// The table has the heartbeat `at`.
    pub fn written(self, at: i64) {
        let key = self.key();
        let Some(board) = Board::get() else { return };
        board.shared(&key, |shelf, hash| {
            if let Some(entry) = shelf.find(&key, hash) {
                entry.set_written(at);
            }
        });
    }
}

/// Forgets all sessions of `table` as [`Place::forget`] does one.
pub fn forget_all(table: pg_sys::Oid) {
    let Some(board) = Board::get() else { return };
    let mut all = Vec::new();
    board.each_shared(|shelf| {
        all.extend(shelf.entries().filter(|entry| is_in(entry, table)).map(Entry::session_id));
    });
    for session_id in &all {
        Place::of(table, session_id).forget();
    }
}

/// Up to `limit` sessions of `table` with their last heartbeat, where that is newer than the one in the
/// table by `lag` microseconds or more, or by as much as is right for the session, or the board is to forget it.
pub fn unwritten(table: pg_sys::Oid, lag: i64, limit: usize) -> Vec<(String, i64)> {
    let Some(board) = Board::get() else { return Vec::new() };
    let mut found = Vec::new();
    // From another shelf each time: those that cannot be written must not always come first.
    let any = time::now_in_microseconds().unsigned_abs() as usize;
    board.each_shared_from(any, |shelf| {
        for entry in shelf.entries().filter(|entry| is_in(entry, table)) {
            if found.len() == limit {
                return;
            }
            let lag = if entry.is_closed() { 1 } else { lag.min(entry.most_lag()).max(1) };
            if entry.beat_at() >= entry.written_at().saturating_add(lag) {
                found.push((entry.session_id(), entry.beat_at()));
            }
        }
    });
    found
}

/// Forgets sessions of `table` that the table answers for, once it has their last heartbeat. Those that
/// live are back with the next one; those that are gone leave nothing.
pub fn sweep(table: pg_sys::Oid) {
    remove_where(|entry| {
        is_in(entry, table) && entry.is_closed() && entry.beat_at() <= entry.written_at()
    });
}

/// Forgets the sessions of this database that are in other tables than `table`: of an extension that has
/// been dropped.
pub fn remove_others(table: Option<pg_sys::Oid>) {
    remove_where(|entry| {
        entry.database() == database() && Some(entry.table()) != table.map(pg_sys::Oid::to_u32)
    });
}

/// Forgets the sessions of databases that are none of these.
pub fn remove_databases_but(databases: &[pg_sys::Oid]) {
    remove_where(|entry| databases.iter().all(|known| known.to_u32() != entry.database()));
}

fn remove_where(is_gone: impl Fn(&Entry) -> bool) {
    let Some(board) = Board::get() else { return };
    board.each_exclusive(|shelf| {
        let gone: Vec<_> = shelf
            .entries()
            .filter(|entry| is_gone(entry))
            .map(|entry| (entry.database(), entry.table(), entry.session_id()))
            .collect();
        for (database, table, session_id) in &gone {
            let key = Key { database: *database, table: *table, session_id };
            board.remove(shelf, &key, key.hash());
        }
    });
}

/// How full the board is, where there is one.
pub fn fullness() -> Option<Fullness> {
    let board = Board::get()?;
    let mut entries = 0;
    board.each_shared(|shelf| entries += shelf.entries().count() as i64);
    Some(Fullness { capacity: board.capacity(), entries, refused: board.refused() })
}

/// The sessions of `table` that the board answers for, each with the acquisition that it says they hold; 0 for none.
pub fn open_sessions(table: pg_sys::Oid) -> Vec<(String, i64)> {
    let mut found = Vec::new();
    if let Some(board) = Board::get() {
        board.each_shared(|shelf| {
            let open = shelf.entries().filter(|entry| is_in(entry, table) && !entry.is_closed());
            found.extend(open.map(|entry| (entry.session_id(), entry.claim_id())));
        });
    }
    found
}

fn is_in(entry: &Entry, table: pg_sys::Oid) -> bool {
    entry.database() == database() && entry.table() == table.to_u32()
}

fn database() -> u32 {
    backend::database().to_u32()
}
