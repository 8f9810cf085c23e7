//! A throw-away server on a socket of its own.

mod descent;

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::log;
use crate::postmaster;
use crate::user::{ServerUser, without_libpq_variables};

/// The longest path of a Unix socket that every system takes, less the socket's own name.
const MAX_SOCKET_DIR_BYTES: usize = 80;

/// Names the socket only: the server listens on no network port.
const PORT: u16 = 5432;

/// Has the C library fill memory that is freed, and memory that is new: who reads either reads nonsense at once,
/// and not now and then.
const FILLS_MEMORY: (&str, &str) = ("MALLOC_PERTURB_", "85");

/// Some operators have this in their server's environment. Errors must tell of no Rust all the same.
const WANTS_BACKTRACES: (&str, &str) = ("RUST_BACKTRACE", "1");

/// An installed PostgreSQL.
#[derive(Debug, Clone)]
pub struct Installation {
    pg_config: PathBuf,
    bin: PathBuf,
    user: ServerUser,
    is_under_test: bool,
}

impl Installation {
    /// The PostgreSQL that `pg_config` belongs to.
    pub fn new(pg_config: &Path) -> Result<Self> {
        let output = Command::new(pg_config)
            .arg("--bindir")
            .output()
            .with_context(|| format!("could not run {}", pg_config.display()))?;
        let bin = String::from_utf8(succeeded(output, "pg_config --bindir")?.stdout)?;
        Ok(Self {
            pg_config: pg_config.to_owned(),
            bin: PathBuf::from(bin.trim()),
            user: ServerUser::choose()?,
            is_under_test: false,
        })
    }

    /// The same for tests: its programs fill memory that they free, and a server whose log tells of a fault does not
    /// go away unnoticed. Filling takes time, so that the benchmark and the demo go without.
    pub fn under_test(self) -> Self {
        Self { is_under_test: true, ..self }
    }

    /// Its `pg_config`.
    pub fn pg_config(&self) -> &Path {
        &self.pg_config
    }

    /// One of its programs, to be run as the server's user.
    pub fn program(&self, name: &str) -> Command {
        let mut command = self.user.command(self.bin.join(name));
        if self.is_under_test {
            command.envs([FILLS_MEMORY, WANTS_BACKTRACES]);
        }
        command
    }
}

/// How to stop a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Disconnects the clients and writes a checkpoint.
    Fast,
    /// Without a checkpoint: the next start recovers.
    Immediate,
}

impl Stop {
    fn mode(self) -> &'static str {
        match self {
            Self::Fast => "fast",
            Self::Immediate => "immediate",
        }
    }
}

/// A throw-away server. Stopped and removed when it is dropped, unless it was [kept](Server::keep).
#[derive(Debug)]
pub struct Server {
    installation: Installation,
    root: PathBuf,
    socket_dir: PathBuf,
    keep: bool,
}

impl Server {
    /// Initialises and starts a server in the new folder `root`; `settings` are lines of
    /// postgresql.conf. What an earlier, killed run left in `root` is stopped and removed.
    pub fn create(installation: &Installation, root: &Path, settings: &[&str]) -> Result<Self> {
        let server = Self::at(installation, root)?;
        server.remove()?;
        installation.user.create_own_dir(root)?;
        installation.user.create_own_dir(&server.socket_dir)?;
        server.initialise(settings)?;
        server.start()?;
        Ok(server)
    }

    /// The server in `root` from an earlier run, if it is running.
    pub fn running(installation: &Installation, root: &Path) -> Result<Option<Self>> {
        let mut server = Self::at(installation, root)?;
        server.keep = true;
        Ok(server.is_running()?.then_some(server))
    }

    fn at(installation: &Installation, root: &Path) -> Result<Self> {
        Ok(Self {
            installation: installation.clone(),
            root: root.to_owned(),
            socket_dir: socket_dir(root),
            keep: false,
        })
    }

    fn initialise(&self, settings: &[&str]) -> Result<()> {
        let initdb = |locale: &str| {
            self.installation
                .program("initdb")
                .arg("-D")
                .arg(self.data())
                .args(["--no-sync", "-U", "postgres", "--auth=trust", "-E", "UTF8"])
                .arg(format!("--locale={locale}"))
                .output()
                .context("could not run initdb")
        };
        let mut output = initdb("C.UTF-8")?;
        if !output.status.success() {
            output = initdb("C")?;
        }
        succeeded(output, "initdb")?;
        let mut file = OpenOptions::new().append(true).open(self.data().join("postgresql.conf"))?;
        writeln!(file, "listen_addresses = ''")?;
        writeln!(file, "unix_socket_directories = '{}'", self.socket_dir.display())?;
        writeln!(file, "port = {PORT}")?;
        for setting in settings {
            writeln!(file, "{setting}")?;
        }
        Ok(())
    }

    /// Starts the server and waits until it accepts connections.
    pub fn start(&self) -> Result<()> {
        self.start_with("")
    }

    /// Starts the server with options for the program `postgres` itself.
    pub fn start_with(&self, options: &str) -> Result<()> {
        let log = self.root.join("log");
        let status = self
            .installation
            .program("pg_ctl")
            .arg("-D")
            .arg(self.data())
            .arg("-l")
            .arg(&log)
            .args(["-w", "-t", "120", "-s", "-o", options, "start"])
            // The server must not keep a pipe of ours open.
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .status()
            .context("could not run pg_ctl")?;
        if status.success() {
            return Ok(());
        }
        bail!(
            "the server in {} did not start; its log ends:\n{}",
            self.root.display(),
            self.log_tail(20)
        )
    }

    /// The server's log.
    pub fn log(&self) -> std::io::Result<String> {
        // Whatever clients wrote into it.
        Ok(String::from_utf8_lossy(&fs::read(self.root.join("log"))?).into_owned())
    }

    /// Fails if the server's log tells of a fault.
    pub fn check_log(&self) -> Result<()> {
        let log = self.log().context("could not read its log")?;
        let faults = log::faults(&log);
        if faults.is_empty() {
            return Ok(());
        }
        bail!("its log tells of a fault:\n{}", faults.join("\n"))
    }

    /// The last lines of the server's log.
    fn log_tail(&self, lines: usize) -> String {
        let log = self.log().unwrap_or_else(|error| error.to_string());
        let from = log.lines().count().saturating_sub(lines);
        log.lines().skip(from).collect::<Vec<_>>().join("\n")
    }

    /// Stops the server and waits until it has gone.
    pub fn stop(&self, how: Stop) -> Result<()> {
        let output = self
            .installation
            .program("pg_ctl")
            .arg("-D")
            .arg(self.data())
            .args(["-w", "-t", "120", "-s", "-m", how.mode(), "stop"])
            .output()
            .context("could not run pg_ctl")?;
        succeeded(output, "pg_ctl stop")?;
        Ok(())
    }

    /// Kills the postmaster with SIGKILL, as a crash would, and waits until it and all processes of
    /// the server have gone.
    pub fn crash(&self) -> Result<()> {
        let Some(pid) = self.pid()? else {
            bail!("the server in {} is not running", self.root.display());
        };
        // A postmaster that stands still makes no more processes. One that this function did not know of would keep the
        // shared memory, and the next postmaster would refuse to start.
        kill(pid, Signal::SIGSTOP)?;
        crate::wait_until("the server to stand still", || postmaster::is_stopped(pid));
        let processes = postmaster::children(pid)?;
        kill(pid, Signal::SIGKILL)?;
        // One that stands still would never notice.
        for process in processes.iter().filter(|process| postmaster::is_stopped(**process)) {
            kill(*process, Signal::SIGKILL)?;
        }
        crate::wait_until("the killed server to be gone", || {
            matches!(postmaster::of(&self.data()), Ok(None))
                && processes.iter().all(|process| !postmaster::is_alive(*process))
        });
        // Where nobody has waited for the killed process yet, its number still seems to be in use.
        fs::remove_file(self.data().join("postmaster.pid"))?;
        fs::remove_file(self.socket_dir.join(format!(".s.PGSQL.{PORT}.lock")))?;
        Ok(())
    }

    /// The postmaster's process id, if it runs.
    fn pid(&self) -> Result<Option<Pid>> {
        postmaster::of(&self.data())
    }

    /// Whether the server runs.
    pub fn is_running(&self) -> Result<bool> {
        Ok(self.pid()?.is_some())
    }

    /// Stops and removes every server that killed runs have left in the folders below `parent`.
    pub fn remove_leftovers(installation: &Installation, parent: &Path) -> Result<()> {
        let entries = match fs::read_dir(parent) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            entries => entries.with_context(|| format!("could not read {}", parent.display()))?,
        };
        for entry in entries {
            let mut server = Self::at(installation, &entry?.path())?;
            server.keep = true;
            server.remove()?;
        }
        Ok(())
    }

    /// Stops the server if it runs, and removes its folder.
    fn remove(&self) -> Result<()> {
        if self.is_running()? {
            self.stop(Stop::Immediate)?;
        }
        for dir in [&self.root, &self.socket_dir] {
            match fs::remove_dir_all(dir) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error)
                        .with_context(|| format!("could not remove {}", dir.display()));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Stops the server and removes its folder, also if it was kept. Fails if it is under test and its log tells of
    /// a fault.
    pub fn discard(mut self) -> Result<()> {
        self.keep = true;
        self.remove_checked()
    }

    fn remove_checked(&self) -> Result<()> {
        if !self.installation.is_under_test {
            return self.remove();
        }
        // Its last words as well. One that does not stop goes all the same, and is told of.
        let stopped = if self.is_running()? { self.stop(Stop::Fast) } else { Ok(()) };
        let checked = self.check_log();
        self.remove()?;
        checked.and(stopped)
    }

    /// Leaves the server running when this value is dropped.
    pub fn keep(&mut self) {
        self.keep = true;
    }

    /// Its data folder.
    pub fn data(&self) -> PathBuf {
        self.root.join("data")
    }

    /// The folder of its socket.
    pub fn socket_dir(&self) -> &Path {
        &self.socket_dir
    }

    /// How to connect to one of its databases as its superuser.
    pub fn config(&self, database: &str) -> postgres::Config {
        config(&self.socket_dir, database)
    }

    /// A client program of its own version, set to connect to one of its databases.
    pub fn client_program(&self, name: &str, database: &str) -> Command {
        client_program(&self.installation, &self.socket_dir, name, database)
    }

    /// Runs a client program on one of its databases. Fails where the program does.
    pub fn run(&self, program: &str, database: &str, arguments: &[&str]) -> Result<String> {
        let output = self
            .client_program(program, database)
            .args(arguments)
            .output()
            .with_context(|| format!("could not run {program}"))?;
        let what = format!("{program} {}", arguments.join(" "));
        Ok(String::from_utf8(succeeded(output, &what)?.stdout)?)
    }

    /// The same as [`client_program`](Self::client_program), run by oneself in the current folder: for a person, whose files and history it
    /// uses. Only servers refuse to run as root.
    pub fn client_program_as_oneself(&self, name: &str, database: &str) -> Command {
        let mut command = Command::new(self.installation.bin.join(name));
        without_libpq_variables(&mut command);
        connecting(command, &self.socket_dir, database)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        let is_failing = std::thread::panicking();
        let removed = if is_failing {
            // The worker tells its errors there.
            eprintln!("The server's log ends:\n{}", self.log_tail(40));
            self.remove()
        } else {
            self.remove_checked()
        };
        let Err(error) = removed else { return };
        let told = format!("the server in {}: {error:#}", self.root.display());
        // The test that started it fails; there is nobody else to tell.
        assert!(is_failing || !self.installation.is_under_test, "{told}");
        eprintln!("{told}");
    }
}

pub(crate) fn config(socket_dir: &Path, database: &str) -> postgres::Config {
    let mut config = postgres::Config::new();
    config.host_path(socket_dir).port(PORT).user("postgres").dbname(database);
    config
}

pub(crate) fn client_program(
    installation: &Installation,
    socket_dir: &Path,
    name: &str,
    database: &str,
) -> Command {
    connecting(installation.program(name), socket_dir, database)
}

fn connecting(mut command: Command, socket_dir: &Path, database: &str) -> Command {
    command
        .env("PGHOST", socket_dir)
        .env("PGPORT", PORT.to_string())
        .env("PGUSER", "postgres")
        .env("PGDATABASE", database);
    command
}

/// Below `root`, unless the path would be too long for a socket, or would need quoting in
/// postgresql.conf, where it is one of a list.
fn socket_dir(root: &Path) -> PathBuf {
    let below = root.join("socket");
    let plain = |text: &str| !text.contains([',', '\'', '"', '\\']);
    if below.as_os_str().len() <= MAX_SOCKET_DIR_BYTES && below.to_str().is_some_and(plain) {
        return below;
    }
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    root.hash(&mut hasher);
    std::env::temp_dir().join(format!("pg_claims-{:016x}", hasher.finish()))
}

pub(crate) fn succeeded(output: Output, what: &str) -> Result<Output> {
    if output.status.success() {
        return Ok(output);
    }
    bail!(
        "{what} failed ({}):\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}
