//! coordination_repair() finds all that is wrong, and mends it.

use pg_claims_tests::{json, sqlstate};
use postgres::Client;

use crate::support::*;
use crate::worker::{PRELOAD, served};

/// The rows of a call: kind, object, whether it was mended.
fn repair(c: &mut Client, dry_run: bool) -> Vec<(String, String, bool)> {
    c.query("SELECT kind, object, done FROM coordination_repair($1)", &[&dry_run])
        .unwrap()
        .iter()
        .map(|row| (row.get(0), row.get(1), row.get(2)))
        .collect()
}

fn kinds(found: &[(String, String, bool)]) -> Vec<&str> {
    found.iter().map(|(kind, ..)| kind.as_str()).collect()
}

/// Mends, and asserts that a dry run before says the same, and that one afterwards finds all well.
fn mend(c: &mut Client) -> Vec<(String, String, bool)> {
    let looked = repair(c, true);
    assert!(looked.iter().all(|(.., done)| !done), "{looked:?}");
    assert_eq!(kinds(&repair(c, true)), kinds(&looked), "a dry run changed something");
    let mended = repair(c, false);
    let named = |found: &[(String, String, bool)]| -> Vec<(String, String)> {
        found.iter().map(|(kind, object, _)| (kind.clone(), object.clone())).collect()
    };
    assert_eq!(named(&mended), named(&looked));
    assert!(mended.iter().all(|(.., done)| *done), "{mended:?}");
    assert_eq!(repair(c, true), []);
    mended
}

#[test]
fn where_all_is_well_nothing_is_found() {
    let (_db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    assert_eq!(repair(&mut c, true), []);
    assert_eq!(repair(&mut c, false), []);
    assert_in_step(&mut c);
}

#[test]
fn claims_and_mirror_are_mended_in_one_call() {
    let (_db, mut c) = coordinated();
    for (sd, session) in [("SD-1", "s1"), ("SD-2", "s2"), ("SD-3", "s3")] {
        granted(&mut c, sd, session);
    }
    as_replica(
        &mut c,
        "DELETE FROM claude_sessions WHERE session_id = 's1';
         DELETE FROM sd_claims WHERE session_id = 's2';
         UPDATE strategic_directives_v2 SET status = 'completed' WHERE sd_id = 'SD-3';
         UPDATE strategic_directives_v2 SET is_working_on = true, active_session_id = 'x' WHERE sd_id = 'SD-4';
         UPDATE strategic_directives_v2 SET is_working_on = false WHERE sd_id = 'SD-2'",
    );
    let looked = repair(&mut c, true);
    let mended = repair(&mut c, false);
    for wanted in ["acquisition", "session", "mirror"] {
        assert!(kinds(&looked).contains(&wanted), "{looked:?}");
        assert!(kinds(&mended).contains(&wanted), "{mended:?}");
    }
    assert!(mended.iter().all(|(.., done)| *done), "{mended:?}");
    assert_eq!(repair(&mut c, true), []);
    assert_eq!(claim(&mut c, "SD-2", "s3")["claimed_by"], "s2");
    granted(&mut c, "SD-1", "s3");
    let mirrors = "SELECT count(*) FROM v_directives WHERE is_working_on";
    assert_eq!(count(&mut c, mirrors), 2);
}

#[test]
fn a_guarded_claim_waits_for_the_next_call() {
    let (db, mut c) = coordinated();
    let claim_id = granted(&mut c, "SD-1", "s1");
    let mut guarding = db.connect();
    guarding.batch_execute("BEGIN").unwrap();
    guarding.query("SELECT assert_claim('SD-1', 's1', $1)", &[&claim_id]).unwrap();
    as_replica(&mut c, "DELETE FROM claude_sessions WHERE session_id = 's1'");
    let found = repair(&mut c, false);
    assert!(found.iter().any(|(kind, _, done)| kind == "acquisition" && !done), "{found:?}");
    guarding.batch_execute("COMMIT").unwrap();
    assert!(repair(&mut c, false).iter().all(|(.., done)| *done));
    assert_eq!(repair(&mut c, true), []);
}

/// A table of a team's own, bound.
const BIND: &str = "
    CREATE TYPE state AS ENUM ('open', 'done');
    CREATE TABLE items (id integer PRIMARY KEY, name varchar(40), state state DEFAULT 'open', priority text,
        parent_sd_id text, is_working_on boolean, active_session_id text);
    INSERT INTO items (id, name) SELECT n, 'N-' || n FROM generate_series(1, 9) n;
    SELECT bind_directives('items', '{name,id}', p_title_column => 'name', p_status_column => 'state', p_terminal_statuses => '{done}')";

#[test]
fn triggers_and_indexes_of_the_backlog_are_made_anew() {
    type Harm = (&'static str, &'static str);
    let harms: [Harm; 7] = [
        ("trigger", "DROP TRIGGER pg_claims_finished ON {t}"),
        ("trigger", "ALTER TABLE {t} DISABLE TRIGGER pg_claims_deleted"),
        ("trigger", "ALTER TABLE {t} DISABLE TRIGGER USER"),
        ("trigger", "ALTER TABLE {t} ENABLE REPLICA TRIGGER zz_pg_claims_mirror_update"),
        (
            "trigger",
            "CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
             CREATE OR REPLACE TRIGGER pg_claims_finished AFTER UPDATE ON {t}
                FOR EACH ROW EXECUTE FUNCTION nothing()",
        ),
        (
            "index",
            "DO $$ BEGIN EXECUTE (SELECT 'DROP INDEX ' || string_agg(indexrelid::regclass::text, ', ')
               FROM pg_index WHERE indrelid = '{t}'::regclass AND NOT indisprimary); END $$",
        ),
        (
            "index",
            "UPDATE pg_index SET indisvalid = false
              WHERE indrelid = '{t}'::regclass AND NOT indisprimary AND NOT indisunique",
        ),
    ];
    for bound in [false, true] {
        for (kind, harm) in &harms {
            let (_db, mut c) = coordinated();
            if bound {
                c.batch_execute(BIND).unwrap();
            }
            let table = if bound { "items" } else { "strategic_directives_v2" };
            c.batch_execute(&harm.replace("{t}", table)).unwrap();
            let mended = mend(&mut c);
            assert!(mended.iter().all(|(found, ..)| found == kind), "{harm}: {mended:?}");
            let (sd, done) = if bound {
                ("N-1", "UPDATE items SET state = 'done' WHERE name = 'N-1'")
            } else {
                (
                    "SD-1",
                    "UPDATE strategic_directives_v2 SET status = 'completed' WHERE sd_id = 'SD-1'",
                )
            };
            granted(&mut c, sd, "s1");
            c.batch_execute(done).unwrap();
            assert_in_step(&mut c);
            assert_eq!(json(&mut c, "SELECT claim_next_sd('s2')", &[])["success"], true);
        }
    }
}

#[test]
fn a_backlog_whose_key_can_be_deferred_is_found_well() {
    let (_db, mut c) = coordinated();
    c.batch_execute(
        "CREATE TABLE late (sd_id text NOT NULL, status text, is_working_on boolean,
                            CONSTRAINT late_key UNIQUE (sd_id) DEFERRABLE INITIALLY DEFERRED);
         SELECT bind_directives('late', '{sd_id}')",
    )
    .unwrap();
    assert_eq!(repair(&mut c, true), []);
    c.batch_execute("DROP TRIGGER zz_pg_claims_mirror_insert ON late").unwrap();
    assert_eq!(kinds(&mend(&mut c)), ["trigger"]);
}

#[test]
fn a_trigger_that_always_fires_is_left_as_it_is_and_keeps_all_in_step() {
    let (_db, mut c) = coordinated();
    c.batch_execute(
        "ALTER TABLE strategic_directives_v2 ENABLE ALWAYS TRIGGER pg_claims_finished;
         ALTER TABLE strategic_directives_v2 ENABLE ALWAYS TRIGGER pg_claims_deleted",
    )
    .unwrap();
    assert_eq!(repair(&mut c, true), []);
    granted(&mut c, "SD-1", "s1");
    granted(&mut c, "SD-2", "s2");
    as_replica(
        &mut c,
        "UPDATE strategic_directives_v2 SET status = 'completed' WHERE sd_id = 'SD-1';
         DELETE FROM strategic_directives_v2 WHERE sd_id = 'SD-2'",
    );
    assert_in_step(&mut c);
    assert_eq!(beat(&mut c, "s1")["lost_claim"]["reason"], "sd_completed");
}

#[test]
fn partitions_get_back_what_they_lost() {
    let (_db, mut c) = coordinated();
    c.batch_execute(
        "CREATE TABLE parts (sd_id text PRIMARY KEY, status text, is_working_on boolean) PARTITION BY HASH (sd_id);
         CREATE TABLE parts_0 PARTITION OF parts FOR VALUES WITH (MODULUS 2, REMAINDER 0);
         CREATE TABLE parts_1 PARTITION OF parts FOR VALUES WITH (MODULUS 2, REMAINDER 1);
         SELECT bind_directives('parts', '{sd_id}');
         INSERT INTO parts VALUES ('P-1', 'draft');
         DROP TRIGGER pg_claims_truncated ON parts_0;
         ALTER TABLE parts_1 DISABLE TRIGGER USER",
    )
    .unwrap();
    let mended = mend(&mut c);
    assert!(mended.iter().all(|(kind, ..)| kind == "trigger"), "{mended:?}");
    granted(&mut c, "P-1", "s1");
    c.batch_execute("TRUNCATE parts_0, parts_1").unwrap();
    assert_in_step(&mut c);
}

#[test]
fn views_of_another_binding_and_views_that_are_gone_are_made_anew() {
    let (db, mut c) = coordinated();
    let viewer = db.role("viewer");
    json(&mut c, "SELECT grant_coordination($1, 'viewer')", &[&viewer]);
    // The binding was written past its trigger.
    c.batch_execute(BIND).unwrap();
    c.batch_execute(
        "ALTER TABLE directive_binding DISABLE TRIGGER ALL;
         UPDATE directive_binding SET title_column = NULL;
         ALTER TABLE directive_binding ENABLE ALWAYS TRIGGER directive_binding_trigger",
    )
    .unwrap();
    let mended = repair(&mut c, false);
    assert_eq!(kinds(&mended), ["view"], "{mended:?}");
    // The views are gone without the extension, as where a temporary type goes that they read.
    c.batch_execute(
        "ALTER EXTENSION pg_claims DROP VIEW v_sd_next;
         ALTER EXTENSION pg_claims DROP VIEW v_sd_queue;
         ALTER EXTENSION pg_claims DROP VIEW v_sd_blockers;
         ALTER EXTENSION pg_claims DROP FUNCTION sd_blockers(text, jsonb);
         ALTER EXTENSION pg_claims DROP VIEW v_worker_health;
         ALTER EXTENSION pg_claims DROP VIEW v_active_sessions;
         ALTER EXTENSION pg_claims DROP VIEW v_directives;
         DROP VIEW v_directives CASCADE",
    )
    .unwrap();
    // A dry run cannot look at the rest before they are there again.
    let looked = repair(&mut c, true);
    assert_eq!(looked.len(), 8, "{looked:?}");
    let mended = repair(&mut c, false);
    assert_eq!(mended.len(), 7, "{mended:?}");
    assert!(mended.iter().all(|(kind, _, done)| kind == "view" && *done), "{mended:?}");
    assert_eq!(repair(&mut c, true), []);
    granted(&mut c, "N-1", "s1");
    let mut viewer = db.connect_as(&viewer);
    assert_eq!(count(&mut viewer, "SELECT count(*) FROM v_sd_next"), 9);
    assert_eq!(count(&mut viewer, "SELECT count(*) FROM v_active_sessions WHERE sd_id = 'N-1'"), 1);
    let owned = "SELECT count(*) FROM pg_depend d JOIN pg_class c ON c.oid = d.objid
                  WHERE d.deptype = 'e' AND c.relkind = 'v'";
    assert_eq!(count(&mut c, owned), 8);
}

#[test]
fn the_board_forgets_a_claim_that_a_session_does_not_have() {
    let (_server, mut c) = served("repair-board", &[PRELOAD]);
    let claim_id = granted(&mut c, "SD-1", "s1");
    beat(&mut c, "s1");
    assert_eq!(beat(&mut c, "s1")["claim_id"], claim_id);
    c.batch_execute("ALTER TABLE claude_sessions DISABLE TRIGGER sync_is_working_on_trigger")
        .unwrap();
    as_replica(
        &mut c,
        "UPDATE claude_sessions SET sd_id = NULL, claim_id = NULL, claimed_at = NULL WHERE session_id = 's1'",
    );
    c.batch_execute("ALTER TABLE claude_sessions ENABLE ALWAYS TRIGGER sync_is_working_on_trigger")
        .unwrap();
    let mended = repair(&mut c, false);
    assert!(kinds(&mended).contains(&"board"), "{mended:?}");
    assert!(beat(&mut c, "s1")["claim_id"].is_null());
}

#[test]
fn only_operators_repair_and_not_on_a_kept_snapshot() {
    let (db, mut c) = coordinated();
    let (worker, operator) = (db.role("worker"), db.role("operator"));
    json(&mut c, "SELECT grant_coordination($1, 'worker')", &[&worker]);
    json(&mut c, "SELECT grant_coordination($1, 'operator')", &[&operator]);
    as_replica(
        &mut c,
        "UPDATE strategic_directives_v2 SET is_working_on = true WHERE sd_id = 'SD-1'",
    );
    let error = db.connect_as(&worker).query("SELECT coordination_repair()", &[]).unwrap_err();
    assert_eq!(sqlstate(&error), "42501");
    let mut operator = db.connect_as(&operator);
    operator.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ").unwrap();
    let error = operator.query("SELECT coordination_repair(false)", &[]).unwrap_err();
    assert_eq!(sqlstate(&error), "0A000");
    operator.batch_execute("ROLLBACK").unwrap();
    assert_eq!(kinds(&repair(&mut operator, false)), ["mirror"]);
    assert_eq!(repair(&mut operator, true), []);
}

#[test]
fn a_dry_run_judges_no_claim_by_a_view_that_is_wrong_and_the_doctor_says_so() {
    let (_db, mut c) = coordinated();
    c.batch_execute(BIND).unwrap();
    granted(&mut c, "N-1", "s1");
    // The binding came past its trigger, as where a dump is restored with --disable-triggers.
    c.batch_execute(
        "CREATE TABLE kept AS SELECT * FROM directive_binding;
         DELETE FROM directive_binding;
         ALTER TABLE directive_binding DISABLE TRIGGER ALL;
         INSERT INTO directive_binding SELECT * FROM kept;
         ALTER TABLE directive_binding ENABLE ALWAYS TRIGGER directive_binding_trigger",
    )
    .unwrap();
    let warned = "SELECT detail FROM coordination_check() WHERE name = 'backlog'";
    assert!(value(&mut c, warned).unwrap_or_default().contains("coordination_repair"));
    let looked = repair(&mut c, true);
    assert!(!kinds(&looked).contains(&"session"), "{looked:?}");
    let mended = repair(&mut c, false);
    assert_eq!(kinds(&mended), ["view", "view"], "{mended:?}");
    assert_eq!(value(&mut c, warned), None);
    assert_eq!(claim(&mut c, "N-1", "s2")["claimed_by"], "s1");
    assert_in_step(&mut c);
}

#[test]
fn the_doctor_counts_contradictions() {
    let (_db, mut c) = coordinated();
    let warned = "SELECT detail FROM coordination_check() WHERE name = 'contradictions'";
    assert_eq!(value(&mut c, warned), None);
    granted(&mut c, "SD-1", "s1");
    as_replica(&mut c, "DELETE FROM claude_sessions WHERE session_id = 's1'");
    assert!(value(&mut c, warned).unwrap_or_default().ends_with(": 1"));
}
