//! What administrators do while all goes on: tables changed and rewritten, indexes made anew, settings reloaded.

use std::time::Duration;

use fastrand::Rng;
use postgres::Client;

use crate::answer::{Answer, ask};
use crate::draw::one_of;
use crate::world::World;

const TABLES: [&str; 6] = [
    "claude_sessions",
    "sd_claims",
    "session_lifecycle_events",
    "lifecycle_event_positions",
    "sd_holds",
    "heartbeat_connections",
];

/// A lock that cannot be had, a deadlock, what is there already or not any more, and a catalogue row that the extension
/// writes at the same moment.
const EXPECTED: [&str; 7] = ["55P03", "40P01", "57014", "42701", "42703", "42710", "42704"];

/// Who waits for a table keeps all others from it meanwhile; and the server must know the extension's settings.
const PREPARE: &str = "SET lock_timeout = '300ms'; LOAD 'pg_claims'";

pub fn one(world: &World, connection: &mut Option<Client>, rng: &mut Rng) {
    if connection.is_none() {
        *connection = world.helper();
    }
    let Some(client) = connection else { return };
    let sql = draw(rng, world);
    clear(client);
    let from = world.log.begin();
    let mut answer = match ask(client, PREPARE) {
        Answer::Rows(_) => ask(client, &sql),
        other => other,
    };
    if sql.starts_with("ALTER SYSTEM") && matches!(answer, Answer::Rows(_)) {
        answer = ask(client, "SELECT pg_reload_conf()");
    }
    world.log.note(from, &format!("phase {} maintenance", world.phase), &sql, &answer);
    match answer {
        Answer::Rows(_) => {}
        Answer::Refused { code, text } => {
            if !EXPECTED.contains(&code.as_str()) {
                world.log.violation(format!("maintenance failed: {sql}: {code}: {text}"));
            }
        }
        Answer::Lost { .. } => *connection = None,
    }
    world.pause(Duration::from_millis(rng.u64(10..150)));
}

fn draw(rng: &mut Rng, world: &World) -> String {
    let table = one_of(rng, &TABLES);
    let (backlog, _) = world.setting.backlog.names();
    match rng.u32(..100) {
        0..10 => format!("VACUUM {table}"),
        10..15 => "VACUUM ANALYZE".into(),
        15..25 => format!("VACUUM FULL {table}"),
        25..30 => format!("VACUUM FULL {backlog}"),
        30..42 => format!("REINDEX TABLE CONCURRENTLY {table}"),
        42..46 => format!("REINDEX TABLE CONCURRENTLY {backlog}"),
        46..50 => format!("REINDEX TABLE {table}"),
        50..58 => format!("ALTER TABLE {table} ADD COLUMN extra integer DEFAULT 7"),
        58..66 => format!("ALTER TABLE {table} DROP COLUMN extra"),
        66..71 => format!("ALTER TABLE {backlog} ADD COLUMN extra text"),
        71..76 => format!("ALTER TABLE {backlog} DROP COLUMN extra"),
        76..82 => format!(
            "CREATE OR REPLACE FUNCTION passing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
             CREATE TRIGGER passing {} ON {table} FOR EACH ROW EXECUTE FUNCTION passing()",
            one_of(rng, &["BEFORE UPDATE", "BEFORE INSERT", "AFTER INSERT OR UPDATE OR DELETE"])
        ),
        82..88 => format!("DROP TRIGGER passing ON {table}"),
        88..92 => setting(rng),
        92..95 => world.setting.backlog.bind().into(),
        95..97 => "CHECKPOINT".into(),
        _ => format!("ANALYZE {table}"),
    }
}

/// One of the settings that may change at any time. `preload` of the next phase resets them all.
fn setting(rng: &mut Rng) -> String {
    let of = |name: &str, value: &str| format!("ALTER SYSTEM SET pg_claims.{name} = '{value}'");
    match rng.u8(..12) {
        0 => of("notify", "off"),
        1 => of("affinity", "off"),
        2 => of("on_disconnect", "release"),
        3 => of("restart_grace", "off"),
        4 => of("stale_after", "40s"),
        5 => of("reap_interval", "2s"),
        6 => of("auto_reap", "off"),
        7 => of("worker", "off"),
        8 => "ALTER SYSTEM SET work_mem = '1MB'".into(),
        9 => "ALTER SYSTEM RESET pg_claims.auto_reap".into(),
        _ => "ALTER SYSTEM RESET pg_claims.worker".into(),
    }
}

/// Takes away what a REINDEX CONCURRENTLY that failed has left: such an index is kept up as well, and would keep a second
/// holder out where the right one fails to.
fn clear(client: &mut Client) {
    let left = "SELECT indexrelid::regclass::text FROM pg_index
                 WHERE NOT indisvalid AND indexrelid::regclass::text ~ '_cc(new|old)[0-9]*$'";
    let Answer::Rows(left) = ask(client, left) else { return };
    for index in left.into_iter().flatten() {
        // A lock that cannot be had leaves the index for the next time; a lost connection shows with the next statement.
        ask(client, &format!("DROP INDEX {index}"));
    }
}
