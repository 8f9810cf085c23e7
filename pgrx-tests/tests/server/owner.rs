//! Whose a session is: a role that is missing, renamed or dropped, and giving its sessions to another one.

use pg_claims_tests::{
    TestDb, backend_pid, detail, hint, json, sqlstate, wait_until, wait_until_blocked,
};
use postgres::Client;

use crate::support::*;
use crate::worker::{PRELOAD, served};

fn worker(db: &TestDb, c: &mut Client, name: &str) -> String {
    let role = db.role(name);
    json(c, "SELECT grant_coordination($1, 'worker')", &[&role]);
    role
}

const SHOWN: &str = "SELECT owner_role FROM v_active_sessions WHERE session_id = 'theirs'";
const STORED: &str = "SELECT owner_role FROM claude_sessions WHERE session_id = 'theirs'";

/// A role that is not there under the name of the dump, and the restored copy.
fn restored_without_role(db: &TestDb, c: &mut Client) -> (TestDb, Client, String) {
    let role = worker(db, c, "agent");
    let mut theirs = db.connect_as(&role);
    register(&mut theirs, "theirs");
    granted(&mut theirs, "SD-1", "theirs");
    drop(theirs);
    let dump = db.dump_with(&["--no-owner", "--no-acl"]);
    let renamed = format!("{role}_elsewhere");
    c.batch_execute(&format!("ALTER ROLE {role} RENAME TO {renamed}")).unwrap();
    let copy = TestDb::empty();
    copy.psql(&dump);
    c.batch_execute(&format!("ALTER ROLE {renamed} RENAME TO {role}")).unwrap();
    let copied = copy.connect();
    (copy, copied, role)
}

#[test]
fn sessions_of_a_role_that_is_missing_are_nobody_s_until_an_operator_gives_them_away() {
    let (db, mut c) = coordinated();
    let (copy, mut c, role) = restored_without_role(&db, &mut c);
    assert_eq!(count(&mut c, "SELECT count(*) FROM claude_sessions WHERE owner_oid IS NULL"), 1);
    assert_eq!(value(&mut c, SHOWN).as_deref(), Some(role.as_str()), "the name in the dump");
    assert_in_step(&mut c);
    // Nobody's, even for a role that has that name by now.
    json(&mut c, "SELECT grant_coordination($1, 'worker')", &[&role]);
    let mut same_name = copy.connect_as(&role);
    for call in [
        "SELECT update_session_heartbeat('theirs')",
        "SELECT heartbeat_sessions('{theirs}')",
        "SELECT release_sd('theirs')",
        "SELECT register_session('theirs')",
        "SELECT assert_claim('SD-1', 'theirs', claim_id) FROM v_active_sessions WHERE session_id = 'theirs'",
        "SELECT end_session('theirs')",
    ] {
        let error = same_name.query(call, &[]).unwrap_err();
        assert_eq!(sqlstate(&error), "42501", "{call}");
        assert!(detail(&error).contains("nobody"), "{call}: {}", detail(&error));
        assert!(hint(&error).contains("assign_sessions"), "{call}: {}", hint(&error));
    }
    // An operator may act for it, and with no heartbeat it goes stale like any other.
    assert_eq!(beat(&mut c, "theirs")["sd_id"], "SD-1");
    age_heartbeat(&mut c, "theirs", "1 hour");
    granted(&mut c, "SD-1", "s1");
    granted(&mut c, "SD-2", "theirs");

    let answer = json(&mut c, "SELECT assign_sessions($1::text::name, $1::text::name)", &[&role]);
    assert_eq!(answer["sessions"], 1, "{answer}");
    assert_eq!((&answer["success"], &answer["to"]), (&true.into(), &role.as_str().into()));
    assert_eq!(beat(&mut same_name, "theirs")["sd_id"], "SD-2");
    assert_eq!(release(&mut same_name, "theirs")["success"], true);
    drop(same_name);
    drop(copy);
}

#[test]
fn a_session_follows_the_rename_of_its_role() {
    let (db, mut c) = coordinated();
    let role = worker(&db, &mut c, "agent");
    let mut theirs = db.connect_as(&role);
    register(&mut theirs, "theirs");
    let renamed = format!("{role}_renamed");
    c.batch_execute(&format!("ALTER ROLE {role} RENAME TO {renamed}")).unwrap();
    assert_eq!(value(&mut c, SHOWN).as_deref(), Some(renamed.as_str()), "at once");
    assert_eq!(beat(&mut theirs, "theirs")["success"], true, "it is the same role");
    // A role that takes the old name is another one.
    c.batch_execute(&format!("CREATE ROLE {role} LOGIN")).unwrap();
    json(&mut c, "SELECT grant_coordination($1, 'worker')", &[&role]);
    let error =
        db.connect_as(&role).query("SELECT update_session_heartbeat('theirs')", &[]).unwrap_err();
    assert_eq!(sqlstate(&error), "42501");
    assert_eq!(
        detail(&error),
        format!("The session belongs to role \"{renamed}\"; the caller is role \"{role}\".")
    );
    let none = json(&mut c, "SELECT assign_sessions($1::text::name, 'postgres')", &[&role]);
    assert_eq!(none["sessions"], 0, "the name that is stored is that of another role by now");
    register(&mut theirs, "theirs");
    assert_eq!(value(&mut c, STORED).as_deref(), Some(renamed.as_str()));
    c.batch_execute(&format!(
        "SELECT grant_coordination('{role}', 'none'); REVOKE ALL ON SCHEMA public FROM {role}; DROP ROLE {role};
         ALTER ROLE {renamed} RENAME TO {role}"
    ))
    .unwrap();
    json(&mut c, "SELECT cleanup_stale_sessions()", &[]);
    assert_eq!(value(&mut c, STORED).as_deref(), Some(role.as_str()));
}

#[test]
fn the_worker_writes_the_names_of_renamed_roles() {
    let (_server, mut c) = served("renamed", &[PRELOAD]);
    c.batch_execute("CREATE ROLE agent LOGIN; UPDATE claude_sessions SET owner_role = 'agent' WHERE session_id = 's1'").unwrap();
    granted(&mut c, "SD-1", "s2");
    for name in ["renamed", "again"] {
        let stored = "SELECT owner_role FROM claude_sessions WHERE session_id = 's1'";
        let before = value(&mut c, stored).unwrap();
        c.batch_execute(&format!("ALTER ROLE {before} RENAME TO {name}")).unwrap();
        // Its claim keeps the worker coming; it may have been here a moment ago.
        wait_until("the name to be written", || {
            beat(&mut c, "s2");
            value(&mut c, stored).as_deref() == Some(name)
        });
    }
}

#[test]
fn the_sessions_of_a_dropped_role_keep_its_name_and_can_be_given_away() {
    let (db, mut c) = coordinated();
    let (role, heir) = (format!("gone_{}", db.name()), worker(&db, &mut c, "heir"));
    c.batch_execute(&format!("CREATE ROLE {role}")).unwrap();
    c.batch_execute(&format!(
        "UPDATE claude_sessions SET owner_role = '{role}' WHERE session_id = 's1'"
    ))
    .unwrap();
    granted(&mut c, "SD-1", "s1");
    c.batch_execute(&format!("DROP ROLE {role}")).unwrap();
    let shown = "SELECT owner_role FROM v_active_sessions WHERE session_id = 's1'";
    assert_eq!(value(&mut c, shown).as_deref(), Some(role.as_str()));
    let mut theirs = db.connect_as(&heir);
    let error = theirs.query("SELECT release_sd('s1')", &[]).unwrap_err();
    assert!(hint(&error).contains("assign_sessions"), "{}", hint(&error));
    let sql = "SELECT assign_sessions($1::text::name, $2::text::name)";
    let error = theirs.query(sql, &[&role, &heir]).unwrap_err();
    assert_eq!(sqlstate(&error), "42501", "operators only");
    assert_eq!(json(&mut c, sql, &[&role, &heir])["sessions"], 1);
    assert_eq!(release(&mut theirs, "s1")["released_sd"], "SD-1");
    assert_in_step(&mut c);
}

#[test]
fn an_owner_is_named_and_must_be_there() {
    let (db, mut c) = coordinated();
    let role = worker(&db, &mut c, "agent");
    let missing =
        "UPDATE claude_sessions SET owner_role = 'nobody_of_that_name' WHERE session_id = 's1'";
    let error = c.batch_execute(missing).unwrap_err();
    assert_eq!(sqlstate(&error), "42704");
    let calls = [
        ("SELECT assign_sessions('a', 'nobody_of_that_name')", "42704"),
        ("SELECT assign_sessions('a', NULL)", "22023"),
        ("SELECT assign_sessions(NULL, 'postgres')", "22023"),
    ];
    for (call, code) in calls {
        assert_eq!(sqlstate(&c.query(call, &[]).unwrap_err()), code, "{call}");
    }
    // The name decides, whatever number is written along.
    c.batch_execute(&format!(
        "INSERT INTO claude_sessions (session_id, owner_role, owner_oid) VALUES ('by-hand', '{role}', 10);
         UPDATE claude_sessions SET owner_oid = 10 WHERE session_id = 'by-hand'"
    ))
    .unwrap();
    assert_eq!(beat(&mut db.connect_as(&role), "by-hand")["success"], true);
}

#[test]
fn an_operator_may_refresh_a_session_that_another_role_is_just_registering() {
    let (db, mut operator) = coordinated();
    let role = worker(&db, &mut operator, "first");
    let mut first = db.connect_as(&role);
    first.batch_execute("BEGIN; SELECT register_session('both')").unwrap();
    let pid = backend_pid(&mut operator);
    let second = std::thread::spawn(move || register(&mut operator, "both"));
    wait_until_blocked(&db, pid);
    first.batch_execute("COMMIT").unwrap();
    assert_eq!(second.join().unwrap()["success"], true);
    let owner = "SELECT owner_role FROM v_active_sessions WHERE session_id = 'both'";
    assert_eq!(value(&mut db.connect(), owner).as_deref(), Some(role.as_str()));
}
