//! One xtask at a time in a checkout.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};

use anyhow::{Context, Result, bail};
use fs4::fs_std::FileExt;

use crate::layout::Layout;

/// Held while a command sets up or runs servers. The system releases it with the process, so a
/// killed run leaves nothing locked.
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock, or says who has it.
    pub fn take(layout: &Layout) -> Result<Self> {
        let path = layout.target().join("xtask.lock");
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&path)
            .with_context(|| format!("could not open {}", path.display()))?;
        if !FileExt::try_lock_exclusive(&file)? {
            let mut holder = String::new();
            file.read_to_string(&mut holder)?;
            bail!(
                "another cargo xtask (process {}) is at work in this checkout; wait for it or stop it",
                holder.trim()
            );
        }
        file.set_len(0)?;
        file.rewind()?;
        writeln!(file, "{}", std::process::id())?;
        Ok(Self { _file: file })
    }
}
