//! Tables whose rows can be written only under their SD's claim.

use pgrx::pg_sys;

use super::partitions::{self, with_partitions};
use super::table::TableFacts;
use crate::error::{ClaimError, Purpose, Result};
use crate::spi::statement::Db;

/// The triggers. The server fires triggers in the order of their names: this one comes last among the
/// BEFORE triggers, so that no other can change a row's SD behind it.
const ROW_TRIGGER: &str = "zz_pg_claims_guard";
const TRUNCATE_TRIGGER: &str = "zz_pg_claims_guard_truncate";

/// Guards a table, or guards it anew by another column. The caller must own it. Returns its name.
pub fn guard_table(db: &Db<'_>, table: pg_sys::Oid, column: &str) -> Result<String> {
    let facts = TableFacts::read(db, table, Purpose::Guard)?;
    facts.check_owner(db)?;
    facts.check_can_be_guarded(db, column)?;
    take_off(db, table)?;
    let schema = &db.catalog()?.schema;
    let name = facts.name();
    // Partitions, also those that come later, get the row trigger from their table.
    create(
        db,
        name,
        ROW_TRIGGER,
        &format!(
            "BEFORE INSERT OR UPDATE OR DELETE ON {name} FOR EACH ROW
             EXECUTE FUNCTION {schema}.check_guarded_write({})",
            pgrx::spi::quote_literal(column)
        ),
    )?;
    for tree in with_partitions(db, table)? {
        create(
            db,
            &tree,
            TRUNCATE_TRIGGER,
            &format!(
                "BEFORE TRUNCATE ON {tree} FOR EACH STATEMENT
                 EXECUTE FUNCTION {schema}.refuse_guarded_truncate()"
            ),
        )?;
    }
    Ok(name.to_owned())
}

/// Takes the guard off a table. The caller must own it. Returns its name.
pub fn unguard_table(db: &Db<'_>, table: pg_sys::Oid) -> Result<String> {
    let facts = TableFacts::read(db, table, Purpose::Guard)?;
    facts.check_owner(db)?;
    let table_name = facts.name().to_owned();
    if !take_off(db, table)? {
        return Err(ClaimError::NotGuarded { table: table_name });
    }
    Ok(table_name)
}

fn create(db: &Db<'_>, table: &str, trigger: &str, definition: &str) -> Result<()> {
    db.run_once(&format!("CREATE TRIGGER {trigger} {definition}"), &[])?;
    // It goes when the extension is dropped.
    db.run_once(
        &format!("ALTER TRIGGER {trigger} ON {table} DEPENDS ON EXTENSION pg_claims"),
        &[],
    )?;
    Ok(())
}

fn take_off(db: &Db<'_>, table: pg_sys::Oid) -> Result<bool> {
    let found = partitions::triggers_on(db, table, &[ROW_TRIGGER, TRUNCATE_TRIGGER])?;
    for (trigger, on) in &found {
        db.run_once(&format!("DROP TRIGGER {trigger} ON {on}"), &[])?;
    }
    Ok(!found.is_empty())
}
