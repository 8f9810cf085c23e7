-- What psql's \d+ and \df+ show.

COMMENT ON TABLE claude_sessions IS
    'One row per session, and the truth about who holds which SD. Everything else is derived from it by triggers in the same transaction.';
COMMENT ON COLUMN claude_sessions.session_id IS 'The name that the session gave itself: 1 to 200 characters, no control characters.';
COMMENT ON COLUMN claude_sessions.sd_id IS 'The SD that the session holds. Writing it claims, clearing it releases.';
COMMENT ON COLUMN claude_sessions.status IS 'active, idle or released. Stale is never stored: see v_active_sessions.computed_status.';
COMMENT ON COLUMN claude_sessions.heartbeat_at IS 'The last sign of life that the row knows of, by the database''s clock; see latest_heartbeat().';
COMMENT ON COLUMN claude_sessions.updated_at IS 'The last change other than a heartbeat.';
COMMENT ON COLUMN claude_sessions.claim_id IS 'The fencing token of the acquisition that the session holds; assigned by the server.';
COMMENT ON COLUMN claude_sessions.silent_until IS 'Until when the session announced that it will not beat.';
COMMENT ON COLUMN claude_sessions.owner_role IS 'The role that registered the session; it or an operator may act for it. v_active_sessions shows its present name.';
COMMENT ON COLUMN claude_sessions.owner_oid IS 'The same role by its number, which decides; NULL: nobody''s, as there was no such role where a dump was restored. See assign_sessions().';
COMMENT ON COLUMN claude_sessions.released_at IS 'When the session''s last claim, or the session itself, ended.';
COMMENT ON COLUMN claude_sessions.release_reason IS 'Why; free text.';
COMMENT ON COLUMN claude_sessions.lost_claim_id IS 'The acquisition that the session lost against its will since its last claim.';
COMMENT ON COLUMN claude_sessions.lost_to IS 'The session that took that acquisition over.';
COMMENT ON INDEX idx_claude_sessions_unique_active_claim IS 'One active claim per SD.';

COMMENT ON COLUMN claude_sessions.stale_after IS 'The lease that the session asked for; NULL: pg_claims.stale_after.';
COMMENT ON COLUMN claude_sessions.progress_at IS 'The last sign of progress.';
COMMENT ON COLUMN claude_sessions.progress_note IS 'What the session said of it.';
COMMENT ON COLUMN claude_sessions.stale_noted_for IS 'The last heartbeat before the silence that the audit has told of.';
COMMENT ON COLUMN claude_sessions.age_warned_for IS 'The claim of whose age the audit has warned.';

COMMENT ON TABLE sd_conflict_matrix IS
    'Pairs of SDs that must not be worked on at once: see declare_conflict(). resolved_at NULL: in force.';
COMMENT ON COLUMN sd_conflict_matrix.conflict_severity IS 'blocking refuses claims; warning is only on record.';
COMMENT ON TABLE sd_holds IS 'SDs that a person has stopped: see hold_sd().';
COMMENT ON TABLE lifecycle_event_positions IS
    'The order in which events became visible; a place in it is the cursor of lifecycle_events_since().';
COMMENT ON TABLE installation IS
    'Since when the extension is installed in this database, and since when it is in use: NULL until somebody has called a function. Not dumped.';
COMMENT ON TABLE event_frontier IS
    'How far that order has got, and which event numbers below may still appear.';
COMMENT ON TABLE heartbeat_connections IS
    'The connections for which the server beats: see start_heartbeat().';
COMMENT ON COLUMN heartbeat_connections.server_since IS
'Since when the server accepted writes that the connection was to: its end with a restart is not its session''s.';
COMMENT ON COLUMN heartbeat_connections.given_up_at IS 'When it stopped after too many failures in a row.';
COMMENT ON TABLE worker_health IS 'How the worker does in this database: see v_worker_health.';
COMMENT ON VIEW v_worker_health IS
    'How the worker does: last run, its duration in milliseconds, claims reaped by it and in all, errors, lag (for how many seconds the claim that has waited longest for the reaper has been due), and the heartbeat board.';

COMMENT ON TABLE sd_claims IS
    'One row per acquisition, open or ended; derived from claude_sessions. Survives the session.';
COMMENT ON COLUMN sd_claims.claim_id IS 'The fencing token: it only grows and never repeats, over a failover and an older dump as well.';
COMMENT ON COLUMN sd_claims.took_over_claim_id IS 'The stale acquisition that this one took over.';
COMMENT ON COLUMN sd_claims.taken_over_by IS 'The session that took this acquisition over.';
COMMENT ON COLUMN sd_claims.queue_reason IS 'Why the queue gave it: lost, affinity or order; NULL: it was asked for.';
COMMENT ON COLUMN sd_claims.queue_track IS 'The track that the queue was asked for; NULL: any.';
COMMENT ON INDEX sd_claims_open_key IS 'One open acquisition per SD.';

COMMENT ON TABLE session_lifecycle_events IS
    'The audit, append-only: registered, resumed, claimed, switched, released, taken_over, stale, reaped, max_age_warning, ended.';
COMMENT ON COLUMN session_lifecycle_events.actor IS 'The role that did it.';
COMMENT ON COLUMN session_lifecycle_events.held_seconds IS 'How long the acquisition lasted that ended with this event.';

COMMENT ON TABLE directive_binding IS
    'The table of the user''s that serves as the backlog; no row: the extension''s own strategic_directives_v2. Written by bind_directives() and unbind_directives().';

-- Where operators are looked for, only the server's own (see 10_tables.sql).
SET LOCAL search_path = pg_catalog, pg_temp;
DO $$
BEGIN
    -- Only where the table is the extension's own.
    IF EXISTS (SELECT FROM pg_catalog.pg_depend d
                WHERE d.deptype = 'e'
                  AND d.classid = 'pg_catalog.pg_class'::regclass
                  AND d.objid = pg_catalog.to_regclass('@extschema@.strategic_directives_v2')
                  AND d.refclassid = 'pg_catalog.pg_extension'::regclass) THEN
        COMMENT ON TABLE @extschema@.strategic_directives_v2 IS
            'The backlog, as long as no other table is bound. is_working_on and active_session_id are kept by the extension.';
    END IF;
END
$$;
SET LOCAL search_path = @extschema@, pg_temp;

COMMENT ON VIEW v_directives IS
    'The backlog in one shape, whichever table it is. sd_id is the canonical id; is_terminal: finished, cannot be claimed.';
COMMENT ON VIEW v_directive_keys IS
    'Every key by which an SD can be named, and the SD that it names: of several the one with the lowest precedence.';
COMMENT ON VIEW v_sd_next IS
    'Every unfinished SD in the order of the queue. eligibility: available, claimed, blocked_by_dependency, conflict or held, with its reason; of claimed ones the owner, whole minutes since the claim, and heartbeat_color: green under 60 s, yellow under 180 s, red from 180 s.';
COMMENT ON VIEW v_sd_queue IS
    'Like v_sd_next, in no order; ORDER BY priority_order, rank, created_at, sd_id is the order of the queue, and reads the backlog''s index.';
COMMENT ON VIEW v_sd_blockers IS
    'What unfinished SDs wait for. kind: dependency (blocking_sd NULL: no SD has that key), child, or malformed (the dependencies are not a list of keys).';
COMMENT ON VIEW v_sd_conflicts IS
    'Blocking conflicts from each side, with who holds the other SD, and whether that claim keeps this SD from being claimed.';
COMMENT ON VIEW v_active_sessions IS
    'One row per session that has not ended. Ages are numeric; computed_status is active, idle or stale.';

COMMENT ON FUNCTION register_session(text, text, text, integer, text, jsonb, interval) IS
    'Registers a session or refreshes it; brings an ended one back. Metadata merges key by key; what is not given stays. p_stale_after asks for a lease of its own, 0 gives it up. Returns the session as stored. Needs the worker level; another role''s session: 42501.';
COMMENT ON FUNCTION end_session(text, text) IS
    'Releases what the session holds and ends it. Ending an ended session changes nothing. Refuses with session_not_found.';
COMMENT ON FUNCTION assign_sessions(name, name) IS
    'An operator gives all sessions of a role, also of one that is gone or was never here, to another role. Returns how many.';
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
COMMENT ON FUNCTION heartbeat_sessions(text[]) IS
    'Records a sign of life of many sessions in one statement. Returns success (all of them), recorded, and sessions: an answer per session, as of update_session_heartbeat, or why it was not recorded.';
COMMENT ON FUNCTION extend_lease(text, interval, bigint) IS
    'Announces that the session will be silent for so long, 0 to pg_claims.max_silence, and will still be alive; 0 takes it back. A sign of life itself. Returns silent_until and lease_expires_at.';
COMMENT ON FUNCTION report_progress(text, text, bigint) IS
    'Records a sign of progress, with a note of up to 1000 characters, apart from the sign of life, which it is as well.';
COMMENT ON FUNCTION start_heartbeat(text) IS
    'From now on the server beats for this session every pg_claims.heartbeat_interval, for as long as this very connection lives. Returns success, sessionId, intervalMs; refuses if another session''s heartbeat runs here, or no worker can beat.';
COMMENT ON FUNCTION stop_heartbeat() IS 'Stops the heartbeat of this connection. Returns success, stoppedSession.';
COMMENT ON FUNCTION is_heartbeat_active() IS
    'Whether a heartbeat runs for this connection: active, sessionId, lastSuccessfulHeartbeat, consecutiveFailures.';
COMMENT ON FUNCTION get_heartbeat_stats() IS
    'How this connection''s heartbeat does: isActive, sessionId, intervalSeconds, lastSuccessfulHeartbeat, secondsSinceLastHeartbeat, consecutiveFailures, maxConsecutiveFailures, healthy.';
COMMENT ON FUNCTION force_heartbeat(text) IS
    'Records a sign of life now, like update_session_heartbeat; resets the failures if this connection''s heartbeat runs for the session.';
COMMENT ON FUNCTION cleanup_stale_sessions(integer, integer) IS
    'What the worker does by itself: ends the claims of stale sessions, up to p_batch_size, and puts events in order. A threshold only makes it more patient: a live session is never reaped. What fails does not keep the rest. Returns success (whether nothing failed), stale_sessions_cleaned, failed, failures (the first ten: session_id, sd_id, error), cleaned_at.';
COMMENT ON FUNCTION prune_history(integer) IS
    'What the worker does by itself: removes ended claims, ended sessions and events older than pg_claims.history_retention; never an open claim. Returns how many of each.';
COMMENT ON FUNCTION advance_numbers() IS
    'For tables that logical replication has filled: lifts the numbers of claims, events and places in their order above those in the tables and above all that a server can have given out before this moment. Returns claim_id, event_id, position: each number that comes next is greater.';
COMMENT ON FUNCTION lifecycle_events_since(bigint, integer) IS
    'The audit in the order in which events became visible, after place p_id (0: from the oldest kept), up to p_limit. Each event once; the last id is the next call''s p_id.';
COMMENT ON FUNCTION latest_heartbeat(oid, text, timestamptz) IS
    'A session''s last sign of life: the later one of the heartbeat board in shared memory and what its row (the third argument) says. The first argument is the row''s tableoid.';
COMMENT ON FUNCTION coordination_check() IS
    'The doctor: one row for each thing that was looked at, with status ok, warning or critical, and unless it is ok what is the matter and what to do about it.';
COMMENT ON FUNCTION coordination_repair(boolean) IS
    'Finds what was written past the triggers, or restored by half, and, unless p_dry_run, mends it in one transaction: acquisitions, sessions, the backlog''s mirror, triggers and indexes, the views, the heartbeat board. One row for each thing found: kind, object, finding, action, done. Claims wait meanwhile; heartbeats do not.';
COMMENT ON FUNCTION heartbeat_board() IS
    'The heartbeat board in shared memory, if there is one: for how many sessions of the server it was made (pg_claims.max_sessions), how many it holds, and how many times it had no room for one, which then beat in the table.';
COMMENT ON FUNCTION forget_heartbeat() IS 'Trigger: the heartbeat board forgets a heartbeat that was set back, and sessions that are gone; an infinite heartbeat is refused.';
COMMENT ON FUNCTION lease_expires_at(timestamptz, timestamptz, interval, timestamptz) IS
    'When a session with this heartbeat, announced silence, lease of its own and time of claim counts as stale: the one rule of liveness.';
COMMENT ON FUNCTION claim_reclaimable_at(timestamptz, timestamptz, interval, timestamptz) IS
    'When such a session''s claim may be taken over or reaped: pg_claims.reclaim_delay after it went stale.';
COMMENT ON FUNCTION elapsed_seconds(timestamptz, timestamptz) IS
    'Seconds from the one moment to the other, cut to milliseconds; 0 where the other comes first.';
COMMENT ON FUNCTION elapsed_minutes(timestamptz, timestamptz) IS
    'Minutes from the one moment to the other, cut to hundredths; 0 where the other comes first.';
COMMENT ON FUNCTION heartbeat_age_human(timestamptz, timestamptz) IS
    'The time from a heartbeat to another moment as a person reads it; truncates, never rounds up.';
COMMENT ON FUNCTION is_claim_live(timestamptz, timestamptz, interval, timestamptz, bigint) IS
    'Whether such a session''s claim keeps others off now: until it may be reclaimed, or while a transaction is open that has asserted it.';
COMMENT ON FUNCTION claim_next_sd(text, text) IS
    'Claims the next SD for the session, of one track or of all: first what the reaper took from it, then what its host and code base worked on last, then by priority, rank and age. Answers like claim_sd(), with title and queue_reason; with what the session holds already, if it does. Refuses with queue_empty, and says why.';
COMMENT ON FUNCTION sd_next(text, integer, boolean, text, integer) IS
    'The queue as a person reads it: the first p_limit unfinished SDs by track, with who holds them or what keeps them, in p_width columns, with ANSI colours on request; the SD of p_session_id is marked.';
COMMENT ON FUNCTION sd_blockers(text, jsonb) IS
    'What an SD of that canonical id and with those dependencies waits for: see v_sd_blockers.';
COMMENT ON FUNCTION dependency_keys(text) IS
    'The keys that a json column holds, as a list of strings; what is no list, as a string. Never fails.';
COMMENT ON FUNCTION dependency_cycles() IS
    'The unfinished SDs that wait for themselves, by way of dependencies and parts, each with a circle that it is entangled in.';
COMMENT ON FUNCTION grant_coordination(text, text) IS
    'Gives a role exactly one level: viewer (see), worker (sessions of its own), operator (every session, tables, binding), or none. What the role had beyond it on the extension''s objects is taken back and told in revoked; what others have granted is told in left. For superusers and members of the role that owns the extension.';
COMMENT ON FUNCTION bind_directives(regclass, text[], text, text, text, text, text, text, text, text, text, text, text[]) IS
    'Makes a table the backlog. The first key column that is not NULL is an SD''s id. A column that is not named is looked for under its usual name; '''' means there is none. The caller must own the table.';
COMMENT ON FUNCTION unbind_directives() IS
    'Lets the bound table go as it was and makes the extension''s own table the backlog again. Needs the operator level and the table''s ownership.';
COMMENT ON FUNCTION assert_claim(text, text, bigint) IS
    'Raises 55000 unless the session holds exactly this acquisition, and then keeps it held until the transaction ends: no takeover, release or reaping slips in between. Returns the claim id.';
COMMENT ON FUNCTION declare_conflict(text, text, text, text) IS
    'From now on the two SDs must not be worked on at once: a claim on one is refused with conflict while a live session holds the other. Severity warning is only put on record. Claims that are held already stay.';
COMMENT ON FUNCTION resolve_conflict(text, text) IS 'Ends the conflict of two SDs. Refuses with no_conflict.';
COMMENT ON FUNCTION hold_sd(text, text) IS
    'A person''s stop sign: the SD cannot be claimed until unhold_sd(). A reason is mandatory. Who holds it already keeps it.';
COMMENT ON FUNCTION unhold_sd(text) IS 'Takes the stop sign away. Refuses with not_held.';
COMMENT ON FUNCTION takeover_sd(text, text, text) IS
    'An operator''s force: gives the SD to the session although another one, even a live one, holds it; waits for a guard. A reason is mandatory; the audit and the loser''s next heartbeat tell it. Answers like claim_sd().';
COMMENT ON FUNCTION guard_table(regclass, name) IS
    'From now on rows of an SD in the table can be written only by a transaction that asserted the claim on it. The caller must own the table.';
COMMENT ON FUNCTION unguard_table(regclass) IS 'Takes the guard off a table. The caller must own it.';
COMMENT ON FUNCTION check_guarded_write() IS 'Trigger on a guarded table: refuses rows of SDs that the transaction has not asserted.';
COMMENT ON FUNCTION refuse_guarded_truncate() IS 'Trigger on a guarded table: refuses TRUNCATE.';
COMMENT ON FUNCTION complete_session_write() IS 'Trigger: makes a direct write of a session whole, or refuses it.';
COMMENT ON FUNCTION own_replicated_session() IS 'Trigger: a replicated session belongs to the role of its owner_role''s name.';
COMMENT ON FUNCTION sync_is_working_on_with_session() IS
    'Trigger: keeps the heartbeat board, the claim history, the audit, and the backlog''s is_working_on and active_session_id in step with a session; of a replicated row only the board.';
COMMENT ON FUNCTION checked_limit(integer) IS 'Stands behind lifecycle_events_since(): p_limit, unless it is less than 1 (22023).';
COMMENT ON FUNCTION note_drop() IS
    'Event trigger: whatever drops the backlog with all that depends on it does not drop the extension (2BP01); DROP EXTENSION pg_claims does.';
COMMENT ON FUNCTION keep_out_foreign_code() IS
    'Event trigger: a trigger on one of the extension''s tables is refused (42501) that uses anything of a role that has not the rights of the extension''s owner, and so is a foreign key that passes writes on to such a role''s table.';
COMMENT ON FUNCTION begin_restoring() IS 'Trigger: a dump is being restored; the worker waits until somebody uses the extension again.';
COMMENT ON FUNCTION make_way_for_dump() IS 'Event trigger: a dump that replaces what is there may drop a bound backlog.';
COMMENT ON FUNCTION protect_open_claim() IS 'Trigger: refuses open acquisitions written other than through claude_sessions.';
COMMENT ON FUNCTION refuse_truncate_while_claimed() IS 'Trigger: refuses TRUNCATE while SDs are claimed.';
COMMENT ON FUNCTION rebuild_directives_view() IS 'Trigger: rebuilds v_directives when the binding changes.';
COMMENT ON FUNCTION release_finished_directive() IS 'Trigger on the backlog: releases an SD that is finished or deleted.';
COMMENT ON FUNCTION release_truncated_directives() IS 'Trigger on the backlog: releases all SDs on TRUNCATE.';
COMMENT ON FUNCTION correct_directive_mirror() IS 'Trigger on the backlog: sets is_working_on and active_session_id of a new or renamed row to what the claims say by then.';
COMMENT ON FUNCTION keep_directive_mirror() IS 'Trigger on the backlog: is_working_on and active_session_id stay what the claims say.';
