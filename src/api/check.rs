//! The doctor.

use pg_claims_core::check::{self, Check};
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

use super::running;
use crate::spi::{Db, check as look};

#[pg_extern(volatile, parallel_unsafe)]
#[expect(clippy::type_complexity, reason = "the columns are read from the type's own text")]
fn coordination_check(
    fcinfo: pg_sys::FunctionCallInfo,
) -> Result<
    TableIterator<
        'static,
        (
            name!(name, String),
            name!(status, String),
            name!(detail, Option<String>),
            name!(hint, Option<String>),
        ),
    >,
    ErrorReport,
> {
    let facts = Db::look(running(fcinfo), look::facts)?;
    let rows: Vec<_> = check::checks(&facts).into_iter().map(row).collect();
    Ok(TableIterator::new(rows))
}

fn row(check: Check) -> (String, String, Option<String>, Option<String>) {
    let status = check.status();
    let (detail, hint) = check.trouble.unzip();
    (check.name.into(), status.into(), detail, hint.map(Into::into))
}
