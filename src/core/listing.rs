//! The queue as a person reads it in a terminal.

use unicode_segmentation::UnicodeSegmentation;
use unicode_width::UnicodeWidthStr;

use crate::text::printable;

/// Session ids are cut to so many characters.
const SESSION_CHARACTERS: usize = 12;

/// In less room than this a title says nothing and is left out.
const LEAST_TITLE: usize = 8;

const ELLIPSIS: &str = "...";

/// An SD in the queue.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Entry {
    /// The SD.
    pub sd_id: String,
    /// Its title.
    pub title: Option<String>,
    /// Its track.
    pub track: Option<String>,
    /// Whether it can be claimed, or what keeps it.
    pub eligibility: String,
    /// The same in words.
    pub reason: Option<String>,
    /// Who holds it.
    pub claimed_by: Option<String>,
    /// Whole minutes since then.
    pub claim_minutes: Option<i64>,
    /// The owner's last heartbeat.
    pub heartbeat_age_human: Option<String>,
    /// `green`, `yellow` or `red`, by its age.
    pub heartbeat_color: Option<String>,
}

/// How the queue is shown.
#[derive(Debug, Clone)]
pub struct Style<'a> {
    /// The columns of the terminal.
    pub width: usize,
    /// Whether the terminal understands ANSI colours.
    pub color: bool,
    /// Whose SD is to be marked.
    pub session_id: Option<&'a str>,
}

/// The lines that a person reads: SDs in the order given, by track in the order in which those first
/// appear.
pub fn lines(entries: &[Entry], style: &Style<'_>) -> Vec<String> {
    let mut tracks: Vec<(Option<&str>, Vec<&Entry>)> = Vec::new();
    for entry in entries {
        let track = entry.track.as_deref();
        match tracks.iter_mut().find(|(known, _)| *known == track) {
            Some((_, of_track)) => of_track.push(entry),
            None => tracks.push((track, vec![entry])),
        }
    }
    let mut lines = Vec::new();
    for (track, of_track) in tracks {
        if !lines.is_empty() {
            lines.push(String::new());
        }
        lines.push(track.map_or_else(
            || "NO TRACK".into(),
            |track| cut(&format!("TRACK {}", printable(track)), style.width),
        ));
        for entry in of_track {
            lines.push(first_line(entry, style));
            lines.extend(second_line(entry, style));
        }
    }
    lines
}

fn first_line(entry: &Entry, style: &Style<'_>) -> String {
    let (word, color) = match entry.eligibility.as_str() {
        "available" => ("READY  ", "green"),
        "claimed" => ("CLAIMED", "yellow"),
        "held" => ("HELD   ", "red"),
        "conflict" => ("CONFLICT", "red"),
        _ => ("BLOCKED", "red"),
    };
    let id = format!(" [{}]", printable(&entry.sd_id));
    let room = style.width.saturating_sub(word.width() + id.width() + " - ".len());
    let title = entry
        .title
        .as_deref()
        .filter(|title| !title.is_empty() && (room >= LEAST_TITLE || title.width() <= room))
        .map(|title| format!(" - {}", cut(&printable(title), room)));
    format!("{}{id}{}", paint(word, Some(color), style), title.unwrap_or_default())
}

fn second_line(entry: &Entry, style: &Style<'_>) -> Option<String> {
    const INDENT: &str = "        └─ ";
    let room = style.width.saturating_sub(INDENT.width());
    let owner = entry.claimed_by.as_deref().filter(|_| entry.eligibility == "claimed");
    let Some(owner) = owner else {
        let reason = printable(entry.reason.as_deref()?);
        let mut characters = reason.chars();
        let first = characters.next()?.to_uppercase();
        let mine = mark(entry, style);
        let reason = format!("{first}{}", characters.as_str());
        return Some(format!("{INDENT}{}{mine}", cut(&reason, room.saturating_sub(mine.width()))));
    };
    let heartbeat = entry.heartbeat_age_human.as_deref().unwrap_or_default();
    let heartbeat = format!("(heartbeat: {heartbeat})");
    Some(format!(
        "{INDENT}Claimed by {} ({}) {}{}",
        short(owner),
        duration(entry.claim_minutes.unwrap_or(0)),
        paint(&heartbeat, entry.heartbeat_color.as_deref(), style),
        mark(entry, style),
    ))
}

/// Tells the reader's own SD.
fn mark(entry: &Entry, style: &Style<'_>) -> &'static str {
    if style.session_id.is_some() && style.session_id == entry.claimed_by.as_deref() {
        " ← you"
    } else {
        ""
    }
}

fn duration(minutes: i64) -> String {
    match minutes {
        ..60 => format!("{minutes}m"),
        60..1440 => format!("{}h", minutes / 60),
        _ => format!("{}d", minutes / 1440),
    }
}

fn short(session_id: &str) -> String {
    let session_id = printable(session_id);
    match session_id.grapheme_indices(true).nth(SESSION_CHARACTERS) {
        Some((end, _)) => format!("{}{ELLIPSIS}", &session_id[..end]),
        None => session_id,
    }
}

/// The text in at most `columns` of a terminal. What a reader sees as one character stays whole; a
/// wide one takes two columns.
fn cut(text: &str, columns: usize) -> String {
    if text.width() <= columns {
        return text.to_owned();
    }
    let room = columns.saturating_sub(ELLIPSIS.len());
    let mut kept = String::new();
    for grapheme in text.graphemes(true) {
        // Of the whole, as the width of a sequence is not the sum of its parts.
        let before = kept.len();
        kept.push_str(grapheme);
        if kept.width() > room {
            kept.truncate(before);
            break;
        }
    }
    kept.truncate(kept.trim_end().len());
    kept.push_str(&ELLIPSIS[..columns.min(ELLIPSIS.len())]);
    kept
}

fn paint(text: &str, color: Option<&str>, style: &Style<'_>) -> String {
    let code = match color.filter(|_| style.color) {
        Some("green") => 32,
        Some("yellow") => 33,
        Some("red") => 31,
        _ => return text.to_owned(),
    };
    format!("\u{1b}[{code}m{text}\u{1b}[0m")
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Style<'static> = Style { width: 80, color: false, session_id: None };

    fn claimed() -> Entry {
        Entry {
            sd_id: "SD-XXX-001".into(),
            title: Some("Feature Title that goes on".into()),
            eligibility: "claimed".into(),
            claimed_by: Some("session_abc123_tty1_1234".into()),
            claim_minutes: Some(10),
            heartbeat_age_human: Some("30s ago".into()),
            heartbeat_color: Some("green".into()),
            ..Entry::default()
        }
    }

    #[test]
    fn a_claimed_sd_reads_to_the_letter() {
        let narrow = Style { width: 39, ..PLAIN };
        assert_eq!(
            lines(&[claimed()], &narrow)[1..],
            [
                "CLAIMED [SD-XXX-001] - Feature Title...",
                "        └─ Claimed by session_abc1... (10m) (heartbeat: 30s ago)",
            ]
        );
    }

    #[test]
    fn colours_are_ansi_and_one_s_own_sd_is_marked() {
        let style = Style { color: true, session_id: Some("session_abc123_tty1_1234"), ..PLAIN };
        assert_eq!(
            lines(&[claimed()], &style)[1..],
            [
                "\u{1b}[33mCLAIMED\u{1b}[0m [SD-XXX-001] - Feature Title that goes on",
                "        └─ Claimed by session_abc1... (10m) \u{1b}[32m(heartbeat: 30s ago)\u{1b}[0m ← you",
            ]
        );
        for (color, code) in [("yellow", 33), ("red", 31)] {
            let entry = Entry { heartbeat_color: Some(color.into()), ..claimed() };
            let shown = lines(&[entry], &style);
            assert!(shown[2].contains(&format!("\u{1b}[{code}m(heartbeat")), "{}", shown[2]);
        }
    }

    #[test]
    fn what_keeps_the_others_stands_below_them() {
        let of = |eligibility: &str, reason: Option<&str>| Entry {
            sd_id: "SD-1".into(),
            title: Some("T".into()),
            eligibility: eligibility.into(),
            reason: reason.map(str::to_owned),
            ..Entry::default()
        };
        let shown = lines(
            &[
                of("available", None),
                of("blocked_by_dependency", Some("waits for SD-2")),
                of("held", Some("held by ann: wait")),
                of("conflict", Some("in conflict")),
            ],
            &PLAIN,
        );
        assert_eq!(
            shown,
            [
                "NO TRACK",
                "READY   [SD-1] - T",
                "BLOCKED [SD-1] - T",
                "        └─ Waits for SD-2",
                "HELD    [SD-1] - T",
                "        └─ Held by ann: wait",
                "CONFLICT [SD-1] - T",
                "        └─ In conflict",
            ]
        );
    }

    #[test]
    fn tracks_come_in_the_order_of_their_first_sd() {
        let of = |sd_id: &str, track: Option<&str>| Entry {
            sd_id: sd_id.into(),
            track: track.map(str::to_owned),
            eligibility: "available".into(),
            ..Entry::default()
        };
        let shown = lines(&[of("1", Some("B")), of("2", None), of("3", Some("B"))], &PLAIN);
        let expected = ["TRACK B", "READY   [1]", "READY   [3]", "", "NO TRACK", "READY   [2]"];
        assert_eq!(shown, expected);
    }

    #[test]
    fn a_title_is_cut_to_the_terminal_s_columns_and_between_characters() {
        for (text, columns, expected) in [
            ("short", 5, "short"),
            ("longer one", 9, "longer..."),
            ("a space here", 10, "a space..."),
            // Two columns each.
            ("日本語の題名", 12, "日本語の題名"),
            ("日本語の題名", 11, "日本語の..."),
            ("日本語の題名", 10, "日本語..."),
            // One character of several code points.
            (
                "e\u{301}e\u{301}e\u{301}e\u{301}e\u{301}",
                5,
                "e\u{301}e\u{301}e\u{301}e\u{301}e\u{301}",
            ),
            ("e\u{301}e\u{301}e\u{301}e\u{301}e\u{301}", 4, "e\u{301}..."),
            ("👩\u{200d}👩\u{200d}👧 family", 6, "👩\u{200d}👩\u{200d}👧..."),
            ("anything", 2, ".."),
        ] {
            let shown = cut(text, columns);
            assert_eq!(shown, expected, "{columns}");
            assert!(shown.width() <= columns);
        }
        let wide = Entry { title: Some("題名".repeat(60)), ..claimed() };
        for width in 20..120 {
            let shown = lines(std::slice::from_ref(&wide), &Style { width, ..PLAIN });
            assert!(shown[1].width() <= width.max("CLAIMED [SD-XXX-001]".len()), "{}", shown[1]);
        }
    }

    #[test]
    fn ages_truncate_and_short_ids_stay_whole() {
        for (minutes, expected) in [(0, "0m"), (59, "59m"), (119, "1h"), (1440, "1d")] {
            assert_eq!(duration(minutes), expected);
        }
        assert_eq!(short("exactly12chr"), "exactly12chr");
        assert_eq!(short("thirteen-char"), "thirteen-cha...");
    }

    #[test]
    fn what_others_wrote_cannot_steer_the_terminal() {
        let forged = Entry {
            title: Some("x\u{1b}[2J\nREADY   [SD-2]".into()),
            reason: Some("held by a: \u{1b}]0;x\u{7}".into()),
            eligibility: "held".into(),
            ..claimed()
        };
        for line in lines(&[forged], &PLAIN) {
            assert!(!line.chars().any(char::is_control), "{line:?}");
        }
    }
}
