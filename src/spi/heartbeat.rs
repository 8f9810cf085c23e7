//! Signs of life: heartbeats, announced silence, progress.

use chrono::{DateTime, Utc};
use pg_claims_core::lease::Lease;
use pg_claims_core::session::{Beat, Progressed};
use pgrx::datum::Interval;
use pgrx::pg_sys::BuiltinOid::{INT8OID, INTERVALOID, OIDOID, TEXTARRAYOID, TEXTOID};
use pgrx::spi::SpiTupleTable;

use super::row::Row;
use super::statement::{Db, Statement};
use crate::error::Result;
use crate::identity::Role;

static BEAT: Statement = Statement::new(
    |c| {
        format!(
            "UPDATE {}.claude_sessions
                SET heartbeat_at = GREATEST(heartbeat_at, pg_catalog.clock_timestamp())
              WHERE session_id = $1 AND status <> 'released'
                AND owner_role = $2 AND ($3 IS NULL OR claim_id = $3)
          RETURNING heartbeat_at, sd_id, claim_id, lost_claim_id",
            c.schema
        )
    },
    &[TEXTOID, OIDOID, INT8OID],
);

/// Records a sign of life: never backwards, on the database's clock. With a claim id only while
/// exactly that acquisition is held. `None` when there is no such session of `owner_role`, it has
/// ended, or it does not hold the claim. The second value is the claim that the session lost.
pub fn beat(
    db: &Db<'_>,
    session_id: &str,
    owner_role: Role,
    claim_id: Option<i64>,
) -> Result<Option<(Beat, Option<i64>)>> {
    let Some(row) =
        db.first_row(&BEAT, &[session_id.into(), owner_role.0.into(), claim_id.into()])?
    else {
        return Ok(None);
    };
    Ok(Some(read_beat(&row, session_id.to_owned())?))
}

fn read_beat(row: &SpiTupleTable<'_>, session_id: String) -> Result<(Beat, Option<i64>)> {
    let beat = Beat {
        success: true,
        session_id,
        heartbeat_at: row.required_instant(1, "claude_sessions.heartbeat_at")?,
        sd_id: row.text(2)?,
        claim_id: row.bigint(3)?,
        lost_claim: None,
    };
    Ok((beat, row.bigint(4)?))
}

/// What [`beat_many`] found of one session.
pub enum Found {
    /// It beat; the second value is the claim that it lost.
    Beaten(Box<Beat>, Option<i64>),
    /// There is none of that id.
    Unknown,
    /// It has ended.
    Released,
    /// Another transaction is writing it.
    Busy,
}

// Rows that another transaction is writing are passed by, or one session's open claim would hold up
// the heartbeats of all. In the order of their ids, so that two hosts with the same sessions cannot
// wait for each other.
static BEAT_MANY: Statement = Statement::new(
    |c| {
        format!(
            "WITH free AS MATERIALIZED (
                 SELECT session_id FROM {x}.claude_sessions
                  WHERE session_id = ANY ($1) AND status <> 'released'
                  ORDER BY session_id
                    FOR NO KEY UPDATE SKIP LOCKED),
                  beaten AS (
                 UPDATE {x}.claude_sessions s
                    SET heartbeat_at = GREATEST(s.heartbeat_at, pg_catalog.clock_timestamp())
                   FROM free WHERE s.session_id = free.session_id
              RETURNING s.heartbeat_at, s.sd_id, s.claim_id, s.lost_claim_id, s.session_id)
             SELECT b.heartbeat_at, b.sd_id, b.claim_id, b.lost_claim_id, asked.session_id,
                    s.status
               FROM pg_catalog.unnest($1) WITH ORDINALITY AS asked(session_id, place)
               LEFT JOIN beaten b ON b.session_id = asked.session_id
               LEFT JOIN {x}.claude_sessions s ON s.session_id = asked.session_id
              ORDER BY asked.place",
            x = c.schema
        )
    },
    &[TEXTARRAYOID],
);

/// Records a sign of life of each session, which must be distinct; says what was found, in order.
pub fn beat_many(db: &Db<'_>, session_ids: &[String]) -> Result<Vec<(String, Found)>> {
    let mut rows = db.run(&BEAT_MANY, &[session_ids.to_vec().into()])?;
    let mut found = Vec::with_capacity(session_ids.len());
    while rows.next().is_some() {
        let session_id = rows.required_text(5, "claude_sessions.session_id")?;
        let state = match (rows.instant(1)?, rows.text(6)?) {
            (Some(_), _) => {
                let (beat, lost) = read_beat(&rows, session_id.clone())?;
                Found::Beaten(Box::new(beat), lost)
            }
            (None, None) => Found::Unknown,
            (None, Some(status)) if status == "released" => Found::Released,
            (None, Some(_)) => Found::Busy,
        };
        found.push((session_id, state));
    }
    Ok(found)
}

static NOT_OF: Statement = Statement::new(
    |c| {
        format!(
            "SELECT session_id, owner_role::oid FROM {}.claude_sessions
              WHERE session_id = ANY ($1) AND owner_role <> $2 ORDER BY session_id LIMIT 1",
            c.schema
        )
    },
    &[TEXTARRAYOID, OIDOID],
);

/// The first of these sessions that is not `role`'s, and whose it is.
pub fn first_not_of(
    db: &Db<'_>,
    session_ids: &[String],
    role: Role,
) -> Result<Option<(String, Role)>> {
    let Some(row) = db.first_row(&NOT_OF, &[session_ids.to_vec().into(), role.0.into()])? else {
        return Ok(None);
    };
    Ok(Some((
        row.required_text(1, "claude_sessions.session_id")?,
        row.role(2, "claude_sessions.owner_role")?,
    )))
}

// Zero takes an announcement back.
static EXTEND: Statement = Statement::new(
    |c| {
        format!(
            "UPDATE {}.claude_sessions s
                SET heartbeat_at = GREATEST(s.heartbeat_at, at.now),
                    silent_until = CASE WHEN $2 > interval '0' THEN at.now + $2 END
               FROM (SELECT pg_catalog.clock_timestamp() AS now) at
              WHERE s.session_id = $1 AND s.status <> 'released'
                AND ($3 IS NULL OR s.claim_id = $3)
          RETURNING s.heartbeat_at, s.silent_until, s.stale_after, s.claimed_at, s.sd_id, s.claim_id",
            c.schema
        )
    },
    &[TEXTOID, INTERVALOID, INT8OID],
);

/// A session's lease and claim.
pub struct Leased {
    pub lease: Lease,
    pub sd_id: Option<String>,
    pub claim_id: Option<i64>,
}

/// Announces silence for `time` from now on; with a claim id only while exactly that acquisition is
/// held. `None` when there is no such session (any more).
pub fn extend(
    db: &Db<'_>,
    session_id: &str,
    time: Interval,
    claim_id: Option<i64>,
) -> Result<Option<Leased>> {
    let arguments = [session_id.into(), time.into(), claim_id.into()];
    let Some(row) = db.first_row(&EXTEND, &arguments)? else {
        return Ok(None);
    };
    Ok(Some(Leased { lease: read_lease(&row, 1)?, sd_id: row.text(5)?, claim_id: row.bigint(6)? }))
}

/// `heartbeat_at, silent_until, stale_after, claimed_at`, from `position` on.
pub fn read_lease(row: &SpiTupleTable<'_>, position: usize) -> Result<Lease> {
    Ok(Lease {
        heartbeat_at: row.required_instant(position, "claude_sessions.heartbeat_at")?,
        silent_until: row.instant(position + 1)?,
        stale_after: row.time(position + 2)?,
        claimed_at: row.instant(position + 3)?,
    })
}

static PROGRESS: Statement = Statement::new(
    |c| {
        format!(
            "UPDATE {}.claude_sessions s
                SET heartbeat_at = GREATEST(s.heartbeat_at, at.now),
                    progress_at = GREATEST(s.progress_at, at.now), progress_note = $2
               FROM (SELECT pg_catalog.clock_timestamp() AS now) at
              WHERE s.session_id = $1 AND s.status <> 'released'
                AND ($3 IS NULL OR s.claim_id = $3)
          RETURNING s.progress_at, s.progress_note, s.sd_id, s.claim_id",
            c.schema
        )
    },
    &[TEXTOID, TEXTOID, INT8OID],
);

/// Records a sign of progress; with a claim id only while exactly that acquisition is held. `None`
/// when there is no such session (any more).
pub fn progress(
    db: &Db<'_>,
    session_id: &str,
    note: Option<&str>,
    claim_id: Option<i64>,
) -> Result<Option<Progressed>> {
    let arguments = [session_id.into(), note.into(), claim_id.into()];
    let Some(row) = db.first_row(&PROGRESS, &arguments)? else {
        return Ok(None);
    };
    let progress_at: DateTime<Utc> = row.required_instant(1, "claude_sessions.progress_at")?;
    Ok(Some(Progressed {
        success: true,
        session_id: session_id.to_owned(),
        progress_at,
        progress_note: row.text(2)?,
        sd_id: row.text(3)?,
        claim_id: row.bigint(4)?,
    }))
}
