//! The findings as a chart.

use super::report::{Finding, Goal};

const ROW: usize = 40;
const LEFT: usize = 430;
const GOAL: usize = 200;
const WIDTH: usize = LEFT + 2 * GOAL + 110;

/// How many letters of this size have room before the bars.
const ROOM: usize = 58;

/// How each ratio stands to its goal, as an SVG: the line is the goal.
pub fn chart(findings: &[Finding]) -> String {
    let compared: Vec<(&Finding, f64)> = findings
        .iter()
        .filter_map(|finding| Some((finding, share_of_goal(finding.goal, finding.ratio())?)))
        .collect();
    let height = (compared.len() + 2) * ROW;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"10\" y=\"18\" font-weight=\"bold\">How each ratio stands to its goal (the line; to the right is better)</text>\n"
    );
    for (row, (finding, share)) in compared.into_iter().enumerate() {
        let y = (row + 1) * ROW;
        let length = (share.min(2.0) * GOAL as f64) as usize;
        let color = if share >= 1.0 { "#2e7d32" } else { "#c62828" };
        let [what, other] = label(finding).map(|line| escaped(&line));
        svg.push_str(&format!(
            "<text x=\"10\" y=\"{}\">{what}</text><text x=\"26\" y=\"{}\" fill=\"#555\">{other}</text>\
             <rect x=\"{LEFT}\" y=\"{}\" width=\"{length}\" height=\"16\" fill=\"{color}\"/>\
             <text x=\"{}\" y=\"{}\">{:.2} (goal {})</text>\n",
            y + 10,
            y + 26,
            y + 6,
            LEFT + length + 6,
            y + 19,
            finding.ratio(),
            finding.goal,
        ));
    }
    svg.push_str(&format!(
        "<line x1=\"{0}\" y1=\"{ROW}\" x2=\"{0}\" y2=\"{1}\" stroke=\"black\" stroke-dasharray=\"4\"/>\n</svg>\n",
        LEFT + GOAL,
        height - ROW + 4,
    ));
    svg
}

/// 1 where the goal is just met, more where it is exceeded.
fn share_of_goal(goal: Goal, ratio: f64) -> Option<f64> {
    match goal {
        Goal::AtLeast(least) => Some(ratio / least),
        Goal::AtMost(most) => Some(most / ratio),
        Goal::None => None,
    }
}

/// What was compared, and below it with what: the one or the other alone may be there twice.
fn label(finding: &Finding) -> [String; 2] {
    let what = format!("{}. {}", finding.number, finding.what);
    [shortened(&what, ROOM), shortened(&format!("against {}", finding.against), ROOM)]
}

/// As many whole words as there is room for, with an ellipsis if there are more.
fn shortened(text: &str, room: usize) -> String {
    if text.chars().count() <= room {
        return text.to_owned();
    }
    // The last word gives way to the ellipsis, even if it is a whole one.
    let head: String = text.chars().take(room).collect();
    let cut = match head.rsplit_once(' ') {
        Some((words, _)) => words.trim_end_matches([',', ' ']).to_owned(),
        None => text.chars().take(room - 1).collect(),
    };
    cut + "…"
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::super::report::Measured;
    use super::*;

    fn finding(what: &str, against: &str, goal: Goal) -> Finding {
        Finding {
            number: 3,
            what: what.into(),
            ours: "2 /s".into(),
            against: against.into(),
            theirs: "1 /s".into(),
            ratios: Measured::once(2.0),
            goal,
        }
    }

    #[test]
    fn a_text_with_room_stays_whole() {
        assert_eq!(shortened("claim and release", 17), "claim and release");
    }

    #[test]
    fn a_longer_one_is_cut_at_a_word() {
        assert_eq!(shortened("claim and release", 16), "claim and…");
        assert_eq!(shortened("claim and release", 10), "claim and…");
        assert_eq!(shortened("claim and release", 9), "claim…");
        assert_eq!(shortened("beating sessions, singly", 18), "beating sessions…");
    }

    #[test]
    fn what_is_one_word_is_cut_within_it() {
        assert_eq!(shortened("überlänglich", 5), "über…");
    }

    #[test]
    fn a_label_tells_both_sides() {
        let goal = Goal::AtLeast(2.0);
        let labels = ["the bare writes", "PL/pgSQL with few checks"]
            .map(|against| label(&finding("claim and release", against, goal)));
        assert_eq!(labels[0], ["3. claim and release", "against the bare writes"]);
        assert_ne!(labels[0], labels[1]);
    }

    #[test]
    fn only_what_has_a_goal_is_drawn() {
        let drawn = chart(&[
            finding("first & best", "other", Goal::AtLeast(2.0)),
            finding("second", "other", Goal::None),
        ]);
        assert!(drawn.contains("3. first &amp; best"));
        assert!(!drawn.contains("second"));
    }

    #[test]
    fn a_bar_reaches_the_line_where_the_goal_is_met() {
        assert_eq!(share_of_goal(Goal::AtLeast(0.5), 0.5), Some(1.0));
        assert_eq!(share_of_goal(Goal::AtLeast(0.5), 1.0), Some(2.0));
        assert_eq!(share_of_goal(Goal::AtMost(3.0), 6.0), Some(0.5));
    }
}
