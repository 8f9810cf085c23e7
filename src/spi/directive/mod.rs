//! The backlog: the extension's own table or one of the user's.

mod attach;
mod backlog;
mod bind;
mod code;
mod column_type;
mod columns;
mod find;
mod guarded;
mod indexes;
mod mirror;
mod own;
mod partitions;
mod table;

pub use attach::{attach_own, rebuild_views};
pub use backlog::Backlog;
pub use bind::{bind, unbind};
pub use columns::Columns;
pub use find::{Found, find};
pub use guarded::{guard_table, unguard_table};
pub use mirror::{count_out_of_step, follow, lock, target, title, try_lock};
pub use own::{is_terminal, says_free, try_lock_found};
