//! Throw-away PostgreSQL servers and databases, and what tests need to talk to them.
//!
//! `cargo xtask` starts servers with [`Server`]; the tests use the one that it names in their
//! environment through [`TestDb`], or start their own.

mod client;
mod contradictions;
mod database;
#[deny(clippy::unwrap_used, clippy::expect_used)]
mod log;
// The tools run on the following as well: what fails there is reported, not a panic.
#[deny(clippy::unwrap_used, clippy::expect_used)]
mod postmaster;
#[deny(clippy::unwrap_used, clippy::expect_used)]
mod server;
#[deny(clippy::unwrap_used, clippy::expect_used)]
mod user;

pub use client::{
    backend_pid, detail, hint, json, message, sqlstate, wait_until, wait_until_blocked,
};
pub use contradictions::contradictions;
pub use database::{TestDb, own_server, under_test, watch};
pub use server::{Installation, Server, Stop};
pub use user::ServerUser;

/// The environment variable that names the shared server's `pg_config`.
pub const ENV_PG_CONFIG: &str = "PG_CLAIMS_TEST_PG_CONFIG";
/// The environment variable that names the shared server's socket directory.
pub const ENV_SOCKET_DIR: &str = "PG_CLAIMS_TEST_SOCKET_DIR";
/// The environment variable that names a folder in which tests may start servers of their own.
pub const ENV_WORK_DIR: &str = "PG_CLAIMS_TEST_WORK_DIR";

/// The environment variable that says for how many seconds functions are called with arguments of all kinds.
pub const ENV_FUZZ_SECONDS: &str = "PG_CLAIMS_FUZZ_SECONDS";
/// The environment variable that says which arguments those are.
pub const ENV_FUZZ_SEED: &str = "PG_CLAIMS_FUZZ_SEED";

/// The environment variable that says for how many seconds the torture goes on.
pub const ENV_TORTURE_SECONDS: &str = "PG_CLAIMS_TORTURE_SECONDS";
/// The environment variable that says what happens in it.
pub const ENV_TORTURE_SEED: &str = "PG_CLAIMS_TORTURE_SEED";
