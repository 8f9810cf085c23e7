//! A database worker: does what there is to do in one database, waits a moment for more, and ends.

use std::ffi::CStr;
use std::time::{Duration, Instant};

use pgrx::pg_sys;

use super::control::{self, Found, Kind};
use super::process;
use super::round::{self, Round, Stay, Untold};
use crate::board;
use crate::guc;
use crate::identity;
use crate::spi::installation::InUse;

/// How long the worker waits for more before it ends: long enough to spare a process for each
/// transaction under load, short enough for `DROP DATABASE`, which waits five seconds for it.
const LINGER: Duration = Duration::from_millis(1000);

/// How often it looks meanwhile. Not sooner, however often it is woken: what comes within that time
/// is done in one go, so that a busy database costs no more than this. And without being woken, for
/// what nobody announces, such as a connection whose process is just ending.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// The same where events come fast. They are announced within a second even so.
const LOOK_EVERY_IF_MANY: Duration = Duration::from_millis(300);

/// How long the worker stays at the most, so that it finds settings that were changed for the
/// database.
const LONGEST_STAY: Duration = Duration::from_secs(60);

/// What the worker's settings are, whatever the database or the superuser has.
const SETTINGS: &[(&CStr, &CStr)] = &[
    // Nothing that a user may have made is found by an unqualified name.
    (c"search_path", c"pg_catalog, pg_temp"),
    (c"default_transaction_isolation", c"read committed"),
    (c"default_transaction_read_only", c"off"),
    (c"default_transaction_deferrable", c"off"),
    // What is lost in a crash is done again. Commits of others after it make it durable as well. Not
    // so the order of events, which others read at once: see `round`.
    (c"synchronous_commit", c"off"),
    // Its statements run again and again with arguments that make no difference.
    (c"plan_cache_mode", c"force_generic_plan"),
    // The worker passes locked rows by; where it cannot, others must not wait for it for long.
    (c"lock_timeout", c"1s"),
    (c"statement_timeout", c"0"),
    (c"idle_in_transaction_session_timeout", c"0"),
    #[cfg(any(feature = "pg17", feature = "pg18"))]
    (c"transaction_timeout", c"0"),
    // Its statements take less time than compiling them would.
    (c"jit", c"off"),
    // The triggers that keep everything in step fire.
    (c"session_replication_role", c"origin"),
];

/// A database worker's main function; the argument is the database's id.
#[pgrx::pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn pg_claims_worker_main(argument: pg_sys::Datum) {
    process::begin();
    let database = pg_sys::Oid::from(argument.value() as u32);
    // SAFETY: connects as the bootstrap superuser; ends the process with a message if the database
    // has been dropped.
    unsafe {
        pg_sys::BackgroundWorkerInitializeConnectionByOid(database, pg_sys::InvalidOid, 0);
    }
    let Found::Ready(handle) = control::find() else {
        return;
    };
    let Some(control) = control::attach(handle) else { return };
    let Some(slot) = control.slot_of(database) else { return };
    // SAFETY: the process's own latch.
    slot.set_worker_latch(unsafe { pg_sys::MyLatch });
    set_settings();
    identity::watch_renames();
    let stay = Stay { control: &control, slot, began: Instant::now() };
    // Where the work could not be done, or the process is terminated, the slot goes on saying that a
    // worker runs, by which the launcher knows that it must start another.
    while work(&stay) {
        // In this order: whoever announces work sets it down first and then asks who runs.
        slot.set_running(false);
        if !slot.is_pending() || stay.is_over() || stay.began.elapsed() >= LONGEST_STAY {
            return;
        }
        slot.set_running(true);
    }
}

/// Works until there has been nothing to do for a while, or another database waits. Returns false if
/// that was not possible.
fn work(stay: &Stay<'_>) -> bool {
    let slot = stay.slot;
    let mut round = Round::begin(stay);
    let mut quiet_since = Instant::now();
    let mut untold = Untold::Anybody;
    while quiet_since.elapsed() < LINGER && stay.began.elapsed() < LONGEST_STAY {
        let was_pending = slot.take_pending();
        untold = stay.untold();
        match round::look() {
            Some(InUse::Since(_)) => slot.set_kind(Kind::Served),
            Some(InUse::NotYet)
                if untold == Untold::Anybody && guc::worker() && !stay.is_over() =>
            {
                process::pause(LOOK_EVERY);
                quiet_since = Instant::now();
                continue;
            }
            Some(InUse::NotYet) => {
                // Whoever uses it first tells so.
                slot.set_kind(Kind::Served);
                slot.set_interval(again_for(untold));
                return true;
            }
            Some(InUse::NotInstalled) => {
                slot.set_kind(Kind::Other);
                board::remove_others(None);
                return true;
            }
            None => return false,
        }
        if round.run() || was_pending || untold == Untold::Anybody {
            quiet_since = Instant::now();
        }
        if !guc::worker() || stay.is_over() {
            break;
        }
        process::idle();
        process::pause(if round.has_many_events() { LOOK_EVERY_IF_MANY } else { LOOK_EVERY });
    }
    slot.set_interval(round.finish().or(again_for(untold)));
    true
}

/// How soon to come again for what somebody may have committed meanwhile, and told nobody.
fn again_for(untold: Untold) -> Option<Duration> {
    (untold != Untold::Nobody).then(round::reap_interval)
}

fn set_settings() {
    for (name, value) in SETTINGS {
        // SAFETY: null-terminated strings; the settings exist in every supported version.
        unsafe {
            pg_sys::SetConfigOption(
                name.as_ptr(),
                value.as_ptr(),
                pg_sys::GucContext::PGC_SUSET,
                pg_sys::GucSource::PGC_S_OVERRIDE,
            );
        }
    }
}
