//! Settings of the server's that hold while something is done.

use std::ffi::CStr;

use pgrx::pg_sys;

/// Settings that hold until this is dropped.
pub struct LocalSettings {
    level: i32,
    keeps_others: bool,
}

impl LocalSettings {
    /// Gives each setting its value. Whatever others are changed meanwhile are put back as well.
    pub fn new(settings: &[(&CStr, &CStr)]) -> Self {
        Self::with(settings, false)
    }

    /// The same, but others stay as they are changed, as after a function of the server's with settings of
    /// its own.
    pub fn keeping_others(settings: &[(&CStr, &CStr)]) -> Self {
        Self::with(settings, true)
    }

    fn with(settings: &[(&CStr, &CStr)], keeps_others: bool) -> Self {
        // SAFETY: the strings are null-terminated and copied by the server; what was set before is put
        // back on drop.
        unsafe {
            let level = pg_sys::NewGUCNestLevel();
            for (name, value) in settings {
                pg_sys::set_config_option(
                    name.as_ptr(),
                    value.as_ptr(),
                    pg_sys::GucContext::PGC_USERSET,
                    pg_sys::GucSource::PGC_S_SESSION,
                    pg_sys::GucAction::GUC_ACTION_SAVE,
                    true,
                    0,
                    false,
                );
            }
            Self { level, keeps_others }
        }
    }
}

impl Drop for LocalSettings {
    fn drop(&mut self) {
        // After an error the abort of the transaction or savepoint does it.
        if !std::thread::panicking() {
            // SAFETY: ends the level that `with` began.
            unsafe { pg_sys::AtEOXact_GUC(self.keeps_others, self.level) };
        }
    }
}
