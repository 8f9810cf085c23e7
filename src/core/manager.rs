//! The JSON of the heartbeat manager, with the seed system's camel-case keys.

use chrono::{DateTime, TimeDelta, Utc};
use serde::Serialize;

use crate::age;

/// The heartbeat that the server gives for a connection.
#[derive(Debug, Clone, PartialEq)]
pub struct Managed {
    /// The session that it is given for.
    pub session_id: String,
    /// When one was recorded last.
    pub last_success: Option<DateTime<Utc>>,
    /// How many failed since.
    pub consecutive_failures: i32,
    /// What the last failure was.
    pub last_error: Option<String>,
    /// Whether it was given up after too many failures.
    pub given_up: bool,
}

/// `start_heartbeat` did.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Started {
    /// Always true.
    pub success: bool,
    /// The session.
    pub session_id: String,
    /// Time between two heartbeats.
    pub interval_ms: i64,
}

/// `start_heartbeat` did not.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct NotStarted {
    /// Always false.
    pub success: bool,
    /// The fixed word for programs.
    pub error: &'static str,
    /// Why, for people.
    pub message: String,
    /// What to do.
    pub hint: &'static str,
}

impl NotStarted {
    /// The connection is another session's.
    pub fn other_session(session_id: &str) -> Self {
        Self {
            success: false,
            error: "heartbeat_running",
            message: format!("this connection's heartbeat runs for session \"{session_id}\""),
            hint: "Call stop_heartbeat() first. Behind a transaction pooler a connection is nobody's: call update_session_heartbeat() from the client instead.",
        }
    }

    /// Nobody is there to beat.
    pub fn no_worker(reason: &str) -> Self {
        Self {
            success: false,
            error: "no_worker",
            message: format!("no background worker can beat for this connection: {reason}"),
            hint: "Call update_session_heartbeat() from the client instead, or see pg_claims.worker and max_worker_processes.",
        }
    }
}

/// `stop_heartbeat` did.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Stopped {
    /// Always true: after it no heartbeat runs here.
    pub success: bool,
    /// The session that the heartbeat was given for; null if none ran.
    pub stopped_session: Option<String>,
}

/// Whether a heartbeat runs for this connection.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Activity {
    /// Whether one runs.
    pub active: bool,
    /// For which session it runs, or ran until it was given up.
    pub session_id: Option<String>,
    /// When one was recorded last.
    pub last_successful_heartbeat: Option<DateTime<Utc>>,
    /// How many failed since.
    pub consecutive_failures: i32,
}

impl From<Option<Managed>> for Activity {
    fn from(managed: Option<Managed>) -> Self {
        Self {
            active: managed.as_ref().is_some_and(|managed| !managed.given_up),
            last_successful_heartbeat: managed.as_ref().and_then(|managed| managed.last_success),
            consecutive_failures: managed.as_ref().map_or(0, |m| m.consecutive_failures),
            session_id: managed.map(|managed| managed.session_id),
        }
    }
}

/// How the heartbeat of this connection does.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Stats {
    /// Whether one runs.
    pub is_active: bool,
    /// For which session it runs, or ran until it was given up.
    pub session_id: Option<String>,
    /// Time between two heartbeats.
    pub interval_seconds: i64,
    /// When one was recorded last.
    pub last_successful_heartbeat: Option<DateTime<Utc>>,
    /// How long ago that is.
    pub seconds_since_last_heartbeat: Option<f64>,
    /// How many failed since.
    pub consecutive_failures: i32,
    /// After how many it is given up.
    pub max_consecutive_failures: i32,
    /// Whether it runs, none failed, and the last one is not overdue.
    pub healthy: bool,
    /// What the last failure was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
    /// What is amiss although heartbeats are recorded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
}

/// How late a heartbeat may come before it counts as overdue, in intervals.
const OVERDUE_AFTER: i32 = 2;

impl Stats {
    /// The state of `managed` at `now`. `also_used_by` is another session that this connection has
    /// acted for since.
    pub fn new(
        managed: Option<Managed>,
        interval: TimeDelta,
        max_failures: i32,
        also_used_by: Option<String>,
        now: DateTime<Utc>,
    ) -> Self {
        let last_error = managed.as_ref().and_then(|managed| managed.last_error.clone());
        let activity = Activity::from(managed);
        let since = activity.last_successful_heartbeat.map(|at| age::age(at, now));
        let in_time = since.is_some_and(|since| since <= interval * OVERDUE_AFTER);
        Self {
            healthy: activity.active
                && activity.consecutive_failures == 0
                && in_time
                && also_used_by.is_none(),
            is_active: activity.active,
            session_id: activity.session_id,
            // In whole seconds, for what is mostly half a minute.
            interval_seconds: interval.num_seconds().max(1),
            last_successful_heartbeat: activity.last_successful_heartbeat,
            seconds_since_last_heartbeat: since.map(age::seconds),
            consecutive_failures: activity.consecutive_failures,
            max_consecutive_failures: max_failures,
            last_error,
            warning: also_used_by.map(|other| {
                format!("this connection also acts for session \"{other}\": behind a transaction pooler it says nothing about either session's life")
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn managed() -> Managed {
        Managed {
            session_id: "s1".into(),
            last_success: Some(DateTime::UNIX_EPOCH),
            consecutive_failures: 0,
            last_error: None,
            given_up: false,
        }
    }

    fn stats(managed: Option<Managed>, seconds: i64, other: Option<&str>) -> Stats {
        let now = DateTime::UNIX_EPOCH + TimeDelta::seconds(seconds);
        Stats::new(managed, TimeDelta::seconds(30), 3, other.map(str::to_owned), now)
    }

    #[test]
    fn the_keys_are_the_seed_system_s() {
        assert_eq!(
            serde_json::to_value(stats(Some(managed()), 12, None)).unwrap(),
            json!({
                "isActive": true,
                "sessionId": "s1",
                "intervalSeconds": 30,
                "lastSuccessfulHeartbeat": "1970-01-01T00:00:00Z",
                "secondsSinceLastHeartbeat": 12.0,
                "consecutiveFailures": 0,
                "maxConsecutiveFailures": 3,
                "healthy": true,
            })
        );
        assert_eq!(
            serde_json::to_value(Activity::from(None)).unwrap(),
            json!({ "active": false, "sessionId": null, "lastSuccessfulHeartbeat": null, "consecutiveFailures": 0 })
        );
    }

    #[test]
    fn healthy_means_running_in_time_without_failures_and_alone() {
        assert!(stats(Some(managed()), 60, None).healthy);
        assert!(!stats(Some(managed()), 61, None).healthy, "overdue");
        assert!(!stats(None, 0, None).healthy);
        assert!(!stats(Some(Managed { given_up: true, ..managed() }), 1, None).healthy);
        assert!(!stats(Some(Managed { consecutive_failures: 1, ..managed() }), 1, None).healthy);
        let shared = stats(Some(managed()), 1, Some("s2"));
        assert!(!shared.healthy && shared.warning.unwrap().contains("\"s2\""));
    }

    #[test]
    fn a_heartbeat_that_was_given_up_is_not_active_but_still_seen() {
        let given_up = Managed { given_up: true, consecutive_failures: 3, ..managed() };
        let activity = Activity::from(Some(given_up));
        assert!(!activity.active);
        assert_eq!(activity.session_id.as_deref(), Some("s1"));
        assert_eq!(activity.consecutive_failures, 3);
    }
}
