//! Faults: each with its SQLSTATE, DETAIL and HINT, in one place.
//!
//! A business outcome (the SD is taken, the session has ended) is not a fault: see
//! `pg_claims_core::outcome`.

use pg_claims_core::id::IdRule;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::{PgLogLevel, PgSqlErrorCode};
use thiserror::Error;

use crate::identity::Role;

/// The result of everything that can fail inside the extension.
pub type Result<T, E = ClaimError> = std::result::Result<T, E>;

/// What a table of the user's is to be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// As the backlog.
    Bind,
    /// For rows that are written under their SD's claim.
    Guard,
}

impl std::fmt::Display for Purpose {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Bind => "bind as the backlog",
            Self::Guard => "guard",
        })
    }
}

/// What can go wrong.
#[derive(Debug, Error)]
pub enum ClaimError {
    /// An argument breaks a rule.
    #[error("invalid value for \"{argument}\": {rule}")]
    InvalidId {
        /// The argument's name.
        argument: &'static str,
        /// The rule that it breaks.
        rule: IdRule,
    },
    /// An argument is not what the function takes.
    #[error("invalid value for \"{argument}\": {reason}")]
    InvalidArgument {
        /// The argument's name.
        argument: &'static str,
        /// What is wrong with it.
        reason: String,
        /// What to give instead.
        hint: Option<String>,
    },
    /// The session belongs to another role.
    #[error("permission denied for session \"{session_id}\"")]
    NotSessionOwner {
        /// The session.
        session_id: String,
        /// The role that registered it.
        owner_role: Role,
        /// The role that calls.
        caller: Role,
    },
    /// Only whoever may do everything to the extension grants levels.
    #[error("permission denied to grant levels of coordination")]
    MayNotGrant {
        /// The role that calls.
        caller: Role,
    },
    /// The claim that a transaction relies on is not held.
    #[error("session \"{session_id}\" does not hold claim {claim_id} on SD \"{sd_id}\"")]
    ClaimNotHeld {
        /// The SD.
        sd_id: String,
        /// The session.
        session_id: String,
        /// The acquisition.
        claim_id: i64,
        /// Who has the SD now, and since when.
        detail: String,
    },
    /// A trigger of the user's has kept a row from being written.
    #[error("a row of \"{table}\" could not be written")]
    WriteRefused {
        /// The table.
        table: String,
    },
    /// A trigger of the user's has changed the row that it was fired for.
    #[error("a row of \"{table}\" was changed by a trigger that its own write has fired")]
    ChangedByTrigger {
        /// The table.
        table: String,
    },
    /// The table's policies apply to the extension's owner, whose writes go by none.
    #[error("row-level security of \"{table}\" applies to the owner of pg_claims")]
    RowSecurity {
        /// The table.
        table: String,
    },
    /// A transaction that keeps one snapshot was to write a row that has changed since.
    #[error("could not serialize access due to concurrent update")]
    Serialization,
    /// Whoever was waited for has come to wait for this transaction.
    #[error("gave way to a transaction that waits for this one")]
    GaveWay,
    /// A row of a guarded table was to be written without its SD's claim.
    #[error("rows of SD \"{sd_id}\" in table {table} can be written only under its claim")]
    Unguarded {
        /// The SD.
        sd_id: String,
        /// The table.
        table: String,
    },
    /// A guarded table was to be truncated.
    #[error("cannot truncate table {table}, which is guarded")]
    GuardedTruncate {
        /// The table.
        table: String,
    },
    /// There is no guard to take off.
    #[error("table {table} is not guarded")]
    NotGuarded {
        /// The table.
        table: String,
    },
    /// Planning a statement on the backlog would run code of its owner's.
    #[error("cannot use table {table} as the backlog, as it has code of its owner's")]
    UntrustedCode {
        /// The table.
        table: String,
        /// The code.
        code: String,
    },
    /// A trigger on one of the extension's tables would run code of somebody's with the rights of the extension's owner.
    #[error("an ordinary role's code is on the tables of pg_claims")]
    ForeignCode {
        /// The trigger.
        code: String,
    },
    /// A trigger function of the extension's is on a table that is none of its own.
    #[error("table \"{table}\" is none of pg_claims")]
    NotOwnTable {
        /// The table.
        table: String,
    },
    /// The extension was about to be dropped with what its backlog stands on.
    #[error("cannot drop extension pg_claims with what its backlog stands on")]
    BacklogDropped,
    /// The caller may not bind the table.
    #[error("permission denied for table {table}")]
    NotTableOwner {
        /// The table.
        table: String,
        /// The role that calls.
        caller: Role,
    },
    /// A direct write would leave half a claim or a lie in the mirrors.
    #[error("{message}")]
    DirectWrite {
        /// The error's class.
        code: PgSqlErrorCode,
        /// What is wrong.
        message: String,
        /// The facts.
        detail: Option<String>,
        /// What to do instead.
        hint: &'static str,
    },
    /// The table cannot serve as the backlog, or cannot be guarded.
    #[error("cannot {purpose} table {table}")]
    UnfitTable {
        /// The error's class.
        code: PgSqlErrorCode,
        /// What was to be done with it.
        purpose: Purpose,
        /// The table.
        table: String,
        /// Why not.
        detail: String,
        /// What to do.
        hint: String,
    },
    /// Claims are open on SDs that the next backlog does not have.
    #[error("cannot change the backlog while it has claims")]
    BacklogInUse {
        /// Some of the SDs.
        detail: String,
    },
    /// A bound column is not there any more.
    #[error("the backlog {table} has no column \"{column}\" any more")]
    ColumnGone {
        /// The table.
        table: String,
        /// The column as it was called when it was bound.
        column: String,
    },
    /// A column that a trigger writes has been given another type since.
    #[error("column \"{column}\" of table {table} is not of type {of_type} any more")]
    ColumnOfOtherType {
        /// The table.
        table: String,
        /// The column.
        column: String,
        /// The type that it must have.
        of_type: &'static str,
    },
    /// A trigger of the user's kept the mirror from being written.
    #[error("could not write is_working_on and active_session_id of SD \"{sd_id}\"")]
    MirrorRefused {
        /// The SD.
        sd_id: String,
    },
    /// A trigger of the user's has ended the claim while it was being made.
    #[error("a trigger released SD \"{sd_id}\" while it was being claimed")]
    Undone {
        /// The SD.
        sd_id: String,
    },
    /// A decision needs to see what others have committed by now.
    #[error("cannot {what} in a REPEATABLE READ or SERIALIZABLE transaction")]
    NeedsReadCommitted {
        /// What was tried.
        what: &'static str,
    },
    /// The server is a standby, which writes nothing.
    #[error("this server is a standby")]
    Standby,
    /// A parallel query may not write.
    #[error("cannot call a function of pg_claims that writes in a parallel query")]
    Parallel,
    /// There is nothing to unbind.
    #[error("no backlog is bound")]
    NotBound,
    /// The state kept changing under the caller.
    #[error("could not settle the claim on \"{sd_id}\"")]
    Unsettled {
        /// The SD.
        sd_id: String,
    },
    /// The extension's tables were not found.
    #[error("extension \"pg_claims\" is not installed in this database")]
    NotInstalled,
    /// The worker must not do anything here (any more).
    #[error("extension \"pg_claims\" is not in use in this database, or is being changed")]
    NotInUse,
    /// A column holds what it must never hold.
    #[error("unexpected NULL or type in {what}")]
    Corrupt {
        /// Where.
        what: &'static str,
    },
    /// The server's programming interface failed.
    #[error("{0}")]
    Spi(#[from] pgrx::spi::SpiError),
    /// A trigger was called in a way that it was not made for.
    #[error("{0}")]
    Trigger(#[from] pgrx::trigger_support::PgTriggerError),
    /// An answer could not be written as JSON.
    #[error("{0}")]
    Json(#[from] serde_json::Error),
}

impl ClaimError {
    /// Its SQLSTATE.
    pub fn code(&self) -> PgSqlErrorCode {
        match self {
            Self::InvalidId { .. } | Self::InvalidArgument { .. } => {
                PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE
            }
            Self::NotSessionOwner { .. }
            | Self::NotTableOwner { .. }
            | Self::MayNotGrant { .. }
            | Self::ForeignCode { .. }
            | Self::NotOwnTable { .. }
            | Self::UntrustedCode { .. } => PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
            Self::DirectWrite { code, .. } | Self::UnfitTable { code, .. } => *code,
            Self::BacklogDropped => PgSqlErrorCode::ERRCODE_DEPENDENT_OBJECTS_STILL_EXIST,
            Self::BacklogInUse { .. } => PgSqlErrorCode::ERRCODE_OBJECT_IN_USE,
            Self::ColumnGone { .. } => PgSqlErrorCode::ERRCODE_UNDEFINED_COLUMN,
            Self::ColumnOfOtherType { .. } => PgSqlErrorCode::ERRCODE_DATATYPE_MISMATCH,
            Self::MirrorRefused { .. } | Self::WriteRefused { .. } | Self::Undone { .. } => {
                PgSqlErrorCode::ERRCODE_TRIGGERED_ACTION_EXCEPTION
            }
            Self::ChangedByTrigger { .. } => {
                PgSqlErrorCode::ERRCODE_TRIGGERED_DATA_CHANGE_VIOLATION
            }
            Self::RowSecurity { .. } => PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
            Self::NeedsReadCommitted { .. } => PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
            Self::Standby => PgSqlErrorCode::ERRCODE_READ_ONLY_SQL_TRANSACTION,
            Self::Parallel => PgSqlErrorCode::ERRCODE_INVALID_TRANSACTION_STATE,
            Self::Serialization | Self::GaveWay => {
                PgSqlErrorCode::ERRCODE_T_R_SERIALIZATION_FAILURE
            }
            Self::ClaimNotHeld { .. }
            | Self::Unguarded { .. }
            | Self::GuardedTruncate { .. }
            | Self::NotGuarded { .. } => PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            Self::NotBound => PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            Self::Unsettled { .. } => PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            Self::NotInstalled => PgSqlErrorCode::ERRCODE_UNDEFINED_OBJECT,
            Self::NotInUse => PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            Self::Corrupt { .. } => PgSqlErrorCode::ERRCODE_DATA_CORRUPTED,
            Self::Spi(_) | Self::Trigger(_) | Self::Json(_) => {
                PgSqlErrorCode::ERRCODE_INTERNAL_ERROR
            }
        }
    }

    fn detail(&self) -> Option<String> {
        match self {
            Self::NotSessionOwner { owner_role, caller, .. } if !owner_role.exists() => Some(format!(
                "The session belongs to nobody: the role that registered it is not there (any more); the caller is role \"{}\".",
                caller.name()
            )),
            Self::NotSessionOwner { owner_role, caller, .. } => Some(format!(
                "The session belongs to role \"{}\"; the caller is role \"{}\".",
                owner_role.name(),
                caller.name()
            )),
            Self::NotTableOwner { caller, .. } => {
                Some(format!("Role \"{}\" does not own the table.", caller.name()))
            }
            Self::ForeignCode { code } => Some(format!(
                "The {code}: code could run with the rights of the extension's owner, or old rows could not be removed."
            )),
            Self::BacklogDropped => Some(
                "The command would drop the views that read the backlog, and with them the extension, all sessions, claims and their history.".into(),
            ),
            Self::MayNotGrant { caller } => Some(format!(
                "Role \"{}\" has not the rights of the role that owns the extension.",
                caller.name()
            )),
            Self::UntrustedCode { code, .. } => Some(format!(
                "An index, a constraint, statistics or the partitioning uses {code}, which would run with the rights of the extension's owner."
            )),
            Self::ClaimNotHeld { detail, .. } => Some(detail.clone()),
            Self::Unguarded { .. } => Some("This transaction has not asserted the claim.".into()),
            Self::GaveWay => Some(
                "This transaction was waiting for the other one, which guards a claim or has locked rows in another order.".into(),
            ),
            Self::GuardedTruncate { .. } => {
                Some("It would remove rows of SDs that others may have claimed.".into())
            }
            Self::DirectWrite { detail, .. } => detail.clone(),
            Self::UnfitTable { detail, .. } | Self::BacklogInUse { detail } => Some(detail.clone()),
            Self::ColumnOfOtherType { .. } => {
                Some("Give the column its type back, or call bind_directives() again without it.".into())
            }
            Self::MirrorRefused { .. } => {
                Some("A trigger on the backlog has suppressed or changed the update.".into())
            }
            Self::WriteRefused { .. } => {
                Some("A BEFORE trigger on the table has suppressed the write.".into())
            }
            Self::RowSecurity { .. } => {
                Some("The table forces its policies on its owner, and the extension must see and write every row.".into())
            }
            Self::Standby => Some(
                "Claims, heartbeats and all else that writes are for the primary; a standby only shows what has arrived.".into(),
            ),
            Self::Parallel => Some("The server's parallel workers share a transaction that none of them may write in.".into()),
            Self::Unsettled { .. } => {
                Some("The open claims and the sessions that should hold them do not agree.".into())
            }
            _ => None,
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::InvalidId { .. } => Some(format!(
                "Give 1 to {} characters that can be printed.",
                pg_claims_core::id::MAX_ID_CHARACTERS
            )),
            Self::InvalidArgument { hint, .. } => hint.clone(),
            Self::NotSessionOwner { owner_role, .. } if !owner_role.exists() => Some(
                "Register a session of another id, or have an operator give the sessions of that role to another one: assign_sessions().".into(),
            ),
            Self::NotSessionOwner { owner_role, caller, .. } => Some(format!(
                "Call as \"{}\", or have a superuser run grant_coordination('{}', 'operator').",
                owner_role.name(),
                caller.name()
            )),
            Self::UntrustedCode { .. } => Some(
                "Drop it from there, or let a superuser own it, or the table.".into(),
            ),
            Self::ForeignCode { .. } => Some(
                "Drop it, and take the privileges TRIGGER and REFERENCES on the extension's tables from whoever made it.".into(),
            ),
            Self::BacklogDropped => Some(
                "Call unbind_directives() or bind another table first. DROP EXTENSION pg_claims drops everything on purpose.".into(),
            ),
            Self::MayNotGrant { .. } => {
                Some("Ask a superuser, or a member of the role that owns the extension.".into())
            }
            Self::NotTableOwner { .. } => {
                Some("Call as the table's owner or as a superuser.".into())
            }
            Self::ClaimNotHeld { .. } => {
                Some("Stop this work; claim the SD again if it is free.".into())
            }
            Self::Unguarded { .. } => Some(
                "Call assert_claim() for the SD earlier in the same transaction, or unguard_table().".into(),
            ),
            Self::GuardedTruncate { .. } => {
                Some("Use DELETE under the claims, or call unguard_table() first.".into())
            }
            Self::DirectWrite { hint, .. } => Some((*hint).into()),
            Self::UnfitTable { hint, .. } => Some(hint.clone()),
            Self::BacklogInUse { .. } => {
                Some("Release these claims first, with release_sd().".into())
            }
            Self::ColumnGone { .. } => {
                Some("Call bind_directives() again with the columns' present names.".into())
            }
            Self::MirrorRefused { .. } => {
                Some("Let the backlog's BEFORE triggers pass updates of these two columns.".into())
            }
            Self::WriteRefused { .. } => {
                Some("Let the table's BEFORE triggers pass what the extension writes.".into())
            }
            Self::ChangedByTrigger { .. } => {
                Some("Let an AFTER trigger do so, or the row that is given back.".into())
            }
            Self::RowSecurity { .. } => {
                Some("ALTER TABLE … NO FORCE ROW LEVEL SECURITY.".into())
            }
            Self::Undone { .. } => {
                Some("Let the triggers on the backlog leave claims alone that are just being made.".into())
            }
            Self::NeedsReadCommitted { .. } => {
                Some("Use READ COMMITTED, which sees the claims that others commit meanwhile.".into())
            }
            Self::Standby => Some(
                "Connect to the primary, for example with target_session_attrs=read-write.".into(),
            ),
            Self::Parallel => Some("Do not declare a function that calls it PARALLEL SAFE.".into()),
            Self::Serialization | Self::GaveWay => Some("Try the transaction again.".into()),
            Self::NotBound => Some("The extension's own strategic_directives_v2 is in use.".into()),
            Self::Unsettled { .. } => Some(
                "Compare the open rows of sd_claims with claude_sessions; triggers may have been disabled.".into(),
            ),
            Self::NotInstalled => Some("Run CREATE EXTENSION pg_claims.".into()),
            _ => None,
        }
    }

    /// Raises the error; for triggers, which cannot return one that keeps its SQLSTATE.
    pub fn raise(self) -> ! {
        ErrorReport::from(self).report(PgLogLevel::ERROR);
        unreachable!("an ERROR does not return")
    }
}

impl From<ClaimError> for ErrorReport {
    fn from(error: ClaimError) -> Self {
        let mut report = Self::new(error.code(), cut(error.to_string()), "pg_claims");
        if let Some(detail) = error.detail() {
            report = report.set_detail(cut(detail));
        }
        if let Some(hint) = error.hint() {
            report = report.set_hint(hint);
        }
        report
    }
}

/// So much of a text is told in an error, in characters: it may repeat an argument of any length.
const MOST_TOLD: usize = 2000;

fn cut(text: String) -> String {
    match text.char_indices().nth(MOST_TOLD) {
        None => text,
        Some((at, _)) => format!("{}…", &text[..at]),
    }
}
