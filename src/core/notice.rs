//! The message that listeners on channel `pg_claims` receive.

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::Value;

/// PostgreSQL takes messages of less than 8000 bytes.
const MAX_BYTES: usize = 7999;

/// The longest reason that is sent whole, in characters. A reason is free text of any length.
const MAX_REASON_CHARACTERS: usize = 500;

/// An event as it is announced.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Notice {
    /// Its place in the order of all events: the cursor of `lifecycle_events_since`.
    pub id: i64,
    /// What happened.
    pub event: String,
    /// The session that it happened to.
    pub session_id: String,
    /// The SD; null if there is none, or its id is too long to be sent.
    pub sd_id: Option<String>,
    /// The fencing token of the acquisition.
    pub claim_id: Option<i64>,
    /// When.
    pub at: DateTime<Utc>,
    /// Why; cut if it is long.
    pub reason: Option<String>,
    /// What else belongs to it; null where the message would be too long with it.
    pub detail: Value,
}

impl Notice {
    /// The message, short enough to be sent.
    ///
    /// # Errors
    /// If it cannot be written as JSON, which no event is known to cause.
    pub fn payload(mut self) -> serde_json::Result<String> {
        if let Some(reason) = &mut self.reason
            && let Some((end, _)) = reason.char_indices().nth(MAX_REASON_CHARACTERS)
        {
            reason.truncate(end);
            reason.push('…');
        }
        let payload = serde_json::to_string(&self)?;
        if payload.len() <= MAX_BYTES {
            return Ok(payload);
        }
        self.detail = Value::Null;
        let payload = serde_json::to_string(&self)?;
        if payload.len() <= MAX_BYTES {
            return Ok(payload);
        }
        // A bound backlog's keys may be of any length: `lifecycle_events_since` tells them.
        self.sd_id = None;
        serde_json::to_string(&self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn notice() -> Notice {
        Notice {
            id: 7,
            event: "released".into(),
            session_id: "s1".into(),
            sd_id: Some("SD-1".into()),
            claim_id: Some(3),
            at: DateTime::UNIX_EPOCH,
            reason: Some("done".into()),
            detail: json!({}),
        }
    }

    #[test]
    fn a_message_is_one_json_object() {
        assert_eq!(
            notice().payload().unwrap(),
            r#"{"id":7,"event":"released","session_id":"s1","sd_id":"SD-1","claim_id":3,"at":"1970-01-01T00:00:00Z","reason":"done","detail":{}}"#
        );
    }

    #[test]
    fn the_longest_ids_and_reason_fit() {
        // Two bytes become six: the widest that JSON makes of what an id or a reason may hold.
        let wide = |n: usize| "\u{1f600}".repeat(n);
        let quotes = |n: usize| "\u{1}".repeat(n);
        let longest = Notice {
            session_id: wide(200),
            sd_id: Some(wide(200)),
            reason: Some(quotes(100_000)),
            detail: json!({ "taken_over_by": wide(200), "released_sd": wide(200), "x": wide(2000) }),
            ..notice()
        };
        let payload = longest.payload().unwrap();
        assert!(payload.len() <= MAX_BYTES, "{}", payload.len());
        let read: Value = serde_json::from_str(&payload).unwrap();
        assert!(read["reason"].as_str().unwrap().ends_with('…'));
        assert_eq!(read["detail"], Value::Null);
        assert_eq!(read["sd_id"].as_str().unwrap().chars().count(), 200);
    }

    #[test]
    fn an_id_of_whatever_length_blocks_nothing() {
        let endless = Notice { sd_id: Some("x".repeat(9000)), ..notice() };
        let read: Value = serde_json::from_str(&endless.payload().unwrap()).unwrap();
        assert_eq!((&read["sd_id"], &read["id"]), (&Value::Null, &json!(7)));
    }
}
