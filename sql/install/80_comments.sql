-- What psql's \d+ and \df+ show.

COMMENT ON TABLE claude_sessions IS
    'One row per session, and the truth about who holds which SD. Everything else is derived from it by triggers in the same transaction.';
COMMENT ON COLUMN claude_sessions.session_id IS 'The name that the session gave itself: 1 to 200 characters, no control characters.';
COMMENT ON COLUMN claude_sessions.sd_id IS 'The SD that the session holds. Writing it claims, clearing it releases.';
COMMENT ON COLUMN claude_sessions.status IS 'active, idle or released. Stale is never stored: see v_active_sessions.computed_status.';
COMMENT ON COLUMN claude_sessions.heartbeat_at IS 'The last sign of life, by the database''s clock.';
COMMENT ON COLUMN claude_sessions.updated_at IS 'The last change other than a heartbeat.';
COMMENT ON COLUMN claude_sessions.claim_id IS 'The fencing token of the acquisition that the session holds; assigned by the server.';
COMMENT ON COLUMN claude_sessions.silent_until IS 'Until when the session announced that it will not beat.';
COMMENT ON COLUMN claude_sessions.owner_role IS 'The role that registered the session; it or an operator may act for it.';
COMMENT ON COLUMN claude_sessions.released_at IS 'When the session''s last claim, or the session itself, ended.';
COMMENT ON COLUMN claude_sessions.release_reason IS 'Why; free text.';
COMMENT ON COLUMN claude_sessions.lost_claim_id IS 'The acquisition that the session lost against its will since its last claim.';
COMMENT ON COLUMN claude_sessions.lost_to IS 'The session that took that acquisition over.';
COMMENT ON INDEX idx_claude_sessions_unique_active_claim IS 'One active claim per SD.';

COMMENT ON TABLE sd_claims IS
    'One row per acquisition, open or ended; derived from claude_sessions. Survives the session.';
COMMENT ON COLUMN sd_claims.claim_id IS 'The fencing token: it only grows and never repeats.';
COMMENT ON COLUMN sd_claims.took_over_claim_id IS 'The stale acquisition that this one took over.';
COMMENT ON COLUMN sd_claims.taken_over_by IS 'The session that took this acquisition over.';
COMMENT ON INDEX sd_claims_open_key IS 'One open acquisition per SD.';

COMMENT ON TABLE session_lifecycle_events IS
    'The audit, append-only: registered, resumed, claimed, switched, released, taken_over, ended.';
COMMENT ON COLUMN session_lifecycle_events.actor IS 'The role that did it.';
COMMENT ON COLUMN session_lifecycle_events.held_seconds IS 'How long the acquisition lasted that ended with this event.';

COMMENT ON TABLE directive_binding IS
    'The table of the user''s that serves as the backlog; no row: the extension''s own strategic_directives_v2. Written by bind_directives() and unbind_directives().';

DO $$
BEGIN
    -- Only where the table is the extension's own.
    IF EXISTS (SELECT FROM pg_catalog.pg_depend d
                WHERE d.deptype = 'e'
                  AND d.classid = 'pg_catalog.pg_class'::regclass
                  AND d.objid = pg_catalog.to_regclass('strategic_directives_v2')
                  AND d.refclassid = 'pg_catalog.pg_extension'::regclass) THEN
        COMMENT ON TABLE strategic_directives_v2 IS
            'The backlog, as long as no other table is bound. is_working_on and active_session_id are kept by the extension.';
    END IF;
END
$$;

COMMENT ON VIEW v_directives IS
    'The backlog in one shape, whichever table it is. sd_id is the canonical id; is_terminal: finished, cannot be claimed.';
COMMENT ON VIEW v_active_sessions IS
    'One row per session that has not ended. Ages are numeric; computed_status is active, idle or stale.';

COMMENT ON FUNCTION register_session(text, text, text, integer, text, jsonb) IS
    'Registers a session or refreshes it; brings an ended one back. Metadata merges key by key; what is not given stays. Returns the session as stored. Needs the worker level; another role''s session: 42501.';
COMMENT ON FUNCTION end_session(text, text) IS
    'Releases what the session holds and ends it. Ending an ended session changes nothing. Refuses with session_not_found.';
COMMENT ON FUNCTION claim_sd(text, text, text) IS
    'Claims an SD for a session; gives up the SD that it held; takes over from a stale owner; claiming again what one holds changes only the heartbeat. Refuses with already_claimed (naming the owner), session_not_found, session_released, sd_not_found, sd_terminal_status.';
COMMENT ON FUNCTION sd_start(text, text, text) IS
    'Like claim_sd, and returns the text to show a person.';
COMMENT ON FUNCTION release_sd(text, text, bigint) IS
    'Releases what the session holds, for any reason; with a claim id only exactly that acquisition. Refuses with no_claim, claim_lost, session_not_found, session_released.';
COMMENT ON FUNCTION is_sd_claimed(text, text) IS
    'Whether a live session (other than the excluded one) holds the SD, and which. A stale owner is named, with claimed false: a claim takes over from it.';
COMMENT ON FUNCTION update_session_heartbeat(text, bigint) IS
    'Records a sign of life and returns what the session holds; lost_claim tells of a claim that was lost since. With a claim id only while exactly that acquisition is held, else claim_lost.';
COMMENT ON FUNCTION lease_expires_at(timestamptz, timestamptz) IS
    'When a session with this heartbeat and announced silence counts as stale: the one rule of liveness, by pg_claims.stale_after.';
COMMENT ON FUNCTION heartbeat_age_human(timestamptz, timestamptz) IS
    'The time from a heartbeat to another moment as a person reads it; truncates, never rounds up.';
COMMENT ON FUNCTION grant_coordination(text, text) IS
    'Gives a role exactly one level: viewer (see), worker (sessions of its own), operator (every session, tables, binding), or none. Superusers, and roles granted EXECUTE.';
COMMENT ON FUNCTION bind_directives(regclass, text[], text, text, text, text, text, text, text, text, text, text, text[]) IS
    'Makes a table the backlog. The first key column that is not NULL is an SD''s id. A column that is not named is looked for under its usual name; '''' means there is none. The caller must own the table.';
COMMENT ON FUNCTION unbind_directives() IS
    'Lets the bound table go as it was and makes the extension''s own table the backlog again. Needs the operator level and the table''s ownership.';
COMMENT ON FUNCTION complete_session_write() IS 'Trigger: makes a direct write of a session whole, or refuses it.';
COMMENT ON FUNCTION record_claim_history() IS 'Trigger: keeps sd_claims and session_lifecycle_events.';
COMMENT ON FUNCTION sync_is_working_on_with_session() IS 'Trigger: keeps the backlog''s is_working_on and active_session_id.';
COMMENT ON FUNCTION protect_open_claim() IS 'Trigger: refuses open acquisitions written other than through claude_sessions.';
COMMENT ON FUNCTION refuse_truncate_while_claimed() IS 'Trigger: refuses TRUNCATE while SDs are claimed.';
COMMENT ON FUNCTION rebuild_directives_view() IS 'Trigger: rebuilds v_directives when the binding changes.';
COMMENT ON FUNCTION release_finished_directive() IS 'Trigger on the backlog: releases an SD that is finished or deleted.';
COMMENT ON FUNCTION release_truncated_directives() IS 'Trigger on the backlog: releases all SDs on TRUNCATE.';
COMMENT ON FUNCTION keep_directive_mirror() IS 'Trigger on the backlog: is_working_on and active_session_id stay what the claims say.';
