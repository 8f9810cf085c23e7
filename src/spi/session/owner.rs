//! Whose a session is.
//!
//! The role's number decides, and its name is for people. A role may be renamed, dropped, or be missing where a
//! dump was restored.

use pgrx::pg_sys::BuiltinOid::{OIDOID, TEXTOID};

use crate::error::Result;
use crate::identity::Role;
use crate::spi::row::Row;
use crate::spi::statement::{Db, Statement};

// In the order of their ids, so that two callers cannot wait for each other. The trigger on the table lets it
// answer the next heartbeat in place of the board.
static ASSIGN: Statement = Statement::new(
    |c| {
        format!(
            "WITH concerned AS MATERIALIZED (
                 SELECT session_id FROM {x}.claude_sessions
                  WHERE owner_oid = $1
                     OR (owner_role = $2::name
                         AND NOT EXISTS (SELECT FROM pg_catalog.pg_roles r WHERE r.oid = owner_oid))
                  ORDER BY session_id
                    FOR NO KEY UPDATE),
                  assigned AS (
                 UPDATE {x}.claude_sessions s
                    SET owner_role = $4::name, owner_oid = $3,
                        updated_at = pg_catalog.clock_timestamp()
                   FROM concerned WHERE s.session_id = concerned.session_id
              RETURNING 1)
             SELECT pg_catalog.count(*) FROM assigned",
            x = c.schema
        )
    },
    &[OIDOID, TEXTOID, OIDOID, TEXTOID],
);

/// Gives all sessions of the role `from`, or of one that is gone and was called so, to another role. Returns
/// how many.
pub fn assign(db: &Db<'_>, from: (Option<Role>, &str), to: (Role, &str)) -> Result<i64> {
    let from_oid = from.0.map(|role| role.0);
    let arguments = [from_oid.into(), from.1.into(), to.0.0.into(), to.1.into()];
    db.run(&ASSIGN, &arguments)?.first().required_bigint(1, "claude_sessions")
}

static FOLLOW_RENAMES: Statement = Statement::new(
    |c| {
        format!(
            "WITH renamed AS MATERIALIZED (
                 SELECT session_id FROM {x}.claude_sessions s
                  WHERE EXISTS (SELECT FROM pg_catalog.pg_roles r
                                 WHERE r.oid = s.owner_oid AND r.rolname <> s.owner_role)
                  ORDER BY session_id
                    FOR NO KEY UPDATE SKIP LOCKED)
             UPDATE {x}.claude_sessions s SET owner_role = r.rolname
               FROM renamed, pg_catalog.pg_roles r
              WHERE s.session_id = renamed.session_id AND r.oid = s.owner_oid",
            x = c.schema
        )
    },
    &[],
);

/// Writes the present names of roles that have been renamed.
pub fn follow_renames(db: &Db<'_>) -> Result<()> {
    db.run(&FOLLOW_RENAMES, &[])?;
    Ok(())
}
