//! What a person sees while a long step runs.

/// Announces a step.
pub fn step(what: impl std::fmt::Display) {
    eprintln!("==> {what}");
}

/// Says something about the step that runs.
pub fn note(what: impl std::fmt::Display) {
    eprintln!("    {what}");
}
