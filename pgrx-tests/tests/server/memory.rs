//! Rows of any size and shape pass the triggers and functions whole. Whoever keeps memory that the server has
//! freed loses part of a row, or the server.

use std::io::{Read, Write};

use pg_claims_tests::{TestDb, sqlstate};
use postgres::Client;

use crate::support::*;

/// Values of which each is stored in another way: none at all, short, within the row, compressed, out of line.
const PAYLOADS: &str = "
    CREATE FUNCTION noise(bytes integer) RETURNS text LANGUAGE sql IMMUTABLE AS
        $$ SELECT left(string_agg(md5(i::text), ''), bytes) FROM generate_series(1, bytes / 32 + 1) i $$;
    CREATE TABLE payloads AS
        SELECT row_number() OVER ()::integer AS n, payload FROM (
            SELECT NULL::text AS payload UNION ALL SELECT ''
            UNION ALL SELECT repeat('x', size) FROM unnest('{1,126,127,2100,9000,100000,1000000}'::integer[]) size
            UNION ALL SELECT noise(size) FROM unnest('{126,127,2100,9000,100000,1000000}'::integer[]) size) p;
    GRANT SELECT ON payloads TO PUBLIC";

/// A backlog, and what tells its rows apart.
struct Backlog {
    table: &'static str,
    /// Makes it, with columns that are dropped before and after it is bound.
    make: &'static str,
    bind: &'static str,
    /// Its key columns, the first of which can be looked for a conflict.
    keys: &'static str,
    conflict: &'static str,
    /// Keys made of `w`, the way by which a row came, and `n`.
    values: &'static str,
    /// The id by which a claim finds it.
    id: &'static str,
}

const OWN: Backlog = Backlog {
    table: "strategic_directives_v2",
    make: "ALTER TABLE strategic_directives_v2 ADD gone_early text DEFAULT 'early';
           ALTER TABLE strategic_directives_v2 DROP gone_early;
           ALTER TABLE strategic_directives_v2 ADD payload text, ADD n integer, ADD gone_late integer DEFAULT 7;
           ALTER TABLE strategic_directives_v2 ALTER title SET STORAGE EXTERNAL",
    bind: "SELECT 1",
    keys: "sd_id",
    conflict: "sd_id",
    values: "w || '-' || n",
    id: "w || '-' || n",
};

const TEXT: Backlog = Backlog {
    table: "items",
    make: "CREATE TABLE items (gone_early text, key text PRIMARY KEY, gone_late integer DEFAULT 7, payload text,
                               status text, is_working_on boolean, active_session_id varchar(300), n integer);
           ALTER TABLE items DROP gone_early; ALTER TABLE items ALTER payload SET STORAGE EXTERNAL",
    bind: "SELECT bind_directives('items', '{key}', p_title_column => 'payload')",
    keys: "key",
    conflict: "key",
    values: "w || '-' || n",
    id: "w || '-' || n",
};

const UUID: Backlog = Backlog {
    table: "items",
    make: "CREATE TABLE items (payload text, active_session_id text, gone_early integer, id uuid PRIMARY KEY,
                               gone_late integer DEFAULT 7, n integer, is_working_on boolean NOT NULL DEFAULT false);
           ALTER TABLE items DROP gone_early; ALTER TABLE items ALTER payload SET STORAGE MAIN",
    bind: "SELECT bind_directives('items', '{id}')",
    keys: "id",
    conflict: "id",
    values: "md5(w || '-' || n)::uuid",
    id: "md5(w || '-' || n)::uuid",
};

/// The first of several keys that is not NULL counts. No `is_working_on`.
const KEYS: Backlog = Backlog {
    table: "items",
    make: "CREATE TABLE items (gone_early integer, number bigint UNIQUE, key text UNIQUE, gone_late integer DEFAULT 7,
                               payload text, title text, active_session_id text, n integer);
           ALTER TABLE items DROP gone_early",
    bind: "SELECT bind_directives('items', '{number,key}')",
    keys: "number, key",
    conflict: "key",
    values: "CASE WHEN n % 2 = 0 THEN hashtext(w) * 1000::bigint + n END, w || '-' || n",
    id: "w || '-' || n",
};

const UNMIRRORED: Backlog = Backlog {
    table: "items",
    make: "CREATE TABLE items (key text PRIMARY KEY, gone_early integer, gone_late integer DEFAULT 7, payload text,
                               n integer, status text);
           ALTER TABLE items DROP gone_early",
    bind: "SELECT bind_directives('items', '{key}')",
    keys: "key",
    conflict: "key",
    values: "w || '-' || n",
    id: "w || '-' || n",
};

/// The partitions have their columns at other places than the table itself.
const PARTITIONED: Backlog = Backlog {
    table: "items",
    make: "CREATE TABLE items (key text PRIMARY KEY, payload text, is_working_on boolean, active_session_id text,
                               gone_late integer DEFAULT 7, n integer, status text) PARTITION BY HASH (key);
           CREATE TABLE items_0 PARTITION OF items FOR VALUES WITH (MODULUS 2, REMAINDER 0);
           CREATE TABLE items_1 (gone_early text, status text, n integer, is_working_on boolean, gone_too integer,
                                 gone_late integer DEFAULT 7, active_session_id text, key text NOT NULL, payload text);
           ALTER TABLE items_1 DROP gone_early, DROP gone_too;
           ALTER TABLE items ATTACH PARTITION items_1 FOR VALUES WITH (MODULUS 2, REMAINDER 1)",
    bind: "SELECT bind_directives('items', '{key}')",
    keys: "key",
    conflict: "key",
    values: "w || '-' || n",
    id: "w || '-' || n",
};

impl Backlog {
    fn keys_of(&self, way: &str) -> String {
        self.values.replace('w', &format!("'{way}'"))
    }

    fn id_of(&self, c: &mut Client, way: &str, n: i32) -> String {
        let id = self.id.replace('w', &format!("'{way}'"));
        value(c, &format!("SELECT ({id})::text FROM payloads WHERE n = {n}")).unwrap()
    }

    fn select(&self, way: &str) -> String {
        format!("SELECT {}, n, payload FROM payloads", self.keys_of(way))
    }

    /// Has every row come by `ways` as it was sent.
    fn assert_whole(&self, c: &mut Client, ways: i64) {
        let rows = count(c, &format!("SELECT count(*) FROM {} WHERE n IS NOT NULL", self.table));
        assert_eq!(rows, ways * count(c, "SELECT count(*) FROM payloads"), "{}", self.make);
        let other = format!(
            "SELECT count(*) FROM {} t JOIN payloads p USING (n) WHERE t.payload IS DISTINCT FROM p.payload",
            self.table
        );
        assert_eq!(count(c, &other), 0, "{}", self.make);
        assert_in_step(c);
    }

    /// Columns that say who works on it, with what they must not say.
    fn lies(&self) -> Option<String> {
        let lies = [("is_working_on", "NOT is_working_on"), ("active_session_id", "'liar'")]
            .into_iter()
            .filter(|(column, _)| self.make.contains(column) || self.table == OWN.table)
            .map(|(column, lie)| format!("{column} = {lie}"));
        let lies: Vec<_> = lies.collect();
        (!lies.is_empty()).then(|| lies.join(", "))
    }
}

/// All that can be done to a backlog, by `c`, who may write it.
fn pass_rows_through(c: &mut Client, db: &TestDb, backlog: &Backlog) {
    let Backlog { table, keys, conflict, .. } = backlog;
    let into = format!("INSERT INTO {table} ({keys}, n, payload)");
    c.batch_execute(&format!("{into} {}", backlog.select("many"))).unwrap();
    c.batch_execute(&format!(
        "ALTER TABLE {table} DROP gone_late;
         ALTER TABLE {table} ADD later text DEFAULT 'later', ADD number_later numeric DEFAULT 1.5"
    ))
    .unwrap();
    backlog.assert_whole(c, 1);

    // Each in a subtransaction, of which every second one is undone.
    c.batch_execute(&format!(
        "DO $do$ DECLARE row record; BEGIN
             FOR row IN {select} LOOP
                 BEGIN
                     {into} SELECT {keys} FROM payloads WHERE n = row.n;
                     RAISE 'undone';
                 EXCEPTION WHEN raise_exception THEN
                     {into} SELECT {keys} FROM payloads WHERE n = row.n;
                 END;
             END LOOP;
         END $do$",
        select = "SELECT n FROM payloads",
        keys = format!("{}, n, payload", backlog.keys_of("block")),
    ))
    .unwrap();
    for _ in 0..2 {
        c.batch_execute(&format!(
            "{into} {} ON CONFLICT ({conflict}) DO UPDATE SET payload = excluded.payload",
            backlog.select("upsert")
        ))
        .unwrap();
    }
    let mut copied = Vec::new();
    let copy = format!("COPY ({}) TO STDOUT", backlog.select("copy"));
    c.copy_out(copy.as_str()).unwrap().read_to_end(&mut copied).unwrap();
    let copy = format!("COPY {table} ({keys}, n, payload) FROM STDIN");
    let mut to = c.copy_in(copy.as_str()).unwrap();
    to.write_all(&copied).unwrap();
    to.finish().unwrap();
    let mut ways = 4;
    if count(c, "SELECT current_setting('server_version_num')::bigint") >= 150_000 {
        ways += 1;
        // Some are there already.
        for _ in 0..2 {
            c.batch_execute(&format!(
                "MERGE INTO {table} t USING (SELECT n, payload, {keys_of}, {id} AS id FROM payloads) p ({names})
                    ON t.n = p.n AND t.{conflict}::text = p.id::text
                  WHEN MATCHED THEN UPDATE SET payload = p.payload
                  WHEN NOT MATCHED THEN INSERT ({keys}, n, payload) VALUES ({values}, p.n, p.payload)",
                keys_of = backlog.keys_of("merge"),
                id = backlog.id.replace('w', "'merge'"),
                names = if keys.contains(',') { "n, payload, k1, k2, id" } else { "n, payload, k1, id" },
                values = if keys.contains(',') { "p.k1, p.k2" } else { "p.k1" },
            ))
            .unwrap();
        }
    }
    backlog.assert_whole(c, ways);

    if let Some(lies) = backlog.lies() {
        c.batch_execute(&format!("UPDATE {table} SET {lies}")).unwrap();
        c.batch_execute(&format!("UPDATE {table} SET {lies}, payload = payload || ''")).unwrap();
    }
    backlog.assert_whole(c, ways);
    if table != &OWN.table {
        let later =
            format!("SELECT count(*) FROM {table} WHERE later = 'later' AND number_later = 1.5");
        assert_eq!(count(c, &later), ways * count(c, "SELECT count(*) FROM payloads"));
    }

    // Claimed, worked on, let go, finished, deleted.
    let mut operator = db.connect();
    for n in [1, 8, 9, 15] {
        for way in ["many", "copy"] {
            let sd = backlog.id_of(&mut operator, way, n);
            granted(&mut operator, &sd, "s1");
            if let Some(lies) = backlog.lies() {
                c.batch_execute(&format!("UPDATE {table} SET {lies} WHERE n = {n}")).unwrap();
            }
            assert_in_step(c);
            assert_eq!(claim(&mut operator, &sd, "s2")["claimed_by"], "s1");
        }
        assert_eq!(release(&mut operator, "s1")["success"], true);
    }
    backlog.assert_whole(c, ways);
    if backlog.make.contains("status") || table == &OWN.table {
        let sd = backlog.id_of(&mut operator, "many", 9);
        granted(&mut operator, &sd, "s1");
        c.batch_execute(&format!("UPDATE {table} SET status = 'completed' WHERE n = 9")).unwrap();
        backlog.assert_whole(c, ways);
        assert_eq!(count(c, "SELECT count(*) FROM claude_sessions WHERE sd_id IS NOT NULL"), 0);
    }
    let sd = backlog.id_of(&mut operator, "many", 15);
    granted(&mut operator, &sd, "s1");
    c.batch_execute(&format!("DELETE FROM {table} WHERE n = 15")).unwrap();
    assert_in_step(c);
    assert_eq!(count(c, "SELECT count(*) FROM claude_sessions WHERE sd_id IS NOT NULL"), 0);
}

fn with_payloads() -> (TestDb, Client) {
    let (db, mut c) = coordinated();
    c.batch_execute("DELETE FROM strategic_directives_v2").unwrap();
    c.batch_execute(PAYLOADS).unwrap();
    (db, c)
}

#[test]
fn large_rows_can_be_inserted_into_the_own_backlog() {
    let (_db, mut c) = coordinated();
    c.batch_execute(
        "INSERT INTO strategic_directives_v2 (sd_id, title)
         SELECT 'Z' || i, repeat('x', 1000000 + i * 1000) FROM generate_series(1, 20) i",
    )
    .unwrap();
    let whole = "SELECT count(*) FROM strategic_directives_v2
                  WHERE sd_id LIKE 'Z%' AND title = repeat('x', 1000000 + substr(sd_id, 2)::integer * 1000)";
    assert_eq!(count(&mut c, whole), 20);
    assert_in_step(&mut c);
}

#[test]
fn rows_of_any_kind_pass_the_triggers_of_the_own_backlog() {
    let (db, mut c) = with_payloads();
    c.batch_execute(OWN.make).unwrap();
    pass_rows_through(&mut c, &db, &OWN);
}

#[test]
fn rows_of_any_kind_pass_the_triggers_of_an_ordinary_role_s_backlog() {
    for backlog in [TEXT, UUID, KEYS, UNMIRRORED, PARTITIONED] {
        let (db, mut c) = with_payloads();
        let owner = db.role("owner");
        c.batch_execute(&format!(
            "GRANT CREATE ON SCHEMA public TO {owner}; SELECT grant_coordination('{owner}', 'operator')"
        ))
        .unwrap();
        let mut o = db.connect_as(&owner);
        o.batch_execute(backlog.make).unwrap();
        o.batch_execute(backlog.bind).unwrap();
        pass_rows_through(&mut o, &db, &backlog);
        if backlog.make.contains("PARTITION") {
            // Half of them go to the other partition.
            o.batch_execute("UPDATE items SET key = key || '!', is_working_on = true").unwrap();
            let whole = "SELECT count(*) FROM items t JOIN payloads p USING (n) WHERE t.payload IS DISTINCT FROM p.payload";
            assert_eq!(count(&mut o, whole), 0);
            assert_in_step(&mut o);
        }
        c.batch_execute(&format!(
            "SELECT unbind_directives(); DROP TABLE items; REVOKE CREATE ON SCHEMA public FROM {owner}"
        ))
        .unwrap();
    }
}

#[test]
fn a_row_of_a_hundred_megabytes_passes() {
    let (_db, mut c) = coordinated();
    c.batch_execute(
        "CREATE TABLE work (sd_id text, note text);
         SELECT guard_table('work', 'sd_id');
         INSERT INTO strategic_directives_v2 (sd_id, title) SELECT 'LARGE', repeat('x', 100000000);
         UPDATE strategic_directives_v2 SET is_working_on = true WHERE sd_id = 'LARGE';
         INSERT INTO claude_sessions (session_id, sd_id, metadata)
         SELECT 'large', 'LARGE', jsonb_build_object('note', repeat('x', 100000000));
         SELECT assert_claim(sd_id, session_id, claim_id) FROM claude_sessions WHERE session_id = 'large';
         BEGIN;
         SELECT assert_claim(sd_id, session_id, claim_id) FROM claude_sessions WHERE session_id = 'large';
         INSERT INTO work SELECT 'LARGE', repeat('x', 100000000);
         COMMIT;
         UPDATE claude_sessions SET sd_id = NULL WHERE session_id = 'large'",
    )
    .unwrap();
    let lengths = "SELECT concat_ws(' ', (SELECT length(title) FROM strategic_directives_v2 WHERE sd_id = 'LARGE'),
                           (SELECT length(metadata ->> 'note') FROM claude_sessions WHERE session_id = 'large'),
                           (SELECT length(note) FROM work))";
    assert_eq!(value(&mut c, lengths).as_deref(), Some("100000000 100000000 100000000"));
    assert_in_step(&mut c);
}

#[test]
fn sessions_written_by_hand_keep_what_they_carry() {
    let (_db, mut c) = with_payloads();
    c.batch_execute(
        "ALTER TABLE claude_sessions ADD gone text; ALTER TABLE claude_sessions DROP gone;
         INSERT INTO strategic_directives_v2 (sd_id) SELECT 'SD-' || n FROM payloads;
         INSERT INTO claude_sessions (session_id, sd_id, metadata, hostname, codebase)
         SELECT 'h-' || n, 'SD-' || n, jsonb_build_object('payload', payload), left(payload, 9000), NULL FROM payloads;
         ALTER TABLE claude_sessions ADD later text DEFAULT 'later'",
    )
    .unwrap();
    let other = "SELECT count(*) FROM payloads LEFT JOIN claude_sessions ON session_id = 'h-' || n
                  WHERE metadata ->> 'payload' IS DISTINCT FROM payload OR later IS DISTINCT FROM 'later'
                     OR hostname IS DISTINCT FROM left(payload, 9000)";
    assert_eq!(count(&mut c, other), 0);
    assert_in_step(&mut c);
    for write in [
        "UPDATE claude_sessions SET sd_id = NULL WHERE session_id LIKE 'h-%'",
        "UPDATE claude_sessions SET sd_id = replace(session_id, 'h-', 'SD-') WHERE session_id LIKE 'h-%'",
        "UPDATE claude_sessions SET status = 'idle' WHERE session_id LIKE 'h-%'",
        "INSERT INTO claude_sessions (session_id, sd_id, metadata)
         SELECT 'h-' || n, 'SD-' || n, '{}' FROM payloads
             ON CONFLICT (session_id) DO UPDATE SET sd_id = excluded.sd_id",
        "UPDATE claude_sessions SET metadata = metadata || '{}', sd_id = sd_id, heartbeat_at = now() WHERE session_id LIKE 'h-%'",
        "DO $$ BEGIN
             BEGIN
                 UPDATE claude_sessions SET sd_id = NULL, release_reason = noise(200000) WHERE session_id LIKE 'h-%';
                 RAISE 'undone';
             EXCEPTION WHEN raise_exception THEN NULL; END;
             UPDATE claude_sessions SET status = 'released', release_reason = noise(200000) WHERE session_id LIKE 'h-%';
         END $$",
    ] {
        c.batch_execute(write).unwrap();
        assert_eq!(count(&mut c, other), 0, "{write}");
        assert_in_step(&mut c);
    }
    let reasons = "SELECT count(*) FROM sd_claims WHERE release_reason = noise(200000)";
    assert_eq!(count(&mut c, reasons), count(&mut c, "SELECT count(*) FROM payloads"));
    // An acquisition that has ended may be corrected by hand, and one that has not is refused.
    // So is one that a dump brings along taken as it is.
    c.batch_execute(
        "UPDATE sd_claims SET release_reason = release_reason || 'x';
         BEGIN; SET LOCAL check_function_bodies = off; SET LOCAL row_security = off; SET LOCAL client_min_messages = warning;
         INSERT INTO sd_claims (sd_id, session_id, claimed_at, released_at, release_reason)
         SELECT 'R-' || n, 'h-' || n, now(), now(), coalesce(payload, '-') FROM payloads;
         COMMIT",
    )
    .unwrap();
    let other = "SELECT count(*) FROM payloads LEFT JOIN sd_claims ON sd_id = 'R-' || n
                  WHERE release_reason IS DISTINCT FROM coalesce(payload, '-')";
    assert_eq!(count(&mut c, other), 0);
    let error = c
        .batch_execute(
            "INSERT INTO sd_claims (sd_id, session_id, track, claimed_at) VALUES ('SD-1', 'h-1', noise(200000), now())",
        )
        .unwrap_err();
    assert_eq!(sqlstate(&error), "55000");
    c.batch_execute(
        "DELETE FROM claude_sessions WHERE session_id LIKE 'h-%'; DELETE FROM sd_claims",
    )
    .unwrap();
    assert_in_step(&mut c);
}

#[test]
fn rows_of_any_kind_pass_the_guard() {
    let (_db, mut c) = with_payloads();
    c.batch_execute(
        "CREATE TABLE work (gone text, note text, sd_id text, n integer);
         ALTER TABLE work DROP gone; ALTER TABLE work ALTER note SET STORAGE EXTERNAL;
         SELECT guard_table('work', 'sd_id');
         INSERT INTO strategic_directives_v2 (sd_id) VALUES ('SD-1');
         SELECT claim_sd('SD-1', 's1'); BEGIN",
    )
    .unwrap();
    let held = count(&mut c, "SELECT claim_id FROM claude_sessions WHERE session_id = 's1'");
    c.batch_execute(&format!(
        "SELECT assert_claim('SD-1', 's1', {held});
         INSERT INTO work (sd_id, n, note) SELECT 'SD-1', n, payload FROM payloads;
         ALTER TABLE work ADD later text DEFAULT 'later';
         UPDATE work SET n = n;
         UPDATE work SET note = note || '';
         INSERT INTO work (sd_id, n, note) SELECT NULL, n, payload FROM payloads"
    ))
    .unwrap();
    let other = "SELECT count(*) FROM work JOIN payloads USING (n)
                  WHERE note IS DISTINCT FROM payload OR later IS DISTINCT FROM 'later'";
    assert_eq!(count(&mut c, other), 0);
    c.batch_execute("DELETE FROM work; COMMIT").unwrap();
}
