//! Every setting, with its unit, range and default.

use chrono::TimeDelta;
use pgrx::{GucContext, GucFlags, GucRegistry, GucSetting};

static STALE_AFTER: GucSetting<i32> = GucSetting::<i32>::new(300);

/// How long after its last heartbeat a session counts as dead (`pg_claims.stale_after`).
pub fn stale_after() -> TimeDelta {
    TimeDelta::seconds(i64::from(STALE_AFTER.get()))
}

/// Declares the settings to the server.
pub fn init() {
    // Only a superuser may change it: a threshold that a worker could set for itself would let it
    // declare others dead. A value that an ordinary role put in place before the library was
    // loaded is rejected by the server at this very call.
    GucRegistry::define_int_guc(
        c"pg_claims.stale_after",
        c"Sets how long after its last heartbeat a session counts as stale.",
        c"A stale session's SD can be taken over by the next claim.",
        &STALE_AFTER,
        1,
        7 * 24 * 60 * 60,
        GucContext::Suset,
        GucFlags::UNIT_S,
    );
    reserve_prefix();
}

/// Makes a misspelt `pg_claims.…` setting an error instead of a silent no-op.
fn reserve_prefix() {
    // SAFETY: both functions only read the null-terminated name and run in `_PG_init`, where the
    // server allows settings to be declared.
    unsafe {
        #[cfg(feature = "pg14")]
        pgrx::pg_sys::EmitWarningsOnPlaceholders(c"pg_claims".as_ptr());
        #[cfg(not(feature = "pg14"))]
        pgrx::pg_sys::MarkGUCPrefixReserved(c"pg_claims".as_ptr());
    }
}
