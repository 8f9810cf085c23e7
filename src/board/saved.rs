//! Keeping the board across a restart.
//!
//! A server that shuts down starts no more workers, so what the board has and the tables have not goes
//! into a file, in the folder where the server keeps its own statistics meanwhile. The postmaster writes it
//! last of all where the library is preloaded, and otherwise the launcher, when it ends. Whoever makes the
//! board reads it. A crash of the server leaves none behind; then every session has one full lease anyway.

use std::fs;
use std::io::ErrorKind;

use pg_claims_core::board::{Entry, Key, Shelf};
use pgrx::pg_sys;

use super::memory::Board;

/// In the server's data folder, which is where the postmaster works.
const FILE: &str = "pg_stat/pg_claims.board";

/// When the postmaster ends: writes the file if the server has shut down in an orderly way.
#[pgrx::pg_guard]
pub extern "C-unwind" fn when_server_ends(code: i32, _nothing: pg_sys::Datum) {
    if let Some(board) = Board::get().filter(|_| code == 0) {
        write(&lines(board.entries()));
    }
}

/// When the launcher ends: writes the file, as the server may be shutting down. If it is not, the next launcher
/// throws it away: the board is still there, and may have forgotten some of it.
#[pgrx::pg_guard]
pub extern "C-unwind" fn when_launcher_ends(_code: i32, _nothing: pg_sys::Datum) {
    let mut all = String::new();
    if let Some(board) = Board::get() {
        board.each_shared(|shelf| all.push_str(&lines(shelf)));
    }
    write(&all);
}

/// What the tables do not have yet.
fn lines(shelf: Shelf<'_>) -> String {
    let unwritten = shelf.entries().filter(|entry| entry.beat_at() > entry.written_at());
    let line = |entry: &Entry| {
        let (database, table) = (entry.database(), entry.table());
        format!("{database} {table} {} {}\n", entry.beat_at(), entry.session_id())
    };
    unwritten.map(line).collect()
}

fn write(lines: &str) {
    if lines.is_empty() {
        return;
    }
    // Whole or not at all.
    let unfinished = format!("{FILE}.tmp");
    if let Err(error) = fs::write(&unfinished, lines).and_then(|()| fs::rename(&unfinished, FILE)) {
        pgrx::log!("pg_claims: could not keep the last heartbeats in \"{FILE}\": {error}");
    }
}

/// Puts what the file has, if there is one, onto the new board. It is used up with that.
pub fn restore(board: Board) {
    let lines = match fs::read_to_string(FILE) {
        Ok(lines) => lines,
        Err(error) if error.kind() == ErrorKind::NotFound => return,
        Err(error) => {
            pgrx::log!("pg_claims: could not read the last heartbeats from \"{FILE}\": {error}");
            return;
        }
    };
    for line in lines.lines() {
        let Some((key, beat_at)) = parsed(line) else {
            pgrx::log!("pg_claims: \"{FILE}\" has a line that is no heartbeat");
            continue;
        };
        board.exclusive(&key, |shelf, hash| {
            if let Some(entry) = shelf.find_or_make(&key, hash) {
                entry.note(beat_at);
            }
        });
    }
    discard();
}

/// Throws the file away, if there is one.
pub fn discard() {
    match fs::remove_file(FILE) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            pgrx::log!("pg_claims: could not remove \"{FILE}\": {error}");
        }
        _ => {}
    }
}

fn parsed(line: &str) -> Option<(Key<'_>, i64)> {
    let mut parts = line.splitn(4, ' ');
    let database = parts.next()?.parse().ok()?;
    let table = parts.next()?.parse().ok()?;
    let beat_at = parts.next()?.parse().ok()?;
    Some((Key { database, table, session_id: parts.next()? }, beat_at))
}
