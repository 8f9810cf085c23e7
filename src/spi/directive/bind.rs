//! Binding a user's table as the backlog, and letting it go.

use pgrx::pg_sys::panic::ErrorReport;
use pgrx::{PgLogLevel, PgSqlErrorCode, pg_sys};

use super::backlog::{Backlog, is_there};
use super::columns::Columns;
use super::table::TableFacts;
use super::{attach, mirror};
use crate::error::{ClaimError, Purpose, Result};
use crate::identity;
use crate::pg::lock::{self, Mode};
use crate::pg::time;
use crate::spi::catalog;
use crate::spi::intent;
use crate::spi::repair::views;
use crate::spi::statement::{Db, required};

/// What binding did.
#[derive(Debug, serde::Serialize)]
pub struct Bound {
    /// Always true.
    pub success: bool,
    /// The table that is the backlog now.
    pub table: String,
    /// Its keys, the canonical one first.
    pub key_columns: Vec<String>,
    /// The indexes that were made for keys that had none that serves.
    pub indexes_created: Vec<String>,
    /// Rows whose is_working_on or active_session_id did not agree with the claims, and was set.
    pub rows_corrected: usize,
}

/// Makes `table` the backlog. The caller must own it. A column that is `None` is looked for under its
/// usual name; an empty name means that the table has none such.
pub fn bind(db: &Db<'_>, table: pg_sys::Oid, asked: Columns) -> Result<Bound> {
    // The owner first: a stranger could lock any table otherwise. What was read before the lock may
    // have changed until it was granted, so all is read again.
    TableFacts::read(db, table, Purpose::Bind)?.check_owner(db)?;
    exclude_others(db, Some(table))?;
    let facts = TableFacts::read(db, table, Purpose::Bind)?;
    facts.check_owner(db)?;
    facts.check_kind(db)?;
    facts.check_lasts(db)?;
    let columns = facts.columns(asked)?;
    let backlog = Backlog::of(db, table, columns)?;
    backlog.usable()?;
    views::make_missing(db)?;
    let_go(db)?;
    let indexes_created = facts.ensure_indexes(db, &backlog)?;
    let schema = db.catalog()?.schema.clone();
    attach::attach_triggers(db, &backlog, &schema)?;
    attach::tie_triggers_to_extension(db, &backlog)?;
    remember(db, &schema, &backlog)?;
    check_open_claims(db, &schema)?;
    warn_of_unlogged(db, &backlog)?;
    Ok(Bound {
        success: true,
        rows_corrected: correct_mirror(db)?,
        key_columns: backlog.columns.keys,
        table: backlog.table,
        indexes_created,
    })
}

/// Makes the extension's own table the backlog again. The caller must own the bound table.
/// Returns the table that was let go.
pub fn unbind(db: &Db<'_>) -> Result<String> {
    exclude_others(db, None)?;
    views::make_missing(db)?;
    let Some(table) = let_go(db)? else {
        return Err(ClaimError::NotBound);
    };
    let schema = catalog::usable_backlog(db)?.schema.clone();
    check_open_claims(db, &schema)?;
    correct_mirror(db)?;
    Ok(table)
}

/// Keeps everybody else off the backlogs and the claims until the transaction ends, in the order in
/// which a claim or a completion comes by: backlog, then claims. Heartbeats touch neither and go on.
fn exclude_others(db: &Db<'_>, next: Option<pg_sys::Oid>) -> Result<()> {
    if time::has_transaction_snapshot() {
        return Err(ClaimError::NeedsReadCommitted { what: "change the backlog" });
    }
    if intent::mirrors_under_way() > 0 {
        return Err(ClaimError::DirectWrite {
            code: PgSqlErrorCode::ERRCODE_OBJECT_IN_USE,
            message: "cannot change the backlog while a claim writes a row of it".into(),
            detail: Some("A trigger that the write has set off asks for it.".into()),
            hint: "Call bind_directives() and unbind_directives() outside of the backlog's triggers.",
        });
    }
    let catalog = db.catalog()?;
    let mut tables: Vec<pg_sys::Oid> = next.into_iter().collect();
    tables.extend(catalog.backlog.as_ref().map(|backlog| backlog.table_oid));
    tables.sort_by_key(|oid| oid.to_u32());
    for table in tables {
        lock::relation(table, Mode::AccessExclusive);
    }
    let schema = &catalog.schema;
    db.run_once(&format!("LOCK TABLE {schema}.sd_claims IN SHARE ROW EXCLUSIVE MODE"), &[])?;
    Ok(())
}

/// Takes the extension's things off the bound table, if there is one, and clears its mirror.
fn let_go(db: &Db<'_>) -> Result<Option<String>> {
    let catalog = db.catalog()?;
    let schema = &catalog.schema;
    let Some((table, columns)) = Columns::bound(db, schema)? else {
        // The extension's own table keeps its triggers; its mirror is cleared all the same.
        catalog::usable_backlog(db)?;
        clear_mirror(db)?;
        return Ok(None);
    };
    if !is_there(table) {
        db.run_once(&format!("DELETE FROM {schema}.directive_binding"), &[])?;
        return Ok(None);
    }
    TableFacts::read(db, table, Purpose::Bind)?.check_owner(db)?;
    let backlog = Backlog::of(db, table, columns)?;
    // With a column renamed there is no telling where the mirror is; the triggers go all the same.
    if backlog.usable().is_ok() {
        clear_mirror(db)?;
    }
    attach::detach_triggers(db, &backlog)?;
    for index in tied_indexes(db, table)? {
        db.run_once(&format!("DROP INDEX {index}"), &[])?;
    }
    db.run_once(&format!("DELETE FROM {schema}.directive_binding"), &[])?;
    Ok(Some(backlog.table))
}

/// What is in an unlogged table is lost in a crash, and a standby has nothing of it.
fn warn_of_unlogged(db: &Db<'_>, backlog: &Backlog) -> Result<()> {
    let unlogged = db.run_once(
        "SELECT FROM pg_catalog.pg_class WHERE oid = $1 AND relpersistence = 'u'",
        &[backlog.table_oid.into()],
    )?;
    if !unlogged.is_empty() {
        ErrorReport::new(
            PgSqlErrorCode::ERRCODE_WARNING,
            format!("the backlog {} is an unlogged table", backlog.table),
            "pg_claims",
        )
        .set_detail(
            "A crash empties it, and its claims end with its SDs; a standby has nothing of it.",
        )
        .set_hint("ALTER TABLE … SET LOGGED keeps it.")
        .report(PgLogLevel::WARNING);
    }
    Ok(())
}

/// Forgets that one of these tables is bound, without a look at it: it is being dropped. Whoever writes the
/// binding gets the views that go with it.
pub fn forget_bound(db: &Db<'_>, tables: &[pg_sys::Oid]) -> Result<()> {
    let schema = db.catalog()?.schema.clone();
    if Columns::bound(db, &schema)?.is_some_and(|(table, _)| tables.contains(&table)) {
        db.run_once(&format!("DELETE FROM {schema}.directive_binding"), &[])?;
    }
    Ok(())
}

fn remember(db: &Db<'_>, schema: &str, backlog: &Backlog) -> Result<()> {
    let c = &backlog.columns;
    db.run_once(
        &format!(
            "INSERT INTO {schema}.directive_binding
                    (bound_table, key_columns, terminal_statuses, title_column, status_column,
                     priority_column, track_column, rank_column, dependencies_column,
                     parent_column, created_at_column, is_working_on_column,
                     active_session_id_column, bound_by)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)"
        ),
        &[
            backlog.table_oid.into(),
            c.keys.clone().into(),
            c.terminal_statuses.clone().into(),
            c.title.clone().into(),
            c.status.clone().into(),
            c.priority.clone().into(),
            c.track.clone().into(),
            c.rank.clone().into(),
            c.dependencies.clone().into(),
            c.parent.clone().into(),
            c.created_at.clone().into(),
            c.is_working_on.clone().into(),
            c.active_session_id.clone().into(),
            identity::caller().name().into(),
        ],
    )?;
    Ok(())
}

/// A claim on an SD that the backlog does not have could be neither shown nor finished.
fn check_open_claims(db: &Db<'_>, schema: &str) -> Result<()> {
    let rows = db.run_once(
        &format!(
            "SELECT s.sd_id, s.session_id
               FROM {schema}.claude_sessions s
              WHERE s.sd_id IS NOT NULL AND s.status = 'active'
                AND NOT EXISTS (SELECT FROM {schema}.v_directives d
                                 WHERE d.sd_id = s.sd_id AND NOT d.is_terminal)
              ORDER BY s.sd_id LIMIT 5"
        ),
        &[],
    )?;
    let mut lost = Vec::new();
    for row in rows {
        let sd_id = required(row.get::<String>(1)?, "claude_sessions.sd_id")?;
        let session_id = required(row.get::<String>(2)?, "claude_sessions.session_id")?;
        lost.push(format!("\"{sd_id}\" by session \"{session_id}\""));
    }
    if lost.is_empty() {
        return Ok(());
    }
    Err(ClaimError::BacklogInUse {
        detail: format!(
            "Claimed, and not among the unfinished SDs of the next backlog: {}.",
            lost.join(", ")
        ),
    })
}

fn clear_mirror(db: &Db<'_>) -> Result<()> {
    for sd_id in marked(db)? {
        mirror::sync(db, &sd_id, None)?;
    }
    Ok(())
}

/// Makes the mirror agree with the claims, row by row where it does not; returns how many.
fn correct_mirror(db: &Db<'_>) -> Result<usize> {
    let wrong = mirror::out_of_step(db)?;
    for (sd_id, session_id) in &wrong {
        mirror::sync(db, sd_id, session_id.as_deref())?;
    }
    Ok(wrong.len())
}

/// The SDs whose mirror says that somebody works on them.
fn marked(db: &Db<'_>) -> Result<Vec<String>> {
    let schema = db.catalog()?.schema.clone();
    let rows = db.run_once(
        &format!(
            "SELECT sd_id FROM {schema}.v_directives
              WHERE is_working_on OR active_session_id IS NOT NULL"
        ),
        &[],
    )?;
    let mut marked = Vec::new();
    for row in rows {
        marked.extend(row.get::<String>(1)?);
    }
    Ok(marked)
}

/// The indexes that binding made, which depend on the extension.
fn tied_indexes(db: &Db<'_>, table: pg_sys::Oid) -> Result<Vec<String>> {
    let rows = db.run_once(
        "SELECT pg_catalog.format('%I.%I', n.nspname, c.relname)
           FROM pg_catalog.pg_index i
           JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid
           JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
           JOIN pg_catalog.pg_depend d
             ON d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.objid = c.oid
            AND d.refclassid = 'pg_catalog.pg_extension'::pg_catalog.regclass
            AND d.refobjid = $2 AND d.deptype = 'x'
          WHERE i.indrelid = $1",
        &[table.into(), db.catalog()?.extension.into()],
    )?;
    let mut indexes = Vec::new();
    for row in rows {
        indexes.extend(row.get::<String>(1)?);
    }
    Ok(indexes)
}
