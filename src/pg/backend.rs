//! This process and its transaction, as the server's variables tell of them.

use std::ffi::CStr;

use pgrx::pg_sys;

/// The database that the process is connected to; set before any transaction, and never changed.
pub fn database() -> pg_sys::Oid {
    // SAFETY: reads a variable of this process's.
    unsafe { pg_sys::MyDatabaseId }
}

/// The process's number.
pub fn pid() -> i32 {
    // SAFETY: reads a variable of this process's.
    unsafe { pg_sys::MyProcPid }
}

/// When the client's statement began, in the server's microseconds: what tells one from the next.
pub fn statement() -> i64 {
    // SAFETY: reads a variable of this process's.
    unsafe { pg_sys::GetCurrentStatementStartTimestamp() }
}

/// How deep this is among savepoints; 1 outside of any.
pub fn savepoint_depth() -> i32 {
    // SAFETY: reads a variable of this process's.
    unsafe { pg_sys::GetCurrentTransactionNestLevel() }
}

/// The savepoint that this is in, or the transaction itself.
pub fn savepoint() -> pg_sys::SubTransactionId {
    // SAFETY: reads a variable of this process's.
    unsafe { pg_sys::GetCurrentSubTransactionId() }
}

/// Whether a parallel query runs, in which nothing may be written.
pub fn is_parallel() -> bool {
    // SAFETY: reads a variable of this process's.
    unsafe { pg_sys::IsInParallelMode() }
}

/// Whether an installation script runs.
pub fn is_creating_extension() -> bool {
    // SAFETY: reads a variable of this process's.
    unsafe { pg_sys::creating_extension }
}

/// Has every process hear, once this is committed, that the relation has changed.
pub fn invalidate(relation: pg_sys::Oid) {
    // SAFETY: in a transaction; a relation that is not there is an error of the server's.
    unsafe { pg_sys::CacheInvalidateRelcacheByRelid(relation) }
}

/// The relation of that name in the schema, if there is one, whatever snapshot the transaction keeps. Takes no lock.
pub fn relation(name: &CStr, schema: pg_sys::Oid) -> Option<pg_sys::Oid> {
    // SAFETY: looks a null-terminated name up in the server's caches of its catalogues.
    let relation = unsafe { pg_sys::get_relname_relid(name.as_ptr(), schema) };
    (relation != pg_sys::Oid::INVALID).then_some(relation)
}

/// The schema of a function; invalid where there is no such function.
pub fn schema_of(function: pg_sys::Oid) -> pg_sys::Oid {
    // SAFETY: looks the function up in the server's caches of its catalogues.
    unsafe { pg_sys::get_func_namespace(function) }
}
