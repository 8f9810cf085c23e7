//! Ages: how long ago something was, as a number and as a person reads it.

use chrono::{DateTime, TimeDelta, Utc};

/// The time from `then` to `now`, never negative.
///
/// A heartbeat that lies in the future (a clock that was set back) counts as just received.
pub fn age(then: DateTime<Utc>, now: DateTime<Utc>) -> TimeDelta {
    (now - then).max(TimeDelta::zero())
}

/// An age in seconds, cut to whole milliseconds.
pub fn seconds(age: TimeDelta) -> f64 {
    age.num_milliseconds() as f64 / 1000.0
}

/// An age as a person reads it: `59s ago`, `1m ago`, `3h ago`, `2d ago`.
///
/// Truncates to the largest whole unit and never rounds up, so that 59.7 s is not yet a minute.
pub fn human(age: TimeDelta) -> String {
    let (count, unit) = if age < TimeDelta::minutes(1) {
        (age.num_seconds().max(0), 's')
    } else if age < TimeDelta::hours(1) {
        (age.num_minutes(), 'm')
    } else if age < TimeDelta::days(1) {
        (age.num_hours(), 'h')
    } else {
        (age.num_days(), 'd')
    };
    format!("{count}{unit} ago")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn human_ages_truncate_and_never_round_up() {
        for (milliseconds, expected) in [
            (0, "0s ago"),
            (45_000, "45s ago"),
            (59_700, "59s ago"),
            (60_000, "1m ago"),
            (90_000, "1m ago"),
            (3_599_999, "59m ago"),
            (3_600_000, "1h ago"),
            (86_399_999, "23h ago"),
            (86_400_000, "1d ago"),
            (-5_000, "0s ago"),
        ] {
            assert_eq!(human(TimeDelta::milliseconds(milliseconds)), expected);
        }
    }

    #[test]
    fn an_age_is_never_negative() {
        let now = DateTime::UNIX_EPOCH;
        assert_eq!(age(now + TimeDelta::hours(4), now), TimeDelta::zero());
        assert_eq!(age(now, now + TimeDelta::seconds(7)), TimeDelta::seconds(7));
    }

    #[test]
    fn seconds_are_cut_to_milliseconds() {
        assert_eq!(seconds(TimeDelta::microseconds(45_123_999)), 45.123);
    }
}
