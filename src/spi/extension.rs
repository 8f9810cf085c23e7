//! The extension's own entry in the server's catalogue.

use pgrx::pg_sys;

/// The extension, as the catalogue has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extension {
    /// Another one after it was dropped and created again.
    pub oid: pg_sys::Oid,
    /// The role that owns it.
    pub owner: pg_sys::Oid,
    /// The schema that it is in.
    pub schema: pg_sys::Oid,
}

/// The extension, if it is installed in this database. Takes nobody's rights and no statement.
pub fn find() -> Option<Extension> {
    // SAFETY: reads a catalogue as the server itself does, with a snapshot of its own; what an error leaves
    // open the abort of the transaction closes.
    unsafe {
        let mut found = None;
        let lock = pg_sys::AccessShareLock as i32;
        let relation = pg_sys::table_open(pg_sys::ExtensionRelationId, lock);
        let (none, no_keys) = (std::ptr::null_mut(), std::ptr::null_mut());
        let scan =
            pg_sys::systable_beginscan(relation, pg_sys::InvalidOid, false, none, 0, no_keys);
        loop {
            let tuple = pg_sys::systable_getnext(scan);
            if tuple.is_null() {
                break;
            }
            let row = &*pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_extension>();
            if pgrx::name_data_to_str(&row.extname) == "pg_claims" {
                found =
                    Some(Extension { oid: row.oid, owner: row.extowner, schema: row.extnamespace });
            }
        }
        pg_sys::systable_endscan(scan);
        pg_sys::table_close(relation, lock);
        found
    }
}
