//! The JSON that the functions about sessions, heartbeats and leases answer with.

use chrono::{DateTime, Utc};
use serde::Serialize;

use crate::outcome::LostClaim;
use crate::refusal::Refusal;

/// A session as `register_session` and `end_session` left it. Its metadata is passed on as `M`, which nobody
/// reads.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SessionState<M> {
    /// Always true.
    pub success: bool,
    /// The session.
    pub session_id: String,
    /// `active` with an SD, `idle` without, `released` once ended.
    pub status: String,
    /// The SD that it holds.
    pub sd_id: Option<String>,
    /// The fencing token of that acquisition.
    pub claim_id: Option<i64>,
    /// What it said of itself.
    pub hostname: Option<String>,
    /// What it said of itself.
    pub tty: Option<String>,
    /// What it said of itself.
    pub pid: Option<i32>,
    /// What it said of itself.
    pub codebase: Option<String>,
    /// All metadata that was ever given, merged.
    pub metadata: M,
    /// Its last sign of life.
    pub heartbeat_at: DateTime<Utc>,
    /// The lease that it has of its own, in seconds; `None`: `pg_claims.stale_after`.
    pub stale_after_seconds: Option<f64>,
    /// When it was first registered.
    pub created_at: DateTime<Utc>,
    /// Whether this registration brought an ended session back.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resumed: Option<bool>,
    /// The SD that ending the session released.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub released_sd: Option<String>,
}

/// A heartbeat that was recorded.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Beat {
    /// Always true.
    pub success: bool,
    /// The session.
    pub session_id: String,
    /// The sign of life that counts from now on.
    pub heartbeat_at: DateTime<Utc>,
    /// The SD that the session holds now.
    pub sd_id: Option<String>,
    /// The fencing token of that acquisition.
    pub claim_id: Option<i64>,
    /// The claim that the session lost against its will since its last claim.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lost_claim: Option<LostClaim>,
}

/// Heartbeats of many sessions: one answer for each.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Beats {
    /// Whether every session's heartbeat was recorded.
    pub success: bool,
    /// How many were.
    pub recorded: usize,
    /// One answer for each session that was asked for, in the order of the question.
    pub sessions: Vec<BeatOrRefusal>,
}

/// One session's answer among [`Beats`].
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum BeatOrRefusal {
    /// It was recorded.
    Beat(Beat),
    /// It was not.
    Refusal(Refusal),
}

impl Beats {
    /// The answers of all sessions.
    pub fn new(sessions: Vec<BeatOrRefusal>) -> Self {
        let recorded =
            sessions.iter().filter(|answer| matches!(answer, BeatOrRefusal::Beat(_))).count();
        Self { success: recorded == sessions.len(), recorded, sessions }
    }
}

/// A lease that was extended, or whose announced silence was taken back.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Extended {
    /// Always true.
    pub success: bool,
    /// The session.
    pub session_id: String,
    /// The sign of life that the announcement is.
    pub heartbeat_at: DateTime<Utc>,
    /// Until when the session will be silent; null once taken back.
    pub silent_until: Option<DateTime<Utc>>,
    /// From when on it counts as stale if nothing more is heard of it.
    pub lease_expires_at: DateTime<Utc>,
    /// The SD that it holds.
    pub sd_id: Option<String>,
    /// The fencing token of that acquisition.
    pub claim_id: Option<i64>,
}

/// A sign of progress that was recorded.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Progressed {
    /// Always true.
    pub success: bool,
    /// The session.
    pub session_id: String,
    /// When.
    pub progress_at: DateTime<Utc>,
    /// What it said.
    pub progress_note: Option<String>,
    /// The SD that it holds.
    pub sd_id: Option<String>,
    /// The fencing token of that acquisition.
    pub claim_id: Option<i64>,
}
