//! Installing, in any schema, under any search_path; uninstalling.

use pg_claims_tests::{TestDb, json, sqlstate};

use crate::support::*;

#[test]
fn a_schema_of_its_own_works_whatever_the_search_path() {
    let db = TestDb::empty();
    let mut c = db.connect();
    c.batch_execute(
        r#"CREATE SCHEMA "Claims; now";
           CREATE EXTENSION pg_claims SCHEMA "Claims; now";
           CREATE SCHEMA hostile;
           CREATE TABLE hostile.claude_sessions (session_id text);
           CREATE FUNCTION hostile.clock_timestamp() RETURNS timestamptz LANGUAGE sql AS $$ SELECT '1970-01-01'::timestamptz $$;
           CREATE FUNCTION hostile.eq(text, text) RETURNS boolean LANGUAGE sql AS $$ SELECT true $$;
           CREATE OPERATOR hostile.= (LEFTARG = text, RIGHTARG = text, FUNCTION = hostile.eq);
           INSERT INTO "Claims; now".strategic_directives_v2 (sd_id) VALUES ('SD-1'), ('SD-2')"#,
    )
    .unwrap();
    for search_path in
        ["''", "hostile, pg_catalog", r#"hostile, pg_catalog, "Claims; now""#, "pg_temp"]
    {
        c.batch_execute(&format!("SET search_path = {search_path}")).unwrap();
        let call = |c: &mut postgres::Client, call: &str| {
            json(c, &format!(r#"SELECT "Claims; now".{call}"#), &[])
        };
        assert_eq!(call(&mut c, "register_session('s1')")["success"], true);
        assert_eq!(call(&mut c, "register_session('s2')")["success"], true);
        assert_eq!(call(&mut c, "claim_sd('SD-1', 's1')")["success"], true);
        assert_eq!(call(&mut c, "claim_sd('SD-1', 's2')")["claimed_by"], "s1");
        assert_eq!(call(&mut c, "claim_sd('SD-2', 's1')")["released_sd"], "SD-1");
        assert_eq!(call(&mut c, "update_session_heartbeat('s1')")["sd_id"], "SD-2");
        let seen = r#"SELECT computed_status FROM "Claims; now".v_active_sessions WHERE session_id OPERATOR(pg_catalog.=) 's1'"#;
        assert_eq!(value(&mut c, seen).as_deref(), Some("active"), "{search_path}");
        c.batch_execute(r#"UPDATE "Claims; now".claude_sessions SET sd_id = NULL"#).unwrap();
        assert_eq!(call(&mut c, "release_sd('s1')")["error"], "no_claim");
    }
    // The schema may be renamed under connections that have plans.
    c.batch_execute(r#"ALTER SCHEMA "Claims; now" RENAME TO claims; SET search_path = claims"#)
        .unwrap();
    granted(&mut c, "SD-1", "s1");
}

#[test]
fn dropping_and_creating_again_in_another_schema_does_not_confuse_a_connection() {
    let db = TestDb::empty();
    let mut c = db.connect();
    c.batch_execute("CREATE SCHEMA a; CREATE SCHEMA b").unwrap();
    let mut last = 0;
    for schema in ["a", "b", "public"] {
        c.batch_execute(&format!(
            "SET search_path = {schema};
             CREATE EXTENSION pg_claims SCHEMA {schema};
             INSERT INTO strategic_directives_v2 (sd_id) VALUES ('SD-1');
             SELECT register_session('s1')"
        ))
        .unwrap();
        // Nor does a token come again that the dropped one gave out.
        let token = granted(&mut c, "SD-1", "s1");
        assert!(token > last, "{token} after {last}");
        last = token;
        let of_schema = format!("SELECT claim_id FROM {schema}.sd_claims");
        assert_eq!(count(&mut c, &of_schema), token);
        c.batch_execute("DROP EXTENSION pg_claims").unwrap();
    }
    assert_eq!(value(&mut c, "SELECT count(*) FROM pg_class WHERE relname IN ('claude_sessions', 'sd_claims', 'strategic_directives_v2')").as_deref(), Some("0"));
}

#[test]
fn an_existing_backlog_is_left_as_it_is_and_nothing_can_be_claimed_before_it_is_bound() {
    let db = TestDb::empty();
    let mut c = db.connect();
    c.batch_execute(
        "CREATE TABLE strategic_directives_v2 (id text PRIMARY KEY, title text);
         INSERT INTO strategic_directives_v2 VALUES ('SD-1', 'mine');
         CREATE EXTENSION pg_claims;
         SELECT register_session('s1')",
    )
    .unwrap();
    assert_eq!(crate::support::claim(&mut c, "SD-1", "s1")["error"], "sd_not_found");
    assert_eq!(crate::support::count(&mut c, "SELECT count(*) FROM v_directives"), 0);
    c.batch_execute("SELECT bind_directives('strategic_directives_v2', '{id}')").unwrap();
    granted(&mut c, "SD-1", "s1");
    // It holds the extension's place in a dump, so it is not dropped by accident.
    let error = c.batch_execute("DROP TABLE strategic_directives_v2").unwrap_err();
    assert_eq!(sqlstate(&error), "2BP01");
    c.batch_execute("DROP EXTENSION pg_claims; DROP TABLE strategic_directives_v2").unwrap();
}

#[test]
fn a_sequence_that_was_there_before_gives_no_fencing_tokens() {
    let db = TestDb::empty();
    let mut c = db.connect();
    let strangers = ["sd_claims_claim_id_seq", "session_lifecycle_events_event_id_seq"];
    for stranger in strangers {
        c.batch_execute(&format!("CREATE SEQUENCE {stranger} START 1000")).unwrap();
    }
    c.batch_execute("CREATE EXTENSION pg_claims").unwrap();
    backlog(&mut c);
    for session in ["s1", "s2"] {
        register(&mut c, session);
    }
    let first = granted(&mut c, "SD-1", "s1");
    // By a statement, which asks the column's own.
    c.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1").unwrap();
    let second = granted(&mut c, "SD-2", "s2");
    c.batch_execute("COMMIT").unwrap();
    assert!(first < second, "{first}, {second}");
    for stranger in strangers {
        let used = format!("SELECT is_called FROM {stranger}");
        assert_eq!(value(&mut c, &used).as_deref(), Some("false"));
    }
    // Nor does another name keep them from being given.
    c.batch_execute("ALTER SEQUENCE sd_claims_claim_id_seq1 RENAME TO tokens").unwrap();
    let mut c = db.connect();
    assert!(granted(&mut c, "SD-3", "s2") > second);
}

#[test]
fn needs_no_preloading() {
    let db = TestDb::new();
    let preloaded = value(&mut db.connect(), "SELECT current_setting('shared_preload_libraries')");
    assert_eq!(preloaded.as_deref(), Some(""));
}

#[test]
fn a_transaction_pooler_may_give_every_statement_another_connection() {
    let (db, mut c) = crate::support::coordinated();
    let claim_id = granted(&mut c, "SD-1", "s1");
    let on_another = |sql: &str| json(&mut db.connect(), sql, &[]);
    assert_eq!(on_another("SELECT update_session_heartbeat('s1')")["claim_id"], claim_id);
    assert_eq!(on_another("SELECT claim_sd('SD-1', 's1')")["already_owned"], true);
    assert_eq!(on_another("SELECT claim_sd('SD-2', 's1')")["released_sd"], "SD-1");
    // DISCARD ALL is what poolers send between clients.
    c.batch_execute("DISCARD ALL").unwrap();
    assert_eq!(crate::support::release(&mut c, "s1")["released_sd"], "SD-2");
    crate::support::assert_in_step(&mut c);
}

#[test]
fn a_database_in_another_encoding_is_refused() {
    let db = TestDb::empty();
    let mut c = db.connect();
    let name = format!("{}_latin1", db.name());
    c.batch_execute(&format!(
        "CREATE DATABASE {name} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0"
    ))
    .unwrap();
    let refused = db
        .config()
        .dbname(&name)
        .connect(postgres::NoTls)
        .unwrap()
        .batch_execute("CREATE EXTENSION pg_claims");
    c.batch_execute(&format!("DROP DATABASE {name} WITH (FORCE)")).unwrap();
    let error = refused.unwrap_err();
    assert_eq!(sqlstate(&error), "0A000");
    assert!(pg_claims_tests::hint(&error).contains("UTF8"));
}
