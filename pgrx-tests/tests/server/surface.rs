//! Every object that the extension owns: the public surface cannot grow by accident.

use pg_claims_tests::TestDb;

const OBJECTS: &str = "\
event trigger pg_claims_keep_out_foreign_code
event trigger pg_claims_make_way_for_dump
event trigger pg_claims_note_drop
function advance_numbers()
function assert_claim(text,text,bigint)
function assign_sessions(name,name)
function begin_restoring()
function bind_directives(regclass,text[],text,text,text,text,text,text,text,text,text,text,text[])
function check_guarded_write()
function checked_limit(integer)
function claim_next_sd(text,text)
function claim_reclaimable_at(timestamp with time zone,timestamp with time zone,interval,timestamp with time zone)
function claim_sd(text,text,text)
function cleanup_stale_sessions(integer,integer)
function complete_session_write()
function coordination_check()
function coordination_repair(boolean)
function correct_directive_mirror()
function declare_conflict(text,text,text,text)
function dependency_cycles()
function dependency_keys(text)
function elapsed_minutes(timestamp with time zone,timestamp with time zone)
function elapsed_seconds(timestamp with time zone,timestamp with time zone)
function end_session(text,text)
function extend_lease(text,interval,bigint)
function force_heartbeat(text)
function forget_heartbeat()
function get_heartbeat_stats()
function grant_coordination(text,text)
function guard_table(regclass,name)
function heartbeat_age_human(timestamp with time zone,timestamp with time zone)
function heartbeat_board()
function heartbeat_sessions(text[])
function hold_sd(text,text)
function is_claim_live(timestamp with time zone,timestamp with time zone,interval,timestamp with time zone,bigint)
function is_heartbeat_active()
function is_sd_claimed(text,text)
function keep_directive_mirror()
function keep_out_foreign_code()
function latest_heartbeat(oid,text,timestamp with time zone)
function lease_expires_at(timestamp with time zone,timestamp with time zone,interval,timestamp with time zone)
function lifecycle_events_since(bigint,integer)
function make_way_for_dump()
function note_drop()
function own_replicated_session()
function protect_open_claim()
function prune_history(integer)
function rebuild_directives_view()
function refuse_guarded_truncate()
function refuse_truncate_while_claimed()
function register_session(text,text,text,integer,text,jsonb,interval)
function release_finished_directive()
function release_sd(text,text,bigint)
function release_truncated_directives()
function report_progress(text,text,bigint)
function resolve_conflict(text,text)
function sd_blockers(text,jsonb)
function sd_next(text,integer,boolean,text,integer)
function sd_start(text,text,text)
function start_heartbeat(text)
function stop_heartbeat()
function sync_is_working_on_with_session()
function takeover_sd(text,text,text)
function unbind_directives()
function unguard_table(regclass)
function unhold_sd(text)
function update_session_heartbeat(text,bigint)
sequence lifecycle_event_positions_position_seq
sequence sd_claims_claim_id_seq
sequence sd_conflict_matrix_conflict_id_seq
sequence session_lifecycle_events_event_id_seq
table claude_sessions
table directive_binding
table event_frontier
table heartbeat_connections
table installation
table lifecycle_event_positions
table sd_claims
table sd_conflict_matrix
table sd_holds
table session_lifecycle_events
table strategic_directives_v2
table worker_health
view v_active_sessions
view v_directive_keys
view v_directives
view v_sd_blockers
view v_sd_conflicts
view v_sd_next
view v_sd_queue
view v_worker_health";

fn lines(c: &mut postgres::Client, sql: &str) -> Vec<String> {
    c.query(sql, &[]).unwrap().iter().map(|row| row.get(0)).collect()
}

#[test]
fn the_extension_owns_exactly_these_objects() {
    let db = TestDb::new();
    // Types are left out: each table and view has its row type, and newer servers list them.
    let owned = lines(
        &mut db.connect(),
        "SELECT pg_describe_object(classid, objid, 0) COLLATE \"C\" AS object
           FROM pg_depend d JOIN pg_extension e ON e.oid = d.refobjid
          WHERE e.extname = 'pg_claims' AND d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e'
            AND d.classid <> 'pg_type'::regclass
          ORDER BY 1",
    );
    assert_eq!(owned.join("\n"), OBJECTS);
}

#[test]
fn indexes_and_triggers_are_exactly_these() {
    let db = TestDb::new();
    let found = lines(
        &mut db.connect(),
        "SELECT line FROM (
         SELECT CASE WHEN i.indisunique THEN 'unique ' ELSE '' END || 'index ' || i.indexrelid::regclass
           FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid WHERE c.relnamespace = 'public'::regnamespace
          UNION ALL
         SELECT 'trigger ' || tgname || ' on ' || tgrelid::regclass FROM pg_trigger WHERE NOT tgisinternal) lines (line)
          ORDER BY line COLLATE \"C\"",
    );
    let expected = "\
index sd_conflict_matrix_open_b_idx
index strategic_directives_v2_parent_idx
index strategic_directives_v2_queue_idx
trigger claude_sessions_complete_trigger on claude_sessions
trigger claude_sessions_delete_trigger on claude_sessions
trigger claude_sessions_deleted_trigger on claude_sessions
trigger claude_sessions_replicated_trigger on claude_sessions
trigger claude_sessions_restore_trigger on claude_sessions
trigger claude_sessions_set_back_trigger on claude_sessions
trigger claude_sessions_truncate_trigger on claude_sessions
trigger claude_sessions_truncated_trigger on claude_sessions
trigger directive_binding_trigger on directive_binding
trigger event_frontier_restore_trigger on event_frontier
trigger lifecycle_event_positions_restore_trigger on lifecycle_event_positions
trigger pg_claims_deleted on strategic_directives_v2
trigger pg_claims_finished on strategic_directives_v2
trigger pg_claims_truncated on strategic_directives_v2
trigger sd_claims_protect_delete_trigger on sd_claims
trigger sd_claims_protect_insert_trigger on sd_claims
trigger sd_claims_protect_update_trigger on sd_claims
trigger sd_claims_restore_trigger on sd_claims
trigger sd_claims_truncate_trigger on sd_claims
trigger session_lifecycle_events_restore_trigger on session_lifecycle_events
trigger sync_is_working_on_trigger on claude_sessions
trigger zz_pg_claims_mirror_insert on strategic_directives_v2
trigger zz_pg_claims_mirror_inserted on strategic_directives_v2
trigger zz_pg_claims_mirror_renamed on strategic_directives_v2
trigger zz_pg_claims_mirror_update on strategic_directives_v2
unique index claude_sessions_pkey
unique index directive_binding_pkey
unique index event_frontier_pkey
unique index heartbeat_connections_pkey
unique index idx_claude_sessions_unique_active_claim
unique index lifecycle_event_positions_event_id_key
unique index lifecycle_event_positions_pkey
unique index sd_claims_open_key
unique index sd_claims_pkey
unique index sd_conflict_matrix_open_key
unique index sd_conflict_matrix_pkey
unique index sd_holds_pkey
unique index session_lifecycle_events_pkey
unique index strategic_directives_v2_pkey
unique index worker_health_pkey";
    let mut found = found;
    // The tests' own, where they put one on every table.
    found.retain(|line| !line.starts_with("trigger watch on "));
    assert_eq!(found.join("\n"), expected);
}

#[test]
fn the_index_that_decides_is_partial_and_unique() {
    let db = TestDb::new();
    let definition = lines(
        &mut db.connect(),
        "SELECT pg_get_indexdef('idx_claude_sessions_unique_active_claim'::regclass)",
    );
    assert_eq!(
        definition,
        [
            "CREATE UNIQUE INDEX idx_claude_sessions_unique_active_claim ON public.claude_sessions USING btree (sd_id) \
          WHERE ((sd_id IS NOT NULL) AND (status = 'active'::text))"
        ]
    );
}

#[test]
fn everything_has_a_comment_and_functions_have_the_rights_of_their_caller() {
    let db = TestDb::new();
    let mut c = db.connect();
    let silent = lines(
        &mut c,
        "SELECT pg_describe_object(d.classid, d.objid, 0)
           FROM pg_depend d JOIN pg_extension e ON e.oid = d.refobjid AND e.extname = 'pg_claims'
           LEFT JOIN pg_class r ON d.classid = 'pg_class'::regclass AND r.oid = d.objid
          WHERE d.deptype = 'e' AND d.classid IN ('pg_proc'::regclass, 'pg_class'::regclass)
            AND coalesce(r.relkind, 'f') <> 'S' AND obj_description(d.objid, d.classid::regclass::text) IS NULL",
    );
    assert!(silent.is_empty(), "no COMMENT on {silent:?}");
    let loose = lines(
        &mut c,
        "SELECT p.oid::regprocedure::text
           FROM pg_depend d JOIN pg_extension e ON e.oid = d.refobjid AND e.extname = 'pg_claims'
           JOIN pg_proc p ON d.classid = 'pg_proc'::regclass AND p.oid = d.objid
          WHERE d.deptype = 'e' AND p.prosecdef
            AND p.proconfig IS DISTINCT FROM ARRAY['search_path=pg_catalog, pg_temp']",
    );
    assert!(loose.is_empty(), "SECURITY DEFINER without a pinned search_path: {loose:?}");
    // All others are entered with the rights of whoever calls, who is the caller for that reason.
    let with_rights_of_owner = lines(
        &mut c,
        "SELECT p.proname::text
           FROM pg_depend d JOIN pg_extension e ON e.oid = d.refobjid AND e.extname = 'pg_claims'
           JOIN pg_proc p ON d.classid = 'pg_proc'::regclass AND p.oid = d.objid
          WHERE d.deptype = 'e' AND p.prosecdef ORDER BY 1",
    );
    assert_eq!(with_rights_of_owner, ["lifecycle_events_since"]);
}
