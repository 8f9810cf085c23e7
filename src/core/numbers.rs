//! Numbers that never come again: those of claims, of events and of places in the order of events.
//!
//! A number comes from a sequence, and a sequence can go back: a standby that is promoted has not
//! heard of the last ones, and neither has a backup. So each run of the server begins with numbers
//! of its own, above a floor that is made of the time at which it began to accept writes. A number
//! below it belongs to somebody before, and the sequence is lifted.
//!
//! A run may give out a thousand numbers for every millisecond before it reaches what a later run
//! begins with, which is more than a server can write. All stay below 2^53, up to which JSON
//! clients know whole numbers exactly, for more than two centuries.

use chrono::{DateTime, Utc};

/// 2026-01-01 00:00 UTC in milliseconds of the Unix epoch.
const EPOCH_MILLISECONDS: i64 = 1_767_225_600_000;

/// How many numbers there are for a millisecond.
pub const PER_MILLISECOND: i64 = 1024;

/// No floor is higher, whatever a clock says: it leaves a million millions of numbers that JSON clients
/// know exactly.
const HIGHEST_FLOOR: i64 = (1 << 53) - (1 << 40);

/// Numbers go on above those that a table has, up to here: a greater one was never drawn, but written by hand, and must
/// not use all others up.
pub const HIGHEST: i64 = HIGHEST_FLOOR;

/// Below which no number is that is drawn by whoever began at that instant; nothing, for a clock that
/// says a time before 2026.
pub fn floor_of(instant: DateTime<Utc>) -> i64 {
    instant
        .timestamp_millis()
        .saturating_sub(EPOCH_MILLISECONDS)
        .max(0)
        .saturating_mul(PER_MILLISECOND)
        .min(HIGHEST_FLOOR)
}

/// To which a sequence is lifted so that all that follow are above each of `past`. With room for whoever
/// draws between the last look at the sequence and the lifting of it.
pub fn above(past: &[i64]) -> i64 {
    past.iter().copied().max().unwrap_or(0).max(0).saturating_add(PER_MILLISECOND)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> DateTime<Utc> {
        text.parse().unwrap()
    }

    #[test]
    fn a_later_start_has_a_higher_floor() {
        assert_eq!(floor_of(at("2026-01-01T00:00:00Z")), 0);
        assert_eq!(floor_of(at("2026-01-01T00:00:00.001Z")), 1024);
        assert_eq!(
            floor_of(at("2026-11-29T12:00:00Z")),
            332 * 86_400_000 * 1024 + 43_200_000 * 1024
        );
        assert!(floor_of(at("2026-11-29T12:00:00.001Z")) > floor_of(at("2026-11-29T12:00:00Z")));
    }

    #[test]
    fn a_clock_before_2026_lifts_nothing() {
        for early in
            [at("2025-12-31T23:59:59.999Z"), at("1970-01-01T00:00:00Z"), DateTime::<Utc>::MIN_UTC]
        {
            assert_eq!(floor_of(early), 0, "{early}");
        }
    }

    #[test]
    fn json_clients_know_every_number_exactly_for_centuries() {
        const EXACT: i64 = 1 << 53;
        let late = at("2269-12-31T00:00:00Z");
        assert!(floor_of(late) < HIGHEST_FLOOR);
        // A run of a hundred days with a thousand numbers a second, and what a lifting adds.
        assert!(above(&[floor_of(late)]) + 100 * 86_400 * 1000 < EXACT);
        // A clock that is out of its mind leaves room as well.
        for mad in [at("9999-12-31T23:59:59Z"), DateTime::<Utc>::MAX_UTC] {
            assert!(above(&[floor_of(mad)]) + 100 * 86_400 * 1000 < EXACT, "{mad}");
        }
    }

    #[test]
    fn a_sequence_is_lifted_above_all_that_is_known() {
        assert_eq!(above(&[7, 9, 8]), 9 + PER_MILLISECOND);
        assert_eq!(above(&[]), PER_MILLISECOND);
        assert_eq!(above(&[-5]), PER_MILLISECOND);
        assert_eq!(above(&[i64::MAX]), i64::MAX);
    }
}
