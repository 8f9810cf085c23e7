//! The backlog: the extension's own table or one of the user's.

/// The partitions of the table `$1`, and theirs, for WITH RECURSIVE. From the catalogue: the server's function for
/// that locks each, and would wait for whoever is changing one.
macro_rules! partitions {
    () => {
        "partitions (oid) AS (
             SELECT i.inhrelid
               FROM pg_catalog.pg_inherits i
               JOIN pg_catalog.pg_class c ON c.oid = i.inhparent AND c.relkind = 'p'
              WHERE i.inhparent = $1 AND NOT i.inhdetachpending
              UNION ALL
             SELECT i.inhrelid
               FROM partitions p
               JOIN pg_catalog.pg_inherits i ON i.inhparent = p.oid AND NOT i.inhdetachpending)"
    };
}

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
mod mirror_row;
mod own;
mod partitions;
mod table;

pub use attach::{
    TRIGGERS, attach_own, attach_triggers, rebuild_views, renew_triggers, view_bodies,
};
pub use backlog::Backlog;
pub use bind::{bind, forget_bound, unbind};
pub use columns::Columns;
pub use find::{Found, find};
pub use guarded::{guard_table, unguard_table};
pub use indexes::{renew_index, wanted_indexes};
pub use mirror::{correct, count_out_of_step, follow, lock, out_of_step, sync, title, try_lock};
pub use own::{is_terminal, is_unfinished_as_known, says_free, try_lock_found};
pub use table::WantedIndex;
