//! Where the board's memory comes from, and its locks.
//!
//! When the library is preloaded, the server sets the memory aside at its start. Otherwise there is none
//! before PostgreSQL 17; from then on whoever needs it first makes it. It is a header, locks, and entries:
//! each lock guards one shelf of them.

use std::cell::Cell;
use std::ffi::{CStr, c_void};
use std::sync::atomic::{AtomicI32, AtomicI64, AtomicU32, AtomicU64, Ordering};

use pg_claims_core::board::{Entry, Key, Shelf};
use pgrx::pg_sys;

#[cfg(any(feature = "pg17", feature = "pg18"))]
use super::on_demand;
use super::saved;
use crate::attempt::{message_of, on_shared_memory};
use crate::guc;

pub(super) const NAME: &CStr = c"pg_claims board";

/// Tells this version's memory from any other's: to be changed with whatever is said here of how the memory is
/// divided, and with the fields of an entry.
pub(super) const MAGIC: u64 = 0x7067_636c_6169_6d05;

/// Entries for each session that the board is made for: half empty, each is found at once.
const SPARSENESS: usize = 2;

/// The most shelves: so many sessions beat at once without waiting for each other's lock.
const MOST_SHELVES: usize = 128;

/// The least entries of a shelf.
const LEAST_ENTRIES: usize = 64;

#[repr(C, align(128))]
struct Header {
    magic: AtomicU64,
    capacity: AtomicU64,
    refused: AtomicU64,
    /// How many entries there are.
    used: AtomicI64,
    shelves: AtomicU32,
    entries_per_shelf: AtomicU32,
    tranche: AtomicI32,
}

/// How the memory is divided.
#[derive(Clone, Copy)]
pub(super) struct Layout {
    shelves: usize,
    entries_per_shelf: usize,
}

impl Layout {
    pub(super) fn for_sessions(sessions: usize) -> Self {
        let entries = sessions * SPARSENESS;
        let shelves = (entries / LEAST_ENTRIES).clamp(1, MOST_SHELVES);
        Self { shelves, entries_per_shelf: entries.div_ceil(shelves) }
    }

    pub(super) fn size(self) -> usize {
        size_of::<Header>()
            + self.shelves * size_of::<pg_sys::LWLockPadded>()
            + self.shelves * self.entries_per_shelf * size_of::<Entry>()
    }
}

/// The board as this process sees it.
#[derive(Clone, Copy)]
pub struct Board {
    header: &'static Header,
    locks: *mut pg_sys::LWLockPadded,
    entries: &'static [Entry],
    entries_per_shelf: usize,
}

thread_local! {
    static BOARD: Cell<Option<Board>> = const { Cell::new(None) };
    /// Whether the server was to set memory aside at its start.
    static PRELOADED: Cell<bool> = const { Cell::new(false) };
    /// Whether this process keeps the board over a shutdown, and whether it has told why it cannot.
    static IS_KEPT: Cell<bool> = const { Cell::new(false) };
    static IS_TOLD: Cell<bool> = const { Cell::new(false) };
}

static mut PREVIOUS_STARTUP_HOOK: pg_sys::shmem_startup_hook_type = None;
#[cfg(not(feature = "pg14"))]
static mut PREVIOUS_REQUEST_HOOK: pg_sys::shmem_request_hook_type = None;

/// While the library is being preloaded: asks the server to set the memory aside.
pub fn init() {
    // SAFETY: runs in _PG_init, in the one thread of the postmaster; hooks are chained as the server
    // asks for.
    unsafe {
        if !pg_sys::process_shared_preload_libraries_in_progress {
            return;
        }
        PRELOADED.set(true);
        if guc::max_sessions() == 0 {
            // Or a later run would take it for its own.
            saved::discard();
            return;
        }
        #[cfg(feature = "pg14")]
        request();
        #[cfg(not(feature = "pg14"))]
        {
            PREVIOUS_REQUEST_HOOK = pg_sys::shmem_request_hook;
            pg_sys::shmem_request_hook = Some(request_hook);
        }
        PREVIOUS_STARTUP_HOOK = pg_sys::shmem_startup_hook;
        pg_sys::shmem_startup_hook = Some(startup_hook);
    }
}

#[cfg(not(feature = "pg14"))]
#[pgrx::pg_guard]
extern "C-unwind" fn request_hook() {
    // SAFETY: called by the server once, where memory may be asked for.
    unsafe {
        if let Some(previous) = PREVIOUS_REQUEST_HOOK {
            previous();
        }
    }
    request();
}

fn request() {
    // SAFETY: called where memory may be asked for.
    unsafe { pg_sys::RequestAddinShmemSpace(Layout::for_sessions(guc::max_sessions()).size()) };
}

#[pgrx::pg_guard]
extern "C-unwind" fn startup_hook() {
    // SAFETY: called by the server in the postmaster once it has shared memory, also anew after a crash;
    // nobody else is there yet. The memory has the size that was asked for.
    unsafe {
        if let Some(previous) = PREVIOUS_STARTUP_HOOK {
            previous();
        }
        let layout = Layout::for_sessions(guc::max_sessions());
        let mut found = false;
        let memory = pg_sys::ShmemInitStruct(NAME.as_ptr(), layout.size(), &mut found);
        if !found {
            prepare(memory, layout, guc::max_sessions());
        }
        BOARD.set(Board::at(memory));
        if !found {
            BOARD.get().into_iter().for_each(|board| saved::restore(board, saved::Start::Ahead));
            pg_sys::on_shmem_exit(Some(saved::when_server_ends), pg_sys::Datum::null());
        }
    }
}

/// In the launcher, now and then: keeps the board over a shutdown, unless the postmaster does, from when it is there.
pub fn keep_over_shutdown() {
    if PRELOADED.get() || IS_KEPT.get() {
        return;
    }
    match on_shared_memory(Board::get) {
        Ok(Some(_)) => {}
        Ok(None) => return,
        // Whoever beats or claims is told. This process must not end again and again for it.
        Err(error) => {
            if !IS_TOLD.replace(true) {
                pgrx::log!("pg_claims launcher: {}", message_of(&error));
            }
            return;
        }
    }
    IS_KEPT.set(true);
    // Left by a launcher that ended before this one.
    saved::discard();
    // SAFETY: the callback lives as long as the library; the memory is detached only after it has run.
    unsafe { pg_sys::before_shmem_exit(Some(saved::when_launcher_ends), pg_sys::Datum::null()) };
}

/// Makes new memory an empty board.
///
/// # Safety
/// `memory` must have the size of `layout`, and nobody else may see it yet.
pub(super) unsafe fn prepare(memory: *mut c_void, layout: Layout, sessions: usize) {
    // SAFETY: as promised. A header and entries of zeros are valid, and an entry of zeros is free.
    unsafe {
        memory.cast::<u8>().write_bytes(0, layout.size());
        let tranche = pg_sys::LWLockNewTrancheId();
        let header = &*memory.cast::<Header>();
        header.capacity.store(sessions as u64, Ordering::Relaxed);
        header.shelves.store(layout.shelves as u32, Ordering::Relaxed);
        header.entries_per_shelf.store(layout.entries_per_shelf as u32, Ordering::Relaxed);
        header.tranche.store(tranche, Ordering::Relaxed);
        let locks = memory.byte_add(size_of::<Header>()).cast::<pg_sys::LWLockPadded>();
        for shelf in 0..layout.shelves {
            pg_sys::LWLockInitialize(&raw mut (*locks.add(shelf)).lock, tranche);
        }
        header.magic.store(MAGIC, Ordering::Release);
    }
}

impl Board {
    /// The board, if there is one.
    pub fn get() -> Option<Self> {
        if let Some(board) = BOARD.get() {
            return Some(board);
        }
        let board = find()?;
        BOARD.set(Some(board));
        Some(board)
    }

    /// # Safety
    /// `memory` must have been prepared, and live as long as this process.
    pub(super) unsafe fn at(memory: *mut c_void) -> Option<Self> {
        // SAFETY: as promised; the parts follow each other, each with an alignment that divides the
        // sizes before it.
        unsafe {
            let header = &*memory.cast::<Header>();
            if header.magic.load(Ordering::Acquire) != MAGIC {
                return None;
            }
            pg_sys::LWLockRegisterTranche(header.tranche.load(Ordering::Relaxed), NAME.as_ptr());
            let shelves = header.shelves.load(Ordering::Relaxed) as usize;
            let entries_per_shelf = header.entries_per_shelf.load(Ordering::Relaxed) as usize;
            let locks = memory.byte_add(size_of::<Header>()).cast::<pg_sys::LWLockPadded>();
            let entries = std::slice::from_raw_parts(
                locks.add(shelves).cast::<Entry>(),
                shelves * entries_per_shelf,
            );
            Some(Self { header, locks, entries, entries_per_shelf })
        }
    }

    /// For how many sessions it was made.
    pub fn capacity(self) -> i64 {
        self.header.capacity.load(Ordering::Relaxed) as i64
    }

    /// The entry of `key` on `shelf`, which must be locked; made if there is none. `None` where there is no room: a shelf
    /// is half empty when the board is full, so that each entry is found at once.
    pub fn find_or_make<'s>(self, shelf: Shelf<'s>, key: &Key<'_>, hash: u32) -> Option<&'s Entry> {
        if let Some(entry) = shelf.find(key, hash) {
            return Some(entry);
        }
        let used = &self.header.used;
        if used.fetch_add(1, Ordering::Relaxed) < self.capacity()
            && let Some(entry) = shelf.find_or_make(key, hash)
        {
            return Some(entry);
        }
        used.fetch_sub(1, Ordering::Relaxed);
        None
    }

    /// Takes the entry of `key` away from `shelf`, which must be locked.
    pub fn remove(self, shelf: Shelf<'_>, key: &Key<'_>, hash: u32) {
        if shelf.remove(key, hash) {
            self.header.used.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// How many times it had no room.
    pub fn refused(self) -> i64 {
        self.header.refused.load(Ordering::Relaxed) as i64
    }

    /// It had no room.
    pub fn count_refused(self) {
        self.header.refused.fetch_add(1, Ordering::Relaxed);
    }

    /// Works on the shelf of `key` side by side with others that only look or beat.
    pub fn shared<R>(self, key: &Key<'_>, work: impl FnOnce(Shelf<'static>, u32) -> R) -> R {
        let hash = key.hash();
        self.locked(self.shelf_of(hash), pg_sys::LWLockMode::LW_SHARED, |shelf| work(shelf, hash))
    }

    /// Works on the shelf of `key` alone.
    pub fn exclusive<R>(self, key: &Key<'_>, work: impl FnOnce(Shelf<'static>, u32) -> R) -> R {
        let hash = key.hash();
        let mode = pg_sys::LWLockMode::LW_EXCLUSIVE;
        self.locked(self.shelf_of(hash), mode, |shelf| work(shelf, hash))
    }

    /// Looks at one shelf after the other.
    pub fn each_shared(self, work: impl FnMut(Shelf<'static>)) {
        self.each_shared_from(0, work);
    }

    /// The same, beginning with another one.
    pub fn each_shared_from(self, first: usize, mut work: impl FnMut(Shelf<'static>)) {
        for shelf in 0..self.shelves() {
            let shelf = (first % self.shelves() + shelf) % self.shelves();
            self.locked(shelf, pg_sys::LWLockMode::LW_SHARED, &mut work);
        }
    }

    /// Works on one shelf after the other, alone.
    pub fn each_exclusive(self, mut work: impl FnMut(Shelf<'static>)) {
        for shelf in 0..self.shelves() {
            self.locked(shelf, pg_sys::LWLockMode::LW_EXCLUSIVE, &mut work);
        }
    }

    fn shelves(self) -> usize {
        self.entries.len() / self.entries_per_shelf
    }

    /// By other bits of the hash than those that tell the place on the shelf.
    fn shelf_of(self, hash: u32) -> usize {
        (hash.rotate_left(16) as usize) % self.shelves()
    }

    fn locked<R>(
        self,
        shelf: usize,
        mode: pg_sys::LWLockMode::Type,
        work: impl FnOnce(Shelf<'static>) -> R,
    ) -> R {
        let start = shelf * self.entries_per_shelf;
        let shelf_entries = Shelf(&self.entries[start..start + self.entries_per_shelf]);
        // SAFETY: the lock was initialised with the memory. `work` raises no error of the server's.
        unsafe {
            let lock = &raw mut (*self.locks.add(shelf)).lock;
            pg_sys::LWLockAcquire(lock, mode);
            let result = work(shelf_entries);
            pg_sys::LWLockRelease(lock);
            result
        }
    }

    /// Every entry, without any lock: in the postmaster, once it is alone. A process that was killed may have
    /// left one locked.
    pub fn entries(self) -> Shelf<'static> {
        Shelf(self.entries)
    }
}

/// Where the server has set no memory aside, none that could be found.
#[cfg(not(any(feature = "pg17", feature = "pg18")))]
fn find() -> Option<Board> {
    None
}

/// Where the server has set no memory aside, such as can be made at any time.
#[cfg(any(feature = "pg17", feature = "pg18"))]
fn find() -> Option<Board> {
    // Whoever preloads with a size of 0 wants none. Otherwise all must agree whether there is one, so what
    // the setting says now does not count.
    // SAFETY: a flag of the server's.
    if PRELOADED.get() || !unsafe { pg_sys::IsUnderPostmaster } {
        return None;
    }
    on_demand::find()
}
