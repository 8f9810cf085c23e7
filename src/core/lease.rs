//! When a lease expires: the one rule of liveness.
//!
//! The view, the claim, the reaper and everything else that must know whether a session still lives
//! ask here (from SQL through `lease_expires_at`), so that no two of them can disagree.

use chrono::{DateTime, TimeDelta, Utc};

/// What an operator has set for all sessions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    /// How long after its last heartbeat a session counts as dead, unless it has a lease of its own.
    pub stale_after: TimeDelta,
    /// The shortest lease that a session may have of its own.
    pub min_stale_after: TimeDelta,
    /// The longest one.
    pub max_stale_after: TimeDelta,
    /// How long after a sign of life announced silence counts at the most.
    pub max_silence: TimeDelta,
    /// How long a stale session's SD is kept for that session alone.
    pub reclaim_delay: TimeDelta,
    /// How old a claim may grow, however alive its session is.
    pub max_claim_age: Option<TimeDelta>,
    /// Since when the server has been accepting writes and the database has been in use. Before that nobody
    /// could beat, so nobody's lease ends sooner than one lease after it.
    pub in_service_since: Option<DateTime<Utc>>,
}

/// What a session's liveness depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    /// When the session last gave a sign of life.
    pub heartbeat_at: DateTime<Utc>,
    /// Until when the session has announced that it will be silent, if it has.
    pub silent_until: Option<DateTime<Utc>>,
    /// The lease that it asked for at registration, if it did.
    pub stale_after: Option<TimeDelta>,
    /// When it acquired what it holds, if it holds anything.
    pub claimed_at: Option<DateTime<Utc>>,
}

impl Lease {
    /// The moment from which the session counts as stale: so long after its last heartbeat, or at
    /// the end of its announced silence, whichever is later; but when its claim has grown too old
    /// in any case, and never before the server has been up for one lease.
    pub fn expires_at(&self, rules: &Rules) -> DateTime<Utc> {
        // Limits that an operator tightened later hold for the leases that are there already.
        let stale_after = self.stale_after.map_or(rules.stale_after, |own| {
            own.min(rules.max_stale_after).max(rules.min_stale_after)
        });
        let mut expires_at = after(self.heartbeat_at, stale_after);
        if let Some(silent_until) = self.silent_until {
            let longest = after(self.heartbeat_at, rules.max_silence);
            expires_at = expires_at.max(silent_until.min(longest));
        }
        if let (Some(claimed_at), Some(max_age)) = (self.claimed_at, rules.max_claim_age) {
            expires_at = expires_at.min(after(claimed_at, max_age));
        }
        match rules.in_service_since {
            Some(since) => expires_at.max(after(since, stale_after)),
            None => expires_at,
        }
    }

    /// The moment from which another session may take the claim over, and the reaper may end it.
    pub fn reclaimable_at(&self, rules: &Rules) -> DateTime<Utc> {
        after(self.expires_at(rules), rules.reclaim_delay)
    }

    /// Whether the lease has expired at `now`.
    pub fn is_stale(&self, rules: &Rules, now: DateTime<Utc>) -> bool {
        self.expires_at(rules) <= now
    }

    /// Until when the session is silent by its own announcement, as far as that counts at `now`.
    pub fn announced_silence(&self, rules: &Rules, now: DateTime<Utc>) -> Option<DateTime<Utc>> {
        self.silent_until
            .map(|until| until.min(after(self.heartbeat_at, rules.max_silence)))
            .filter(|until| *until > now)
    }
}

fn after(at: DateTime<Utc>, time: TimeDelta) -> DateTime<Utc> {
    at.checked_add_signed(time).unwrap_or(DateTime::<Utc>::MAX_UTC)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEAT: DateTime<Utc> = DateTime::UNIX_EPOCH;

    const LEASE: Lease =
        Lease { heartbeat_at: BEAT, silent_until: None, stale_after: None, claimed_at: None };

    fn rules() -> Rules {
        Rules {
            stale_after: TimeDelta::seconds(300),
            min_stale_after: TimeDelta::seconds(30),
            max_stale_after: TimeDelta::seconds(600),
            max_silence: TimeDelta::seconds(1800),
            reclaim_delay: TimeDelta::zero(),
            max_claim_age: None,
            in_service_since: None,
        }
    }

    fn at(seconds: i64) -> DateTime<Utc> {
        BEAT + TimeDelta::seconds(seconds)
    }

    #[test]
    fn a_lease_ends_at_its_threshold_and_not_before() {
        let just_before = BEAT + TimeDelta::microseconds(299_999_999);
        assert!(!LEASE.is_stale(&rules(), just_before));
        assert!(LEASE.is_stale(&rules(), at(300)));
    }

    #[test]
    fn announced_silence_only_ever_prolongs_and_is_bounded() {
        let silent = |until| Lease { silent_until: Some(until), ..LEASE };
        assert_eq!(silent(at(900)).expires_at(&rules()), at(900));
        assert_eq!(silent(at(10)).expires_at(&rules()), at(300));
        let for_ever = silent(DateTime::<Utc>::MAX_UTC);
        assert_eq!(for_ever.expires_at(&rules()), at(1800));
        assert_eq!(for_ever.announced_silence(&rules(), at(1799)), Some(at(1800)));
        assert_eq!(for_ever.announced_silence(&rules(), at(1800)), None);
    }

    #[test]
    fn a_lease_of_its_own_keeps_within_the_operator_s_limits() {
        for (asked, counts) in [(60, 60), (1, 30), (9999, 600)] {
            let own = Lease { stale_after: Some(TimeDelta::seconds(asked)), ..LEASE };
            assert_eq!(own.expires_at(&rules()), at(counts), "{asked}");
        }
    }

    #[test]
    fn a_claim_that_grows_too_old_ends_however_alive_its_session_is() {
        let rules = Rules { max_claim_age: Some(TimeDelta::seconds(100)), ..rules() };
        let claim = Lease { claimed_at: Some(BEAT), silent_until: Some(at(1700)), ..LEASE };
        assert_eq!(claim.expires_at(&rules), at(100));
        assert_eq!(LEASE.expires_at(&rules), at(300), "without a claim nothing grows old");
    }

    #[test]
    fn time_that_the_server_was_down_counts_against_nobody() {
        let rules = Rules {
            in_service_since: Some(at(5000)),
            max_claim_age: Some(TimeDelta::seconds(100)),
            ..rules()
        };
        let claim = Lease { claimed_at: Some(BEAT), ..LEASE };
        assert_eq!(claim.expires_at(&rules), at(5300));
        let beating = Lease { heartbeat_at: at(6000), ..LEASE };
        assert_eq!(beating.expires_at(&rules), at(6300));
    }

    #[test]
    fn a_stale_session_s_claim_is_kept_for_it_as_long_as_the_delay_says() {
        let rules = Rules { reclaim_delay: TimeDelta::seconds(20), ..rules() };
        assert_eq!(LEASE.expires_at(&rules), at(300));
        assert_eq!(LEASE.reclaimable_at(&rules), at(320));
    }

    #[test]
    fn the_end_of_time_does_not_overflow() {
        let lease = Lease { heartbeat_at: DateTime::<Utc>::MAX_UTC, ..LEASE };
        assert_eq!(lease.expires_at(&rules()), DateTime::<Utc>::MAX_UTC);
    }
}
