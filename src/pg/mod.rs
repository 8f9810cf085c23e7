//! The server's programming interface, made safe: what the other rooms ask of a process, its transactions and its locks.

pub mod backend;
pub mod lock;
pub mod time;
pub mod transaction;
