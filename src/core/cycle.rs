//! Circles among SDs that wait for each other.

use std::collections::{HashMap, VecDeque};

use petgraph::algo::kosaraju_scc;
use petgraph::graph::{DiGraph, NodeIndex};

/// How many SDs of a circle are named.
const NAMED: usize = 10;

/// An SD that waits, by way of others or directly, for itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Circular {
    /// The SD.
    pub sd_id: String,
    /// A shortest circle of those that it is entangled in, such as `A → B → A`.
    pub cycle: String,
}

/// The SDs that wait for themselves, sorted, of `waits`: who waits, and for whom.
///
/// SDs that wait for each other are one strongly connected component, for which one circle is told,
/// whichever of its SDs it goes through: one look at each SD and each wait.
pub fn find(waits: &[(String, String)]) -> Vec<Circular> {
    let mut graph = DiGraph::<&str, ()>::new();
    let mut nodes = HashMap::new();
    for (waiting, awaited) in waits {
        let [from, to] = [waiting, awaited]
            .map(|sd_id| *nodes.entry(sd_id.as_str()).or_insert_with(|| graph.add_node(sd_id)));
        graph.add_edge(from, to, ());
    }
    let components = kosaraju_scc(&graph);
    let mut component_of = vec![0; graph.node_count()];
    for (number, component) in components.iter().enumerate() {
        for node in component {
            component_of[node.index()] = number;
        }
    }
    let mut found = Vec::new();
    for component in components {
        let Some(first) = component.iter().min_by_key(|node| graph[**node]).copied() else {
            continue;
        };
        let Some(circle) = shortest_circle(&graph, &component_of, first) else { continue };
        let cycle = told(&graph, &circle);
        found.extend(
            component
                .iter()
                .map(|node| Circular { sd_id: graph[*node].to_owned(), cycle: cycle.clone() }),
        );
    }
    found.sort_by(|a, b| a.sd_id.cmp(&b.sd_id));
    found
}

/// From `start` back to it, without the return itself. Who leaves the component does not come back.
fn shortest_circle(
    graph: &DiGraph<&str, ()>,
    component_of: &[usize],
    start: NodeIndex,
) -> Option<Vec<NodeIndex>> {
    let is_inside = |node: &NodeIndex| component_of[node.index()] == component_of[start.index()];
    let mut reached_from = HashMap::new();
    let mut next = VecDeque::from([start]);
    while let Some(node) = next.pop_front() {
        for neighbour in graph.neighbors(node).filter(is_inside) {
            if neighbour == start {
                let mut circle = vec![node];
                let mut at = node;
                while let Some(before) = reached_from.get(&at) {
                    at = *before;
                    circle.push(at);
                }
                circle.reverse();
                return Some(circle);
            }
            reached_from.entry(neighbour).or_insert_with(|| {
                next.push_back(neighbour);
                node
            });
        }
    }
    None
}

fn told(graph: &DiGraph<&str, ()>, circle: &[NodeIndex]) -> String {
    let mut names: Vec<&str> = circle.iter().take(NAMED).map(|node| graph[*node]).collect();
    if circle.len() > NAMED {
        names.push("…");
    }
    names.extend(names.first().copied());
    names.join(" → ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(waits: &[(&str, &str)]) -> Vec<(String, String)> {
        let waits: Vec<_> = waits.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
        find(&waits).into_iter().map(|c| (c.sd_id, c.cycle)).collect()
    }

    fn pairs(expected: &[(&str, &str)]) -> Vec<(String, String)> {
        expected.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect()
    }

    #[test]
    fn only_those_that_wait_for_themselves_are_told() {
        assert_eq!(found(&[("A", "B"), ("B", "C"), ("D", "C")]), []);
        assert_eq!(found(&[("A", "A"), ("B", "A")]), pairs(&[("A", "A → A")]));
        // E waits for the circle and is not in it; the circle waits for F.
        let waits = [("B", "C"), ("C", "A"), ("A", "B"), ("E", "A"), ("B", "F")];
        let cycle = "A → B → C → A";
        assert_eq!(found(&waits), pairs(&[("A", cycle), ("B", cycle), ("C", cycle)]));
    }

    #[test]
    fn entangled_circles_are_told_by_one_of_them() {
        let waits = [("A", "B"), ("B", "A"), ("B", "C"), ("C", "B")];
        let cycle = "A → B → A";
        assert_eq!(found(&waits), pairs(&[("A", cycle), ("B", cycle), ("C", cycle)]));
    }

    #[test]
    fn a_long_chain_and_a_long_circle_neither_overflow_nor_fill_the_screen() {
        let name = |n: usize| format!("SD-{n:06}");
        let mut waits: Vec<_> = (0..200_000).map(|n| (name(n), name(n + 1))).collect();
        assert_eq!(find(&waits), []);
        waits.push((name(200_000), name(0)));
        let circle = find(&waits);
        assert_eq!(circle.len(), 200_001);
        assert!(circle[0].cycle.ends_with("SD-000009 → … → SD-000000"), "{}", circle[0].cycle);
    }
}
