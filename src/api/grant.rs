//! Who may do what.

use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

use super::running;
use crate::error::{ClaimError, Result};
use crate::jsonb::Jsonb;
use crate::spi::Db;
use crate::spi::grant::{self, Level};

#[pg_extern(volatile, parallel_unsafe)]
fn grant_coordination(
    p_role: Option<&str>,
    p_level: Option<&str>,
    fcinfo: pg_sys::FunctionCallInfo,
) -> Result<Jsonb, ErrorReport> {
    let invalid = |argument, reason: String, hint: &str| ClaimError::InvalidArgument {
        argument,
        reason,
        hint: Some(hint.into()),
    };
    let role = p_role
        .filter(|role| !role.is_empty())
        .ok_or_else(|| invalid("p_role", "must name a role".into(), "Give a role's name."))?;
    let level_name = p_level.unwrap_or_default();
    let level = Level::named(level_name).ok_or_else(|| {
        invalid(
            "p_level",
            format!("\"{level_name}\" is not a level"),
            "The levels are 'viewer', 'worker', 'operator', and 'none' to take all back.",
        )
    })?;
    let changed = Db::administer(running(fcinfo), |db| grant::set_level(db, role, level))?;
    Ok(super::json(&serde_json::json!({
        "success": true,
        "role": role,
        "level": level_name,
        "revoked": changed.revoked,
        "left": changed.left,
    }))?)
}
