//! A backlog of the user's own: any name, any schema, any of the usual types.

use pg_claims_tests::{detail, hint, json, sqlstate};
use serde_json::json as literal;

use crate::support::*;

/// A backlog as teams have them: two keys of which either may be NULL, naive timestamps, columns
/// too short for a session id, a trigger, a view on top.
const SEED: &str = r#"
    CREATE SCHEMA "Product";
    CREATE TABLE "Product"."Work Items" (
        id          uuid PRIMARY KEY DEFAULT gen_random_uuid(),
        sd_key      varchar(50) UNIQUE,
        legacy_id   varchar(50),
        title       varchar(500) NOT NULL,
        status      varchar(50),
        priority    varchar(20),
        sequence_rank integer,
        dependencies jsonb,
        is_working_on boolean,
        active_session_id text,
        created_at  timestamp,
        updated_at  timestamp
    );
    CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS
      $$ BEGIN NEW.updated_at := '2001-01-01'; RETURN NEW; END $$;
    CREATE TRIGGER touch BEFORE UPDATE ON "Product"."Work Items" FOR EACH ROW EXECUTE FUNCTION touch();
    CREATE VIEW report AS SELECT title FROM "Product"."Work Items";
    INSERT INTO "Product"."Work Items" (sd_key, legacy_id, title, status, is_working_on, created_at) VALUES
        ('SD-1', 'L-1', 'both keys', NULL, true, '2026-07-01 12:00'),
        (NULL,   'L-2', 'second key only', 'draft', NULL, NULL),
        ('SD-3', NULL,  'first key only', 'draft', false, NULL),
        (NULL,   NULL,  'no key at all', 'draft', true, NULL),
        ('SD-5', 'SD-3', 'an alias that is another SD''s id', 'draft', false, NULL),
        ('SD-6', NULL,  'done', 'COMPLETED', false, NULL)"#;

const BIND: &str = r#"SELECT bind_directives('"Product"."Work Items"', '{sd_key,legacy_id}')"#;

/// Everything that defines the table, as a text to compare.
const DEFINITION: &str = r#"
    SELECT string_agg(line, E'\n' ORDER BY line) FROM (
        SELECT 'column ' || attname || ' ' || format_type(atttypid, atttypmod) || ' ' || attnotnull AS line
          FROM pg_attribute WHERE attrelid = '"Product"."Work Items"'::regclass AND attnum > 0
        UNION ALL SELECT pg_get_indexdef(indexrelid) FROM pg_index WHERE indrelid = '"Product"."Work Items"'::regclass
        UNION ALL SELECT pg_get_triggerdef(oid) FROM pg_trigger WHERE tgrelid = '"Product"."Work Items"'::regclass
        UNION ALL SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = '"Product"."Work Items"'::regclass
        UNION ALL SELECT 'acl ' || coalesce(relacl::text, '') FROM pg_class WHERE oid = '"Product"."Work Items"'::regclass
    ) lines"#;

fn bound() -> (pg_claims_tests::TestDb, postgres::Client) {
    let (db, mut c) = coordinated();
    c.batch_execute(SEED).unwrap();
    json(&mut c, BIND, &[]);
    (db, c)
}

#[test]
fn an_sd_is_one_sd_by_whichever_key() {
    let (_db, mut c) = bound();
    assert_eq!(claim(&mut c, "L-1", "s1")["sd_id"], "SD-1");
    assert_eq!(claim(&mut c, "SD-1", "s2")["claimed_by"], "s1");
    assert_eq!(claim(&mut c, "L-1", "s2")["claimed_by"], "s1");
    assert_eq!(claim(&mut c, "L-1", "s1")["already_owned"], true);
    assert_eq!(json(&mut c, "SELECT is_sd_claimed('L-1')", &[])["claimedBy"], "s1");
    assert_eq!(claim(&mut c, "L-2", "s2")["sd_id"], "L-2");
    assert_eq!(
        claim(&mut c, "SD-3", "s3")["sd_id"],
        "SD-3",
        "the canonical id goes before an alias"
    );
    assert_in_step(&mut c);
    c.batch_execute("UPDATE claude_sessions SET sd_id = NULL WHERE session_id = 's1'").unwrap();
    c.batch_execute("UPDATE claude_sessions SET sd_id = 'L-1' WHERE session_id = 's1'").unwrap();
    assert_eq!(beat(&mut c, "s1")["sd_id"], "SD-1", "a direct write is made canonical");
    assert_in_step(&mut c);
}

#[test]
fn binding_corrects_the_flags_that_lied_and_reads_the_columns() {
    let (_db, mut c) = coordinated();
    c.batch_execute(SEED).unwrap();
    let answer = json(&mut c, BIND, &[]);
    assert_eq!(answer["success"], true);
    assert_eq!(answer["table"], "\"Product\".\"Work Items\"");
    assert_eq!(answer["key_columns"], literal!(["sd_key", "legacy_id"]));
    assert_eq!(answer["rows_corrected"], 1);
    assert_in_step(&mut c);
    let row = json(&mut c, "SELECT to_jsonb(d) FROM v_directives d WHERE sd_id = 'SD-1'", &[]);
    assert_eq!(
        row,
        literal!({
            "sd_id": "SD-1", "title": "both keys", "status": null, "priority": null, "track": null,
            "rank": null, "dependencies": null, "parent_sd_id": null,
            "created_at": "2026-07-01T12:00:00+00:00", "priority_order": null,
            "is_working_on": false, "active_session_id": null, "is_terminal": false,
        })
    );
    c.batch_execute("SET timezone = 'Asia/Tokyo'").unwrap();
    let at = "SELECT created_at = '2026-07-01 12:00Z' FROM v_directives WHERE sd_id = 'SD-1'";
    assert_eq!(value(&mut c, at).as_deref(), Some("true"), "a naive time is UTC, not the reader's");
    assert_eq!(
        count(&mut c, "SELECT count(*) FROM v_directives"),
        5,
        "a row without a key is no SD"
    );
}

#[test]
fn the_user_s_triggers_run_and_an_sd_of_unknown_status_can_be_claimed() {
    let (_db, mut c) = bound();
    granted(&mut c, "SD-1", "s1");
    let touched = r#"SELECT updated_at FROM "Product"."Work Items" WHERE sd_key = 'SD-1'"#;
    assert_eq!(value(&mut c, touched).as_deref(), Some("2001-01-01 00:00:00"));
    assert_eq!(claim(&mut c, "SD-6", "s2")["error"], "sd_terminal_status");
    let title = "SELECT sd_title FROM v_active_sessions WHERE session_id = 's1'";
    assert_eq!(value(&mut c, title).as_deref(), Some("both keys"));
}

#[test]
fn finishing_deleting_and_truncating_release_in_a_bound_backlog() {
    let (_db, mut c) = bound();
    for (sd, finish) in [
        ("L-1", r#"UPDATE "Product"."Work Items" SET status = 'Cancelled' WHERE sd_key = 'SD-1'"#),
        ("L-2", r#"DELETE FROM "Product"."Work Items" WHERE legacy_id = 'L-2'"#),
        ("SD-3", r#"TRUNCATE "Product"."Work Items""#),
    ] {
        granted(&mut c, sd, "s1");
        c.batch_execute(finish).unwrap();
        assert_eq!(release(&mut c, "s1")["error"], "no_claim", "{finish}");
        assert_in_step(&mut c);
    }
}

#[test]
fn keys_of_type_uuid_and_bigint_work_in_any_spelling_of_their_text() {
    let (_db, mut c) = coordinated();
    c.batch_execute(
        "CREATE TYPE state AS ENUM ('open', 'completed');
         CREATE TABLE jobs (id uuid PRIMARY KEY, number bigint UNIQUE, status state, is_working_on boolean);
         INSERT INTO jobs VALUES ('6F9619FF-8B86-D011-B42D-00C04FC964FF', 42, 'open'),
                                 ('00000000-0000-0000-0000-000000000002', NULL, 'completed');
         SELECT bind_directives('jobs', '{id,number}')",
    )
    .unwrap();
    assert_eq!(claim(&mut c, "42", "s1")["sd_id"], "6f9619ff-8b86-d011-b42d-00c04fc964ff");
    assert_eq!(claim(&mut c, "6f9619ff-8b86-d011-b42d-00c04fc964ff", "s2")["claimed_by"], "s1");
    assert_eq!(claim(&mut c, "not-a-uuid", "s2")["error"], "sd_not_found");
    assert_eq!(
        claim(&mut c, "00000000-0000-0000-0000-000000000002", "s2")["error"],
        "sd_terminal_status"
    );
    assert_in_step(&mut c);
    c.batch_execute("UPDATE jobs SET status = 'completed'").unwrap();
    assert_in_step(&mut c);
}

#[test]
fn a_backlog_without_mirror_columns_shows_the_claims_themselves() {
    let (_db, mut c) = coordinated();
    c.batch_execute(
        "CREATE TABLE plain (name varchar(20) PRIMARY KEY, note text);
         INSERT INTO plain VALUES ('P-1'), ('P-2');
         SELECT bind_directives('plain', '{name}', p_title_column => 'note', p_terminal_statuses => '{}')",
    )
    .unwrap();
    granted(&mut c, "P-1", "s1");
    assert_in_step(&mut c);
    let holder = "SELECT active_session_id FROM v_directives WHERE sd_id = 'P-1'";
    assert_eq!(value(&mut c, holder).as_deref(), Some("s1"));
}

#[test]
fn statuses_that_end_an_sd_can_be_named() {
    let (_db, mut c) = coordinated();
    c.batch_execute(
        "CREATE TABLE tickets (key text PRIMARY KEY, state text);
         INSERT INTO tickets VALUES ('T-1', 'Won''t Fix'), ('T-2', 'completed');
         SELECT bind_directives('tickets', '{key}', p_status_column => 'state',
                                p_terminal_statuses => ARRAY['won''t fix', 'DONE'])",
    )
    .unwrap();
    assert_eq!(claim(&mut c, "T-1", "s1")["error"], "sd_terminal_status");
    granted(&mut c, "T-2", "s1");
    c.batch_execute("UPDATE tickets SET state = 'Done' WHERE key = 'T-2'").unwrap();
    assert_eq!(value(&mut c, "SELECT release_reason FROM sd_claims").as_deref(), Some("sd_done"));
    assert_in_step(&mut c);
}

#[test]
fn unbinding_and_dropping_leave_the_table_as_it_was() {
    for end in [
        "SELECT unbind_directives()",
        "DROP EXTENSION pg_claims",
        "DROP EXTENSION pg_claims CASCADE",
    ] {
        let (_db, mut c) = coordinated();
        c.batch_execute(SEED).unwrap();
        let before = value(&mut c, DEFINITION);
        json(&mut c, BIND, &[]);
        assert_ne!(value(&mut c, DEFINITION), before, "binding adds triggers and indexes");
        granted(&mut c, "SD-1", "s1");
        release(&mut c, "s1");
        c.batch_execute(end).unwrap();
        assert_eq!(value(&mut c, DEFINITION), before, "{end}");
        c.batch_execute(r#"UPDATE "Product"."Work Items" SET status = 'completed'"#).unwrap();
        assert_eq!(count(&mut c, "SELECT count(*) FROM report"), 6);
    }
}

#[test]
fn after_unbinding_the_extension_s_own_backlog_is_in_use_again() {
    let (_db, mut c) = bound();
    granted(&mut c, "SD-3", "s1");
    // SD-3 is in both backlogs: the claim goes along.
    c.batch_execute("SELECT unbind_directives()").unwrap();
    assert_in_step(&mut c);
    let left =
        r#"SELECT count(*) FROM "Product"."Work Items" WHERE is_working_on AND sd_key IS NOT NULL"#;
    assert_eq!(count(&mut c, left), 0);
    let error = c.query("SELECT unbind_directives()", &[]).unwrap_err();
    assert_eq!(sqlstate(&error), "55000");
}

#[test]
fn a_claim_that_the_next_backlog_does_not_have_keeps_the_present_one() {
    let (_db, mut c) = coordinated();
    c.batch_execute(SEED).unwrap();
    granted(&mut c, "SD-7", "s1");
    let error = c.query(BIND, &[]).unwrap_err();
    assert_eq!(sqlstate(&error), "55006");
    assert!(detail(&error).contains("SD-7") && detail(&error).contains("s1"), "{}", detail(&error));
    assert!(hint(&error).contains("release_sd()"));
    assert_in_step(&mut c);
    assert_eq!(beat(&mut c, "s1")["sd_id"], "SD-7");
}

#[test]
fn binding_again_replaces_the_binding() {
    let (_db, mut c) = bound();
    granted(&mut c, "SD-1", "s1");
    c.batch_execute(
        r#"ALTER TABLE "Product"."Work Items" RENAME COLUMN title TO headline;
           ALTER TABLE "Product"."Work Items" RENAME TO tasks;
           SELECT bind_directives('"Product".tasks', '{sd_key}', p_title_column => 'headline')"#,
    )
    .unwrap();
    assert_in_step(&mut c);
    let title = "SELECT sd_title FROM v_active_sessions WHERE session_id = 's1'";
    assert_eq!(value(&mut c, title).as_deref(), Some("both keys"));
    assert_eq!(
        claim(&mut c, "L-2", "s2")["error"],
        "sd_not_found",
        "that key is not bound any more"
    );
}

#[test]
fn a_backend_learns_of_a_binding_made_by_another() {
    let (db, mut c) = coordinated();
    let mut other = db.connect();
    assert_eq!(claim(&mut other, "L-1", "s1")["error"], "sd_not_found");
    c.batch_execute(SEED).unwrap();
    json(&mut c, BIND, &[]);
    assert_eq!(claim(&mut other, "L-1", "s1")["success"], true);
    c.batch_execute(r#"ALTER TABLE "Product"."Work Items" RENAME TO renamed; ALTER SCHEMA "Product" RENAME TO prod"#)
        .unwrap();
    assert_eq!(release(&mut other, "s1")["success"], true);
    assert_eq!(claim(&mut other, "L-2", "s1")["success"], true);
    assert_in_step(&mut c);
}

#[test]
fn a_binding_that_is_rolled_back_never_was() {
    let (_db, mut c) = coordinated();
    c.batch_execute(SEED).unwrap();
    c.batch_execute("BEGIN").unwrap();
    json(&mut c, BIND, &[]);
    granted(&mut c, "L-1", "s1");
    c.batch_execute("ROLLBACK").unwrap();
    assert_eq!(claim(&mut c, "L-1", "s1")["error"], "sd_not_found");
    granted(&mut c, "SD-7", "s1");
    assert_in_step(&mut c);
}

#[test]
fn what_cannot_be_bound_is_refused_with_a_reason() {
    let (_db, mut c) = coordinated();
    c.batch_execute(SEED).unwrap();
    c.batch_execute(
        "CREATE TABLE twice (key text, is_working_on text, active_session_id varchar(20), rank text, dependencies text, created_at text);
         INSERT INTO twice VALUES ('same'), ('same');
         CREATE TABLE padded (key text PRIMARY KEY, status char(12));
         CREATE MATERIALIZED VIEW frozen AS SELECT * FROM twice",
    )
    .unwrap();
    let none = "p_is_working_on_column => '', p_active_session_id_column => '', p_rank_column => '', \
                p_dependencies_column => '', p_created_at_column => ''";
    for (call, code, says) in [
        ("bind_directives('report', '{title}')".to_owned(), "42809", "table"),
        ("bind_directives('frozen', '{key}')".into(), "42809", "table"),
        (format!("bind_directives('twice', '{{nope}}', {none})"), "42703", "nope"),
        (
            format!("bind_directives('twice', '{{key}}', p_title_column => 'nope', {none})"),
            "42703",
            "nope",
        ),
        (format!("bind_directives('twice', '{{key}}', {none})"), "23505", "same"),
        ("bind_directives('twice', '{key}')".into(), "42804", "is_working_on"),
        (
            "bind_directives('twice', '{key}', p_is_working_on_column => '')".into(),
            "42804",
            "active_session_id",
        ),
        ("bind_directives('claude_sessions', '{session_id}')".into(), "42809", "own"),
        ("bind_directives('twice', '{key,key}')".into(), "22023", ""),
        ("bind_directives('padded', '{key}')".into(), "42804", "status"),
        ("bind_directives('twice', '{}')".into(), "22023", ""),
        ("bind_directives('twice', NULL)".into(), "22023", ""),
        ("bind_directives(NULL, '{key}')".into(), "22023", ""),
        ("bind_directives(0, '{key}')".into(), "22023", ""),
        ("bind_directives('no_such_table', '{key}')".into(), "42P01", ""),
    ] {
        let error = c.query(&format!("SELECT {call}"), &[]).unwrap_err();
        assert_eq!(sqlstate(&error), code, "{call}: {error:?}");
        assert!(detail(&error).contains(says), "{call}: {}", detail(&error));
    }
    granted(&mut c, "SD-1", "s1");
    assert_in_step(&mut c);
}

#[test]
fn the_own_backlog_rests_while_another_is_bound() {
    let (_db, mut c) = coordinated();
    granted(&mut c, "SD-3", "s1");
    c.batch_execute(
        "CREATE TABLE other (sd_id text PRIMARY KEY, status text, is_working_on boolean, active_session_id text);
         INSERT INTO other SELECT sd_id FROM strategic_directives_v2;
         SELECT bind_directives('other', '{sd_id}')",
    )
    .unwrap();
    assert_in_step(&mut c);
    let own = "SELECT count(*) FROM strategic_directives_v2 WHERE is_working_on OR active_session_id IS NOT NULL";
    assert_eq!(count(&mut c, own), 0, "it says nothing about claims any more");
    // The same ids, but not the backlog: finishing one here finishes nothing.
    c.batch_execute(
        "UPDATE strategic_directives_v2 SET status = 'completed';
         DELETE FROM strategic_directives_v2 WHERE sd_id = 'SD-3';
         TRUNCATE strategic_directives_v2",
    )
    .unwrap();
    assert_eq!(beat(&mut c, "s1")["sd_id"], "SD-3");
    assert_in_step(&mut c);
}

#[test]
fn a_renamed_column_is_reported_rather_than_overlooked() {
    let (_db, mut c) = bound();
    granted(&mut c, "SD-1", "s1");
    c.batch_execute(r#"ALTER TABLE "Product"."Work Items" RENAME COLUMN status TO state"#).unwrap();
    for statement in [
        r#"UPDATE "Product"."Work Items" SET state = 'completed' WHERE sd_key = 'SD-1'"#,
        r#"DELETE FROM "Product"."Work Items" WHERE sd_key = 'SD-1'"#,
        "SELECT claim_sd('SD-3', 's2')",
    ] {
        let error = c.batch_execute(statement).unwrap_err();
        assert_eq!(sqlstate(&error), "42703", "{statement}: {error:?}");
        assert!(hint(&error).contains("bind_directives()"), "{}", hint(&error));
    }
    c.batch_execute(
        r#"SELECT bind_directives('"Product"."Work Items"', '{sd_key,legacy_id}', p_status_column => 'state');
           UPDATE "Product"."Work Items" SET state = 'completed' WHERE sd_key = 'SD-1'"#,
    )
    .unwrap();
    assert_eq!(release(&mut c, "s1")["error"], "no_claim");
    assert_in_step(&mut c);
}

#[test]
fn rows_of_inheriting_tables_are_not_sds_of_the_bound_one() {
    let (_db, mut c) = coordinated();
    c.batch_execute(
        r#"CREATE SCHEMA "my.schema";
           CREATE TABLE "my.schema".parent (id uuid, name varchar(20), is_working_on boolean);
           CREATE TABLE child () INHERITS ("my.schema".parent);
           INSERT INTO "my.schema".parent VALUES ('00000000-0000-0000-0000-00000000000a', 'p', false);
           INSERT INTO child VALUES ('00000000-0000-0000-0000-00000000000a', 'c', false);
           SELECT bind_directives('"my.schema".parent', '{id,name}')"#,
    )
    .unwrap();
    granted(&mut c, "p", "s1");
    assert_eq!(claim(&mut c, "c", "s2")["error"], "sd_not_found");
    assert_eq!(count(&mut c, "SELECT count(*) FROM v_active_sessions WHERE session_id = 's1'"), 1);
    assert_eq!(count(&mut c, "SELECT count(*) FROM child WHERE is_working_on"), 0);
    assert_in_step(&mut c);
}

#[test]
fn the_case_of_a_status_is_folded_alike_everywhere_in_whatever_locale() {
    let (_db, mut c) = coordinated();
    c.batch_execute(
        "CREATE TABLE mine (key text PRIMARY KEY, status text, is_working_on boolean);
         INSERT INTO mine VALUES ('A', 'DONE'), ('B', 'TERMINÉ'), ('C', 'open'), ('D', 'open');
         SELECT bind_directives('mine', '{key}', p_terminal_statuses => '{Done,Terminé}')",
    )
    .unwrap();
    assert_eq!(claim(&mut c, "A", "s1")["error"], "sd_terminal_status");
    // Beyond A to Z letters count as they are written.
    granted(&mut c, "B", "s1");
    granted(&mut c, "C", "s2");
    granted(&mut c, "D", "s3");
    c.batch_execute("UPDATE mine SET status = 'TERMINÉ' WHERE key = 'C'; UPDATE mine SET status = 'TERMINé' WHERE key = 'D'")
        .unwrap();
    assert_eq!(beat(&mut c, "s2")["sd_id"], "C");
    assert!(beat(&mut c, "s3")["sd_id"].is_null());
    assert_in_step(&mut c);
}

#[test]
fn columns_that_cannot_be_written_are_refused_at_once() {
    let (_db, mut c) = coordinated();
    for (columns, code, says) in [
        ("is_working_on boolean GENERATED ALWAYS AS (true) STORED", "42804", "generated"),
        ("active_session_id text NOT NULL DEFAULT ''", "42804", "NULL"),
    ] {
        c.batch_execute(&format!(
            "DROP TABLE IF EXISTS mine; CREATE TABLE mine (key text PRIMARY KEY, {columns})"
        ))
        .unwrap();
        let error = c.batch_execute("SELECT bind_directives('mine', '{key}')").unwrap_err();
        assert_eq!(pg_claims_tests::sqlstate(&error), code, "{columns}");
        assert!(pg_claims_tests::detail(&error).contains(says), "{error:?}");
    }
    c.batch_execute("CREATE TEMPORARY TABLE passing (key text PRIMARY KEY)").unwrap();
    let error = c.batch_execute("SELECT bind_directives('passing', '{key}')").unwrap_err();
    assert_eq!(pg_claims_tests::sqlstate(&error), "42809");
}

#[test]
fn the_own_backlog_is_known_by_any_name() {
    let (db, mut c) = coordinated();
    c.batch_execute("ALTER TABLE strategic_directives_v2 RENAME TO backlog").unwrap();
    granted(&mut c, "SD-1", "s1");
    assert_eq!(count(&mut db.connect(), "SELECT count(*) FROM backlog WHERE is_working_on"), 1);
    assert_in_step(&mut c);
}

#[test]
fn a_deferrable_constraint_may_have_the_name_of_another_table_s_that_cannot_be_deferred() {
    let (_db, mut c) = coordinated();
    c.batch_execute(
        "CREATE TABLE owners (id integer PRIMARY KEY); INSERT INTO owners VALUES (1);
         CREATE TABLE roadmap (key text PRIMARY KEY, owner integer, is_working_on boolean,
             CONSTRAINT owner_fk FOREIGN KEY (owner) REFERENCES owners DEFERRABLE INITIALLY DEFERRED);
         CREATE TABLE tasks (owner integer, CONSTRAINT owner_fk FOREIGN KEY (owner) REFERENCES owners);
         INSERT INTO roadmap VALUES ('A', 1)",
    )
    .unwrap();
    c.batch_execute("SELECT bind_directives('roadmap', '{key}')").unwrap();
    granted(&mut c, "A", "s1");
    assert_eq!(release(&mut c, "s1")["success"], true);
    assert_in_step(&mut c);
}
