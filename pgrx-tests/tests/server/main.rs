//! What pg_claims promises, on a real server with real connections.
//!
//! One binary, one module per promise. Every test has a database of its own. Run it through
//! `cargo xtask test`, which builds the extension and starts the server.

mod support;

mod backlog_binding;
mod bad_input;
mod claim;
mod direct_writes;
mod dump_restore;
mod identity;
mod installation;
mod isolation;
mod liveness;
mod mirror;
mod plans;
mod privileges;
mod race;
mod refusal;
mod release;
mod settings;
mod surface;
mod waiting;
