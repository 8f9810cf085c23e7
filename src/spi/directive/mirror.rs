//! Keeping the backlog's `is_working_on` and `active_session_id`.

use std::cell::Cell;

use pgrx::pg_sys::BuiltinOid::TEXTOID;

use super::Backlog;
use crate::error::Result;
use crate::identity::ActingAs;
use crate::spi::catalog::{self, Catalog};
use crate::spi::row::Row;
use crate::spi::statement::{Db, Statement};

// One SD a statement: for a list the server would plan anew each time, as it cannot know how long
// the list will be.
static LOCK: Statement = Statement::new(
    |catalog| {
        over_backlog(catalog, "SELECT 1 WHERE $1 IS NULL", |b| {
            format!(
                "SELECT 1 FROM {} b WHERE {} = $1 FOR NO KEY UPDATE OF b",
                b.table,
                b.canonical()
            )
        })
    },
    &[TEXTOID],
);

/// Writes who works on an SD ($2 NULL: nobody), where that is not what the row says already.
static SYNC: Statement = Statement::new(
    |catalog| {
        const NOTHING: &str = "SELECT 1 WHERE $1 IS NULL AND $2 IS NULL";
        over_backlog(catalog, NOTHING, |b| {
            let mut set = Vec::new();
            if let Some(column) = &b.columns.is_working_on {
                set.push((pgrx::spi::quote_identifier(column), "($2 IS NOT NULL)"));
            }
            if let Some(column) = &b.columns.active_session_id {
                set.push((pgrx::spi::quote_identifier(column), "$2"));
            }
            if set.is_empty() {
                return NOTHING.into();
            }
            let assignments: Vec<_> = set.iter().map(|(c, v)| format!("{c} = {v}")).collect();
            let differences: Vec<_> =
                set.iter().map(|(c, v)| format!("b.{c} IS DISTINCT FROM {v}")).collect();
            format!(
                "UPDATE {} b SET {} WHERE {} = $1 AND ({})",
                b.table,
                assignments.join(", "),
                b.canonical(),
                differences.join(" OR "),
            )
        })
    },
    &[TEXTOID, TEXTOID],
);

fn over_backlog(catalog: &Catalog, nothing: &str, text: impl FnOnce(&Backlog) -> String) -> String {
    catalog.backlog.as_ref().map_or_else(|| nothing.into(), text)
}

/// Locks the SDs against a concurrent claim, release, completion or deletion until the transaction
/// ends, waiting for whoever is writing them now. In the order of their ids, so that two callers
/// with the same SDs cannot wait for each other.
pub fn lock(db: &Db<'_>, mut sd_ids: Vec<String>) -> Result<()> {
    catalog::lock_history(db)?;
    sd_ids.sort();
    let _acting = acting_as_owner(db)?;
    for sd_id in sd_ids {
        db.run(&LOCK, &[sd_id.into()])?;
    }
    Ok(())
}

thread_local! {
    static SYNCING: Cell<bool> = const { Cell::new(false) };
}

/// Whether this backend is writing the mirror right now; the trigger that keeps others from doing
/// so asks.
pub fn is_syncing() -> bool {
    SYNCING.get()
}

/// Lets this backend write the mirror until it is dropped, on an error as well.
struct Syncing;

impl Syncing {
    fn new() -> Self {
        SYNCING.set(true);
        Self
    }
}

impl Drop for Syncing {
    fn drop(&mut self) {
        SYNCING.set(false);
    }
}

/// Makes the backlog say that `session_id` works on the SD, or nobody.
pub fn sync(db: &Db<'_>, sd_id: &str, session_id: Option<&str>) -> Result<()> {
    let _syncing = Syncing::new();
    let _acting = acting_as_owner(db)?;
    db.run(&SYNC, &[sd_id.into(), session_id.into()])?;
    Ok(())
}

fn acting_as_owner(db: &Db<'_>) -> Result<Option<ActingAs>> {
    let catalog = db.catalog()?;
    Ok(catalog.backlog.as_ref().map(|backlog| ActingAs::table_owner(backlog.owner)))
}

static TITLE: Statement = Statement::new(
    |c| format!("SELECT title FROM {}.v_directives WHERE sd_id = $1", c.schema),
    &[TEXTOID],
);

/// An SD's title.
pub fn title(db: &Db<'_>, sd_id: &str) -> Result<Option<String>> {
    match db.first_row(&TITLE, &[sd_id.into()])? {
        Some(row) => row.text(1),
        None => Ok(None),
    }
}
