//! The file that keeps the board over a shutdown counts only for the start that follows it: not on another
//! server, timeline or run, and not where the server recovers.

use std::fs;
use std::path::PathBuf;

use pg_claims_tests::{Server, Stop, sqlstate, wait_until};
use postgres::Client;

use crate::board::{boarded, entries, heartbeats, needs_no_preloading};
use crate::support::*;
use crate::worker::{connect, served};

fn file_of(server: &Server) -> PathBuf {
    server.data().join("pg_stat/pg_claims.board")
}

/// Beats until the board has what the table has not. Returns both.
fn beat_ahead(c: &mut Client) -> (f64, f64) {
    wait_until("the table to be behind", || {
        beat(c, "s1");
        let (in_table, counts) = heartbeats(c, "s1");
        counts > in_table
    });
    heartbeats(c, "s1")
}

/// Shuts a server down whose board is ahead of its table. Returns the file that it leaves, and the heartbeats.
fn shut_down_ahead(server: &Server) -> (String, (f64, f64)) {
    let mut c = connect(server, "postgres");
    let seen = beat_ahead(&mut c);
    drop(c);
    server.stop(Stop::Fast).unwrap();
    (fs::read_to_string(file_of(server)).unwrap(), seen)
}

/// Does what starts the server, and asserts that the file does not count, that it is gone, and that the log tells why.
fn assert_discarded(server: &Server, in_table: f64, why: &str, start: impl FnOnce()) {
    let times_told = || server.log().unwrap().matches(why).count();
    let before = times_told();
    start();
    let mut c = connect(server, "postgres");
    assert_eq!(heartbeats(&mut c, "s1"), (in_table, in_table), "{why}");
    assert_eq!(entries(&mut c), 0, "{why}");
    assert!(!file_of(server).exists(), "{why}");
    assert_eq!(times_told(), before + 1, "{why}");
}

/// The file with one field of its first line replaced.
fn with_field(kept: &str, at: usize, replace: impl Fn(&str) -> String) -> String {
    let (first, rest) = kept.split_once('\n').unwrap();
    let mut fields: Vec<_> = first.split(' ').map(str::to_owned).collect();
    fields[at] = replace(&fields[at]);
    format!("{}\n{rest}", fields.join(" "))
}

#[test]
fn a_file_that_was_not_written_at_this_very_shutdown_is_discarded() {
    let (server, _) = boarded("board-file-fields", &[]);
    let other = |number: &str| (number.parse::<u64>().unwrap() + 1).to_string();
    type Change<'a> = &'a dyn Fn(&str) -> String;
    let changes: [(Change<'_>, &str); 6] = [
        (&|kept| with_field(kept, 1, |_| "0".into()), "another version of pg_claims"),
        (&|kept| with_field(kept, 2, other), "another server"),
        (&|kept| with_field(kept, 3, other), "another timeline"),
        (&|kept| with_field(kept, 4, other), "another shutdown"),
        // As it was written once.
        (&|kept| kept.split_once('\n').unwrap().1.into(), "another version of pg_claims"),
        (&|_| String::new(), "another version of pg_claims"),
    ];
    for (change, why) in changes {
        let (kept, seen) = shut_down_ahead(&server);
        fs::write(file_of(&server), change(&kept)).unwrap();
        assert_discarded(&server, seen.0, why, || server.start().unwrap());
    }
    // As it is it counts.
    let (_, seen) = shut_down_ahead(&server);
    server.start().unwrap();
    assert_eq!(heartbeats(&mut connect(&server, "postgres"), "s1"), seen);
    server.discard().unwrap();
}

#[test]
fn a_file_of_an_earlier_run_or_of_another_server_is_discarded() {
    let (server, _) = boarded("board-file-earlier", &[]);
    let (kept, _) = shut_down_ahead(&server);
    server.start().unwrap();
    let (_, seen) = shut_down_ahead(&server);
    fs::write(file_of(&server), &kept).unwrap();
    assert_discarded(&server, seen.0, "another shutdown", || server.start().unwrap());

    // The same session in the same database and table of a server that was made in the same way.
    let (other, _) = boarded("board-file-other", &[]);
    let (_, seen) = shut_down_ahead(&other);
    fs::write(file_of(&other), &kept).unwrap();
    assert_discarded(&other, seen.0, "another server", || other.start().unwrap());
    other.discard().unwrap();
    server.discard().unwrap();
}

#[test]
fn a_file_is_discarded_where_the_server_recovers() {
    let (server, _) = boarded("board-file-crash", &["restore_command = 'false'"]);
    // A crash, and the file of the shutdown before.
    let (kept, _) = shut_down_ahead(&server);
    server.start().unwrap();
    let mut c = connect(&server, "postgres");
    c.batch_execute("UPDATE claude_sessions SET heartbeat_at = now() WHERE session_id = 's1'")
        .unwrap();
    let (in_table, _) = heartbeats(&mut c, "s1");
    drop(c);
    server.crash().unwrap();
    fs::write(file_of(&server), &kept).unwrap();
    assert_discarded(&server, in_table, "starts with a recovery", || server.start().unwrap());

    // A standby of nobody, which is promoted, as after a switch to another server and back.
    let (_, seen) = shut_down_ahead(&server);
    fs::write(server.data().join("standby.signal"), "").unwrap();
    assert_discarded(&server, seen.0, "starts with a recovery", || server.start().unwrap());
    let mut c = connect(&server, "postgres");
    let error = c.query("SELECT update_session_heartbeat('s1')", &[]).unwrap_err();
    assert_eq!(sqlstate(&error), "25006");
    c.batch_execute("SELECT pg_promote()").unwrap();
    wait_until("the promotion", || {
        value(&mut c, "SELECT pg_is_in_recovery()").as_deref() == Some("false")
    });
    assert_eq!(heartbeats(&mut c, "s1"), (seen.0, seen.0));
    assert_eq!(entries(&mut c), 0);
    drop(c);

    // The file of the timeline before.
    let (kept, seen) = shut_down_ahead(&server);
    assert_eq!(kept.split(' ').nth(3), Some("2"), "a timeline of its own");
    fs::write(file_of(&server), with_field(&kept, 3, |_| "1".into())).unwrap();
    assert_discarded(&server, seen.0, "another timeline", || server.start().unwrap());

    // Recovery to a point in time.
    let (_, seen) = shut_down_ahead(&server);
    fs::write(server.data().join("recovery.signal"), "").unwrap();
    assert_discarded(&server, seen.0, "starts with a recovery", || server.start().unwrap());
    server.discard().unwrap();
}

#[test]
fn a_file_in_a_base_backup_is_discarded() {
    let (server, _) = boarded("board-file-backup", &[]);
    let (kept, _) = shut_down_ahead(&server);
    server.start().unwrap();
    // Such as a launcher leaves that has ended alone, or a server whose board nobody has needed yet.
    fs::write(file_of(&server), kept).unwrap();
    let taken = server.data().with_file_name("taken");
    let backup = server
        .client_program("pg_basebackup", "postgres")
        .args(["--checkpoint=fast", "--no-sync", "-D"])
        .arg(&taken)
        .output()
        .unwrap();
    assert!(backup.status.success(), "{}", String::from_utf8_lossy(&backup.stderr));
    assert!(taken.join("pg_stat/pg_claims.board").exists());
    let (in_table, _) = heartbeats(&mut connect(&server, "postgres"), "s1");
    server.stop(Stop::Immediate).unwrap();
    // In the place of the server that is lost.
    fs::remove_dir_all(server.data()).unwrap();
    fs::rename(taken, server.data()).unwrap();
    assert_discarded(&server, in_table, "starts with a recovery", || server.start().unwrap());
    server.discard().unwrap();
}

#[test]
fn a_server_without_a_board_leaves_no_file_for_later() {
    let (server, _) = boarded("board-file-none", &["max_connections = 50"]);
    let (_, seen) = shut_down_ahead(&server);
    server.start_with("-c pg_claims.max_sessions=0").unwrap();
    assert!(!file_of(&server).exists());
    server.stop(Stop::Fast).unwrap();
    server.start().unwrap();
    assert_eq!(heartbeats(&mut connect(&server, "postgres"), "s1"), (seen.0, seen.0));
    server.discard().unwrap();
}

#[test]
fn without_preloading_a_file_is_discarded_where_it_does_not_belong() {
    let (server, mut c) =
        served("board-file-dynamic", &["autovacuum = off", "restore_command = 'false'"]);
    if !needs_no_preloading(&mut c) {
        return server.discard().unwrap();
    }
    wait_until("the launcher to be there", || {
        value(&mut c, "SELECT last_run_at FROM v_worker_health").is_some()
    });
    drop(c);
    let start = || {
        server.start().unwrap();
        // Whoever needs the board first looks for the file.
        entries(&mut connect(&server, "postgres"));
    };
    let other = |number: &str| (number.parse::<u64>().unwrap() + 1).to_string();
    let launch = || {
        let mut c = connect(&server, "postgres");
        wait_until("the launcher to be there", || {
            register(&mut c, "s2");
            value(&mut c, "SELECT last_run_at > pg_postmaster_start_time() FROM v_worker_health")
                .as_deref()
                == Some("true")
        });
    };
    for (at, why) in [(2, "another server"), (3, "another timeline")] {
        let (kept, seen) = shut_down_ahead(&server);
        fs::write(file_of(&server), with_field(&kept, at, other)).unwrap();
        assert_discarded(&server, seen.0, why, start);
        launch();
    }
    let (kept, seen) = shut_down_ahead(&server);
    fs::write(server.data().join("standby.signal"), "").unwrap();
    // Nobody needs it before the promotion.
    assert_discarded(&server, seen.0, "starts with a recovery", || {
        server.start().unwrap();
        let mut c = connect(&server, "postgres");
        c.batch_execute("SELECT pg_promote()").unwrap();
        wait_until("the promotion", || {
            value(&mut c, "SELECT pg_is_in_recovery()").as_deref() == Some("false")
        });
        entries(&mut c);
    });
    // A crash.
    server.crash().unwrap();
    let kept = with_field(&kept, 3, |_| "2".into());
    fs::write(file_of(&server), kept).unwrap();
    assert_discarded(&server, seen.0, "starts with a recovery", start);
    server.discard().unwrap();
}
