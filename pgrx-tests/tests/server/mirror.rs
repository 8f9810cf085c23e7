//! is_working_on and active_session_id, whoever writes them.

use pg_claims_tests::json;
use postgres::Client;

use crate::support::*;
use crate::worker::served;

const WORKING: &str = "SELECT string_agg(sd_id || ':' || active_session_id, ',' ORDER BY sd_id)
                         FROM strategic_directives_v2 WHERE is_working_on";

#[test]
fn the_mirror_follows_claim_switch_release_and_takeover() {
    let (_db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    assert_eq!(value(&mut c, WORKING).as_deref(), Some("SD-1:s1"));
    granted(&mut c, "SD-2", "s1");
    assert_eq!(value(&mut c, WORKING).as_deref(), Some("SD-2:s1"));
    age_heartbeat(&mut c, "s1", "1 hour");
    granted(&mut c, "SD-2", "s2");
    assert_eq!(value(&mut c, WORKING).as_deref(), Some("SD-2:s2"));
    release(&mut c, "s2");
    assert_eq!(value(&mut c, WORKING), None);
}

#[test]
fn what_others_write_there_becomes_what_the_claims_say() {
    let (_db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    // As a client that saves whole rows, with what it read a while ago.
    c.batch_execute(
        "UPDATE strategic_directives_v2 SET title = 'edited', is_working_on = false, active_session_id = NULL
          WHERE sd_id = 'SD-1';
         UPDATE strategic_directives_v2 SET is_working_on = true, active_session_id = 'liar' WHERE sd_id = 'SD-2';
         INSERT INTO strategic_directives_v2 (sd_id, is_working_on, active_session_id) VALUES ('SD-NEW', true, 'liar')",
    )
    .unwrap();
    assert_eq!(value(&mut c, WORKING).as_deref(), Some("SD-1:s1"));
    let title = "SELECT title FROM strategic_directives_v2 WHERE sd_id = 'SD-1'";
    assert_eq!(value(&mut c, title).as_deref(), Some("edited"));
    assert_in_step(&mut c);
}

#[test]
fn the_mirror_rolls_back_with_the_claim() {
    let (_db, mut c) = coordinated();
    c.batch_execute("BEGIN").unwrap();
    granted(&mut c, "SD-1", "s1");
    assert_eq!(value(&mut c, WORKING).as_deref(), Some("SD-1:s1"));
    c.batch_execute("ROLLBACK").unwrap();
    assert_eq!(value(&mut c, WORKING), None);
    assert_in_step(&mut c);
}

#[test]
fn what_other_triggers_write_there_becomes_what_the_claims_say() {
    let (_db, mut c) = coordinated();
    c.batch_execute(
        "CREATE TABLE elsewhere (n integer);
         CREATE FUNCTION meddle() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             UPDATE strategic_directives_v2 SET is_working_on = NOT is_working_on, active_session_id = 'ghost'
              WHERE sd_id IN ('SD-1', 'SD-2');
             RETURN NULL; END $$;
         CREATE TRIGGER meddle AFTER INSERT ON elsewhere FOR EACH ROW EXECUTE FUNCTION meddle()",
    )
    .unwrap();
    granted(&mut c, "SD-1", "s1");
    c.batch_execute("INSERT INTO elsewhere VALUES (1)").unwrap();
    assert_in_step(&mut c);
    // Also while the mirror itself is being written.
    c.batch_execute(
        "CREATE FUNCTION meddle_too() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             NEW.is_working_on := NOT NEW.is_working_on; NEW.active_session_id := 'ghost';
             IF NEW.sd_id = 'SD-3' THEN
                 UPDATE strategic_directives_v2 SET is_working_on = true WHERE sd_id = 'SD-4';
             END IF;
             RETURN NEW; END $$;
         CREATE TRIGGER meddle_too BEFORE UPDATE ON strategic_directives_v2 FOR EACH ROW EXECUTE FUNCTION meddle_too()",
    )
    .unwrap();
    granted(&mut c, "SD-3", "s1");
    assert_in_step(&mut c);
    release(&mut c, "s1");
    assert_in_step(&mut c);
}

#[test]
fn a_trigger_that_swallows_the_mirror_s_update_is_reported() {
    let (_db, mut c) = coordinated();
    c.batch_execute(
        "CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
         CREATE TRIGGER swallow BEFORE UPDATE ON strategic_directives_v2 FOR EACH ROW EXECUTE FUNCTION swallow()",
    )
    .unwrap();
    let error = c.query("SELECT claim_sd('SD-1', 's1')", &[]).unwrap_err();
    assert_eq!(pg_claims_tests::sqlstate(&error), "09000");
    assert!(pg_claims_tests::hint(&error).contains("BEFORE"));
    assert_in_step(&mut c);
}

#[test]
fn a_trigger_that_has_its_own_way_with_the_mirror_is_reported() {
    let (_db, mut c) = coordinated();
    // After the extension's own, by its name.
    c.batch_execute(
        "CREATE FUNCTION lie() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.is_working_on := false; RETURN NEW; END $$;
         CREATE TRIGGER zzz BEFORE UPDATE ON strategic_directives_v2 FOR EACH ROW EXECUTE FUNCTION lie()",
    )
    .unwrap();
    let error = c.query("SELECT claim_sd('SD-1', 's1')", &[]).unwrap_err();
    assert_eq!(pg_claims_tests::sqlstate(&error), "09000");
    assert_in_step(&mut c);
}

#[test]
fn a_claim_that_a_trigger_undoes_is_no_success() {
    let (_db, mut c) = coordinated();
    let held = granted(&mut c, "SD-2", "s1");
    c.batch_execute(
        "CREATE FUNCTION veto() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
           IF NEW.is_working_on THEN PERFORM release_sd(NEW.active_session_id, 'veto'); END IF; RETURN NULL; END $$;
         CREATE TRIGGER veto AFTER UPDATE ON strategic_directives_v2 FOR EACH ROW WHEN (NEW.sd_id = 'SD-1') EXECUTE FUNCTION veto()",
    )
    .unwrap();
    let error = c.query("SELECT claim_sd('SD-1', 's1')", &[]).unwrap_err();
    assert_eq!(pg_claims_tests::sqlstate(&error), "09000");
    assert!(pg_claims_tests::message(&error).contains("released SD \"SD-1\" while"));
    assert_eq!(beat(&mut c, "s1")["claim_id"], held);
    assert_in_step(&mut c);
}

#[test]
fn what_is_wrong_to_say_free_hides_no_owner_and_costs_nobody_the_claim() {
    const MIRROR: &str =
        "UPDATE strategic_directives_v2 SET is_working_on = false, active_session_id = NULL";
    // Past the triggers, as when a part of a dump is restored.
    for lost in [MIRROR, &format!("{MIRROR}; DELETE FROM sd_claims")] {
        let (_db, mut c) = coordinated();
        let held = granted(&mut c, "SD-1", "s1");
        let written = |c: &mut Client| {
            ["sd_claims", "session_lifecycle_events"]
                .map(|table| count(c, &format!("SELECT count(*) FROM {table}")))
        };
        for isolation in ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"] {
            c.batch_execute(&format!(
                "SET session_replication_role = replica; {lost}; RESET session_replication_role"
            ))
            .unwrap();
            // One that holds another SD, and keeps it.
            let kept = granted(&mut c, "SD-9", "s2");
            let before = written(&mut c);
            c.batch_execute(&format!("BEGIN ISOLATION LEVEL {isolation}")).unwrap();
            let refusal = claim(&mut c, "SD-1", "s2");
            assert_eq!(refusal["error"], "already_claimed", "{lost}, {isolation}");
            assert_eq!(refusal["claimed_by"], "s1", "{lost}, {isolation}");
            c.batch_execute("COMMIT").unwrap();
            assert_eq!(written(&mut c), before, "{lost}, {isolation}");
            assert_eq!(beat(&mut c, "s2")["claim_id"], kept, "{lost}, {isolation}");
            release(&mut c, "s2");
            // The queue takes the next one.
            let given = json(&mut c, "SELECT claim_next_sd('s2')", &[]);
            assert_eq!(given["success"], true, "{lost}, {isolation}: {given}");
            assert_ne!(given["sd_id"], "SD-1", "{lost}, {isolation}");
            release(&mut c, "s2");
            assert_eq!(beat(&mut c, "s1")["claim_id"], held, "{lost}, {isolation}");
        }
        age_heartbeat(&mut c, "s1", "1 hour");
        let taken = claim(&mut c, "SD-1", "s2");
        assert_eq!(taken["took_over"]["claim_id"], held, "{lost}: {taken}");
        assert_in_step(&mut c);
    }
}

#[test]
fn fencing_tokens_that_are_set_back_cost_no_history() {
    let (db, mut c) = coordinated();
    granted(&mut c, "SD-1", "s1");
    granted(&mut c, "SD-2", "s2");
    release(&mut c, "s2");
    // Among the numbers of this run of the server, which a connection that has drawn none does not notice.
    c.batch_execute("SELECT setval('sd_claims_claim_id_seq', min(claim_id), false) FROM sd_claims")
        .unwrap();
    let all = "SELECT string_agg(h::text, ' ' ORDER BY claim_id) FROM sd_claims h";
    let before = value(&mut c, all);
    for call in ["claim_sd('SD-3', 's3')", "claim_next_sd('s3')"] {
        let error = db.connect().batch_execute(&format!("SELECT {call}")).unwrap_err();
        assert_eq!(pg_claims_tests::sqlstate(&error), "23505", "{call}");
        assert_eq!(value(&mut c, all), before, "{call}");
    }
    granted(&mut c, "SD-3", "s3");
    assert_in_step(&mut c);
}

#[test]
fn subscribers_are_told_of_no_claim_that_was_taken_back() {
    // An acquisition that nobody holds is closed before the SD is given out.
    for (lost, next, written) in [
        ("DELETE FROM sd_claims", "SD-2", "IU"),
        (
            "UPDATE claude_sessions SET sd_id = NULL, claim_id = NULL, claimed_at = NULL, status = 'idle'",
            "SD-1",
            "UIU",
        ),
    ] {
        // The worker would mend it first.
        let settings = ["wal_level = logical", "pg_claims.worker = off"];
        let (server, mut c) = served("decoded", &settings);
        granted(&mut c, "SD-1", "s1");
        c.batch_execute(&format!(
            "SET session_replication_role = replica; {lost};
             UPDATE strategic_directives_v2 SET is_working_on = false, active_session_id = NULL;
             RESET session_replication_role;
             CREATE PUBLICATION all_claims FOR TABLE claude_sessions, sd_claims"
        ))
        .unwrap();
        c.batch_execute("SELECT pg_create_logical_replication_slot('told', 'pgoutput')").unwrap();
        if lost.starts_with("DELETE") {
            assert_eq!(claim(&mut c, "SD-1", "s2")["claimed_by"], "s1");
        }
        let given = json(&mut c, "SELECT claim_next_sd('s2')", &[]);
        assert_eq!(given["sd_id"], next, "{given}");
        // The publication sends a subscriber the writes of this one claim, and no others.
        let told = "SELECT string_agg(chr(get_byte(data, 0)), '' ORDER BY lsn)
                      FROM pg_logical_slot_peek_binary_changes('told', NULL, NULL, 'proto_version', '1',
                                                               'publication_names', 'all_claims')
                     WHERE get_byte(data, 0) IN (ascii('I'), ascii('U'), ascii('D'))";
        assert_eq!(value(&mut c, told).as_deref(), Some(written), "{lost}");
        c.batch_execute("SELECT pg_drop_replication_slot('told')").unwrap();
        drop(server);
    }
}
