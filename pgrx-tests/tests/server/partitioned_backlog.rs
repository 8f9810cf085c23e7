//! A bound backlog in partitions.

use std::thread;

use pg_claims_tests::{TestDb, backend_pid, detail, sqlstate, wait_until_blocked};
use postgres::Client;

use crate::support::*;

fn partitioned() -> (TestDb, Client) {
    let (db, mut c) = coordinated();
    c.batch_execute(
        "CREATE TABLE parts (key text, status text DEFAULT 'open', is_working_on boolean, active_session_id text,
                             team integer, PRIMARY KEY (key, team)) PARTITION BY LIST (team);
         CREATE TABLE parts_1 PARTITION OF parts FOR VALUES IN (1);
         CREATE TABLE parts_2 PARTITION OF parts FOR VALUES IN (2);
         CREATE UNIQUE INDEX ON parts_1 (key); CREATE UNIQUE INDEX ON parts_2 (key);
         INSERT INTO parts (key, team) VALUES ('A', 1), ('B', 2), ('C', 1)",
    )
    .unwrap();
    (db, c)
}

/// By hash of the key, which alone can be unique over all partitions.
fn hashed() -> (TestDb, Client) {
    let (db, mut c) = coordinated();
    c.batch_execute(
        "CREATE TABLE parts (key text PRIMARY KEY, status text DEFAULT 'open', is_working_on boolean,
                             active_session_id text) PARTITION BY HASH (key);
         CREATE TABLE parts_0 PARTITION OF parts FOR VALUES WITH (MODULUS 2, REMAINDER 0);
         CREATE TABLE parts_1 PARTITION OF parts FOR VALUES WITH (MODULUS 2, REMAINDER 1);
         INSERT INTO parts SELECT 'K-' || n FROM generate_series(1, 20) n;
         SELECT bind_directives('parts', '{key}')",
    )
    .unwrap();
    (db, c)
}

/// A key in the partition of that number.
fn key_in(c: &mut Client, partition: i32) -> String {
    value(c, &format!("SELECT min(key) FROM parts_{partition}")).unwrap()
}

#[test]
fn claims_completions_and_deletions_work_across_partitions() {
    let (_db, mut c) = hashed();
    let (here, there) = (key_in(&mut c, 0), key_in(&mut c, 1));
    granted(&mut c, &here, "s1");
    granted(&mut c, &there, "s2");
    assert_in_step(&mut c);
    c.batch_execute(&format!("UPDATE parts SET status = 'completed' WHERE key = '{here}'; DELETE FROM parts_1 WHERE key = '{there}'"))
        .unwrap();
    assert_eq!(count(&mut c, "SELECT count(*) FROM claude_sessions WHERE sd_id IS NOT NULL"), 0);
    assert_in_step(&mut c);
    c.batch_execute("SELECT unbind_directives()").unwrap();
    assert_eq!(
        count(
            &mut c,
            "SELECT count(*) FROM pg_trigger WHERE tgrelid IN ('parts'::regclass, 'parts_0'::regclass, 'parts_1'::regclass) AND NOT tgisinternal"
        ),
        0
    );
}

#[test]
fn truncating_one_partition_releases_its_sds_and_no_others() {
    let (_db, mut c) = hashed();
    let (here, there) = (key_in(&mut c, 0), key_in(&mut c, 1));
    granted(&mut c, &here, "s1");
    let kept = granted(&mut c, &there, "s2");
    c.batch_execute("TRUNCATE parts_0").unwrap();
    assert_eq!(beat(&mut c, "s1")["lost_claim"]["reason"], "sd_deleted");
    assert_eq!(beat(&mut c, "s2")["claim_id"], kept);
    assert_in_step(&mut c);
    c.batch_execute("TRUNCATE parts").unwrap();
    assert_eq!(beat(&mut c, "s2")["lost_claim"]["reason"], "sd_deleted");
    assert_in_step(&mut c);
}

#[test]
fn a_foreign_partition_that_comes_later_is_not_read_with_the_extension_s_rights() {
    let (db, mut c) = coordinated();
    let tenant = db.role("tenant");
    c.batch_execute(&format!(
        "CREATE TABLE parts (key text PRIMARY KEY, is_working_on boolean) PARTITION BY LIST (key);
         CREATE TABLE parts_1 PARTITION OF parts FOR VALUES IN ('A');
         INSERT INTO parts VALUES ('A');
         ALTER TABLE parts OWNER TO {tenant}; ALTER TABLE parts_1 OWNER TO {tenant};
         SELECT bind_directives('parts', '{{key}}');
         CREATE FOREIGN DATA WRAPPER nothing;
         CREATE SERVER nowhere FOREIGN DATA WRAPPER nothing"
    ))
    .unwrap();
    granted(&mut c, "A", "s1");
    c.batch_execute(&format!(
        "CREATE FOREIGN TABLE abroad (key text NOT NULL, is_working_on boolean) SERVER nowhere;
         ALTER FOREIGN TABLE abroad OWNER TO {tenant}"
    ))
    .unwrap();
    // No unique index can be on all partitions then.
    c.batch_execute(
        "ALTER TABLE parts DROP CONSTRAINT parts_pkey;
         ALTER TABLE parts ATTACH PARTITION abroad FOR VALUES IN ('B')",
    )
    .unwrap();
    for call in ["claim_sd('A', 's2')", "is_sd_claimed('A')", "claim_next_sd('s2')"] {
        let error = c.batch_execute(&format!("SELECT {call}")).unwrap_err();
        assert_eq!(sqlstate(&error), "42501", "{call}: {error:?}");
        assert!(detail(&error).contains("foreign table public.abroad"), "{error:?}");
    }
    c.batch_execute("ALTER TABLE parts DETACH PARTITION abroad").unwrap();
    assert_eq!(claim(&mut c, "A", "s2")["claimed_by"], "s1");
    release(&mut c, "s1");
    c.batch_execute(
        "SELECT unbind_directives(); DROP TABLE parts; DROP FOREIGN DATA WRAPPER nothing CASCADE",
    )
    .unwrap();
}

#[test]
fn an_index_that_comes_later_on_a_partition_runs_no_code_with_the_extension_s_rights() {
    let (db, mut c) = hashed();
    let tenant = db.role("tenant");
    c.batch_execute(&format!(
        "CREATE FUNCTION evil(integer) RETURNS integer LANGUAGE plpgsql IMMUTABLE AS $$ BEGIN
             IF (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) THEN
                 RAISE 'runs with the rights of %', current_user; END IF;
             RETURN 1; END $$;
         ALTER FUNCTION evil(integer) OWNER TO {tenant}; ALTER TABLE parts OWNER TO {tenant};
         ALTER TABLE parts_0 OWNER TO {tenant}; ALTER TABLE parts_1 OWNER TO {tenant}"
    ))
    .unwrap();
    let mut other = db.connect();
    let calls = ["is_sd_claimed('K-1')", "claim_next_sd('s1')", "sd_next()"];
    for call in calls {
        other.batch_execute(&format!("SELECT {call}; SELECT release_sd('s1')")).unwrap();
    }
    let assert_refused = |error: &postgres::Error, call: &str| {
        assert_eq!(sqlstate(error), "42501", "{call}: {error:?}");
        assert!(detail(error).contains("function public.evil(integer)"), "{error:?}");
    };
    c.batch_execute(&format!(
        "GRANT CREATE ON SCHEMA public TO {tenant}; SET SESSION AUTHORIZATION {tenant}"
    ))
    .unwrap();
    let make = "CREATE INDEX evil_idx ON parts_1 ((evil(1)))";
    c.batch_execute(make).unwrap();
    for call in calls {
        assert_refused(&other.batch_execute(&format!("SELECT {call}")).unwrap_err(), call);
    }
    c.batch_execute("DROP INDEX evil_idx").unwrap();
    // Nor where it comes while whoever reads the backlog waits for the partition.
    for call in calls {
        // This one knows the backlog already.
        let mut reader = db.connect();
        reader.batch_execute(&format!("SELECT {call}; SELECT release_sd('s1')")).unwrap();
        c.batch_execute(&format!("BEGIN; LOCK TABLE parts_1; {make}")).unwrap();
        let pid = backend_pid(&mut reader);
        let waiting = thread::spawn(move || reader.batch_execute(&format!("SELECT {call}")));
        wait_until_blocked(&db, pid);
        c.batch_execute("COMMIT").unwrap();
        assert_refused(&waiting.join().unwrap().unwrap_err(), call);
        c.batch_execute("DROP INDEX evil_idx").unwrap();
    }
    c.batch_execute(&format!(
        "RESET SESSION AUTHORIZATION; SELECT unbind_directives(); DROP TABLE parts;
         DROP FUNCTION evil; REVOKE CREATE ON SCHEMA public FROM {tenant}"
    ))
    .unwrap();
}

#[test]
fn an_sd_that_moves_to_another_partition_stays_claimed() {
    let (_db, mut c) = partitioned();
    // A key that is unique in each partition only cannot be kept unique by the binding.
    let error = c.batch_execute("SELECT bind_directives('parts', '{key}')").unwrap_err();
    assert_eq!(sqlstate(&error), "0A000", "{error:?}");
}
