-- Unqualified names are those of the server (see 10_tables.sql).
SET LOCAL search_path = pg_catalog, pg_temp;

-- v_directives is built from the binding; this builds it, and the backlog's triggers, for the
-- extension's own table. The function serves the installation only.
SELECT @extschema@.attach_default_directives();
DROP FUNCTION @extschema@.attach_default_directives();

-- One row per session that has not ended. observed_at is read once per row, so that all ages of a
-- row agree. The two branches exclude each other, and together are all that has not ended because a
-- session with an SD is active by constraint. So the server finds an SD by the partial index, which
-- it could not for a mere status <> 'released', and skips the second branch, where it is NULL.
CREATE VIEW @extschema@.v_active_sessions AS
SELECT s.id,
       s.session_id,
       s.sd_id,
       d.title AS sd_title,
       s.track,
       s.tty,
       s.pid,
       s.hostname,
       s.codebase,
       s.claimed_at,
       s.heartbeat_at,
       s.status,
       s.metadata,
       s.created_at,
       @extschema@.elapsed_seconds(s.heartbeat_at, s.observed_at) AS heartbeat_age_seconds,
       @extschema@.elapsed_minutes(s.heartbeat_at, s.observed_at) AS heartbeat_age_minutes,
       @extschema@.elapsed_seconds(s.observed_at, s.stale_at) AS seconds_until_stale,
       CASE
           WHEN s.status = 'released' THEN 'released'
           WHEN s.stale_at <= s.observed_at THEN 'stale'
           ELSE s.status
       END AS computed_status,
       @extschema@.elapsed_minutes(s.claimed_at, s.observed_at) AS claim_duration_minutes,
       @extschema@.heartbeat_age_human(s.heartbeat_at, s.observed_at) AS heartbeat_age_human,
       s.claim_id,
       s.silent_until,
       s.stale_at,
       -- By its present name; the one that was stored where the role is gone.
       COALESCE(NULLIF(pg_catalog.pg_get_userbyid(s.owner_oid),
                       pg_catalog.format('unknown (OID=%s)', s.owner_oid)::pg_catalog.name), s.owner_role) AS owner_role,
       s.updated_at,
       s.stale_after,
       s.progress_at,
       s.progress_note,
       @extschema@.elapsed_seconds(s.progress_at, s.observed_at) AS progress_age_seconds,
       s.reclaimable_at
  FROM (SELECT c.*,
               @extschema@.lease_expires_at(c.heartbeat_at, c.silent_until, c.stale_after, c.claimed_at) AS stale_at,
               CASE WHEN c.sd_id IS NOT NULL THEN
                   @extschema@.claim_reclaimable_at(c.heartbeat_at, c.silent_until, c.stale_after, c.claimed_at)
               END AS reclaimable_at,
               pg_catalog.clock_timestamp() AS observed_at
          FROM (SELECT id, session_id, sd_id, track, tty, pid, hostname, codebase, claimed_at,
                       @extschema@.latest_heartbeat(tableoid, session_id, heartbeat_at) AS heartbeat_at,
                       status, metadata, created_at, updated_at, claim_id,
                       silent_until, owner_role, owner_oid, stale_after, progress_at, progress_note
                  FROM @extschema@.claude_sessions
                 WHERE sd_id IS NOT NULL AND status = 'active'
                UNION ALL
                SELECT id, session_id, NULL::text, track, tty, pid, hostname, codebase, claimed_at,
                       @extschema@.latest_heartbeat(tableoid, session_id, heartbeat_at) AS heartbeat_at,
                       status, metadata, created_at, updated_at, claim_id,
                       silent_until, owner_role, owner_oid, stale_after, progress_at, progress_note
                  FROM @extschema@.claude_sessions
                 WHERE sd_id IS NULL AND status <> 'released') c) s
       -- sd_id is unique in v_directives, so the join cannot fan a session out.
  LEFT JOIN @extschema@.v_directives d ON d.sd_id = s.sd_id;

-- How the worker does in this database. Lag is how long the claim that has waited longest for the
-- reaper has been due; a worker that stands still is seen by its growth.
CREATE VIEW @extschema@.v_worker_health AS
SELECT h.last_run_at,
       h.last_duration_ms,
       h.last_reaped,
       h.runs,
       h.reaped,
       h.errors,
       h.last_error,
       h.last_error_at,
       h.last_pruned_at,
       due.claims AS claims_due,
       COALESCE(due.lag_seconds, 0) AS lag_seconds,
       beating.connections AS heartbeat_connections,
       board.capacity AS board_capacity,
       board.entries AS board_entries,
       board.refused AS board_refused
  FROM (SELECT pg_catalog.count(*) AS claims,
               pg_catalog.trunc(pg_catalog.max(EXTRACT(EPOCH FROM
                   pg_catalog.clock_timestamp() - s.reclaimable_at)), 3) AS lag_seconds
          FROM @extschema@.v_active_sessions s
         WHERE s.sd_id IS NOT NULL AND s.computed_status = 'stale'
           AND s.reclaimable_at <= pg_catalog.clock_timestamp()) due
 CROSS JOIN (SELECT pg_catalog.count(*) AS connections
               FROM @extschema@.heartbeat_connections WHERE given_up_at IS NULL) beating
  LEFT JOIN @extschema@.worker_health h ON true
  LEFT JOIN @extschema@.heartbeat_board() board ON true;

-- Catching up without loss or repetition: each event once, in the order in which events became
-- visible.
CREATE FUNCTION @extschema@.lifecycle_events_since(p_id bigint DEFAULT 0, p_limit integer DEFAULT 1000)
RETURNS TABLE (id bigint, event_type text, session_id text, sd_id text, claim_id bigint,
               occurred_at timestamptz, actor name, reason text, held_seconds numeric,
               detail jsonb)
LANGUAGE sql STABLE PARALLEL SAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT p.position, e.event_type, e.session_id, e.sd_id, e.claim_id, e.occurred_at, e.actor,
           e.reason, e.held_seconds, e.detail
      FROM @extschema@.lifecycle_event_positions p
      JOIN @extschema@.session_lifecycle_events e ON e.event_id = p.event_id
     WHERE p.position > COALESCE(p_id, 0)
     ORDER BY p.position
     LIMIT @extschema@.checked_limit(p_limit);
END;

SET LOCAL search_path = @extschema@, pg_temp;
