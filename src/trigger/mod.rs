//! The triggers. They keep everything that is derived from claude_sessions in step with it, for
//! direct writes as for the functions.

pub mod board;
pub mod directive;
pub mod guard;
pub mod history;
pub mod mirror;
pub mod session;

use std::cell::RefCell;
use std::collections::HashMap;
use std::convert::Infallible;
use std::num::NonZeroUsize;

use pgrx::datum::UnboxDatum;
use pgrx::heap_tuple::PgHeapTuple;
use pgrx::{AllocatedByRust, FromDatum, IntoDatum, PgTrigger, WhoAllocated, pg_sys};

use crate::error::{ClaimError, Result};
use chrono::{DateTime, Utc};
use pgrx::datum::TimestampWithTimeZone;

use crate::spi::time;

/// What a trigger function gives back; errors are raised inside.
type Row<'a> = Result<Option<PgHeapTuple<'a, AllocatedByRust>>, Infallible>;

/// Runs a trigger's work, raising its error with SQLSTATE, DETAIL and HINT intact.
fn run<'a>(work: impl FnOnce() -> Result<Option<PgHeapTuple<'a, AllocatedByRust>>>) -> Row<'a> {
    match work() {
        Ok(row) => Ok(row),
        Err(error) => error.raise(),
    }
}

/// The columns of a claude_sessions row that the triggers look at.
#[derive(Debug, Clone, PartialEq)]
struct SessionRow {
    session_id: String,
    sd_id: Option<String>,
    claim_id: Option<i64>,
    claimed_at: Option<DateTime<Utc>>,
    track: Option<String>,
    status: String,
    released_at: Option<DateTime<Utc>>,
    release_reason: Option<String>,
    lost_claim_id: Option<i64>,
    lost_to: Option<String>,
    heartbeat_at: Option<DateTime<Utc>>,
    stale_noted_for: Option<DateTime<Utc>>,
}

impl SessionRow {
    fn read<A: WhoAllocated>(tuple: &PgHeapTuple<'_, A>) -> Result<Self> {
        let text = |name: &'static str| -> Result<Option<String>> { column(tuple, name) };
        let instant = |name: &'static str| -> Result<Option<DateTime<Utc>>> {
            Ok(column::<TimestampWithTimeZone, A>(tuple, name)?.map(time::from_server))
        };
        // Before the row is written its NOT NULL constraints have not been checked yet.
        let not_null = |what: &'static str| move || ClaimError::Corrupt { what };
        Ok(Self {
            session_id: text("session_id")?.ok_or_else(not_null("claude_sessions.session_id"))?,
            sd_id: text("sd_id")?,
            claim_id: column(tuple, "claim_id")?,
            claimed_at: instant("claimed_at")?,
            track: text("track")?,
            status: text("status")?.ok_or_else(not_null("claude_sessions.status"))?,
            released_at: instant("released_at")?,
            release_reason: text("release_reason")?,
            lost_claim_id: column(tuple, "lost_claim_id")?,
            lost_to: text("lost_to")?,
            heartbeat_at: instant("heartbeat_at")?,
            stale_noted_for: instant("stale_noted_for")?,
        })
    }

    /// The SD and the acquisition that the row holds.
    fn claim(&self) -> Option<(&str, i64)> {
        self.sd_id.as_deref().zip(self.claim_id)
    }
}

thread_local! {
    /// Where the columns of claude_sessions are. They were made with the table and stay there.
    static POSITIONS: RefCell<HashMap<&'static str, NonZeroUsize>> = RefCell::new(HashMap::new());
}

/// A column of a claude_sessions row.
fn column<'t, T, A: WhoAllocated>(
    tuple: &'t PgHeapTuple<'_, A>,
    name: &'static str,
) -> Result<Option<T>>
where
    T: FromDatum + IntoDatum + UnboxDatum<As<'t> = T> + 't,
{
    let known = POSITIONS.with_borrow(|positions| positions.get(name).copied());
    let position = match known {
        Some(position) => position,
        None => {
            let (position, _) = tuple
                .get_attribute_by_name(name)
                .ok_or(ClaimError::Corrupt { what: "claude_sessions" })?;
            POSITIONS.with_borrow_mut(|positions| positions.insert(name, position));
            position
        }
    };
    Ok(tuple.get_by_index(position)?)
}

/// OLD and NEW, as far as the operation has them.
fn session_rows<'a>(
    trigger: &'a PgTrigger<'a>,
) -> Result<(Option<SessionRow>, Option<SessionRow>)> {
    let old = trigger.old().map(|tuple| SessionRow::read(&tuple)).transpose()?;
    let new = trigger.new().map(|tuple| SessionRow::read(&tuple)).transpose()?;
    Ok((old, new))
}

/// Whether a dump is being restored, whose rows bring along what belongs to them. Every script of
/// pg_dump's begins by turning check_function_bodies and row_security off and warnings on, which
/// nobody else does around writes; and a restore is run by whoever may do everything to the extension's
/// tables anyway, which for a trigger that runs as their owner is the current user.
fn is_restoring() -> bool {
    // SAFETY: reads settings of this backend and asks about its roles.
    unsafe {
        !pg_sys::check_function_bodies
            && !pg_sys::row_security
            && pg_sys::client_min_messages == pg_sys::WARNING as i32
            && pg_sys::has_privs_of_role(pg_sys::GetOuterUserId(), pg_sys::GetUserId())
    }
}

/// Which of a trigger's two rows.
#[derive(Clone, Copy)]
enum Side {
    Old,
    New,
}

/// A column of any type as text.
fn text_of(trigger: &PgTrigger<'_>, side: Side, column: &str) -> Result<Option<String>> {
    let data = trigger.trigger_data();
    let is_update = trigger.old().is_some() && trigger.new().is_some();
    let tuple = match side {
        Side::New if is_update => data.tg_newtuple,
        Side::New | Side::Old => data.tg_trigtuple,
    };
    let gone = || ClaimError::ColumnGone {
        table: trigger.table_name().unwrap_or_default(),
        column: column.to_owned(),
    };
    let name = std::ffi::CString::new(column).map_err(|_| gone())?;
    // SAFETY: in a row trigger the server gives a valid relation and tuples of its row type;
    // SPI_getvalue returns a palloc'd, null-terminated string, or null for NULL (SPI_fnumber's
    // error codes are not positive).
    unsafe {
        let descriptor = (*data.tg_relation).rd_att;
        let number = pg_sys::SPI_fnumber(descriptor, name.as_ptr());
        if number <= 0 {
            return Err(gone());
        }
        let value = pg_sys::SPI_getvalue(tuple, descriptor, number);
        if value.is_null() {
            return Ok(None);
        }
        Ok(Some(std::ffi::CStr::from_ptr(value).to_string_lossy().into_owned()))
    }
}
