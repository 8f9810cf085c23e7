//! Choosing from the extension's own backlog, without a statement: most of what that takes is spent before
//! it reads the first row.
//!
//! By the rules of `v_sd_queue`. What is chosen wrongly costs no more than time: the claim refuses it, and
//! the queue passes it over. What this cannot tell is left to the statement.

use serde_json::Value;

use super::{Among, Choice};
use crate::error::Result;
use crate::guc;
use crate::spi::row::Row;
use crate::spi::session::Session;
use crate::spi::statement::Db;
use crate::spi::table::layout::directives as column;
use crate::spi::table::layout::sessions;
use crate::spi::table::{Key, Lock, Name, Snapshot, Table, TableRow, Wait};
use crate::spi::{conflict, directive, guard, heartbeat, hold, time};

/// What comes of a look.
pub enum Look {
    /// The SD that was chosen and locked, unless there is none.
    Done(Option<Choice>),
    /// Only the statement can tell.
    Undecided,
}

/// What is known of an SD in the queue.
enum Eligible {
    Yes,
    No,
    Unknown,
}

/// Chooses and locks the first eligible SD that nobody has locked.
pub fn next(db: &Db<'_>, among: Among<'_>, passed: &[String]) -> Result<Look> {
    let track = match among {
        Among::All => None,
        Among::Track(track) => Some(track),
        Among::These { .. } => return Ok(Look::Undecided),
    };
    let backlog = Table::to_read(db, Name::Directives)?;
    let sessions = Table::to_read(db, Name::Sessions)?;
    let snapshot = Snapshot::take();
    let mut look = Look::Done(None);
    let walked = backlog.walk(&snapshot, column::IN_QUEUE, |row| {
        pgrx::check_for_interrupts!();
        let sd_id = row.required_text(column::SD_ID, "strategic_directives_v2.sd_id")?;
        if track.is_some_and(|track| !row.says(column::TRACK, track)) || passed.contains(&sd_id) {
            return Ok(false);
        }
        match is_eligible(db, &backlog, &sessions, &snapshot, &sd_id, row)? {
            Eligible::No => Ok(false),
            Eligible::Unknown => {
                look = Look::Undecided;
                Ok(true)
            }
            Eligible::Yes => {
                let chosen = lock(db, &sd_id, row)?;
                let is_chosen = chosen.is_some();
                look = Look::Done(chosen);
                Ok(is_chosen)
            }
        }
    });
    match walked {
        Some(walked) => walked.map(|_| look),
        None => Ok(Look::Undecided),
    }
}

/// Whether the SD could be claimed.
fn is_eligible(
    db: &Db<'_>,
    backlog: &Table,
    sessions: &Table,
    snapshot: &Snapshot,
    sd_id: &str,
    row: &TableRow,
) -> Result<Eligible> {
    if directive::is_terminal(db, row.text(column::STATUS)?.as_deref())?
        || is_claimed(db, sessions, snapshot, sd_id, row)?
        || hold::find(db, snapshot, sd_id)?.is_some()
    {
        return Ok(Eligible::No);
    }
    let Some(has_parts) =
        backlog.any_hashed(snapshot, column::BY_PARENT, Key::Text(sd_id), |part| {
            part.says(column::PARENT_SD_ID, sd_id)
        })
    else {
        return Ok(Eligible::Unknown);
    };
    if has_parts {
        return Ok(Eligible::No);
    }
    match waits(db, backlog, snapshot, row)? {
        Some(false) => {}
        Some(true) => return Ok(Eligible::No),
        None => return Ok(Eligible::Unknown),
    }
    let opponent = match conflict::any(db, snapshot, sd_id)? {
        true => conflict::live_opponent(db, sd_id, "")?,
        false => None,
    };
    Ok(if opponent.is_some() { Eligible::No } else { Eligible::Yes })
}

/// Whether a live session holds the SD.
fn is_claimed(
    db: &Db<'_>,
    sessions: &Table,
    snapshot: &Snapshot,
    sd_id: &str,
    row: &TableRow,
) -> Result<bool> {
    if directive::says_free(row)? {
        return Ok(false);
    }
    let Some(holder) = sessions.find(snapshot, sessions::BY_SD_ID, Key::Text(sd_id)) else {
        return Ok(false);
    };
    let holder = Session::read(&holder)?;
    let lease = holder.lease(heartbeat::latest_of(db, &holder)?);
    Ok(lease.reclaimable_at(&guc::lease_rules()) > time::now()
        || holder.claim_id.is_some_and(guard::is_held))
}

/// Whether the SD waits for another one. `None` where its dependencies are something else than texts.
fn waits(
    db: &Db<'_>,
    backlog: &Table,
    snapshot: &Snapshot,
    row: &TableRow,
) -> Result<Option<bool>> {
    let keys = match row.json(column::DEPENDENCIES) {
        None | Some(Value::Null) => return Ok(Some(false)),
        Some(Value::Array(keys)) => keys,
        Some(_) => return Ok(Some(true)),
    };
    for key in keys {
        let Value::String(key) = key else { return Ok(None) };
        let Some(other) = backlog.find(snapshot, column::BY_SD_ID, Key::Text(&key)) else {
            return Ok(Some(true));
        };
        if !directive::is_terminal(db, other.text(column::STATUS)?.as_deref())? {
            return Ok(Some(true));
        }
    }
    Ok(Some(false))
}

/// Locks the SD, if it is free and, in what matters, still as it was seen. What becomes of the SDs that it
/// waits for counts as having come after the claim.
fn lock(db: &Db<'_>, sd_id: &str, seen: &TableRow) -> Result<Option<Choice>> {
    let Lock::Held(row) = directive::lock_own(db, sd_id, Wait::Skip)? else {
        return Ok(None);
    };
    let is_as_seen = !directive::is_terminal(db, row.text(column::STATUS)?.as_deref())?
        && row.json(column::DEPENDENCIES) == seen.json(column::DEPENDENCIES)
        && row.text(column::TRACK)? == seen.text(column::TRACK)?
        && row.flag(column::IS_WORKING_ON)? == seen.flag(column::IS_WORKING_ON)?
        && row.text(column::ACTIVE_SESSION_ID)? == seen.text(column::ACTIVE_SESSION_ID)?;
    if !is_as_seen {
        return Ok(None);
    }
    Ok(Some(Choice {
        sd_id: sd_id.to_owned(),
        title: row.text(column::TITLE)?,
        track: row.text(column::TRACK)?,
    }))
}
