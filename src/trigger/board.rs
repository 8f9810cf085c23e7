//! Keeping the heartbeat board in step with the sessions.

use pgrx::prelude::*;

use super::{Row, run};
use crate::board::Place;

/// The table alone says when the session last beat, and answers its next heartbeat.
#[pg_trigger]
pub fn forget_heartbeat<'a>(trigger: &'a PgTrigger<'a>) -> Row<'a> {
    run(|| {
        let old = trigger.old();
        if let Some(session_id) =
            old.and_then(|row| row.get_by_name::<String>("session_id").ok()?)
        {
            Place::of(trigger.relid()?, &session_id).remove();
        }
        Ok(None)
    })
}
