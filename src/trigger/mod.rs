//! The triggers. They keep everything that is derived from claude_sessions in step with it, for
//! direct writes as for the functions.

pub mod board;
pub mod ddl;
pub mod directive;
pub mod guard;
pub mod history;
pub mod mirror;
pub mod restore;
mod row;
pub mod session;

use std::convert::Infallible;
use std::ffi::{CStr, CString};

use chrono::{DateTime, TimeDelta, Utc};
use pgrx::datum::{Interval, TimestampWithTimeZone};
use pgrx::{FromDatum, IntoDatum, PgTrigger, PgTupleDesc, pg_sys};

use crate::error::{ClaimError, Result};
use crate::identity::{self, ActingAs, Role};
use crate::pg::{backend, time};
use crate::spi::intent::{self, Intent};
use crate::spi::row::Row as Columns;
use crate::spi::session::Session;
use crate::spi::table::layout::sessions;

/// What a trigger function gives back; errors are raised inside.
type Row<'a> = Result<Option<row::Given<'a>>, Infallible>;

/// Runs a trigger's work, raising its error with SQLSTATE, DETAIL and HINT intact.
fn run<'a>(work: impl FnOnce() -> Result<Option<row::Given<'a>>>) -> Row<'a> {
    match work() {
        Ok(row) => Ok(row),
        Err(error) => error.raise(),
    }
}

/// The extension's tables whose triggers have the rights of its owner.
const OWN_TABLES: [&CStr; 6] = [
    c"claude_sessions",
    c"sd_claims",
    c"session_lifecycle_events",
    c"lifecycle_event_positions",
    c"event_frontier",
    c"directive_binding",
];

/// The same for a trigger on one of the extension's tables, with the rights of its owner. A role that may call the function
/// could put it on a table of its own, and would invent the rows that the function believes: that is an error.
fn run_on_own_table<'a>(
    trigger: &PgTrigger<'_>,
    work: impl FnOnce() -> Result<Option<row::Given<'a>>>,
) -> Row<'a> {
    // The extension's own write has all that already.
    if intent::is(&Intent::Own) && identity::is_acting() {
        return run(work);
    }
    run_as_owner(trigger, || {
        let table = trigger.relid()?;
        let schema = backend::schema_of(function_of(trigger));
        let is_own = OWN_TABLES.iter().any(|name| backend::relation(name, schema) == Some(table));
        if is_own { work() } else { Err(ClaimError::NotOwnTable { table: trigger.table_name()? }) }
    })
}

/// The same with the rights of the extension's owner: whoever writes the table may do nothing with others.
fn run_as_owner<'a>(
    trigger: &PgTrigger<'_>,
    work: impl FnOnce() -> Result<Option<row::Given<'a>>>,
) -> Row<'a> {
    run(|| {
        let _acting = ActingAs::extension_owner(function_of(trigger))?;
        work()
    })
}

/// The trigger's function.
fn function_of(trigger: &PgTrigger<'_>) -> pg_sys::Oid {
    // SAFETY: the server gives the trigger that it has called, which names its function.
    unsafe { (*trigger.trigger_data().tg_trigger).tgfoid }
}

/// A row of claude_sessions in one of its triggers, taken apart.
struct SessionTuple<'a> {
    columns: PgTupleDesc<'a>,
    values: Vec<pg_sys::Datum>,
    are_null: Vec<bool>,
}

impl<'a> SessionTuple<'a> {
    fn of(trigger: &'a PgTrigger<'_>, side: Side) -> Option<Self> {
        let tuple = tuple_of(trigger, side)?;
        // SAFETY: in a row trigger the server gives a valid relation, and a tuple of its row type. The values are not read
        // after the trigger has ended.
        unsafe {
            let descriptor = (*trigger.trigger_data().tg_relation).rd_att;
            let columns = PgTupleDesc::from_pg_unchecked(descriptor);
            let mut values = vec![pg_sys::Datum::null(); columns.len()];
            let mut are_null = vec![true; columns.len()];
            let (to, are) = (values.as_mut_ptr(), are_null.as_mut_ptr());
            pg_sys::heap_deform_tuple(tuple, descriptor, to, are);
            Some(Self { columns, values, are_null })
        }
    }

    fn get<T: FromDatum>(&self, position: usize, of_type: pg_sys::Oid) -> Result<Option<T>> {
        let at = position - 1;
        if self.columns.get(at).is_none_or(|column| column.atttypid != of_type) {
            return Err(ClaimError::Corrupt { what: "claude_sessions" });
        }
        // SAFETY: the value is of the type that is asked for, and copied.
        unsafe { Ok(T::from_datum(self.values[at], self.are_null[at])) }
    }

    fn column<T: FromDatum + IntoDatum>(&self, position: usize) -> Result<Option<T>> {
        self.get(position, T::type_oid())
    }

    /// The name of the role that it belongs to.
    fn owner_role(&self) -> Result<Option<CString>> {
        let name = self.get::<&CStr>(sessions::OWNER_ROLE, pg_sys::NAMEOID)?;
        Ok(name.map(CStr::to_owned))
    }
}

impl Columns for SessionTuple<'_> {
    fn text(&self, position: usize) -> Result<Option<String>> {
        self.column(position)
    }

    fn bigint(&self, position: usize) -> Result<Option<i64>> {
        self.column(position)
    }

    fn instant(&self, position: usize) -> Result<Option<DateTime<Utc>>> {
        Ok(self.column::<TimestampWithTimeZone>(position)?.map(time::from_server))
    }

    fn time(&self, position: usize) -> Result<Option<TimeDelta>> {
        Ok(self.column::<Interval>(position)?.map(|interval| time::from_interval(&interval)))
    }

    fn role(&self, position: usize) -> Result<Role> {
        Ok(self.get(position, pg_sys::OIDOID)?.map_or(Role::NOBODY, Role))
    }

    fn flag(&self, position: usize) -> Result<bool> {
        Ok(self.column(position)?.unwrap_or(false))
    }
}

/// OLD and NEW, as far as the operation has them.
fn session_rows(trigger: &PgTrigger<'_>) -> Result<(Option<Session>, Option<Session>)> {
    let read = |side| SessionTuple::of(trigger, side).map(|row| Session::read(&row)).transpose();
    Ok((read(Side::Old)?, read(Side::New)?))
}

/// Whether a dump is being restored, whose rows bring along what belongs to them. A restore is run by whoever
/// may do everything to the extension's tables anyway. A function that is called after it on the same connection writes no dump.
fn is_restoring() -> bool {
    // SAFETY: asks about this backend's roles.
    reads_dump() && !intent::is(&Intent::Own) && may_restore(unsafe { pg_sys::GetUserId() })
}

/// Whether the rows of a table of `owner`'s may come from a dump: who calls must have that role's rights, and so must
/// whoever is logged in, as a SECURITY DEFINER function has its owner's and restores nothing.
fn may_restore(owner: pg_sys::Oid) -> bool {
    // SAFETY: asks about this backend's roles.
    unsafe {
        pg_sys::has_privs_of_role(identity::caller().0, owner)
            && pg_sys::has_privs_of_role(pg_sys::GetOuterUserId(), owner)
    }
}

/// Whether the settings are those of a dump's script. Each of pg_dump's begins by turning check_function_bodies
/// and row_security off and warnings on, which nobody else does around writes. Anybody may.
fn reads_dump() -> bool {
    // SAFETY: reads settings of this backend.
    unsafe {
        !pg_sys::check_function_bodies
            && !pg_sys::row_security
            && pg_sys::client_min_messages == pg_sys::WARNING as i32
    }
}

/// Which of a trigger's two rows.
#[derive(Clone, Copy)]
enum Side {
    Old,
    New,
}

/// The row, if the operation has it.
fn tuple_of(trigger: &PgTrigger<'_>, side: Side) -> Option<pg_sys::HeapTuple> {
    let data = trigger.trigger_data();
    match (side, trigger.old().is_some(), trigger.new().is_some()) {
        (Side::Old, true, _) | (Side::New, false, true) => Some(data.tg_trigtuple),
        (Side::New, true, true) => Some(data.tg_newtuple),
        _ => None,
    }
}

/// A column of any type as text.
fn text_of(trigger: &PgTrigger<'_>, side: Side, column: &str) -> Result<Option<String>> {
    let Some(tuple) = tuple_of(trigger, side) else {
        return Ok(None);
    };
    let number = row::position_of(trigger, column)?;
    // SAFETY: in a row trigger the server gives a valid relation and tuples of its row type;
    // SPI_getvalue returns a palloc'd, null-terminated string, or null for NULL.
    unsafe {
        let descriptor = (*trigger.trigger_data().tg_relation).rd_att;
        let value = pg_sys::SPI_getvalue(tuple, descriptor, number);
        if value.is_null() {
            return Ok(None);
        }
        Ok(Some(std::ffi::CStr::from_ptr(value).to_string_lossy().into_owned()))
    }
}
