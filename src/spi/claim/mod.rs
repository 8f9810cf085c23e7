//! Claims: acquiring an SD, and the history of acquisitions.

mod acquire;
pub mod contradiction;
mod follow;
mod history;
mod picture;
pub mod reap;

pub use acquire::{Request, acquire};
pub use follow::{follow_delete, follow_insert, follow_update};
pub use history::{is_opening, lost, next_id, not_before_the_last, see_latest};
pub use picture::{Picture, Sd, look, see_latest_stops};

use std::cell::{Cell, RefCell};

use crate::spi::heartbeat;

thread_local! {
    /// The acquisitions that this backend is giving to their sessions right now, each with whether it has been ended
    /// meanwhile. A trigger of the user's may claim while a claim is being made, so there may be several.
    static GRANTING: RefCell<Vec<(i64, bool)>> = const { RefCell::new(Vec::new()) };
    /// Whether this backend is ending an acquisition in the way that the functions do.
    static ENDING: Cell<bool> = const { Cell::new(false) };
}

/// Whether a session's row is being written by a statement of the extension's that ends a claim, and
/// says when and why. The trigger that makes direct writes whole asks.
pub fn is_ending() -> bool {
    ENDING.get()
}

/// Marks such a statement until it is dropped, on an error as well.
pub struct Ending(bool);

impl Ending {
    /// Begins.
    pub fn new() -> Self {
        Self(ENDING.replace(true))
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        ENDING.set(self.0);
    }
}

/// From when on a row of claude_sessions may lose its claim to another session or to the reaper.
fn reclaimable_at(schema: &str) -> String {
    let latest = heartbeat::latest(schema, "");
    format!("{schema}.claim_reclaimable_at({latest}, silent_until, stale_after, claimed_at)")
}

/// Whether `claim_id` was opened by this extension for the row that is being written. The trigger
/// that makes direct writes whole asks, to tell a claim's own write from one by hand.
pub fn is_granting(claim_id: i64) -> bool {
    GRANTING.with_borrow(|all| all.iter().any(|(granting, _)| *granting == claim_id))
}

/// The acquisition ends: whoever is granting it must not tell of a claim.
fn note_end(claim_id: i64) {
    GRANTING.with_borrow_mut(|all| {
        for (granting, is_undone) in all {
            *is_undone |= *granting == claim_id;
        }
    });
}

/// Marks an acquisition as being granted until it is dropped, on an error as well.
struct Granting;

impl Granting {
    fn new(claim_id: i64) -> Self {
        GRANTING.with_borrow_mut(|all| all.push((claim_id, false)));
        Self
    }

    /// Whether the acquisition was ended while it was being granted. Those that were begun since have been dropped.
    fn is_undone(&self) -> bool {
        GRANTING.with_borrow(|all| all.last().is_some_and(|(_, is_undone)| *is_undone))
    }
}

impl Drop for Granting {
    fn drop(&mut self) {
        GRANTING.with_borrow_mut(Vec::pop);
    }
}
