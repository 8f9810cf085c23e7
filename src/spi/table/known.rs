//! A table as it is.

use std::ffi::CString;
use std::rc::Rc;

use pgrx::pg_sys;

use super::Name;
use super::layout::{self, BTREE, Layout};

/// What is known of a table, until the server says that it has changed.
#[derive(Debug, Clone, PartialEq)]
pub struct Known {
    /// The table.
    pub oid: pg_sys::Oid,
    indexes: Vec<pg_sys::Oid>,
    spare_indexes: Vec<Option<pg_sys::Oid>>,
    /// The primary key's position, if the table is read by it: by the first index.
    key: Option<usize>,
}

/// What is known of the extension's own tables, in the order of [`Name::ALL`].
pub type AllKnown = [Option<Rc<Known>>; Name::ALL.len()];

impl Known {
    /// Looks at all tables. `None` for one that is not there, or lacks a column as it was made, or an
    /// index that it is read by. By the server's caches of its catalogues: opening a table would wait for whoever has
    /// locked it, as a change of the backlog does.
    pub fn look(oids: [pg_sys::Oid; Name::ALL.len()]) -> AllKnown {
        Name::ALL.map(|name| {
            let (layout, oid) = (name.layout(), oids[name as usize]);
            if !has_columns(layout, oid) {
                return None;
            }
            // SAFETY: looks the table up in the catalogue.
            let schema = unsafe { pg_sys::get_rel_namespace(oid) };
            Some(Rc::new(Self {
                oid,
                indexes: indexes(layout, oid, schema)?,
                spare_indexes: spare_indexes(layout, oid, schema),
                key: layout.key_column(),
            }))
        })
    }

    /// A table that is only written where its rows are known to be.
    pub(super) fn without_indexes(oid: pg_sys::Oid) -> Self {
        Self { oid, indexes: Vec::new(), spare_indexes: Vec::new(), key: None }
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

/// Whether there is such a table, and it begins with the columns as they were made. Others may have come, or come and
/// gone.
fn has_columns(layout: &Layout, table: pg_sys::Oid) -> bool {
    // SAFETY: looks the table up in the catalogue; 0 where it is not there.
    let kind = unsafe { pg_sys::get_rel_relkind(table) } as u8;
    let mut columns = (1..).zip(layout.columns);
    kind == pg_sys::RELKIND_RELATION
        && columns.all(|(position, (name, of_type))| {
            // SAFETY: look the column up in the catalogue, by a null-terminated name.
            CString::new(*name).is_ok_and(|name| unsafe {
                pg_sys::get_attnum(table, name.as_ptr()) == position
                    && pg_sys::get_atttype(table, position) == of_type.value()
            })
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
    of_name: &str,
    columns: &[&str],
    method: u32,
) -> Option<pg_sys::Oid> {
    // An expression has no name, and the position 0.
    let position = |column: &&str| match *column {
        "" => Some(0),
        column => i16::try_from(layout.position(column)?).ok(),
    };
    let positions: Vec<i16> = columns.iter().map(position).collect::<Option<_>>()?;
    let name = CString::new(of_name).ok()?;
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
        let is_sound = form.indisvalid
            && form.indrelid == table
            && all.starts_with(positions.as_slice())
            && (layout.decider.is_none_or(|(name, _)| name != of_name)
                || form.indisunique && condition_of(entry) == layout.condition());
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

/// The columns that an index's condition is about, by their positions.
///
/// # Safety
/// `index` must be an entry of pg_index.
unsafe fn condition_of(index: pg_sys::HeapTuple) -> Vec<usize> {
    // SAFETY: as promised; the attribute has an expression that the server has written.
    unsafe {
        let mut is_null = false;
        let condition = pg_sys::SysCacheGetAttr(
            pg_sys::SysCacheIdentifier::INDEXRELID as i32,
            index,
            pg_sys::Anum_pg_index_indpred as pg_sys::AttrNumber,
            &mut is_null,
        );
        if is_null {
            return Vec::new();
        }
        let mut columns = std::ptr::null_mut();
        let text = pg_sys::text_to_cstring(condition.cast_mut_ptr());
        pg_sys::pull_varattnos(pg_sys::stringToNode(text).cast(), 1, &mut columns);
        let mut positions = Vec::new();
        let mut member = -1;
        loop {
            member = pg_sys::bms_next_member(columns, member);
            match usize::try_from(member + pg_sys::FirstLowInvalidHeapAttributeNumber) {
                Ok(position) => positions.push(position),
                Err(_) => return positions,
            }
        }
    }
}
