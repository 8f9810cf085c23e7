-- The triggers on the extension's own tables. Those on the backlog are made by the code that binds
-- a backlog, for the extension's own table as well (see src/spi/directive/attach.rs).

-- Unqualified names are those of the server (see 10_tables.sql).
SET LOCAL search_path = pg_catalog, pg_temp;

-- Before a row is written: makes a direct write whole, or refuses it. Does not fire for heartbeats,
-- which name none of these columns.
CREATE TRIGGER claude_sessions_complete_trigger
    BEFORE INSERT OR UPDATE OF id, session_id, sd_id, claim_id, claimed_at, status, owner_role,
                               owner_oid, stale_after, silent_until
    ON @extschema@.claude_sessions
    FOR EACH ROW EXECUTE FUNCTION @extschema@.complete_session_write();

-- And before one that holds an SD is deleted: locks the SD and the acquisition first.
CREATE TRIGGER claude_sessions_delete_trigger
    BEFORE DELETE ON @extschema@.claude_sessions
    FOR EACH ROW WHEN (OLD.sd_id IS NOT NULL) EXECUTE FUNCTION @extschema@.complete_session_write();

-- A replicated row brings along the number of another server's role: the name decides here.
CREATE TRIGGER claude_sessions_replicated_trigger
    BEFORE INSERT OR UPDATE OF owner_role, owner_oid ON @extschema@.claude_sessions
    FOR EACH ROW WHEN (pg_catalog.current_setting('session_replication_role') = 'replica')
    EXECUTE FUNCTION @extschema@.own_replicated_session();
ALTER TABLE @extschema@.claude_sessions ENABLE ALWAYS TRIGGER claude_sessions_replicated_trigger;

-- After it: the heartbeat board, the claim history and the audit, and the backlog's is_working_on and active_session_id.
-- Of a replicated row only the board, as the rest is replicated by itself.
CREATE TRIGGER sync_is_working_on_trigger
    AFTER INSERT OR DELETE OR UPDATE OF session_id, sd_id, claim_id, status, owner_role, owner_oid, stale_after
    ON @extschema@.claude_sessions
    FOR EACH ROW EXECUTE FUNCTION @extschema@.sync_is_working_on_with_session();
ALTER TABLE @extschema@.claude_sessions ENABLE ALWAYS TRIGGER sync_is_working_on_trigger;

-- The claim history is derived: an acquisition begins and ends with its session's row only; one that
-- has ended may be corrected or removed by hand.
CREATE TRIGGER sd_claims_protect_insert_trigger
    BEFORE INSERT ON @extschema@.sd_claims
    FOR EACH ROW
    EXECUTE FUNCTION @extschema@.protect_open_claim();

CREATE TRIGGER sd_claims_protect_update_trigger
    BEFORE UPDATE ON @extschema@.sd_claims
    FOR EACH ROW WHEN (OLD.released_at IS NULL OR NEW.released_at IS NULL)
    EXECUTE FUNCTION @extschema@.protect_open_claim();

CREATE TRIGGER sd_claims_protect_delete_trigger
    BEFORE DELETE ON @extschema@.sd_claims
    FOR EACH ROW WHEN (OLD.released_at IS NULL)
    EXECUTE FUNCTION @extschema@.protect_open_claim();

-- The heartbeat board is kept in step with every write, also a replicated one. Whoever sets a heartbeat
-- back means it: the board forgets it, as heartbeats only move forward. So it does with a session that is
-- gone, or one of the same id would have its heartbeats. An infinite one is refused: its session would be
-- immortal, or stale for ever. The table itself may be behind the board, so that what sets back there may be
-- a step forward here.
CREATE TRIGGER claude_sessions_set_back_trigger
    AFTER UPDATE OF heartbeat_at ON @extschema@.claude_sessions
    FOR EACH ROW WHEN (NEW.heartbeat_at <> OLD.heartbeat_at OR NEW.heartbeat_at = 'infinity')
    EXECUTE FUNCTION @extschema@.forget_heartbeat();
CREATE TRIGGER claude_sessions_deleted_trigger
    AFTER DELETE ON @extschema@.claude_sessions
    FOR EACH ROW EXECUTE FUNCTION @extschema@.forget_heartbeat();
CREATE TRIGGER claude_sessions_truncated_trigger
    AFTER TRUNCATE ON @extschema@.claude_sessions
    FOR EACH STATEMENT EXECUTE FUNCTION @extschema@.forget_heartbeat();
ALTER TABLE @extschema@.claude_sessions ENABLE ALWAYS TRIGGER claude_sessions_set_back_trigger;
ALTER TABLE @extschema@.claude_sessions ENABLE ALWAYS TRIGGER claude_sessions_deleted_trigger;
ALTER TABLE @extschema@.claude_sessions ENABLE ALWAYS TRIGGER claude_sessions_truncated_trigger;

-- No row trigger sees a TRUNCATE: it would leave the mirrors behind.
CREATE TRIGGER claude_sessions_truncate_trigger
    BEFORE TRUNCATE ON @extschema@.claude_sessions
    FOR EACH STATEMENT EXECUTE FUNCTION @extschema@.refuse_truncate_while_claimed();

CREATE TRIGGER sd_claims_truncate_trigger
    BEFORE TRUNCATE ON @extschema@.sd_claims
    FOR EACH STATEMENT EXECUTE FUNCTION @extschema@.refuse_truncate_while_claimed();

-- A dump that replaces what is there drops a bound backlog before the extension.
CREATE EVENT TRIGGER pg_claims_make_way_for_dump ON ddl_command_start
    WHEN TAG IN ('DROP TABLE') EXECUTE FUNCTION @extschema@.make_way_for_dump();

-- A command that drops the backlog with all that depends on it must not drop the extension. The trigger fires for every
-- command, as the server has no list of those that drop something along with what they name.
CREATE EVENT TRIGGER pg_claims_note_drop ON ddl_command_start EXECUTE FUNCTION @extschema@.note_drop();
ALTER EVENT TRIGGER pg_claims_note_drop ENABLE ALWAYS;

-- An ordinary role must not have its code run with the rights of the extension's owner.
CREATE EVENT TRIGGER pg_claims_keep_out_foreign_code ON ddl_command_end
    WHEN TAG IN ('ALTER TABLE', 'CREATE SCHEMA', 'CREATE TABLE', 'CREATE TRIGGER')
    EXECUTE FUNCTION @extschema@.keep_out_foreign_code();
ALTER EVENT TRIGGER pg_claims_keep_out_foreign_code ENABLE ALWAYS;

-- The rows of a dump come table by table, and the worker must not touch any until all are there. Every script
-- of pg_dump's begins with this setting, so that no other write pays for it.
CREATE TRIGGER claude_sessions_restore_trigger
    BEFORE INSERT ON @extschema@.claude_sessions
    FOR EACH STATEMENT WHEN (pg_catalog.current_setting('check_function_bodies') = 'off')
    EXECUTE FUNCTION @extschema@.begin_restoring();
CREATE TRIGGER sd_claims_restore_trigger
    BEFORE INSERT ON @extschema@.sd_claims
    FOR EACH STATEMENT WHEN (pg_catalog.current_setting('check_function_bodies') = 'off')
    EXECUTE FUNCTION @extschema@.begin_restoring();
CREATE TRIGGER session_lifecycle_events_restore_trigger
    BEFORE INSERT ON @extschema@.session_lifecycle_events
    FOR EACH STATEMENT WHEN (pg_catalog.current_setting('check_function_bodies') = 'off')
    EXECUTE FUNCTION @extschema@.begin_restoring();
CREATE TRIGGER lifecycle_event_positions_restore_trigger
    BEFORE INSERT ON @extschema@.lifecycle_event_positions
    FOR EACH STATEMENT WHEN (pg_catalog.current_setting('check_function_bodies') = 'off')
    EXECUTE FUNCTION @extschema@.begin_restoring();
CREATE TRIGGER event_frontier_restore_trigger
    BEFORE INSERT ON @extschema@.event_frontier
    FOR EACH STATEMENT WHEN (pg_catalog.current_setting('check_function_bodies') = 'off')
    EXECUTE FUNCTION @extschema@.begin_restoring();

-- Whoever writes the binding (bind_directives, unbind_directives, a restored dump) gets the view
-- that goes with it. Also of a replicated binding, for which only triggers for each row fire.
CREATE TRIGGER directive_binding_trigger
    AFTER INSERT OR UPDATE OR DELETE ON @extschema@.directive_binding
    FOR EACH ROW EXECUTE FUNCTION @extschema@.rebuild_directives_view();
ALTER TABLE @extschema@.directive_binding ENABLE ALWAYS TRIGGER directive_binding_trigger;

SET LOCAL search_path = @extschema@, pg_temp;
