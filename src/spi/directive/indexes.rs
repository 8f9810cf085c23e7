//! The indexes that the queue reads a backlog by.

use super::Backlog;
use super::table::{TableFacts, WantedIndex};
use crate::error::{Purpose, Result};
use crate::spi::statement::Db;

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

/// The indexes that the backlog in use is to have, apart from those that its table has by itself.
pub fn wanted_indexes(db: &Db<'_>, backlog: &Backlog) -> Result<Vec<WantedIndex>> {
    if db.catalog()?.uses_own_backlog() {
        return Ok(of_own(backlog));
    }
    TableFacts::read(db, backlog.table_oid, Purpose::Bind)?.wanted_indexes(backlog)
}

/// Those of the extension's own backlog.
pub fn of_own(backlog: &Backlog) -> Vec<WantedIndex> {
    let wanted = for_queue(backlog).into_iter();
    wanted
        .map(|(name, definition)| {
            WantedIndex::of_queue(format!("strategic_directives_v2_{name}_idx"), definition)
        })
        .collect()
}

/// Makes an index anew that is missing, or is not as it was made.
pub fn renew_index(db: &Db<'_>, backlog: &Backlog, index: &WantedIndex) -> Result<()> {
    let schema_of = backlog.table.rsplit_once('.').map_or("", |(schema, _)| schema);
    let name = pgrx::spi::quote_identifier(&index.name);
    db.run_once(&format!("DROP INDEX IF EXISTS {schema_of}.{name}"), &[])?;
    if db.catalog()?.uses_own_backlog() {
        db.run_once(
            &format!("CREATE {} {name} ON {} {}", index.kind, backlog.table, index.definition),
            &[],
        )?;
        return Ok(());
    }
    TableFacts::read(db, backlog.table_oid, Purpose::Bind)?.make_index(db, backlog, index)?;
    Ok(())
}
