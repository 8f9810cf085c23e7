//! Reading columns of a result row by position.

use chrono::{DateTime, TimeDelta, Utc};
use pgrx::datum::{Interval, TimestampWithTimeZone};
use pgrx::spi::SpiTupleTable;

use super::statement::required;
use crate::error::Result;
use crate::identity::Role;
use crate::pg::time;

/// Typed access to the current row of a result. Positions count from 1.
pub trait Row {
    /// A text that may be NULL.
    fn text(&self, position: usize) -> Result<Option<String>>;
    /// A bigint that may be NULL.
    fn bigint(&self, position: usize) -> Result<Option<i64>>;
    /// A timestamptz that may be NULL.
    fn instant(&self, position: usize) -> Result<Option<DateTime<Utc>>>;
    /// An interval that may be NULL.
    fn time(&self, position: usize) -> Result<Option<TimeDelta>>;
    /// A role; NULL stands for none.
    fn role(&self, position: usize) -> Result<Role>;
    /// A boolean; NULL counts as false.
    fn flag(&self, position: usize) -> Result<bool>;

    /// A text that is never NULL.
    fn required_text(&self, position: usize, what: &'static str) -> Result<String> {
        required(self.text(position)?, what)
    }
    /// A bigint that is never NULL.
    fn required_bigint(&self, position: usize, what: &'static str) -> Result<i64> {
        required(self.bigint(position)?, what)
    }
    /// A timestamptz that is never NULL.
    fn required_instant(&self, position: usize, what: &'static str) -> Result<DateTime<Utc>> {
        required(self.instant(position)?, what)
    }
}

impl Row for SpiTupleTable<'_> {
    fn text(&self, position: usize) -> Result<Option<String>> {
        Ok(self.get::<String>(position)?)
    }

    fn bigint(&self, position: usize) -> Result<Option<i64>> {
        Ok(self.get::<i64>(position)?)
    }

    fn instant(&self, position: usize) -> Result<Option<DateTime<Utc>>> {
        Ok(self.get::<TimestampWithTimeZone>(position)?.map(time::from_server))
    }

    fn time(&self, position: usize) -> Result<Option<TimeDelta>> {
        Ok(self.get::<Interval>(position)?.map(|interval| time::from_interval(&interval)))
    }

    fn role(&self, position: usize) -> Result<Role> {
        Ok(self.get(position)?.map_or(Role::NOBODY, Role))
    }

    fn flag(&self, position: usize) -> Result<bool> {
        Ok(self.get::<bool>(position)?.unwrap_or(false))
    }
}
