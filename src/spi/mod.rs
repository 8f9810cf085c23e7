//! The only place with SQL text: kept plans and typed rows.
//!
//! Every statement runs on a plan that the backend keeps, with a fresh snapshot (in READ
//! COMMITTED), and names its tables with the schema that the extension is installed in.

pub mod catalog;
pub mod check;
pub mod claim;
pub mod conflict;
pub mod directive;
pub mod event;
pub mod extension;
pub mod foreign;
pub mod grant;
pub mod guard;
pub mod health;
pub mod heartbeat;
pub mod hold;
pub mod installation;
pub mod intent;
pub mod manager;
pub mod numbers;
pub mod order;
pub mod prune;
pub mod queue;
pub mod quota;
pub mod repair;
pub mod row;
pub mod session;
mod statement;
pub mod table;
pub mod wait;

pub use statement::{Db, Rights};

/// Prepares the process: watches for changes that make kept plans wrong.
pub fn init() {
    catalog::watch();
    installation::watch();
    guard::init();
    table::init();
}
