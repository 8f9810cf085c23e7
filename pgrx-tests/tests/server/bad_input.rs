//! Bad input gets an error that names the argument and the rule, and loses nothing.

use pg_claims_tests::{hint, json, message, sqlstate};

use crate::support::*;

#[test]
fn every_bad_id_is_named_with_the_rule_that_it_breaks() {
    let (_db, mut c) = coordinated();
    let held = granted(&mut c, "SD-1", "s1");
    let long = "x".repeat(201);
    let bad: [(Option<&str>, &str); 7] = [
        (None, "must not be NULL"),
        (Some(""), "must not be empty or blank"),
        (Some("  "), "must not be empty or blank"),
        (Some("\u{2003}"), "must not be empty or blank"),
        (Some(&long), "must not be longer than 200 characters"),
        (Some("a\nb"), "must not contain control characters"),
        (Some("\u{1b}[2J"), "must not contain control characters"),
    ];
    for (call, argument) in [
        ("register_session($1)", "p_session_id"),
        ("end_session($1)", "p_session_id"),
        ("claim_sd($1, 's2')", "p_sd_id"),
        ("claim_sd('SD-2', $1)", "p_session_id"),
        ("sd_start($1, 's2')", "p_sd_id"),
        ("sd_start('SD-2', $1)", "p_session_id"),
        ("release_sd($1)", "p_session_id"),
        ("is_sd_claimed($1)", "p_sd_id"),
        ("update_session_heartbeat($1)", "p_session_id"),
    ] {
        for (id, rule) in bad {
            let error = c.query(&format!("SELECT {call}"), &[&id]).unwrap_err();
            assert_eq!(sqlstate(&error), "22023", "{call} {id:?}");
            assert_eq!(message(&error), format!("invalid value for \"{argument}\": {rule}"));
            assert!(hint(&error).contains("200"), "{}", hint(&error));
        }
    }
    for id in ["", "a\tb", &long] {
        let error = c.query("SELECT is_sd_claimed('SD-1', $1)", &[&id]).unwrap_err();
        assert_eq!(sqlstate(&error), "22023");
        assert!(message(&error).contains("p_exclude_session_id"));
    }
    assert_eq!(count(&mut c, "SELECT count(*) FROM claude_sessions"), 3);
    assert_eq!(beat(&mut c, "s1")["claim_id"], held);
    assert_in_step(&mut c);
}

#[test]
fn the_longest_id_and_any_script_are_fine() {
    let (_db, mut c) = coordinated();
    let long = "é".repeat(200);
    for id in
        [long.as_str(), "会话-1", "session with spaces", "o'reilly\"; DROP TABLE x --", "a\\b"]
    {
        assert_eq!(register(&mut c, id)["session_id"], id);
        let answer = claim(&mut c, "SD-1", id);
        assert_eq!(answer["session_id"], id, "{answer}");
        assert_eq!(claim(&mut c, "SD-1", "s2")["claimed_by"], id);
        assert_eq!(release(&mut c, id)["success"], true);
    }
    assert_in_step(&mut c);
}

#[test]
fn an_unknown_sd_of_any_spelling_is_not_found() {
    let (_db, mut c) = coordinated();
    for id in ["sd-1", " SD-1", "SD-1 ", "%", "SD-_", "'"] {
        assert_eq!(claim(&mut c, id, "s1")["error"], "sd_not_found", "{id:?}");
    }
}

#[test]
fn metadata_must_be_an_object() {
    let (_db, mut c) = coordinated();
    for bad in ["[1]", "3", "\"text\"", "null"] {
        let error = c
            .query_one(&format!("SELECT register_session('x', p_metadata => '{bad}')"), &[])
            .unwrap_err();
        assert_eq!(sqlstate(&error), "22023", "{bad}");
        assert!(message(&error).contains("p_metadata"));
    }
    assert_eq!(
        json(&mut c, "SELECT register_session('x', p_metadata => NULL)", &[])["success"],
        true
    );
}

#[test]
fn levels_and_roles_must_exist() {
    let (_db, mut c) = coordinated();
    for (call, argument) in [
        ("grant_coordination('postgres', 'boss')", "p_level"),
        ("grant_coordination('postgres', NULL)", "p_level"),
        ("grant_coordination('no_such_role', 'viewer')", "p_role"),
        ("grant_coordination('', 'viewer')", "p_role"),
        ("grant_coordination(NULL, 'viewer')", "p_role"),
    ] {
        let error = c.query_one(&format!("SELECT {call}"), &[]).unwrap_err();
        assert_eq!(sqlstate(&error), "22023", "{call}");
        assert!(message(&error).contains(argument), "{}", message(&error));
    }
}
