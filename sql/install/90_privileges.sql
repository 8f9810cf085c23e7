-- Unqualified names are those of the server (see 10_tables.sql).
SET LOCAL search_path = pg_catalog, pg_temp;

-- Closed by default: nobody but the owner gets anything, whatever ALTER DEFAULT PRIVILEGES says in
-- this database. grant_coordination() opens what a role needs.
DO $$
DECLARE
    v_object record;
BEGIN
    -- Every function, table, view and sequence that the extension owns, so that none can be
    -- forgotten, and every grantee of each.
    FOR v_object IN
        SELECT DISTINCT o.kind, o.name, CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END AS grantee
          FROM pg_catalog.pg_depend d
          JOIN pg_catalog.pg_extension e ON e.oid = d.refobjid AND e.extname = 'pg_claims'
         CROSS JOIN LATERAL (
               SELECT 'FUNCTION' AS kind, p.oid::regprocedure::text AS name, p.proowner AS owner,
                      COALESCE(p.proacl, pg_catalog.acldefault('f', p.proowner)) AS acl
                 FROM pg_catalog.pg_proc p
                WHERE d.classid = 'pg_catalog.pg_proc'::regclass AND p.oid = d.objid
                UNION ALL
               SELECT CASE c.relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END, c.oid::regclass::text, c.relowner,
                      COALESCE(c.relacl, pg_catalog.acldefault(CASE c.relkind WHEN 'S' THEN 's' ELSE 'r' END::"char", c.relowner))
                 FROM pg_catalog.pg_class c
                WHERE d.classid = 'pg_catalog.pg_class'::regclass AND c.oid = d.objid
                  AND c.relkind IN ('r', 'v', 'S')) o
         CROSS JOIN LATERAL pg_catalog.aclexplode(o.acl) a
         WHERE d.refclassid = 'pg_catalog.pg_extension'::regclass AND d.deptype = 'e'
           AND a.grantee <> o.owner
    LOOP
        EXECUTE pg_catalog.format('REVOKE ALL ON %s %s FROM %s', v_object.kind, v_object.name, v_object.grantee);
    END LOOP;
END
$$;

-- Privileges decide who sees what. Some servers have an event trigger that turns row-level security on for every new
-- table, which without policies shows nobody but the owner anything.
DO $$
DECLARE
    v_table regclass;
BEGIN
    FOR v_table IN
        SELECT c.oid
          FROM pg_catalog.pg_class c
          JOIN pg_catalog.pg_depend d
            ON d.classid = 'pg_catalog.pg_class'::regclass AND d.objid = c.oid
           AND d.refclassid = 'pg_catalog.pg_extension'::regclass AND d.deptype = 'e'
          JOIN pg_catalog.pg_extension e ON e.oid = d.refobjid AND e.extname = 'pg_claims'
         WHERE c.relrowsecurity
    LOOP
        EXECUTE pg_catalog.format('ALTER TABLE %s DISABLE ROW LEVEL SECURITY', v_table);
    END LOOP;
END
$$;

-- What pg_dump must write: everything that was not made by CREATE EXTENSION. But the sequences of claims, events
-- and places: a dump would set them back to numbers that were given out since.
SELECT pg_catalog.pg_extension_config_dump('@extschema@.claude_sessions', '');
SELECT pg_catalog.pg_extension_config_dump('@extschema@.sd_claims', '');
SELECT pg_catalog.pg_extension_config_dump('@extschema@.session_lifecycle_events', '');
SELECT pg_catalog.pg_extension_config_dump('@extschema@.sd_conflict_matrix', '');
SELECT pg_catalog.pg_extension_config_dump(pg_catalog.pg_get_serial_sequence('@extschema@.sd_conflict_matrix', 'conflict_id')::regclass, '');
SELECT pg_catalog.pg_extension_config_dump('@extschema@.sd_holds', '');
SELECT pg_catalog.pg_extension_config_dump('@extschema@.lifecycle_event_positions', '');
SELECT pg_catalog.pg_extension_config_dump('@extschema@.event_frontier', '');
SELECT pg_catalog.pg_extension_config_dump('@extschema@.directive_binding', '');
SELECT pg_catalog.pg_extension_config_dump(c.oid::regclass, '')
  FROM pg_catalog.pg_class c
  JOIN pg_catalog.pg_depend d ON d.objid = c.oid AND d.classid = 'pg_catalog.pg_class'::regclass
                             AND d.refclassid = 'pg_catalog.pg_extension'::regclass
                             AND d.deptype = 'e'
 WHERE c.relname = 'strategic_directives_v2';

SET LOCAL search_path = @extschema@, pg_temp;
