//! What a claim looks at before it decides.

use chrono::{DateTime, TimeDelta, Utc};
use pg_claims_core::lease::Lease;
use pg_claims_core::outcome::{Hold, Owner, Progress};
use pg_claims_core::{age, text};
use pgrx::PgSqlErrorCode;

use crate::error::{ClaimError, Result};
use crate::guc;
use crate::pg::time;
use crate::spi::session::Session;
use crate::spi::statement::{Db, required};
use crate::spi::table::layout::sessions;
use crate::spi::table::{Key, Name, Snapshot, Table, TableRow};
use crate::spi::{conflict, directive, guard, heartbeat, hold};

/// The session, the SD and the SD's owner at one moment.
#[derive(Debug)]
pub struct Picture {
    /// The session, if it was ever registered.
    pub session: Option<Session>,
    /// Whether another transaction is writing it.
    pub is_session_contested: bool,
    /// The SD, if the backlog has it.
    pub sd: Option<Sd>,
    /// Who holds the SD, and whether that session's lease has expired.
    pub owner: Option<(Owner, bool)>,
    /// Whether the owner's heartbeat lies in the future.
    pub is_owner_ahead: bool,
    /// When the picture was taken.
    pub at: DateTime<Utc>,
}

/// An SD.
#[derive(Debug)]
pub struct Sd {
    /// Its canonical id.
    pub sd_id: String,
    /// Its status.
    pub status: Option<String>,
    /// Whether it is finished.
    pub is_terminal: bool,
    /// Whether a person has stopped it.
    pub hold: Option<Hold>,
    /// Whether there are SDs that must not be worked on at the same time.
    pub has_conflicts: bool,
}

/// Looks, without waiting for anybody and without writing anything.
pub fn look(db: &Db<'_>, session_id: Option<&str>, sd_id: &str) -> Result<Picture> {
    look_at(db, session_id, sd_id, false)
}

/// The same before the SD is locked and looked at again: where the backlog says that nobody holds it, its owner is not
/// searched for.
pub fn glance(db: &Db<'_>, session_id: &str, sd_id: &str) -> Result<Picture> {
    look_at(db, Some(session_id), sd_id, true)
}

fn look_at(
    db: &Db<'_>,
    session_id: Option<&str>,
    sd_id: &str,
    trusts_backlog: bool,
) -> Result<Picture> {
    let found = directive::find(db, sd_id)?;
    let table = Table::to_read(db, Name::Sessions)?;
    let snapshot = Snapshot::take();
    let find = |index, key: &str| table.find(&snapshot, index, Key::Text(key));
    let row = session_id.and_then(|session_id| find(sessions::BY_SESSION_ID, session_id));
    let is_session_contested = row.as_ref().is_some_and(TableRow::is_contested);
    let session = row.map(|row| Session::read(&row)).transpose()?;
    let mut holder = None;
    let mut sd = None;
    if let Some(found) = found {
        if !(trusts_backlog && found.says_free) {
            let row = find(sessions::BY_SD_ID, &found.sd_id);
            holder = row.map(|row| Session::read(&row)).transpose()?;
        }
        sd = Some(Sd {
            hold: hold::find(db, &snapshot, &found.sd_id)?,
            has_conflicts: conflict::any(db, &snapshot, &found.sd_id)?,
            sd_id: found.sd_id,
            status: found.status,
            is_terminal: found.is_terminal,
        });
    }
    let at = time::now();
    let mut picture =
        Picture { session, is_session_contested, sd, owner: None, is_owner_ahead: false, at };
    if let Some(holder) = holder {
        let lease = holder.lease(heartbeat::latest_of(db, &holder)?);
        picture.is_owner_ahead = lease.heartbeat_at > at + TimeDelta::seconds(1);
        let is_stale = lease.is_stale(&guc::lease_rules(), at);
        picture.owner = Some((owner(holder, lease, is_stale, at)?, is_stale));
    }
    Ok(picture)
}

/// Under REPEATABLE READ and SERIALIZABLE: error 40001 if the SD, which this transaction has locked, was stopped
/// since its snapshot or is in a conflict that this does not show, or no longer in one.
pub fn see_latest_stops(db: &Db<'_>, sd_id: &str) -> Result<()> {
    if !time::has_transaction_snapshot() {
        return Ok(());
    }
    let (kept, latest) = (Snapshot::take(), Snapshot::take_latest());
    let stops = |snapshot| -> Result<_> {
        Ok((hold::find(db, snapshot, sd_id)?.is_some(), conflict::open_pairs(db, snapshot, sd_id)?))
    };
    if stops(&kept)? == stops(&latest)? { Ok(()) } else { Err(ClaimError::Serialization) }
}

fn owner(holder: Session, lease: Lease, is_stale: bool, at: DateTime<Utc>) -> Result<Owner> {
    let rules = guc::lease_rules();
    let reclaimable_at = lease.reclaimable_at(&rules);
    let claim_id = required(holder.claim_id, "claude_sessions.claim_id")?;
    Ok(Owner {
        session_id: holder.session_id,
        heartbeat_age: age::age(lease.heartbeat_at, at),
        hostname: holder.hostname,
        tty: holder.tty,
        codebase: holder.codebase,
        track: holder.track,
        claimed_at: required(holder.claimed_at, "claude_sessions.claimed_at")?,
        claim_id,
        silent_until: lease.announced_silence(&rules, at),
        progress: holder.progress_at.map(|at| Progress { at, note: holder.progress_note }),
        // Only a stale owner's guard makes a difference.
        guarded: is_stale && guard::is_held(claim_id),
        kept_until: (is_stale && reclaimable_at > at).then_some(reclaimable_at),
    })
}

impl Picture {
    /// The error for a direct write that claims the SD although this owner has it.
    pub fn claimed_by_another(&self, sd_id: &str) -> ClaimError {
        let detail = self.owner.as_ref().map(|(owner, _)| {
            format!(
                "Session \"{}\" holds it, heartbeat {}, hostname {}, tty {}, codebase {}.",
                owner.session_id,
                age::human(owner.heartbeat_age),
                text::told(&owner.hostname),
                text::told(&owner.tty),
                text::told(&owner.codebase),
            )
        });
        ClaimError::DirectWrite {
            code: PgSqlErrorCode::ERRCODE_UNIQUE_VIOLATION,
            message: format!("SD \"{sd_id}\" is already claimed"),
            detail,
            hint: "Release it there first; claim_sd() takes over from a stale session.",
        }
    }
}
