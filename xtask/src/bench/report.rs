//! What was measured, for a terminal, as Markdown and as a chart.

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
    /// The one divided by the other.
    pub ratio: f64,
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
    fn verdict(&self) -> &'static str {
        match self.goal {
            Goal::None => "",
            goal if goal.is_met_by(self.ratio) => "met",
            _ => "**missed**",
        }
    }
}

/// The findings as a table that reads well in a terminal and as Markdown.
pub fn table(findings: &[Finding]) -> String {
    let mut rows =
        vec![["#", "what", "pg_claims", "compared with", "ratio", "goal", ""].map(String::from)];
    rows.extend(findings.iter().map(|finding| {
        [
            finding.number.to_string(),
            finding.what.clone(),
            finding.ours.clone(),
            finding.theirs.clone(),
            format!("{:.2}", finding.ratio),
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
            Goal::AtLeast(least) => Some((finding, finding.ratio / least, least)),
            Goal::AtMost(most) => Some((finding, most / finding.ratio, most)),
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
            finding.ratio,
        ));
    }
    svg.push_str(&format!(
            "<line x1=\"{0}\" y1=\"{ROW}\" x2=\"{0}\" y2=\"{1}\" stroke=\"black\" stroke-dasharray=\"4\"/>\n</svg>\n",
        LEFT + GOAL,
        height - ROW + 4,
    ));
    svg
}
