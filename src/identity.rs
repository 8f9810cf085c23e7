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
    /// The rights from before that, while nobody has taken the extension's again.
    static BEFORE: Cell<Option<Rights>> = const { Cell::new(None) };
}

/// A role and the server's flags that say what it may do.
#[derive(Clone, Copy)]
struct Rights {
    role: pg_sys::Oid,
    context: i32,
}

impl Rights {
    fn current() -> Self {
        let mut rights = Self { role: pg_sys::Oid::INVALID, context: 0 };
        // SAFETY: reads the backend's user id and context flags.
        unsafe { pg_sys::GetUserIdAndSecContext(&mut rights.role, &mut rights.context) };
        rights
    }

    fn set(self) {
        // SAFETY: whoever calls puts back what was before, on an error's unwinding as well.
        unsafe { pg_sys::SetUserIdAndSecContext(self.role, self.context) };
    }
}

/// The rights from before acting as a backlog's owner, until it is dropped: for what that owner may not read. With
/// them goes a search_path of the server's own names, as that owner has objects in the one that the acting has.
pub struct Unacting {
    rights: Rights,
    _search_path: LocalSettings,
}

impl Unacting {
    /// Begins; `None` where nobody is acting.
    pub fn new() -> Option<Self> {
        let before = BEFORE.get()?;
        let search_path = LocalSettings::new(&[(c"search_path", c"pg_catalog, pg_temp")]);
        let rights = Rights::current();
        before.set();
        Some(Self { rights, _search_path: search_path })
    }
}

impl Drop for Unacting {
    fn drop(&mut self) {
        self.rights.set();
    }
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
    before: Option<Rights>,
    rights: Rights,
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
        let search_path = LocalSettings::new(&[(c"search_path", search_path)]);
        let rights = Rights::current();
        let flags = RESTRICTION
            | pg_sys::SECURITY_LOCAL_USERID_CHANGE as i32
            | pg_sys::SECURITY_NOFORCE_RLS as i32;
        Rights { role, context: rights.context | flags }.set();
        Self {
            acting: ACTING.replace(Some(role)),
            before: BEFORE.replace(Some(rights)),
            rights,
            _search_path: search_path,
        }
    }
}

impl ActingAs {
    /// Acts as the extension's owner, as a function does that is SECURITY DEFINER with a search_path of
    /// its own. For functions that mostly do without: the server sets both up for every call.
    pub fn extension_owner(function: pg_sys::Oid) -> Result<Self> {
        let search_path =
            LocalSettings::keeping_others(&[(c"search_path", c"pg_catalog, pg_temp")]);
        // SAFETY: reads the function's entry in the catalogue, which is there while it runs.
        let owner = unsafe {
            let entry = pg_sys::SearchSysCache1(
                pg_sys::SysCacheIdentifier::PROCOID as i32,
                function.into(),
            );
            if entry.is_null() {
                return Err(ClaimError::NotInstalled);
            }
            let owner = (*pg_sys::GETSTRUCT(entry).cast::<pg_sys::FormData_pg_proc>()).proowner;
            pg_sys::ReleaseSysCache(entry);
            owner
        };
        let rights = Rights::current();
        let flags = pg_sys::SECURITY_LOCAL_USERID_CHANGE as i32;
        Rights { role: owner, context: rights.context | flags }.set();
        Ok(Self {
            acting: ACTING.get(),
            before: BEFORE.replace(None),
            rights,
            _search_path: search_path,
        })
    }
}

impl Drop for ActingAs {
    fn drop(&mut self) {
        ACTING.set(self.acting);
        BEFORE.set(self.before);
        self.rights.set();
    }
}
