//! Triggers on a table and its partitions. Partitions get the row triggers of their table from the
//! server, but none that are for whole statements.

use pgrx::pg_sys;

use crate::error::Result;
use crate::spi::row::Row;
use crate::spi::statement::Db;

/// The names of the table and its partitions, schema-qualified and quoted.
pub fn with_partitions(db: &Db<'_>, table: pg_sys::Oid) -> Result<Vec<String>> {
    let mut rows = db.run_once(
        "SELECT pg_catalog.format('%I.%I', n.nspname, c.relname)
           FROM pg_catalog.pg_class c
           JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
          WHERE c.oid = $1 OR c.oid IN (SELECT relid FROM pg_catalog.pg_partition_tree($1))
          ORDER BY c.oid",
        &[table.into()],
    )?;
    let mut found = Vec::new();
    while rows.next().is_some() {
        found.push(rows.required_text(1, "pg_class")?);
    }
    Ok(found)
}

/// Those of the triggers `names` that are on the table or made for one of its partitions, each with
/// what it is on.
pub fn triggers_on(
    db: &Db<'_>,
    table: pg_sys::Oid,
    names: &[&str],
) -> Result<Vec<(String, String)>> {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let mut rows = db.run_once(
        "SELECT t.tgname::text, pg_catalog.format('%I.%I', n.nspname, c.relname)
           FROM pg_catalog.pg_trigger t
           JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid
           JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
          WHERE (t.tgrelid = $1 OR t.tgrelid IN (SELECT relid FROM pg_catalog.pg_partition_tree($1)))
            AND t.tgname = ANY ($2) AND t.tgparentid = 0 AND NOT t.tgisinternal
          ORDER BY t.tgname, c.oid",
        &[table.into(), names.into()],
    )?;
    let mut found = Vec::new();
    while rows.next().is_some() {
        found.push((rows.required_text(1, "pg_trigger")?, rows.required_text(2, "pg_class")?));
    }
    Ok(found)
}
