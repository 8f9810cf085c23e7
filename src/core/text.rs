//! The words that people read.

use chrono::{DateTime, Utc};

use crate::outcome::{Claimed, Owner};
use crate::refusal::Refusal;
use crate::{age, id};

/// What a field reads as when the session never told.
const UNKNOWN: &str = "unknown";

/// One line that says why a request was refused, clean whatever is stored.
pub fn message(refusal: &Refusal) -> String {
    clean(&reason(refusal))
}

fn reason(refusal: &Refusal) -> String {
    match refusal {
        Refusal::AlreadyClaimed { sd_id, owner } => format!(
            "{} is already claimed by {} (heartbeat {}, {}host {})",
            printable(sd_id),
            owner.session_id,
            age::human(owner.heartbeat_age),
            waiting(owner).map(|(name, what)| format!("{name} {what}, ")).unwrap_or_default(),
            told(&owner.hostname),
        ),
        Refusal::SessionNotFound { session_id } => {
            format!("session \"{session_id}\" is not registered")
        }
        Refusal::SessionReleased { session_id } => format!("session \"{session_id}\" has ended"),
        Refusal::SessionBusy { session_id } => {
            format!("session \"{session_id}\" is being written by another transaction")
        }
        Refusal::SdNotFound { sd_id } => format!("the backlog has no SD \"{sd_id}\""),
        Refusal::SdTerminalStatus { sd_id, status } => {
            format!("{sd_id} is {}", printable(status))
        }
        Refusal::QuotaReached { role, limit, quota } => {
            format!("role \"{role}\" has {limit} {}, which is its quota", quota.what())
        }
        Refusal::Held { sd_id, hold } => {
            format!("{sd_id} is held by {}: {}", hold.held_by, printable(&hold.reason))
        }
        Refusal::Conflict { sd_id, conflict } => format!(
            "{sd_id} is in conflict ({}) with {}, which {} has claimed",
            printable(&conflict.conflict_type),
            conflict.conflicting_sd,
            conflict.conflicting_session,
        ),
        Refusal::NoConflict { sd_id, other } => format!("{sd_id} and {other} are in no conflict"),
        Refusal::NotHeld { sd_id } => format!("{sd_id} is not held"),
        Refusal::SdBusy { sd_id } => format!("{sd_id} is being written by another transaction"),
        Refusal::QueueEmpty { shortage } => shortage.message(),
        Refusal::NoClaim { session_id } => format!("session \"{session_id}\" holds no SD"),
        Refusal::ClaimLost { session_id, claim_id, .. } => {
            format!("claim {claim_id} is not held by session \"{session_id}\"")
        }
    }
}

/// What to do about a refusal.
pub fn hint(refusal: &Refusal) -> Option<&'static str> {
    match refusal {
        Refusal::AlreadyClaimed { .. } => Some(
            "Work on another SD, or try again: the claim ends by release_sd() or when its session goes stale.",
        ),
        Refusal::QuotaReached { quota, .. } => Some(quota.hint()),
        Refusal::SessionNotFound { .. } => Some("Call register_session() first."),
        Refusal::SessionReleased { .. } => {
            Some("Call register_session() to bring the session back.")
        }
        Refusal::SessionBusy { .. } => Some(
            "Beat again at the next turn; until that transaction ends nothing can be taken from the session.",
        ),
        Refusal::SdNotFound { .. } => {
            Some("See v_directives for the SDs that can be claimed, by their ids.")
        }
        Refusal::SdTerminalStatus { .. } => {
            Some("Set the SD's status back if there is more work to do on it.")
        }
        Refusal::Held { .. } => {
            Some("Work on another SD; an operator takes the stop sign away with unhold_sd().")
        }
        Refusal::Conflict { .. } => Some(
            "Work on another SD, or try again once the other one is released; an operator ends the conflict with resolve_conflict().",
        ),
        Refusal::QueueEmpty { shortage } if shortage.in_cycle > 0 => Some(
            "Take one dependency out of each circle: v_sd_next names them. For the rest try again later.",
        ),
        Refusal::QueueEmpty { .. } => Some(
            "Try again when an SD has been released, finished or added; v_sd_next says of each what keeps it.",
        ),
        Refusal::SdBusy { .. } => Some("Try again once that transaction has ended."),
        Refusal::NoClaim { .. } | Refusal::NoConflict { .. } | Refusal::NotHeld { .. } => None,
        Refusal::ClaimLost { .. } => {
            Some("Stop working under this claim; claim the SD again if it is free.")
        }
    }
}

/// The text that a person sees after a granted claim.
pub fn claimed(claim: &Claimed, title: Option<&str>) -> String {
    let mut text = if claim.already_owned {
        format!("✅ {} is already yours", printable(&claim.sd_id))
    } else {
        format!("✅ {} is claimed", printable(&claim.sd_id))
    };
    let mut line = |name: &str, value: &str| {
        text.push_str("\n   ");
        text.push_str(name);
        text.push_str(": ");
        text.push_str(&printable(value));
    };
    if let Some(title) = title {
        line("Title", title);
    }
    line("Session", &claim.session_id);
    line("Claim", &claim.claim_id.to_string());
    if let Some(track) = &claim.track {
        line("Track", track);
    }
    if let Some(released) = &claim.released_sd {
        line("Released", released);
    }
    if let Some(loser) = &claim.took_over {
        let loser = format!("{} (heartbeat {})", loser.session_id, loser.heartbeat_age_human);
        line("Took over from", &loser);
    }
    text
}

/// The text that a person sees after a refusal.
pub fn refused(refusal: &Refusal) -> String {
    if let Refusal::AlreadyClaimed { sd_id, owner } = refusal {
        return already_claimed(sd_id, owner);
    }
    let mut text = format!("❌ {}", message(refusal));
    if let Some(hint) = hint(refusal) {
        text.push_str("\n   ");
        text.push_str(hint);
    }
    text
}

fn already_claimed(sd_id: &str, owner: &Owner) -> String {
    let mut text = format!(
        "❌ {} is already claimed\n   Session: {}\n   Heartbeat: {}\n   Hostname: {}\n   TTY: {}",
        printable(sd_id),
        printable(&owner.session_id),
        age::human(owner.heartbeat_age),
        told(&owner.hostname),
        told(&owner.tty),
    );
    if let Some((name, what)) = waiting(owner) {
        text.push_str(&format!("\n   {}{}: {what}", name[..1].to_uppercase(), &name[1..]));
    }
    text
}

/// Why an owner that does not beat keeps the SD all the same.
fn waiting(owner: &Owner) -> Option<(&'static str, String)> {
    if owner.guarded {
        return Some(("at work", "in an open transaction".into()));
    }
    let told = |name, until: Option<DateTime<Utc>>| {
        until.map(|until| (name, until.format("%Y-%m-%d %H:%M:%S UTC").to_string()))
    };
    told("silent until", owner.silent_until)
        .or_else(|| told("stale, kept for it until", owner.kept_until))
}

/// What a session told of itself, on one line: control characters could forge the lines that follow
/// or steer the reader's terminal.
pub fn told(fact: &Option<String>) -> String {
    fact.as_deref().map_or_else(|| UNKNOWN.into(), printable)
}

/// So much of a text is shown to people, in characters; what is longer is cut.
pub const MOST_SHOWN: usize = 1000;

/// The text as people may see it: on one line, without characters that could forge lines, steer the reader's terminal or
/// hide, and not longer than [`MOST_SHOWN`].
pub fn printable(text: &str) -> String {
    let mut characters = text.chars();
    let mut shown: String = characters.by_ref().take(MOST_SHOWN).map(cleaned).collect();
    if characters.next().is_some() {
        shown.push('…');
    }
    shown
}

/// The same for a text of ours whose parts are no longer than that.
fn clean(text: &str) -> String {
    text.chars().map(cleaned).collect()
}

fn cleaned(c: char) -> char {
    if steers(c) || hides(c) { '\u{fffd}' } else { c }
}

fn steers(c: char) -> bool {
    // The last two separate lines and paragraphs.
    c.is_control() || id::turns_direction(c) || matches!(c, '\u{2028}' | '\u{2029}')
}

/// Whether a character takes no room: zero-width spaces and joiners, soft hyphens, annotations, tags.
fn hides(c: char) -> bool {
    matches!(c,
        '\u{ad}' | '\u{34f}' | '\u{115f}' | '\u{1160}' | '\u{180b}'..='\u{180f}'
        | '\u{200b}'..='\u{200d}' | '\u{2060}'..='\u{2065}' | '\u{206a}'..='\u{206f}' | '\u{3164}'
        | '\u{feff}' | '\u{ffa0}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::{TookOver, tests::owner};

    fn refused_by(owner: Owner) -> String {
        refused(&Refusal::AlreadyClaimed { sd_id: "SD-LEO-001".into(), owner })
    }

    #[test]
    fn the_refusal_reads_to_the_letter() {
        assert_eq!(
            refused_by(owner()),
            "❌ SD-LEO-001 is already claimed\n   Session: session_abc123_tty1_1234\n   Heartbeat: 45s ago\n   Hostname: dev-machine\n   TTY: win-1234"
        );
    }

    #[test]
    fn an_owner_without_host_or_tty_is_still_named() {
        let silent = Owner { hostname: None, tty: None, ..owner() };
        assert_eq!(
            refused_by(silent),
            "❌ SD-LEO-001 is already claimed\n   Session: session_abc123_tty1_1234\n   Heartbeat: 45s ago\n   Hostname: unknown\n   TTY: unknown"
        );
    }

    #[test]
    fn an_owner_that_announced_silence_says_until_when() {
        let until = DateTime::from_timestamp(1_800_000_000, 0);
        let silent = Owner { silent_until: until, ..owner() };
        assert!(refused_by(silent).ends_with("\n   Silent until: 2027-01-15 08:00:00 UTC"));
        let kept = Owner { kept_until: until, ..owner() };
        assert!(
            refused_by(kept).ends_with("\n   Stale, kept for it until: 2027-01-15 08:00:00 UTC")
        );
    }

    #[test]
    fn what_a_session_tells_of_itself_cannot_forge_lines() {
        let forger = Owner { hostname: Some("h\n   TTY: forged\u{1b}[31m".into()), ..owner() };
        let text = refused_by(forger);
        assert_eq!(text.lines().count(), 5, "{text}");
        assert!(!text.contains('\u{1b}'));
    }

    #[test]
    fn what_turns_hides_or_never_ends_is_not_shown() {
        assert_eq!(
            printable("a\u{202e}b\u{200b}c\u{2028}d\u{1b}[2Je\u{feff}"),
            "a\u{fffd}b\u{fffd}c\u{fffd}d\u{fffd}[2Je\u{fffd}"
        );
        assert_eq!(printable("naïve 漢字 ✅"), "naïve 漢字 ✅");
        assert_eq!(printable(&"x".repeat(1001)).chars().count(), 1001);
        assert!(printable(&"x".repeat(1001)).ends_with("x…"));
        for refusal in [
            Refusal::SdTerminalStatus {
                sd_id: "S\u{1b}[1m".into(),
                status: "\u{202e}done\n".into(),
            },
            Refusal::Held {
                sd_id: "S\n".into(),
                hold: crate::outcome::Hold {
                    reason: "\u{1b}]0;x".into(),
                    held_by: "o\n".into(),
                    held_at: DateTime::UNIX_EPOCH,
                },
            },
        ] {
            let text = refused(&refusal);
            assert!(text.lines().count() <= 2, "{text:?}");
            assert!(!text.replace('\n', "").chars().any(|c| steers(c) || hides(c)), "{text:?}");
        }
    }

    #[test]
    fn a_granted_claim_says_what_it_cost_others() {
        let claim = Claimed {
            success: true,
            sd_id: "SD-2".into(),
            session_id: "s".into(),
            track: None,
            claimed_at: DateTime::UNIX_EPOCH,
            claim_id: 9,
            already_owned: false,
            released_sd: Some("SD-1".into()),
            took_over: Some(TookOver::from(&owner())),
        };
        assert_eq!(
            claimed(&claim, Some("Second")),
            "✅ SD-2 is claimed\n   Title: Second\n   Session: s\n   Claim: 9\n   Released: SD-1\n   Took over from: session_abc123_tty1_1234 (heartbeat 45s ago)"
        );
    }
}
