//! Where an error of the server's came from: all that the server says of it, and nothing of Rust.
//!
//! pgrx catches an error that passes through Rust and raises it again at the end. On the way it drops the CONTEXT, which
//! tells in which of a user's triggers the error was; the table, column and constraint that the error is about; and a
//! SQLSTATE that pgrx does not know. The server tells a callback of each error. The callback here remembers what the server
//! said of the first one, and says it again for the second.

use std::ffi::{CStr, c_char, c_int, c_void};

use pgrx::pg_sys;

unsafe extern "C-unwind" {
    // Variadic functions of elog.h, which pgrx keeps to itself.
    fn set_errcontext_domain(domain: *const c_char) -> c_int;
    fn errcontext_msg(format: *const c_char, ...) -> c_int;
    fn errcode(code: c_int) -> c_int;
    fn err_generic_string(field: c_int, text: *const c_char) -> c_int;
}

/// The server's node, and the last error that came from within, or null.
#[repr(C)]
struct Node {
    callback: pg_sys::ErrorContextCallback,
    error: *mut pg_sys::ErrorData,
}

/// Keeps the CONTEXT of errors until it is dropped. After an error the node stays where it is, as the error is raised
/// anew only then; the server takes its stack back to whoever catches it.
pub struct KeepsContext(*mut Node);

impl KeepsContext {
    /// Begins. The node is of the caller's memory, which lasts until the server is done with the error.
    pub fn new() -> Self {
        // SAFETY: the memory is that of the node; the server's stack is that of this process alone.
        unsafe {
            let node = pg_sys::palloc0(size_of::<Node>()).cast::<Node>();
            (*node).callback.previous = pg_sys::error_context_stack;
            (*node).callback.callback = Some(tell);
            (*node).callback.arg = node.cast();
            pg_sys::error_context_stack = &raw mut (*node).callback;
            Self(node)
        }
    }
}

impl Drop for KeepsContext {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        // SAFETY: whoever has come after it is gone by now.
        unsafe {
            pg_sys::error_context_stack = (*self.0).callback.previous;
            pg_sys::pfree(self.0.cast());
        }
    }
}

/// The server's stack of nodes, as it was: whoever catches an error takes it back, as the memory of those that have come
/// since goes with the error.
pub struct Stack(*mut pg_sys::ErrorContextCallback);

impl Stack {
    /// As it is now.
    pub fn now() -> Self {
        // SAFETY: a variable of this process's.
        Self(unsafe { pg_sys::error_context_stack })
    }

    /// As it was then.
    pub fn restore(&self) {
        // SAFETY: a variable of this process's; those who were there then are still there.
        unsafe { pg_sys::error_context_stack = self.0 };
    }
}

/// Called by the server for each error, warning and notice, from the innermost node outwards.
unsafe extern "C-unwind" fn tell(node: *mut c_void) {
    // SAFETY: the server gives the node, whose memory is there as long as it is on its stack, and is telling of an
    // error, which can be copied.
    unsafe {
        let node = &mut *node.cast::<Node>();
        let before = pg_sys::MemoryContextSwitchTo(pg_sys::GetMemoryChunkContext(
            std::ptr::from_mut(node).cast(),
        ));
        let error = pg_sys::CopyErrorData();
        let is_error = (*error).elevel >= pgrx::PgLogLevel::ERROR as i32;
        if is_error && !(*error).context.is_null() && !(*error).message.is_null() {
            // From within: it is on its way here.
            node.error = error;
        } else {
            if is_error && !node.error.is_null() && is_same((*node.error).message, (*error).message)
            {
                pg_sys::MemoryContextSwitchTo(before);
                say_again(&*node.error);
            }
            pg_sys::FreeErrorData(error);
        }
        pg_sys::MemoryContextSwitchTo(before);
    }
}

/// # Safety
/// The server must be telling of an error; `error` is a copy of one.
unsafe fn say_again(error: &pg_sys::ErrorData) {
    // SAFETY: as promised; the strings of a copy are null or null-terminated, and the server copies them.
    unsafe {
        errcode(error.sqlerrcode);
        for (field, text) in [
            (pg_sys::PG_DIAG_SCHEMA_NAME, error.schema_name),
            (pg_sys::PG_DIAG_TABLE_NAME, error.table_name),
            (pg_sys::PG_DIAG_COLUMN_NAME, error.column_name),
            (pg_sys::PG_DIAG_DATATYPE_NAME, error.datatype_name),
            (pg_sys::PG_DIAG_CONSTRAINT_NAME, error.constraint_name),
        ] {
            if !text.is_null() {
                err_generic_string(field as c_int, text);
            }
        }
        set_errcontext_domain(std::ptr::null());
        errcontext_msg(c"%s".as_ptr(), error.context);
    }
}

/// # Safety
/// Each is null or a null-terminated string.
unsafe fn is_same(one: *const c_char, other: *const c_char) -> bool {
    // SAFETY: as promised.
    unsafe { !one.is_null() && !other.is_null() && CStr::from_ptr(one) == CStr::from_ptr(other) }
}

/// Where the environment asks Rust for backtraces, pgrx would put one into each error's DETAIL. Whether it does so is
/// decided once in this library, here, and the environment is as before.
pub fn keep_backtraces_out() {
    const ASKED_BY: [&str; 2] = ["RUST_BACKTRACE", "RUST_LIB_BACKTRACE"];
    let before = ASKED_BY.map(|name| (name, std::env::var_os(name)));
    // SAFETY: runs once in each process, in _PG_init, where there is no other thread.
    unsafe {
        ASKED_BY.iter().for_each(|name| std::env::set_var(name, "0"));
        drop(std::backtrace::Backtrace::capture());
        for (name, value) in before {
            match value {
                Some(value) => std::env::set_var(name, value),
                None => std::env::remove_var(name),
            }
        }
    }
}
