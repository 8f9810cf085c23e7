//! The functions that SQL sees: thin, one file per noun.
//!
//! All run as the extension's owner with a pinned search_path, a few only from their first statement on;
//! none is STRICT, so that a NULL is answered with an error that names the argument.

pub mod board;
mod check;
mod claim;
mod conflict;
pub mod directive;
mod grant;
mod guard;
mod heartbeat;
mod hold;
pub mod lease;
mod manager;
mod ops;
pub mod queue;
mod session;
mod shared;

use pg_claims_core::refusal::Refusal;
use pgrx::pg_sys;
use serde::Serialize;

use crate::error::{ClaimError, Result};
use crate::identity::{self, Role};
use crate::jsonb::Jsonb;
use crate::spi::Db;
use crate::spi::grant as privileges;
use crate::spi::heartbeat::first_not_of;
use crate::spi::session::Session;

/// The function that the server has called.
fn running(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Oid {
    // SAFETY: the server calls with a description of the function.
    unsafe { (*(*fcinfo).flinfo).fn_oid }
}

/// An answer or a refusal as JSON.
fn answer<T: Serialize>(outcome: Result<T, Refusal>) -> Result<Jsonb> {
    match outcome {
        Ok(done) => json(&done),
        Err(refusal) => json(&refusal),
    }
}

/// Anything as JSON.
fn json<T: Serialize>(value: &T) -> Result<Jsonb> {
    Ok(Jsonb::of(value)?)
}

/// A session belongs to the role that registered it: that role, or an operator, may act for it.
fn check_may_act_for(db: &Db<'_>, session: &Session) -> Result<()> {
    check_may_act_as(db, &session.session_id, session.owner_role)
}

fn check_may_act_as(db: &Db<'_>, session_id: &str, owner_role: Role) -> Result<()> {
    let caller = identity::caller()?;
    if caller == owner_role || privileges::is_operator(db, caller)? {
        return Ok(());
    }
    Err(ClaimError::NotSessionOwner { session_id: session_id.to_owned(), owner_role, caller })
}

/// The same for many sessions at once; an id that no session has is nobody's.
fn may_act_for_all(db: &Db<'_>, session_ids: &[String]) -> Result<()> {
    let caller = identity::caller()?;
    match first_not_of(db, session_ids, caller)? {
        Some((session_id, owner_role)) if !privileges::is_operator(db, caller)? => {
            Err(ClaimError::NotSessionOwner { session_id, owner_role, caller })
        }
        _ => Ok(()),
    }
}

/// A reason that must be given.
fn mandatory_reason(reason: Option<&str>) -> Result<&str> {
    reason.filter(|reason| !reason.trim().is_empty()).ok_or_else(|| ClaimError::InvalidArgument {
        argument: "p_reason",
        reason: "must not be NULL or blank".into(),
        hint: Some("Say why, for whoever reads the audit.".into()),
    })
}

/// A reason as it is recorded: free text, so that no reason can make a release fail.
fn reason_or<'a>(reason: Option<&'a str>, default: &'a str) -> &'a str {
    reason.filter(|reason| !reason.trim().is_empty()).unwrap_or(default)
}
