//! Who may do what, and with whose rights code runs.

use pg_claims_tests::{TestDb, detail, json, message, sqlstate, wait_until};
use postgres::{Client, NoTls};

use crate::support::*;

/// A role with the level, and its connection.
fn role(db: &TestDb, owner: &mut Client, name: &str, level: &str) -> (String, Client) {
    let role = db.role(name);
    json(owner, "SELECT grant_coordination($1, $2)", &[&role, &level]);
    let client = db.connect_as(&role);
    (role, client)
}

fn owner_of(c: &mut Client, session: &str) -> Option<String> {
    value(c, &format!("SELECT owner_role FROM claude_sessions WHERE session_id = '{session}'"))
}

/// Two workers, of whom one has a session with a claim and the other would like to act for it.
struct Two {
    victim_role: String,
    victim: Client,
    held: i64,
    thief: String,
    t: Client,
}

fn victim_and_thief(db: &TestDb, owner: &mut Client) -> Two {
    let (victim_role, mut victim) = role(db, owner, "victim", "worker");
    let (thief, t) = role(db, owner, "thief", "worker");
    owner.batch_execute(&format!("GRANT CREATE ON SCHEMA public TO {thief}")).unwrap();
    register(&mut victim, "victim");
    let held = granted(&mut victim, "SD-1", "victim");
    Two { victim_role, victim, held, thief, t }
}

#[test]
fn who_calls_is_the_role_that_executes_the_call() {
    let (db, mut owner) = coordinated();
    let Two { victim_role, mut victim, held, thief, mut t } = victim_and_thief(&db, &mut owner);
    // Whatever sets it off, a function that has its owner's rights acts for that owner.
    t.batch_execute(
        "CREATE TABLE seen (state text); GRANT ALL ON seen TO PUBLIC;
         CREATE FUNCTION act(p_name text) RETURNS boolean LANGUAGE plpgsql SECURITY DEFINER AS $$ BEGIN
           PERFORM public.register_session(p_name);
           PERFORM public.release_sd('victim', 'stolen');
           INSERT INTO public.seen VALUES ('stolen by ' || p_name);
           RETURN true;
         EXCEPTION WHEN insufficient_privilege THEN
           PERFORM public.register_session(p_name);
           INSERT INTO public.seen VALUES (SQLSTATE); RETURN true; END $$;
         CREATE FUNCTION act_in_trigger() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS
         $$ BEGIN PERFORM public.act(TG_ARGV[0]); RETURN NULL; END $$;
         CREATE TABLE bait (a integer PRIMARY KEY); GRANT ALL ON bait TO PUBLIC;
         CREATE TRIGGER act AFTER INSERT ON bait FOR EACH ROW EXECUTE FUNCTION act_in_trigger('by-trigger');
         CREATE CONSTRAINT TRIGGER act_late AFTER INSERT ON bait DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION act_in_trigger('by-deferred');
         CREATE VIEW look AS SELECT public.act('by-view'); GRANT SELECT ON look TO PUBLIC;
         CREATE TABLE ruled (a integer); GRANT ALL ON ruled TO PUBLIC;
         CREATE RULE act AS ON INSERT TO ruled DO ALSO SELECT public.act('by-rule');
         CREATE TABLE child (a integer REFERENCES bait ON DELETE CASCADE);
         CREATE TRIGGER act AFTER DELETE ON child FOR EACH ROW EXECUTE FUNCTION act_in_trigger('by-cascade');
         CREATE TABLE watched (a integer); INSERT INTO watched VALUES (1); GRANT SELECT ON watched TO PUBLIC;
         ALTER TABLE watched ENABLE ROW LEVEL SECURITY;
         CREATE POLICY act ON watched USING (public.act('by-policy'));
         CREATE FUNCTION act_in_event() RETURNS event_trigger LANGUAGE plpgsql SECURITY DEFINER AS
         $$ BEGIN PERFORM public.act('by-event'); END $$;
         CREATE MATERIALIZED VIEW stored AS SELECT public.act('by-view-first');
         CREATE TABLE indexed (a integer);
         CREATE FUNCTION act_in_index(integer) RETURNS integer LANGUAGE plpgsql IMMUTABLE AS
         $$ BEGIN PERFORM public.act('by-index'); RETURN $1; END $$;
         INSERT INTO indexed VALUES (1); CREATE INDEX ON indexed (act_in_index(a))",
    )
    .unwrap();
    for (name, set_off) in [
        ("by-call", "SELECT act('by-call')"),
        ("by-trigger", "INSERT INTO bait VALUES (1)"),
        ("by-deferred", "INSERT INTO bait VALUES (2)"),
        ("by-view", "SELECT * FROM look"),
        ("by-rule", "INSERT INTO ruled VALUES (1)"),
        ("by-cascade", "INSERT INTO child VALUES (1); DELETE FROM bait WHERE a = 1"),
        ("by-policy", "SET ROLE TO victim; SELECT * FROM watched; RESET ROLE"),
        ("by-index", "REINDEX TABLE indexed; VACUUM (ANALYZE) indexed"),
        (
            "by-event",
            "CREATE EVENT TRIGGER act ON ddl_command_end WHEN TAG IN ('CREATE SEQUENCE') EXECUTE FUNCTION act_in_event();
             CREATE SEQUENCE unheard_of; DROP EVENT TRIGGER act",
        ),
        ("by-view-first", "REFRESH MATERIALIZED VIEW stored"),
    ] {
        for part in set_off.replace("TO victim", &victim_role).split("; ") {
            owner.batch_execute(part).unwrap();
        }
        assert_eq!(owner_of(&mut owner, name).as_deref(), Some(&*thief), "{name}");
        assert_eq!(beat(&mut victim, "victim")["claim_id"], held, "{name}");
    }
    assert_eq!(
        value(&mut owner, "SELECT string_agg(DISTINCT state, ',') FROM seen").as_deref(),
        Some("42501")
    );
    let actors = "SELECT string_agg(DISTINCT actor, ',') FROM session_lifecycle_events WHERE session_id LIKE 'by-%'";
    assert_eq!(value(&mut owner, actors), Some(thief.clone()));
    // SET ROLE counts, and is taken back.
    owner.batch_execute(&format!("SET ROLE {thief}")).unwrap();
    register(&mut owner, "by-role");
    let refused = owner.batch_execute("SELECT release_sd('victim')").unwrap_err();
    assert_eq!(sqlstate(&refused), "42501");
    owner.batch_execute("RESET ROLE").unwrap();
    assert_eq!(owner_of(&mut owner, "by-role"), Some(thief));
    assert_in_step(&mut owner);
}

/// A function of the thief's that acts for the victim if it can, and in any case for itself.
fn bait(thief: &mut Client, victim_claim: i64) {
    thief
        .batch_execute(&format!(
            "CREATE FUNCTION act(integer) RETURNS integer LANGUAGE plpgsql IMMUTABLE SECURITY DEFINER AS $$ BEGIN
               PERFORM public.register_session('by-autovacuum');
               BEGIN
                 PERFORM public.release_sd('victim', 'stolen');
               EXCEPTION WHEN insufficient_privilege THEN NULL; END;
               RETURN $1; END $$;
             CREATE FUNCTION beat_for_the_victim() RETURNS jsonb LANGUAGE sql PARALLEL SAFE SECURITY DEFINER AS
             $$ SELECT public.update_session_heartbeat('victim', {victim_claim}) $$"
        ))
        .unwrap();
}

#[test]
fn what_autovacuum_sets_off_acts_for_the_owner_of_the_code() {
    let (server, mut owner) = coordinated_server(
        "autovacuum",
        &["autovacuum = on", "autovacuum_naptime = 1s", "shared_preload_libraries = 'pg_claims'"],
    );
    owner
        .batch_execute(
            "CREATE ROLE victim LOGIN; CREATE ROLE thief LOGIN; GRANT CREATE ON SCHEMA public TO thief;
             SELECT grant_coordination('victim', 'worker'), grant_coordination('thief', 'worker')",
        )
        .unwrap();
    let as_role = |role: &str| {
        let mut config = server.config("postgres");
        config.user(role).connect(NoTls).unwrap()
    };
    let (mut victim, mut thief) = (as_role("victim"), as_role("thief"));
    register(&mut victim, "victim");
    let held = granted(&mut victim, "SD-1", "victim");
    bait(&mut thief, held);
    // The victim's own table, on which the thief's function is an index expression.
    owner
        .batch_execute(
            "CREATE TABLE indexed (a integer)
               WITH (autovacuum_analyze_threshold = 1, autovacuum_analyze_scale_factor = 0);
             ALTER TABLE indexed OWNER TO victim;
             CREATE INDEX ON indexed (act(a)); INSERT INTO indexed SELECT generate_series(1, 100);
             SELECT end_session('by-autovacuum'); DELETE FROM claude_sessions WHERE session_id = 'by-autovacuum'",
        )
        .unwrap();
    // What it has registered is there once it commits, which is after it tells of the analysis.
    wait_until("autovacuum analyses the table", || owner_of(&mut owner, "by-autovacuum").is_some());
    assert_eq!(owner_of(&mut owner, "by-autovacuum").as_deref(), Some("thief"));
    assert_eq!(beat(&mut victim, "victim")["claim_id"], held);
    assert_in_step(&mut owner);
    server.discard().unwrap();
}

#[test]
fn in_a_parallel_worker_too_the_caller_is_who_executes_the_call() {
    let (db, mut owner) = coordinated();
    let Two { victim_role, held, thief, mut t, .. } = victim_and_thief(&db, &mut owner);
    bait(&mut t, held);
    owner
        .batch_execute(
            "CREATE TABLE many AS SELECT generate_series(1, 10) AS n; ALTER TABLE many SET (parallel_workers = 2);
             SET parallel_setup_cost = 0; SET parallel_tuple_cost = 0; SET min_parallel_table_scan_size = 0;
             SET parallel_leader_participation = off; GRANT SELECT ON many TO PUBLIC",
        )
        .unwrap();
    // The plan says that the function runs in the worker.
    let sql = "SELECT beat_for_the_victim() FROM many WHERE beat_for_the_victim() IS NOT NULL";
    let plan = owner.query(&format!("EXPLAIN (VERBOSE) {sql}"), &[]).unwrap();
    let plan: Vec<String> = plan.iter().map(|row| row.get(0)).collect();
    let (gather, filter) = ("Gather", "Filter: (beat_for_the_victim() IS NOT NULL)");
    assert!(plan[0].contains(gather) && plan.iter().any(|line| line.contains(filter)), "{plan:#?}");
    for caller in [None, Some(&victim_role)] {
        if let Some(role) = caller {
            owner.batch_execute(&format!("SET ROLE {role}")).unwrap();
        }
        let error = owner.batch_execute(sql).unwrap_err();
        match sqlstate(&error) {
            "42501" => assert!(detail(&error).contains(&thief), "{}", detail(&error)),
            // Where a statement would find out, which no parallel worker may begin.
            code => assert_eq!(code, "25000", "{}", message(&error)),
        }
    }
    owner.batch_execute("RESET ROLE").unwrap();
    // And where the function is the victim's, it may, whoever calls: as in a transaction of one's own.
    owner
        .batch_execute(&format!("ALTER FUNCTION beat_for_the_victim() OWNER TO {victim_role}"))
        .unwrap();
    if let Err(error) = owner.batch_execute(sql) {
        // Without the board a heartbeat is written to the table, which no parallel worker may do.
        assert_eq!(sqlstate(&error), "25000", "{}", message(&error));
    }
    assert_in_step(&mut owner);
}

#[test]
fn a_team_s_own_wrapper_owns_its_sessions() {
    let (db, mut owner) = coordinated();
    let (team, mut t) = role(&db, &mut owner, "team", "worker");
    let user = db.role("client");
    owner
        .batch_execute(&format!(
            "GRANT CREATE ON SCHEMA public TO {team}; GRANT USAGE ON SCHEMA public TO {user}"
        ))
        .unwrap();
    t.batch_execute(
        "CREATE FUNCTION start(p_name text, p_sd text) RETURNS jsonb LANGUAGE sql SECURITY DEFINER AS
         $$ SELECT register_session(p_name); SELECT claim_sd(p_sd, p_name) $$;
         CREATE FUNCTION beat(p_name text) RETURNS jsonb LANGUAGE sql SECURITY DEFINER AS
         $$ SELECT update_session_heartbeat(p_name) $$;
         CREATE FUNCTION done(p_name text) RETURNS jsonb LANGUAGE sql SECURITY DEFINER AS
         $$ SELECT release_sd(p_name) $$",
    )
    .unwrap();
    let mut c = db.connect_as(&user);
    assert_eq!(json(&mut c, "SELECT start('w', 'SD-1')", &[])["success"], true);
    assert_eq!(json(&mut c, "SELECT beat('w')", &[])["success"], true);
    assert_eq!(owner_of(&mut owner, "w"), Some(team));
    assert_eq!(json(&mut c, "SELECT done('w')", &[])["success"], true);
    // It has no other way in.
    let refused = c.batch_execute("SELECT claim_sd('SD-1', 'w')").unwrap_err();
    assert_eq!(sqlstate(&refused), "42501");
    assert_in_step(&mut owner);
}

#[test]
fn execute_on_all_functions_is_no_right_to_grant() {
    let (db, mut owner) = coordinated();
    let app = db.role("app");
    owner
        .batch_execute(&format!("GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA public TO {app}"))
        .unwrap();
    let mut a = db.connect_as(&app);
    owner
        .batch_execute(&format!(
            "GRANT CREATE ON SCHEMA public TO {app}; CREATE TABLE session_facts (LIKE claude_sessions);
             GRANT SELECT ON session_facts TO {app}"
        ))
        .unwrap();
    a.batch_execute(
        "CREATE TABLE forged (LIKE session_facts);
         CREATE TRIGGER forge AFTER INSERT ON forged FOR EACH ROW EXECUTE FUNCTION sync_is_working_on_with_session();
         CREATE TRIGGER forge_too AFTER INSERT ON forged FOR EACH ROW EXECUTE FUNCTION sync_is_working_on_with_session()",
    )
    .unwrap();
    let forged = "INSERT INTO forged (id, session_id, heartbeat_at, status, metadata, created_at, updated_at, owner_role)
                  VALUES (gen_random_uuid(), 'forged', now(), 'idle', '{}', now(), now(), 'x')";
    assert_eq!(sqlstate(&a.batch_execute(forged).unwrap_err()), "42501");
    for level in ["operator", "worker", "none"] {
        let error = a.query_one("SELECT grant_coordination($1, $2)", &[&app, &level]).unwrap_err();
        assert_eq!(sqlstate(&error), "42501", "{level}");
        assert!(detail(&error).contains(&app), "{}", detail(&error));
    }
}

#[test]
fn the_write_of_a_bound_backlog_invents_no_session_for_its_owner() {
    let (db, mut owner) = coordinated();
    granted(&mut owner, "SD-1", "s1");
    let app = db.role("app");
    owner
        .batch_execute(&format!(
            "GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA public TO {app}; GRANT CREATE ON SCHEMA public TO {app};
             CREATE TABLE items (LIKE claude_sessions, is_working_on boolean, active_session_id text, PRIMARY KEY (sd_id));
             INSERT INTO items SELECT *, false, NULL FROM claude_sessions WHERE session_id = 's1';
             UPDATE items SET sd_id = 'SD-9', status = 'active';
             ALTER TABLE items OWNER TO {app}"
        ))
        .unwrap();
    release(&mut owner, "s1");
    let mut a = db.connect_as(&app);
    // What it says of the old and the new row would close whatever acquisition the owner pleases.
    a.batch_execute(
        "CREATE TRIGGER forge AFTER UPDATE ON items FOR EACH ROW EXECUTE FUNCTION sync_is_working_on_with_session()",
    )
    .unwrap();
    owner
        .batch_execute(
            "SELECT bind_directives('items', '{sd_id}', p_is_working_on_column => 'is_working_on',
                                    p_active_session_id_column => 'active_session_id')",
        )
        .unwrap();
    let error = owner.query("SELECT claim_sd('SD-9', 's2')", &[]).unwrap_err();
    assert_eq!(sqlstate(&error), "42501", "{error:?}");
    a.batch_execute("DROP TRIGGER forge ON items").unwrap();
    granted(&mut owner, "SD-9", "s2");
}

#[test]
fn a_function_of_somebody_s_with_the_same_name_is_not_in_the_way() {
    let (db, mut owner) = coordinated();
    let (other, mut o) = role(&db, &mut owner, "other", "viewer");
    owner.batch_execute(&format!("GRANT CREATE ON SCHEMA public TO {other}")).unwrap();
    o.batch_execute(
        "CREATE FUNCTION claim_sd(integer) RETURNS integer LANGUAGE sql AS 'SELECT 1';
         CREATE FUNCTION unbind_directives(integer) RETURNS integer LANGUAGE sql AS 'SELECT 1'",
    )
    .unwrap();
    let (_, mut w) = role(&db, &mut owner, "worker", "worker");
    register(&mut w, "w");
    granted(&mut w, "SD-1", "w");
}

#[test]
fn a_role_has_exactly_the_level_that_it_is_given() {
    let (db, mut owner) = coordinated();
    owner
        .batch_execute("CREATE ROLE passer_on; SELECT grant_coordination('passer_on', 'none')")
        .unwrap();
    let app = db.role("app");
    owner
        .batch_execute(&format!(
            "GRANT ALL ON ALL TABLES IN SCHEMA public TO {app}; GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {app};
             GRANT UPDATE (hostname) ON claude_sessions TO {app}; GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA public TO {app}"
        ))
        .unwrap();
    let answer = json(&mut owner, "SELECT grant_coordination($1, 'worker')", &[&app]);
    let revoked = answer["revoked"].as_array().unwrap();
    assert!(
        revoked
            .iter()
            .any(|told| told.as_str().unwrap().contains("INSERT ON TABLE public.claude_sessions")),
        "{answer}"
    );
    assert!(
        revoked.iter().any(|told| told.as_str().unwrap().contains("grant_coordination")),
        "{answer}"
    );
    assert_eq!(answer["left"], serde_json::json!([]));
    let mut a = db.connect_as(&app);
    for forbidden in [
        "SELECT * FROM claude_sessions",
        "UPDATE claude_sessions SET hostname = 'x'",
        "INSERT INTO strategic_directives_v2 (sd_id) VALUES ('X')",
        "SELECT unbind_directives()",
        "SELECT nextval('sd_claims_claim_id_seq')",
    ] {
        assert_eq!(sqlstate(&a.batch_execute(forbidden).unwrap_err()), "42501", "{forbidden}");
    }
    register(&mut a, "a");
    granted(&mut a, "SD-1", "a");
    drop(a);
    // The same level again changes nothing, and tells of nothing.
    let again = json(&mut owner, "SELECT grant_coordination($1, 'worker')", &[&app]);
    assert_eq!(again["revoked"], serde_json::json!([]), "{again}");
    let none = json(&mut owner, "SELECT grant_coordination($1, 'none')", &[&app]);
    // Schema public is for others as well, which is told.
    assert_eq!(none["left"], serde_json::json!(["USAGE ON SCHEMA public"]), "{none}");
    owner.batch_execute("DROP ROLE passer_on").unwrap();
}

#[test]
fn nothing_is_left_of_a_role_in_a_schema_of_the_extension_s_own() {
    let db = TestDb::empty();
    let mut owner = db.connect();
    owner.batch_execute("CREATE SCHEMA claims; CREATE EXTENSION pg_claims SCHEMA claims; CREATE ROLE shortlived LOGIN").unwrap();
    owner
        .batch_execute(
            "SELECT claims.grant_coordination('shortlived', 'operator');
             GRANT DELETE ON claims.sd_holds TO shortlived;
             SELECT claims.grant_coordination('shortlived', 'viewer');
             SELECT claims.grant_coordination('shortlived', 'none');
             DROP ROLE shortlived",
        )
        .unwrap();
}

#[test]
fn what_somebody_else_has_granted_is_told() {
    let (db, mut owner) = coordinated();
    let (boss, mut b) = role(&db, &mut owner, "boss", "operator");
    let app = db.role("app");
    owner.batch_execute(&format!("GRANT SELECT ON sd_claims TO {boss} WITH GRANT OPTION")).unwrap();
    b.batch_execute(&format!("GRANT SELECT ON sd_claims TO {app}")).unwrap();
    let answer = json(&mut owner, "SELECT grant_coordination($1, 'worker')", &[&app]);
    assert_eq!(answer["left"], serde_json::json!(["SELECT ON TABLE public.sd_claims"]), "{answer}");
    json(&mut owner, "SELECT grant_coordination($1, 'none')", &[&boss]);
}

#[test]
fn settings_of_the_caller_s_change_nothing() {
    let (_db, mut owner) = coordinated();
    owner
        .batch_execute(
            "CREATE TABLE theirs (key text PRIMARY KEY, title text);
             SET quote_all_identifiers = on; SET standard_conforming_strings = off;
             SELECT bind_directives('theirs', '{key}')",
        )
        .unwrap();
    assert_eq!(count(&mut owner, "SELECT count(*) FROM coordination_repair(true)"), 0);
    let kept = "SELECT current_setting('quote_all_identifiers') || current_setting('standard_conforming_strings')";
    assert_eq!(value(&mut owner, kept).as_deref(), Some("onoff"));
}

#[test]
fn row_level_security_that_comes_by_itself_hides_nothing() {
    let db = TestDb::empty();
    let mut owner = db.connect();
    owner
        .batch_execute(
            "CREATE FUNCTION secure() RETURNS event_trigger LANGUAGE plpgsql AS $$
             DECLARE r record; BEGIN
               FOR r IN SELECT * FROM pg_event_trigger_ddl_commands() WHERE object_type = 'table' LOOP
                 EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', r.object_identity);
               END LOOP; END $$;
             CREATE EVENT TRIGGER secure ON ddl_command_end WHEN TAG IN ('CREATE TABLE') EXECUTE FUNCTION secure();
             CREATE EXTENSION pg_claims",
        )
        .unwrap();
    backlog(&mut owner);
    register(&mut owner, "s1");
    let (_, mut operator) = role(&db, &mut owner, "operator", "operator");
    assert_eq!(count(&mut operator, "SELECT count(*) FROM claude_sessions"), 1);
    assert_eq!(count(&mut operator, "SELECT count(*) FROM strategic_directives_v2"), 9);
    let updated = operator
        .execute("UPDATE strategic_directives_v2 SET title = 'x' WHERE sd_id = 'SD-1'", &[]);
    assert_eq!(updated.unwrap(), 1);
}
