//! Claims: acquiring, releasing, asking.

use pg_claims_core::outcome::{ClaimStatus, Claimed, Released};
use pg_claims_core::refusal::Refusal;
use pg_claims_core::text;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

use super::argument::{checked_id, checked_track, mandatory_reason, reason_or};
use super::{answer, check_may_act_for, running, shared};
use crate::error::Result;
use crate::identity;
use crate::jsonb::Jsonb;
use crate::spi::claim::{self, Request};
use crate::spi::{Db, directive, guard, session};

// Not SECURITY DEFINER, nor is release_sd: a refusal only reads by index, which needs no rights, and
// setting them up is a good part of what a call costs.
#[pg_extern(volatile, parallel_unsafe)]
fn claim_sd(
    p_sd_id: Option<&str>,
    p_session_id: Option<&str>,
    p_track: default!(Option<&str>, "NULL"),
    fcinfo: pg_sys::FunctionCallInfo,
) -> Result<Jsonb, ErrorReport> {
    let sd_id = checked_id("p_sd_id", p_sd_id)?;
    let session_id = checked_id("p_session_id", p_session_id)?;
    let track = checked_track(p_track)?;
    Ok(Db::connect_for(running(fcinfo), |db| answer(acquire(db, sd_id, session_id, track)?))?)
}

#[pg_extern(volatile, parallel_unsafe)]
fn sd_start(
    p_sd_id: Option<&str>,
    p_session_id: Option<&str>,
    p_track: default!(Option<&str>, "NULL"),
    fcinfo: pg_sys::FunctionCallInfo,
) -> Result<String, ErrorReport> {
    let sd_id = checked_id("p_sd_id", p_sd_id)?;
    let session_id = checked_id("p_session_id", p_session_id)?;
    let track = checked_track(p_track)?;
    Ok(Db::connect(running(fcinfo), |db| {
        Ok(match acquire(db, sd_id, session_id, track)? {
            Ok(claimed) => {
                text::claimed(&claimed, directive::title(db, &claimed.sd_id)?.as_deref())
            }
            Err(refusal) => text::refused(&refusal),
        })
    })?)
}

fn acquire(
    db: &Db<'_>,
    sd_id: &str,
    session_id: &str,
    track: Option<&str>,
) -> Result<Result<Claimed, Refusal>> {
    shared::note_acting_for(session_id);
    let request =
        Request { sd_id, session_id, track, force: None, only_if_held: false, queued: None };
    claim::acquire(db, request, |session| check_may_act_for(db, session))
}

#[pg_extern(volatile, parallel_unsafe)]
fn takeover_sd(
    p_sd_id: Option<&str>,
    p_session_id: Option<&str>,
    p_reason: Option<&str>,
    fcinfo: pg_sys::FunctionCallInfo,
) -> Result<Jsonb, ErrorReport> {
    let sd_id = checked_id("p_sd_id", p_sd_id)?;
    let session_id = checked_id("p_session_id", p_session_id)?;
    let reason = mandatory_reason(p_reason)?;
    Ok(Db::connect(running(fcinfo), |db| {
        shared::note_acting_for(session_id);
        let request = Request {
            sd_id,
            session_id,
            track: None,
            force: Some(reason),
            only_if_held: false,
            queued: None,
        };
        answer(claim::acquire(db, request, |session| check_may_act_for(db, session))?)
    })?)
}

#[pg_extern(volatile, parallel_unsafe)]
fn release_sd(
    p_session_id: Option<&str>,
    p_reason: default!(Option<&str>, "'manual'"),
    p_claim_id: default!(Option<i64>, "NULL"),
    fcinfo: pg_sys::FunctionCallInfo,
) -> Result<Jsonb, ErrorReport> {
    let session_id = checked_id("p_session_id", p_session_id)?;
    let reason = reason_or(p_reason, "manual")?;
    Ok(Db::connect_for(running(fcinfo), |db| answer(release(db, session_id, reason, p_claim_id)?))?)
}

/// Ends exactly the acquisition that was named or, without a name, the one that was found: if that
/// has ended meanwhile, a newer one is left alone.
fn release(
    db: &Db<'_>,
    session_id: &str,
    reason: &str,
    named: Option<i64>,
) -> Result<Result<Released, Refusal>> {
    shared::note_acting_for(session_id);
    let Some((found, is_contested)) = session::find_contested(db, session_id)? else {
        return Ok(Err(Refusal::SessionNotFound { session_id: session_id.into() }));
    };
    check_may_act_for(db, &found)?;
    let lost = |claim_id| -> Result<Refusal> {
        let lost = claim::lost(db, claim_id, session_id)?;
        Ok(Refusal::ClaimLost { session_id: session_id.into(), claim_id, lost })
    };
    if let Some(named) = named
        && found.claim_id != Some(named)
    {
        return Ok(Err(lost(named)?));
    }
    if found.is_released() {
        return Ok(Err(Refusal::SessionReleased { session_id: session_id.into() }));
    }
    let Some((sd_id, claim_id)) = found.sd_id.zip(found.claim_id) else {
        return Ok(Err(Refusal::NoClaim { session_id: session_id.into() }));
    };
    // Before the SD is locked, which they may come to need.
    if guard::await_others(claim_id)? || is_contested {
        session::await_writer(db, session_id)?;
    }
    directive::lock(db, vec![sd_id.clone()])?;
    let unasked = identity::caller() != found.owner_role;
    Ok(match session::let_go(db, session_id, claim_id, reason, unasked)? {
        Some(released_at) => Ok(Released {
            success: true,
            session_id: session_id.into(),
            released_sd: sd_id,
            claim_id,
            reason: reason.into(),
            released_at,
        }),
        None => Err(lost(claim_id)?),
    })
}

#[pg_extern(volatile, parallel_unsafe)]
fn is_sd_claimed(
    p_sd_id: Option<&str>,
    p_exclude_session_id: default!(Option<&str>, "NULL"),
    fcinfo: pg_sys::FunctionCallInfo,
) -> Result<Jsonb, ErrorReport> {
    let sd_id = checked_id("p_sd_id", p_sd_id)?;
    let excluded = match p_exclude_session_id {
        None => None,
        given => Some(checked_id("p_exclude_session_id", given)?),
    };
    Ok(Db::look(running(fcinfo), |db| {
        let picture = claim::look(db, None, sd_id)?;
        let status = match picture.owner {
            Some((owner, stale)) if Some(owner.session_id.as_str()) != excluded => {
                ClaimStatus::held(owner, stale, picture.at)
            }
            _ => ClaimStatus::free(),
        };
        answer(Ok(status))
    })?)
}
