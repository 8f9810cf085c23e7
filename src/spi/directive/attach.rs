//! What a backlog needs around it: the views that normalise it, and triggers on the table.

use super::Backlog;
use super::columns::quoted;
use super::indexes;
use super::partitions::{self, with_partitions};
use crate::error::Result;
use crate::spi::statement::Db;
use crate::worker::wake;

/// The triggers on a backlog, apart from the schema of their functions. The server fires triggers
/// in the order of their names: the two that keep the mirror come last among the BEFORE triggers,
/// so that no trigger of the user's can change the mirror behind them.
pub const TRIGGERS: [&str; 7] = [
    "pg_claims_finished",
    "pg_claims_deleted",
    "pg_claims_truncated",
    "zz_pg_claims_mirror_insert",
    "zz_pg_claims_mirror_update",
    "zz_pg_claims_mirror_inserted",
    "zz_pg_claims_mirror_renamed",
];

/// (Re)builds `v_directives` and `v_directive_keys` for the backlog in use.
pub fn rebuild_views(db: &Db<'_>) -> Result<()> {
    let schema = db.catalog()?.schema.clone();
    for (view, body) in ["v_directives", "v_directive_keys"].into_iter().zip(view_bodies(db)?) {
        db.run_once(&format!("CREATE OR REPLACE VIEW {schema}.{view} AS {body}"), &[])?;
    }
    Ok(())
}

/// What `v_directives` and `v_directive_keys` are made of for the backlog in use.
pub fn view_bodies(db: &Db<'_>) -> Result<[String; 2]> {
    let schema = db.catalog()?.schema.clone();
    let own_backlog = db.catalog()?.own_backlog;
    // Read afresh: the binding was written by the very statement that this runs for.
    Ok(match Backlog::read(db, &schema, own_backlog)? {
        Some(b) => [view_of(&b, &schema), b.by_key(|key| format!("{key} IS NOT NULL"))],
        None => [
            "SELECT NULL::text AS sd_id, NULL::text AS title, NULL::text AS status,
                    NULL::text AS priority, NULL::text AS track, NULL::numeric AS rank,
                    NULL::jsonb AS dependencies, NULL::text AS parent_sd_id,
                    NULL::timestamptz AS created_at, NULL::boolean AS is_working_on,
                    NULL::text AS active_session_id, NULL::boolean AS is_terminal,
                    NULL::numeric AS priority_order
              WHERE false"
                .into(),
            "SELECT NULL::text AS key, NULL::text AS sd_id, NULL::text AS status,
                    NULL::boolean AS is_terminal, NULL::integer AS precedence
              WHERE false"
                .into(),
        ],
    })
}

fn view_of(b: &Backlog, schema: &str) -> String {
    let c = &b.columns;
    let column = |column: &Option<String>, sql_type: &str| {
        column.as_ref().map_or_else(
            || format!("NULL::{sql_type}"),
            |name| format!("{}::{sql_type}", quoted("b.", name)),
        )
    };
    let dependencies = b.dependencies(schema);
    // A backlog that lacks a mirror column shows the claims themselves.
    let holder = format!(
        "(SELECT s.session_id FROM {schema}.claude_sessions s
           WHERE s.sd_id = {} AND s.sd_id IS NOT NULL AND s.status = 'active')",
        b.canonical()
    );
    let is_working_on = match &c.is_working_on {
        Some(_) => format!("COALESCE({}, false)", column(&c.is_working_on, "boolean")),
        None => format!("{holder} IS NOT NULL"),
    };
    let active_session_id = match &c.active_session_id {
        Some(_) => column(&c.active_session_id, "text"),
        None => holder,
    };
    let order = b.order("b.");
    format!(
        "SELECT {id} AS sd_id, {title} AS title, {status} AS status, {priority} AS priority,
                {track} AS track, {rank} AS rank, {dependencies} AS dependencies,
                {parent} AS parent_sd_id, {created_at} AS created_at,
                {is_working_on} AS is_working_on, {active_session_id} AS active_session_id,
                {is_terminal} AS is_terminal, {priority_order} AS priority_order
           FROM {table} b WHERE {id} IS NOT NULL",
        id = b.canonical(),
        title = b.text(&c.title),
        status = b.status(),
        priority = b.text(&c.priority),
        track = b.text(&c.track),
        rank = order.rank,
        created_at = order.created_at,
        priority_order = order.priority,
        parent = b.text(&c.parent),
        is_terminal = b.is_terminal_in_view(),
        table = b.from,
    )
}

/// Puts the triggers on a backlog.
pub fn attach_triggers(db: &Db<'_>, backlog: &Backlog, schema: &str) -> Result<()> {
    let [finished, deleted, truncated, mirror_insert, mirror_update, inserted, renamed] = TRIGGERS;
    let c = &backlog.columns;
    let create = |name: &str, event: &str, each: &str, function: &str| {
        let table = &backlog.table;
        let sql = format!(
            "CREATE TRIGGER {name} {event} ON {table} FOR EACH {each} EXECUTE FUNCTION {schema}.{function}()"
        );
        db.run_once(&sql, &[]).map(|_| ())
    };
    // WHEN, not a column list: a BEFORE trigger of the user's may change a column that the
    // statement does not name.
    let mut watched = vec![(c.canonical("OLD."), c.canonical("NEW."))];
    watched.extend(backlog.status_value("OLD.").zip(backlog.status_value("NEW.")));
    let changed = format!("ROW WHEN ({})", differ(&watched));
    create(finished, "AFTER UPDATE", &changed, "release_finished_directive")?;
    create(deleted, "AFTER DELETE", "ROW", "release_finished_directive")?;
    for table in with_partitions(db, backlog.table_oid)? {
        db.run_once(
            &format!(
                "CREATE TRIGGER {truncated} AFTER TRUNCATE ON {table} FOR EACH STATEMENT
                 EXECUTE FUNCTION {schema}.release_truncated_directives()"
            ),
            &[],
        )?;
    }

    let mirror: Vec<_> = [&c.is_working_on, &c.active_session_id]
        .into_iter()
        .flatten()
        .map(|column| old_and_new(column))
        .collect();
    if mirror.is_empty() {
        return Ok(());
    }
    // Also for writes of other triggers; the extension announces its own.
    create(mirror_insert, "BEFORE INSERT", "ROW", "keep_directive_mirror")?;
    let rewritten = format!("ROW WHEN ({})", differ(&mirror));
    create(mirror_update, "BEFORE UPDATE", &rewritten, "keep_directive_mirror")?;

    // Where the key's uniqueness can be deferred, a row of the same key is waited for when the transaction
    // commits.
    let (when, each) = if has_deferrable_keys(db, backlog)? {
        ("CONSTRAINT TRIGGER", "DEFERRABLE INITIALLY DEFERRED FOR EACH ROW")
    } else {
        ("TRIGGER", "FOR EACH ROW")
    };
    let works = [
        c.is_working_on.iter().map(|name| format!("NEW.{}", quoted("", name))).collect::<Vec<_>>(),
        c.active_session_id
            .iter()
            .map(|name| format!("NEW.{} IS NOT NULL", quoted("", name)))
            .collect(),
    ]
    .concat()
    .join(" OR ");
    let renames = differ(&[(c.canonical("OLD."), c.canonical("NEW."))]);
    for (name, event, condition) in
        [(inserted, "AFTER INSERT", works), (renamed, "AFTER UPDATE", renames)]
    {
        db.run_once(
            &format!(
                "CREATE {when} {name} {event} ON {} {each} WHEN ({condition})
                 EXECUTE FUNCTION {schema}.correct_directive_mirror()",
                backlog.table
            ),
            &[],
        )?;
    }
    Ok(())
}

fn has_deferrable_keys(db: &Db<'_>, backlog: &Backlog) -> Result<bool> {
    let found = db.run_once(
        "SELECT 1 FROM pg_catalog.pg_index WHERE indrelid = $1 AND indisunique AND NOT indimmediate",
        &[backlog.table_oid.into()],
    )?;
    Ok(!found.is_empty())
}

/// A column in a trigger's two rows.
fn old_and_new(column: &str) -> (String, String) {
    let column = pgrx::spi::quote_identifier(column);
    (format!("OLD.{column}"), format!("NEW.{column}"))
}

fn differ(pairs: &[(String, String)]) -> String {
    let differences: Vec<_> =
        pairs.iter().map(|(old, new)| format!("{old} IS DISTINCT FROM {new}")).collect();
    differences.join(" OR ")
}

/// Makes the triggers of a user's table go by themselves when the extension is dropped.
pub fn tie_triggers_to_extension(db: &Db<'_>, backlog: &Backlog) -> Result<()> {
    for (trigger, table) in triggers_on(db, backlog)? {
        db.run_once(
            &format!("ALTER TRIGGER {trigger} ON {table} DEPENDS ON EXTENSION pg_claims"),
            &[],
        )?;
    }
    Ok(())
}

/// Takes the triggers off a backlog.
pub fn detach_triggers(db: &Db<'_>, backlog: &Backlog) -> Result<()> {
    for (trigger, table) in triggers_on(db, backlog)? {
        db.run_once(&format!("DROP TRIGGER {trigger} ON {table}"), &[])?;
    }
    Ok(())
}

/// Makes the triggers of the backlog in use anew.
pub fn renew_triggers(db: &Db<'_>, backlog: &Backlog) -> Result<()> {
    let catalog = db.catalog()?;
    detach_triggers(db, backlog)?;
    attach_triggers(db, backlog, &catalog.schema)?;
    if catalog.uses_own_backlog() { Ok(()) } else { tie_triggers_to_extension(db, backlog) }
}

fn triggers_on(db: &Db<'_>, backlog: &Backlog) -> Result<Vec<(String, String)>> {
    partitions::triggers_on(db, backlog.table_oid, &TRIGGERS)
}

/// At installation: the views, and the triggers and indexes of the extension's own backlog.
pub fn attach_own(db: &Db<'_>) -> Result<()> {
    // So that the worker learns of this database.
    wake::at_commit();
    rebuild_views(db)?;
    let catalog = db.catalog()?;
    if let Some(backlog) = &catalog.backlog {
        attach_triggers(db, backlog, &catalog.schema)?;
        for index in indexes::of_own(backlog) {
            let (name, definition) = (&index.name, &index.definition);
            db.run_once(&format!("CREATE INDEX {name} ON {} {definition}", backlog.table), &[])?;
        }
    }
    Ok(())
}
