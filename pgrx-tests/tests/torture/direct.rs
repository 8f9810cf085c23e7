//! Tables written by hand, as operators do.

use fastrand::Rng;

use crate::draw::{chance, one_of};
use crate::setting::Backlog;
use crate::verbs::{self, Kind, Operation};

pub fn draw(rng: &mut Rng, client: u64, backlog: Backlog) -> Operation {
    let sql = if chance(rng, 55) { of_sessions(rng, client) } else { of_backlog(rng, backlog) };
    Operation::new(Kind::Direct, "", sql)
}

fn of_sessions(rng: &mut Rng, client: u64) -> String {
    let (session, sd) = (verbs::session(rng, client), verbs::sd(rng));
    let one = format!("WHERE session_id = '{session}'");
    match rng.u32(..100) {
        0..15 => format!("UPDATE claude_sessions SET sd_id = '{sd}' {one}"),
        15..23 => format!("UPDATE claude_sessions SET sd_id = NULL {one}"),
        23..29 => format!(
            "UPDATE claude_sessions SET status = '{}' {one}",
            one_of(rng, &["idle", "released", "active"])
        ),
        29..33 => format!("UPDATE claude_sessions SET sd_id = '{sd}', status = 'active', track = 'A' {one}"),
        33..50 => format!("UPDATE claude_sessions SET heartbeat_at = heartbeat_at - interval '1 hour' {one}"),
        50..55 => format!("UPDATE claude_sessions SET heartbeat_at = heartbeat_at - interval '1 hour' WHERE sd_id <> '{sd}'"),
        55..58 => format!("UPDATE claude_sessions SET heartbeat_at = clock_timestamp() + interval '1 hour' {one}"),
        58..61 => format!("UPDATE claude_sessions SET silent_until = clock_timestamp() + interval '5 minutes' {one}"),
        61..64 => format!("UPDATE claude_sessions SET hostname = 'moved', metadata = metadata || '{{\"by\": \"hand\"}}' {one}"),
        64..68 => format!("DELETE FROM claude_sessions {one}"),
        68..70 => format!("DELETE FROM claude_sessions WHERE sd_id = '{sd}'"),
        70..86 => format!("INSERT INTO claude_sessions (session_id) VALUES ('{session}') ON CONFLICT DO NOTHING"),
        86..92 => format!("INSERT INTO claude_sessions (session_id, sd_id, status) VALUES ('{session}', '{sd}', 'active')"),
        92..95 => format!("UPDATE claude_sessions SET sd_id = NULL WHERE sd_id IN ('{sd}', '{}')", verbs::sd(rng)),
        95 => format!("UPDATE claude_sessions SET claim_id = 7 {one}"),
        96 => format!("UPDATE claude_sessions SET session_id = 's99' {one}"),
        97 => "TRUNCATE claude_sessions".into(),
        98 => "UPDATE sd_claims SET released_at = clock_timestamp(), release_reason = 'by hand' WHERE released_at IS NULL".into(),
        _ => format!("UPDATE claude_sessions SET owner_role = '{}' {one}", one_of(rng, &["torture_worker", "postgres"])),
    }
}

fn of_backlog(rng: &mut Rng, backlog: Backlog) -> String {
    let (table, key) = backlog.names();
    let (sd, other) = (verbs::sd(rng), verbs::sd(rng));
    let one = format!("WHERE {key} = '{sd}'");
    match rng.u32(..100) {
        0..12 => format!(
            "UPDATE {table} SET status = '{}' {one}",
            one_of(rng, &["completed", "cancelled", "Deferred"])
        ),
        12..40 => format!("UPDATE {table} SET status = 'draft' {one}"),
        40..46 => format!("UPDATE {table} SET status = 'draft' WHERE status <> 'draft'"),
        46..54 => format!("DELETE FROM {table} {one}"),
        54..68 => format!(
            "INSERT INTO {table} ({key}, title) VALUES ('{sd}', 'back') ON CONFLICT DO NOTHING"
        ),
        68..74 => format!("UPDATE {table} SET title = 'edited' {one}"),
        74..80 => format!(
            "UPDATE {table} SET dependencies = '{}' {one}",
            if chance(rng, 30) { format!("[\"{other}\"]") } else { "[]".into() }
        ),
        80..85 => format!(
            "UPDATE {table} SET is_working_on = NOT is_working_on, active_session_id = 'nobody' {one}"
        ),
        85..89 => {
            format!("UPDATE {table} SET status = 'completed' WHERE {key} IN ('{sd}', '{other}')")
        }
        89..92 => format!("UPDATE {table} SET {key} = '{other}' {one}"),
        92..95 => format!("DELETE FROM {table} WHERE {key} IN ('{sd}', '{other}')"),
        95..99 => format!(
            "INSERT INTO {table} ({key}, priority) SELECT 'SD-' || n, 'high' FROM generate_series(0, {}) n ON CONFLICT DO NOTHING",
            verbs::SDS - 1
        ),
        _ => format!("TRUNCATE {table}"),
    }
}
