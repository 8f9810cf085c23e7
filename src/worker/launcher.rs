//! The launcher: starts database workers where there is something to do.

use std::time::{Duration, Instant};

use pgrx::pg_sys;

use super::child::Child;
use super::control::{self, Control, Kind, MAX_DATABASES, Slot};
use super::process;
use crate::board;
use crate::guc;
use crate::identity;
use crate::pg::lock::{Mode, Tag, Until};

/// How often a database is visited in which time alone can change nothing: for settings that an
/// operator has changed there, and for pruning.
const IDLE_INTERVAL: Duration = Duration::from_secs(60);

/// How soon, and at most how seldom, to look again whether a database has got the extension that had
/// not. Normally it tells so itself; this is for what the launcher was not yet there to hear.
const OTHER_INTERVALS: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(3600));

/// How long to wait for a slot of `max_worker_processes` to become free.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// How many database workers may run at once, so that other extensions find slots as well. Where more
/// databases have something to do, they take turns.
const MAX_WORKERS: usize = 2;

/// How soon to come again after a worker that ended before its work was done; twice as long after each
/// further one, up to the interval of idle databases.
const AGAIN_AFTER: Duration = Duration::from_secs(1);

/// After how many intervals of reaping without getting on a database worker counts as stuck, such as
/// in a trigger of the user's that never returns, and is terminated: it must not keep the others.
const STUCK_AFTER: u32 = 30;

/// The lock that one launcher holds at a time: an advisory lock of no database, which nobody else
/// can take. The number is arbitrary.
const SINGLETON: u64 = 0x7067_636c_6169_6d73;

/// What the launcher knows of a database beside what is in its slot.
struct Visit {
    database: pg_sys::Oid,
    /// When its worker is to come, by time alone.
    due: Instant,
    /// Since when it has waited for one, if it does.
    waiting_since: Option<Instant>,
    /// Until when it has to wait, as the last one failed.
    put_off_until: Option<Instant>,
    /// How often in a row.
    failures: u32,
    /// How long to leave a database alone that has not the extension.
    other_interval: Duration,
    worker: Option<Child>,
}

impl Visit {
    fn new(database: pg_sys::Oid) -> Self {
        Self {
            database,
            due: Instant::now(),
            waiting_since: None,
            put_off_until: None,
            failures: 0,
            other_interval: OTHER_INTERVALS.0,
            worker: None,
        }
    }

    fn is_put_off(&self, now: Instant) -> bool {
        self.put_off_until.is_some_and(|until| now < until)
    }
}

fn reap_interval() -> Duration {
    guc::reap_interval().to_std().unwrap_or(IDLE_INTERVAL)
}

/// The launcher's main function.
#[pgrx::pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn pg_claims_launcher_main(_argument: pg_sys::Datum) {
    process::begin();
    // SAFETY: without names the process may read the catalogues that all databases share, and
    // counts as connected to none.
    unsafe {
        pg_sys::BackgroundWorkerInitializeConnection(std::ptr::null(), std::ptr::null(), 0);
    }
    if !hold_singleton() {
        // Another one serves this server. Ending in order keeps the server from restarting it.
        return;
    }
    let control = control::create();
    identity::watch_renames();
    let mut visits: Vec<Visit> = Vec::new();
    let mut scanned_at: Option<Instant> = None;
    loop {
        board::keep_over_shutdown();
        // Also by time: a database that was made from a template with claims tells nobody.
        let is_old = scanned_at.is_none_or(|at| at.elapsed() >= IDLE_INTERVAL);
        if guc::worker() && (control.take_rescan() || is_old) {
            rescan(control, &mut visits);
            scanned_at = Some(Instant::now());
        }
        if has_heard_of_renames() {
            for slot in control.slots() {
                slot.set_renamed_at(0);
            }
        }
        let next = serve(control, &mut visits);
        process::idle();
        if process::wait(next) {
            // Settings have changed: what is due may be due earlier.
            for visit in &mut visits {
                visit.due = Instant::now();
            }
        }
    }
}

/// Whether a role was renamed, which database workers mostly do not live to hear of.
fn has_heard_of_renames() -> bool {
    // SAFETY: a transaction begins with hearing what was changed; none is open between two rounds.
    unsafe {
        pg_sys::StartTransactionCommand();
        pg_sys::CommitTransactionCommand();
    }
    identity::take_renamed()
}

fn hold_singleton() -> bool {
    Tag::of_server(SINGLETON).try_acquire(Mode::Exclusive, Until::Released)
}

/// Starts what is due, first what has waited longest. Returns how long to wait.
fn serve(control: &Control, visits: &mut [Visit]) -> Duration {
    let now = Instant::now();
    for visit in &mut *visits {
        let Some(slot) = control.slot_of(visit.database) else { continue };
        collect(control, visit, slot, now);
        let wants = visit.worker.is_none()
            && (visit.due <= now || slot.is_pending())
            && !visit.is_put_off(now);
        visit.waiting_since = wants.then(|| visit.waiting_since.unwrap_or(now));
    }
    if !guc::worker() {
        // Those that run end by themselves, or are ended as stuck.
        let is_any_left = visits.iter().any(|visit| visit.worker.is_some());
        return if is_any_left { reap_interval() } else { IDLE_INTERVAL };
    }
    visits.sort_by_key(|visit| visit.waiting_since.unwrap_or(now));
    let mut running = visits.iter().filter(|visit| visit.worker.is_some()).count();
    let mut is_crowded = false;
    let mut is_starved = false;
    for visit in visits.iter_mut().filter(|visit| visit.waiting_since.is_some()) {
        let Some(slot) = control.slot_of(visit.database) else { continue };
        if running >= MAX_WORKERS || is_starved {
            is_crowded = true;
            continue;
        }
        match Child::start(slot, visit.database) {
            Some(worker) => {
                visit.worker = Some(worker);
                visit.waiting_since = None;
                visit.put_off_until = None;
                // From its beginning, so that it comes at even intervals.
                visit.due = now + slot.interval().unwrap_or(IDLE_INTERVAL);
                running += 1;
            }
            None => is_starved = true,
        }
    }
    control.set_crowded(is_crowded);
    if is_starved && !control.set_starved(true) {
        pgrx::ereport!(
            pgrx::PgLogLevel::LOG,
            pgrx::PgSqlErrorCode::ERRCODE_CONFIGURATION_LIMIT_EXCEEDED,
            "no background worker slot is free for pg_claims",
            "Claims are not reaped until one is. Consider a greater max_worker_processes."
        );
    }
    if !is_starved {
        control.set_starved(false);
    }
    let at_most = match (is_starved, running) {
        (true, _) => RETRY_AFTER,
        (false, 0) => IDLE_INTERVAL,
        // The end of one wakes the launcher; that it does not get on must be looked for.
        (false, _) => reap_interval(),
    };
    let next = visits
        .iter()
        .filter(|visit| visit.worker.is_none() && visit.waiting_since.is_none())
        .map(|visit| visit.put_off_until.unwrap_or(visit.due))
        .fold(now + at_most, Instant::min);
    next.saturating_duration_since(Instant::now())
}

/// Notes the end of a database's worker, and when to come again.
fn collect(control: &Control, visit: &mut Visit, slot: &Slot, now: Instant) {
    let Some(worker) = &mut visit.worker else { return };
    if !worker.has_ended() {
        return worker.terminate_if_stuck(slot, reap_interval() * STUCK_AFTER);
    }
    visit.worker = None;
    if slot.is_running() {
        // It was terminated, or failed, before its work was done.
        slot.set_running(false);
        slot.set_pending();
        let longer = 2_u32.saturating_pow(visit.failures);
        visit.put_off_until = Some(now + AGAIN_AFTER.saturating_mul(longer).min(IDLE_INTERVAL));
        visit.failures = visit.failures.saturating_add(1);
        // The database may not be there any more.
        control.request_rescan();
    } else {
        visit.failures = 0;
    }
    // What it found out about the time of the next visit counts from its beginning.
    let planned = slot.interval().unwrap_or(IDLE_INTERVAL);
    visit.due = visit.due.min(now + planned);
    if slot.kind() == Kind::Other {
        visit.due = now + visit.other_interval;
        visit.other_interval = (visit.other_interval * 2).min(OTHER_INTERVALS.1);
    } else if slot.interval().is_none() {
        visit.due = now + IDLE_INTERVAL;
    }
}

/// Makes slots and visits those of the databases that there are.
fn rescan(control: &Control, visits: &mut Vec<Visit>) {
    let databases = databases();
    let without_room = control.set_databases(&databases);
    if without_room > 0 {
        pgrx::ereport!(
            pgrx::PgLogLevel::WARNING,
            pgrx::PgSqlErrorCode::ERRCODE_CONFIGURATION_LIMIT_EXCEEDED,
            format!(
                "pg_claims serves {MAX_DATABASES} databases, {without_room} more are not served"
            ),
            "Call cleanup_stale_sessions() there at intervals."
        );
    }
    visits.retain(|visit| control.slot_of(visit.database).is_some());
    for slot in control.slots() {
        let Some(database) = slot.database() else { continue };
        if !visits.iter().any(|visit| visit.database == database) {
            visits.push(Visit::new(database));
        }
    }
}

/// The databases that can be connected to.
fn databases() -> Vec<pg_sys::Oid> {
    /// What `datconnlimit` is while a database is being dropped.
    const INVALID: i32 = -2;
    let mut found = Vec::new();
    // SAFETY: reads a catalogue that all databases share, in a transaction, as the server's own
    // autovacuum launcher does.
    unsafe {
        pg_sys::StartTransactionCommand();
        pg_sys::GetTransactionSnapshot();
        let relation =
            pg_sys::table_open(pg_sys::DatabaseRelationId, pg_sys::AccessShareLock as i32);
        let scan = pg_sys::table_beginscan_catalog(relation, 0, std::ptr::null_mut());
        loop {
            let tuple = pg_sys::heap_getnext(scan, pg_sys::ScanDirection::ForwardScanDirection);
            if tuple.is_null() {
                break;
            }
            let row = &*pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_database>();
            if row.datallowconn && row.datconnlimit != INVALID {
                found.push(row.oid);
            }
        }
        pg_sys::table_endscan(scan);
        pg_sys::table_close(relation, pg_sys::AccessShareLock as i32);
        pg_sys::CommitTransactionCommand();
    }
    found
}
