-- The queue: what keeps an unfinished SD from being claimed, and the order in which the rest should be
-- worked. Read through v_directives and v_directive_keys, so that it serves every backlog.
--
-- An OFFSET 0 keeps the server from turning a look at one SD into a join of whole tables: the queue is
-- read from its head, mostly for a single SD.

-- Unqualified names are those of the server (see 10_tables.sql).
SET LOCAL search_path = pg_catalog, pg_temp;

-- What an SD waits for: unfinished SDs that it depends on, keys among its dependencies that no SD has,
-- dependencies that are no list, and its own unfinished parts. The server puts the body in the place of
-- a call, which it would not if the function had rights or settings of its own; whoever may read the
-- queue may read these views.
CREATE FUNCTION @extschema@.sd_blockers(p_sd_id text, p_dependencies jsonb)
RETURNS TABLE (kind text, key text, blocking_sd text)
LANGUAGE sql STABLE PARALLEL SAFE ROWS 1
BEGIN ATOMIC
    SELECT 'dependency', k.key, f.sd_id
      FROM pg_catalog.jsonb_array_elements_text(
               CASE pg_catalog.jsonb_typeof(p_dependencies) WHEN 'array' THEN p_dependencies ELSE '[]' END) k (key)
      LEFT JOIN LATERAL (SELECT n.sd_id, n.is_terminal FROM @extschema@.v_directive_keys n
                          WHERE n.key = k.key ORDER BY n.precedence LIMIT 1) f ON true
     WHERE f.is_terminal IS NOT TRUE
     UNION ALL
    SELECT 'malformed', pg_catalog.left(p_dependencies::text, 100), NULL
     WHERE pg_catalog.jsonb_typeof(p_dependencies) NOT IN ('array', 'null')
     UNION ALL
    SELECT 'child', c.sd_id, c.sd_id
      FROM @extschema@.v_directive_keys n
      JOIN @extschema@.v_directives c ON c.parent_sd_id = n.key
     WHERE n.sd_id = p_sd_id AND NOT c.is_terminal
       AND NOT EXISTS (SELECT FROM @extschema@.v_directive_keys o
                        WHERE o.key = n.key AND o.precedence < n.precedence);
END;

-- The same of all unfinished SDs.
CREATE VIEW @extschema@.v_sd_blockers AS
SELECT d.sd_id, w.kind, w.key, w.blocking_sd
  FROM @extschema@.v_directives d
 CROSS JOIN LATERAL @extschema@.sd_blockers(d.sd_id, d.dependencies) w
 WHERE NOT d.is_terminal;

-- Blocking conflicts, seen from each side, with who holds the other SD.
CREATE VIEW @extschema@.v_sd_conflicts AS
SELECT m.conflict_id,
       m.sd_id,
       m.conflict_type,
       m.conflicting_sd,
       o.session_id AS conflicting_session,
       COALESCE(@extschema@.is_claim_live(@extschema@.latest_heartbeat(o.tableoid, o.session_id, o.heartbeat_at), o.silent_until, o.stale_after, o.claimed_at, o.claim_id),
                false) AS is_live
  FROM (SELECT conflict_id, sd_id_a AS sd_id, conflict_type, sd_id_b AS conflicting_sd
          FROM @extschema@.sd_conflict_matrix WHERE resolved_at IS NULL AND conflict_severity = 'blocking'
        UNION ALL
        SELECT conflict_id, sd_id_b, conflict_type, sd_id_a
          FROM @extschema@.sd_conflict_matrix WHERE resolved_at IS NULL AND conflict_severity = 'blocking') m
  LEFT JOIN @extschema@.claude_sessions o
    ON o.sd_id = m.conflicting_sd AND o.sd_id IS NOT NULL AND o.status = 'active';

-- Circles are few.
ALTER FUNCTION @extschema@.dependency_cycles() ROWS 10;

-- Every unfinished SD: whether it can be claimed, or what keeps it, and who holds it. In no order; that
-- of the queue is priority_order, rank, created_at, sd_id, which is the order of the backlog's index.
CREATE VIEW @extschema@.v_sd_queue AS
SELECT q.*,
       CASE q.eligibility
           WHEN 'claimed' THEN
               'claimed by ' || q.claimed_by
               || CASE WHEN q.reclaimable_at <= q.observed_at THEN ', stale, with a transaction open under the claim'
                       WHEN q.stale_at <= q.observed_at THEN ', stale, and kept for it'
                       ELSE '' END
           WHEN 'held' THEN
               (SELECT 'held by ' || h.held_by || ': ' || h.reason FROM @extschema@.sd_holds h WHERE h.sd_id = q.sd_id)
           WHEN 'blocked_by_dependency' THEN COALESCE(
               (SELECT 'waits for itself: ' || y.cycle FROM @extschema@.dependency_cycles() y WHERE y.sd_id = q.sd_id),
               (SELECT pg_catalog.string_agg(
                           CASE w.kind
                               WHEN 'child' THEN 'waits for its part ' || w.key
                               WHEN 'malformed' THEN 'its dependencies are not a list of keys: ' || w.key
                               ELSE 'waits for ' || COALESCE(
                                        w.blocking_sd,
                                        '"' || pg_catalog.left(w.key, 100) || '", which the backlog does not have',
                                        'null, which is no key')
                           END, '; ' ORDER BY w.key)
                  FROM (SELECT * FROM @extschema@.sd_blockers(q.sd_id, q.dependencies) LIMIT 5) w))
           WHEN 'conflict' THEN
               (SELECT pg_catalog.format('in conflict (%s) with %s, which %s has claimed',
                                         m.conflict_type, m.conflicting_sd, m.conflicting_session)
                  FROM @extschema@.v_sd_conflicts m
                 WHERE m.sd_id = q.sd_id AND m.is_live ORDER BY m.conflict_id LIMIT 1)
           WHEN 'available' THEN
               'claimed by ' || q.claimed_by || ', which is stale: a claim takes over'
       END AS reason,
       CASE WHEN q.claimed_at IS NOT NULL THEN
           pg_catalog.trunc(LEAST(@extschema@.elapsed_minutes(q.claimed_at, q.observed_at), 2147483647))::integer
       END AS claim_minutes,
       @extschema@.elapsed_seconds(q.heartbeat_at, q.observed_at) AS heartbeat_age_seconds,
       @extschema@.heartbeat_age_human(q.heartbeat_at, q.observed_at) AS heartbeat_age_human,
       CASE WHEN q.heartbeat_at > q.observed_at - interval '60 seconds' THEN 'green'
            WHEN q.heartbeat_at > q.observed_at - interval '180 seconds' THEN 'yellow'
            WHEN q.heartbeat_at IS NOT NULL THEN 'red' END AS heartbeat_color
  FROM (SELECT d.sd_id, d.title, d.status, d.priority, d.priority_order, d.track, d.rank,
               d.dependencies, d.parent_sd_id, d.created_at, d.is_working_on, d.active_session_id,
               o.session_id AS claimed_by, o.hostname, o.tty, o.codebase, o.claim_id, o.claimed_at,
               o.heartbeat_at, o.stale_at, o.reclaimable_at, o.observed_at,
               CASE
                   WHEN o.is_live
                       THEN 'claimed'
                   WHEN EXISTS (SELECT FROM @extschema@.sd_holds h WHERE h.sd_id = d.sd_id OFFSET 0)
                       THEN 'held'
                   WHEN EXISTS (SELECT FROM @extschema@.sd_blockers(d.sd_id, d.dependencies) OFFSET 0)
                       THEN 'blocked_by_dependency'
                   WHEN EXISTS (SELECT FROM @extschema@.v_sd_conflicts m WHERE m.sd_id = d.sd_id AND m.is_live OFFSET 0)
                       THEN 'conflict'
                   ELSE 'available'
               END AS eligibility
          FROM @extschema@.v_directives d
          LEFT JOIN LATERAL (
                  SELECT s.session_id, s.hostname, s.tty, s.codebase, s.claim_id, s.claimed_at,
                         h.latest AS heartbeat_at,
                         @extschema@.lease_expires_at(h.latest, s.silent_until, s.stale_after, s.claimed_at)
                             AS stale_at,
                         @extschema@.claim_reclaimable_at(h.latest, s.silent_until, s.stale_after, s.claimed_at)
                             AS reclaimable_at,
                         @extschema@.is_claim_live(h.latest, s.silent_until, s.stale_after, s.claimed_at, s.claim_id)
                             AS is_live,
                         pg_catalog.clock_timestamp() AS observed_at
                    FROM @extschema@.claude_sessions s
                   CROSS JOIN LATERAL (SELECT @extschema@.latest_heartbeat(s.tableoid, s.session_id, s.heartbeat_at)
                                           AS latest OFFSET 0) h
                   WHERE s.sd_id = d.sd_id AND s.sd_id IS NOT NULL AND s.status = 'active'
                  OFFSET 0) o ON true
         WHERE NOT d.is_terminal) q;

-- The same in the order of the queue, for people.
CREATE VIEW @extschema@.v_sd_next AS
SELECT pg_catalog.row_number() OVER (ORDER BY q.priority_order, q.rank, q.created_at, q.sd_id)
           AS queue_position,
       q.sd_id, q.title, q.status, q.priority, q.track, q.rank, q.parent_sd_id, q.created_at,
       q.eligibility, q.reason, q.claimed_by, q.hostname, q.tty, q.codebase, q.claim_id, q.claimed_at,
       q.claim_minutes, q.heartbeat_age_seconds, q.heartbeat_age_human, q.heartbeat_color
  FROM @extschema@.v_sd_queue q
 ORDER BY q.priority_order, q.rank, q.created_at, q.sd_id;

SET LOCAL search_path = @extschema@, pg_temp;
