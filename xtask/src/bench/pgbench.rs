//! Running pgbench, side by side.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use pg_claims_tests::Server;

use super::report::Measured;

/// One side of a comparison.
pub struct Side<'a> {
    /// Where it runs.
    pub server: &'a Server,
    /// In which database.
    pub database: &'a str,
    /// What it runs, in pgbench's language.
    pub script: String,
    /// How many clients at once.
    pub clients: usize,
    /// Settings of its connections.
    pub options: &'a str,
}

impl Side<'_> {
    /// Runs for so long; transactions a second.
    pub fn run(&self, folder: &Path, seconds: u64) -> Result<f64> {
        let script = folder.join("script.sql");
        fs::write(&script, &self.script).context("could not write a script")?;
        let output = self
            .server
            .client_program("pgbench", self.database)
            .args(["--no-vacuum", "--protocol=prepared", "--jobs=2"])
            .arg(format!("--client={}", self.clients))
            .arg(format!("--time={seconds}"))
            .arg(format!("--file={}", script.display()))
            .env("PGOPTIONS", self.options)
            .output()
            .context("could not run pgbench")?;
        let told = String::from_utf8_lossy(&output.stdout);
        let complaint = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() || complaint.contains("ERROR") {
            bail!("pgbench failed:\n{}\n{told}{complaint}", self.script);
        }
        let rate = told.lines().find_map(|line| line.strip_prefix("tps = "));
        rate.and_then(|rest| rest.split_whitespace().next()?.parse().ok())
            .with_context(|| format!("pgbench told no rate:\n{told}"))
    }
}

/// How long and how often.
pub struct Plan {
    /// Where scripts are written.
    pub folder: PathBuf,
    /// How long each turn takes.
    pub seconds: u64,
    /// How many turns each side gets.
    pub rounds: usize,
}

impl Plan {
    /// The sides in turns.
    pub fn in_turns(&self, sides: &[Side<'_>]) -> Result<Vec<Measured>> {
        self.measure(sides.len(), |side| sides[side].run(&self.folder, self.seconds))
    }

    /// The same for anything that can be measured.
    pub fn measure(
        &self,
        sides: usize,
        mut measure: impl FnMut(usize) -> Result<f64>,
    ) -> Result<Vec<Measured>> {
        let mut measured = vec![Measured::default(); sides];
        for _ in 0..self.rounds {
            for (side, measured) in measured.iter_mut().enumerate() {
                measured.add(measure(side)?);
            }
        }
        Ok(measured)
    }
}
