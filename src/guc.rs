//! Every setting, with its unit, range and default.
//!
//! All of them decide about somebody else's sessions, so only a superuser may change them: for the
//! server, for one database (`ALTER DATABASE … SET`) or for a superuser's own connection. The worker
//! reads the database's values at each of its runs. A value that an ordinary role put in place
//! before the library was loaded is rejected by the server when the setting is declared.

use std::ffi::CStr;

use chrono::{DateTime, TimeDelta, Utc};
use pg_claims_core::lease::Rules;
use pgrx::{GucContext, GucFlags, GucRegistry, GucSetting, PostgresGucEnum};

use crate::pg::time;
use crate::service;
use crate::spi::installation::{self, InUse};

const MINUTE: i32 = 60;
const HOUR: i32 = 60 * MINUTE;
const DAY: i32 = 24 * HOUR;
const WEEK: i32 = 7 * DAY;

/// What becomes of a session's claim when the connection ends that its heartbeat was bound to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PostgresGucEnum)]
pub enum OnDisconnect {
    /// Nothing: the session goes stale unless it comes back in time.
    #[name = c"go_stale"]
    GoStale,
    /// It is released at once.
    #[name = c"release"]
    Release,
}

/// A setting that is a time in seconds.
struct Seconds {
    name: &'static CStr,
    short: &'static CStr,
    long: &'static CStr,
    value: GucSetting<i32>,
    min: i32,
    max: i32,
}

impl Seconds {
    fn get(&self) -> TimeDelta {
        TimeDelta::seconds(i64::from(self.value.get()))
    }
}

static STALE_AFTER: Seconds = Seconds {
    name: c"pg_claims.stale_after",
    short: c"Sets how long after its last heartbeat a session counts as stale.",
    long: c"A stale session's SD can be taken over by the next claim.",
    value: GucSetting::<i32>::new(300),
    min: 1,
    max: WEEK,
};

static MIN_STALE_AFTER: Seconds = Seconds {
    name: c"pg_claims.min_stale_after",
    short: c"Sets the shortest lease that a session may ask for at registration.",
    long: c"Shorter ones that exist already are lengthened to it.",
    value: GucSetting::<i32>::new(30),
    min: 1,
    max: WEEK,
};

static MAX_STALE_AFTER: Seconds = Seconds {
    name: c"pg_claims.max_stale_after",
    short: c"Sets the longest lease that a session may ask for at registration.",
    long: c"Longer ones that exist already are shortened to it.",
    value: GucSetting::<i32>::new(HOUR),
    min: 1,
    max: WEEK,
};

static MAX_SILENCE: Seconds = Seconds {
    name: c"pg_claims.max_silence",
    short: c"Sets for how long at the most a session may announce that it will be silent.",
    long: c"Counts from its last sign of life.",
    value: GucSetting::<i32>::new(30 * MINUTE),
    min: 0,
    max: WEEK,
};

static MAX_CLAIM_AGE: Seconds = Seconds {
    name: c"pg_claims.max_claim_age",
    short: c"Sets how old a claim may grow, however alive its session is.",
    long: c"0 turns it off. A warning event is recorded when four fifths of it have passed.",
    value: GucSetting::<i32>::new(0),
    min: 0,
    max: 365 * DAY,
};

static RECLAIM_DELAY: Seconds = Seconds {
    name: c"pg_claims.reclaim_delay",
    short: c"Sets for how long a stale session's SD is kept for that session alone.",
    long: c"Counts from the moment at which it went stale: time for its last writes to arrive.",
    value: GucSetting::<i32>::new(0),
    min: 0,
    max: DAY,
};

static HEARTBEAT_INTERVAL: Seconds = Seconds {
    name: c"pg_claims.heartbeat_interval",
    short: c"Sets how often the server beats for connections that called start_heartbeat().",
    long: c"",
    value: GucSetting::<i32>::new(30),
    min: 1,
    max: HOUR,
};

static REAP_INTERVAL: Seconds = Seconds {
    name: c"pg_claims.reap_interval",
    short: c"Sets how often the worker looks for stale sessions while SDs are claimed.",
    long: c"",
    value: GucSetting::<i32>::new(10),
    min: 1,
    max: HOUR,
};

static SESSION_RETENTION: Seconds = Seconds {
    name: c"pg_claims.session_retention",
    short: c"Sets how long a session that holds nothing may be silent before the worker ends it.",
    long: c"0 turns it off. Registering again brings such a session back.",
    value: GucSetting::<i32>::new(DAY),
    min: 0,
    max: i32::MAX,
};

static HISTORY_RETENTION: Seconds = Seconds {
    name: c"pg_claims.history_retention",
    short: c"Sets how long ended claims, ended sessions and audit events are kept.",
    long: c"0 keeps them for ever. An open claim is never removed.",
    value: GucSetting::<i32>::new(90 * DAY),
    min: 0,
    max: i32::MAX,
};

static ALL_SECONDS: [&Seconds; 10] = [
    &STALE_AFTER,
    &MIN_STALE_AFTER,
    &MAX_STALE_AFTER,
    &MAX_SILENCE,
    &MAX_CLAIM_AGE,
    &RECLAIM_DELAY,
    &HEARTBEAT_INTERVAL,
    &REAP_INTERVAL,
    &SESSION_RETENTION,
    &HISTORY_RETENTION,
];

static RESTART_GRACE: GucSetting<bool> = GucSetting::<bool>::new(true);
static WORKER: GucSetting<bool> = GucSetting::<bool>::new(true);
static AUTO_REAP: GucSetting<bool> = GucSetting::<bool>::new(true);
static NOTIFY: GucSetting<bool> = GucSetting::<bool>::new(true);
static AFFINITY: GucSetting<bool> = GucSetting::<bool>::new(true);
static AFFINITY_LIMIT: GucSetting<i32> = GucSetting::<i32>::new(3);
static MAX_HEARTBEAT_FAILURES: GucSetting<i32> = GucSetting::<i32>::new(3);
static MAX_SESSIONS: GucSetting<i32> = GucSetting::<i32>::new(10_000);
static MAX_SESSIONS_PER_ROLE: GucSetting<i32> = GucSetting::<i32>::new(1000);
static MAX_CLAIMS_PER_ROLE: GucSetting<i32> = GucSetting::<i32>::new(0);
static ON_DISCONNECT: GucSetting<OnDisconnect> =
    GucSetting::<OnDisconnect>::new(OnDisconnect::GoStale);

/// What decides about liveness.
pub fn lease_rules() -> Rules {
    Rules {
        stale_after: STALE_AFTER.get(),
        min_stale_after: MIN_STALE_AFTER.get(),
        max_stale_after: MAX_STALE_AFTER.get(),
        max_silence: MAX_SILENCE.get(),
        reclaim_delay: RECLAIM_DELAY.get(),
        max_claim_age: max_claim_age(),
        in_service_since: in_service_since(),
    }
}

fn in_service_since() -> Option<DateTime<Utc>> {
    if !RESTART_GRACE.get() {
        return None;
    }
    let now = time::now();
    // Where the clock was set back after the start, the grace would last until it catches up.
    let until_now = |since: &DateTime<Utc>| *since <= now;
    let in_use_since = match installation::in_use() {
        InUse::Since(at) => Some(at).filter(until_now),
        // Nobody could beat before: what was restored waits for its users.
        InUse::NotYet => Some(now),
        InUse::NotInstalled => None,
    };
    service::since().filter(until_now).max(in_use_since)
}

/// The shortest and the longest lease that a session may ask for.
pub fn stale_after_limits() -> (TimeDelta, TimeDelta) {
    (MIN_STALE_AFTER.get(), MAX_STALE_AFTER.get())
}

/// For how long a session may announce that it will be silent.
pub fn max_silence() -> TimeDelta {
    MAX_SILENCE.get()
}

/// How old a claim may grow.
pub fn max_claim_age() -> Option<TimeDelta> {
    nonzero(MAX_CLAIM_AGE.get())
}

/// How often the server beats for a connection.
pub fn heartbeat_interval() -> TimeDelta {
    HEARTBEAT_INTERVAL.get()
}

/// After how many failures in a row it stops.
pub fn max_heartbeat_failures() -> i32 {
    MAX_HEARTBEAT_FAILURES.get()
}

/// What becomes of the claim when that connection ends.
pub fn on_disconnect() -> OnDisconnect {
    ON_DISCONNECT.get()
}

/// Whether there may be a background worker.
pub fn worker() -> bool {
    WORKER.get()
}

/// Whether the worker reaps.
pub fn auto_reap() -> bool {
    AUTO_REAP.get()
}

/// How often it does.
pub fn reap_interval() -> TimeDelta {
    REAP_INTERVAL.get()
}

/// Whether the worker announces events on the channel.
pub fn notify() -> bool {
    NOTIFY.get()
}

/// Whether the queue gives a session first what its host and code base worked on last.
pub fn affinity() -> bool {
    AFFINITY.get()
}

/// How many times in a row it may do so.
pub fn affinity_limit() -> i32 {
    AFFINITY_LIMIT.get()
}

/// How long a session that holds nothing may be silent before it is ended.
pub fn session_retention() -> Option<TimeDelta> {
    nonzero(SESSION_RETENTION.get())
}

/// How long history is kept.
pub fn history_retention() -> Option<TimeDelta> {
    nonzero(HISTORY_RETENTION.get())
}

fn nonzero(time: TimeDelta) -> Option<TimeDelta> {
    (!time.is_zero()).then_some(time)
}

/// How many sessions that have not ended a role may have, if that is limited.
pub fn max_sessions_per_role() -> Option<i32> {
    Some(MAX_SESSIONS_PER_ROLE.get()).filter(|most| *most > 0)
}

/// How many SDs the sessions of a role may hold, if that is limited.
pub fn max_claims_per_role() -> Option<i32> {
    Some(MAX_CLAIMS_PER_ROLE.get()).filter(|most| *most > 0)
}

/// For how many sessions the heartbeat board is made; 0: there is none.
pub fn max_sessions() -> usize {
    MAX_SESSIONS.get().unsigned_abs() as usize
}

/// Declares the settings to the server.
pub fn init() {
    for setting in ALL_SECONDS {
        GucRegistry::define_int_guc(
            setting.name,
            setting.short,
            setting.long,
            &setting.value,
            setting.min,
            setting.max,
            GucContext::Suset,
            GucFlags::UNIT_S,
        );
    }
    let switches = [
        (
            c"pg_claims.restart_grace",
            c"Gives every session one full lease after the server has begun to accept writes, or a dump was restored.",
            c"After a start, a crash, a promotion or a restore: time in which nobody could beat counts against nobody.",
            &RESTART_GRACE,
            GucContext::Suset,
        ),
        (
            c"pg_claims.auto_reap",
            c"Lets the worker release what stale sessions hold.",
            c"Without it cleanup_stale_sessions() does, or the next claim takes over.",
            &AUTO_REAP,
            GucContext::Suset,
        ),
        (
            c"pg_claims.notify",
            c"Lets the worker announce claims, releases, takeovers, stale sessions and reaping on channel pg_claims.",
            c"",
            &NOTIFY,
            GucContext::Suset,
        ),
        (
            c"pg_claims.affinity",
            c"Lets claim_next_sd() give a session first what its host and code base worked on last.",
            c"",
            &AFFINITY,
            GucContext::Suset,
        ),
        (
            c"pg_claims.worker",
            c"Lets the extension run background workers.",
            c"",
            &WORKER,
            GucContext::Sighup,
        ),
    ];
    for (name, short, long, value, context) in switches {
        GucRegistry::define_bool_guc(name, short, long, value, context, GucFlags::default());
    }
    let counts = [
        (
            c"pg_claims.max_heartbeat_failures",
            c"Sets after how many failures in a row the server stops beating for a connection.",
            c"",
            &MAX_HEARTBEAT_FAILURES,
            1..=100,
        ),
        (
            c"pg_claims.affinity_limit",
            c"Sets how many times in a row claim_next_sd() may give what a host and code base worked on last.",
            c"After that whoever calls is given the first in the order of the queue, so that none is passed over for ever.",
            &AFFINITY_LIMIT,
            1..=100,
        ),
        (
            c"pg_claims.max_sessions_per_role",
            c"Sets how many sessions that have not ended a role may have.",
            c"0 turns it off. Operators have no such limit.",
            &MAX_SESSIONS_PER_ROLE,
            0..=i32::MAX,
        ),
        (
            c"pg_claims.max_claims_per_role",
            c"Sets how many SDs the sessions of a role may hold at once.",
            c"0 turns it off. Operators have no such limit.",
            &MAX_CLAIMS_PER_ROLE,
            0..=i32::MAX,
        ),
    ];
    for (name, short, long, value, range) in counts {
        GucRegistry::define_int_guc(
            name,
            short,
            long,
            value,
            *range.start(),
            *range.end(),
            GucContext::Suset,
            GucFlags::default(),
        );
    }
    GucRegistry::define_enum_guc(
        c"pg_claims.on_disconnect",
        c"Sets what becomes of a claim when the connection ends that its heartbeat was bound to.",
        c"go_stale leaves it until the lease ends; release ends it at once.",
        &ON_DISCONNECT,
        GucContext::Suset,
        GucFlags::default(),
    );
    // Without preloading it is too late for a setting of the server's start.
    // SAFETY: a flag that the server sets while it loads libraries.
    let context = if unsafe { pgrx::pg_sys::process_shared_preload_libraries_in_progress } {
        GucContext::Postmaster
    } else {
        GucContext::Sighup
    };
    GucRegistry::define_int_guc(
        c"pg_claims.max_sessions",
        c"Sets for how many sessions of the server there is room on the heartbeat board in shared memory.",
        c"0 turns it off. A session that finds no room beats in the table.",
        &MAX_SESSIONS,
        0,
        10_000_000,
        context,
        GucFlags::default(),
    );
    reserve_prefix();
}

/// Makes a misspelt `pg_claims.…` setting an error instead of a silent no-op.
fn reserve_prefix() {
    // SAFETY: both functions only read the null-terminated name and run in `_PG_init`, where the
    // server allows settings to be declared.
    unsafe {
        #[cfg(feature = "pg14")]
        pgrx::pg_sys::EmitWarningsOnPlaceholders(c"pg_claims".as_ptr());
        #[cfg(not(feature = "pg14"))]
        pgrx::pg_sys::MarkGUCPrefixReserved(c"pg_claims".as_ptr());
    }
}
