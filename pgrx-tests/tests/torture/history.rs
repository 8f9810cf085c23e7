//! Remembers what the server told each client, and whether the client's transaction was committed. At the end of a phase the
//! test compares that with the tables.

use std::collections::HashMap;
use std::sync::Mutex;

use serde_json::Value;

use crate::logbook::Logbook;
use crate::verbs::Kind;

/// A claim that a client was granted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    pub claim_id: i64,
    pub sd: String,
    pub session: String,
    /// Whether this very call made it.
    pub is_new: bool,
}

/// What the server has told a transaction so far. It counts once the transaction is committed.
#[derive(Debug, Clone, Default)]
pub struct Pending {
    pub granted: Vec<Told>,
    /// Claims that others were said to hold.
    pub refused: Vec<Told>,
    /// Claim ids that were released.
    pub released: Vec<i64>,
    /// Ids of rows that were written under a claim.
    pub work: Vec<i64>,
}

impl Pending {
    /// How much there is of each, to go back to.
    pub fn mark(&self) -> [usize; 4] {
        [self.granted.len(), self.refused.len(), self.released.len(), self.work.len()]
    }

    /// Takes what came after `mark` out: it was rolled back.
    pub fn split_off(&mut self, mark: [usize; 4]) -> Self {
        Self {
            granted: self.granted.split_off(mark[0]),
            refused: self.refused.split_off(mark[1]),
            released: self.released.split_off(mark[2]),
            work: self.work.split_off(mark[3]),
        }
    }
}

/// Of one phase.
#[derive(Default)]
pub struct Facts {
    /// Acknowledged commits.
    pub kept: Pending,
    /// Claims that were made by what was certainly rolled back.
    pub undone: Vec<i64>,
    /// Rows that were written by what was certainly rolled back.
    pub undone_work: Vec<i64>,
    prepared: HashMap<String, Pending>,
    last_told: HashMap<String, (i64, String)>,
    pub operations: u64,
}

#[derive(Default)]
pub struct History(Mutex<Facts>);

impl History {
    /// The claim id and the SD that a client was last told for the session, committed or not.
    pub fn last_told(&self, session: &str) -> (i64, String) {
        let facts = self.0.lock().unwrap();
        facts.last_told.get(session).cloned().unwrap_or((1, "SD-0".into()))
    }

    /// Reads an answer. What it tells goes to `pending`, until it is known what became of the transaction.
    pub fn read(&self, kind: Kind, rows: &[Option<String>], pending: &mut Pending, log: &Logbook) {
        self.0.lock().unwrap().operations += 1;
        let first = rows.first().and_then(|row| row.as_deref()).unwrap_or_default();
        match kind {
            Kind::Claim | Kind::Takeover | Kind::Release => match serde_json::from_str(first) {
                Ok(answer) => self.read_json(kind, &answer, pending, log),
                Err(error) => log.violation(format!("an answer is no JSON: {first}: {error}")),
            },
            Kind::Start => {
                let is_told = !first.starts_with('❌')
                    || !first.contains("is already claimed")
                    || ["Session: s", "Heartbeat: ", "Hostname: ", "TTY: "]
                        .iter()
                        .all(|part| first.contains(part));
                if !is_told {
                    log.violation(format!("a refusal that does not name the owner: {first}"));
                }
            }
            // The assertion's answer comes first, the row's id last.
            Kind::Work => match rows.last().and_then(|row| row.as_deref()?.parse().ok()) {
                Some(id) => pending.work.push(id),
                None => log.violation(format!("work without an id: {rows:?}")),
            },
            Kind::Unguarded => log.violation("a row of an SD was written without its claim".into()),
            _ => {}
        }
    }

    fn read_json(&self, kind: Kind, answer: &Value, pending: &mut Pending, log: &Logbook) {
        let text = |key: &str| answer[key].as_str().unwrap_or_default().to_owned();
        let told = |session: &str, is_new| Told {
            claim_id: answer["claim_id"].as_i64().unwrap_or_default(),
            sd: text("sd_id"),
            session: text(session),
            is_new,
        };
        match (kind, answer["success"].as_bool(), answer["error"].as_str()) {
            (Kind::Claim | Kind::Takeover, Some(true), None) => {
                let told = told("session_id", answer["already_owned"] == false);
                if told.claim_id == 0 || told.sd.is_empty() || told.session.is_empty() {
                    log.violation(format!("a claim that was granted, and not which: {answer}"));
                }
                // Nobody is silent for that long unless an operator says so.
                let age = &answer["took_over"]["heartbeat_age_seconds"];
                let is_live = age.as_f64().is_none_or(|age| age < 30.0);
                if kind == Kind::Claim && answer["took_over"].is_object() && is_live {
                    log.violation(format!("a live session lost its claim: {answer}"));
                }
                let place = (told.claim_id, told.sd.clone());
                self.0.lock().unwrap().last_told.insert(told.session.clone(), place);
                pending.granted.push(told);
            }
            (Kind::Claim, Some(false), Some("already_claimed")) => {
                let owner = told("claimed_by", false);
                let is_complete = owner.claim_id != 0
                    && !owner.sd.is_empty()
                    && !owner.session.is_empty()
                    && answer["heartbeat_age_seconds"].is_number()
                    && answer["heartbeat_age_human"].is_string()
                    && answer["claimed_at"].is_string();
                if !is_complete {
                    log.violation(format!("a refusal that does not name the owner: {answer}"));
                }
                pending.refused.push(owner);
            }
            (Kind::Release, Some(true), None) => {
                // end_session answers with the row as it is stored, whose claim is over.
                if answer["released_at"].is_string() {
                    pending.released.extend(answer["claim_id"].as_i64());
                }
            }
            (_, Some(false), Some(_)) => {}
            _ => log.violation(format!("neither granted nor refused: {answer}")),
        }
    }

    pub fn commit(&self, pending: Pending) {
        self.0.lock().unwrap().keep(pending);
    }

    pub fn roll_back(&self, pending: Pending) {
        self.0.lock().unwrap().undo(pending);
    }

    /// Before PREPARE TRANSACTION is sent: whoever ends it settles what becomes of this.
    pub fn prepare(&self, gid: &str, pending: Pending) {
        self.0.lock().unwrap().prepared.insert(gid.to_owned(), pending);
    }

    /// What was prepared has ended, and so it was said.
    pub fn settle(&self, gid: &str, is_committed: bool) {
        let mut facts = self.0.lock().unwrap();
        let Some(pending) = facts.prepared.remove(gid) else { return };
        if is_committed { facts.keep(pending) } else { facts.undo(pending) }
    }

    pub fn take(&self) -> Facts {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl Facts {
    fn keep(&mut self, pending: Pending) {
        self.kept.granted.extend(pending.granted);
        self.kept.refused.extend(pending.refused);
        self.kept.released.extend(pending.released);
        self.kept.work.extend(pending.work);
    }

    fn undo(&mut self, pending: Pending) {
        self.undone
            .extend(pending.granted.iter().filter(|told| told.is_new).map(|told| told.claim_id));
        self.undone_work.extend(pending.work);
    }
}
