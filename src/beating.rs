//! `RESET ALL` and `DISCARD ALL` end a connection's heartbeat.
//!
//! A pool resets a connection when a client gives it back. The connection is nobody's then, and the server would go on
//! beating for a session that is gone. PostgreSQL tells an extension of a reset only by resetting the extension's settings.
//! So this file has a setting that is on while the server beats for the connection.

use std::cell::Cell;
use std::ffi::{CStr, c_void};

use pgrx::{GucContext, GucFlags, GucRegistry, GucSetting, pg_sys};

use crate::api::shared;
use crate::error::Result;
use crate::identity::ActingAs;
use crate::pg::time;
use crate::pg::transaction::{self, End};
use crate::spi::Db;
use crate::spi::manager::{self, Connection};

const NAME: &CStr = c"pg_claims.heartbeat_active";

static IS_ACTIVE: GucSetting<bool> = GucSetting::<bool>::new(false);

thread_local! {
    /// Whether this process itself is changing the setting.
    static IS_CHANGING: Cell<bool> = const { Cell::new(false) };
    /// What it is.
    static IS_ON: Cell<bool> = const { Cell::new(false) };
    /// The function that began the heartbeat: what its end takes has the rights of that function's owner.
    static BEGUN_BY: Cell<Option<pg_sys::Oid>> = const { Cell::new(None) };
    /// Whether the setting was reset since, so that the heartbeat is to end with this transaction.
    static IS_ENDED: Cell<bool> = const { Cell::new(false) };
}

/// Declares the setting.
pub fn init() {
    // SAFETY: runs once in each process, in _PG_init; the hooks live as long as the library.
    unsafe {
        GucRegistry::define_bool_guc_with_hooks(
            NAME,
            c"Shows whether the server beats for this connection.",
            c"start_heartbeat() sets it, stop_heartbeat(), RESET ALL and DISCARD ALL reset it.",
            &IS_ACTIVE,
            GucContext::Userset,
            GucFlags::DISALLOW_IN_FILE,
            Some(check),
            Some(assign),
            None,
        );
    }
    transaction::at_end(transaction_ends);
}

/// Refuses the setting to everybody but this file.
unsafe extern "C-unwind" fn check(
    value: *mut bool,
    _extra: *mut *mut c_void,
    _source: pg_sys::GucSource::Type,
) -> bool {
    // A parallel worker gets the settings of the process that it works for.
    // SAFETY: the server gives the new value; the flag is this process's.
    unsafe { !*value || IS_CHANGING.get() || pg_sys::InitializingParallelWorker }
}

unsafe extern "C-unwind" fn assign(value: bool, _extra: *mut c_void) {
    // A rollback brings it back.
    IS_ENDED.set(IS_ON.get() && !value && !IS_CHANGING.get());
    IS_ON.set(value);
}

/// The server beats for this connection from now on, which `function` has begun.
pub fn begin(function: pg_sys::Oid) {
    BEGUN_BY.set(Some(function));
    set(c"on");
}

/// The server stops beating for this connection.
pub fn end() {
    set(c"off");
}

fn set(value: &CStr) {
    IS_CHANGING.set(true);
    // SAFETY: both strings are null-terminated, and copied by the server; a value that it knows is no error.
    unsafe {
        pg_sys::set_config_option(
            NAME.as_ptr(),
            value.as_ptr(),
            pg_sys::GucContext::PGC_USERSET,
            pg_sys::GucSource::PGC_S_SESSION,
            pg_sys::GucAction::GUC_ACTION_SET,
            true,
            0,
            false,
        );
    }
    IS_CHANGING.set(false);
}

fn transaction_ends(end: End) {
    if end != End::PreCommit || !IS_ENDED.get() {
        return;
    }
    // Where nothing can be written, the next transaction does it.
    if time::is_read_only() {
        return;
    }
    IS_ENDED.set(false);
    if let Err(error) = stop() {
        error.raise();
    }
}

/// Forgets the connection. Runs just before the commit, the last moment at which a transaction may write.
fn stop() -> Result<()> {
    shared::bind(None);
    // If somebody has dropped the extension since, nothing is left to stop.
    let Some(function) = BEGUN_BY.take().filter(|function| is_there(*function)) else {
        return Ok(());
    };
    // SAFETY: the transaction goes on until the callbacks have run.
    unsafe { pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot()) };
    let acting = ActingAs::extension_owner(function)?;
    Db::within(|db| {
        db.refuse_foreign_code()?;
        manager::stop(db, Connection::own())
    })?;
    drop(acting);
    // SAFETY: the snapshot is that from above.
    unsafe { pg_sys::PopActiveSnapshot() };
    Ok(())
}

fn is_there(function: pg_sys::Oid) -> bool {
    // SAFETY: looks the function up in the catalogue.
    unsafe { !pg_sys::get_func_name(function).is_null() }
}
