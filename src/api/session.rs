//! Sessions: registering and ending.

use pg_claims_core::age;
use pg_claims_core::refusal::Refusal;
use pgrx::datum::Interval;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

use super::{answer, check_may_act_for, reason_or, shared};
use crate::error::{ClaimError, Result, checked_id};
use crate::jsonb::Jsonb;
use crate::spi::session::{self, Registration};
use crate::spi::{Db, directive, grant, time};
use crate::{guc, identity};

#[pg_extern(volatile, parallel_unsafe, security_definer)]
#[search_path(pg_catalog, pg_temp)]
fn register_session(
    p_session_id: Option<&str>,
    p_hostname: default!(Option<&str>, "NULL"),
    p_tty: default!(Option<&str>, "NULL"),
    p_pid: default!(Option<i32>, "NULL"),
    p_codebase: default!(Option<&str>, "NULL"),
    p_metadata: default!(Option<Jsonb>, "NULL"),
    p_stale_after: default!(Option<Interval>, "NULL"),
) -> Result<Jsonb, ErrorReport> {
    let registration = Registration {
        session_id: checked_id("p_session_id", p_session_id)?,
        hostname: p_hostname,
        tty: p_tty,
        pid: p_pid,
        codebase: p_codebase,
        metadata: object_or_empty(p_metadata)?,
        stale_after: checked_lease(p_stale_after)?,
    };
    Ok(Db::connect(|db| register(db, registration))?)
}

fn object_or_empty(metadata: Option<Jsonb>) -> Result<Jsonb> {
    let Some(metadata) = metadata else {
        return Ok(Jsonb::of(&serde_json::json!({}))?);
    };
    if metadata.is_object() {
        return Ok(metadata);
    }
    Err(ClaimError::InvalidArgument {
        argument: "p_metadata",
        reason: "must be a JSON object".into(),
        hint: Some("Objects are merged key by key with what the session told before.".into()),
    })
}

/// A lease of the session's own, within what the operator allows; zero stands for the usual one.
fn checked_lease(stale_after: Option<Interval>) -> Result<Option<Interval>> {
    let Some(stale_after) = stale_after else { return Ok(None) };
    let (shortest, longest) = guc::stale_after_limits();
    let asked = time::from_interval(&stale_after);
    if asked.is_zero() || (shortest..=longest).contains(&asked) {
        return Ok(Some(stale_after));
    }
    Err(ClaimError::InvalidArgument {
        argument: "p_stale_after",
        reason: format!(
            "must be {} to {} seconds",
            age::seconds(shortest),
            age::seconds(longest)
        ),
        hint: Some(
            "The limits are pg_claims.min_stale_after and pg_claims.max_stale_after; 0 gives up a lease of its own, and extend_lease() announces a single silence.".into(),
        ),
    })
}

fn register(db: &Db<'_>, registration: Registration<'_>) -> Result<Jsonb> {
    let caller = identity::caller()?;
    let session_id = registration.session_id.to_owned();
    shared::note_acting_for(&session_id);
    let before = session::find(db, &session_id)?;
    let is_others = before.as_ref().is_some_and(|session| session.owner_role != caller);
    let privileged = is_others && grant::is_operator(db, caller)?;
    match session::register(db, registration, caller, privileged)? {
        Some(mut state) => {
            state.resumed = before.filter(|session| session.is_released()).map(|_| true);
            answer(Ok(state))
        }
        None => {
            // The row is another role's; it may have come since it was looked for.
            let owner_role =
                session::find(db, &session_id)?.map_or(caller, |session| session.owner_role);
            Err(ClaimError::NotSessionOwner { session_id, owner_role, caller })
        }
    }
}

#[pg_extern(volatile, parallel_unsafe, security_definer)]
#[search_path(pg_catalog, pg_temp)]
fn end_session(
    p_session_id: Option<&str>,
    p_reason: default!(Option<&str>, "'ended'"),
) -> Result<Jsonb, ErrorReport> {
    let session_id = checked_id("p_session_id", p_session_id)?;
    let reason = reason_or(p_reason, "ended");
    Ok(Db::connect(|db| end(db, session_id, reason))?)
}

fn end(db: &Db<'_>, session_id: &str, reason: &str) -> Result<Jsonb> {
    // Each further round means that the session's claim has changed since the look before.
    loop {
        let Some(found) = session::find(db, session_id)? else {
            return answer::<()>(Err(Refusal::SessionNotFound { session_id: session_id.into() }));
        };
        check_may_act_for(db, &found)?;
        if found.is_released() {
            // Ending an ended session changes nothing and is no error.
            if let Some(state) = session::state(db, session_id)? {
                return answer(Ok(state));
            }
            continue;
        }
        let (sd_id, claim_id) = (found.sd_id, found.claim_id);
        if let Some(sd_id) = &sd_id {
            directive::lock(db, vec![sd_id.clone()])?;
        }
        let unasked = identity::caller()? != found.owner_role;
        if let Some(mut state) = session::end(db, session_id, claim_id, reason, unasked)? {
            state.released_sd = sd_id;
            return answer(Ok(state));
        }
    }
}
