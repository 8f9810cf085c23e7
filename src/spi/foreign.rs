//! Code of others on the extension's own tables.
//!
//! A trigger runs with the rights of whoever writes the table, which inside the functions are those of the extension's
//! owner; so do, before PostgreSQL 18, the triggers of a table to which a foreign key passes a write on. So none may be
//! there that is a role's of less, nor that uses anything of such a role's.

use pgrx::pg_sys;

use super::row::Row;
use super::statement::Db;
use super::table::layout;
use crate::error::{ClaimError, Result};
use crate::identity::Role;

/// What is looked for, as `(classid, objid, relation, told)`: triggers on the extension's tables, and foreign keys onto them,
/// that are or use something of a role that has not the rights of the extension's owner.
macro_rules! found {
    () => {
        "WITH own AS (
             SELECT d.objid AS relation, e.extowner
               FROM pg_catalog.pg_extension e
               JOIN pg_catalog.pg_depend d
                 ON d.refclassid = 'pg_catalog.pg_extension'::pg_catalog.regclass AND d.refobjid = e.oid
                AND d.deptype = 'e' AND d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass
              WHERE e.extname = 'pg_claims'),
         triggers AS (
             SELECT t.*, o.extowner FROM own o JOIN pg_catalog.pg_trigger t ON t.tgrelid = o.relation
              WHERE NOT t.tgisinternal),
         used AS (
             SELECT t.oid, t.tgname, t.tgrelid, t.extowner,
                    'pg_catalog.pg_proc'::pg_catalog.regclass AS classid, t.tgfoid AS objid
               FROM triggers t
              UNION
             SELECT t.oid, t.tgname, t.tgrelid, t.extowner, d.refclassid, d.refobjid
               FROM triggers t
               JOIN pg_catalog.pg_depend d
                 ON d.classid = 'pg_catalog.pg_trigger'::pg_catalog.regclass AND d.objid = t.oid),
         found (classid, objid, relation, passes_on, told) AS (
             SELECT 'pg_catalog.pg_trigger'::pg_catalog.regclass, u.oid, u.tgrelid, true,
                    pg_catalog.format('trigger %I on table %s uses %s of role %I', u.tgname,
                                      u.tgrelid::pg_catalog.regclass,
                                      pg_catalog.pg_describe_object(u.classid, u.objid, 0), r.rolname)
               FROM used u
               LEFT JOIN pg_catalog.pg_proc p
                 ON u.classid = 'pg_catalog.pg_proc'::pg_catalog.regclass AND p.oid = u.objid
               LEFT JOIN pg_catalog.pg_operator o
                 ON u.classid = 'pg_catalog.pg_operator'::pg_catalog.regclass AND o.oid = u.objid
               LEFT JOIN pg_catalog.pg_type y
                 ON u.classid = 'pg_catalog.pg_type'::pg_catalog.regclass AND y.oid = u.objid
               JOIN pg_catalog.pg_roles r ON r.oid = COALESCE(p.proowner, o.oprowner, y.typowner)
              WHERE NOT pg_catalog.pg_has_role(r.oid, u.extowner, 'USAGE')
              UNION ALL
             SELECT 'pg_catalog.pg_constraint'::pg_catalog.regclass, k.oid, k.conrelid,
                    k.confdeltype NOT IN ('a', 'r') OR k.confupdtype NOT IN ('a', 'r'),
                    pg_catalog.format('foreign key %I of table %s of role %I refers to table %s', k.conname,
                                      k.conrelid::pg_catalog.regclass, r.rolname, k.confrelid::pg_catalog.regclass)
               FROM own o
               JOIN pg_catalog.pg_constraint k ON k.contype = 'f' AND k.confrelid = o.relation
               JOIN pg_catalog.pg_class c ON c.oid = k.conrelid
               JOIN pg_catalog.pg_roles r ON r.oid = c.relowner
              WHERE NOT pg_catalog.pg_has_role(r.oid, o.extowner, 'USAGE'))"
    };
}

/// The code that runs when one of the extension's tables is written, and is not the extension's.
#[derive(Default)]
pub struct Code {
    /// A definition by which code of somebody's would run who has not the rights of the extension's owner, described.
    pub of_ordinary_role: Option<String>,
    /// The tables whose writes run more than what the installation script has put there: a trigger, a CHECK, a foreign key from
    /// or to it, a generated column, an expression of an index, or what those of the script's use by now. And those with
    /// deferrable constraints, or with row-level security, which asks who writes. Of defaults the writer itself knows.
    pub tables: Vec<pg_sys::Oid>,
}

/// Looks for it.
pub fn code(db: &Db<'_>) -> Result<Code> {
    let mut rows = db.ask(
        concat!(
            found!(),
            ", part (relation, classid, objid, kind, name) AS (
                 SELECT t.tgrelid, 'pg_catalog.pg_trigger'::pg_catalog.regclass::pg_catalog.oid, t.oid, 'trigger', t.tgname
                   FROM triggers t
                  UNION ALL
                 SELECT o.relation, 'pg_catalog.pg_constraint'::pg_catalog.regclass::pg_catalog.oid, k.oid, 'constraint',
                        k.conname
                   FROM own o JOIN pg_catalog.pg_constraint k ON k.conrelid = o.relation AND k.contype = 'c'
                  UNION ALL
                 SELECT o.relation, 'pg_catalog.pg_class'::pg_catalog.regclass::pg_catalog.oid, i.indexrelid,
                        CASE WHEN i.indexprs IS NOT NULL OR i.indpred IS NOT NULL THEN 'index' ELSE 'plain index' END,
                        c.relname
                   FROM own o
                   JOIN pg_catalog.pg_index i ON i.indrelid = o.relation
                   JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid),
             member AS (
                 SELECT d.classid, d.objid FROM pg_catalog.pg_extension e
                   JOIN pg_catalog.pg_depend d
                     ON d.refclassid = 'pg_catalog.pg_extension'::pg_catalog.regclass AND d.refobjid = e.oid
                    AND d.deptype = 'e'
                  WHERE e.extname = 'pg_claims')
             SELECT told, NULL::pg_catalog.oid, NULL, NULL, NULL
               FROM (SELECT told FROM found WHERE passes_on ORDER BY 1 LIMIT 1) f
              UNION ALL
             SELECT NULL, p.relation, c.relname::text, p.kind, p.name::text
               FROM part p JOIN pg_catalog.pg_class c ON c.oid = p.relation
              UNION ALL
             SELECT NULL, p.relation, NULL, NULL, NULL FROM part p
               JOIN pg_catalog.pg_depend d ON d.classid = p.classid AND d.objid = p.objid
              WHERE d.refclassid IN ('pg_catalog.pg_proc'::pg_catalog.regclass,
                                     'pg_catalog.pg_operator'::pg_catalog.regclass,
                                     'pg_catalog.pg_opclass'::pg_catalog.regclass,
                                     'pg_catalog.pg_opfamily'::pg_catalog.regclass,
                                     'pg_catalog.pg_type'::pg_catalog.regclass)
                AND NOT EXISTS (SELECT FROM member m WHERE m.classid = d.refclassid AND m.objid = d.refobjid)
              UNION ALL
             SELECT NULL, o.relation, NULL, NULL, NULL FROM own o
               JOIN pg_catalog.pg_constraint k ON k.conrelid = o.relation AND (k.contype = 'f' OR k.condeferrable)
              UNION ALL
             SELECT NULL, o.relation, NULL, NULL, NULL FROM own o
               JOIN pg_catalog.pg_constraint k ON k.confrelid = o.relation AND k.contype = 'f'
              UNION ALL
             SELECT NULL, o.relation, NULL, NULL, NULL FROM own o
               JOIN pg_catalog.pg_attribute a ON a.attrelid = o.relation AND a.attgenerated <> ''
              UNION ALL
             SELECT NULL, o.relation, NULL, NULL, NULL FROM own o
               JOIN pg_catalog.pg_class c ON c.oid = o.relation AND c.relrowsecurity"
        ),
        &[],
    )?;
    let mut code = Code::default();
    while rows.next().is_some() {
        code.of_ordinary_role = code.of_ordinary_role.or(rows.text(1)?);
        let Some(table) = rows.get::<pg_sys::Oid>(2)? else { continue };
        let is_made = match (rows.text(3)?, rows.text(4)?, rows.text(5)?) {
            (Some(name), Some(kind), Some(part)) => {
                kind == "plain index" || layout::is_made(&name, &kind, &part)
            }
            _ => false,
        };
        if !is_made && !code.tables.contains(&table) {
            code.tables.push(table);
        }
    }
    code.tables.sort_by_key(|table| table.to_u32());
    Ok(code)
}

/// Error 42501 where the command that has just been executed has made such a definition, or a foreign key by which others
/// would keep old rows from being removed; the backlog's are not. And where `caller`, who has not the rights of the
/// extension's owner, has made any trigger: the server's own functions run what they are told. In an event trigger only.
pub fn check_command(db: &Db<'_>, caller: Role) -> Result<()> {
    let made = concat!(
        found!(),
        ", command AS (SELECT classid, objid FROM pg_catalog.pg_event_trigger_ddl_commands())
         SELECT f.told FROM found f
           LEFT JOIN pg_catalog.pg_constraint k
             ON f.classid = 'pg_catalog.pg_constraint'::pg_catalog.regclass AND k.oid = f.objid
           LEFT JOIN pg_catalog.pg_class c ON c.oid = k.confrelid
          WHERE EXISTS (SELECT FROM command m
                         WHERE (m.classid, m.objid) IN ((f.classid, f.objid),
                               ('pg_catalog.pg_class'::pg_catalog.regclass, f.relation)))
            AND (f.passes_on OR c.relname <> 'strategic_directives_v2')
          ORDER BY 1 LIMIT 1"
    );
    const BY_CALLER: &str =
        "SELECT pg_catalog.format('trigger %I on table %s was made by role %I', t.tgname,
                                  t.tgrelid::pg_catalog.regclass, pg_catalog.pg_get_userbyid($1))
           FROM pg_catalog.pg_event_trigger_ddl_commands() m
           JOIN pg_catalog.pg_trigger t
             ON m.classid = 'pg_catalog.pg_trigger'::pg_catalog.regclass AND t.oid = m.objid
           JOIN pg_catalog.pg_depend d
             ON d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.objid = t.tgrelid
            AND d.refclassid = 'pg_catalog.pg_extension'::pg_catalog.regclass AND d.deptype = 'e'
           JOIN pg_catalog.pg_extension e ON e.oid = d.refobjid AND e.extname = 'pg_claims'
          WHERE NOT pg_catalog.pg_has_role($1, e.extowner, 'USAGE')";
    let rows = db.ask(BY_CALLER, &[caller.0.into()])?;
    let by_caller = if rows.is_empty() { None } else { rows.first().text(1)? };
    match by_caller.map_or_else(|| first(db, made), |code| Ok(Some(code)))? {
        None => Ok(()),
        Some(code) => Err(ClaimError::ForeignCode { code }),
    }
}

fn first(db: &Db<'_>, question: &'static str) -> Result<Option<String>> {
    let rows = db.ask(question, &[])?;
    if rows.is_empty() { Ok(None) } else { rows.first().text(1) }
}
