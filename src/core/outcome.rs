//! The JSON that the functions answer with.
//!
//! A business outcome is JSON with `success`; a refusal adds `error` (a fixed word for programs),
//! `message` and `hint` (for people). Faults are raised as errors instead and never appear here.

use chrono::{DateTime, TimeDelta, Utc};
use serde::{Serialize, Serializer};

use crate::{age, text};

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

/// Why a request was refused.
#[derive(Debug, Clone, PartialEq)]
pub enum Refusal {
    /// Another session holds the SD.
    AlreadyClaimed {
        /// The SD.
        sd_id: String,
        /// Who holds it.
        owner: Owner,
    },
    /// No session of that id was ever registered.
    SessionNotFound {
        /// The id that was given.
        session_id: String,
    },
    /// The session has ended.
    SessionReleased {
        /// The session.
        session_id: String,
    },
    /// The backlog has no SD of that id.
    SdNotFound {
        /// The id that was given.
        sd_id: String,
    },
    /// The SD is finished.
    SdTerminalStatus {
        /// The SD.
        sd_id: String,
        /// Its status.
        status: String,
    },
    /// A person has stopped the SD.
    Held {
        /// The SD.
        sd_id: String,
        /// Who stopped it, when and why.
        hold: Hold,
    },
    /// A live session holds an SD that must not be worked on at the same time.
    Conflict {
        /// The SD.
        sd_id: String,
        /// What is in the way.
        conflict: Conflict,
    },
    /// The two SDs have no conflict.
    NoConflict {
        /// One SD.
        sd_id: String,
        /// The other one.
        other: String,
    },
    /// Nobody has stopped the SD.
    NotHeld {
        /// The SD.
        sd_id: String,
    },
    /// Another transaction is writing the session; nobody can take anything from it meanwhile.
    SessionBusy {
        /// The session.
        session_id: String,
    },
    /// The session holds no SD.
    NoClaim {
        /// The session.
        session_id: String,
    },
    /// The acquisition that the caller named is no longer the session's.
    ClaimLost {
        /// The session.
        session_id: String,
        /// The acquisition that was named.
        claim_id: i64,
        /// What became of it; `None` when it never was this session's.
        lost: Option<LostClaim>,
    },
}

impl Refusal {
    /// The fixed word for programs.
    pub fn error(&self) -> &'static str {
        match self {
            Self::AlreadyClaimed { .. } => "already_claimed",
            Self::SessionNotFound { .. } => "session_not_found",
            Self::SessionReleased { .. } => "session_released",
            Self::SdNotFound { .. } => "sd_not_found",
            Self::SdTerminalStatus { .. } => "sd_terminal_status",
            Self::SessionBusy { .. } => "session_busy",
            Self::Held { .. } => "held",
            Self::Conflict { .. } => "conflict",
            Self::NoConflict { .. } => "no_conflict",
            Self::NotHeld { .. } => "not_held",
            Self::NoClaim { .. } => "no_claim",
            Self::ClaimLost { .. } => "claim_lost",
        }
    }
}

/// The JSON of a refusal. Keys that do not apply are left out; what the owner never told is null.
#[derive(Serialize)]
struct RefusalJson<'a> {
    success: bool,
    error: &'static str,
    message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sd_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    session_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    lost_claim: Option<&'a LostClaim>,
    #[serde(skip_serializing_if = "Option::is_none")]
    claim_id: Option<i64>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    owner: Option<OwnerJson<'a>>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    hold: Option<&'a Hold>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    conflict: Option<&'a Conflict>,
}

#[derive(Serialize)]
struct OwnerJson<'a> {
    claimed_by: &'a str,
    heartbeat_age_seconds: f64,
    heartbeat_age_human: String,
    hostname: Option<&'a str>,
    tty: Option<&'a str>,
    codebase: Option<&'a str>,
    claimed_at: DateTime<Utc>,
    #[serde(skip_serializing_if = "Option::is_none")]
    silent_until: Option<DateTime<Utc>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kept_until: Option<DateTime<Utc>>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    guarded: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    progress_at: Option<DateTime<Utc>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    progress_note: Option<&'a str>,
}

impl Serialize for Refusal {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut json = RefusalJson {
            success: false,
            error: self.error(),
            message: text::message(self),
            hint: text::hint(self),
            sd_id: None,
            session_id: None,
            status: None,
            lost_claim: None,
            claim_id: None,
            owner: None,
            hold: None,
            conflict: None,
        };
        match self {
            Self::AlreadyClaimed { sd_id, owner } => {
                json.sd_id = Some(sd_id);
                json.claim_id = Some(owner.claim_id);
                json.owner = Some(OwnerJson {
                    claimed_by: &owner.session_id,
                    heartbeat_age_seconds: age::seconds(owner.heartbeat_age),
                    heartbeat_age_human: age::human(owner.heartbeat_age),
                    hostname: owner.hostname.as_deref(),
                    tty: owner.tty.as_deref(),
                    codebase: owner.codebase.as_deref(),
                    claimed_at: owner.claimed_at,
                    silent_until: owner.silent_until,
                    kept_until: owner.kept_until,
                    guarded: owner.guarded,
                    progress_at: owner.progress.as_ref().map(|progress| progress.at),
                    progress_note: owner.progress.as_ref().and_then(|p| p.note.as_deref()),
                });
            }
            Self::SessionNotFound { session_id }
            | Self::SessionReleased { session_id }
            | Self::SessionBusy { session_id }
            | Self::NoClaim { session_id } => json.session_id = Some(session_id),
            Self::SdNotFound { sd_id }
            | Self::NotHeld { sd_id }
            | Self::NoConflict { sd_id, .. } => json.sd_id = Some(sd_id),
            Self::Held { sd_id, hold } => {
                json.sd_id = Some(sd_id);
                json.hold = Some(hold);
            }
            Self::Conflict { sd_id, conflict } => {
                json.sd_id = Some(sd_id);
                json.conflict = Some(conflict);
            }
            Self::SdTerminalStatus { sd_id, status } => {
                json.sd_id = Some(sd_id);
                json.status = Some(status);
            }
            Self::ClaimLost { session_id, claim_id, lost } => {
                json.session_id = Some(session_id);
                json.claim_id = Some(*claim_id);
                json.lost_claim = lost.as_ref();
            }
        }
        json.serialize(serializer)
    }
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
    fn a_refused_claim_names_its_owner_and_keeps_unknown_facts_as_null() {
        let refusal = Refusal::AlreadyClaimed { sd_id: "SD-LEO-001".into(), owner: owner() };
        assert_eq!(
            serde_json::to_value(refusal).unwrap(),
            json!({
                "success": false,
                "error": "already_claimed",
                "message": "SD-LEO-001 is already claimed by session_abc123_tty1_1234 (heartbeat 45s ago, host dev-machine)",
                "hint": "Work on another SD, or try again: the claim ends by release_sd() or when its session goes stale.",
                "sd_id": "SD-LEO-001",
                "claim_id": 7,
                "claimed_by": "session_abc123_tty1_1234",
                "heartbeat_age_seconds": 45.25,
                "heartbeat_age_human": "45s ago",
                "hostname": "dev-machine",
                "tty": "win-1234",
                "codebase": null,
                "claimed_at": "1970-01-01T00:00:00Z",
            })
        );
    }

    #[test]
    fn keys_that_do_not_apply_are_left_out() {
        let json = serde_json::to_value(Refusal::SdNotFound { sd_id: "X".into() }).unwrap();
        let keys: Vec<_> = json.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["error", "hint", "message", "sd_id", "success"]);
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
