//! Choosing from the extension's own backlog, without a statement: most of what that takes is spent before
//! it reads the first row.
//!
//! By the rules of `v_sd_queue`. What is chosen wrongly costs no more than time: the claim refuses it, and
//! the queue passes it over. What this cannot tell of an SD is left to the statement.

use serde_json::Value;

use super::Choice;
use crate::error::Result;
use crate::guc;
use crate::spi::row::Row;
use crate::spi::session::Session;
use crate::spi::statement::Db;
use crate::spi::table::layout::directives as column;
use crate::spi::table::layout::sessions;
use crate::spi::table::{Key, Lock, Name, Snapshot, Table, TableRow, Wait};
use crate::spi::{conflict, directive, guard, heartbeat, hold, time};

/// What is known of an SD in the queue.
enum Eligible {
    Yes,
    No,
    Unknown,
}

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
    let mut choice = None;
    let walked = backlog.walk(&snapshot, column::IN_QUEUE, |row| {
        pgrx::check_for_interrupts!();
        let sd_id = row.required_text(column::SD_ID, "strategic_directives_v2.sd_id")?;
        if track.is_some_and(|track| !row.says(column::TRACK, track)) || passed.contains(&sd_id) {
            return Ok(false);
        }
        choice = match is_eligible(db, &backlog, &sessions, &snapshot, &sd_id, row)? {
            Eligible::Yes => lock(db, &sd_id, row)?,
            Eligible::No => None,
            Eligible::Unknown => by_statement(&sd_id)?,
        };
        Ok(choice.is_some())
    });
    walked.map(|walked| walked.map(|_| choice)).transpose()
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
    // That index has unfinished ones only.
    let is_part = |part: &TableRow| part.says(column::PARENT_SD_ID, sd_id);
    if backlog.any_hashed(snapshot, column::BY_PARENT, Key::Text(sd_id), is_part) {
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
