//! A person's stop sign on an SD.

use pg_claims_core::refusal::Refusal;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use serde_json::{Value, json};

use super::argument::{checked_id, mandatory_reason};
use super::{answer, running};
use crate::error::Result;
use crate::jsonb::Jsonb;
use crate::spi::{Db, claim, directive, hold};

#[pg_extern(volatile, parallel_unsafe)]
fn hold_sd(
    p_sd_id: Option<&str>,
    p_reason: Option<&str>,
    fcinfo: pg_sys::FunctionCallInfo,
) -> Result<Jsonb, ErrorReport> {
    let sd_id = checked_id("p_sd_id", p_sd_id)?;
    let reason = mandatory_reason(p_reason)?;
    Ok(Db::connect(running(fcinfo), |db| answer(stop(db, sd_id, reason)?))?)
}

fn stop(db: &Db<'_>, sd_id: &str, reason: &str) -> Result<Result<Value, Refusal>> {
    let Some(sd) = claim::look(db, None, sd_id)?.sd else {
        return Ok(Err(Refusal::SdNotFound { sd_id: sd_id.to_owned() }));
    };
    // A claim that is just being made ends first, and is told of; one that comes later is refused.
    directive::lock(db, vec![sd.sd_id.clone()])?;
    let hold = hold::hold(db, &sd.sd_id, reason)?;
    let claimed_by = claim::look(db, None, &sd.sd_id)?.owner.map(|(owner, _)| owner.session_id);
    Ok(Ok(json!({
        "success": true,
        "sd_id": sd.sd_id,
        "reason": hold.reason,
        "held_by": hold.held_by,
        "held_at": hold.held_at,
        "claimed_by": claimed_by,
    })))
}

#[pg_extern(volatile, parallel_unsafe)]
fn unhold_sd(
    p_sd_id: Option<&str>,
    fcinfo: pg_sys::FunctionCallInfo,
) -> Result<Jsonb, ErrorReport> {
    let sd_id = checked_id("p_sd_id", p_sd_id)?;
    Ok(Db::connect(running(fcinfo), |db| answer(go(db, sd_id)?))?)
}

fn go(db: &Db<'_>, sd_id: &str) -> Result<Result<Value, Refusal>> {
    // An SD that has been deleted since is known by the name under which it was stopped.
    let sd_id = claim::look(db, None, sd_id)?.sd.map_or_else(|| sd_id.to_owned(), |sd| sd.sd_id);
    directive::lock(db, vec![sd_id.clone()])?;
    if hold::unhold(db, &sd_id)? {
        Ok(Ok(json!({ "success": true, "sd_id": sd_id })))
    } else {
        Ok(Err(Refusal::NotHeld { sd_id }))
    }
}
