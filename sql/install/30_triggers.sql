-- The triggers on the extension's own tables. Those on the backlog are made by the code that binds
-- a backlog, for the extension's own table as well (see src/spi/directive/attach.rs).

-- Before a row is written: makes a direct write whole, or refuses it. Does not fire for heartbeats,
-- which name none of these columns.
CREATE TRIGGER claude_sessions_complete_trigger
    BEFORE INSERT OR UPDATE OF id, session_id, sd_id, claim_id, claimed_at, status, owner_role,
                               stale_after, silent_until
    ON claude_sessions
    FOR EACH ROW EXECUTE FUNCTION complete_session_write();

-- After it: the claim history and the audit.
CREATE TRIGGER record_claim_history_trigger
    AFTER INSERT OR DELETE OR UPDATE OF sd_id, claim_id, status
    ON claude_sessions
    FOR EACH ROW EXECUTE FUNCTION record_claim_history();

-- And the backlog's is_working_on and active_session_id.
CREATE TRIGGER sync_is_working_on_trigger
    AFTER INSERT OR DELETE OR UPDATE OF sd_id, claim_id, status
    ON claude_sessions
    FOR EACH ROW EXECUTE FUNCTION sync_is_working_on_with_session();

-- The claim history is derived: an acquisition begins and ends with its session's row only; one that
-- has ended may be corrected or removed by hand. pg_trigger_depth() leaves out what the triggers above
-- write.
CREATE TRIGGER sd_claims_protect_insert_trigger
    BEFORE INSERT ON sd_claims
    FOR EACH ROW WHEN (pg_catalog.pg_trigger_depth() = 0)
    EXECUTE FUNCTION protect_open_claim();

CREATE TRIGGER sd_claims_protect_update_trigger
    BEFORE UPDATE ON sd_claims
    FOR EACH ROW WHEN (pg_catalog.pg_trigger_depth() = 0
                       AND (OLD.released_at IS NULL OR NEW.released_at IS NULL))
    EXECUTE FUNCTION protect_open_claim();

CREATE TRIGGER sd_claims_protect_delete_trigger
    BEFORE DELETE ON sd_claims
    FOR EACH ROW WHEN (pg_catalog.pg_trigger_depth() = 0 AND OLD.released_at IS NULL)
    EXECUTE FUNCTION protect_open_claim();

-- The heartbeat board is kept in step with every write, also a replicated one. Whoever sets a heartbeat
-- back means it: the board forgets it, as heartbeats only move forward. So it does with a session that is
-- gone, or one of the same id would have its heartbeats. An infinite one is refused: its session would be
-- immortal, or stale for ever. The table itself may be behind the board, so that what sets back there may be
-- a step forward here.
CREATE TRIGGER claude_sessions_set_back_trigger
    AFTER UPDATE OF heartbeat_at ON claude_sessions
    FOR EACH ROW WHEN (NEW.heartbeat_at <> OLD.heartbeat_at OR NEW.heartbeat_at = 'infinity')
    EXECUTE FUNCTION forget_heartbeat();
CREATE TRIGGER claude_sessions_changed_trigger
    AFTER UPDATE OF session_id, sd_id, claim_id, status, owner_role, stale_after ON claude_sessions
    FOR EACH ROW EXECUTE FUNCTION close_on_board();
CREATE TRIGGER claude_sessions_deleted_trigger
    AFTER DELETE ON claude_sessions
    FOR EACH ROW EXECUTE FUNCTION forget_heartbeat();
CREATE TRIGGER claude_sessions_truncated_trigger
    AFTER TRUNCATE ON claude_sessions
    FOR EACH STATEMENT EXECUTE FUNCTION forget_heartbeat();
ALTER TABLE claude_sessions ENABLE ALWAYS TRIGGER claude_sessions_set_back_trigger;
ALTER TABLE claude_sessions ENABLE ALWAYS TRIGGER claude_sessions_changed_trigger;
ALTER TABLE claude_sessions ENABLE ALWAYS TRIGGER claude_sessions_deleted_trigger;
ALTER TABLE claude_sessions ENABLE ALWAYS TRIGGER claude_sessions_truncated_trigger;

-- No row trigger sees a TRUNCATE: it would leave the mirrors behind.
CREATE TRIGGER claude_sessions_truncate_trigger
    BEFORE TRUNCATE ON claude_sessions
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_truncate_while_claimed();

CREATE TRIGGER sd_claims_truncate_trigger
    BEFORE TRUNCATE ON sd_claims
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_truncate_while_claimed();

-- Whoever writes the binding (bind_directives, unbind_directives, a restored dump) gets the view
-- that goes with it.
CREATE TRIGGER directive_binding_trigger
    AFTER INSERT OR UPDATE OR DELETE ON directive_binding
    FOR EACH STATEMENT EXECUTE FUNCTION rebuild_directives_view();
