//! sd_claims: one row per acquisition.

use chrono::{DateTime, Utc};
use pg_claims_core::outcome::LostClaim;
use pg_claims_core::queue::Queued;
use pgrx::datum::TimestampWithTimeZone;
use pgrx::pg_sys::BuiltinOid::{INT8OID, TEXTOID};

use crate::error::Result;
use crate::pg::time;
use crate::spi::intent::{self, Intent, Meaning};
use crate::spi::numbers::{self, Kind};
use crate::spi::row::Row;
use crate::spi::session::Session;
use crate::spi::statement::{Db, Statement};
use crate::spi::table::layout::claims as column;
use crate::spi::table::{Key, Name, NewRow, Snapshot, Table, TableRow};

/// An acquisition that is to be opened.
#[derive(Debug, Clone, Copy, Default)]
pub struct Opened<'a> {
    pub sd_id: &'a str,
    pub session_id: &'a str,
    pub track: Option<&'a str>,
    pub hostname: Option<&'a str>,
    pub codebase: Option<&'a str>,
    /// The acquisition that it takes the SD from.
    pub took_over: Option<i64>,
    /// It begins now, or then.
    pub not_before: Option<DateTime<Utc>>,
    /// Whether the clock may have been set back lately, as a heartbeat that lies in the future tells.
    pub may_be_set_back: bool,
    pub queued: Option<Queued<'a>>,
}

/// Opens an acquisition: its fencing token and its time. `None` when another one is open. Whoever is just opening one is
/// waited for.
pub fn open(db: &Db<'_>, opened: Opened<'_>) -> Result<Option<(i64, DateTime<Utc>)>> {
    let claim_id = next_id(db)?;
    let claimed_at = begin(db, &opened)?;
    let queued = opened.queued;
    let row = NewRow::default()
        .set(column::CLAIM_ID, claim_id)
        .set(column::SD_ID, opened.sd_id)
        .set(column::SESSION_ID, opened.session_id)
        .set(column::TRACK, opened.track)
        .set(column::HOSTNAME, opened.hostname)
        .set(column::CODEBASE, opened.codebase)
        .set(column::CLAIMED_AT, time::to_server(claimed_at)?)
        .set(column::TOOK_OVER_CLAIM_ID, opened.took_over)
        .set(column::QUEUE_REASON, queued.map(|queued| queued.reason.as_str()))
        .set(column::QUEUE_TRACK, queued.and_then(|queued| queued.track));
    Ok(add_open(db, &row)?.then_some((claim_id, claimed_at)))
}

/// Adds an acquisition that is open. The unique index decides: false where another one is.
fn add_open(db: &Db<'_>, row: &NewRow) -> Result<bool> {
    let _meaning = Meaning::to(Intent::History);
    Table::to_write(db, Name::Claims)?.insert_unless_there(db, column::OPEN_BY_SD_ID, row)
}

/// When an acquisition begins that is being opened.
fn begin(db: &Db<'_>, opened: &Opened<'_>) -> Result<DateTime<Utc>> {
    let now = time::now();
    let begin = opened.not_before.map_or(now, |then| then.max(now));
    if begin > now || opened.may_be_set_back {
        return not_before_the_last(db, opened.sd_id, begin);
    }
    Ok(begin)
}

static LAST_END: Statement = Statement::new(
    |c| {
        format!(
            "SELECT released_at FROM {}.sd_claims
              WHERE sd_id = $1 AND released_at IS NOT NULL ORDER BY claim_id DESC LIMIT 1",
            c.schema
        )
    },
    &[TEXTOID],
);

/// `at`, or when the SD's last acquisition ended if that is later, as it is where the clock was set back. Reads
/// the acquisitions from the newest one on.
pub fn not_before_the_last(db: &Db<'_>, sd_id: &str, at: DateTime<Utc>) -> Result<DateTime<Utc>> {
    let last = db.run_by_index(&LAST_END, &[sd_id.into()])?;
    let last = if last.is_empty() { None } else { last.first().instant(1)? };
    Ok(last.map_or(at, |last| last.max(at)))
}

/// The next fencing token.
pub fn next_id(db: &Db<'_>) -> Result<i64> {
    numbers::next(db, Kind::Claim)
}

/// Opens the acquisition of a session whose row holds it already. False when another one is open.
pub fn open_as(db: &Db<'_>, holder: &Session) -> Result<bool> {
    match held_by(holder)? {
        Some(row) => add_open(db, &row),
        None => Ok(false),
    }
}

/// The acquisition that a session's row tells of.
fn held_by(holder: &Session) -> Result<Option<NewRow>> {
    let Some((sd_id, claim_id)) = holder.claim() else { return Ok(None) };
    let claimed_at = holder.claimed_at.unwrap_or_else(time::now);
    let row = NewRow::default()
        .set(column::CLAIM_ID, claim_id)
        .set(column::SD_ID, sd_id)
        .set(column::SESSION_ID, holder.session_id.as_str())
        .set(column::TRACK, holder.track.as_deref())
        .set(column::HOSTNAME, holder.hostname.as_deref())
        .set(column::CODEBASE, holder.codebase.as_deref())
        .set(column::CLAIMED_AT, time::to_server(claimed_at)?);
    Ok(Some(row))
}

static DISCARD: Statement = Statement::new(
    |c| format!("DELETE FROM {}.sd_claims WHERE claim_id = $1", c.schema),
    &[INT8OID],
);

/// Takes back an acquisition that this transaction opened and could not give to its session.
pub fn discard(db: &Db<'_>, claim_id: i64) -> Result<()> {
    let _meaning = Meaning::to(Intent::History);
    db.run(&DISCARD, &[claim_id.into()])?;
    Ok(())
}

/// Under REPEATABLE READ and SERIALIZABLE: error 40001 if a claim on the SD was committed that the
/// transaction's snapshot does not show. The unique index sees all claims.
pub fn see_latest(db: &Db<'_>, sd_id: &str) -> Result<()> {
    if !time::has_transaction_snapshot() {
        return Ok(());
    }
    match open(db, Opened { sd_id, ..Opened::default() })? {
        Some((claim_id, _)) => discard(db, claim_id),
        None => Ok(()),
    }
}

/// An acquisition as its session's row tells of it.
#[derive(Debug, Clone, Copy)]
pub struct Acquisition<'a> {
    pub claim_id: i64,
    pub sd_id: &'a str,
    pub session_id: &'a str,
}

/// Closes an acquisition. False where the history does not have it open for that session and SD.
pub fn close(
    db: &Db<'_>,
    acquisition: Acquisition<'_>,
    at: DateTime<Utc>,
    reason: &str,
    taken_over_by: Option<&str>,
) -> Result<bool> {
    let Acquisition { claim_id, sd_id, session_id } = acquisition;
    intent::undo_grant(claim_id);
    let end = NewRow::default()
        .set(column::RELEASED_AT, time::to_server(at)?)
        .set(column::RELEASE_REASON, reason)
        .set(column::TAKEN_OVER_BY, taken_over_by);
    amend(db, claim_id, &end, |row| {
        row.is_null(column::RELEASED_AT)
            && row.says(column::SESSION_ID, session_id)
            && row.says(column::SD_ID, sd_id)
    })
}

/// Writes an acquisition that is as `is_it` says. False where there is none such.
fn amend(
    db: &Db<'_>,
    claim_id: i64,
    new: &NewRow,
    is_it: impl Fn(&TableRow) -> bool,
) -> Result<bool> {
    let _meaning = Meaning::to(Intent::History);
    loop {
        pgrx::check_for_interrupts!();
        let table = Table::to_write(db, Name::Claims)?;
        let snapshot = Snapshot::take();
        let found = table.find(&snapshot, column::BY_CLAIM_ID, Key::Bigint(claim_id));
        let Some(row) = found.filter(&is_it) else { return Ok(false) };
        if table.update(db, &snapshot, &row, new)?.is_some() {
            return Ok(true);
        }
    }
}

/// An acquisition that is open.
#[derive(Debug)]
pub struct Open {
    pub claim_id: i64,
    pub session_id: String,
    pub claimed_at: DateTime<Utc>,
}

/// The acquisition of an SD that is open, if one is.
pub fn open_of(db: &Db<'_>, sd_id: &str) -> Result<Option<Open>> {
    let table = Table::to_read(db, Name::Claims)?;
    let found =
        table.find_where(&Snapshot::take(), column::OPEN_BY_SD_ID, Key::Text(sd_id), |_| true);
    let read = |row: TableRow| {
        Ok(Open {
            claim_id: row.required_bigint(column::CLAIM_ID, "sd_claims.claim_id")?,
            session_id: row.required_text(column::SESSION_ID, "sd_claims.session_id")?,
            claimed_at: row.required_instant(column::CLAIMED_AT, "sd_claims.claimed_at")?,
        })
    };
    found.map(read).transpose()
}

/// What the history knows of an acquisition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It is open, and the session's.
    Open,
    /// It has ended.
    Ended,
    /// There is none of that id.
    Missing,
    /// It is another session's, or of another SD.
    OfAnother,
}

/// What the history knows of the acquisition that a session's row tells of.
pub fn state_of(db: &Db<'_>, acquisition: Acquisition<'_>) -> Result<State> {
    let Acquisition { claim_id, sd_id, session_id } = acquisition;
    let table = Table::to_read(db, Name::Claims)?;
    let snapshot = Snapshot::take();
    let Some(row) = table.find(&snapshot, column::BY_CLAIM_ID, Key::Bigint(claim_id)) else {
        return Ok(State::Missing);
    };
    Ok(if !row.says(column::SESSION_ID, session_id) || !row.says(column::SD_ID, sd_id) {
        State::OfAnother
    } else if row.is_null(column::RELEASED_AT) {
        State::Open
    } else {
        State::Ended
    })
}

/// Opens an acquisition again that a session holds.
pub fn reopen(db: &Db<'_>, claim_id: i64) -> Result<()> {
    let open = NewRow::default()
        .set(column::RELEASED_AT, None::<TimestampWithTimeZone>)
        .set(column::RELEASE_REASON, None::<&str>)
        .set(column::TAKEN_OVER_BY, None::<&str>);
    amend(db, claim_id, &open, |_| true).map(drop)
}

/// How an acquisition ended.
#[derive(Debug, Clone, Copy)]
pub struct End<'a> {
    pub at: DateTime<Utc>,
    pub reason: &'a str,
    pub taken_over_by: Option<&'a str>,
}

/// Adds the acquisition that a session holds and the history does not have; with its end, if it has ended just now.
pub fn insert(db: &Db<'_>, holder: &Session, end: Option<End<'_>>) -> Result<()> {
    let Some(mut row) = held_by(holder)? else { return Ok(()) };
    if let Some(end) = end {
        row = row
            .set(column::RELEASED_AT, time::to_server(end.at)?)
            .set(column::RELEASE_REASON, end.reason)
            .set(column::TAKEN_OVER_BY, end.taken_over_by);
    }
    let _meaning = Meaning::to(Intent::History);
    Table::to_write(db, Name::Claims)?.insert(db, &row)
}

static LOST: Statement = Statement::new(
    |c| {
        format!(
            "SELECT h.sd_id, h.released_at, h.release_reason, h.taken_over_by, o.session_id
               FROM {x}.sd_claims h
               LEFT JOIN {x}.claude_sessions o
                 ON o.sd_id = h.sd_id AND o.sd_id IS NOT NULL AND o.status = 'active'
              WHERE h.claim_id = $1 AND h.session_id = $2",
            x = c.schema
        )
    },
    &[INT8OID, TEXTOID],
);

/// What became of an acquisition of this session's. `None` when it never was this session's.
pub fn lost(db: &Db<'_>, claim_id: i64, session_id: &str) -> Result<Option<LostClaim>> {
    let Some(row) = db.first_row(&LOST, &[claim_id.into(), session_id.into()])? else {
        return Ok(None);
    };
    Ok(Some(LostClaim {
        claim_id,
        sd_id: row.required_text(1, "sd_claims.sd_id")?,
        released_at: row.instant(2)?,
        reason: row.text(3)?,
        taken_over_by: row.text(4)?,
        held_by: row.text(5)?,
    }))
}
