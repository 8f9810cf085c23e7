//! Who calls, and acting as somebody else.
//!
//! The functions are SECURITY DEFINER, so `current_user` is the extension's owner inside them. The
//! caller is the outer role: the login role, or the one that it chose with SET ROLE.

use pgrx::pg_sys;

/// The calling role's name.
pub fn caller() -> String {
    // SAFETY: GetOuterUserId has no preconditions in a transaction; with `noerr` false
    // GetUserNameFromId returns a palloc'd, null-terminated string or raises an error.
    unsafe {
        let name = pg_sys::GetUserNameFromId(pg_sys::GetOuterUserId(), false);
        std::ffi::CStr::from_ptr(name).to_string_lossy().into_owned()
    }
}

/// Acts as another role until it is dropped.
pub struct ActingAs {
    role: pg_sys::Oid,
    context: i32,
    settings: i32,
}

impl ActingAs {
    /// Acts as `role`, the owner of a bound backlog in `schema`.
    ///
    /// Whatever triggers, constraints and index expressions that owner put on the table run with
    /// the owner's rights and not with those of the extension's owner, as the server itself does
    /// for foreign keys. They find unqualified names in the table's own schema: the caller's
    /// search_path would let the caller choose what runs with the owner's rights. Settings that
    /// they change are put back, or they could change what runs with the extension's. Row-level
    /// security is not applied even where it is forced on the owner, because a mirror that misses
    /// rows would lie.
    pub fn table_owner(role: pg_sys::Oid, search_path: &std::ffi::CStr) -> Self {
        let mut previous = pg_sys::Oid::INVALID;
        let mut context = 0;
        // SAFETY: the calls read and write the backend's user id, context flags and settings; the
        // previous values are put back on drop, which runs on an error's unwinding as well. The
        // strings are null-terminated and copied by the server.
        unsafe {
            pg_sys::GetUserIdAndSecContext(&mut previous, &mut context);
            let settings = pg_sys::NewGUCNestLevel();
            pg_sys::set_config_option(
                c"search_path".as_ptr(),
                search_path.as_ptr(),
                pg_sys::GucContext::PGC_USERSET,
                pg_sys::GucSource::PGC_S_SESSION,
                pg_sys::GucAction::GUC_ACTION_SAVE,
                true,
                0,
                false,
            );
            pg_sys::SetUserIdAndSecContext(
                role,
                context
                    | pg_sys::SECURITY_LOCAL_USERID_CHANGE as i32
                    | pg_sys::SECURITY_NOFORCE_RLS as i32,
            );
            Self { role: previous, context, settings }
        }
    }
}

impl Drop for ActingAs {
    fn drop(&mut self) {
        // SAFETY: puts back what `table_owner` found. After an error the abort of the transaction or
        // savepoint puts the settings back itself.
        unsafe {
            pg_sys::SetUserIdAndSecContext(self.role, self.context);
            if !std::thread::panicking() {
                pg_sys::AtEOXact_GUC(false, self.settings);
            }
        }
    }
}
