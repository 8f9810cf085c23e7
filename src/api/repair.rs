//! Mending what was written past the triggers.

use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

use super::running;
use crate::spi::{Db, repair as mending};

#[pg_extern(volatile, parallel_unsafe)]
#[expect(clippy::type_complexity, reason = "the columns are read from the type's own text")]
fn coordination_repair(
    p_dry_run: default!(Option<bool>, "true"),
    fcinfo: pg_sys::FunctionCallInfo,
) -> Result<
    TableIterator<
        'static,
        (
            name!(kind, String),
            name!(object, String),
            name!(finding, String),
            name!(action, String),
            name!(done, bool),
        ),
    >,
    ErrorReport,
> {
    let findings =
        Db::connect(running(fcinfo), |db| mending::repair(db, p_dry_run.unwrap_or(true)))?;
    Ok(TableIterator::new(findings.into_iter().map(|found| {
        (found.kind.into(), found.object, found.finding, found.action, found.is_done)
    })))
}
