//! What listeners hear.

use std::time::Duration;

use pg_claims_tests::wait_until;
use postgres::Client;
use serde_json::Value;

use crate::support::*;
use crate::worker::{connect, is_free, served, worker_pids};

/// The events that arrive on the channel within `time`.
fn notices(c: &mut Client, time: Duration) -> Vec<Value> {
    events_in(&messages(c, time))
}

fn events_in(messages: &[String]) -> Vec<Value> {
    let lines = messages.iter().flat_map(|message| message.split('\n'));
    lines.map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The messages that arrive on the channel within `time`.
fn messages(c: &mut Client, time: Duration) -> Vec<String> {
    use postgres::fallible_iterator::FallibleIterator;
    let mut notices = c.notifications();
    let mut arrived = Vec::new();
    let mut iter = notices.timeout_iter(time);
    while let Some(notice) = iter.next().unwrap() {
        assert_eq!(notice.channel(), "pg_claims");
        arrived.push(notice.payload().to_owned());
    }
    arrived
}

#[test]
fn listeners_hear_of_each_event_once_in_order_within_a_second_of_the_commit() {
    let (server, mut c) = served("listen", &[]);
    let mut listener = connect(&server, "postgres");
    listener.batch_execute("LISTEN pg_claims").unwrap();
    notices(&mut listener, Duration::from_millis(1500));
    granted(&mut c, "SD-1", "s1");
    let heard = notices(&mut listener, Duration::from_millis(1000));
    assert_eq!(heard.len(), 1, "{heard:?}");
    assert_eq!(heard[0]["event"], "claimed");
    assert_eq!(heard[0]["session_id"], "s1");
    assert_eq!(heard[0]["sd_id"], "SD-1");
    age_heartbeat(&mut c, "s1", "1 hour");
    claim(&mut c, "SD-1", "s2");
    claim(&mut c, "SD-2", "s2");
    c.batch_execute(
        "UPDATE claude_sessions SET sd_id = NULL, release_reason = repeat('x', 20000) WHERE session_id = 's2'",
    )
    .unwrap();
    granted(&mut c, "SD-3", "s3");
    age_heartbeat(&mut c, "s3", "1 hour");
    wait_until("the stale session to be reaped", || is_free(&mut c, "SD-3"));
    let heard = notices(&mut listener, Duration::from_millis(1500));
    let told: Vec<_> = heard.iter().map(|n| n["event"].as_str().unwrap().to_owned()).collect();
    assert_eq!(
        told,
        ["taken_over", "claimed", "switched", "released", "claimed", "stale", "reaped"],
        "{heard:?}"
    );
    let ids: Vec<_> = heard.iter().map(|n| n["id"].as_i64().unwrap()).collect();
    assert!(ids.is_sorted(), "{ids:?}");
    // Turned off, nothing is said, and turned on again not what was kept silent.
    c.batch_execute("ALTER SYSTEM SET pg_claims.notify = off").unwrap();
    c.batch_execute("SELECT pg_reload_conf()").unwrap();
    wait_until("the worker to have ended", || worker_pids(&mut c, "pg_claims worker").is_empty());
    granted(&mut c, "SD-4", "s1");
    let place = "SELECT count(*) FROM lifecycle_events_since() WHERE sd_id = 'SD-4'";
    wait_until("the event to be in order", || count(&mut c, place) == 1);
    assert!(notices(&mut listener, Duration::from_millis(500)).is_empty());
    c.batch_execute("ALTER SYSTEM RESET pg_claims.notify").unwrap();
    c.batch_execute("SELECT pg_reload_conf()").unwrap();
    wait_until("the worker to have ended", || worker_pids(&mut c, "pg_claims worker").is_empty());
    release(&mut c, "s1");
    let heard = notices(&mut listener, Duration::from_millis(1500));
    assert_eq!(heard.len(), 1, "{heard:?}");
    assert_eq!(heard[0]["event"], "released");
}

#[test]
fn many_events_at_once_share_messages() {
    let (server, mut c) = served("listen-many", &[]);
    let mut listener = connect(&server, "postgres");
    listener.batch_execute("LISTEN pg_claims").unwrap();
    // In one transaction each, so that they become visible at once.
    for (count, expected) in [(50, 50), (60, 2)] {
        notices(&mut listener, Duration::from_millis(1500));
        c.batch_execute("BEGIN").unwrap();
        for _ in 0..count / 2 {
            granted(&mut c, "SD-1", "s1");
            release(&mut c, "s1");
        }
        c.batch_execute("COMMIT").unwrap();
        let messages = messages(&mut listener, Duration::from_millis(1500));
        let events = events_in(&messages);
        assert_eq!(events.len(), count);
        assert!(events.is_sorted_by_key(|event| event["id"].as_i64().unwrap()), "{events:?}");
        assert_eq!(messages.len(), expected, "{messages:?}");
    }
}
