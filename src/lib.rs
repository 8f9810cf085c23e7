//! pg_claims: exclusive claims, leases and heartbeats for sessions that share one backlog.
//!
//! `core` (a crate of its own, without PostgreSQL) holds the rules, `spi` all SQL text and the tables, `api` the
//! functions that SQL sees, `trigger` the triggers, `board` the heartbeats in shared memory. `api` and
//! `trigger` call `spi`, `spi` uses `board` and `core`; nothing points back up.

mod api;
mod attempt;
mod beating;
mod board;
mod error;
mod error_context;
mod guc;
mod identity;
mod jsonb;
mod local_settings;
mod pg;
mod service;
mod spi;
mod trigger;
mod worker;

pgrx::pg_module_magic!(name, version);

pgrx::extension_sql_file!("../sql/install/10_tables.sql", name = "tables", bootstrap);
pgrx::extension_sql_file!(
    "../sql/install/30_triggers.sql",
    name = "triggers",
    requires = [
        "tables",
        trigger::session::complete_session_write,
        trigger::session::own_replicated_session,
        trigger::history::protect_open_claim,
        trigger::history::begin_restoring,
        trigger::restore::make_way_for_dump,
        trigger::ddl::note_drop,
        trigger::ddl::keep_out_foreign_code,
        trigger::board::forget_heartbeat,
        trigger::history::refuse_truncate_while_claimed,
        trigger::mirror::sync_is_working_on_with_session,
        trigger::directive::rebuild_directives_view,
    ]
);
pgrx::extension_sql_file!(
    "../sql/install/40_views.sql",
    name = "views",
    requires = [
        "triggers",
        api::directive::attach_default_directives,
        api::queue::dependency_keys,
        api::lease::latest_heartbeat,
        api::board::heartbeat_board,
        api::lease::lease_expires_at,
        api::lease::claim_reclaimable_at,
        api::lease::heartbeat_age_human,
        api::lease::elapsed_seconds,
        api::lease::elapsed_minutes,
        api::queue::checked_limit,
    ]
);
pgrx::extension_sql_file!(
    "../sql/install/50_queue.sql",
    name = "queue",
    requires = ["views", api::lease::is_claim_live, api::queue::dependency_cycles]
);
pgrx::extension_sql_file!(
    "../sql/install/80_comments.sql",
    name = "comments",
    requires = ["queue"]
);
pgrx::extension_sql_file!("../sql/install/90_privileges.sql", name = "privileges", finalize);

/// Runs when the library is loaded into a server process.
#[pgrx::pg_guard]
pub extern "C-unwind" fn _PG_init() {
    // pg_upgrade starts the servers for itself only.
    // SAFETY: set before the library is loaded, and never changed after.
    if unsafe { pgrx::pg_sys::IsBinaryUpgrade } {
        return;
    }
    error_context::keep_backtraces_out();
    beating::init();
    guc::init();
    board::init();
    spi::init();
    trigger::ddl::init();
    worker::init();
}
