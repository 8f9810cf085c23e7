//! The queue as it is shown: what keeps an SD from being claimed, and how it reads.

use pg_claims_tests::{TestDb, json, sqlstate};
use postgres::Client;
use serde_json::Value;

use crate::support::*;

/// A database whose backlog is what `rows` says: `(sd_id, priority, rank, track, dependencies)`.
pub fn with_backlog(rows: &str) -> (TestDb, Client) {
    let db = TestDb::new();
    let mut c = db.connect();
    c.batch_execute(&format!(
        "INSERT INTO strategic_directives_v2 (sd_id, priority, sequence_rank, track, dependencies, title)
         SELECT sd_id, priority, rank::integer, track, COALESCE(dependencies::jsonb, '[]'), 'Title of ' || sd_id
           FROM (VALUES {rows}) v (sd_id, priority, rank, track, dependencies)"
    ))
    .unwrap();
    for session in ["s1", "s2", "s3"] {
        register(&mut c, session);
    }
    (db, c)
}

pub fn next(c: &mut Client, session: &str) -> Value {
    json(c, "SELECT claim_next_sd($1)", &[&session])
}

pub fn given(c: &mut Client, session: &str) -> String {
    let answer = next(c, session);
    assert_eq!(answer["success"], true, "{answer}");
    answer["sd_id"].as_str().unwrap().to_owned()
}

pub fn texts(c: &mut Client, sql: &str) -> Vec<String> {
    c.query(sql, &[]).unwrap().iter().map(|row| row.get(0)).collect()
}

pub fn queue(c: &mut Client) -> Vec<String> {
    texts(c, "SELECT sd_id FROM v_sd_next")
}

fn eligibility(c: &mut Client, sd: &str) -> (String, Option<String>) {
    let row =
        c.query_one("SELECT eligibility, reason FROM v_sd_next WHERE sd_id = $1", &[&sd]).unwrap();
    (row.get(0), row.get(1))
}

fn assert_blocked(c: &mut Client, sd: &str, reason: &str) {
    let expected = ("blocked_by_dependency".to_owned(), Some(reason.to_owned()));
    assert_eq!(eligibility(c, sd), expected, "{sd}");
}

pub fn finish(c: &mut Client, sd: &str) {
    c.execute("UPDATE strategic_directives_v2 SET status = 'completed' WHERE sd_id = $1", &[&sd])
        .unwrap();
}

#[test]
fn an_sd_waits_for_those_it_depends_on() {
    let (_db, mut c) = with_backlog(
        r#"('SD-1', 'critical', NULL, NULL, '["SD-2", "SD-3"]'), ('SD-2', 'low', NULL, NULL, NULL),
           ('SD-3', 'low', NULL, NULL, NULL), ('SD-4', 'critical', NULL, NULL, 'null')"#,
    );
    assert_blocked(&mut c, "SD-1", "waits for SD-2; waits for SD-3");
    assert_eq!(eligibility(&mut c, "SD-4"), ("available".into(), None));
    assert_eq!(given(&mut c, "s1"), "SD-4");
    // A dependency that is claimed is not finished.
    assert_eq!(given(&mut c, "s2"), "SD-2");
    finish(&mut c, "SD-3");
    assert_blocked(&mut c, "SD-1", "waits for SD-2");
    c.batch_execute("UPDATE strategic_directives_v2 SET status = 'cancelled' WHERE sd_id = 'SD-2'")
        .unwrap();
    assert_eq!(given(&mut c, "s2"), "SD-1");
    // Whoever names an SD knows what they do.
    c.batch_execute("UPDATE strategic_directives_v2 SET status = 'draft' WHERE sd_id = 'SD-2'")
        .unwrap();
    release(&mut c, "s2");
    granted(&mut c, "SD-1", "s2");
}

#[test]
fn dependencies_that_say_nothing_known_keep_an_sd_and_are_told() {
    let (_db, mut c) = with_backlog(
        r#"('typo', 'low', NULL, NULL, '["SD-1", "no such SD"]'), ('scalar', 'low', NULL, NULL, '"SD-1"'),
           ('object', 'low', NULL, NULL, '{"on": "SD-1"}'), ('nested', 'low', NULL, NULL, '[{"on": "SD-1"}]'),
           ('null', 'low', NULL, NULL, '[null]'), ('SD-1', 'low', NULL, NULL, NULL)"#,
    );
    finish(&mut c, "SD-1");
    assert_blocked(&mut c, "typo", "waits for \"no such SD\", which the backlog does not have");
    assert_blocked(&mut c, "scalar", r#"its dependencies are not a list of keys: "SD-1""#);
    assert_blocked(&mut c, "object", r#"its dependencies are not a list of keys: {"on": "SD-1"}"#);
    assert_blocked(
        &mut c,
        "nested",
        r#"waits for "{"on": "SD-1"}", which the backlog does not have"#,
    );
    assert_blocked(&mut c, "null", "waits for null, which is no key");
    let answer = next(&mut c, "s1");
    assert_eq!(answer["blocked_by_dependency"], 5, "{answer}");
}

#[test]
fn a_circle_is_reported_and_not_looped_over() {
    let (_db, mut c) = with_backlog(
        r#"('A', 'low', NULL, NULL, '["B"]'), ('B', 'low', NULL, NULL, '["C"]'), ('C', 'low', NULL, NULL, '["A"]'),
           ('self', 'low', NULL, NULL, '["self"]'), ('behind', 'low', NULL, NULL, '["A"]')"#,
    );
    for sd in ["A", "B", "C"] {
        assert_blocked(&mut c, sd, "waits for itself: A → B → C → A");
    }
    assert_blocked(&mut c, "self", "waits for itself: self → self");
    assert_blocked(&mut c, "behind", "waits for A");
    assert_eq!(
        texts(&mut c, "SELECT sd_id FROM dependency_cycles() ORDER BY 1"),
        ["A", "B", "C", "self"]
    );
    let answer = next(&mut c, "s1");
    assert_eq!(
        answer["message"],
        "no SD can be claimed now: 5 blocked by dependencies (4 of them in a circle)"
    );
    assert!(answer["hint"].as_str().unwrap().contains("circle"), "{answer}");
    c.batch_execute("UPDATE strategic_directives_v2 SET dependencies = '[]' WHERE sd_id = 'C'")
        .unwrap();
    assert_eq!(given(&mut c, "s1"), "C");
    assert_eq!(texts(&mut c, "SELECT sd_id FROM dependency_cycles()"), ["self"]);
}

#[test]
fn a_parent_waits_for_its_parts() {
    let (_db, mut c) = with_backlog(
        "('parent', 'critical', NULL, NULL, NULL), ('part 1', 'low', NULL, NULL, NULL), ('part 2', 'low', NULL, NULL, NULL)",
    );
    c.batch_execute(
        "UPDATE strategic_directives_v2 SET parent_sd_id = 'parent' WHERE sd_id LIKE 'part %'",
    )
    .unwrap();
    assert_blocked(&mut c, "parent", "waits for its part part 1; waits for its part part 2");
    assert_eq!(given(&mut c, "s1"), "part 1");
    finish(&mut c, "part 1");
    assert_eq!(given(&mut c, "s2"), "part 2");
    assert_eq!(next(&mut c, "s1")["error"], "queue_empty");
    finish(&mut c, "part 2");
    assert_eq!(given(&mut c, "s1"), "parent");
    // A part that waits for the whole is a circle.
    c.batch_execute(
        r#"INSERT INTO strategic_directives_v2 (sd_id, parent_sd_id, dependencies)
           VALUES ('part 3', 'whole', '["whole"]'), ('whole', NULL, '[]')"#,
    )
    .unwrap();
    assert_blocked(&mut c, "part 3", "waits for itself: part 3 → whole → part 3");
}

#[test]
fn an_sd_that_is_stopped_or_in_conflict_is_passed_over() {
    let (_db, mut c) = with_backlog(
        "('SD-1', 'critical', NULL, NULL, NULL), ('SD-2', 'high', NULL, NULL, NULL), ('SD-3', 'low', NULL, NULL, NULL)",
    );
    json(&mut c, "SELECT hold_sd('SD-1', 'wait for legal')", &[]);
    json(&mut c, "SELECT declare_conflict('SD-2', 'SD-3', 'same_files')", &[]);
    granted(&mut c, "SD-3", "s1");
    assert_eq!(
        eligibility(&mut c, "SD-1"),
        ("held".into(), Some("held by postgres: wait for legal".into()))
    );
    let conflict = "in conflict (same_files) with SD-3, which s1 has claimed";
    assert_eq!(eligibility(&mut c, "SD-2"), ("conflict".into(), Some(conflict.into())));
    let answer = next(&mut c, "s2");
    assert_eq!(answer["message"], "no SD can be claimed now: 1 claimed, 1 in conflict, 1 held");
    assert_eq!(
        (&answer["claimed"], &answer["conflict"], &answer["held"]),
        (&1.into(), &1.into(), &1.into())
    );
    age_heartbeat(&mut c, "s1", "1 hour");
    assert_eq!(given(&mut c, "s2"), "SD-2");
}

#[test]
fn a_stale_owner_s_sd_is_in_the_queue_and_a_guarded_one_s_is_not() {
    let (db, mut c) = with_backlog("('SD-1', 'low', NULL, NULL, NULL)");
    let held = granted(&mut c, "SD-1", "s1");
    assert_eq!(eligibility(&mut c, "SD-1"), ("claimed".into(), Some("claimed by s1".into())));
    age_heartbeat(&mut c, "s1", "1 hour");
    let reason = "claimed by s1, which is stale: a claim takes over";
    assert_eq!(eligibility(&mut c, "SD-1"), ("available".into(), Some(reason.into())));
    let mut guarding = db.connect();
    guarding.batch_execute("BEGIN").unwrap();
    guarding.query("SELECT assert_claim('SD-1', 's1', $1)", &[&held]).unwrap();
    let reason = "claimed by s1, stale, with a transaction open under the claim";
    assert_eq!(eligibility(&mut c, "SD-1"), ("claimed".into(), Some(reason.into())));
    assert_eq!(next(&mut c, "s2")["claimed"], 1);
    guarding.batch_execute("COMMIT").unwrap();
    c.batch_execute("SET pg_claims.reclaim_delay = '2h'").unwrap();
    let reason = "claimed by s1, stale, and kept for it";
    assert_eq!(eligibility(&mut c, "SD-1"), ("claimed".into(), Some(reason.into())));
    c.batch_execute("RESET pg_claims.reclaim_delay").unwrap();
    let answer = next(&mut c, "s2");
    assert_eq!(answer["took_over"]["session_id"], "s1", "{answer}");
}

#[test]
fn a_conflict_with_an_sd_that_is_kept_for_a_stale_session_still_counts() {
    let (_db, mut c) = coordinated();
    json(&mut c, "SELECT declare_conflict('SD-1', 'SD-2', 'same_files')", &[]);
    granted(&mut c, "SD-1", "s1");
    age_heartbeat(&mut c, "s1", "1 hour");
    c.batch_execute("SET pg_claims.reclaim_delay = '2h'").unwrap();
    // A heartbeat would bring the session back, and then both were claimed.
    assert_eq!(claim(&mut c, "SD-2", "s2")["error"], "conflict");
    c.batch_execute("RESET pg_claims.reclaim_delay").unwrap();
    granted(&mut c, "SD-2", "s2");
}

/// Makes what a session holds be claimed that much earlier, which no session can.
fn age_claim(c: &mut Client, session: &str, by: &str) {
    c.batch_execute("SET session_replication_role = replica").unwrap();
    c.execute(
        "UPDATE claude_sessions SET claimed_at = claimed_at - $2::text::interval WHERE session_id = $1",
        &[&session, &by],
    )
    .unwrap();
    c.batch_execute("RESET session_replication_role").unwrap();
}

pub fn register_at(c: &mut Client, session: &str, host: &str) {
    json(
        c,
        "SELECT register_session(p_session_id => $1, p_hostname => $2, p_codebase => 'repo')",
        &[&session, &host],
    );
}

#[test]
fn the_view_tells_of_the_owner_and_colours_its_heartbeat() {
    let (_db, mut c) = with_backlog("('SD-1', 'low', NULL, NULL, NULL)");
    register_at(&mut c, "a1", "alpha");
    granted(&mut c, "SD-1", "a1");
    age_claim(&mut c, "a1", "10 minutes 59 seconds");
    for (age, human, color) in [
        (59, "59s ago", "green"),
        (60, "1m ago", "yellow"),
        (179, "2m ago", "yellow"),
        (180, "3m ago", "red"),
    ] {
        c.execute(
            "UPDATE claude_sessions SET heartbeat_at = clock_timestamp() - make_interval(secs => $1) WHERE session_id = 'a1'",
            &[&(f64::from(age) + 0.05)],
        )
        .unwrap();
        let row = c
            .query_one(
                "SELECT claimed_by, hostname, codebase, claim_minutes, trunc(heartbeat_age_seconds)::integer,
                        heartbeat_age_human, heartbeat_color FROM v_sd_next",
                &[],
            )
            .unwrap();
        assert_eq!(row.get::<_, String>(0), "a1");
        assert_eq!(row.get::<_, String>(1), "alpha");
        assert_eq!(row.get::<_, String>(2), "repo");
        assert_eq!(row.get::<_, i32>(3), 10);
        assert_eq!(row.get::<_, i32>(4), age);
        assert_eq!(row.get::<_, String>(5), human);
        assert_eq!(row.get::<_, String>(6), color, "{age}");
    }
}

#[test]
fn the_lines_read_to_the_letter() {
    let (db, mut c) = with_backlog(
        r#"('SD-XXX-001', 'critical', NULL, 'A', NULL), ('SD-2', 'high', NULL, 'B', NULL),
           ('SD-3', 'low', NULL, 'A', '["SD-2"]'), ('SD-4', 'low', NULL, NULL, NULL)"#,
    );
    c.batch_execute(
        "UPDATE strategic_directives_v2 SET title = 'Feature Title that is too long' WHERE sd_id = 'SD-XXX-001'",
    )
    .unwrap();
    register(&mut c, "session_abc123_tty1_1234");
    granted(&mut c, "SD-XXX-001", "session_abc123_tty1_1234");
    age_claim(&mut c, "session_abc123_tty1_1234", "10 minutes 5 seconds");
    age_heartbeat(&mut c, "session_abc123_tty1_1234", "30 seconds");
    assert_eq!(
        texts(&mut c, "SELECT * FROM sd_next(p_width => 39)"),
        [
            "TRACK A",
            "CLAIMED [SD-XXX-001] - Feature Title...",
            "        └─ Claimed by session_abc1... (10m) (heartbeat: 30s ago)",
            "BLOCKED [SD-3] - Title of SD-3",
            "        └─ Waits for SD-2",
            "",
            "TRACK B",
            "READY   [SD-2] - Title of SD-2",
            "",
            "NO TRACK",
            "READY   [SD-4] - Title of SD-4",
        ]
    );
    assert_eq!(
        texts(&mut c, "SELECT * FROM sd_next('A', 1, true, 'session_abc123_tty1_1234')"),
        [
            "TRACK A",
            "\u{1b}[33mCLAIMED\u{1b}[0m [SD-XXX-001] - Feature Title that is too long",
            "        └─ Claimed by session_abc1... (10m) \u{1b}[32m(heartbeat: 30s ago)\u{1b}[0m ← you",
            "",
            "The first 1; p_limit shows more.",
        ]
    );
    assert_eq!(
        texts(&mut c, "SELECT * FROM sd_next('Z')"),
        ["the backlog has no unfinished SD in track Z"]
    );
    // Whoever may see may see this, and nobody else.
    let viewer = db.role("viewer");
    json(&mut c, "SELECT grant_coordination($1, 'viewer')", &[&viewer]);
    let mut v = db.connect_as(&viewer);
    assert_eq!(texts(&mut v, "SELECT * FROM sd_next('B')").len(), 2);
    assert_eq!(queue(&mut v).len(), 4);
    assert_eq!(
        texts(&mut v, "SELECT reason FROM v_sd_next WHERE sd_id = 'SD-3'"),
        ["waits for SD-2"]
    );
    let error = v.query("SELECT claim_next_sd('s1')", &[]).unwrap_err();
    assert_eq!(sqlstate(&error), "42501");
}

#[test]
fn a_bound_backlog_has_the_same_queue() {
    let (_db, mut c) = coordinated();
    c.batch_execute(
        r#"CREATE SCHEMA product;
           CREATE TYPE product.urgency AS ENUM ('High', 'low', 'none', 'critical');
           CREATE TYPE product.state AS ENUM ('open', 'Completed', 'cancelled');
           CREATE TABLE product.items (
               id uuid PRIMARY KEY DEFAULT gen_random_uuid(), legacy varchar(20) UNIQUE, headline text,
               state product.state NOT NULL DEFAULT 'open', urgency product.urgency, needs text[],
               part_of text, noted timestamp);
           INSERT INTO product.items (legacy, urgency, needs, part_of, noted) VALUES
               ('L-1', 'low', NULL, NULL, '2026-01-02'), ('L-2', 'low', '{}', NULL, '2026-01-01'),
               ('L-3', 'critical', '{L-1}', NULL, NULL), ('L-4', 'High', '{}', NULL, NULL),
               ('L-5', 'none', NULL, 'L-4', NULL), ('L-6', NULL, '{L-6}', NULL, NULL);
           SELECT bind_directives('product.items', '{id,legacy}', p_title_column => 'headline',
                                  p_status_column => 'state', p_priority_column => 'urgency',
                                  p_dependencies_column => 'needs', p_parent_column => 'part_of',
                                  p_created_at_column => 'noted')"#,
    )
    .unwrap();
    let order = "SELECT i.legacy || ' ' || q.eligibility FROM v_sd_next q JOIN product.items i ON i.id = q.sd_id::uuid ORDER BY queue_position";
    assert_eq!(
        texts(&mut c, order)[..4],
        [
            "L-3 blocked_by_dependency",
            "L-4 blocked_by_dependency",
            "L-2 available",
            "L-1 available"
        ]
    );
    let id = |c: &mut Client, legacy: &str| {
        value(c, &format!("SELECT id FROM product.items WHERE legacy = '{legacy}'")).unwrap()
    };
    let (l1, l2, l6) = (id(&mut c, "L-1"), id(&mut c, "L-2"), id(&mut c, "L-6"));
    assert_eq!(given(&mut c, "s1"), l2);
    assert_eq!(given(&mut c, "s2"), l1);
    let l5 = id(&mut c, "L-5");
    assert_blocked(&mut c, &l6, &format!("waits for itself: {l6} → {l6}"));
    let l4 = id(&mut c, "L-4");
    assert_blocked(&mut c, &l4, &format!("waits for its part {l5}"));
    c.batch_execute("UPDATE product.items SET state = 'Completed' WHERE legacy IN ('L-1', 'L-5')")
        .unwrap();
    assert_eq!(texts(&mut c, order)[..2], ["L-3 available", "L-4 available"]);
    // A value that the enum has got since counts by its name.
    c.batch_execute("ALTER TYPE product.state ADD VALUE 'DEFERRED'").unwrap();
    c.batch_execute("UPDATE product.items SET state = 'DEFERRED' WHERE legacy = 'L-3'").unwrap();
    assert_eq!(given(&mut c, "s2"), l4);
    let indexes = "SELECT indexdef FROM pg_indexes WHERE tablename = 'items' AND indexname LIKE 'pg_claims_queue_%'";
    assert_eq!(texts(&mut c, indexes).len(), 1);
    assert_in_step(&mut c);
    release(&mut c, "s1");
    release(&mut c, "s2");
    c.batch_execute("SELECT unbind_directives()").unwrap();
    assert_eq!(texts(&mut c, indexes).len(), 0);
    assert_eq!(given(&mut c, "s3"), "SD-1");
}

#[test]
fn what_nobody_holds_has_no_ages() {
    let (_db, mut c) = coordinated();
    let ages = "SELECT concat(claim_minutes, heartbeat_age_seconds, heartbeat_age_human, heartbeat_color, claimed_by)
                  FROM v_sd_next WHERE sd_id = 'SD-1'";
    assert_eq!(value(&mut c, ages).as_deref(), Some(""));
    let ages = "SELECT concat(claim_duration_minutes, progress_age_seconds) FROM v_active_sessions WHERE session_id = 's1'";
    assert_eq!(value(&mut c, ages).as_deref(), Some(""));
}

#[test]
fn odd_tables_are_bound_and_odd_rows_keep_nobody_from_the_rest() {
    let (_db, mut c) = coordinated();
    c.batch_execute(
        r#"CREATE TYPE state AS ENUM ('open', 'Completed');
           CREATE DOMAIN a_state AS state;
           CREATE TABLE odd (id text PRIMARY KEY, queue integer UNIQUE, parent uuid UNIQUE, status a_state,
                             title text COLLATE "C", dependencies json, created_at date, parent_sd_id text);
           INSERT INTO odd (id, queue, status, dependencies, created_at, parent_sd_id) VALUES
               ('nul', 1, 'open', '["\u0000"]', '5874897-01-01', NULL), ('half', 2, 'open', '["\ud800"]', '-infinity', NULL),
               ('huge', 3, 'open', '[1e999999]', 'infinity', NULL), ('fine', 4, NULL, '["done"]', '2026-01-01', repeat('x', 100000)),
               ('done', 5, 'Completed', NULL, NULL, NULL), ('1', 6, 'Completed', NULL, NULL, NULL), ('part', 7, 'open', NULL, NULL, '1');
           SELECT bind_directives('odd', '{id,queue,parent}')"#,
    )
    .unwrap();
    assert_eq!(given(&mut c, "s1"), "fine");
    assert_blocked(&mut c, "huge", "waits for \"1e+999999\", which the backlog does not have");
    assert_eq!(queue(&mut c), ["half", "fine", "huge", "nul", "part"]);
    // '1' is the id of one and the number of another: the part is one of the former's.
    assert_eq!(
        texts(&mut c, "SELECT sd_id FROM v_sd_blockers WHERE kind = 'child'"),
        Vec::<String>::new()
    );
    // A value that is called otherwise meanwhile.
    c.batch_execute("ALTER TYPE state RENAME VALUE 'Completed' TO 'archived'").unwrap();
    assert_eq!(given(&mut c, "s2"), "part");
    assert_eq!(claim(&mut c, "fine", "s3")["error"], "already_claimed");
    c.batch_execute("CREATE TABLE c (id text COLLATE \"C\" PRIMARY KEY); CREATE TABLE v (id text PRIMARY KEY, dependencies varchar(20)[])").unwrap();
    let error = c.batch_execute("SELECT bind_directives('c', '{id}')").unwrap_err();
    assert_eq!(sqlstate(&error), "42804");
    for session in ["s1", "s2"] {
        release(&mut c, session);
    }
    c.batch_execute("SELECT bind_directives('v', '{id}')").unwrap();
}

#[test]
fn an_owner_s_code_never_runs_with_the_extension_s_rights() {
    let (db, mut c) = coordinated();
    let owner = db.role("owner");
    json(&mut c, "SELECT grant_coordination($1, 'operator')", &[&owner]);
    c.batch_execute(&format!("CREATE SCHEMA theirs AUTHORIZATION {owner}")).unwrap();
    let mut o = db.connect_as(&owner);
    o.batch_execute(
        "CREATE TABLE theirs.t (id text PRIMARY KEY, status text, n integer);
         INSERT INTO theirs.t VALUES ('T-1', 'open', 1);
         CREATE TABLE theirs.seen (who text);
         CREATE FUNCTION theirs.note() RETURNS integer LANGUAGE plpgsql AS
         $$ BEGIN INSERT INTO theirs.seen VALUES (current_user); RETURN 1; END $$;
         CREATE FUNCTION theirs.f(integer) RETURNS integer LANGUAGE plpgsql IMMUTABLE AS
         $$ BEGIN RETURN (SELECT theirs.note()); END $$;
         SELECT bind_directives('theirs.t', '{id}');
         CREATE INDEX hostile ON theirs.t ((n + theirs.f(1)));
         DELETE FROM theirs.seen",
    )
    .unwrap();
    register(&mut o, "mine");
    for call in
        ["claim_next_sd('mine')", "claim_sd('T-1', 'mine')", "bind_directives('theirs.t', '{id}')"]
    {
        let error = o.query(&format!("SELECT {call}"), &[]).unwrap_err();
        assert_eq!(sqlstate(&error), "42501", "{call}");
    }
    let strangers = format!("SELECT count(*) FROM theirs.seen WHERE who <> '{owner}'");
    assert_eq!(count(&mut c, &strangers), 0);
    o.batch_execute("DROP INDEX theirs.hostile").unwrap();
    assert_eq!(next(&mut o, "mine")["sd_id"], "T-1");
}
