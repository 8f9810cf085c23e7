//! The messages that listeners on channel `pg_claims` receive.

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::Value;

/// PostgreSQL takes messages of less than 8000 bytes.
const MAX_BYTES: usize = 7999;

/// The longest reason that is sent whole, in characters. A reason is free text of any length.
pub const MAX_REASON_CHARACTERS: usize = 500;

/// So many events that become visible together have a message each. Every message costs every listener and
/// the server alike; of more, each message tells as many as fit.
const FEW: usize = 50;

/// The messages that tell these events, in order: a JSON object each or, where there are many, several,
/// a line each.
#[must_use]
pub fn messages(payloads: Vec<String>) -> Vec<String> {
    if payloads.len() <= FEW {
        return payloads;
    }
    let mut messages: Vec<String> = Vec::new();
    for payload in payloads {
        match messages.last_mut() {
            Some(message) if message.len() + 1 + payload.len() <= MAX_BYTES => {
                message.push('\n');
                message.push_str(&payload);
            }
            _ => messages.push(payload),
        }
    }
    messages
}

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
    /// The event as one line of JSON, short enough to be sent.
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
        let payload = self.line()?;
        if payload.len() <= MAX_BYTES {
            return Ok(payload);
        }
        self.detail = Value::Null;
        let payload = self.line()?;
        if payload.len() <= MAX_BYTES {
            return Ok(payload);
        }
        // A bound backlog's keys may be of any length: `lifecycle_events_since` tells them.
        self.sd_id = None;
        self.line()
    }

    /// As JSON without anything that some language takes for the end of a line, and JSON does not.
    fn line(&self) -> serde_json::Result<String> {
        const ENDS: [char; 3] = ['\u{85}', '\u{2028}', '\u{2029}'];
        let mut line = serde_json::to_string(self)?;
        for end in ENDS {
            if line.contains(end) {
                line = line.replace(end, &format!("\\u{:04x}", u32::from(end)));
            }
        }
        Ok(line)
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
    fn few_events_have_a_message_each() {
        let few: Vec<String> = (0..FEW).map(|n| n.to_string()).collect();
        assert_eq!(messages(few.clone()), few);
        assert_eq!(messages(Vec::new()), Vec::<String>::new());
    }

    #[test]
    fn of_many_events_each_message_tells_as_many_as_fit() {
        let payload = |n: usize| {
            format!("{n:>width$}", width = if n.is_multiple_of(7) { 7999 } else { 1 + n * 13 })
        };
        let many: Vec<String> = (0..300).map(payload).collect();
        let messages = messages(many.clone());
        let told: Vec<&str> = messages.iter().flat_map(|message| message.split('\n')).collect();
        assert_eq!(told, many);
        assert!(messages.iter().all(|message| message.len() <= MAX_BYTES));
        let fits = |pair: &[String]| {
            pair[0].len() + 1 + pair[1].split('\n').next().unwrap().len() <= MAX_BYTES
        };
        assert!(!messages.windows(2).any(fits));
        let even: Vec<String> = (0..80).map(|_| "x".repeat(99)).collect();
        assert_eq!(super::messages(even.clone()), [even.join("\n")]);
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
    fn an_event_is_one_line_for_everybody() {
        let odd = "a\u{85}b\u{2028}c\u{2029}d\n\r\u{b}\u{c}\u{1c}\u{1d}\u{1e}e";
        let payload = Notice { reason: Some(odd.into()), ..notice() }.payload().unwrap();
        // All at which Python's str.splitlines() splits, which knows the most.
        let ends = "\n\r\u{b}\u{c}\u{1c}\u{1d}\u{1e}\u{85}\u{2028}\u{2029}";
        assert!(!payload.contains(|c| ends.contains(c)), "{payload}");
        let read: Value = serde_json::from_str(&payload).unwrap();
        assert_eq!(read["reason"], odd);
        let widest = Notice {
            session_id: "\u{2028}".repeat(200),
            sd_id: Some("\u{2028}".repeat(200)),
            reason: Some("\u{2029}".repeat(501)),
            ..notice()
        };
        assert!(widest.payload().unwrap().len() <= MAX_BYTES);
    }

    #[test]
    fn an_id_of_whatever_length_blocks_nothing() {
        let endless = Notice { sd_id: Some("x".repeat(9000)), ..notice() };
        let read: Value = serde_json::from_str(&endless.payload().unwrap()).unwrap();
        assert_eq!((&read["sd_id"], &read["id"]), (&Value::Null, &json!(7)));
    }
}
