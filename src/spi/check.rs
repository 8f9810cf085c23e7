//! What the doctor looks at.

use chrono::TimeDelta;
use pg_claims_core::check::{Board, Facts};

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

// Prepared transactions are no process's. Vacuums and this very call keep nothing for long.
static OLDEST: Statement = Statement::new(
    |_| {
        "SELECT what, pg_catalog.clock_timestamp() - since
           FROM (SELECT pg_catalog.format('the transaction of process %s (%s, %s)', pid, usename, state),
                        xact_start
                   FROM pg_catalog.pg_stat_activity
                  WHERE (backend_xmin IS NOT NULL OR backend_xid IS NOT NULL)
                    AND pid <> pg_catalog.pg_backend_pid()
                  UNION ALL
                 SELECT pg_catalog.format('prepared transaction %L', gid), prepared
                   FROM pg_catalog.pg_prepared_xacts) t (what, since)
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
    let health = db.run(&HEALTH, &[])?.first();
    let oldest = match db.first_row(&OLDEST, &[])? {
        Some(row) => row.text(1)?.zip(row.time(2)?),
        None => None,
    };
    let mut changed_tables = Vec::new();
    for name in Name::ALL {
        let is_used = name != Name::Directives || db.catalog()?.is_own_backlog_in_use;
        if is_used && !Table::to_read(db, name)?.is_as_made() {
            changed_tables.push(name.layout().name);
        }
    }
    Ok(Facts {
        at: time::now(),
        is_worker_on: guc::worker(),
        reap_interval: guc::reap_interval(),
        due: (
            health.required_bigint(1, "v_worker_health")?,
            health.time(2)?.unwrap_or(TimeDelta::zero()),
        ),
        last_error: health.instant(4)?.zip(health.text(3)?),
        board: board::fullness()
            .map(|full| Board { capacity: full.capacity, refused: full.refused }),
        changed_tables,
        oldest,
        out_of_step: db.run(&OUT_OF_STEP, &[])?.first().required_bigint(1, "v_directives")?,
    })
}
