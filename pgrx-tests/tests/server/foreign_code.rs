//! Code and names of others: nothing of theirs is found by name, or runs with the rights of the extension's owner.

use pg_claims_tests::{TestDb, detail, json, message, sqlstate};
use postgres::Client;

use crate::support::*;

#[test]
fn a_schema_full_of_better_matches_lends_the_extension_nothing() {
    let db = TestDb::empty();
    let evil = db.role("evil");
    let mut owner = db.connect();
    owner
        .batch_execute(&format!(
            "ALTER DATABASE {} OWNER TO {evil}; ALTER SCHEMA public OWNER TO {evil}",
            db.name()
        ))
        .unwrap();
    // Operators on every pair of these types that the server has none of its own for, and functions that take a
    // varchar or a name where the server's take a text.
    db.connect_as(&evil)
        .batch_execute(
            r#"SET search_path = pg_catalog;
            CREATE TABLE public.ran (what text); GRANT ALL ON public.ran TO PUBLIC;
            DO $do$
            DECLARE
                v_types regtype[] := '{oid,regclass,regproc,regprocedure,regtype,regrole,regnamespace,name,text,varchar,bpchar,"\"char\"",smallint,integer,bigint,numeric,float8,boolean,jsonb,timestamptz,interval,uuid,text[],oid[]}';
                v_operators text[] := '{=,<>,<,<=,>,>=,||,->,->>,@>,+,-,*,/,~,&&,~~,!~}';
                v_left regtype; v_right regtype; v_operator text; v_function record;
            BEGIN
                FOREACH v_left IN ARRAY v_types LOOP
                    FOREACH v_right IN ARRAY v_types LOOP
                        EXECUTE format('CREATE FUNCTION public.evil(%s, %s) RETURNS boolean LANGUAGE plpgsql AS $f$ DECLARE v text; BEGIN GET DIAGNOSTICS v = PG_CONTEXT; INSERT INTO public.ran VALUES (v); RETURN true; END $f$', v_left, v_right);
                        FOREACH v_operator IN ARRAY v_operators LOOP
                            CONTINUE WHEN EXISTS (SELECT FROM pg_operator o WHERE o.oprname = v_operator AND o.oprleft = v_left AND o.oprright = v_right);
                            EXECUTE format('CREATE OPERATOR public.%s (LEFTARG = %s, RIGHTARG = %s, FUNCTION = public.evil)', v_operator, v_left, v_right);
                        END LOOP;
                    END LOOP;
                END LOOP;
                FOR v_function IN
                    SELECT DISTINCT p.proname, replace(pg_get_function_identity_arguments(p.oid), 'text', t) AS arguments
                      FROM pg_proc p CROSS JOIN (VALUES ('varchar'), ('name')) AS t (t)
                     WHERE p.pronamespace = 'pg_catalog'::regnamespace AND p.prokind = 'f'
                       AND p.proargmodes IS NULL AND p.pronargs BETWEEN 1 AND 3 AND 'text'::regtype = ANY (p.proargtypes)
                       AND pg_get_function_identity_arguments(p.oid) !~ 'internal|any|\['
                LOOP
                    BEGIN
                        EXECUTE format('CREATE FUNCTION public.%I(%s) RETURNS text LANGUAGE plpgsql AS $f$ DECLARE v text; BEGIN GET DIAGNOSTICS v = PG_CONTEXT; INSERT INTO public.ran VALUES (v); RETURN ''evil''; END $f$', v_function.proname, v_function.arguments);
                    EXCEPTION WHEN duplicate_function OR syntax_error OR undefined_object THEN NULL;
                    END;
                END LOOP;
            END
            $do$;
            CREATE TABLE public.backlog (key varchar(40) PRIMARY KEY, title varchar, status varchar, is_working_on boolean, active_session_id varchar(200));
            INSERT INTO public.backlog VALUES ('A', 'a', 'open')"#,
        )
        .unwrap();
    // The test's own queries must not call the overloads: this connection looks in pg_catalog only.
    owner
        .batch_execute("SET search_path = pg_catalog; CREATE EXTENSION pg_claims SCHEMA public")
        .unwrap();
    let ran = "SELECT string_agg(DISTINCT what, ',') FROM public.ran";
    assert_eq!(value(&mut owner, ran), None, "while it was installed");
    let use_it = |c: &mut Client, sd: &str| {
        c.batch_execute(&format!(
            "SELECT public.register_session('s1', 'h', 't', 1, 'c', '{{}}', '1 minute'), public.register_session('s2');
             SELECT public.claim_sd('{sd}', 's1'); SELECT public.claim_sd('{sd}', 's2');
             SELECT public.update_session_heartbeat('s1'), public.heartbeat_sessions('{{s1,s2}}');
             SELECT public.extend_lease('s1', '1 minute'), public.report_progress('s1', 'n'), public.is_sd_claimed('{sd}');
             SELECT * FROM public.sd_next(); SELECT * FROM public.v_active_sessions; SELECT * FROM public.v_sd_next;
             SELECT * FROM public.v_worker_health; SELECT public.release_sd('s1'); SELECT public.claim_next_sd('s2');
             SELECT public.hold_sd('{sd}', 'r'), public.unhold_sd('{sd}'); SELECT * FROM public.coordination_check();
             UPDATE public.claude_sessions SET sd_id = NULL; SELECT * FROM public.coordination_repair(false);
             SELECT * FROM public.lifecycle_events_since(0); SELECT public.cleanup_stale_sessions(), public.prune_history();
             SELECT public.end_session('s1'), public.end_session('s2')"
        ))
        .unwrap();
    };
    owner
        .batch_execute(
            "INSERT INTO public.strategic_directives_v2 (sd_id) VALUES ('SD-1'), ('SD-2')",
        )
        .unwrap();
    use_it(&mut owner, "SD-1");
    assert_eq!(value(&mut owner, ran), None, "while it was used");
    owner
        .batch_execute(
            "SELECT public.bind_directives('public.backlog', '{key}', 'title', 'status',
                 p_is_working_on_column => 'is_working_on', p_active_session_id_column => 'active_session_id')",
        )
        .unwrap();
    use_it(&mut owner, "A");
    // A view that is made again is made as by the installation.
    owner
        .batch_execute(
            "ALTER EXTENSION pg_claims DROP VIEW public.v_sd_next; DROP VIEW public.v_sd_next;
             SELECT * FROM public.coordination_repair(false)",
        )
        .unwrap();
    assert_eq!(value(&mut owner, ran), None, "with a backlog that is bound");
    // Nor is anything stored: of all that belongs to the extension, and what the server made along with it, nothing
    // refers to anything but the server's own, the extension's own and the backlog.
    let stored = "WITH RECURSIVE parts AS (
            SELECT d.classid, d.objid FROM pg_depend d JOIN pg_extension e ON e.oid = d.refobjid
             WHERE e.extname = 'pg_claims' AND d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e'
             UNION
            SELECT d.classid, d.objid FROM parts p
              JOIN pg_depend d ON d.refclassid = p.classid AND d.refobjid = p.objid AND d.deptype IN ('i', 'a'))
        SELECT string_agg(DISTINCT pg_describe_object(d.classid, d.objid, 0) || ' uses '
                                   || pg_describe_object(d.refclassid, d.refobjid, 0), '; ')
          FROM parts p
          JOIN pg_depend d ON d.classid = p.classid AND d.objid = p.objid
         CROSS JOIN LATERAL pg_identify_object(d.refclassid, d.refobjid, 0) o
         WHERE d.refclassid NOT IN ('pg_namespace'::regclass, 'pg_extension'::regclass)
           AND o.schema IS DISTINCT FROM 'pg_catalog'
           AND NOT EXISTS (SELECT FROM parts x WHERE x.classid = d.refclassid AND x.objid = d.refobjid)
           AND NOT (d.refclassid = 'pg_class'::regclass AND d.refobjid = 'public.backlog'::regclass)";
    assert_eq!(value(&mut owner, stored), None);
    let bodies = "SELECT string_agg(p.proname, ', ') FROM pg_proc p
                    JOIN pg_depend d ON d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e'
                    JOIN pg_language l ON l.oid = p.prolang
                   WHERE l.lanname <> 'c' AND p.prosqlbody IS NULL";
    assert_eq!(value(&mut owner, bodies), None, "a body is read anew, with the names of the day");
    owner.batch_execute(&format!("ALTER DATABASE {} OWNER TO postgres; ALTER SCHEMA public OWNER TO postgres; DROP EXTENSION pg_claims; DROP OWNED BY {evil} CASCADE", db.name())).unwrap();
}

#[test]
fn nobody_puts_code_of_its_own_on_the_extension_s_tables() {
    let (db, mut owner) = coordinated();
    let app = db.role("app");
    owner
        .batch_execute(&format!(
            "GRANT ALL ON ALL TABLES IN SCHEMA public TO {app}; GRANT CREATE ON SCHEMA public TO {app}"
        ))
        .unwrap();
    let mut a = db.connect_as(&app);
    a.batch_execute(
        "CREATE TABLE ran (who text); GRANT ALL ON ran TO PUBLIC;
         CREATE FUNCTION spy() RETURNS trigger LANGUAGE plpgsql AS
         $$ BEGIN INSERT INTO public.ran VALUES (current_user); RETURN NULL; END $$",
    )
    .unwrap();
    let create = |table: &str| {
        format!(
            "CREATE TRIGGER spy AFTER INSERT OR UPDATE ON {table} FOR EACH STATEMENT EXECUTE FUNCTION spy()"
        )
    };
    for table in [
        "claude_sessions",
        "sd_claims",
        "session_lifecycle_events",
        "strategic_directives_v2",
        "sd_holds",
        "worker_health",
        "heartbeat_connections",
    ] {
        let error = a.batch_execute(&create(table)).unwrap_err();
        assert_eq!(sqlstate(&error), "42501", "{table}: {}", message(&error));
        assert!(detail(&error).contains("spy"), "{}", detail(&error));
        // Not in the way that a replica's definitions come in, either.
        let replica = owner
            .batch_execute(&format!("SET session_replication_role = replica; {}", create(table)));
        assert_eq!(sqlstate(&replica.unwrap_err()), "42501", "{table}");
        owner.batch_execute("RESET session_replication_role").unwrap();
    }
    // Nor by way of a condition, or of a table of its own to which a foreign key passes writes on.
    a.batch_execute(
        "CREATE FUNCTION peek(text) RETURNS boolean LANGUAGE plpgsql AS
         $$ BEGIN INSERT INTO public.ran VALUES (current_user); RETURN true; END $$;
         CREATE OPERATOR <<<>>> (RIGHTARG = text, FUNCTION = peek)",
    )
    .unwrap();
    for definition in [
        "CREATE TRIGGER peek BEFORE UPDATE ON claude_sessions FOR EACH ROW WHEN (peek(NEW.session_id))
            EXECUTE FUNCTION suppress_redundant_updates_trigger()",
        "CREATE TRIGGER peek BEFORE UPDATE ON claude_sessions FOR EACH ROW WHEN (<<<>>> NEW.session_id)
            EXECUTE FUNCTION suppress_redundant_updates_trigger()",
        "CREATE TRIGGER peek BEFORE UPDATE ON claude_sessions FOR EACH ROW
            WHEN (ts_rewrite('a'::tsquery, 'SELECT ''a''::tsquery, peek(''x'')::text::tsquery') IS NOT NULL)
            EXECUTE FUNCTION suppress_redundant_updates_trigger()",
        "CREATE TRIGGER peek BEFORE UPDATE ON claude_sessions FOR EACH ROW
            EXECUTE FUNCTION suppress_redundant_updates_trigger()",
        "CREATE TABLE old_ones (c bigint REFERENCES sd_claims)",
        "CREATE TABLE child (s text REFERENCES claude_sessions ON DELETE CASCADE)",
        "CREATE TABLE child (s text); ALTER TABLE child ADD FOREIGN KEY (s) REFERENCES claude_sessions ON UPDATE CASCADE",
    ] {
        let error = a.batch_execute(definition).unwrap_err();
        assert_eq!(sqlstate(&error), "42501", "{definition}: {}", message(&error));
    }
    owner.batch_execute(&format!("GRANT CREATE ON DATABASE {} TO {app}", db.name())).unwrap();
    let in_schema = "CREATE SCHEMA appx CREATE TABLE child (s text REFERENCES public.claude_sessions ON DELETE CASCADE)";
    assert_eq!(sqlstate(&a.batch_execute(in_schema).unwrap_err()), "42501");
    owner.batch_execute(&format!("REVOKE CREATE ON DATABASE {} FROM {app}", db.name())).unwrap();
    // Nor does it choose what the extension's views read.
    for by_hand in [
        "INSERT INTO directive_binding (bound_table, key_columns, title_column, terminal_statuses, bound_by)
         VALUES ('pg_authid', '{oid}', 'rolpassword', '{completed}', 'app')",
        "DELETE FROM directive_binding WHERE false; TRUNCATE directive_binding; INSERT INTO directive_binding
         (bound_table, key_columns, terminal_statuses, bound_by) VALUES ('pg_authid', '{oid}', '{completed}', 'app')",
    ] {
        assert_eq!(sqlstate(&a.batch_execute(by_hand).unwrap_err()), "42501", "{by_hand}");
    }
    // One that passes nothing on runs nothing.
    a.batch_execute("CREATE TABLE note (sd_id text REFERENCES strategic_directives_v2)").unwrap();
    // Past the event trigger: nothing is done, and the doctor says why.
    owner
        .batch_execute(&format!(
            "ALTER EVENT TRIGGER pg_claims_keep_out_foreign_code DISABLE; {}",
            create("claude_sessions")
        ))
        .unwrap();
    json(&mut owner, "SELECT grant_coordination($1, 'viewer')", &[&app]);
    for call in [
        "SELECT claim_sd('SD-1', 's1')",
        "SELECT register_session('new')",
        "SELECT release_sd('s1')",
    ] {
        let error = owner.batch_execute(call).unwrap_err();
        assert_eq!(sqlstate(&error), "42501", "{call}");
        assert!(detail(&error).contains("spy"), "{}", detail(&error));
    }
    let told = "SELECT status || ': ' || detail FROM coordination_check() WHERE name = 'security'";
    assert!(value(&mut owner, told).unwrap().starts_with("critical: a security fault"));
    owner.batch_execute("DROP TRIGGER spy ON claude_sessions").unwrap();
    granted(&mut owner, "SD-1", "s1");
    release(&mut owner, "s1");
    for table in ["heartbeat_connections", "worker_health", "installation", "event_frontier"] {
        owner.batch_execute(&create(table)).unwrap();
        let error = owner.batch_execute("SELECT claim_sd('SD-1', 's1')").unwrap_err();
        assert_eq!(sqlstate(&error), "42501", "{table}");
        owner.batch_execute(&format!("DROP TRIGGER spy ON {table}")).unwrap();
    }
    granted(&mut owner, "SD-1", "s1");
    assert_eq!(value(&mut owner, told).as_deref(), None);
    assert_eq!(count(&mut owner, "SELECT count(*) FROM ran"), 0);
    // A superuser may put a trigger there, with a function of a superuser's.
    owner
        .batch_execute(&format!(
            "ALTER EVENT TRIGGER pg_claims_keep_out_foreign_code ENABLE ALWAYS; ALTER FUNCTION spy() OWNER TO postgres; {}",
            create("claude_sessions")
        ))
        .unwrap();
    release(&mut owner, "s1");
}
