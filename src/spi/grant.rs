//! Who may do what: privileges on the extension's objects.

use pgrx::pg_sys::BuiltinOid::OIDOID;

use super::row::Row;
use super::statement::{Db, Statement};
use crate::error::{ClaimError, Result};
use crate::identity::{self, Role};

/// How much of the coordination a role may do; each level includes those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Nothing: takes back what was granted.
    None,
    /// See sessions, backlog and claims.
    Viewer,
    /// Register sessions of its own and claim, beat and release for them.
    Worker,
    /// Act for every session, read the tables, write the backlog, bind another.
    Operator,
}

impl Level {
    /// The level of that name.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "none" => Some(Self::None),
            "viewer" => Some(Self::Viewer),
            "worker" => Some(Self::Worker),
            "operator" => Some(Self::Operator),
            _ => None,
        }
    }
}

/// The views and tables that each level may read.
const RELATIONS: &[(Level, &[&str])] = &[
    (
        Level::Viewer,
        &[
            "v_active_sessions",
            "v_directives",
            "v_directive_keys",
            "v_sd_next",
            "v_sd_queue",
            "v_sd_blockers",
            "v_sd_conflicts",
            "v_worker_health",
        ],
    ),
    (
        Level::Operator,
        &[
            "claude_sessions",
            "sd_claims",
            "session_lifecycle_events",
            "sd_conflict_matrix",
            "sd_holds",
            "lifecycle_event_positions",
            "event_frontier",
            "installation",
            "heartbeat_connections",
            "worker_health",
            "directive_binding",
        ],
    ),
];

/// The extension's own backlog.
const OWN_BACKLOG: &str = "strategic_directives_v2";

/// What an operator may do with it.
const BACKLOG: &[&str] = &["SELECT", "INSERT", "UPDATE", "DELETE"];

/// The functions that each level may call. Whoever reads a view is asked by the server for the
/// privilege on the functions behind it.
const FUNCTIONS: &[(Level, &[&str])] = &[
    (
        Level::Viewer,
        &[
            "is_sd_claimed",
            "lease_expires_at",
            "claim_reclaimable_at",
            "is_claim_live",
            "dependency_cycles",
            "dependency_keys",
            "sd_blockers",
            "sd_next",
            "heartbeat_age_human",
            "elapsed_seconds",
            "elapsed_minutes",
            "latest_heartbeat",
            "heartbeat_board",
            "lifecycle_events_since",
        ],
    ),
    (
        Level::Worker,
        &[
            "register_session",
            "end_session",
            "claim_sd",
            "claim_next_sd",
            "release_sd",
            "sd_start",
            "update_session_heartbeat",
            "heartbeat_sessions",
            "extend_lease",
            "report_progress",
            "start_heartbeat",
            "stop_heartbeat",
            "is_heartbeat_active",
            "get_heartbeat_stats",
            "force_heartbeat",
            "assert_claim",
        ],
    ),
    (
        Level::Operator,
        &[
            "bind_directives",
            "unbind_directives",
            "declare_conflict",
            "resolve_conflict",
            "hold_sd",
            "unhold_sd",
            "takeover_sd",
            "assign_sessions",
            "guard_table",
            "unguard_table",
            "coordination_check",
            "coordination_repair",
            "cleanup_stale_sessions",
            "prune_history",
            "advance_numbers",
        ],
    ),
];

/// What a change of level came to.
#[derive(Debug, Default)]
pub struct Changed {
    /// What the role had beyond the level, and has not any more.
    pub revoked: Vec<String>,
    /// What it still has beyond the level, as somebody else has granted it, or the schema holds more than the extension.
    pub left: Vec<String>,
}

/// A privilege that a role has on something.
struct Held {
    /// `TABLE`, `SEQUENCE` or `FUNCTION`.
    kind: String,
    /// Its name or signature, quoted.
    object: String,
    /// Its bare name.
    name: String,
    /// With a column's name where it is for that alone.
    privilege: String,
    /// May be passed on.
    is_grantable: bool,
}

/// What a level has on one of the extension's objects.
fn privileges_of(level: Level, kind: &str, name: &str) -> &'static [&'static str] {
    let is_in = |all: &[(Level, &[&str])]| {
        all.iter().any(|(needed, names)| level >= *needed && names.contains(&name))
    };
    match kind {
        "FUNCTION" if is_in(FUNCTIONS) => &["EXECUTE"],
        "TABLE" if name == OWN_BACKLOG && level >= Level::Operator => BACKLOG,
        "TABLE" if is_in(RELATIONS) => &["SELECT"],
        _ => &[],
    }
}

impl Held {
    fn is_of(&self, level: Level) -> bool {
        privileges_of(level, &self.kind, &self.name).contains(&&*self.privilege)
    }

    fn told(&self) -> String {
        let option = if self.is_grantable { " WITH GRANT OPTION" } else { "" };
        format!("{} ON {} {}{option}", self.privilege, self.kind, self.object)
    }
}

/// Gives `role` exactly `level`: what else it has on the extension's objects is taken back.
pub fn set_level(db: &Db<'_>, role: &str, level: Level) -> Result<Changed> {
    check_may_grant()?;
    let schema = db.catalog()?.schema.clone();
    let role = quoted_role(db, role)?;
    let mut changed = Changed::default();
    for held in held(db, &role)? {
        if held.is_of(level) && !held.is_grantable {
            continue;
        }
        let option = if held.is_of(level) { "GRANT OPTION FOR " } else { "" };
        // What the role has passed on goes as well.
        db.run_once(
            &format!(
                "REVOKE {option}{} ON {} {} FROM {role} CASCADE",
                held.privilege, held.kind, held.object
            ),
            &[],
        )?;
        changed.revoked.push(held.told());
    }
    for (kind, object, name) in objects(db)? {
        for privilege in privileges_of(level, &kind, &name) {
            db.run_once(&format!("GRANT {privilege} ON {kind} {object} TO {role}"), &[])?;
        }
    }
    changed.left = held(db, &role)?
        .into_iter()
        .filter(|held| !held.is_of(level) || held.is_grantable)
        .map(|held| held.told())
        .collect();
    changed.revoked.retain(|revoked| !changed.left.contains(revoked));
    if level > Level::None {
        db.run_once(&format!("GRANT USAGE ON SCHEMA {schema} TO {role}"), &[])?;
    }
    // The schema may be public, or hold more than this extension.
    let is_taken_back = level == Level::None && !is_schema_shared(db)?;
    for privilege in on_schema(db, &role)? {
        if level > Level::None && privilege == "USAGE" {
            continue;
        }
        if is_taken_back {
            db.run_once(
                &format!("REVOKE {privilege} ON SCHEMA {schema} FROM {role} CASCADE"),
                &[],
            )?;
        } else {
            changed.left.push(format!("{privilege} ON SCHEMA {schema}"));
        }
    }
    Ok(changed)
}

/// Only those who have the rights of the extension's owner, which are those of the moment, grant levels. That somebody may
/// call the function says little: a GRANT on all functions of a schema is easily given.
fn check_may_grant() -> Result<()> {
    let caller = identity::caller();
    if identity::current().is_had_by(caller) {
        Ok(())
    } else {
        Err(ClaimError::MayNotGrant { caller })
    }
}

/// Each of the extension's tables, views, sequences and functions: its kind, its quoted name or signature, its bare
/// name. By what belongs to the extension: others may have functions of the same name.
fn objects(db: &Db<'_>) -> Result<Vec<(String, String, String)>> {
    let mut rows = db.run_once(
        &format!("{OBJECTS} SELECT kind, object, name FROM objects ORDER BY 1, 2"),
        &[db.catalog()?.extension.into()],
    )?;
    let mut found = Vec::new();
    while rows.next().is_some() {
        found.push((
            rows.required_text(1, "pg_depend")?,
            rows.required_text(2, "pg_depend")?,
            rows.required_text(3, "pg_depend")?,
        ));
    }
    Ok(found)
}

const OBJECTS: &str = "
    WITH members AS (
         SELECT classid, objid FROM pg_catalog.pg_depend
          WHERE refclassid = 'pg_catalog.pg_extension'::pg_catalog.regclass AND refobjid = $1
            AND deptype = 'e'),
    objects AS (
         SELECT CASE c.relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END AS kind,
                c.oid::pg_catalog.regclass::text AS object, c.relname::text AS name, c.relowner AS owner,
                c.relacl AS acl, c.oid AS relation
           FROM members m
           JOIN pg_catalog.pg_class c ON c.oid = m.objid AND c.relkind IN ('r', 'v', 'S')
          WHERE m.classid = 'pg_catalog.pg_class'::pg_catalog.regclass
          UNION ALL
         SELECT 'FUNCTION', p.oid::pg_catalog.regprocedure::text, p.proname::text, p.proowner, p.proacl, NULL
           FROM members m
           JOIN pg_catalog.pg_proc p ON p.oid = m.objid
          WHERE m.classid = 'pg_catalog.pg_proc'::pg_catalog.regclass)";

/// What the role has been granted on the extension's objects, by whomever. Those of an owner are no grants.
fn held(db: &Db<'_>, role: &str) -> Result<Vec<Held>> {
    let mut rows = db.run_once(
        &format!(
            "{OBJECTS}, granted AS (
                SELECT o.kind, o.object, o.name, a.privilege_type AS privilege, a.is_grantable, a.grantee
                  FROM objects o CROSS JOIN LATERAL pg_catalog.aclexplode(o.acl) a
                 WHERE a.grantee <> o.owner
                 UNION ALL
                SELECT o.kind, o.object, o.name,
                       pg_catalog.format('%s (%I)', a.privilege_type, c.attname), a.is_grantable, a.grantee
                  FROM objects o
                  JOIN pg_catalog.pg_attribute c ON c.attrelid = o.relation AND NOT c.attisdropped
                 CROSS JOIN LATERAL pg_catalog.aclexplode(c.attacl) a
                 WHERE a.grantee <> o.owner)
             SELECT DISTINCT kind, object, name, privilege, is_grantable FROM granted
              WHERE grantee = $2::pg_catalog.regrole ORDER BY 1, 2, 4"
        ),
        &[db.catalog()?.extension.into(), role.into()],
    )?;
    let mut found = Vec::new();
    while rows.next().is_some() {
        found.push(Held {
            kind: rows.required_text(1, "pg_depend")?,
            object: rows.required_text(2, "pg_depend")?,
            name: rows.required_text(3, "pg_depend")?,
            privilege: rows.required_text(4, "pg_class.relacl")?,
            is_grantable: rows.flag(5)?,
        });
    }
    Ok(found)
}

/// What the role itself has been granted on the extension's schema.
fn on_schema(db: &Db<'_>, role: &str) -> Result<Vec<String>> {
    let mut rows = db.run_once(
        "SELECT DISTINCT a.privilege_type
           FROM pg_catalog.pg_extension e
           JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace
          CROSS JOIN LATERAL pg_catalog.aclexplode(n.nspacl) a
          WHERE e.oid = $1 AND a.grantee = $2::pg_catalog.regrole AND a.grantee <> n.nspowner
          ORDER BY 1",
        &[db.catalog()?.extension.into(), role.into()],
    )?;
    let mut found = Vec::new();
    while rows.next().is_some() {
        found.push(rows.required_text(1, "pg_namespace.nspacl")?);
    }
    Ok(found)
}

/// Whether the extension's schema is public, or holds anything else.
fn is_schema_shared(db: &Db<'_>) -> Result<bool> {
    let found = db.run_once(
        "SELECT FROM pg_catalog.pg_extension e
           JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace
          WHERE e.oid = $1
            AND (n.nspname = 'public'
                 OR EXISTS (SELECT FROM pg_catalog.pg_depend o
                             WHERE o.refclassid = 'pg_catalog.pg_namespace'::pg_catalog.regclass
                               AND o.refobjid = n.oid AND o.deptype = 'n'
                               AND (o.classid, o.objid)
                                   <> ('pg_catalog.pg_extension'::pg_catalog.regclass, e.oid)
                               AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend m
                                                WHERE m.classid = o.classid AND m.objid = o.objid
                                                  AND m.deptype IN ('e', 'i', 'a'))))",
        &[db.catalog()?.extension.into()],
    )?;
    Ok(!found.is_empty())
}

fn quoted_role(db: &Db<'_>, role: &str) -> Result<String> {
    let rows = db.run_once(
        "SELECT pg_catalog.quote_ident(rolname) FROM pg_catalog.pg_roles WHERE rolname = $1::name",
        &[role.into()],
    )?;
    if rows.is_empty() {
        return Err(ClaimError::InvalidArgument {
            argument: "p_role",
            reason: format!("role \"{role}\" does not exist"),
            hint: Some("Create it with CREATE ROLE first.".into()),
        });
    }
    rows.first().required_text(1, "pg_roles.rolname")
}

// unbind_directives() stands for the operator's level: it takes no argument that could change and
// no other level ever includes it.
static IS_OPERATOR: Statement = Statement::new(
    |c| {
        format!(
            "SELECT pg_catalog.has_function_privilege($1, '{}.unbind_directives()', 'EXECUTE')",
            c.schema.replace('\'', "''")
        )
    },
    &[OIDOID],
);

/// Whether `role` may act for every session. Superusers may.
pub fn is_operator(db: &Db<'_>, role: Role) -> Result<bool> {
    db.run(&IS_OPERATOR, &[role.0.into()])?.first().flag(1)
}
