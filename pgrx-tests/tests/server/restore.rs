//! A dump in any form is restored whole while the worker is alive, and then goes on as if nothing had been.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use pg_claims_tests::{Server, json, own_server, wait_until};
use postgres::Client;
use postgres::fallible_iterator::FallibleIterator;
use serde_json::Value;

use crate::support::*;
use crate::worker::{PRELOAD, connect};

/// How many sessions hold an SD in the dumped database.
pub const HOLDERS: usize = 100;

/// Everything that a dump must bring along.
pub const ALL: &str = "
    SELECT jsonb_build_object(
        'sessions', (SELECT jsonb_agg(to_jsonb(s) ORDER BY session_id) FROM claude_sessions s),
        'claims', (SELECT jsonb_agg(to_jsonb(c) ORDER BY claim_id) FROM sd_claims c),
        'events', (SELECT jsonb_agg(to_jsonb(e) ORDER BY event_id) FROM session_lifecycle_events e),
        'places', (SELECT jsonb_agg(to_jsonb(p) ORDER BY position) FROM lifecycle_event_positions p),
        -- Gaps are given up whenever somebody looks.
        'frontier', (SELECT jsonb_agg(to_jsonb(f) - '{gaps_first,gaps_last,gaps_before}'::text[]) FROM event_frontier f),
        'conflicts', (SELECT jsonb_agg(to_jsonb(m) ORDER BY conflict_id) FROM sd_conflict_matrix m),
        'holds', (SELECT jsonb_agg(to_jsonb(h) ORDER BY sd_id) FROM sd_holds h),
        'binding', (SELECT jsonb_agg(to_jsonb(b)) FROM directive_binding b),
        'directives', (SELECT jsonb_agg(to_jsonb(d) ORDER BY sd_id) FROM v_directives d))";

/// The ways of `pg_dump` and back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    Plain,
    Inserts,
    Custom,
    Directory,
    Sections,
    SchemaThenData,
}

pub const MAIN_FORMS: [Form; 5] =
    [Form::Plain, Form::Custom, Form::Directory, Form::Sections, Form::SchemaThenData];

/// A dump in files of its own.
pub struct Dump {
    form: Form,
    path: PathBuf,
}

impl Dump {
    /// Writes one beside the server's data.
    pub fn write(server: &Server, database: &str, form: Form, further: &[&str]) -> Self {
        let name = format!("{database}-{form:?}{}", further.concat());
        let path = server.data().with_file_name(name);
        let file = |of: &str| format!("{}{of}", path.display());
        let write = |of: &str, arguments: &[&str]| {
            let mut all = vec!["-f".to_owned(), file(of)];
            all.extend(arguments.iter().chain(further).map(|argument| (*argument).to_owned()));
            let all: Vec<&str> = all.iter().map(String::as_str).collect();
            server.run("pg_dump", database, &all).unwrap();
        };
        match form {
            Form::Plain => write("", &[]),
            Form::Inserts => write("", &["--column-inserts"]),
            Form::Custom => write("", &["-Fc"]),
            Form::Directory => write("", &["-Fd", "-j2"]),
            Form::Sections => {
                for section in ["pre-data", "data", "post-data"] {
                    write(section, &["--section", section]);
                }
            }
            Form::SchemaThenData => {
                write("s", &["-s"]);
                write("a", &["-a"]);
            }
        }
        Self { form, path }
    }

    /// Restores it; nothing may fail.
    pub fn restore(&self, server: &Server, database: &str, further: &[&str]) {
        let file = |of: &str| format!("{}{of}", self.path.display());
        let run = |program: &str, arguments: &[&str]| {
            let all: Vec<&str> = arguments.iter().chain(further).copied().collect();
            server.run(program, database, &all).unwrap();
        };
        let script = |of: &str| run("psql", &["-Xqv", "ON_ERROR_STOP=1", "-f", &file(of)]);
        match self.form {
            Form::Plain | Form::Inserts => script(""),
            Form::Custom => run("pg_restore", &["-e", "-d", database, &file("")]),
            Form::Directory => run("pg_restore", &["-e", "-j2", "-d", database, &file("")]),
            Form::Sections => ["pre-data", "data", "post-data"].into_iter().for_each(script),
            Form::SchemaThenData => ["s", "a"].into_iter().for_each(script),
        }
    }

    /// Restores the rows alone, of a dump that has them in a file of their own.
    pub fn restore_data(&self, server: &Server, database: &str) {
        let file = format!("{}a", self.path.display());
        server.run("psql", database, &["-Xqv", "ON_ERROR_STOP=1", "-f", &file]).unwrap();
    }
}

/// A server with a living worker that looks every second.
pub fn server(name: &str, settings: &[&str]) -> Server {
    let mut all = vec!["fsync = off", "max_connections = 60", "pg_claims.reap_interval = 1s"];
    all.extend(settings);
    own_server(name, &all)
}

/// A database with a hundred sessions that hold an SD each, and some that held one, half of which the listeners
/// have not been told of.
pub fn source(server: &Server, database: &str) -> Client {
    connect(server, "postgres").batch_execute(&format!("CREATE DATABASE {database}")).unwrap();
    let mut c = connect(server, database);
    c.batch_execute("CREATE EXTENSION pg_claims").unwrap();
    fill(&mut c);
    c
}

pub fn fill(c: &mut Client) {
    let work = |c: &mut Client, from: usize, to: usize| {
        c.batch_execute(&format!(
            "INSERT INTO strategic_directives_v2 (sd_id) SELECT 'W-' || n FROM generate_series({from}, {to}) n;
             SELECT register_session('h-' || n, 'host', 'tty') FROM generate_series({from}, {to}) n;
             SELECT claim_sd('W-' || n, 'h-' || n) FROM generate_series({from}, {to}) n"
        ))
        .unwrap();
    };
    backlog(c);
    register(c, "s1");
    granted(c, "SD-1", "s1");
    release(c, "s1");
    json(c, "SELECT declare_conflict('SD-2', 'SD-3', 'files')", &[]);
    json(c, "SELECT hold_sd('SD-4', 'not now')", &[]);
    work(c, 1, HOLDERS / 2);
    settle(c);
    set_worker(c, false);
    work(c, HOLDERS / 2 + 1, HOLDERS);
}

/// Waits until all events have been announced.
pub fn settle(c: &mut Client) {
    wait_until("all events to be announced", || {
        count(
            c,
            "SELECT count(*) FROM session_lifecycle_events e
               LEFT JOIN lifecycle_event_positions p USING (event_id)
               LEFT JOIN event_frontier f ON p.position <= f.announced_to
              WHERE f.is_frontier IS NULL",
        ) == 0
    });
}

/// Turns the workers on or off, and waits until those that run have ended.
pub fn set_worker(c: &mut Client, on: bool) {
    c.batch_execute(&format!("ALTER SYSTEM SET pg_claims.worker = {on}")).unwrap();
    c.batch_execute("SELECT pg_reload_conf()").unwrap();
    let workers = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'pg_claims worker'";
    if !on {
        wait_until("the workers to end", || count(c, workers) == 0);
    }
}

/// Has workers come to every database all the time, until it is dropped.
pub struct Hurry {
    ended: std::sync::Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Hurry {
    pub fn new(server: &Server) -> Self {
        let ended = std::sync::Arc::new(AtomicBool::new(false));
        let until = ended.clone();
        let mut c = connect(server, "postgres");
        let thread = thread::spawn(move || {
            while !until.load(Ordering::Relaxed) {
                c.batch_execute("SELECT pg_reload_conf()").unwrap();
                thread::sleep(Duration::from_millis(20));
            }
        });
        Self { ended, thread: Some(thread) }
    }
}

impl Drop for Hurry {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ended = thread.join();
        }
    }
}

/// A new database that the workers know and visit.
pub fn visited_database(server: &Server, name: &str) {
    let mut c = connect(server, "postgres");
    c.batch_execute(&format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)")).unwrap();
    c.batch_execute(&format!("CREATE DATABASE {name}")).unwrap();
    let mut c = connect(server, name);
    c.batch_execute("CREATE EXTENSION pg_claims").unwrap();
    register(&mut c, "s");
    wait_until("the worker to have been there", || {
        count(&mut c, "SELECT count(*) FROM lifecycle_event_positions") > 0
    });
    c.batch_execute("DROP EXTENSION pg_claims").unwrap();
}

/// The events that listeners are told of, by their numbers, in the order of what they are told.
fn heard(listener: &mut Client, until: &str) -> Vec<Value> {
    let mut heard: Vec<Value> = Vec::new();
    wait_until("the listener to hear", || {
        let mut notices = listener.notifications();
        let mut arriving = notices.timeout_iter(Duration::from_millis(20));
        while let Some(notice) = arriving.next().unwrap() {
            let lines =
                notice.payload().split('\n').map(|line| serde_json::from_str(line).unwrap());
            heard.extend(lines);
        }
        heard.iter().any(|notice| notice["sd_id"] == until)
    });
    heard
}

/// The numbers of the events that a reader gets, in order.
fn read(c: &mut Client) -> Vec<(i64, i64)> {
    c.query(
        "SELECT id, event_id FROM lifecycle_events_since(0, 1000000)
           JOIN lifecycle_event_positions ON position = id ORDER BY id",
        &[],
    )
    .unwrap()
    .iter()
    .map(|row| (row.get(0), row.get(1)))
    .collect()
}

/// Checks that a restored database has all that its source had, which `all` describes, and works.
pub fn check(server: &Server, database: &str, all: &Value) {
    let mut listener = connect(server, database);
    listener.batch_execute("LISTEN pg_claims").unwrap();
    let mut c = connect(server, database);
    assert_eq!(&json(&mut c, ALL, &[]), all, "{database}");
    assert_in_step(&mut c);
    let stale = "SELECT count(*) FROM v_active_sessions WHERE computed_status = 'stale'";
    assert_eq!(count(&mut c, stale), 0, "nobody is stale before anybody could beat");

    // Used for the first time.
    for n in 1..=HOLDERS {
        let answer = beat(&mut c, &format!("h-{n}"));
        assert_eq!(answer["sd_id"], format!("W-{n}"), "{answer}");
    }
    assert_eq!(claim(&mut c, "W-1", "s1")["claimed_by"], "h-1");
    granted(&mut c, "SD-9", "s1");
    settle(&mut c);

    let places = all["places"].as_array().unwrap();
    let before: Vec<(i64, i64)> = places
        .iter()
        .map(|place| (place["position"].as_i64().unwrap(), place["event_id"].as_i64().unwrap()))
        .collect();
    let now = read(&mut c);
    assert!(now.starts_with(&before), "the order of a dump is kept");
    let mut times: HashMap<i64, usize> = HashMap::new();
    for (_, event) in &now {
        *times.entry(*event).or_default() += 1;
    }
    assert!(times.values().all(|times| *times == 1), "{times:?}");
    assert_eq!(
        times.len() as i64,
        count(&mut c, "SELECT count(*) FROM session_lifecycle_events"),
        "each event is read"
    );

    let announced_to = all["frontier"][0]["announced_to"].as_i64().unwrap();
    let told: Vec<i64> =
        heard(&mut listener, "SD-9").iter().map(|notice| notice["id"].as_i64().unwrap()).collect();
    let to_be_told: Vec<i64> = c
        .query(
            "SELECT id FROM lifecycle_events_since($1, 1000000) WHERE event_type <> 'registered'
              ORDER BY id",
            &[&announced_to],
        )
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert_eq!(told, to_be_told, "each event is heard once, unless it was before the dump");
    assert_eq!(to_be_told.len(), HOLDERS / 2 + 1);
    assert_in_step(&mut c);
}

fn twenty_times(name: &str, settings: &[&str], rounds: usize) {
    let server = server(name, settings);
    let mut source = source(&server, "source");
    let all = json(&mut source, ALL, &[]);
    let dumps = MAIN_FORMS.map(|form| Dump::write(&server, "source", form, &[]));
    set_worker(&mut source, true);
    let _hurry = Hurry::new(&server);
    thread::scope(|scope| {
        for dump in &dumps {
            let (server, all) = (&server, &all);
            scope.spawn(move || {
                let database = format!("{:?}", dump.form).to_lowercase();
                for _ in 0..rounds {
                    visited_database(server, &database);
                    dump.restore(server, &database, &[]);
                    check(server, &database, all);
                }
            });
        }
    });
}

#[test]
fn every_main_form_is_restored_whole_twenty_times_in_a_row_with_the_worker_alive() {
    twenty_times("restore-preloaded", &[PRELOAD], 20);
}

#[test]
fn every_main_form_is_restored_whole_without_preloading() {
    twenty_times("restore-dynamic", &[], 3);
}
