//! The functions that SQL sees: thin, one file per noun.
//!
//! All are entered with the caller's rights and take those of the extension's owner inside (see
//! [`identity`]), a few only from their first statement or write on; none is STRICT, so that a NULL is answered with an error that names the argument.

mod argument;
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
mod repair;
mod session;
pub mod shared;

use pg_claims_core::refusal::Refusal;
use serde::Serialize;

use crate::error::{ClaimError, Result};
use crate::identity::{self, Role, running};
use crate::jsonb::Jsonb;
use crate::spi::Db;
use crate::spi::grant as privileges;
use crate::spi::heartbeat::first_not_of;
use crate::spi::session::Session;

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
    let caller = identity::caller();
    if caller == owner_role || privileges::is_operator(db, caller)? {
        return Ok(());
    }
    Err(ClaimError::NotSessionOwner { session_id: session_id.to_owned(), owner_role, caller })
}

/// The same for many sessions at once; an id that no session has is nobody's.
fn may_act_for_all(db: &Db<'_>, session_ids: &[String]) -> Result<()> {
    let caller = identity::caller();
    match first_not_of(db, session_ids, caller)? {
        Some((session_id, owner_role)) if !privileges::is_operator(db, caller)? => {
            Err(ClaimError::NotSessionOwner { session_id, owner_role, caller })
        }
        _ => Ok(()),
    }
}
