//! Before a session's row is written: a direct write is made whole, or refused with a reason.

use pg_claims_core::refusal::Refusal;
use pg_claims_core::{id, text};
use pgrx::PgSqlErrorCode;
use pgrx::prelude::*;

use chrono::TimeDelta;

use super::board::check_finite;
use super::row::{self, Value};
use super::{Row, SessionTuple, Side, is_restoring, run, run_on_own_table};
use crate::error::{ClaimError, Result};
use crate::identity::Role;
use crate::pg::time;
use crate::spi::claim::{self, Picture, contradiction};
use crate::spi::intent::{self, Intent};
use crate::spi::row::Row as _;
use crate::spi::session::Session;
use crate::spi::table::Wait;
use crate::spi::table::layout::sessions as column;
use crate::spi::{Db, conflict, directive, guard};

/// The reason recorded for a claim that ended by a direct write that gave none.
const DIRECT_WRITE: &str = "direct_write";

#[pg_trigger]
pub fn complete_session_write<'a>(trigger: &'a PgTrigger<'a>) -> Row<'a> {
    run_on_own_table(trigger, || {
        let old =
            SessionTuple::of(trigger, Side::Old).map(|row| Session::read(&row)).transpose()?;
        if let (Some(old), None) = (&old, trigger.new()) {
            lock_claim(old)?;
            return Ok(row::unchanged(trigger));
        }
        let Some(columns) = SessionTuple::of(trigger, Side::New) else {
            return Ok(None);
        };
        if columns.text(column::SESSION_ID)?.is_none()
            || columns.text(column::STATUS)?.is_none()
            || columns.instant(column::HEARTBEAT_AT)?.is_none()
            || columns.owner_role()?.is_none()
        {
            // The table's NOT NULL constraints say it best.
            return Ok(row::unchanged(trigger));
        }
        let new = Session::read(&columns)?;
        let before = SessionTuple::of(trigger, Side::Old);
        check_finite(before.as_ref(), &columns)?;
        check_values(old.as_ref(), &new)?;
        let whole = match &old {
            // The functions have completed it. A trigger of somebody's may have spoiled it since, so it is checked.
            Some(_) if intent::is(&Intent::Session) => None,
            None => complete_insert(&new)?,
            Some(old) => complete_update(old, &new)?,
        };
        let mut values = whole.map_or_else(Vec::new, values_of);
        if let Some(owner) = owner_of(before.as_ref(), &columns)? {
            values.push(("owner_oid", Value::Role(owner)));
        }
        row::changed(trigger, values)
    })
}

/// A replicated row: whose the session is goes by the role's name.
#[pg_trigger]
pub fn own_replicated_session<'a>(trigger: &'a PgTrigger<'a>) -> Row<'a> {
    run(|| {
        let Some(columns) = SessionTuple::of(trigger, Side::New) else { return Ok(None) };
        let owner = owner_of(SessionTuple::of(trigger, Side::Old).as_ref(), &columns)?;
        row::changed(
            trigger,
            owner.map(|owner| ("owner_oid", Value::Role(owner))).into_iter().collect(),
        )
    })
}

/// Whose the session is to be, if that is not what the row says: the role of the name that was written. The
/// number in a dump is that of some other server's role.
fn owner_of(old: Option<&SessionTuple>, new: &SessionTuple) -> Result<Option<Role>> {
    let (name, owner) = (new.owner_role()?, new.role(column::OWNER_OID)?);
    if let Some(old) = old
        && old.owner_role()? == name
        && old.role(column::OWNER_OID)? == owner
    {
        return Ok(None);
    }
    let name = name.unwrap_or_default();
    let named = match Role::named(&name) {
        Some(role) => role,
        None if is_restoring() || time::is_replica() => Role::NOBODY,
        None => {
            return Err(ClaimError::DirectWrite {
                code: PgSqlErrorCode::ERRCODE_UNDEFINED_OBJECT,
                message: format!("role \"{}\" does not exist", name.to_string_lossy()),
                detail: None,
                hint: "Write the name of a role to owner_role, or call assign_sessions().",
            });
        }
    };
    Ok((named != owner).then_some(named))
}

/// What no row may come to say, whoever writes it. What comes of a claim is a constraint of the table's.
fn check_values(old: Option<&Session>, row: &Session) -> Result<()> {
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
    if old.is_none_or(|old| old.stale_after != row.stale_after)
        && row.stale_after.is_some_and(|lease| lease <= TimeDelta::zero())
    {
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
    claim_by_hand(new, sd_id, None).map(Some)
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
        (Some(_), Some(_)) if new.sd_id == old.sd_id => {
            if new.claim_id != old.claim_id || new.claimed_at != old.claimed_at {
                return Err(claim_id_is_assigned(new));
            }
            if new.status == "active" {
                return Ok(None);
            }
            lock_claim(old)?;
            let_go(old, &mut whole);
        }
        (_, Some(sd_id)) => {
            if new.claim_id != old.claim_id {
                return Err(claim_id_is_assigned(new));
            }
            // 'active' is what a claim implies; another status was either left as it is, or set
            // against the claim.
            if new.status == "released" || (new.status == "idle" && old.status != "idle") {
                return Err(contradiction(new));
            }
            whole = claim_by_hand(new, sd_id, old.claim())?;
        }
        (Some(_), None) => {
            lock_claim(old)?;
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

/// Locks the SD that the session holds and its acquisition. The session's row is locked already, which is against
/// the order of locks: see [`wait`](crate::spi::wait).
fn lock_claim(row: &Session) -> Result<()> {
    let Some((sd_id, claim_id)) = row.claim() else {
        return Ok(());
    };
    Db::within(|db| {
        directive::lock(db, vec![sd_id.to_owned()])?;
        guard::exclude(db, claim_id)
    })
}

/// Takes the claim out of the row and says when and why.
fn let_go(old: &Session, row: &mut Session) {
    row.sd_id = None;
    row.claim_id = None;
    row.claimed_at = None;
    row.track = None;
    // What was announced, was announced for the claim.
    row.silent_until = None;
    if row.status == "active" {
        row.status = "idle".into();
    }
    row.lost_claim_id = old.claim_id;
    row.lost_to = None;
    // By the server's clock, whatever was written there.
    row.released_at = Some(old.moment());
    if row.release_reason == old.release_reason || row.release_reason.is_none() {
        row.release_reason = Some(DIRECT_WRITE.into());
    }
}

/// Checks a claim that was written by hand and gives it its token and time. The acquisition itself
/// is opened once the row is written: an INSERT … ON CONFLICT may yet leave this row out.
fn claim_by_hand(row: &Session, sd_id: &str, given_up: Option<(&str, i64)>) -> Result<Session> {
    id::check(Some(sd_id)).map_err(|rule| ClaimError::InvalidId { argument: "sd_id", rule })?;
    Db::within(|db| {
        let canonical = match claim::look(db, None, sd_id)?.sd {
            Some(sd) => sd.sd_id,
            None => return Err(unknown_sd(sd_id)),
        };
        let mut concerned: Vec<String> =
            given_up.iter().map(|(sd_id, _)| (*sd_id).to_owned()).collect();
        concerned.push(canonical.clone());
        if !directive::lock(db, concerned)?.contains(&canonical) {
            // Whoever was waited for has deleted it, or put another row in its place.
            return Err(replaced_sd(sd_id));
        }
        claim::see_latest(db, &canonical)?;
        claim::see_latest_stops(db, &canonical)?;
        contradiction::settle(db, &canonical, Wait::Block)?;

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
        if let Some((_, claim_id)) = given_up {
            guard::exclude(db, claim_id)?;
        }
        // After all that had to be waited for.
        let mut claimed_at = row.moment();
        let now = time::now();
        if claimed_at > now || row.heartbeat_at > now {
            claimed_at = claim::not_before_the_last(db, &canonical, claimed_at)?;
        }
        Ok(Session {
            sd_id: Some(canonical),
            claim_id: Some(claim::next_id(db)?),
            claimed_at: Some(claimed_at),
            // A claim is a sign of life.
            heartbeat_at: row.heartbeat_at.max(now),
            status: "active".into(),
            silent_until: row.silent_until.filter(|_| given_up.is_none()),
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

/// The columns that make a session's row whole.
fn values_of(row: Session) -> Vec<(&'static str, Value)> {
    vec![
        ("sd_id", Value::Text(row.sd_id)),
        ("claim_id", Value::Bigint(row.claim_id)),
        ("claimed_at", Value::Instant(row.claimed_at)),
        ("track", Value::Text(row.track)),
        ("status", Value::Text(Some(row.status))),
        ("silent_until", Value::Instant(row.silent_until)),
        ("released_at", Value::Instant(row.released_at)),
        ("release_reason", Value::Text(row.release_reason)),
        ("lost_claim_id", Value::Bigint(row.lost_claim_id)),
        ("lost_to", Value::Text(row.lost_to)),
        ("heartbeat_at", Value::Instant(Some(row.heartbeat_at))),
        ("updated_at", Value::Instant(Some(time::now()))),
    ]
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
