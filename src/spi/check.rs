//! What the doctor looks at.

use chrono::TimeDelta;
use pg_claims_core::check::{Board, Facts};

use super::catalog;
use super::row::Row;
use super::statement::{Db, Statement};
use super::table::{Name, Table};
use super::time;
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

// Only what the backlog has a column for can be out of step.
static OUT_OF_STEP: Statement = Statement::new(
    |c| {
        let Some(columns) = c.backlog.as_ref().map(|backlog| &backlog.columns) else {
            return "SELECT 0::bigint".into();
        };
        let mut differ = vec!["false"];
        if columns.is_working_on.is_some() {
            differ.push("COALESCE(d.is_working_on, false) <> (s.session_id IS NOT NULL)");
        }
        if columns.active_session_id.is_some() {
            differ.push("d.active_session_id IS DISTINCT FROM s.session_id");
        }
        format!(
            "SELECT pg_catalog.count(*)
               FROM {x}.v_directives d
               LEFT JOIN {x}.claude_sessions s
                 ON s.sd_id = d.sd_id AND s.sd_id IS NOT NULL AND s.status = 'active'
              WHERE {}",
            differ.join(" OR "),
            x = c.schema
        )
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
        board: board::fullness()
            .map(|full| Board { capacity: full.capacity, refused: full.refused }),
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
        let out_of_step = db.run(&OUT_OF_STEP, &[])?.first();
        facts.out_of_step = Some(out_of_step.required_bigint(1, "v_directives")?);
    }
    Ok(facts)
}

/// The tables that cannot be used, and those that are not read and written directly, or not always.
fn tables(db: &Db<'_>) -> Result<(Vec<&'static str>, Vec<&'static str>)> {
    let catalog = db.catalog()?;
    let is_own_bound = catalog
        .backlog
        .as_ref()
        .is_some_and(|backlog| Some(backlog.table_oid) == catalog.own_backlog);
    let (mut broken, mut changed) = (Vec::new(), Vec::new());
    for name in Name::ALL {
        let is_backlog = name == Name::Directives;
        if is_backlog && (!is_own_bound || !catalog.is_own_backlog_in_use) {
            // A statement can do without all that.
            changed.extend(is_own_bound.then_some(name.layout().name));
        } else if catalog.table(name).is_none() {
            broken.push(name.layout().name);
        } else if !Table::to_read(db, name)?.is_as_made() {
            changed.push(name.layout().name);
        }
    }
    Ok((broken, changed))
}
