//! Sessions: registering and ending.

use std::ffi::CStr;

use pg_claims_core::age;
use pg_claims_core::refusal::Refusal;
use pgrx::datum::Interval;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use serde_json::json;

use super::argument::{MAX_FACT_CHARACTERS, checked_id, checked_text, reason_or};
use super::{answer, check_may_act_for, running, shared};
use crate::error::{ClaimError, Result};
use crate::identity::Role;
use crate::jsonb::Jsonb;
use crate::pg::time;
use crate::spi::session::{self, Registration, Session};
use crate::spi::{Db, directive, grant, guard, quota};
use crate::{guc, identity};

/// The most that a session may tell of itself, in bytes as the server stores them.
const MOST_METADATA: usize = 64 * 1024;

#[pg_extern(volatile, parallel_unsafe)]
#[expect(clippy::too_many_arguments, reason = "those of the SQL function, and how it was called")]
fn register_session(
    p_session_id: Option<&str>,
    p_hostname: default!(Option<&str>, "NULL"),
    p_tty: default!(Option<&str>, "NULL"),
    p_pid: default!(Option<i32>, "NULL"),
    p_codebase: default!(Option<&str>, "NULL"),
    p_metadata: default!(Option<Jsonb>, "NULL"),
    p_stale_after: default!(Option<Interval>, "NULL"),
    fcinfo: pg_sys::FunctionCallInfo,
) -> Result<Jsonb, ErrorReport> {
    let registration = Registration {
        session_id: checked_id("p_session_id", p_session_id)?,
        hostname: checked_text("p_hostname", p_hostname, MAX_FACT_CHARACTERS)?,
        tty: checked_text("p_tty", p_tty, MAX_FACT_CHARACTERS)?,
        pid: p_pid,
        codebase: checked_text("p_codebase", p_codebase, MAX_FACT_CHARACTERS)?,
        metadata: object_or_empty(p_metadata)?,
        stale_after: checked_lease(p_stale_after)?,
    };
    Ok(Db::connect(running(fcinfo), |db| register(db, registration))?)
}

fn object_or_empty(metadata: Option<Jsonb>) -> Result<Jsonb> {
    let Some(metadata) = metadata else {
        return Ok(Jsonb::of(&serde_json::json!({}))?);
    };
    check_size(&metadata)?;
    if metadata.is_object() {
        return Ok(metadata);
    }
    Err(ClaimError::InvalidArgument {
        argument: "p_metadata",
        reason: "must be a JSON object".into(),
        hint: Some("Objects are merged key by key with what the session told before.".into()),
    })
}

/// As it comes, and as it is once it is merged: others read it.
fn check_size(metadata: &Jsonb) -> Result<()> {
    if metadata.size() <= MOST_METADATA {
        return Ok(());
    }
    Err(ClaimError::InvalidArgument {
        argument: "p_metadata",
        reason: format!(
            "must not be larger than {MOST_METADATA} bytes, together with what the session told before"
        ),
        hint: Some("Keep what is large elsewhere, and a reference to it here.".into()),
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
    let caller = identity::caller();
    let session_id = registration.session_id.to_owned();
    shared::note_acting_for(&session_id);
    let before = session::find(db, &session_id)?;
    // Whatever was found: another role may be registering it just now.
    let privileged = grant::is_operator(db, caller)?;
    if before.as_ref().is_none_or(Session::is_released)
        && let Some(refusal) = quota::refuse_session(db, caller)?
    {
        return answer::<()>(Err(refusal));
    }
    match session::register(db, registration, caller, privileged)? {
        Some(mut state) => {
            check_size(&state.metadata)?;
            state.resumed = before.filter(|session| session.is_released()).map(|_| true);
            answer(Ok(state))
        }
        None => {
            // The row is another role's.
            let owner_role =
                session::find(db, &session_id)?.map_or(caller, |session| session.owner_role);
            Err(ClaimError::NotSessionOwner { session_id, owner_role, caller })
        }
    }
}

#[pg_extern(volatile, parallel_unsafe)]
fn end_session(
    p_session_id: Option<&str>,
    p_reason: default!(Option<&str>, "'ended'"),
    fcinfo: pg_sys::FunctionCallInfo,
) -> Result<Jsonb, ErrorReport> {
    let session_id = checked_id("p_session_id", p_session_id)?;
    let reason = reason_or(p_reason, "ended")?;
    Ok(Db::connect(running(fcinfo), |db| end(db, session_id, reason))?)
}

// The SQL is written out because pgrx has no name.
#[pg_extern(sql = r#"
CREATE FUNCTION assign_sessions(p_from name, p_to name)
RETURNS jsonb
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS '@MODULE_PATHNAME@', '@FUNCTION_NAME@';
"#)]
fn assign_sessions(
    p_from: Option<&CStr>,
    p_to: Option<&CStr>,
    fcinfo: pg_sys::FunctionCallInfo,
) -> Result<Jsonb, ErrorReport> {
    let (from, from_name) = checked_role("p_from", p_from)?;
    let (to, to_name) = checked_role("p_to", p_to)?;
    let to = Role::named(to).ok_or_else(|| ClaimError::DirectWrite {
        code: PgSqlErrorCode::ERRCODE_UNDEFINED_OBJECT,
        message: format!("role \"{to_name}\" does not exist"),
        detail: None,
        hint: "Give p_to the name of the role that is to act for the sessions.",
    })?;
    let sessions = Db::connect(running(fcinfo), |db| {
        session::assign(db, (Role::named(from), from_name), (to, to_name))
    })?;
    let answer = json!({ "success": true, "from": from_name, "to": to_name, "sessions": sessions });
    Ok(super::json(&answer)?)
}

fn checked_role<'a>(argument: &'static str, name: Option<&'a CStr>) -> Result<(&'a CStr, &'a str)> {
    name.and_then(|name| Some((name, name.to_str().ok()?))).ok_or_else(|| {
        ClaimError::InvalidArgument {
            argument,
            reason: "must not be NULL".into(),
            hint: Some("Give a role's name; p_from may be that of one that is gone.".into()),
        }
    })
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
        if let Some((sd_id, claim_id)) = sd_id.as_ref().zip(claim_id) {
            // Before the SD is locked, which they may come to need.
            if guard::await_others(claim_id)? || session::await_writer(db, session_id)? {
                continue;
            }
            directive::lock(db, vec![sd_id.clone()])?;
        }
        let unasked = identity::caller() != found.owner_role;
        if let Some(mut state) = session::end(db, session_id, claim_id, reason, unasked)? {
            state.released_sd = sd_id;
            return answer(Ok(state));
        }
    }
}
