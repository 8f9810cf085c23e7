//! Mending everything at once: what a superuser, a replica or half a restore has left behind.
//!
//! What a call meets it settles by itself (see `claim::contradiction`). This looks at all of it, also at what
//! nobody meets for long: the backlog's mirror, triggers and indexes, the views, the heartbeat board.

mod backlog;
pub mod views;

use crate::board;
use crate::error::{ClaimError, Result};
use crate::pg::time;
use crate::spi::claim::contradiction::{self, Contradiction};
use crate::spi::statement::Db;
use crate::spi::table::Wait;
use crate::spi::{catalog, directive, session};

/// How many rows one look finds.
const BATCH: i32 = 1000;

/// One thing that was found.
#[derive(Debug)]
pub struct Finding {
    /// What it is about: `acquisition`, `session`, `mirror`, `board`, `trigger`, `index`, `view`, `backlog`.
    pub kind: &'static str,
    /// Which one.
    pub object: String,
    /// What is wrong with it.
    pub finding: String,
    /// What is done about it.
    pub action: String,
    /// Whether that was done.
    pub is_done: bool,
}

/// The findings so far, and whether to mend them.
pub struct Report {
    is_dry_run: bool,
    findings: Vec<Finding>,
}

impl Report {
    /// Adds something that was found, and mends it unless this is only to look.
    fn mend(
        &mut self,
        kind: &'static str,
        object: &str,
        finding: impl Into<String>,
        action: impl Into<String>,
        mend: impl FnOnce() -> Result<bool>,
    ) -> Result<()> {
        let is_done = !self.is_dry_run && mend()?;
        self.findings.push(Finding {
            kind,
            object: object.to_owned(),
            finding: finding.into(),
            action: action.into(),
            is_done,
        });
        Ok(())
    }
}

/// Finds what is wrong and, unless this is only to look, mends it, in this transaction.
///
/// Whoever claims, releases or finishes an SD waits meanwhile; heartbeats do not.
pub fn repair(db: &Db<'_>, is_dry_run: bool) -> Result<Vec<Finding>> {
    if time::has_transaction_snapshot() {
        return Err(ClaimError::NeedsReadCommitted { what: "repair" });
    }
    let mut report = Report { is_dry_run, findings: Vec::new() };
    if !is_dry_run {
        catalog::exclude_claims(db)?;
    }
    let are_views_right = views::mend(db, &mut report)?;
    match catalog::usable_backlog(db) {
        Ok(_) if !are_views_right => {
            let finding =
                "the views of the backlog are wrong, by which claims and mirror would be judged";
            let action = "call again without p_dry_run";
            report.mend("backlog", "v_directives", finding, action, || Ok(false))?;
            backlog::mend(db, &mut report)?;
            claims(db, &mut report)?;
        }
        Ok(_) => {
            backlog::mend(db, &mut report)?;
            claims(db, &mut report)?;
            stranded(db, &mut report)?;
            mirror(db, &mut report)?;
        }
        Err(error) => {
            let action = "see coordination_check(); call again once the backlog can be used";
            report.mend("backlog", "v_directives", error.to_string(), action, || Ok(false))?;
            claims(db, &mut report)?;
        }
    }
    heartbeats(db, &mut report)?;
    Ok(report.findings)
}

/// Claims about which sessions and history disagree.
fn claims(db: &Db<'_>, report: &mut Report) -> Result<()> {
    let mut after = String::new();
    loop {
        let found = contradiction::contradictory(db, &after, BATCH)?;
        let Some(last) = found.last() else { return Ok(()) };
        after.clone_from(last);
        for sd_id in &found {
            let wrong = contradiction::diagnose(db, sd_id)?;
            let settled = if report.is_dry_run {
                Vec::new()
            } else {
                contradiction::settle(db, sd_id, Wait::Skip)?
            };
            for (contradiction, claim_id) in wrong {
                let kind = match contradiction {
                    Contradiction::OpenWithoutHolder => "acquisition",
                    _ => "session",
                };
                let object = format!("claim {claim_id} on SD \"{sd_id}\"");
                let done = settled.contains(&contradiction);
                let action = contradiction.remedy();
                report.mend(kind, &object, contradiction.finding(), action, || Ok(done))?;
            }
        }
    }
}

/// Claims on SDs that are finished or gone.
fn stranded(db: &Db<'_>, report: &mut Report) -> Result<()> {
    let mut after = 0;
    loop {
        let found = contradiction::stranded(db, after, BATCH)?;
        let Some(last) = found.last() else { return Ok(()) };
        after = last.claim_id;
        for held in &found {
            let object = format!("session \"{}\" with SD \"{}\"", held.session_id, held.sd_id);
            let wrong = Contradiction::HeldThoughFinished;
            report.mend("session", &object, wrong.finding(), wrong.remedy(), || {
                contradiction::end_finished(db, &held.session_id, &held.sd_id, held.claim_id)
            })?;
        }
    }
}

/// SDs of which the backlog says something else than the sessions.
fn mirror(db: &Db<'_>, report: &mut Report) -> Result<()> {
    for (sd_id, session_id) in directive::out_of_step(db)? {
        let object = format!("SD \"{sd_id}\"");
        let finding = match &session_id {
            Some(session_id) => {
                format!("the backlog does not say that session \"{session_id}\" works on it")
            }
            None => "the backlog says that somebody works on it, and nobody does".into(),
        };
        report.mend(
            "mirror",
            &object,
            finding,
            "the backlog says what the sessions say",
            || directive::sync(db, &sd_id, session_id.as_deref()).map(|()| true),
        )?;
    }
    Ok(())
}

/// Sessions of which the heartbeat board says something else than the table.
fn heartbeats(db: &Db<'_>, report: &mut Report) -> Result<()> {
    let table = db.catalog()?.sessions;
    for (session_id, claim_id) in board::open_sessions(table) {
        let found = session::find(db, &session_id)?;
        let is_right = found.is_some_and(|session| {
            !session.is_released() && session.claim_id.unwrap_or_default() == claim_id
        });
        if is_right {
            continue;
        }
        let object = format!("session \"{session_id}\"");
        let finding = "the heartbeat board answers with a claim that the session does not have";
        report.mend("board", &object, finding, "the table answers its next heartbeat", || {
            board::Place::of(table, &session_id).close();
            Ok(true)
        })?;
    }
    Ok(())
}
