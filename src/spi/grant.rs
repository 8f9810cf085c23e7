//! Who may do what: privileges on the extension's objects.

use pgrx::pg_sys::BuiltinOid::OIDOID;

use super::row::Row;
use super::statement::{Db, Statement};
use crate::error::{ClaimError, Result};
use crate::identity::Role;

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
            "heartbeat_connections",
            "worker_health",
            "directive_binding",
        ],
    ),
];

/// What an operator may do with the extension's own backlog.
const BACKLOG: &str = "SELECT, INSERT, UPDATE, DELETE";

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
            "guard_table",
            "unguard_table",
            "coordination_check",
            "cleanup_stale_sessions",
            "prune_history",
        ],
    ),
];

/// Gives `role` exactly `level`.
pub fn set_level(db: &Db<'_>, role: &str, level: Level) -> Result<()> {
    let schema = db.catalog()?.schema.clone();
    let role = quoted_role(db, role)?;
    let change = |privilege: &str, kind: &str, object: &str, granted: bool| -> Result<()> {
        // What the role has passed on goes as well.
        let (verb, to, rest) =
            if granted { ("GRANT", "TO", "") } else { ("REVOKE", "FROM", " CASCADE") };
        db.run_once(&format!("{verb} {privilege} ON {kind} {object} {to} {role}{rest}"), &[])?;
        Ok(())
    };
    // The schema is left usable on 'none': it may be public, or hold more than this extension.
    if level > Level::None {
        change("USAGE", "SCHEMA", &schema, true)?;
    }
    for (needed, relations) in RELATIONS {
        for relation in *relations {
            change("SELECT", "TABLE", &format!("{schema}.{relation}"), level >= *needed)?;
        }
    }
    if let Some(backlog) = db.catalog()?.own_backlog {
        let name = db.run_once("SELECT $1::regclass::text", &[backlog.into()])?.first();
        let name = name.required_text(1, "strategic_directives_v2")?;
        change(BACKLOG, "TABLE", &name, level >= Level::Operator)?;
    }
    for (needed, functions) in FUNCTIONS {
        for function in *functions {
            // No function of the extension's is overloaded, so the name says it all.
            change("EXECUTE", "FUNCTION", &format!("{schema}.{function}"), level >= *needed)?;
        }
    }
    Ok(())
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
