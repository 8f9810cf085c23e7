//! Binding a user's table as the backlog, and letting it go.

use pgrx::{PgSqlErrorCode, pg_sys};

use super::backlog::Backlog;
use super::columns::Columns;
use super::{attach, mirror};
use crate::error::{ClaimError, Result};
use crate::identity;
use crate::spi::row::Row;
use crate::spi::statement::{Db, required};

/// What `bind_directives` was asked for. A column that is `None` is looked for under its usual
/// name; an empty name means that the table has none such.
#[derive(Debug, Default)]
pub struct Request {
    pub keys: Vec<String>,
    pub title: Option<String>,
    pub status: Option<String>,
    pub priority: Option<String>,
    pub track: Option<String>,
    pub rank: Option<String>,
    pub dependencies: Option<String>,
    pub parent: Option<String>,
    pub created_at: Option<String>,
    pub is_working_on: Option<String>,
    pub active_session_id: Option<String>,
    pub terminal_statuses: Vec<String>,
}

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

/// Makes `table` the backlog. The caller must own it.
pub fn bind(db: &Db<'_>, table: pg_sys::Oid, request: Request) -> Result<Bound> {
    let facts = TableFacts::read(db, table)?;
    facts.check_owner(db)?;
    facts.check_kind()?;
    let columns = facts.columns(request)?;
    exclude_claims(db)?;
    let_go(db)?;

    let backlog = Backlog::of(db, table, columns)?;
    let indexes_created = facts.ensure_indexes(db, &backlog)?;
    let schema = db.catalog()?.schema.clone();
    attach::attach_triggers(db, &backlog, &schema)?;
    attach::tie_triggers_to_extension(db, &backlog)?;
    remember(db, &schema, &backlog)?;
    check_open_claims(db, &schema)?;
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
    exclude_claims(db)?;
    let Some(table) = let_go(db)? else {
        return Err(ClaimError::NotBound);
    };
    let schema = db.catalog()?.schema.clone();
    check_open_claims(db, &schema)?;
    correct_mirror(db)?;
    Ok(table)
}

/// Keeps claims and releases out until the transaction ends. Heartbeats do not touch sd_claims and
/// go on.
fn exclude_claims(db: &Db<'_>) -> Result<()> {
    let schema = db.catalog()?.schema.clone();
    db.run_once(&format!("LOCK TABLE {schema}.sd_claims IN SHARE ROW EXCLUSIVE MODE"), &[])?;
    Ok(())
}

/// Takes the extension's things off the bound table, if there is one, and clears its mirror.
fn let_go(db: &Db<'_>) -> Result<Option<String>> {
    let catalog = db.catalog()?;
    let schema = &catalog.schema;
    let Some((table, columns)) = Columns::bound(db, schema)? else {
        // The extension's own table keeps its triggers; its mirror is cleared all the same.
        clear_mirror(db)?;
        return Ok(None);
    };
    TableFacts::read(db, table)?.check_owner(db)?;
    let backlog = Backlog::of(db, table, columns)?;
    clear_mirror(db)?;
    attach::detach_triggers(db, &backlog)?;
    for index in tied_indexes(db, table)? {
        db.run_once(&format!("DROP INDEX {index}"), &[])?;
    }
    db.run_once(&format!("DELETE FROM {schema}.directive_binding"), &[])?;
    Ok(Some(backlog.table))
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
            identity::caller().into(),
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
    let schema = db.catalog()?.schema.clone();
    let rows = db.run_once(
        &format!(
            "SELECT d.sd_id, s.session_id
               FROM {schema}.v_directives d
               LEFT JOIN {schema}.claude_sessions s
                 ON s.sd_id = d.sd_id AND s.sd_id IS NOT NULL AND s.status = 'active'
              WHERE d.is_working_on IS DISTINCT FROM (s.session_id IS NOT NULL)
                 OR d.active_session_id IS DISTINCT FROM s.session_id"
        ),
        &[],
    )?;
    let mut wrong = Vec::new();
    for row in rows {
        let sd_id = required(row.get::<String>(1)?, "v_directives.sd_id")?;
        wrong.push((sd_id, row.get::<String>(2)?));
    }
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

/// What the server knows of a table.
struct TableFacts {
    oid: pg_sys::Oid,
    name: String,
    kind: String,
    owner: String,
    /// Column names with their types' names.
    columns: Vec<(String, String)>,
    /// The columns that a unique index covers alone.
    unique: Vec<String>,
}

impl TableFacts {
    fn read(db: &Db<'_>, oid: pg_sys::Oid) -> Result<Self> {
        let rows = db.run_once(
            "SELECT pg_catalog.format('%I.%I', n.nspname, c.relname), c.relkind::text,
                    pg_catalog.pg_get_userbyid(c.relowner)::text
               FROM pg_catalog.pg_class c
               JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
              WHERE c.oid = $1",
            &[oid.into()],
        )?;
        if rows.is_empty() {
            return Err(ClaimError::InvalidArgument {
                argument: "p_table",
                reason: "no such table".into(),
                hint: None,
            });
        }
        let row = rows.first();
        let (name, kind, owner) = (
            row.required_text(1, "pg_class")?,
            row.required_text(2, "pg_class")?,
            row.required_text(3, "pg_class")?,
        );
        let mut columns = Vec::new();
        for row in db.run_once(
            "SELECT attname::text, pg_catalog.format_type(atttypid, atttypmod)
               FROM pg_catalog.pg_attribute
              WHERE attrelid = $1 AND attnum > 0 AND NOT attisdropped",
            &[oid.into()],
        )? {
            columns.push((
                required(row.get::<String>(1)?, "pg_attribute")?,
                required(row.get::<String>(2)?, "pg_attribute")?,
            ));
        }
        let mut unique = Vec::new();
        for row in db.run_once(
            "SELECT a.attname::text
               FROM pg_catalog.pg_index i
               JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
              WHERE i.indrelid = $1 AND i.indisunique AND i.indisvalid AND i.indimmediate
                AND i.indnkeyatts = 1 AND i.indpred IS NULL",
            &[oid.into()],
        )? {
            unique.extend(row.get::<String>(1)?);
        }
        Ok(Self { oid, name, kind, owner, columns, unique })
    }

    fn check_owner(&self, db: &Db<'_>) -> Result<()> {
        let caller = identity::caller();
        let owns = db
            .run_once(
                "SELECT pg_catalog.pg_has_role($1::name, $2::name, 'USAGE')",
                &[caller.clone().into(), self.owner.clone().into()],
            )?
            .first()
            .flag(1)?;
        if owns {
            Ok(())
        } else {
            Err(ClaimError::NotTableOwner { table: self.name.clone(), caller })
        }
    }

    /// Reading a view or a foreign table would run its owner's code with the extension's rights.
    fn check_kind(&self) -> Result<()> {
        match self.kind.as_str() {
            "r" | "p" => Ok(()),
            _ => Err(self.refuse(
                PgSqlErrorCode::ERRCODE_WRONG_OBJECT_TYPE,
                "Only an ordinary or a partitioned table can be the backlog.".into(),
                "Bind the table itself rather than a view of it.",
            )),
        }
    }

    fn columns(&self, request: Request) -> Result<Columns> {
        if request.keys.is_empty() {
            return Err(ClaimError::InvalidArgument {
                argument: "p_key_columns",
                reason: "names no column".into(),
                hint: Some("Name the column that identifies an SD, or several in order.".into()),
            });
        }
        for key in &request.keys {
            self.type_of(key)?;
        }
        let columns = Columns {
            title: self.column(request.title, &["title"])?,
            status: self.column(request.status, &["status"])?,
            priority: self.column(request.priority, &["priority"])?,
            track: self.column(request.track, &["track"])?,
            rank: self.column(request.rank, &["sequence_rank", "rank"])?,
            dependencies: self.column(request.dependencies, &["dependencies"])?,
            parent: self.column(request.parent, &["parent_sd_id"])?,
            created_at: self.column(request.created_at, &["created_at"])?,
            is_working_on: self.column(request.is_working_on, &["is_working_on"])?,
            active_session_id: self.column(request.active_session_id, &["active_session_id"])?,
            keys: request.keys,
            terminal_statuses: request.terminal_statuses,
        };
        self.expect(&columns.is_working_on, |t| t == "boolean", "boolean")?;
        self.expect(
            &columns.active_session_id,
            holds_session_id,
            "text, or varchar of 200 or more",
        )?;
        self.expect(&columns.rank, is_numeric, "a number")?;
        self.expect(&columns.dependencies, is_list, "jsonb, json or text[]")?;
        self.expect(&columns.created_at, is_time, "a timestamp or a date")?;
        Ok(columns)
    }

    fn column(&self, asked: Option<String>, usual: &[&str]) -> Result<Option<String>> {
        match asked {
            Some(name) if name.is_empty() => Ok(None),
            Some(name) => self.type_of(&name).map(|_| Some(name)),
            None => Ok(usual
                .iter()
                .find(|name| self.columns.iter().any(|(column, _)| column == *name))
                .map(|name| (*name).to_owned())),
        }
    }

    fn type_of(&self, column: &str) -> Result<&str> {
        self.columns
            .iter()
            .find(|(name, _)| name == column)
            .map(|(_, sql_type)| sql_type.as_str())
            .ok_or_else(|| {
                self.refuse(
                    PgSqlErrorCode::ERRCODE_UNDEFINED_COLUMN,
                    format!("The table has no column \"{column}\"."),
                    "Column names are taken to the letter, without quotes.",
                )
            })
    }

    fn expect(
        &self,
        column: &Option<String>,
        fits: impl Fn(&str) -> bool,
        wanted: &str,
    ) -> Result<()> {
        let Some(column) = column else { return Ok(()) };
        let sql_type = self.type_of(column)?;
        if fits(sql_type) {
            return Ok(());
        }
        Err(self.refuse(
            PgSqlErrorCode::ERRCODE_DATATYPE_MISMATCH,
            format!("Column \"{column}\" is of type {sql_type}; it must be {wanted}."),
            "Name another column, or '' to do without.",
        ))
    }

    /// Makes sure that every key is unique and can be looked up as text by an index. Makes an index
    /// where the table has none that serves; it goes with the binding or the extension.
    fn ensure_indexes(&self, db: &Db<'_>, backlog: &Backlog) -> Result<Vec<String>> {
        let columns = &backlog.columns;
        let mut wanted = Vec::new();
        let [first, further @ ..] = columns.keys.as_slice() else { return Ok(Vec::new()) };
        if !further.is_empty() || !self.serves(first)? {
            wanted.push(("sd_id".to_owned(), columns.canonical("")));
        }
        for (key, expression) in further.iter().zip(columns.aliases("")) {
            if !self.serves(key)? {
                wanted.push((key.clone(), expression));
            }
        }
        let mut created = Vec::new();
        for (name, expression) in wanted {
            self.check_unique(db, &expression)?;
            let index =
                pgrx::spi::quote_identifier(format!("pg_claims_{}_{name}", self.oid.to_u32()));
            db.run_once(
                &format!("CREATE UNIQUE INDEX {index} ON {} (({expression}))", self.name),
                &[],
            )?;
            let schema = self.name.split_once('.').map_or("", |(schema, _)| schema);
            db.run_once(
                &format!("ALTER INDEX {schema}.{index} DEPENDS ON EXTENSION pg_claims"),
                &[],
            )?;
            created.push(format!("{schema}.{index}"));
        }
        Ok(created)
    }

    /// Whether an index of the table's finds the key by its text and keeps it unique.
    fn serves(&self, key: &str) -> Result<bool> {
        let sql_type = self.type_of(key)?;
        let is_text = sql_type == "text" || sql_type.starts_with("character varying");
        Ok(is_text && self.unique.iter().any(|column| column == key))
    }

    fn check_unique(&self, db: &Db<'_>, expression: &str) -> Result<()> {
        let rows = db.run_once(
            &format!(
                "SELECT {expression} FROM {} WHERE {expression} IS NOT NULL
                  GROUP BY 1 HAVING pg_catalog.count(*) > 1 LIMIT 1",
                self.name
            ),
            &[],
        )?;
        if rows.is_empty() {
            return Ok(());
        }
        let example = rows.first().required_text(1, "a key")?;
        Err(self.refuse(
            PgSqlErrorCode::ERRCODE_UNIQUE_VIOLATION,
            format!("More than one row has the key \"{example}\"."),
            "Two rows of one key would be one SD; make the keys unique first.",
        ))
    }

    fn refuse(&self, code: PgSqlErrorCode, detail: String, hint: &str) -> ClaimError {
        ClaimError::CannotBind { code, table: self.name.clone(), detail, hint: hint.into() }
    }
}

fn holds_session_id(sql_type: &str) -> bool {
    let length = sql_type
        .strip_prefix("character varying(")
        .and_then(|rest| rest.strip_suffix(')'))
        .map(|length| length.parse().unwrap_or(0));
    match length {
        Some(length) => length >= pg_claims_core::id::MAX_ID_CHARACTERS,
        None => matches!(sql_type, "text" | "character varying"),
    }
}

fn is_numeric(sql_type: &str) -> bool {
    sql_type.starts_with("numeric")
        || matches!(sql_type, "smallint" | "integer" | "bigint" | "real" | "double precision")
}

fn is_list(sql_type: &str) -> bool {
    matches!(sql_type, "jsonb" | "json" | "text[]" | "character varying[]")
}

fn is_time(sql_type: &str) -> bool {
    sql_type.starts_with("timestamp") || sql_type == "date"
}
