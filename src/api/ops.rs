//! What an operator, or pg_cron, does by hand: the worker's steps.

use std::collections::HashSet;

use chrono::TimeDelta;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use pgrx::{PgLogLevel, PgSqlErrorCode};
use serde::Serialize;
use serde_json::json;

use super::running;
use crate::attempt::each_or_halves;
use crate::error::{ClaimError, Result};
use crate::guc;
use crate::jsonb::Jsonb;
use crate::pg::time;
use crate::spi::claim::contradiction::{self, Stranded};
use crate::spi::claim::reap::{self, Policy};
use crate::spi::{Db, heartbeat, numbers, order, prune, session};
use crate::worker::wake;

/// How many events a call puts in order and announces.
const EVENT_BATCH: i32 = 10_000;

/// The most rows that one call takes on.
const MAX_BATCH: i32 = 100_000;

#[pg_extern(volatile, parallel_unsafe)]
fn cleanup_stale_sessions(
    p_stale_threshold_seconds: default!(Option<i32>, "NULL"),
    p_batch_size: default!(Option<i32>, "100"),
    fcinfo: pg_sys::FunctionCallInfo,
) -> Result<Jsonb, ErrorReport> {
    let threshold = p_stale_threshold_seconds.unwrap_or(0);
    if threshold < 0 {
        Err(ClaimError::InvalidArgument {
            argument: "p_stale_threshold_seconds",
            reason: "must not be negative".into(),
            hint: Some("Give the least silence in seconds, or NULL for each session's own lease; a live session is never reaped.".into()),
        })?;
    }
    let batch = checked_batch(p_batch_size)?;
    let policy = Policy { reap: true, min_silence: TimeDelta::seconds(i64::from(threshold)) };
    // The worker passes by what this holds, and must look again afterwards.
    wake::at_commit();
    let (reaped, failures) = Db::connect(running(fcinfo), |db| {
        let mut failures = Failures::default();
        // The worker does that where one serves this database, whatever keeps it from being there right now, and
        // locks the sessions for a shorter time.
        if !wake::is_served() {
            heartbeat::write_all(db, &mut |session_id, error| {
                failures.add(session_id, None, error)
            })?;
        }
        let reaped = reap_up_to(db, policy, batch, &mut failures)?;
        settle_up_to(db, batch, &mut failures)?;
        // Keeps nothing else: it is tried again with the next call.
        each_or_halves(&[()], &|_| session::follow_renames(db), &mut |()| {}, &mut |(), error| {
            pgrx::warning!("sessions do not follow a renamed role: {error}")
        });
        // Nor are others to wait for this transaction's end until they are told of events.
        if !wake::is_served() {
            order::append_visible(db, EVENT_BATCH)?;
            // What does not fit into the server's queue, which a listener may have filled that is stuck in a
            // transaction, would fail all this when it commits.
            if order::may_announce(db)? {
                order::announce(db, EVENT_BATCH, guc::notify())?;
            }
        }
        Ok((reaped, failures))
    })?;
    failures.warn();
    Ok(super::json(&json!({
        "success": failures.sessions.is_empty(),
        "stale_sessions_cleaned": reaped,
        "failed": failures.sessions.len(),
        "failures": failures.first,
        "cleaned_at": time::now(),
    }))?)
}

/// What could not be done, such as for a trigger of the user's.
#[derive(Default)]
struct Failures {
    sessions: HashSet<String>,
    first: Vec<Failure>,
}

/// One session for which something could not be done.
#[derive(Serialize)]
struct Failure {
    session_id: String,
    sd_id: Option<String>,
    error: String,
}

impl Failures {
    /// So many are told.
    const MOST: usize = 10;

    fn add(&mut self, session_id: &str, sd_id: Option<&str>, error: String) {
        if self.sessions.insert(session_id.to_owned()) && self.first.len() < Self::MOST {
            let sd_id = sd_id.map(str::to_owned);
            self.first.push(Failure { session_id: session_id.to_owned(), sd_id, error });
        }
    }

    /// Tells the log too: whoever calls this now and then looks at no answer.
    fn warn(&self) {
        let Some(first) = self.first.first() else { return };
        ErrorReport::new(
            PgSqlErrorCode::ERRCODE_WARNING,
            format!("not all could be done for {} sessions", self.sessions.len()),
            "pg_claims",
        )
        .set_detail(format!("The first is session \"{}\": {}", first.session_id, first.error))
        .set_hint("Nothing else was kept by that. The answer's \"failures\" tell of the first ten.")
        .report(PgLogLevel::WARNING);
    }
}

fn checked_batch(batch: Option<i32>) -> Result<i32> {
    batch.filter(|batch| (1..=MAX_BATCH).contains(batch)).ok_or_else(|| {
        ClaimError::InvalidArgument {
            argument: "p_batch_size",
            reason: format!("must be 1 to {MAX_BATCH}"),
            hint: Some("What is left over is for the next call.".into()),
        }
    })
}

/// Reaps up to `limit` claims. What is locked is passed by and does not count; nor does what fails.
fn reap_up_to(db: &Db<'_>, policy: Policy, limit: i32, failures: &mut Failures) -> Result<i64> {
    let mut reaped = 0;
    let mut after = 0;
    while reaped < i64::from(limit) {
        let candidates = reap::scan(db, policy, after, limit - reaped as i32)?;
        let Some(last) = candidates.last() else { break };
        after = last.claim_id;
        each_or_halves(
            &candidates,
            &|some| reap::attend_all(db, some, policy),
            &mut |some| reaped += some,
            &mut |candidate, error| {
                failures.add(&candidate.session_id, Some(&candidate.sd_id), error);
            },
        );
    }
    Ok(reaped)
}

/// Settles up to `limit` contradictions of each kind, as the worker does.
fn settle_up_to(db: &Db<'_>, limit: i32, failures: &mut Failures) -> Result<()> {
    let contradictory = contradiction::contradictory(db, "", limit)?;
    each_or_halves(
        &contradictory,
        &|some: &[String]| {
            some.iter().try_for_each(|sd_id| contradiction::try_settle(db, sd_id).map(|_| ()))
        },
        &mut |()| {},
        &mut |sd_id, error| failures.add(sd_id, Some(sd_id), error),
    );
    let stranded = contradiction::stranded(db, 0, limit)?;
    each_or_halves(
        &stranded,
        &|some: &[Stranded]| {
            some.iter().try_for_each(|held| {
                contradiction::end_finished(db, &held.session_id, &held.sd_id, held.claim_id)
                    .map(|_| ())
            })
        },
        &mut |()| {},
        &mut |held, error| failures.add(&held.session_id, Some(&held.sd_id), error),
    );
    Ok(())
}

#[pg_extern(volatile, parallel_unsafe)]
fn prune_history(
    p_batch_size: default!(Option<i32>, "1000"),
    fcinfo: pg_sys::FunctionCallInfo,
) -> Result<Jsonb, ErrorReport> {
    let batch = checked_batch(p_batch_size)?;
    let limit =
        guc::history_retention().and_then(|retention| time::now().checked_sub_signed(retention));
    wake::at_commit();
    let (claims, events, sessions) = Db::connect(running(fcinfo), |db| {
        // Where a worker serves this database it gives events their places, and nobody waits for this
        // transaction's end.
        if !wake::is_served() {
            order::append_visible(db, EVENT_BATCH)?;
        }
        let Some(limit) = limit else { return Ok((0, 0, 0)) };
        Ok((
            all_stretches(batch, |from, size| prune::claims(db, from, limit, size))?,
            all_stretches(batch, |from, size| prune::events(db, from, limit, size))?,
            prune::sessions(db, limit, batch)?,
        ))
    })?;
    Ok(super::json(&json!({
        "success": true,
        "claims_removed": claims,
        "events_removed": events,
        "sessions_removed": sessions,
    }))?)
}

/// Prunes a table until `limit` rows are gone or nothing old is left.
fn all_stretches(limit: i32, prune: impl Fn(i64, i32) -> Result<prune::Stretch>) -> Result<i32> {
    let mut removed = 0;
    let mut from = Some(0);
    while let Some(position) = from
        && removed < limit
    {
        let stretch = prune(position, limit - removed)?;
        removed += stretch.removed;
        from = stretch.next;
    }
    Ok(removed)
}

#[pg_extern(volatile, parallel_unsafe)]
fn advance_numbers(fcinfo: pg_sys::FunctionCallInfo) -> Result<Jsonb, ErrorReport> {
    let [claim_id, event_id, position] = Db::connect(running(fcinfo), numbers::lift_above_tables)?;
    Ok(super::json(&json!({
        "success": true,
        "claim_id": claim_id,
        "event_id": event_id,
        "position": position,
    }))?)
}
