//! The rule of liveness and the words for ages, for the views.

use chrono::{DateTime, Utc};
use pg_claims_core::age;
use pg_claims_core::lease::Lease;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

use crate::error::Result;
use crate::guc;
use crate::spi::time;

#[pg_extern(stable, parallel_safe)]
pub fn lease_expires_at(
    p_heartbeat_at: Option<TimestampWithTimeZone>,
    p_silent_until: Option<TimestampWithTimeZone>,
) -> Result<Option<TimestampWithTimeZone>, ErrorReport> {
    let Some(heartbeat_at) = p_heartbeat_at else {
        return Ok(None);
    };
    let lease = Lease {
        heartbeat_at: time::from_server(heartbeat_at),
        silent_until: p_silent_until.map(time::from_server),
        stale_after: guc::stale_after(),
    };
    Ok(Some(time::to_server(lease.expires_at())?))
}

#[pg_extern(immutable, parallel_safe, strict)]
pub fn heartbeat_age_human(
    p_heartbeat_at: TimestampWithTimeZone,
    p_at: TimestampWithTimeZone,
) -> String {
    let at: DateTime<Utc> = time::from_server(p_at);
    age::human(age::age(time::from_server(p_heartbeat_at), at))
}
