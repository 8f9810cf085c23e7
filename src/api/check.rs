//! The doctor.

use pg_claims_core::check::{self, Check};
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

use crate::spi::{Db, check as look};

// SECURITY DEFINER, as most facts are nobody else's to see.
#[pg_extern(volatile, parallel_unsafe, security_definer)]
#[search_path(pg_catalog, pg_temp)]
#[expect(clippy::type_complexity, reason = "the columns are read from the type's own text")]
fn coordination_check() -> Result<
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
    let facts = Db::connect(look::facts)?;
    let rows: Vec<_> = check::checks(&facts).into_iter().map(row).collect();
    Ok(TableIterator::new(rows))
}

fn row(check: Check) -> (String, String, Option<String>, Option<String>) {
    let status = if check.trouble.is_some() { "warning" } else { "ok" };
    let (detail, hint) = check.trouble.unzip();
    (check.name.into(), status.into(), detail, hint.map(Into::into))
}
