//! Whether sessions, claim history, backlog and audit tell one story.

use postgres::{Error, GenericClient};

/// One row for each thing on which they disagree.
const DISAGREEMENTS: &str = "
    SELECT 'session without open claim: ' || s.session_id
      FROM claude_sessions s
     WHERE s.sd_id IS NOT NULL
       AND NOT EXISTS (SELECT FROM sd_claims c
                        WHERE c.claim_id = s.claim_id AND c.sd_id = s.sd_id
                          AND c.session_id = s.session_id AND c.released_at IS NULL)
    UNION ALL
    SELECT 'open claim without session: ' || c.claim_id
      FROM sd_claims c
     WHERE c.released_at IS NULL
       AND NOT EXISTS (SELECT FROM claude_sessions s WHERE s.claim_id = c.claim_id)
    UNION ALL
    SELECT 'backlog disagrees: ' || d.sd_id
      FROM v_directives d
      LEFT JOIN claude_sessions s ON s.sd_id = d.sd_id
     WHERE d.is_working_on IS DISTINCT FROM (s.session_id IS NOT NULL)
        OR d.active_session_id IS DISTINCT FROM s.session_id
    UNION ALL
    SELECT 'claimed though finished: ' || d.sd_id
      FROM v_directives d JOIN claude_sessions s ON s.sd_id = d.sd_id
     WHERE d.is_terminal
    UNION ALL
    SELECT 'claimed but not in the backlog: ' || s.sd_id
      FROM claude_sessions s
     WHERE s.sd_id IS NOT NULL
       AND NOT EXISTS (SELECT FROM v_directives d WHERE d.sd_id = s.sd_id)
    UNION ALL
    -- Every acquisition has one event that begins it and, once ended, one that ends it
    -- (a switch begins and ends at once).
    SELECT CASE WHEN COALESCE(e.begins, 0) <> 1 THEN 'claim without its begin in the audit: ' || c.claim_id
                ELSE 'claim and audit disagree on its end: ' || c.claim_id END
      FROM sd_claims c
      LEFT JOIN (SELECT claim_id,
                        count(*) FILTER (WHERE event_type IN ('claimed', 'switched')) AS begins,
                        count(*) FILTER (WHERE event_type IN ('released', 'taken_over', 'reaped')) AS ends
                   FROM session_lifecycle_events GROUP BY claim_id) e ON e.claim_id = c.claim_id
     WHERE COALESCE(e.begins, 0) <> 1
        OR c.release_reason IS DISTINCT FROM 'switched'
           AND (c.released_at IS NOT NULL)::int <> COALESCE(e.ends, 0)";

/// Asks the database for everything on which sessions, history, backlog and audit disagree. An empty list means that they
/// agree.
pub fn contradictions(client: &mut impl GenericClient) -> Result<Vec<String>, Error> {
    Ok(client.query(DISAGREEMENTS, &[])?.iter().map(|row| row.get(0)).collect())
}
