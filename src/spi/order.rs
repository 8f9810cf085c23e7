//! The order in which events became visible, and announcing them in it.

use pg_claims_core::frontier::{Frontier, Gap, Moment};
use pg_claims_core::notice::{MAX_REASON_CHARACTERS, Notice, messages};
use pgrx::pg_sys;
use pgrx::pg_sys::BuiltinOid::{INT4OID, INT8ARRAYOID, INT8OID, TEXTARRAYOID, TEXTOID};
use pgrx::spi::SpiTupleTable;
use pgrx::{IntoDatum, JsonB};

use super::catalog::Catalog;
use super::event::EventType;
use super::numbers::{self, Kind};
use super::row::Row;
use super::statement::{Db, Statement, required};
use crate::error::Result;
use crate::pg::lock::{Class, Mode, Tag, Until};

/// What listeners are told of; registering and ending concern the session alone.
const ANNOUNCED: [EventType; 8] = [
    EventType::Claimed,
    EventType::Switched,
    EventType::Released,
    EventType::TakenOver,
    EventType::Stale,
    EventType::Reaped,
    EventType::MaxAgeWarning,
    EventType::Repaired,
];

/// The channel.
const CHANNEL: &str = "pg_claims";

// Where there are places already, a dump was restored without the frontier: what has a place was announced.
static BEGIN: Statement = Statement::new(
    |c| {
        format!(
            "INSERT INTO {x}.event_frontier (announced_to)
             SELECT COALESCE(pg_catalog.max(position), 0) FROM {x}.lifecycle_event_positions
             ON CONFLICT DO NOTHING",
            x = c.schema
        )
    },
    &[],
);

static FORGET: Statement =
    Statement::new(|c| format!("DELETE FROM {}.event_frontier", c.schema), &[]);

/// Makes room for the frontier of a dump, which goes with its events.
pub fn forget_frontier(db: &Db<'_>) -> Result<()> {
    db.run(&FORGET, &[])?;
    Ok(())
}

// There is one row, but an old snapshot of somebody else's may keep any number of its versions. The index
// has the newest one last.
fn frontier(c: &Catalog, locking: &str) -> String {
    format!(
        "SELECT scanned_to, gaps_first, gaps_last, gaps_before, announced_to, ctid::text
           FROM {}.event_frontier ORDER BY is_frontier DESC LIMIT 1 {locking}",
        c.schema
    )
}

static PEEK: Statement = Statement::new(|c| frontier(c, ""), &[]);

// Somebody else who is at it does the work for both.
static HOLD: Statement = Statement::new(|c| frontier(c, "FOR NO KEY UPDATE SKIP LOCKED"), &[]);

/// The frontier's row.
struct Kept {
    frontier: Frontier,
    /// How far events have been announced.
    announced_to: i64,
    /// Where the row is: there it stays while it is locked.
    place: String,
}

/// The frontier without locking it. Makes the first one, unless another transaction is just doing so.
fn peek(db: &Db<'_>) -> Result<Option<Kept>> {
    let peeked = read(db.run_by_index(&PEEK, &[])?)?;
    if peeked.is_none() && may_begin() {
        db.run(&BEGIN, &[])?;
    }
    Ok(peeked)
}

/// Whether no other transaction is just making the first frontier; none will until this one has ended. Waiting for
/// one would mean to wait for its end.
fn may_begin() -> bool {
    Tag::of(Class::Numbers, 0).try_acquire(Mode::Exclusive, Until::TransactionEnds)
}

/// The same, locked. `None` while somebody else has it.
fn hold(db: &Db<'_>) -> Result<Option<Kept>> {
    read(db.run_by_index(&HOLD, &[])?)
}

fn read(rows: SpiTupleTable<'_>) -> Result<Option<Kept>> {
    if rows.is_empty() {
        return Ok(None);
    }
    let row = rows.first();
    let list = |position| -> Result<Vec<i64>> {
        required(row.get::<Vec<i64>>(position)?, "event_frontier")
    };
    let gaps = list(2)?
        .into_iter()
        .zip(list(3)?)
        .zip(list(4)?)
        .map(|((first, last), before_xid)| Gap { first, last, before_xid })
        .collect();
    let frontier =
        Frontier { scanned_to: row.required_bigint(1, "event_frontier.scanned_to")?, gaps };
    Ok(Some(Kept {
        frontier,
        announced_to: row.required_bigint(5, "event_frontier.announced_to")?,
        place: row.required_text(6, "event_frontier.ctid")?,
    }))
}

// One statement, so that events and transaction id are those of one snapshot.
static LOOK: Statement = Statement::new(
    |c| {
        format!(
            "SELECT pg_catalog.pg_snapshot_xmin(pg_catalog.pg_current_snapshot())::text::bigint,
                    ARRAY(SELECT e.event_id
                            FROM ROWS FROM (pg_catalog.unnest($2), pg_catalog.unnest($3))
                                 AS gap(first, last)
                            JOIN {x}.session_lifecycle_events e
                              ON e.event_id BETWEEN gap.first AND gap.last
                           ORDER BY e.event_id),
                    ARRAY(SELECT event_id FROM {x}.session_lifecycle_events
                           WHERE event_id > $1 ORDER BY event_id LIMIT $4)",
            x = c.schema
        )
    },
    &[INT8OID, INT8ARRAYOID, INT8ARRAYOID, INT4OID],
);

static IS_NEW: Statement = Statement::new(
    |c| format!("SELECT 1 FROM {}.session_lifecycle_events WHERE event_id > $1 LIMIT 1", c.schema),
    &[INT8OID],
);

// Who holds the frontier is the only one to append, so that an event can have a place already only where the
// frontier itself came later: from a dump, or because it was lost.
static APPEND: Statement = Statement::new(
    |c| {
        format!(
            "INSERT INTO {}.lifecycle_event_positions (position, event_id)
             SELECT position, event_id
               FROM ROWS FROM (pg_catalog.unnest($1), pg_catalog.unnest($2)) AS e(position, event_id)
             ON CONFLICT (event_id) DO NOTHING",
            c.schema
        )
    },
    &[INT8ARRAYOID, INT8ARRAYOID],
);

static KEEP: Statement = Statement::new(
    |c| {
        format!(
            "UPDATE {}.event_frontier
                SET scanned_to = $1, gaps_first = $2, gaps_last = $3, gaps_before = $4
              WHERE ctid = $5::tid",
            c.schema
        )
    },
    &[INT8OID, INT8ARRAYOID, INT8ARRAYOID, INT8ARRAYOID, TEXTOID],
);

/// Appends up to `limit` events that have become visible to the order, and those that were awaited.
/// Returns how many.
pub fn append_visible(db: &Db<'_>, limit: i32) -> Result<usize> {
    // Most looks find nothing to do, and then write nothing.
    if let Some(Kept { frontier: mut peeked, .. }) = peek(db)? {
        let is_idle = if peeked.gaps.is_empty() {
            db.run_by_index(&IS_NEW, &[peeked.scanned_to.into()])?.is_empty()
        } else {
            let before = peeked.clone();
            look(db, &mut peeked, limit)?.is_empty() && peeked == before
        };
        if is_idle {
            return Ok(0);
        }
    }
    let Some(Kept { mut frontier, place, .. }) = hold(db)? else {
        return Ok(0);
    };
    let before = frontier.clone();
    let seen = look(db, &mut frontier, limit)?;
    if !seen.is_empty() {
        // Whoever draws these holds the frontier's lock, so the order is that of the numbers.
        let positions = seen.iter().map(|_| numbers::next(db, Kind::Position));
        let positions = positions.collect::<Result<Vec<i64>>>()?;
        db.run(&APPEND, &[positions.into(), seen.clone().into()])?;
    }
    if frontier != before {
        let (first, last) = bounds(&frontier);
        let before: Vec<i64> = frontier.gaps.iter().map(|gap| gap.before_xid).collect();
        let scanned_to = frontier.scanned_to;
        let kept = [scanned_to.into(), first.into(), last.into(), before.into(), place.into()];
        db.run(&KEEP, &kept)?;
    }
    Ok(seen.len())
}

/// The events that have become visible since, up to `limit` of the new ones; advances the frontier.
fn look(db: &Db<'_>, frontier: &mut Frontier, limit: i32) -> Result<Vec<i64>> {
    let (first, last) = bounds(frontier);
    let arguments = [frontier.scanned_to.into(), first.into(), last.into(), limit.into()];
    let row = db.run_by_index(&LOOK, &arguments)?.first();
    let moment =
        Moment { xmin: row.required_bigint(1, "pg_current_snapshot()")?, next_xid: next_xid() };
    let list = |position| -> Result<Vec<i64>> {
        required(row.get::<Vec<i64>>(position)?, "session_lifecycle_events.event_id")
    };
    let mut seen = list(2)?;
    seen.extend(list(3)?);
    frontier.advance(&seen, moment);
    Ok(seen)
}

/// The gaps' first and last numbers.
fn bounds(frontier: &Frontier) -> (Vec<i64>, Vec<i64>) {
    frontier.gaps.iter().map(|gap| (gap.first, gap.last)).unzip()
}

/// The transaction id that is given out next.
fn next_xid() -> i64 {
    // SAFETY: reads the server's shared state; no preconditions.
    let next = unsafe { pg_sys::ReadNextFullTransactionId() };
    i64::try_from(next.value).unwrap_or(i64::MAX)
}

static UNANNOUNCED: Statement = Statement::new(
    |c| {
        format!(
            "SELECT p.position, e.event_type, e.session_id, e.sd_id, e.claim_id, e.occurred_at,
                    pg_catalog.left(e.reason, {MAX_REASON_CHARACTERS} + 1), e.detail,
                    e.event_type = ANY ($3)
               FROM {x}.lifecycle_event_positions p
               JOIN {x}.session_lifecycle_events e ON e.event_id = p.event_id
              WHERE p.position > $1 ORDER BY p.position LIMIT $2",
            x = c.schema
        )
    },
    &[INT8OID, INT4OID, TEXTARRAYOID],
);

static IS_MORE: Statement = Statement::new(
    |c| format!("SELECT 1 FROM {}.lifecycle_event_positions WHERE position > $1 LIMIT 1", c.schema),
    &[INT8OID],
);

static ANNOUNCED_TO: Statement = Statement::new(
    |c| format!("UPDATE {}.event_frontier SET announced_to = $1 WHERE ctid = $2::tid", c.schema),
    &[INT8OID, TEXTOID],
);

/// Whether the server's queue of notifications, which all databases share, is at most half full.
pub fn may_announce(db: &Db<'_>) -> Result<bool> {
    db.ask("SELECT pg_catalog.pg_notification_queue_usage() <= 0.5", &[])?.first().flag(1)
}

/// Announces up to `limit` events, in order; in silence if `aloud` is false, so that listeners are
/// not flooded with the past once they are told again. Returns how many it went past.
pub fn announce(db: &Db<'_>, limit: i32, aloud: bool) -> Result<usize> {
    if let Some(Kept { announced_to, .. }) = peek(db)?
        && db.run_by_index(&IS_MORE, &[announced_to.into()])?.is_empty()
    {
        return Ok(0);
    }
    let Some(Kept { announced_to, place, .. }) = hold(db)? else {
        return Ok(0);
    };
    let kinds: Vec<String> = ANNOUNCED.iter().map(|kind| kind.name().to_owned()).collect();
    let mut rows =
        db.run_by_index(&UNANNOUNCED, &[announced_to.into(), limit.into(), kinds.into()])?;
    let mut payloads = Vec::new();
    let (mut passed, mut last) = (0, announced_to);
    while rows.next().is_some() {
        passed += 1;
        last = rows.required_bigint(1, "lifecycle_event_positions.position")?;
        if !aloud || !rows.flag(9)? {
            continue;
        }
        let notice = Notice {
            id: last,
            event: rows.required_text(2, "session_lifecycle_events.event_type")?,
            session_id: rows.required_text(3, "session_lifecycle_events.session_id")?,
            sd_id: rows.text(4)?,
            claim_id: rows.bigint(5)?,
            at: rows.required_instant(6, "session_lifecycle_events.occurred_at")?,
            reason: rows.text(7)?,
            detail: required(rows.get::<JsonB>(8)?, "session_lifecycle_events.detail")?.0,
        };
        payloads.push(notice.payload()?);
    }
    for message in messages(payloads) {
        // SAFETY: a function of the server's that takes two texts.
        unsafe {
            let arguments = [CHANNEL.into_datum(), message.into_datum()];
            pgrx::direct_function_call_as_datum(pg_sys::pg_notify, &arguments);
        }
    }
    if passed > 0 {
        db.run(&ANNOUNCED_TO, &[last.into(), place.into()])?;
    }
    Ok(passed)
}
