//! Memory for the board that is made by whoever first needs it, where the library is not preloaded.
//!
//! There either is a board or there is none, for all: who does not see the heartbeats that others give takes a
//! live session for a dead one. So where it cannot be made everybody does without, and where it is made and
//! cannot be reached that is an error.

use std::cell::Cell;
use std::ffi::{CStr, c_void};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pgrx::pg_sys;
use pgrx::pg_sys::panic::{CaughtError, ErrorReport};
use pgrx::{PgLogLevel, PgSqlErrorCode};

use super::memory::{self, Board, Layout};
use super::saved;
use crate::attempt::{message_of, on_shared_memory};
use crate::guc;

/// What all agree on before there is a board. Every version of the library must be able to read this.
#[repr(C)]
struct Agreed {
    /// By which rules the board is divided.
    magic: AtomicU64,
    /// For how many sessions it is made: what the setting told the first who needed it.
    sessions: AtomicU64,
    /// Not 0 once it has been made.
    made: AtomicU64,
}

const NAME_OF_AGREED: &CStr = c"pg_claims board size";

/// How long a process does without before it tries again to make the board, unless somebody else has made it.
const TRY_AGAIN_AFTER: Duration = Duration::from_secs(1);

thread_local! {
    /// Found once, and mapped for as long as the process lives.
    static AGREED: Cell<Option<&'static Agreed>> = const { Cell::new(None) };
    /// When it could not be made last.
    static FAILED_AT: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// The board; `None` where there is none, or none can be made.
pub(super) fn find() -> Option<Board> {
    let agreed = agreed()?;
    let is_made = || agreed.made.load(Ordering::Acquire) != 0;
    if has_just_failed() && !is_made() {
        return None;
    }
    if agreed.magic.load(Ordering::Relaxed) != memory::MAGIC {
        unreachable_board(
            "It was made by another version of pg_claims, which processes that are there may go on using.".into(),
            "Restart the server after pg_claims was upgraded.",
        );
    }
    let sessions = agreed.sessions.load(Ordering::Relaxed) as usize;
    if sessions == 0 {
        return None;
    }
    match segment(memory::NAME, Layout::for_sessions(sessions).size(), prepare_board) {
        // SAFETY: the server gives memory of the size asked for, which `prepare_board` has prepared, and maps
        // it for as long as the process lives.
        Ok(memory) => unsafe { Board::at(memory) },
        Err(Missing { error, .. }) if !is_made() => do_without(&error),
        Err(Missing { error, .. }) => unreachable_board(
            message_of(&error),
            "Other processes use it. Connect again; if that does not help, restart the server.",
        ),
    }
}

fn agreed() -> Option<&'static Agreed> {
    if let Some(agreed) = AGREED.get() {
        return Some(agreed);
    }
    if has_just_failed() && !is_registry_made() {
        return None;
    }
    match segment(NAME_OF_AGREED, size_of::<Agreed>(), prepare_agreed) {
        Ok(memory) => {
            // SAFETY: of that size, valid in any state, and mapped for as long as the process lives.
            let agreed = unsafe { &*memory.cast::<Agreed>() };
            AGREED.set(Some(agreed));
            Some(agreed)
        }
        Err(Missing { was_there: Some(false), error }) => do_without(&error),
        Err(Missing { was_there: None, error }) if !is_registry_made() => do_without(&error),
        Err(Missing { error, .. }) => unreachable_board(
            message_of(&error),
            "Connect again; if that does not help, restart the server, with more shared memory if that is what it lacks, or with pg_claims in shared_preload_libraries.",
        ),
    }
}

fn has_just_failed() -> bool {
    FAILED_AT.get().is_some_and(|at| at.elapsed() < TRY_AGAIN_AFTER)
}

/// Memory that the server could not give.
struct Missing {
    /// Whether somebody had made it, or begun to, if the server got as far as to look.
    was_there: Option<bool>,
    error: CaughtError,
}

fn segment(
    name: &CStr,
    size: usize,
    prepare: unsafe extern "C-unwind" fn(*mut c_void),
) -> Result<*mut c_void, Missing> {
    const NEITHER: u8 = 2;
    let mut was_there = NEITHER;
    on_shared_memory(|| {
        // SAFETY: the server writes a boolean there, which any byte has room for, and reads none. May raise an
        // error for lack of memory, which is caught.
        unsafe {
            let was_there = (&raw mut was_there).cast::<bool>();
            pg_sys::GetNamedDSMSegment(name.as_ptr(), size, Some(prepare), was_there)
        }
    })
    .map_err(|error| Missing { was_there: (was_there != NEITHER).then_some(was_there != 0), error })
}

/// Whether anybody has made the server's own list of such memory, without which there is none.
fn is_registry_made() -> bool {
    /// As the server has it.
    #[repr(C)]
    struct Registry {
        area: u32,
        table: u64,
    }
    let found = on_shared_memory(|| {
        let mut found = false;
        // SAFETY: the server has made this at its start, and refuses another size.
        unsafe {
            pg_sys::ShmemInitStruct(
                c"DSM Registry Data".as_ptr(),
                size_of::<Registry>(),
                &mut found,
            )
            .cast::<Registry>()
            .read_volatile()
            .area
        }
    });
    // What cannot be told counts as made.
    !found.is_ok_and(|area| area == 0)
}

#[pgrx::pg_guard]
unsafe extern "C-unwind" fn prepare_agreed(memory: *mut c_void) {
    // SAFETY: the server gives memory of the size asked for.
    let agreed = unsafe {
        memory.write_bytes(0, size_of::<Agreed>());
        &*memory.cast::<Agreed>()
    };
    agreed.magic.store(memory::MAGIC, Ordering::Relaxed);
    agreed.sessions.store(guc::max_sessions() as u64, Ordering::Relaxed);
    if guc::max_sessions() == 0 {
        // Or a later run would take it for its own.
        saved::discard();
    }
}

#[pgrx::pg_guard]
unsafe extern "C-unwind" fn prepare_board(memory: *mut c_void) {
    let Some(agreed) = AGREED.get() else { return };
    let sessions = agreed.sessions.load(Ordering::Relaxed) as usize;
    // SAFETY: the server gives memory of the size asked for, and nobody else sees it before this has returned.
    let board = unsafe {
        memory::prepare(memory, Layout::for_sessions(sessions), sessions);
        Board::at(memory)
    };
    board.into_iter().for_each(|board| saved::restore(board, saved::Start::Over));
    agreed.made.store(1, Ordering::Release);
}

/// There is no board for now: heartbeats go to the table.
fn do_without<T>(error: &CaughtError) -> Option<T> {
    // Once a process: each tries again and again.
    if FAILED_AT.replace(Some(Instant::now())).is_none() {
        pgrx::log!("pg_claims: there is no heartbeat board for now: {}", message_of(error));
    }
    None
}

fn unreachable_board(why: String, hint: &'static str) -> ! {
    ErrorReport::new(
        PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
        "cannot reach the heartbeat board, and without it cannot tell which sessions live",
        "pg_claims",
    )
    .set_detail(why)
    .set_hint(hint)
    .report(PgLogLevel::ERROR);
    unreachable!("an error is raised")
}
