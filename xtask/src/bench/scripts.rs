//! What the sides of the comparisons run, in pgbench's language.

/// A session and an SD that no other client touches, each one of the client's share.
fn variables(sds: usize, clients: usize) -> String {
    format!("{}{}", of_share("c", sds, clients), of_share("n", sds, clients))
}

fn of_share(variable: &str, count: usize, clients: usize) -> String {
    let share = count / clients;
    format!("\\set {variable} random(:client_id * {share} + 1, (:client_id + 1) * {share})\n")
}

/// One of so many sessions or SDs.
fn any(count: usize) -> String {
    format!("\\set n random(1, {count})\n")
}

pub fn cycle(sds: usize, clients: usize) -> String {
    variables(sds, clients)
        + "SELECT claim_sd('SD-' || :n, 'session-' || :c);\nSELECT release_sd('session-' || :c);\n"
}

/// The same with one of the functions in PL/pgSQL.
pub fn peer_cycle(claim: &str, sds: usize, clients: usize) -> String {
    variables(sds, clients)
        + &format!(
            "SELECT peer.{claim}('SD-' || :n, 'session-' || :c);\nSELECT peer.release_sd('session-' || :c);\n"
        )
}

/// The writes of a claim and a release as two statements, without any check.
pub fn floor_cycle(sds: usize, clients: usize) -> String {
    let claim = claim_writes("VALUES ('SD-' || :n, 'session-' || :c)", "");
    variables(sds, clients)
        + &claim
        + &release_writes("sd_id = 'SD-' || :n AND released_at IS NULL")
}

pub fn next(sessions: usize, clients: usize) -> String {
    of_share("c", sessions, clients)
        + "SELECT claim_next_sd('session-' || :c);\nSELECT release_sd('session-' || :c);\n"
}

/// The same writes for the first SD of a queue that nobody has locked.
pub fn floor_next(sessions: usize, clients: usize) -> String {
    let pick = "pick AS (
        SELECT sd_id FROM floor.strategic_directives_v2
         WHERE status = 'draft' AND NOT is_working_on
         ORDER BY sequence_rank LIMIT 1 FOR UPDATE SKIP LOCKED),";
    let claim = claim_writes("SELECT sd_id, 'session-' || :c FROM pick", pick);
    let held = "claim_id = (SELECT claim_id FROM floor.claude_sessions WHERE session_id = 'session-' || :c)";
    format!("{}{claim}{}", of_share("c", sessions, clients), release_writes(held))
}

fn claim_writes(row: &str, before: &str) -> String {
    one_line(&format!(
        "WITH {before} h AS (
            INSERT INTO floor.sd_claims (sd_id, session_id) {row} RETURNING claim_id, sd_id, claimed_at),
         e AS (
            INSERT INTO floor.session_lifecycle_events (event_type, session_id, sd_id, claim_id, actor)
            SELECT 'claimed', 'session-' || :c, sd_id, claim_id, current_user FROM h),
         b AS (
            UPDATE floor.strategic_directives_v2 d
               SET is_working_on = true, active_session_id = 'session-' || :c
              FROM h WHERE d.sd_id = h.sd_id)
         UPDATE floor.claude_sessions s
            SET sd_id = h.sd_id, claim_id = h.claim_id, claimed_at = h.claimed_at, status = 'active',
                heartbeat_at = clock_timestamp(), updated_at = clock_timestamp()
           FROM h WHERE s.session_id = 'session-' || :c"
    ))
}

fn release_writes(which: &str) -> String {
    one_line(&format!(
        "WITH h AS (
            UPDATE floor.sd_claims SET released_at = clock_timestamp(), release_reason = 'manual'
             WHERE {which} RETURNING claim_id, sd_id),
         e AS (
            INSERT INTO floor.session_lifecycle_events (event_type, session_id, sd_id, claim_id, actor, reason)
            SELECT 'released', 'session-' || :c, sd_id, claim_id, current_user, 'manual' FROM h),
         b AS (
            UPDATE floor.strategic_directives_v2 d SET is_working_on = false, active_session_id = NULL
              FROM h WHERE d.sd_id = h.sd_id)
         UPDATE floor.claude_sessions
            SET sd_id = NULL, claim_id = NULL, claimed_at = NULL, status = 'idle',
                released_at = clock_timestamp(), release_reason = 'manual', updated_at = clock_timestamp()
          WHERE session_id = 'session-' || :c"
    ))
}

/// Ends all stale claims in the sessions' table, with an event for each.
pub fn floor_reaping_of_sessions() -> String {
    one_line(&format!(
        "WITH s AS ({})
         INSERT INTO floor.session_lifecycle_events (event_type, session_id, actor, reason)
         SELECT 'reaped', session_id, current_user, 'reaped' FROM s",
        floor_end_of_stale("WHERE", "session_id")
    ))
}

/// Writes all rows that the reaper writes: sessions, acquisitions, SDs, two events each.
pub fn floor_reaping() -> String {
    one_line(&format!(
        "WITH s AS ({}),
         e AS (
            INSERT INTO floor.session_lifecycle_events (event_type, session_id, sd_id, claim_id, actor, reason)
            SELECT event_type, session_id, sd_id, claim_id, current_user, 'reaped'
              FROM s CROSS JOIN unnest(array['stale', 'reaped']) event_type),
         h AS (
            UPDATE floor.sd_claims c SET released_at = clock_timestamp(), release_reason = 'reaped'
              FROM s WHERE s.claim_id = c.claim_id)
         UPDATE floor.strategic_directives_v2 d SET is_working_on = false, active_session_id = NULL
           FROM s WHERE d.sd_id = s.sd_id",
        floor_end_of_stale(
            "FROM floor.claude_sessions held WHERE held.session_id = s.session_id AND",
            "s.session_id, held.sd_id, held.claim_id"
        )
    ))
}

fn floor_end_of_stale(joined: &str, returning: &str) -> String {
    format!(
        "UPDATE floor.claude_sessions s
            SET sd_id = NULL, claim_id = NULL, claimed_at = NULL, status = 'idle', released_at = clock_timestamp(),
                release_reason = 'reaped', updated_at = clock_timestamp()
          {joined} s.sd_id IS NOT NULL AND s.heartbeat_at < clock_timestamp() - interval '5 minutes'
      RETURNING {returning}"
    )
}

fn one_line(statement: &str) -> String {
    let words: Vec<&str> = statement.split_whitespace().collect();
    words.join(" ") + ";\n"
}

pub fn heartbeat(sessions: usize) -> String {
    any(sessions) + "SELECT update_session_heartbeat('session-' || :n);\n"
}

/// A function of the server's own that does next to nothing with the same argument.
pub fn no_op(sessions: usize) -> String {
    any(sessions) + "SELECT pg_catalog.octet_length('session-' || :n);\n"
}

pub fn floor_heartbeat(sessions: usize) -> String {
    any(sessions)
        + "UPDATE floor.claude_sessions SET heartbeat_at = clock_timestamp() WHERE session_id = 'session-' || :n;\n"
}

/// A claim on an SD that another session holds: of the last in the table.
pub fn refusal(sds: usize, held: usize) -> String {
    format!("\\set n random({}, {sds})\n", sds - held + 1)
        + "SELECT claim_sd('SD-' || :n, 'session-1');\n"
}

pub fn floor_select(sds: usize, held: usize) -> String {
    format!("\\set n random({}, {sds})\n", sds - held + 1)
        + "SELECT * FROM floor.claude_sessions WHERE session_id = 'session-' || :n;\n"
}
