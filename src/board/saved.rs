//! Keeping the board across a restart.
//!
//! A server that shuts down starts no more workers, so what the board has and the tables have not goes
//! into a file, in the folder where the server keeps its own statistics meanwhile. The postmaster writes it
//! last of all where the library is preloaded, and otherwise the launcher, when it ends. Whoever makes the
//! board reads it. A crash of the server leaves none behind; then every session has one full lease anyway.
//!
//! Files get about: with backups and copies of the data folder, or left there by a run that did not need its own.
//! Elsewhere, or later, the file is a lie about sessions that have lived on. So it says in its first line which
//! shutdown it was written at, and is believed only by the start that follows that one.

use std::fmt;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use pg_claims_core::board::{Entry, Key, Shelf};
use pgrx::pg_sys;

use super::control::Control;
use super::memory::Board;

/// In the server's data folder, which is where the postmaster works.
const FILE: &str = "pg_stat/pg_claims.board";

/// How the first line begins: to be changed with the form of the others.
const FORM: &str = "pg_claims.board 1";

/// What has the server recover when it starts.
const RECOVERS_BY: [&str; 3] = ["backup_label", "recovery.signal", "standby.signal"];

/// The shutdown that a file was written at.
struct Shutdown {
    system: u64,
    timeline: u32,
    /// Where its checkpoint lies; 0 if the file was written before.
    checkpoint: u64,
}

impl fmt::Display for Shutdown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{FORM} {} {} {}", self.system, self.timeline, self.checkpoint)
    }
}

impl Shutdown {
    /// As a file's first line tells it.
    fn parsed(line: &str) -> Option<Self> {
        let mut numbers = line.strip_prefix(FORM)?.strip_prefix(' ')?.split(' ');
        let shutdown = Self {
            system: numbers.next()?.parse().ok()?,
            timeline: numbers.next()?.parse().ok()?,
            checkpoint: numbers.next()?.parse().ok()?,
        };
        numbers.next().is_none().then_some(shutdown)
    }

    /// Why it is not the one that `now` comes after.
    fn why_not(&self, now: &Control, start: Start) -> Option<&'static str> {
        if self.system != now.system {
            return Some("it is of another server");
        }
        if self.timeline != now.timeline {
            return Some("it is of another timeline");
        }
        let is_another = self.checkpoint != 0 && self.checkpoint != now.checkpoint;
        // A server that runs has had checkpoints since.
        (start == Start::Ahead && is_another).then_some("it is of another shutdown")
    }
}

/// When the board is made.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// By the postmaster, before it starts anything else.
    Ahead,
    /// Later, by whoever needs it.
    #[cfg(any(feature = "pg17", feature = "pg18"))]
    Over,
}

impl Start {
    /// Whether the server recovers at this start, or has: from a crash, of a backup, as a standby.
    fn is_recovery(self, now: &Control) -> bool {
        match self {
            Self::Ahead => {
                !now.is_shut_down || RECOVERS_BY.iter().any(|file| Path::new(file).exists())
            }
            #[cfg(any(feature = "pg17", feature = "pg18"))]
            // SAFETY: reads the server's shared state: up to where it has replayed its log, which is nowhere unless
            // it recovers or has. No other preconditions.
            Self::Over => unsafe { pg_sys::GetXLogReplayRecPtr(std::ptr::null_mut()) != 0 },
        }
    }
}

/// When the postmaster ends: writes the file if the server has shut down in an orderly way.
#[pgrx::pg_guard]
pub extern "C-unwind" fn when_server_ends(code: i32, _nothing: pg_sys::Datum) {
    if let Some(board) = Board::get().filter(|_| code == 0) {
        write(&lines(board.entries()), |now| now.is_shut_down.then_some(now.checkpoint));
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
    write(&all, |_| Some(0));
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

/// Writes the file, unless nothing is to be kept: also where `checkpoint` finds no shutdown that it could be of.
fn write(lines: &str, checkpoint: impl FnOnce(&Control) -> Option<u64>) {
    if lines.is_empty() {
        return;
    }
    let written = Control::read().map(|now| {
        let Some(checkpoint) = checkpoint(&now) else { return Ok(()) };
        let shutdown = Shutdown { system: now.system, timeline: now.timeline, checkpoint };
        // Whole or not at all.
        let unfinished = format!("{FILE}.tmp");
        fs::write(&unfinished, format!("{shutdown}\n{lines}"))
            .and_then(|()| fs::rename(&unfinished, FILE))
    });
    let failed = match written {
        Ok(Ok(())) => return,
        Ok(Err(error)) => error.to_string(),
        Err(why) => format!("the server's control file cannot be read: {why}"),
    };
    pgrx::log!("pg_claims: could not keep the last heartbeats in \"{FILE}\": {failed}");
}

/// Puts what the file has, if there is one, onto the new board, unless it is not of the shutdown before this start. It
/// is used up either way.
pub fn restore(board: Board, start: Start) {
    let text = match fs::read(FILE) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) if error.kind() == ErrorKind::NotFound => return,
        Err(error) => {
            pgrx::log!("pg_claims: could not read the last heartbeats from \"{FILE}\": {error}");
            return;
        }
    };
    let (first, lines) = text.split_once('\n').unwrap_or_default();
    match why_not(first, start) {
        Some(why) => pgrx::log!("pg_claims: discarded the heartbeats in \"{FILE}\": {why}"),
        None => put(board, lines),
    }
    discard();
}

/// Why a file with this first line does not count at this start.
fn why_not(first: &str, start: Start) -> Option<String> {
    let Some(shutdown) = Shutdown::parsed(first) else {
        return Some("it was written by another version of pg_claims".into());
    };
    let now = match Control::read() {
        Ok(now) => now,
        Err(why) => return Some(format!("the server's control file cannot be read: {why}")),
    };
    if start.is_recovery(&now) {
        return Some("the server starts with a recovery".into());
    }
    shutdown.why_not(&now, start).map(str::to_owned)
}

fn put(board: Board, lines: &str) {
    for line in lines.lines() {
        let Some((key, beat_at)) = parsed(line) else {
            pgrx::log!("pg_claims: \"{FILE}\" has a line that is no heartbeat");
            continue;
        };
        board.exclusive(&key, |shelf, hash| {
            if let Some(entry) = board.find_or_make(shelf, &key, hash) {
                entry.note(beat_at);
            }
        });
    }
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
