//! How the backlog in use is addressed in SQL.

use std::ffi::CString;

use pgrx::pg_sys;

use super::code;
use super::column_type::{ColumnType, NO_ORDER};
use super::columns::{Columns, quoted};
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
    /// The types of its columns.
    types: Vec<ColumnType>,
    /// A column that the table does not have (any more).
    missing: Option<String>,
    /// What of its owner's code planning a statement on it would run.
    untrusted: Option<String>,
    /// Its partitions, and theirs.
    pub partitions: Vec<pg_sys::Oid>,
    /// Its deferrable constraints.
    pub deferrable: Vec<Deferrable>,
}

impl Backlog {
    /// Reads which backlog is in use: the bound one, else the extension's own, else none.
    pub fn read(
        db: &Db<'_>,
        schema: &str,
        own_backlog: Option<pg_sys::Oid>,
    ) -> Result<Option<Self>> {
        match Columns::bound(db, schema)?.filter(|(table, _)| is_there(*table)) {
            Some((table, columns)) => Ok(Some(Self::of(db, table, columns)?)),
            None => own_backlog.map(|table| Self::of(db, table, Columns::own())).transpose(),
        }
    }

    /// The table `table_oid` with `columns`.
    pub fn of(db: &Db<'_>, table_oid: pg_sys::Oid, columns: Columns) -> Result<Self> {
        let row = db
            .ask(
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
        let types = ColumnType::all(db, table_oid)?;
        let deferrable = deferrable_constraints(db, table_oid)?;
        let is_missing = |column: &&String| types.iter().all(|known| known.column != **column);
        let missing = columns.named().find(is_missing).cloned();
        Ok(Self {
            // Rows of tables that inherit from it are not its own: they could repeat a key.
            from: if row.flag(3)? { format!("ONLY {table}") } else { table.clone() },
            owner: required(row.get(2)?, "pg_class")?,
            table_oid,
            table,
            search_path,
            columns,
            types,
            missing,
            untrusted: code::untrusted(db, table_oid)?,
            partitions: partitions_of(db, table_oid)?,
            deferrable,
        })
    }

    /// A table of the same columns, without partitions.
    pub fn likeness(&self, table: &str, table_oid: pg_sys::Oid) -> Self {
        Self { table: table.into(), table_oid, partitions: Vec::new(), ..self.clone() }
    }

    /// The backlog, unless a column that it was bound with has been renamed since, or reading it would run
    /// its owner's code with the extension's rights.
    pub fn usable(&self) -> Result<&Self> {
        if let Some(code) = &self.untrusted {
            return Err(ClaimError::UntrustedCode {
                table: self.table.clone(),
                code: code.clone(),
            });
        }
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

    /// The column's type, if the backlog has the column.
    fn type_of(&self, column: &Option<String>) -> Option<&ColumnType> {
        let column = column.as_ref()?;
        self.types.iter().find(|known| known.column == *column)
    }

    /// A column of `b` as text, or NULL where the backlog has none such.
    pub fn text(&self, column: &Option<String>) -> String {
        self.type_of(column).map_or_else(|| "NULL::text".into(), |column| column.text("b."))
    }

    /// An SD's status as text, possibly NULL.
    pub fn status(&self) -> String {
        self.text(&self.columns.status)
    }

    /// An SD's status in a form that can be compared with itself.
    pub fn status_value(&self, prefix: &str) -> Option<String> {
        self.type_of(&self.columns.status).map(|status| status.base(prefix))
    }

    /// Whether an SD is finished, by what its status is called.
    pub fn is_terminal(&self) -> String {
        self.type_of(&self.columns.status)
            .map_or_else(|| "false".into(), |status| status.is_one_of("b.", &self.terminal_words()))
    }

    /// The same for a view, whose text the server keeps. Of an enum it is told twice: also by the values
    /// themselves, which is the form that an index can hold. A statement's text must not name them, as
    /// they may be called otherwise by the time that it is prepared.
    pub fn is_terminal_in_view(&self) -> String {
        let by_name = self.is_terminal();
        let by_value = self
            .type_of(&self.columns.status)
            .and_then(|status| status.is_indexed_one_of("b.", &self.terminal_words()));
        match by_value {
            Some(by_value) if by_value != by_name => format!("({by_value} OR {by_name})"),
            _ => by_name,
        }
    }

    fn terminal_words(&self) -> Vec<String> {
        let statuses = self.columns.terminal_statuses.iter();
        statuses.map(|status| status.to_ascii_lowercase()).collect()
    }

    /// The condition of an index on unfinished SDs; `None` where an index cannot tell.
    pub fn is_unfinished_indexed(&self) -> Option<String> {
        match self.type_of(&self.columns.status) {
            None => Some("true".into()),
            Some(status) => status
                .is_indexed_one_of("", &self.terminal_words())
                .map(|is_terminal| format!("NOT {is_terminal}")),
        }
    }

    /// The order in which SDs should be worked, as expressions of which each is NULL for what comes
    /// last: by priority, rank and age. The id comes after these.
    pub fn order(&self, prefix: &str) -> Order {
        let c = &self.columns;
        Order {
            priority: self
                .type_of(&c.priority)
                .map_or_else(|| NO_ORDER.into(), |column| column.priority_order(prefix)),
            rank: c.rank.as_ref().map_or_else(
                || "NULL::numeric".into(),
                |rank| format!("({}::numeric)", quoted(prefix, rank)),
            ),
            created_at: self
                .type_of(&c.created_at)
                .map_or_else(|| "NULL::timestamptz".into(), |column| column.instant(prefix)),
        }
    }

    /// The keys of the SDs that an SD depends on, as jsonb.
    pub fn dependencies(&self, schema: &str) -> String {
        match self.type_of(&self.columns.dependencies) {
            None => "NULL::jsonb".into(),
            Some(column) => column.keys("b.", schema),
        }
    }

    /// The key of the SD of which an SD is a part, if an index can hold it.
    pub fn parent_indexed(&self) -> Option<String> {
        let parent = self.type_of(&self.columns.parent)?;
        parent.is_immutable_as_text().then(|| parent.text(""))
    }

    /// Every key by which an SD can be named, as `(key, sd_id, status, is_terminal, precedence)`, of
    /// those whose key meets `condition`. Where one SD's further key is another's canonical id, that
    /// goes before: it has the lower precedence, and comes first.
    pub fn by_key(&self, condition: impl Fn(&str) -> String) -> String {
        let mut keys = vec![self.canonical()];
        keys.extend(self.columns.aliases("b."));
        let branches: Vec<String> = keys
            .iter()
            .enumerate()
            .map(|(precedence, key)| {
                format!(
                    "SELECT {key} AS key, {} AS sd_id, {} AS status, {} AS is_terminal,
                            {precedence} AS precedence
                       FROM {} b WHERE {}",
                    self.canonical(),
                    self.status(),
                    self.is_terminal(),
                    self.from,
                    condition(key),
                )
            })
            .collect();
        format!("({})", branches.join(") UNION ALL ("))
    }

    /// The SD that `parameter` names by any of its keys.
    pub fn resolve(&self, parameter: &str) -> String {
        format!("{} LIMIT 1", self.by_key(|key| format!("{key} = {parameter}")))
    }
}

/// A table whose type went with a session is gone without anybody having been asked: then nothing is bound any more.
pub fn is_there(table: pg_sys::Oid) -> bool {
    // SAFETY: looks the table up in the catalogue.
    unsafe { !pg_sys::get_rel_name(table).is_null() }
}

/// See [`Backlog::order`].
pub struct Order {
    /// The priority's place, as a numeric.
    pub priority: String,
    /// The rank, as a numeric.
    pub rank: String,
    /// When the SD was written down, as a timestamptz.
    pub created_at: String,
}

fn partitions_of(db: &Db<'_>, table: pg_sys::Oid) -> Result<Vec<pg_sys::Oid>> {
    let rows = db.ask(
        concat!("WITH RECURSIVE ", partitions!(), " SELECT oid FROM partitions ORDER BY 1"),
        &[table.into()],
    )?;
    rows.into_iter().map(|row| required(row.get(1)?, "pg_inherits")).collect()
}

/// A constraint that can be deferred.
#[derive(Debug, Clone, PartialEq)]
pub struct Deferrable {
    /// As SET CONSTRAINTS names it.
    pub qualified: String,
    /// Its name.
    pub name: String,
    /// Its schema.
    pub namespace: pg_sys::Oid,
    /// Whether it is deferred unless told otherwise.
    pub is_deferred: bool,
}

fn deferrable_constraints(db: &Db<'_>, table: pg_sys::Oid) -> Result<Vec<Deferrable>> {
    let rows = db.ask(
        "SELECT DISTINCT pg_catalog.format('%I.%I', n.nspname, c.conname), t.tginitdeferred,
                c.conname::text, c.connamespace
           FROM pg_catalog.pg_trigger t
           JOIN pg_catalog.pg_constraint c ON c.oid = t.tgconstraint
           JOIN pg_catalog.pg_namespace n ON n.oid = c.connamespace
          WHERE t.tgrelid = $1 AND t.tgdeferrable AND NOT pg_catalog.starts_with(t.tgname, 'zz_pg_claims_')
          ORDER BY 1",
        &[table.into()],
    )?;
    let mut found = Vec::new();
    for row in rows {
        found.push(Deferrable {
            qualified: required(row.get(1)?, "pg_constraint")?,
            is_deferred: required(row.get(2)?, "pg_trigger")?,
            name: required(row.get(3)?, "pg_constraint")?,
            namespace: required(row.get(4)?, "pg_constraint")?,
        });
    }
    Ok(found)
}
