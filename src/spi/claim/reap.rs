//! The reaper: ending the claims of sessions that have gone stale.
//!
//! A scan finds what is due without locking anything; then each claim is taken by itself, as a
//! compare on its id and on its still being due under the row's lock. A row that somebody else is
//! writing is passed by: if that is a heartbeat, the session lives; if not, the next run sees it.

use chrono::TimeDelta;
use pg_claims_core::age;
use pg_claims_core::lease::Lease;
use pgrx::pg_sys::BuiltinOid::{FLOAT8OID, INT4OID, INT8OID, TEXTOID};
use serde_json::json;

use crate::board::Place;
use crate::error::Result;
use crate::guc;
use crate::pg::time;
use crate::spi::catalog::Catalog;
use crate::spi::event::{self, Event, EventType};
use crate::spi::intent::{Intent, Meaning};
use crate::spi::row::Row;
use crate::spi::statement::{Db, Statement};
use crate::spi::table::Wait;
use crate::spi::{directive, guard, heartbeat, session};

/// When four fifths of the greatest age have passed, the audit warns.
const WARN_AT: f64 = 0.8;

/// An open claim that something is to be done about.
#[derive(Debug, Clone)]
pub struct Candidate {
    pub session_id: String,
    pub sd_id: String,
    pub claim_id: i64,
    /// Its heartbeat lies in the future: the clock was set back, or somebody wrote it by hand.
    pub is_ahead: bool,
    /// It has gone stale, and the audit has not told so yet.
    pub is_unnoted: bool,
    /// Its claim is to be ended.
    pub is_due: bool,
    /// It grows old, and the audit has not warned yet.
    pub is_ageing: bool,
}

/// What becomes of stale sessions.
#[derive(Debug, Clone, Copy)]
pub struct Policy {
    /// Whether their claims are ended, or only noted as stale.
    pub reap: bool,
    /// The least silence that a claim is ended for, over and above the rule of liveness; a claim that
    /// has grown too old ends without any.
    pub min_silence: TimeDelta,
}

// Reads the open claims, which the partial index holds together, in the order of their ids, so that
// what one run had to pass by, or could not end, does not keep it from the rest.
static SCAN: Statement = Statement::new(
    |c| {
        format!(
            "SELECT session_id, sd_id, claim_id, is_ahead, is_unnoted, is_due, is_ageing
               FROM (SELECT session_id, sd_id, claim_id,
                            heartbeat_at > now + interval '1 second' AS is_ahead,
                            stale_at <= now AND stale_noted_for IS DISTINCT FROM heartbeat_at
                                AS is_unnoted,
                            reclaimable_at <= now
                                AND (heartbeat_at <= now - pg_catalog.make_interval(secs => $2)
                                     OR COALESCE(claimed_at <= now - pg_catalog.make_interval(secs => $5),
                                                 false)) AS is_due,
                            COALESCE(claimed_at <= now - pg_catalog.make_interval(secs => $3), false)
                                AND age_warned_for IS DISTINCT FROM claim_id AS is_ageing
                       FROM (SELECT session_id, sd_id, claim_id, {latest} AS heartbeat_at,
                                    claimed_at, stale_noted_for, age_warned_for,
                                    {x}.lease_expires_at({latest}, silent_until, stale_after,
                                                         claimed_at) AS stale_at,
                                    {reclaimable_at} AS reclaimable_at,
                                    pg_catalog.clock_timestamp() AS now
                               FROM {x}.claude_sessions
                              WHERE sd_id IS NOT NULL AND status = 'active'
                                AND claim_id > $1) s) s
              WHERE is_ahead OR is_unnoted OR is_due OR is_ageing
              ORDER BY claim_id LIMIT $4",
            x = c.schema,
            latest = heartbeat::latest(&c.schema, ""),
            reclaimable_at = super::reclaimable_at(&c.schema),
        )
    },
    &[INT8OID, FLOAT8OID, FLOAT8OID, INT4OID, FLOAT8OID],
);

/// Up to `limit` open claims that something is to be done about, with ids above `after`.
pub fn scan(db: &Db<'_>, policy: Policy, after: i64, limit: i32) -> Result<Vec<Candidate>> {
    let max_age = guc::max_claim_age().map(age::seconds);
    let warn_at = max_age.map(|age| age * WARN_AT);
    let arguments = [
        after.into(),
        age::seconds(policy.min_silence).into(),
        warn_at.into(),
        limit.into(),
        max_age.into(),
    ];
    let mut rows = db.run_by_index(&SCAN, &arguments)?;
    let mut candidates = Vec::new();
    while rows.next().is_some() {
        candidates.push(Candidate {
            session_id: rows.required_text(1, "claude_sessions.session_id")?,
            sd_id: rows.required_text(2, "claude_sessions.sd_id")?,
            claim_id: rows.required_bigint(3, "claude_sessions.claim_id")?,
            is_ahead: rows.flag(4)?,
            is_unnoted: rows.flag(5)?,
            is_due: rows.flag(6)? && policy.reap,
            is_ageing: rows.flag(7)?,
        });
    }
    Ok(candidates)
}

/// Does what is to be done about these claims. Returns how many were ended.
pub fn attend_all(db: &Db<'_>, candidates: &[Candidate], policy: Policy) -> Result<i64> {
    let mut reaped = 0;
    for candidate in candidates {
        reaped += i64::from(attend(db, candidate, policy)?);
    }
    Ok(reaped)
}

/// Does what is to be done about one claim. Returns whether it was ended.
fn attend(db: &Db<'_>, candidate: &Candidate, policy: Policy) -> Result<bool> {
    if candidate.is_ahead {
        pull_back(db, &candidate.session_id)?;
        return Ok(false);
    }
    if candidate.is_due && reap(db, candidate, policy)? {
        return Ok(true);
    }
    if candidate.is_unnoted {
        note(db, &NOTE_STALE, EventType::Stale, candidate)?;
    }
    if candidate.is_ageing {
        note(db, &NOTE_AGE, EventType::MaxAgeWarning, candidate)?;
    }
    Ok(false)
}

/// The reasons recorded for a claim that the reaper ended.
pub const REAPED: &str = "reaped";
const TOO_OLD: &str = "max_claim_age";

/// Ends the claim if it is still due.
fn reap(db: &Db<'_>, candidate: &Candidate, policy: Policy) -> Result<bool> {
    // An open transaction that guards the claim is a sign of life, and not waited for.
    if guard::is_held(candidate.claim_id)
        || !directive::try_lock(db, &candidate.sd_id)?
        || !guard::try_exclude(db, candidate.claim_id)?
    {
        return Ok(false);
    }
    let Some(held) = session::hold(db, &candidate.session_id, Wait::Skip)? else {
        return Ok(false);
    };
    let session = &held.session;
    if session.claim_id != Some(candidate.claim_id) {
        return Ok(false);
    }
    Place::of(db.catalog()?.sessions, &session.session_id).close();
    let now = time::now();
    let rules = guc::lease_rules();
    let lease = session.lease(heartbeat::latest_of(db, session)?);
    let is_too_old = rules
        .max_claim_age
        .zip(session.claimed_at)
        .is_some_and(|(longest, claimed_at)| age::age(claimed_at, now) >= longest);
    let is_due = lease.reclaimable_at(&rules) <= now
        && (is_too_old || age::age(lease.heartbeat_at, now) >= policy.min_silence);
    if !is_due {
        return Ok(false);
    }
    // Without its age it would be stale as well, or not.
    let is_stale = Lease { claimed_at: None, ..lease }.is_stale(&rules, now);
    let reason = if is_stale { REAPED } else { TOO_OLD };
    let _meaning = Meaning::to(Intent::Reap { claim_id: candidate.claim_id });
    let loser = session.without_claim(now, reason, true);
    held.write(db, &loser)?;
    Ok(true)
}

/// Remembers in `noted` that the audit has told of `value`, once, and while `condition` holds.
fn note_once(c: &Catalog, noted: &str, value: impl Fn(&str) -> String, condition: &str) -> String {
    format!(
        "WITH found AS MATERIALIZED (
             SELECT session_id FROM {x}.claude_sessions
              WHERE session_id = $1 AND claim_id = $2
                AND {noted} IS DISTINCT FROM {value} AND {condition}
                FOR NO KEY UPDATE SKIP LOCKED)
         UPDATE {x}.claude_sessions s SET {noted} = {value_of_s}
           FROM found WHERE s.session_id = found.session_id
      RETURNING 1",
        x = c.schema,
        value = value(""),
        value_of_s = value("s."),
    )
}

static NOTE_STALE: Statement = Statement::new(
    |c| {
        let is_stale = format!(
            "{}.lease_expires_at({}, silent_until, stale_after, claimed_at)
                 <= pg_catalog.clock_timestamp()",
            c.schema,
            heartbeat::latest(&c.schema, ""),
        );
        let latest = |prefix: &str| heartbeat::latest(&c.schema, prefix);
        note_once(c, "stale_noted_for", latest, &is_stale)
    },
    &[TEXTOID, INT8OID],
);

static NOTE_AGE: Statement = Statement::new(
    |c| note_once(c, "age_warned_for", |prefix| format!("{prefix}claim_id"), "true"),
    &[TEXTOID, INT8OID],
);

/// Tells the audit once.
fn note(
    db: &Db<'_>,
    statement: &'static Statement,
    event_type: EventType,
    candidate: &Candidate,
) -> Result<()> {
    let arguments = [candidate.session_id.as_str().into(), candidate.claim_id.into()];
    if db.first_row(statement, &arguments)?.is_none() {
        return Ok(());
    }
    let event = Event {
        event_type,
        session_id: &candidate.session_id,
        sd_id: Some(&candidate.sd_id),
        claim_id: Some(candidate.claim_id),
        reason: None,
        held: None,
        detail: json!({}),
    };
    event::record(db, event)
}

static PULL_BACK: Statement = Statement::new(
    |c| {
        format!(
            "WITH ahead AS MATERIALIZED (
                 SELECT session_id FROM {x}.claude_sessions
                  WHERE session_id = $1 AND heartbeat_at > pg_catalog.clock_timestamp()
                    FOR NO KEY UPDATE SKIP LOCKED)
             UPDATE {x}.claude_sessions s
                SET heartbeat_at = pg_catalog.clock_timestamp(),
                    updated_at = pg_catalog.clock_timestamp()
               FROM ahead WHERE s.session_id = ahead.session_id",
            x = c.schema
        )
    },
    &[TEXTOID],
);

/// A heartbeat in the future would keep its session alive until then: it counts as given now, so
/// that the session has one full lease from here.
pub fn pull_back(db: &Db<'_>, session_id: &str) -> Result<()> {
    Place::of(db.catalog()?.sessions, session_id).pull_back(time::now_in_microseconds());
    db.run(&PULL_BACK, &[session_id.into()])?;
    Ok(())
}
