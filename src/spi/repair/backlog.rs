//! The triggers and indexes of the backlog in use.
//!
//! They are compared with those that an empty table of the same columns gets: the server writes the definitions
//! of both, so that it does not matter how it spells them.

use std::collections::BTreeMap;

use pgrx::pg_sys;

use super::Report;
use crate::error::Result;
use crate::spi::directive::{self, Backlog, TRIGGERS, WantedIndex};
use crate::spi::row::Row;
use crate::spi::statement::{Db, required};

/// The empty table; it lives until the end of the look.
const LIKENESS: &str = "pg_temp.pg_claims_likeness_of_the_backlog";

/// Finds and mends what is wrong with the backlog's triggers and indexes.
pub fn mend(db: &Db<'_>, report: &mut Report) -> Result<()> {
    let catalog = db.catalog()?;
    let Some(backlog) = &catalog.backlog else { return Ok(()) };
    let wanted = directive::wanted_indexes(db, backlog)?;
    // With its indexes: where a key's uniqueness can be deferred, so are triggers.
    db.run_once(
        &format!("CREATE TABLE {LIKENESS} (LIKE {} INCLUDING INDEXES)", backlog.table),
        &[],
    )?;
    let row = db.run_once("SELECT $1::regclass::oid", &[LIKENESS.into()])?.first();
    let likeness = backlog.likeness(LIKENESS, required(row.get(1)?, "pg_class")?);
    directive::attach_triggers(db, &likeness, &catalog.schema)?;
    let triggers = definitions_of_triggers(db, likeness.table_oid)?;
    let mut indexes = Vec::new();
    for index in &wanted {
        indexes.push((index, definition_on(db, index)?));
    }
    db.run_once(&format!("DROP TABLE {LIKENESS}"), &[])?;
    mend_triggers(db, backlog, &triggers, report)?;
    mend_indexes(db, backlog, &indexes, report)
}

fn mend_triggers(
    db: &Db<'_>,
    backlog: &Backlog,
    wanted: &BTreeMap<String, String>,
    report: &mut Report,
) -> Result<()> {
    let found = definitions_of_triggers(db, backlog.table_oid)?;
    let mut wrong: Vec<(String, &str)> = Vec::new();
    for name in TRIGGERS {
        match (wanted.get(name), found.get(name)) {
            (Some(_), None) => wrong.push((name.to_owned(), "the trigger is missing")),
            (Some(wanted), Some(found)) if wanted != found => {
                wrong.push((name.to_owned(), "the trigger is another one than binding makes"));
            }
            (None, Some(_)) => {
                wrong.push((name.to_owned(), "the trigger is one that binding does not make"));
            }
            _ => {}
        }
    }
    wrong.extend(
        disabled_triggers(db, backlog)?.into_iter().map(|name| (name, "the trigger is disabled")),
    );
    wrong.extend(
        partitions_without_truncate(db, backlog)?
            .into_iter()
            .map(|partition| (partition, "the partition lacks the trigger on TRUNCATE")),
    );
    let mut is_mended = false;
    for (name, finding) in wrong {
        let object = format!("{name} on {}", backlog.table);
        report.mend("trigger", &object, finding, "the backlog's triggers are made anew", || {
            if !is_mended {
                directive::renew_triggers(db, backlog)?;
                is_mended = true;
            }
            Ok(true)
        })?;
    }
    Ok(())
}

/// The definitions of those of the backlog's triggers that are on a table itself, without the table's name.
fn definitions_of_triggers(db: &Db<'_>, table: pg_sys::Oid) -> Result<BTreeMap<String, String>> {
    let names: Vec<String> = TRIGGERS.iter().map(|name| (*name).to_owned()).collect();
    let mut rows = db.run_once(
        "SELECT tgname::text,
                pg_catalog.regexp_replace(pg_catalog.pg_get_triggerdef(oid), ' ON .*? FOR EACH ', ' FOR EACH ')
           FROM pg_catalog.pg_trigger
          WHERE tgrelid = $1 AND tgname = ANY ($2) AND NOT tgisinternal",
        &[table.into(), names.into()],
    )?;
    let mut found = BTreeMap::new();
    while rows.next().is_some() {
        found.insert(
            rows.required_text(1, "pg_trigger.tgname")?,
            rows.required_text(2, "pg_get_triggerdef()")?,
        );
    }
    Ok(found)
}

/// Of the table and of its partitions. One that always fires does no harm.
fn disabled_triggers(db: &Db<'_>, backlog: &Backlog) -> Result<Vec<String>> {
    let names: Vec<String> = TRIGGERS.iter().map(|name| (*name).to_owned()).collect();
    texts(
        db,
        "SELECT DISTINCT tgname::text COLLATE pg_catalog.\"C\" FROM pg_catalog.pg_trigger
          WHERE (tgrelid = $1 OR tgrelid IN (SELECT relid FROM pg_catalog.pg_partition_tree($1)))
            AND tgname = ANY ($2) AND NOT tgisinternal AND tgenabled NOT IN ('O', 'A')
          ORDER BY 1",
        backlog.table_oid,
        names,
    )
}

fn partitions_without_truncate(db: &Db<'_>, backlog: &Backlog) -> Result<Vec<String>> {
    texts(
        db,
        "SELECT t.relid::regclass::text FROM pg_catalog.pg_partition_tree($1) t
          WHERE t.level > 0
            AND NOT EXISTS (SELECT FROM pg_catalog.pg_trigger
                             WHERE tgrelid = t.relid AND tgname = ANY ($2) AND NOT tgisinternal)
          ORDER BY 1",
        backlog.table_oid,
        vec!["pg_claims_truncated".to_owned()],
    )
}

fn texts(
    db: &Db<'_>,
    question: &str,
    table: pg_sys::Oid,
    names: Vec<String>,
) -> Result<Vec<String>> {
    let mut rows = db.run_once(question, &[table.into(), names.into()])?;
    let mut found = Vec::new();
    while rows.next().is_some() {
        found.push(rows.required_text(1, "pg_trigger")?);
    }
    Ok(found)
}

fn mend_indexes(
    db: &Db<'_>,
    backlog: &Backlog,
    wanted: &[(&WantedIndex, String)],
    report: &mut Report,
) -> Result<()> {
    let found = definitions_of_indexes(db, backlog.table_oid)?;
    for (index, definition) in wanted {
        if found.contains(definition) {
            continue;
        }
        let object = format!("{} on {}", index.name, backlog.table);
        let finding = "the index is missing, invalid or another one than binding makes";
        report.mend("index", &object, finding, "the index is made anew", || {
            directive::renew_index(db, backlog, index)?;
            Ok(true)
        })?;
    }
    Ok(())
}

/// The definition that the index has on the empty table, without the names of both.
fn definition_on(db: &Db<'_>, index: &WantedIndex) -> Result<String> {
    const NAME: &str = "pg_claims_likeness_of_an_index";
    db.run_once(&format!("CREATE {} {NAME} ON {LIKENESS} {}", index.kind, index.definition), &[])?;
    let row = db.run_once(
        &format!("SELECT {} FROM pg_catalog.pg_index WHERE indexrelid = $1::regclass", nameless()),
        &[format!("pg_temp.{NAME}").into()],
    )?;
    let definition = row.first().required_text(1, "pg_get_indexdef()")?;
    db.run_once(&format!("DROP INDEX pg_temp.{NAME}"), &[])?;
    Ok(definition)
}

/// The definition of an index in pg_index, without its name and its table's.
fn nameless() -> &'static str {
    "pg_catalog.regexp_replace(pg_catalog.pg_get_indexdef(indexrelid),
                               '^(CREATE (UNIQUE )?INDEX) .*? USING ', '\\1 USING ')"
}

/// The definitions of the indexes that can be relied on, without names.
fn definitions_of_indexes(db: &Db<'_>, table: pg_sys::Oid) -> Result<Vec<String>> {
    let mut rows = db.run_once(
        &format!(
            "SELECT {} FROM pg_catalog.pg_index WHERE indrelid = $1 AND indisvalid",
            nameless()
        ),
        &[table.into()],
    )?;
    let mut found = Vec::new();
    while rows.next().is_some() {
        found.push(rows.required_text(1, "pg_get_indexdef()")?);
    }
    Ok(found)
}
