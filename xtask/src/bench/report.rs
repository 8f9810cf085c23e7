//! What was measured, for a terminal and as Markdown.

/// What one side measured, round by round.
#[derive(Debug, Clone, Default)]
pub struct Measured(Vec<f64>);

impl Measured {
    /// What was measured once.
    pub fn once(value: f64) -> Self {
        Self(vec![value])
    }

    /// Adds another round's.
    pub fn add(&mut self, value: f64) {
        self.0.push(value);
    }

    /// The round in the middle.
    pub fn median(&self) -> f64 {
        let mut values = self.0.clone();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    }

    /// Each round's ratio to the other side's in the same round, whatever the machine was like at that time.
    pub fn ratio_to(&self, other: &Self) -> Self {
        Self(self.0.iter().zip(&other.0).map(|(ours, theirs)| ours / theirs).collect())
    }

    /// The least and the greatest, if there were several rounds.
    fn range(&self) -> Option<(f64, f64)> {
        let least = self.0.iter().copied().fold(f64::INFINITY, f64::min);
        let greatest = self.0.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        (self.0.len() > 1).then_some((least, greatest))
    }
}

/// One line of the report.
pub struct Finding {
    /// The number of the comparison.
    pub number: u8,
    /// What was compared.
    pub what: String,
    /// What the extension does, with its unit.
    pub ours: String,
    /// What it is compared with.
    pub against: String,
    /// What that does, with its unit.
    pub theirs: String,
    /// The one divided by the other, round by round.
    pub ratios: Measured,
    /// What the ratio is to be.
    pub goal: Goal,
}

/// What a ratio is to be.
#[derive(Clone, Copy)]
pub enum Goal {
    /// So much or more.
    AtLeast(f64),
    /// So much or less.
    AtMost(f64),
    /// Nothing is asked of it.
    None,
}

impl Goal {
    fn is_met_by(self, ratio: f64) -> bool {
        match self {
            Self::AtLeast(least) => ratio >= least,
            Self::AtMost(most) => ratio <= most,
            Self::None => true,
        }
    }
}

impl std::fmt::Display for Goal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::AtLeast(least) => write!(f, "≥ {least}"),
            Self::AtMost(most) => write!(f, "≤ {most}"),
            Self::None => f.write_str("none"),
        }
    }
}

impl Finding {
    /// The ratio in the middle.
    pub fn ratio(&self) -> f64 {
        self.ratios.median()
    }

    fn spread(&self) -> String {
        self.ratios
            .range()
            .map_or_else(String::new, |(least, greatest)| format!("{least:.2} to {greatest:.2}"))
    }

    fn verdict(&self) -> &'static str {
        match self.goal {
            Goal::None => "",
            goal if goal.is_met_by(self.ratio()) => "met",
            _ => "**missed**",
        }
    }
}

/// The findings as a table that reads well in a terminal and as Markdown.
pub fn table(findings: &[Finding]) -> String {
    let mut rows = vec![
        ["#", "what", "pg_claims", "compared with", "ratio", "rounds", "goal", ""]
            .map(String::from),
    ];
    rows.extend(findings.iter().map(|finding| {
        [
            finding.number.to_string(),
            finding.what.clone(),
            finding.ours.clone(),
            format!("{}: {}", finding.against, finding.theirs),
            format!("{:.2}", finding.ratio()),
            finding.spread(),
            finding.goal.to_string(),
            finding.verdict().to_owned(),
        ]
    }));
    let widths: Vec<usize> = (0..rows[0].len())
        .map(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0))
        .collect();
    rows.insert(1, std::array::from_fn(|column| "-".repeat(widths[column].max(3))));
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| {
                format!("{cell}{}", " ".repeat(width - cell.chars().count().min(*width)))
            })
            .collect();
        text.push_str(&format!("| {} |\n", cells.join(" | ")));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(values: &[f64]) -> Measured {
        let mut measured = Measured::default();
        values.iter().for_each(|value| measured.add(*value));
        measured
    }

    fn finding(ratios: &[f64], goal: Goal) -> Finding {
        Finding {
            number: 1,
            what: "heartbeat".into(),
            ours: "2 /s".into(),
            against: "no-op".into(),
            theirs: "1 /s".into(),
            ratios: measured(ratios),
            goal,
        }
    }

    #[test]
    fn a_ratio_is_the_median_of_the_rounds_not_the_ratio_of_the_medians() {
        let ratios = measured(&[10.0, 1.0, 4.0]).ratio_to(&measured(&[20.0, 4.0, 1.0]));
        assert_eq!(ratios.median(), 0.5);
        assert_eq!(ratios.range(), Some((0.25, 4.0)));
    }

    #[test]
    fn what_was_measured_once_has_no_range() {
        assert_eq!(finding(&[1.0], Goal::None).spread(), "");
        assert_eq!(finding(&[2.0, 1.0], Goal::None).spread(), "1.00 to 2.00");
    }

    #[test]
    fn a_goal_is_met_up_to_its_very_value() {
        assert_eq!(finding(&[0.85], Goal::AtLeast(0.85)).verdict(), "met");
        assert_eq!(finding(&[0.84], Goal::AtLeast(0.85)).verdict(), "**missed**");
        assert_eq!(finding(&[3.0], Goal::AtMost(3.0)).verdict(), "met");
        assert_eq!(finding(&[3.01], Goal::AtMost(3.0)).verdict(), "**missed**");
    }

    #[test]
    fn a_single_round_neither_meets_nor_misses_a_goal() {
        assert_eq!(finding(&[0.1, 0.9, 1.0], Goal::AtLeast(0.85)).verdict(), "met");
        assert_eq!(finding(&[0.1, 0.2, 1.0], Goal::AtLeast(0.85)).verdict(), "**missed**");
    }

    #[test]
    fn without_a_goal_there_is_no_verdict() {
        assert_eq!(finding(&[0.0], Goal::None).verdict(), "");
    }

    #[test]
    fn the_table_tells_both_sides_and_the_verdict() {
        let table = table(&[finding(&[2.0], Goal::AtLeast(3.0))]);
        let row = table.lines().last().unwrap_or_default();
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        assert_eq!(
            cells,
            ["", "1", "heartbeat", "2 /s", "no-op: 1 /s", "2.00", "", "≥ 3", "**missed**", ""]
        );
    }
}
