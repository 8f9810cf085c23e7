//! A thread that makes things go wrong: it ends connections, kills server processes, and crashes the server.

use std::sync::atomic::Ordering;
use std::time::Duration;

use fastrand::Rng;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pg_claims_tests::Stop;
use postgres::{Client, Error};

use crate::draw;
use crate::maintenance;
use crate::setting::Trouble;
use crate::world::{CLIENT, World};

/// One fault after the other, until the phase is over. Returns how many.
pub fn run(world: &World) -> u64 {
    let mut connection = None;
    let mut step = 0;
    world.pause(Duration::from_millis(300));
    while !world.is_over() {
        let mut rng = world.generator(draw::FAULTS, step);
        step += 1;
        match world.setting.trouble {
            Trouble::Connections => of_connections(world, &mut connection, &mut rng),
            Trouble::Crashes => of_server(world, &mut connection, &mut rng),
            Trouble::Maintenance => maintenance::one(world, &mut connection, &mut rng),
        }
    }
    step
}

fn note(world: &World, what: &str, answer: &dyn std::fmt::Display) {
    world.log.note(world.log.begin(), &format!("phase {} fault", world.phase), what, answer);
}

fn of_connections(world: &World, connection: &mut Option<Client>, rng: &mut Rng) {
    let (what, kind) = match rng.u8(..20) {
        0..9 => ("pg_cancel_backend", "client backend"),
        9..16 => ("pg_terminate_backend", "client backend"),
        16..18 => ("pg_terminate_backend", "pg_claims worker"),
        18 => ("pg_cancel_backend", "pg_claims worker"),
        _ => ("pg_terminate_backend", "pg_claims launcher"),
    };
    let which = rng.i32(..1000);
    let Some(hit) = world.insist(connection, |client| {
        let found = client.query(
            &format!("SELECT pid, {what}(pid) FROM ({VICTIM}) v"),
            &[&kind, &CLIENT, &which],
        )?;
        Ok(found.first().map(|row| row.get::<_, i32>(0)))
    }) else {
        return;
    };
    note(world, &format!("{what} of a {kind}"), &format!("{hit:?}"));
    world.pause(Duration::from_millis(rng.u64(20..200)));
}

/// A process of a kind; of connections, one of a client's. The one that $3 names by its turn.
const VICTIM: &str = "
    SELECT pid FROM pg_stat_activity
     WHERE backend_type = $1 AND datname IS NOT DISTINCT FROM CASE $1 WHEN 'pg_claims launcher' THEN NULL ELSE current_database() END
       AND (backend_type <> 'client backend' OR application_name = $2)
     ORDER BY (hashint4($3) # hashint4(pid)) LIMIT 1";

fn of_server(world: &World, connection: &mut Option<Client>, rng: &mut Rng) {
    // A while to do something in.
    world.pause(Duration::from_millis(rng.u64(800..2_500)));
    if world.is_over() {
        return;
    }
    match rng.u8(..10) {
        0..4 => crash(world),
        4..6 => {
            let how = if rng.bool() { Stop::Fast } else { Stop::Immediate };
            // PostgreSQL 18 may not come to its end where it is stopped while it recovers.
            if world.insist(connection, |client| client.batch_execute("SELECT 1")).is_some() {
                restart(world, how);
            }
        }
        _ => kill_a_process(world, connection, rng),
    }
}

fn crash(world: &World) {
    world.deeds.crashes.fetch_add(1, Ordering::Relaxed);
    note(world, "the server crashes", &"…");
    let outcome = world.server.crash().and_then(|()| world.server.start());
    started(world, "crash", outcome);
}

fn restart(world: &World, how: Stop) {
    if how == Stop::Immediate {
        world.deeds.crashes.fetch_add(1, Ordering::Relaxed);
    }
    note(world, &format!("the server restarts, {how:?}"), &"…");
    let outcome = world.server.stop(how).and_then(|()| world.server.start());
    started(world, "restart", outcome);
}

fn started(world: &World, what: &str, outcome: anyhow::Result<()>) {
    match outcome {
        Ok(()) => note(world, what, &"the server is back"),
        Err(error) => world.log.violation(format!("no server after a {what}: {error:#}")),
    }
}

/// By SIGKILL, after which the postmaster starts all others anew.
fn kill_a_process(world: &World, connection: &mut Option<Client>, rng: &mut Rng) {
    let kind = draw::one_of(
        rng,
        &["client backend", "client backend", "pg_claims worker", "pg_claims launcher"],
    );
    let which = rng.i32(..1000);
    let Some(Some(pid)) = world.insist(connection, |client| victim(client, kind, which)) else {
        return;
    };
    world.deeds.kills.fetch_add(1, Ordering::Relaxed);
    let outcome = kill(Pid::from_raw(pid), Signal::SIGKILL);
    note(world, &format!("kill -9 of a {kind}"), &format!("{pid} {outcome:?}"));
    if let Err(error) = outcome
        && error != Errno::ESRCH
    {
        world.log.violation(format!("kill -9 of process {pid}: {error}"));
    }
}

fn victim(client: &mut Client, kind: &str, which: i32) -> Result<Option<i32>, Error> {
    let found = client.query(VICTIM, &[&kind, &CLIENT, &which])?;
    Ok(found.first().map(|row| row.get(0)))
}
