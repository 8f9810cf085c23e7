//! Functions of the extension, with arguments drawn at random.

use fastrand::Rng;

use crate::direct;
use crate::draw::{chance, one_of};
use crate::setting::Backlog;

/// How an answer is read, and which errors may come instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// jsonb that grants or refuses a claim.
    Claim,
    /// The same of an operator's takeover by force, which a live session loses its claim to.
    Takeover,
    /// The text for a person about a claim.
    Start,
    /// jsonb that tells of a release.
    Release,
    /// A claim asserted, and a row written under it.
    Work,
    /// A row of an SD without any assertion, by itself: never to succeed.
    Unguarded,
    /// Other functions that write.
    Verb,
    /// Mending.
    Repair,
    /// Reading.
    Look,
    /// A table written by hand.
    Direct,
    /// BEGIN, COMMIT, SAVEPOINT and so on.
    Control,
    /// PREPARE TRANSACTION.
    Prepare,
    /// The end of a prepared transaction.
    EndPrepared,
}

/// A statement to be. `{claim}` stands for the claim id that somebody was last told for the session, `{held}` for its SD.
#[derive(Debug, Clone)]
pub struct Operation {
    pub kind: Kind,
    pub session: String,
    pub sql: String,
}

impl Operation {
    pub fn new(kind: Kind, session: &str, sql: String) -> Self {
        Self { kind, session: session.to_owned(), sql }
    }

    /// Of a transaction's own, such as COMMIT.
    pub fn control(sql: impl Into<String>) -> Self {
        Self::new(Kind::Control, "", sql.into())
    }
}

/// Few, so that clients meet.
pub const SDS: u32 = 12;
pub const SESSIONS: u64 = 10;

pub fn sd(rng: &mut Rng) -> String {
    format!("SD-{}", rng.u32(..SDS))
}

/// A client's own sessions mostly, those of others sometimes.
pub fn session(rng: &mut Rng, client: u64) -> String {
    let number = if chance(rng, 70) { client } else { rng.u64(..SESSIONS) };
    format!("s{}", number % SESSIONS)
}

/// As whom a client works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    Superuser,
    Operator,
    Worker,
}

impl Level {
    pub fn role(self) -> &'static str {
        match self {
            Self::Superuser => "postgres",
            Self::Operator => "torture_operator",
            Self::Worker => "torture_worker",
        }
    }
}

/// The next operation of a client that works at `level`.
pub fn draw(rng: &mut Rng, client: u64, level: Level, backlog: Backlog) -> Operation {
    match level {
        Level::Superuser if chance(rng, 35) => direct::draw(rng, client, backlog),
        Level::Worker => of_worker(rng, client),
        _ if chance(rng, 15) => of_operator(rng, client),
        _ => of_worker(rng, client),
    }
}

fn of_worker(rng: &mut Rng, client: u64) -> Operation {
    let (session, sd) = (session(rng, client), sd(rng));
    let its_claim = if chance(rng, 50) { ", {claim}" } else { ", NULL" };
    let track = one_of(rng, &["", ", 'A'", ", 'B'"]);
    let make = |kind, sql: String| Operation::new(kind, &session, sql);
    match rng.u32(..100) {
        0..22 => make(Kind::Claim, format!("SELECT claim_sd('{sd}', '{session}'{track})")),
        22..32 => make(Kind::Claim, format!("SELECT claim_next_sd('{session}')")),
        32..37 => make(Kind::Start, format!("SELECT sd_start('{sd}', '{session}')")),
        37..50 => make(
            Kind::Release,
            format!("SELECT release_sd('{session}', '{}'{its_claim})", one_of(rng, &["done", " "])),
        ),
        50..66 => work(rng, &session),
        66..72 => {
            make(Kind::Verb, format!("SELECT update_session_heartbeat('{session}'{its_claim})"))
        }
        72..77 => make(
            Kind::Verb,
            format!(
                "SELECT register_session('{session}', 'host-{}', {}, p_codebase => 'code', p_metadata => '{{\"n\": {}}}')",
                rng.u8(..3),
                one_of(rng, &["NULL", "'tty-1'"]),
                rng.u8(..)
            ),
        ),
        77..79 => make(Kind::Release, format!("SELECT end_session('{session}', 'over')")),
        79..81 => make(
            Kind::Verb,
            format!("SELECT extend_lease('{session}', '{} minutes'{its_claim})", rng.u8(..20)),
        ),
        81..83 => {
            make(Kind::Verb, format!("SELECT report_progress('{session}', 'half'{its_claim})"))
        }
        83..85 => make(Kind::Verb, format!("SELECT start_heartbeat('{session}')")),
        85 => make(Kind::Verb, "SELECT stop_heartbeat()".into()),
        86 => make(Kind::Verb, format!("SELECT force_heartbeat('{session}')")),
        87 => make(Kind::Verb, "SELECT is_heartbeat_active(), get_heartbeat_stats()".into()),
        88..90 => Operation::new(
            Kind::Unguarded,
            &session,
            format!(
                "INSERT INTO work (sd_id, session_id, claim_id) VALUES ('{sd}', '{session}', NULL)"
            ),
        ),
        _ => look(rng, &session, &sd),
    }
}

/// As a session goes about it.
pub fn job(rng: &mut Rng, client: u64) -> Vec<Operation> {
    let (session, sd) = (session(rng, client), sd(rng));
    let claim = if rng.bool() {
        format!("SELECT claim_next_sd('{session}')")
    } else {
        format!("SELECT claim_sd('{sd}', '{session}')")
    };
    let mut steps = Vec::new();
    if chance(rng, 30) {
        steps.push(Operation::new(
            Kind::Verb,
            &session,
            format!("SELECT register_session('{session}')"),
        ));
    }
    steps.push(Operation::new(Kind::Claim, &session, claim));
    for _ in 0..rng.usize(1..5) {
        steps.push(work(rng, &session));
    }
    let beat = format!("SELECT update_session_heartbeat('{session}', {{claim}})");
    steps.push(Operation::new(Kind::Verb, &session, beat));
    let release = format!("SELECT release_sd('{session}', 'done', {{claim}})");
    steps.push(Operation::new(Kind::Release, &session, release));
    steps
}

/// With a pause between the assertion and the row now and then, which is where others would slip in.
fn work(rng: &mut Rng, session: &str) -> Operation {
    let pause = if chance(rng, 20) {
        format!("SELECT pg_sleep({});", f64::from(rng.u8(1..40)) / 1000.0)
    } else {
        String::new()
    };
    Operation::new(
        Kind::Work,
        session,
        format!(
            "SELECT assert_claim('{{held}}', '{session}', {{claim}}); {pause}
             INSERT INTO work (sd_id, session_id, claim_id) VALUES ('{{held}}', '{session}', {{claim}}) RETURNING id"
        ),
    )
}

fn look(rng: &mut Rng, session: &str, sd: &str) -> Operation {
    let sql = match rng.u8(..8) {
        0 => format!("SELECT is_sd_claimed('{sd}', '{session}')"),
        1 => format!("SELECT count(*) FROM sd_next(p_session_id => '{session}')"),
        2 => "SELECT count(*) FROM v_active_sessions".into(),
        3 => "SELECT count(*) FROM v_directives".into(),
        4 => "SELECT count(*) FROM lifecycle_events_since(0, 50)".into(),
        5 => "SELECT count(*) FROM dependency_cycles()".into(),
        6 => "SELECT claims_due FROM v_worker_health".into(),
        _ => "SELECT count(*) FROM heartbeat_board()".into(),
    };
    Operation::new(Kind::Look, session, sql)
}

fn of_operator(rng: &mut Rng, client: u64) -> Operation {
    let (session, sd, other) = (session(rng, client), sd(rng), sd(rng));
    let make = |kind, sql: String| Operation::new(kind, &session, sql);
    match rng.u32(..100) {
        0..25 => {
            make(Kind::Takeover, format!("SELECT takeover_sd('{sd}', '{session}', 'it is urgent')"))
        }
        25..30 => make(Kind::Verb, format!("SELECT hold_sd('{sd}', 'wait')")),
        30..50 => make(Kind::Verb, format!("SELECT unhold_sd('{sd}')")),
        50..53 => make(
            Kind::Verb,
            format!(
                "SELECT declare_conflict('{sd}', '{other}', 'same_files', '{}') WHERE '{sd}' <> '{other}'",
                one_of(rng, &["blocking", "warning"])
            ),
        ),
        53..67 => make(
            Kind::Verb,
            format!("SELECT resolve_conflict('{sd}', '{other}') WHERE '{sd}' <> '{other}'"),
        ),
        67..72 => make(
            Kind::Verb,
            format!(
                "SELECT assign_sessions('{}', '{}')",
                one_of(rng, &["postgres", "torture_worker"]),
                one_of(rng, &["torture_operator", "torture_worker"])
            ),
        ),
        72..82 => {
            make(Kind::Verb, format!("SELECT cleanup_stale_sessions(NULL, {})", rng.u8(1..20)))
        }
        82..84 => make(Kind::Verb, "SELECT prune_history(5)".into()),
        84..88 => make(
            Kind::Look,
            "SELECT string_agg(name, ' ') FROM coordination_check() WHERE status = 'critical'"
                .into(),
        ),
        88..91 => {
            make(Kind::Repair, format!("SELECT count(*) FROM coordination_repair({})", rng.bool()))
        }
        91..93 => make(Kind::Verb, "SELECT advance_numbers()".into()),
        _ => make(
            Kind::Verb,
            "SELECT heartbeat_sessions(ARRAY(SELECT 's' || n FROM generate_series(0, 4) n))".into(),
        ),
    }
}
