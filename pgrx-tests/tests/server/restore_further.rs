//! Dumps of other kinds, and into databases that are not empty.

use pg_claims_tests::{Server, json, own_server, wait_until};
use postgres::Client;

use crate::restore::*;
use crate::support::*;
use crate::worker::{PRELOAD, connect};

const HELD: &str = "SELECT count(*) FROM claude_sessions WHERE sd_id IS NOT NULL";

#[test]
fn a_dump_whose_leases_are_long_over_gives_everybody_one_lease_from_the_first_use_on() {
    for (name, settings) in [("old-preloaded", vec![PRELOAD]), ("old-dynamic", vec![])] {
        let server = server(name, &settings);
        let mut source = source(&server, "source");
        source
            .batch_execute(
                "UPDATE claude_sessions SET heartbeat_at = heartbeat_at - interval '2 hours'",
            )
            .unwrap();
        let all = json(&mut source, ALL, &[]);
        let dump = Dump::write(&server, "source", Form::Custom, &[]);
        source.batch_execute("DROP EXTENSION pg_claims").unwrap();
        set_worker(&mut source, true);
        visited_database(&server, "target");
        let lease = "pg_claims.stale_after = '4s'";
        source.batch_execute(&format!("ALTER DATABASE target SET {lease}")).unwrap();
        source.batch_execute(&format!("ALTER DATABASE source SET {lease}")).unwrap();
        dump.restore(&server, "target", &[]);

        // However long nobody comes: elsewhere a whole lease passes meanwhile.
        let mut clock = connect(&server, "source");
        clock.batch_execute("CREATE EXTENSION pg_claims").unwrap();
        backlog(&mut clock);
        register(&mut clock, "s1");
        granted(&mut clock, "SD-1", "s1");
        wait_until("a lease to pass by", || count(&mut clock, HELD) == 0);
        let mut c = connect(&server, "target");
        assert_eq!(json(&mut c, ALL, &[]), all, "{name}");
        let stale = "SELECT count(*) FROM v_active_sessions WHERE computed_status = 'stale'";
        assert_eq!(count(&mut c, stale), 0);

        register(&mut c, "fresh");
        assert_eq!(claim(&mut c, "W-1", "fresh")["claimed_by"], "h-1");
        wait_until("the others to be reaped", || {
            assert_eq!(beat(&mut c, "h-7")["sd_id"], "W-7", "it lives");
            count(&mut c, HELD) == 1
        });
        let soonest = "SELECT min(e.occurred_at) >= min(i.in_use_since) + interval '4s'
                         FROM session_lifecycle_events e, installation i
                        WHERE e.event_type IN ('stale', 'reaped')";
        assert_eq!(value(&mut c, soonest).as_deref(), Some("true"), "not within one lease");
        assert_in_step(&mut c);
        granted(&mut c, "W-1", "fresh");
    }
}

#[test]
fn a_dump_replaces_a_database_that_has_lived_on() {
    let server = server("restore-over", &[PRELOAD]);
    let mut c = source(&server, "lively");
    let all = json(&mut c, ALL, &[]);
    let whole = Dump::write(&server, "lively", Form::Custom, &[]);
    let in_parts = Dump::write(&server, "lively", Form::SchemaThenData, &[]);
    set_worker(&mut c, true);
    let _hurry = Hurry::new(&server);
    let live_on = |c: &mut Client| {
        settle(c);
        c.batch_execute(
            "SELECT release_sd('h-' || n), claim_sd('SD-8', 'h-1') FROM generate_series(1, 60) n",
        )
        .unwrap();
        register(c, "later");
        granted(c, "W-5", "later");
        settle(c);
    };
    for _ in 0..3 {
        live_on(&mut c);
        whole.restore(&server, "lively", &["--clean", "--if-exists"]);
        check(&server, "lively", &all);

        live_on(&mut c);
        c.batch_execute(
            "BEGIN;
             DELETE FROM claude_sessions; DELETE FROM directive_binding;
             TRUNCATE sd_claims, session_lifecycle_events, lifecycle_event_positions, sd_conflict_matrix,
                      sd_holds, strategic_directives_v2;
             COMMIT",
        )
        .unwrap();
        in_parts.restore_data(&server, "lively");
        check(&server, "lively", &all);
    }
}

#[test]
fn other_forms_are_restored_whole() {
    let server = server("restore-forms", &[PRELOAD]);
    let mut c = source(&server, "source");
    let all = json(&mut c, ALL, &[]);
    let forms: [(Form, &[&str], &[&str]); 6] = [
        (Form::Inserts, &[], &[]),
        (Form::Plain, &["--no-owner", "--no-acl"], &["-1"]),
        (Form::Plain, &["--clean", "--if-exists"], &[]),
        (Form::Custom, &["--no-owner"], &["--no-owner", "--no-acl", "-1"]),
        (Form::Directory, &["--no-acl"], &["--clean", "--if-exists"]),
        (Form::Inserts, &["--on-conflict-do-nothing"], &[]),
    ];
    let dumps = forms.map(|(form, dumping, restoring)| {
        (Dump::write(&server, "source", form, dumping), restoring)
    });
    set_worker(&mut c, true);
    let _hurry = Hurry::new(&server);
    for (dump, restoring) in &dumps {
        visited_database(&server, "target");
        dump.restore(&server, "target", restoring);
        check(&server, "target", &all);
    }
}

/// A database whose backlog is a table of the user's, with a guarded table beside it.
fn bound(server: &Server, database: &str) -> Client {
    connect(server, "postgres").batch_execute(&format!("CREATE DATABASE {database}")).unwrap();
    let mut c = connect(server, database);
    c.batch_execute(
        "CREATE EXTENSION pg_claims;
         CREATE TABLE items (key text PRIMARY KEY, label text, status text, is_working_on boolean, active_session_id text);
         INSERT INTO items (key) SELECT 'SD-' || n FROM generate_series(1, 9) n;
         CREATE TABLE results (sd text, result text);
         SELECT bind_directives('items', '{key}', p_status_column => 'status', p_title_column => 'label'), guard_table('results', 'sd')",
    )
    .unwrap();
    fill_bound(&mut c);
    c
}

fn fill_bound(c: &mut Client) {
    for session in ["s1", "s2", "s3"] {
        register(c, session);
    }
    granted(c, "SD-1", "s1");
    granted(c, "SD-2", "s2");
    json(c, "SELECT hold_sd('SD-4', 'not now')", &[]);
    json(c, "SELECT declare_conflict('SD-2', 'SD-3', 'files')", &[]);
    c.batch_execute(
        "BEGIN; SELECT assert_claim('SD-1', 's1', claim_id) FROM claude_sessions WHERE session_id = 's1'; INSERT INTO results VALUES ('SD-1', 'half done'); COMMIT",
    )
    .unwrap();
    settle(c);
}

/// The restored database goes on with its bound backlog and its guard.
fn check_bound(c: &mut Client, all: &serde_json::Value) {
    assert_eq!(&json(c, ALL, &[]), all);
    assert_eq!(beat(c, "s1")["sd_id"], "SD-1");
    assert_eq!(claim(c, "SD-1", "s3")["claimed_by"], "s1");
    assert_eq!(claim(c, "SD-3", "s3")["error"], "conflict");
    let error = c.batch_execute("INSERT INTO results VALUES ('SD-1', 'late')").unwrap_err();
    assert_eq!(pg_claims_tests::sqlstate(&error), "55000", "the guard is there");
    c.batch_execute("UPDATE items SET status = 'completed' WHERE key = 'SD-1'").unwrap();
    assert!(beat(c, "s1")["sd_id"].is_null(), "and so are the backlog's triggers");
    assert_in_step(c);
}

#[test]
fn a_bound_backlog_and_a_guarded_table_are_restored_in_every_form() {
    let server = server("restore-bound", &[PRELOAD]);
    let mut c = bound(&server, "source");
    let all = json(&mut c, ALL, &[]);
    let _hurry = Hurry::new(&server);
    for form in MAIN_FORMS {
        let dump = Dump::write(&server, "source", form, &[]);
        visited_database(&server, "target");
        dump.restore(&server, "target", &[]);
        check_bound(&mut connect(&server, "target"), &all);
    }
    // Over the database itself, which has lived on.
    let custom = Dump::write(&server, "source", Form::Custom, &[]);
    let plain = Dump::write(&server, "source", Form::Plain, &["--clean", "--if-exists"]);
    for (dump, further) in [(custom, &["--clean", "--if-exists"][..]), (plain, &[])] {
        json(&mut c, "SELECT end_session('s1')", &[]);
        granted(&mut c, "SD-5", "s3");
        dump.restore(&server, "source", further);
        check_bound(&mut c, &all);
    }
}

#[test]
fn a_guard_and_a_claim_outlive_a_restore_into_a_server_without_the_roles_of_the_dump() {
    let source_server = server("restore-from", &[PRELOAD]);
    let mut c = source(&source_server, "source");
    c.batch_execute(
        "CREATE ROLE agent LOGIN; SELECT grant_coordination('agent', 'worker');
         UPDATE claude_sessions SET owner_role = 'agent' WHERE session_id LIKE 'h-%'",
    )
    .unwrap();
    let all = json(&mut c, ALL, &[]);
    let server =
        own_server("restore-to", &["fsync = off", "pg_claims.reap_interval = 1s", PRELOAD]);
    for form in MAIN_FORMS {
        let dump = Dump::write(&source_server, "source", form, &["--no-owner", "--no-acl"]);
        visited_database(&server, "target");
        let _hurry = Hurry::new(&server);
        dump.restore(&server, "target", &[]);
        let mut c = connect(&server, "target");
        assert_eq!(
            count(&mut c, "SELECT count(*) FROM claude_sessions WHERE owner_oid IS NULL"),
            HOLDERS as i64
        );
        let here = json(&mut c, ALL, &[]);
        let without_numbers = |all: &serde_json::Value| {
            let mut all = all.clone();
            for session in all["sessions"].as_array_mut().unwrap() {
                session["owner_oid"] = serde_json::Value::Null;
            }
            all
        };
        assert_eq!(without_numbers(&here), without_numbers(&all), "{form:?}");
        // The superuser is an operator, who may act for nobody's sessions.
        check(&server, "target", &here);
        c.batch_execute("CREATE ROLE heir").unwrap();
        assert_eq!(
            json(&mut c, "SELECT assign_sessions('agent', 'heir')", &[])["sessions"],
            HOLDERS as i64
        );
        drop(c);
        let mut c = connect(&server, "postgres");
        for drop in ["DROP DATABASE target WITH (FORCE)", "DROP ROLE heir"] {
            c.batch_execute(drop).unwrap();
        }
    }
}

#[test]
fn a_function_that_is_called_on_the_connection_of_a_restore_uses_the_extension() {
    let (db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    let copy = pg_claims_tests::TestDb::empty();
    let calls = "SELECT public.register_session('s4'); SELECT public.claim_sd('SD-2', 's4');
                 INSERT INTO public.claude_sessions (session_id) VALUES ('by hand');";
    copy.psql(&format!("{}\n{calls}", db.dump()));
    let mut c = copy.connect();
    assert_eq!(events(&mut c, "s4"), ["registered", "claimed"]);
    // The last line is what a dump's script looks like; the first function begins it again.
    let in_use = "SELECT count(*) FROM installation WHERE in_use_since IS NOT NULL";
    assert_eq!(count(&mut c, in_use), 0);
    release(&mut c, "s4");
    assert_eq!(count(&mut c, in_use), 1);
    assert_in_step(&mut c);
}

#[test]
fn looking_is_no_use_and_a_first_use_that_is_rolled_back_was_none() {
    let db = pg_claims_tests::TestDb::new();
    let mut c = db.connect();
    let in_use = "SELECT count(*) FROM installation WHERE in_use_since IS NOT NULL";
    c.batch_execute(
        "SELECT * FROM coordination_check(); SELECT is_sd_claimed('x'); SELECT sd_next();
         SELECT * FROM lifecycle_events_since(); SELECT * FROM v_active_sessions; SELECT * FROM v_sd_next;
         SELECT * FROM v_worker_health; SELECT is_heartbeat_active(); SELECT * FROM dependency_cycles();
         INSERT INTO strategic_directives_v2 (sd_id) VALUES ('SD-1')",
    )
    .unwrap();
    assert_eq!(count(&mut c, in_use), 0);
    c.batch_execute("BEGIN; SELECT register_session('s1'); ROLLBACK").unwrap();
    c.batch_execute("BEGIN; SAVEPOINT s; SELECT register_session('s1'); ROLLBACK TO s; COMMIT")
        .unwrap();
    assert_eq!(count(&mut c, in_use), 0);
    c.batch_execute("BEGIN READ ONLY").unwrap();
    let error = c.query("SELECT register_session('s1')", &[]).unwrap_err();
    assert_eq!(pg_claims_tests::sqlstate(&error), "25006");
    c.batch_execute("ROLLBACK").unwrap();
    assert_eq!(count(&mut c, in_use), 0);

    // Whoever comes while another's first use is open neither waits for it nor depends on it.
    let mut other = db.connect();
    let mut open = other.transaction().unwrap();
    open.batch_execute("SELECT register_session('s2')").unwrap();
    c.batch_execute("SET lock_timeout = '5s'").unwrap();
    register(&mut c, "s3");
    assert_eq!(count(&mut c, in_use), 1);
    open.rollback().unwrap();
    assert_eq!(count(&mut c, in_use), 1);
    register(&mut other, "s2");
    assert_eq!(count(&mut c, in_use), 1, "once is enough");
}

#[test]
fn a_session_that_is_written_by_hand_is_a_use() {
    let db = pg_claims_tests::TestDb::new();
    let mut c = db.connect();
    c.batch_execute("INSERT INTO claude_sessions (session_id) VALUES ('s1')").unwrap();
    assert_eq!(
        count(&mut c, "SELECT count(*) FROM installation WHERE in_use_since IS NOT NULL"),
        1
    );
    // And an extension that is made anew begins anew, also for a connection that knew the one before.
    c.batch_execute("DROP EXTENSION pg_claims; CREATE EXTENSION pg_claims").unwrap();
    assert_eq!(
        count(&mut c, "SELECT count(*) FROM installation WHERE in_use_since IS NOT NULL"),
        0
    );
    register(&mut c, "s1");
    assert_eq!(
        count(&mut c, "SELECT count(*) FROM installation WHERE in_use_since IS NOT NULL"),
        1
    );
}
