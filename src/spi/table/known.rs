//! A table as it is.

use std::ffi::CString;
use std::rc::Rc;

use pgrx::pg_sys::BuiltinOid::TEXTOID;
use pgrx::{JsonB, pg_sys};
use serde::Deserialize;

use super::Name;
use super::layout::{self, BTREE, Layout};
use crate::error::Result;
use crate::spi::statement::{Db, required};

/// What is known of a table, until the server says that it has changed.
#[derive(Debug, Clone, PartialEq)]
pub struct Known {
    /// The table.
    pub oid: pg_sys::Oid,
    indexes: Vec<pg_sys::Oid>,
    spare_indexes: Vec<Option<pg_sys::Oid>>,
    /// The primary key's position, if the table is read by it: by the first index.
    key: Option<usize>,
    /// The columns that it had for a while, by their positions. They still have a place in each row.
    pub(super) dropped: Vec<usize>,
    /// Whether it has just the triggers and constraints that the extension made, all in force, and no
    /// index that would run code of a user's.
    pub(super) is_as_made: bool,
    /// What a new version of a row enters into those indexes of which that is known.
    pub(super) entries: Vec<Entry>,
    /// Whether there are other indexes, which the executor must write.
    pub(super) has_other_indexes: bool,
}

/// What the catalogue says of an index.
#[derive(Deserialize)]
struct Index {
    oid: u32,
    name: String,
    columns: Vec<i16>,
    is_unique: bool,
    is_primary: bool,
    is_valid: bool,
    is_partial: bool,
    /// The columns that it has or that its condition is about.
    concerned: Vec<usize>,
    /// A B-tree on columns, checked at once.
    is_simple: bool,
}

/// How a row is entered into an index.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// The index.
    pub index: pg_sys::Oid,
    /// Its columns, by their positions in the table.
    pub columns: Vec<usize>,
    /// Whether it is unique.
    pub is_unique: bool,
    /// Whether it is the primary key's, which no update here changes.
    pub is_primary: bool,
    /// Whether all rows are in it. One that is just being built may lack some.
    pub is_valid: bool,
    /// Whether all its columns are of type text.
    pub is_on_texts: bool,
    /// Which rows it has.
    pub rows: Rows,
}

/// Which rows an index has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rows {
    /// All of them.
    All,
    /// Sessions that hold an SD.
    Holding,
    /// Acquisitions that have not ended.
    Open,
}

impl Entry {
    fn of(index: &Index, layout: &Layout) -> Option<Self> {
        let rows = match (index.is_partial, index.name.as_str()) {
            (false, _) => Rows::All,
            (true, "idx_claude_sessions_unique_active_claim") => Rows::Holding,
            (true, "sd_claims_open_key") => Rows::Open,
            (true, _) => return None,
        };
        // One of another condition has other rows.
        let concerned: &[usize] = match rows {
            Rows::All => &[],
            Rows::Holding => &[layout::sessions::SD_ID, layout::sessions::STATUS],
            Rows::Open => &[layout::claims::SD_ID, layout::claims::RELEASED_AT],
        };
        if index.is_partial
            && !(index.concerned.len() == concerned.len()
                && concerned.iter().all(|column| index.concerned.contains(column)))
        {
            return None;
        }
        let columns = index.columns.iter().map(|column| usize::try_from(*column).ok());
        let columns: Vec<usize> = columns.collect::<Option<_>>()?;
        let is_text = |position: &usize| {
            // An expression has the position 0.
            let column = position.checked_sub(1).and_then(|at| layout.columns.get(at));
            column.is_some_and(|(_, of_type)| *of_type == TEXTOID)
        };
        index.is_simple.then_some(Self {
            index: pg_sys::Oid::from(index.oid),
            is_on_texts: columns.iter().all(is_text),
            columns,
            is_unique: index.is_unique,
            is_primary: index.is_primary,
            is_valid: index.is_valid,
            rows,
        })
    }
}

/// What is known of the extension's own tables, in the order of [`Name::ALL`].
pub type AllKnown = [Option<Rc<Known>>; Name::ALL.len()];

// From the catalogue and not from the server's description of an open table: opening it would wait for
// whoever has locked it, as a change of the backlog does. So would the server's functions that show an index's
// condition.
const LOOK: &str = "
    SELECT c.oid, c.relnamespace,
           ARRAY(SELECT CASE WHEN a.attisdropped THEN '' ELSE a.attname || ' ' || a.atttypid END
                   FROM pg_catalog.pg_attribute a
                  WHERE a.attrelid = c.oid AND a.attnum > 0 ORDER BY a.attnum),
           ARRAY(SELECT k.conname::text FROM pg_catalog.pg_constraint k
                  WHERE k.conrelid = c.oid AND k.contype = 'c' ORDER BY k.conname),
           ARRAY(SELECT t.tgname::text FROM pg_catalog.pg_trigger t
                  WHERE t.tgrelid = c.oid ORDER BY t.tgname),
           c.relkind = 'r' AND NOT c.relispartition AND NOT c.relhassubclass AND NOT c.relhasrules
           AND NOT c.relrowsecurity
           AND NOT EXISTS (SELECT FROM pg_catalog.pg_attribute a
                            WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
                              AND (a.attgenerated <> '' OR a.atttypmod <> -1))
           AND NOT EXISTS (SELECT FROM pg_catalog.pg_trigger t
                            WHERE t.tgrelid = c.oid
                              AND (t.tgenabled NOT IN ('O', 'A')
                                   OR NOT EXISTS (
                                       SELECT FROM pg_catalog.pg_depend d
                                         JOIN pg_catalog.pg_extension e
                                           ON e.oid = d.refobjid AND e.extname = 'pg_claims'
                                        WHERE d.classid = 'pg_catalog.pg_proc'::pg_catalog.regclass
                                          AND d.objid = t.tgfoid AND d.deptype = 'e'
                                          AND d.refclassid = 'pg_catalog.pg_extension'::pg_catalog.regclass))),
           ARRAY(SELECT i.relname::text FROM pg_catalog.pg_index x
                   JOIN pg_catalog.pg_class i ON i.oid = x.indexrelid
                  WHERE x.indrelid = c.oid AND (x.indexprs IS NOT NULL OR x.indpred IS NOT NULL)),
           (SELECT pg_catalog.jsonb_agg(pg_catalog.jsonb_build_object(
                       'oid', x.indexrelid::bigint, 'name', i.relname,
                       'columns', pg_catalog.string_to_array(x.indkey::text, ' ')::integer[],
                       'is_unique', x.indisunique, 'is_primary', x.indisprimary,
                       'is_valid', x.indisvalid,
                       'is_partial', x.indpred IS NOT NULL,
                       'concerned', ARRAY(SELECT DISTINCT d.refobjsubid FROM pg_catalog.pg_depend d
                                           WHERE d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass
                                             AND d.objid = x.indexrelid AND d.refobjid = c.oid
                                             AND d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass
                                             AND d.refobjsubid > 0),
                       'is_simple', i.relam = 403 AND x.indexprs IS NULL AND x.indimmediate
                                    AND NOT x.indisexclusion))
              FROM pg_catalog.pg_index x JOIN pg_catalog.pg_class i ON i.oid = x.indexrelid
             WHERE x.indrelid = c.oid AND x.indisready),
           ARRAY(SELECT a.attname::text FROM pg_catalog.pg_attribute a
                  WHERE a.attrelid = c.oid AND a.attnum > 0 AND a.attnotnull)
      FROM pg_catalog.pg_class c WHERE c.oid = ANY ($1)";

impl Known {
    /// Looks at all tables. `None` for one that is not there, or lacks a column as it was made, or an
    /// index that it is read by.
    pub fn look(db: &Db<'_>, oids: [pg_sys::Oid; Name::ALL.len()]) -> Result<AllKnown> {
        let mut known = AllKnown::default();
        for row in db.ask(LOOK, &[oids.to_vec().into()])? {
            let found = required(row.get::<pg_sys::Oid>(1)?, "pg_class")?;
            let schema = required(row.get::<pg_sys::Oid>(2)?, "pg_class")?;
            let list = |position| -> Result<Vec<String>> {
                required(row.get::<Vec<String>>(position)?, "pg_class")
            };
            let (columns, checks, triggers) = (list(3)?, list(4)?, list(5)?);
            let (computed, not_null) = (list(7)?, list(9)?);
            let is_plain = row.get::<bool>(6)?.unwrap_or(false);
            for name in Name::ALL {
                let layout = name.layout();
                if oids[name as usize] != found || !has_columns(layout, &columns) {
                    continue;
                }
                let Some(indexes) = indexes(layout, found, schema) else { continue };
                let all: Vec<Index> = match row.get::<JsonB>(8)? {
                    Some(JsonB(all)) => serde_json::from_value(all)?,
                    None => Vec::new(),
                };
                let entries: Vec<Entry> =
                    all.iter().filter_map(|index| Entry::of(index, layout)).collect();
                let is_as_made = is_plain
                    && has_decider(name, &entries)
                    && columns.iter().skip(layout.columns.len()).all(String::is_empty)
                    && computed.iter().all(|index| layout.computed.contains(&index.as_str()))
                    && same_names(&not_null, layout.not_null)
                    && same_names(&checks, layout.checks)
                    && same_names(&triggers, layout.triggers);
                let key = layout.key_column();
                let has_other_indexes = entries.len() < all.len();
                let known_table = Self {
                    oid: found,
                    indexes,
                    spare_indexes: spare_indexes(layout, found, schema),
                    key,
                    dropped: dropped(&columns),
                    is_as_made,
                    entries,
                    has_other_indexes,
                };
                known[name as usize] = Some(Rc::new(known_table));
            }
        }
        Ok(known)
    }

    /// The primary key's position, if that is what the index is on.
    pub(super) fn key_of(&self, index: layout::Index) -> Option<usize> {
        self.key.filter(|_| index.0 == 0)
    }

    pub(super) fn index(&self, index: layout::Index) -> pg_sys::Oid {
        self.indexes[index.0]
    }

    pub(super) fn has_all_spare_indexes(&self) -> bool {
        self.spare_indexes.iter().all(Option::is_some)
    }

    pub(super) fn spare_index(&self, index: layout::SpareIndex) -> Option<pg_sys::Oid> {
        self.spare_indexes[index.at]
    }
}

/// Which columns are not there any more; they have no name in [`LOOK`].
fn dropped(columns: &[String]) -> Vec<usize> {
    let numbered = columns.iter().enumerate();
    numbered.filter(|(_, column)| column.is_empty()).map(|(at, _)| at + 1).collect()
}

/// Whether the table begins with the columns as they were made. Others may have come, or come and gone.
fn has_columns(layout: &Layout, columns: &[String]) -> bool {
    let made = layout.columns.iter().map(|(name, of_type)| format!("{name} {}", of_type.value()));
    columns.len() >= layout.columns.len() && made.zip(columns).all(|(made, is)| made == *is)
}

/// Whether the table has the unique index that decides who of several gets an SD, if it is one that has.
fn has_decider(name: Name, entries: &[Entry]) -> bool {
    let (rows, column) = match name {
        Name::Sessions => (Rows::Holding, layout::sessions::SD_ID),
        Name::Claims => (Rows::Open, layout::claims::SD_ID),
        _ => return true,
    };
    entries.iter().any(|entry| {
        entry.rows == rows && entry.columns == [column] && entry.is_unique && entry.is_valid
    })
}

/// The indexes by which the table is read.
fn indexes(layout: &Layout, table: pg_sys::Oid, schema: pg_sys::Oid) -> Option<Vec<pg_sys::Oid>> {
    let find = |(name, column): &(&str, &str)| {
        find_index(layout, table, schema, name, std::slice::from_ref(column), BTREE)
    };
    layout.indexes.iter().map(find).collect()
}

/// Those by which it may be read as well.
fn spare_indexes(
    layout: &Layout,
    table: pg_sys::Oid,
    schema: pg_sys::Oid,
) -> Vec<Option<pg_sys::Oid>> {
    let find = |(name, columns, method): &(&str, &[&str], u32)| {
        find_index(layout, table, schema, name, columns, *method)
    };
    layout.spare_indexes.iter().map(find).collect()
}

/// An index of that access method by its name, whatever snapshot the transaction keeps, and only while it can be relied on (one
/// that is being built under that name misses rows) and begins with these columns.
fn find_index(
    layout: &Layout,
    table: pg_sys::Oid,
    schema: pg_sys::Oid,
    name: &str,
    columns: &[&str],
    method: u32,
) -> Option<pg_sys::Oid> {
    // An expression has no name, and the position 0.
    let position = |column: &&str| match *column {
        "" => Some(0),
        column => i16::try_from(layout.position(column)?).ok(),
    };
    let positions: Vec<i16> = columns.iter().map(position).collect::<Option<_>>()?;
    let name = CString::new(name).ok()?;
    // SAFETY: looks the name up in the catalogue; invalid where there is none. The entry is valid until it
    // is given back, and has as many positions as it tells.
    unsafe {
        let index = pg_sys::get_relname_relid(name.as_ptr(), schema);
        let cache = pg_sys::SysCacheIdentifier::INDEXRELID as i32;
        let entry = pg_sys::SearchSysCache1(cache, index.into());
        if entry.is_null() {
            return None;
        }
        let form = &*pg_sys::GETSTRUCT(entry).cast::<pg_sys::FormData_pg_index>();
        let all = form.indkey.values.as_slice(usize::try_from(form.indnatts).unwrap_or(0));
        let is_sound =
            form.indisvalid && form.indrelid == table && all.starts_with(positions.as_slice());
        pg_sys::ReleaseSysCache(entry);
        let entry =
            pg_sys::SearchSysCache1(pg_sys::SysCacheIdentifier::RELOID as i32, index.into());
        if entry.is_null() {
            return None;
        }
        let form = &*pg_sys::GETSTRUCT(entry).cast::<pg_sys::FormData_pg_class>();
        let is_of_method = form.relam == pg_sys::Oid::from(method);
        pg_sys::ReleaseSysCache(entry);
        (is_sound && is_of_method).then_some(index)
    }
}

fn same_names(are: &[String], made: &[&str]) -> bool {
    are.len() == made.len() && are.iter().all(|name| made.contains(&name.as_str()))
}
