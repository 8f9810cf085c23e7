//! The errors that docs/reference.md tells of.

use crate::verbs::Kind;

/// What any statement may end with: a lost race, giving way, a deadlock, a lock or a statement that took too long.
const ANYWHERE: [&str; 4] = ["40001", "40P01", "55P03", "57014"];

/// What ends a connection, or greets a new one: terminated, a crash, starting up, idle for too long in a transaction,
/// too many connections, and losing it.
const OF_CONNECTIONS: [&str; 10] =
    ["57P01", "57P02", "57P03", "57P05", "25P03", "53300", "08000", "08003", "08006", "08P01"];

/// Whether a statement of that kind may end with this error.
pub fn is_documented(kind: Kind, code: &str, reads_only: bool, by_a_worker: bool) -> bool {
    let of_its_own: &[&str] = match kind {
        Kind::Work => &["55000"],
        // Half a claim, an SD that another one holds, that is unknown, that is finished, a claim id by hand, another
        // session id, the key of a claimed SD; and a claim that ended while the statement waited.
        Kind::Direct => &["23505", "23514", "23503", "428C9", "0A000", "55006", "55000"],
        Kind::Unguarded => &["55000"],
        // Mending is not for snapshots that are kept.
        Kind::Repair => &["0A000"],
        // A transaction that has mended cannot be prepared.
        Kind::Prepare => &["0A000"],
        // Somebody else has ended what was prepared, or is about to.
        Kind::EndPrepared => &["42704", "55000"],
        _ => &[],
    };
    ANYWHERE.contains(&code)
        || of_its_own.contains(&code)
        || reads_only && code == "25006"
        || by_a_worker && code == "42501"
}

/// Whether a connection may be lost with this error.
pub fn is_of_connections(code: Option<&str>) -> bool {
    code.is_none_or(|code| OF_CONNECTIONS.contains(&code))
}
