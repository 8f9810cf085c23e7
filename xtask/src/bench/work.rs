//! Whether the compared work was done: a refusal is fast, and pgbench counts it like anything else.

use anyhow::{Result, ensure};
use postgres::Client;

/// What each of a script's transactions does.
#[derive(Clone, Copy)]
pub enum Work {
    /// Nothing to do with acquisitions.
    Other,
    /// Makes and ends one acquisition in this table.
    Cycles(&'static str),
    /// Is refused, and so makes none in this table.
    Refusals(&'static str),
}

impl Work {
    /// A claim and a release with the extension.
    pub const CYCLES: Self = Self::Cycles("sd_claims");

    fn table(self) -> Option<&'static str> {
        match self {
            Self::Other => None,
            Self::Cycles(table) | Self::Refusals(table) => Some(table),
        }
    }

    /// Remembers where the table's acquisitions end now. Ids only grow, so that what is new is found by
    /// the key, however long the table is.
    pub fn begin(self, client: &mut Client) -> Result<Begun> {
        let last = match self.table() {
            None => 0,
            Some(table) => client
                .query_one(&format!("SELECT COALESCE(max(claim_id), 0) FROM {table}"), &[])?
                .get(0),
        };
        Ok(Begun { work: self, last })
    }

    /// Compares what a turn has left in the table with the transactions that pgbench counted. It may
    /// have left one transaction per client uncounted when the time was over.
    fn check(self, made: u64, ended: u64, transactions: u64, clients: u64) -> Result<()> {
        ensure!(transactions > 0, "pgbench processed no transaction");
        match self {
            Self::Other => {}
            Self::Cycles(table) => {
                let expected = transactions..=transactions + clients;
                ensure!(
                    expected.contains(&made) && expected.contains(&ended),
                    "{transactions} transactions made {made} acquisitions in {table} and ended {ended}: \
                     some of the compared work was not done"
                );
            }
            Self::Refusals(table) => ensure!(
                made == 0,
                "{made} of {transactions} transactions were not refused, but made an acquisition in {table}"
            ),
        }
        Ok(())
    }
}

/// Work of which the beginning is known.
pub struct Begun {
    work: Work,
    last: i64,
}

impl Begun {
    /// Fails if less or more was done than pgbench's transactions do.
    pub fn check(self, client: &mut Client, transactions: u64, clients: usize) -> Result<()> {
        let (mut made, mut ended) = (0, 0);
        if let Some(table) = self.work.table() {
            let count =
                format!("SELECT count(*), count(released_at) FROM {table} WHERE claim_id > $1");
            let row = client.query_one(&count, &[&self.last])?;
            made = row.get::<_, i64>(0).try_into()?;
            ended = row.get::<_, i64>(1).try_into()?;
        }
        self.work.check(made, ended, transactions, clients.try_into()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cycles_are_as_many_as_the_transactions() {
        let work = Work::Cycles("sd_claims");
        assert!(work.check(100, 100, 100, 8).is_ok());
        assert!(work.check(99, 99, 100, 8).is_err());
        assert!(work.check(100, 99, 100, 8).is_err());
    }

    #[test]
    fn each_client_may_have_one_transaction_that_was_not_counted() {
        let work = Work::Cycles("sd_claims");
        assert!(work.check(108, 108, 100, 8).is_ok());
        assert!(work.check(109, 109, 100, 8).is_err());
    }

    #[test]
    fn a_refusal_makes_no_acquisition() {
        let work = Work::Refusals("sd_claims");
        assert!(work.check(0, 0, 100, 2).is_ok());
        assert!(work.check(1, 0, 100, 2).is_err());
    }

    #[test]
    fn a_turn_without_transactions_compares_nothing() {
        assert!(Work::Other.check(0, 0, 0, 2).is_err());
    }
}
