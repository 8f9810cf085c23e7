//! Prepared transactions: who ends them, and how, is told by their names.

use std::collections::HashMap;
use std::time::Duration;

use postgres::Client;

use crate::answer::{Answer, ask};
use crate::sqlstates;
use crate::verbs::Kind;
use crate::world::World;

/// How often it is looked for them, and after how many looks those are ended whose own client was to do it.
const LOOK: Duration = Duration::from_millis(60);
const LOST_AFTER: u32 = 25;

pub fn name(of: &str, by_itself: bool, commits: bool) -> String {
    let (who, how) =
        (if by_itself { "itself" } else { "another" }, if commits { "commit" } else { "back" });
    format!("{of}-{who}-{how}")
}

fn commits(gid: &str) -> bool {
    gid.ends_with("-commit")
}

/// The statement that ends one as its name says.
pub fn end(gid: &str) -> String {
    let how = if commits(gid) { "COMMIT" } else { "ROLLBACK" };
    format!("{how} PREPARED '{gid}'")
}

/// Ends those that their own clients leave, also after a crash, until all clients have gone and none is left.
pub fn run(world: &World) {
    let mut connection = None;
    let mut seen: HashMap<String, u32> = HashMap::new();
    loop {
        let was_last = world.are_clients_gone();
        let found = world.insist(&mut connection, |client| {
            let found = client.query(
                "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()",
                &[],
            )?;
            Ok(found.iter().map(|row| row.get(0)).collect::<Vec<String>>())
        });
        let Some(found) = found else { return };
        for gid in &found {
            let looks = seen.entry(gid.clone()).or_default();
            *looks += 1;
            let is_due = if gid.contains("-another-") { *looks > 1 } else { *looks > LOST_AFTER };
            if (is_due || was_last)
                && let Some(client) = &mut connection
            {
                finish(world, client, gid);
            }
        }
        if world.log.has_violations() || was_last && found.is_empty() {
            return;
        }
        std::thread::sleep(LOOK);
    }
}

fn finish(world: &World, client: &mut Client, gid: &str) {
    let from = world.log.begin();
    let sql = end(gid);
    let answer = ask(client, &sql);
    world.log.note(from, &format!("phase {} finisher", world.phase), &sql, &answer);
    match answer {
        Answer::Rows(_) => world.history.settle(gid, commits(gid)),
        Answer::Refused { code, text }
            if !sqlstates::is_documented(Kind::EndPrepared, &code, false, false) =>
        {
            world.log.violation(format!("{sql}: {code}: {text}"));
        }
        // Looked for again.
        _ => {}
    }
}
