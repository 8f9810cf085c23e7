//! Settings of the server's that hold while something is done.

use std::ffi::CStr;

use pgrx::pg_sys;

/// Settings that hold until this is dropped. Whatever others are changed meanwhile are put back as well.
pub struct LocalSettings {
    level: i32,
}

impl LocalSettings {
    /// Gives each setting its value.
    pub fn new(settings: &[(&CStr, &CStr)]) -> Self {
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
            Self { level }
        }
    }
}

impl Drop for LocalSettings {
    fn drop(&mut self) {
        // After an error the abort of the transaction or savepoint does it.
        if !std::thread::panicking() {
            // SAFETY: ends the level that `new` began.
            unsafe { pg_sys::AtEOXact_GUC(false, self.level) };
        }
    }
}
