//! After a session's row was written: who works on the SD, in the backlog.

use pgrx::prelude::*;

use super::{Row, is_restoring, run, session_rows};
use crate::spi::{Db, directive};

#[pg_trigger]
pub fn sync_is_working_on_with_session<'a>(trigger: &'a PgTrigger<'a>) -> Row<'a> {
    run(|| {
        let (old, new) = session_rows(trigger)?;
        let before = old.as_ref().and_then(|row| row.sd_id.as_deref());
        let now = new.as_ref().and_then(|row| row.sd_id.as_deref());
        let restored = old.is_none() && is_restoring();
        if before == now || restored {
            return Ok(None);
        }
        Db::connect(|db| {
            if let Some(sd_id) = before {
                directive::sync(db, sd_id, None)?;
            }
            if let (Some(sd_id), Some(row)) = (now, &new) {
                directive::sync(db, sd_id, Some(&row.session_id))?;
            }
            Ok(())
        })?;
        Ok(None)
    })
}
