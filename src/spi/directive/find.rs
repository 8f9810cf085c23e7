//! Finding an SD by any of its keys.

use pgrx::pg_sys::BuiltinOid::TEXTOID;

use super::{mirror, own};
use crate::error::Result;
use crate::spi::catalog;
use crate::spi::row::Row;
use crate::spi::statement::{Db, Statement};

/// An SD as the backlog has it.
#[derive(Debug)]
pub struct Found {
    /// Its canonical id.
    pub sd_id: String,
    /// Its status.
    pub status: Option<String>,
    /// Whether it is finished.
    pub is_terminal: bool,
    /// Whether the backlog says that nobody works on it, which follows from what sessions hold: not proof, but good enough
    /// for a first look.
    pub says_free: bool,
}

static FIND: Statement = Statement::new(
    |c| match &c.backlog {
        Some(backlog) => {
            format!("SELECT sd_id, status, is_terminal FROM ({}) d", backlog.resolve("$1"))
        }
        None => "SELECT $1, NULL::text, false WHERE false".into(),
    },
    &[TEXTOID],
);

/// The SD that `key` names, if the backlog has it.
pub fn find(db: &Db<'_>, key: &str) -> Result<Option<Found>> {
    if db.catalog()?.is_own_backlog_in_use {
        let found = own::find(db, key)?;
        // Whoever was waited for there may have bound another backlog.
        if db.catalog()?.is_own_backlog_in_use {
            return Ok(found);
        }
    }
    catalog::usable_backlog(db)?;
    // Whatever its owner puts on the table meanwhile, planning runs it with the owner's rights.
    mirror::as_owner(db, |db| {
        let Some(row) = db.first_row(&FIND, &[key.into()])? else {
            return Ok(None);
        };
        Ok(Some(Found {
            sd_id: row.required_text(1, "an SD's id")?,
            status: row.text(2)?,
            is_terminal: row.flag(3)?,
            says_free: false,
        }))
    })
}
