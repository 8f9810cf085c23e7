//! What a database worker does, step by step, each in transactions of its own.
//!
//! A step that fails is counted and told in `worker_health`; it keeps neither the other steps from
//! being done nor, where it is about one claim or one connection, the other claims and connections.

use std::ffi::CStr;
use std::time::{Duration, Instant};

use chrono::TimeDelta;
use pg_claims_core::batch::Batch;
use pgrx::pg_sys;

use super::connections;
use super::control::{Control, Slot};
use super::process;
use super::settle;
use super::step::{STEP_LIMIT, note, step, try_look, try_step};
use crate::board;
use crate::error::Result;
use crate::guc;
use crate::identity;
use crate::pg::{backend, time};
use crate::service;
use crate::spi::claim::reap::{self, Candidate, Policy};
use crate::spi::installation::{self, InUse};
use crate::spi::{Db, health, heartbeat, manager, order, prune, session};

/// How many claims one scan finds. Each scan reads all open claims, so that few find many.
const SCAN_BATCH: i32 = 1000;

/// How many claims or rows one transaction takes on.
pub(super) const BATCH: i32 = 100;

/// How many claims one transaction ends.
const REAP_BATCH: usize = 25;

/// How long ending them may take.
const BATCH_LIMIT: Duration = Duration::from_secs(2);

/// How long ending a single claim may take, after its batch has failed.
pub(super) const SINGLE_LIMIT: Duration = Duration::from_secs(1);

/// How long heartbeats are written one by one, after their batch has failed: what else there is to do must have
/// its turn.
const SINGLY_LIMIT: Duration = Duration::from_secs(5);

/// How many events one transaction puts in order or announces, at the most. Each costs a flush to disk, and
/// every listener a wake-up.
const EVENT_BATCH: i32 = 5000;

/// How many events of one look make it worth while to let more come together before the next one.
const MANY_EVENTS: usize = 100;

/// How many rows one transaction of pruning looks at.
const PRUNE_BATCH: i32 = 1000;

/// How often history is pruned.
const PRUNE_INTERVAL: TimeDelta = TimeDelta::hours(1);

/// How often the names of roles are looked at, in microseconds.
const RENAME_INTERVAL: i64 = 60_000_000;

/// What the database is to the worker; `None` if that cannot be told. Keeps no lock while it looks, as somebody
/// may be dropping the extension.
pub fn look() -> Option<InUse> {
    let look = |_: &Db<'_>| Ok(installation::in_use());
    let found = try_look(STEP_LIMIT, c"looking for the extension", look);
    found.map_err(|error| note(&mut health::Run::default(), error)).ok()
}

/// How long the worker may stay.
pub struct Stay<'c> {
    /// What all processes share.
    pub control: &'c Control,
    /// The database's part of it.
    pub slot: &'c Slot,
    /// Since when it has been here.
    pub began: Instant,
}

/// How long the worker stays where another database waits for its turn.
const SHORT_STAY: Duration = Duration::from_millis(250);

/// How long it takes at the most until every process that looks for the launcher finds it, in microseconds: a little longer
/// than a process goes by its last look (see `wake`).
const FOUND_WITHIN: i64 = 1_100_000;

/// Who may yet commit something of which the worker is not told.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Untold {
    /// Nobody.
    Nobody,
    /// A transaction that began before the launcher was found by all.
    AnOldTransaction,
    /// Anybody: the launcher has only just been there to be found.
    Anybody,
}

impl Stay<'_> {
    /// Who may yet commit something untold. Asked before a look: what was committed before is seen by that.
    pub fn untold(&self) -> Untold {
        let made_at = self.control.made_at();
        let found_from = made_at.saturating_add(FOUND_WITHIN);
        // A clock that was set back since says nothing.
        if (made_at..found_from).contains(&time::now_in_microseconds()) {
            return Untold::Anybody;
        }
        let (database, own_pid) = (backend::database(), backend::pid());
        let mut is_any = false;
        service::each_process(|process| {
            // With track_activities off a process does not tell of its transactions.
            let began = match process.st_state {
                pg_sys::BackendState::STATE_DISABLED => process.st_proc_start_timestamp,
                _ => process.st_xact_start_timestamp,
            };
            is_any |= process.st_databaseid == database
                && process.st_procpid != own_pid
                && process.st_backendType != pg_sys::BackendType::B_AUTOVAC_WORKER
                && (1..found_from).contains(&began);
        });
        if is_any { Untold::AnOldTransaction } else { Untold::Nobody }
    }

    /// Whether it is another database's turn.
    pub fn is_over(&self) -> bool {
        self.control.is_crowded() && self.began.elapsed() >= SHORT_STAY
    }
}

/// The work of one stay in the database.
pub struct Round<'c> {
    stay: &'c Stay<'c>,
    run: health::Run,
    /// Time spent working since health was recorded.
    spent: Duration,
    recorded_at: Instant,
    /// When stale sessions were looked for last.
    reaped_at: Option<Instant>,
    /// How many events the last run put in order.
    events: usize,
    ordering: Batch,
    announcing: Batch,
}

impl<'c> Round<'c> {
    /// Begins.
    pub fn begin(stay: &'c Stay<'c>) -> Self {
        Self {
            stay,
            run: health::Run::default(),
            spent: Duration::ZERO,
            recorded_at: Instant::now(),
            reaped_at: None,
            events: 0,
            ordering: Batch::of(EVENT_BATCH),
            announcing: Batch::of(EVENT_BATCH),
        }
    }

    /// Whether events come so fast that they had better be dealt with in larger groups.
    pub fn has_many_events(&self) -> bool {
        self.events >= MANY_EVENTS
    }

    /// Does what there is to do. Returns whether there was anything.
    pub fn run(&mut self) -> bool {
        let start = Instant::now();
        self.stay.slot.take_turn();
        let mut done = connections::tend(&mut self.run);
        if self.is_reaping_due() {
            self.reaped_at = Some(Instant::now());
            done |= write_board(self.stay, &mut self.run);
            done |= attend_claims(self.stay, &mut self.run);
            done |= settle::contradictions(self.stay, &mut self.run);
            follow_renames(self.stay.slot, &mut self.run);
            self.prune();
        }
        done |= self.announce();
        self.spent += start.elapsed();
        if self.recorded_at.elapsed() >= reap_interval() {
            self.record();
        }
        done
    }

    /// Puts what has become visible in order, and announces it. Returns whether there was anything.
    fn announce(&mut self) -> bool {
        self.events = 0;
        let mut any = false;
        loop {
            self.stay.slot.take_turn();
            let limit = self.ordering.limit();
            let ordered = step(&mut self.run, c"pg_claims: putting events in order", |db| {
                // Durable before anybody can read it: a place that was forgotten in a crash would be given
                // to the same event again, and who has read it would read it twice.
                process::commit_durably();
                order::append_visible(db, limit)
            });
            let limit = self.announcing.limit();
            let announced = step(&mut self.run, c"pg_claims: announcing events", |db| {
                order::announce(db, limit, guc::notify())
            });
            let (ordered, is_more) = self.ordering.note(ordered);
            let (announced, is_more_to_announce) = self.announcing.note(announced);
            self.events += ordered;
            any |= ordered > 0 || announced > 0;
            if !is_more && !is_more_to_announce {
                return any;
            }
        }
    }

    fn is_reaping_due(&self) -> bool {
        self.reaped_at.is_none_or(|at| at.elapsed() >= reap_interval())
    }

    fn prune(&mut self) {
        let due = step(&mut self.run, c"pg_claims: looking whether to prune", |db| {
            health::is_pruning_due(db, PRUNE_INTERVAL)
        });
        if due == Some(true) {
            tidy(self.stay.slot, &mut self.run);
            self.run.pruned = true;
            self.record();
        }
    }

    /// Records how it went since the last time.
    fn record(&mut self) {
        let mut run = std::mem::take(&mut self.run);
        run.duration = TimeDelta::from_std(self.spent).unwrap_or(TimeDelta::MAX);
        self.spent = Duration::ZERO;
        self.recorded_at = Instant::now();
        // What fails here is told with the next.
        step(&mut self.run, c"pg_claims: recording health", |db| health::record(db, &run));
    }

    /// Records how it went. Returns after what time to come again, if time alone may change something
    /// here.
    pub fn finish(mut self) -> Option<Duration> {
        self.record();
        let next = step(&mut self.run, c"pg_claims: planning the next visit", |db| {
            let is_busy = health::is_busy(db)? || heartbeat::is_board_ahead(db)?;
            let mut next = is_busy.then(reap_interval);
            if let Some(interval) = manager::shortest_interval(db)? {
                let interval = interval.to_std().unwrap_or_default();
                next = Some(next.map_or(interval, |next| next.min(interval)));
            }
            Ok(next)
        });
        // If it cannot be told, come back soon.
        next.unwrap_or_else(|| Some(reap_interval()))
    }
}

/// Writes the names of roles that have been renamed: as soon as this process hears of one, and otherwise now and
/// then, as it does not live for long.
fn follow_renames(slot: &Slot, run: &mut health::Run) {
    let now = time::now_in_microseconds();
    let is_due =
        now.saturating_sub(slot.renamed_at()) >= RENAME_INTERVAL || slot.renamed_at() > now;
    if (identity::take_renamed() || is_due)
        && step(run, c"pg_claims: following renamed roles", session::follow_renames).is_some()
    {
        slot.set_renamed_at(now);
    }
}

pub(super) fn reap_interval() -> Duration {
    guc::reap_interval().to_std().unwrap_or_default()
}

/// What the worker does with the heartbeat board.
const WRITING: &CStr = c"pg_claims: writing heartbeats";

/// Writes heartbeats from the board to the table, and clears it of what is over.
fn write_board(stay: &Stay<'_>, run: &mut health::Run) -> bool {
    let any = write_heartbeats(stay, run);
    step(run, WRITING, heartbeat::sweep_board);
    any
}

/// In batches, each by itself where a batch fails.
fn write_heartbeats(stay: &Stay<'_>, run: &mut health::Run) -> bool {
    let mut any = false;
    loop {
        stay.slot.take_turn();
        let unwritten = step(run, WRITING, heartbeat::unwritten).unwrap_or_default();
        if unwritten.is_empty() {
            return any;
        }
        // Noted only once it is committed; each step is a transaction.
        let noted = try_step(STEP_LIMIT, WRITING, |db| heartbeat::write(db, &unwritten))
            .map(heartbeat::Written::note);
        connections::tend(run);
        match noted {
            Ok(true) if stay.is_over() => return true,
            Ok(true) => any = true,
            Ok(false) => return any,
            Err(_) => return write_singly(stay, run, &unwritten) || any,
        }
    }
}

/// Each by itself, as many as there is time for; the next look begins anywhere. One that cannot be written,
/// such as for a slow trigger of the user's, must keep neither the others nor the worker's other work.
fn write_singly(stay: &Stay<'_>, run: &mut health::Run, unwritten: &[(String, i64)]) -> bool {
    let begin = Instant::now();
    let mut any = false;
    for one in unwritten.chunks(1) {
        stay.slot.take_turn();
        match try_step(SINGLE_LIMIT, WRITING, |db| heartbeat::write(db, one)) {
            Ok(written) => any |= written.note(),
            Err(error) => note(run, error),
        }
        connections::tend(run);
        if begin.elapsed() >= SINGLY_LIMIT || stay.is_over() {
            break;
        }
    }
    any
}

/// Notes stale sessions, warns of old claims, and reaps: from where the last run was broken off, and
/// then from the beginning. Breaks off where another database waits.
fn attend_claims(stay: &Stay<'_>, run: &mut health::Run) -> bool {
    let from = stay.slot.reaped_to();
    let mut any = false;
    for (after, up_to) in [(from, i64::MAX), (0, from)] {
        match attend_between(stay, run, after, up_to) {
            Attended::BrokenOff => {
                stay.slot.set_pending();
                return true;
            }
            Attended::All { something } => any |= something,
        }
    }
    stay.slot.set_reaped_to(0);
    any
}

/// What came of attending to some claims.
enum Attended {
    All { something: bool },
    BrokenOff,
}

fn attend_between(stay: &Stay<'_>, run: &mut health::Run, mut after: i64, up_to: i64) -> Attended {
    let policy = Policy { reap: guc::auto_reap(), min_silence: TimeDelta::zero() };
    let mut something = false;
    while after < up_to {
        let mut candidates = step(run, c"pg_claims: looking for stale sessions", |db| {
            reap::scan(db, policy, after, SCAN_BATCH)
        })
        .unwrap_or_default();
        let is_last = candidates.len() < SCAN_BATCH as usize;
        candidates.retain(|candidate| candidate.claim_id <= up_to);
        let Some(last) = candidates.last() else { break };
        after = last.claim_id;
        something = true;
        // Those that go on living apart: a trigger that runs while others are reaped must not keep
        // them locked.
        let (due, alive): (Vec<_>, Vec<_>) =
            candidates.iter().cloned().partition(|candidate| candidate.is_due);
        for alive in alive.chunks(BATCH as usize) {
            attend_batch(stay, run, alive, policy);
        }
        for due in due.chunks(REAP_BATCH) {
            if !attend_batch(stay, run, due, policy) {
                return Attended::BrokenOff;
            }
            connections::tend(run);
        }
        if is_last {
            break;
        }
    }
    Attended::All { something }
}

/// All in one transaction or, if that fails, each by itself: one claim that cannot be ended, such
/// as by a trigger of the user's, must not keep the others. Returns false if it was broken off.
fn attend_batch(
    stay: &Stay<'_>,
    run: &mut health::Run,
    candidates: &[Candidate],
    policy: Policy,
) -> bool {
    const WHAT: &CStr = c"pg_claims: reaping stale sessions";
    if candidates.is_empty() {
        return true;
    }
    stay.slot.take_turn();
    if let Ok(reaped) = try_step(BATCH_LIMIT, WHAT, |db| reap::attend_all(db, candidates, policy)) {
        run.reaped += reaped;
        return true;
    }
    for one in candidates {
        stay.slot.take_turn();
        let single = std::slice::from_ref(one);
        match try_step(SINGLE_LIMIT, WHAT, |db| reap::attend_all(db, single, policy)) {
            Ok(reaped) => run.reaped += reaped,
            Err(error) => note(run, error),
        }
        stay.slot.set_reaped_to(one.claim_id);
        connections::tend(run);
        if stay.is_over() {
            return false;
        }
    }
    true
}

/// Removes old history, and ends sessions that nobody comes back to.
fn tidy(slot: &Slot, run: &mut health::Run) {
    step(run, c"pg_claims: setting heartbeats right", prune::pull_back_heartbeats);
    step(run, c"pg_claims: clearing the heartbeat board", |db| {
        board::remove_others(Some(db.catalog()?.sessions));
        board::remove_databases_but(&health::databases(db)?);
        Ok(())
    });
    if let Some(silence) = guc::session_retention() {
        until_fewer(run, c"pg_claims: ending silent sessions", |db| {
            Ok(prune::end_silent_sessions(db, silence, BATCH)? as i64)
        });
    }
    let Some(retention) = guc::history_retention() else { return };
    let Some(limit) = time::now().checked_sub_signed(retention) else { return };
    prune_all(slot, run, c"pg_claims: pruning claims", |db, from| {
        prune::claims(db, from, limit, PRUNE_BATCH)
    });
    prune_all(slot, run, c"pg_claims: pruning events", |db, from| {
        prune::events(db, from, limit, PRUNE_BATCH)
    });
    until_fewer(run, c"pg_claims: pruning sessions", |db| prune::sessions(db, limit, PRUNE_BATCH));
}

/// Prunes a table stretch by stretch, until nothing old is left (or a stretch fails).
fn prune_all(
    slot: &Slot,
    run: &mut health::Run,
    what: &CStr,
    prune: impl Fn(&Db<'_>, i64) -> Result<prune::Stretch>,
) {
    let mut from = Some(0);
    while let Some(position) = from {
        slot.take_turn();
        connections::tend(run);
        from = step(run, what, |db| prune(db, position)).and_then(|stretch| stretch.next);
    }
}

/// Repeats a step until it does nothing (or fails).
fn until_fewer(run: &mut health::Run, what: &CStr, work: impl Fn(&Db<'_>) -> Result<i64>) {
    while step(run, what, &work).is_some_and(|done| done > 0) {}
}
