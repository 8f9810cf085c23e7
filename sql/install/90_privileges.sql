-- Closed by default: PUBLIC gets nothing. grant_coordination() opens what a role needs.
DO $$
DECLARE
    v_function regprocedure;
BEGIN
    -- Every function that the extension owns, so that none can be forgotten.
    FOR v_function IN
        SELECT d.objid::regprocedure
          FROM pg_catalog.pg_depend d
          JOIN pg_catalog.pg_extension e ON e.oid = d.refobjid
         WHERE d.refclassid = 'pg_catalog.pg_extension'::regclass
           AND d.classid = 'pg_catalog.pg_proc'::regclass
           AND d.deptype = 'e'
           AND e.extname = 'pg_claims'
    LOOP
        EXECUTE pg_catalog.format('REVOKE ALL ON FUNCTION %s FROM PUBLIC', v_function);
    END LOOP;
END
$$;

-- Trigger functions write tables that the writing role has no privilege on, and must not be led
-- astray by that role's search_path.
ALTER FUNCTION complete_session_write() SECURITY DEFINER SET search_path = pg_catalog, pg_temp;
ALTER FUNCTION record_claim_history() SECURITY DEFINER SET search_path = pg_catalog, pg_temp;
ALTER FUNCTION sync_is_working_on_with_session() SECURITY DEFINER SET search_path = pg_catalog, pg_temp;
ALTER FUNCTION protect_open_claim() SECURITY DEFINER SET search_path = pg_catalog, pg_temp;
ALTER FUNCTION refuse_truncate_while_claimed() SECURITY DEFINER SET search_path = pg_catalog, pg_temp;
ALTER FUNCTION rebuild_directives_view() SECURITY DEFINER SET search_path = pg_catalog, pg_temp;
ALTER FUNCTION release_finished_directive() SECURITY DEFINER SET search_path = pg_catalog, pg_temp;
ALTER FUNCTION release_truncated_directives() SECURITY DEFINER SET search_path = pg_catalog, pg_temp;
ALTER FUNCTION keep_directive_mirror() SECURITY DEFINER SET search_path = pg_catalog, pg_temp;

-- What pg_dump must write: everything that was not made by CREATE EXTENSION.
SELECT pg_catalog.pg_extension_config_dump('claude_sessions', '');
SELECT pg_catalog.pg_extension_config_dump('sd_claims', '');
SELECT pg_catalog.pg_extension_config_dump(pg_catalog.pg_get_serial_sequence('sd_claims', 'claim_id')::regclass, '');
SELECT pg_catalog.pg_extension_config_dump('session_lifecycle_events', '');
SELECT pg_catalog.pg_extension_config_dump(pg_catalog.pg_get_serial_sequence('session_lifecycle_events', 'event_id')::regclass, '');
SELECT pg_catalog.pg_extension_config_dump('directive_binding', '');
SELECT pg_catalog.pg_extension_config_dump(c.oid::regclass, '')
  FROM pg_catalog.pg_class c
  JOIN pg_catalog.pg_depend d ON d.objid = c.oid AND d.classid = 'pg_catalog.pg_class'::regclass
                             AND d.refclassid = 'pg_catalog.pg_extension'::regclass
                             AND d.deptype = 'e'
 WHERE c.relname = 'strategic_directives_v2';
