//! After a session's row was written: who works on the SD, in the backlog.

use pgrx::prelude::*;

use super::{Row, is_restoring, run_on_own_table, session_rows};
use crate::spi::{Db, directive};

#[pg_trigger]
pub fn sync_is_working_on_with_session<'a>(trigger: &'a PgTrigger<'a>) -> Row<'a> {
    run_on_own_table(trigger, || {
        let (old, new) = session_rows(trigger)?;
        if old.is_none() && is_restoring() {
            return Ok(None);
        }
        let before = old.as_ref().and_then(|row| row.sd_id.as_deref());
        Db::within(|db| directive::follow(db, before, new.as_ref()))?;
        Ok(None)
    })
}
