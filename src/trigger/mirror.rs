//! After a session's row was written: all that is derived from it.

use pgrx::prelude::*;

use super::row::Given;
use super::{Row, function_of, is_restoring, run, run_on_own_table, session_rows};
use crate::board::Place;
use crate::error::Result;
use crate::pg::time;
use crate::spi::intent::{self, Intent};
use crate::spi::{Db, Rights, catalog, claim, directive, installation};

/// The heartbeat board, the claim history and the audit, and who works on the SD in the backlog.
#[pg_trigger]
pub fn sync_is_working_on_with_session<'a>(trigger: &'a PgTrigger<'a>) -> Row<'a> {
    // The extension's own write takes rights only where they are needed. Its write of a bound backlog is announced as well,
    // and that may have this trigger, which its owner may have put there.
    let function = function_of(trigger);
    let is_of_sessions = catalog::sessions_of(function) == trigger.relid().ok();
    if is_of_sessions && intent::is(&Intent::Own) {
        return run(|| follow(trigger, Rights::of_owner(function)));
    }
    run_on_own_table(trigger, || follow(trigger, Rights::Given))
}

fn follow<'a>(trigger: &'a PgTrigger<'a>, rights: Rights) -> Result<Option<Given<'a>>> {
    let (old, new) = session_rows(trigger)?;
    // The table answers the next heartbeat of a session that was changed. Its last one is kept, unless that was
    // another session's: one that has been given another id.
    if let (Some(old), Some(new)) = (&old, &new) {
        let place = Place::of(trigger.relid()?, &old.session_id);
        if old.session_id == new.session_id {
            place.close();
        } else {
            place.forget();
        }
    }
    // What follows from a replicated row is replicated as well, and a dump brings it along.
    if (time::is_replica() && !intent::is(&Intent::Own)) || (old.is_none() && is_restoring()) {
        return Ok(None);
    }
    Db::within_with(rights, |db| {
        installation::note_use(db)?;
        match (&old, &new) {
            (None, Some(new)) => claim::follow_insert(db, new)?,
            (Some(old), Some(new)) => claim::follow_update(db, old, new)?,
            (Some(old), None) => claim::follow_delete(db, old)?,
            (None, None) => {}
        }
        let before = old.as_ref().and_then(|row| row.sd_id.as_deref());
        directive::follow(db, before, new.as_ref())
    })?;
    Ok(None)
}
