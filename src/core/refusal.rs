//! Why a request was refused, and the JSON that says so.
//!
//! A refusal is a business outcome: JSON with `success: false`, `error` (a fixed word for programs),
//! `message` and `hint` (for people), and the facts.

use chrono::{DateTime, Utc};
use serde::{Serialize, Serializer};

use crate::outcome::{Conflict, Hold, LostClaim, Owner};
use crate::queue::Shortage;
use crate::{age, text};

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
    /// Another transaction is about to claim the SD, or its owner is about to beat. The queue passes it
    /// by; whoever asks for it by name waits instead.
    SdBusy {
        /// The SD.
        sd_id: String,
    },
    /// The queue has no SD that could be claimed now.
    QueueEmpty {
        /// What there is instead.
        shortage: Shortage,
    },
    /// The session holds no SD.
    NoClaim {
        /// The session.
        session_id: String,
    },
    /// The role has as many sessions or claims as it may have.
    QuotaReached {
        /// The role.
        role: String,
        /// How many they are.
        limit: i32,
        /// Of what.
        quota: Quota,
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

/// What a role may have only so many of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quota {
    /// Sessions that have not ended.
    Sessions,
    /// SDs that its sessions hold.
    Claims,
}

impl Quota {
    /// What is counted.
    pub fn what(self) -> &'static str {
        match self {
            Self::Sessions => "sessions that have not ended",
            Self::Claims => "claimed SDs",
        }
    }

    /// The setting that says how many.
    pub fn setting(self) -> &'static str {
        match self {
            Self::Sessions => "pg_claims.max_sessions_per_role",
            Self::Claims => "pg_claims.max_claims_per_role",
        }
    }

    /// What to do where it is reached.
    pub fn hint(self) -> &'static str {
        match self {
            Self::Sessions => {
                "End sessions that are over with end_session(); a superuser raises the quota by pg_claims.max_sessions_per_role, 0 turns it off."
            }
            Self::Claims => {
                "Release an SD first; a superuser raises the quota by pg_claims.max_claims_per_role, 0 turns it off."
            }
        }
    }
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
            Self::SdBusy { .. } => "sd_busy",
            Self::QueueEmpty { .. } => "queue_empty",
            Self::QuotaReached { .. } => "quota_reached",
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
    quota: Option<QuotaJson<'a>>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    owner: Option<OwnerJson<'a>>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    hold: Option<&'a Hold>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    conflict: Option<&'a Conflict>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    shortage: Option<&'a Shortage>,
}

#[derive(Serialize)]
struct QuotaJson<'a> {
    role: &'a str,
    limit: i32,
    setting: &'static str,
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
            quota: None,
            owner: None,
            hold: None,
            conflict: None,
            shortage: None,
        };
        match self {
            Self::QuotaReached { role, limit, quota } => {
                json.quota = Some(QuotaJson { role, limit: *limit, setting: quota.setting() });
            }
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
            | Self::SdBusy { sd_id }
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
            Self::QueueEmpty { shortage } => json.shortage = Some(shortage),
            Self::ClaimLost { session_id, claim_id, lost } => {
                json.session_id = Some(session_id);
                json.claim_id = Some(*claim_id);
                json.lost_claim = lost.as_ref();
            }
        }
        json.serialize(serializer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::tests::owner;
    use serde_json::json;

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
}
