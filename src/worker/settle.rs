//! Settling what somebody wrote past the triggers.

use std::ffi::CStr;

use super::connections;
use super::round::{BATCH, SINGLE_LIMIT, Stay};
use super::step::{note, step, try_step};
use crate::error::Result;
use crate::spi::claim::contradiction;
use crate::spi::{Db, health};

const SETTLING: &CStr = c"pg_claims: settling contradictions";

/// Settles what somebody wrote past the triggers: claims about which sessions and history disagree, and such as are on
/// SDs that are finished or gone. Each by itself: one that cannot be settled must not keep the others.
pub fn contradictions(stay: &Stay<'_>, run: &mut health::Run) -> bool {
    let mut any = false;
    let mut after = String::new();
    while let Some(found) =
        step(run, SETTLING, |db| contradiction::contradictory(db, &after, BATCH))
        && let Some(last) = found.last()
    {
        after.clone_from(last);
        for sd_id in &found {
            any |= one(stay, run, |db| Ok(!contradiction::try_settle(db, sd_id)?.is_empty()));
        }
        if stay.is_over() {
            return any;
        }
    }
    let mut after = 0;
    while let Some(found) = step(run, SETTLING, |db| contradiction::stranded(db, after, BATCH))
        && let Some(last) = found.last()
    {
        after = last.claim_id;
        for held in &found {
            any |= one(stay, run, |db| {
                contradiction::end_finished(db, &held.session_id, &held.sd_id, held.claim_id)
            });
        }
        if stay.is_over() {
            break;
        }
    }
    any
}

/// One of them by itself.
fn one(stay: &Stay<'_>, run: &mut health::Run, work: impl FnOnce(&Db<'_>) -> Result<bool>) -> bool {
    stay.slot.take_turn();
    let done = try_step(SINGLE_LIMIT, SETTLING, work).unwrap_or_else(|error| {
        note(run, error);
        false
    });
    connections::tend(run);
    done
}
