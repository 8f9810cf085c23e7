//! What a phase plays on: which backlog, whose triggers, how the server runs, what goes wrong.

use fastrand::Rng;

use crate::draw::{self, chance};

/// The table that is the backlog.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backlog {
    Own,
    Bound,
    Partitioned,
}

impl Backlog {
    /// Its name, and that of its key.
    pub fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::Own => ("strategic_directives_v2", "sd_id"),
            Self::Bound => ("team_items", "item"),
            Self::Partitioned => ("team_parts", "part"),
        }
    }

    /// Makes it, if it is not the extension's own.
    pub fn create(self) -> String {
        let columns = "title text, status text DEFAULT 'draft', priority text, dependencies jsonb DEFAULT '[]',
                       is_working_on boolean, active_session_id text";
        match self {
            Self::Own => String::new(),
            Self::Bound => format!("CREATE TABLE team_items (item text PRIMARY KEY, legacy uuid UNIQUE, {columns})"),
            Self::Partitioned => format!(
                "CREATE TABLE team_parts (part text PRIMARY KEY, {columns}) PARTITION BY HASH (part);
                 CREATE TABLE team_parts_0 PARTITION OF team_parts FOR VALUES WITH (MODULUS 2, REMAINDER 0);
                 CREATE TABLE team_parts_1 PARTITION OF team_parts FOR VALUES WITH (MODULUS 2, REMAINDER 1)"
            ),
        }
    }

    /// Makes it the backlog. Doing so again is allowed.
    pub fn bind(self) -> &'static str {
        match self {
            Self::Own => "SELECT 1",
            Self::Bound => "SELECT bind_directives('team_items', '{item,legacy}')",
            Self::Partitioned => "SELECT bind_directives('team_parts', '{part}')",
        }
    }
}

/// What goes wrong in a phase, beside clients that stop, roll back and run into time limits, which they do in each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// Connections are cancelled and terminated, psql is killed and stopped, the worker is terminated.
    Connections,
    /// The server crashes, or restarts, and server processes are killed.
    Crashes,
    /// Tables are changed, rewritten and indexed anew, settings reloaded.
    Maintenance,
}

/// A phase's stage. All of it follows from the seed.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    pub backlog: Backlog,
    pub trouble: Trouble,
    pub watched: bool,
    pub preloaded: bool,
    pub clients: u64,
}

impl Setting {
    pub fn draw(seed: u64, phase: u64) -> Self {
        let mut rng = draw::generator(seed, phase, draw::PHASE, 0);
        Self {
            backlog: in_turn(seed, phase, [Backlog::Own, Backlog::Bound, Backlog::Partitioned], 1),
            trouble: in_turn(
                seed,
                phase,
                [Trouble::Connections, Trouble::Crashes, Trouble::Maintenance],
                2,
            ),
            watched: chance(&mut rng, 40),
            preloaded: chance(&mut rng, 60),
            clients: rng.u64(6..11),
        }
    }
}

/// Of three phases in a row each has another one, in an order of its own.
fn in_turn<T: Copy>(seed: u64, phase: u64, mut of: [T; 3], stream: u64) -> T {
    let mut rng: Rng = draw::generator(seed, phase / 3, draw::PHASE, stream);
    rng.shuffle(&mut of);
    of[(phase % 3) as usize]
}
