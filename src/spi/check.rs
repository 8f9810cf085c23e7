//! What the doctor looks at.

use chrono::TimeDelta;
use pg_claims_core::check::Facts;

use super::claim::contradiction;
use super::row::Row;
use super::statement::{Db, Statement};
use super::table::{Name, Table, layout};
use super::{catalog, directive, foreign};
use crate::board;
use crate::error::Result;
use crate::guc;
use crate::pg::time;

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

// Of the tables that belong to the extension and whose rows pg_dump writes.
const PARTS: &str = "
    SELECT c.relname::text, p.kind, p.name
      FROM pg_catalog.pg_extension e
     CROSS JOIN LATERAL pg_catalog.unnest(e.extconfig) AS dumped (oid)
      JOIN pg_catalog.pg_class c ON c.oid = dumped.oid AND c.relkind = 'r'
     CROSS JOIN LATERAL (
           SELECT 'column', a.attname::text FROM pg_catalog.pg_attribute a
            WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
            UNION ALL
           SELECT 'trigger', t.tgname::text FROM pg_catalog.pg_trigger t
            WHERE t.tgrelid = c.oid AND NOT t.tgisinternal
            UNION ALL
           SELECT 'constraint', k.conname::text FROM pg_catalog.pg_constraint k
            WHERE k.conrelid = c.oid AND k.contype NOT IN ('n', 't')
            UNION ALL
           SELECT 'index', i.relname::text FROM pg_catalog.pg_index x
             JOIN pg_catalog.pg_class i ON i.oid = x.indexrelid
            WHERE x.indrelid = c.oid
              AND NOT EXISTS (SELECT FROM pg_catalog.pg_constraint k WHERE k.conindid = i.oid
                                 AND k.conrelid = c.oid AND k.contype IN ('p', 'u', 'x'))
            UNION ALL
           SELECT 'rule', r.rulename::text FROM pg_catalog.pg_rewrite r WHERE r.ev_class = c.oid
            UNION ALL
           SELECT 'policy', y.polname::text FROM pg_catalog.pg_policy y WHERE y.polrelid = c.oid
           ) p (kind, name)
     WHERE e.extname = 'pg_claims'
     ORDER BY 1, 2, 3";

/// What somebody has added to the tables, in words.
fn additions(db: &Db<'_>) -> Result<Vec<String>> {
    let mut rows = db.ask(PARTS, &[])?;
    let mut additions = Vec::new();
    while rows.next().is_some() {
        let (table, kind) =
            (rows.required_text(1, "pg_class")?, rows.required_text(2, "pg_class")?);
        let name = rows.required_text(3, "pg_class")?;
        if !layout::is_made(&table, &kind, &name) {
            additions.push(format!("{kind} \"{name}\" of {table}"));
        }
    }
    Ok(additions)
}

/// So many contradictions of a kind are counted.
const MOST_TOLD: i32 = 1000;

/// Whether the view of the backlog reads the backlog in use, if there is one. It may not where the binding was written
/// past its trigger.
fn is_backlog_seen(db: &Db<'_>) -> Result<bool> {
    let catalog = db.catalog()?;
    let Some(backlog) = &catalog.backlog else { return Ok(true) };
    let view = format!("{}.v_directives", catalog.schema);
    let found = db.ask(
        "SELECT 1 FROM pg_catalog.pg_rewrite r
           JOIN pg_catalog.pg_depend d
             ON d.classid = 'pg_catalog.pg_rewrite'::pg_catalog.regclass AND d.objid = r.oid
            AND d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.refobjid = $2
          WHERE r.ev_class = pg_catalog.to_regclass($1)::oid LIMIT 1",
        &[view.into(), backlog.table_oid.into()],
    )?;
    Ok(!found.is_empty())
}

/// Gathers the facts.
pub fn facts(db: &Db<'_>) -> Result<Facts> {
    let usable = catalog::usable_backlog(db);
    let (broken_tables, changed_tables) = tables(db)?;
    let mut facts = Facts {
        at: time::now(),
        foreign_code: foreign::code(db)?.of_ordinary_role,
        is_worker_on: guc::worker(),
        reap_interval: guc::reap_interval(),
        due: None,
        last_error: None,
        board: board::fullness(),
        broken_tables,
        changed_tables,
        additions: additions(db)?,
        oldest: None,
        out_of_step: None,
        contradictions: None,
        unusable_backlog: usable.err().map(|error| error.to_string()),
    };
    if facts.unusable_backlog.is_none() && !is_backlog_seen(db)? {
        facts.unusable_backlog = Some(
            "v_directives does not read it; coordination_repair(false) makes the view anew".into(),
        );
    }
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
        let contradictory = contradiction::contradictory(db, "", MOST_TOLD)?.len();
        let stranded = contradiction::stranded(db, 0, MOST_TOLD)?.len();
        facts.contradictions = Some(contradictory + stranded);
    }
    Ok(facts)
}

/// The tables that cannot be used, and those that are not read by index, or not always.
fn tables(db: &Db<'_>) -> Result<(Vec<&'static str>, Vec<&'static str>)> {
    let catalog = db.catalog()?;
    let is_own_used = catalog.uses_own_backlog();
    let (mut broken, mut changed) = (Vec::new(), Vec::new());
    for name in Name::ALL {
        let is_backlog = name == Name::Directives;
        if is_backlog && !catalog.is_own_backlog_in_use {
            // Statements can do without all that.
            changed.extend(is_own_used.then_some(name.layout().name));
        } else if catalog.table(name).is_none() {
            broken.push(name.layout().name);
        } else if !Table::to_read(db, name)?.has_all_indexes() {
            changed.push(name.layout().name);
        }
    }
    Ok((broken, changed))
}
