//! A session's row.

use chrono::{DateTime, TimeDelta, Utc};
use pg_claims_core::lease::Lease;

use crate::error::Result;
use crate::identity::Role;
use crate::pg::time;
use crate::spi::row::Row;
use crate::spi::table::NewRow;
use crate::spi::table::layout::sessions as column;

/// What is to be known of a session in order to decide about it.
#[derive(Debug, Clone, PartialEq)]
pub struct Session {
    pub session_id: String,
    /// The SD that it holds, and the fencing token of that acquisition.
    pub sd_id: Option<String>,
    pub claim_id: Option<i64>,
    pub claimed_at: Option<DateTime<Utc>>,
    pub track: Option<String>,
    pub status: String,
    pub owner_role: Role,
    pub hostname: Option<String>,
    pub tty: Option<String>,
    pub codebase: Option<String>,
    /// As the table has it; the board may know of a later one.
    pub heartbeat_at: DateTime<Utc>,
    pub silent_until: Option<DateTime<Utc>>,
    pub stale_after: Option<TimeDelta>,
    pub released_at: Option<DateTime<Utc>>,
    pub release_reason: Option<String>,
    pub lost_claim_id: Option<i64>,
    pub lost_to: Option<String>,
    pub progress_at: Option<DateTime<Utc>>,
    pub progress_note: Option<String>,
    pub stale_noted_for: Option<DateTime<Utc>>,
}

impl Session {
    /// Reads a row of claude_sessions.
    pub fn read(row: &impl Row) -> Result<Self> {
        Ok(Self {
            session_id: row.required_text(column::SESSION_ID, "claude_sessions.session_id")?,
            sd_id: row.text(column::SD_ID)?,
            claim_id: row.bigint(column::CLAIM_ID)?,
            claimed_at: row.instant(column::CLAIMED_AT)?,
            track: row.text(column::TRACK)?,
            status: row.required_text(column::STATUS, "claude_sessions.status")?,
            owner_role: row.role(column::OWNER_OID)?,
            hostname: row.text(column::HOSTNAME)?,
            tty: row.text(column::TTY)?,
            codebase: row.text(column::CODEBASE)?,
            heartbeat_at: row
                .required_instant(column::HEARTBEAT_AT, "claude_sessions.heartbeat_at")?,
            silent_until: row.instant(column::SILENT_UNTIL)?,
            stale_after: row.time(column::STALE_AFTER)?,
            released_at: row.instant(column::RELEASED_AT)?,
            release_reason: row.text(column::RELEASE_REASON)?,
            lost_claim_id: row.bigint(column::LOST_CLAIM_ID)?,
            lost_to: row.text(column::LOST_TO)?,
            progress_at: row.instant(column::PROGRESS_AT)?,
            progress_note: row.text(column::PROGRESS_NOTE)?,
            stale_noted_for: row.instant(column::STALE_NOTED_FOR)?,
        })
    }

    /// Whether the session has ended.
    pub fn is_released(&self) -> bool {
        self.status == "released"
    }

    /// The SD that it holds and the fencing token of that acquisition.
    pub fn claim(&self) -> Option<(&str, i64)> {
        self.sd_id.as_deref().zip(self.claim_id)
    }

    /// What its liveness depends on; `heartbeat_at` is the latest one.
    pub fn lease(&self, heartbeat_at: DateTime<Utc>) -> Lease {
        Lease {
            heartbeat_at,
            silent_until: self.silent_until,
            stale_after: self.stale_after,
            claimed_at: self.claimed_at,
        }
    }

    /// When a claim begins or ends that this session makes or loses now, which it holds since `claimed_at`: never
    /// before its last one ended or this one began, also if the clock was set back.
    pub fn moment(&self) -> DateTime<Utc> {
        let known = [self.claimed_at, self.released_at];
        known.into_iter().flatten().fold(time::now(), DateTime::max)
    }

    /// The session without its claim, which ended `at` this moment. It is to learn of that with its next
    /// heartbeat if it `lost` the claim.
    pub fn without_claim(&self, at: DateTime<Utc>, reason: &str, lost: bool) -> Self {
        Self {
            sd_id: None,
            claim_id: None,
            claimed_at: None,
            track: None,
            status: "idle".into(),
            silent_until: None,
            lost_claim_id: self.claim_id.filter(|_| lost),
            lost_to: None,
            released_at: Some(self.claimed_at.map_or(at, |claimed_at| claimed_at.max(at))),
            release_reason: Some(reason.into()),
            ..self.clone()
        }
    }

    /// What the functions write of it: all that a claim changes.
    pub(super) fn written(&self) -> Result<NewRow> {
        let instant = |at: Option<DateTime<Utc>>| at.map(time::to_server).transpose();
        Ok(NewRow::default()
            .set(column::SD_ID, self.sd_id.as_deref())
            .set(column::CLAIM_ID, self.claim_id)
            .set(column::CLAIMED_AT, instant(self.claimed_at)?)
            .set(column::TRACK, self.track.as_deref())
            .set(column::STATUS, self.status.as_str())
            .set(column::SILENT_UNTIL, instant(self.silent_until)?)
            .set(column::HEARTBEAT_AT, instant(Some(self.heartbeat_at))?)
            .set(column::LOST_CLAIM_ID, self.lost_claim_id)
            .set(column::LOST_TO, self.lost_to.as_deref())
            .set(column::RELEASED_AT, instant(self.released_at)?)
            .set(column::RELEASE_REASON, self.release_reason.as_deref())
            .set(column::UPDATED_AT, instant(Some(time::now()))?))
    }
}
