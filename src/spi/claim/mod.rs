//! Claims: acquiring an SD, and the history of acquisitions.

mod acquire;
mod history;
mod picture;
pub mod reap;

pub use acquire::acquire;
pub use history::{close, discard, is_opening, lost, next_id, open, open_as};
pub use picture::{Picture, look};

use std::cell::Cell;

thread_local! {
    /// The acquisition that is being given to its session by this backend right now.
    static GRANTING: Cell<Option<i64>> = const { Cell::new(None) };
}

/// From when on a row of claude_sessions may lose its claim to another session or to the reaper.
fn reclaimable_at(schema: &str) -> String {
    format!("{schema}.claim_reclaimable_at(heartbeat_at, silent_until, stale_after, claimed_at)")
}

/// Whether `claim_id` was opened by this extension for the row that is being written. The trigger
/// that makes direct writes whole asks, to tell a claim's own write from one by hand.
pub fn is_granting(claim_id: i64) -> bool {
    GRANTING.get() == Some(claim_id)
}

/// Marks `claim_id` as being granted until it is dropped, on an error as well.
struct Granting(Option<i64>);

impl Granting {
    fn new(claim_id: i64) -> Self {
        Self(GRANTING.replace(Some(claim_id)))
    }
}

impl Drop for Granting {
    fn drop(&mut self) {
        GRANTING.set(self.0);
    }
}
