//! Choosing from the extension's own backlog, without a statement: most of what that takes is spent before
//! it reads the first row.
//!
//! By the rules of `v_sd_queue`; what this cannot tell of an SD is left to the statement. The claim looks
//! again at all but the SDs that this one waits for.

use serde_json::Value;

use super::Choice;
use crate::error::Result;
use crate::spi::row::Row;
use crate::spi::session::Session;
use crate::spi::statement::Db;
use crate::spi::table::layout::directives as column;
use crate::spi::table::layout::sessions;
use crate::spi::table::{Key, Lock, Name, Snapshot, Table, TableRow};
use crate::spi::{conflict, directive, guard, heartbeat, hold};

/// So many SDs are asked about one by one; then one statement for all of them is quicker.
const MOST_UNKNOWN: usize = 8;

/// Chooses and locks the first eligible SD that nobody has locked. The outer `None` where that cannot be done
/// here; `by_statement` chooses and locks one of which only a statement can tell whether it is eligible.
pub fn next(
    db: &Db<'_>,
    track: Option<&str>,
    passed: &[String],
    by_statement: impl Fn(&str) -> Result<Option<Choice>>,
) -> Result<Option<Option<Choice>>> {
    let backlog = Table::to_read(db, Name::Directives)?;
    let sessions = Table::to_read(db, Name::Sessions)?;
    let snapshot = Snapshot::take();
    if !backlog.has(column::BY_PARENT) {
        return Ok(None);
    }
    // The claim refuses an SD of which the backlog was wrong to say that nobody holds it; then it is not
    // believed again.
    let trusts_backlog = passed.is_empty();
    let mut choice = None;
    let mut unknown = 0;
    let walked = backlog.walk(&snapshot, column::IN_QUEUE, |row| {
        pgrx::check_for_interrupts!();
        let sd_id = row.required_text(column::SD_ID, "strategic_directives_v2.sd_id")?;
        if track.is_some_and(|track| !row.says(column::TRACK, track)) || passed.contains(&sd_id) {
            return Ok(false);
        }
        if directive::is_terminal(db, row.text(column::STATUS)?.as_deref())?
            || !(trusts_backlog && directive::says_free(row)?)
                && is_claimed(db, &sessions, &snapshot, &sd_id)?
        {
            return Ok(false);
        }
        choice = match is_eligible(db, &backlog, &snapshot, &sd_id, row)? {
            Some(true) => lock(db, &snapshot, &sd_id, row)?,
            Some(false) => None,
            None => {
                unknown += 1;
                if unknown > MOST_UNKNOWN {
                    return Ok(true);
                }
                by_statement(&sd_id)?
            }
        };
        Ok(choice.is_some())
    });
    if unknown > MOST_UNKNOWN {
        return Ok(None);
    }
    walked.map(|walked| walked.map(|_| choice)).transpose()
}

/// Whether the SD, which is unfinished and which nobody holds, could be claimed. `None` where only a statement
/// can tell.
fn is_eligible(
    db: &Db<'_>,
    backlog: &Table,
    snapshot: &Snapshot,
    sd_id: &str,
    row: &TableRow,
) -> Result<Option<bool>> {
    if hold::find(db, snapshot, sd_id)?.is_some() {
        return Ok(Some(false));
    }
    let is_part = |part: &TableRow| {
        Ok(part.says(column::PARENT_SD_ID, sd_id)
            && !directive::is_terminal(db, part.text(column::STATUS)?.as_deref())?)
    };
    if backlog.any(snapshot, column::BY_PARENT, Key::Text(sd_id), is_part)? {
        return Ok(Some(false));
    }
    let is_free = match waits(db, backlog, snapshot, row)? {
        Some(false) => {
            !conflict::any(db, snapshot, sd_id)?
                || conflict::live_opponent(db, sd_id, "")?.is_none()
        }
        Some(true) => false,
        None => return Ok(None),
    };
    Ok(Some(is_free))
}

/// Whether a live session holds the SD.
fn is_claimed(db: &Db<'_>, sessions: &Table, snapshot: &Snapshot, sd_id: &str) -> Result<bool> {
    let Some(holder) = sessions.find(snapshot, sessions::BY_SD_ID, Key::Text(sd_id)) else {
        return Ok(false);
    };
    let holder = Session::read(&holder)?;
    let lease = holder.lease(heartbeat::latest_of(db, &holder)?);
    Ok(guard::is_live(&lease, holder.claim_id).unwrap_or(false))
}

/// Whether the SD waits for another one. `None` where its dependencies are not plain keys.
fn waits(
    db: &Db<'_>,
    backlog: &Table,
    snapshot: &Snapshot,
    row: &TableRow,
) -> Result<Option<bool>> {
    let Some(text) = row.json_text(column::DEPENDENCIES) else {
        return Ok(Some(false));
    };
    // The server takes what is nested more deeply, and larger numbers.
    let keys = match serde_json::from_str(&text) {
        Ok(Value::Null) => return Ok(Some(false)),
        Ok(Value::Array(keys)) => keys,
        Ok(_) => return Ok(Some(true)),
        Err(_) => return Ok(None),
    };
    for key in keys {
        let key = match key {
            Value::String(key) => key,
            Value::Null => return Ok(Some(true)),
            _ => return Ok(None),
        };
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
fn lock(db: &Db<'_>, snapshot: &Snapshot, sd_id: &str, seen: &TableRow) -> Result<Option<Choice>> {
    let Lock::Held(row) = directive::try_lock_found(db, snapshot, seen)? else {
        return Ok(None);
    };
    let is_as_seen = row.says(column::SD_ID, sd_id)
        && !directive::is_terminal(db, row.text(column::STATUS)?.as_deref())?
        && row.json_text(column::DEPENDENCIES) == seen.json_text(column::DEPENDENCIES)
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
