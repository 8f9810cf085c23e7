//! Claims: acquiring an SD, and the history of acquisitions.

mod acquire;
mod follow;
mod history;
mod picture;
pub mod reap;

pub use acquire::{Request, acquire};
pub use follow::{follow_delete, follow_insert, follow_update};
pub use history::{is_opening, lost, next_id, see_latest};
pub use picture::{Picture, Sd, look};

use std::cell::Cell;

use crate::spi::heartbeat;

thread_local! {
    /// The acquisition that is being given to its session by this backend right now.
    static GRANTING: Cell<Option<i64>> = const { Cell::new(None) };
    /// Whether it has been ended meanwhile, by a trigger of the user's.
    static UNDONE: Cell<bool> = const { Cell::new(false) };
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
    GRANTING.get() == Some(claim_id)
}

/// Marks `claim_id` as being granted until it is dropped, on an error as well.
struct Granting {
    before: Option<i64>,
    was_undone: bool,
}

impl Granting {
    fn new(claim_id: i64) -> Self {
        Self { before: GRANTING.replace(Some(claim_id)), was_undone: UNDONE.replace(false) }
    }

    /// Whether the acquisition was ended while it was being granted.
    fn is_undone(&self) -> bool {
        UNDONE.get()
    }
}

impl Drop for Granting {
    fn drop(&mut self) {
        GRANTING.set(self.before);
        UNDONE.set(self.was_undone);
    }
}
