//! How the worker does.

use chrono::TimeDelta;
use pgrx::pg_sys;
use pgrx::pg_sys::BuiltinOid::{BOOLOID, FLOAT8OID, INT8OID, TEXTOID};

use super::row::Row;
use super::statement::{Db, Statement};
use crate::error::Result;

/// What one run did.
#[derive(Debug, Default)]
pub struct Run {
    /// How long it took.
    pub duration: TimeDelta,
    /// How many claims were reaped.
    pub reaped: i64,
    /// How many steps failed.
    pub errors: i64,
    /// What the last failure was.
    pub last_error: Option<String>,
    /// Whether history was pruned.
    pub pruned: bool,
}

static RECORD: Statement = Statement::new(
    |c| {
        format!(
            "INSERT INTO {}.worker_health AS h
                    (last_run_at, last_duration_ms, last_reaped, runs, reaped, errors, last_error,
                     last_error_at, last_pruned_at)
             SELECT now, pg_catalog.round($1::numeric, 3), $2, 1, $2, $3, $4,
                    CASE WHEN $4 IS NOT NULL THEN now END, CASE WHEN $5 THEN now END
               FROM pg_catalog.clock_timestamp() now
             ON CONFLICT (is_health) DO UPDATE
                SET last_run_at = EXCLUDED.last_run_at,
                    last_duration_ms = EXCLUDED.last_duration_ms,
                    last_reaped = EXCLUDED.last_reaped,
                    runs = h.runs + 1,
                    reaped = h.reaped + EXCLUDED.reaped,
                    errors = h.errors + EXCLUDED.errors,
                    last_error = COALESCE(EXCLUDED.last_error, h.last_error),
                    last_error_at = COALESCE(EXCLUDED.last_error_at, h.last_error_at),
                    last_pruned_at = COALESCE(EXCLUDED.last_pruned_at, h.last_pruned_at)",
            c.schema
        )
    },
    &[FLOAT8OID, INT8OID, INT8OID, TEXTOID, BOOLOID],
);

/// Remembers a run.
pub fn record(db: &Db<'_>, run: &Run) -> Result<()> {
    let milliseconds = run.duration.as_seconds_f64() * 1000.0;
    let arguments = [
        milliseconds.into(),
        run.reaped.into(),
        run.errors.into(),
        run.last_error.as_deref().into(),
        run.pruned.into(),
    ];
    db.run(&RECORD, &arguments)?;
    Ok(())
}

static IS_PRUNING_DUE: Statement = Statement::new(
    |c| {
        format!(
            "SELECT NOT EXISTS (SELECT FROM {}.worker_health
                                 WHERE last_pruned_at > pg_catalog.clock_timestamp()
                                                        - pg_catalog.make_interval(secs => $1))",
            c.schema
        )
    },
    &[FLOAT8OID],
);

/// Whether history was last pruned so long ago.
pub fn is_pruning_due(db: &Db<'_>, interval: TimeDelta) -> Result<bool> {
    db.run(&IS_PRUNING_DUE, &[interval.as_seconds_f64().into()])?.first().flag(1)
}

static IS_BUSY: Statement = Statement::new(
    |c| {
        format!(
            "SELECT EXISTS (SELECT FROM {x}.claude_sessions
                             WHERE sd_id IS NOT NULL AND status = 'active')
                 OR EXISTS (SELECT FROM {x}.heartbeat_connections)
                 OR EXISTS (SELECT FROM pg_catalog.pg_prepared_xacts
                             WHERE database = pg_catalog.current_database())",
            x = c.schema
        )
    },
    &[],
);

/// Whether there is anything that time alone may change: an open claim, a connection to beat for, a
/// prepared transaction, whose commit nobody announces.
pub fn is_busy(db: &Db<'_>) -> Result<bool> {
    db.run(&IS_BUSY, &[])?.first().flag(1)
}

static DATABASES: Statement =
    Statement::new(|_| "SELECT oid FROM pg_catalog.pg_database".into(), &[]);

/// The server's databases.
pub fn databases(db: &Db<'_>) -> Result<Vec<pg_sys::Oid>> {
    let mut rows = db.run(&DATABASES, &[])?;
    let mut databases = Vec::new();
    while rows.next().is_some() {
        databases.extend(rows.get::<pg_sys::Oid>(1)?);
    }
    Ok(databases)
}
