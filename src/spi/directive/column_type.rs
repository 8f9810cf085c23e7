//! What type a column of the backlog is of, and how its values stand in SQL.

use pg_claims_core::priority;
use pgrx::pg_sys;

use super::columns::{as_text, quoted};
use crate::error::Result;
use crate::spi::statement::{Db, required};

/// A column's type; a domain counts as the type that it is made of.
#[derive(Debug, Clone, PartialEq)]
pub struct ColumnType {
    /// The column.
    pub column: String,
    /// The type's name, with its schema where it is not the server's own.
    pub name: String,
    /// Whether it has a collation of its own, which the views must not show.
    pub is_collated: bool,
    /// The values of an enum.
    pub labels: Option<Vec<String>>,
}

impl ColumnType {
    /// The types of a table's columns. The collation 100 is the database's own.
    pub fn all(db: &Db<'_>, table: pg_sys::Oid) -> Result<Vec<Self>> {
        let mut types = Vec::new();
        for row in db.ask(
            "SELECT a.attname::text, pg_catalog.format_type(b.oid, NULL),
                    a.attcollation NOT IN (0, 100)
                        AND b.typtype <> 'e',
                    CASE WHEN b.typtype = 'e' THEN
                        ARRAY(SELECT e.enumlabel::text FROM pg_catalog.pg_enum e
                               WHERE e.enumtypid = b.oid ORDER BY e.enumsortorder) END
               FROM pg_catalog.pg_attribute a
               JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
               JOIN pg_catalog.pg_type b ON b.oid = COALESCE(NULLIF(t.typbasetype, 0), t.oid)
              WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped",
            &[table.into()],
        )? {
            types.push(Self {
                column: required(row.get(1)?, "pg_attribute")?,
                name: required(row.get(2)?, "pg_type")?,
                is_collated: required(row.get(3)?, "pg_attribute")?,
                labels: row.get(4)?,
            });
        }
        Ok(types)
    }

    /// The column as text. An enum is written out by its output function: for a cast, its owner might
    /// have made a function of their own, which would run with the extension's rights.
    pub fn text(&self, prefix: &str) -> String {
        match self.labels {
            Some(_) => {
                format!("pg_catalog.textin(pg_catalog.enum_out({}))", self.base(prefix))
            }
            None if self.is_collated => {
                format!("({} COLLATE pg_catalog.\"default\")", as_text(prefix, &self.column))
            }
            None => as_text(prefix, &self.column),
        }
    }

    /// Whether that text can never change by itself, so that an index may hold it. What an enum is
    /// called may change.
    pub fn is_immutable_as_text(&self) -> bool {
        self.is_text()
            || matches!(
                self.name.as_str(),
                "boolean" | "smallint" | "integer" | "bigint" | "numeric" | "uuid"
            )
    }

    fn is_text(&self) -> bool {
        matches!(self.name.as_str(), "text" | "character varying" | "name")
    }

    /// Whether the column has one of `words`, which are in small letters. The letters A to Z in any
    /// case, in whatever locale.
    pub fn is_one_of(&self, prefix: &str, words: &[String]) -> String {
        format!(
            "COALESCE(pg_catalog.lower({} COLLATE pg_catalog.\"C\") = ANY (ARRAY[{}]::text[]), false)",
            self.text(prefix),
            literals(words)
        )
    }

    /// The same in a form that an index may hold. Of an enum: whether it has one of those of its
    /// values that are called so now. `None` where there is no such form.
    pub fn is_indexed_one_of(&self, prefix: &str, words: &[String]) -> Option<String> {
        let Some(labels) = &self.labels else {
            return self.is_immutable_as_text().then(|| self.is_one_of(prefix, words));
        };
        let labels: Vec<String> = labels
            .iter()
            .filter(|label| words.contains(&label.to_ascii_lowercase()))
            .cloned()
            .collect();
        Some(format!(
            "COALESCE({} = ANY (ARRAY[{}]::{}[]), false)",
            self.base(prefix),
            literals(&labels),
            self.name
        ))
    }

    /// Where a priority stands in the order, the most urgent first, as a numeric; NULL comes last. Any
    /// other number than in a text counts for itself.
    pub fn priority_order(&self, prefix: &str) -> String {
        let column = self.base(prefix);
        let mut cases = Vec::new();
        let subject = match &self.labels {
            Some(labels) => {
                for label in labels {
                    if let Some(place) = priority::order_of(label) {
                        let label = pgrx::spi::quote_literal(label);
                        cases.push(format!("WHEN {label}::{} THEN {place}", self.name));
                    }
                }
                column
            }
            None if self.is_text() => {
                for (place, word) in priority::WORDS.iter().enumerate() {
                    cases.push(format!("WHEN {} THEN {place}", pgrx::spi::quote_literal(word)));
                }
                let text = format!("{} COLLATE pg_catalog.\"C\"", self.text(prefix));
                cases.push(format!(
                    "ELSE pg_catalog.substring({text}, {})::integer",
                    pgrx::spi::quote_literal(priority::NUMBER)
                ));
                format!("pg_catalog.lower({text})")
            }
            None if self.is_number() => return format!("({column}::numeric)"),
            None => return NO_ORDER.into(),
        };
        if cases.is_empty() {
            return NO_ORDER.into();
        }
        format!("(CASE {subject} {} END::numeric)", cases.join(" "))
    }

    fn is_number(&self) -> bool {
        matches!(
            self.name.as_str(),
            "smallint" | "integer" | "bigint" | "numeric" | "real" | "double precision"
        )
    }

    /// The column without the domain that its type may be.
    pub fn base(&self, prefix: &str) -> String {
        format!("({}::{})", quoted(prefix, &self.column), self.name)
    }

    /// A list of keys as jsonb. What json may hold and jsonb may not must not keep anybody from reading
    /// the rest.
    pub fn keys(&self, prefix: &str, schema: &str) -> String {
        let column = quoted(prefix, &self.column);
        if self.name == "json" {
            format!("{schema}.dependency_keys({column}::text)")
        } else {
            format!("pg_catalog.to_jsonb({column})")
        }
    }

    /// The column as a timestamptz. A time without a zone is UTC, never the reader's local time; a date
    /// that is later than a timestamp can be is the last one.
    pub fn instant(&self, prefix: &str) -> String {
        let column = quoted(prefix, &self.column);
        if self.name == "timestamp with time zone" {
            format!("({column}::timestamptz)")
        } else if self.name == "date" {
            format!("(LEAST({column}, '294276-01-01'::date)::timestamp AT TIME ZONE 'UTC')")
        } else {
            format!("({column}::timestamp AT TIME ZONE 'UTC')")
        }
    }
}

/// A priority that says nothing about the order.
pub const NO_ORDER: &str = "NULL::numeric";

fn literals(words: &[String]) -> String {
    let words: Vec<String> = words.iter().map(pgrx::spi::quote_literal).collect();
    words.join(", ")
}
