//! Many connections, one SD.

use std::collections::HashSet;
use std::sync::Barrier;
use std::thread;

use pg_claims_tests::TestDb;
use postgres::Client;
use serde_json::Value;

use crate::support::*;

const CONNECTIONS: usize = 64;
const ROUNDS: usize = 200;

/// Every connection claims at the same moment; all answers, by session.
fn stampede(clients: &mut [Client], sd_of: impl Fn(usize) -> String + Sync) -> Vec<Value> {
    let start = Barrier::new(clients.len());
    thread::scope(|scope| {
        let claims: Vec<_> = clients
            .iter_mut()
            .enumerate()
            .map(|(n, client)| {
                let (start, sd_of) = (&start, &sd_of);
                scope.spawn(move || {
                    let (sd, session) = (sd_of(n), format!("racer-{n}"));
                    start.wait();
                    claim(client, &sd, &session)
                })
            })
            .collect();
        claims.into_iter().map(|claim| claim.join().unwrap()).collect()
    })
}

fn racers(db: &TestDb, control: &mut Client) -> Vec<Client> {
    (0..CONNECTIONS)
        .map(|n| {
            register(control, &format!("racer-{n}"));
            db.connect()
        })
        .collect()
}

#[test]
fn one_winner_each_round_and_every_loser_learns_its_name() {
    let (db, mut control) = coordinated();
    let mut clients = racers(&db, &mut control);
    let mut tokens = HashSet::new();
    for round in 0..ROUNDS {
        let answers = stampede(&mut clients, |_| "SD-1".into());
        let winners: Vec<_> = answers.iter().filter(|answer| answer["success"] == true).collect();
        assert_eq!(winners.len(), 1, "round {round}: {answers:#?}");
        let winner = winners[0]["session_id"].as_str().unwrap().to_owned();
        assert!(tokens.insert(winners[0]["claim_id"].as_i64()), "a token repeated");
        for loser in answers.iter().filter(|answer| answer["success"] == false) {
            assert_eq!(loser["error"], "already_claimed", "round {round}");
            assert_eq!(loser["claimed_by"], winner.as_str(), "round {round}: {loser}");
            assert!(loser["heartbeat_age_seconds"].is_number());
        }
        assert_eq!(release(&mut control, &winner)["success"], true);
    }
    assert_in_step(&mut control);
    assert_eq!(count(&mut control, "SELECT count(*) FROM sd_claims"), ROUNDS as i64);
}

#[test]
fn a_stale_owner_is_taken_over_by_exactly_one() {
    let (db, mut control) = coordinated();
    let mut clients = racers(&db, &mut control);
    granted(&mut control, "SD-1", "s1");
    for round in 0..20 {
        control
            .batch_execute(
                "UPDATE claude_sessions SET heartbeat_at = heartbeat_at - interval '1 hour'
                  WHERE sd_id = 'SD-1'",
            )
            .unwrap();
        let owner =
            value(&mut control, "SELECT session_id FROM claude_sessions WHERE sd_id = 'SD-1'")
                .unwrap();
        let answers = stampede(&mut clients, |_| "SD-1".into());
        let winners: Vec<_> = answers.iter().filter(|answer| answer["success"] == true).collect();
        assert_eq!(winners.len(), 1, "round {round}: {answers:#?}");
        if winners[0]["already_owned"] == false {
            assert_eq!(winners[0]["took_over"]["session_id"], owner.as_str());
        }
        assert_in_step(&mut control);
    }
}

#[test]
fn sessions_that_switch_among_few_sds_never_share_one() {
    let (db, mut control) = coordinated();
    let mut clients = racers(&db, &mut control);
    for round in 0..20 {
        // Some SDs become free, so that some can switch.
        control
            .batch_execute(
                "UPDATE claude_sessions SET sd_id = NULL WHERE sd_id IN ('SD-1', 'SD-4', 'SD-6')",
            )
            .unwrap();
        let answers = stampede(&mut clients, |n| format!("SD-{}", (n + round) % 7 + 1));
        let held: Vec<_> = answers.iter().filter(|answer| answer["success"] == true).collect();
        for (answer, n) in answers.iter().zip(0..) {
            let fine = answer["success"] == true || answer["error"] == "already_claimed";
            assert!(fine, "racer-{n}: {answer}");
        }
        assert!(!held.is_empty());
        assert_in_step(&mut control);
    }
}

#[test]
fn two_sessions_that_swap_stale_claims_do_not_deadlock() {
    let (db, mut control) = coordinated();
    let mut clients: Vec<_> = (0..2)
        .map(|n| {
            register(&mut control, &format!("racer-{n}"));
            db.connect()
        })
        .collect();
    granted(&mut control, "SD-1", "racer-0");
    granted(&mut control, "SD-2", "racer-1");
    for _ in 0..50 {
        control
            .batch_execute("UPDATE claude_sessions SET heartbeat_at = heartbeat_at - interval '1 hour' WHERE sd_id IS NOT NULL")
            .unwrap();
        // Each claims what the other holds; both are stale, so one or both may win.
        let sds = ["SD-1", "SD-2"].map(String::from);
        let first =
            value(&mut control, "SELECT sd_id FROM claude_sessions WHERE session_id = 'racer-0'");
        let other = |n: usize| {
            let first_holds_sd_1 = first.as_deref() == Some("SD-1");
            if (n == 0) == first_holds_sd_1 { sds[1].clone() } else { sds[0].clone() }
        };
        let answers = stampede(&mut clients, other);
        assert!(answers.iter().any(|answer| answer["success"] == true), "{answers:#?}");
        assert_in_step(&mut control);
        for n in 0..2 {
            let session = format!("racer-{n}");
            if beat(&mut control, &session)["sd_id"].is_null() {
                let free = value(&mut control, "SELECT min(sd_id) FROM v_directives WHERE NOT is_working_on AND sd_id IN ('SD-1', 'SD-2')").unwrap();
                granted(&mut control, &free, &session);
            }
        }
    }
}

/// A hundred times: SD-1 is completed by one connection while another one calls `call`.
/// Returns the answers.
fn against_completion(
    prepare: impl Fn(&mut Client),
    call: impl Fn(&mut Client) -> Value,
) -> Vec<Value> {
    let (db, mut control) = coordinated();
    let mut finisher = db.connect();
    let mut caller = db.connect();
    (0..100)
        .map(|_| {
            control
                .batch_execute("UPDATE strategic_directives_v2 SET status = 'draft' WHERE sd_id = 'SD-1'")
                .unwrap();
            prepare(&mut control);
            let start = Barrier::new(2);
            let answer = thread::scope(|scope| {
                scope.spawn(|| {
                    start.wait();
                    finisher
                        .batch_execute("UPDATE strategic_directives_v2 SET status = 'completed' WHERE sd_id = 'SD-1'")
                        .unwrap();
                });
                start.wait();
                call(&mut caller)
            });
            assert_in_step(&mut control);
            answer
        })
        .collect()
}

#[test]
fn a_claim_and_a_completion_at_once_never_leave_a_finished_sd_claimed() {
    for answer in against_completion(|_| {}, |c| claim(c, "SD-1", "s1")) {
        let fine = answer["success"] == true || answer["error"] == "sd_terminal_status";
        assert!(fine, "{answer}");
    }
}

#[test]
fn release_and_completion_at_once_do_not_deadlock() {
    let held = |c: &mut Client| {
        granted(c, "SD-1", "s1");
    };
    for answer in against_completion(held, |c| release(c, "s1")) {
        let lost = ["no_claim", "claim_lost"].map(Value::from).contains(&answer["error"]);
        assert!(answer["success"] == true || lost, "{answer}");
    }
}
