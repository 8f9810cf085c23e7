//! What clients were told, held against what is there in the end.

use std::collections::{HashMap, HashSet};

use postgres::{Client, Error};

use crate::follower::{self, Event};
use crate::history::{Facts, Told};

/// An acquisition as it is stored.
struct Stored {
    sd: String,
    session: String,
    has_ended: bool,
}

/// Each acknowledged claim, release and row of work that is not there, and each one that is there although its
/// transaction was rolled back.
pub fn broken(client: &mut Client, facts: &Facts) -> Result<Vec<String>, Error> {
    let stored: HashMap<i64, Stored> = client
        .query("SELECT claim_id, sd_id, session_id, released_at IS NOT NULL FROM sd_claims", &[])?
        .iter()
        .map(|row| {
            (row.get(0), Stored { sd: row.get(1), session: row.get(2), has_ended: row.get(3) })
        })
        .collect();
    let work: HashSet<i64> =
        client.query("SELECT id FROM work", &[])?.iter().map(|row| row.get(0)).collect();
    let is_stored = |told: &Told| {
        stored
            .get(&told.claim_id)
            .is_some_and(|row| row.sd == told.sd && row.session == told.session)
    };
    let kept = &facts.kept;
    let mut found = Vec::new();
    let lost = kept.granted.iter().filter(|told| !is_stored(told));
    found.extend(lost.map(|told| format!("an acknowledged claim is not there: {told:?}")));
    let named = kept.refused.iter().filter(|told| !is_stored(told));
    found.extend(named.map(|told| format!("a refusal named an owner that never was: {told:?}")));
    let open = |id: &&i64| stored.get(id).is_none_or(|row| !row.has_ended);
    let released = kept.released.iter().filter(open);
    found.extend(released.map(|id| format!("an acknowledged release did not end claim {id}")));
    let undone = facts.undone.iter().filter(|id| stored.contains_key(id));
    found.extend(undone.map(|id| format!("claim {id} is there, and was rolled back")));
    let missing = kept.work.iter().filter(|id| !work.contains(id));
    found.extend(missing.map(|id| format!("acknowledged work is not there: {id}")));
    let unmade = facts.undone_work.iter().filter(|id| work.contains(id));
    found.extend(unmade.map(|id| format!("work {id} is there, and was rolled back")));
    found.extend(repeated(&kept.granted));
    Ok(found)
}

/// Claim ids that were given out twice.
fn repeated(granted: &[Told]) -> Vec<String> {
    let mut given: HashMap<i64, &Told> = HashMap::new();
    let mut found = Vec::new();
    for told in granted.iter().filter(|told| told.is_new) {
        if let Some(other) = given.insert(told.claim_id, told) {
            found.push(format!("a claim id was given out twice: {other:?} and {told:?}"));
        }
    }
    found
}

/// Whether who followed all the time has read what is there now, each event once.
pub fn broken_by_order(client: &mut Client, followed: &[Event]) -> Result<Vec<String>, Error> {
    let all = follower::read(client, 0, None)?;
    let stored: i64 =
        client.query_one("SELECT count(*) FROM session_lifecycle_events", &[])?.get(0);
    let mut found = Vec::new();
    if stored != all.len() as i64 {
        found.push(format!("{stored} events are stored, {} can be read", all.len()));
    }
    let known: HashMap<i64, &Event> = followed.iter().map(|event| (event.place, event)).collect();
    for event in &all {
        match known.get(&event.place) {
            None => found.push(format!("who followed never read {event:?}")),
            Some(read) if *read != event => {
                found.push(format!("who followed read {read:?}, which is {event:?} now"));
            }
            Some(_) => {}
        }
    }
    let there: HashSet<i64> = all.iter().map(|event| event.place).collect();
    let gone = followed.iter().filter(|event| !there.contains(&event.place));
    found.extend(gone.map(|event| format!("who followed read {event:?}, which is not there")));
    if followed.len() != known.len() {
        found.push("who followed read a place twice".into());
    }
    Ok(found)
}
