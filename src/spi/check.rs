//! What the doctor looks at.

use chrono::TimeDelta;
use pg_claims_core::check::Facts;

use super::row::Row;
use super::statement::{Db, Statement};
use super::table::{Name, Table};
use super::time;
use super::{catalog, directive};
use crate::board;
use crate::error::Result;
use crate::guc;

static DUE: Statement = Statement::new(
    |c| {
        format!(
            "SELECT claims_due, pg_catalog.make_interval(secs => lag_seconds::double precision)
               FROM {}.v_worker_health",
            c.schema
        )
    },
    &[],
);

static LAST_ERROR: Statement = Statement::new(
    |c| format!("SELECT last_error, last_error_at FROM {}.worker_health", c.schema),
    &[],
);

// Those of other databases keep nothing here; nor do vacuums.
static OLDEST: Statement = Statement::new(
    |_| {
        "SELECT what, pg_catalog.clock_timestamp() - since
           FROM (SELECT pg_catalog.format('the transaction of process %s (%s, %s)', pid, usename, state),
                        xact_start
                   FROM pg_catalog.pg_stat_activity
                  WHERE datname = pg_catalog.current_database()
                    AND (backend_xmin IS NOT NULL OR backend_xid IS NOT NULL)
                    AND backend_type <> 'autovacuum worker'
                    AND pid NOT IN (SELECT pid FROM pg_catalog.pg_stat_progress_vacuum)
                  UNION ALL
                 SELECT pg_catalog.format('prepared transaction %L', gid), prepared
                   FROM pg_catalog.pg_prepared_xacts
                  WHERE database = pg_catalog.current_database()) t (what, since)
          WHERE since IS NOT NULL ORDER BY since LIMIT 1"
            .into()
    },
    &[],
);

/// Gathers the facts.
pub fn facts(db: &Db<'_>) -> Result<Facts> {
    let usable = catalog::usable_backlog(db);
    let (broken_tables, changed_tables) = tables(db)?;
    let mut facts = Facts {
        at: time::now(),
        is_worker_on: guc::worker(),
        reap_interval: guc::reap_interval(),
        due: None,
        last_error: None,
        board: board::fullness(),
        broken_tables,
        changed_tables,
        oldest: None,
        out_of_step: None,
        unusable_backlog: usable.err().map(|error| error.to_string()),
    };
    if let Some(row) = db.first_row(&OLDEST, &[])? {
        facts.oldest = row.text(1)?.zip(row.time(2)?);
    }
    if let Some(row) = db.first_row(&LAST_ERROR, &[])? {
        facts.last_error = row.instant(2)?.zip(row.text(1)?);
    }
    if facts.unusable_backlog.is_none() {
        let due = db.run(&DUE, &[])?.first();
        let lag = due.time(2)?.unwrap_or(TimeDelta::zero());
        facts.due = Some((due.required_bigint(1, "v_worker_health")?, lag));
        facts.out_of_step = Some(directive::count_out_of_step(db)?);
    }
    Ok(facts)
}

/// The tables that cannot be used, and those that are not read and written directly, or not always.
fn tables(db: &Db<'_>) -> Result<(Vec<&'static str>, Vec<&'static str>)> {
    let catalog = db.catalog()?;
    let is_own_used = catalog.uses_own_backlog();
    let (mut broken, mut changed) = (Vec::new(), Vec::new());
    for name in Name::ALL {
        let is_backlog = name == Name::Directives;
        if is_backlog && !catalog.is_own_backlog_in_use {
            // A statement can do without all that.
            changed.extend(is_own_used.then_some(name.layout().name));
        } else if catalog.table(name).is_none() {
            broken.push(name.layout().name);
        } else if !Table::to_read(db, name)?.is_as_made() {
            changed.push(name.layout().name);
        }
    }
    Ok((broken, changed))
}
