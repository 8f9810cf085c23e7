//! Event triggers: commands must not drop the extension by accident, nor put others' code on its tables.

use std::cell::Cell;
use std::ffi::{CStr, CString, c_int, c_void};

use pgrx::pg_sys;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

use crate::error::{ClaimError, Result};
use crate::identity::{self, ActingAs, running};
use crate::pg::backend;
use crate::spi::extension::{self, Extension};
use crate::spi::{Db, foreign};

thread_local! {
    /// When the client's statement began whose command the server has told of last, and whether that command drops the
    /// extension on purpose.
    static DROPPING: Cell<Option<(i64, bool)>> = const { Cell::new(None) };
}

static mut PREVIOUS_HOOK: pg_sys::object_access_hook_type = None;

/// Asks the server to tell of each object that it drops.
pub fn init() {
    // SAFETY: runs once in each process, in _PG_init; hooks are chained as the server asks for.
    unsafe {
        PREVIOUS_HOOK = pg_sys::object_access_hook;
        pg_sys::object_access_hook = Some(object_accessed);
    }
}

/// Notes whether a command drops the extension on purpose. A command that drops the backlog with all that depends on it, such
/// as DROP SCHEMA … CASCADE, would drop the views that read the backlog, and with them the extension that they belong to, its
/// sessions and its history. The server calls this function before each command. So the library, which refuses such a drop,
/// is loaded in every process that might do it.
#[pg_extern(sql = r#"
CREATE FUNCTION note_drop()
RETURNS event_trigger
LANGUAGE c
AS '@MODULE_PATHNAME@', '@FUNCTION_NAME@';
"#)]
pub fn note_drop(fcinfo: pg_sys::FunctionCallInfo) {
    // SAFETY: the server calls an event trigger with a description of the event, which has the statement.
    let is_meant = unsafe {
        let context = (*fcinfo).context;
        !context.is_null()
            && (*context).type_ == pg_sys::NodeTag::T_EventTriggerData
            && means_extension((*context.cast::<pg_sys::EventTriggerData>()).parsetree)
    };
    DROPPING.set(Some((backend::statement(), is_meant)));
}

/// Whether a statement names the extension, its schema or its owner.
///
/// # Safety
/// `parsetree` must be null or a statement.
unsafe fn means_extension(parsetree: *mut pg_sys::Node) -> bool {
    // SAFETY: as promised; the nodes are of the types that the parser gives them.
    unsafe {
        if parsetree.is_null() {
            return false;
        }
        match (*parsetree).type_ {
            pg_sys::NodeTag::T_DropStmt => {
                let statement = &*parsetree.cast::<pg_sys::DropStmt>();
                let meant = match statement.removeType {
                    pg_sys::ObjectType::OBJECT_EXTENSION => Some(EXTENSION.to_owned()),
                    pg_sys::ObjectType::OBJECT_SCHEMA => extension::find().and_then(schema_of),
                    _ => None,
                };
                meant.is_some_and(|meant| {
                    elements(statement.objects)
                        .any(|name| CStr::from_ptr(string_of(name)) == &*meant)
                })
            }
            pg_sys::NodeTag::T_DropOwnedStmt => {
                let statement = &*parsetree.cast::<pg_sys::DropOwnedStmt>();
                extension::find().is_some_and(|extension| {
                    elements(statement.roles)
                        .any(|role| pg_sys::get_rolespec_oid(role.cast(), true) == extension.owner)
                })
            }
            _ => false,
        }
    }
}

/// The name of the schema that the extension is in.
fn schema_of(extension: Extension) -> Option<CString> {
    // SAFETY: returns a null-terminated copy, or null.
    unsafe {
        let name = pg_sys::get_namespace_name(extension.schema);
        (!name.is_null()).then(|| CStr::from_ptr(name).to_owned())
    }
}

const EXTENSION: &CStr = c"pg_claims";

/// # Safety
/// `list` must be null or a list of pointers.
unsafe fn elements(list: *mut pg_sys::List) -> impl Iterator<Item = *mut c_void> {
    // SAFETY: as promised.
    let length = if list.is_null() { 0 } else { unsafe { (*list).length } };
    // SAFETY: the position is one of the list's.
    (0..length).map(move |at| unsafe { pg_sys::list_nth(list, at) })
}

/// # Safety
/// `node` must be one that the parser makes of a name.
unsafe fn string_of(node: *mut c_void) -> *const std::ffi::c_char {
    // SAFETY: as promised.
    unsafe {
        #[cfg(feature = "pg14")]
        return (*node.cast::<pg_sys::Value>()).val.str_;
        #[cfg(not(feature = "pg14"))]
        return (*node.cast::<pg_sys::String>()).sval;
    }
}

#[pgrx::pg_guard]
unsafe extern "C-unwind" fn object_accessed(
    access: pg_sys::ObjectAccessType::Type,
    class: pg_sys::Oid,
    object: pg_sys::Oid,
    part: c_int,
    argument: *mut c_void,
) {
    // SAFETY: the server's arguments go on to whoever was here before.
    unsafe {
        if let Some(previous) = PREVIOUS_HOOK {
            previous(access, class, object, part, argument);
        }
    }
    if access != pg_sys::ObjectAccessType::OAT_DROP || class != pg_sys::ExtensionRelationId {
        return;
    }
    let is_aside =
        DROPPING.get().is_some_and(|(at, is_meant)| at == backend::statement() && !is_meant);
    // SAFETY: looks the name up in the catalogue.
    if is_aside && object == unsafe { pg_sys::get_extension_oid(EXTENSION.as_ptr(), true) } {
        ClaimError::BacklogDropped.raise()
    }
}

/// Whoever may put a trigger on one of the extension's tables, or have writes there passed on to a table of its own, would
/// have code run with the rights of whoever writes there, mostly those of the extension's owner.
#[pg_extern(sql = r#"
CREATE FUNCTION keep_out_foreign_code()
RETURNS event_trigger
LANGUAGE c
AS '@MODULE_PATHNAME@', '@FUNCTION_NAME@';
"#)]
pub fn keep_out_foreign_code(fcinfo: pg_sys::FunctionCallInfo) -> Result<(), ErrorReport> {
    let caller = identity::caller();
    let _acting = ActingAs::extension_owner(running(fcinfo))?;
    Ok(Db::within(|db| foreign::check_command(db, caller))?)
}
