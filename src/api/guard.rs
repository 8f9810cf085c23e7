//! The guard: excluding takeover, release and reaping for the length of the caller's transaction.

use chrono::{DateTime, Utc};
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use serde_json::json;

use super::argument::checked_id;
use super::{check_may_act_as, running, shared};
use crate::error::{ClaimError, Result};
use crate::jsonb::Jsonb;
use crate::spi::claim::contradiction;
use crate::spi::guard::Acquisition;
use crate::spi::table::Wait;
use crate::spi::{Db, claim, directive, guard, session};

#[pg_extern(volatile, parallel_unsafe)]
fn assert_claim(
    p_sd_id: Option<&str>,
    p_session_id: Option<&str>,
    p_claim_id: Option<i64>,
    fcinfo: pg_sys::FunctionCallInfo,
) -> Result<i64, ErrorReport> {
    let sd_id = checked_id("p_sd_id", p_sd_id)?;
    let session_id = checked_id("p_session_id", p_session_id)?;
    let claim_id = p_claim_id.ok_or_else(|| ClaimError::InvalidArgument {
        argument: "p_claim_id",
        reason: "must not be NULL".into(),
        hint: Some("Give the claim_id that claim_sd() answered with.".into()),
    })?;
    Ok(Db::connect(running(fcinfo), |db| assert_held(db, sd_id, session_id, claim_id))?)
}

fn assert_held(db: &Db<'_>, sd_id: &str, session_id: &str, claim_id: i64) -> Result<i64> {
    shared::note_acting_for(session_id);
    let refused = |detail: String| ClaimError::ClaimNotHeld {
        sd_id: sd_id.to_owned(),
        session_id: session_id.to_owned(),
        claim_id,
        detail,
    };
    let mut found = guard::hold(db, claim_id)?;
    if found.as_ref().is_none_or(|found| found.released_at.is_some())
        && holds_all_the_same(db, session_id, claim_id)?
    {
        found = guard::hold(db, claim_id)?;
    }
    let Some(found) = found else {
        return Err(refused(format!("There never was a claim {claim_id}.")));
    };
    // Whose it is comes before what became of it: that is not for everybody to know.
    if let Some(owner_role) = found.owner_role {
        check_may_act_as(db, &found.session_id, owner_role)?;
    }
    if found.session_id != session_id || !is_one_sd(db, &found.sd_id, sd_id)? {
        return Err(refused(format!(
            "Claim {claim_id} is that of session \"{}\" on SD \"{}\".",
            found.session_id, found.sd_id
        )));
    }
    if let Some(released_at) = found.released_at {
        return Err(refused(what_became_of(db, claim_id, &found, released_at)?));
    }
    guard::remember(&found.sd_id);
    if found.sd_id != sd_id {
        guard::remember(sd_id);
    }
    Ok(claim_id)
}

/// Whether the session holds an acquisition that the history says has ended, or does not have. Then it is open again.
fn holds_all_the_same(db: &Db<'_>, session_id: &str, claim_id: i64) -> Result<bool> {
    let holding =
        session::find(db, session_id)?.filter(|session| session.claim_id == Some(claim_id));
    let Some(sd_id) = holding.and_then(|session| session.sd_id) else { return Ok(false) };
    directive::lock(db, vec![sd_id.clone()])?;
    Ok(!contradiction::settle(db, &sd_id, Wait::Block)?.is_empty())
}

/// Whether `asked` names the SD of that canonical id.
fn is_one_sd(db: &Db<'_>, canonical: &str, asked: &str) -> Result<bool> {
    Ok(canonical == asked
        || claim::look(db, None, asked)?.sd.is_some_and(|sd| sd.sd_id == canonical))
}

fn what_became_of(
    db: &Db<'_>,
    claim_id: i64,
    ended: &Acquisition,
    released_at: DateTime<Utc>,
) -> Result<String> {
    let reason = ended.release_reason.as_deref().unwrap_or("unknown");
    let end = format!("Claim {claim_id} ended at {} ({reason}).", shown(released_at));
    Ok(match claim::look(db, None, &ended.sd_id)?.owner {
        Some((owner, _)) => format!(
            "{end} Session \"{}\" has SD \"{}\" since {} (claim {}).",
            owner.session_id,
            ended.sd_id,
            shown(owner.claimed_at),
            owner.claim_id
        ),
        None => format!("{end} Nobody has SD \"{}\" now.", ended.sd_id),
    })
}

fn shown(at: DateTime<Utc>) -> String {
    at.format("%Y-%m-%d %H:%M:%S%.3f UTC").to_string()
}

// The SQL is written out because pgrx has no regclass.
#[pg_extern(sql = r#"
CREATE FUNCTION guard_table(p_table regclass, p_sd_column name)
RETURNS jsonb
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS '@MODULE_PATHNAME@', '@FUNCTION_NAME@';
"#)]
fn guard_table(
    p_table: Option<pg_sys::Oid>,
    p_sd_column: Option<&core::ffi::CStr>,
    fcinfo: pg_sys::FunctionCallInfo,
) -> Result<Jsonb, ErrorReport> {
    let table = checked_table(p_table)?;
    let column = p_sd_column.and_then(|name| name.to_str().ok()).ok_or_else(|| {
        ClaimError::InvalidArgument {
            argument: "p_sd_column",
            reason: "must not be NULL".into(),
            hint: Some("Name the column that says which SD a row is of.".into()),
        }
    })?;
    let name = Db::connect(running(fcinfo), |db| directive::guard_table(db, table, column))?;
    Ok(super::json(&json!({ "success": true, "table": name, "sd_column": column }))?)
}

#[pg_extern(sql = r#"
CREATE FUNCTION unguard_table(p_table regclass)
RETURNS jsonb
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS '@MODULE_PATHNAME@', '@FUNCTION_NAME@';
"#)]
fn unguard_table(
    p_table: Option<pg_sys::Oid>,
    fcinfo: pg_sys::FunctionCallInfo,
) -> Result<Jsonb, ErrorReport> {
    let table = checked_table(p_table)?;
    let name = Db::connect(running(fcinfo), |db| directive::unguard_table(db, table))?;
    Ok(super::json(&json!({ "success": true, "table": name }))?)
}

fn checked_table(table: Option<pg_sys::Oid>) -> Result<pg_sys::Oid> {
    table.ok_or_else(|| ClaimError::InvalidArgument {
        argument: "p_table",
        reason: "must not be NULL".into(),
        hint: Some("Give the table's name, with its schema.".into()),
    })
}
