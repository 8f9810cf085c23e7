//! The shared memory through which sessions, the launcher and database workers speak.
//!
//! The launcher makes it when it starts and tells its handle in its own `application_name`, where
//! every process can find it: so it works without preloading. It holds nothing that must survive.
//! When the launcher ends, the memory is marked closed, and everybody looks for the next one.

use std::cell::RefCell;
use std::ffi::{CStr, CString};
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::atomic::{
    AtomicBool, AtomicI64, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering,
};
use std::time::Duration;

use pgrx::pg_sys;

use super::LAUNCHER_TYPE;
use crate::pg::time;
use crate::service;

/// How many databases can be told apart. Those beyond are not served; the launcher says so.
pub const MAX_DATABASES: usize = 256;

/// Tells this version's memory from any other's.
const MAGIC: u64 = 0x7067_636c_6169_6d03;

/// What the launcher's `application_name` begins with; the handle follows.
const NAME_PREFIX: &str = "pg_claims launcher ";

/// All accesses are sequentially consistent: they are rare, and whoever announces work and then
/// asks whether a worker runs must not see the two in another order than the worker.
const ORDER: Ordering = Ordering::SeqCst;

/// The memory.
#[repr(C)]
pub struct Control {
    magic: AtomicU64,
    /// Set when the launcher ends.
    closed: AtomicBool,
    /// The list of databases is out of date.
    rescan: AtomicBool,
    /// Some database waits for a worker because too many run: those that run should not stay.
    crowded: AtomicBool,
    /// No worker could be started, as no slot of the server's was free.
    starved: AtomicBool,
    launcher_latch: AtomicUsize,
    /// When the launcher made this, in the server's microseconds.
    made_at: AtomicI64,
    slots: [Slot; MAX_DATABASES],
}

/// One database.
#[repr(C)]
pub struct Slot {
    database: AtomicU32,
    /// A [`Kind`].
    kind: AtomicU8,
    /// There is something to do.
    pending: AtomicBool,
    /// A worker is there, or is being started.
    running: AtomicBool,
    /// After how many milliseconds the worker must come back by itself, as time alone may change
    /// something; 0: it need not.
    interval: AtomicU32,
    worker_latch: AtomicUsize,
    /// Grows while the worker gets on.
    turns: AtomicU32,
    /// The claim at which the reaper was last; the next worker goes on behind it.
    reaped_to: AtomicI64,
    /// When the names of renamed roles were last written, in the server's microseconds.
    renamed_at: AtomicI64,
}

/// What is known of a database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Nobody has looked yet.
    Unknown,
    /// It has the extension.
    Served,
    /// It has not.
    Other,
}

impl Slot {
    /// The database's id, if the slot is in use.
    pub fn database(&self) -> Option<pg_sys::Oid> {
        match self.database.load(ORDER) {
            0 => None,
            database => Some(pg_sys::Oid::from(database)),
        }
    }

    /// What is known of the database.
    pub fn kind(&self) -> Kind {
        match self.kind.load(ORDER) {
            1 => Kind::Served,
            2 => Kind::Other,
            _ => Kind::Unknown,
        }
    }

    /// Remembers what the database is.
    pub fn set_kind(&self, kind: Kind) {
        let code = match kind {
            Kind::Unknown => 0,
            Kind::Served => 1,
            Kind::Other => 2,
        };
        self.kind.store(code, ORDER);
    }

    /// Whether there is something to do.
    pub fn is_pending(&self) -> bool {
        self.pending.load(ORDER)
    }

    /// Takes what there is to do.
    pub fn take_pending(&self) -> bool {
        self.pending.swap(false, ORDER)
    }

    /// Whether a worker is there.
    pub fn is_running(&self) -> bool {
        self.running.load(ORDER)
    }

    /// Remembers whether a worker is there.
    pub fn set_running(&self, running: bool) {
        self.running.store(running, ORDER);
    }

    /// There is something (more) to do.
    pub fn set_pending(&self) {
        self.pending.store(true, ORDER);
    }

    /// After what time the worker must come back by itself, if it must.
    pub fn interval(&self) -> Option<Duration> {
        match self.interval.load(ORDER) {
            0 => None,
            milliseconds => Some(Duration::from_millis(milliseconds.into())),
        }
    }

    /// Remembers after what time the worker must come back by itself, if it must.
    pub fn set_interval(&self, interval: Option<Duration>) {
        let milliseconds = interval.map_or(0, |time| time.as_millis().clamp(1, u32::MAX.into()));
        self.interval.store(milliseconds as u32, ORDER);
    }

    /// Remembers where to wake the worker.
    pub fn set_worker_latch(&self, latch: *mut pg_sys::Latch) {
        self.worker_latch.store(latch.addr(), ORDER);
    }

    /// The worker gets on.
    pub fn take_turn(&self) {
        self.turns.fetch_add(1, ORDER);
    }

    /// How often it has got on; wraps around.
    pub fn turns(&self) -> u32 {
        self.turns.load(ORDER)
    }

    /// The claim at which the reaper was last; 0: it has come to the end.
    pub fn reaped_to(&self) -> i64 {
        self.reaped_to.load(ORDER)
    }

    /// Remembers the claim at which the reaper is.
    pub fn set_reaped_to(&self, claim_id: i64) {
        self.reaped_to.store(claim_id, ORDER);
    }

    /// When the names of renamed roles were last written, in the server's microseconds.
    pub fn renamed_at(&self) -> i64 {
        self.renamed_at.load(ORDER)
    }

    /// Remembers when the names of renamed roles were written.
    pub fn set_renamed_at(&self, at: i64) {
        self.renamed_at.store(at, ORDER);
    }

    fn clear(&self, database: u32) {
        self.database.store(0, ORDER);
        self.kind.store(0, ORDER);
        self.pending.store(false, ORDER);
        self.running.store(false, ORDER);
        self.interval.store(0, ORDER);
        self.reaped_to.store(0, ORDER);
        self.renamed_at.store(0, ORDER);
        self.worker_latch.store(0, ORDER);
        self.database.store(database, ORDER);
    }
}

impl Control {
    /// All slots.
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// Makes the slots those of `databases`. Returns how many found no room.
    pub fn set_databases(&self, databases: &[pg_sys::Oid]) -> usize {
        let gone =
            |slot: &&Slot| slot.database().is_some_and(|database| !databases.contains(&database));
        for slot in self.slots.iter().filter(gone).filter(|slot| !slot.is_running()) {
            slot.clear(0);
        }
        let mut without_room = 0;
        for database in databases {
            if self.slot_of(*database).is_some() {
                continue;
            }
            match self.slots.iter().find(|slot| slot.database().is_none()) {
                Some(slot) => slot.clear(database.to_u32()),
                None => without_room += 1,
            }
        }
        without_room
    }

    /// The slot of a database.
    pub fn slot_of(&self, database: pg_sys::Oid) -> Option<&Slot> {
        self.slots.iter().find(|slot| slot.database() == Some(database))
    }

    /// Whether the database is one of those that workers are sent to, or can become one.
    pub fn may_serve(&self, database: pg_sys::Oid) -> bool {
        self.slots.iter().any(|slot| slot.database().is_none_or(|known| known == database))
    }

    /// When the launcher made this, in the server's microseconds. A transaction that began before, or soon after, may not
    /// find it when it is committed, and tells nobody.
    pub fn made_at(&self) -> i64 {
        self.made_at.load(ORDER)
    }

    /// Whether the launcher has ended.
    pub fn is_closed(&self) -> bool {
        self.closed.load(ORDER)
    }

    /// Whether some database waits for another's worker to end.
    pub fn is_crowded(&self) -> bool {
        self.crowded.load(ORDER)
    }

    /// Remembers whether some database waits for another's worker to end.
    pub fn set_crowded(&self, crowded: bool) {
        self.crowded.store(crowded, ORDER);
    }

    /// Whether the server has no slot free for a database worker.
    pub fn is_starved(&self) -> bool {
        self.starved.load(ORDER)
    }

    /// Remembers whether the server has no slot free; returns what was remembered before.
    pub fn set_starved(&self, starved: bool) -> bool {
        self.starved.swap(starved, ORDER)
    }

    /// The list of databases is out of date.
    pub fn request_rescan(&self) {
        self.rescan.store(true, ORDER);
    }

    /// Whether the list of databases is out of date; takes the note of it.
    pub fn take_rescan(&self) -> bool {
        self.rescan.swap(false, ORDER)
    }

    /// Tells that there is something to do in a database. Neither allocates nor fails: it may be
    /// called when a transaction has just been committed.
    pub fn wake(&self, database: pg_sys::Oid) {
        let Some(slot) = self.slot_of(database) else {
            self.rescan.store(true, ORDER);
            return set_latch(&self.launcher_latch);
        };
        if slot.kind() == Kind::Other {
            slot.set_kind(Kind::Unknown);
        }
        slot.pending.store(true, ORDER);
        if slot.is_running() {
            set_latch(&slot.worker_latch);
        } else {
            set_latch(&self.launcher_latch);
        }
    }
}

/// Wakes the process that waits on a latch, if there is one.
fn set_latch(latch: &AtomicUsize) {
    let latch = std::ptr::with_exposed_provenance_mut::<pg_sys::Latch>(latch.load(ORDER));
    if !latch.is_null() {
        // SAFETY: processes' latches lie in the server's main shared memory, at one address in all
        // processes and for as long as the server runs. If the process has ended, the next one that
        // uses the latch is woken for nothing.
        unsafe { pg_sys::SetLatch(latch) };
    }
}

/// The launcher's: makes the memory, and tells everybody where it is.
pub fn create() -> &'static Control {
    // SAFETY: dsm_create either gives memory of that size, filled with zeroes by the system and
    // aligned for any type, or raises an error. Outside of a transaction there is no resource owner,
    // so it stays mapped until the process ends. All fields may be zero.
    unsafe {
        let segment = pg_sys::dsm_create(size_of::<Control>(), 0);
        pg_sys::dsm_pin_mapping(segment);
        let memory = pg_sys::dsm_segment_address(segment);
        std::ptr::write_bytes(memory.cast::<u8>(), 0, size_of::<Control>());
        let control = &*memory.cast::<Control>();
        control.launcher_latch.store(pg_sys::MyLatch.expose_provenance(), ORDER);
        control.made_at.store(time::now_in_microseconds(), ORDER);
        control.rescan.store(true, ORDER);
        control.magic.store(MAGIC, ORDER);
        pg_sys::before_shmem_exit(Some(close), pg_sys::Datum::from(memory));
        let name = format!("{NAME_PREFIX}{}", pg_sys::dsm_segment_handle(segment));
        if let Ok(name) = CString::new(name) {
            // As a setting that no configuration file overrides: reading that anew would otherwise
            // put the file's name in its place.
            pg_sys::SetConfigOption(
                c"application_name".as_ptr(),
                name.as_ptr(),
                pg_sys::GucContext::PGC_USERSET,
                pg_sys::GucSource::PGC_S_OVERRIDE,
            );
        }
        control
    }
}

/// When the launcher ends, in whatever way the server lets it.
extern "C-unwind" fn close(_code: i32, memory: pg_sys::Datum) {
    // SAFETY: the memory is detached only after these callbacks have run.
    let control = unsafe { &*memory.cast_mut_ptr::<Control>() };
    control.closed.store(true, ORDER);
}

/// What a look for the launcher found.
pub enum Found {
    /// It is there, and this is its memory.
    Ready(u32),
    /// It is there and not ready yet.
    Starting,
    /// It is not there.
    Nothing,
}

/// Looks for the launcher among the server's processes.
pub fn find() -> Found {
    let mut found = Found::Nothing;
    service::each_process(|process| {
        if process.st_backendType != pg_sys::BackendType::B_BG_WORKER || !is_launcher(process) {
            return;
        }
        let handle =
            service::name_of(process).and_then(|name| name.strip_prefix(NAME_PREFIX)?.parse().ok());
        match handle {
            Some(handle) => found = Found::Ready(handle),
            None if matches!(found, Found::Nothing) => found = Found::Starting,
            None => {}
        }
    });
    found
}

fn is_launcher(process: &pg_sys::PgBackendStatus) -> bool {
    // SAFETY: gives null or a null-terminated string, valid until the next call.
    unsafe {
        let kind = pg_sys::GetBackgroundWorkerTypeByPid(process.st_procpid);
        !kind.is_null() && CStr::from_ptr(kind) == LAUNCHER_TYPE
    }
}

/// Memory that this process is attached to, mapped for as long as somebody has this.
pub struct Attached {
    segment: *mut pg_sys::dsm_segment,
    control: NonNull<Control>,
}

impl Attached {
    /// Attaches to the memory of that handle. `None` where that is gone, or is not this version's.
    fn to(handle: u32) -> Option<Self> {
        // SAFETY: dsm_attach gives null for a handle that is gone; a segment that is mapped already (the launcher's own) is
        // not attached to, as only sessions and database workers come here. It stays mapped until this is dropped.
        let attached = unsafe {
            let segment = pg_sys::dsm_attach(handle);
            if segment.is_null() {
                return None;
            }
            pg_sys::dsm_pin_mapping(segment);
            let control = NonNull::new(pg_sys::dsm_segment_address(segment).cast())?;
            Self { segment, control }
        };
        // SAFETY: attached; its length comes before its content.
        let is_ours = unsafe {
            pg_sys::dsm_segment_map_length(attached.segment) >= size_of::<Control>()
                && attached.control.as_ref().magic.load(ORDER) == MAGIC
        };
        is_ours.then_some(attached)
    }
}

impl Deref for Attached {
    type Target = Control;

    fn deref(&self) -> &Control {
        // SAFETY: mapped while this is there, of that size, and valid in any state.
        unsafe { self.control.as_ref() }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // SAFETY: attached once, and nobody has a reference to its content any more.
        unsafe { pg_sys::dsm_detach(self.segment) };
    }
}

thread_local! {
    /// The server itself detaches it when the process ends.
    static ATTACHED: RefCell<ManuallyDrop<Option<Rc<Attached>>>> =
        const { RefCell::new(ManuallyDrop::new(None)) };
}

/// The memory that this process is attached to, if its launcher still lives. Neither allocates nor fails.
pub fn attached() -> Option<Rc<Attached>> {
    let attached = ATTACHED.with_borrow(|attached| Option::clone(attached));
    attached.filter(|control| !control.is_closed())
}

/// Attaches this process to the memory of that handle, in place of what it is attached to.
pub fn attach(handle: u32) -> Option<Rc<Attached>> {
    drop(ATTACHED.with_borrow_mut(|attached| attached.take()));
    let attached = Attached::to(handle).map(Rc::new);
    ATTACHED.with_borrow_mut(|kept| **kept = attached.clone());
    attached
}
