//! How the backlog in use is addressed in SQL.

use pgrx::pg_sys;

use super::columns::{Columns, as_text};
use crate::error::Result;
use crate::spi::row::Row;
use crate::spi::statement::{Db, required};

/// The backlog in use. Its SQL fragments name the table by the alias `b`.
#[derive(Debug, Clone, PartialEq)]
pub struct Backlog {
    /// The table.
    pub table_oid: pg_sys::Oid,
    /// Its schema-qualified name, quoted.
    pub table: String,
    /// Its owner, with whose rights it is written.
    pub owner: pg_sys::Oid,
    /// Which of its columns mean what.
    pub columns: Columns,
    /// Those of its columns whose type is an enum.
    enums: Vec<String>,
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
                "SELECT pg_catalog.format('%I.%I', n.nspname, c.relname), c.relowner
                   FROM pg_catalog.pg_class c
                   JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
                  WHERE c.oid = $1",
                &[table_oid.into()],
            )?
            .first();
        let mut enums = Vec::new();
        for row in db.run_once(
            "SELECT a.attname::text
               FROM pg_catalog.pg_attribute a
               JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
               JOIN pg_catalog.pg_type b ON b.oid = COALESCE(NULLIF(t.typbasetype, 0), t.oid)
              WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped AND b.typtype = 'e'",
            &[table_oid.into()],
        )? {
            enums.extend(row.get::<String>(1)?);
        }
        Ok(Self {
            enums,
            table_oid,
            table: row.required_text(1, "pg_class")?,
            owner: required(row.get(2)?, "pg_class")?,
            columns,
        })
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
            .map(|status| pgrx::spi::quote_literal(status.to_lowercase()))
            .collect();
        format!(
            "COALESCE(pg_catalog.lower({}) = ANY (ARRAY[{}]::text[]), false)",
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
                    self.table,
                )
            })
            .collect();
        format!("({}) LIMIT 1", branches.join(") UNION ALL ("))
    }
}

/// [`Backlog::resolve`], or nothing where there is no backlog.
pub fn resolve(backlog: Option<&Backlog>, parameter: &str) -> String {
    backlog.map_or_else(
        || format!("SELECT {parameter} AS sd_id, NULL::text AS status, false AS is_terminal WHERE false"),
        |backlog| backlog.resolve(parameter),
    )
}
