//! What a session id or an SD id may look like.

use thiserror::Error;

/// The longest id that is accepted, in characters.
pub const MAX_ID_CHARACTERS: usize = 200;

/// Why an id was not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum IdRule {
    /// The argument was NULL.
    #[error("must not be NULL")]
    Null,
    /// The argument had no characters, or only white space.
    #[error("must not be empty or blank")]
    Blank,
    /// The argument was longer than [`MAX_ID_CHARACTERS`].
    #[error("must not be longer than {MAX_ID_CHARACTERS} characters")]
    TooLong,
    /// The argument held a control character (a line break, a tab, an escape, …).
    #[error("must not contain control characters")]
    ControlCharacter,
    /// The argument held a character that turns the direction of writing, and so makes one id look like another.
    #[error("must not contain characters that turn the direction of writing")]
    BidirectionalControl,
}

/// Accepts an id, or says which rule it breaks.
///
/// Ids are shown in terminals, logs and refusals, so control characters are out; they are matched
/// to the letter, so nothing is trimmed or folded.
///
/// # Errors
/// The first [`IdRule`] that `id` breaks.
pub fn check(id: Option<&str>) -> Result<&str, IdRule> {
    let id = id.ok_or(IdRule::Null)?;
    if id.trim().is_empty() {
        return Err(IdRule::Blank);
    }
    if id.chars().any(char::is_control) {
        return Err(IdRule::ControlCharacter);
    }
    if !id.is_ascii() && id.chars().any(turns_direction) {
        return Err(IdRule::BidirectionalControl);
    }
    // Bytes bound characters from above: the count is only needed for the few long ones.
    if id.len() > MAX_ID_CHARACTERS && id.chars().count() > MAX_ID_CHARACTERS {
        return Err(IdRule::TooLong);
    }
    Ok(id)
}

/// Whether a character turns the direction of writing.
pub fn turns_direction(c: char) -> bool {
    matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rule_is_named() {
        assert_eq!(check(None), Err(IdRule::Null));
        for blank in ["", " ", "\t\n", "\u{a0}\u{2003}"] {
            assert_eq!(check(Some(blank)), Err(IdRule::Blank), "{blank:?}");
        }
        for control in ["a\nb", "\u{1b}[31m", "a\u{0}", "\u{7f}x", "x\u{85}y"] {
            assert_eq!(check(Some(control)), Err(IdRule::ControlCharacter), "{control:?}");
        }
        for turned in ["a\u{202e}b", "\u{2066}x", "x\u{200f}", "x\u{61c}y"] {
            assert_eq!(check(Some(turned)), Err(IdRule::BidirectionalControl), "{turned:?}");
        }
        assert_eq!(check(Some(&"x".repeat(201))), Err(IdRule::TooLong));
    }

    #[test]
    fn the_limit_counts_characters_not_bytes() {
        let wide = "é".repeat(200);
        assert_eq!(check(Some(&wide)), Ok(wide.as_str()));
        assert_eq!(check(Some(&"é".repeat(201))), Err(IdRule::TooLong));
    }

    #[test]
    fn an_id_is_taken_to_the_letter() {
        assert_eq!(check(Some(" SD-1 ")), Ok(" SD-1 "));
    }
}
