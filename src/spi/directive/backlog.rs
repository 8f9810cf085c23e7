//! How the backlog in use is addressed in SQL.

use std::ffi::CString;

use pgrx::pg_sys;

use super::columns::{Columns, as_text};
use crate::error::{ClaimError, Result};
use crate::spi::row::Row;
use crate::spi::statement::{Db, required};

/// The backlog in use. Its SQL fragments name the table by the alias `b`.
#[derive(Debug, Clone, PartialEq)]
pub struct Backlog {
    /// The table.
    pub table_oid: pg_sys::Oid,
    /// Its schema-qualified name, quoted.
    pub table: String,
    /// The same as it stands in FROM and UPDATE.
    pub from: String,
    /// Where its owner's code finds unqualified names.
    pub search_path: CString,
    /// Its owner, with whose rights it is written.
    pub owner: pg_sys::Oid,
    /// Which of its columns mean what.
    pub columns: Columns,
    /// Those of its columns whose type is an enum.
    enums: Vec<String>,
    /// A column that the table does not have (any more).
    missing: Option<String>,
    /// Its deferrable constraints, as SET CONSTRAINTS names them, and whether each is deferred unless
    /// told otherwise.
    pub deferrable: Vec<(String, bool)>,
}

impl Backlog {
    /// Reads which backlog is in use: the bound one, else the extension's own, else none.
    pub fn read(
        db: &Db<'_>,
        schema: &str,
        own_backlog: Option<pg_sys::Oid>,
    ) -> Result<Option<Self>> {
        match Columns::bound(db, schema)? {
            Some((table, columns)) => Ok(Some(Self::of(db, table, columns)?)),
            None => own_backlog.map(|table| Self::of(db, table, Columns::own())).transpose(),
        }
    }

    /// The table `table_oid` with `columns`.
    pub fn of(db: &Db<'_>, table_oid: pg_sys::Oid, columns: Columns) -> Result<Self> {
        let row = db
            .run_once(
                "SELECT pg_catalog.format('%I.%I', n.nspname, c.relname), c.relowner, c.relkind = 'r',
                        pg_catalog.format('pg_catalog, %I, pg_temp', n.nspname)
                   FROM pg_catalog.pg_class c
                   JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
                  WHERE c.oid = $1",
                &[table_oid.into()],
            )?
            .first();
        let table = row.required_text(1, "pg_class")?;
        let search_path = CString::new(row.required_text(4, "pg_namespace")?)
            .map_err(|_| ClaimError::Corrupt { what: "pg_namespace" })?;
        let mut enums = Vec::new();
        let mut present = Vec::new();
        for row in db.run_once(
            "SELECT a.attname::text, b.typtype = 'e'
               FROM pg_catalog.pg_attribute a
               JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
               JOIN pg_catalog.pg_type b ON b.oid = COALESCE(NULLIF(t.typbasetype, 0), t.oid)
              WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped",
            &[table_oid.into()],
        )? {
            let name: String = required(row.get(1)?, "pg_attribute")?;
            if row.get::<bool>(2)? == Some(true) {
                enums.push(name.clone());
            }
            present.push(name);
        }
        let deferrable = deferrable_constraints(db, table_oid)?;
        let missing = columns.named().find(|column| !present.contains(column)).cloned();
        Ok(Self {
            // Rows of tables that inherit from it are not its own: they could repeat a key.
            from: if row.flag(3)? { format!("ONLY {table}") } else { table.clone() },
            owner: required(row.get(2)?, "pg_class")?,
            table_oid,
            table,
            search_path,
            columns,
            enums,
            missing,
            deferrable,
        })
    }

    /// The backlog, unless a column that it was bound with has been renamed since.
    pub fn usable(&self) -> Result<&Self> {
        match &self.missing {
            None => Ok(self),
            Some(column) => {
                Err(ClaimError::ColumnGone { table: self.table.clone(), column: column.clone() })
            }
        }
    }

    /// An SD's canonical id: its first key that is not NULL, as text.
    pub fn canonical(&self) -> String {
        self.columns.canonical("b.")
    }

    /// A column of `b` as text, or NULL where the backlog has none such. An enum is written out by its
    /// output function: for a cast, its owner might have made a function of their own, which would
    /// run with the extension's rights.
    pub fn text(&self, column: &Option<String>) -> String {
        match column {
            None => "NULL::text".into(),
            Some(column) if self.enums.contains(column) => format!(
                "pg_catalog.textin(pg_catalog.enum_out(b.{}))",
                pgrx::spi::quote_identifier(column)
            ),
            Some(column) => as_text("b.", column),
        }
    }

    /// An SD's status as text, possibly NULL.
    pub fn status(&self) -> String {
        self.text(&self.columns.status)
    }

    /// Whether an SD is finished.
    pub fn is_terminal(&self) -> String {
        if self.columns.status.is_none() {
            return "false".into();
        }
        let statuses: Vec<String> = self
            .columns
            .terminal_statuses
            .iter()
            .map(|status| pgrx::spi::quote_literal(status.to_ascii_lowercase()))
            .collect();
        format!(
            // The letters A to Z only, in whatever locale, as the trigger does.
            "COALESCE(pg_catalog.lower({} COLLATE pg_catalog.\"C\") = ANY (ARRAY[{}]::text[]), false)",
            self.status(),
            statuses.join(", ")
        )
    }

    /// The SD that `parameter` names by any of its keys, as `(sd_id, status, is_terminal)`. The
    /// canonical id goes before the other keys.
    pub fn resolve(&self, parameter: &str) -> String {
        let mut keys = vec![self.canonical()];
        keys.extend(self.columns.aliases("b."));
        let branches: Vec<String> = keys
            .iter()
            .map(|key| {
                format!(
                    "SELECT {} AS sd_id, {} AS status, {} AS is_terminal FROM {} b WHERE {key} = {parameter}",
                    self.canonical(),
                    self.status(),
                    self.is_terminal(),
                    self.from,
                )
            })
            .collect();
        format!("({}) LIMIT 1", branches.join(") UNION ALL ("))
    }
}

fn deferrable_constraints(db: &Db<'_>, table: pg_sys::Oid) -> Result<Vec<(String, bool)>> {
    let rows = db.run_once(
        "SELECT DISTINCT pg_catalog.format('%I.%I', n.nspname, c.conname), t.tginitdeferred
           FROM pg_catalog.pg_trigger t
           JOIN pg_catalog.pg_constraint c ON c.oid = t.tgconstraint
           JOIN pg_catalog.pg_namespace n ON n.oid = c.connamespace
          WHERE t.tgrelid = $1 AND t.tgdeferrable ORDER BY 1",
        &[table.into()],
    )?;
    let mut found = Vec::new();
    for row in rows {
        let name = required(row.get(1)?, "pg_constraint")?;
        found.push((name, required(row.get(2)?, "pg_trigger")?));
    }
    Ok(found)
}

/// [`Backlog::resolve`], or nothing where there is no backlog.
pub fn resolve(backlog: Option<&Backlog>, parameter: &str) -> String {
    backlog.map_or_else(
        || format!("SELECT {parameter} AS sd_id, NULL::text AS status, false AS is_terminal WHERE false"),
        |backlog| backlog.resolve(parameter),
    )
}
