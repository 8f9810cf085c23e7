//! Claims: acquiring an SD, and the history of acquisitions.

mod acquire;
pub mod contradiction;
mod follow;
mod history;
mod picture;
pub mod reap;

pub use acquire::{Request, acquire};
pub use follow::{follow_delete, follow_insert, follow_update};
pub use history::{lost, next_id, not_before_the_last, see_latest};
pub use picture::{Picture, Sd, look, see_latest_stops};

use crate::spi::heartbeat;

/// From when on a row of claude_sessions may lose its claim to another session or to the reaper.
fn reclaimable_at(schema: &str) -> String {
    let latest = heartbeat::latest(schema, "");
    format!("{schema}.claim_reclaimable_at({latest}, silent_until, stale_after, claimed_at)")
}
