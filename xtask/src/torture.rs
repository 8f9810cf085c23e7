//! Torture: the test of that name for as long as one likes. See docs/testing.md.

use anyhow::{Result, bail};
use pg_claims_tests::{ENV_TORTURE_SECONDS, ENV_TORTURE_SEED};

use crate::interrupt;
use crate::layout::Layout;
use crate::lock::Lock;
use crate::setup::Choice;
use crate::test;

/// The test, in a binary of its own.
const TEST: &str = "torture_breaks_no_promise";

/// Runs for about so many seconds. The seed gives each client the same operations again.
pub fn run(layout: &Layout, choice: &Choice, seconds: u64, seed: Option<u64>) -> Result<()> {
    let _lock = Lock::take(layout)?;
    interrupt::watch()?;
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()));
    let environment =
        [(ENV_TORTURE_SECONDS, seconds.to_string()), (ENV_TORTURE_SEED, seed.to_string())];
    let arguments = [TEST.to_owned(), "--nocapture".to_owned()];
    if !test::on_choice(layout, choice, &arguments, &environment)? {
        bail!("a promise was broken; seed {seed}");
    }
    Ok(())
}
