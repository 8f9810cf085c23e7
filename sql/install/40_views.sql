-- v_directives is built from the binding; this builds it, and the backlog's triggers, for the
-- extension's own table. The function serves the installation only.
SELECT attach_default_directives();
DROP FUNCTION attach_default_directives();

-- One row per session that has not ended. observed_at is read once per row, so that all ages of a
-- row agree. The two branches exclude each other, and together are all that has not ended because a
-- session with an SD is active by constraint. So the server finds an SD by the partial index, which
-- it could not for a mere status <> 'released', and skips the second branch, where it is NULL.
CREATE VIEW v_active_sessions AS
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
       pg_catalog.trunc(GREATEST(EXTRACT(EPOCH FROM s.observed_at - s.heartbeat_at), 0), 3)
           AS heartbeat_age_seconds,
       pg_catalog.trunc(GREATEST(EXTRACT(EPOCH FROM s.observed_at - s.heartbeat_at), 0) / 60, 2)
           AS heartbeat_age_minutes,
       pg_catalog.trunc(GREATEST(EXTRACT(EPOCH FROM s.stale_at - s.observed_at), 0), 3)
           AS seconds_until_stale,
       CASE
           WHEN s.status = 'released' THEN 'released'
           WHEN s.stale_at <= s.observed_at THEN 'stale'
           ELSE s.status
       END AS computed_status,
       pg_catalog.trunc(GREATEST(EXTRACT(EPOCH FROM s.observed_at - s.claimed_at), 0) / 60, 2)
           AS claim_duration_minutes,
       heartbeat_age_human(s.heartbeat_at, s.observed_at) AS heartbeat_age_human,
       s.claim_id,
       s.silent_until,
       s.stale_at,
       s.owner_role,
       s.updated_at
  FROM (SELECT c.*,
               lease_expires_at(c.heartbeat_at, c.silent_until) AS stale_at,
               pg_catalog.clock_timestamp() AS observed_at
          FROM (SELECT id, session_id, sd_id, track, tty, pid, hostname, codebase, claimed_at,
                       heartbeat_at, status, metadata, created_at, updated_at, claim_id,
                       silent_until, owner_role
                  FROM claude_sessions
                 WHERE sd_id IS NOT NULL AND status = 'active'
                UNION ALL
                SELECT id, session_id, NULL::text, track, tty, pid, hostname, codebase, claimed_at,
                       heartbeat_at, status, metadata, created_at, updated_at, claim_id,
                       silent_until, owner_role
                  FROM claude_sessions
                 WHERE sd_id IS NULL AND status <> 'released') c) s
       -- sd_id is unique in v_directives, so the join cannot fan a session out.
  LEFT JOIN v_directives d ON d.sd_id = s.sd_id;
