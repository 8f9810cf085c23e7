//! The guard: holding a claim until the transaction ends.
//!
//! A guard locks the acquisition's row in sd_claims, which whoever ends the claim must write: a
//! takeover, a release, the reaper, the completion of the SD. Heartbeats, views and refusals do not
//! touch that row.
//!
//! It also takes an advisory lock, by which others see it without waiting: a claim that meets an open
//! guard is refused, as an open transaction is a sign of life.

use std::cell::{Cell, RefCell};
use std::ffi::c_void;

use chrono::{DateTime, Utc};
use pg_claims_core::lease::Lease;
use pgrx::pg_sys;
use pgrx::pg_sys::BuiltinOid::INT8OID;

use super::row::Row;
use super::statement::{Db, Statement};
use super::table::layout::claims as column;
use super::table::{Key, Lock, Name, Snapshot, Table, Wait};
use super::wait;
use crate::error::Result;
use crate::guc;
use crate::identity::Role;
use crate::spi::time;

/// Sets these locks apart from those of `pg_advisory_lock`, which use 1 and 2.
const LOCK_CLASS: u16 = 3;

fn tag_of(claim_id: i64) -> pg_sys::LOCKTAG {
    // SAFETY: the database's id is set before any statement runs, and never changes.
    let database = unsafe { pg_sys::MyDatabaseId };
    pg_sys::LOCKTAG {
        locktag_field1: database.to_u32(),
        locktag_field2: (claim_id >> 32) as u32,
        locktag_field3: claim_id as u32,
        locktag_field4: LOCK_CLASS,
        locktag_type: pg_sys::LockTagType::LOCKTAG_ADVISORY as u8,
        locktag_lockmethodid: pg_sys::USER_LOCKMETHOD as u8,
    }
}

/// Whether a claim is live: its lease has not run out, or an open transaction that guards it is a sign of
/// life. `None` where only a guard could tell, of a claim that is not named.
pub fn is_live(lease: &Lease, claim_id: Option<i64>) -> Option<bool> {
    if lease.reclaimable_at(&guc::lease_rules()) > time::now() {
        return Some(true);
    }
    claim_id.map(is_held)
}

/// Whether another transaction holds a guard on the acquisition. Waits for nobody.
pub fn is_held(claim_id: i64) -> bool {
    let tag = tag_of(claim_id);
    // Conflicts with a guard's mode, but not with another look.
    let mode = pg_sys::RowExclusiveLock as i32;
    // SAFETY: not waited for; released at once if it was granted.
    unsafe {
        if pg_sys::LockAcquire(&tag, mode, true, true)
            == pg_sys::LockAcquireResult::LOCKACQUIRE_NOT_AVAIL
        {
            return true;
        }
        pg_sys::LockRelease(&tag, mode, true);
    }
    false
}

/// An acquisition as its guard found it.
#[derive(Debug)]
pub struct Acquisition {
    pub sd_id: String,
    pub session_id: String,
    pub owner_role: Option<Role>,
    pub released_at: Option<DateTime<Utc>>,
    pub release_reason: Option<String>,
}

// Waits for whoever is ending the claim, and then sees that it has ended.
static HOLD: Statement = Statement::new(
    |c| {
        format!(
            "SELECT h.sd_id, h.session_id, s.session_id IS NOT NULL, h.released_at, h.release_reason, s.owner_oid
               FROM {x}.sd_claims h
               LEFT JOIN {x}.claude_sessions s ON s.session_id = h.session_id
              WHERE h.claim_id = $1 FOR SHARE OF h",
            x = c.schema
        )
    },
    &[INT8OID],
);

/// Locks the acquisition until the transaction ends. `None` when there never was one of that id.
pub fn hold(db: &Db<'_>, claim_id: i64) -> Result<Option<Acquisition>> {
    // SAFETY: waits at most for a look of somebody else's; may raise an error, which unwinds as usual.
    unsafe {
        pg_sys::LockAcquire(&tag_of(claim_id), pg_sys::ShareLock as i32, false, false);
    }
    let Some(row) = db.first_row(&HOLD, &[claim_id.into()])? else {
        return Ok(None);
    };
    Ok(Some(Acquisition {
        sd_id: row.required_text(1, "sd_claims.sd_id")?,
        session_id: row.required_text(2, "sd_claims.session_id")?,
        owner_role: if row.flag(3)? { Some(row.role(6)?) } else { None },
        released_at: row.instant(4)?,
        release_reason: row.text(5)?,
    }))
}

/// Waits until no other transaction guards the acquisition. Locks nothing, so that whoever guards it can do
/// anything meanwhile; another guard may come right after. Returns whether there was anybody to wait for.
pub fn await_others(claim_id: i64) -> Result<bool> {
    if !is_held(claim_id) {
        return Ok(false);
    }
    wait::giving_way(|| {
        while is_held(claim_id) {
            let mode = pg_sys::RowExclusiveLock as pg_sys::LOCKMODE;
            // SAFETY: waits for the transactions that hold a guard, but not for this one; may raise an error,
            // which unwinds as usual.
            unsafe { pg_sys::WaitForLockers(tag_of(claim_id), mode, false) };
        }
        Ok(())
    })?;
    Ok(true)
}

/// Locks an acquisition that is to be ended, and waits for its guards. Before its session is locked,
/// whose heartbeats must not wait for them as well.
pub fn exclude(db: &Db<'_>, claim_id: i64) -> Result<()> {
    if let Some(Lock::Busy) = lock(db, claim_id, Wait::Skip)? {
        await_others(claim_id)?;
        wait::giving_way(|| lock(db, claim_id, Wait::Block))?;
    }
    Ok(())
}

/// `None` where there is no such acquisition.
fn lock(db: &Db<'_>, claim_id: i64, wait: Wait) -> Result<Option<Lock>> {
    let table = Table::to_write(db, Name::Claims)?;
    let snapshot = Snapshot::take();
    let found = table.find(&snapshot, column::BY_CLAIM_ID, Key::Bigint(claim_id));
    found.map(|row| table.lock(&snapshot, &row, wait)).transpose()
}

/// Locks an acquisition that is to be ended, unless a guard holds it: then false. One that is not
/// there, after triggers were disabled, cannot be guarded.
pub fn try_exclude(db: &Db<'_>, claim_id: i64) -> Result<bool> {
    Ok(!matches!(lock(db, claim_id, Wait::Skip)?, Some(Lock::Busy)))
}

/// A claim that this transaction has asserted.
struct Asserted {
    sd_id: String,
    /// The subtransaction that did; its rollback takes the guard's locks along.
    within: pg_sys::SubTransactionId,
}

thread_local! {
    static ASSERTED: RefCell<Vec<Asserted>> = const { RefCell::new(Vec::new()) };
    /// Whether there may be anything to forget when a transaction ends.
    static IS_USED: Cell<bool> = const { Cell::new(false) };
}

/// Asks the server to tell how transactions and subtransactions end.
pub(super) fn init() {
    // SAFETY: runs once per process; the callbacks live as long as the library.
    unsafe {
        pg_sys::RegisterXactCallback(Some(transaction_ends), std::ptr::null_mut());
        pg_sys::RegisterSubXactCallback(Some(subtransaction_ends), std::ptr::null_mut());
    }
}

/// Lets this transaction write rows of the SD in guarded tables.
pub fn remember(sd_id: &str) {
    // SAFETY: reads a variable of this process's.
    let within = unsafe { pg_sys::GetCurrentSubTransactionId() };
    IS_USED.set(true);
    ASSERTED.with_borrow_mut(|asserted| {
        if !asserted.iter().any(|known| known.sd_id == sd_id) {
            asserted.push(Asserted { sd_id: sd_id.to_owned(), within });
        }
    });
}

/// Whether this transaction has asserted any claim.
pub fn is_guarding() -> bool {
    IS_USED.get() && ASSERTED.with_borrow(|asserted| !asserted.is_empty())
}

/// Whether this transaction has asserted a claim on the SD.
pub fn is_asserted(sd_id: &str) -> bool {
    IS_USED.get()
        && ASSERTED.with_borrow(|asserted| asserted.iter().any(|known| known.sd_id == sd_id))
}

// Neither may fail: a transaction that is ending cannot be rolled back any more.
unsafe extern "C-unwind" fn transaction_ends(event: pg_sys::XactEvent::Type, _: *mut c_void) {
    use pg_sys::XactEvent::{XACT_EVENT_ABORT, XACT_EVENT_COMMIT, XACT_EVENT_PREPARE};
    if IS_USED.get() && [XACT_EVENT_ABORT, XACT_EVENT_COMMIT, XACT_EVENT_PREPARE].contains(&event) {
        IS_USED.set(false);
        ASSERTED.with_borrow_mut(Vec::clear);
    }
}

unsafe extern "C-unwind" fn subtransaction_ends(
    event: pg_sys::SubXactEvent::Type,
    ended: pg_sys::SubTransactionId,
    parent: pg_sys::SubTransactionId,
    _: *mut c_void,
) {
    if !IS_USED.get() {
        return;
    }
    ASSERTED.with_borrow_mut(|asserted| match event {
        pg_sys::SubXactEvent::SUBXACT_EVENT_ABORT_SUB => {
            asserted.retain(|known| known.within != ended);
        }
        pg_sys::SubXactEvent::SUBXACT_EVENT_COMMIT_SUB => {
            for known in asserted.iter_mut().filter(|known| known.within == ended) {
                known.within = parent;
            }
        }
        _ => {}
    });
}
