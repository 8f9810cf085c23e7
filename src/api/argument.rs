//! Arguments of functions: what is accepted, and which error names the argument that is not.

use pg_claims_core::id;

use crate::error::{ClaimError, Result};

/// Accepts an id, or says which argument breaks which rule.
pub fn checked_id<'a>(argument: &'static str, given: Option<&'a str>) -> Result<&'a str> {
    id::check(given).map_err(|rule| ClaimError::InvalidId { argument, rule })
}

/// The longest fact that a session tells of itself, and the longest track, in characters.
pub const MAX_FACT_CHARACTERS: usize = 255;

/// The longest reason and note, in characters.
pub const MAX_REASON_CHARACTERS: usize = 1000;

/// Accepts a text of up to `most` characters: others are shown it with each refusal.
pub fn checked_text<'a>(
    argument: &'static str,
    text: Option<&'a str>,
    most: usize,
) -> Result<Option<&'a str>> {
    // Bytes bound characters from above.
    if text.is_none_or(|text| text.len() <= most || text.chars().count() <= most) {
        return Ok(text);
    }
    Err(ClaimError::InvalidArgument {
        argument,
        reason: format!("must not be longer than {most} characters"),
        hint: Some("Say it shorter; others are shown it. Keep the rest elsewhere.".into()),
    })
}

/// A reason that must be given.
pub fn mandatory_reason(reason: Option<&str>) -> Result<&str> {
    checked_text("p_reason", reason, MAX_REASON_CHARACTERS)?
        .filter(|reason| !reason.trim().is_empty())
        .ok_or_else(|| ClaimError::InvalidArgument {
            argument: "p_reason",
            reason: "must not be NULL or blank".into(),
            hint: Some("Say why, for whoever reads the audit.".into()),
        })
}

/// A reason as it is recorded: without one the default.
pub fn reason_or<'a>(reason: Option<&'a str>, default: &'a str) -> Result<&'a str> {
    let reason = checked_text("p_reason", reason, MAX_REASON_CHARACTERS)?;
    Ok(reason.filter(|reason| !reason.trim().is_empty()).unwrap_or(default))
}

/// The track of a claim, or of the queue.
pub fn checked_track(track: Option<&str>) -> Result<Option<&str>> {
    checked_text("p_track", track, MAX_FACT_CHARACTERS)
}
