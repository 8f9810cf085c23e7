//! Writing what a session holds, and all that follows from it.

use pgrx::datum::TimestampWithTimeZone;
use pgrx::pg_sys::BuiltinOid::{INT8OID, TEXTOID, TIMESTAMPTZOID};

use super::Session;
use crate::board::Place;
use crate::error::{ClaimError, Result};
use crate::spi::claim::{self, Ending};
use crate::spi::directive;
use crate::spi::statement::{Db, Statement};
use crate::spi::table::layout::sessions as column;
use crate::spi::table::{Key, Lock, Name, Snapshot, Table, TableRow, Update, Wait};
use crate::spi::{time, wait};

/// Writes what `change` makes of the session, in one go with what follows from it: the claim history,
/// the audit, the backlog. `None` where there is no such session, or `change` wants nothing.
///
/// Waits for a transaction that is writing the session, and asks again with what that made of it. With
/// [`Wait::Skip`] it is `None` as well where another session has the SD that is to be this one's, or may just be
/// getting it, and the session may be written directly.
pub fn change(
    db: &Db<'_>,
    session_id: &str,
    wait: Wait,
    change: impl Fn(&Session) -> Option<Session>,
) -> Result<Option<Session>> {
    loop {
        pgrx::check_for_interrupts!();
        let table = Table::to_write(db, Name::Sessions)?;
        if !table.may_be_written() {
            return change_by_statement(db, session_id, change);
        }
        let snapshot = Snapshot::take();
        let Some(row) = table.find(&snapshot, column::BY_SESSION_ID, Key::Text(session_id)) else {
            return Ok(None);
        };
        let old = Session::read(&row)?;
        let Some(new) = change(&old) else {
            return Ok(None);
        };
        // What it is to be says when that was, which is after the wait.
        if row.is_contested() {
            wait::giving_way_unless_guarding(|| table.lock(&snapshot, &row, Wait::Block))?;
            continue;
        }
        let update = match wait {
            Wait::Block if table.update(&snapshot, &row, &new.written()?) => Update::Done,
            Wait::Block => Update::Outdated,
            Wait::Skip => table.try_update(&snapshot, &row, &new.written()?),
        };
        match update {
            Update::Done => {
                follow(db, &old, &new)?;
                return Ok(Some(new));
            }
            Update::Outdated => {}
            Update::Contested => {
                take_back(&table, &old)?;
                return Ok(None);
            }
        }
    }
}

/// Writes the session again as it was, after this transaction has written what must not stay.
fn take_back(table: &Table, old: &Session) -> Result<()> {
    let snapshot = Snapshot::take();
    let session_id = Key::Text(&old.session_id);
    let row = table.find(&snapshot, column::BY_SESSION_ID, session_id);
    // Nobody else can have changed it.
    let what = "claude_sessions";
    let row = row.ok_or(ClaimError::Corrupt { what })?;
    if table.update(&snapshot, &row, &old.written()?) {
        Ok(())
    } else {
        Err(ClaimError::Corrupt { what })
    }
}

fn change_by_statement(
    db: &Db<'_>,
    session_id: &str,
    change: impl Fn(&Session) -> Option<Session>,
) -> Result<Option<Session>> {
    let Some(held) = hold(db, session_id, Wait::Block)? else {
        return Ok(None);
    };
    let Some(new) = change(&held.session) else {
        return Ok(None);
    };
    held.write(db, &new)?;
    Ok(Some(new))
}

/// A session whose row this transaction has locked.
pub struct Held {
    pub session: Session,
    row: TableRow,
    snapshot: Snapshot,
    table: Table,
}

/// Locks the session's row until the transaction ends. `None` where there is no such session, or
/// somebody else is writing it and it was not to be waited for.
pub fn hold(db: &Db<'_>, session_id: &str, wait: Wait) -> Result<Option<Held>> {
    let table = Table::to_write(db, Name::Sessions)?;
    loop {
        pgrx::check_for_interrupts!();
        let snapshot = Snapshot::take();
        let Some(found) = table.find(&snapshot, column::BY_SESSION_ID, Key::Text(session_id))
        else {
            return Ok(None);
        };
        let mut lock = table.lock(&snapshot, &found, Wait::Skip)?;
        if matches!(lock, Lock::Busy) && wait == Wait::Block {
            lock = wait::giving_way_unless_guarding(|| table.lock(&snapshot, &found, wait))?;
        }
        match lock {
            Lock::Held(row) => {
                let session = Session::read(&row)?;
                if session.session_id != session_id {
                    continue;
                }
                return Ok(Some(Held { session, row, snapshot, table }));
            }
            Lock::Busy => return Ok(None),
            Lock::Gone => {}
        }
    }
}

impl Held {
    /// Writes the session as it is to be, and what follows from it.
    pub fn write(self, db: &Db<'_>, new: &Session) -> Result<()> {
        if !self.table.may_be_written() {
            return write_by_statement(db, &self.session, new);
        }
        if !self.table.update(&self.snapshot, &self.row, &new.written()?) {
            // Nobody else can have changed it.
            return Err(ClaimError::Corrupt { what: "claude_sessions" });
        }
        follow(db, &self.session, new)
    }
}

/// What the triggers do where a statement has written the session.
fn follow(db: &Db<'_>, old: &Session, new: &Session) -> Result<()> {
    if old.claim() != new.claim() || old.status != new.status {
        Place::of(db.catalog()?.sessions, &new.session_id).close();
    }
    claim::follow_update(db, old, new)?;
    directive::follow(db, old.sd_id.as_deref(), Some(new))
}

static WRITE: Statement = Statement::new(
    |c| {
        format!(
            "UPDATE {}.claude_sessions
                SET sd_id = $2, claim_id = $3, claimed_at = $4, track = $5, status = $6,
                    silent_until = $7, heartbeat_at = $8, lost_claim_id = $9, lost_to = $10,
                    released_at = $11, release_reason = $12,
                    updated_at = pg_catalog.clock_timestamp()
              WHERE session_id = $1
          RETURNING 1",
            c.schema
        )
    },
    &[
        TEXTOID,
        TEXTOID,
        INT8OID,
        TIMESTAMPTZOID,
        TEXTOID,
        TEXTOID,
        TIMESTAMPTZOID,
        TIMESTAMPTZOID,
        INT8OID,
        TEXTOID,
        TIMESTAMPTZOID,
        TEXTOID,
    ],
);

/// Writes a session that is locked by a statement, which fires the triggers: those of the extension's,
/// which do what follows, and others'.
fn write_by_statement(db: &Db<'_>, old: &Session, new: &Session) -> Result<()> {
    let instant = |at: Option<_>| -> Result<Option<TimestampWithTimeZone>> {
        at.map(time::to_server).transpose()
    };
    let arguments = [
        new.session_id.as_str().into(),
        new.sd_id.as_deref().into(),
        new.claim_id.into(),
        instant(new.claimed_at)?.into(),
        new.track.as_deref().into(),
        new.status.as_str().into(),
        instant(new.silent_until)?.into(),
        instant(Some(new.heartbeat_at))?.into(),
        new.lost_claim_id.into(),
        new.lost_to.as_deref().into(),
        instant(new.released_at)?.into(),
        new.release_reason.as_deref().into(),
    ];
    let _ending = (old.sd_id.is_some() && new.sd_id.is_none()).then(Ending::new);
    match db.first_row(&WRITE, &arguments)? {
        // As a replica the server fires no trigger of these.
        Some(_) if time::is_replica() => follow(db, old, new),
        Some(_) => Ok(()),
        None => Err(ClaimError::WriteRefused { session_id: new.session_id.clone() }),
    }
}
