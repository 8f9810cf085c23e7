//! Contradictions between the sessions and what follows from them, and settling them.
//!
//! The triggers keep sessions, claim history and backlog in step. Past them goes whoever disables them, writes as
//! a replica (`session_replication_role`, logical replication) or restores half a dump. Then the sessions are
//! right about who holds what, and the backlog about what is finished. Whoever meets a contradiction settles it
//! in the same transaction and under the lock of the SD, as a claim would, and the audit says so.

use pgrx::pg_sys::BuiltinOid::{INT4OID, INT8OID, TEXTARRAYOID, TEXTOID};
use pgrx::spi::SpiTupleTable;
use serde_json::json;

use super::history::{self, Open};
use crate::error::Result;
use crate::pg::time;
use crate::spi::event::{self, Event, EventType};
use crate::spi::row::Row;
use crate::spi::session::{self, Session};
use crate::spi::statement::{Db, Statement};
use crate::spi::table::Wait;
use crate::spi::{catalog, directive, guard};

/// The reason recorded for an acquisition that was ended because it contradicted the sessions.
const REPAIRED: &str = "repaired";

/// One thing that was wrong with an SD's claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contradiction {
    /// An acquisition is open that no session holds.
    OpenWithoutHolder,
    /// A session holds an acquisition that the history says has ended.
    HeldThoughEnded,
    /// A session holds an acquisition that the history does not have.
    HeldWithoutHistory,
    /// A session holds an acquisition that is another session's, or another SD's, in the history.
    HeldOfAnother,
    /// A session holds an SD that is finished, or that the backlog does not have.
    HeldThoughFinished,
}

impl Contradiction {
    /// What was found, for the audit and for people.
    pub fn finding(self) -> &'static str {
        match self {
            Self::OpenWithoutHolder => "the acquisition was open, and no session held it",
            Self::HeldThoughEnded => {
                "the session held an acquisition that had ended in the history"
            }
            Self::HeldWithoutHistory => {
                "the session held an acquisition that the history did not have"
            }
            Self::HeldOfAnother => {
                "the session held an acquisition that was another one in the history"
            }
            Self::HeldThoughFinished => "the session held an SD that is finished or gone",
        }
    }

    /// What is done about it.
    pub fn remedy(self) -> &'static str {
        match self {
            Self::OpenWithoutHolder => "the acquisition is closed",
            Self::HeldThoughEnded => "the acquisition is open again",
            Self::HeldWithoutHistory => "the history has the acquisition",
            Self::HeldOfAnother | Self::HeldThoughFinished => "the session's claim is ended",
        }
    }
}

/// What is wrong with an SD's claim, and which acquisition it is about.
pub fn diagnose(db: &Db<'_>, sd_id: &str) -> Result<Vec<(Contradiction, i64)>> {
    let mut found = Vec::new();
    let holder = session::holder(db, sd_id)?;
    let held = holder.as_ref().and_then(Session::claim);
    if let Some(open) = history::open_of(db, sd_id)?
        && held.is_none_or(|(_, claim_id)| claim_id != open.claim_id)
    {
        found.push((Contradiction::OpenWithoutHolder, open.claim_id));
    }
    if let Some(holder) = &holder
        && let Some((_, claim_id)) = held
    {
        found.extend(of_holder(db, holder)?.map(|contradiction| (contradiction, claim_id)));
    }
    Ok(found)
}

/// Makes history and sessions agree about an SD that this transaction has locked, or that the backlog does not
/// have. With [`Wait::Skip`] an acquisition that a guard holds stays as it is. Returns what was settled.
pub fn settle(db: &Db<'_>, sd_id: &str, wait: Wait) -> Result<Vec<Contradiction>> {
    let mut settled = Vec::new();
    let holder = session::holder(db, sd_id)?;
    let held = holder.as_ref().and_then(|holder| holder.claim_id);
    if let Some(open) = history::open_of(db, sd_id)?
        && Some(open.claim_id) != held
        && is_free_of_guards(db, open.claim_id, wait)?
    {
        close_orphan(db, sd_id, &open)?;
        settled.push(Contradiction::OpenWithoutHolder);
    }
    if let Some(holder) = &holder {
        settled.extend(settle_holder(db, holder, wait)?);
    }
    Ok(settled)
}

fn is_free_of_guards(db: &Db<'_>, claim_id: i64, wait: Wait) -> Result<bool> {
    match wait {
        Wait::Block => guard::exclude(db, claim_id).map(|()| true),
        Wait::Skip => guard::try_exclude(db, claim_id),
    }
}

fn close_orphan(db: &Db<'_>, sd_id: &str, open: &Open) -> Result<()> {
    let at = time::now().max(open.claimed_at);
    let acquisition =
        history::Acquisition { claim_id: open.claim_id, sd_id, session_id: &open.session_id };
    history::close(db, acquisition, at, REPAIRED, None)?;
    record(db, Contradiction::OpenWithoutHolder, acquisition)
}

fn acquisition_of(holder: &Session) -> Option<history::Acquisition<'_>> {
    let session_id = &holder.session_id;
    holder.claim().map(|(sd_id, claim_id)| history::Acquisition { claim_id, sd_id, session_id })
}

fn of_holder(db: &Db<'_>, holder: &Session) -> Result<Option<Contradiction>> {
    let Some(acquisition) = acquisition_of(holder) else { return Ok(None) };
    Ok(match history::state_of(db, acquisition)? {
        history::State::Open => None,
        history::State::Ended => Some(Contradiction::HeldThoughEnded),
        history::State::Missing => Some(Contradiction::HeldWithoutHistory),
        history::State::OfAnother => Some(Contradiction::HeldOfAnother),
    })
}

fn settle_holder(db: &Db<'_>, holder: &Session, wait: Wait) -> Result<Option<Contradiction>> {
    let Some(acquisition) = acquisition_of(holder) else { return Ok(None) };
    let Some(contradiction) = of_holder(db, holder)? else { return Ok(None) };
    let claim_id = acquisition.claim_id;
    match contradiction {
        Contradiction::HeldThoughEnded => history::reopen(db, claim_id)?,
        Contradiction::HeldWithoutHistory => history::insert(db, holder, None)?,
        _ if wait == Wait::Skip && guard::is_held(claim_id) => return Ok(None),
        // Its end is told as a repair by what follows from it.
        _ => {
            session::change(db, &holder.session_id, |session| {
                let held = session.claim_id == Some(claim_id);
                held.then(|| session.without_claim(time::now(), REPAIRED, true))
            })?;
            return Ok(Some(contradiction));
        }
    }
    record(db, contradiction, acquisition)?;
    Ok(Some(contradiction))
}

/// Whether the history does not have the acquisition open that a session holds.
pub fn is_not_open(db: &Db<'_>, session_id: &str, sd_id: &str, claim_id: i64) -> Result<bool> {
    let acquisition = history::Acquisition { claim_id, sd_id, session_id };
    Ok(history::state_of(db, acquisition)? != history::State::Open)
}

/// Puts the end of a claim on record of which the history did not know that it was open.
pub fn note_end(db: &Db<'_>, old: &Session, end: history::End<'_>) -> Result<()> {
    let Some(acquisition) = acquisition_of(old) else { return Ok(()) };
    let Some(contradiction) = of_holder(db, old)? else { return Ok(()) };
    if contradiction == Contradiction::HeldWithoutHistory {
        history::insert(db, old, Some(end))?;
    }
    record(db, contradiction, acquisition)
}

fn record(
    db: &Db<'_>,
    contradiction: Contradiction,
    acquisition: history::Acquisition<'_>,
) -> Result<()> {
    let event = Event {
        event_type: EventType::Repaired,
        session_id: acquisition.session_id,
        sd_id: Some(acquisition.sd_id),
        claim_id: Some(acquisition.claim_id),
        reason: Some(contradiction.finding()),
        held: None,
        detail: json!({ "done": contradiction.remedy() }),
    };
    event::record(db, event)
}

/// Why a claim cannot be held any more, if the backlog says that the SD is finished, or does not have it.
pub fn finished(db: &Db<'_>, sd_id: &str) -> Result<Option<String>> {
    Ok(match directive::find(db, sd_id)? {
        Some(found) if found.sd_id != sd_id => Some("sd_deleted".into()),
        Some(found) if found.is_terminal => {
            Some(format!("sd_{}", found.status.unwrap_or_default().to_ascii_lowercase()))
        }
        Some(_) => None,
        None => Some("sd_deleted".into()),
    })
}

/// Ends the claim of a session on an SD that is finished or gone, unless a guard holds it, or somebody writes the SD. Returns
/// whether it did.
pub fn end_finished(db: &Db<'_>, session_id: &str, sd_id: &str, claim_id: i64) -> Result<bool> {
    if guard::is_held(claim_id) || !directive::try_lock(db, sd_id)? {
        return Ok(false);
    }
    let Some(reason) = finished(db, sd_id)? else { return Ok(false) };
    Ok(session::let_go(db, session_id, claim_id, &reason, true)?.is_some())
}

/// Ends those claims of these sessions that are on SDs which are finished or gone. Where somebody keeps readers off the
/// backlog, nothing is looked at: a heartbeat waits for no work.
pub fn end_finished_of(db: &Db<'_>, session_ids: &[String]) -> Result<()> {
    if time::is_read_only() || !catalog::try_usable_backlog(db)? {
        return Ok(());
    }
    let mut rows = db.run_by_index(&STRANDED_AMONG, &[session_ids.to_vec().into()])?;
    let mut found = Vec::new();
    while rows.next().is_some() {
        found.push(read_stranded(&rows)?);
    }
    for stranded in found {
        end_finished(db, &stranded.session_id, &stranded.sd_id, stranded.claim_id)?;
    }
    Ok(())
}

static STRANDED_AMONG: Statement = Statement::new(
    |c| {
        format!(
            "SELECT s.session_id, s.sd_id, s.claim_id FROM {x}.claude_sessions s
              WHERE s.session_id = ANY ($1) AND s.sd_id IS NOT NULL AND s.status = 'active'
                AND NOT EXISTS (SELECT FROM {x}.v_directives d
                                 WHERE d.sd_id = s.sd_id AND NOT d.is_terminal OFFSET 0)",
            x = c.schema
        )
    },
    &[TEXTARRAYOID],
);

/// A session that holds an SD which is finished or gone.
#[derive(Debug, Clone)]
pub struct Stranded {
    pub session_id: String,
    pub sd_id: String,
    pub claim_id: i64,
}

static STRANDED: Statement = Statement::new(
    |c| {
        format!(
            "SELECT s.session_id, s.sd_id, s.claim_id FROM {x}.claude_sessions s
              WHERE s.sd_id IS NOT NULL AND s.status = 'active' AND s.claim_id > $1
                AND NOT EXISTS (SELECT FROM {x}.v_directives d
                                 WHERE d.sd_id = s.sd_id AND NOT d.is_terminal)
              ORDER BY s.claim_id LIMIT $2",
            x = c.schema
        )
    },
    &[INT8OID, INT4OID],
);

/// Up to `limit` sessions that hold an SD which is finished or gone, with claim ids above `after`.
pub fn stranded(db: &Db<'_>, after: i64, limit: i32) -> Result<Vec<Stranded>> {
    catalog::usable_backlog(db)?;
    let mut rows = db.run_by_index(&STRANDED, &[after.into(), limit.into()])?;
    let mut found = Vec::new();
    while rows.next().is_some() {
        found.push(read_stranded(&rows)?);
    }
    Ok(found)
}

fn read_stranded(row: &SpiTupleTable<'_>) -> Result<Stranded> {
    Ok(Stranded {
        session_id: row.required_text(1, "claude_sessions.session_id")?,
        sd_id: row.required_text(2, "claude_sessions.sd_id")?,
        claim_id: row.required_bigint(3, "claude_sessions.claim_id")?,
    })
}

// One snapshot shows both sides of every claim that somebody is making or ending.
static CONTRADICTORY: Statement = Statement::new(
    |c| {
        format!(
            "SELECT sd_id FROM (
                 SELECT h.sd_id FROM {x}.sd_claims h
                  WHERE h.released_at IS NULL
                    AND NOT EXISTS (SELECT FROM {x}.claude_sessions s
                                     WHERE s.sd_id = h.sd_id AND s.sd_id IS NOT NULL
                                       AND s.status = 'active' AND s.claim_id = h.claim_id)
                  UNION
                 SELECT s.sd_id FROM {x}.claude_sessions s
                  WHERE s.sd_id IS NOT NULL AND s.status = 'active'
                    AND NOT EXISTS (SELECT FROM {x}.sd_claims h
                                     WHERE h.sd_id = s.sd_id AND h.released_at IS NULL
                                       AND h.claim_id = s.claim_id
                                       AND h.session_id = s.session_id)) found
              WHERE sd_id COLLATE pg_catalog.\"C\" > $1
              ORDER BY sd_id COLLATE pg_catalog.\"C\" LIMIT $2",
            x = c.schema
        )
    },
    &[TEXTOID, INT4OID],
);

/// Up to `limit` SDs about whose claims sessions and history disagree, in the order of their ids, after `after`.
pub fn contradictory(db: &Db<'_>, after: &str, limit: i32) -> Result<Vec<String>> {
    let mut rows = db.run_by_index(&CONTRADICTORY, &[after.into(), limit.into()])?;
    let mut found = Vec::new();
    while rows.next().is_some() {
        found.push(rows.required_text(1, "sd_claims.sd_id")?);
    }
    Ok(found)
}

/// Settles what is wrong with an SD's claim, unless somebody is writing the SD or guards the claim.
pub fn try_settle(db: &Db<'_>, sd_id: &str) -> Result<Vec<Contradiction>> {
    if !directive::try_lock(db, sd_id)? {
        return Ok(Vec::new());
    }
    settle(db, sd_id, Wait::Skip)
}
