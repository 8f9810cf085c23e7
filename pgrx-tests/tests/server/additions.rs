//! A user adds triggers, constraints or columns to the extension's tables: the extension's own writes obey them.

use pg_claims_tests::{json, message, sqlstate};
use postgres::Client;

use crate::queue::texts;
use crate::support::*;

fn add(c: &mut Client, sql: &str) {
    c.batch_execute(sql).unwrap();
}

#[test]
fn a_generated_column_is_computed_for_each_write() {
    let (_db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    add(
        &mut c,
        "ALTER TABLE claude_sessions ADD COLUMN holds text GENERATED ALWAYS AS (upper(sd_id)) STORED;
         ALTER TABLE sd_claims ADD COLUMN is_over boolean GENERATED ALWAYS AS (released_at IS NOT NULL) STORED;
         ALTER TABLE strategic_directives_v2
             ADD COLUMN worker text GENERATED ALWAYS AS (coalesce(active_session_id, 'nobody')) STORED",
    );
    let told = |c: &mut Client| {
        [
            "SELECT holds FROM claude_sessions WHERE session_id = 's1'",
            "SELECT string_agg(is_over::text, ' ' ORDER BY claim_id) FROM sd_claims",
            "SELECT worker FROM strategic_directives_v2 WHERE sd_id = 'SD-1'",
        ]
        .map(|question| value(c, question))
    };
    assert_eq!(told(&mut c), [Some("SD-1".into()), Some("false".into()), Some("s1".into())]);
    release(&mut c, "s1");
    assert_eq!(told(&mut c), [None, Some("true".into()), Some("nobody".into())]);
    granted(&mut c, "SD-1", "s1");
    assert_eq!(told(&mut c), [Some("SD-1".into()), Some("true false".into()), Some("s1".into())]);
    assert_in_step(&mut c);
}

#[test]
fn a_statement_trigger_sees_the_rows_in_its_transition_tables() {
    let (_db, mut c) = coordinated();
    add(
        &mut c,
        "CREATE TABLE seen (n serial, what text);
         CREATE FUNCTION see_update() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             INSERT INTO public.seen (what) SELECT TG_OP || ' ' || coalesce(o.sd_id, '-') || ' ' || coalesce(n.sd_id, '-')
                                   FROM o JOIN n USING (session_id);
             RETURN NULL; END $$;
         CREATE FUNCTION see_insert() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             INSERT INTO public.seen (what) SELECT TG_OP || ' ' || n.sd_id FROM n; RETURN NULL; END $$;
         CREATE TRIGGER see AFTER UPDATE ON claude_sessions REFERENCING OLD TABLE AS o NEW TABLE AS n
             FOR EACH STATEMENT EXECUTE FUNCTION see_update();
         CREATE TRIGGER see AFTER INSERT ON sd_claims REFERENCING NEW TABLE AS n
             FOR EACH STATEMENT EXECUTE FUNCTION see_insert()",
    );
    granted(&mut c, "SD-1", "s1");
    release(&mut c, "s1");
    let seen = texts(&mut c, "SELECT what FROM seen ORDER BY n");
    assert_eq!(seen, ["INSERT SD-1", "UPDATE - SD-1", "UPDATE SD-1 -"]);
}

/// Makes functions for a superuser to put on the tables. They are an error where an ordinary role's call runs them as another
/// role than the extension's owner, or with another search_path than the one they are given.
fn note_runs(c: &mut Client) {
    add(
        c,
        "CREATE SEQUENCE runs;
         CREATE FUNCTION runs_in(at text, of anyelement) RETURNS boolean LANGUAGE plpgsql IMMUTABLE AS $$ BEGIN
             -- Not while it is added.
             IF session_user <> 'postgres' THEN
                 PERFORM pg_catalog.nextval('public.runs');
                 IF current_user <> 'postgres' OR current_setting('search_path') <> at THEN
                     RAISE EXCEPTION 'as % in %', current_user, current_setting('search_path');
                 END IF;
             END IF;
             RETURN true; END $$;
         CREATE FUNCTION run_in() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             PERFORM public.runs_in(TG_ARGV[0], 1); RETURN NEW; END $$;
         CREATE DOMAIN checked AS text CHECK (public.runs_in('pg_catalog, pg_temp', VALUE))",
    );
}

/// A claim and a release by an ordinary role, with one thing of a superuser's on the tables.
#[test]
fn whatever_is_put_on_the_tables_runs_as_the_extension_s_owner() {
    // Each is an error where it runs as another role, or finds unqualified names elsewhere.
    let additions = [
        "ALTER TABLE {t} ADD CONSTRAINT added CHECK (public.runs_in('{s}', {k}))",
        "ALTER TABLE {t} ADD CONSTRAINT added CHECK (session_user = 'postgres' OR current_user = 'postgres')",
        "CREATE INDEX added ON {t} (public.runs_in('{s}', {k}))",
        "CREATE INDEX added ON {t} ({k}) WHERE public.runs_in('{s}', {k})",
        "ALTER TABLE {t} ADD COLUMN added boolean GENERATED ALWAYS AS (public.runs_in('{s}', {k})) STORED",
        "CREATE TRIGGER added BEFORE INSERT OR UPDATE ON {t} FOR EACH ROW EXECUTE FUNCTION public.run_in('{s}')",
        "CREATE TRIGGER added AFTER INSERT OR UPDATE ON {t} FOR EACH ROW EXECUTE FUNCTION public.run_in('{s}')",
        "CREATE TRIGGER added AFTER INSERT OR UPDATE ON {t} FOR EACH STATEMENT EXECUTE FUNCTION public.run_in('{s}')",
        "CREATE CONSTRAINT TRIGGER added AFTER INSERT OR UPDATE ON {t} FOR EACH ROW EXECUTE FUNCTION public.run_in('{s}')",
    ];
    let defaults = [
        "ALTER TABLE {t} ADD COLUMN added boolean DEFAULT public.runs_in('{s}', clock_timestamp())",
        "ALTER TABLE {t} ADD COLUMN added name DEFAULT current_user CHECK (added = 'postgres')",
        "ALTER TABLE {t} ADD COLUMN added serial",
        "ALTER TABLE {t} ADD COLUMN added public.checked DEFAULT clock_timestamp()::text",
    ];
    let tables = [
        ("claude_sessions", "session_id", &additions[..]),
        ("strategic_directives_v2", "active_session_id", &additions[..]),
        ("sd_claims", "claim_id", &additions[..]),
        ("session_lifecycle_events", "event_id", &additions[..]),
        ("sd_claims", "claim_id", &defaults[..]),
        ("session_lifecycle_events", "event_id", &defaults[..]),
    ];
    let (db, mut c) = coordinated();
    note_runs(&mut c);
    let role = db.role("worker");
    add(&mut c, &format!("SELECT grant_coordination('{role}', 'worker')"));
    for (table, key, additions) in tables {
        for addition in additions {
            let mut own = db.connect_as(&role);
            json(&mut own, "SELECT register_session('own')", &[]);
            // What the connection keeps of the tables is made before.
            granted(&mut own, "SD-1", "own");
            release(&mut own, "own");
            let search_path = match table {
                "strategic_directives_v2" => "pg_catalog, public, pg_temp",
                _ => "pg_catalog, pg_temp",
            };
            let addition =
                addition.replace("{t}", table).replace("{k}", key).replace("{s}", search_path);
            add(&mut c, &addition);
            add(&mut c, "ALTER SEQUENCE runs RESTART");
            for call in ["claim_sd('SD-1', 'own')", "release_sd('own')"] {
                let done = own.query(&format!("SELECT {call}"), &[]);
                assert!(done.is_ok(), "{addition}, {call}: {done:?}");
            }
            let has_run = count(&mut c, "SELECT count(*) FROM runs WHERE is_called") > 0;
            assert_eq!(has_run, addition.contains("public."), "{addition}");
            assert_in_step(&mut c);
            let undo = if addition.contains("CONSTRAINT added") {
                format!("ALTER TABLE {table} DROP CONSTRAINT added")
            } else if addition.contains("INDEX") {
                "DROP INDEX added".into()
            } else if addition.contains("TRIGGER") {
                format!("DROP TRIGGER added ON {table}")
            } else {
                format!("ALTER TABLE {table} DROP COLUMN added")
            };
            add(&mut c, &undo);
        }
    }
}

#[test]
fn what_was_put_there_since_a_transaction_s_snapshot_runs_as_the_owner_too() {
    let (db, mut c) = coordinated();
    note_runs(&mut c);
    let role = db.role("worker");
    add(&mut c, &format!("SELECT grant_coordination('{role}', 'worker')"));
    let mut own = db.connect_as(&role);
    json(&mut own, "SELECT register_session('own')", &[]);
    own.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1").unwrap();
    for (table, search_path) in [
        ("claude_sessions", "pg_catalog, pg_temp"),
        ("sd_claims", "pg_catalog, pg_temp"),
        ("strategic_directives_v2", "pg_catalog, public, pg_temp"),
    ] {
        add(
            &mut c,
            &format!(
                "CREATE TRIGGER added AFTER INSERT OR UPDATE ON {table} FOR EACH ROW
                     EXECUTE FUNCTION public.run_in('{search_path}')"
            ),
        );
    }
    for _ in 0..3 {
        own.batch_execute("SELECT claim_sd('SD-1', 'own'); SELECT release_sd('own')").unwrap();
    }
    own.batch_execute("COMMIT").unwrap();
    assert!(count(&mut c, "SELECT last_value FROM runs") >= 18);
    assert_in_step(&mut c);
}

/// The extension's own backlog, and one that is bound instead of it.
const BACKLOGS: [(&str, &str); 2] = [
    ("strategic_directives_v2", "SELECT 1"),
    (
        "items",
        "CREATE TABLE items (sd_id text PRIMARY KEY, is_working_on boolean NOT NULL DEFAULT false, active_session_id text);
         INSERT INTO items SELECT sd_id FROM strategic_directives_v2;
         SELECT bind_directives('items', '{sd_id}', p_is_working_on_column => 'is_working_on',
                                p_active_session_id_column => 'active_session_id')",
    ),
];

#[test]
fn a_foreign_key_passes_the_mirror_on() {
    for (table, made) in BACKLOGS {
        let (db, mut c) = coordinated();
        note_runs(&mut c);
        let role = db.role("worker");
        add(&mut c, &format!("SELECT grant_coordination('{role}', 'worker'); {made}"));
        let mut own = db.connect_as(&role);
        json(&mut own, "SELECT register_session('own')", &[]);
        granted(&mut own, "SD-1", "own");
        release(&mut own, "own");
        add(
            &mut c,
            &format!(
                "ALTER TABLE {table} ADD UNIQUE (sd_id, is_working_on);
                 CREATE TABLE child (sd_id text, w boolean,
                     FOREIGN KEY (sd_id, w) REFERENCES {table} (sd_id, is_working_on) ON UPDATE CASCADE);
                 INSERT INTO child VALUES ('SD-1', false);
                 CREATE TRIGGER added BEFORE UPDATE ON child FOR EACH ROW
                     EXECUTE FUNCTION public.run_in('pg_catalog, public, pg_temp')"
            ),
        );
        let told = |c: &mut Client| value(c, "SELECT w FROM child");
        granted(&mut own, "SD-1", "own");
        assert_eq!(told(&mut c).as_deref(), Some("true"), "{table}");
        // Of this table nobody tells the extension.
        add(
            &mut c,
            "CREATE TRIGGER late AFTER UPDATE ON child FOR EACH ROW
                 EXECUTE FUNCTION public.run_in('pg_catalog, public, pg_temp')",
        );
        for _ in 0..3 {
            release(&mut own, "own");
            assert_eq!(told(&mut c).as_deref(), Some("false"), "{table}");
            granted(&mut own, "SD-1", "own");
        }
        assert!(count(&mut c, "SELECT last_value FROM runs") >= 7, "{table}");
        assert_in_step(&mut c);
    }
}

#[test]
fn a_trigger_of_the_backlog_cannot_take_it_away_from_under_the_write() {
    for (table, made) in BACKLOGS {
        let (_db, mut c) = coordinated();
        add(&mut c, made);
        add(
            &mut c,
            &format!(
                "CREATE INDEX added ON {table} (active_session_id);
                 CREATE INDEX added_too ON {table} (active_session_id);
                 CREATE FUNCTION meddle() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                     EXECUTE current_setting('test.meddles'); RETURN NEW; END $$;
                 CREATE TRIGGER meddle BEFORE UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION meddle();
                 SET test.meddles = 'SELECT 1'"
            ),
        );
        // What the connection keeps of the table is made.
        granted(&mut c, "SD-1", "s1");
        release(&mut c, "s1");
        for (meddles, told) in [
            ("DROP INDEX public.added", "cannot DROP INDEX"),
            (
                "SELECT public.unbind_directives()",
                "cannot change the backlog while a claim writes a row of it",
            ),
        ] {
            add(&mut c, &format!("SET test.meddles = '{meddles}'"));
            let error = c.query("SELECT claim_sd('SD-1', 's1')", &[]).unwrap_err();
            assert_eq!(sqlstate(&error), "55006", "{table}, {meddles}: {error:?}");
            assert!(message(&error).starts_with(told), "{table}: {}", message(&error));
        }
        add(&mut c, "SET test.meddles = 'SELECT 1'");
        granted(&mut c, "SD-1", "s1");
        assert_in_step(&mut c);
    }
}

#[test]
fn a_trigger_of_the_backlog_may_claim_although_another_one_is_deferrable() {
    for (table, made) in BACKLOGS {
        let (_db, mut c) = coordinated();
        add(&mut c, made);
        add(
            &mut c,
            &format!(
                "CREATE FUNCTION claim_another() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                     IF NEW.sd_id = 'SD-1' AND NEW.is_working_on THEN
                         PERFORM public.claim_sd('SD-2', 's2');
                     END IF; RETURN NEW; END $$;
                 CREATE TRIGGER another BEFORE UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION claim_another();
                 CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
                 CREATE CONSTRAINT TRIGGER later AFTER UPDATE ON {table} DEFERRABLE INITIALLY DEFERRED
                     FOR EACH ROW EXECUTE FUNCTION nothing();
                 CREATE CONSTRAINT TRIGGER z_later AFTER UPDATE ON {table} DEFERRABLE INITIALLY DEFERRED
                     FOR EACH ROW EXECUTE FUNCTION nothing()"
            ),
        );
        granted(&mut c, "SD-1", "s1");
        assert_in_step(&mut c);
        release(&mut c, "s2");
        release(&mut c, "s1");
        assert_in_step(&mut c);
    }
}

#[test]
fn constraints_and_generated_columns_know_their_table() {
    for (table, made) in BACKLOGS {
        let (_db, mut c) = coordinated();
        add(&mut c, made);
        for table in [table, "claude_sessions", "sd_claims", "session_lifecycle_events"] {
            add(
                &mut c,
                &format!(
                    "ALTER TABLE {table} ADD CHECK (tableoid = '{table}'::regclass),
                     ADD COLUMN of_table oid GENERATED ALWAYS AS (tableoid) STORED"
                ),
            );
        }
        granted(&mut c, "SD-1", "s1");
        release(&mut c, "s1");
        let wrong = format!("SELECT count(*) FROM {table} WHERE of_table <> '{table}'::regclass");
        assert_eq!(count(&mut c, &wrong), 0);
        assert_in_step(&mut c);
    }
}

#[test]
fn columns_that_must_have_a_value_get_their_default() {
    let (_db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    for table in ["sd_claims", "session_lifecycle_events"] {
        add(
            &mut c,
            &format!(
                "ALTER TABLE {table} ADD COLUMN cost integer NOT NULL DEFAULT 7,
                 ADD COLUMN number bigint GENERATED ALWAYS AS IDENTITY, ADD COLUMN at timestamptz NOT NULL DEFAULT clock_timestamp()"
            ),
        );
    }
    release(&mut c, "s1");
    granted(&mut c, "SD-2", "s1");
    granted(&mut c, "SD-3", "s2");
    for table in ["sd_claims", "session_lifecycle_events"] {
        let whole = format!(
            "SELECT count(*) FROM {table} WHERE cost = 7 AND number > 0 AND at IS NOT NULL"
        );
        let all = count(&mut c, &format!("SELECT count(*) FROM {table}"));
        assert_eq!(count(&mut c, &whole), all, "{table}");
        assert_eq!(
            count(&mut c, &format!("SELECT count(DISTINCT number) FROM {table}")),
            all,
            "{table}"
        );
    }
}

#[test]
fn a_trigger_that_suppresses_a_write_is_an_error_that_undoes_the_call() {
    for (table, when) in [
        ("claude_sessions", "UPDATE"),
        ("sd_claims", "INSERT"),
        ("session_lifecycle_events", "INSERT"),
    ] {
        let (_db, mut c) = coordinated();
        add(
            &mut c,
            &format!(
                "CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
                 CREATE TRIGGER swallow BEFORE {when} ON {table} FOR EACH ROW EXECUTE FUNCTION swallow()"
            ),
        );
        let error = c.query("SELECT claim_sd('SD-1', 's1')", &[]).unwrap_err();
        assert_eq!(sqlstate(&error), "09000", "{table}");
        assert_eq!(message(&error), format!("a row of \"{table}\" could not be written"));
        assert_in_step(&mut c);
        add(&mut c, &format!("DROP TRIGGER swallow ON {table}"));
        granted(&mut c, "SD-1", "s1");
    }
}

#[test]
fn a_trigger_that_writes_the_very_row_is_told_so() {
    let (_db, mut c) = coordinated();
    add(
        &mut c,
        "CREATE FUNCTION meddle() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             UPDATE public.claude_sessions SET metadata = '{\"seen\": true}' WHERE session_id = NEW.session_id
                AND NOT metadata ? 'seen';
             RETURN NEW; END $$;
         CREATE TRIGGER meddle BEFORE UPDATE OF sd_id ON claude_sessions FOR EACH ROW EXECUTE FUNCTION meddle()",
    );
    let error = c.query("SELECT claim_sd('SD-1', 's1')", &[]).unwrap_err();
    assert_eq!(sqlstate(&error), "27000");
    assert_in_step(&mut c);
}

#[test]
fn a_trigger_cannot_have_the_extension_write_what_no_row_may_say() {
    let (_db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    // Before the extension's own trigger, by its name.
    for spoiling in [
        "status := 'paused'",
        "stale_after := '-1 hour'",
        "heartbeat_at := 'infinity'",
        "silent_until := 'infinity'",
    ] {
        add(
            &mut c,
            &format!(
                "CREATE OR REPLACE FUNCTION spoil() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                     NEW.{spoiling}; RETURN NEW; END $$;
                 CREATE TRIGGER aa_spoil BEFORE UPDATE OF sd_id ON claude_sessions
                     FOR EACH ROW EXECUTE FUNCTION spoil()"
            ),
        );
        let error = c.query("SELECT release_sd('s1')", &[]).unwrap_err();
        assert_eq!(sqlstate(&error), "23514", "{spoiling}: {error:?}");
        assert_in_step(&mut c);
        add(&mut c, "DROP TRIGGER aa_spoil ON claude_sessions");
    }
    release(&mut c, "s1");
}

#[test]
fn a_trigger_that_the_extension_sets_off_is_not_taken_for_the_extension() {
    let (_db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    add(
        &mut c,
        "CREATE FUNCTION forge() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             UPDATE public.sd_claims SET released_at = now(), release_reason = 'forged'
              WHERE sd_id = 'SD-1' AND released_at IS NULL;
             RETURN NULL; END $$;
         CREATE TRIGGER forge AFTER UPDATE OF sd_id ON claude_sessions FOR EACH ROW EXECUTE FUNCTION forge()",
    );
    let error = c.query("SELECT claim_sd('SD-2', 's2')", &[]).unwrap_err();
    assert_eq!(sqlstate(&error), "55000");
    assert!(message(&error).contains("open claims are written through claude_sessions"));
    assert_in_step(&mut c);
}

#[test]
fn a_function_that_is_replaced_is_the_one_that_runs() {
    let (db, mut c) = coordinated();
    let mut other = db.connect();
    let define = |limit: usize| {
        format!(
            "CREATE OR REPLACE FUNCTION is_short(t text) RETURNS boolean IMMUTABLE LANGUAGE sql
                 AS 'SELECT t IS NULL OR pg_catalog.length(t) < {limit}'"
        )
    };
    add(&mut other, &define(10));
    add(
        &mut other,
        "ALTER TABLE claude_sessions ADD CONSTRAINT short_track CHECK (public.is_short(track));
         CREATE TABLE seen (what text);
         CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN INSERT INTO public.seen VALUES ('one'); RETURN NULL; END $$;
         CREATE TRIGGER see AFTER INSERT ON sd_claims FOR EACH ROW EXECUTE FUNCTION see()",
    );
    c.batch_execute("SELECT claim_sd('SD-1', 's1', 'track')").unwrap();
    release(&mut c, "s1");
    add(&mut other, &define(3));
    add(
        &mut other,
        "CREATE OR REPLACE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN INSERT INTO public.seen VALUES ('two'); RETURN NULL; END $$",
    );
    let error = c.query("SELECT claim_sd('SD-1', 's1', 'track')", &[]).unwrap_err();
    assert_eq!(sqlstate(&error), "23514");
    c.batch_execute("SELECT claim_sd('SD-1', 's1', 'ab')").unwrap();
    assert_eq!(texts(&mut c, "SELECT what FROM seen ORDER BY what"), ["one", "two"]);
}

#[test]
fn a_trigger_may_write_the_table_whose_write_has_set_it_off() {
    let (_db, mut c) = coordinated();
    add(
        &mut c,
        "CREATE FUNCTION chain() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             IF NEW.sd_id = 'SD-1' THEN PERFORM public.claim_sd('SD-2', 's2'); END IF;
             RETURN NULL; END $$;
         CREATE TRIGGER chain AFTER UPDATE OF sd_id ON claude_sessions FOR EACH ROW EXECUTE FUNCTION chain()",
    );
    for _ in 0..3 {
        granted(&mut c, "SD-1", "s1");
        let holders = "SELECT string_agg(session_id || ' ' || sd_id, ', ' ORDER BY session_id)
                         FROM claude_sessions WHERE sd_id IS NOT NULL";
        assert_eq!(value(&mut c, holders).as_deref(), Some("s1 SD-1, s2 SD-2"));
        assert_in_step(&mut c);
        release(&mut c, "s1");
        release(&mut c, "s2");
    }
}

#[test]
fn a_deferred_trigger_is_fired_when_the_transaction_commits() {
    let (_db, mut c) = coordinated();
    add(
        &mut c,
        "CREATE FUNCTION veto() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN RAISE EXCEPTION 'not at last' USING ERRCODE = 'P0007'; END $$;
         CREATE CONSTRAINT TRIGGER veto AFTER UPDATE OF sd_id ON claude_sessions DEFERRABLE INITIALLY DEFERRED
             FOR EACH ROW WHEN (NEW.sd_id = 'SD-1') EXECUTE FUNCTION veto()",
    );
    c.batch_execute("BEGIN; SELECT claim_sd('SD-1', 's1'); SELECT claim_sd('SD-2', 's2')").unwrap();
    let error = c.batch_execute("COMMIT").unwrap_err();
    assert_eq!(sqlstate(&error), "P0007");
    assert_in_step(&mut c);
    granted(&mut c, "SD-2", "s2");
}

#[test]
fn policies_that_apply_to_the_extension_s_owner_are_refused() {
    let (db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    add(&mut c, "ALTER TABLE sd_claims ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY");
    // A superuser's writes go by no policy.
    release(&mut c, "s1");
    granted(&mut c, "SD-1", "s1");
    let owner = db.role("owner");
    // As if that role, which is no superuser, owned the extension.
    let own = "SELECT format('ALTER %s %s OWNER TO %I', CASE WHEN c.oid IS NULL THEN 'FUNCTION' ELSE 'TABLE' END,
                             COALESCE(c.oid::regclass::text, d.objid::regprocedure::text), $1::text)
                 FROM pg_depend d JOIN pg_extension e ON e.oid = d.refobjid AND e.extname = 'pg_claims'
                 LEFT JOIN pg_class c ON d.classid = 'pg_class'::regclass AND c.oid = d.objid
                WHERE d.deptype = 'e' AND (c.relkind IN ('r', 'v') OR d.classid = 'pg_proc'::regclass)";
    let commands =
        c.query(own, &[&owner]).unwrap().iter().map(|row| row.get(0)).collect::<Vec<String>>();
    add(&mut c, &format!("GRANT CREATE, USAGE ON SCHEMA public TO {owner}"));
    add(&mut c, &commands.join("; "));
    add(
        &mut c,
        &format!(
            "SET allow_system_table_mods = on;
             UPDATE pg_extension SET extowner = '{owner}'::regrole WHERE extname = 'pg_claims'"
        ),
    );
    let error = db.connect().query("SELECT release_sd('s1')", &[]).unwrap_err();
    assert_eq!(sqlstate(&error), "0A000", "{error:?}");
}
