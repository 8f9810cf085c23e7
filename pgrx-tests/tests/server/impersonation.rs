//! Nobody acts as somebody else, by whatever detour.

use pg_claims_tests::{TestDb, json, sqlstate};
use postgres::Client;

use crate::support::*;

/// A role with the worker's level and a place for objects of its own.
fn worker(db: &TestDb, owner: &mut Client, name: &str) -> (String, Client) {
    let role = db.role(name);
    json(owner, "SELECT grant_coordination($1, 'worker')", &[&role]);
    owner.batch_execute(&format!("GRANT CREATE ON SCHEMA public TO {role}")).unwrap();
    let client = db.connect_as(&role);
    (role, client)
}

#[test]
fn a_function_in_an_index_does_not_act_as_whoever_analyses_the_table() {
    let (db, mut owner) = coordinated();
    let (_, mut victim) = worker(&db, &mut owner, "victim");
    let (_, mut thief) = worker(&db, &mut owner, "thief");
    register(&mut victim, "victim");
    let held = granted(&mut victim, "SD-1", "victim");
    thief
        .batch_execute(
            "CREATE FUNCTION steal(integer) RETURNS integer LANGUAGE plpgsql IMMUTABLE AS $$ BEGIN
               BEGIN PERFORM public.release_sd('victim', 'stolen'); EXCEPTION WHEN insufficient_privilege THEN NULL; END;
               RETURN $1; END $$;
             CREATE TABLE bait (a integer);
             INSERT INTO bait SELECT generate_series(1, 100);
             CREATE INDEX ON bait (steal(a))",
        )
        .unwrap();
    for maintenance in ["ANALYZE bait", "REINDEX TABLE bait", "VACUUM ANALYZE bait"] {
        owner.batch_execute(maintenance).unwrap();
        assert_eq!(beat(&mut victim, "victim")["claim_id"], held, "{maintenance}");
    }
    assert_eq!(events(&mut owner, "victim"), ["registered", "claimed"]);
}

#[test]
fn a_backlog_owner_s_trigger_acts_as_that_owner() {
    let (db, mut owner) = coordinated();
    let (_, mut victim) = worker(&db, &mut owner, "victim");
    let (thief, mut t) = worker(&db, &mut owner, "thief");
    t.batch_execute(
        "CREATE TABLE theirs (key text PRIMARY KEY, is_working_on boolean, active_session_id text);
         INSERT INTO theirs VALUES ('A'), ('B');
         CREATE TABLE seen (state text);
         CREATE FUNCTION steal() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
           IF NEW.active_session_id = 'boss' THEN
             BEGIN PERFORM public.release_sd('victim', 'stolen');
             EXCEPTION WHEN insufficient_privilege THEN INSERT INTO public.seen VALUES (SQLSTATE); END;
             PERFORM public.register_session('theirs');
           END IF;
           RETURN NULL; END $$;
         CREATE TRIGGER steal AFTER UPDATE ON theirs FOR EACH ROW EXECUTE FUNCTION steal()",
    )
    .unwrap();
    owner.batch_execute("SELECT bind_directives('theirs', '{key}')").unwrap();
    register(&mut victim, "victim");
    let held = granted(&mut victim, "A", "victim");
    register(&mut owner, "boss");
    granted(&mut owner, "B", "boss");
    assert_eq!(beat(&mut victim, "victim")["claim_id"], held);
    assert_eq!(
        value(&mut owner, "SELECT string_agg(state, ',') FROM seen").as_deref(),
        Some("42501")
    );
    let registered_by = "SELECT owner_role FROM claude_sessions WHERE session_id = 'theirs'";
    assert_eq!(value(&mut owner, registered_by), Some(thief));
    assert_in_step(&mut owner);
}

#[test]
fn what_a_backlog_owner_has_in_its_schema_runs_with_nobody_else_s_rights() {
    let (db, mut owner) = coordinated();
    let (thief, mut t) = worker(&db, &mut owner, "thief");
    owner.batch_execute(&format!("CREATE SCHEMA theirs AUTHORIZATION {thief}")).unwrap();
    // Operators that fit better than the server's where somebody compares an oid with a regclass, or appends to a
    // name. The trigger has every connection read the catalogue anew, right there.
    t.batch_execute(
        "SET search_path = theirs;
         CREATE TABLE ran (who text); GRANT ALL ON ran TO PUBLIC;
         CREATE FUNCTION same(oid, regclass) RETURNS boolean LANGUAGE plpgsql AS
         $$ BEGIN INSERT INTO theirs.ran VALUES (current_user); RETURN $1 = $2::oid; END $$;
         CREATE OPERATOR = (LEFTARG = oid, RIGHTARG = regclass, FUNCTION = same);
         CREATE FUNCTION append(name, text) RETURNS text LANGUAGE plpgsql AS
         $$ BEGIN INSERT INTO theirs.ran VALUES (current_user); RETURN concat($1, $2); END $$;
         CREATE OPERATOR || (LEFTARG = name, RIGHTARG = text, FUNCTION = append);
         CREATE TABLE others (id integer PRIMARY KEY);
         CREATE TABLE backlog (key text PRIMARY KEY, other integer, is_working_on boolean,
             FOREIGN KEY (other) REFERENCES others DEFERRABLE);
         INSERT INTO backlog VALUES ('A');
         CREATE FUNCTION change() RETURNS trigger LANGUAGE plpgsql AS
         $$ BEGIN EXECUTE 'GRANT SELECT ON theirs.backlog TO PUBLIC'; RETURN NULL; END $$;
         CREATE TRIGGER change AFTER UPDATE ON backlog FOR EACH ROW EXECUTE FUNCTION change();
         RESET search_path",
    )
    .unwrap();
    owner.batch_execute("SELECT bind_directives('theirs.backlog', '{key}')").unwrap();
    for _ in 0..2 {
        granted(&mut owner, "A", "s1");
        assert_eq!(release(&mut owner, "s1")["success"], true);
    }
    let others =
        format!("SELECT string_agg(DISTINCT who, ' ') FROM theirs.ran WHERE who <> '{thief}'");
    assert_eq!(value(&mut owner, &others), None);
    assert_in_step(&mut owner);
    owner.batch_execute("SELECT unbind_directives(); DROP SCHEMA theirs CASCADE").unwrap();
}

#[test]
fn the_settings_of_a_restore_switch_nothing_off_for_others() {
    let (db, mut owner) = coordinated();
    let (_, mut w) = worker(&db, &mut owner, "worker");
    let operator = db.role("operator");
    json(&mut owner, "SELECT grant_coordination($1, 'operator')", &[&operator]);
    let mut o = db.connect_as(&operator);
    for c in [&mut w, &mut o] {
        c.batch_execute(
            "SET check_function_bodies = off; SET row_security = off; SET client_min_messages = warning",
        )
        .unwrap();
    }
    register(&mut w, "audited");
    assert_eq!(events(&mut owner, "audited"), ["registered"]);
    o.batch_execute(
        "UPDATE strategic_directives_v2 SET is_working_on = true, active_session_id = 'ghost'",
    )
    .unwrap();
    assert_in_step(&mut owner);
    // One of them alone, as migrations set it, means nothing for anybody.
    owner.batch_execute("SET check_function_bodies = off").unwrap();
    let half = "INSERT INTO claude_sessions (session_id, sd_id, claim_id, claimed_at, status)
                VALUES ('half', 'SD-5', 99, now(), 'active')";
    assert_eq!(sqlstate(&owner.batch_execute(half).unwrap_err()), "428C9");
    assert_in_step(&mut owner);
}

#[test]
fn a_session_belongs_to_the_role_and_not_to_its_name() {
    let (db, mut owner) = coordinated();
    let (first, mut f) = worker(&db, &mut owner, "first");
    register(&mut f, "theirs");
    let held = granted(&mut f, "SD-1", "theirs");
    drop(f);
    let renamed = format!("{first}_renamed");
    owner.batch_execute(&format!("ALTER ROLE {first} RENAME TO {renamed}")).unwrap();
    assert_eq!(beat(&mut db.connect_as(&renamed), "theirs")["claim_id"], held);
    // Another role that gets the name gets no session with it.
    owner.batch_execute(&format!("CREATE ROLE {first} LOGIN")).unwrap();
    json(&mut owner, "SELECT grant_coordination($1, 'worker')", &[&first]);
    let error = db.connect_as(&first).batch_execute("SELECT release_sd('theirs')").unwrap_err();
    assert_eq!(sqlstate(&error), "42501");
    json(&mut owner, "SELECT grant_coordination($1, 'none')", &[&renamed]);
    owner
        .batch_execute(&format!("REVOKE ALL ON SCHEMA public FROM {renamed}; DROP ROLE {renamed}"))
        .unwrap();
    assert_eq!(
        count(&mut owner, "SELECT count(*) FROM v_active_sessions WHERE session_id = 'theirs'"),
        1
    );
}

#[test]
fn a_level_is_taken_back_with_what_was_passed_on() {
    let (db, mut owner) = coordinated();
    let (w, mut c) = worker(&db, &mut owner, "worker");
    let (friend, _) = worker(&db, &mut owner, "friend");
    owner
        .batch_execute(&format!("GRANT EXECUTE ON FUNCTION is_sd_claimed TO {w} WITH GRANT OPTION"))
        .unwrap();
    c.batch_execute(&format!("GRANT EXECUTE ON FUNCTION is_sd_claimed TO {friend}")).unwrap();
    json(&mut owner, "SELECT grant_coordination($1, 'none')", &[&w]);
    let error = c.batch_execute("SELECT is_sd_claimed('SD-1')").unwrap_err();
    assert_eq!(sqlstate(&error), "42501");
}
