//! What the server knows of a table, and whether it can serve as the backlog.

use pgrx::{PgSqlErrorCode, pg_sys};

use super::backlog::Backlog;
use super::columns::Columns;
use super::indexes;
use crate::error::{ClaimError, Purpose, Result};
use crate::identity;
use crate::spi::row::Row;
use crate::spi::statement::{Db, required};

/// What the server knows of a table.
pub struct TableFacts {
    purpose: Purpose,
    oid: pg_sys::Oid,
    name: String,
    schema: String,
    kind: String,
    owner: String,
    columns: Vec<ColumnFacts>,
    /// The columns that a unique index covers alone.
    unique: Vec<String>,
}

impl TableFacts {
    /// What the server knows of a table that is to be used for `purpose`.
    pub fn read(db: &Db<'_>, oid: pg_sys::Oid, purpose: Purpose) -> Result<Self> {
        let rows = db.run_once(
            "SELECT pg_catalog.format('%I.%I', n.nspname, c.relname), c.relkind::text,
                    pg_catalog.pg_get_userbyid(c.relowner)::text, pg_catalog.quote_ident(n.nspname)
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
        let (name, kind, owner, schema) = (
            row.required_text(1, "pg_class")?,
            row.required_text(2, "pg_class")?,
            row.required_text(3, "pg_class")?,
            row.required_text(4, "pg_namespace")?,
        );
        let mut columns = Vec::new();
        // A domain counts as the type that it is made of.
        for row in db.run_once(
            "SELECT a.attname::text, pg_catalog.format_type(b.oid, COALESCE(NULLIF(t.typtypmod, -1), a.atttypmod)),
                    b.typtype = 'e', b.typtype = 'b' AND b.typnamespace = 'pg_catalog'::pg_catalog.regnamespace,
                    a.attgenerated <> '', a.attnotnull OR t.typnotnull, t.typtype = 'd',
                    a.attcollation NOT IN (0, 100)
               FROM pg_catalog.pg_attribute a
               JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
               JOIN pg_catalog.pg_type b ON b.oid = COALESCE(NULLIF(t.typbasetype, 0), t.oid)
               
              WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped",
            &[oid.into()],
        )? {
            columns.push(ColumnFacts {
                name: required(row.get(1)?, "pg_attribute")?,
                sql_type: required(row.get(2)?, "pg_attribute")?,
                is_enum: required(row.get(3)?, "pg_type")?,
                is_built_in: required(row.get(4)?, "pg_type")?,
                is_generated: required(row.get(5)?, "pg_attribute")?,
                is_not_null: required(row.get(6)?, "pg_attribute")?,
                is_domain: required(row.get(7)?, "pg_type")?,
                is_collated: required(row.get(8)?, "pg_attribute")?,
            });
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
        Ok(Self { purpose, oid, name, schema, kind, owner, columns, unique })
    }

    /// Its schema-qualified name, quoted.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A table whose rows are of the SDs that `column` names.
    pub fn check_can_be_guarded(&self, db: &Db<'_>, column: &str) -> Result<()> {
        self.check_kind(db)?;
        self.expect_of(column, |c| is_key(&c.sql_type), "text, varchar, uuid or an integer")
    }

    pub fn check_owner(&self, db: &Db<'_>) -> Result<()> {
        let caller = identity::caller();
        let owns = db
            .run_once(
                "SELECT pg_catalog.pg_has_role($1, $2::name, 'USAGE')",
                &[caller.0.into(), self.owner.clone().into()],
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
    pub fn check_kind(&self, db: &Db<'_>) -> Result<()> {
        let unfit = db.run_once(
            "SELECT FROM pg_catalog.pg_partition_tree($1) t
               JOIN pg_catalog.pg_class c ON c.oid = t.relid AND c.relkind = 'f'
              UNION ALL
             SELECT FROM pg_catalog.pg_depend d
               JOIN pg_catalog.pg_extension e ON e.oid = d.refobjid AND e.extname = 'pg_claims'
              WHERE d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.objid = $1
                AND d.refclassid = 'pg_catalog.pg_extension'::pg_catalog.regclass
                AND d.deptype = 'e'",
            &[self.oid.into()],
        )?;
        let is_temporary = db
            .run_once(
                "SELECT relpersistence = 't' FROM pg_catalog.pg_class WHERE oid = $1",
                &[self.oid.into()],
            )?
            .first()
            .flag(1)?;
        if unfit.is_empty() && !is_temporary && matches!(self.kind.as_str(), "r" | "p") {
            return Ok(());
        }
        Err(self.refuse(
            PgSqlErrorCode::ERRCODE_WRONG_OBJECT_TYPE,
            "Only an ordinary table that is not temporary, or a partitioned one without foreign partitions, will do, and none of the extension's own.".into(),
            "Name the table itself rather than a view of it; unbind_directives() returns to the extension's own backlog.",
        ))
    }

    /// What lives in a temporary schema goes with the session, and takes along what depends on it: a column, or the table.
    pub fn check_lasts(&self, db: &Db<'_>) -> Result<()> {
        let passing = db.run_once(
            "WITH RECURSIVE parts AS (
                 SELECT 'pg_catalog.pg_class'::pg_catalog.regclass::oid AS classid, $1 AS objid
                  UNION
                 SELECT d.classid, d.objid FROM parts p
                   JOIN pg_catalog.pg_depend d
                     ON d.refclassid = p.classid AND d.refobjid = p.objid AND d.deptype IN ('a', 'i')
                    AND d.classid IN ('pg_catalog.pg_attrdef'::pg_catalog.regclass,
                                      'pg_catalog.pg_constraint'::pg_catalog.regclass,
                                      'pg_catalog.pg_class'::pg_catalog.regclass)),
                 uses (classid, objid) AS (
                 SELECT d.refclassid, d.refobjid FROM parts p
                   JOIN pg_catalog.pg_depend d ON d.classid = p.classid AND d.objid = p.objid
                  UNION
                 -- What a domain or an array is made of.
                 SELECT d.refclassid, d.refobjid FROM uses u
                   JOIN pg_catalog.pg_depend d ON d.classid = u.classid AND d.objid = u.objid
                  WHERE u.classid = 'pg_catalog.pg_type'::pg_catalog.regclass)
             SELECT pg_catalog.pg_describe_object(u.classid, u.objid, 0)
               FROM uses u
              CROSS JOIN LATERAL pg_catalog.pg_identify_object(u.classid, u.objid, 0) o
              WHERE pg_catalog.starts_with(o.schema, 'pg_temp') LIMIT 1",
            &[self.oid.into()],
        )?;
        if passing.is_empty() {
            return Ok(());
        }
        let what = passing.first().required_text(1, "pg_depend")?;
        Err(self.refuse(
            PgSqlErrorCode::ERRCODE_DATATYPE_MISMATCH,
            format!("It depends on {what}, which goes with the session, and would take columns or the table along."),
            "Make that in a schema that lasts.",
        ))
    }

    pub fn columns(&self, asked: Columns) -> Result<Columns> {
        if asked.keys.is_empty() {
            return Err(ClaimError::InvalidArgument {
                argument: "p_key_columns",
                reason: "names no column".into(),
                hint: Some("Name the column that identifies an SD, or several in order.".into()),
            });
        }
        for (n, key) in asked.keys.iter().enumerate() {
            if asked.keys.iter().take(n).any(|before| before == key) {
                return Err(ClaimError::InvalidArgument {
                    argument: "p_key_columns",
                    reason: format!("names column \"{key}\" twice"),
                    hint: None,
                });
            }
            self.expect_of(key, |c| is_key(&c.sql_type), "text, varchar, uuid or an integer")?;
            self.expect_of(key, |c| !c.is_collated, "of the database's own collation")?;
        }
        let columns = Columns {
            title: self.column(asked.title, &["title"])?,
            status: self.column(asked.status, &["status"])?,
            priority: self.column(asked.priority, &["priority"])?,
            track: self.column(asked.track, &["track"])?,
            rank: self.column(asked.rank, &["sequence_rank", "rank"])?,
            dependencies: self.column(asked.dependencies, &["dependencies"])?,
            parent: self.column(asked.parent, &["parent_sd_id"])?,
            created_at: self.column(asked.created_at, &["created_at"])?,
            is_working_on: self.column(asked.is_working_on, &["is_working_on"])?,
            active_session_id: self.column(asked.active_session_id, &["active_session_id"])?,
            keys: asked.keys,
            terminal_statuses: asked.terminal_statuses,
        };
        for column in
            [&columns.title, &columns.status, &columns.priority, &columns.track, &columns.parent]
        {
            self.expect(column, ColumnFacts::reads_as_text, "a built-in type or an enum")?;
        }
        self.expect(&columns.is_working_on, |c| c.sql_type == "boolean", "boolean")?;
        let writable = |c: &ColumnFacts| !c.is_generated && !c.is_domain;
        let wanted = "writable: not generated, and of no domain";
        self.expect(&columns.is_working_on, writable, wanted)?;
        self.expect(&columns.active_session_id, writable, wanted)?;
        self.expect(
            &columns.active_session_id,
            |c| !c.is_not_null,
            "such that it can be NULL, for an SD that nobody works on",
        )?;
        let id = "text, or varchar of 200 or more";
        self.expect(&columns.active_session_id, |c| holds_session_id(&c.sql_type), id)?;
        self.expect(&columns.rank, |c| is_numeric(&c.sql_type), "a number")?;
        self.expect(&columns.dependencies, |c| is_list(&c.sql_type), "jsonb, json or text[]")?;
        self.expect(&columns.created_at, |c| is_time(&c.sql_type), "a timestamp or a date")?;
        Ok(columns)
    }

    fn column(&self, asked: Option<String>, usual: &[&str]) -> Result<Option<String>> {
        match asked {
            Some(name) if name.is_empty() => Ok(None),
            Some(name) => self.facts_of(&name).map(|_| Some(name)),
            None => Ok(usual
                .iter()
                .find(|name| self.columns.iter().any(|column| column.name == **name))
                .map(|name| (*name).to_owned())),
        }
    }

    fn facts_of(&self, column: &str) -> Result<&ColumnFacts> {
        self.columns.iter().find(|facts| facts.name == column).ok_or_else(|| {
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
        fits: impl Fn(&ColumnFacts) -> bool,
        wanted: &str,
    ) -> Result<()> {
        column.as_ref().map_or(Ok(()), |column| self.expect_of(column, fits, wanted))
    }

    fn expect_of(
        &self,
        column: &str,
        fits: impl Fn(&ColumnFacts) -> bool,
        wanted: &str,
    ) -> Result<()> {
        let facts = self.facts_of(column)?;
        if fits(facts) {
            return Ok(());
        }
        Err(self.refuse(
            PgSqlErrorCode::ERRCODE_DATATYPE_MISMATCH,
            format!("Column \"{column}\" is of type {}; it must be {wanted}.", facts.sql_type),
            "Name another column, or '' to do without.",
        ))
    }

    /// Makes sure that every key is unique and can be looked up as text by an index, where the table has
    /// none that serves, and makes those that the queue reads. They go with the binding or the extension.
    pub fn ensure_indexes(&self, db: &Db<'_>, backlog: &Backlog) -> Result<Vec<String>> {
        let mut created = Vec::new();
        for index in self.wanted_indexes(backlog)? {
            created.push(self.make_index(db, backlog, &index)?);
        }
        Ok(created)
    }

    /// The indexes that binding makes, as the table has none of its own that serves.
    pub fn wanted_indexes(&self, backlog: &Backlog) -> Result<Vec<WantedIndex>> {
        let columns = &backlog.columns;
        let mut keys = Vec::new();
        let [first, further @ ..] = columns.keys.as_slice() else { return Ok(Vec::new()) };
        if !further.is_empty() || !self.serves(first)? {
            keys.push(("sd_id".to_owned(), columns.canonical("")));
        }
        for (key, expression) in further.iter().zip(columns.aliases("")) {
            if !self.serves(key)? {
                keys.push((key.clone(), expression));
            }
        }
        let of_keys = keys.into_iter().map(|(name, expression)| WantedIndex {
            kind: "UNIQUE INDEX",
            name: format!("pg_claims_{}_{name}", self.oid.to_u32()),
            definition: format!("(({expression}))"),
            unique: Some(expression),
        });
        let of_queue = indexes::for_queue(backlog).into_iter().map(|(name, definition)| {
            WantedIndex::of_queue(format!("pg_claims_{name}_{}", self.oid.to_u32()), definition)
        });
        Ok(of_keys.chain(of_queue).collect())
    }

    /// Makes one of them. Returns its name.
    pub fn make_index(
        &self,
        db: &Db<'_>,
        backlog: &Backlog,
        index: &WantedIndex,
    ) -> Result<String> {
        if let Some(expression) = &index.unique {
            self.check_unique(db, &backlog.from, expression)?;
        }
        self.create_index(db, index.kind, &index.name, &index.definition)
    }

    fn create_index(
        &self,
        db: &Db<'_>,
        kind: &str,
        name: &str,
        definition: &str,
    ) -> Result<String> {
        let index = pgrx::spi::quote_identifier(name);
        db.run_once(&format!("CREATE {kind} {index} ON {} {definition}", self.name), &[])?;
        let index = format!("{}.{index}", self.schema);
        db.run_once(&format!("ALTER INDEX {index} DEPENDS ON EXTENSION pg_claims"), &[])?;
        Ok(index)
    }

    /// Whether an index of the table's finds the key by its text and keeps it unique.
    fn serves(&self, key: &str) -> Result<bool> {
        let sql_type = &self.facts_of(key)?.sql_type;
        let is_text = sql_type == "text" || sql_type.starts_with("character varying");
        Ok(is_text && self.unique.iter().any(|column| column == key))
    }

    fn check_unique(&self, db: &Db<'_>, from: &str, expression: &str) -> Result<()> {
        let rows = db.run_once(
            &format!(
                "SELECT {expression} FROM {from} WHERE {expression} IS NOT NULL
                  GROUP BY 1 HAVING pg_catalog.count(*) > 1 LIMIT 1"
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
        ClaimError::UnfitTable {
            code,
            purpose: self.purpose,
            table: self.name.clone(),
            detail,
            hint: hint.into(),
        }
    }
}

/// An index that the backlog is to have.
#[derive(Debug)]
pub struct WantedIndex {
    /// `INDEX` or `UNIQUE INDEX`.
    pub kind: &'static str,
    /// Its name.
    pub name: String,
    /// All that stands behind the table's name in CREATE INDEX.
    pub definition: String,
    /// The expression that it keeps unique.
    unique: Option<String>,
}

impl WantedIndex {
    /// One that the queue reads.
    pub fn of_queue(name: String, definition: String) -> Self {
        Self { kind: "INDEX", name, definition, unique: None }
    }
}

/// A column.
struct ColumnFacts {
    name: String,
    sql_type: String,
    is_enum: bool,
    is_built_in: bool,
    is_generated: bool,
    is_not_null: bool,
    is_domain: bool,
    is_collated: bool,
}

impl ColumnFacts {
    /// Whether the column can be read as text with the extension's rights: a cast of a user's own
    /// type would run the user's code with them. Enums are read by their output function.
    fn reads_as_text(&self) -> bool {
        // char(n) is out because its text loses its padding in one place and keeps it in another.
        let is_padded = self.sql_type == "character" || self.sql_type.starts_with("character(");
        self.is_enum || (self.is_built_in && !is_padded)
    }
}

fn is_key(sql_type: &str) -> bool {
    matches!(sql_type, "text" | "uuid" | "smallint" | "integer" | "bigint")
        || sql_type.starts_with("character varying")
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
    matches!(sql_type, "jsonb" | "json" | "text[]")
        || (sql_type.starts_with("character varying") && sql_type.ends_with("[]"))
}

fn is_time(sql_type: &str) -> bool {
    sql_type.starts_with("timestamp") || sql_type == "date"
}
