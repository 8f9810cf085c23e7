//! When a lease expires: the one rule of liveness.
//!
//! The view, the claim and everything else that must know whether a session still lives ask here
//! (from SQL through `lease_expires_at`), so that no two of them can disagree.

use chrono::{DateTime, TimeDelta, Utc};

/// What a session's liveness depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    /// When the session last gave a sign of life.
    pub heartbeat_at: DateTime<Utc>,
    /// Until when the session has announced that it will be silent, if it has.
    pub silent_until: Option<DateTime<Utc>>,
    /// How long after its last heartbeat a session counts as dead.
    pub stale_after: TimeDelta,
}

impl Lease {
    /// The moment from which the session counts as stale: so long after its last heartbeat, or at
    /// the end of its announced silence, whichever is later.
    pub fn expires_at(&self) -> DateTime<Utc> {
        let by_heartbeat = self
            .heartbeat_at
            .checked_add_signed(self.stale_after)
            .unwrap_or(DateTime::<Utc>::MAX_UTC);
        self.silent_until.map_or(by_heartbeat, |silence| by_heartbeat.max(silence))
    }

    /// Whether the lease has expired at `now`.
    pub fn is_stale(&self, now: DateTime<Utc>) -> bool {
        self.expires_at() <= now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEAT: DateTime<Utc> = DateTime::UNIX_EPOCH;

    fn lease(silent_until: Option<DateTime<Utc>>) -> Lease {
        Lease { heartbeat_at: BEAT, silent_until, stale_after: TimeDelta::seconds(300) }
    }

    #[test]
    fn a_lease_ends_at_its_threshold_and_not_before() {
        let just_before = BEAT + TimeDelta::microseconds(299_999_999);
        assert!(!lease(None).is_stale(just_before));
        assert!(lease(None).is_stale(BEAT + TimeDelta::seconds(300)));
    }

    #[test]
    fn announced_silence_only_ever_prolongs() {
        let long = BEAT + TimeDelta::seconds(900);
        assert_eq!(lease(Some(long)).expires_at(), long);
        let short = BEAT + TimeDelta::seconds(10);
        assert_eq!(lease(Some(short)).expires_at(), BEAT + TimeDelta::seconds(300));
    }

    #[test]
    fn the_end_of_time_does_not_overflow() {
        let lease = Lease { heartbeat_at: DateTime::<Utc>::MAX_UTC, ..lease(None) };
        assert_eq!(lease.expires_at(), DateTime::<Utc>::MAX_UTC);
    }
}
