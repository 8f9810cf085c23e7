//! A run is a row of phases of a few seconds. Each has a database of its own on the one server, and is checked in the end.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use pg_claims_tests::{ENV_WORK_DIR, Server, Stop, own_server};
use postgres::{Client, NoTls};

use crate::client;
use crate::faults;
use crate::follower::{self, Event};
use crate::invariants;
use crate::logbook::Logbook;
use crate::memory::Memory;
use crate::observer;
use crate::prepared;
use crate::promises;
use crate::psql;
use crate::setting::{Setting, Trouble};
use crate::work;
use crate::world::{Deeds, World};

const LASTS: Duration = Duration::from_secs(7);
/// Far above what the worker takes for the last events.
const PATIENCE: Duration = Duration::from_secs(120);

/// No setting of these lets an acknowledged commit be lost: a crash is one of processes, not of the machine.
const SETTINGS: [&str; 10] = [
    "fsync = off",
    "max_connections = 60",
    "max_prepared_transactions = 40",
    "track_commit_timestamp = on",
    "deadlock_timeout = 100ms",
    "log_statement = 'none'",
    "client_connection_check_interval = 500ms",
    "pg_claims.reap_interval = 1s",
    "pg_claims.heartbeat_interval = 1s",
    "pg_claims.history_retention = 0",
];

pub struct Run {
    seed: u64,
    log: Logbook,
    deeds: Deeds,
    is_preloaded: bool,
    operations: u64,
    /// The launcher's lives from phase to phase.
    memory: Memory,
    server: Server,
}

impl Run {
    pub fn new(seed: u64) -> Self {
        let server = own_server("torture", &SETTINGS);
        work::make_roles(&mut administrator(&server)).unwrap();
        let log = Logbook::new(&history_file(seed));
        Self {
            seed,
            log,
            deeds: Deeds::default(),
            is_preloaded: false,
            operations: 0,
            memory: Memory::default(),
            server,
        }
    }

    pub fn phase(&mut self, phase: u64) {
        let setting = Setting::draw(self.seed, phase);
        println!("torture: phase {phase}: {setting:?}");
        self.preload(setting.preloaded);
        let database = format!("phase_{phase}");
        administrator(&self.server).batch_execute(&format!("CREATE DATABASE {database}")).unwrap();
        let world = World::new(
            &self.server,
            database.clone(),
            (self.seed, phase, setting),
            &self.log,
            &self.deeds,
        );
        work::prepare(&mut world.helper().unwrap(), setting).unwrap();
        let begin = Instant::now();
        let (followed, faults, looks) = play(&world, &mut self.memory);
        let facts = world.history.take();
        let played = begin.elapsed();
        if !self.log.has_violations() {
            let mut connection = None;
            let broken = world.insist(&mut connection, |client| {
                let mut broken = invariants::broken(client, setting.backlog.names().0, true)?;
                broken.extend(promises::broken(client, &facts)?);
                broken.extend(promises::broken_by_order(client, &followed)?);
                Ok(broken)
            });
            let broken =
                broken.into_iter().flatten().chain(self.memory.grown()).chain(amcheck(&world));
            broken.for_each(|what| self.log.violation(what));
        }
        for what in told_by_the_log(&self.server, &self.deeds) {
            self.log.violation(what);
        }
        println!(
            "torture: phase {phase}: {} operations, {} claims and {} rows of work acknowledged, {} refusals, {} events, {faults} faults, {looks} looks, {} kB grown at most, {:.1} s and {:.1} s for checks",
            facts.operations,
            facts.kept.granted.len(),
            facts.kept.work.len(),
            facts.kept.refused.len(),
            followed.len(),
            self.memory.greatest_growth(),
            played.as_secs_f64(),
            (begin.elapsed() - played).as_secs_f64()
        );
        self.operations += facts.operations;
        if self.log.has_violations() {
            // The server goes, and its log with it.
            let kept = history_file(self.seed).with_extension("server.log");
            std::fs::write(kept, self.server.log().unwrap()).unwrap();
        }
        self.log.judge(self.seed);
        drop(world);
        // What maintenance has set is one phase's.
        let mut client = administrator(&self.server);
        client.batch_execute(&format!("DROP DATABASE {database} WITH (FORCE)")).unwrap();
    }

    /// Whether the library is preloaded can only change when the server starts.
    fn preload(&mut self, preloads: bool) {
        let mut client = administrator(&self.server);
        client.batch_execute("ALTER SYSTEM RESET ALL").unwrap();
        if preloads {
            client
                .batch_execute("ALTER SYSTEM SET shared_preload_libraries = 'pg_claims'")
                .unwrap();
        }
        if preloads == self.is_preloaded {
            client.batch_execute("SELECT pg_reload_conf()").unwrap();
            return;
        }
        drop(client);
        self.server.stop(Stop::Fast).unwrap();
        self.server.start().unwrap();
        self.is_preloaded = preloads;
    }

    pub fn end(self) {
        self.log.judge(self.seed);
        println!("torture: {} operations, seed {}, well", self.operations, self.seed);
        // Fails if the log tells of a fault.
        self.server.discard().unwrap();
    }
}

/// Of what the server's log tells, faults and crashes that nobody made.
fn told_by_the_log(server: &Server, deeds: &Deeds) -> Vec<String> {
    let log = server.log().unwrap();
    let told = |what: &str| log.lines().filter(|line| line.contains(what)).count() as u64;
    let (kills, crashes) =
        (deeds.kills.load(Ordering::Relaxed), deeds.crashes.load(Ordering::Relaxed));
    let mut found: Vec<String> =
        server.check_log().err().into_iter().map(|error| format!("{error:#}")).collect();
    if told("was terminated by signal 9:") > kills {
        found.push(format!("more processes were killed than {kills}"));
    }
    if told("database system was not properly shut down") > kills + crashes {
        found.push(format!("more crashes than {crashes}, and {kills} processes that were killed"));
    }
    if !found.is_empty() {
        let of_the_server = [
            "was terminated by",
            "Failed process was running",
            "shutdown request",
            "interrupted",
            "properly shut down",
            "ready to accept",
        ];
        let is_told = |line: &&str| of_the_server.iter().any(|word| line.contains(word));
        found.push(log.lines().filter(is_told).collect::<Vec<_>>().join("\n"));
    }
    found
}

/// Everybody at once. Returns what the follower has read, and how many faults and looks there were.
fn play(world: &World, memory: &mut Memory) -> (Vec<Event>, u64, u64) {
    thread::scope(|scope| {
        let clients: Vec<_> = (0..world.setting.clients)
            .map(|number| scope.spawn(move || client::run(world, number)))
            .collect();
        let follower = scope.spawn(|| follower::run(world));
        let finisher = scope.spawn(|| prepared::run(world));
        let faults = scope.spawn(|| faults::run(world));
        let observer = scope.spawn(|| observer::run(world, memory));
        let puppeteer = (world.setting.trouble == Trouble::Connections)
            .then(|| scope.spawn(|| psql::run(world)));
        world.pause(LASTS);
        world.end();
        for client in clients {
            client.join().unwrap();
        }
        world.clients_gone();
        if let Some(puppeteer) = puppeteer {
            puppeteer.join().unwrap();
        }
        let (faults, looks) = (faults.join().unwrap(), observer.join().unwrap());
        finisher.join().unwrap();
        come_to_rest(world);
        world.settle();
        (follower.join().unwrap(), faults, looks)
    })
}

/// Waits until every transaction has ended and every event has its place, and has the worker stop: from then on nothing
/// changes.
fn come_to_rest(world: &World) {
    let mut connection = None;
    // Maintenance may have switched the worker off. Otherwise it gets there by itself; where it is not preloaded, any call
    // brings it back.
    if world.setting.trouble != Trouble::Maintenance {
        wait_for(world, &mut connection, "SELECT is_sd_claimed('SD-0')", ALL_PLACED);
    }
    let is_off = world.insist(&mut connection, |client| {
        client.batch_execute("LOAD 'pg_claims'")?;
        client.batch_execute("ALTER SYSTEM SET pg_claims.worker = off")?;
        client.batch_execute("SELECT pg_reload_conf()")
    });
    if is_off.is_some() {
        let gone = "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE backend_type = 'pg_claims worker')
                       AND current_setting('pg_claims.worker') = 'off'";
        wait_for(world, &mut connection, "SELECT 1", gone);
        wait_for(world, &mut connection, "SELECT cleanup_stale_sessions()", ALL_PLACED);
    }
}

/// No client is left, and no event is without its place.
const ALL_PLACED: &str = "
    SELECT NOT EXISTS (SELECT FROM pg_stat_activity
                        WHERE datname = current_database() AND application_name = 'torture client')
       AND NOT EXISTS (SELECT FROM session_lifecycle_events e
                        WHERE NOT EXISTS (SELECT FROM lifecycle_event_positions p WHERE p.event_id = e.event_id))";

/// Calls `nudge` until `condition` holds.
fn wait_for(world: &World, connection: &mut Option<Client>, nudge: &str, condition: &str) {
    let begin = Instant::now();
    loop {
        let is_so = world.insist(connection, |client| {
            client.batch_execute(nudge)?;
            client.query_one(condition, &[]).map(|row| row.get::<_, bool>(0))
        });
        if is_so.is_none_or(|is_so| is_so) {
            return;
        }
        if begin.elapsed() > PATIENCE {
            world.log.violation(format!("waited in vain, calling {nudge}, until {condition}"));
            return;
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// What pg_amcheck finds, where the installation has it.
fn amcheck(world: &World) -> Vec<String> {
    let mut connection = None;
    let installed = world.insist(&mut connection, |client| {
        let there = "SELECT count(*) FROM pg_available_extensions WHERE name = 'amcheck'";
        if client.query_one(there, &[])?.get::<_, i64>(0) == 0 {
            return Ok(false);
        }
        client.batch_execute("CREATE EXTENSION IF NOT EXISTS amcheck")?;
        Ok(true)
    });
    if installed != Some(true) {
        println!("torture: no amcheck here, which is left out");
        return Vec::new();
    }
    let output = world
        .server
        .client_program("pg_amcheck", &world.database)
        .args(["--heapallindexed", "--no-strict-names", "--relation=public.*"])
        .arg(&world.database)
        .output();
    match output {
        Ok(output) if output.status.success() => Vec::new(),
        Ok(output) => vec![format!(
            "pg_amcheck: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        )],
        Err(error) => vec![format!("pg_amcheck could not be run: {error}")],
    }
}

fn administrator(server: &Server) -> Client {
    server.config("postgres").connect(NoTls).unwrap()
}

/// Beside the folder of the tests' servers, which is cleared in the end.
fn history_file(seed: u64) -> PathBuf {
    let servers = std::env::var_os(ENV_WORK_DIR)
        .expect("run these tests through `cargo xtask test` or `cargo xtask torture`");
    Path::new(&servers).with_file_name(format!("torture-{seed}.history"))
}
