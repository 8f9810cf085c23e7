//! The JSON that the functions write is byte for byte what the server would make of it.

use crate::support::*;

/// What `register_session` returns of metadata, which comes back as it was given.
fn assert_written_like_the_server_s(c: &mut postgres::Client, metadata: &str) {
    let row = c
        .query_one(
            "WITH given AS (SELECT $1::text::jsonb AS metadata),
                  answer AS (SELECT register_session('json', p_metadata => metadata) AS a FROM given),
                  written AS MATERIALIZED (SELECT a, a::text::jsonb AS read, a -> 'metadata' AS part FROM answer)
             SELECT record_image_eq(ROW (a), ROW (read)), part @> metadata, part::text,
                    (SELECT count(*) FROM jsonb_each(part) e WHERE part -> e.key IS DISTINCT FROM e.value)
               FROM written, given",
            &[&metadata],
        )
        .unwrap();
    let part: String = row.get(2);
    assert!(row.get::<_, bool>(0), "other bytes than the server's: {part}");
    assert!(row.get::<_, bool>(1), "{metadata} became {part}");
    assert_eq!(row.get::<_, i64>(3), 0, "a key is not found: {part}");
}

#[test]
fn answers_are_stored_as_the_server_stores_them() {
    let (_db, mut c) = coordinated();
    let many = (0..100).map(|n| format!(r#""{}{n}": {n}.5"#, "k".repeat(n % 7)));
    let numbers = (0..70).map(|n| format!("-{n}e{n}"));
    for metadata in [
        "{}".to_owned(),
        r#"{"none": null, "true": true, "false": false, "text": "", "zero": 0, "less": -1, "half": 0.50}"#.into(),
        r#"{"most": 9223372036854775807, "more": 18446744073709551616, "least": -9223372036854775808, "tiny": 1e-40}"#.into(),
        r#"{"ü": "ß\n\"", "日本": "語", "tab": "\t", "long": "#.to_owned() + &format!("\"{}\"}}", "x".repeat(5000)),
        r#"{"empty": [[], {}, [{}]], "a": {"b": {"c": [1, "two", null, {"d": 4.0}]}}}"#.into(),
        format!("{{{}}}", many.collect::<Vec<_>>().join(", ")),
        format!(r#"{{"numbers": [{}], "s": "odd"}}"#, numbers.collect::<Vec<_>>().join(", ")),
    ] {
        assert_written_like_the_server_s(&mut c, &metadata);
    }
    // A value that is no container, and an answer within an answer.
    for sql in [
        r#"SELECT record_image_eq(ROW (j), ROW (j::text::jsonb)) FROM dependency_keys('"one"') j"#,
        "SELECT record_image_eq(ROW (j), ROW (j::text::jsonb)) FROM claim_sd('SD-1', 'json') j",
        "SELECT record_image_eq(ROW (j), ROW (j::text::jsonb)) FROM claim_sd('SD-1', 's1') j",
        "SELECT record_image_eq(ROW (j), ROW (j::text::jsonb)) FROM heartbeat_sessions('{json,s1,nobody}') j",
        "SELECT bool_and(record_image_eq(ROW (detail), ROW (detail::text::jsonb))) FROM session_lifecycle_events",
    ] {
        assert!(c.query_one(sql, &[]).unwrap().get::<_, bool>(0), "{sql}");
    }
}
