//! is_working_on and active_session_id, whoever writes them.

use crate::support::*;

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
