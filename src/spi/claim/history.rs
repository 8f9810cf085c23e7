//! sd_claims: one row per acquisition.

use std::cell::{Cell, RefCell};

use chrono::{DateTime, Utc};
use pg_claims_core::outcome::LostClaim;
use pg_claims_core::queue::Queued;
use pgrx::pg_sys::BuiltinOid::{INT8OID, TEXTOID, TIMESTAMPTZOID};

use crate::error::Result;
use crate::spi::numbers::{self, Kind};
use crate::spi::row::Row;
use crate::spi::session::Session;
use crate::spi::statement::{Db, Statement};
use crate::spi::table::layout::claims as column;
use crate::spi::table::{Key, Name, NewRow, Snapshot, Table, Wait};
use crate::spi::time;

thread_local! {
    static OPENING: Cell<bool> = const { Cell::new(false) };
}

/// Whether this backend is opening, closing or discarding an acquisition right now; the trigger that keeps
/// others from doing so asks.
pub fn is_opening() -> bool {
    OPENING.get()
}

/// Lets this backend write open acquisitions until it is dropped, on an error as well.
struct Opening(bool);

impl Opening {
    fn new() -> Self {
        Self(OPENING.replace(true))
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        OPENING.set(self.0);
    }
}

// The unique index on open acquisitions decides. Waits for a transaction that has opened one and
// not ended yet; no row comes back if that one commits.
static OPEN: Statement = Statement::new(
    |c| {
        format!(
            "INSERT INTO {x}.sd_claims
                    (sd_id, session_id, track, hostname, codebase, took_over_claim_id, queue_reason,
                     queue_track, claimed_at, claim_id)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
             ON CONFLICT (sd_id) WHERE released_at IS NULL DO NOTHING
          RETURNING claim_id, claimed_at",
            x = c.schema
        )
    },
    &[
        TEXTOID,
        TEXTOID,
        TEXTOID,
        TEXTOID,
        TEXTOID,
        INT8OID,
        TEXTOID,
        TEXTOID,
        TIMESTAMPTZOID,
        INT8OID,
    ],
);

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

/// Opens an acquisition: its fencing token and its time. `None` when another one is open. Whoever is just
/// opening one is waited for, unless `wait` says to pass and the table may be written directly.
pub fn open(db: &Db<'_>, opened: Opened<'_>, wait: Wait) -> Result<Option<(i64, DateTime<Utc>)>> {
    let table = Table::to_write(db, Name::Claims)?;
    let directly = table.may_be_written() && (wait == Wait::Skip || !time::is_decoded());
    if directly {
        let found = open_directly(db, &table, opened)?;
        if found.is_some() || wait == Wait::Skip {
            return Ok(found);
        }
        // The statement waits, and then tells rather than fails.
    }
    let Opened { sd_id, session_id, track, hostname, codebase, took_over, queued, .. } = opened;
    let _opening = Opening::new();
    let arguments = [
        sd_id.into(),
        session_id.into(),
        track.into(),
        hostname.into(),
        codebase.into(),
        took_over.into(),
        queued.map(|queued| queued.reason.as_str()).into(),
        queued.and_then(|queued| queued.track).into(),
        time::to_server(begin(db, &opened)?)?.into(),
        next_id(db)?.into(),
    ];
    let Some(row) = db.first_row(&OPEN, &arguments)? else {
        return Ok(None);
    };
    Ok(Some((
        row.required_bigint(1, "sd_claims.claim_id")?,
        row.required_instant(2, "sd_claims.claimed_at")?,
    )))
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

/// The SD is locked, and nobody holds it, so that no acquisition of it is open. `None` where somebody has opened one
/// past the functions and the triggers, or may just be doing so.
fn open_directly(
    db: &Db<'_>,
    table: &Table,
    opened: Opened<'_>,
) -> Result<Option<(i64, DateTime<Utc>)>> {
    if time::is_decoded()
        && table
            .any(&Snapshot::take(), column::OPEN_BY_SD_ID, Key::Text(opened.sd_id), |_| Ok(true))?
    {
        return Ok(None);
    }
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
    if table.try_insert(&row) {
        return Ok(Some((claim_id, claimed_at)));
    }
    discard(db, claim_id)?;
    Ok(None)
}

/// The next fencing token.
pub fn next_id(db: &Db<'_>) -> Result<i64> {
    numbers::next(db, Kind::Claim)
}

static OPEN_AS: Statement = Statement::new(
    |c| {
        format!(
            "INSERT INTO {x}.sd_claims
                    (claim_id, claimed_at, sd_id, session_id, track, hostname, codebase)
             SELECT $1, $2, $3, $4, $5, s.hostname, s.codebase
               FROM {x}.claude_sessions s WHERE s.session_id = $4
             ON CONFLICT (sd_id) WHERE released_at IS NULL DO NOTHING
          RETURNING 1",
            x = c.schema
        )
    },
    &[INT8OID, TIMESTAMPTZOID, TEXTOID, TEXTOID, TEXTOID],
);

/// Opens an acquisition of a given token for a session whose row holds it already. False when
/// another one is open.
pub fn open_as(
    db: &Db<'_>,
    claim_id: i64,
    claimed_at: DateTime<Utc>,
    sd_id: &str,
    session_id: &str,
    track: Option<&str>,
) -> Result<bool> {
    let arguments = [
        claim_id.into(),
        time::to_server(claimed_at)?.into(),
        sd_id.into(),
        session_id.into(),
        track.into(),
    ];
    Ok(db.first_row(&OPEN_AS, &arguments)?.is_some())
}

static DISCARD: Statement = Statement::new(
    |c| format!("DELETE FROM {}.sd_claims WHERE claim_id = $1", c.schema),
    &[INT8OID],
);

/// Takes back an acquisition that this transaction opened and could not give to its session.
pub fn discard(db: &Db<'_>, claim_id: i64) -> Result<()> {
    let _opening = Opening::new();
    db.run(&DISCARD, &[claim_id.into()])?;
    Ok(())
}

/// Under REPEATABLE READ and SERIALIZABLE: error 40001 if a claim on the SD was committed that the
/// transaction's snapshot does not show. The unique index sees all claims.
pub fn see_latest(db: &Db<'_>, sd_id: &str) -> Result<()> {
    if !time::has_transaction_snapshot() {
        return Ok(());
    }
    match open(db, Opened { sd_id, ..Opened::default() }, Wait::Block)? {
        Some((claim_id, _)) => discard(db, claim_id),
        None => Ok(()),
    }
}

static CLOSE: Statement = Statement::new(
    |c| {
        format!(
            "UPDATE {}.sd_claims
                SET released_at = $2, release_reason = $3, taken_over_by = $4
              WHERE claim_id = $1 AND released_at IS NULL AND session_id = $5 AND sd_id = $6
          RETURNING 1",
            c.schema
        )
    },
    &[INT8OID, TIMESTAMPTZOID, TEXTOID, TEXTOID, TEXTOID, TEXTOID],
);

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
    super::note_end(claim_id);
    let at = time::to_server(at)?;
    loop {
        pgrx::check_for_interrupts!();
        let table = Table::to_write(db, Name::Claims)?;
        if !table.may_be_written() {
            // What was written directly comes without the trigger's depth.
            let _opening = Opening::new();
            let arguments = [
                claim_id.into(),
                at.into(),
                reason.into(),
                taken_over_by.into(),
                session_id.into(),
                sd_id.into(),
            ];
            return Ok(db.first_row(&CLOSE, &arguments)?.is_some());
        }
        let snapshot = Snapshot::take();
        let Some(row) = table.find(&snapshot, column::BY_CLAIM_ID, Key::Bigint(claim_id)) else {
            return Ok(false);
        };
        if !row.is_null(column::RELEASED_AT)
            || !row.says(column::SESSION_ID, session_id)
            || !row.says(column::SD_ID, sd_id)
        {
            return Ok(false);
        }
        let new = NewRow::default()
            .set(column::RELEASED_AT, at)
            .set(column::RELEASE_REASON, reason)
            .set(column::TAKEN_OVER_BY, taken_over_by);
        if table.update(&snapshot, &row, &new) {
            return Ok(true);
        }
    }
}

static OPEN_OF: Statement = Statement::new(
    |c| {
        format!(
            "SELECT claim_id, session_id, claimed_at FROM {}.sd_claims
              WHERE sd_id = $1 AND released_at IS NULL",
            c.schema
        )
    },
    &[TEXTOID],
);

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
    if !table.has(column::OPEN_BY_SD_ID) {
        let row = db.first_row(&OPEN_OF, &[sd_id.into()])?;
        return row.map(|row| read_open(&row, [1, 2, 3])).transpose();
    }
    let found = RefCell::new(None);
    table.any(&Snapshot::take(), column::OPEN_BY_SD_ID, Key::Text(sd_id), |row| {
        let columns = [column::CLAIM_ID, column::SESSION_ID, column::CLAIMED_AT];
        found.replace(Some(read_open(row, columns)?));
        Ok(true)
    })?;
    Ok(found.into_inner())
}

fn read_open(row: &impl Row, [claim_id, session_id, claimed_at]: [usize; 3]) -> Result<Open> {
    Ok(Open {
        claim_id: row.required_bigint(claim_id, "sd_claims.claim_id")?,
        session_id: row.required_text(session_id, "sd_claims.session_id")?,
        claimed_at: row.required_instant(claimed_at, "sd_claims.claimed_at")?,
    })
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

static REOPEN: Statement = Statement::new(
    |c| {
        format!(
            "UPDATE {}.sd_claims
                SET released_at = NULL, release_reason = NULL, taken_over_by = NULL
              WHERE claim_id = $1",
            c.schema
        )
    },
    &[INT8OID],
);

/// Opens an acquisition again that a session holds.
pub fn reopen(db: &Db<'_>, claim_id: i64) -> Result<()> {
    let _opening = Opening::new();
    db.run(&REOPEN, &[claim_id.into()])?;
    Ok(())
}

/// How an acquisition ended.
#[derive(Debug, Clone, Copy)]
pub struct End<'a> {
    pub at: DateTime<Utc>,
    pub reason: &'a str,
    pub taken_over_by: Option<&'a str>,
}

static INSERT: Statement = Statement::new(
    |c| {
        format!(
            "INSERT INTO {}.sd_claims
                    (claim_id, sd_id, session_id, track, hostname, codebase, claimed_at, released_at,
                     release_reason, taken_over_by)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
            c.schema
        )
    },
    &[
        INT8OID,
        TEXTOID,
        TEXTOID,
        TEXTOID,
        TEXTOID,
        TEXTOID,
        TIMESTAMPTZOID,
        TIMESTAMPTZOID,
        TEXTOID,
        TEXTOID,
    ],
);

/// Adds the acquisition that a session holds and the history does not have; with its end, if it has ended just now.
pub fn insert(db: &Db<'_>, holder: &Session, end: Option<End<'_>>) -> Result<()> {
    let Some((sd_id, claim_id)) = holder.claim() else { return Ok(()) };
    let instant = |at: Option<DateTime<Utc>>| at.map(time::to_server).transpose();
    let arguments = [
        claim_id.into(),
        sd_id.into(),
        holder.session_id.as_str().into(),
        holder.track.as_deref().into(),
        holder.hostname.as_deref().into(),
        holder.codebase.as_deref().into(),
        time::to_server(holder.claimed_at.unwrap_or_else(time::now))?.into(),
        instant(end.map(|end| end.at))?.into(),
        end.map(|end| end.reason).into(),
        end.and_then(|end| end.taken_over_by).into(),
    ];
    let _opening = Opening::new();
    db.run(&INSERT, &arguments)?;
    Ok(())
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
