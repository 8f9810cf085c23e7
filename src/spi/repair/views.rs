//! The extension's views, and the function among them.

use super::Report;
use crate::error::{ClaimError, Result};
use crate::pg::backend;
use crate::spi::directive;
use crate::spi::row::Row;
use crate::spi::statement::Db;

/// What the installation makes them by.
const INSTALLATION: [&str; 2] = [
    include_str!("../../../sql/install/40_views.sql"),
    include_str!("../../../sql/install/50_queue.sql"),
];

const COMMENTS: &str = include_str!("../../../sql/install/80_comments.sql");

/// How the installation names the extension's schema.
const SCHEMA: &str = "@extschema@";

/// Those that are made from the binding.
const OF_BACKLOG: [&str; 2] = ["v_directives", "v_directive_keys"];

/// The others, each after what it reads.
const FURTHER: [(&str, &str); 7] = [
    ("VIEW", "v_active_sessions"),
    ("VIEW", "v_worker_health"),
    ("FUNCTION", "sd_blockers"),
    ("VIEW", "v_sd_blockers"),
    ("VIEW", "v_sd_conflicts"),
    ("VIEW", "v_sd_queue"),
    ("VIEW", "v_sd_next"),
];

/// Finds and mends what is wrong with the views. Returns whether those of the backlog are right now.
pub fn mend(db: &Db<'_>, report: &mut Report) -> Result<bool> {
    let schema = db.catalog()?.schema.clone();
    let mut are_right = true;
    let mut wrong = Vec::new();
    for (view, body) in OF_BACKLOG.into_iter().zip(directive::view_bodies(db)?) {
        match (definition(db, &schema, view)?, would_be(db, &body)?) {
            (None, _) => wrong.push((view, "the view is missing")),
            (is, wanted) if is != wanted => {
                wrong.push((view, "the view is another one than binding makes"));
            }
            _ => {}
        }
    }
    let mut is_rebuilt = false;
    for (view, finding) in wrong {
        let is_missing = finding == "the view is missing";
        are_right &= !report.is_dry_run;
        report.mend("view", view, finding, "the view is made anew", || {
            if !is_rebuilt {
                directive::rebuild_views(db)?;
                is_rebuilt = true;
            }
            if is_missing {
                take_in(db, &schema, "VIEW", view, view)?;
            }
            Ok(true)
        })?;
    }
    for (kind, name) in FURTHER {
        if exists(db, &schema, kind, name)? {
            continue;
        }
        let finding = format!("the {} is missing", kind.to_ascii_lowercase());
        let action = format!("the {} is made anew", kind.to_ascii_lowercase());
        report.mend("view", name, finding, action, || {
            make(db, &schema, kind, name)?;
            Ok(true)
        })?;
    }
    Ok(are_right)
}

/// Makes those that are missing: they go without a word where a column that they read goes with a session.
pub fn make_missing(db: &Db<'_>) -> Result<()> {
    let catalog = db.catalog()?;
    let schema = catalog.schema.clone();
    let mut missing = Vec::new();
    for view in OF_BACKLOG {
        if !exists(db, &schema, "VIEW", view)? {
            missing.push(view);
        }
    }
    if !missing.is_empty() {
        directive::rebuild_views(db)?;
        // Everybody learns of a change of the backlog by that of the view, and of this one by a table that stays.
        backend::invalidate(catalog.sessions);
    }
    for view in missing {
        take_in(db, &schema, "VIEW", view, view)?;
    }
    for (kind, name) in FURTHER {
        if !exists(db, &schema, kind, name)? {
            make(db, &schema, kind, name)?;
        }
    }
    Ok(())
}

/// The server's text of a view, if it is there.
fn definition(db: &Db<'_>, schema: &str, view: &str) -> Result<Option<String>> {
    let name = format!("{schema}.{view}");
    let rows = db.run_once(
        "SELECT pg_catalog.pg_get_viewdef(pg_catalog.to_regclass($1)::oid)",
        &[name.into()],
    )?;
    rows.first().text(1)
}

/// The server's text of a view of that body.
fn would_be(db: &Db<'_>, body: &str) -> Result<Option<String>> {
    const LIKENESS: &str = "pg_claims_likeness_of_a_view";
    db.run_once(&format!("CREATE TEMPORARY VIEW {LIKENESS} AS {body}"), &[])?;
    let found = definition(db, "pg_temp", LIKENESS)?;
    db.run_once(&format!("DROP VIEW pg_temp.{LIKENESS}"), &[])?;
    Ok(found)
}

fn exists(db: &Db<'_>, schema: &str, kind: &str, name: &str) -> Result<bool> {
    let name = format!("{schema}.{name}");
    let question = match kind {
        "VIEW" => "SELECT pg_catalog.to_regclass($1) IS NOT NULL",
        _ => "SELECT pg_catalog.to_regproc($1) IS NOT NULL",
    };
    db.run_once(question, &[name.into()])?.first().flag(1)
}

/// Makes a view or function as the installation does.
fn make(db: &Db<'_>, schema: &str, kind: &str, name: &str) -> Result<()> {
    let begin = match kind {
        "VIEW" => format!("CREATE VIEW {SCHEMA}.{name} AS"),
        _ => format!("CREATE FUNCTION {SCHEMA}.{name}("),
    };
    let end = if kind == "VIEW" { ";\n" } else { "END;\n" };
    let statement = INSTALLATION
        .iter()
        .find_map(|script| cut(script, &begin, end))
        .ok_or(ClaimError::Corrupt { what: "the installation script" })?;
    db.run_once(&statement.replace(SCHEMA, schema), &[])?;
    let signature = match kind {
        "VIEW" => name.to_owned(),
        _ => format!("{name}(text, jsonb)"),
    };
    take_in(db, schema, kind, name, &signature)
}

/// Makes a new view or function one of the extension's, with its comment, for those who may see the backlog.
fn take_in(db: &Db<'_>, schema: &str, kind: &str, name: &str, signature: &str) -> Result<()> {
    let run = |statement: String| db.run_once(&statement, &[]).map(|_| ());
    run(format!("ALTER EXTENSION pg_claims ADD {kind} {schema}.{signature}"))?;
    run(format!("REVOKE ALL ON {} {schema}.{signature} FROM PUBLIC", on(kind)))?;
    if let Some(comment) = cut(COMMENTS, &format!("COMMENT ON {kind} {name}"), ";\n") {
        let begin = format!("COMMENT ON {kind} ");
        run(comment.replacen(&begin, &format!("{begin}{schema}."), 1))?;
    }
    let mut rows = db.run_once(
        "SELECT DISTINCT pg_catalog.quote_ident(r.rolname)
           FROM pg_catalog.pg_proc p
          CROSS JOIN LATERAL pg_catalog.aclexplode(p.proacl) a
           JOIN pg_catalog.pg_roles r ON r.oid = a.grantee
          WHERE p.oid = pg_catalog.to_regprocedure($1) AND a.grantee <> p.proowner",
        &[format!("{schema}.is_sd_claimed(text, text)").into()],
    )?;
    let mut viewers = Vec::new();
    while rows.next().is_some() {
        viewers.push(rows.required_text(1, "pg_roles.rolname")?);
    }
    let privilege = if kind == "VIEW" { "SELECT" } else { "EXECUTE" };
    for viewer in viewers {
        run(format!("GRANT {privilege} ON {} {schema}.{signature} TO {viewer}", on(kind)))?;
    }
    Ok(())
}

fn on(kind: &str) -> &str {
    if kind == "VIEW" { "TABLE" } else { kind }
}

/// The part of a script from `begin` to the first `end` after it.
fn cut<'a>(script: &'a str, begin: &str, end: &str) -> Option<&'a str> {
    let rest = &script[script.find(begin)?..];
    let end_at = rest.find(end)? + end.len();
    Some(rest[..end_at].trim_end().trim_end_matches(';'))
}
