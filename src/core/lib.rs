//! The rules of pg_claims that need no PostgreSQL.
//!
//! What an id may look like, when a lease expires, how an age reads, which JSON a caller gets and
//! which text a person sees. Everything here compiles and tests without a server; the extension
//! is glue between these rules and the tables.

pub mod age;
pub mod batch;
pub mod board;
pub mod check;
pub mod cycle;
pub mod frontier;
pub mod id;
pub mod keys;
pub mod lease;
pub mod listing;
pub mod manager;
pub mod notice;
pub mod numbers;
pub mod outcome;
pub mod priority;
pub mod queue;
pub mod refusal;
pub mod session;
pub mod text;
