//! Many clients write at random while connections, workers and the server die, and every promise is checked. See
//! docs/testing.md.
//!
//! For half a minute in each run of the tests; `cargo xtask torture` takes as long as it is told. A binary of its own, so
//! that it does not run beside the load of other tests.

mod answer;
mod client;
mod direct;
mod draw;
mod faults;
mod follower;
mod history;
mod invariants;
mod logbook;
mod maintenance;
mod memory;
mod observer;
mod phases;
mod prepared;
mod promises;
mod psql;
mod setting;
mod sqlstates;
mod transaction;
mod verbs;
mod work;
mod world;

use std::env;
use std::time::{Duration, Instant};

use pg_claims_tests::{ENV_TORTURE_SECONDS, ENV_TORTURE_SEED};

/// A whole number from the environment.
fn from_environment(variable: &str) -> Option<u64> {
    env::var(variable).ok().and_then(|value| value.parse().ok())
}

#[test]
fn torture_breaks_no_promise() {
    let seconds = from_environment(ENV_TORTURE_SECONDS).unwrap_or(27);
    let seed = from_environment(ENV_TORTURE_SEED).unwrap_or_else(|| fastrand::u64(..1_000_000_000));
    println!("torture: seed {seed}");
    let begin = Instant::now();
    let mut run = phases::Run::new(seed);
    let mut phase = 0;
    // Three at least, one of each kind of fault.
    while phase < 3 || begin.elapsed() < Duration::from_secs(seconds) {
        run.phase(phase);
        phase += 1;
    }
    run.end();
}
