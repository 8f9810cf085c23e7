//! The queue: which SD comes next for a session, and what keeps the others.
//!
//! A choice is made on a snapshot, so it decides nothing: the SD is locked with it, and the claim looks at
//! it again. Whoever finds an SD locked passes on to the next one, so that many sessions that ask at once get
//! different SDs and none waits for another.

mod own;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::{Duration, Instant};

use pg_claims_core::cycle::{self, Circular};
use pg_claims_core::listing::Entry;
use pg_claims_core::queue::Shortage;
use pgrx::pg_sys::BuiltinOid::{INT8OID, TEXTARRAYOID, TEXTOID};

use crate::attempt;
use crate::error::Result;
use crate::spi::catalog::{self, Catalog};
use crate::spi::claim::reap::REAPED;
use crate::spi::row::Row;
use crate::spi::session::{self, Session};
use crate::spi::statement::{Db, Statement, required};

/// How many acquisitions affinity looks back at: those that were made last, whoever made them.
const REMEMBERED: usize = 200;

/// For how long a connection passes over an SD whose claim failed with an error, such as a trigger of the
/// backlog's own: one bad SD must not keep everybody from the rest.
const AVOIDED_FOR: Duration = Duration::from_secs(60);

/// So many are kept in mind; of more the oldest is forgotten.
const MOST_FAILED: usize = 100;

thread_local! {
    static FAILED: RefCell<VecDeque<(String, Instant)>> = const { RefCell::new(VecDeque::new()) };
}

/// Claims an SD from the queue. An error is the SD's own failure, unless the call was to end, the transaction is to
/// be tried again, or the server lacks something.
pub fn attempt<R>(sd_id: &str, claim: impl FnOnce() -> Result<R>) -> Result<R> {
    // What the server raises passes on as it came, with all that it says.
    match catch_unwind(AssertUnwindSafe(claim)) {
        Ok(Ok(claimed)) => Ok(claimed),
        Ok(Err(error)) => {
            if !attempt::ends_all_with(error.code()) {
                note_failure(sd_id);
            }
            Err(error)
        }
        Err(error) => {
            if error.downcast_ref().is_some_and(|error| !attempt::ends_all(error)) {
                note_failure(sd_id);
            }
            resume_unwind(error)
        }
    }
}

fn note_failure(sd_id: &str) {
    FAILED.with_borrow_mut(|failed| {
        failed.retain(|(known, _)| known != sd_id);
        failed.truncate(MOST_FAILED - 1);
        failed.push_front((sd_id.to_owned(), Instant::now()));
    });
}

/// The SDs whose claim has failed on this connection lately. They are tried again where there is nothing
/// else.
pub fn failed_lately() -> Vec<String> {
    FAILED.with_borrow_mut(|failed| {
        failed.retain(|(_, at)| at.elapsed() < AVOIDED_FOR);
        failed.iter().map(|(sd_id, _)| sd_id.clone()).collect()
    })
}

/// What the queue needs to know of a session.
pub struct Caller {
    pub session: Session,
    /// Where it runs, if it told both.
    pub place: Option<(String, String)>,
    /// The SD that the reaper took from it, if it has not claimed any since and nobody that one.
    pub lost: Option<String>,
}

static LOST: Statement = Statement::new(
    |c| {
        format!(
            "SELECT h.sd_id FROM {x}.sd_claims h
              WHERE h.claim_id = $1 AND h.release_reason = '{REAPED}'
                AND NOT EXISTS (SELECT FROM {x}.sd_claims n
                                 WHERE n.claim_id > $1 AND n.sd_id = h.sd_id)",
            x = c.schema
        )
    },
    &[INT8OID],
);

/// The session, if it was ever registered.
pub fn caller(db: &Db<'_>, session_id: &str) -> Result<Option<Caller>> {
    let Some(session) = session::find(db, session_id)? else {
        return Ok(None);
    };
    let lost = match session.lost_claim_id.filter(|_| session.sd_id.is_none()) {
        Some(claim_id) => db.first_row(&LOST, &[claim_id.into()])?,
        None => None,
    };
    Ok(Some(Caller {
        place: session.hostname.clone().zip(session.codebase.clone()),
        lost: lost.map(|row| row.text(1)).transpose()?.flatten(),
        session,
    }))
}

/// An SD that can be claimed, locked until the transaction ends.
#[derive(Debug)]
pub struct Choice {
    pub sd_id: String,
    pub title: Option<String>,
    pub track: Option<String>,
}

/// What is looked for, apart from what has been passed over already ($1).
#[derive(Debug, Clone, Copy)]
pub enum Among<'a> {
    All,
    Track(&'a str),
    These { sd_ids: &'a [String], track: Option<&'a str> },
}

static FROM_ALL: Statement = Statement::new(|c| choose(c, "true"), &[TEXTARRAYOID]);

static FROM_TRACK: Statement =
    Statement::new(|c| choose(c, "q.track = $2"), &[TEXTARRAYOID, TEXTOID]);

static FROM_THESE: Statement = Statement::new(
    |c| choose(c, "q.sd_id = ANY ($2) AND ($3 IS NULL OR q.track = $3)"),
    &[TEXTARRAYOID, TEXTARRAYOID, TEXTOID],
);

/// The first eligible SD of those that meet `condition` that nobody has locked.
fn choose(c: &Catalog, condition: &str) -> String {
    let Some(b) = &c.backlog else {
        return "SELECT NULL::text, NULL::text, NULL::text WHERE false".into();
    };
    // The row that is locked may be newer than the snapshot; then it must still say that the same
    // session works on it, and that it is not finished.
    let mut still = vec![format!("NOT {}", b.is_terminal())];
    // And that it waits for the same ones, on the same track. What becomes of those meanwhile counts as
    // having come after the claim.
    still.push(format!("{} IS NOT DISTINCT FROM q.dependencies", b.dependencies(&c.schema)));
    still.push(format!("{} IS NOT DISTINCT FROM q.track", b.text(&b.columns.track)));
    for (column, seen) in [
        (&b.columns.is_working_on, "COALESCE(b.{}, false) = q.is_working_on"),
        (&b.columns.active_session_id, "b.{} IS NOT DISTINCT FROM q.active_session_id"),
    ] {
        still.extend(
            column.iter().map(|column| seen.replace("{}", &pgrx::spi::quote_identifier(column))),
        );
    }
    // Of a limit that it does not know in advance the server assumes that it stops early, and reads
    // the queue in its order from the head. Otherwise it might judge all SDs first and then sort.
    format!(
        "SELECT locked.sd_id, q.title, q.track
           FROM (SELECT q.sd_id, q.title, q.track, q.dependencies, q.is_working_on, q.active_session_id
                   FROM {x}.v_sd_queue q
                  WHERE q.eligibility = 'available' AND q.sd_id <> ALL ($1) AND {condition}
                  ORDER BY q.priority_order, q.rank, q.created_at, q.sd_id
                  LIMIT (SELECT NULL::bigint)) q
          CROSS JOIN LATERAL (
                 SELECT {id} AS sd_id FROM {table} b WHERE {id} = q.sd_id AND {still}
                    FOR NO KEY UPDATE OF b SKIP LOCKED) locked
          LIMIT 1",
        x = c.schema,
        id = b.canonical(),
        table = b.from,
        still = still.join(" AND "),
    )
}

/// Chooses and locks an SD, unless there is none.
pub fn next(db: &Db<'_>, among: Among<'_>, passed: &[String]) -> Result<Option<Choice>> {
    catalog::lock_backlog(db)?;
    let catalog = catalog::usable_backlog(db)?;
    let track = match among {
        Among::All => Some(None),
        Among::Track(track) => Some(Some(track)),
        Among::These { .. } => None,
    };
    if catalog.is_own_backlog_in_use
        && let Some(track) = track
    {
        let by_statement = |sd_id: &str| {
            next_by_statement(db, Among::These { sd_ids: &[sd_id.to_owned()], track }, passed)
        };
        if let Some(chosen) = own::next(db, track, passed, by_statement)? {
            return Ok(chosen);
        }
    }
    next_by_statement(db, among, passed)
}

fn next_by_statement(db: &Db<'_>, among: Among<'_>, passed: &[String]) -> Result<Option<Choice>> {
    let passed = passed.to_vec();
    let rows = match among {
        Among::All => db.run_by_index(&FROM_ALL, &[passed.into()])?,
        Among::Track(track) => db.run_by_index(&FROM_TRACK, &[passed.into(), track.into()])?,
        Among::These { sd_ids, track } => {
            let arguments = [passed.into(), sd_ids.to_vec().into(), track.into()];
            db.run_by_index(&FROM_THESE, &arguments)?
        }
    };
    if rows.is_empty() {
        return Ok(None);
    }
    let row = rows.first();
    Ok(Some(Choice {
        sd_id: row.required_text(1, "v_directives.sd_id")?,
        title: row.text(2)?,
        track: row.text(3)?,
    }))
}

// Reads the last acquisitions by their primary key. That of an SD which none of them follows is its
// latest. Counted are those that calls for the same track were given, whoever called, since one of them
// was given the head of its queue; where that is too long ago to be seen, affinity has to stand back.
static FAMILIAR: Statement = Statement::new(
    |c| {
        format!(
            "WITH recent AS MATERIALIZED (
                 SELECT claim_id, sd_id, hostname, codebase, released_at, queue_reason, queue_track
                   FROM {x}.sd_claims ORDER BY claim_id DESC LIMIT {REMEMBERED}),
             here AS MATERIALIZED (
                 SELECT claim_id, sd_id, released_at FROM recent
                  WHERE hostname = $1 AND codebase = $2),
             alike AS MATERIALIZED (
                 SELECT claim_id, queue_reason FROM recent
                  WHERE queue_reason IS NOT NULL AND queue_track IS NOT DISTINCT FROM $3)
             SELECT ARRAY(SELECT h.sd_id FROM here h
                           WHERE h.released_at IS NOT NULL
                             AND NOT EXISTS (SELECT FROM recent r
                                              WHERE r.sd_id = h.sd_id AND r.claim_id > h.claim_id)),
                    (SELECT pg_catalog.count(*) FROM alike
                      WHERE queue_reason = 'affinity' AND claim_id > COALESCE(head.claim_id, 0)),
                    head.claim_id IS NOT NULL
                        OR (SELECT pg_catalog.count(*) FROM recent) < {REMEMBERED}
               FROM (SELECT pg_catalog.max(claim_id) AS claim_id FROM alike
                      WHERE queue_reason = 'order') head",
            x = c.schema
        )
    },
    &[TEXTOID, TEXTOID, TEXTOID],
);

/// The SDs on which sessions at that host and code base were the last to work. None when the last
/// `limit` calls for the same track were all given an SD for that reason: then it is the turn of the
/// first in its queue.
pub fn familiar(
    db: &Db<'_>,
    place: &(String, String),
    track: Option<&str>,
    limit: i32,
) -> Result<Vec<String>> {
    let arguments = [place.0.as_str().into(), place.1.as_str().into(), track.into()];
    let row = db.run(&FAMILIAR, &arguments)?.first();
    if row.required_bigint(2, "a count")? >= i64::from(limit) || !row.flag(3)? {
        return Ok(Vec::new());
    }
    required(row.get::<Vec<String>>(1)?, "sd_claims.sd_id")
}

static COUNTS: Statement = Statement::new(
    |c| {
        format!(
            "SELECT eligibility, pg_catalog.count(*) FROM {}.v_sd_queue
              WHERE $1 IS NULL OR track = $1 GROUP BY eligibility",
            c.schema
        )
    },
    &[TEXTOID],
);

static CIRCULAR: Statement = Statement::new(
    |c| {
        format!(
            "SELECT pg_catalog.count(*) FROM {x}.dependency_cycles() y
               JOIN {x}.v_sd_queue q ON q.sd_id = y.sd_id
              WHERE $1 IS NULL OR q.track = $1",
            x = c.schema
        )
    },
    &[TEXTOID],
);

/// What keeps the unfinished SDs.
pub fn shortage(db: &Db<'_>, track: Option<&str>) -> Result<Shortage> {
    catalog::usable_backlog(db)?;
    let mut shortage = Shortage { track: track.map(str::to_owned), ..Shortage::default() };
    let mut rows = db.run_by_index(&COUNTS, &[track.into()])?;
    while rows.next().is_some() {
        let count = rows.required_bigint(2, "v_sd_queue")?;
        match rows.required_text(1, "v_sd_queue.eligibility")?.as_str() {
            "claimed" => shortage.claimed = count,
            "held" => shortage.held = count,
            "blocked_by_dependency" => shortage.blocked_by_dependency = count,
            "conflict" => shortage.conflict = count,
            // They could be claimed, were they not locked.
            _ => shortage.busy = count,
        }
    }
    if shortage.blocked_by_dependency > 0 {
        let row = db.run_by_index(&CIRCULAR, &[track.into()])?.first();
        shortage.in_cycle = row.required_bigint(1, "dependency_cycles")?;
    }
    Ok(shortage)
}

static WAITS: Statement = Statement::new(
    |c| {
        format!(
            "SELECT sd_id, blocking_sd FROM {}.v_sd_blockers WHERE blocking_sd IS NOT NULL",
            c.schema
        )
    },
    &[],
);

/// The SDs that wait for themselves.
pub fn cycles(db: &Db<'_>) -> Result<Vec<Circular>> {
    catalog::usable_backlog(db)?;
    let mut rows = db.run_by_index(&WAITS, &[])?;
    let mut waits = Vec::with_capacity(rows.len());
    while rows.next().is_some() {
        let blocking = rows.required_text(2, "v_sd_blockers.blocking_sd")?;
        waits.push((rows.required_text(1, "v_sd_blockers.sd_id")?, blocking));
    }
    Ok(cycle::find(&waits))
}

static LIST: Statement = Statement::new(
    |c| {
        format!(
            "SELECT sd_id, title, track, eligibility, reason, claimed_by, claim_minutes::bigint,
                    heartbeat_age_human, heartbeat_color
               FROM {}.v_sd_queue
              WHERE $1 IS NULL OR track = $1
              ORDER BY priority_order, rank, created_at, sd_id
              LIMIT $2",
            c.schema
        )
    },
    &[TEXTOID, INT8OID],
);

/// The first `limit` of the queue.
pub fn list(db: &Db<'_>, track: Option<&str>, limit: Option<i64>) -> Result<Vec<Entry>> {
    catalog::usable_backlog(db)?;
    let mut rows = db.run_by_index(&LIST, &[track.into(), limit.into()])?;
    let mut entries = Vec::with_capacity(rows.len());
    while rows.next().is_some() {
        entries.push(Entry {
            sd_id: rows.required_text(1, "v_sd_queue.sd_id")?,
            title: rows.text(2)?,
            track: rows.text(3)?,
            eligibility: rows.required_text(4, "v_sd_queue.eligibility")?,
            reason: rows.text(5)?,
            claimed_by: rows.text(6)?,
            claim_minutes: rows.bigint(7)?,
            heartbeat_age_human: rows.text(8)?,
            heartbeat_color: rows.text(9)?,
        });
    }
    Ok(entries)
}
