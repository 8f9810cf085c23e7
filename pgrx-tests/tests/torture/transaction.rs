//! A transaction of a client's: what it does, where it goes back, how it ends.

use std::time::Duration;

use fastrand::Rng;

use crate::draw::{chance, one_of};
use crate::setting::Backlog;
use crate::verbs::{self, Kind, Level, Operation};

/// What a client does between two looks at whether it is over.
#[derive(Debug)]
pub enum Plan {
    /// One statement by itself.
    Single(Operation),
    /// Several, in a transaction.
    Several(Transaction),
    /// Claims, works and releases, each by itself.
    Job(Vec<Operation>),
    /// Gives its connection up and makes another one.
    Reconnect,
}

#[derive(Debug)]
pub struct Transaction {
    pub begin: String,
    pub reads_only: bool,
    pub steps: Vec<Step>,
    pub end: End,
}

#[derive(Debug)]
pub enum Step {
    Do(Operation),
    /// In a savepoint, which is rolled back or released.
    Within {
        steps: Vec<Operation>,
        is_undone: bool,
    },
    /// Stands still with all its locks.
    Stop(Duration),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Commit,
    Rollback,
    /// The connection goes away.
    Drop,
    /// PREPARE TRANSACTION, and then it is ended, by whom and how.
    Prepare {
        by_itself: bool,
        commits: bool,
    },
}

pub fn draw(rng: &mut Rng, client: u64, level: Level, backlog: Backlog) -> Plan {
    match rng.u32(..1000) {
        0..7 => Plan::Reconnect,
        7..200 => Plan::Job(verbs::job(rng, client)),
        200..650 => Plan::Single(verbs::draw(rng, client, level, backlog)),
        _ => Plan::Several(transaction(rng, client, level, backlog)),
    }
}

fn transaction(rng: &mut Rng, client: u64, level: Level, backlog: Backlog) -> Transaction {
    let isolation = if chance(rng, 60) {
        "READ COMMITTED"
    } else {
        one_of(rng, &["REPEATABLE READ", "SERIALIZABLE"])
    };
    let reads_only = chance(rng, 3);
    let access = if reads_only { " READ ONLY" } else { "" };
    let operation = |rng: &mut Rng| loop {
        let operation = verbs::draw(rng, client, level, backlog);
        // That one must be by itself: an assertion before would let it pass.
        if operation.kind != Kind::Unguarded {
            break operation;
        }
    };
    let steps = (0..rng.usize(1..5))
        .map(|_| match rng.u32(..100) {
            0..70 => Step::Do(operation(rng)),
            70..96 => Step::Within {
                steps: (0..rng.usize(1..3)).map(|_| operation(rng)).collect(),
                is_undone: chance(rng, 60),
            },
            96 => Step::Stop(Duration::from_millis(rng.u64(200..1200))),
            _ => Step::Stop(Duration::from_millis(rng.u64(1..40))),
        })
        .collect();
    let end = match rng.u32(..100) {
        0..62 => End::Commit,
        62..80 => End::Rollback,
        80..84 => End::Drop,
        _ => End::Prepare { by_itself: rng.bool(), commits: chance(rng, 60) },
    };
    Transaction {
        begin: format!("BEGIN ISOLATION LEVEL {isolation}{access}"),
        reads_only,
        steps,
        end,
    }
}

/// How one that nobody listens to ends, if it gets there.
pub fn ending(rng: &mut Rng) -> &'static str {
    one_of(rng, &["COMMIT;", "COMMIT;", "ROLLBACK;"])
}
