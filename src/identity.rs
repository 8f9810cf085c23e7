//! Who calls, and acting as somebody else.
//!
//! No function of the extension's is SECURITY DEFINER: each is entered with the rights of the role that executes the
//! call, which is the caller, and takes those of the extension's owner inside. So `SET ROLE` counts, a SECURITY DEFINER
//! function of a team's own acts for its owner, and whatever the server runs for somebody else, such as a function in
//! an index while that is being built, acts for the role that the server runs it as.

use std::cell::Cell;
use std::ffi::CStr;

use pgrx::pg_sys;

use crate::error::{ClaimError, Result};
use crate::local_settings::LocalSettings;

/// A role: by its number, as a name may be given to another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Role(pub pg_sys::Oid);

impl Role {
    /// What no role is.
    pub const NOBODY: Self = Self(pg_sys::Oid::INVALID);

    /// The role of that name, if there is one.
    pub fn named(name: &CStr) -> Option<Self> {
        // SAFETY: looks the name up in the catalogue; invalid where there is none.
        let role = unsafe { pg_sys::get_role_oid(name.as_ptr(), true) };
        (role != pg_sys::Oid::INVALID).then_some(Self(role))
    }

    /// Whether `role` has the rights of this one.
    pub fn is_had_by(self, role: Self) -> bool {
        // SAFETY: reads the catalogues of roles.
        unsafe { pg_sys::has_privs_of_role(role.0, self.0) }
    }

    /// Whether there is such a role (still).
    pub fn exists(self) -> bool {
        // SAFETY: as in `name`.
        unsafe { !pg_sys::GetUserNameFromId(self.0, true).is_null() }
    }

    /// Its present name; its number if it has been dropped.
    pub fn name(self) -> String {
        // SAFETY: with `noerr` true GetUserNameFromId returns a palloc'd, null-terminated string, or
        // null for an unknown role.
        unsafe {
            let name = pg_sys::GetUserNameFromId(self.0, true);
            if name.is_null() {
                return self.0.to_u32().to_string();
            }
            CStr::from_ptr(name).to_string_lossy().into_owned()
        }
    }
}

thread_local! {
    /// Whether a role may have been renamed since somebody asked.
    static RENAMED: Cell<bool> = const { Cell::new(false) };
}

/// Asks the server to tell of changed roles.
pub fn watch_renames() {
    // SAFETY: runs once in a process; the callback lives as long as the library, and sets a variable.
    unsafe {
        pg_sys::CacheRegisterSyscacheCallback(
            pg_sys::SysCacheIdentifier::AUTHOID as i32,
            Some(role_changed),
            pg_sys::Datum::null(),
        );
    }
}

extern "C-unwind" fn role_changed(_: pg_sys::Datum, _: i32, _: u32) {
    RENAMED.set(true);
}

/// Whether a role may have been renamed since this was asked before.
pub fn take_renamed() -> bool {
    RENAMED.replace(false)
}

/// For whom the rights of the extension's owner were taken.
#[derive(Clone, Copy)]
struct Call {
    extension_owner: pg_sys::Oid,
    caller: Role,
}

thread_local! {
    /// The call that runs, unless that has set off code of somebody else's.
    static CALL: Cell<Option<Call>> = const { Cell::new(None) };
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
        let search_path = LocalSettings::new(&[(c"search_path", SEARCH_PATH)]);
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

/// The rights of a relation's owner until it is dropped: for functions of the server's that ask for rights on
/// it, and run nobody's code.
pub struct AsOwner(Rights);

impl AsOwner {
    /// Begins. Nothing changes where there is no such relation.
    pub fn of(relation: pg_sys::Oid) -> Self {
        let before = Rights::current();
        // SAFETY: reads the relation's entry in the catalogue.
        let owner = unsafe {
            let entry =
                pg_sys::SearchSysCache1(pg_sys::SysCacheIdentifier::RELOID as i32, relation.into());
            if entry.is_null() {
                before.role
            } else {
                let owner =
                    (*pg_sys::GETSTRUCT(entry).cast::<pg_sys::FormData_pg_class>()).relowner;
                pg_sys::ReleaseSysCache(entry);
                owner
            }
        };
        let flags = pg_sys::SECURITY_LOCAL_USERID_CHANGE as i32;
        Rights { role: owner, context: before.context | flags }.set();
        Self(before)
    }
}

impl Drop for AsOwner {
    fn drop(&mut self) {
        self.0.set();
    }
}

/// Whether this process acts as the extension's owner, with the search_path that goes with it.
pub fn is_acting() -> bool {
    let current = Rights::current().role;
    // SAFETY: the setting is a null-terminated text, or null before it is set.
    let search_path = unsafe {
        let setting = pg_sys::namespace_search_path;
        if setting.is_null() { c"" } else { std::ffi::CStr::from_ptr(setting) }
    };
    CALL.get().is_some_and(|call| call.extension_owner == current) && search_path == SEARCH_PATH
}

/// A search_path in which nobody else can put anything.
const SEARCH_PATH: &std::ffi::CStr = c"pg_catalog, pg_temp";

/// The role whose rights this process has right now.
pub fn current() -> Role {
    Role(Rights::current().role)
}

/// The function that the server has called.
pub fn running(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Oid {
    // SAFETY: the server calls with a description of the function.
    unsafe { (*(*fcinfo).flinfo).fn_oid }
}

/// The calling role: the one with whose rights the function was entered.
pub fn caller() -> Role {
    let current = Rights::current().role;
    match CALL.get() {
        Some(call) if call.extension_owner == current => call.caller,
        _ => Role(current),
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
    call: Option<Call>,
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
            call: CALL.replace(None),
            before: BEFORE.replace(Some(rights)),
            rights,
            _search_path: search_path,
        }
    }
}

impl ActingAs {
    /// Acts as the owner of `function`, which is one of the extension's, with a search_path in which nobody else can put
    /// anything. Whoever has the rights until then is the caller; where a statement or write of the extension's has set off
    /// a trigger of its own, whoever called before.
    pub fn extension_owner(function: pg_sys::Oid) -> Result<Self> {
        let search_path = own_settings();
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
        let call = Call { extension_owner: owner, caller: caller() };
        let rights = Rights::current();
        let flags = pg_sys::SECURITY_LOCAL_USERID_CHANGE as i32;
        Rights { role: owner, context: rights.context | flags }.set();
        Ok(Self {
            call: CALL.replace(Some(call)),
            before: BEFORE.replace(None),
            rights,
            _search_path: search_path,
        })
    }
}

/// What the extension's own statements are written for, and the answers of the server's functions that they compare. What
/// is so already is not set: each setting takes its time.
fn own_settings() -> LocalSettings {
    let mut settings = vec![(c"search_path", SEARCH_PATH)];
    // SAFETY: both read settings of this process's.
    unsafe {
        if pg_sys::quote_all_identifiers {
            settings.push((c"quote_all_identifiers", c"off"));
        }
        if !pg_sys::standard_conforming_strings {
            settings.push((c"standard_conforming_strings", c"on"));
        }
    }
    LocalSettings::keeping_others(&settings)
}

impl Drop for ActingAs {
    fn drop(&mut self) {
        CALL.set(self.call);
        BEFORE.set(self.before);
        self.rights.set();
    }
}
