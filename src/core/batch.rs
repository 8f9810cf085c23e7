//! How much one transaction takes on.

/// How many things one transaction takes on. Fewer after it has failed, as it may have taken too long: the
/// same batch would fail for ever.
#[derive(Debug)]
pub struct Batch {
    most: i32,
    limit: i32,
}

impl Batch {
    /// Begins with `most`, which is at least 1.
    #[must_use]
    pub fn of(most: i32) -> Self {
        Self { most, limit: most }
    }

    /// How many the next one takes on.
    #[must_use]
    pub fn limit(&self) -> i32 {
        self.limit
    }

    /// Notes what came of one that was of this limit: how many it did, or `None` if it failed. Returns how
    /// many, and whether there may be more.
    pub fn note(&mut self, done: Option<usize>) -> (usize, bool) {
        let limit = self.limit;
        match done {
            Some(done) => {
                self.limit = limit.saturating_mul(2).min(self.most);
                (done, usize::try_from(limit).is_ok_and(|limit| done >= limit))
            }
            None => {
                self.limit = (limit / 10).max(1);
                (0, false)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_batch_may_not_be_the_last() {
        let mut batch = Batch::of(100);
        assert_eq!(batch.note(Some(99)), (99, false));
        assert_eq!(batch.note(Some(100)), (100, true));
        assert_eq!(batch.limit(), 100);
    }

    #[test]
    fn what_fails_is_tried_in_ever_smaller_batches_down_to_one() {
        let mut batch = Batch::of(5000);
        let mut limits = vec![];
        for _ in 0..6 {
            limits.push(batch.limit());
            assert_eq!(batch.note(None), (0, false));
        }
        assert_eq!(limits, [5000, 500, 50, 5, 1, 1]);
    }

    #[test]
    fn what_succeeds_grows_again() {
        let mut batch = Batch::of(50);
        batch.note(None);
        let limits: Vec<i32> = (0..5)
            .map(|_| {
                batch.note(Some(0));
                batch.limit()
            })
            .collect();
        assert_eq!(limits, [10, 20, 40, 50, 50]);
    }
}
