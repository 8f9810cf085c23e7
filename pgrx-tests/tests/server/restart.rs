//! Restart, crash and promotion: nothing is lost, and the time that it took counts against nobody.

use std::collections::HashSet;
use std::fs;
use std::io::ErrorKind;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use pg_claims_tests::{Server, Stop, json, own_server, wait_until};
use postgres::error::SqlState;
use postgres::{Client, NoTls};

use crate::support::*;

const STATUS: &str = "SELECT computed_status FROM v_active_sessions WHERE session_id = 's1'";

#[test]
fn a_restart_and_a_crash_give_everybody_one_full_lease() {
    let settings = ["pg_claims.stale_after = 4s", "pg_claims.auto_reap = off"];
    let (server, mut c) = coordinated_server("grace", &settings);
    granted(&mut c, "SD-1", "s1");
    age_heartbeat(&mut c, "s1", "1 hour");
    wait_until("the server to have been up for a lease", || {
        value(&mut c, STATUS).as_deref() == Some("stale")
    });
    let restarts: [(&str, &dyn Fn()); 2] = [
        ("restart", &|| {
            server.stop(Stop::Fast).unwrap();
            server.start().unwrap();
        }),
        ("crash", &|| {
            server.crash().unwrap();
            server.start().unwrap();
        }),
    ];
    for (what, restart) in restarts {
        restart();
        let mut c = connect_to(&server);
        assert_eq!(value(&mut c, STATUS).as_deref(), Some("active"), "{what}");
        assert_eq!(claim(&mut c, "SD-1", "s2")["claimed_by"], "s1", "{what}");
        // One lease, and not for ever.
        wait_until("the grace to end", || value(&mut c, STATUS).as_deref() == Some("stale"));
    }
    // A single process that is lost takes all others along, and the server recovers by itself.
    let mut c = connect_to(&server);
    let mut victim = connect_to(&server);
    kill(pg_claims_tests::backend_pid(&mut victim));
    wait_until("the server to have noticed", || c.simple_query("SELECT 1").is_err());
    let mut c = reconnect(&server);
    assert_eq!(value(&mut c, STATUS).as_deref(), Some("active"), "after a recovery");
    assert_eq!(claim(&mut c, "SD-1", "s2")["claimed_by"], "s1");
}

fn kill(pid: i32) {
    let killed = std::process::Command::new("kill").args(["-9", &pid.to_string()]).status();
    assert!(killed.unwrap().success());
}

fn reconnect(server: &Server) -> Client {
    let mut client = None;
    wait_until("the server to accept connections", || {
        match server.config("postgres").connect(NoTls) {
            Ok(connected) => client = Some(connected),
            // A socket without a server, or a server that is not ready, and nothing else.
            Err(error) => assert!(
                error.as_db_error().is_none_or(|e| e.code() == &SqlState::CANNOT_CONNECT_NOW),
                "{error:?}"
            ),
        }
        client.is_some()
    });
    client.unwrap()
}

#[test]
fn a_server_killed_in_mid_load_comes_back_in_step_and_repeats_no_token() {
    // Durable commits, as in production.
    let (server, mut c) = coordinated_server("killed", &["pg_claims.reap_interval = 1s"]);
    for n in 0..6 {
        register(&mut c, &format!("busy-{n}"));
    }
    let tokens = Mutex::new(HashSet::new());
    let stop = AtomicBool::new(false);
    let work = |n: usize, mut client: Client| {
        // Until the connection is lost.
        while !stop.load(Ordering::Relaxed) {
            let sd = format!("SD-{}", n + 1);
            let session = format!("busy-{n}");
            let answer = client.query_one("SELECT claim_sd($1, $2)", &[&sd, &session]);
            let Ok(row) = answer else { return };
            let answer: serde_json::Value = row.get(0);
            if let Some(token) = answer["claim_id"].as_i64()
                && answer["already_owned"] == false
            {
                assert!(tokens.lock().unwrap().insert(token), "token {token} repeated");
            }
            if client.query("SELECT release_sd($1)", &[&session]).is_err() {
                return;
            }
        }
    };
    for _ in 1..=3 {
        thread::scope(|scope| {
            for n in 0..6 {
                let client = reconnect(&server);
                let work = &work;
                scope.spawn(move || work(n, client));
            }
            let before = tokens.lock().unwrap().len();
            wait_until("some load", || tokens.lock().unwrap().len() > before + 20);
            server.crash().unwrap();
            server.start().unwrap();
        });
        let mut c = reconnect(&server);
        assert_in_step(&mut c);
        // Every acquisition that a client was told of is there.
        let known: HashSet<i64> = c
            .query("SELECT claim_id FROM sd_claims", &[])
            .unwrap()
            .iter()
            .map(|row| row.get(0))
            .collect();
        let told = tokens.lock().unwrap();
        let lost: Vec<_> = told.difference(&known).collect();
        assert!(lost.is_empty(), "acquisitions were forgotten: {lost:?}");
    }
    stop.store(true, Ordering::Relaxed);
}

#[test]
fn a_standby_shows_everything_writes_nothing_and_gives_grace_once_promoted() {
    let settings = [
        "shared_preload_libraries = 'pg_claims'",
        "pg_claims.stale_after = 3s",
        "pg_claims.reap_interval = 1s",
        "restore_command = 'false'",
    ];
    let (server, mut c) = coordinated_server("standby", &settings);
    let held = granted(&mut c, "SD-1", "s1");
    drop(c);
    // The same data as a standby that has no primary any more.
    server.stop(Stop::Fast).unwrap();
    fs::write(server.data().join("standby.signal"), "").unwrap();
    server.start().unwrap();
    let mut standby = connect_to(&server);
    wait_until("more than a lease to pass", || {
        let silent =
            "SELECT heartbeat_age_seconds > 4 FROM v_active_sessions WHERE session_id = 's1'";
        value(&mut standby, silent).as_deref() == Some("true")
    });
    let error = standby.query("SELECT claim_sd('SD-1', 's2')", &[]).unwrap_err();
    assert_eq!(pg_claims_tests::sqlstate(&error), "25006");
    let workers = "SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'pg_claims%'";
    assert_eq!(count(&mut standby, workers), 0);
    assert_eq!(json(&mut standby, "SELECT is_heartbeat_active()", &[])["active"], false);
    assert_eq!(json(&mut standby, "SELECT start_heartbeat('s1')", &[])["error"], "no_worker");
    standby.batch_execute("SELECT pg_promote()").unwrap();
    wait_until("the promotion", || {
        value(&mut standby, "SELECT pg_is_in_recovery()").as_deref() == Some("false")
    });
    // Also for a connection that was there before.
    assert_eq!(value(&mut standby, STATUS).as_deref(), Some("active"));
    assert_eq!(claim(&mut standby, "SD-1", "s2")["claimed_by"], "s1");
    wait_until("the worker to be there and to reap once the grace is over", || {
        value(&mut standby, "SELECT sd_id FROM claude_sessions WHERE session_id = 's1'").is_none()
    });
    assert!(granted(&mut standby, "SD-1", "s2") > held, "tokens only grow");
    assert_in_step(&mut standby);
}

#[test]
fn a_standby_sees_the_heartbeats_of_the_board_that_were_written() {
    let settings = [
        "shared_preload_libraries = 'pg_claims'",
        "pg_claims.stale_after = 2s",
        "pg_claims.reap_interval = 1s",
        "restore_command = 'false'",
    ];
    let (server, mut c) = coordinated_server("standby-board", &settings);
    let in_table = "SELECT EXTRACT(EPOCH FROM heartbeat_at)::float8 FROM claude_sessions
                     WHERE session_id = 's1'";
    let written = |c: &mut Client| c.query_one(in_table, &[]).unwrap().get::<_, f64>(0);
    // The first one brings the session onto the board; from then on the worker writes them.
    for _ in 0..2 {
        json(&mut c, "SELECT update_session_heartbeat('s1')", &[]);
    }
    let before = written(&mut c);
    wait_until("the worker to write the board", || {
        json(&mut c, "SELECT update_session_heartbeat('s1')", &[]);
        written(&mut c) > before
    });
    let before = written(&mut c);
    drop(c);
    server.stop(Stop::Fast).unwrap();
    // As another machine would have it. Nothing was kept if the worker has just written all.
    match fs::remove_file(server.data().join("pg_stat/pg_claims.board")) {
        Err(error) if error.kind() != ErrorKind::NotFound => panic!("{error}"),
        _ => {}
    }
    fs::write(server.data().join("standby.signal"), "").unwrap();
    server.start().unwrap();
    let mut standby = connect_to(&server);
    assert_eq!(count(&mut standby, "SELECT entries FROM heartbeat_board()"), 0);
    let counts =
        "SELECT EXTRACT(EPOCH FROM latest_heartbeat(tableoid, session_id, heartbeat_at))::float8
                    FROM claude_sessions WHERE session_id = 's1'";
    let counts: f64 = standby.query_one(counts, &[]).unwrap().get(0);
    assert!(counts >= before, "{counts}, and {before} was written");
}

#[test]
fn under_pg_upgrade_nothing_runs() {
    let (server, c) = coordinated_server("upgrade", &["shared_preload_libraries = 'pg_claims'"]);
    drop(c);
    server.stop(Stop::Fast).unwrap();
    // As pg_upgrade starts both servers.
    server.start_with("-b").unwrap();
    let mut c = connect_to(&server);
    assert_eq!(value(&mut c, "SELECT count(*) FROM claude_sessions").as_deref(), Some("2"));
    thread::sleep(Duration::from_secs(2));
    let workers = "SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'pg_claims%'";
    assert_eq!(count(&mut c, workers), 0);
}

#[test]
fn pg_upgrade_keeps_claims_and_repeats_no_number() {
    let settings = ["shared_preload_libraries = 'pg_claims'"];
    let (old, mut c) = coordinated_server("upgraded-from", &settings);
    c.batch_execute(
        "CREATE TABLE theirs (key text PRIMARY KEY, title text); INSERT INTO theirs VALUES ('A'), ('B');
         SELECT bind_directives('theirs', '{key}', 'title')",
    )
    .unwrap();
    let held = granted(&mut c, "A", "s1");
    let events = "SELECT count(*) FROM session_lifecycle_events";
    let before = (
        count(&mut c, events),
        count(&mut c, "SELECT max(event_id) FROM session_lifecycle_events"),
    );
    drop(c);
    old.stop(Stop::Fast).unwrap();
    let new = own_server("upgraded", &settings);
    new.stop(Stop::Fast).unwrap();
    new.upgrade_from(&old).unwrap();

    let mut c = connect_to(&new);
    assert_eq!(beat(&mut c, "s1")["claim_id"], held);
    assert_eq!(count(&mut c, events), before.0);
    let refusal = claim(&mut c, "A", "s2");
    assert_eq!(
        (&refusal["error"], &refusal["claimed_by"]),
        (&"already_claimed".into(), &"s1".into())
    );
    assert!(granted(&mut c, "B", "s2") > held);
    let least =
        format!("SELECT min(event_id) FROM session_lifecycle_events WHERE event_id > {}", before.1);
    assert!(count(&mut c, &least) > before.1);
    let wrong = "SELECT count(*) FROM coordination_repair(true)";
    assert_eq!(count(&mut c, wrong), 0);
    // The new server, too, refuses to drop the extension together with the backlog.
    let error = c.batch_execute("DROP TABLE theirs CASCADE").unwrap_err();
    assert_eq!(error.code(), Some(&SqlState::DEPENDENT_OBJECTS_STILL_EXIST));
    assert_in_step(&mut c);
}
