//! A person's stop sign on an SD.

use pg_claims_core::outcome::Hold;
use pgrx::pg_sys::BuiltinOid::TEXTOID;

use super::row::Row;
use super::statement::{Db, Statement};
use super::table::layout::holds as column;
use super::table::{Key, Name, Snapshot, Table};
use crate::error::Result;
use crate::identity;

static HOLD: Statement = Statement::new(
    |c| {
        format!(
            "INSERT INTO {}.sd_holds (sd_id, reason, held_by) VALUES ($1, $2, $3::name)
             ON CONFLICT (sd_id) DO UPDATE
                SET reason = EXCLUDED.reason, held_by = EXCLUDED.held_by,
                    held_at = EXCLUDED.held_at
          RETURNING reason, held_by::text, held_at",
            c.schema
        )
    },
    &[TEXTOID, TEXTOID, TEXTOID],
);

/// Stops the SD.
pub fn hold(db: &Db<'_>, sd_id: &str, reason: &str) -> Result<Hold> {
    let arguments = [sd_id.into(), reason.into(), identity::caller().name().into()];
    let row = db.run(&HOLD, &arguments)?.first();
    Ok(Hold {
        reason: row.required_text(1, "sd_holds.reason")?,
        held_by: row.required_text(2, "sd_holds.held_by")?,
        held_at: row.required_instant(3, "sd_holds.held_at")?,
    })
}

/// The stop sign on an SD, if there is one.
pub fn find(db: &Db<'_>, snapshot: &Snapshot, sd_id: &str) -> Result<Option<Hold>> {
    let table = Table::to_read(db, Name::Holds)?;
    if table.is_bare() {
        return Ok(None);
    }
    let Some(row) = table.find(snapshot, column::BY_SD_ID, Key::Text(sd_id)) else {
        return Ok(None);
    };
    Ok(Some(Hold {
        reason: row.required_text(column::REASON, "sd_holds.reason")?,
        held_by: row.required_name(column::HELD_BY, "sd_holds.held_by")?,
        held_at: row.required_instant(column::HELD_AT, "sd_holds.held_at")?,
    }))
}

static UNHOLD: Statement = Statement::new(
    |c| format!("DELETE FROM {}.sd_holds WHERE sd_id = $1 RETURNING 1", c.schema),
    &[TEXTOID],
);

/// Takes the stop sign away. False where there is none.
pub fn unhold(db: &Db<'_>, sd_id: &str) -> Result<bool> {
    Ok(db.first_row(&UNHOLD, &[sd_id.into()])?.is_some())
}
