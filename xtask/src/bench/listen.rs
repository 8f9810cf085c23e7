//! Connections that listen to what the extension announces, and one that sends as much without it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use pg_claims_tests::Server;
use postgres::Client;
use postgres::fallible_iterator::FallibleIterator as _;

use super::{connect, wait_until};

/// Connections that listen.
pub struct Listening {
    over: Arc<AtomicBool>,
    /// How many events the first of them has heard of, and in how many bytes. Only that one counts them, as
    /// that costs time.
    events: Arc<AtomicU64>,
    bytes: Arc<AtomicU64>,
    /// How many messages each has heard.
    messages: Vec<Arc<AtomicU64>>,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl Listening {
    /// Has so many connections listen.
    pub fn begin(server: &Server, database: &str, listeners: usize) -> Result<Self> {
        let over = Arc::new(AtomicBool::new(false));
        let (events, bytes) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let mut messages = Vec::new();
        let mut threads = Vec::new();
        for listener in 0..listeners {
            let mut client = connect(server, database)?;
            client.batch_execute("LISTEN pg_claims")?;
            let heard = Arc::new(AtomicU64::new(0));
            messages.push(Arc::clone(&heard));
            let (over, events, bytes) =
                (Arc::clone(&over), Arc::clone(&events), Arc::clone(&bytes));
            threads.push(thread::spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    let mut notifications = client.notifications();
                    let mut waiting = notifications.timeout_iter(Duration::from_millis(200));
                    while let Some(message) = waiting.next()? {
                        heard.fetch_add(1, Ordering::Relaxed);
                        if listener == 0 {
                            let lines = message.payload().split('\n').count() as u64;
                            events.fetch_add(lines, Ordering::Relaxed);
                            bytes.fetch_add(message.payload().len() as u64, Ordering::Relaxed);
                        }
                    }
                }
                Ok(())
            }));
        }
        Ok(Self { over, events, bytes, messages, threads })
    }

    /// How many events each of them has heard of.
    pub fn events(&self) -> u64 {
        self.events.load(Ordering::Relaxed)
    }

    /// In how many bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Waits until all events have been announced, or passed in silence, and all have heard the same.
    pub fn settle(&self, client: &mut Client) -> Result<()> {
        let is_behind = "SELECT EXISTS (SELECT FROM session_lifecycle_events e WHERE NOT EXISTS (
                             SELECT FROM lifecycle_event_positions p WHERE p.event_id = e.event_id))
                             OR EXISTS (SELECT FROM lifecycle_event_positions
                                         WHERE position > (SELECT announced_to FROM event_frontier))";
        wait_until("the events to be announced", || {
            Ok(!client.query_one(is_behind, &[])?.get::<_, bool>(0))
        })?;
        let mut before = Vec::new();
        wait_until("all listeners to have heard the same", || {
            let messages = self.messages.iter().map(|heard| heard.load(Ordering::Relaxed));
            let now: Vec<u64> = messages.collect();
            let is_same = now.windows(2).all(|pair| pair[0] == pair[1]);
            Ok(std::mem::replace(&mut before, now.clone()) == now && is_same)
        })
    }

    /// Ends it.
    pub fn stop(self) -> Result<()> {
        self.over.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().map_err(|_| anyhow!("a listening thread panicked"))??;
        }
        Ok(())
    }
}

/// A connection that sends by bare NOTIFY what the extension would announce.
pub struct Sending {
    over: Arc<AtomicBool>,
    thread: JoinHandle<Result<()>>,
}

impl Sending {
    /// Sends so many bytes a second, as full and at such a pace as the worker's messages are under load.
    pub fn begin(server: &Server, database: &str, bytes_per_second: f64) -> Result<Self> {
        const PACE: Duration = Duration::from_millis(300);
        const LONGEST: f64 = 7900.0;
        let bytes = bytes_per_second * PACE.as_secs_f64();
        // A short turn on a busy machine may have announced less than a message of that length, or nothing at all.
        let messages = (bytes / LONGEST).ceil();
        let length = bytes / messages.max(1.0);
        let over = Arc::new(AtomicBool::new(false));
        let is_over = Arc::clone(&over);
        let mut client = connect(server, database)?;
        let send = client.prepare(
            "SELECT pg_notify('pg_claims', rpad(n || ' ', $2, 'x'))
               FROM generate_series(1, $1::int) n",
        )?;
        let thread = thread::spawn(move || {
            while !is_over.load(Ordering::Relaxed) {
                let next = Instant::now() + PACE;
                client.query(&send, &[&(messages as i32), &(length as i32)])?;
                thread::sleep(next.saturating_duration_since(Instant::now()));
            }
            Ok(())
        });
        Ok(Self { over, thread })
    }

    /// Ends it.
    pub fn stop(self) -> Result<()> {
        self.over.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the sending thread panicked"))?
    }
}

/// Sets whether events are announced. A worker reads that when it begins: all is quiet here, so the one
/// that is there ends.
pub fn set_notify(client: &mut Client, database: &str, value: &str) -> Result<()> {
    client.batch_execute(&format!("ALTER DATABASE {database} SET pg_claims.notify = {value}"))?;
    let workers = "SELECT count(*) FROM pg_stat_activity
                    WHERE datname = current_database() AND backend_type = 'pg_claims worker'";
    wait_until("the worker to end", || Ok(client.query_one(workers, &[])?.get::<_, i64>(0) == 0))
}
