//! Every function, as each level, with every kind of argument that nobody would give.
//!
//! For a few seconds in each run of the tests; `cargo xtask fuzz` takes as long as it is told.

use std::env;
use std::time::{Duration, Instant};

use fastrand::Rng;
use pg_claims_tests::{ENV_FUZZ_SECONDS, ENV_FUZZ_SEED, json};
use postgres::Client;

use crate::support::*;

/// Values of a type, as SQL. NULL is among all.
fn values(of_type: &str) -> Vec<String> {
    let mut found: Vec<String> = match of_type {
        "text" | "name" => [
            "''",
            "' '",
            "'SD-1'",
            "'SD-2'",
            "'s1'",
            "'s2'",
            "'S1'",
            "'blocking'",
            "'none'",
            "'completed'",
            "'sd_id'",
            "repeat('x', 200)",
            "repeat('x', 201)",
            "repeat('é', 5000)",
            "repeat('x', 3000000)",
            r"E'a\nb\tc'",
            r"E'\u001b[31m\u0007'",
            r"E'\u202e\u2066\u200b\ufeff'",
            r#"'"; DROP TABLE claude_sessions; --'"#,
            "'%s %I $1 $$ \\ {} []'",
            "'😀👩‍👩‍👧'",
            "'null'",
            "'{\"a\": [1, 2}'",
        ]
        .map(Into::into)
        .to_vec(),
        "smallint" | "integer" => {
            ["0", "1", "-1", "7", "2147483647", "(-2147483647 - 1)"].map(Into::into).to_vec()
        }
        "bigint" => [
            "0",
            "1",
            "-1",
            "9223372036854775807",
            "(-9223372036854775807 - 1)",
            "(SELECT max(claim_id) FROM held)",
        ]
        .map(Into::into)
        .to_vec(),
        "boolean" => ["true", "false"].map(Into::into).to_vec(),
        "oid" => ["0", "1259", "'public.claude_sessions'::regclass::oid", "4294967295"]
            .map(Into::into)
            .to_vec(),
        "regclass" => [
            "'pg_class'",
            "'claude_sessions'",
            "'strategic_directives_v2'",
            "'theirs'",
            "'v_sd_next'",
            "0",
        ]
        .map(Into::into)
        .to_vec(),
        "interval" => [
            "'0'",
            "'30 seconds'",
            "'-1 day'",
            "'1000 years'",
            "'178000000 years'",
            "'-178000000 years'",
            "'1 month -30 days'",
        ]
        .map(Into::into)
        .to_vec(),
        "timestamp with time zone" => {
            ["'infinity'", "'-infinity'", "now()", "'4713-01-01 BC'", "'294276-12-31'", "'epoch'"]
                .map(Into::into)
                .to_vec()
        }
        "jsonb" => [
            "'{}'",
            "'[]'",
            "'null'",
            "'\"x\"'",
            "'{\"a\": {\"b\": [1, null, 1e400]}}'",
            "jsonb_build_object('k', repeat('v', 200000))",
            "(repeat('[', 5000) || repeat(']', 5000))::jsonb",
            r"'{\u0022\\u0007\u0022: 1}'",
        ]
        .map(Into::into)
        .to_vec(),
        "text[]" => [
            "'{}'",
            "'{NULL}'",
            "'{s1,s2}'",
            "'{s1,NULL,s1}'",
            "'{{s1,s2},{SD-1,SD-2}}'",
            "'{sd_id}'",
            "'[5:6]={a,b}'",
            "ARRAY(SELECT 'x' || n FROM generate_series(1, 20000) n)",
        ]
        .map(Into::into)
        .to_vec(),
        other => panic!("there are no values of type {other}: think of some"),
    };
    found.push("NULL".into());
    found.iter().map(|value| format!("{value}::{of_type}")).collect()
}

/// The extension's functions, but those that only the server calls: name and types of arguments.
fn functions(c: &mut Client) -> Vec<(String, Vec<String>)> {
    c.query(
        "SELECT p.proname::text,
                ARRAY(SELECT pg_catalog.format_type(t, NULL) FROM unnest(p.proargtypes) WITH ORDINALITY a (t, n) ORDER BY n)
           FROM pg_depend d
           JOIN pg_extension e ON e.oid = d.refobjid AND e.extname = 'pg_claims'
           JOIN pg_proc p ON d.classid = 'pg_proc'::regclass AND p.oid = d.objid
          WHERE d.deptype = 'e' AND p.prorettype NOT IN ('trigger'::regtype, 'event_trigger'::regtype)
          ORDER BY 1",
        &[],
    )
    .unwrap()
    .iter()
    .map(|row| (row.get(0), row.get(1)))
    .collect()
}

/// A whole number from the environment.
fn from_environment(variable: &str) -> Option<u64> {
    env::var(variable).ok().and_then(|value| value.parse().ok())
}

#[test]
fn no_argument_makes_a_function_fail_in_a_way_that_is_not_its_own() {
    let seconds = from_environment(ENV_FUZZ_SECONDS).unwrap_or(8);
    let seed = from_environment(ENV_FUZZ_SEED).unwrap_or_else(|| Rng::new().u64(..));
    let mut rng = Rng::with_seed(seed);
    let (db, mut owner) = coordinated();
    owner
        .batch_execute(
            "CREATE VIEW held AS SELECT claim_id FROM claude_sessions; GRANT SELECT ON held TO PUBLIC;
             CREATE TABLE theirs (sd_id text PRIMARY KEY, title text)",
        )
        .unwrap();
    let all = functions(&mut owner);
    assert!(all.len() > 40);
    let mut clients = vec![("superuser".to_owned(), db.connect())];
    for level in ["none", "viewer", "worker", "operator"] {
        let role = db.role(level);
        json(&mut owner, "SELECT grant_coordination($1, $2)", &[&role, &level]);
        owner.batch_execute(&format!("GRANT USAGE ON SCHEMA public TO {role}")).unwrap();
        clients.push((level.to_owned(), db.connect_as(&role)));
    }
    for (_, client) in &mut clients {
        client.batch_execute("SET statement_timeout = '20s'; SET lock_timeout = '5s'; SET client_min_messages = error").unwrap();
    }
    let begin = Instant::now();
    let mut calls = 0;
    while begin.elapsed() < Duration::from_secs(seconds) || calls < all.len() {
        let (level, client) = &mut clients[rng.usize(..5)];
        // Each once first, then any.
        let (name, types) = &all[if calls < all.len() { calls } else { rng.usize(..all.len()) }];
        calls += 1;
        let arguments: Vec<String> = types
            .iter()
            .map(|of_type| {
                let values = values(of_type);
                values[rng.usize(..values.len())].clone()
            })
            .collect();
        let call = format!("SELECT * FROM public.{name}({})", arguments.join(", "));
        let transaction = [
            "{call}",
            "BEGIN; {call}; ROLLBACK",
            "BEGIN ISOLATION LEVEL SERIALIZABLE; {call}; COMMIT",
            "BEGIN READ ONLY; {call}; COMMIT",
        ][rng.usize(..4)];
        let sql = transaction.replace("{call}", &call);
        let outcome = client.batch_execute(&sql);
        let told = format!(
            "seed {seed}, call {calls}, as {level}: {}",
            sql.chars().take(2000).collect::<String>()
        );
        if let Err(error) = outcome {
            let Some(error) = error.as_db_error() else { panic!("{told}: {error:?}") };
            let code = error.code().code();
            // A statement's time may be over on a machine that has much else to do; then it must end.
            assert!(
                code == "57014" || !["XX", "57", "58"].contains(&&code[..2]),
                "{told}: {error:?}"
            );
            let shown = [Some(error.message()), error.detail(), error.hint()];
            let is_clean = |text: &str| {
                !text.contains(".rs:") && !text.contains("panicked") && text.len() < 20_000
            };
            assert!(shown.iter().flatten().all(|text| is_clean(text)), "{told}: {error:?}");
            client.batch_execute("ROLLBACK").unwrap();
        }
    }
    println!("{calls} calls, seed {seed}");
    drop(clients);
    // Whatever was called, what is there is whole, and goes on working.
    owner
        .batch_execute("SELECT unbind_directives() WHERE EXISTS (SELECT FROM directive_binding)")
        .unwrap();
    assert_in_step(&mut owner);
    owner.batch_execute("DELETE FROM sd_holds; DELETE FROM sd_conflict_matrix; DELETE FROM claude_sessions; INSERT INTO strategic_directives_v2 (sd_id) VALUES ('after')").unwrap();
    register(&mut owner, "s1");
    granted(&mut owner, "after", "s1");
    release(&mut owner, "s1");
}
