//! The queue when it is long, and when many draw from it.

use std::thread;
use std::time::Duration;

use pg_claims_tests::{TestDb, json};
use postgres::Client;

use crate::plans::Planner;
use crate::support::*;

const ELIGIBLE: usize = 1_000;

/// A database with so many finished SDs, and after them [`ELIGIBLE`] that can be claimed.
fn with_finished(finished: usize) -> (TestDb, Client) {
    let db = TestDb::new();
    let mut c = db.connect();
    c.batch_execute(&format!(
        "ALTER TABLE strategic_directives_v2 DISABLE TRIGGER USER;
         INSERT INTO strategic_directives_v2 (sd_id, priority, status)
         SELECT 'done-' || n, 'critical', 'completed' FROM generate_series(1, {finished}) n;
         INSERT INTO strategic_directives_v2 (sd_id, priority, sequence_rank)
         SELECT 'SD-' || n, 'high', n FROM generate_series(1, {ELIGIBLE}) n;
         ALTER TABLE strategic_directives_v2 ENABLE TRIGGER USER"
    ))
    .unwrap();
    c.batch_execute("VACUUM ANALYZE").unwrap();
    register(&mut c, "s1");
    (db, c)
}

#[test]
fn what_a_claim_from_the_queue_reads_does_not_grow_with_the_finished_ones() {
    let read = |finished: usize| {
        let (db, mut c) = with_finished(finished);
        let index =
            value(&mut c, "SELECT 'strategic_directives_v2_queue_idx'::regclass::oid").unwrap();
        let mut planner = Planner::new(&db, "force_custom_plan", "strategic_directives_v2");
        let mut assert_by_index = |call: &str| {
            let plans = planner.plans_of(call);
            let choosing: Vec<_> =
                plans.iter().filter(|plan| plan.contains(&format!(":indexid {index} "))).collect();
            assert_eq!(choosing.len(), 1, "{call}: {}", plans.join("\n\n"));
        };
        // From a backlog of somebody else's the queue chooses by a statement.
        let owner = value(&mut c, "SELECT current_user").unwrap();
        let other = db.role("backlog_owner");
        c.batch_execute(&format!("ALTER TABLE strategic_directives_v2 OWNER TO {other}")).unwrap();
        assert_by_index("SELECT claim_next_sd('s1')");
        release(&mut c, "s1");
        c.batch_execute(&format!("ALTER TABLE strategic_directives_v2 OWNER TO {owner}")).unwrap();
        assert_by_index("SELECT * FROM sd_next()");
        // The first makes the plans and finds the pages. Later, too, a connection reads the catalog anew, and
        // plans again, after a vacuum, or where the other tests of this server have sent it more invalidations
        // than it took in. What grows does so for each of them: hence the least.
        let mut all = Vec::new();
        for n in 1..=10 {
            let pages = pages(&mut c, "claim_next_sd('s1')");
            let held = value(&mut c, "SELECT sd_id FROM claude_sessions WHERE session_id = 's1'");
            assert_eq!(held, Some(format!("SD-{n}")));
            c.batch_execute(
                "UPDATE strategic_directives_v2 SET status = 'completed' WHERE is_working_on",
            )
            .unwrap();
            all.push(pages);
        }
        eprintln!("{finished} finished: {all:?} pages");
        all.into_iter().min().unwrap()
    };
    let (few, many) = (read(1_000), read(1_000_000));
    // An index of a million keys is a level or two higher, which shows at each look at it.
    assert!(many <= few + 30, "{few} pages with a thousand finished SDs, {many} with a million");
}

const CLIENTS: usize = 50;
const SDS: usize = 10_000;

#[test]
fn fifty_clients_drain_ten_thousand_each_once_and_in_order() {
    let db = TestDb::new();
    let mut c = db.connect();
    // Of ten SDs two wait for others of the ten, which may come before them or after; and of a hundred one
    // waits for one that is less urgent.
    c.batch_execute(&format!(
        "INSERT INTO strategic_directives_v2 (sd_id, priority, sequence_rank, dependencies)
         SELECT 'SD-' || n, ('{{critical,high,medium,low}}'::text[])[1 + n / 10 % 4], n * 31 % 1000,
                CASE WHEN n % 10 = 3 THEN jsonb_build_array('SD-' || n - 1)
                     WHEN n % 10 = 6 THEN jsonb_build_array('SD-' || n - 3, 'SD-' || n - 1)
                     WHEN n % 100 = 9 THEN jsonb_build_array('SD-' || n + 10) ELSE '[]' END
           FROM generate_series(1, {SDS}) n;
         ANALYZE"
    ))
    .unwrap();
    thread::scope(|scope| {
        for n in 0..CLIENTS {
            let db = &db;
            scope.spawn(move || drain(&mut db.connect(), &format!("client-{n}")));
        }
    });
    let counts = "SELECT count(*) || ' ' || count(DISTINCT sd_id) FROM sd_claims WHERE release_reason = 'sd_completed'";
    assert_eq!(value(&mut c, counts), Some(format!("{SDS} {SDS}")));
    assert_eq!(count(&mut c, "SELECT count(*) FROM sd_claims"), SDS as i64);
    let too_early = "SELECT count(*) FROM strategic_directives_v2 d
              CROSS JOIN LATERAL jsonb_array_elements_text(d.dependencies) k (key)
               JOIN sd_claims later ON later.sd_id = d.sd_id JOIN sd_claims earlier ON earlier.sd_id = k.key
              WHERE later.claimed_at < earlier.released_at";
    assert_eq!(count(&mut c, too_early), 0);
    // Of those that wait for nothing, each was claimed when all before it had been, or were just being by
    // the other clients.
    let furthest = "SELECT max(position - turn) FROM (
             SELECT row_number() OVER (ORDER BY q.priority_order, d.sequence_rank, d.created_at, d.sd_id) AS position,
                    row_number() OVER (ORDER BY h.claim_id) AS turn
               FROM strategic_directives_v2 d JOIN v_directives q USING (sd_id) JOIN sd_claims h USING (sd_id)
              WHERE d.dependencies = '[]') t";
    let furthest = count(&mut c, furthest);
    eprintln!("furthest ahead of its turn: {furthest}");
    assert!(furthest < CLIENTS as i64, "{furthest}");
    // The comparison looks for the events of each claim.
    c.batch_execute("CREATE INDEX ON session_lifecycle_events (claim_id); ANALYZE").unwrap();
    assert_in_step(&mut c);
}

/// Claims and completes until nothing is left.
fn drain(client: &mut Client, session: &str) {
    register(client, session);
    loop {
        let answer = json(client, "SELECT claim_next_sd($1)", &[&session]);
        if answer["success"] == true {
            let sd = answer["sd_id"].as_str().unwrap();
            client
                .execute(
                    "UPDATE strategic_directives_v2 SET status = 'completed' WHERE sd_id = $1",
                    &[&sd],
                )
                .unwrap();
            continue;
        }
        assert_eq!(answer["error"], "queue_empty", "{answer}");
        let left = ["claimed", "busy", "blocked_by_dependency", "conflict", "held"];
        if left.iter().all(|kind| answer[*kind] == 0) {
            return;
        }
        // The others have what is left.
        thread::sleep(Duration::from_millis(5));
    }
}
