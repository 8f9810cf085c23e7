//! sd_claims: one row per acquisition.

use std::cell::Cell;

use chrono::{DateTime, Utc};
use pg_claims_core::outcome::LostClaim;
use pg_claims_core::queue::Queued;
use pgrx::pg_sys::BuiltinOid::{INT8OID, TEXTOID, TIMESTAMPTZOID};

use crate::error::Result;
use crate::spi::row::Row;
use crate::spi::statement::{Db, Statement};
use crate::spi::table::layout::claims as column;
use crate::spi::table::{Key, Name, NewRow, Snapshot, Table, Wait, next_value};
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
                     queue_track)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
             ON CONFLICT (sd_id) WHERE released_at IS NULL DO NOTHING
          RETURNING claim_id, claimed_at",
            x = c.schema
        )
    },
    &[TEXTOID, TEXTOID, TEXTOID, TEXTOID, TEXTOID, INT8OID, TEXTOID, TEXTOID],
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
    pub queued: Option<Queued<'a>>,
}

/// Opens an acquisition: its fencing token and its time. `None` when another one is open. Whoever is just
/// opening one is waited for, unless `wait` says to pass and the table may be written directly.
pub fn open(db: &Db<'_>, opened: Opened<'_>, wait: Wait) -> Result<Option<(i64, DateTime<Utc>)>> {
    let table = Table::to_write(db, Name::Claims)?;
    if table.may_be_written() {
        return open_directly(db, &table, opened, wait);
    }
    let Opened { sd_id, session_id, track, hostname, codebase, took_over, queued } = opened;
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
    ];
    let Some(row) = db.first_row(&OPEN, &arguments)? else {
        return Ok(None);
    };
    Ok(Some((
        row.required_bigint(1, "sd_claims.claim_id")?,
        row.required_instant(2, "sd_claims.claimed_at")?,
    )))
}

/// The SD is locked, and nobody holds it, so that no acquisition of it is open; where one is to be waited for
/// that somebody has opened past the functions and the triggers, that is the unique index's error.
fn open_directly(
    db: &Db<'_>,
    table: &Table,
    opened: Opened<'_>,
    wait: Wait,
) -> Result<Option<(i64, DateTime<Utc>)>> {
    if wait == Wait::Skip
        && time::is_decoded()
        && table
            .any(&Snapshot::take(), column::OPEN_BY_SD_ID, Key::Text(opened.sd_id), |_| Ok(true))?
    {
        return Ok(None);
    }
    let claim_id = next_id(db)?;
    let claimed_at = time::now();
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
    match wait {
        Wait::Block => table.insert(&row),
        Wait::Skip if table.try_insert(&row) => {}
        Wait::Skip => {
            discard(db, claim_id)?;
            return Ok(None);
        }
    }
    Ok(Some((claim_id, claimed_at)))
}

/// The next fencing token.
pub fn next_id(db: &Db<'_>) -> Result<i64> {
    next_value(db.catalog()?.claim_ids, "sd_claims.claim_id")
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
              WHERE claim_id = $1 AND released_at IS NULL",
            c.schema
        )
    },
    &[INT8OID, TIMESTAMPTZOID, TEXTOID, TEXTOID],
);

/// Closes an acquisition.
pub fn close(
    db: &Db<'_>,
    claim_id: i64,
    at: DateTime<Utc>,
    reason: &str,
    taken_over_by: Option<&str>,
) -> Result<()> {
    if super::is_granting(claim_id) {
        super::UNDONE.set(true);
    }
    let at = time::to_server(at)?;
    loop {
        pgrx::check_for_interrupts!();
        let table = Table::to_write(db, Name::Claims)?;
        if !table.may_be_written() {
            // What was written directly comes without the trigger's depth.
            let _opening = Opening::new();
            db.run(&CLOSE, &[claim_id.into(), at.into(), reason.into(), taken_over_by.into()])?;
            return Ok(());
        }
        let snapshot = Snapshot::take();
        let Some(row) = table.find(&snapshot, column::BY_CLAIM_ID, Key::Bigint(claim_id)) else {
            return Ok(());
        };
        if row.instant(column::RELEASED_AT)?.is_some() {
            return Ok(());
        }
        let new = NewRow::default()
            .set(column::RELEASED_AT, at)
            .set(column::RELEASE_REASON, reason)
            .set(column::TAKEN_OVER_BY, taken_over_by);
        if table.update(&snapshot, &row, &new) {
            return Ok(());
        }
    }
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
