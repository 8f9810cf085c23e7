//! The indexes that the queue reads a backlog by.

use super::Backlog;

/// What the queue needs an index for, and what stands in CREATE INDEX after the table's name. Only
/// unfinished SDs are in them, so that finished ones cost nothing. An index that the server could
/// not keep, as the text of a column may change by itself, is left out: then it reads the table.
pub fn for_queue(backlog: &Backlog) -> Vec<(&'static str, String)> {
    let Some(unfinished) = backlog.is_unfinished_indexed() else {
        return Vec::new();
    };
    let order = backlog.order("");
    let canonical = backlog.columns.canonical("");
    // The queue is read by an index only if that has its very order; a part that is the same for all
    // SDs is no part of it.
    let keys: Vec<String> = [order.priority, order.rank, order.created_at, canonical]
        .into_iter()
        .filter(|key| !key.starts_with("NULL::"))
        .map(|key| format!("({key})"))
        .collect();
    let mut wanted = vec![("queue", format!("({}) WHERE {unfinished}", keys.join(", ")))];
    if let Some(parent) = backlog.parent_indexed() {
        // Hashed, as whatever stands in that column must find room.
        let hashed = format!("USING hash (({parent})) WHERE {parent} IS NOT NULL AND {unfinished}");
        wanted.push(("parent", hashed));
    }
    wanted
}
