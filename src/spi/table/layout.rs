//! The tables as the installation script makes them.

use pgrx::pg_sys::BuiltinOid;

/// The access method B-tree, by its number in every server.
pub const BTREE: u32 = 403;
const HASH: u32 = 405;

/// A table: the names of what belongs to it, in the order in which it was made.
pub struct Layout {
    /// Its name.
    pub name: &'static str,
    /// Its columns, and their types.
    pub columns: &'static [(&'static str, BuiltinOid)],
    /// The column that is its primary key, if it is read by that.
    pub key: Option<&'static str>,
    /// Those of its indexes by which it is read, and the first column of each; that of the primary key
    /// comes first.
    pub indexes: &'static [(&'static str, &'static str)],
    /// Those by which it may be read as well where they are there, the columns of each, with no name for an
    /// expression, and its access method.
    pub spare_indexes: &'static [(&'static str, &'static [&'static str], u32)],
    /// The one of its indexes that decides who of several gets an SD, and the columns that its condition is about: one of
    /// that name that is not unique, or of another condition, decides nothing.
    pub decider: Option<(&'static str, &'static [&'static str])>,
    /// Its triggers.
    pub triggers: &'static [&'static str],
    /// Its CHECK constraints.
    pub checks: &'static [&'static str],
}

/// One of a table's indexes.
#[derive(Debug, Clone, Copy)]
pub struct Index(pub(super) usize);

/// One that the table may be without.
#[derive(Debug, Clone, Copy)]
pub struct SpareIndex {
    pub(super) at: usize,
    method: u32,
}

impl SpareIndex {
    /// Whether it is a hash index, in which one key may stand for several.
    pub(super) fn is_hashed(self) -> bool {
        self.method == HASH
    }
}

impl Layout {
    /// A column's position; they count from 1.
    ///
    /// Evaluated by the compiler only: there a name that the table lacks is an error.
    const fn column(&self, name: &str) -> usize {
        let mut at = 0;
        while !is_same(self.columns[at].0.as_bytes(), name.as_bytes()) {
            at += 1;
        }
        at + 1
    }

    /// The primary key's position, if the table is read by it.
    pub(super) fn key_column(&self) -> Option<usize> {
        self.key.and_then(|key| self.position(key))
    }

    /// The columns that the deciding index's condition is about, by their positions, in their order.
    pub(super) fn condition(&self) -> Vec<usize> {
        let columns = self.decider.map_or(&[][..], |(_, columns)| columns);
        columns.iter().filter_map(|column| self.position(column)).collect()
    }

    /// A column's position as [`Layout::column`] has it, if there is one of that name.
    pub(super) fn position(&self, column: &str) -> Option<usize> {
        self.columns.iter().position(|(name, _)| *name == column).map(|at| at + 1)
    }

    /// Like [`Layout::column`].
    const fn index(&self, name: &str) -> Index {
        let mut at = 0;
        while !is_same(self.indexes[at].0.as_bytes(), name.as_bytes()) {
            at += 1;
        }
        Index(at)
    }

    /// Like [`Layout::column`].
    const fn spare_index(&self, name: &str) -> SpareIndex {
        let mut at = 0;
        while !is_same(self.spare_indexes[at].0.as_bytes(), name.as_bytes()) {
            at += 1;
        }
        SpareIndex { at, method: self.spare_indexes[at].2 }
    }
}

const fn is_same(a: &[u8], b: &[u8]) -> bool {
    if a.len() != b.len() {
        return false;
    }
    let mut at = 0;
    while at < a.len() {
        if a[at] != b[at] {
            return false;
        }
        at += 1;
    }
    true
}

/// Whether the installation script makes the part of that kind and name of a table of the extension's.
pub fn is_made(table: &str, kind: &str, name: &str) -> bool {
    let key = name.strip_prefix(table).unwrap_or_default();
    if let Some(known) =
        super::Name::ALL.into_iter().map(super::Name::layout).find(|known| known.name == table)
    {
        return match kind {
            "column" => known.position(name).is_some(),
            "trigger" => known.triggers.contains(&name),
            "constraint" => key == "_pkey" || known.checks.contains(&name),
            "index" => {
                known.indexes.iter().any(|(index, _)| *index == name)
                    || known.spare_indexes.iter().any(|(index, _, _)| *index == name)
            }
            _ => false,
        };
    }
    let (columns, triggers, constraints): (&[&str], &[&str], &[&str]) = match table {
        "lifecycle_event_positions" => {
            (&["position", "event_id"], &["_restore_trigger"], &["_pkey", "_event_id_key"])
        }
        "event_frontier" => (
            &[
                "is_frontier",
                "scanned_to",
                "gaps_first",
                "gaps_last",
                "gaps_before",
                "announced_to",
            ],
            &["_restore_trigger"],
            &["_pkey", "_at_most_one_check"],
        ),
        "directive_binding" => (
            &[
                "bound_table",
                "key_columns",
                "title_column",
                "status_column",
                "priority_column",
                "track_column",
                "rank_column",
                "dependencies_column",
                "parent_column",
                "created_at_column",
                "is_working_on_column",
                "active_session_id_column",
                "terminal_statuses",
                "bound_at",
                "bound_by",
                "is_bound",
            ],
            &["_trigger"],
            &["_pkey", "_at_most_one_check"],
        ),
        _ => return true,
    };
    match kind {
        "column" => columns.contains(&name),
        "trigger" => triggers.contains(&key),
        "constraint" => constraints.contains(&key),
        _ => false,
    }
}

/// `claude_sessions`.
pub mod sessions {
    use pgrx::pg_sys::BuiltinOid::{
        INT4OID, INT8OID, INTERVALOID, JSONBOID, NAMEOID, OIDOID, TEXTOID, TIMESTAMPTZOID, UUIDOID,
    };

    use super::{Index, Layout};

    /// The table.
    pub const LAYOUT: Layout = Layout {
        name: "claude_sessions",
        columns: &[
            ("id", UUIDOID),
            ("session_id", TEXTOID),
            ("sd_id", TEXTOID),
            ("track", TEXTOID),
            ("tty", TEXTOID),
            ("pid", INT4OID),
            ("hostname", TEXTOID),
            ("codebase", TEXTOID),
            ("claimed_at", TIMESTAMPTZOID),
            ("heartbeat_at", TIMESTAMPTZOID),
            ("status", TEXTOID),
            ("metadata", JSONBOID),
            ("created_at", TIMESTAMPTZOID),
            ("updated_at", TIMESTAMPTZOID),
            ("claim_id", INT8OID),
            ("silent_until", TIMESTAMPTZOID),
            ("owner_role", NAMEOID),
            ("released_at", TIMESTAMPTZOID),
            ("release_reason", TEXTOID),
            ("lost_claim_id", INT8OID),
            ("lost_to", TEXTOID),
            ("stale_after", INTERVALOID),
            ("progress_at", TIMESTAMPTZOID),
            ("progress_note", TEXTOID),
            ("stale_noted_for", TIMESTAMPTZOID),
            ("age_warned_for", INT8OID),
            ("owner_oid", OIDOID),
        ],
        key: Some("session_id"),
        indexes: &[
            ("claude_sessions_pkey", "session_id"),
            ("idx_claude_sessions_unique_active_claim", "sd_id"),
        ],
        spare_indexes: &[],
        decider: Some(("idx_claude_sessions_unique_active_claim", &["sd_id", "status"])),
        triggers: &[
            "claude_sessions_complete_trigger",
            "claude_sessions_delete_trigger",
            "claude_sessions_deleted_trigger",
            "claude_sessions_replicated_trigger",
            "claude_sessions_restore_trigger",
            "claude_sessions_set_back_trigger",
            "claude_sessions_truncate_trigger",
            "claude_sessions_truncated_trigger",
            "sync_is_working_on_trigger",
        ],
        checks: &["claude_sessions_whole_claim_check"],
    };

    pub const SESSION_ID: usize = LAYOUT.column("session_id");
    pub const SD_ID: usize = LAYOUT.column("sd_id");
    pub const TRACK: usize = LAYOUT.column("track");
    pub const TTY: usize = LAYOUT.column("tty");
    pub const HOSTNAME: usize = LAYOUT.column("hostname");
    pub const CODEBASE: usize = LAYOUT.column("codebase");
    pub const CLAIMED_AT: usize = LAYOUT.column("claimed_at");
    pub const HEARTBEAT_AT: usize = LAYOUT.column("heartbeat_at");
    pub const STATUS: usize = LAYOUT.column("status");
    pub const UPDATED_AT: usize = LAYOUT.column("updated_at");
    pub const CLAIM_ID: usize = LAYOUT.column("claim_id");
    pub const SILENT_UNTIL: usize = LAYOUT.column("silent_until");
    pub const OWNER_ROLE: usize = LAYOUT.column("owner_role");
    pub const OWNER_OID: usize = LAYOUT.column("owner_oid");
    pub const RELEASED_AT: usize = LAYOUT.column("released_at");
    pub const RELEASE_REASON: usize = LAYOUT.column("release_reason");
    pub const LOST_CLAIM_ID: usize = LAYOUT.column("lost_claim_id");
    pub const LOST_TO: usize = LAYOUT.column("lost_to");
    pub const STALE_AFTER: usize = LAYOUT.column("stale_after");
    pub const PROGRESS_AT: usize = LAYOUT.column("progress_at");
    pub const PROGRESS_NOTE: usize = LAYOUT.column("progress_note");
    pub const STALE_NOTED_FOR: usize = LAYOUT.column("stale_noted_for");

    pub const BY_SESSION_ID: Index = LAYOUT.index("claude_sessions_pkey");
    pub const BY_SD_ID: Index = LAYOUT.index("idx_claude_sessions_unique_active_claim");
}

/// `sd_claims`.
pub mod claims {
    use pgrx::pg_sys::BuiltinOid::{INT8OID, TEXTOID, TIMESTAMPTZOID};

    use super::{Index, Layout};

    /// The table.
    pub const LAYOUT: Layout = Layout {
        name: "sd_claims",
        columns: &[
            ("claim_id", INT8OID),
            ("sd_id", TEXTOID),
            ("session_id", TEXTOID),
            ("track", TEXTOID),
            ("hostname", TEXTOID),
            ("codebase", TEXTOID),
            ("claimed_at", TIMESTAMPTZOID),
            ("released_at", TIMESTAMPTZOID),
            ("release_reason", TEXTOID),
            ("took_over_claim_id", INT8OID),
            ("taken_over_by", TEXTOID),
            ("queue_reason", TEXTOID),
            ("queue_track", TEXTOID),
        ],
        key: Some("claim_id"),
        indexes: &[("sd_claims_pkey", "claim_id"), ("sd_claims_open_key", "sd_id")],
        spare_indexes: &[],
        decider: Some(("sd_claims_open_key", &["released_at"])),
        triggers: &[
            "sd_claims_protect_insert_trigger",
            "sd_claims_protect_update_trigger",
            "sd_claims_protect_delete_trigger",
            "sd_claims_restore_trigger",
            "sd_claims_truncate_trigger",
        ],
        checks: &["sd_claims_closed_check"],
    };

    pub const CLAIM_ID: usize = LAYOUT.column("claim_id");
    pub const SD_ID: usize = LAYOUT.column("sd_id");
    pub const SESSION_ID: usize = LAYOUT.column("session_id");
    pub const TRACK: usize = LAYOUT.column("track");
    pub const HOSTNAME: usize = LAYOUT.column("hostname");
    pub const CODEBASE: usize = LAYOUT.column("codebase");
    pub const CLAIMED_AT: usize = LAYOUT.column("claimed_at");
    pub const RELEASED_AT: usize = LAYOUT.column("released_at");
    pub const RELEASE_REASON: usize = LAYOUT.column("release_reason");
    pub const TOOK_OVER_CLAIM_ID: usize = LAYOUT.column("took_over_claim_id");
    pub const TAKEN_OVER_BY: usize = LAYOUT.column("taken_over_by");
    pub const QUEUE_REASON: usize = LAYOUT.column("queue_reason");
    pub const QUEUE_TRACK: usize = LAYOUT.column("queue_track");

    pub const BY_CLAIM_ID: Index = LAYOUT.index("sd_claims_pkey");
    pub const OPEN_BY_SD_ID: Index = LAYOUT.index("sd_claims_open_key");
}

/// `session_lifecycle_events`.
pub mod events {
    use pgrx::pg_sys::BuiltinOid::{
        INT8OID, JSONBOID, NAMEOID, NUMERICOID, TEXTOID, TIMESTAMPTZOID,
    };

    use super::Layout;

    /// The table.
    pub const LAYOUT: Layout = Layout {
        name: "session_lifecycle_events",
        columns: &[
            ("event_id", INT8OID),
            ("event_type", TEXTOID),
            ("session_id", TEXTOID),
            ("sd_id", TEXTOID),
            ("claim_id", INT8OID),
            ("occurred_at", TIMESTAMPTZOID),
            ("actor", NAMEOID),
            ("reason", TEXTOID),
            ("held_seconds", NUMERICOID),
            ("detail", JSONBOID),
        ],
        key: None,
        indexes: &[],
        spare_indexes: &[],
        decider: None,
        triggers: &["session_lifecycle_events_restore_trigger"],
        checks: &[],
    };

    pub const EVENT_ID: usize = LAYOUT.column("event_id");
    pub const EVENT_TYPE: usize = LAYOUT.column("event_type");
    pub const SESSION_ID: usize = LAYOUT.column("session_id");
    pub const SD_ID: usize = LAYOUT.column("sd_id");
    pub const CLAIM_ID: usize = LAYOUT.column("claim_id");
    pub const OCCURRED_AT: usize = LAYOUT.column("occurred_at");
    pub const ACTOR: usize = LAYOUT.column("actor");
    pub const REASON: usize = LAYOUT.column("reason");
    pub const HELD_SECONDS: usize = LAYOUT.column("held_seconds");
    pub const DETAIL: usize = LAYOUT.column("detail");
}

/// `sd_holds`.
pub mod holds {
    use pgrx::pg_sys::BuiltinOid::{NAMEOID, TEXTOID, TIMESTAMPTZOID};

    use super::{Index, Layout};

    /// The table.
    pub const LAYOUT: Layout = Layout {
        name: "sd_holds",
        columns: &[
            ("sd_id", TEXTOID),
            ("reason", TEXTOID),
            ("held_by", NAMEOID),
            ("held_at", TIMESTAMPTZOID),
        ],
        key: Some("sd_id"),
        indexes: &[("sd_holds_pkey", "sd_id")],
        spare_indexes: &[],
        decider: None,
        triggers: &[],
        checks: &[],
    };

    pub const REASON: usize = LAYOUT.column("reason");
    pub const HELD_BY: usize = LAYOUT.column("held_by");
    pub const HELD_AT: usize = LAYOUT.column("held_at");

    pub const BY_SD_ID: Index = LAYOUT.index("sd_holds_pkey");
}

/// `sd_conflict_matrix`.
pub mod conflicts {
    use pgrx::pg_sys::BuiltinOid::{INT8OID, NAMEOID, TEXTOID, TIMESTAMPTZOID};

    use super::{Index, Layout};

    /// The table.
    pub const LAYOUT: Layout = Layout {
        name: "sd_conflict_matrix",
        columns: &[
            ("conflict_id", INT8OID),
            ("sd_id_a", TEXTOID),
            ("sd_id_b", TEXTOID),
            ("conflict_type", TEXTOID),
            ("conflict_severity", TEXTOID),
            ("declared_at", TIMESTAMPTZOID),
            ("declared_by", NAMEOID),
            ("resolved_at", TIMESTAMPTZOID),
            ("resolved_by", NAMEOID),
            ("last_claim_at", TIMESTAMPTZOID),
        ],
        key: None,
        indexes: &[
            ("sd_conflict_matrix_open_key", "sd_id_a"),
            ("sd_conflict_matrix_open_b_idx", "sd_id_b"),
        ],
        spare_indexes: &[],
        decider: None,
        triggers: &[],
        checks: &["sd_conflict_matrix_order_check", "sd_conflict_matrix_severity_check"],
    };

    pub const CONFLICT_ID: usize = LAYOUT.column("conflict_id");
    pub const SEVERITY: usize = LAYOUT.column("conflict_severity");

    pub const OPEN_BY_SD_A: Index = LAYOUT.index("sd_conflict_matrix_open_key");
    pub const OPEN_BY_SD_B: Index = LAYOUT.index("sd_conflict_matrix_open_b_idx");
}

/// `strategic_directives_v2`, the extension's own backlog.
pub mod directives {
    use pgrx::pg_sys::BuiltinOid::{BOOLOID, INT4OID, JSONBOID, TEXTOID, TIMESTAMPTZOID};

    use super::{BTREE, HASH, Index, Layout, SpareIndex};

    /// The table.
    pub const LAYOUT: Layout = Layout {
        name: "strategic_directives_v2",
        columns: &[
            ("sd_id", TEXTOID),
            ("title", TEXTOID),
            ("status", TEXTOID),
            ("priority", TEXTOID),
            ("track", TEXTOID),
            ("sequence_rank", INT4OID),
            ("dependencies", JSONBOID),
            ("parent_sd_id", TEXTOID),
            ("is_working_on", BOOLOID),
            ("active_session_id", TEXTOID),
            ("metadata", JSONBOID),
            ("created_at", TIMESTAMPTZOID),
            ("updated_at", TIMESTAMPTZOID),
        ],
        key: Some("sd_id"),
        indexes: &[("strategic_directives_v2_pkey", "sd_id")],
        spare_indexes: &[
            ("strategic_directives_v2_queue_idx", &["", "", "created_at", "sd_id"], BTREE),
            ("strategic_directives_v2_parent_idx", &["parent_sd_id"], HASH),
        ],
        decider: None,
        triggers: &[
            "pg_claims_deleted",
            "pg_claims_finished",
            "pg_claims_truncated",
            "zz_pg_claims_mirror_insert",
            "zz_pg_claims_mirror_inserted",
            "zz_pg_claims_mirror_renamed",
            "zz_pg_claims_mirror_update",
        ],
        checks: &["strategic_directives_v2_sd_id_check"],
    };

    pub const SD_ID: usize = LAYOUT.column("sd_id");
    pub const TITLE: usize = LAYOUT.column("title");
    pub const STATUS: usize = LAYOUT.column("status");
    pub const TRACK: usize = LAYOUT.column("track");
    pub const DEPENDENCIES: usize = LAYOUT.column("dependencies");
    pub const PARENT_SD_ID: usize = LAYOUT.column("parent_sd_id");
    pub const IS_WORKING_ON: usize = LAYOUT.column("is_working_on");
    pub const ACTIVE_SESSION_ID: usize = LAYOUT.column("active_session_id");

    pub const BY_SD_ID: Index = LAYOUT.index("strategic_directives_v2_pkey");
    pub const IN_QUEUE: SpareIndex = LAYOUT.spare_index("strategic_directives_v2_queue_idx");
    pub const BY_PARENT: SpareIndex = LAYOUT.spare_index("strategic_directives_v2_parent_idx");
}
