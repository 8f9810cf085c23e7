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
}

impl ActingAs {
    /// Acts as `role`, the owner of a bound backlog.
    ///
    /// Whatever triggers, constraints and index expressions that owner put on the table run with
    /// the owner's rights and not with those of the extension's owner, as the server itself does
    /// for foreign keys. Row-level security is not applied even where it is forced on the owner,
    /// because a mirror that misses rows would lie.
    pub fn table_owner(role: pg_sys::Oid) -> Self {
        let mut previous = pg_sys::Oid::INVALID;
        let mut context = 0;
        // SAFETY: both calls only read and write the backend's user id and context flags; the
        // previous values are put back on drop, which runs on an error's unwinding as well.
        unsafe {
            pg_sys::GetUserIdAndSecContext(&mut previous, &mut context);
            pg_sys::SetUserIdAndSecContext(
                role,
                context
                    | pg_sys::SECURITY_LOCAL_USERID_CHANGE as i32
                    | pg_sys::SECURITY_NOFORCE_RLS as i32,
            );
        }
        Self { role: previous, context }
    }
}

impl Drop for ActingAs {
    fn drop(&mut self) {
        // SAFETY: puts back what `table_owner` found.
        unsafe { pg_sys::SetUserIdAndSecContext(self.role, self.context) }
    }
}
