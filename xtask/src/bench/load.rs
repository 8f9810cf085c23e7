//! Loads that pgbench cannot make.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Result, anyhow, ensure};
use pg_claims_tests::Server;
use postgres::Client;

use super::{connect, cpu, wait_until};

/// How often a session beats.
const INTERVAL: Duration = Duration::from_secs(30);

/// Connections that beat.
const BEATERS: usize = 4;

/// What was seen of a fleet of sessions.
pub struct Seen {
    /// Of the sessions' table with its indexes, in megabytes: after and before.
    pub sizes: [f64; 2],
    beats: u64,
    seconds: f64,
    oldest: f64,
    cpu: f64,
    p99: Duration,
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:.0} beats a second, the oldest {:.1} s old, the server takes {:.1} % of a core, claims' p99 {:.1} ms",
            self.beats as f64 / self.seconds,
            self.oldest,
            self.cpu,
            self.p99.as_secs_f64() * 1000.0
        )
    }
}

/// Has every session beat once.
pub fn beat_all(client: &mut Client) -> Result<()> {
    // As many in a call as it takes.
    let beat = "SELECT bool_and((heartbeat_sessions(ids)->>'success')::boolean)
                  FROM (SELECT array_agg(session_id) AS ids
                          FROM (SELECT session_id, row_number() OVER () / 10000 AS part FROM claude_sessions) numbered
                         GROUP BY part) parts";
    let success: bool = client.query_one(beat, &[])?.get(0);
    ensure!(success, "not all heartbeats were recorded");
    Ok(())
}

/// Has `fleet` sessions beat every 30 seconds, in groups of `group`, while others claim.
pub fn fleet(
    server: &Server,
    database: &str,
    fleet: usize,
    group: usize,
    seconds: u64,
) -> Result<Seen> {
    let mut client = connect(server, database)?;
    let before = size(&mut client)?;
    let refused_before = refused(&mut client)?;
    // From here on all have a place on the board, as sessions have that live for longer than this run.
    beat_all(&mut client)?;
    let cpu_before = cpu::of_server(server)?;
    let begin = Instant::now();
    let end = begin + Duration::from_secs(seconds);
    let beats = AtomicU64::new(0);
    let mut latencies = thread::scope(|scope| -> Result<Vec<Duration>> {
        let beaters: Vec<_> = (0..BEATERS)
            .map(|beater| {
                let beats = &beats;
                scope.spawn(move || beat(server, database, share(fleet, beater), group, end, beats))
            })
            .collect();
        let latencies = claim_meanwhile(server, database, end)?;
        for beater in beaters {
            beater.join().map_err(|_| anyhow!("a beating thread panicked"))??;
        }
        Ok(latencies)
    })?;
    let elapsed = begin.elapsed().as_secs_f64();
    let over = SystemTime::now();
    wait_until_alone(&mut client)?;
    let cpu = cpu::of_server(server)? - cpu_before;
    ensure!(refused(&mut client)? == refused_before, "heartbeats found no room on the board");
    latencies.sort();
    Ok(Seen {
        beats: beats.into_inner(),
        seconds: elapsed,
        oldest: oldest(&mut client, over)?,
        cpu: cpu / elapsed * 100.0,
        p99: latencies.get(latencies.len() * 99 / 100).copied().unwrap_or_default(),
        sizes: [size(&mut client)?, before],
    })
}

/// How old the oldest last heartbeat was at that time, in seconds.
fn oldest(client: &mut Client, at: SystemTime) -> Result<f64> {
    let age = "SELECT EXTRACT(EPOCH FROM max($1::timestamptz - latest_heartbeat(tableoid, session_id, heartbeat_at)))::float8
                 FROM claude_sessions";
    Ok(client.query_one(age, &[&at])?.get(0))
}

/// How many heartbeats have found no room on the board, and went to the table.
fn refused(client: &mut Client) -> Result<i64> {
    Ok(client.query_one("SELECT refused FROM heartbeat_board()", &[])?.get(0))
}

/// Waits until the connections of the load are gone.
fn wait_until_alone(client: &mut Client) -> Result<()> {
    let others = "SELECT count(*) FROM pg_stat_activity
                   WHERE datname = current_database() AND backend_type = 'client backend'
                         AND pid <> pg_backend_pid()";
    wait_until("the load's connections to end", || {
        Ok(client.query_one(others, &[])?.get::<_, i64>(0) == 0)
    })
}

/// The sessions of one beater.
fn share(fleet: usize, beater: usize) -> std::ops::Range<usize> {
    fleet * beater / BEATERS + 1..fleet * (beater + 1) / BEATERS + 1
}

fn beat(
    server: &Server,
    database: &str,
    sessions: std::ops::Range<usize>,
    group: usize,
    end: Instant,
    beats: &AtomicU64,
) -> Result<()> {
    let mut client = connect(server, database)?;
    let single = client.prepare("SELECT update_session_heartbeat($1)")?;
    let many = client.prepare("SELECT heartbeat_sessions($1)")?;
    let ids: Vec<String> = sessions.map(|n| format!("session-{n}")).collect();
    let groups: Vec<&[String]> = ids.chunks(group).collect();
    let pause = INTERVAL / u32::try_from(groups.len())?;
    let mut due = Instant::now();
    for group in groups.iter().cycle() {
        if due >= end {
            return Ok(());
        }
        thread::sleep(due.saturating_duration_since(Instant::now()));
        match group {
            [one] => client.query_one(&single, &[one])?,
            _ => client.query_one(&many, &[group])?,
        };
        beats.fetch_add(group.len() as u64, Ordering::Relaxed);
        due += pause;
    }
    Ok(())
}

fn claim_meanwhile(server: &Server, database: &str, end: Instant) -> Result<Vec<Duration>> {
    let mut client = connect(server, database)?;
    client.batch_execute("SET synchronous_commit = off")?;
    let claim = client.prepare("SELECT claim_sd($1, 'session-1')->>'success'")?;
    let release = client.prepare("SELECT release_sd('session-1')")?;
    let mut latencies = Vec::new();
    while Instant::now() < end {
        let sd = format!("SD-{}", 1 + latencies.len() % 100);
        let begin = Instant::now();
        let success: String = client.query_one(&claim, &[&sd])?.get(0);
        latencies.push(begin.elapsed());
        ensure!(success == "true", "a claim was refused");
        client.query_one(&release, &[])?;
        thread::sleep(Duration::from_millis(10));
    }
    Ok(latencies)
}

fn size(client: &mut Client) -> Result<f64> {
    let bytes: i64 =
        client.query_one("SELECT pg_total_relation_size('claude_sessions')", &[])?.get(0);
    Ok(bytes as f64 / 1e6)
}

/// Makes every session hold its SD, and be stale, in both schemas.
pub fn make_stale(client: &mut Client, count: usize) -> Result<()> {
    client.batch_execute(&format!(
        "SET session_replication_role = replica;
         TRUNCATE sd_claims, session_lifecycle_events, floor.session_lifecycle_events;
         INSERT INTO sd_claims (claim_id, sd_id, session_id)
         SELECT n, 'SD-' || n, 'session-' || n FROM generate_series(1, {count}) n;
         UPDATE strategic_directives_v2 SET is_working_on = true, active_session_id = replace(sd_id, 'SD-', 'session-');
         UPDATE claude_sessions SET sd_id = replace(session_id, 'session-', 'SD-'),
                claim_id = replace(session_id, 'session-', '')::bigint, claimed_at = now() - interval '3 days',
                status = 'active', heartbeat_at = now() - interval '2 days';
         TRUNCATE floor.claude_sessions, floor.sd_claims, floor.strategic_directives_v2;
         INSERT INTO floor.claude_sessions SELECT * FROM claude_sessions;
         INSERT INTO floor.sd_claims SELECT * FROM sd_claims;
         INSERT INTO floor.strategic_directives_v2 SELECT * FROM strategic_directives_v2;
         RESET session_replication_role"
    ))?;
    client.batch_execute("VACUUM ANALYZE")?;
    Ok(())
}

/// Makes sure that the work was done.
pub fn check_all_ended(client: &mut Client, ours: bool) -> Result<()> {
    let table = if ours { "claude_sessions" } else { "floor.claude_sessions" };
    let left: i64 = client
        .query_one(&format!("SELECT count(*) FROM {table} WHERE sd_id IS NOT NULL"), &[])?
        .get(0);
    ensure!(left == 0, "{left} claims are left in {table}");
    Ok(())
}

/// What this machine is.
pub fn machine() -> String {
    let read = |file: &str| std::fs::read_to_string(file).unwrap_or_default();
    let value = |text: &str, key: &str| {
        let line = text.lines().find(|line| line.starts_with(key)).unwrap_or_default();
        line.split(':').nth(1).unwrap_or("unknown").trim().to_owned()
    };
    let cores = thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let cpu = value(&read("/proc/cpuinfo"), "model name");
    let memory = value(&read("/proc/meminfo"), "MemTotal");
    format!("{cores} cores ({cpu}), {memory} of memory")
}
