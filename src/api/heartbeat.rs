//! Heartbeats.

use pg_claims_core::outcome::{Beat, Refusal};
use pgrx::JsonB;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

use super::{answer, check_may_act_for};
use crate::error::{Result, checked_id};
use crate::identity;
use crate::spi::{Db, claim, session};

#[pg_extern(volatile, parallel_unsafe, security_definer)]
#[search_path(pg_catalog, pg_temp)]
fn update_session_heartbeat(
    p_session_id: Option<&str>,
    p_claim_id: default!(Option<i64>, "NULL"),
) -> Result<JsonB, ErrorReport> {
    let session_id = checked_id("p_session_id", p_session_id)?;
    Ok(Db::connect(|db| answer(beat(db, session_id, p_claim_id)?))?)
}

fn beat(db: &Db<'_>, session_id: &str, named: Option<i64>) -> Result<Result<Beat, Refusal>> {
    // One statement where all is well; only its failure asks why.
    let mut beaten = session::beat(db, session_id, &identity::caller(), named)?;
    if beaten.is_none() {
        let Some(found) = session::find(db, session_id)? else {
            return Ok(Err(Refusal::SessionNotFound { session_id: session_id.into() }));
        };
        check_may_act_for(db, &found)?;
        beaten = session::beat(db, session_id, &found.owner_role, named)?;
    }
    if let Some((mut beat, lost)) = beaten {
        if let Some(lost) = lost {
            beat.lost_claim = claim::lost(db, lost, session_id)?;
        }
        return Ok(Ok(beat));
    }
    Ok(Err(match named {
        Some(claim_id) => Refusal::ClaimLost {
            session_id: session_id.into(),
            claim_id,
            lost: claim::lost(db, claim_id, session_id)?,
        },
        None => Refusal::SessionReleased { session_id: session_id.into() },
    }))
}
