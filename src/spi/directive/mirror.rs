//! Keeping the backlog's `is_working_on` and `active_session_id`.

use pg_claims_core::text::MOST_SHOWN;
use pgrx::datum::DatumWithOid;
use pgrx::pg_sys;
use pgrx::pg_sys::BuiltinOid::TEXTOID;

use super::backlog::Deferrable;
use super::{Backlog, mirror_row, own};
use crate::error::{ClaimError, Result};
use crate::identity::Role;
use crate::spi::catalog::{self, Catalog};
use crate::spi::intent::{self, Intent, Meaning};
use crate::spi::row::Row;
use crate::spi::session::{self, Session};
use crate::spi::statement::{Db, Statement};
use crate::spi::table::{self, Key, Lock, Wait};
use crate::spi::wait;

// One SD a statement: for a list the server would plan anew each time, as it cannot know how long
// the list will be.
static LOCK: Statement = Statement::new(
    |catalog| {
        over_backlog(catalog, "SELECT 1 WHERE $1 IS NULL", |b| {
            format!(
                "SELECT b.ctid, b.tableoid FROM {} b WHERE {} = $1 FOR NO KEY UPDATE OF b",
                b.from,
                b.canonical()
            )
        })
    },
    &[TEXTOID],
);

/// Writes who works on an SD ($2 NULL: nobody), where that is not what the row says already. Returns
/// whether the row then says so: a trigger of the user's may have its own way.
static SYNC: Statement = Statement::new(
    |catalog| {
        over_mirror(catalog, |b, columns| {
            let assignments: Vec<_> =
                columns.iter().map(|mirrored| mirrored.assignment()).collect();
            format!(
                "UPDATE {} b SET {} WHERE {} = $1 AND ({differ}) RETURNING NOT ({differ})",
                b.from,
                assignments.join(", "),
                b.canonical(),
                differ = differ(columns),
            )
        })
    },
    &[TEXTOID, TEXTOID],
);

/// Finds an SD whose row does not say what [`SYNC`] was to write.
static DISAGREES: Statement = Statement::new(
    |catalog| {
        over_mirror(catalog, |b, columns| {
            format!(
                "SELECT 1 FROM {} b WHERE {} = $1 AND ({})",
                b.from,
                b.canonical(),
                differ(columns)
            )
        })
    },
    &[TEXTOID, TEXTOID],
);

/// A column of the backlog's that says who works on the SD.
struct Mirrored {
    /// Its name, quoted.
    name: String,
    /// What $2 gives it.
    value: &'static str,
    /// The type of both.
    of_type: &'static str,
}

impl Mirrored {
    fn assignment(&self) -> String {
        format!("{} = {}", self.name, self.value)
    }

    /// Of one type on both sides, so that no operator fits better than the server's: the statement runs with the backlog's
    /// own schema in the search_path.
    fn difference(&self) -> String {
        format!("b.{}::{} IS DISTINCT FROM {}", self.name, self.of_type, self.value)
    }
}

/// A statement on the backlog's mirror columns, each with the value that $2 gives it.
fn over_mirror(catalog: &Catalog, text: impl FnOnce(&Backlog, &[Mirrored]) -> String) -> String {
    const NOTHING: &str = "SELECT 1 WHERE $1 IS NULL AND $2 IS NULL";
    over_backlog(catalog, NOTHING, |b| {
        let mirrored = |column: &Option<String>, value, of_type| {
            let name = column.as_ref().map(pgrx::spi::quote_identifier);
            name.map(|name| Mirrored { name, value, of_type })
        };
        let columns: Vec<Mirrored> = [
            mirrored(&b.columns.is_working_on, "($2 IS NOT NULL)", "boolean"),
            mirrored(&b.columns.active_session_id, "$2", "text"),
        ]
        .into_iter()
        .flatten()
        .collect();
        if columns.is_empty() { NOTHING.into() } else { text(b, &columns) }
    })
}

fn differ(columns: &[Mirrored]) -> String {
    let differences: Vec<_> = columns.iter().map(Mirrored::difference).collect();
    differences.join(" OR ")
}

/// `what` of the SDs of which the backlog says something else than the sessions: only what it has a column
/// for can be out of step.
fn of_out_of_step(catalog: &Catalog, what: &str) -> String {
    let mut differ = vec!["false"];
    if let Some(Backlog { columns, .. }) = &catalog.backlog {
        if columns.is_working_on.is_some() {
            differ.push("d.is_working_on IS DISTINCT FROM (s.session_id IS NOT NULL)");
        }
        if columns.active_session_id.is_some() {
            differ.push("d.active_session_id IS DISTINCT FROM s.session_id");
        }
    }
    format!(
        "SELECT {what}
           FROM {x}.v_directives d
           LEFT JOIN {x}.claude_sessions s
             ON s.sd_id = d.sd_id AND s.sd_id IS NOT NULL AND s.status = 'active'
          WHERE {}",
        differ.join(" OR "),
        x = catalog.schema
    )
}

static OUT_OF_STEP: Statement =
    Statement::new(|catalog| of_out_of_step(catalog, "d.sd_id, s.session_id"), &[]);

/// The SDs of which the backlog says something else than the sessions, and who works on each.
pub fn out_of_step(db: &Db<'_>) -> Result<Vec<(String, Option<String>)>> {
    let mut rows = db.run(&OUT_OF_STEP, &[])?;
    let mut found = Vec::with_capacity(rows.len());
    while rows.next().is_some() {
        found.push((rows.required_text(1, "v_directives.sd_id")?, rows.text(2)?));
    }
    Ok(found)
}

static COUNT_OUT_OF_STEP: Statement =
    Statement::new(|catalog| of_out_of_step(catalog, "pg_catalog.count(*)"), &[]);

/// How many they are.
pub fn count_out_of_step(db: &Db<'_>) -> Result<i64> {
    db.run(&COUNT_OUT_OF_STEP, &[])?.first().required_bigint(1, "v_directives")
}

fn over_backlog(catalog: &Catalog, nothing: &str, text: impl FnOnce(&Backlog) -> String) -> String {
    catalog.backlog.as_ref().map_or_else(|| nothing.into(), text)
}

/// Locks the SDs against a concurrent claim, release, completion or deletion until the transaction
/// ends, waiting for whoever is writing them now. In the order of their ids, so that two callers
/// with the same SDs cannot wait for each other.
///
/// Returns those that were locked. A row that whoever was waited for has deleted or replaced is not:
/// look again.
pub fn lock(db: &Db<'_>, mut sd_ids: Vec<String>) -> Result<Vec<String>> {
    catalog::lock_backlog(db)?;
    sd_ids.sort();
    let mut locked = Vec::with_capacity(sd_ids.len());
    let is_own = db.catalog()?.is_own_backlog_in_use;
    for sd_id in sd_ids {
        if lock_one(db, &sd_id, is_own)? {
            locked.push(sd_id);
        }
    }
    Ok(locked)
}

/// Most SDs nobody else has locked, and then there is nothing to watch for.
fn lock_one(db: &Db<'_>, sd_id: &str, is_own: bool) -> Result<bool> {
    if is_own {
        let mut lock = own::lock(db, sd_id, Wait::Skip)?;
        if matches!(lock, Lock::Busy) {
            lock = wait::giving_way_unless_guarding(|| own::lock(db, sd_id, Wait::Block))?;
        }
        return Ok(matches!(lock, Lock::Held(_)));
    }
    Ok(lock_bound(db, &TRY_LOCK, sd_id)?
        || wait::giving_way_unless_guarding(|| lock_bound(db, &LOCK, sd_id))?)
}

/// Locks the SD's row by a statement, and remembers where it is. Whether there was one to lock.
fn lock_bound(db: &Db<'_>, statement: &'static Statement, sd_id: &str) -> Result<bool> {
    as_owner(db, |db| {
        let rows = db.run(statement, &[sd_id.into()])?;
        if rows.len() == 1 {
            let row = rows.first();
            let place: Option<pg_sys::ItemPointerData> = row.get(1)?;
            let table: Option<pg_sys::Oid> = row.get(2)?;
            if let (Some(table), Some(place)) = (table, place) {
                table::remember(table, Key::Text(sd_id), place);
            }
            return Ok(true);
        }
        Ok(!rows.is_empty())
    })
}

static TRY_LOCK: Statement = Statement::new(
    |catalog| {
        over_backlog(catalog, "SELECT 1 WHERE $1 IS NULL", |b| {
            format!(
                "SELECT b.ctid, b.tableoid FROM {} b WHERE {} = $1 FOR NO KEY UPDATE OF b SKIP LOCKED",
                b.from,
                b.canonical()
            )
        })
    },
    &[TEXTOID],
);

static EXISTS: Statement = Statement::new(
    |catalog| {
        over_backlog(catalog, "SELECT 1 WHERE $1 IS NULL", |b| {
            format!("SELECT 1 FROM {} b WHERE {} = $1", b.from, b.canonical())
        })
    },
    &[TEXTOID],
);

/// Locks the SD like [`lock`], unless somebody else is writing it: then false. An SD that the
/// backlog does not have cannot be written by anybody.
pub fn try_lock(db: &Db<'_>, sd_id: &str) -> Result<bool> {
    catalog::lock_backlog(db)?;
    if db.catalog()?.is_own_backlog_in_use {
        return Ok(!matches!(own::lock(db, sd_id, Wait::Skip)?, Lock::Busy));
    }
    Ok(lock_bound(db, &TRY_LOCK, sd_id)? || run_as_owner(db, &EXISTS, &[sd_id.into()])? == 0)
}

/// Makes the backlog say that `session_id` works on the SD, or nobody.
pub fn sync(db: &Db<'_>, sd_id: &str, session_id: Option<&str>) -> Result<()> {
    let _meaning = Meaning::to(Intent::Mirror {
        sd_id: sd_id.to_owned(),
        session_id: session_id.map(str::to_owned),
    });
    let is_as_asked = if db.catalog()?.is_own_backlog_in_use {
        own::sync(db, sd_id, session_id)?
    } else {
        write_as_owner(db, || sync_bound(db, sd_id, session_id))?
    };
    if is_as_asked { Ok(()) } else { Err(ClaimError::MirrorRefused { sd_id: sd_id.to_owned() }) }
}

/// Does a write that may run code of the backlog's owner, with the rights of that owner.
pub(super) fn write_as_owner<R>(db: &Db<'_>, write: impl FnOnce() -> Result<R>) -> Result<R> {
    as_owner(db, |db| {
        set_constraints(db, true)?;
        let done = write()?;
        // A write around this one, whose trigger has come here, still needs them so.
        if intent::mirrors_under_way() <= 1 {
            set_constraints(db, false)?;
        }
        Ok(done)
    })
}

/// The same in a bound backlog. Mostly the row is locked and need not be found again.
fn sync_bound(db: &Db<'_>, sd_id: &str, session_id: Option<&str>) -> Result<bool> {
    if let Some(says) = mirror_row::sync_locked(db, sd_id, session_id)? {
        return Ok(says);
    }
    let arguments = [sd_id.into(), session_id.into()];
    match db.first_row(&SYNC, &arguments)? {
        Some(row) => row.flag(1),
        // It says so already, the SD is gone, or a trigger of the user's has swallowed the write.
        None => Ok(db.run(&DISAGREES, &arguments)?.is_empty()),
    }
}

/// Makes the backlog say who holds the SD by now.
pub fn correct(db: &Db<'_>, sd_id: &str) -> Result<()> {
    let holder = session::latest_holder(db, sd_id)?.map(|session| session.session_id);
    // Before 18 a write has deferred triggers of the owner's fire early; mostly there is nothing to write.
    let arguments = [sd_id.into(), holder.as_deref().into()];
    if !db.catalog()?.is_own_backlog_in_use && run_as_owner(db, &DISAGREES, &arguments)? == 0 {
        return Ok(());
    }
    sync(db, sd_id, holder.as_deref())
}

/// What follows for the backlog from a session's having held `before` and being now what `session` is, if
/// it still is at all.
pub fn follow(db: &Db<'_>, before: Option<&str>, session: Option<&Session>) -> Result<()> {
    let now = session.and_then(|session| session.sd_id.as_deref());
    if before == now {
        return Ok(());
    }
    if let Some(sd_id) = before {
        sync(db, sd_id, None)?;
    }
    match (now, session) {
        (Some(sd_id), Some(session)) => sync(db, sd_id, Some(&session.session_id)),
        _ => Ok(()),
    }
}

/// Where the server defers nothing for the backlog's owner (see [`ActingAs`](crate::identity::ActingAs)), the backlog's own
/// deferrable constraints are made immediate for the time of a write, and then as they were.
fn set_constraints(db: &Db<'_>, immediate: bool) -> Result<()> {
    if cfg!(feature = "pg18") {
        return Ok(());
    }
    let catalog = db.catalog()?;
    for constraint in catalog.backlog.iter().flat_map(|backlog| &backlog.deferrable) {
        let name = &constraint.qualified;
        if immediate {
            db.run_once(&format!("SET CONSTRAINTS {name} IMMEDIATE"), &[])?;
        } else if constraint.is_deferred && !has_undeferrable_namesake(db, constraint)? {
            db.run_once(&format!("SET CONSTRAINTS {name} DEFERRED"), &[])?;
        }
    }
    Ok(())
}

/// Constraints of several tables may have one name, which stands for all of them then. Where one of those cannot
/// be deferred, none can be by that name.
fn has_undeferrable_namesake(db: &Db<'_>, constraint: &Deferrable) -> Result<bool> {
    let namesakes = db.ask(
        "SELECT 1 FROM pg_catalog.pg_constraint
          WHERE conname = $1::name AND connamespace = $2 AND NOT condeferrable LIMIT 1",
        &[constraint.name.as_str().into(), constraint.namespace.into()],
    )?;
    Ok(!namesakes.is_empty())
}

/// Runs a statement on the backlog with the rights of its owner; returns how many rows it found.
fn run_as_owner(
    db: &Db<'_>,
    statement: &'static Statement,
    arguments: &[DatumWithOid<'_>],
) -> Result<usize> {
    as_owner(db, |db| Ok(db.run(statement, arguments)?.len()))
}

/// Does `work` with the rights of the backlog's owner.
pub(super) fn as_owner<R>(db: &Db<'_>, work: impl FnOnce(&Db<'_>) -> Result<R>) -> Result<R> {
    // The catalogue is read before acting as the owner, who may not read it all.
    let catalog = db.catalog()?;
    let _acting = match &catalog.backlog {
        Some(backlog) => Some(db.act_as(Role(backlog.owner), &backlog.search_path)?),
        None => None,
    };
    work(db)
}

static TITLE: Statement = Statement::new(
    |c| {
        format!(
            "SELECT pg_catalog.left(title, {MOST_SHOWN}) FROM {}.v_directives WHERE sd_id = $1",
            c.schema
        )
    },
    &[TEXTOID],
);

/// An SD's title, as much of it as is shown.
pub fn title(db: &Db<'_>, sd_id: &str) -> Result<Option<String>> {
    match db.first_row(&TITLE, &[sd_id.into()])? {
        Some(row) => row.text(1),
        None => Ok(None),
    }
}
