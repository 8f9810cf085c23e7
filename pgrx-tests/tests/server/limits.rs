//! The limits: how long a text may be, how much a role may have, and which characters a person is shown.

use pg_claims_tests::{backend_pid, hint, json, message, sqlstate, wait_until};
use postgres::Client;

use crate::support::*;
use crate::worker::{PRELOAD, connect, served};

fn refused(c: &mut Client, call: &str) -> String {
    let error = c.batch_execute(&format!("SELECT {call}")).expect_err(call);
    assert_eq!(sqlstate(&error), "22023", "{call}: {}", message(&error));
    assert!(!hint(&error).is_empty(), "{call}");
    message(&error).to_owned()
}

#[test]
fn what_is_too_long_is_refused_with_its_limit() {
    let (_db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    for (call, limit) in [
        ("register_session('x', repeat('h', 256))", "255"),
        ("register_session('x', p_tty => repeat('t', 60000000))", "255"),
        ("register_session('x', p_codebase => repeat('ä', 256))", "255"),
        ("claim_sd('SD-2', 's2', repeat('t', 256))", "255"),
        ("sd_start('SD-2', 's2', repeat('t', 256))", "255"),
        ("claim_next_sd('s2', repeat('t', 256))", "255"),
        ("sd_next(repeat('t', 256))", "255"),
        ("sd_next(p_session_id => repeat('t', 201))", "200"),
        ("release_sd('s1', repeat('r', 100000000))", "1000"),
        ("end_session('s1', repeat('r', 1001))", "1000"),
        ("takeover_sd('SD-1', 's2', repeat('r', 1001))", "1000"),
        ("hold_sd('SD-1', repeat('r', 1001))", "1000"),
        ("report_progress('s1', repeat('n', 1001))", "1000"),
        ("heartbeat_sessions(ARRAY(SELECT 's' || n FROM generate_series(1, 10001) n))", "10000"),
        (
            "register_session('s1', p_metadata => jsonb_build_object('a', repeat('m', 70000)))",
            "65536",
        ),
    ] {
        let told = refused(&mut c, call);
        assert!(told.contains(limit), "{call}: {told}");
    }
    // Bit by bit no further than at once.
    let grow = |c: &mut Client, key: &str| {
        c.batch_execute(&format!(
            "SELECT register_session('s1', p_metadata => jsonb_build_object('{key}', repeat('m', 30000)))"
        ))
    };
    grow(&mut c, "a").unwrap();
    grow(&mut c, "b").unwrap();
    assert_eq!(sqlstate(&grow(&mut c, "c").unwrap_err()), "22023");
    // Characters and not bytes are counted, and what was refused has changed nothing.
    c.batch_execute(
        "SELECT register_session('s2', repeat('ä', 255)), release_sd('s1', repeat('ä', 1000))",
    )
    .unwrap();
    assert_in_step(&mut c);
}

#[test]
fn the_same_argument_is_judged_alike_everywhere() {
    let (_db, mut c) = coordinated();
    for call in ["sd_next(p_limit => 0)", "sd_next(p_limit => -1)"] {
        assert_eq!(sqlstate(&c.batch_execute(&format!("SELECT {call}")).unwrap_err()), "22023");
    }
    for limit in [0, -1] {
        let error = c.query("SELECT * FROM lifecycle_events_since(0, $1)", &[&limit]).unwrap_err();
        assert_eq!(sqlstate(&error), "22023", "{limit}");
    }
    json(&mut c, "SELECT cleanup_stale_sessions()", &[]);
    wait_until("events", || count(&mut c, "SELECT count(*) FROM lifecycle_event_positions") > 0);
    assert!(!c.query("SELECT * FROM lifecycle_events_since(0, NULL)", &[]).unwrap().is_empty());
    // Before anything else is looked at.
    c.batch_execute("SET default_transaction_read_only = on").unwrap();
    refused(&mut c, "claim_sd('SD-1', 's1', repeat('t', 256))");
    let error = c.query("SELECT * FROM lifecycle_events_since(0, -1)", &[]).unwrap_err();
    assert_eq!(sqlstate(&error), "22023");
}

#[test]
fn texts_for_people_are_clean_whatever_is_stored() {
    let (_db, mut c) = coordinated();
    c.batch_execute(
        "CREATE TABLE wild (key text PRIMARY KEY, title text, status text);
         INSERT INTO wild VALUES
             (E'W\\u202e1\\u001b[31m', E'title\\u001b]0;x\\u0007\\u2066\\u200b', 'open'),
             ('W2', repeat('t', 100000), E'done\\n\\u001b[1m'), ('W3', 'c', 'open');
         SELECT bind_directives('wild', '{key}', 'title', 'status', p_terminal_statuses => ARRAY[E'done\\n\\u001b[1m'])",
    )
    .unwrap();
    c.batch_execute(
        "UPDATE claude_sessions SET hostname = E'h\\u001b[1m\\u202e', tty = E't\\n', codebase = E'c\\u200f'",
    )
    .unwrap();
    granted(&mut c, "W3", "s1");
    let mut texts: Vec<String> = Vec::new();
    for sd in ["W3", "W2"] {
        let row = c.query_one("SELECT sd_start($1, 's2')", &[&sd]).unwrap();
        texts.push(row.get(0));
    }
    let none = c.query_one("SELECT sd_next(E'a\\u001b[2J\\u202e')", &[]).unwrap();
    texts.push(none.get(0));
    texts.extend(c.query("SELECT * FROM sd_next()", &[]).unwrap().iter().map(|row| row.get(0)));
    for text in texts {
        assert!(
            text.chars().all(|character| character == '\n'
                || !(character.is_control()
                    || "\u{202e}\u{2066}\u{200b}\u{200f}\u{2028}".contains(character))),
            "{text:?}"
        );
        assert!(text.chars().count() < 2000);
    }
    // Nor is there an id that looks like another.
    for id in ["a\u{202e}b", "\u{2066}a", "a\u{200f}"] {
        let error = c.query_one("SELECT register_session($1)", &[&id]).unwrap_err();
        assert_eq!(sqlstate(&error), "22023", "{id:?}");
    }
}

#[test]
fn a_role_has_no_more_sessions_and_claims_than_its_quota() {
    let (db, mut owner) = coordinated();
    let name = db.name().to_owned();
    owner
        .batch_execute(&format!(
            "ALTER DATABASE {name} SET pg_claims.max_sessions_per_role = 3;
             ALTER DATABASE {name} SET pg_claims.max_claims_per_role = 2"
        ))
        .unwrap();
    let role = db.role("w");
    json(&mut owner, "SELECT grant_coordination($1, 'worker')", &[&role]);
    let mut w = db.connect_as(&role);
    for session in ["w1", "w2", "w3"] {
        assert_eq!(register(&mut w, session)["success"], true);
    }
    let refusal = register(&mut w, "w4");
    assert_eq!(refusal["error"], "quota_reached", "{refusal}");
    assert_eq!((&refusal["role"], &refusal["limit"]), (&role.as_str().into(), &3.into()));
    assert!(refusal["hint"].as_str().unwrap().contains("pg_claims.max_sessions_per_role"));
    // A role at its quota can still refresh its sessions, and can register another once one has ended.
    assert_eq!(register(&mut w, "w3")["success"], true);
    json(&mut w, "SELECT end_session('w3')", &[]);
    assert_eq!(register(&mut w, "w4")["success"], true);
    assert_eq!(register(&mut w, "w3")["error"], "quota_reached");
    granted(&mut w, "SD-1", "w1");
    granted(&mut w, "SD-2", "w2");
    for refusal in [claim(&mut w, "SD-3", "w4"), json(&mut w, "SELECT claim_next_sd('w4')", &[])] {
        assert_eq!(refusal["error"], "quota_reached", "{refusal}");
        assert!(refusal["hint"].as_str().unwrap().contains("pg_claims.max_claims_per_role"));
    }
    // A switch holds no more than before; who holds one has it confirmed.
    granted(&mut w, "SD-3", "w2");
    assert_eq!(claim(&mut w, "SD-1", "w1")["already_owned"], true);
    release(&mut w, "w1");
    granted(&mut w, "SD-4", "w4");
    // Operators have no such limit, and nobody by default for claims.
    for n in 1..=5 {
        register(&mut owner, &format!("o{n}"));
    }
    assert_in_step(&mut owner);
}

#[test]
fn an_error_tells_of_no_rust_and_keeps_its_context() {
    let (_db, mut c) = coordinated();
    refuse_release_of(&mut c, "SD-1");
    granted(&mut c, "SD-1", "s1");
    c.batch_execute(
        "CREATE FUNCTION outer_one() RETURNS void LANGUAGE plpgsql AS $$ BEGIN PERFORM release_sd('s1'); END $$",
    )
    .unwrap();
    for (call, contexts) in [
        ("release_sd('s1')", &["refuse() line"][..]),
        ("outer_one()", &["refuse() line", "outer_one() line"][..]),
        ("claim_sd(NULL, 's1')", &[][..]),
        ("register_session('a' || chr(8238))", &[][..]),
    ] {
        let error = c.batch_execute(&format!("SELECT {call}")).unwrap_err();
        let error = error.as_db_error().unwrap().clone();
        let told = format!("{:?}", error);
        for rust in [".rs", "rustc", "pgrx", "stack backtrace", "core::"] {
            let shown = [Some(error.message()), error.detail(), error.hint(), error.where_()];
            assert!(shown.iter().flatten().all(|text| !text.contains(rust)), "{call}: {told}");
        }
        for context in contexts {
            let found = error.where_().unwrap_or_default().matches(context).count();
            assert_eq!(found, 1, "{call}: {context} in {:?}", error.where_());
        }
    }
    // The client gets the SQLSTATE and every field that a user's trigger raised.
    c.batch_execute(
        "DROP TRIGGER refuse ON strategic_directives_v2; SELECT release_sd('s1');
         CREATE TABLE own (key text PRIMARY KEY, is_working_on boolean);
         INSERT INTO own VALUES ('A');
         SELECT bind_directives('own', '{key}');
         CREATE FUNCTION complain() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
           RAISE 'custom' USING ERRCODE = 'PT409', COLUMN = 'c', TABLE = 't', SCHEMA = 's', CONSTRAINT = 'k', DATATYPE = 'd'; END $$;
         CREATE TRIGGER complain BEFORE UPDATE ON own FOR EACH ROW EXECUTE FUNCTION complain()",
    )
    .unwrap();
    let error = c.batch_execute("SELECT claim_sd('A', 's1')").unwrap_err();
    let error = error.as_db_error().unwrap();
    assert_eq!(error.code().code(), "PT409");
    let fields =
        [error.column(), error.table(), error.schema(), error.constraint(), error.datatype()];
    assert_eq!(fields, [Some("c"), Some("t"), Some("s"), Some("k"), Some("d")]);
    // An error that was caught leaves nothing for the next one.
    c.batch_execute(
        "DO $$ BEGIN PERFORM claim_sd('A', 's1'); EXCEPTION WHEN OTHERS THEN NULL; END $$",
    )
    .unwrap();
    let error = c.batch_execute("SELECT claim_sd(NULL, 's1')").unwrap_err();
    assert_eq!(error.as_db_error().unwrap().where_(), None);
}

#[test]
fn an_announced_silence_ends_with_the_claim_however_that_ends() {
    let (_db, mut c) = coordinated();
    for end in [
        "UPDATE claude_sessions SET sd_id = NULL WHERE session_id = 's1'",
        "UPDATE claude_sessions SET status = 'idle' WHERE session_id = 's1'",
        "UPDATE claude_sessions SET sd_id = 'SD-2' WHERE session_id = 's1'",
        "SELECT claim_sd('SD-2', 's1')",
        "SELECT release_sd('s1')",
        "SELECT takeover_sd('SD-1', 's2', 'because')",
        "UPDATE strategic_directives_v2 SET status = 'completed' WHERE sd_id = 'SD-1'",
    ] {
        granted(&mut c, "SD-1", "s1");
        json(&mut c, "SELECT extend_lease('s1', '10 minutes')", &[]);
        let silent = "SELECT silent_until IS NOT NULL FROM claude_sessions WHERE session_id = 's1'";
        assert_eq!(value(&mut c, silent).as_deref(), Some("true"), "{end}");
        c.batch_execute(end).unwrap();
        assert_eq!(value(&mut c, silent).as_deref(), Some("false"), "{end}");
        for session in ["s1", "s2"] {
            release(&mut c, session);
        }
    }
    assert_in_step(&mut c);
}

#[test]
fn the_lease_that_counts_decides_how_often_the_server_beats() {
    let (server, mut c) =
        served("pace", &["pg_claims.heartbeat_interval = 30s", "pg_claims.stale_after = 6s"]);
    c.batch_execute("ALTER DATABASE postgres SET pg_claims.stale_after = '3s'").unwrap();
    let mut own = connect(&server, "postgres");
    granted(&mut own, "SD-1", "s1");
    let started = json(&mut own, "SELECT start_heartbeat('s1')", &[]);
    assert_eq!(started["intervalMs"], 1000, "{started}");
    let stats = json(&mut own, "SELECT get_heartbeat_stats()", &[]);
    assert_eq!(stats["healthy"], true, "{stats}");
    // Twice its lease.
    let begin = std::time::Instant::now();
    let status = "SELECT computed_status FROM v_active_sessions WHERE session_id = 's1'";
    while begin.elapsed() < std::time::Duration::from_secs(6) {
        assert_eq!(value(&mut own, status).as_deref(), Some("active"), "{:?}", begin.elapsed());
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

#[test]
fn a_connection_that_is_reset_has_no_heartbeat() {
    let (server, mut c) = served("reset", &[PRELOAD]);
    for reset in ["DISCARD ALL", "RESET ALL", "RESET pg_claims.heartbeat_active"] {
        let mut own = connect(&server, "postgres");
        let pid = backend_pid(&mut own);
        let beats = |c: &mut Client| {
            c.query_one(
                "SELECT count(*) FROM heartbeat_connections WHERE backend_pid = $1",
                &[&pid],
            )
            .unwrap()
            .get::<_, i64>(0)
        };
        assert_eq!(json(&mut own, "SELECT start_heartbeat('s1')", &[])["success"], true);
        assert_eq!(
            value(&mut own, "SELECT current_setting('pg_claims.heartbeat_active')").as_deref(),
            Some("on")
        );
        // A rolled back reset leaves the heartbeat running.
        if reset != "DISCARD ALL" {
            own.batch_execute(&format!("BEGIN; {reset}; ROLLBACK")).unwrap();
            assert_eq!(json(&mut own, "SELECT is_heartbeat_active()", &[])["active"], true);
        }
        // A read-only transaction cannot end the heartbeat; the next transaction that may write does.
        own.batch_execute("SET default_transaction_read_only = on").unwrap();
        own.batch_execute(reset).unwrap();
        own.batch_execute("SET default_transaction_read_only = off").unwrap();
        own.batch_execute("SELECT 1").unwrap();
        assert_eq!(beats(&mut c), 0, "{reset}");
        assert_eq!(json(&mut own, "SELECT is_heartbeat_active()", &[])["active"], false, "{reset}");
        // And it begins again.
        assert_eq!(json(&mut own, "SELECT start_heartbeat('s1')", &[])["success"], true);
        assert_eq!(beats(&mut c), 1, "{reset}");
        json(&mut own, "SELECT stop_heartbeat()", &[]);
        assert_eq!(beats(&mut c), 0, "{reset}");
        let error = own.batch_execute("SET pg_claims.heartbeat_active = on").unwrap_err();
        assert_eq!(sqlstate(&error), "22023");
    }
}

#[test]
fn a_heartbeat_is_in_the_way_of_no_parallel_query_and_of_no_reset_without_the_extension() {
    let (server, mut c) = served("reset-dropped", &[PRELOAD]);
    let mut own = connect(&server, "postgres");
    assert_eq!(json(&mut own, "SELECT start_heartbeat('s1')", &[])["success"], true);
    own.batch_execute(
        "CREATE TABLE many AS SELECT generate_series(1, 1000) AS n; ALTER TABLE many SET (parallel_workers = 2);
         SET parallel_setup_cost = 0; SET parallel_tuple_cost = 0; SET min_parallel_table_scan_size = 0",
    )
    .unwrap();
    let plan: Vec<String> = own
        .query("EXPLAIN (ANALYZE, TIMING OFF) SELECT count(*) FROM many", &[])
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert!(plan.iter().any(|line| line.contains("Workers Launched: ")), "{plan:#?}");
    assert_eq!(count(&mut own, "SELECT count(*) FROM many"), 1000);
    c.batch_execute("DROP EXTENSION pg_claims").unwrap();
    for _ in 0..2 {
        own.batch_execute("DISCARD ALL").unwrap();
    }
    let active = "SELECT current_setting('pg_claims.heartbeat_active')";
    assert_eq!(value(&mut own, active).as_deref(), Some("off"));
}
