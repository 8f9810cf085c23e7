//! Somebody changes the extension's tables while it is in use: its next write goes by the change.

use pg_claims_tests::{json, sqlstate};

use crate::queue::texts;
use crate::support::*;

const TABLES: [&str; 4] =
    ["claude_sessions", "sd_claims", "session_lifecycle_events", "strategic_directives_v2"];

#[test]
fn a_trigger_that_comes_later_is_fired_from_then_on() {
    let (db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    release(&mut c, "s1");
    for table in TABLES {
        db.connect()
            .batch_execute(&format!(
                "CREATE TABLE seen_{table} (what text);
                 CREATE FUNCTION see_{table}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS
                     $$ BEGIN INSERT INTO public.seen_{table} VALUES (TG_OP); RETURN NULL; END $$;
                 CREATE TRIGGER see AFTER INSERT OR UPDATE ON {table}
                     FOR EACH ROW EXECUTE FUNCTION see_{table}()"
            ))
            .unwrap();
    }
    granted(&mut c, "SD-1", "s1");
    release(&mut c, "s1");
    let seen = TABLES.map(|table| {
        value(&mut c, &format!("SELECT string_agg(what, ' ') FROM seen_{table}")).unwrap()
    });
    assert_eq!(seen, ["UPDATE UPDATE", "INSERT UPDATE", "INSERT INSERT", "UPDATE UPDATE"]);

    for table in TABLES {
        let gone = format!("DROP TRIGGER see ON {table}; TRUNCATE seen_{table}");
        db.connect().batch_execute(&gone).unwrap();
    }
    granted(&mut c, "SD-2", "s1");
    for table in TABLES {
        assert_eq!(count(&mut c, &format!("SELECT count(*) FROM seen_{table}")), 0);
    }
    assert_in_step(&mut c);
}

#[test]
fn any_one_of_the_tables_may_have_a_trigger() {
    for table in TABLES {
        let (db, mut c) = coordinated();
        db.connect()
            .batch_execute(&format!(
                "CREATE TABLE seen (what text);
                 CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS
                     $$ BEGIN INSERT INTO public.seen VALUES (TG_OP); RETURN NULL; END $$;
                 CREATE TRIGGER see AFTER INSERT OR UPDATE ON {table}
                     FOR EACH ROW EXECUTE FUNCTION see()"
            ))
            .unwrap();
        granted(&mut c, "SD-1", "s1");
        granted(&mut c, "SD-2", "s1");
        assert_eq!(release(&mut c, "s1")["success"], true, "{table}");
        granted(&mut c, "SD-3", "s1");
        age_heartbeat(&mut c, "s1", "1 hour");
        granted(&mut c, "SD-3", "s2");
        age_heartbeat(&mut c, "s2", "1 hour");
        let reaped = json(&mut c, "SELECT cleanup_stale_sessions()", &[]);
        assert_eq!(reaped["success"], true, "{table}: {reaped}");
        assert!(count(&mut c, "SELECT count(*) FROM seen") >= 6, "{table}");
        assert_eq!(
            count(&mut c, "SELECT count(*) FROM claude_sessions WHERE sd_id IS NOT NULL"),
            0
        );
        assert_in_step(&mut c);
    }
}

#[test]
fn a_trigger_of_the_extension_s_that_is_given_another_function_is_fired() {
    let (db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    db.connect()
        .batch_execute(
            "CREATE TABLE seen (what text);
             CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS
                 $$ BEGIN INSERT INTO public.seen VALUES (TG_OP); RETURN NULL; END $$;
             CREATE OR REPLACE TRIGGER claude_sessions_set_back_trigger AFTER UPDATE ON claude_sessions
                 FOR EACH ROW EXECUTE FUNCTION see()",
        )
        .unwrap();
    assert_eq!(release(&mut c, "s1")["success"], true);
    assert_eq!(value(&mut c, "SELECT string_agg(what, ' ') FROM seen").as_deref(), Some("UPDATE"));
    assert_in_step(&mut c);
}

#[test]
fn an_index_of_the_extension_s_name_that_decides_nothing_is_noticed() {
    let makes = [
        "CREATE INDEX idx_claude_sessions_unique_active_claim
             ON claude_sessions (sd_id) WHERE sd_id IS NOT NULL AND status = 'active'",
        "CREATE UNIQUE INDEX idx_claude_sessions_unique_active_claim
             ON claude_sessions (sd_id) WHERE sd_id IS NOT NULL",
    ];
    for make in makes {
        let (db, mut c) = coordinated();
        granted(&mut c, "SD-1", "s1");
        let concerned = "SELECT detail FROM coordination_check() WHERE name = 'tables'";
        let told = |c: &mut postgres::Client| {
            value(c, concerned).is_some_and(|told| told.contains("claude_sessions"))
        };
        assert!(!told(&mut c));
        db.connect()
            .batch_execute(&format!("DROP INDEX idx_claude_sessions_unique_active_claim; {make}"))
            .unwrap();
        assert!(told(&mut c), "{make}");
        let error = c.query("SELECT claim_sd('SD-2', 's2')", &[]).unwrap_err();
        assert_eq!(sqlstate(&error), "XX001", "{make}");
    }
}

#[test]
fn a_constraint_that_comes_later_holds() {
    let (db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    release(&mut c, "s1");
    db.connect()
        .batch_execute(
            "ALTER TABLE claude_sessions ADD CONSTRAINT no_such_track CHECK (track <> 'none')",
        )
        .unwrap();
    let error = c.query("SELECT claim_sd('SD-1', 's1', 'none')", &[]).unwrap_err();
    assert_eq!(sqlstate(&error), "23514");
    granted(&mut c, "SD-1", "s1");
    assert_in_step(&mut c);
}

#[test]
fn a_column_that_comes_later_keeps_its_default_and_its_values() {
    let (db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    for table in TABLES {
        db.connect()
            .batch_execute(&format!("ALTER TABLE {table} ADD COLUMN note text DEFAULT 'made'"))
            .unwrap();
    }
    c.batch_execute("UPDATE claude_sessions SET note = 'mine'").unwrap();
    release(&mut c, "s1");
    granted(&mut c, "SD-2", "s1");
    let notes = |c: &mut postgres::Client, table: &str| {
        value(c, &format!("SELECT string_agg(DISTINCT note, ' ') FROM {table}"))
    };
    assert_eq!(notes(&mut c, "claude_sessions"), Some("mine".into()));
    for table in &TABLES[1..] {
        assert_eq!(notes(&mut c, table), Some("made".into()), "{table}");
    }
    assert_in_step(&mut c);
}

#[test]
fn a_column_that_must_not_be_null_later_is_not() {
    let (db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    db.connect()
        .batch_execute(
            "UPDATE claude_sessions SET track = 'none'; ALTER TABLE claude_sessions ALTER track SET NOT NULL",
        )
        .unwrap();
    let error = c.query("SELECT claim_sd('SD-2', 's2')", &[]).unwrap_err();
    assert_eq!(sqlstate(&error), "23502");
}

#[test]
fn an_index_that_a_transaction_s_snapshot_does_not_show_is_written_all_the_same() {
    let (db, mut c) = coordinated();
    for isolation in ["REPEATABLE READ", "SERIALIZABLE"] {
        let mut late = db.connect();
        late.batch_execute(&format!("BEGIN ISOLATION LEVEL {isolation}; SELECT 1")).unwrap();
        c.batch_execute("DROP INDEX IF EXISTS late; CREATE INDEX late ON claude_sessions (track)")
            .unwrap();
        late.batch_execute("SELECT claim_sd('SD-1', 's1', 'in'); COMMIT").unwrap();
        late.batch_execute("SELECT claim_sd('SD-2', 's2', 'after')").unwrap();
        c.batch_execute("SET enable_seqscan = off").unwrap();
        let found = texts(
            &mut c,
            "SELECT session_id FROM claude_sessions WHERE track IN ('in', 'after') ORDER BY 1",
        );
        assert_eq!(found, ["s1", "s2"], "{isolation}");
        for session in ["s1", "s2"] {
            release(&mut c, session);
        }
    }
}

#[test]
fn an_index_that_misses_rows_is_not_read_by() {
    let (_db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    c.batch_execute("SELECT declare_conflict('SD-1', 'SD-2', 'files', 'blocking')").unwrap();
    // As CREATE INDEX CONCURRENTLY leaves it when it fails: there under its name, and not to be relied on.
    c.batch_execute(
        "DROP INDEX sd_conflict_matrix_open_b_idx;
         CREATE INDEX sd_conflict_matrix_open_b_idx ON sd_conflict_matrix (sd_id_b) WHERE sd_id_b = 'none';
         UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'sd_conflict_matrix_open_b_idx'::regclass",
    )
    .unwrap();
    let error = c.query("SELECT claim_sd('SD-2', 's2')", &[]).unwrap_err();
    assert_eq!(sqlstate(&error), "XX001");
    c.batch_execute(
        "DROP INDEX sd_conflict_matrix_open_b_idx;
         CREATE INDEX sd_conflict_matrix_open_b_idx ON sd_conflict_matrix (sd_id_b) WHERE resolved_at IS NULL",
    )
    .unwrap();
    assert_eq!(claim(&mut c, "SD-2", "s2")["error"], "conflict");
}

#[test]
fn an_exclusion_constraint_that_comes_later_holds() {
    let (db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    db.connect()
        .batch_execute("ALTER TABLE sd_claims ADD EXCLUDE USING btree (track WITH =)")
        .unwrap();
    let claim = |session, sd| format!("SELECT claim_sd('{sd}', '{session}', 'one')");
    c.batch_execute(&claim("s2", "SD-2")).unwrap();
    let error = c.batch_execute(&claim("s3", "SD-3")).unwrap_err();
    assert_eq!(sqlstate(&error), "23P01");
}

#[test]
fn a_table_that_was_emptied_since_it_was_read_is_empty() {
    let (_db, mut c) = coordinated();
    c.batch_execute("BEGIN").unwrap();
    beat(&mut c, "s1");
    c.batch_execute("TRUNCATE claude_sessions").unwrap();
    assert_eq!(beat(&mut c, "s1")["error"], "session_not_found");
    c.batch_execute("COMMIT").unwrap();
}

#[test]
fn indexes_may_be_rebuilt_and_added_at_any_time() {
    let (db, mut c) = coordinated();
    let mut other = db.connect();
    for round in 0..3 {
        for table in TABLES {
            other.batch_execute(&format!("REINDEX TABLE CONCURRENTLY {table}")).unwrap();
            other
                .batch_execute(&format!("CREATE INDEX added_{round}_{table} ON {table} (sd_id)"))
                .unwrap();
        }
        granted(&mut c, "SD-1", "s1");
        assert_eq!(claim(&mut c, "SD-1", "s2")["claimed_by"], "s1");
        assert_eq!(beat(&mut c, "s1")["success"], true);
        release(&mut c, "s1");
    }
    // Each index says what its table says.
    for (table, key) in [
        ("claude_sessions", "session_id > ''"),
        ("claude_sessions", "sd_id > '' AND status = 'active'"),
        ("claude_sessions", "sd_id > ''"),
        ("sd_claims", "claim_id > 0"),
        ("sd_claims", "sd_id > ''"),
        ("sd_claims", "sd_id > '' AND released_at IS NULL"),
        ("session_lifecycle_events", "event_id > 0"),
        ("session_lifecycle_events", "sd_id > ''"),
        ("strategic_directives_v2", "sd_id > ''"),
    ] {
        let all =
            format!("SELECT string_agg(t::text, ' ' ORDER BY t::text) FROM {table} t WHERE {key}");
        c.batch_execute("SET enable_seqscan = off").unwrap();
        let by_index = value(&mut c, &all);
        c.batch_execute(
            "RESET enable_seqscan; SET enable_indexscan = off; SET enable_bitmapscan = off; SET enable_indexonlyscan = off",
        )
        .unwrap();
        assert_eq!(value(&mut c, &all), by_index, "{table}: {key}");
        c.batch_execute(
            "RESET enable_indexscan; RESET enable_bitmapscan; RESET enable_indexonlyscan",
        )
        .unwrap();
    }
    assert_in_step(&mut c);
}

#[test]
fn code_in_an_index_is_run_by_the_server_and_not_past_it() {
    let (db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    release(&mut c, "s1");
    // Whoever runs the code, the claim's statement runs it: an error in it is the claim's error.
    db.connect()
        .batch_execute(
            "CREATE FUNCTION picky(text) RETURNS text IMMUTABLE LANGUAGE plpgsql AS
                 $$ BEGIN IF $1 = 'claimed' THEN RAISE 'not this one'; END IF; RETURN $1; END $$;
             TRUNCATE session_lifecycle_events;
             CREATE INDEX picky ON session_lifecycle_events (picky(event_type))",
        )
        .unwrap();
    let error = c.query("SELECT claim_sd('SD-1', 's1')", &[]).unwrap_err();
    assert_eq!(error.as_db_error().unwrap().message(), "not this one");
}

#[test]
fn a_row_that_has_changed_since_the_snapshot_is_a_serialization_failure() {
    for isolation in ["REPEATABLE READ", "SERIALIZABLE"] {
        let (db, mut c) = coordinated();
        granted(&mut c, "SD-1", "s1");
        for call in ["update_session_heartbeat('s1')", "release_sd('s1')", "claim_sd('SD-2', 's1')"]
        {
            let mut late = db.connect();
            late.batch_execute(&format!(
                "BEGIN ISOLATION LEVEL {isolation}; SELECT 1 FROM sd_holds"
            ))
            .unwrap();
            beat(&mut c, "s1");
            let error = late.query(&format!("SELECT {call}"), &[]).unwrap_err();
            assert_eq!(sqlstate(&error), "40001", "{isolation}: {call}");
        }
        assert_in_step(&mut c);
    }
}

#[test]
fn what_a_transaction_wrote_it_finds_again_also_after_a_savepoint_was_rolled_back() {
    let (_db, mut c) = coordinated();
    c.batch_execute("BEGIN").unwrap();
    granted(&mut c, "SD-1", "s1");
    c.batch_execute("SAVEPOINT here").unwrap();
    release(&mut c, "s1");
    granted(&mut c, "SD-2", "s1");
    c.batch_execute("ROLLBACK TO here").unwrap();
    assert_eq!(claim(&mut c, "SD-1", "s2")["claimed_by"], "s1");
    assert_eq!(beat(&mut c, "s1")["sd_id"], "SD-1");
    release(&mut c, "s1");
    granted(&mut c, "SD-1", "s2");
    c.batch_execute("COMMIT").unwrap();
    assert_in_step(&mut c);
}

#[test]
fn a_published_table_without_an_identity_is_not_updated() {
    let (db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    db.connect()
        .batch_execute(
            "ALTER TABLE sd_claims REPLICA IDENTITY NOTHING; CREATE PUBLICATION p FOR TABLE sd_claims",
        )
        .unwrap();
    let error = c.query("SELECT release_sd('s1')", &[]).unwrap_err();
    assert_eq!(sqlstate(&error), "55000");
    c.batch_execute("DROP PUBLICATION p").unwrap();
    release(&mut c, "s1");
    assert_in_step(&mut c);
}

#[test]
fn nothing_is_written_in_a_transaction_that_may_not() {
    let (_db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    c.batch_execute("SET default_transaction_read_only = on").unwrap();
    for call in ["claim_sd('SD-2', 's2')", "release_sd('s1')", "update_session_heartbeat('s1')"] {
        let error = c.query(&format!("SELECT {call}"), &[]).unwrap_err();
        assert_eq!(sqlstate(&error), "25006", "{call}");
    }
    c.batch_execute("SET default_transaction_read_only = off").unwrap();
    assert_in_step(&mut c);
}

#[test]
fn code_in_an_index_of_another_owner_s_backlog_never_runs_with_the_extension_s_rights() {
    let (db, mut c) = coordinated();
    let owner = db.role("owner");
    json(&mut c, "SELECT grant_coordination($1, 'operator')", &[&owner]);
    c.batch_execute(&format!(
        "GRANT CREATE ON SCHEMA public TO {owner}; ALTER TABLE strategic_directives_v2 OWNER TO {owner};
         CREATE SCHEMA theirs AUTHORIZATION {owner}"
    ))
    .unwrap();
    let mut o = db.connect_as(&owner);
    register(&mut o, "mine");
    granted(&mut o, "SD-1", "mine");
    // Under the name of one of the extension's own.
    o.batch_execute(
        "CREATE TABLE theirs.seen (who text);
         CREATE FUNCTION theirs.note() RETURNS text LANGUAGE plpgsql AS
         $$ BEGIN INSERT INTO theirs.seen VALUES (current_user); RETURN 'x'; END $$;
         CREATE FUNCTION theirs.f(text) RETURNS text LANGUAGE plpgsql IMMUTABLE AS
         $$ BEGIN RETURN (SELECT theirs.note()) || $1; END $$;
         DROP INDEX strategic_directives_v2_queue_idx;
         CREATE INDEX strategic_directives_v2_queue_idx ON strategic_directives_v2 (theirs.f(active_session_id));
         DELETE FROM theirs.seen",
    )
    .unwrap();
    // Whether it is done or refused.
    let released = o.query("SELECT release_sd('mine')", &[]);
    let strangers = format!("SELECT count(*) FROM theirs.seen WHERE who <> '{owner}'");
    assert_eq!(count(&mut c, &strangers), 0, "{released:?}");
}

#[test]
fn a_column_that_was_added_and_dropped_again_leaves_the_tables_as_they_were() {
    let all = ["sd_holds", "sd_conflict_matrix"].into_iter().chain(TABLES);
    let (db, mut c) = coordinated();
    let told = "SELECT detail FROM coordination_check() WHERE name = 'direct_access'";
    let told_before = value(&mut c, told);
    let mut other = db.connect();
    for table in all {
        other
            .batch_execute(&format!(
                "ALTER TABLE {table} ADD passing text DEFAULT repeat('passing', 10), ADD passing_too integer DEFAULT 7"
            ))
            .unwrap();
        granted(&mut c, "SD-1", "s1");
        release(&mut c, "s1");
        // Some rows have these columns in their place, others have them by their defaults only.
        other
            .batch_execute(&format!(
                "UPDATE {table} SET passing = (SELECT string_agg(md5(i::text), '') FROM generate_series(1, 3000) i);
                 ALTER TABLE {table} DROP passing, DROP passing_too"
            ))
            .unwrap();
    }
    assert_eq!(value(&mut c, told), told_before);
    assert_eq!(claim(&mut c, "SD-1", "s2")["success"], true);
    assert_eq!(claim(&mut c, "SD-1", "s1")["claimed_by"], "s2");
    assert_in_step(&mut c);
    release(&mut c, "s2");
    // Each once more, in the same place.
    for table in TABLES {
        other
            .batch_execute(&format!(
                "ALTER TABLE {table} ADD passing integer; ALTER TABLE {table} DROP passing"
            ))
            .unwrap();
    }
    granted(&mut c, "SD-1", "s1");
    release(&mut c, "s1");
    // Nor do values stay behind that nobody can see any more.
    for session in ["s1", "s2", "s3"] {
        granted(&mut c, "SD-2", session);
        release(&mut c, session);
    }
    other.batch_execute("VACUUM claude_sessions").unwrap();
    let kept = "SELECT pg_relation_size(reltoastrelid) FROM pg_class WHERE oid = 'claude_sessions'::regclass";
    assert_eq!(count(&mut c, kept), 0);
    assert_in_step(&mut c);
}
