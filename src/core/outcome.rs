//! The JSON that the functions about claims answer with.
//!
//! A business outcome is JSON with `success`; for those that refuse see [`crate::refusal`]. Faults are
//! raised as errors instead and never appear here.

use chrono::{DateTime, TimeDelta, Utc};
use serde::Serialize;

use crate::age;

/// Who holds an SD, as the refused learn it.
#[derive(Debug, Clone, PartialEq)]
pub struct Owner {
    /// The owning session.
    pub session_id: String,
    /// Time since its last heartbeat.
    pub heartbeat_age: TimeDelta,
    /// The host it said it runs on.
    pub hostname: Option<String>,
    /// The terminal it said it runs in.
    pub tty: Option<String>,
    /// The code base it said it works on.
    pub codebase: Option<String>,
    /// The track it gave with the claim.
    pub track: Option<String>,
    /// When it acquired the SD.
    pub claimed_at: DateTime<Utc>,
    /// Its acquisition's fencing token.
    pub claim_id: i64,
    /// Until when it has announced to be silent, if that is still to come.
    pub silent_until: Option<DateTime<Utc>>,
    /// The last sign of progress that it gave under this or an earlier claim.
    pub progress: Option<Progress>,
    /// Until when the SD is kept for it although it is stale.
    pub kept_until: Option<DateTime<Utc>>,
    /// Whether it is stale, but has a transaction open that guards the claim.
    pub guarded: bool,
}

/// A sign of progress, apart from the sign of life.
#[derive(Debug, Clone, PartialEq)]
pub struct Progress {
    /// When it was given.
    pub at: DateTime<Utc>,
    /// What the session said.
    pub note: Option<String>,
}

/// A claim that was granted.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Claimed {
    /// Always true.
    pub success: bool,
    /// The SD, by its canonical id.
    pub sd_id: String,
    /// The session that holds it.
    pub session_id: String,
    /// The track given with the claim.
    pub track: Option<String>,
    /// When the SD was acquired.
    pub claimed_at: DateTime<Utc>,
    /// The fencing token of this acquisition.
    pub claim_id: i64,
    /// Whether the session held the SD already, so that nothing but the heartbeat changed.
    pub already_owned: bool,
    /// The SD that the session held before and gave up by this claim.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub released_sd: Option<String>,
    /// The stale owner that lost the SD by this claim.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub took_over: Option<TookOver>,
}

/// The stale owner from which a claim took an SD over.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TookOver {
    /// The session that lost the SD.
    pub session_id: String,
    /// The fencing token of the acquisition that ended.
    pub claim_id: i64,
    /// Seconds since that session's last heartbeat.
    pub heartbeat_age_seconds: f64,
    /// The same, as a person reads it.
    pub heartbeat_age_human: String,
}

impl From<&Owner> for TookOver {
    fn from(owner: &Owner) -> Self {
        Self {
            session_id: owner.session_id.clone(),
            claim_id: owner.claim_id,
            heartbeat_age_seconds: age::seconds(owner.heartbeat_age),
            heartbeat_age_human: age::human(owner.heartbeat_age),
        }
    }
}

/// A claim that was lost: when, why and to whom.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LostClaim {
    /// The fencing token of the acquisition that ended.
    pub claim_id: i64,
    /// The SD that was lost.
    pub sd_id: String,
    /// When it ended.
    pub released_at: Option<DateTime<Utc>>,
    /// Why it ended.
    pub reason: Option<String>,
    /// The session that took it over, if one did.
    pub taken_over_by: Option<String>,
    /// The session that holds the SD now, if one does.
    pub held_by: Option<String>,
}

/// A person's stop sign on an SD.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Hold {
    /// Why.
    pub reason: String,
    /// Who.
    pub held_by: String,
    /// Since when.
    pub held_at: DateTime<Utc>,
}

/// A conflict with an SD that a live session holds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Conflict {
    /// Its kind, as it was declared.
    pub conflict_type: String,
    /// The other SD.
    pub conflicting_sd: String,
    /// Who holds that.
    pub conflicting_session: String,
}

/// A release that was done.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Released {
    /// Always true.
    pub success: bool,
    /// The session that held the SD.
    pub session_id: String,
    /// The SD that is free now.
    pub released_sd: String,
    /// The fencing token of the acquisition that ended.
    pub claim_id: i64,
    /// The reason that was recorded.
    pub reason: String,
    /// When it ended.
    pub released_at: DateTime<Utc>,
}

/// Whether an SD is claimed, with the seed system's camel-case keys.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ClaimStatus {
    /// Whether a live session holds the SD. A stale owner does not count: a claim takes it over.
    pub claimed: bool,
    /// The session that holds it, live or stale.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub claimed_by: Option<String>,
    /// Whether that session's lease has expired.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stale: Option<bool>,
    /// The track it gave with the claim.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub track: Option<String>,
    /// Whole minutes since it acquired the SD.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub active_minutes: Option<i64>,
    /// Seconds since its last heartbeat.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub heartbeat_age_seconds: Option<f64>,
    /// The same, as a person reads it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub heartbeat_age_human: Option<String>,
    /// The host it said it runs on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// The terminal it said it runs in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tty: Option<String>,
    /// The code base it said it works on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub codebase: Option<String>,
}

impl ClaimStatus {
    /// Nobody (else) holds the SD.
    pub fn free() -> Self {
        Self {
            claimed: false,
            claimed_by: None,
            stale: None,
            track: None,
            active_minutes: None,
            heartbeat_age_seconds: None,
            heartbeat_age_human: None,
            hostname: None,
            tty: None,
            codebase: None,
        }
    }

    /// `owner` holds the SD; `stale` says whether its lease has expired at `now`.
    pub fn held(owner: Owner, stale: bool, now: DateTime<Utc>) -> Self {
        Self {
            claimed: !stale,
            stale: Some(stale),
            active_minutes: Some(age::age(owner.claimed_at, now).num_minutes()),
            heartbeat_age_seconds: Some(age::seconds(owner.heartbeat_age)),
            heartbeat_age_human: Some(age::human(owner.heartbeat_age)),
            claimed_by: Some(owner.session_id),
            track: owner.track,
            hostname: owner.hostname,
            tty: owner.tty,
            codebase: owner.codebase,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use serde_json::json;

    pub(crate) fn owner() -> Owner {
        Owner {
            session_id: "session_abc123_tty1_1234".into(),
            heartbeat_age: TimeDelta::milliseconds(45_250),
            hostname: Some("dev-machine".into()),
            tty: Some("win-1234".into()),
            codebase: None,
            track: None,
            claimed_at: DateTime::UNIX_EPOCH,
            claim_id: 7,
            silent_until: None,
            progress: None,
            kept_until: None,
            guarded: false,
        }
    }

    #[test]
    fn a_stale_owner_is_named_but_does_not_count_as_a_claim() {
        let now = DateTime::UNIX_EPOCH + TimeDelta::seconds(150);
        let status = serde_json::to_value(ClaimStatus::held(owner(), true, now)).unwrap();
        assert_eq!(status["claimed"], json!(false));
        assert_eq!(status["claimedBy"], json!("session_abc123_tty1_1234"));
        assert_eq!(status["activeMinutes"], json!(2));
        assert_eq!(serde_json::to_value(ClaimStatus::free()).unwrap(), json!({ "claimed": false }));
    }
}
