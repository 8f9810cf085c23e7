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

use super::contradiction::{self, Stranded};
use super::history::{self, Opened};
use super::picture::{self, Picture};
use super::reap;
use crate::board::Place;
use crate::error::{ClaimError, Result};
use crate::guc;
use crate::identity::Role;
use crate::pg::time;
use crate::spi::intent::{Intent, Meaning};
use crate::spi::session::{self, Held, Session};
use crate::spi::statement::Db;
use crate::spi::table::Wait;
use crate::spi::{conflict, directive, guard, heartbeat, quota};

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
        owner_role: Role,
        claim_id: i64,
        sd_id: String,
        claimed_at: DateTime<Utc>,
        track: Option<String>,
    },
    Take {
        sd_id: String,
        /// The session, with what it gives up for the SD.
        session: Box<Session>,
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
    /// Whether it is only to be confirmed that the session holds it: then it is not claimed where that is no longer
    /// so.
    pub only_if_held: bool,
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
    // Whether history and sessions may not agree about the SD.
    let mut is_contradictory = false;
    for _ in 0..ROUNDS {
        let picture = if locked.is_empty() {
            picture::glance(db, session_id, sd_id)?
        } else {
            picture::look(db, Some(session_id), sd_id)?
        };
        // Where no worker sets it right such an owner would be immortal: the one refusal that writes.
        if let Some((owner, _)) = picture.owner.as_ref().filter(|_| picture.is_owner_ahead)
            && !guc::worker()
            && !time::is_read_only()
        {
            reap::pull_back(db, &owner.session_id)?;
        }
        let is_contested = picture.is_session_contested;
        let finished = held_though_finished(&picture, request);
        let verdict = judge(picture, request, &may_act_for)?;
        if let Some(held) = finished
            && !time::is_read_only()
            && contradiction::end_finished(db, &held.session_id, &held.sd_id, held.claim_id)?
        {
            continue;
        }
        match verdict {
            Verdict::Refuse(refusal) => return Ok(Err(refusal)),
            Verdict::AlreadyHeld { owner_role, claim_id, sd_id, claimed_at, track } => {
                if contradiction::is_not_open(db, session_id, &sd_id, claim_id)?
                    && !locked.contains(&sd_id)
                {
                    locked.extend(directive::lock(db, vec![sd_id.clone()])?);
                    contradiction::settle(db, &sd_id, Wait::Block)?;
                    continue;
                }
                // A claim is a sign of life.
                if heartbeat::beat(db, session_id, owner_role, Some(claim_id))?.is_some() {
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
            Verdict::Take { session, sd_id, loser, has_conflicts } => {
                if locked.is_empty()
                    && (await_guards(&session, loser.as_ref().filter(|_| request.force.is_some()))?
                        || is_contested && session::await_writer(db, session_id)?)
                {
                    continue;
                }
                let mut concerned = vec![sd_id.clone()];
                concerned.extend(session.sd_id.clone());
                let is_locked = concerned.iter().all(|sd_id| locked.contains(sd_id));
                if is_locked {
                    picture::see_latest_stops(db, &sd_id)?;
                }
                // Who gives up another SD for it holds no more than before; force is an operator's.
                if session.sd_id.is_none()
                    && request.force.is_none()
                    && let Some(refusal) = quota::refuse_claim(db, session.owner_role)?
                {
                    return Ok(Err(refusal));
                }
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
                    locked.extend(session.sd_id);
                    continue;
                }
                // An acquisition that no session holds would keep the SD for ever.
                if (loser.is_some() || is_contradictory)
                    && !contradiction::settle(db, &sd_id, wait_for(queued))?.is_empty()
                {
                    continue;
                }
                // A stale owner whose row somebody is writing may be beating this very moment.
                if let Some(owner) = loser.as_ref().filter(|_| queued.is_some())
                    && hold_owner(db, owner, Wait::Skip)?.is_none()
                {
                    return Ok(Err(Refusal::SdBusy { sd_id }));
                }
                let request = Request { sd_id: &sd_id, ..request };
                // Entering the conflicts may have taken a while.
                let may_be_contested = is_contested || has_conflicts;
                if let Some(claimed) = take(db, request, &session, loser, may_be_contested)? {
                    return Ok(Ok(claimed));
                }
                if queued.is_some() && is_contradictory {
                    return Ok(Err(Refusal::SdBusy { sd_id: sd_id.to_owned() }));
                }
                is_contradictory = true;
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

/// Who asks for what the queue chose waits for nobody.
fn wait_for(queued: Option<Queued<'_>>) -> Wait {
    if queued.is_some() { Wait::Skip } else { Wait::Block }
}

/// Who holds the SD although it is finished, or holds what the backlog does not have any more: somebody has written past the
/// triggers.
fn held_though_finished(picture: &Picture, request: Request<'_>) -> Option<Stranded> {
    match &picture.sd {
        Some(sd) if sd.is_terminal => {
            let (owner, _) = picture.owner.as_ref()?;
            Some(Stranded {
                session_id: owner.session_id.clone(),
                sd_id: sd.sd_id.clone(),
                claim_id: owner.claim_id,
            })
        }
        Some(_) => None,
        None => {
            let session = picture.session.as_ref()?;
            let (sd_id, claim_id) = session.claim().filter(|(held, _)| *held == request.sd_id)?;
            Some(Stranded {
                session_id: session.session_id.clone(),
                sd_id: sd_id.to_owned(),
                claim_id,
            })
        }
    }
}

/// Waits for whoever guards what the session gives up, or what is taken from its owner by force. Before the SDs
/// are locked, which they may come to need.
fn await_guards(session: &Session, loser: Option<&Owner>) -> Result<bool> {
    let mut has_waited = false;
    for claim_id in session.claim_id.into_iter().chain(loser.map(|owner| owner.claim_id)) {
        has_waited |= guard::await_others(claim_id)?;
    }
    Ok(has_waited)
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
    if request.only_if_held && session.sd_id.as_deref() != Some(request.sd_id) {
        return Ok(Verdict::Refuse(Refusal::NoClaim { session_id: session.session_id }));
    }
    let Some(sd) = picture.sd else {
        let sd_id = request.sd_id.to_owned();
        return Ok(Verdict::Refuse(Refusal::SdNotFound { sd_id }));
    };
    if let (Some((held, claim_id)), Some(claimed_at)) = (session.claim(), session.claimed_at)
        && (held == sd.sd_id || request.queued.is_some())
    {
        let (sd_id, track) = (held.to_owned(), session.track);
        let owner_role = session.owner_role;
        return Ok(Verdict::AlreadyHeld { owner_role, claim_id, sd_id, claimed_at, track });
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
    Ok(Verdict::Take { sd_id: sd.sd_id, session: Box::new(session), loser, has_conflicts })
}

/// Writes the claim. `None` when something changed since the look; then nothing is left behind.
fn take(
    db: &Db<'_>,
    request: Request<'_>,
    session: &Session,
    loser: Option<Owner>,
    may_be_contested: bool,
) -> Result<Option<Claimed>> {
    let Request { sd_id, session_id, track, force, queued, .. } = request;
    let held = session.claim_id;
    if let Some(held) = held {
        guard::exclude(db, held)?;
    }
    let mut not_before = session.moment();
    // Whoever writes the session is waited for before it is said when the claim begins.
    if loser.is_none() && may_be_contested && session::is_contested(db, session_id)? {
        let now = session::hold(db, session_id, Wait::Block)?;
        if now.is_none_or(|now| now.session.is_released() || now.session.claim_id != held) {
            return Ok(None);
        }
    }
    if let Some(owner) = &loser {
        not_before = not_before.max(owner.claimed_at);
        // Force waits for the owner's guards, before any session is locked. Otherwise a guard that was
        // opened since the look is not waited for.
        if force.is_some() {
            guard::exclude(db, owner.claim_id)?;
        } else if !guard::try_exclude(db, owner.claim_id)? {
            return Ok(None);
        }
        // Its own session is locked before the owner loses anything: nobody is evicted for a claim
        // that is refused in the end.
        let is_held = session::hold(db, session_id, Wait::Block)?
            .is_some_and(|now| !now.session.is_released() && now.session.claim_id == held);
        if !is_held || !expire(db, owner, session_id, force)? {
            return Ok(None);
        }
    }
    let opened = Opened {
        sd_id,
        session_id,
        track,
        hostname: session.hostname.as_deref(),
        codebase: session.codebase.as_deref(),
        took_over: loser.as_ref().map(|owner| owner.claim_id),
        not_before: Some(not_before),
        may_be_set_back: session.heartbeat_at > time::now(),
        queued,
    };
    let Some((claim_id, claimed_at)) = history::open(db, opened)? else {
        return match loser {
            None => Ok(None),
            // The SD is locked and its owner has just lost it: an acquisition that is still open
            // belongs to nobody. The error undoes the takeover.
            Some(_) => Err(ClaimError::Unsettled { sd_id: sd_id.to_owned() }),
        };
    };
    if !grant(db, request, claim_id, claimed_at, held)? {
        // The owner has lost it already: the error undoes that as well.
        if loser.is_some() {
            return Err(ClaimError::Unsettled { sd_id: sd_id.to_owned() });
        }
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
        released_sd: session.sd_id.clone(),
        took_over: loser.as_ref().map(TookOver::from),
    }))
}

/// The owner's row, locked while the owner still has the claim.
fn hold_owner(db: &Db<'_>, owner: &Owner, wait: Wait) -> Result<Option<Held>> {
    let held = session::hold(db, &owner.session_id, wait)?;
    Ok(held.filter(|held| held.session.claim_id == Some(owner.claim_id)))
}

/// Ends the owner's claim if its lease has expired, or by force.
fn expire(db: &Db<'_>, owner: &Owner, in_favour_of: &str, force: Option<&str>) -> Result<bool> {
    // Its row first: a heartbeat that is being written has then been, and is seen, and none comes any
    // more once the board is closed.
    let Some(held) = hold_owner(db, owner, Wait::Block)? else {
        return Ok(false);
    };
    Place::of(db.catalog()?.sessions, &owner.session_id).close();
    let now = time::now();
    let lease = held.session.lease(heartbeat::latest_of(db, &held.session)?);
    if force.is_none() && lease.reclaimable_at(&guc::lease_rules()) > now {
        return Ok(false);
    }
    let reason = force.unwrap_or(TAKEN_OVER);
    let loser = Session {
        lost_to: Some(in_favour_of.to_owned()),
        ..held.session.without_claim(now, reason, true)
    };
    held.write(db, &loser)?;
    Ok(true)
}

/// Gives the open acquisition to its session while that still holds `held` and nothing else.
fn grant(
    db: &Db<'_>,
    Request { sd_id, session_id, track, .. }: Request<'_>,
    claim_id: i64,
    claimed_at: DateTime<Utc>,
    held: Option<i64>,
) -> Result<bool> {
    let granting = Meaning::to(Intent::Grant { claim_id, is_undone: false });
    let granted = session::change(db, session_id, |session| {
        // It may have held and lost another one since the acquisition was said to begin.
        let lost_since = session.released_at.is_some_and(|then| then > claimed_at);
        (!session.is_released() && session.claim_id == held && !lost_since).then(|| Session {
            sd_id: Some(sd_id.to_owned()),
            claim_id: Some(claim_id),
            claimed_at: Some(claimed_at),
            track: track.map(str::to_owned),
            status: "active".into(),
            // Announced for what is given up.
            silent_until: session.silent_until.filter(|_| held.is_none()),
            // A claim is a sign of life.
            heartbeat_at: session.heartbeat_at.max(time::now()),
            lost_claim_id: None,
            lost_to: None,
            ..session.clone()
        })
    })?;
    if granting.is_undone() {
        return Err(ClaimError::Undone { sd_id: sd_id.to_owned() });
    }
    Ok(granted.is_some())
}
