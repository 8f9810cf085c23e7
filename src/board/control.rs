//! The server's control file: which server this is, and how it was shut down.

use pgrx::pg_sys;

use crate::attempt::{caught, message_of};

/// How the server stands, by its control file.
pub struct Control {
    /// Which server this is, with all copies of its data folder.
    pub system: u64,
    /// The timeline that it is on.
    pub timeline: u32,
    /// Where its last checkpoint lies, which after a shutdown is that shutdown's.
    pub checkpoint: u64,
    /// Whether it has been shut down in an orderly way, and not as a standby.
    pub is_shut_down: bool,
}

impl Control {
    /// Reads the file, or says why it cannot be read.
    pub fn read() -> Result<Self, String> {
        let read = caught(|| {
            let mut is_whole = false;
            // SAFETY: the name of the data folder is set before the library is loaded. The answer is the caller's to
            // free, and never null. An error, which is caught, leaves nothing behind but memory.
            let control = unsafe {
                let file = pg_sys::get_controlfile(pg_sys::DataDir, &mut is_whole);
                let control = Self {
                    system: (*file).system_identifier,
                    timeline: (*file).checkPointCopy.ThisTimeLineID,
                    checkpoint: (*file).checkPoint,
                    is_shut_down: (*file).state == pg_sys::DBState::DB_SHUTDOWNED,
                };
                pg_sys::pfree(file.cast());
                control
            };
            Ok(is_whole.then_some(control))
        });
        match read {
            Ok(control) => control.ok_or_else(|| "its checksum is wrong".to_owned()),
            Err(error) => Err(message_of(&error)),
        }
    }
}
