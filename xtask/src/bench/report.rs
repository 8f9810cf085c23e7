//! What was measured, for a terminal, as Markdown and as a chart.

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
            finding.theirs.clone(),
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

/// How each ratio stands to its goal, as an SVG: the line is the goal.
pub fn chart(findings: &[Finding]) -> String {
    const ROW: usize = 26;
    const LEFT: usize = 430;
    const GOAL: usize = 200;
    const WIDTH: usize = LEFT + 2 * GOAL + 90;
    let compared: Vec<(&Finding, f64, f64)> = findings
        .iter()
        .filter_map(|finding| match finding.goal {
            Goal::AtLeast(least) => Some((finding, finding.ratio() / least, least)),
            Goal::AtMost(most) => Some((finding, most / finding.ratio(), most)),
            Goal::None => None,
        })
        .collect();
    let height = (compared.len() + 2) * ROW;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"10\" y=\"18\" font-weight=\"bold\">How each ratio stands to its goal (the line; to the right is better)</text>\n"
    );
    for (row, (finding, share, goal)) in compared.into_iter().enumerate() {
        let y = (row + 1) * ROW;
        let length = (share.min(2.0) * GOAL as f64) as usize;
        let color = if share >= 1.0 { "#2e7d32" } else { "#c62828" };
        let what = finding.what.replace('&', "&amp;").replace('<', "&lt;");
        svg.push_str(&format!(
            "<text x=\"10\" y=\"{}\">{}. {what}</text><rect x=\"{LEFT}\" y=\"{}\" width=\"{length}\" height=\"16\" fill=\"{color}\"/><text x=\"{}\" y=\"{}\">{:.2} (goal {goal})</text>\n",
            y + 13,
            finding.number,
            y,
            LEFT + length + 6,
            y + 13,
            finding.ratio(),
        ));
    }
    svg.push_str(&format!(
            "<line x1=\"{0}\" y1=\"{ROW}\" x2=\"{0}\" y2=\"{1}\" stroke=\"black\" stroke-dasharray=\"4\"/>\n</svg>\n",
        LEFT + GOAL,
        height - ROW + 4,
    ));
    svg
}
