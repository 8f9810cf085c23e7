//! What a priority means for the order of the queue.

/// The words that mean a priority, the most urgent first: each stands for its place in this list.
pub const WORDS: [&str; 4] = ["critical", "high", "medium", "low"];

/// A priority that is a number, perhaps after a `P`, as a regular expression of PostgreSQL's. Nine
/// digits fit into an integer.
pub const NUMBER: &str = "^[pP]?([0-9]{1,9})$";

/// A priority's place in the order, the most urgent first: a word of [`WORDS`] in any case, or a
/// number, so that `P0` is as urgent as `critical`. `None`, for what is neither, comes last.
pub fn order_of(priority: &str) -> Option<u32> {
    let mut places = WORDS.iter().zip(0..);
    if let Some((_, place)) = places.find(|(word, _)| priority.eq_ignore_ascii_case(word)) {
        return Some(place);
    }
    let digits = priority.strip_prefix(['p', 'P']).unwrap_or(priority);
    let is_number = (1..=9).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_digit());
    is_number.then(|| digits.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_numbers_share_one_order() {
        for (priority, place) in [
            ("critical", Some(0)),
            ("High", Some(1)),
            ("MEDIUM", Some(2)),
            ("low", Some(3)),
            ("P0", Some(0)),
            ("p2", Some(2)),
            ("10", Some(10)),
            ("999999999", Some(999_999_999)),
            ("1000000000", None),
            ("soon", None),
            ("P", None),
            ("", None),
            ("-1", None),
            ("١", None),
        ] {
            assert_eq!(order_of(priority), place, "{priority:?}");
        }
    }
}
