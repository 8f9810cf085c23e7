//! Before a session's row is written: a direct write is made whole, or refused with a reason.

use pg_claims_core::refusal::Refusal;
use pg_claims_core::{id, text};
use pgrx::heap_tuple::PgHeapTuple;
use pgrx::prelude::*;
use pgrx::{AllocatedByRust, PgSqlErrorCode};

use chrono::TimeDelta;

use super::board::check_finite;
use super::{Row, SessionTuple, Side, is_restoring, run};
use crate::error::{ClaimError, Result};
use crate::spi::claim::{self, Picture};
use crate::spi::row::Row as _;
use crate::spi::session::Session;
use crate::spi::table::layout::sessions as column;
use crate::spi::{Db, conflict, directive, time};

/// The reason recorded for a claim that ended by a direct write that gave none.
const DIRECT_WRITE: &str = "direct_write";

#[pg_trigger]
pub fn complete_session_write<'a>(trigger: &'a PgTrigger<'a>) -> Row<'a> {
    run(|| {
        let old =
            SessionTuple::of(trigger, Side::Old).map(|row| Session::read(&row)).transpose()?;
        let (Some(tuple), Some(columns)) = (trigger.new(), SessionTuple::of(trigger, Side::New))
        else {
            return Ok(None);
        };
        if columns.text(column::SESSION_ID)?.is_none()
            || columns.text(column::STATUS)?.is_none()
            || columns.instant(column::HEARTBEAT_AT)?.is_none()
            || columns.owner_role()?.is_none()
        {
            // The table's NOT NULL constraints say it best.
            return Ok(Some(tuple.into_owned()));
        }
        let new = Session::read(&columns)?;
        check_values(&columns, &new)?;
        let whole = match &old {
            None => complete_insert(&new)?,
            Some(old) => complete_update(old, &new)?,
        };
        let mut tuple = tuple.into_owned();
        if let Some(whole) = whole {
            write(&mut tuple, &whole)?;
        }
        Ok(Some(tuple))
    })
}

/// What no row may say, whoever writes it. What comes of a claim is a constraint of the table's.
fn check_values(tuple: &SessionTuple, row: &Session) -> Result<()> {
    check_finite(tuple)?;
    let refused = |message: String, hint| ClaimError::DirectWrite {
        code: PgSqlErrorCode::ERRCODE_CHECK_VIOLATION,
        message,
        detail: Some(format!("The row is that of session \"{}\".", row.session_id)),
        hint,
    };
    if !["active", "idle", "released"].contains(&row.status.as_str()) {
        let message = format!("a session cannot be \"{}\"", row.status);
        return Err(refused(message, "Write active, idle or released; stale is never stored."));
    }
    if row.stale_after.is_some_and(|lease| lease <= TimeDelta::zero()) {
        return Err(refused(
            "a lease must be longer than nothing".into(),
            "Write NULL for the usual one.",
        ));
    }
    Ok(())
}

/// The row that is to be written instead, or `None` where it is whole already.
fn complete_insert(new: &Session) -> Result<Option<Session>> {
    id::check(Some(&new.session_id))
        .map_err(|rule| ClaimError::InvalidId { argument: "session_id", rule })?;
    let Some(sd_id) = &new.sd_id else {
        return Ok(None);
    };
    if is_restoring() {
        return Ok(None);
    }
    if new.claim_id.is_some() {
        return Err(claim_id_is_assigned(new));
    }
    if new.status == "released" {
        return Err(contradiction(new));
    }
    claim_by_hand(new, sd_id, &[]).map(Some)
}

fn complete_update(old: &Session, new: &Session) -> Result<Option<Session>> {
    if new.session_id != old.session_id {
        return Err(ClaimError::DirectWrite {
            code: PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
            message: format!("cannot rename session \"{}\"", old.session_id),
            detail: Some("The claim history and the audit know it by this id.".into()),
            hint: "Register a session of the new id and end this one.",
        });
    }
    let mut whole = new.clone();
    match (&old.sd_id, &new.sd_id) {
        // A claim that goes on, unless the new status says that the session stops working.
        (Some(_), Some(sd_id)) if new.sd_id == old.sd_id => {
            if new.claim_id != old.claim_id || new.claimed_at != old.claimed_at {
                return Err(claim_id_is_assigned(new));
            }
            if new.status == "active" {
                return Ok(None);
            }
            Db::connect(|db| directive::lock(db, vec![sd_id.clone()]))?;
            let_go(old, &mut whole);
        }
        (_, Some(sd_id)) => {
            if new.claim_id.is_some_and(claim::is_granting) {
                return Ok(None);
            }
            if new.claim_id != old.claim_id {
                return Err(claim_id_is_assigned(new));
            }
            // 'active' is what a claim implies; another status was either left as it is, or set
            // against the claim.
            if new.status == "released" || (new.status == "idle" && old.status != "idle") {
                return Err(contradiction(new));
            }
            let given_up: Vec<&str> = old.sd_id.as_deref().into_iter().collect();
            whole = claim_by_hand(new, sd_id, &given_up)?;
        }
        (Some(sd_id), None) => {
            if claim::is_ending() {
                return Ok(None);
            }
            Db::connect(|db| directive::lock(db, vec![sd_id.clone()]))?;
            let_go(old, &mut whole);
        }
        (None, None) => {
            if new.claim_id.is_some() || new.claimed_at.is_some() {
                return Err(claim_id_is_assigned(new));
            }
            if new.status == "released"
                && old.status != "released"
                && new.released_at == old.released_at
            {
                whole.released_at = Some(time::now());
                whole.release_reason = Some(DIRECT_WRITE.into());
            }
        }
    }
    Ok((whole != *new).then_some(whole))
}

/// Takes the claim out of the row and says when and why.
fn let_go(old: &Session, row: &mut Session) {
    row.sd_id = None;
    row.claim_id = None;
    row.claimed_at = None;
    row.track = None;
    if row.status == "active" {
        row.status = "idle".into();
    }
    row.lost_claim_id = old.claim_id;
    row.lost_to = None;
    // By the server's clock, whatever was written there.
    row.released_at = Some(time::now());
    if row.release_reason == old.release_reason || row.release_reason.is_none() {
        row.release_reason = Some(DIRECT_WRITE.into());
    }
}

/// Checks a claim that was written by hand and gives it its token and time. The acquisition itself
/// is opened once the row is written: an INSERT … ON CONFLICT may yet leave this row out.
fn claim_by_hand(row: &Session, sd_id: &str, given_up: &[&str]) -> Result<Session> {
    id::check(Some(sd_id)).map_err(|rule| ClaimError::InvalidId { argument: "sd_id", rule })?;
    Db::connect(|db| {
        let canonical = match claim::look(db, None, sd_id)?.sd {
            Some(sd) => sd.sd_id,
            None => return Err(unknown_sd(sd_id)),
        };
        let mut concerned: Vec<String> = given_up.iter().map(|sd| (*sd).to_owned()).collect();
        concerned.push(canonical.clone());
        if !directive::lock(db, concerned)?.contains(&canonical) {
            // Whoever was waited for has deleted it, or put another row in its place.
            return Err(replaced_sd(sd_id));
        }
        claim::see_latest(db, &canonical)?;

        // Look again: whoever was waited for may have finished or claimed the SD.
        let picture = claim::look(db, None, &canonical)?;
        match &picture.sd {
            None => return Err(unknown_sd(sd_id)),
            Some(sd) if sd.is_terminal => return Err(finished_sd(&picture, sd_id)),
            Some(sd) => check_may_be_claimed(db, sd, &row.session_id)?,
        }
        if picture.owner.as_ref().is_some_and(|(owner, _)| owner.session_id != row.session_id) {
            return Err(picture.claimed_by_another(sd_id));
        }
        let now = time::now();
        Ok(Session {
            sd_id: Some(canonical),
            claim_id: Some(claim::next_id(db)?),
            claimed_at: Some(now),
            // A claim is a sign of life.
            heartbeat_at: row.heartbeat_at.max(now),
            status: "active".into(),
            lost_claim_id: None,
            lost_to: None,
            ..row.clone()
        })
    })
}

/// Neither stopped by a person, nor in conflict with what another live session holds.
fn check_may_be_claimed(db: &Db<'_>, sd: &claim::Sd, session_id: &str) -> Result<()> {
    let sd_id = sd.sd_id.clone();
    if let Some(hold) = &sd.hold {
        return Err(refused(&Refusal::Held { sd_id, hold: hold.clone() }));
    }
    if sd.has_conflicts {
        conflict::enter(db, &sd.sd_id)?;
        if let Some(conflict) = conflict::live_opponent(db, &sd.sd_id, session_id)? {
            return Err(refused(&Refusal::Conflict { sd_id, conflict }));
        }
    }
    Ok(())
}

fn refused(refusal: &Refusal) -> ClaimError {
    ClaimError::DirectWrite {
        code: PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
        message: text::message(refusal),
        detail: None,
        hint: text::hint(refusal).unwrap_or_default(),
    }
}

fn write(tuple: &mut PgHeapTuple<'_, AllocatedByRust>, row: &Session) -> Result<()> {
    let instant = |at: Option<_>| at.map(time::to_server).transpose();
    tuple.set_by_name("sd_id", row.sd_id.clone())?;
    tuple.set_by_name("claim_id", row.claim_id)?;
    tuple.set_by_name("claimed_at", instant(row.claimed_at)?)?;
    tuple.set_by_name("track", row.track.clone())?;
    tuple.set_by_name("status", row.status.clone())?;
    tuple.set_by_name("released_at", instant(row.released_at)?)?;
    tuple.set_by_name("release_reason", row.release_reason.clone())?;
    tuple.set_by_name("lost_claim_id", row.lost_claim_id)?;
    tuple.set_by_name("lost_to", row.lost_to.clone())?;
    tuple.set_by_name("heartbeat_at", instant(Some(row.heartbeat_at))?)?;
    tuple.set_by_name("updated_at", time::to_server(time::now())?)?;
    Ok(())
}

fn claim_id_is_assigned(row: &Session) -> ClaimError {
    ClaimError::DirectWrite {
        code: PgSqlErrorCode::ERRCODE_GENERATED_ALWAYS,
        message: "claim_id and claimed_at are assigned by the server".into(),
        detail: Some(format!("The row is that of session \"{}\".", row.session_id)),
        hint: "Write sd_id alone, or call claim_sd().",
    }
}

fn contradiction(row: &Session) -> ClaimError {
    ClaimError::DirectWrite {
        code: PgSqlErrorCode::ERRCODE_CHECK_VIOLATION,
        message: format!(
            "session \"{}\" cannot hold an SD while it is {}",
            row.session_id, row.status
        ),
        detail: None,
        hint: "Set status to 'active' together with sd_id, or sd_id to NULL.",
    }
}

fn unknown_sd(sd_id: &str) -> ClaimError {
    ClaimError::DirectWrite {
        code: PgSqlErrorCode::ERRCODE_FOREIGN_KEY_VIOLATION,
        message: format!("the backlog has no SD \"{sd_id}\""),
        detail: None,
        hint: "See v_directives for the SDs that can be claimed, by their ids.",
    }
}

fn replaced_sd(sd_id: &str) -> ClaimError {
    ClaimError::DirectWrite {
        code: PgSqlErrorCode::ERRCODE_T_R_SERIALIZATION_FAILURE,
        message: format!("SD \"{sd_id}\" was deleted or replaced meanwhile"),
        detail: None,
        hint: "Try the transaction again.",
    }
}

fn finished_sd(picture: &Picture, sd_id: &str) -> ClaimError {
    let status = picture.sd.as_ref().and_then(|sd| sd.status.clone()).unwrap_or_default();
    ClaimError::DirectWrite {
        code: PgSqlErrorCode::ERRCODE_CHECK_VIOLATION,
        message: format!("SD \"{sd_id}\" is {status}"),
        detail: None,
        hint: "Set the SD's status back if there is more work to do on it.",
    }
}
