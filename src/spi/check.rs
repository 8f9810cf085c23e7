//! What the doctor looks at.

use chrono::TimeDelta;
use pg_claims_core::check::{Board, Facts};

use super::catalog::Catalog;
use super::row::Row;
use super::statement::{Db, Statement};
use super::table::{Name, Table};
use super::time;
use crate::board;
use crate::error::Result;
use crate::guc;

static HEALTH: Statement = Statement::new(
    |c| {
        format!(
            "SELECT claims_due, pg_catalog.make_interval(secs => lag_seconds::double precision),
                    last_error, last_error_at
               FROM {}.v_worker_health",
            c.schema
        )
    },
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
    let catalog = db.catalog()?;
    let unusable = catalog.backlog.as_ref().and_then(|backlog| backlog.usable().err());
    let mut facts = Facts {
        at: time::now(),
        unusable_backlog: unusable.map(|error| error.to_string()),
        is_worker_on: guc::worker(),
        reap_interval: guc::reap_interval(),
        due: (0, TimeDelta::zero()),
        last_error: None,
        board: board::fullness()
            .map(|full| Board { capacity: full.capacity, refused: full.refused }),
        changed_tables: changed_tables(db, &catalog)?,
        oldest: None,
        out_of_step: 0,
    };
    if let Some(row) = db.first_row(&OLDEST, &[])? {
        facts.oldest = row.text(1)?.zip(row.time(2)?);
    }
    // The server runs code of a table's owner already when it plans a statement on it.
    if facts.unusable_backlog.is_none() {
        let health = db.run(&HEALTH, &[])?.first();
        let due = health.required_bigint(1, "v_worker_health")?;
        facts.due = (due, health.time(2)?.unwrap_or(TimeDelta::zero()));
        facts.last_error = health.instant(4)?.zip(health.text(3)?);
        facts.out_of_step =
            db.run(&OUT_OF_STEP, &[])?.first().required_bigint(1, "v_directives")?;
    }
    Ok(facts)
}

/// The tables that are not read and written directly, or not always.
fn changed_tables(db: &Db<'_>, catalog: &Catalog) -> Result<Vec<&'static str>> {
    let is_own_bound = catalog
        .backlog
        .as_ref()
        .is_some_and(|backlog| Some(backlog.table_oid) == catalog.own_backlog);
    let mut changed = Vec::new();
    for name in Name::ALL {
        let is_backlog = name == Name::Directives;
        if is_backlog && !is_own_bound {
            continue;
        }
        let is_direct = catalog.table(name).is_some()
            && (!is_backlog || catalog.is_own_backlog_in_use)
            && Table::to_read(db, name)?.is_as_made();
        if !is_direct {
            changed.push(name.layout().name);
        }
    }
    Ok(changed)
}
