//! The triggers. They keep everything that is derived from claude_sessions in step with it, for
//! direct writes as for the functions.

pub mod board;
pub mod directive;
pub mod guard;
pub mod history;
pub mod mirror;
pub mod session;

use std::convert::Infallible;

use chrono::{DateTime, TimeDelta, Utc};
use pgrx::datum::{Interval, TimestampWithTimeZone};
use pgrx::heap_tuple::PgHeapTuple;
use pgrx::{AllocatedByRust, FromDatum, IntoDatum, PgTrigger, pg_sys};

use crate::error::{ClaimError, Result};
use crate::identity::Role;
use crate::spi::row::Row as Columns;
use crate::spi::session::Session;
use crate::spi::table::layout::sessions;
use crate::spi::time;

/// What a trigger function gives back; errors are raised inside.
type Row<'a> = Result<Option<PgHeapTuple<'a, AllocatedByRust>>, Infallible>;

/// Runs a trigger's work, raising its error with SQLSTATE, DETAIL and HINT intact.
fn run<'a>(work: impl FnOnce() -> Result<Option<PgHeapTuple<'a, AllocatedByRust>>>) -> Row<'a> {
    match work() {
        Ok(row) => Ok(row),
        Err(error) => error.raise(),
    }
}

/// A row of claude_sessions in one of its triggers.
struct SessionTuple {
    tuple: pg_sys::HeapTuple,
    columns: pg_sys::TupleDesc,
}

impl SessionTuple {
    fn of(trigger: &PgTrigger<'_>, side: Side) -> Option<Self> {
        let tuple = tuple_of(trigger, side)?;
        // SAFETY: in a row trigger the server gives a valid relation.
        Some(Self { tuple, columns: unsafe { (*trigger.trigger_data().tg_relation).rd_att } })
    }

    fn get<T: FromDatum>(&self, position: usize, of_type: pg_sys::Oid) -> Result<Option<T>> {
        let position = position as i32;
        // SAFETY: the server gives a tuple of the relation's row type; the value is of the type that is
        // asked for, and copied.
        unsafe {
            if pg_sys::SPI_gettypeid(self.columns, position) != of_type {
                return Err(ClaimError::Corrupt { what: "claude_sessions" });
            }
            let mut is_null = false;
            let value = pg_sys::SPI_getbinval(self.tuple, self.columns, position, &mut is_null);
            Ok(T::from_datum(value, is_null))
        }
    }

    fn column<T: FromDatum + IntoDatum>(&self, position: usize) -> Result<Option<T>> {
        self.get(position, T::type_oid())
    }

    fn owner_role(&self) -> Result<Option<pg_sys::Oid>> {
        self.get(sessions::OWNER_ROLE, pg_sys::REGROLEOID)
    }
}

impl Columns for SessionTuple {
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

    fn role(&self, position: usize, what: &'static str) -> Result<Role> {
        self.get(position, pg_sys::REGROLEOID)?.map(Role).ok_or(ClaimError::Corrupt { what })
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

/// Whether a dump is being restored, whose rows bring along what belongs to them. Every script of
/// pg_dump's begins by turning check_function_bodies and row_security off and warnings on, which
/// nobody else does around writes; and a restore is run by whoever may do everything to the extension's
/// tables anyway, which for a trigger that runs as their owner is the current user.
fn is_restoring() -> bool {
    // SAFETY: reads settings of this backend and asks about its roles.
    unsafe {
        !pg_sys::check_function_bodies
            && !pg_sys::row_security
            && pg_sys::client_min_messages == pg_sys::WARNING as i32
            && pg_sys::has_privs_of_role(pg_sys::GetOuterUserId(), pg_sys::GetUserId())
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
    let data = trigger.trigger_data();
    let gone = || ClaimError::ColumnGone {
        table: trigger.table_name().unwrap_or_default(),
        column: column.to_owned(),
    };
    let name = std::ffi::CString::new(column).map_err(|_| gone())?;
    // SAFETY: in a row trigger the server gives a valid relation and tuples of its row type;
    // SPI_getvalue returns a palloc'd, null-terminated string, or null for NULL (SPI_fnumber's
    // error codes are not positive).
    unsafe {
        let descriptor = (*data.tg_relation).rd_att;
        let number = pg_sys::SPI_fnumber(descriptor, name.as_ptr());
        if number <= 0 {
            return Err(gone());
        }
        let value = pg_sys::SPI_getvalue(tuple, descriptor, number);
        if value.is_null() {
            return Ok(None);
        }
        Ok(Some(std::ffi::CStr::from_ptr(value).to_string_lossy().into_owned()))
    }
}
