//! What pg_claims promises, on a real server with real connections.
//!
//! One binary, one module per promise. Every test has a database of its own. Run it through
//! `cargo xtask test`, which builds the extension and starts the server.

mod support;

mod backlog_binding;
mod bad_input;
mod board;
mod board_memory;
mod board_upkeep;
mod catching_up;
mod channel;
mod check;
mod claim;
mod claim_next;
mod conflict;
mod connections;
mod direct;
mod direct_writes;
mod dump_restore;
mod guard;
mod guard_load;
mod identity;
mod impersonation;
mod installation;
mod isolation;
mod json;
mod lease;
mod liveness;
mod mirror;
mod partitioned_backlog;
mod plans;
mod privileges;
mod queue;
mod queue_load;
mod race;
mod reaper;
mod refusal;
mod release;
mod restart;
mod settings;
mod surface;
mod waiting;
mod worker;
mod worker_faults;
