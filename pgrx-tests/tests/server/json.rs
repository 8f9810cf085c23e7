//! The JSON that the functions write is byte for byte what the server would make of it.

use crate::support::*;

#[test]
fn metadata_comes_back_as_the_server_stored_it() {
    let (_db, mut c) = coordinated();
    let many = (0..100).map(|n| format!(r#""{}{n}": {n}.5"#, "k".repeat(n % 7)));
    let deep = |depth| format!(r#"{{"deep": {}{}}}"#, "[".repeat(depth), "]".repeat(depth));
    for (at, metadata) in [
        "{}".to_owned(),
        r#"{"none": null, "true": true, "text": "", "less": -1, "half": 0.50, "more": 18446744073709551616}"#.into(),
        r#"{"ü": "ß\n\"", "日本": "語", "long": "#.to_owned() + &format!("\"{}\"}}", "x".repeat(5000)),
        r#"{"empty": [[], {}, [{}]], "a": {"b": {"c": [1, "two", null, {"d": 4.0}]}}}"#.into(),
        format!("{{{}}}", many.collect::<Vec<_>>().join(", ")),
        // What serde would not read, or take for something else.
        deep(500),
        r#"{"$serde_json::private::Number": "12", "a": {"$serde_json::private::RawValue": 1}}"#.into(),
    ]
    .into_iter()
    .enumerate()
    {
        let row = c
            .query_one(
                "WITH answer AS (SELECT register_session($1, p_metadata => $2::text::jsonb) AS a)
                 SELECT a ->> 'success', record_image_eq(ROW (a), ROW (a::text::jsonb)),
                        record_image_eq(ROW (a -> 'metadata'), ROW ($2::text::jsonb)), a ->> 'metadata'
                   FROM answer",
                &[&format!("json-{at}"), &metadata],
            )
            .unwrap();
        let part: String = row.get(3);
        assert_eq!(row.get::<_, Option<&str>>(0), Some("true"), "{metadata}");
        assert!(row.get::<_, bool>(1), "other bytes than the server's: {part}");
        assert!(row.get::<_, bool>(2), "{metadata} became {part}");
    }
}

#[test]
fn metadata_is_read_however_the_server_keeps_it() {
    let (_db, mut c) = coordinated();
    c.batch_execute(
        "CREATE TABLE given (kept text PRIMARY KEY, metadata jsonb);
         INSERT INTO given VALUES
             ('short', '{\"a\": 1}'),
             ('compressed', jsonb_build_object('a', repeat('x', 60000))),
             ('apart', (SELECT jsonb_build_object('a', string_agg(md5(n::text), '')) FROM generate_series(1, 1000) n))",
    )
    .unwrap();
    let is_kept = "SELECT count(*) = 3 AND min(pg_column_size(metadata)) < 100
                      AND bool_and(kept <> 'compressed' OR pg_column_size(metadata) < 5000)
                      AND bool_and(kept <> 'apart' OR pg_column_size(metadata) > 30000) FROM given";
    assert!(c.query_one(is_kept, &[]).unwrap().get::<_, bool>(0));
    for call in [
        "register_session(kept, p_metadata => metadata)",
        "end_session(kept)",
        "end_session(kept, 'again')",
    ] {
        let rows = c
            .query(
                &format!(
                    "SELECT kept, record_image_eq(ROW (a), ROW (a::text::jsonb))
                                  AND a -> 'metadata' = metadata
                       FROM (SELECT kept, metadata, {call} AS a FROM given OFFSET 0) answers"
                ),
                &[],
            )
            .unwrap();
        assert_eq!(rows.len(), 3);
        for row in rows {
            assert!(row.get::<_, bool>(1), "{call}, {}", row.get::<_, &str>(0));
        }
    }
}

#[test]
fn answers_are_stored_as_the_server_stores_them() {
    let (_db, mut c) = coordinated();
    register(&mut c, "json");
    granted(&mut c, "SD-2", "json");
    let switched = "SELECT detail -> 'released_claim_id' FROM session_lifecycle_events
                     WHERE event_type = 'switched'";
    granted(&mut c, "SD-3", "json");
    for sql in [
        // Numbers, which serde tells in a way of its own where it keeps every digit.
        &format!("SELECT jsonb_typeof(({switched})) = 'number'"),
        "SELECT jsonb_typeof(cleanup_stale_sessions() -> 'stale_sessions_cleaned') = 'number'",
        // Values that are no container.
        r#"SELECT record_image_eq(ROW (j), ROW (j::text::jsonb)) FROM dependency_keys('"one"') j"#,
        "SELECT record_image_eq(ROW (j), ROW (j::text::jsonb)) FROM dependency_keys('null') j",
        "SELECT record_image_eq(ROW (j), ROW (j::text::jsonb)) FROM dependency_keys('[]') j",
        "SELECT record_image_eq(ROW (j), ROW (j::text::jsonb)) FROM claim_sd('SD-1', 'json') j",
        // Refused: numbers with a fraction, and an object within another one.
        "SELECT record_image_eq(ROW (j), ROW (j::text::jsonb)) FROM claim_sd('SD-1', 's1') j",
        // An object for each, and more of them than one offset spans.
        "SELECT record_image_eq(ROW (j), ROW (j::text::jsonb)) AND jsonb_array_length(j -> 'sessions') = 102
           FROM heartbeat_sessions('{json,s1}' || ARRAY(SELECT repeat('x', n) FROM generate_series(1, 100) n)) j",
        "SELECT record_image_eq(ROW (j), ROW (j::text::jsonb)) AND jsonb_array_length(j) = 100
           FROM dependency_keys((SELECT jsonb_agg(repeat('ü', n % 9))::text FROM generate_series(1, 100) n)) j",
        "SELECT bool_and(record_image_eq(ROW (detail), ROW (detail::text::jsonb))) FROM session_lifecycle_events",
    ] {
        assert!(c.query_one(sql, &[]).unwrap().get::<_, bool>(0), "{sql}");
    }
}
