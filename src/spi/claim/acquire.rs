//! Acquiring an SD.
//!
//! Look; if the answer may be yes, lock the SDs concerned and look again on a fresh snapshot; then
//! write, each write a compare-and-set that fails where the row is no longer as it was seen. A
//! refusal on the first look has waited for nobody and written nothing.
//!
//! Everyone locks in one order: SDs (by id), the acquisition, sessions. A heartbeat locks its
//! session only, so it waits for a claim's transaction but never for what that waits for.

use chrono::{DateTime, Utc};
use pg_claims_core::outcome::{Claimed, Owner, TookOver};
use pg_claims_core::queue::Queued;
use pg_claims_core::refusal::Refusal;
use pgrx::pg_sys::BuiltinOid::{BOOLOID, INT8OID, TEXTOID, TIMESTAMPTZOID};

use super::history;
use super::picture::{self, Picture};
use super::reap;
use super::{Ending, Granting};
use crate::board::Place;
use crate::error::{ClaimError, Result};
use crate::guc;
use crate::spi::session::{self, Session};
use crate::spi::statement::{Db, Statement};
use crate::spi::time;
use crate::spi::{conflict, directive, guard};

/// How often to look again before giving up. Each round means that another transaction has
/// committed a change to the same SD or session since the last look, so a few suffice; only
/// tables that contradict each other would go on for ever.
const ROUNDS: usize = 16;

/// The reason recorded for a stale owner whose SD another session's claim took over.
const TAKEN_OVER: &str = "taken_over";

/// What a look at the tables allows.
enum Verdict {
    Refuse(Refusal),
    AlreadyHeld {
        claim_id: i64,
        sd_id: String,
        claimed_at: DateTime<Utc>,
        track: Option<String>,
    },
    Take {
        sd_id: String,
        gives_up: Option<(String, i64)>,
        /// Who loses the SD: a stale owner, or any by force.
        loser: Option<Owner>,
        has_conflicts: bool,
    },
}

/// Who wants what.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// The SD, by any of its keys.
    pub sd_id: &'a str,
    /// The session that is to have it.
    pub session_id: &'a str,
    /// The track to be noted with the claim.
    pub track: Option<&'a str>,
    /// The reason for taking the SD also from a live session.
    pub force: Option<&'a str>,
    /// How the queue has chosen it. Then `sd_id` is the canonical one and this transaction has locked
    /// the SD. What the session holds already is not given up for it, but is the answer; and nobody is
    /// waited for, as there are others to be had.
    pub queued: Option<Queued<'a>>,
}

/// Gives the SD to the session, or says why not. `may_act_for` checks the caller's right to the session.
pub fn acquire(
    db: &Db<'_>,
    request: Request<'_>,
    may_act_for: impl Fn(&Session) -> Result<()>,
) -> Result<Result<Claimed, Refusal>> {
    let Request { sd_id, session_id, queued, .. } = request;
    let mut locked: Vec<String> = queued.iter().map(|_| sd_id.to_owned()).collect();
    for _ in 0..ROUNDS {
        let picture = picture::look(db, Some(session_id), sd_id)?;
        // Where no worker sets it right such an owner would be immortal: the one refusal that writes.
        if let Some((owner, _)) = picture.owner.as_ref().filter(|_| picture.is_owner_ahead)
            && !guc::worker()
            && !time::is_read_only()
        {
            reap::pull_back(db, &owner.session_id)?;
        }
        match judge(picture, request, &may_act_for)? {
            Verdict::Refuse(refusal) => return Ok(Err(refusal)),
            Verdict::AlreadyHeld { claim_id, sd_id, claimed_at, track } => {
                if touch(db, session_id, claim_id)? {
                    return Ok(Ok(Claimed {
                        success: true,
                        session_id: session_id.to_owned(),
                        sd_id,
                        track,
                        claimed_at,
                        claim_id,
                        already_owned: true,
                        released_sd: None,
                        took_over: None,
                    }));
                }
            }
            Verdict::Take { sd_id, gives_up, loser, has_conflicts } => {
                let mut concerned = vec![sd_id.clone()];
                concerned.extend(gives_up.as_ref().map(|(given_up, _)| given_up.clone()));
                let is_locked = concerned.iter().all(|sd_id| locked.contains(sd_id));
                if has_conflicts {
                    if is_locked && queued.is_none() {
                        conflict::enter(db, &sd_id)?;
                    } else if is_locked && !conflict::try_enter(db, &sd_id)? {
                        return Ok(Err(Refusal::SdBusy { sd_id }));
                    }
                    // Before anything is locked as well: so a refusal writes nothing.
                    if let Some(conflict) = conflict::live_opponent(db, &sd_id, session_id)? {
                        return Ok(Err(Refusal::Conflict { sd_id, conflict }));
                    }
                }
                if !is_locked {
                    locked.extend(directive::lock(db, concerned)?);
                    // The SD that is given up need not be there any more; the one to be claimed is
                    // looked for again, and locked, until it is.
                    locked.extend(gives_up.map(|(given_up, _)| given_up));
                    continue;
                }
                // A stale owner whose row somebody is writing may be beating this very moment.
                if let Some(owner) = loser.as_ref().filter(|_| queued.is_some())
                    && !session::try_hold(db, &owner.session_id, owner.claim_id)?
                {
                    return Ok(Err(Refusal::SdBusy { sd_id }));
                }
                let request = Request { sd_id: &sd_id, ..request };
                if let Some(claimed) = take(db, request, gives_up, loser)? {
                    return Ok(Ok(claimed));
                }
            }
        }
    }
    let sd_id = sd_id.to_owned();
    if queued.is_some() {
        Ok(Err(Refusal::SdBusy { sd_id }))
    } else {
        Err(ClaimError::Unsettled { sd_id })
    }
}

fn judge(
    picture: Picture,
    request: Request<'_>,
    may_act_for: &impl Fn(&Session) -> Result<()>,
) -> Result<Verdict> {
    let Some(session) = picture.session else {
        let session_id = request.session_id.to_owned();
        return Ok(Verdict::Refuse(Refusal::SessionNotFound { session_id }));
    };
    may_act_for(&session)?;
    if session.is_released() {
        let session_id = session.session_id;
        return Ok(Verdict::Refuse(Refusal::SessionReleased { session_id }));
    }
    let Some(sd) = picture.sd else {
        let sd_id = request.sd_id.to_owned();
        return Ok(Verdict::Refuse(Refusal::SdNotFound { sd_id }));
    };
    if let (Some((held, claim_id)), Some((claimed_at, track))) =
        (&session.claim, picture.held_since)
        && (*held == sd.sd_id || request.queued.is_some())
    {
        let claim_id = *claim_id;
        return Ok(Verdict::AlreadyHeld { claim_id, sd_id: held.clone(), claimed_at, track });
    }
    if sd.is_terminal {
        let status = sd.status.unwrap_or_default();
        return Ok(Verdict::Refuse(Refusal::SdTerminalStatus { sd_id: sd.sd_id, status }));
    }
    let loser = match picture.owner {
        Some((owner, _)) if request.force.is_some() => Some(owner),
        // A stale owner's SD may still be kept for it for a while, and an open transaction of its own
        // that guards the claim is a sign of life.
        Some((owner, is_stale)) if !is_stale || owner.kept_until.is_some() || owner.guarded => {
            return Ok(Verdict::Refuse(Refusal::AlreadyClaimed { sd_id: sd.sd_id, owner }));
        }
        Some((owner, _)) => Some(owner),
        None => None,
    };
    if let Some(hold) = sd.hold {
        return Ok(Verdict::Refuse(Refusal::Held { sd_id: sd.sd_id, hold }));
    }
    let has_conflicts = sd.has_conflicts;
    Ok(Verdict::Take { sd_id: sd.sd_id, gives_up: session.claim, loser, has_conflicts })
}

/// Writes the claim. `None` when something changed since the look; then nothing is left behind.
fn take(
    db: &Db<'_>,
    request: Request<'_>,
    gives_up: Option<(String, i64)>,
    loser: Option<Owner>,
) -> Result<Option<Claimed>> {
    let Request { sd_id, session_id, track, force, queued } = request;
    let held = gives_up.as_ref().map(|(_, claim_id)| *claim_id);
    if let Some(held) = held {
        guard::exclude(db, held)?;
    }
    if let Some(owner) = &loser {
        // Force waits for the owner's guards, before any session is locked. Otherwise a guard that was
        // opened since the look is not waited for.
        if force.is_some() {
            guard::exclude(db, owner.claim_id)?;
        } else if !guard::try_exclude(db, owner.claim_id)? {
            return Ok(None);
        }
        // Its own session is locked before the owner loses anything: nobody is evicted for a claim
        // that is refused in the end.
        if !hold_session(db, session_id, held)? || !expire(db, owner, session_id, force)? {
            return Ok(None);
        }
    }
    let took_over = loser.as_ref().map(|owner| owner.claim_id);
    let Some((claim_id, claimed_at)) =
        history::open(db, sd_id, session_id, track, took_over, queued)?
    else {
        return match loser {
            None => Ok(None),
            // The SD is locked and its owner has just lost it: an acquisition that is still open
            // belongs to nobody. The error undoes the takeover.
            Some(_) => Err(ClaimError::Unsettled { sd_id: sd_id.to_owned() }),
        };
    };
    if !grant(db, sd_id, session_id, track, claim_id, claimed_at, held)? {
        history::discard(db, claim_id)?;
        return Ok(None);
    }
    Ok(Some(Claimed {
        success: true,
        sd_id: sd_id.to_owned(),
        session_id: session_id.to_owned(),
        track: track.map(str::to_owned),
        claimed_at,
        claim_id,
        already_owned: false,
        released_sd: gives_up.map(|(given_up, _)| given_up),
        took_over: loser.as_ref().map(TookOver::from),
    }))
}

static TOUCH: Statement = Statement::new(
    |c| {
        format!(
            "UPDATE {}.claude_sessions
                SET heartbeat_at = GREATEST(heartbeat_at, pg_catalog.clock_timestamp())
              WHERE session_id = $1 AND claim_id = $2
          RETURNING 1",
            c.schema
        )
    },
    &[TEXTOID, INT8OID],
);

/// A claim is a sign of life.
fn touch(db: &Db<'_>, session_id: &str, claim_id: i64) -> Result<bool> {
    Ok(db.first_row(&TOUCH, &[session_id.into(), claim_id.into()])?.is_some())
}

static HOLD_SESSION: Statement = Statement::new(
    |c| {
        format!(
            "SELECT 1 FROM {}.claude_sessions
              WHERE session_id = $1 AND status <> 'released'
                AND claim_id IS NOT DISTINCT FROM $2
                FOR NO KEY UPDATE",
            c.schema
        )
    },
    &[TEXTOID, INT8OID],
);

/// Locks the session while it still holds `held` and nothing else.
fn hold_session(db: &Db<'_>, session_id: &str, held: Option<i64>) -> Result<bool> {
    Ok(db.first_row(&HOLD_SESSION, &[session_id.into(), held.into()])?.is_some())
}

// Waits for a heartbeat that is being written, then compares against the row as that left it: a
// heartbeat that was committed first wins.
static EXPIRE: Statement = Statement::new(
    |c| {
        format!(
            "UPDATE {x}.claude_sessions
                SET sd_id = NULL, claim_id = NULL, claimed_at = NULL, track = NULL,
                    status = 'idle', silent_until = NULL,
                    lost_claim_id = claim_id, lost_to = $3,
                    released_at = pg_catalog.clock_timestamp(), release_reason = $4,
                    updated_at = pg_catalog.clock_timestamp()
              WHERE session_id = $1 AND claim_id = $2
                AND ($5 OR {reclaimable_at} <= pg_catalog.clock_timestamp())
          RETURNING 1",
            x = c.schema,
            reclaimable_at = super::reclaimable_at(&c.schema),
        )
    },
    &[TEXTOID, INT8OID, TEXTOID, TEXTOID, BOOLOID],
);

/// Ends the owner's claim if its lease has expired, or by force.
fn expire(db: &Db<'_>, owner: &Owner, in_favour_of: &str, force: Option<&str>) -> Result<bool> {
    let arguments = [
        owner.session_id.as_str().into(),
        owner.claim_id.into(),
        in_favour_of.into(),
        force.unwrap_or(TAKEN_OVER).into(),
        force.is_some().into(),
    ];
    // Its row first: a heartbeat that is being written has then been, and none comes any more.
    if !hold_session(db, &owner.session_id, Some(owner.claim_id))? {
        return Ok(false);
    }
    Place::of(db.catalog()?.sessions, &owner.session_id).close();
    let _ending = Ending::new();
    Ok(db.first_row(&EXPIRE, &arguments)?.is_some())
}

static GRANT: Statement = Statement::new(
    |c| {
        format!(
            "UPDATE {}.claude_sessions
                SET sd_id = $2, claim_id = $3, claimed_at = $4, track = $5, status = 'active',
                    heartbeat_at = GREATEST(heartbeat_at, pg_catalog.clock_timestamp()),
                    lost_claim_id = NULL, lost_to = NULL,
                    updated_at = pg_catalog.clock_timestamp()
              WHERE session_id = $1 AND status <> 'released'
                AND claim_id IS NOT DISTINCT FROM $6
          RETURNING 1",
            c.schema
        )
    },
    &[TEXTOID, TEXTOID, INT8OID, TIMESTAMPTZOID, TEXTOID, INT8OID],
);

/// Gives the open acquisition to its session while that still holds `held` and nothing else.
fn grant(
    db: &Db<'_>,
    sd_id: &str,
    session_id: &str,
    track: Option<&str>,
    claim_id: i64,
    claimed_at: DateTime<Utc>,
    held: Option<i64>,
) -> Result<bool> {
    let granting = Granting::new(claim_id);
    let arguments = [
        session_id.into(),
        sd_id.into(),
        claim_id.into(),
        time::to_server(claimed_at)?.into(),
        track.into(),
        held.into(),
    ];
    let granted = db.first_row(&GRANT, &arguments)?.is_some();
    if granting.is_undone() {
        return Err(ClaimError::Undone { sd_id: sd_id.to_owned() });
    }
    Ok(granted)
}
