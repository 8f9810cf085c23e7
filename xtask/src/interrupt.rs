//! Being told to stop: by Ctrl-C, `kill` or a closed terminal.
//!
//! Servers are no descendants of this program: killed without further ado, it would leave them
//! running. So the signal goes to the command that runs, and this program goes on to clean up.

use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

struct State {
    interrupted: bool,
    /// The command that runs; negative, as `kill` has it, for a group of processes.
    running: Option<Pid>,
}

/// Signals come to the process as a whole.
static STATE: Mutex<State> = Mutex::new(State { interrupted: false, running: None });

/// Begins to watch; to be called once. Until then a signal ends this program as usual.
pub fn watch() -> Result<()> {
    ctrlc::set_handler(|| {
        let mut state = state();
        state.interrupted = true;
        state.terminate_running();
    })
    .context("could not watch for an interrupt")
}

/// Fails once a signal has arrived.
pub fn check() -> Result<()> {
    if state().interrupted {
        bail!("interrupted");
    }
    Ok(())
}

/// Runs a command to its end, or to the next signal.
pub fn run(command: &mut Command) -> Result<ExitStatus> {
    let child = command.spawn()?;
    let pid = i32::try_from(child.id())?;
    wait(child, Pid::from_raw(pid))
}

/// The same for a command that starts others and does not end them by itself, such as `cargo test`.
/// It has no terminal to read from.
pub fn run_with_descendants(command: &mut Command) -> Result<ExitStatus> {
    let child = command.process_group(0).stdin(Stdio::null()).spawn()?;
    let pid = i32::try_from(child.id())?;
    wait(child, Pid::from_raw(-pid))
}

fn wait(mut child: Child, running: Pid) -> Result<ExitStatus> {
    {
        let mut state = state();
        state.running = Some(running);
        if state.interrupted {
            // The signal came just before.
            state.terminate_running();
        }
    }
    let status = child.wait();
    state().running = None;
    check()?;
    Ok(status?)
}

impl State {
    fn terminate_running(&self) {
        if let Some(running) = self.running
            && let Err(error) = kill(running, Signal::SIGTERM)
        {
            eprintln!("could not stop the command that runs ({error}); waiting for its end");
        }
    }
}

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}
