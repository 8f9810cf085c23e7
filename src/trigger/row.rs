//! The row that a BEFORE trigger gives back.
//!
//! Memory that the server gives while an SPI connection is open belongs to that connection, and is gone when it
//! ends: a tuple, a datum, a string, whatever is made by palloc. In a trigger only values of Rust's may leave a
//! connection ([`Db::connect`](crate::spi::Db::connect)). So a trigger decides within the connection and returns
//! values from it; the row is made of these here, outside of all connections, where the server's memory is that of
//! the row which is just being written.

use std::ffi::CString;

use chrono::{DateTime, Utc};
use pgrx::heap_tuple::PgHeapTuple;
use pgrx::{AllocatedByPostgres, IntoDatum, PgTrigger, PgTupleDesc, pg_sys};

use super::{Side, tuple_of};
use crate::error::{ClaimError, Result};
use crate::identity::Role;
use crate::pg::time;

/// A row that goes back to the server.
pub type Given<'a> = PgHeapTuple<'a, AllocatedByPostgres>;

/// A column's new value.
pub enum Value {
    Flag(bool),
    Text(Option<String>),
    Bigint(Option<i64>),
    Instant(Option<DateTime<Utc>>),
    /// Nobody is NULL.
    Role(Role),
}

impl Value {
    fn type_name(&self) -> &'static str {
        match self {
            Self::Flag(_) => "boolean",
            Self::Text(_) => "text or varchar",
            Self::Bigint(_) => "bigint",
            Self::Instant(_) => "timestamp with time zone",
            Self::Role(_) => "oid",
        }
    }

    fn fits(&self, of_type: pg_sys::Oid) -> bool {
        match self {
            Self::Flag(_) => of_type == pg_sys::BOOLOID,
            Self::Text(_) => [pg_sys::TEXTOID, pg_sys::VARCHAROID].contains(&of_type),
            Self::Bigint(_) => of_type == pg_sys::INT8OID,
            Self::Instant(_) => of_type == pg_sys::TIMESTAMPTZOID,
            Self::Role(_) => of_type == pg_sys::OIDOID,
        }
    }

    fn into_datum(self) -> Result<Option<pg_sys::Datum>> {
        Ok(match self {
            Self::Flag(value) => value.into_datum(),
            Self::Text(value) => value.into_datum(),
            Self::Bigint(value) => value.into_datum(),
            Self::Instant(value) => value.map(time::to_server).transpose()?.into_datum(),
            Self::Role(Role::NOBODY) => None,
            Self::Role(role) => role.0.into_datum(),
        })
    }
}

/// The row as the server gave it: the very same, of which it need not take a copy. NEW where there is one.
pub fn unchanged<'a>(trigger: &'a PgTrigger<'a>) -> Option<Given<'a>> {
    trigger.new().or(trigger.old())
}

/// NEW with other values in some columns. Must be called outside of all SPI connections.
pub fn changed<'a>(
    trigger: &'a PgTrigger<'a>,
    values: Vec<(&str, Value)>,
) -> Result<Option<Given<'a>>> {
    let Some(tuple) = tuple_of(trigger, Side::New).filter(|_| !values.is_empty()) else {
        return Ok(unchanged(trigger));
    };
    // SAFETY: in a row trigger the server gives a valid relation.
    let descriptor = unsafe { (*trigger.trigger_data().tg_relation).rd_att };
    let mut positions = Vec::with_capacity(values.len());
    let mut datums = Vec::with_capacity(values.len());
    let mut are_null = Vec::with_capacity(values.len());
    for (column, value) in values {
        let position = position_of(trigger, column)?;
        // SAFETY: the position is one of the row type's.
        let of_type = unsafe { pg_sys::SPI_gettypeid(descriptor, position) };
        if !value.fits(of_type) {
            return Err(ClaimError::ColumnOfOtherType {
                table: trigger.table_name()?,
                column: column.to_owned(),
                of_type: value.type_name(),
            });
        }
        let datum = value.into_datum()?;
        positions.push(position);
        are_null.push(datum.is_none());
        datums.push(datum.unwrap_or(pg_sys::Datum::null()));
    }
    // SAFETY: the tuple is of the relation's row type, and the three lists are of one length; the values are of
    // the columns' types. The new tuple is made in the memory that the server has for this row.
    unsafe {
        let changed = pg_sys::heap_modify_tuple_by_cols(
            tuple,
            descriptor,
            positions.len() as i32,
            positions.as_mut_ptr(),
            datums.as_mut_ptr(),
            are_null.as_mut_ptr(),
        );
        let descriptor = PgTupleDesc::from_pg_unchecked(descriptor);
        Ok(Some(PgHeapTuple::from_heap_tuple(descriptor, changed)))
    }
}

/// The position of a column of the trigger's table, whichever columns were dropped before it.
pub(super) fn position_of(trigger: &PgTrigger<'_>, column: &str) -> Result<i32> {
    let gone = || ClaimError::ColumnGone {
        table: trigger.table_name().unwrap_or_default(),
        column: column.to_owned(),
    };
    let name = CString::new(column).map_err(|_| gone())?;
    // SAFETY: in a row trigger the server gives a valid relation. The codes for what is no column of the user's
    // are not positive.
    let position = unsafe {
        let descriptor = (*trigger.trigger_data().tg_relation).rd_att;
        pg_sys::SPI_fnumber(descriptor, name.as_ptr())
    };
    if position > 0 { Ok(position) } else { Err(gone()) }
}
