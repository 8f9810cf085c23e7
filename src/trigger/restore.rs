//! Making way for a dump that replaces what is there.

use pgrx::pg_sys;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

use super::is_restoring;
use crate::error::Result;
use crate::identity::{ActingAs, running};
use crate::spi::{Db, directive};

/// A dump that was written or is restored with `--clean` drops the bound backlog before the extension, whose
/// views read it. Where that is so the extension lets the table go: the dump binds it again. Whoever drops it
/// otherwise is told by the server what depends on it.
#[pg_extern(sql = r#"
CREATE FUNCTION make_way_for_dump()
RETURNS event_trigger
LANGUAGE c
AS '@MODULE_PATHNAME@', '@FUNCTION_NAME@';
"#)]
pub fn make_way_for_dump(fcinfo: pg_sys::FunctionCallInfo) -> Result<(), ErrorReport> {
    let _acting = ActingAs::extension_owner(running(fcinfo))?;
    let dropped = if is_restoring() { dropped_tables(fcinfo) } else { Vec::new() };
    if !dropped.is_empty() {
        Db::within(|db| directive::forget_bound(db, &dropped))?;
    }
    Ok(())
}

/// The tables that the statement names of which the server is about to execute DROP TABLE.
fn dropped_tables(fcinfo: pg_sys::FunctionCallInfo) -> Vec<pg_sys::Oid> {
    // SAFETY: the server calls an event trigger with a description of the event, which tells of its kind and
    // has the statement; that of DROP TABLE has a list of qualified names. Looks the names up and locks nothing.
    unsafe {
        let context = (*fcinfo).context;
        if context.is_null() || (*context).type_ != pg_sys::NodeTag::T_EventTriggerData {
            return Vec::new();
        }
        let statement = (*context.cast::<pg_sys::EventTriggerData>()).parsetree;
        if statement.is_null() || (*statement).type_ != pg_sys::NodeTag::T_DropStmt {
            return Vec::new();
        }
        let statement = &*statement.cast::<pg_sys::DropStmt>();
        if statement.removeType != pg_sys::ObjectType::OBJECT_TABLE {
            return Vec::new();
        }
        let names = (0..(*statement.objects).length).map(|at| {
            let name = pg_sys::list_nth(statement.objects, at).cast::<pg_sys::List>();
            pg_sys::RangeVarGetRelidExtended(
                pg_sys::makeRangeVarFromNameList(name),
                pg_sys::NoLock as pg_sys::LOCKMODE,
                pg_sys::RVROption::RVR_MISSING_OK,
                None,
                std::ptr::null_mut(),
            )
        });
        names.filter(|table| *table != pg_sys::Oid::INVALID).collect()
    }
}
