//! Who calls, and acting as somebody else.
//!
//! The functions are SECURITY DEFINER, or take the rights of the extension's owner for their statements, so
//! `current_user` is that owner inside them. The caller is the outer role: the login role, or the one that
//! it chose with SET ROLE.

use std::cell::Cell;

use pgrx::pg_sys;

use crate::error::{ClaimError, Result};
use crate::local_settings::LocalSettings;

/// A role: by its number, as a name may be given to another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Role(pub pg_sys::Oid);

impl Role {
    /// Its present name; its number if it has been dropped.
    pub fn name(self) -> String {
        // SAFETY: with `noerr` true GetUserNameFromId returns a palloc'd, null-terminated string, or
        // null for an unknown role.
        unsafe {
            let name = pg_sys::GetUserNameFromId(self.0, true);
            if name.is_null() {
                return self.0.to_u32().to_string();
            }
            std::ffi::CStr::from_ptr(name).to_string_lossy().into_owned()
        }
    }
}

thread_local! {
    /// The backlog's owner, while its triggers may be running.
    static ACTING: Cell<Option<pg_sys::Oid>> = const { Cell::new(None) };
}

/// The calling role.
///
/// Code that a backlog's owner has put on the table calls as that owner, whoever has set it off.
/// Where the server runs code of users' for somebody else, such as a function in an index while
/// that is being built or analysed, the outer role is not the caller, and there is no telling who
/// is: then this is an error.
pub fn caller() -> Result<Role> {
    // SAFETY: neither has preconditions in a transaction.
    unsafe {
        if let Some(role) = ACTING.get() {
            return Ok(Role(role));
        }
        if pg_sys::InSecurityRestrictedOperation() {
            return Err(ClaimError::Restricted);
        }
        Ok(Role(pg_sys::GetOuterUserId()))
    }
}

/// What the acting may not do. Until PostgreSQL 18 a deferred trigger runs with the rights of whoever
/// commits, be it the worker; in a security-restricted operation the server refuses to defer any.
#[cfg(not(feature = "pg18"))]
const RESTRICTION: i32 = pg_sys::SECURITY_RESTRICTED_OPERATION as i32;
#[cfg(feature = "pg18")]
const RESTRICTION: i32 = 0;

/// Acts as another role until it is dropped.
pub struct ActingAs {
    acting: Option<pg_sys::Oid>,
    role: pg_sys::Oid,
    context: i32,
    _search_path: LocalSettings,
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
        let search_path = LocalSettings::new(&[(c"search_path", search_path)]);
        // SAFETY: the calls read and write the backend's user id and context flags; the previous values
        // are put back on drop, which runs on an error's unwinding as well.
        unsafe {
            pg_sys::GetUserIdAndSecContext(&mut previous, &mut context);
            pg_sys::SetUserIdAndSecContext(
                role,
                context
                    | RESTRICTION
                    | pg_sys::SECURITY_LOCAL_USERID_CHANGE as i32
                    | pg_sys::SECURITY_NOFORCE_RLS as i32,
            );
            let acting = ACTING.replace(Some(role));
            Self { acting, role: previous, context, _search_path: search_path }
        }
    }
}

impl ActingAs {
    /// Acts as the extension's owner, as a function does that is SECURITY DEFINER with a search_path of
    /// its own. For functions that mostly do without: the server sets both up for every call.
    pub fn extension_owner(function: pg_sys::Oid) -> Result<Self> {
        let search_path =
            LocalSettings::keeping_others(&[(c"search_path", c"pg_catalog, pg_temp")]);
        let mut previous = pg_sys::Oid::INVALID;
        let mut context = 0;
        // SAFETY: reads the function's entry in the catalogue, which is there while it runs; then as in
        // `table_owner`.
        unsafe {
            let entry = pg_sys::SearchSysCache1(
                pg_sys::SysCacheIdentifier::PROCOID as i32,
                function.into(),
            );
            if entry.is_null() {
                return Err(ClaimError::NotInstalled);
            }
            let owner = (*pg_sys::GETSTRUCT(entry).cast::<pg_sys::FormData_pg_proc>()).proowner;
            pg_sys::ReleaseSysCache(entry);
            pg_sys::GetUserIdAndSecContext(&mut previous, &mut context);
            pg_sys::SetUserIdAndSecContext(
                owner,
                context | pg_sys::SECURITY_LOCAL_USERID_CHANGE as i32,
            );
        }
        let acting = ACTING.get();
        Ok(Self { acting, role: previous, context, _search_path: search_path })
    }
}

impl Drop for ActingAs {
    fn drop(&mut self) {
        ACTING.set(self.acting);
        // SAFETY: puts back what `table_owner` or `extension_owner` found.
        unsafe { pg_sys::SetUserIdAndSecContext(self.role, self.context) };
    }
}
