//! Two servers, one of which takes over from the other without having heard of its last claims.

use std::collections::{HashMap, HashSet};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pg_claims_tests::{Server, Stop, json, own_server, wait_until};
use postgres::Client;

use crate::support::*;

/// How many claims the old primary grants that the standby never hears of.
const FORGOTTEN: usize = 500;

/// A process that stands still until this is dropped, also if the test fails.
struct Standing(Pid);

impl Standing {
    fn still(pid: i32) -> Self {
        let pid = Pid::from_raw(pid);
        kill(pid, Signal::SIGSTOP).unwrap();
        Self(pid)
    }
}

impl Drop for Standing {
    fn drop(&mut self) {
        // The server may have ended the process before. No panic here: the test may be panicking already.
        match kill(self.0, Signal::SIGCONT) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => eprintln!("process {} does not go on: {error}", self.0),
        }
    }
}

/// The store of docs/guard.md, outside of both servers.
#[derive(Default)]
struct Store(HashMap<String, i64>);

impl Store {
    /// Whether it takes a write under this token.
    fn write(&mut self, sd: &str, token: i64) -> bool {
        let last = self.0.entry(sd.to_owned()).or_insert(token);
        if *last > token {
            return false;
        }
        *last = token;
        true
    }
}

/// Somebody who follows the events by a cursor.
#[derive(Default, Clone)]
struct Follower {
    cursor: i64,
    /// The numbers of the events that it has read, in the order of events.
    read: Vec<i64>,
}

impl Follower {
    /// Reads on. What is told has no number of the event's own, so that is looked up by the place.
    fn follow(&mut self, c: &mut Client) -> Vec<i64> {
        let rows = c
            .query(
                "SELECT e.id, p.event_id
                   FROM lifecycle_events_since($1, 1000000) e
                   JOIN lifecycle_event_positions p ON p.position = e.id
                  ORDER BY e.id",
                &[&self.cursor],
            )
            .unwrap();
        let mut new = Vec::new();
        for row in rows {
            assert!(row.get::<_, i64>(0) > self.cursor);
            self.cursor = row.get(0);
            new.push(row.get(1));
        }
        self.read.extend(&new);
        new
    }
}

/// Every number of a kind, and the row that has it.
type Named = HashMap<i64, String>;

fn named(c: &mut Client) -> [Named; 3] {
    [
        "SELECT claim_id, session_id || ' ' || sd_id || ' ' || claimed_at FROM sd_claims",
        "SELECT event_id, event_type || ' ' || session_id || ' ' || occurred_at
           FROM session_lifecycle_events",
        "SELECT position, event_id::text FROM lifecycle_event_positions",
    ]
    .map(|sql| c.query(sql, &[]).unwrap().iter().map(|row| (row.get(0), row.get(1))).collect())
}

/// No number names one thing on one server and another thing on the other.
fn assert_no_number_twice(one: &[Named; 3], other: &[Named; 3]) {
    for ((one, other), kind) in one.iter().zip(other).zip(["claim", "event", "place"]) {
        let twice: Vec<_> = one
            .iter()
            .filter(|(number, of)| other.get(number).is_some_and(|also| also != *of))
            .collect();
        assert!(twice.is_empty(), "{} numbers of {kind}s twice: {:?}", twice.len(), twice.first());
    }
}

fn await_worker(c: &mut Client) {
    wait_until("the worker to have put all events in order", || {
        let left = "SELECT count(*) FROM session_lifecycle_events e
             WHERE NOT EXISTS (SELECT FROM lifecycle_event_positions p WHERE p.event_id = e.event_id)";
        count(c, left) == 0
    });
}

fn primary(name: &str, settings: &[&str]) -> (Server, Client) {
    let mut all = vec![
        "shared_preload_libraries = 'pg_claims'",
        "pg_claims.reap_interval = 1s",
        "pg_claims.stale_after = 10min",
        "autovacuum = off",
    ];
    all.extend(settings);
    let server = own_server(name, &all);
    let mut c = connect_to(&server);
    c.batch_execute("CREATE EXTENSION pg_claims").unwrap();
    backlog(&mut c);
    for session in ["s1", "s2", "s3"] {
        register(&mut c, session);
    }
    (server, c)
}

/// Waits until the standby has all that the primary has written so far.
fn await_replay(primary: &mut Client) {
    let written = value(primary, "SELECT pg_current_wal_flush_lsn()").unwrap();
    wait_until("the standby to have caught up", || {
        let replayed = format!("SELECT replay_lsn >= '{written}' FROM pg_stat_replication");
        primary
            .query(&replayed, &[])
            .unwrap()
            .first()
            .is_some_and(|row| row.get::<_, Option<bool>>(0) == Some(true))
    });
}

fn walsender(primary: &mut Client) -> i32 {
    primary.query_one("SELECT pid FROM pg_stat_replication", &[]).unwrap().get(0)
}

#[test]
fn a_promoted_standby_repeats_no_number_and_fences_the_old_primary_off() {
    let (old, mut c) = primary("failover-old", &[]);
    let new = old.standby("failover-new").unwrap();
    let mut store = Store::default();

    // A shared past, and somebody who follows it.
    let shared = granted(&mut c, "SD-1", "s1");
    for _ in 0..10 {
        granted(&mut c, "SD-2", "s2");
        release(&mut c, "s2");
    }
    assert!(store.write("SD-1", shared));
    await_worker(&mut c);
    let mut follower = Follower::default();
    follower.follow(&mut c);
    await_replay(&mut c);

    // From here on the standby hears nothing.
    let sender = Standing::still(walsender(&mut c));
    let mut acknowledged = Vec::new();
    for n in 0..FORGOTTEN {
        let (sd, session) = (format!("SD-{}", 3 + n % 5), ["s2", "s3"][n % 2]);
        acknowledged.push((sd.clone(), granted(&mut c, &sd, session)));
        release(&mut c, session);
    }
    // One holds on, and has written under its claim.
    let late = granted(&mut c, "SD-3", "s2");
    assert!(store.write("SD-3", late));
    await_worker(&mut c);
    let past = follower.clone();
    assert!(follower.follow(&mut c).len() >= 2 * FORGOTTEN);

    // The standby takes over while the old primary is alive and goes on granting.
    new.promote().unwrap();
    let mut d = connect_to(&new);
    let before: HashSet<i64> = named(&mut d)[0].keys().copied().collect();
    assert!(acknowledged.iter().all(|(_, token)| !before.contains(token)), "the standby knew");
    let rightful = granted(&mut d, "SD-3", "s3");
    assert!(rightful > late, "{rightful} after {late}");
    assert!(store.write("SD-3", rightful));
    let later_on_old = granted(&mut c, "SD-4", "s3");
    assert!(rightful > later_on_old, "the old primary fences nobody off: {later_on_old}");
    for (sd, token) in &acknowledged {
        if sd == "SD-3" {
            assert!(!store.write(sd, *token), "a late client of the old primary");
        }
    }
    assert!(!store.write("SD-3", late), "a late client of the old primary");
    assert!(store.write("SD-3", rightful), "the rightful holder");

    // It is killed, and started again as a server of its own: both grant.
    drop(c);
    old.crash().unwrap();
    drop(sender);
    old.start().unwrap();
    let mut c = connect_to(&old);
    for (n, client) in [&mut c, &mut d].into_iter().enumerate() {
        for _ in 0..100 {
            let sd = ["SD-5", "SD-6"][n];
            let mut last = 0;
            for session in ["s1", "s2"] {
                if session == "s1" {
                    release(client, "s1");
                }
                release(client, session);
                let token = granted(client, sd, session);
                assert!(token > last);
                assert!(store.write(sd, token));
                assert!(last == 0 || !store.write(sd, last));
                last = token;
                release(client, session);
            }
        }
        await_worker(client);
        assert_in_step(client);
    }
    let (of_old, of_new) = (named(&mut c), named(&mut d));
    assert_no_number_twice(&of_old, &of_new);
    // All that the new primary has granted is above all that the old one had granted by then.
    let own = of_new[0].keys().filter(|token| !before.contains(token)).min().unwrap();
    assert!(acknowledged.iter().all(|(_, token)| token < own));

    // Whoever has read on the old primary finds on the new one all that it has not read, each once. What both
    // have was read before.
    let known: HashSet<i64> = follower.read.iter().copied().collect();
    let on_new: HashSet<i64> = of_new[1].keys().copied().collect();
    for mut follower in [follower, past] {
        let read = follower.follow(&mut d);
        let distinct: HashSet<i64> = read.iter().copied().collect();
        assert_eq!(distinct.len(), read.len(), "an event came twice");
        let unread: HashSet<i64> = on_new.difference(&known).copied().collect();
        assert_eq!(distinct, unread);
    }
}

#[test]
fn an_event_without_a_place_when_the_standby_took_over_is_not_lost() {
    // Nobody puts events in order but this test.
    let (old, mut c) = primary("failover-places-old", &["pg_claims.worker = off"]);
    let new = old.standby("failover-places-new").unwrap();
    json(&mut c, "SELECT cleanup_stale_sessions()", &[]);
    let mut follower = Follower::default();
    follower.follow(&mut c);
    // The event reaches the standby, its place does not. Nor does the end of a transaction that goes on.
    let mut open = connect_to(&old);
    open.batch_execute("BEGIN").unwrap();
    granted(&mut open, "SD-9", "s3");
    granted(&mut c, "SD-1", "s1");
    await_replay(&mut c);
    let sender = Standing::still(walsender(&mut c));
    json(&mut c, "SELECT cleanup_stale_sessions()", &[]);
    follower.follow(&mut c);
    granted(&mut c, "SD-2", "s2");
    json(&mut c, "SELECT cleanup_stale_sessions()", &[]);
    assert_eq!(follower.follow(&mut c).len(), 1);
    drop((c, open));
    old.crash().unwrap();
    drop(sender);
    new.promote().unwrap();
    let mut d = connect_to(&new);
    granted(&mut d, "SD-2", "s3");
    json(&mut d, "SELECT cleanup_stale_sessions()", &[]);
    let read = follower.follow(&mut d);
    // It has a new place, so it is told again: its number says that it is the same.
    let told: Vec<(i64, String)> = d
        .query(
            "SELECT event_id, event_type || ' ' || session_id FROM session_lifecycle_events
              WHERE event_id = ANY ($1) ORDER BY event_id",
            &[&read],
        )
        .unwrap()
        .iter()
        .map(|row| (row.get(0), row.get(1)))
        .collect();
    let told: Vec<&str> = told.iter().map(|(_, event)| event.as_str()).collect();
    assert_eq!(told, ["claimed s1", "claimed s3"]);
    // The worker stops waiting for events of transactions that the old primary never committed.
    wait_until("the gaps to be given up", || {
        json(&mut d, "SELECT cleanup_stale_sessions()", &[]);
        count(&mut d, "SELECT cardinality(gaps_first)::bigint FROM event_frontier") == 0
    });
    assert_in_step(&mut d);
}

#[test]
fn recovery_to_an_earlier_moment_repeats_no_number() {
    let (server, mut c) = primary("recovered", &[]);
    let kept = granted(&mut c, "SD-1", "s1");
    await_worker(&mut c);
    let base = server.base_backup("recovered-earlier").unwrap();
    granted(&mut c, "SD-2", "s2");
    c.batch_execute("SELECT pg_create_restore_point('here')").unwrap();
    for _ in 0..50 {
        granted(&mut c, "SD-3", "s3");
        release(&mut c, "s3");
    }
    await_worker(&mut c);
    c.batch_execute("SELECT pg_switch_wal()").unwrap();
    let lived = named(&mut c);
    drop(c);
    base.recover_to(&server, "here").unwrap();
    let mut d = connect_to(&base);
    wait_until("the recovery to have ended", || {
        value(&mut d, "SELECT pg_is_in_recovery()").as_deref() == Some("false")
    });
    let recovered = named(&mut d);
    assert!(recovered[0].contains_key(&kept));
    assert_eq!(recovered[0].len() + 50, lived[0].len(), "nothing was undone");
    for _ in 0..20 {
        granted(&mut d, "SD-3", "s3");
        release(&mut d, "s3");
    }
    await_worker(&mut d);
    let now = named(&mut d);
    assert_no_number_twice(&now, &lived);
    let greatest = lived[0].keys().max().unwrap();
    let new = now[0].keys().filter(|token| !recovered[0].contains_key(token)).min().unwrap();
    assert!(new > greatest, "{new} after {greatest}");
    assert_in_step(&mut d);
}

#[test]
fn a_rewound_primary_that_takes_over_again_repeats_no_number() {
    let (first, mut c) = primary("rewound", &["wal_log_hints = on", "wal_keep_size = 256MB"]);
    let second = first.standby("rewound-from").unwrap();
    granted(&mut c, "SD-1", "s1");
    await_worker(&mut c);
    await_replay(&mut c);
    second.promote().unwrap();

    // Both go on by themselves: what the first one grants from here on is thrown away.
    let mut d = connect_to(&second);
    for client in [&mut c, &mut d] {
        for _ in 0..20 {
            granted(client, "SD-2", "s2");
            release(client, "s2");
        }
        await_worker(client);
    }
    let thrown_away = named(&mut c);
    assert_no_number_twice(&thrown_away, &named(&mut d));
    drop(c);
    first.stop(Stop::Fast).unwrap();
    first.rewind(&second).unwrap();
    let kept = granted(&mut d, "SD-3", "s3");
    await_worker(&mut d);
    await_replay(&mut d);
    let of_second = named(&mut d);
    drop(d);
    second.stop(Stop::Immediate).unwrap();

    first.promote().unwrap();
    let mut c = connect_to(&first);
    assert_eq!(beat(&mut c, "s3")["claim_id"], kept, "what the second one granted is there");
    for _ in 0..20 {
        let again = granted(&mut c, "SD-2", "s2");
        release(&mut c, "s2");
        for before in [&thrown_away, &of_second] {
            assert!(before[0].keys().all(|claim_id| *claim_id < again), "{again}");
        }
    }
    await_worker(&mut c);
    let now = named(&mut c);
    assert_no_number_twice(&thrown_away, &now);
    assert_no_number_twice(&of_second, &now);
    assert_in_step(&mut c);
}
