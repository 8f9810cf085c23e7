//! Code that a table's owner could have the extension run.
//!
//! Whoever plans a statement on a table evaluates what its indexes and constraints say, with their own
//! rights; the extension's functions do so with those of its owner, a superuser. So a backlog must have
//! no code there but the server's, an installed extension's or another superuser's.

use pgrx::pg_sys;

use crate::error::Result;
use crate::spi::row::Row;
use crate::spi::statement::Db;

/// A function, operator or domain of an ordinary role's that an index, a constraint, extended statistics or
/// the partitioning of the table uses, described. Or the table itself or a partition, if it is not a table but
/// a view or a foreign table, which it may have become after it was bound: reading it runs what its owner
/// pleases. None of tables that are a superuser's.
pub fn untrusted(db: &Db<'_>, table: pg_sys::Oid) -> Result<Option<String>> {
    let rows = db.ask(
        concat!("WITH RECURSIVE ", partitions!(), ",
              tables AS (
             SELECT c.oid, c.relkind
               FROM (SELECT $1 AS oid UNION SELECT oid FROM partitions) t
               JOIN pg_catalog.pg_class c ON c.oid = t.oid
               JOIN pg_catalog.pg_roles r ON r.oid = c.relowner AND NOT r.rolsuper),
              users AS (
             SELECT 'pg_catalog.pg_class'::pg_catalog.regclass::oid AS classid, i.indexrelid AS objid
               FROM pg_catalog.pg_index i JOIN tables t ON t.oid = i.indrelid
              UNION ALL
             SELECT 'pg_catalog.pg_class'::pg_catalog.regclass::oid, t.oid FROM tables t
              UNION ALL
             SELECT 'pg_catalog.pg_constraint'::pg_catalog.regclass::oid, c.oid
               FROM pg_catalog.pg_constraint c JOIN tables t ON t.oid = c.conrelid
              UNION ALL
             SELECT 'pg_catalog.pg_statistic_ext'::pg_catalog.regclass::oid, s.oid
               FROM pg_catalog.pg_statistic_ext s JOIN tables t ON t.oid = s.stxrelid),
              used AS (
             SELECT d.refclassid, d.refobjid,
                    COALESCE(p.proowner, o.oprowner, y.typowner) AS owner
               FROM users u
               JOIN pg_catalog.pg_depend d ON d.classid = u.classid AND d.objid = u.objid
               LEFT JOIN pg_catalog.pg_proc p
                 ON d.refclassid = 'pg_catalog.pg_proc'::pg_catalog.regclass AND p.oid = d.refobjid
               LEFT JOIN pg_catalog.pg_operator o
                 ON d.refclassid = 'pg_catalog.pg_operator'::pg_catalog.regclass AND o.oid = d.refobjid
               LEFT JOIN pg_catalog.pg_type y
                 ON d.refclassid = 'pg_catalog.pg_type'::pg_catalog.regclass AND y.oid = d.refobjid
                AND y.typtype = 'd')
         SELECT pg_catalog.pg_describe_object(used.refclassid, used.refobjid, 0)
           FROM used
           JOIN pg_catalog.pg_roles owner ON owner.oid = used.owner AND NOT owner.rolsuper
          UNION ALL
         SELECT pg_catalog.pg_describe_object('pg_catalog.pg_class'::pg_catalog.regclass, t.oid, 0)
           FROM tables t WHERE t.relkind NOT IN ('r', 'p')
          LIMIT 1"),
        &[table.into()],
    )?;
    if rows.is_empty() { Ok(None) } else { rows.first().text(1) }
}
