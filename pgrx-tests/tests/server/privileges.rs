//! Who may do what.

use pg_claims_tests::{TestDb, detail, hint, json, message, sqlstate};

use crate::support::*;

/// Every function that a client calls, with arguments that would do something.
const CALLS: [&str; 10] = [
    "register_session('x')",
    "end_session('s1')",
    "claim_sd('SD-1', 's1')",
    "sd_start('SD-1', 's1')",
    "release_sd('s1')",
    "is_sd_claimed('SD-1')",
    "update_session_heartbeat('s1')",
    "grant_coordination('postgres', 'viewer')",
    "bind_directives('strategic_directives_v2', '{sd_id}')",
    "unbind_directives()",
];

const RELATIONS: [&str; 7] = [
    "claude_sessions",
    "sd_claims",
    "session_lifecycle_events",
    "directive_binding",
    "strategic_directives_v2",
    "v_active_sessions",
    "v_directives",
];

#[test]
fn public_has_nothing() {
    let (db, mut owner) = coordinated();
    let nobody = db.role("nobody");
    let mut c = db.connect_as(&nobody);
    for call in CALLS {
        let error = c.query(&format!("SELECT {call}"), &[]).unwrap_err();
        assert_eq!(sqlstate(&error), "42501", "{call}");
        let function = call.split('(').next().unwrap();
        assert!(
            message(&error).contains(function),
            "says which grant is missing: {}",
            message(&error)
        );
    }
    for relation in RELATIONS {
        for statement in ["SELECT FROM", "DELETE FROM", "TRUNCATE"] {
            // What a view does not offer at all is refused before privileges are looked at.
            if relation.starts_with("v_") && statement != "SELECT FROM" {
                continue;
            }
            let error = c.batch_execute(&format!("{statement} {relation}")).unwrap_err();
            assert_eq!(sqlstate(&error), "42501", "{statement} {relation}");
        }
    }
    // Whatever the extension owns, so that nothing new can be forgotten.
    let open = owner
        .query(
            "SELECT pg_describe_object(d.classid, d.objid, 0)
               FROM pg_depend d JOIN pg_extension e ON e.oid = d.refobjid AND e.extname = 'pg_claims'
               LEFT JOIN pg_proc p ON d.classid = 'pg_proc'::regclass AND p.oid = d.objid
               LEFT JOIN pg_class c ON d.classid = 'pg_class'::regclass AND c.oid = d.objid
              WHERE d.deptype = 'e'
                AND EXISTS (SELECT FROM aclexplode(coalesce(p.proacl, c.relacl,
                              acldefault(CASE WHEN p.oid IS NOT NULL THEN 'f' WHEN c.relkind = 'S' THEN 's' ELSE 'r' END::\"char\",
                                         coalesce(p.proowner, c.relowner)))) a
                             WHERE a.grantee = 0)",
            &[],
        )
        .unwrap();
    let open: Vec<String> = open.iter().map(|row| row.get(0)).collect();
    assert!(open.is_empty(), "PUBLIC can use {open:?}");
}

#[test]
fn each_level_opens_what_it_says_and_nothing_more() {
    let (db, mut owner) = coordinated();
    let role = db.role("agent");
    let mut c = db.connect_as(&role);
    let may = |c: &mut postgres::Client, sql: &str| match c.batch_execute(sql) {
        Ok(()) => true,
        Err(error) => {
            assert_eq!(sqlstate(&error), "42501", "{sql}: {error}");
            false
        }
    };
    let grant = |owner: &mut postgres::Client, level: &str| {
        assert_eq!(
            json(owner, "SELECT grant_coordination($1, $2)", &[&role, &level])["level"],
            level
        );
    };
    let see =
        "SELECT * FROM v_active_sessions; SELECT * FROM v_directives; SELECT is_sd_claimed('SD-1')";
    let work = "SELECT register_session('mine'); SELECT claim_sd('SD-1', 'mine');
                SELECT sd_start('SD-1', 'mine'); SELECT update_session_heartbeat('mine');
                SELECT release_sd('mine'); SELECT end_session('mine')";
    let operate = "SELECT * FROM claude_sessions; SELECT * FROM sd_claims;
                   SELECT * FROM session_lifecycle_events; SELECT release_sd('s1');
                   INSERT INTO strategic_directives_v2 (sd_id) VALUES ('X');
                   DELETE FROM strategic_directives_v2 WHERE sd_id = 'X'";
    for (level, expected) in [
        ("viewer", [true, false, false]),
        ("worker", [true, true, false]),
        ("operator", [true, true, true]),
        ("worker", [true, true, false]),
        ("none", [false, false, false]),
    ] {
        grant(&mut owner, level);
        let found = [see, work, operate].map(|sql| may(&mut c, sql));
        assert_eq!(found, expected, "{level}");
        for write in [
            "UPDATE claude_sessions SET tty = NULL",
            "DELETE FROM sd_claims",
            "TRUNCATE session_lifecycle_events",
            "SELECT grant_coordination('postgres', 'none')",
        ] {
            assert!(!may(&mut c, write), "{level} may {write}");
        }
    }
}

fn two_workers(db: &TestDb, owner: &mut postgres::Client) -> (String, String) {
    let roles = (db.role("alice"), db.role("bob"));
    for role in [&roles.0, &roles.1] {
        json(owner, "SELECT grant_coordination($1, 'worker')", &[role]);
    }
    roles
}

#[test]
fn a_session_belongs_to_the_role_that_registered_it() {
    let (db, mut owner) = coordinated();
    let (alice, bob) = two_workers(&db, &mut owner);
    let mut a = db.connect_as(&alice);
    let mut b = db.connect_as(&bob);
    register(&mut a, "hers");
    granted(&mut a, "SD-1", "hers");
    for call in [
        "register_session('hers')",
        "claim_sd('SD-2', 'hers')",
        "claim_sd('SD-1', 'hers')",
        "sd_start('SD-2', 'hers')",
        "release_sd('hers')",
        "release_sd('hers', 'x', 0)",
        "update_session_heartbeat('hers')",
        "end_session('hers')",
    ] {
        let error = b.query(&format!("SELECT {call}"), &[]).unwrap_err();
        assert_eq!(sqlstate(&error), "42501", "an error, never zero rows: {call}");
        assert!(detail(&error).contains(&alice), "{}", detail(&error));
        assert!(hint(&error).contains("grant_coordination"), "{}", hint(&error));
    }
    register(&mut b, "his");
    assert_eq!(claim(&mut b, "SD-1", "his")["claimed_by"], "hers", "refusals cross roles");
    assert_eq!(beat(&mut a, "hers")["sd_id"], "SD-1");
    // An operator may act for everybody, and the audit says who did.
    json(&mut owner, "SELECT grant_coordination($1, 'operator')", &[&bob]);
    assert_eq!(release(&mut b, "hers")["success"], true);
    assert_eq!(register(&mut b, "hers")["session_id"], "hers");
    assert_eq!(beat(&mut a, "hers")["success"], true, "it is still hers");
    let actor = "SELECT actor FROM session_lifecycle_events WHERE event_type = 'released'";
    assert_eq!(value(&mut owner, actor), Some(bob));
    assert_in_step(&mut owner);
}

#[test]
fn set_role_counts_as_postgrest_uses_it() {
    let (db, mut owner) = coordinated();
    let (alice, bob) = two_workers(&db, &mut owner);
    let gateway = db.role("authenticator");
    owner.batch_execute(&format!("GRANT {alice}, {bob} TO {gateway}")).unwrap();
    let mut c = db.connect_as(&gateway);
    c.batch_execute(&format!("SET ROLE {alice}")).unwrap();
    register(&mut c, "hers");
    c.batch_execute(&format!("SET ROLE {bob}")).unwrap();
    let error = c.query("SELECT claim_sd('SD-1', 'hers')", &[]).unwrap_err();
    assert_eq!(sqlstate(&error), "42501");
    c.batch_execute(&format!("SET ROLE {alice}")).unwrap();
    granted(&mut c, "SD-1", "hers");
    let owner_role = "SELECT owner_role FROM claude_sessions WHERE session_id = 'hers'";
    assert_eq!(value(&mut owner, owner_role), Some(alice));
}

/// An operator that is no superuser and has tables of its own.
fn tenant(db: &TestDb, owner: &mut postgres::Client) -> String {
    let tenant = db.role("tenant");
    json(owner, "SELECT grant_coordination($1, 'operator')", &[&tenant]);
    owner.batch_execute(&format!("GRANT CREATE ON SCHEMA public TO {tenant}")).unwrap();
    tenant
}

#[test]
fn a_backlog_owner_s_code_never_runs_with_the_extension_s_rights() {
    let (db, mut owner) = coordinated();
    let tenant = tenant(&db, &mut owner);
    let mut t = db.connect_as(&tenant);
    t.batch_execute(
        "CREATE TABLE theirs (key text PRIMARY KEY, is_working_on boolean, seen_as text);
         CREATE FUNCTION spy() RETURNS trigger LANGUAGE plpgsql AS
           $$ BEGIN NEW.seen_as := current_user; RETURN NEW; END $$;
         CREATE TRIGGER spy BEFORE UPDATE ON theirs FOR EACH ROW EXECUTE FUNCTION spy();
         INSERT INTO theirs VALUES ('T-1');
         ALTER TABLE theirs ENABLE ROW LEVEL SECURITY;
         ALTER TABLE theirs FORCE ROW LEVEL SECURITY;
         SELECT bind_directives('theirs', '{key}')",
    )
    .unwrap();
    granted(&mut owner, "T-1", "s1");
    // Although row-level security is forced on the owner, the mirror is written; and the trigger
    // ran as the table's owner.
    assert_eq!(
        value(&mut owner, "SELECT is_working_on || ' ' || seen_as FROM theirs"),
        Some(format!("true {tenant}"))
    );
    assert_in_step(&mut owner);
}

#[test]
fn a_backlog_owner_s_deferred_trigger_never_runs_with_the_rights_of_whoever_commits() {
    let (db, mut owner) = coordinated();
    let tenant = tenant(&db, &mut owner);
    let mut t = db.connect_as(&tenant);
    t.batch_execute(
        "CREATE TABLE theirs (key text PRIMARY KEY, is_working_on boolean);
         CREATE TABLE seen (as_role text);
         CREATE FUNCTION spy() RETURNS trigger LANGUAGE plpgsql AS
           $$ BEGIN INSERT INTO public.seen VALUES (current_user); RETURN NULL; END $$;
         CREATE CONSTRAINT TRIGGER spy AFTER UPDATE ON theirs DEFERRABLE INITIALLY DEFERRED
           FOR EACH ROW EXECUTE FUNCTION spy();
         INSERT INTO theirs VALUES ('T-1');
         SELECT bind_directives('theirs', '{key}')",
    )
    .unwrap();
    granted(&mut owner, "T-1", "s1");
    age_heartbeat(&mut owner, "s1", "1 hour");
    json(&mut owner, "SELECT cleanup_stale_sessions()", &[]);
    let seen = "SELECT string_agg(as_role, ',') FROM seen";
    assert_eq!(value(&mut owner, seen), Some(format!("{tenant},{tenant}")));
    assert_in_step(&mut owner);
    // Nor by way of another table: what would be deferred there is refused, or since 18 runs as the
    // role that wrote it.
    t.batch_execute(
        "CREATE TABLE further (a text);
         CREATE CONSTRAINT TRIGGER spy AFTER INSERT ON further DEFERRABLE INITIALLY DEFERRED
           FOR EACH ROW EXECUTE FUNCTION spy();
         CREATE FUNCTION chain() RETURNS trigger LANGUAGE plpgsql AS
           $$ BEGIN SET CONSTRAINTS ALL DEFERRED; INSERT INTO public.further VALUES ('x'); RETURN NULL; END $$;
         CREATE TRIGGER chain AFTER UPDATE ON theirs FOR EACH ROW EXECUTE FUNCTION chain()",
    )
    .unwrap();
    let attempt = owner.query("SELECT claim_sd('T-1', 's1')", &[]);
    let newer = value(&mut owner, "SELECT current_setting('server_version_num')::int >= 180000");
    if newer.as_deref() != Some("true") {
        assert_eq!(sqlstate(&attempt.unwrap_err()), "42501");
    }
    assert_eq!(
        value(&mut owner, "SELECT count(*) FROM seen WHERE as_role <> (SELECT tableowner FROM pg_tables WHERE tablename = 'theirs')").as_deref(),
        Some("0")
    );
    release(&mut owner, "s1");
    t.batch_execute(
        "DROP TRIGGER chain ON theirs; DELETE FROM seen; INSERT INTO seen VALUES ('a'), ('b')",
    )
    .unwrap();
    // The user's own writes are deferred as before.
    t.batch_execute("BEGIN; UPDATE theirs SET key = 'T-2'").unwrap();
    assert_eq!(count(&mut t, "SELECT count(*) FROM seen"), 2);
    t.batch_execute("COMMIT").unwrap();
    assert_eq!(count(&mut t, "SELECT count(*) FROM seen"), 3);
}

#[test]
fn a_backlog_owner_s_casts_never_run_with_the_extension_s_rights() {
    let (db, mut owner) = coordinated();
    let tenant = tenant(&db, &mut owner);
    let mut t = db.connect_as(&tenant);
    t.batch_execute(
        "CREATE TYPE state AS ENUM ('open', 'completed');
         CREATE TYPE pair AS (a text, b text);
         CREATE FUNCTION as_text(state) RETURNS text LANGUAGE plpgsql AS
           $$ BEGIN RAISE 'ran as %', current_user; END $$;
         CREATE CAST (state AS text) WITH FUNCTION as_text(state);
         CREATE TABLE theirs (key text PRIMARY KEY, status state, title pair, kind char(4));
         INSERT INTO theirs VALUES ('T-1', 'open'), ('T-2', 'completed')",
    )
    .unwrap();
    for (columns, detail_says) in [
        ("'{key}'", "title"),
        ("'{status}', p_title_column => ''", "status"),
        ("'{kind}', p_title_column => ''", "kind"),
        ("'{title}'", "title"),
    ] {
        let error =
            t.query(&format!("SELECT bind_directives('theirs', {columns})"), &[]).unwrap_err();
        assert_eq!(sqlstate(&error), "42804", "{columns}: {error:?}");
        assert!(detail(&error).contains(detail_says), "{}", detail(&error));
    }
    t.batch_execute("SELECT bind_directives('theirs', '{key}', p_title_column => '')").unwrap();
    granted(&mut owner, "T-1", "s1");
    assert_eq!(claim(&mut owner, "T-2", "s2")["error"], "sd_terminal_status");
    assert_eq!(
        value(&mut owner, "SELECT string_agg(status, ',' ORDER BY sd_id) FROM v_directives")
            .as_deref(),
        Some("open,completed")
    );
    t.batch_execute("UPDATE theirs SET status = 'completed'").unwrap();
    assert_eq!(release(&mut owner, "s1")["error"], "no_claim");
    assert_in_step(&mut owner);
}

#[test]
fn only_the_owner_of_a_table_can_bind_it() {
    let (db, mut owner) = coordinated();
    let operator = db.role("operator");
    json(&mut owner, "SELECT grant_coordination($1, 'operator')", &[&operator]);
    owner
        .batch_execute(
            "CREATE TABLE payroll (key text PRIMARY KEY); GRANT SELECT ON payroll TO public",
        )
        .unwrap();
    let mut c = db.connect_as(&operator);
    let error = c.query("SELECT bind_directives('payroll', '{key}')", &[]).unwrap_err();
    assert_eq!(sqlstate(&error), "42501");
    assert!(hint(&error).contains("owner"));
}

#[test]
fn an_application_without_any_grant_can_finish_an_sd_of_its_own_backlog() {
    let (db, mut owner) = coordinated();
    let app = db.role("app");
    owner
        .batch_execute(&format!(
            "CREATE TABLE work (key text PRIMARY KEY, status text, is_working_on boolean);
             INSERT INTO work VALUES ('W-1', 'open');
             SELECT bind_directives('work', '{{key}}');
             GRANT SELECT, UPDATE ON work TO {app}"
        ))
        .unwrap();
    granted(&mut owner, "W-1", "s1");
    db.connect_as(&app).batch_execute("UPDATE work SET status = 'completed'").unwrap();
    assert_eq!(release(&mut owner, "s1")["error"], "no_claim");
    assert_in_step(&mut owner);
}

#[test]
fn default_privileges_open_nothing() {
    let db = TestDb::empty();
    let anon = db.role("anon");
    let mut owner = db.connect();
    owner
        .batch_execute(&format!(
            "ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT ALL ON FUNCTIONS TO {anon}, public;
             ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT ALL ON TABLES TO {anon}, public;
             ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT ALL ON SEQUENCES TO {anon}, public;
             CREATE EXTENSION pg_claims"
        ))
        .unwrap();
    let mut c = db.connect_as(&anon);
    for call in CALLS {
        let error = c.query(&format!("SELECT {call}"), &[]).unwrap_err();
        assert_eq!(sqlstate(&error), "42501", "{call}");
    }
    for relation in RELATIONS {
        let error = c.batch_execute(&format!("SELECT FROM {relation}")).unwrap_err();
        assert_eq!(sqlstate(&error), "42501", "{relation}");
    }
    let error = c.query("SELECT nextval('sd_claims_claim_id_seq')", &[]).unwrap_err();
    assert_eq!(sqlstate(&error), "42501");
}

#[test]
fn a_backlog_owner_s_trigger_cannot_lead_the_extension_astray() {
    let (db, mut owner) = coordinated();
    let tenant = tenant(&db, &mut owner);
    let mut t = db.connect_as(&tenant);
    // The trigger leaves a search_path behind in which "=" is the tenant's.
    owner.batch_execute(&format!("CREATE SCHEMA trap AUTHORIZATION {tenant}")).unwrap();
    t.batch_execute(
        "CREATE TABLE theirs (key text PRIMARY KEY, title text, is_working_on boolean);
         INSERT INTO theirs VALUES ('T-1', 'one'), ('T-2', 'two');
         CREATE TABLE trap.sprung (by name);
         CREATE FUNCTION trap.eq(text, text) RETURNS boolean LANGUAGE plpgsql AS
           $$ BEGIN INSERT INTO trap.sprung VALUES (current_user); RETURN $1 OPERATOR(pg_catalog.=) $2; END $$;
         CREATE OPERATOR trap.= (LEFTARG = text, RIGHTARG = text, FUNCTION = trap.eq);
         CREATE FUNCTION lure() RETURNS trigger LANGUAGE plpgsql AS
           $$ BEGIN PERFORM pg_catalog.set_config('search_path', 'trap, pg_catalog', false); RETURN NEW; END $$;
         CREATE TRIGGER lure BEFORE UPDATE ON theirs FOR EACH ROW EXECUTE FUNCTION lure();
         SELECT bind_directives('theirs', '{key}')",
    )
    .unwrap();
    let path = value(&mut owner, "SELECT current_setting('search_path')");
    for sd in ["T-1", "T-2"] {
        owner.query(&format!("SELECT sd_start('{sd}', 's1')"), &[]).unwrap();
    }
    age_heartbeat(&mut owner, "s1", "1 hour");
    granted(&mut owner, "T-2", "s2");
    release(&mut owner, "s2");
    assert_eq!(count(&mut owner, "SELECT count(*) FROM trap.sprung"), 0);
    assert_eq!(value(&mut owner, "SELECT current_setting('search_path')"), path);
}

#[test]
fn a_backlog_owner_s_trigger_finds_what_lies_beside_the_table() {
    let (_db, mut c) = coordinated();
    c.batch_execute(
        "CREATE SCHEMA app; SET search_path = app, public;
         CREATE TABLE app.work (key text PRIMARY KEY, is_working_on boolean);
         CREATE TABLE app.log (line text);
         CREATE FUNCTION app.note() RETURNS trigger LANGUAGE plpgsql AS
           $$ BEGIN INSERT INTO log VALUES (NEW.key); RETURN NULL; END $$;
         CREATE TRIGGER note AFTER UPDATE ON app.work FOR EACH ROW EXECUTE FUNCTION app.note();
         INSERT INTO app.work VALUES ('W-1');
         SELECT bind_directives('app.work', '{key}');
         SET search_path = public",
    )
    .unwrap();
    granted(&mut c, "W-1", "s1");
    assert_eq!(count(&mut c, "SELECT count(*) FROM app.log"), 1);
}

#[test]
fn the_owner_s_rights_end_with_the_call() {
    let (db, mut owner) = coordinated();
    let worker = db.role("worker");
    json(&mut owner, "SELECT grant_coordination($1, 'worker')", &[&worker]);
    // The operator's trigger, so that a statement is needed. It sees the owner's rights and the pinned
    // search_path, and leaves a setting behind, as it may.
    owner
        .batch_execute(
            "CREATE TABLE seen (as_role name, search_path text);
             CREATE FUNCTION look() RETURNS trigger LANGUAGE plpgsql AS $$
               BEGIN
                 INSERT INTO public.seen VALUES (current_user, current_setting('search_path'));
                 PERFORM set_config('app.last', NEW.session_id, false);
                 RETURN NULL;
               END $$;
             CREATE TRIGGER look AFTER UPDATE ON claude_sessions FOR EACH ROW EXECUTE FUNCTION look()",
        )
        .unwrap();
    let mut c = db.connect_as(&worker);
    json(&mut c, "SELECT register_session('mine')", &[]);
    c.batch_execute("SET search_path = public, pg_temp").unwrap();
    let state = "concat_ws(' ', current_user, current_setting('search_path'))";
    let own = value(&mut c, &format!("SELECT {state}")).unwrap();
    assert_eq!(own, format!("{worker} public, pg_temp"));
    for call in
        ["claim_sd('SD-1', 'mine')", "release_sd('mine')", "update_session_heartbeat('mine')"]
    {
        c.batch_execute("SET app.last = ''").unwrap();
        owner.batch_execute("TRUNCATE seen").unwrap();
        // Also within the statement that calls.
        let within = format!("SELECT concat_ws(' ', {call} ->> 'success', {state})");
        assert_eq!(value(&mut c, &within), Some(format!("true {own}")), "{call}");
        assert_eq!(value(&mut c, &format!("SELECT {state}")), Some(own.clone()), "{call}");
        let seen = "SELECT string_agg(DISTINCT concat_ws(' ', as_role = (SELECT extowner::regrole::name FROM pg_extension WHERE extname = 'pg_claims'), search_path), ';') FROM seen";
        assert_eq!(value(&mut owner, seen).as_deref(), Some("t pg_catalog, pg_temp"), "{call}");
        let last = value(&mut c, "SELECT current_setting('app.last')");
        assert_eq!(last.as_deref(), Some("mine"), "{call}");
    }
    // After an error that is caught as well. Each has asked, by a statement, whether the caller is an operator.
    for call in ["claim_sd('SD-1', 's1')", "release_sd('s1')", "update_session_heartbeat('s1')"] {
        c.batch_execute(&format!(
            "DO $$ BEGIN
               BEGIN
                 PERFORM {call};
                 RAISE EXCEPTION 'no error';
               EXCEPTION WHEN insufficient_privilege THEN NULL;
               END;
               IF {state} <> '{own}' THEN RAISE EXCEPTION 'left behind: %', {state}; END IF;
             END $$"
        ))
        .unwrap();
        assert_eq!(value(&mut c, &format!("SELECT {state}")), Some(own.clone()), "{call}");
    }
}
