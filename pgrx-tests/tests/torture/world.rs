//! What everybody in a phase shares.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;
use pg_claims_tests::Server;
use postgres::{Client, NoTls};

use crate::draw;
use crate::history::History;
use crate::logbook::Logbook;
use crate::setting::Setting;
use crate::sqlstates;

/// For how long a server may refuse connections; far above what a recovery takes.
const PATIENCE: Duration = Duration::from_secs(120);

/// By which names connections are told apart.
pub const CLIENT: &str = "torture client";
pub const HELPER: &str = "torture helper";

/// What was done on purpose that the server's log tells of.
#[derive(Default)]
pub struct Deeds {
    /// Server processes that were killed by SIGKILL, the postmaster apart.
    pub kills: AtomicU64,
    /// The whole server.
    pub crashes: AtomicU64,
}

pub struct World<'a> {
    pub server: &'a Server,
    pub database: String,
    pub seed: u64,
    pub phase: u64,
    pub setting: Setting,
    pub log: &'a Logbook,
    pub deeds: &'a Deeds,
    pub history: History,
    is_over: AtomicBool,
    are_clients_gone: AtomicBool,
    is_settled: AtomicBool,
}

impl<'a> World<'a> {
    pub fn new(
        server: &'a Server,
        database: String,
        (seed, phase, setting): (u64, u64, Setting),
        log: &'a Logbook,
        deeds: &'a Deeds,
    ) -> Self {
        Self {
            server,
            database,
            seed,
            phase,
            setting,
            log,
            deeds,
            history: History::default(),
            is_over: AtomicBool::new(false),
            are_clients_gone: AtomicBool::new(false),
            is_settled: AtomicBool::new(false),
        }
    }

    pub fn generator(&self, stream: u64, step: u64) -> Rng {
        draw::generator(self.seed, self.phase, stream, step)
    }

    /// Nobody begins anything more.
    pub fn end(&self) {
        self.is_over.store(true, Ordering::Release);
    }

    pub fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Acquire) || self.log.has_violations()
    }

    /// Nobody prepares a transaction any more.
    pub fn clients_gone(&self) {
        self.are_clients_gone.store(true, Ordering::Release);
    }

    pub fn are_clients_gone(&self) -> bool {
        self.are_clients_gone.load(Ordering::Acquire)
    }

    /// Nothing changes any more but by the worker, and all events have their place.
    pub fn settle(&self) {
        self.is_settled.store(true, Ordering::Release);
    }

    pub fn is_settled(&self) -> bool {
        self.is_settled.load(Ordering::Acquire) || self.log.has_violations()
    }

    /// Waits, as long as the phase goes on.
    pub fn pause(&self, time: Duration) {
        let end = Instant::now() + time;
        while !self.is_over() && Instant::now() < end {
            thread::sleep(Duration::from_millis(10).min(time));
        }
    }

    /// A connection, as soon as the server lets one in. It waits for a server that is down.
    pub fn connect(&self, role: &str, name: &str, options: &str) -> Option<Client> {
        let begin = Instant::now();
        loop {
            let mut config = self.server.config(&self.database);
            config.user(role).application_name(name).options(options);
            let error = match config.connect(NoTls) {
                Ok(client) => return Some(client),
                Err(error) => error,
            };
            let code = error.code().map(|code| code.code().to_owned());
            if !sqlstates::is_of_connections(code.as_deref()) || begin.elapsed() > PATIENCE {
                self.log.violation(format!("no connection as {role}: {error:?}"));
            }
            if self.log.has_violations() {
                return None;
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// One that helps: a superuser's, which is left alone but by crashes.
    pub fn helper(&self) -> Option<Client> {
        self.connect("postgres", HELPER, "")
    }

    /// Does something on a helper's connection, again on a new one whenever that is lost. `None`: the run has failed.
    pub fn insist<T>(
        &self,
        connection: &mut Option<Client>,
        mut work: impl FnMut(&mut Client) -> Result<T, postgres::Error>,
    ) -> Option<T> {
        let begin = Instant::now();
        loop {
            if connection.is_none() {
                *connection = self.helper();
            }
            match work(connection.as_mut()?) {
                Ok(done) => return Some(done),
                Err(error) => {
                    let code = error.code().map(|code| code.code().to_owned());
                    // A lock that maintenance holds, in another order than this one takes it.
                    let may_come_again = sqlstates::is_of_connections(code.as_deref())
                        || matches!(code.as_deref(), Some("40P01" | "40001" | "55P03"));
                    if !may_come_again || begin.elapsed() > PATIENCE {
                        self.log.violation(format!("a helper's statement failed: {error:?}"));
                        return None;
                    }
                    *connection = None;
                }
            }
            if self.log.has_violations() {
                return None;
            }
        }
    }
}
