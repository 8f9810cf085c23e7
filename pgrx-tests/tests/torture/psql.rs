//! Clients in processes of their own, which are killed or stopped amid a transaction.

use std::io::{ErrorKind, Write};
use std::process::{Child, Stdio};
use std::time::Duration;

use fastrand::Rng;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::draw::{self, chance};
use crate::transaction;
use crate::verbs::{self, Kind, Level, Operation};
use crate::world::World;

/// Its sessions are those of this client.
const NUMBER: u64 = 8;

/// One psql after the other. Nobody reads what psql was told, so whether its transactions took effect counts as unknown.
pub fn run(world: &World) {
    let mut step = 0;
    while !world.is_over() {
        one(world, &mut world.generator(draw::PSQL, step), step);
        step += 1;
        world.pause(Duration::from_millis(100));
    }
}

fn one(world: &World, rng: &mut Rng, step: u64) {
    let script = script(world, rng);
    let (stops, after) = (chance(rng, 40), Duration::from_micros(rng.u64(1_000..60_000)));
    let stopped = Duration::from_millis(rng.u64(300..1_500));
    let from = world.log.begin();
    let mut child = world
        .server
        .client_program("psql", &world.database)
        .args(["-X", "-q"])
        .env("PGAPPNAME", crate::world::CLIENT)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // psql has ended already where the server is down, and then reads nothing.
    if let Err(error) = child.stdin.as_mut().unwrap().write_all(script.as_bytes())
        && error.kind() != ErrorKind::BrokenPipe
    {
        world.log.violation(format!("psql could not be given its script: {error}"));
    }
    std::thread::sleep(after);
    let end = if stops {
        signal(&child, Signal::SIGSTOP);
        world.pause(stopped);
        signal(&child, Signal::SIGCONT);
        "stopped, and went on"
    } else {
        signal(&child, Signal::SIGKILL);
        "killed"
    };
    drop(child.stdin.take());
    child.wait().unwrap();
    let who = format!("phase {} psql {step}", world.phase);
    world.log.note(from, &who, &script, &end);
}

/// Not waited for yet, so the number is its own.
fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(child.id() as i32), signal).unwrap();
}

/// A few operations in a transaction that may be left open, which is where the signal mostly finds it.
fn script(world: &World, rng: &mut Rng) -> String {
    let mut lines = vec!["\\set ON_ERROR_STOP on".to_owned(), "BEGIN;".into()];
    for _ in 0..rng.usize(1..4) {
        let operation: Operation = loop {
            let drawn = verbs::draw(rng, NUMBER, Level::Superuser, world.setting.backlog);
            if drawn.kind != Kind::Unguarded {
                break drawn;
            }
        };
        let (claim_id, held) = world.history.last_told(&operation.session);
        let sql = operation.sql.replace("{claim}", &claim_id.to_string()).replace("{held}", &held);
        lines.push(format!("{sql};"));
        lines.push(format!("SELECT pg_sleep({});", f64::from(rng.u8(..30)) / 1000.0));
    }
    lines.push(transaction::ending(rng).into());
    lines.join("\n") + "\n"
}
