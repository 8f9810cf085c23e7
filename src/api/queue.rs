//! The queue: taking the next SD, and showing what there is.

use pg_claims_core::listing::{self, Style};
use pg_claims_core::outcome::Claimed;
use pg_claims_core::queue::QueueReason;
use pg_claims_core::refusal::Refusal;
use pgrx::JsonB;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use serde::Serialize;

use super::{answer, check_may_act_for, shared};
use crate::error::{ClaimError, Result, checked_id};
use crate::guc;
use crate::spi::claim::{self, Request};
use crate::spi::queue::{self, Among, Caller, Choice};
use crate::spi::{Db, directive};

/// The least columns of a terminal that `sd_next` writes for.
const LEAST_WIDTH: i32 = 20;

/// A claim that the queue gave.
#[derive(Serialize)]
struct Next {
    #[serde(flatten)]
    claimed: Claimed,
    title: Option<String>,
    /// `None` for what the session held before.
    queue_reason: Option<QueueReason>,
}

#[pg_extern(volatile, parallel_unsafe, security_definer)]
#[search_path(pg_catalog, pg_temp)]
fn claim_next_sd(
    p_session_id: Option<&str>,
    p_track: default!(Option<&str>, "NULL"),
) -> Result<JsonB, ErrorReport> {
    let session_id = checked_id("p_session_id", p_session_id)?;
    Ok(Db::connect(|db| answer(claim_next(db, session_id, p_track)?))?)
}

/// Each round ends it, or passes over one more SD for good, or finds what the session has come to hold.
fn claim_next(db: &Db<'_>, session_id: &str, track: Option<&str>) -> Result<Result<Next, Refusal>> {
    shared::note_acting_for(session_id);
    let mut passed = Vec::new();
    loop {
        let Some(caller) = queue::caller(db, session_id)? else {
            return Ok(Err(Refusal::SessionNotFound { session_id: session_id.into() }));
        };
        check_may_act_for(db, &caller.session)?;
        if caller.session.is_released() {
            return Ok(Err(Refusal::SessionReleased { session_id: session_id.into() }));
        }
        let (sd_id, queued, track_of_sd) = match &caller.session.claim {
            Some((held, _)) => (held.clone(), None, None),
            None => match choose(db, &caller, track, &passed)? {
                Some((choice, reason)) => {
                    (choice.sd_id, Some((reason, choice.title)), choice.track)
                }
                None => {
                    let shortage = queue::shortage(db, track)?;
                    return Ok(Err(Refusal::QueueEmpty { shortage }));
                }
            },
        };
        let request = Request {
            sd_id: &sd_id,
            session_id,
            track: track.or(track_of_sd.as_deref()),
            force: None,
            queued: queued.as_ref().map(|(reason, _)| *reason),
        };
        match claim::acquire(db, request, |session| check_may_act_for(db, session))? {
            Ok(claimed) => {
                let chosen = queued.filter(|_| !claimed.already_owned);
                let (queue_reason, title) = match chosen {
                    Some((reason, title)) => (Some(reason), title),
                    None => (None, directive::title(db, &claimed.sd_id)?),
                };
                return Ok(Ok(Next { claimed, title, queue_reason }));
            }
            // Looked for again at the next round.
            Err(Refusal::SessionNotFound { .. } | Refusal::SessionReleased { .. }) => {}
            Err(_) => passed.push(sd_id),
        }
    }
}

/// First what the reaper took from this session, then what its place has worked on, then the order.
fn choose(
    db: &Db<'_>,
    caller: &Caller,
    track: Option<&str>,
    passed: &[String],
) -> Result<Option<(Choice, QueueReason)>> {
    if let Some(lost) = &caller.lost {
        let these = Among::These { sd_ids: std::slice::from_ref(lost), track };
        if let Some(choice) = queue::next(db, these, passed)? {
            return Ok(Some((choice, QueueReason::Lost)));
        }
    }
    if let Some(place) = caller.place.as_ref().filter(|_| guc::affinity()) {
        let sd_ids = queue::familiar(db, place, guc::affinity_limit())?;
        if !sd_ids.is_empty()
            && let Some(choice) = queue::next(db, Among::These { sd_ids: &sd_ids, track }, passed)?
        {
            return Ok(Some((choice, QueueReason::Affinity)));
        }
    }
    let among = track.map_or(Among::All, Among::Track);
    Ok(queue::next(db, among, passed)?.map(|choice| (choice, QueueReason::Order)))
}

#[pg_extern(volatile, parallel_unsafe, security_definer)]
#[search_path(pg_catalog, pg_temp)]
fn sd_next(
    p_track: default!(Option<&str>, "NULL"),
    p_limit: default!(Option<i32>, "20"),
    p_color: default!(Option<bool>, "false"),
    p_session_id: default!(Option<&str>, "NULL"),
    p_width: default!(Option<i32>, "80"),
) -> Result<SetOfIterator<'static, String>, ErrorReport> {
    let at_least = |argument, least: i32, given: Option<i32>| match given {
        Some(given) if given < least => Err(ClaimError::InvalidArgument {
            argument,
            reason: format!("must be at least {least}, and is {given}"),
            hint: None,
        }),
        _ => Ok(given),
    };
    let limit = at_least("p_limit", 1, p_limit)?;
    let width = at_least("p_width", LEAST_WIDTH, p_width)?.unwrap_or(80);
    let style = Style {
        width: width.unsigned_abs() as usize,
        color: p_color.unwrap_or(false),
        session_id: p_session_id,
    };
    let lines = Db::connect(|db| {
        // One more tells whether there are more.
        let mut entries = queue::list(db, p_track, limit.map(|limit| i64::from(limit) + 1))?;
        let shown = limit.map_or(entries.len(), |limit| limit.unsigned_abs() as usize);
        let has_more = entries.len() > shown;
        entries.truncate(shown);
        if entries.is_empty() {
            return Ok(vec![queue::shortage(db, p_track)?.message()]);
        }
        let mut lines = listing::lines(&entries, &style);
        if has_more {
            lines.extend([String::new(), format!("The first {shown}; p_limit shows more.")]);
        }
        Ok(lines)
    })?;
    Ok(SetOfIterator::new(lines))
}

// Stable, as v_sd_queue calls it: see is_claim_live().
#[pg_extern(stable, parallel_unsafe, security_definer)]
#[search_path(pg_catalog, pg_temp)]
pub fn dependency_cycles()
-> Result<TableIterator<'static, (name!(sd_id, String), name!(cycle, String))>, ErrorReport> {
    let cycles = Db::connect(queue::cycles)?;
    Ok(TableIterator::new(cycles.into_iter().map(|circular| (circular.sd_id, circular.cycle))))
}
