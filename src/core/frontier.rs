//! Which events have been put in order, and which numbers are still awaited.
//!
//! Events are numbered when they are written but seen when their transaction commits, so a lower
//! number may appear after a higher one. Whoever reads "everything above the last number" loses
//! it. The frontier remembers each number that it passed without seeing it, until it appears or
//! until every transaction that can have drawn it has ended.
//!
//! It relies on one thing: a transaction has its transaction id before it draws a number, and draws none
//! that it does not use at once. Whoever draws them sees to that.
//!
//! Numbers jump when a server begins to accept writes (see `numbers`). That leaves one great gap, which
//! is given up like any other; to look into it for what has appeared costs as much as into a small one.

/// Successive numbers that were passed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gap {
    /// The first of them.
    pub first: i64,
    /// The last of them.
    pub last: i64,
    /// The first transaction id that was not yet given out when they were passed: whoever drew one
    /// of them has a lower one.
    pub before_xid: i64,
}

/// How far the events have been put in order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Frontier {
    /// All numbers up to this one are either in order or in `gaps`.
    pub scanned_to: i64,
    /// The numbers that may still appear.
    pub gaps: Vec<Gap>,
}

/// The transaction ids around a snapshot.
#[derive(Debug, Clone, Copy)]
pub struct Moment {
    /// Every transaction with a lower id had ended when the snapshot was taken: its `xmin`.
    pub xmin: i64,
    /// The first id that was not given out, read after the snapshot was taken. Not its `xmax`, which
    /// transactions that run may have passed.
    pub next_xid: i64,
}

impl Frontier {
    /// Takes in `seen`, in the order of their numbers: all events that a snapshot of `moment` shows
    /// among the gaps, and as many of the first ones above `scanned_to` as were asked for.
    pub fn advance(&mut self, seen: &[i64], moment: Moment) {
        let split = seen.partition_point(|event_id| *event_id <= self.scanned_to);
        let (late, new) = seen.split_at(split);
        self.gaps = self
            .gaps
            .iter()
            // A gap from beyond the present belongs to another server's count, before a restore; its
            // transaction is not in the dump and never will be here.
            .filter(|gap| gap.before_xid > moment.xmin && gap.before_xid <= moment.next_xid)
            .flat_map(|gap| gap.without(late))
            .collect();
        for &event_id in new {
            if event_id > self.scanned_to + 1 {
                self.gaps.push(Gap {
                    first: self.scanned_to + 1,
                    last: event_id - 1,
                    before_xid: moment.next_xid,
                });
            }
            self.scanned_to = event_id;
        }
    }
}

impl Gap {
    /// What is left of the gap without the numbers that have appeared.
    fn without(self, appeared: &[i64]) -> Vec<Self> {
        let from = appeared.partition_point(|event_id| *event_id < self.first);
        let to = appeared.partition_point(|event_id| *event_id <= self.last);
        let mut rest = Vec::new();
        let mut first = self.first;
        for event_id in appeared.get(from..to).unwrap_or_default() {
            if *event_id > first {
                rest.push(Self { first, last: event_id - 1, ..self });
            }
            first = event_id + 1;
        }
        if first <= self.last {
            rest.push(Self { first, ..self });
        }
        rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_number_that_appears_late_is_still_awaited_and_then_done_with() {
        let mut frontier = Frontier::default();
        frontier.advance(&[1, 3], Moment { xmin: 100, next_xid: 102 });
        assert_eq!(frontier.gaps, [Gap { first: 2, last: 2, before_xid: 102 }]);
        frontier.advance(&[2, 4], Moment { xmin: 103, next_xid: 103 });
        assert_eq!(frontier, Frontier { scanned_to: 4, gaps: vec![] });
    }

    #[test]
    fn a_number_whose_transaction_ended_without_it_is_given_up() {
        let mut frontier = Frontier::default();
        frontier.advance(&[1, 3], Moment { xmin: 100, next_xid: 102 });
        frontier.advance(&[], Moment { xmin: 101, next_xid: 105 });
        assert_eq!(frontier.gaps.len(), 1, "101 may have drawn it");
        frontier.advance(&[], Moment { xmin: 102, next_xid: 105 });
        assert!(frontier.gaps.is_empty());
    }

    #[test]
    fn another_server_s_transaction_ids_do_not_keep_a_gap_for_ever() {
        let mut frontier = Frontier {
            scanned_to: 9,
            gaps: vec![Gap { first: 5, last: 7, before_xid: 9_000_000 }],
        };
        frontier.advance(&[], Moment { xmin: 700, next_xid: 700 });
        assert!(frontier.gaps.is_empty());
    }

    #[test]
    fn a_great_leap_is_one_gap_and_what_appears_within_it_divides_it() {
        let mut frontier = Frontier::default();
        frontier.advance(&[1_000_000_000], Moment { xmin: 100, next_xid: 102 });
        assert_eq!(frontier.gaps.len(), 1);
        frontier.advance(&[1, 500, 501], Moment { xmin: 101, next_xid: 103 });
        let gap = |first, last| Gap { first, last, before_xid: 102 };
        assert_eq!(frontier.gaps, [gap(2, 499), gap(502, 999_999_999)]);
    }

    /// A small generator, so that a failing run can be repeated from its seed.
    struct Dice(u64);

    impl Dice {
        fn below(&mut self, limit: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % limit
        }
    }

    /// Transactions that draw numbers and end in any order, and a reader in between: every
    /// committed number is read exactly once, whatever the interleaving.
    #[test]
    fn whatever_the_interleaving_every_committed_event_is_seen_exactly_once() {
        for seed in 1..2000_u64 {
            let mut dice = Dice(seed * 0x9E37_79B9);
            let (mut next_xid, mut next_event) = (10_i64, 1_i64);
            let mut running: Vec<(i64, Vec<i64>)> = Vec::new();
            let mut committed = BTreeSet::new();
            let mut frontier = Frontier::default();
            let mut read = Vec::new();
            let look = |frontier: &mut Frontier,
                        read: &mut Vec<i64>,
                        running: &[(i64, Vec<i64>)],
                        committed: &BTreeSet<i64>,
                        next_xid: i64,
                        limit: usize| {
                let awaited =
                    |id: &i64| frontier.gaps.iter().any(|gap| (gap.first..=gap.last).contains(id));
                let late = committed.iter().copied().filter(awaited);
                let new = committed.range(frontier.scanned_to + 1..).copied().take(limit);
                let seen: Vec<i64> = late.chain(new).collect();
                let xmin = running.iter().map(|(xid, _)| *xid).min().unwrap_or(next_xid);
                frontier.advance(&seen, Moment { xmin, next_xid });
                read.extend(seen);
            };
            for _ in 0..60 {
                match dice.below(5) {
                    0 => {
                        running.push((next_xid, Vec::new()));
                        next_xid += 1;
                    }
                    1 | 2 if !running.is_empty() => {
                        let n = dice.below(running.len() as u64) as usize;
                        running[n].1.push(next_event);
                        next_event += 1;
                    }
                    3 if !running.is_empty() => {
                        let n = dice.below(running.len() as u64) as usize;
                        let (_, events) = running.swap_remove(n);
                        if dice.below(4) > 0 {
                            committed.extend(events);
                        }
                    }
                    _ => look(
                        &mut frontier,
                        &mut read,
                        &running,
                        &committed,
                        next_xid,
                        1 + dice.below(4) as usize,
                    ),
                }
            }
            running.clear();
            while read.len() < committed.len() {
                let before = read.len();
                look(&mut frontier, &mut read, &running, &committed, next_xid, 3);
                assert!(read.len() > before, "seed {seed}: an event is lost");
            }
            let once: BTreeSet<i64> = read.iter().copied().collect();
            assert_eq!(once.len(), read.len(), "seed {seed}: an event came twice");
            assert_eq!(once, committed, "seed {seed}");
        }
    }
}
