//! The backlog: binding a table of the user's.

use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;

use super::{answer, running};
use crate::error::{ClaimError, Result};
use crate::jsonb::Jsonb;
use crate::spi::Db;
use crate::spi::directive::{self, Columns};

// The SQL is written out because pgrx has no regclass.
#[pg_extern(sql = r#"
CREATE FUNCTION bind_directives(
    p_table                    regclass,
    p_key_columns              text[],
    p_title_column             text DEFAULT NULL,
    p_status_column            text DEFAULT NULL,
    p_priority_column          text DEFAULT NULL,
    p_track_column             text DEFAULT NULL,
    p_rank_column              text DEFAULT NULL,
    p_dependencies_column      text DEFAULT NULL,
    p_parent_column            text DEFAULT NULL,
    p_created_at_column        text DEFAULT NULL,
    p_is_working_on_column     text DEFAULT NULL,
    p_active_session_id_column text DEFAULT NULL,
    p_terminal_statuses        text[] DEFAULT '{completed,cancelled,deferred}')
RETURNS jsonb
LANGUAGE c VOLATILE PARALLEL UNSAFE
AS '@MODULE_PATHNAME@', '@FUNCTION_NAME@';
"#)]
#[allow(clippy::too_many_arguments)]
fn bind_directives(
    p_table: Option<pg_sys::Oid>,
    p_key_columns: Option<Vec<Option<String>>>,
    p_title_column: Option<String>,
    p_status_column: Option<String>,
    p_priority_column: Option<String>,
    p_track_column: Option<String>,
    p_rank_column: Option<String>,
    p_dependencies_column: Option<String>,
    p_parent_column: Option<String>,
    p_created_at_column: Option<String>,
    p_is_working_on_column: Option<String>,
    p_active_session_id_column: Option<String>,
    p_terminal_statuses: Option<Vec<Option<String>>>,
    fcinfo: pg_sys::FunctionCallInfo,
) -> Result<Jsonb, ErrorReport> {
    let table = p_table.ok_or_else(|| ClaimError::InvalidArgument {
        argument: "p_table",
        reason: "must not be NULL".into(),
        hint: Some("Give the table's name, with its schema.".into()),
    })?;
    let asked = Columns {
        keys: p_key_columns.unwrap_or_default().into_iter().flatten().collect(),
        title: p_title_column,
        status: p_status_column,
        priority: p_priority_column,
        track: p_track_column,
        rank: p_rank_column,
        dependencies: p_dependencies_column,
        parent: p_parent_column,
        created_at: p_created_at_column,
        is_working_on: p_is_working_on_column,
        active_session_id: p_active_session_id_column,
        terminal_statuses: match p_terminal_statuses {
            Some(statuses) => statuses.into_iter().flatten().collect(),
            None => Columns::own().terminal_statuses,
        },
    };
    Ok(Db::connect(running(fcinfo), |db| answer(Ok(directive::bind(db, table, asked)?)))?)
}

#[pg_extern(volatile, parallel_unsafe)]
fn unbind_directives(fcinfo: pg_sys::FunctionCallInfo) -> Result<Jsonb, ErrorReport> {
    let table = Db::connect(running(fcinfo), directive::unbind)?;
    Ok(super::json(&serde_json::json!({ "success": true, "unbound_table": table }))?)
}

/// Serves the installation, which drops it again.
#[pg_extern(volatile, parallel_unsafe)]
pub fn attach_default_directives() -> Result<(), ErrorReport> {
    Ok(Db::within(directive::attach_own)?)
}
