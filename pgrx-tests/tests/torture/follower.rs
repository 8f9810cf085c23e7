//! A reader that follows the audit from place to place, all the time, also over crashes.

use std::thread;
use std::time::Duration;

use postgres::{Client, Error, Row};

use crate::draw;
use crate::world::World;

/// An event as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    pub place: i64,
    pub kind: String,
    pub session: String,
    pub sd: Option<String>,
    pub claim_id: Option<i64>,
    pub occurred_at: String,
}

impl Event {
    fn from(row: &Row) -> Self {
        Self {
            place: row.get(0),
            kind: row.get(1),
            session: row.get(2),
            sd: row.get(3),
            claim_id: row.get(4),
            occurred_at: row.get(5),
        }
    }
}

/// Events from the one after `place` on.
pub fn read(client: &mut Client, place: i64, limit: Option<i32>) -> Result<Vec<Event>, Error> {
    let sql = "SELECT id, event_type, session_id, sd_id, claim_id, occurred_at::text
                 FROM lifecycle_events_since($1, $2)";
    Ok(client.query(sql, &[&place, &limit])?.iter().map(Event::from).collect())
}

/// All that was read, in the order in which it was read.
pub fn run(world: &World) -> Vec<Event> {
    let mut connection = None;
    let mut seen: Vec<Event> = Vec::new();
    let mut rng = world.generator(draw::FOLLOWER, 0);
    loop {
        let was_settled = world.is_settled();
        let cursor = seen.last().map_or(0, |event| event.place);
        let limit = rng.i32(1..200);
        let Some(found) = world.insist(&mut connection, |client| read(client, cursor, Some(limit)))
        else {
            return seen;
        };
        let mut last = cursor;
        for event in &found {
            if event.place <= last {
                world
                    .log
                    .violation(format!("after place {last} came {event:?}, read from {cursor}"));
            }
            last = event.place;
        }
        if was_settled && found.is_empty() || world.log.has_violations() {
            return seen;
        }
        seen.extend(found);
        thread::sleep(Duration::from_millis(rng.u64(0..30)));
    }
}
