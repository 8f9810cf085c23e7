//! The rule of liveness and the words for ages, for the views.

use chrono::{DateTime, Utc};
use pg_claims_core::age;
use pg_claims_core::lease::Lease;
use pgrx::datum::Interval;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use pgrx::{AnyNumeric, FromDatum};

use crate::board::Place;
use crate::error::Result;
use crate::guc;
use crate::pg::time;
use crate::spi::guard;

// Called stable for the reason given at is_claim_live().
#[pg_extern(stable, parallel_safe)]
pub fn latest_heartbeat(
    p_sessions: Option<pg_sys::Oid>,
    p_session_id: Option<&str>,
    p_heartbeat_at: Option<TimestampWithTimeZone>,
) -> Option<TimestampWithTimeZone> {
    let written = p_heartbeat_at?;
    let on_board = p_sessions
        .zip(p_session_id)
        .and_then(|(sessions, session_id)| Place::of(sessions, session_id).latest())
        .and_then(|at| TimestampWithTimeZone::try_from(at).ok());
    Some(on_board.map_or(written, |on_board| if on_board > written { on_board } else { written }))
}

#[pg_extern(stable, parallel_safe)]
pub fn lease_expires_at(
    p_heartbeat_at: Option<TimestampWithTimeZone>,
    p_silent_until: Option<TimestampWithTimeZone>,
    p_stale_after: default!(Option<Interval>, "NULL"),
    p_claimed_at: default!(Option<TimestampWithTimeZone>, "NULL"),
) -> Result<Option<TimestampWithTimeZone>, ErrorReport> {
    let lease = lease(p_heartbeat_at, p_silent_until, p_stale_after, p_claimed_at);
    Ok(instant(lease.map(|lease| lease.expires_at(&guc::lease_rules())))?)
}

#[pg_extern(stable, parallel_safe)]
pub fn claim_reclaimable_at(
    p_heartbeat_at: Option<TimestampWithTimeZone>,
    p_silent_until: Option<TimestampWithTimeZone>,
    p_stale_after: Option<Interval>,
    p_claimed_at: Option<TimestampWithTimeZone>,
) -> Result<Option<TimestampWithTimeZone>, ErrorReport> {
    let lease = lease(p_heartbeat_at, p_silent_until, p_stale_after, p_claimed_at);
    Ok(instant(lease.map(|lease| lease.reclaimable_at(&guc::lease_rules())))?)
}

// Reads the clock and yet is called stable: each look is at another row, and the server would not
// read the queue in its order past a volatile function.
#[pg_extern(stable, parallel_restricted)]
pub fn is_claim_live(
    p_heartbeat_at: Option<TimestampWithTimeZone>,
    p_silent_until: Option<TimestampWithTimeZone>,
    p_stale_after: Option<Interval>,
    p_claimed_at: Option<TimestampWithTimeZone>,
    p_claim_id: Option<i64>,
) -> Option<bool> {
    let lease = lease(p_heartbeat_at, p_silent_until, p_stale_after, p_claimed_at)?;
    guard::is_live(&lease, p_claim_id)
}

fn lease(
    heartbeat_at: Option<TimestampWithTimeZone>,
    silent_until: Option<TimestampWithTimeZone>,
    stale_after: Option<Interval>,
    claimed_at: Option<TimestampWithTimeZone>,
) -> Option<Lease> {
    Some(Lease {
        heartbeat_at: time::from_server(heartbeat_at?),
        silent_until: silent_until.map(time::from_server),
        stale_after: stale_after.as_ref().map(time::from_interval),
        claimed_at: claimed_at.map(time::from_server),
    })
}

fn instant(at: Option<DateTime<Utc>>) -> Result<Option<TimestampWithTimeZone>> {
    at.map(time::to_server).transpose()
}

#[pg_extern(immutable, parallel_safe, strict)]
pub fn elapsed_seconds(
    p_from: TimestampWithTimeZone,
    p_to: TimestampWithTimeZone,
) -> Option<AnyNumeric> {
    let milliseconds = elapsed(p_from, p_to) / 1000;
    numeric(milliseconds, 3)
}

#[pg_extern(immutable, parallel_safe, strict)]
pub fn elapsed_minutes(
    p_from: TimestampWithTimeZone,
    p_to: TimestampWithTimeZone,
) -> Option<AnyNumeric> {
    let hundredths = elapsed(p_from, p_to) / 600_000;
    numeric(hundredths, 2)
}

/// Microseconds; none where time runs backwards.
fn elapsed(from: TimestampWithTimeZone, to: TimestampWithTimeZone) -> i64 {
    to.into_inner().saturating_sub(from.into_inner()).max(0)
}

/// So many units with so many decimal places, which the server's own arithmetic takes several times as
/// long for.
fn numeric(units: i64, places: i32) -> Option<AnyNumeric> {
    // SAFETY: the server makes a number of its own, of which this is a copy.
    unsafe {
        let number = pg_sys::int64_div_fast_to_numeric(units, places);
        AnyNumeric::from_datum(pg_sys::Datum::from(number), false)
    }
}

#[pg_extern(immutable, parallel_safe, strict)]
pub fn heartbeat_age_human(
    p_heartbeat_at: TimestampWithTimeZone,
    p_at: TimestampWithTimeZone,
) -> String {
    let at: DateTime<Utc> = time::from_server(p_at);
    age::human(age::age(time::from_server(p_heartbeat_at), at))
}
