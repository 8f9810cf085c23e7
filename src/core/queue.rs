//! Why the queue gave an SD, and why it gave none.

use serde::Serialize;

/// Why a session was given this SD and no other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum QueueReason {
    /// The reaper had taken it from this very session, and nobody has claimed it since.
    Lost,
    /// A session on the same host and code base was the last to work on it.
    Affinity,
    /// It was the first in the order of the queue.
    Order,
}

impl QueueReason {
    /// The word for it, in JSON and in `sd_claims`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Lost => "lost",
            Self::Affinity => "affinity",
            Self::Order => "order",
        }
    }
}

/// How the queue came to give an SD.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Queued<'a> {
    /// Why this one.
    pub reason: QueueReason,
    /// The track that was asked for.
    pub track: Option<&'a str>,
}

/// Why no SD could be given: how many there are that are not finished, and what keeps them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Shortage {
    /// The track that was asked for.
    pub track: Option<String>,
    /// Held by a session.
    pub claimed: i64,
    /// Waiting for other SDs.
    pub blocked_by_dependency: i64,
    /// Those among them that wait for themselves.
    pub in_cycle: i64,
    /// In conflict with an SD that a session holds.
    pub conflict: i64,
    /// Stopped by a person.
    pub held: i64,
    /// Being claimed or written by a transaction that has not ended.
    pub busy: i64,
}

impl Shortage {
    /// One line that says so.
    pub fn message(&self) -> String {
        let track = self.track.as_deref().map(|track| format!(" in track {track}"));
        let track = track.unwrap_or_default();
        let counts = [
            (self.claimed, "claimed".to_owned()),
            (self.blocked_by_dependency, self.blocked()),
            (self.conflict, "in conflict".to_owned()),
            (self.held, "held".to_owned()),
            (self.busy, "being written by others".to_owned()),
        ];
        let told: Vec<String> = counts
            .into_iter()
            .filter(|(count, _)| *count > 0)
            .map(|(count, what)| format!("{count} {what}"))
            .collect();
        if told.is_empty() {
            format!("the backlog has no unfinished SD{track}")
        } else {
            format!("no SD{track} can be claimed now: {}", told.join(", "))
        }
    }

    fn blocked(&self) -> String {
        match self.in_cycle {
            0 => "blocked by dependencies".into(),
            circular => format!("blocked by dependencies ({circular} of them in a circle)"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_queue_says_why() {
        assert_eq!(Shortage::default().message(), "the backlog has no unfinished SD");
        let shortage = Shortage {
            track: Some("A".into()),
            claimed: 3,
            blocked_by_dependency: 2,
            in_cycle: 1,
            busy: 1,
            ..Shortage::default()
        };
        assert_eq!(
            shortage.message(),
            "no SD in track A can be claimed now: 3 claimed, 2 blocked by dependencies (1 of them in a circle), 1 being written by others"
        );
    }
}
