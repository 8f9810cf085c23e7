//! What must be so in every snapshot, as queries that find each thing that is not.

use pg_claims_tests::contradictions;
use postgres::{Client, Error, IsolationLevel};

/// Name of the promise, and the rows that break it, as one text each.
type Promise = (&'static str, &'static str);

/// In every snapshot, while all goes on.
const ALWAYS: [Promise; 7] = [
    (
        "an SD has one holder",
        "SELECT string_agg(to_jsonb(s)::text, E'\\n') FROM claude_sessions s
          WHERE sd_id IS NOT NULL GROUP BY sd_id HAVING count(*) > 1",
    ),
    (
        "an SD has one open acquisition, and a session one",
        "SELECT string_agg(to_jsonb(c)::text, E'\\n') FROM sd_claims c
          WHERE released_at IS NULL GROUP BY GROUPING SETS (sd_id, session_id) HAVING count(*) > 1",
    ),
    (
        "of an SD's acquisitions each begins after the one before has ended, with a greater claim id",
        "SELECT acquisition || ' came after ' || before
           FROM (SELECT to_jsonb(c)::text AS acquisition, claimed_at,
                        lag(to_jsonb(c)::text) OVER w AS before, lag(released_at) OVER w AS ended
                   FROM sd_claims c WINDOW w AS (PARTITION BY sd_id ORDER BY claim_id)) c
          WHERE before IS NOT NULL AND (ended IS NULL OR claimed_at < ended)",
    ),
    (
        "of a session's acquisitions each begins after the one before has ended",
        "SELECT acquisition || ' came after ' || before
           FROM (SELECT to_jsonb(c)::text AS acquisition, claimed_at,
                        lag(to_jsonb(c)::text) OVER w AS before, lag(released_at) OVER w AS ended
                   FROM sd_claims c WINDOW w AS (PARTITION BY session_id ORDER BY claim_id)) c
          WHERE before IS NOT NULL AND (ended IS NULL OR claimed_at < ended)",
    ),
    (
        "an acquisition ends after it has begun",
        "SELECT to_jsonb(c)::text FROM sd_claims c WHERE released_at < claimed_at",
    ),
    (
        "nothing ever had to be repaired",
        "SELECT to_jsonb(e)::text FROM session_lifecycle_events e WHERE event_type = 'repaired'",
    ),
    (
        "a session that has not ended is one row of v_active_sessions",
        "SELECT COALESCE(s.session_id, v.session_id)
           FROM (SELECT session_id FROM claude_sessions WHERE status <> 'released') s
           FULL JOIN (SELECT session_id, count(*) FROM v_active_sessions GROUP BY 1) v USING (session_id)
          WHERE s.session_id IS NULL OR v.count IS DISTINCT FROM 1",
    ),
];

/// Once all transactions have ended and all events have their place.
const IN_THE_END: [Promise; 7] = [
    (
        "work was done under its claim",
        "SELECT to_jsonb(w)::text || ' under ' || COALESCE(to_jsonb(c)::text, 'nothing')
           FROM work w LEFT JOIN sd_claims c USING (claim_id)
          WHERE w.sd_id IS DISTINCT FROM c.sd_id OR w.session_id IS DISTINCT FROM c.session_id
             OR w.written_at < c.claimed_at OR w.written_at > c.released_at",
    ),
    (
        // Whoever ends a claim waits for those that have asserted it. The very transaction may end it; a savepoint's
        // rows have another number, but the same time.
        "work was committed before its claim ended",
        "SELECT to_jsonb(w)::text || ' was committed at ' || pg_xact_commit_timestamp(w.xmin)::text
                || ' under ' || to_jsonb(c)::text
           FROM work w JOIN sd_claims c USING (claim_id)
          WHERE pg_xact_commit_timestamp(c.xmin) <> pg_xact_commit_timestamp(w.xmin)
            AND pg_xact_commit_timestamp(w.xmin) > c.released_at",
    ),
    (
        "an event tells of its acquisition",
        "SELECT to_jsonb(e)::text FROM session_lifecycle_events e LEFT JOIN sd_claims c USING (claim_id)
          WHERE e.claim_id IS NOT NULL
            AND (e.sd_id, e.session_id) IS DISTINCT FROM (c.sd_id, c.session_id)",
    ),
    (
        "an event has one place",
        "SELECT to_jsonb(e)::text FROM session_lifecycle_events e
          WHERE 1 <> (SELECT count(*) FROM lifecycle_event_positions p WHERE p.event_id = e.event_id)
          UNION ALL
         SELECT to_jsonb(p)::text FROM lifecycle_event_positions p
          WHERE NOT EXISTS (SELECT FROM session_lifecycle_events e WHERE e.event_id = p.event_id)",
    ),
    (
        "an acquisition's end is told after its beginning, and before the SD's next one",
        "WITH told AS (
             SELECT claim_id,
                    min(position) FILTER (WHERE event_type IN ('claimed', 'switched')) AS began,
                    min(position) FILTER (WHERE event_type IN ('released', 'taken_over', 'reaped')) AS ended
               FROM session_lifecycle_events JOIN lifecycle_event_positions USING (event_id)
              GROUP BY claim_id)
         SELECT claim_id || ' of ' || sd_id || ' began at place ' || began || ', ended at ' || COALESCE(ended::text, 'none')
                || '; the next one began at ' || COALESCE(next::text, 'none')
           FROM (SELECT claim_id, sd_id, began, ended, lead(began) OVER (PARTITION BY sd_id ORDER BY claim_id) AS next
                   FROM sd_claims JOIN told USING (claim_id)) t
          WHERE ended < began OR next < began OR next < ended",
    ),
    (
        "the doctor finds nothing amiss",
        "SELECT name || ': ' || status || ': ' || detail FROM coordination_check()
          WHERE status = 'critical'
             OR status <> 'ok' AND name IN ('backlog', 'tables', 'is_working_on', 'contradictions')",
    ),
    (
        "there is nothing to repair",
        "SELECT to_jsonb(r)::text FROM coordination_repair(true) r",
    ),
];

/// What is broken in one snapshot.
pub fn broken(client: &mut Client, backlog: &str, in_the_end: bool) -> Result<Vec<String>, Error> {
    // An index that lacks a row must not hide it.
    client.batch_execute(
        "SET enable_indexscan = off; SET enable_indexonlyscan = off; SET enable_bitmapscan = off",
    )?;
    let mut snapshot = client
        .build_transaction()
        .isolation_level(IsolationLevel::RepeatableRead)
        .read_only(true)
        .start()?;
    // A truncated table is empty for older snapshots as well, so nobody may truncate one between snapshot and query. LOCK
    // takes no snapshot.
    snapshot.batch_execute(&format!(
        "LOCK TABLE {backlog}, claude_sessions, sd_claims, session_lifecycle_events IN ACCESS SHARE MODE"
    ))?;
    let mut found: Vec<String> = contradictions(&mut snapshot)?;
    for (promise, sql) in &ALWAYS {
        found.extend(snapshot.query(*sql, &[])?.iter().map(|row| tell(promise, row)));
    }
    snapshot.commit()?;
    if in_the_end {
        // Some of these take no snapshot of others; nobody but the worker writes any more.
        for (promise, sql) in &IN_THE_END {
            found.extend(client.query(*sql, &[])?.iter().map(|row| tell(promise, row)));
        }
    }
    Ok(found)
}

fn tell(promise: &str, row: &postgres::Row) -> String {
    format!("it is broken that {promise}: {}", row.get::<_, Option<String>>(0).unwrap_or_default())
}
