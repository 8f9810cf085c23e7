//! The guard: holding a claim until the transaction ends.
//!
//! A guard locks the acquisition's row in sd_claims, which whoever ends the claim must write: a
//! takeover, a release, the reaper, the completion of the SD. Heartbeats, views and refusals do not
//! touch that row.
//!
//! It also takes an advisory lock, by which others see it without waiting: a claim that meets an open
//! guard is refused, as an open transaction is a sign of life.

use std::cell::{Cell, RefCell};

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
use crate::pg::lock::{Class, Mode, Tag, Until};
use crate::pg::transaction::{self, End, SavepointEnd};
use crate::pg::{backend, time};

fn tag_of(claim_id: i64) -> Tag {
    Tag::of(Class::Guard, claim_id.cast_unsigned())
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
    let is_free = tag.try_acquire(Mode::RowExclusive, Until::Released);
    if is_free {
        tag.release(Mode::RowExclusive, Until::Released);
    }
    !is_free
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
    // Waits at most for a look of somebody else's.
    tag_of(claim_id).acquire(Mode::Share, Until::TransactionEnds);
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
            tag_of(claim_id).await_holders(Mode::RowExclusive);
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

/// Asks the server to tell how transactions and savepoints end.
pub(super) fn init() {
    transaction::at_end(transaction_ends);
    transaction::at_savepoint_end(savepoint_ends);
}

/// Lets this transaction write rows of the SD in guarded tables.
pub fn remember(sd_id: &str) {
    let within = backend::savepoint();
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

fn transaction_ends(end: End) {
    if end != End::PreCommit && IS_USED.replace(false) {
        ASSERTED.with_borrow_mut(Vec::clear);
    }
}

fn savepoint_ends(end: SavepointEnd) {
    if !IS_USED.get() {
        return;
    }
    ASSERTED.with_borrow_mut(|asserted| {
        if end.is_rolled_back {
            asserted.retain(|known| known.within != end.savepoint);
        }
        for known in asserted.iter_mut().filter(|known| known.within == end.savepoint) {
            known.within = end.parent;
        }
    });
}
