//! Looks at the promises while all goes on, and at what memory the server's processes take.

use std::time::Duration;

use crate::invariants;
use crate::memory::Memory;
use crate::world::World;

const EVERY: Duration = Duration::from_millis(400);

pub fn run(world: &World, memory: &mut Memory) -> u64 {
    let mut connection = None;
    let (backlog, _) = world.setting.backlog.names();
    let mut looks = 0;
    while !world.is_over() {
        let broken = world.insist(&mut connection, |client| {
            memory.sample(client)?;
            invariants::broken(client, backlog, false)
        });
        let Some(broken) = broken else { return looks };
        for what in broken {
            world.log.violation(what);
        }
        looks += 1;
        world.pause(EVERY);
    }
    looks
}
