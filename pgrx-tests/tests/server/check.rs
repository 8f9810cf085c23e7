//! The doctor.

use pg_claims_tests::{json, sqlstate};
use postgres::Client;

use crate::queue::texts;
use crate::support::*;

/// What is not well, but for what concerns the whole server that the tests share; it has no worker.
fn warnings(c: &mut Client) -> Vec<String> {
    texts(
        c,
        "SELECT name || ': ' || detail FROM coordination_check()
          WHERE status = 'warning' AND name NOT IN ('heartbeat_board', 'old_transactions', 'worker')
          ORDER BY name",
    )
}

#[test]
fn the_doctor_finds_a_new_database_well() {
    let (_db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    assert_eq!(warnings(&mut c), Vec::<String>::new());
    let consistent = "SELECT count(*) FROM coordination_check()
                       WHERE (status = 'ok') = (detail IS NULL) AND (detail IS NULL) = (hint IS NULL)";
    assert_eq!(count(&mut c, consistent), 12);
}

#[test]
fn the_doctor_tells_of_what_was_written_past_the_triggers() {
    let (_db, mut c) = coordinated();
    c.batch_execute(
        "SET session_replication_role = replica;
         UPDATE strategic_directives_v2 SET is_working_on = true WHERE sd_id = 'SD-1';
         RESET session_replication_role",
    )
    .unwrap();
    assert_eq!(
        warnings(&mut c),
        ["is_working_on: SDs of which the backlog says something else than the sessions: 1"]
    );
    granted(&mut c, "SD-1", "s1");
    json(&mut c, "SELECT release_sd('s1')", &[]);
    assert_eq!(warnings(&mut c), Vec::<String>::new());
}

#[test]
fn the_doctor_tells_of_claims_that_nobody_reaps_and_of_a_worker_in_trouble() {
    let (_db, mut c) = coordinated();
    let worker = "SELECT detail FROM coordination_check() WHERE name = 'worker'";
    assert_eq!(
        value(&mut c, worker).as_deref(),
        Some("pg_claims.worker is off: nothing ends stale claims by itself")
    );
    granted(&mut c, "SD-2", "s1");
    age_heartbeat(&mut c, "s1", "1 hour");
    c.batch_execute(
        "INSERT INTO worker_health (last_run_at, last_duration_ms, last_reaped, runs, reaped, errors, last_error,
                                    last_error_at)
         SELECT now, 1, 0, 1, 0, 1, 'it hurts', now - interval '3 minutes' FROM clock_timestamp() now",
    )
    .unwrap();
    assert_eq!(
        warnings(&mut c),
        [
            "stale_claims: stale claims that wait for the reaper: 1, the first one for 55 min",
            "worker_errors: 3 min ago: it hurts",
        ]
    );
}

#[test]
fn the_doctor_answers_operators_and_nobody_else() {
    let (db, mut c) = coordinated();
    let role = db.role("onlooker");
    let mut onlooker = db.connect_as(&role);
    for level in ["none", "viewer", "worker"] {
        json(&mut c, "SELECT grant_coordination($1, $2)", &[&role, &level]);
        let error = onlooker.query("SELECT coordination_check()", &[]).unwrap_err();
        assert_eq!(sqlstate(&error), "42501", "{level}");
    }
    json(&mut c, "SELECT grant_coordination($1, 'operator')", &[&role]);
    assert_eq!(count(&mut onlooker, "SELECT count(*) FROM coordination_check()"), 12);
}

#[test]
fn the_doctor_tells_of_indexes_that_are_missing() {
    let (_db, mut c) = coordinated();
    c.batch_execute("DROP INDEX strategic_directives_v2_parent_idx").unwrap();
    let told = warnings(&mut c).concat();
    assert!(told.starts_with("direct_access: "), "{told}");
    assert!(told.contains("strategic_directives_v2"), "{told}");
    c.batch_execute("DROP INDEX sd_conflict_matrix_open_b_idx").unwrap();
    let told = warnings(&mut c);
    let broken = "tables: lacking an index or a column, so that claims fail: sd_conflict_matrix";
    assert!(told.contains(&broken.to_owned()), "{told:?}");
}

#[test]
fn the_doctor_names_each_thing_that_would_not_survive_a_restore() {
    let (_db, mut c) = coordinated();
    c.batch_execute(
        "ALTER TABLE claude_sessions ADD COLUMN team text, ADD CONSTRAINT named CHECK (hostname <> 'none');
         CREATE INDEX by_host ON claude_sessions (hostname);
         ALTER TABLE event_frontier ADD COLUMN note text;
         ALTER TABLE sd_holds ADD CONSTRAINT one_reason UNIQUE (reason);
         CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
         CREATE TRIGGER mine AFTER INSERT ON strategic_directives_v2 EXECUTE FUNCTION nothing();
         CREATE TRIGGER mine AFTER INSERT ON directive_binding EXECUTE FUNCTION nothing();
         CREATE RULE mine AS ON DELETE TO sd_conflict_matrix DO INSTEAD NOTHING;
         CREATE POLICY mine ON sd_claims",
    )
    .unwrap();
    let told = texts(
        &mut c,
        "SELECT detail FROM coordination_check()
          WHERE name = 'dump_and_restore' AND status = 'warning' AND detail NOT LIKE '%\"watch\"%' ORDER BY detail",
    );
    let things = [
        "column \"note\" of event_frontier",
        "column \"team\" of claude_sessions",
        "constraint \"named\" of claude_sessions",
        "constraint \"one_reason\" of sd_holds",
        "index \"by_host\" of claude_sessions",
        "policy \"mine\" of sd_claims",
        "rule \"mine\" of sd_conflict_matrix",
        "trigger \"mine\" of directive_binding",
        "trigger \"mine\" of strategic_directives_v2",
    ];
    assert_eq!(told, things.map(|thing| format!("would not survive a restore: {thing}")));
}
