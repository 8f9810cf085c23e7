//! The server's timestamps as chrono's.

use chrono::{DateTime, TimeDelta, Utc};
use pgrx::datum::{Interval, TimestampWithTimeZone};
use pgrx::pg_sys;

use crate::error::{ClaimError, Result};

/// Microseconds from the Unix epoch to the server's, 2000-01-01.
const SERVER_EPOCH_MICROSECONDS: i64 = 946_684_800_000_000;

/// The present moment, by the database's clock.
pub fn now() -> DateTime<Utc> {
    from_microseconds(now_in_microseconds())
}

/// The same in the server's microseconds.
pub fn now_in_microseconds() -> i64 {
    // SAFETY: reads the system clock; no preconditions.
    unsafe { pg_sys::GetCurrentTimestamp() }
}

/// An instant in the server's microseconds.
pub fn to_microseconds(instant: DateTime<Utc>) -> i64 {
    instant.timestamp_micros().saturating_sub(SERVER_EPOCH_MICROSECONDS)
}

/// Whether the transaction has written anything yet, so that it has a number.
pub fn has_written() -> bool {
    // SAFETY: reads this backend's transaction state.
    unsafe { pg_sys::GetTopTransactionIdIfAny() != pg_sys::InvalidTransactionId }
}

/// Whether all statements of the transaction see one snapshot: REPEATABLE READ or SERIALIZABLE.
pub fn has_transaction_snapshot() -> bool {
    // SAFETY: reads a variable of this backend that only changes between transactions.
    unsafe { pg_sys::XactIsoLevel >= pg_sys::XACT_REPEATABLE_READ as i32 }
}

/// Whether the transaction may not write.
pub fn is_read_only() -> bool {
    // SAFETY: reads a variable of this backend.
    unsafe { pg_sys::XactReadOnly }
}

/// Whether the session writes as a replica: then the server fires none but the triggers that always fire.
pub fn is_replica() -> bool {
    // SAFETY: reads a variable of this process's.
    unsafe { pg_sys::SessionReplicationRole == pg_sys::SESSION_REPLICATION_ROLE_REPLICA as i32 }
}

/// A server timestamp; `infinity` and what chrono cannot hold become the ends of its range.
pub fn from_server(timestamp: TimestampWithTimeZone) -> DateTime<Utc> {
    from_microseconds(timestamp.into_inner())
}

/// The first moment that the server knows: 4713 BC.
const FIRST_MICROSECOND: i64 = -211_813_488_000_000_000;

/// The same instant for the server; one before its first moment, such as comes of `-infinity`, is that moment.
pub fn to_server(instant: DateTime<Utc>) -> Result<TimestampWithTimeZone> {
    TimestampWithTimeZone::try_from(to_microseconds(instant).max(FIRST_MICROSECOND))
        .map_err(|_| ClaimError::Corrupt { what: "a timestamp" })
}

/// A length of time, with months of 30 days and days of 24 hours as `EXTRACT(EPOCH …)` has them;
/// what chrono cannot hold becomes its longest.
pub fn from_interval(interval: &Interval) -> TimeDelta {
    let days = i64::from(interval.months()) * 30 + i64::from(interval.days());
    TimeDelta::try_days(days)
        .and_then(|days| days.checked_add(&TimeDelta::microseconds(interval.micros())))
        .unwrap_or(TimeDelta::MAX)
}

/// Microseconds since the server's epoch.
pub fn from_microseconds(microseconds: i64) -> DateTime<Utc> {
    let end = if microseconds < 0 { DateTime::<Utc>::MIN_UTC } else { DateTime::<Utc>::MAX_UTC };
    microseconds
        .checked_add(SERVER_EPOCH_MICROSECONDS)
        .and_then(DateTime::from_timestamp_micros)
        .unwrap_or(end)
}
