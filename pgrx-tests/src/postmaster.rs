//! Finding a data folder's postmaster, and nobody else's process.

use std::ffi::OsStr;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::Pid;

/// The postmaster that runs on the data folder `data`.
///
/// The file postmaster.pid outlives a killed server, and its number may since belong to another
/// process. It is believed only if that process was started on `data`.
pub fn of(data: &Path) -> Result<Option<Pid>> {
    let file = data.join("postmaster.pid");
    let text = match fs::read_to_string(&file) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => {
            return Err(error).with_context(|| format!("could not read {}", file.display()));
        }
    };
    let line = text.lines().next().unwrap_or_default().trim();
    // A server that was killed before it had written its number never got to run.
    if line.is_empty() {
        return Ok(None);
    }
    let pid: i32 = line
        .parse()
        .with_context(|| format!("cannot read a process id from {}", file.display()))?;
    // A single-user server notes its number as a negative one.
    let pid = Pid::from_raw(pid.abs());
    Ok(serves(pid, data)?.then_some(pid))
}

fn serves(pid: Pid, data: &Path) -> Result<bool> {
    if !Path::new("/proc/self").exists() {
        return match kill(pid, None) {
            Ok(()) => Ok(true),
            // Gone, or somebody else's and hence not a server of ours.
            Err(Errno::ESRCH | Errno::EPERM) => Ok(false),
            Err(error) => Err(error).with_context(|| format!("could not look for process {pid}")),
        };
    }
    // Not its working folder: in a container even root may not read that of another user's process.
    match fs::read(format!("/proc/{pid}/cmdline")) {
        // Empty for a process that has ended and that nobody has waited for.
        Ok(line) => {
            let data = fs::canonicalize(data)?;
            Ok(line.split(|byte| *byte == 0).any(|word| {
                let word = Path::new(OsStr::from_bytes(word));
                word.is_absolute() && fs::canonicalize(word).is_ok_and(|word| word == data)
            }))
        }
        // The latter if it ends while it is being read.
        Err(error)
            if error.kind() == ErrorKind::NotFound
                || error.raw_os_error() == Some(Errno::ESRCH as i32) =>
        {
            Ok(false)
        }
        Err(error) => Err(error).with_context(|| format!("could not look for process {pid}")),
    }
}

/// The processes that `parent` has started and that still run.
pub fn children(parent: Pid) -> Result<Vec<Pid>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").context("could not read /proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()).map(Pid::from_raw) else {
            continue;
        };
        if let Some((state, its_parent)) = state_and_parent(pid)
            && state != 'Z'
            && its_parent == parent
        {
            found.push(pid);
        }
    }
    Ok(found)
}

/// Whether a process runs; one that has ended and that nobody has waited for does not.
pub fn is_alive(pid: Pid) -> bool {
    state_and_parent(pid).is_some_and(|(state, _)| state != 'Z')
}

/// Whether a process stands still, by SIGSTOP.
pub fn is_stopped(pid: Pid) -> bool {
    state_and_parent(pid).is_some_and(|(state, _)| state == 'T')
}

fn state_and_parent(pid: Pid) -> Option<(char, Pid)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Behind the program's name, which may hold anything.
    let mut words = stat.rsplit_once(')')?.1.split_whitespace();
    let state = words.next()?.chars().next()?;
    Some((state, Pid::from_raw(words.next()?.parse().ok()?)))
}
