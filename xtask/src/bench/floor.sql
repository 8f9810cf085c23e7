-- What the extension is measured against: the same tables without any checks, and the same logic in
-- PL/pgSQL as it is usually written.

CREATE SCHEMA floor;
CREATE TABLE floor.claude_sessions (LIKE public.claude_sessions INCLUDING ALL EXCLUDING CONSTRAINTS) WITH (fillfactor = 70);
CREATE TABLE floor.sd_claims (LIKE public.sd_claims INCLUDING ALL EXCLUDING CONSTRAINTS) WITH (fillfactor = 90);
CREATE TABLE floor.session_lifecycle_events (LIKE public.session_lifecycle_events INCLUDING ALL EXCLUDING CONSTRAINTS);
CREATE TABLE floor.strategic_directives_v2 (LIKE public.strategic_directives_v2 INCLUDING ALL EXCLUDING CONSTRAINTS) WITH (fillfactor = 80);

CREATE SCHEMA peer;
CREATE TABLE peer.sd_holds (LIKE public.sd_holds INCLUDING ALL);
CREATE TABLE peer.sd_conflict_matrix (LIKE public.sd_conflict_matrix INCLUDING ALL);
CREATE TABLE peer.claude_sessions (LIKE public.claude_sessions INCLUDING ALL) WITH (fillfactor = 70);
CREATE TABLE peer.sd_claims (LIKE public.sd_claims INCLUDING ALL) WITH (fillfactor = 90);
CREATE TABLE peer.session_lifecycle_events (LIKE public.session_lifecycle_events INCLUDING ALL);
CREATE TABLE peer.strategic_directives_v2 (LIKE public.strategic_directives_v2 INCLUDING ALL) WITH (fillfactor = 80);

CREATE VIEW peer.v_active_sessions AS
SELECT s.*, EXTRACT(EPOCH FROM clock_timestamp() - s.heartbeat_at) AS heartbeat_age_seconds,
       CASE WHEN s.heartbeat_at < clock_timestamp() - interval '5 minutes' THEN 'stale' ELSE s.status END
           AS computed_status
  FROM peer.claude_sessions s
 WHERE s.sd_id IS NOT NULL AND s.status = 'active';

CREATE FUNCTION peer.claim_sd(p_sd_id text, p_session_id text) RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
    v_owner peer.v_active_sessions;
    v_session peer.claude_sessions;
    v_status text;
    v_claim_id bigint;
    v_now timestamptz := clock_timestamp();
BEGIN
    SELECT * INTO v_session FROM peer.claude_sessions WHERE session_id = p_session_id;
    IF NOT FOUND OR v_session.status = 'released' THEN
        RETURN jsonb_build_object('success', false, 'error', 'session_not_found');
    END IF;
    SELECT status INTO v_status FROM peer.strategic_directives_v2 WHERE sd_id = p_sd_id;
    IF NOT FOUND OR v_status IN ('completed', 'cancelled', 'deferred') THEN
        RETURN jsonb_build_object('success', false, 'error', 'sd_not_found');
    END IF;
    SELECT * INTO v_owner FROM peer.v_active_sessions WHERE sd_id = p_sd_id;
    IF FOUND AND v_owner.session_id <> p_session_id AND v_owner.computed_status = 'active' THEN
        RETURN jsonb_build_object('success', false, 'error', 'already_claimed',
            'claimed_by', v_owner.session_id, 'heartbeat_age_seconds', v_owner.heartbeat_age_seconds,
            'hostname', v_owner.hostname, 'tty', v_owner.tty, 'codebase', v_owner.codebase);
    END IF;
    BEGIN
        INSERT INTO peer.sd_claims (sd_id, session_id, hostname, codebase)
        VALUES (p_sd_id, p_session_id, v_session.hostname, v_session.codebase) RETURNING claim_id INTO v_claim_id;
    EXCEPTION WHEN unique_violation THEN
        RETURN jsonb_build_object('success', false, 'error', 'already_claimed');
    END;
    UPDATE peer.claude_sessions
       SET sd_id = p_sd_id, claim_id = v_claim_id, claimed_at = v_now, heartbeat_at = v_now,
           status = 'active', updated_at = v_now
     WHERE session_id = p_session_id;
    UPDATE peer.strategic_directives_v2 SET is_working_on = true, active_session_id = p_session_id
     WHERE sd_id = p_sd_id;
    INSERT INTO peer.session_lifecycle_events (event_type, session_id, sd_id, claim_id, actor)
    VALUES ('claimed', p_session_id, p_sd_id, v_claim_id, current_user);
    RETURN jsonb_build_object('success', true, 'sd_id', p_sd_id, 'session_id', p_session_id,
                              'claim_id', v_claim_id, 'claimed_at', v_now);
END $$;

-- The same with all that claim_sd() looks at: whose the session is, stop signs, conflicts, and a stale owner,
-- from whom it takes over.
CREATE FUNCTION peer.claim_sd_with_all_checks(p_sd_id text, p_session_id text) RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
    v_owner peer.v_active_sessions;
    v_session peer.claude_sessions;
    v_hold peer.sd_holds;
    v_conflict record;
    v_status text;
    v_claim_id bigint;
    v_now timestamptz := clock_timestamp();
BEGIN
    SELECT * INTO v_session FROM peer.claude_sessions WHERE session_id = p_session_id FOR UPDATE;
    IF NOT FOUND OR v_session.status = 'released' THEN
        RETURN jsonb_build_object('success', false, 'error', 'session_not_found');
    END IF;
    IF NOT pg_has_role(session_user, v_session.owner_oid, 'MEMBER') THEN
        RAISE insufficient_privilege;
    END IF;
    SELECT status INTO v_status FROM peer.strategic_directives_v2 WHERE sd_id = p_sd_id FOR UPDATE;
    IF NOT FOUND OR v_status IN ('completed', 'cancelled', 'deferred') THEN
        RETURN jsonb_build_object('success', false, 'error', 'sd_not_found');
    END IF;
    SELECT * INTO v_owner FROM peer.v_active_sessions WHERE sd_id = p_sd_id;
    IF FOUND AND v_owner.session_id <> p_session_id AND v_owner.computed_status = 'active' THEN
        RETURN jsonb_build_object('success', false, 'error', 'already_claimed',
            'claimed_by', v_owner.session_id, 'heartbeat_age_seconds', v_owner.heartbeat_age_seconds,
            'hostname', v_owner.hostname, 'tty', v_owner.tty, 'codebase', v_owner.codebase);
    END IF;
    SELECT * INTO v_hold FROM peer.sd_holds WHERE sd_id = p_sd_id;
    IF FOUND THEN
        RETURN jsonb_build_object('success', false, 'error', 'sd_held', 'held_by', v_hold.held_by, 'reason', v_hold.reason);
    END IF;
    SELECT m.conflict_type, o.sd_id, o.session_id INTO v_conflict
      FROM peer.sd_conflict_matrix m
      JOIN peer.v_active_sessions o ON o.sd_id = CASE p_sd_id WHEN m.sd_id_a THEN m.sd_id_b ELSE m.sd_id_a END
     WHERE (m.sd_id_a = p_sd_id OR m.sd_id_b = p_sd_id) AND m.resolved_at IS NULL
       AND m.conflict_severity = 'blocking' AND o.session_id <> p_session_id AND o.computed_status = 'active' LIMIT 1;
    IF FOUND THEN
        RETURN jsonb_build_object('success', false, 'error', 'conflict', 'conflicting_sd', v_conflict.sd_id,
                                  'conflicting_session', v_conflict.session_id);
    END IF;
    IF v_owner.session_id IS NOT NULL AND v_owner.session_id <> p_session_id THEN
        UPDATE peer.sd_claims SET released_at = v_now, release_reason = 'taken_over', taken_over_by = p_session_id
         WHERE claim_id = v_owner.claim_id;
        UPDATE peer.claude_sessions
           SET sd_id = NULL, claim_id = NULL, claimed_at = NULL, status = 'idle', lost_claim_id = v_owner.claim_id
         WHERE session_id = v_owner.session_id AND claim_id = v_owner.claim_id;
    END IF;
    BEGIN
        INSERT INTO peer.sd_claims (sd_id, session_id, hostname, codebase)
        VALUES (p_sd_id, p_session_id, v_session.hostname, v_session.codebase) RETURNING claim_id INTO v_claim_id;
    EXCEPTION WHEN unique_violation THEN
        RETURN jsonb_build_object('success', false, 'error', 'already_claimed');
    END;
    UPDATE peer.claude_sessions
       SET sd_id = p_sd_id, claim_id = v_claim_id, claimed_at = v_now, heartbeat_at = v_now,
           status = 'active', updated_at = v_now
     WHERE session_id = p_session_id;
    UPDATE peer.strategic_directives_v2 SET is_working_on = true, active_session_id = p_session_id
     WHERE sd_id = p_sd_id;
    INSERT INTO peer.session_lifecycle_events (event_type, session_id, sd_id, claim_id, actor)
    VALUES ('claimed', p_session_id, p_sd_id, v_claim_id, current_user);
    RETURN jsonb_build_object('success', true, 'sd_id', p_sd_id, 'session_id', p_session_id,
                              'claim_id', v_claim_id, 'claimed_at', v_now);
END $$;

CREATE FUNCTION peer.release_sd(p_session_id text, p_reason text DEFAULT 'manual') RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
    v_session peer.claude_sessions;
    v_now timestamptz := clock_timestamp();
BEGIN
    SELECT * INTO v_session FROM peer.claude_sessions WHERE session_id = p_session_id FOR UPDATE;
    IF NOT FOUND OR v_session.sd_id IS NULL THEN
        RETURN jsonb_build_object('success', false, 'error', 'no_claim');
    END IF;
    UPDATE peer.sd_claims SET released_at = v_now, release_reason = p_reason
     WHERE claim_id = v_session.claim_id;
    UPDATE peer.claude_sessions
       SET sd_id = NULL, claim_id = NULL, claimed_at = NULL, status = 'idle', updated_at = v_now,
           released_at = v_now, release_reason = p_reason
     WHERE session_id = p_session_id;
    UPDATE peer.strategic_directives_v2 SET is_working_on = false, active_session_id = NULL
     WHERE sd_id = v_session.sd_id;
    INSERT INTO peer.session_lifecycle_events (event_type, session_id, sd_id, claim_id, actor, reason)
    VALUES ('released', p_session_id, v_session.sd_id, v_session.claim_id, current_user, p_reason);
    RETURN jsonb_build_object('success', true, 'released_sd', v_session.sd_id, 'released_at', v_now);
END $$;

CREATE INDEX ON floor.strategic_directives_v2 (sequence_rank) WHERE status = 'draft';
