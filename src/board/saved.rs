//! Keeping the board across a restart.
//!
//! A server that shuts down starts no more workers, so what the board has and the tables have not goes
//! into a file, in the folder where the server keeps its own statistics meanwhile. After a crash there is
//! none; then every session has one full lease anyway.

use std::fs;
use std::io::ErrorKind;

use pg_claims_core::board::Key;
use pgrx::pg_sys;

use super::memory::Board;

/// In the server's data folder, which is where the postmaster works.
const FILE: &str = "pg_stat/pg_claims.board";

/// Writes the file when the server has shut down in an orderly way.
#[pgrx::pg_guard]
pub extern "C-unwind" fn at_exit(code: i32, _nothing: pg_sys::Datum) {
    let Some(board) = Board::get().filter(|_| code == 0) else { return };
    let lines: String = board
        .entries()
        .entries()
        .filter(|entry| entry.beat_at() > entry.written_at())
        .map(|entry| {
            let (database, table) = (entry.database(), entry.table());
            format!("{database} {table} {} {}\n", entry.beat_at(), entry.session_id())
        })
        .collect();
    if lines.is_empty() {
        return;
    }
    // Whole or not at all.
    let unfinished = format!("{FILE}.tmp");
    if let Err(error) = fs::write(&unfinished, lines).and_then(|()| fs::rename(&unfinished, FILE)) {
        pgrx::log!("pg_claims: could not keep the last heartbeats in \"{FILE}\": {error}");
    }
}

/// Reads the file, which is used up with that.
pub fn restore() {
    let lines = match fs::read_to_string(FILE) {
        Ok(lines) => lines,
        Err(error) if error.kind() == ErrorKind::NotFound => return,
        Err(error) => {
            pgrx::log!("pg_claims: could not read the last heartbeats from \"{FILE}\": {error}");
            return;
        }
    };
    if let Err(error) = fs::remove_file(FILE) {
        pgrx::log!("pg_claims: could not remove \"{FILE}\": {error}");
    }
    let Some(board) = Board::get() else { return };
    for line in lines.lines() {
        let Some((key, beat_at)) = parsed(line) else {
            pgrx::log!("pg_claims: \"{FILE}\" has a line that is no heartbeat");
            continue;
        };
        let (shelf, hash) = board.shelf(&key);
        if let Some(entry) = shelf.find_or_make(&key, hash) {
            entry.note(beat_at);
        }
    }
}

fn parsed(line: &str) -> Option<(Key<'_>, i64)> {
    let mut parts = line.splitn(4, ' ');
    let database = parts.next()?.parse().ok()?;
    let table = parts.next()?.parse().ok()?;
    let beat_at = parts.next()?.parse().ok()?;
    Some((Key { database, table, session_id: parts.next()? }, beat_at))
}
