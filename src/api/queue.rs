//! The queue: taking the next SD, and showing what there is.

use pg_claims_core::keys;
use pg_claims_core::listing::{self, Style};
use pg_claims_core::outcome::Claimed;
use pg_claims_core::queue::{QueueReason, Queued};
use pg_claims_core::refusal::Refusal;
use pg_claims_core::text::{self, MOST_SHOWN};
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use serde::Serialize;

use super::argument::{checked_id, checked_track};
use super::{answer, check_may_act_for, json, running, shared};
use crate::error::{ClaimError, Result};
use crate::guc;
use crate::jsonb::Jsonb;
use crate::spi::claim::{self, Request};
use crate::spi::queue::{self, Among, Caller, Choice};
use crate::spi::session::{self, Session};
use crate::spi::{Db, directive};

/// The least columns of a terminal that `sd_next` writes for.
const LEAST_WIDTH: i32 = 20;

/// How many times a call takes note that its session has been changed meanwhile.
const MOST_CHANGES: usize = 16;

/// A claim that the queue gave.
#[derive(Serialize)]
struct Next {
    #[serde(flatten)]
    claimed: Claimed,
    title: Option<String>,
    /// `None` for what the session held before.
    queue_reason: Option<QueueReason>,
}

// Not SECURITY DEFINER, as claim_sd.
#[pg_extern(volatile, parallel_unsafe)]
fn claim_next_sd(
    p_session_id: Option<&str>,
    p_track: default!(Option<&str>, "NULL"),
    fcinfo: pg_sys::FunctionCallInfo,
) -> Result<Jsonb, ErrorReport> {
    let session_id = checked_id("p_session_id", p_session_id)?;
    let track = checked_track(p_track)?;
    Ok(Db::connect_for(running(fcinfo), |db| answer(claim_next(db, session_id, track)?))?)
}

/// Each round ends it, passes over one more SD for good, or finds that what the session held or was
/// is no longer so, which it does a few times only.
fn claim_next(db: &Db<'_>, session_id: &str, track: Option<&str>) -> Result<Result<Next, Refusal>> {
    shared::note_acting_for(session_id);
    let may_act = |session: &Session| check_may_act_for(db, session);
    let mut avoided = queue::failed_lately();
    let mut passed = Vec::new();
    let mut changes = 0;
    while changes < MOST_CHANGES {
        let Some(caller) = queue::caller(db, session_id)? else {
            return Ok(Err(Refusal::SessionNotFound { session_id: session_id.into() }));
        };
        check_may_act_for(db, &caller.session)?;
        if caller.session.is_released() {
            return Ok(Err(Refusal::SessionReleased { session_id: session_id.into() }));
        }
        if let Some(held) = &caller.session.sd_id {
            let request = Request {
                sd_id: held,
                session_id,
                track,
                force: None,
                only_if_held: true,
                queued: None,
            };
            match claim::acquire(db, request, may_act)? {
                Ok(claimed) => {
                    let title = directive::title(db, &claimed.sd_id)?;
                    return Ok(Ok(Next { claimed, title, queue_reason: None }));
                }
                // The session holds it, but the backlog does not have it.
                Err(refusal @ Refusal::SdNotFound { .. }) => return Ok(Err(refusal)),
                // It has let it go, lost it or ended just now.
                Err(_) => changes += 1,
            }
            continue;
        }
        // Before an SD is locked, which whoever writes the session may come to need.
        if session::await_writer(db, session_id)? {
            changes += 1;
            continue;
        }
        let all_passed = [passed.as_slice(), &avoided].concat();
        let Some((choice, reason)) = choose(db, &caller, track, &all_passed)? else {
            if avoided.is_empty() {
                return Ok(Err(Refusal::QueueEmpty { shortage: queue::shortage(db, track)? }));
            }
            // There is nothing else.
            avoided.clear();
            continue;
        };
        let request = Request {
            sd_id: &choice.sd_id,
            session_id,
            track: track.or(choice.track.as_deref()),
            force: None,
            only_if_held: false,
            queued: Some(Queued { reason, track }),
        };
        match queue::attempt(&choice.sd_id, || claim::acquire(db, request, may_act))? {
            Ok(claimed) if claimed.already_owned => changes += 1,
            Ok(claimed) => {
                let queue_reason = Some(reason);
                let title = choice.title.map(|title| title.chars().take(MOST_SHOWN).collect());
                return Ok(Ok(Next { claimed, title, queue_reason }));
            }
            Err(Refusal::SessionNotFound { .. } | Refusal::SessionReleased { .. }) => changes += 1,
            // With another SD it would be the same.
            Err(refusal @ Refusal::QuotaReached { .. }) => return Ok(Err(refusal)),
            Err(_) => passed.push(choice.sd_id),
        }
    }
    Ok(Err(Refusal::SessionBusy { session_id: session_id.into() }))
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
        let sd_ids = queue::familiar(db, place, track, guc::affinity_limit())?;
        if !sd_ids.is_empty()
            && let Some(choice) = queue::next(db, Among::These { sd_ids: &sd_ids, track }, passed)?
        {
            return Ok(Some((choice, QueueReason::Affinity)));
        }
    }
    let among = track.map_or(Among::All, Among::Track);
    Ok(queue::next(db, among, passed)?.map(|choice| (choice, QueueReason::Order)))
}

fn at_least(argument: &'static str, least: i32, given: Option<i32>) -> Result<Option<i32>> {
    match given {
        Some(given) if given < least => Err(ClaimError::InvalidArgument {
            argument,
            reason: format!("must be at least {least}, and is {given}"),
            hint: Some("Leave it out for the usual value.".into()),
        }),
        _ => Ok(given),
    }
}

#[pg_extern(volatile, parallel_unsafe)]
fn sd_next(
    p_track: default!(Option<&str>, "NULL"),
    p_limit: default!(Option<i32>, "20"),
    p_color: default!(Option<bool>, "false"),
    p_session_id: default!(Option<&str>, "NULL"),
    p_width: default!(Option<i32>, "80"),
    fcinfo: pg_sys::FunctionCallInfo,
) -> Result<SetOfIterator<'static, String>, ErrorReport> {
    let limit = at_least("p_limit", 1, p_limit)?;
    let track = checked_track(p_track)?;
    let session_id = match p_session_id {
        None => None,
        given => Some(checked_id("p_session_id", given)?),
    };
    let width = at_least("p_width", LEAST_WIDTH, p_width)?.unwrap_or(80);
    let style =
        Style { width: width.unsigned_abs() as usize, color: p_color.unwrap_or(false), session_id };
    let lines = Db::look(running(fcinfo), |db| {
        // One more tells whether there are more.
        let mut entries = queue::list(db, track, limit.map(|limit| i64::from(limit) + 1))?;
        let shown = limit.map_or(entries.len(), |limit| limit.unsigned_abs() as usize);
        let has_more = entries.len() > shown;
        entries.truncate(shown);
        if entries.is_empty() {
            return Ok(vec![text::printable(&queue::shortage(db, track)?.message())]);
        }
        let mut lines = listing::lines(&entries, &style);
        if has_more {
            lines.extend([String::new(), format!("The first {shown}; p_limit shows more.")]);
        }
        Ok(lines)
    })?;
    Ok(SetOfIterator::new(lines))
}

/// Stands behind lifecycle_events_since(): judges p_limit as sd_next() does.
#[pg_extern(immutable, parallel_safe)]
pub fn checked_limit(p_limit: Option<i32>) -> Result<Option<i32>, ErrorReport> {
    Ok(at_least("p_limit", 1, p_limit)?)
}

/// Stands behind v_directives.
#[pg_extern(immutable, parallel_safe)]
pub fn dependency_keys(p_json: Option<&str>) -> Result<Option<Jsonb>, ErrorReport> {
    Ok(p_json.map(|text| json(&keys::read(text))).transpose()?)
}

// Stable, as v_sd_queue calls it: see is_claim_live().
#[pg_extern(stable, parallel_unsafe)]
pub fn dependency_cycles(
    fcinfo: pg_sys::FunctionCallInfo,
) -> Result<TableIterator<'static, (name!(sd_id, String), name!(cycle, String))>, ErrorReport> {
    let cycles = Db::look(running(fcinfo), queue::cycles)?;
    Ok(TableIterator::new(cycles.into_iter().map(|circular| (circular.sd_id, circular.cycle))))
}
