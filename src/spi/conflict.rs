//! Pairs of SDs that must not be worked on at once.

use std::cell::RefCell;

use pg_claims_core::outcome::Conflict;
use pgrx::pg_sys::BuiltinOid::TEXTOID;

use super::catalog::Catalog;
use super::row::Row;
use super::statement::{Db, Statement};
use super::table::layout::conflicts as column;
use super::table::{Key, Name, Snapshot, Table, TableRow};
use super::wait;
use crate::error::Result;
use crate::identity;

/// A pair in the order in which it is stored: by bytes, whatever the database's collation.
pub fn ordered<'a>(a: &'a str, b: &'a str) -> (&'a str, &'a str) {
    if a < b { (a, b) } else { (b, a) }
}

/// Blocking conflicts of the SD $1 that are in force.
const OF_SD: &str = "(sd_id_a = $1 OR sd_id_b = $1) AND resolved_at IS NULL
                     AND conflict_severity = 'blocking'";

/// Whether the SD has any.
pub fn any(db: &Db<'_>, snapshot: &Snapshot, sd_id: &str) -> Result<bool> {
    let table = Table::to_read(db, Name::Conflicts)?;
    if table.is_bare() {
        return Ok(false);
    }
    let is_blocking = |row: &TableRow| matches!(row.text(column::SEVERITY), Ok(Some(severity)) if severity == "blocking");
    let key = Key::Text(sd_id);
    Ok([column::OPEN_BY_SD_A, column::OPEN_BY_SD_B]
        .into_iter()
        .any(|side| table.find_where(snapshot, side, key, is_blocking).is_some()))
}

/// The numbers of the SD's blocking conflicts that are in force.
pub fn open_pairs(db: &Db<'_>, snapshot: &Snapshot, sd_id: &str) -> Result<Vec<i64>> {
    let table = Table::to_read(db, Name::Conflicts)?;
    let found = RefCell::new(Vec::new());
    for side in [column::OPEN_BY_SD_A, column::OPEN_BY_SD_B] {
        table.find_where(snapshot, side, Key::Text(sd_id), |row| {
            if row.says(column::SEVERITY, "blocking") {
                found.borrow_mut().extend(row.bigint(column::CONFLICT_ID).ok().flatten());
            }
            false
        });
    }
    let mut found = found.into_inner();
    found.sort_unstable();
    Ok(found)
}

/// Enters the SD's pairs, waiting for whoever is in one or (`SKIP LOCKED`) passing it by.
///
/// Two claims of one pair meet at its row: the second one waits for the first, and under REPEATABLE READ
/// and SERIALIZABLE it is a serialization failure. In the order of the pairs' numbers, so that claims with
/// several pairs cannot wait for each other in a circle.
fn enter_pairs(c: &Catalog, waiting: &str, answer: &str) -> String {
    format!(
        "WITH pairs AS MATERIALIZED (
             SELECT conflict_id FROM {x}.sd_conflict_matrix
              WHERE {OF_SD} ORDER BY conflict_id FOR NO KEY UPDATE {waiting}),
              entered AS (
             UPDATE {x}.sd_conflict_matrix m SET last_claim_at = pg_catalog.clock_timestamp()
               FROM pairs WHERE m.conflict_id = pairs.conflict_id)
         SELECT {answer}",
        x = c.schema
    )
}

static ENTER: Statement = Statement::new(|c| enter_pairs(c, "", "true"), &[TEXTOID]);

/// Excludes concurrent claims on what the SD is in conflict with, until the transaction ends.
pub fn enter(db: &Db<'_>, sd_id: &str) -> Result<()> {
    wait::giving_way_unless_guarding(|| db.run(&ENTER, &[sd_id.into()]).map(|_| ()))
}

static TRY_ENTER: Statement = Statement::new(
    |c| {
        let all = format!(
            "(SELECT pg_catalog.count(*) FROM pairs)
             = (SELECT pg_catalog.count(*) FROM {}.sd_conflict_matrix WHERE {OF_SD})",
            c.schema
        );
        enter_pairs(c, "SKIP LOCKED", &all)
    },
    &[TEXTOID],
);

/// Like [`enter`], but waits for nobody: false where somebody else is claiming what the SD is in
/// conflict with.
pub fn try_enter(db: &Db<'_>, sd_id: &str) -> Result<bool> {
    db.run(&TRY_ENTER, &[sd_id.into()])?.first().flag(1)
}

static OPPONENT: Statement = Statement::new(
    |c| {
        format!(
            "SELECT conflict_type, conflicting_sd, conflicting_session FROM {}.v_sd_conflicts
              WHERE sd_id = $1 AND conflicting_session <> $2 AND is_live
              ORDER BY conflict_id LIMIT 1",
            c.schema
        )
    },
    &[TEXTOID, TEXTOID],
);

/// The first conflict of the SD with one that another live session than `session_id` holds.
pub fn live_opponent(db: &Db<'_>, sd_id: &str, session_id: &str) -> Result<Option<Conflict>> {
    let Some(row) = db.first_row(&OPPONENT, &[sd_id.into(), session_id.into()])? else {
        return Ok(None);
    };
    Ok(Some(Conflict {
        conflict_type: row.required_text(1, "sd_conflict_matrix.conflict_type")?,
        conflicting_sd: row.required_text(2, "sd_conflict_matrix.sd_id")?,
        conflicting_session: row.required_text(3, "claude_sessions.session_id")?,
    }))
}

static DECLARE: Statement = Statement::new(
    |c| {
        format!(
            "INSERT INTO {}.sd_conflict_matrix
                    (sd_id_a, sd_id_b, conflict_type, conflict_severity, declared_by)
             VALUES ($1, $2, $3, $4, $5::name)
             ON CONFLICT (sd_id_a, sd_id_b) WHERE resolved_at IS NULL DO UPDATE
                SET conflict_type = EXCLUDED.conflict_type,
                    conflict_severity = EXCLUDED.conflict_severity",
            c.schema
        )
    },
    &[TEXTOID, TEXTOID, TEXTOID, TEXTOID, TEXTOID],
);

/// Puts the pair on record, or changes what is on record of it.
pub fn declare(db: &Db<'_>, pair: (&str, &str), kind: &str, severity: &str) -> Result<()> {
    let arguments = [
        pair.0.into(),
        pair.1.into(),
        kind.into(),
        severity.into(),
        identity::caller().name().into(),
    ];
    db.run(&DECLARE, &arguments)?;
    Ok(())
}

static RESOLVE: Statement = Statement::new(
    |c| {
        format!(
            "UPDATE {}.sd_conflict_matrix
                SET resolved_at = pg_catalog.clock_timestamp(), resolved_by = $3::name
              WHERE sd_id_a = $1 AND sd_id_b = $2 AND resolved_at IS NULL
          RETURNING 1",
            c.schema
        )
    },
    &[TEXTOID, TEXTOID, TEXTOID],
);

/// Ends the conflict of a pair. False where there is none.
pub fn resolve(db: &Db<'_>, pair: (&str, &str)) -> Result<bool> {
    let arguments = [pair.0.into(), pair.1.into(), identity::caller().name().into()];
    Ok(db.first_row(&RESOLVE, &arguments)?.is_some())
}
