//! Which columns of a backlog mean what.

use pgrx::pg_sys;

use crate::error::Result;
use crate::spi::row::Row;
use crate::spi::statement::{Db, required};

/// The columns of a backlog, by their unquoted names.
#[derive(Debug, Clone, PartialEq)]
pub struct Columns {
    /// The keys, the canonical one first.
    pub keys: Vec<String>,
    /// The title that people read.
    pub title: Option<String>,
    /// The status that says whether an SD is finished.
    pub status: Option<String>,
    /// Its priority.
    pub priority: Option<String>,
    /// Its track.
    pub track: Option<String>,
    /// Its place among SDs of one priority.
    pub rank: Option<String>,
    /// The SDs that must be finished before it.
    pub dependencies: Option<String>,
    /// The SD of which it is a part.
    pub parent: Option<String>,
    /// When it was written down.
    pub created_at: Option<String>,
    /// Whether a session works on it; kept by the extension.
    pub is_working_on: Option<String>,
    /// Which session that is; kept by the extension.
    pub active_session_id: Option<String>,
    /// The statuses in which it cannot be claimed.
    pub terminal_statuses: Vec<String>,
}

impl Columns {
    /// The columns of the extension's own strategic_directives_v2.
    pub fn own() -> Self {
        let named = |name: &str| Some(name.to_owned());
        Self {
            keys: vec!["sd_id".into()],
            title: named("title"),
            status: named("status"),
            priority: named("priority"),
            track: named("track"),
            rank: named("sequence_rank"),
            dependencies: named("dependencies"),
            parent: named("parent_sd_id"),
            created_at: named("created_at"),
            is_working_on: named("is_working_on"),
            active_session_id: named("active_session_id"),
            terminal_statuses: ["completed", "cancelled", "deferred"].map(String::from).into(),
        }
    }

    /// The bound table and its columns, if a table is bound.
    pub fn bound(db: &Db<'_>, schema: &str) -> Result<Option<(pg_sys::Oid, Self)>> {
        let rows = db.run_once(
            &format!(
                "SELECT bound_table::oid, key_columns, terminal_statuses, title_column, status_column,
                        priority_column, track_column, rank_column, dependencies_column,
                        parent_column, created_at_column, is_working_on_column,
                        active_session_id_column
                   FROM {schema}.directive_binding"
            ),
            &[],
        )?;
        if rows.is_empty() {
            return Ok(None);
        }
        let row = rows.first();
        let list = |position| -> Result<Vec<String>> {
            required(row.get::<Vec<String>>(position)?, "directive_binding")
        };
        let table = required(row.get(1)?, "directive_binding")?;
        let columns = Self {
            keys: list(2)?,
            terminal_statuses: list(3)?,
            title: row.text(4)?,
            status: row.text(5)?,
            priority: row.text(6)?,
            track: row.text(7)?,
            rank: row.text(8)?,
            dependencies: row.text(9)?,
            parent: row.text(10)?,
            created_at: row.text(11)?,
            is_working_on: row.text(12)?,
            active_session_id: row.text(13)?,
        };
        Ok(Some((table, columns)))
    }

    /// All columns that are named.
    pub fn named(&self) -> impl Iterator<Item = &String> {
        self.keys.iter().chain(
            [
                &self.title,
                &self.status,
                &self.priority,
                &self.track,
                &self.rank,
                &self.dependencies,
                &self.parent,
                &self.created_at,
                &self.is_working_on,
                &self.active_session_id,
            ]
            .into_iter()
            .flatten(),
        )
    }

    /// The canonical id of a row: the first key that is not NULL, as text. `prefix` stands before
    /// every column, to tell aliases (`b.`) and trigger rows (`OLD.`) apart.
    pub fn canonical(&self, prefix: &str) -> String {
        let keys: Vec<String> = self.keys.iter().map(|key| as_text(prefix, key)).collect();
        match keys.as_slice() {
            [only] => only.clone(),
            _ => format!("COALESCE({})", keys.join(", ")),
        }
    }

    /// The further keys by which a row can be named.
    pub fn aliases(&self, prefix: &str) -> Vec<String> {
        self.keys.iter().skip(1).map(|key| as_text(prefix, key)).collect()
    }
}

/// A column of a built-in type as text.
pub fn as_text(prefix: &str, column: &str) -> String {
    format!("({}::text)", quoted(prefix, column))
}

/// A column as it stands in SQL.
pub fn quoted(prefix: &str, column: &str) -> String {
    format!("{prefix}{}", pgrx::spi::quote_identifier(column))
}
