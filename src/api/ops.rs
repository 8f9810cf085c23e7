//! What an operator, or pg_cron, does by hand: the worker's steps.

use chrono::TimeDelta;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use serde_json::json;

use crate::error::{ClaimError, Result};
use crate::guc;
use crate::jsonb::Jsonb;
use crate::spi::claim::reap::{self, Policy};
use crate::spi::{Db, heartbeat, order, prune, time};
use crate::worker::wake;

/// How many events a call puts in order and announces.
const EVENT_BATCH: i32 = 10_000;

/// The most rows that one call takes on.
const MAX_BATCH: i32 = 100_000;

#[pg_extern(volatile, parallel_unsafe, security_definer)]
#[search_path(pg_catalog, pg_temp)]
fn cleanup_stale_sessions(
    p_stale_threshold_seconds: default!(Option<i32>, "NULL"),
    p_batch_size: default!(Option<i32>, "100"),
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
    let reaped = Db::connect(|db| {
        // The worker does that where there is one, whatever keeps it from being there, and locks the sessions
        // for a shorter time.
        if wake::ensure().is_err() {
            heartbeat::write_all(db)?;
        }
        let reaped = reap_up_to(db, policy, batch)?;
        order::append_visible(db, EVENT_BATCH)?;
        order::announce(db, EVENT_BATCH, guc::notify())?;
        Ok(reaped)
    })?;
    Ok(super::json(&json!({
        "success": true,
        "stale_sessions_cleaned": reaped,
        "cleaned_at": time::now(),
    }))?)
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

/// Reaps up to `limit` claims. What is locked is passed by and does not count.
fn reap_up_to(db: &Db<'_>, policy: Policy, limit: i32) -> Result<i32> {
    let mut reaped = 0;
    let mut after = 0;
    while reaped < limit {
        let candidates = reap::scan(db, policy, after, limit - reaped)?;
        let Some(last) = candidates.last() else { break };
        after = last.claim_id;
        for candidate in &candidates {
            reaped += i32::from(reap::attend(db, candidate, policy)?);
        }
    }
    Ok(reaped)
}

#[pg_extern(volatile, parallel_unsafe, security_definer)]
#[search_path(pg_catalog, pg_temp)]
fn prune_history(p_batch_size: default!(Option<i32>, "1000")) -> Result<Jsonb, ErrorReport> {
    let batch = checked_batch(p_batch_size)?;
    let limit =
        guc::history_retention().and_then(|retention| time::now().checked_sub_signed(retention));
    wake::at_commit();
    let (claims, events, sessions) = Db::connect(|db| {
        order::append_visible(db, EVENT_BATCH)?;
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
