//! How many sessions and claims a role may have.
//!
//! A quota counts what is committed, so that several sessions that come at the same moment may exceed it by as many. It keeps
//! one role from taking everything. That needs no exact limit, and nobody has to wait.

use pg_claims_core::refusal::{Quota, Refusal};
use pgrx::pg_sys::BuiltinOid::{INT8OID, OIDOID};

use super::grant;
use super::row::Row;
use super::statement::{Db, Statement};
use crate::error::Result;
use crate::guc;
use crate::identity::Role;

static SESSIONS: Statement = Statement::new(
    |c| {
        format!(
            "SELECT pg_catalog.count(*)
               FROM (SELECT FROM {}.claude_sessions
                      WHERE owner_oid = $1 AND status <> 'released' LIMIT $2) counted",
            c.schema
        )
    },
    &[OIDOID, INT8OID],
);

static CLAIMS: Statement = Statement::new(
    |c| {
        format!(
            "SELECT pg_catalog.count(*)
               FROM (SELECT FROM {}.claude_sessions
                      WHERE owner_oid = $1 AND sd_id IS NOT NULL AND status = 'active' LIMIT $2) counted",
            c.schema
        )
    },
    &[OIDOID, INT8OID],
);

/// Why the role may not register another session, if that is so.
pub fn refuse_session(db: &Db<'_>, role: Role) -> Result<Option<Refusal>> {
    refuse(db, role, Quota::Sessions, guc::max_sessions_per_role(), &SESSIONS)
}

/// Why none of the role's sessions may claim another SD, if that is so.
pub fn refuse_claim(db: &Db<'_>, role: Role) -> Result<Option<Refusal>> {
    refuse(db, role, Quota::Claims, guc::max_claims_per_role(), &CLAIMS)
}

fn refuse(
    db: &Db<'_>,
    role: Role,
    quota: Quota,
    most: Option<i32>,
    count: &'static Statement,
) -> Result<Option<Refusal>> {
    let Some(limit) = most else { return Ok(None) };
    // First, as counting reads all sessions.
    if grant::is_operator(db, role)? {
        return Ok(None);
    }
    let arguments = [role.0.into(), i64::from(limit).into()];
    let counted = db.run(count, &arguments)?.first().required_bigint(1, "claude_sessions")?;
    if counted < i64::from(limit) {
        return Ok(None);
    }
    Ok(Some(Refusal::QuotaReached { role: role.name(), limit, quota }))
}
