//! sd_claims: one row per acquisition.

use std::cell::Cell;

use chrono::{DateTime, Utc};
use pg_claims_core::outcome::LostClaim;
use pg_claims_core::queue::Queued;
use pgrx::pg_sys::BuiltinOid::{INT8OID, TEXTOID, TIMESTAMPTZOID};

use crate::error::Result;
use crate::spi::row::Row;
use crate::spi::statement::{Db, Statement};
use crate::spi::time;

thread_local! {
    static OPENING: Cell<bool> = const { Cell::new(false) };
}

/// Whether this backend is opening or discarding an acquisition right now; the trigger that keeps
/// others from doing so asks.
pub fn is_opening() -> bool {
    OPENING.get()
}

/// Lets this backend write open acquisitions until it is dropped, on an error as well.
struct Opening;

impl Opening {
    fn new() -> Self {
        OPENING.set(true);
        Self
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        OPENING.set(false);
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
             VALUES ($1, $2, $3,
                     (SELECT hostname FROM {x}.claude_sessions WHERE session_id = $2),
                     (SELECT codebase FROM {x}.claude_sessions WHERE session_id = $2), $4, $5, $6)
             ON CONFLICT (sd_id) WHERE released_at IS NULL DO NOTHING
          RETURNING claim_id, claimed_at",
            x = c.schema
        )
    },
    &[TEXTOID, TEXTOID, TEXTOID, INT8OID, TEXTOID, TEXTOID],
);

/// Opens an acquisition: its fencing token and its time. `None` when another one is open.
pub fn open(
    db: &Db<'_>,
    sd_id: &str,
    session_id: &str,
    track: Option<&str>,
    took_over: Option<i64>,
    queued: Option<Queued<'_>>,
) -> Result<Option<(i64, DateTime<Utc>)>> {
    let _opening = Opening::new();
    let arguments = [
        sd_id.into(),
        session_id.into(),
        track.into(),
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

static NEXT_ID: Statement = Statement::new(
    |c| {
        format!(
            "SELECT pg_catalog.nextval('{}.sd_claims_claim_id_seq'::pg_catalog.regclass)",
            c.schema.replace('\'', "''")
        )
    },
    &[],
);

/// The next fencing token.
pub fn next_id(db: &Db<'_>) -> Result<i64> {
    db.run(&NEXT_ID, &[])?.first().required_bigint(1, "sd_claims_claim_id_seq")
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
    match open(db, sd_id, "", None, None, None)? {
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
    let arguments =
        [claim_id.into(), time::to_server(at)?.into(), reason.into(), taken_over_by.into()];
    db.run(&CLOSE, &arguments)?;
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
