//! Signs of life: heartbeats, announced silence, progress.

use std::collections::HashSet;

use chrono::TimeDelta;
use pg_claims_core::age;
use pg_claims_core::refusal::Refusal;
use pg_claims_core::session::{Beat, BeatOrRefusal, Beats, Extended, Progressed};
use pgrx::datum::Interval;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

use super::argument::{MAX_REASON_CHARACTERS, checked_id, checked_text};
use super::{answer, check_may_act_for, may_act_for_all, running, shared};
use crate::error::{ClaimError, Result};
use crate::guc;
use crate::identity;
use crate::jsonb::Jsonb;
use crate::pg::time;
use crate::spi::claim::contradiction;
use crate::spi::heartbeat::{self, Found};
use crate::spi::{Db, catalog, claim, session};

/// The most sessions that one call beats for.
const MOST_SESSIONS: usize = 10_000;

// Not SECURITY DEFINER: the board needs no rights, and the server would spend more on them than on the
// heartbeat.
#[pg_extern(volatile, parallel_unsafe)]
fn update_session_heartbeat(
    p_session_id: Option<&str>,
    p_claim_id: default!(Option<i64>, "NULL"),
    fcinfo: pg_sys::FunctionCallInfo,
) -> Result<Jsonb, ErrorReport> {
    let session_id = checked_id("p_session_id", p_session_id)?;
    shared::note_acting_for(session_id);
    let caller = identity::caller();
    let function = running(fcinfo);
    if let Some(sessions) = catalog::sessions_of(function)
        && let Some(beat) = heartbeat::beat_on_board(sessions, session_id, caller, p_claim_id)
    {
        return Ok(answer(Ok(beat))?);
    }
    Ok(Db::connect_for(function, |db| answer(beat(db, session_id, p_claim_id)?))?)
}

/// Records a sign of life of the session, or says why not.
pub fn beat(db: &Db<'_>, session_id: &str, named: Option<i64>) -> Result<Result<Beat, Refusal>> {
    shared::note_acting_for(session_id);
    let (sessions, caller) = (db.catalog()?.sessions, identity::caller());
    if let Some(beat) = heartbeat::beat_on_board(sessions, session_id, caller, named) {
        return Ok(Ok(beat));
    }
    // One write where all is well; only its failure asks why.
    let mut beaten = heartbeat::beat(db, session_id, caller, named)?;
    if beaten.is_none() {
        let Some(found) = session::find(db, session_id)? else {
            return Ok(Err(Refusal::SessionNotFound { session_id: session_id.into() }));
        };
        check_may_act_for(db, &found)?;
        beaten = heartbeat::beat(db, session_id, found.owner_role, named)?;
    }
    match beaten {
        Some((beat, lost)) => Ok(Ok(with_lost_claim(db, beat, lost)?)),
        None => Ok(Err(not_held(db, session_id, named)?)),
    }
}

fn with_lost_claim(db: &Db<'_>, mut beat: Beat, lost: Option<i64>) -> Result<Beat> {
    if let Some(lost) = lost {
        beat.lost_claim = claim::lost(db, lost, &beat.session_id)?;
    }
    Ok(beat)
}

/// Why a session that exists was not written: it has ended, or lost the claim that was named.
fn not_held(db: &Db<'_>, session_id: &str, named: Option<i64>) -> Result<Refusal> {
    let session_id = session_id.to_owned();
    Ok(match named {
        Some(claim_id) => Refusal::ClaimLost {
            lost: claim::lost(db, claim_id, &session_id)?,
            session_id,
            claim_id,
        },
        None => Refusal::SessionReleased { session_id },
    })
}

#[pg_extern(volatile, parallel_unsafe)]
fn heartbeat_sessions(
    p_session_ids: Option<Vec<Option<String>>>,
    fcinfo: pg_sys::FunctionCallInfo,
) -> Result<Jsonb, ErrorReport> {
    let mut session_ids: Vec<String> = Vec::new();
    let mut known: HashSet<&str> = HashSet::new();
    let given = p_session_ids.ok_or_else(|| ClaimError::InvalidArgument {
        argument: "p_session_ids",
        reason: "must not be NULL".into(),
        hint: Some("Give an array of session ids; it may be empty.".into()),
    })?;
    if given.len() > MOST_SESSIONS {
        Err(ClaimError::InvalidArgument {
            argument: "p_session_ids",
            reason: format!("must not hold more than {MOST_SESSIONS} ids"),
            hint: Some("Beat for the rest with another call.".into()),
        })?;
    }
    for session_id in &given {
        let session_id = checked_id("p_session_ids", session_id.as_deref())?;
        // A session that is named twice beats once and is answered once.
        if known.insert(session_id) {
            session_ids.push(session_id.to_owned());
        }
    }
    let caller = identity::caller();
    let mut answers: Vec<Option<BeatOrRefusal>> = session_ids.iter().map(|_| None).collect();
    // Before anything that may wait: these count whatever becomes of the others.
    if let Some(sessions) = catalog::sessions_of(running(fcinfo)) {
        for (session_id, answer) in session_ids.iter().zip(&mut answers) {
            let beat = heartbeat::beat_on_board(sessions, session_id, caller, None);
            *answer = beat.map(BeatOrRefusal::Beat);
        }
    }
    if answers.iter().any(Option::is_none) {
        Db::connect(running(fcinfo), |db| {
            let rest = session_ids.iter().zip(&answers).filter(|(_, answer)| answer.is_none());
            let rest: Vec<String> = rest.map(|(session_id, _)| session_id.clone()).collect();
            let mut of_rest = beat_all(db, &rest)?.into_iter();
            for answer in answers.iter_mut().filter(|answer| answer.is_none()) {
                *answer = of_rest.next();
            }
            Ok(())
        })?;
    }
    Ok(answer(Ok(Beats::new(answers.into_iter().flatten().collect())))?)
}

/// The heartbeats that the table must record, in the order of the question.
fn beat_all(db: &Db<'_>, session_ids: &[String]) -> Result<Vec<BeatOrRefusal>> {
    if session_ids.is_empty() {
        return Ok(Vec::new());
    }
    may_act_for_all(db, session_ids)?;
    contradiction::end_finished_of(db, session_ids)?;
    let mut answers = Vec::with_capacity(session_ids.len());
    for (session_id, found) in heartbeat::beat_many(db, session_ids)? {
        answers.push(match found {
            Found::Beaten(beat, lost) => BeatOrRefusal::Beat(with_lost_claim(db, *beat, lost)?),
            Found::Unknown => BeatOrRefusal::Refusal(Refusal::SessionNotFound { session_id }),
            Found::Released => BeatOrRefusal::Refusal(Refusal::SessionReleased { session_id }),
            Found::Busy => BeatOrRefusal::Refusal(Refusal::SessionBusy { session_id }),
        });
    }
    Ok(answers)
}

#[pg_extern(volatile, parallel_unsafe)]
fn extend_lease(
    p_session_id: Option<&str>,
    p_for: Option<Interval>,
    p_claim_id: default!(Option<i64>, "NULL"),
    fcinfo: pg_sys::FunctionCallInfo,
) -> Result<Jsonb, ErrorReport> {
    let session_id = checked_id("p_session_id", p_session_id)?;
    let silence = checked_silence(p_for)?;
    Ok(Db::connect(running(fcinfo), |db| answer(extend(db, session_id, silence, p_claim_id)?))?)
}

fn checked_silence(silence: Option<Interval>) -> Result<Interval> {
    let longest = guc::max_silence();
    let refused = |reason: String| ClaimError::InvalidArgument {
        argument: "p_for",
        reason,
        hint: Some(format!(
            "Give an interval of 0 (which takes an announcement back) to {} seconds, the value of pg_claims.max_silence, and announce again in time.",
            age::seconds(longest)
        )),
    };
    let silence = silence.ok_or_else(|| refused("must not be NULL".into()))?;
    match time::from_interval(&silence) {
        time if time < TimeDelta::zero() => Err(refused("must not be negative".into())),
        time if time > longest => {
            Err(refused(format!("must not be longer than {} seconds", age::seconds(longest))))
        }
        _ => Ok(silence),
    }
}

fn extend(
    db: &Db<'_>,
    session_id: &str,
    silence: Interval,
    named: Option<i64>,
) -> Result<Result<Extended, Refusal>> {
    if let Err(refusal) = checked_session(db, session_id)? {
        return Ok(Err(refusal));
    }
    let Some(leased) = heartbeat::extend(db, session_id, silence, named)? else {
        return Ok(Err(not_held(db, session_id, named)?));
    };
    Ok(Ok(Extended {
        success: true,
        session_id: session_id.to_owned(),
        heartbeat_at: leased.lease.heartbeat_at,
        silent_until: leased.lease.silent_until,
        lease_expires_at: leased.lease.expires_at(&guc::lease_rules()),
        sd_id: leased.sd_id,
        claim_id: leased.claim_id,
    }))
}

/// A session that the caller may act for, or why there is none.
pub fn checked_session(db: &Db<'_>, session_id: &str) -> Result<Result<(), Refusal>> {
    shared::note_acting_for(session_id);
    let session_id = session_id.to_owned();
    let Some(found) = session::find(db, &session_id)? else {
        return Ok(Err(Refusal::SessionNotFound { session_id }));
    };
    check_may_act_for(db, &found)?;
    if found.is_released() {
        return Ok(Err(Refusal::SessionReleased { session_id }));
    }
    Ok(Ok(()))
}

#[pg_extern(volatile, parallel_unsafe)]
fn report_progress(
    p_session_id: Option<&str>,
    p_note: default!(Option<&str>, "NULL"),
    p_claim_id: default!(Option<i64>, "NULL"),
    fcinfo: pg_sys::FunctionCallInfo,
) -> Result<Jsonb, ErrorReport> {
    let session_id = checked_id("p_session_id", p_session_id)?;
    let note = checked_text("p_note", p_note, MAX_REASON_CHARACTERS)?;
    Ok(Db::connect(running(fcinfo), |db| answer(progress(db, session_id, note, p_claim_id)?))?)
}

fn progress(
    db: &Db<'_>,
    session_id: &str,
    note: Option<&str>,
    named: Option<i64>,
) -> Result<Result<Progressed, Refusal>> {
    if let Err(refusal) = checked_session(db, session_id)? {
        return Ok(Err(refusal));
    }
    match heartbeat::progress(db, session_id, note, named)? {
        Some(progressed) => Ok(Ok(progressed)),
        None => Ok(Err(not_held(db, session_id, named)?)),
    }
}
