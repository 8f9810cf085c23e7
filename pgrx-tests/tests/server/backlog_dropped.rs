//! A bound backlog that somebody drops, or that goes by itself.

use pg_claims_tests::{message, sqlstate, wait_until};

use crate::support::*;

#[test]
fn what_the_backlog_stands_on_takes_the_extension_with_it_nowhere() {
    let (db, mut owner) = coordinated();
    let app = db.role("app");
    owner
        .batch_execute(&format!(
            "CREATE SCHEMA app AUTHORIZATION {app};
             CREATE TYPE app.state AS ENUM ('open', 'completed'); CREATE DOMAIN app.words AS text;
             SET ROLE {app};
             CREATE TEXT SEARCH CONFIGURATION app.search (COPY = pg_catalog.simple);
             CREATE TABLE app.backlog (key text PRIMARY KEY, title app.words, status app.state,
                 parent_sd_id text GENERATED ALWAYS AS (to_tsvector('app.search'::regconfig, key)::text) STORED);
             INSERT INTO app.backlog VALUES ('A', 'a', 'open'); RESET ROLE;
             SELECT bind_directives('app.backlog', '{{key}}', 'title', 'status')"
        ))
        .unwrap();
    let held = granted(&mut owner, "A", "s1");
    for command in [
        "DROP TABLE app.backlog CASCADE".to_owned(),
        "ALTER TABLE app.backlog DROP COLUMN title CASCADE".to_owned(),
        "DROP TYPE app.state CASCADE".to_owned(),
        "DROP DOMAIN app.words CASCADE".to_owned(),
        "DROP TEXT SEARCH CONFIGURATION app.search CASCADE".to_owned(),
        "DROP SCHEMA app CASCADE".to_owned(),
        format!("DROP OWNED BY {app} CASCADE"),
        "DO $$ BEGIN DROP TABLE app.backlog CASCADE; END $$".to_owned(),
    ] {
        // In a process that has not seen the library yet.
        let mut fresh = db.connect();
        let error = fresh.batch_execute(&command).unwrap_err();
        assert_eq!(sqlstate(&error), "2BP01", "{command}: {}", message(&error));
        assert_eq!(beat(&mut fresh, "s1")["claim_id"], held, "{command}");
    }
    // Nor without CASCADE, as everywhere.
    let error = owner.batch_execute("DROP TABLE app.backlog").unwrap_err();
    assert_eq!(sqlstate(&error), "2BP01");
    assert_in_step(&mut owner);
    release(&mut owner, "s1");
    owner
        .batch_execute(&format!(
            "SELECT unbind_directives(); DROP SCHEMA app CASCADE; DROP OWNED BY {app}"
        ))
        .unwrap();
    granted(&mut owner, "SD-1", "s1");
    // DROP EXTENSION itself still works.
    owner.batch_execute("DROP EXTENSION pg_claims").unwrap();
}

#[test]
fn a_backlog_that_cannot_last_is_not_bound() {
    let (_db, mut owner) = coordinated();
    owner
        .batch_execute(
            "CREATE TYPE pg_temp.state AS ENUM ('open', 'completed');
             CREATE DOMAIN pg_temp.words AS text; CREATE DOMAIN middle AS pg_temp.words; CREATE DOMAIN outermost AS middle;
             CREATE TABLE with_domains (key text PRIMARY KEY, title outermost);
             CREATE COLLATION pg_temp.plain (provider = libc, locale = 'C');
             CREATE TABLE with_collation (key text PRIMARY KEY, title text COLLATE pg_temp.plain);
             CREATE TYPE pg_temp.shape AS (key text, title text); CREATE TABLE with_shape OF pg_temp.shape (PRIMARY KEY (key));
             CREATE TABLE with_type (key text PRIMARY KEY, status pg_temp.state);
             CREATE TABLE with_domain (key text PRIMARY KEY, title pg_temp.words);
             CREATE TABLE with_array (key text PRIMARY KEY, title text, more pg_temp.state[])",
        )
        .unwrap();
    for (table, columns) in [
        ("with_type", "p_status_column => 'status'"),
        ("with_domain", "p_title_column => 'title'"),
        ("with_domains", "p_title_column => 'title'"),
        ("with_collation", "p_title_column => 'title'"),
        ("with_shape", "p_title_column => 'title'"),
        ("with_array", "p_title_column => 'title'"),
    ] {
        let error = owner
            .batch_execute(&format!("SELECT bind_directives('{table}', '{{key}}', {columns})"))
            .unwrap_err();
        assert_eq!(sqlstate(&error), "42804", "{table}: {}", message(&error));
    }
}

#[test]
fn a_backlog_that_is_gone_all_the_same_is_unbound_and_binding_mends_the_views() {
    let (db, mut owner) = coordinated();
    owner
        .batch_execute(
            "CREATE TABLE passing (key text, title text); CREATE UNIQUE INDEX ON passing (key);
             SELECT bind_directives('passing', '{key}', 'title')",
        )
        .unwrap();
    let mut other = db.connect();
    other
        .batch_execute(
            "CREATE TYPE pg_temp.shape AS (key text, title text); ALTER TABLE passing OF pg_temp.shape",
        )
        .unwrap();
    drop(other);
    let there = "SELECT to_regclass('passing')::text";
    wait_until("the table to have gone with the session", || value(&mut owner, there).is_none());
    granted(&mut owner, "SD-1", "s1");
    assert_eq!(beat(&mut owner, "s1")["sd_id"], "SD-1");
    owner
        .batch_execute(
            "SELECT * FROM coordination_check(); SELECT * FROM coordination_repair(true)",
        )
        .unwrap();
    release(&mut owner, "s1");
    owner
        .batch_execute(
            "CREATE TABLE lasting (key text PRIMARY KEY, title text); INSERT INTO lasting VALUES ('A', 'a');
             SELECT bind_directives('lasting', '{key}', 'title')",
        )
        .unwrap();
    granted(&mut owner, "A", "s1");
    assert_eq!(count(&mut owner, "SELECT count(*) FROM v_active_sessions WHERE sd_id = 'A'"), 1);
    owner
        .batch_execute(
            "SELECT * FROM v_sd_next; SELECT * FROM sd_next(); SELECT * FROM v_worker_health",
        )
        .unwrap();
    release(&mut owner, "s1");
    owner.batch_execute("SELECT unbind_directives()").unwrap();
}
