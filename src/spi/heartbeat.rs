//! Signs of life: heartbeats, announced silence, progress.

use std::collections::HashMap;

use chrono::{DateTime, TimeDelta, Utc};
use pg_claims_core::board::Held;
use pg_claims_core::lease::Lease;
use pg_claims_core::session::{Beat, Progressed};
use pgrx::datum::Interval;
use pgrx::pg_sys;
use pgrx::pg_sys::BuiltinOid::{INT8OID, INTERVALOID, OIDOID, TEXTARRAYOID, TEXTOID};
use pgrx::spi::SpiTupleTable;

use super::catalog;
use super::claim::contradiction;
use super::row::Row;
use super::session::Session;
use super::statement::{Db, Statement};
use super::table::layout::sessions as column;
use super::table::{Key, Name, NewRow, Snapshot, Table};
use crate::attempt::each_or_halves;
use crate::board::{self, Place};
use crate::error::Result;
use crate::guc;
use crate::identity::Role;
use crate::pg::time;

/// A session's last heartbeat, the later one of board and table, of the row that `prefix` names.
pub fn latest(schema: &str, prefix: &str) -> String {
    format!("{schema}.latest_heartbeat({prefix}tableoid, {prefix}session_id, {prefix}heartbeat_at)")
}

/// The same of a session whose row was read.
pub fn latest_of(db: &Db<'_>, session: &Session) -> Result<DateTime<Utc>> {
    let on_board = Place::of(db.catalog()?.sessions, &session.session_id).latest();
    let written = session.heartbeat_at;
    Ok(on_board.map_or(written, |at| written.max(time::from_microseconds(at))))
}

/// Records a sign of life: never backwards, on the database's clock. A claim on an SD that is finished or gone ends first. With a claim id only while
/// exactly that acquisition is held. `None` when there is no such session of `owner_role`, it has
/// ended, or it does not hold the claim. The second value is the claim that the session lost.
pub fn beat(
    db: &Db<'_>,
    session_id: &str,
    owner_role: Role,
    named: Option<i64>,
) -> Result<Option<(Beat, Option<i64>)>> {
    let undisturbed = Undisturbed::new();
    let mut has_looked_at_sd = false;
    loop {
        pgrx::check_for_interrupts!();
        let table = Table::to_write(db, Name::Sessions)?;
        let snapshot = Snapshot::take();
        let Some(row) = table.find(&snapshot, column::BY_SESSION_ID, Key::Text(session_id)) else {
            return Ok(None);
        };
        let claim_id = row.bigint(column::CLAIM_ID)?;
        let lost = row.bigint(column::LOST_CLAIM_ID)?;
        if row.required_text(column::STATUS, "claude_sessions.status")? == "released"
            || row.role(column::OWNER_OID)? != owner_role
            || named.is_some_and(|named| Some(named) != claim_id)
        {
            return Ok(None);
        }
        let sd_id = row.text(column::SD_ID)?;
        if let Some(sd_id) = &sd_id
            && !has_looked_at_sd
            && catalog::is_unfinished_as_known(sd_id)? != Some(true)
        {
            contradiction::end_finished_of(db, &[session_id.to_owned()])?;
            has_looked_at_sd = true;
            continue;
        }
        let before = row.required_instant(column::HEARTBEAT_AT, "claude_sessions.heartbeat_at")?;
        let heartbeat_at = before.max(time::now());
        let new = NewRow::default().set(column::HEARTBEAT_AT, time::to_server(heartbeat_at)?);
        if table.update(db, &snapshot, &row, &new)?.is_none() {
            continue;
        }
        let beat = Beat {
            success: true,
            session_id: session_id.to_owned(),
            heartbeat_at,
            sd_id,
            claim_id,
            lost_claim: None,
        };
        if undisturbed.still() && lost.is_none() {
            open_on_board(table.oid(), &beat, owner_role, row.time(column::STALE_AFTER)?);
        }
        return Ok(Some((beat, lost)));
    }
}

/// Tells whether what a heartbeat finds in the table is committed and still so when it is there: this
/// transaction has written nothing before, and no trigger has changed a session since.
struct Undisturbed {
    is_first_write: bool,
    closed: u64,
}

impl Undisturbed {
    fn new() -> Self {
        Self { is_first_write: !time::has_written(), closed: board::times_closed() }
    }

    fn still(&self) -> bool {
        self.is_first_write && self.closed == board::times_closed()
    }
}

/// Lets the board answer from now on: the row is locked, and undisturbed. A session that lost a claim is
/// told so by the table. The table is to be behind by half of the session's own lease at the most, as it is by
/// half of the usual one in any case.
fn open_on_board(
    table: pg_sys::Oid,
    beat: &Beat,
    owner_role: Role,
    stale_after: Option<TimeDelta>,
) {
    let most_lag = stale_after.and_then(|lease| (lease / 2).num_microseconds()).unwrap_or(i64::MAX);
    let held = Held { owner: owner_role.0.to_u32(), claim: beat.sd_id.clone().zip(beat.claim_id) };
    let place = Place::of(table, &beat.session_id);
    place.open(&held, most_lag, time::to_microseconds(beat.heartbeat_at));
}

/// Records a sign of life on the board, without any statement or lock, for the sessions in the table `sessions`.
/// `None` where only the table can tell: the board does not know the session, another role calls, the claim that is
/// named is another one.
pub fn beat_on_board(
    sessions: pg_sys::Oid,
    session_id: &str,
    caller: Role,
    claim_id: Option<i64>,
) -> Option<Beat> {
    beat_in(Place::of(sessions, session_id), session_id, Some(caller), claim_id)
}

/// The same on behalf of the session itself, whoever's it is.
pub fn beat_on_board_for(db: &Db<'_>, session_id: &str) -> Result<Option<Beat>> {
    let place = Place::of(db.catalog()?.sessions, session_id);
    Ok(beat_in(place, session_id, None, None))
}

fn beat_in(
    place: Place<'_>,
    session_id: &str,
    caller: Option<Role>,
    claim_id: Option<i64>,
) -> Option<Beat> {
    let caller = caller.map(|caller| caller.0);
    let (at, held) = place.beat(caller, claim_id, time::now_in_microseconds())?;
    let (sd_id, claim_id) = held.claim.unzip();
    Some(Beat {
        success: true,
        session_id: session_id.to_owned(),
        heartbeat_at: time::from_microseconds(at),
        sd_id,
        claim_id,
        lost_claim: None,
    })
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
              RETURNING s.heartbeat_at, s.sd_id, s.claim_id, s.lost_claim_id, s.session_id,
                        s.owner_oid, s.stale_after)
             SELECT b.heartbeat_at, b.sd_id, b.claim_id, b.lost_claim_id, asked.session_id,
                    s.status, b.owner_oid, b.stale_after
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
    let undisturbed = Undisturbed::new();
    let mut rows = db.run(&BEAT_MANY, &[session_ids.to_vec().into()])?;
    let mut found = Vec::with_capacity(session_ids.len());
    while rows.next().is_some() {
        let session_id = rows.required_text(5, "claude_sessions.session_id")?;
        let state = match (rows.instant(1)?, rows.text(6)?) {
            (Some(_), _) => {
                let (beat, lost) = read_beat(&rows, session_id.clone())?;
                if undisturbed.still() && lost.is_none() {
                    let owner_role = rows.role(7)?;
                    open_on_board(db.catalog()?.sessions, &beat, owner_role, rows.time(8)?);
                }
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

// What another transaction is writing is passed by, and comes with the next. The board is asked once a row is
// locked: its session may have been forgotten since somebody looked. It is forgotten a moment after the
// transaction that asked for it is seen as committed, and what is written in that moment is not forgotten.
static WRITE: Statement = Statement::new(
    |c| {
        format!(
            "WITH free AS MATERIALIZED (
                 SELECT session_id FROM {x}.claude_sessions
                  WHERE session_id = ANY ($1) AND status <> 'released'
                  ORDER BY session_id
                    FOR NO KEY UPDATE SKIP LOCKED),
                  written AS (
                 UPDATE {x}.claude_sessions s SET heartbeat_at = {latest}
                   FROM free WHERE s.session_id = free.session_id
              RETURNING s.session_id)
             SELECT asked.session_id, w.session_id IS NOT NULL, s.session_id IS NULL
               FROM pg_catalog.unnest($1) AS asked (session_id)
               LEFT JOIN written w ON w.session_id = asked.session_id
               LEFT JOIN {x}.claude_sessions s
                 ON s.session_id = asked.session_id AND s.status <> 'released'",
            x = c.schema,
            latest = latest(&c.schema, "s."),
        )
    },
    &[TEXTARRAYOID],
);

/// How many heartbeats are written at once.
const WRITE_BATCH: usize = 1000;

/// What [`write()`] wrote, to be noted once that is committed.
#[derive(Default)]
pub struct Written {
    table: Option<pg_sys::Oid>,
    written: Vec<(String, i64)>,
    /// Sessions that are over, as far as a snapshot of now tells.
    gone: Vec<(String, i64)>,
}

impl Written {
    /// Notes on the board what the table has. Returns whether there was anything.
    pub fn note(self) -> bool {
        let Some(table) = self.table else { return false };
        for (session_id, at) in &self.written {
            Place::of(table, session_id).written(*at);
        }
        for (session_id, at) in &self.gone {
            Place::of(table, session_id).remove_if_over(*at);
        }
        !self.written.is_empty() || !self.gone.is_empty()
    }
}

/// Heartbeats on the board where the table is behind by half a lease: as many as are written at once.
pub fn unwritten(db: &Db<'_>) -> Result<Vec<(String, i64)>> {
    unwritten_up_to(db, WRITE_BATCH)
}

fn unwritten_up_to(db: &Db<'_>, limit: usize) -> Result<Vec<(String, i64)>> {
    let lag = guc::lease_rules().stale_after / 2;
    let lag = lag.num_microseconds().unwrap_or(i64::MAX);
    Ok(board::unwritten(db.catalog()?.sessions, lag, limit))
}

/// Does all for the board that the worker does, within this transaction, where there may be no worker. A
/// session that cannot be written is told to `failed`, with the error's message.
pub fn write_all(db: &Db<'_>, failed: &mut impl FnMut(&str, String)) -> Result<()> {
    let table = db.catalog()?.sessions;
    for batch in unwritten_up_to(db, usize::MAX)?.chunks(WRITE_BATCH) {
        each_or_halves(
            batch,
            &|some| write(db, some),
            &mut |written| {
                board::at_commit(|| {
                    written.note();
                });
            },
            &mut |(session_id, _), error| failed(session_id, error),
        );
    }
    board::at_commit(move || board::sweep(table));
    Ok(())
}

/// Writes such heartbeats to the table.
pub fn write(db: &Db<'_>, unwritten: &[(String, i64)]) -> Result<Written> {
    let mut done = Written { table: Some(db.catalog()?.sessions), ..Written::default() };
    if unwritten.is_empty() {
        return Ok(done);
    }
    let ids: Vec<String> = unwritten.iter().map(|(session_id, _)| session_id.clone()).collect();
    let mut rows = db.run(&WRITE, &[ids.into()])?;
    let mut outcome = HashMap::new();
    while rows.next().is_some() {
        let session_id = rows.required_text(1, "claude_sessions.session_id")?;
        outcome.insert(session_id, (rows.flag(2)?, rows.flag(3)?));
    }
    for (session_id, at) in unwritten {
        match outcome.get(session_id) {
            // Also where a trigger of the user's has made it less: it would not do otherwise the next time.
            Some((true, _)) => done.written.push((session_id.clone(), *at)),
            // A snapshot that the transaction keeps may not show a session that has come since.
            Some((false, true)) if !time::has_transaction_snapshot() => {
                done.gone.push((session_id.clone(), *at));
            }
            _ => {}
        }
    }
    Ok(done)
}

/// Forgets sessions on the board that the table answers for anyway.
pub fn sweep_board(db: &Db<'_>) -> Result<()> {
    board::sweep(db.catalog()?.sessions);
    Ok(())
}

/// Whether the board has heartbeats that the table has not.
pub fn is_board_ahead(db: &Db<'_>) -> Result<bool> {
    Ok(!board::unwritten(db.catalog()?.sessions, 1, 1).is_empty())
}

static NOT_OF: Statement = Statement::new(
    |c| {
        format!(
            "SELECT session_id, owner_oid FROM {}.claude_sessions
              WHERE session_id = ANY ($1) AND owner_oid IS DISTINCT FROM $2 ORDER BY session_id LIMIT 1",
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
    Ok(Some((row.required_text(1, "claude_sessions.session_id")?, row.role(2)?)))
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
