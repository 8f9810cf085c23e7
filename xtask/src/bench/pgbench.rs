//! Running pgbench, side by side.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use pg_claims_tests::Server;

use super::report::Measured;
use super::work::Work;
use super::{ASYNCHRONOUS, CLIENTS, connect, scripts};

/// One side of a comparison.
pub struct Side<'a> {
    /// Where it runs.
    pub server: &'a Server,
    /// In which database.
    pub database: &'a str,
    /// What it runs, in pgbench's language.
    pub script: String,
    /// What that does.
    pub work: Work,
    /// How many clients at once.
    pub clients: usize,
    /// Settings of its connections.
    pub options: &'a str,
}

impl<'a> Side<'a> {
    /// One with the clients of a comparison of claims, who do not wait for the disk.
    pub fn asynchronous(server: &'a Server, database: &'a str, script: String, work: Work) -> Self {
        Self { server, database, script, work, clients: CLIENTS, options: ASYNCHRONOUS }
    }

    /// Claims and releases with the extension, of the first so many SDs and sessions.
    pub fn cycle(server: &'a Server, database: &'a str, count: usize) -> Self {
        Self::asynchronous(server, database, scripts::cycle(count, CLIENTS), Work::CYCLES)
    }

    /// Runs for so long; transactions a second. Fails if they did not do their work.
    pub fn run(&self, folder: &Path, seconds: u64) -> Result<f64> {
        let mut client = connect(self.server, self.database)?;
        let begun = self.work.begin(&mut client)?;
        let told = self.pgbench(folder, seconds)?;
        begun.check(&mut client, told.transactions, self.clients).with_context(|| {
            format!("this script did not do the work that is compared:\n{}", self.script)
        })?;
        Ok(told.rate)
    }

    fn pgbench(&self, folder: &Path, seconds: u64) -> Result<Told> {
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
        Told::read(&told)
    }

    /// Leaves nothing of earlier turns to be cleaned up in this one.
    fn vacuum(&self) -> Result<()> {
        connect(self.server, self.database)?.batch_execute("VACUUM (ANALYZE)")?;
        Ok(())
    }
}

/// What pgbench tells of a run.
#[derive(Debug, PartialEq)]
struct Told {
    transactions: u64,
    /// Transactions a second.
    rate: f64,
}

impl Told {
    fn read(text: &str) -> Result<Self> {
        let word = |start: &str| {
            text.lines().find_map(|line| line.strip_prefix(start)?.split_whitespace().next())
        };
        let transactions = word("number of transactions actually processed: ")
            .and_then(|word| word.parse().ok())
            .with_context(|| format!("pgbench told no number of transactions:\n{text}"))?;
        let rate = word("tps = ")
            .and_then(|word| word.parse().ok())
            .with_context(|| format!("pgbench told no rate:\n{text}"))?;
        Ok(Self { transactions, rate })
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

    /// The same where turns leave much to be vacuumed: when the server gets to that by itself, one side
    /// would pay for another.
    pub fn in_vacuumed_turns(&self, sides: &[Side<'_>]) -> Result<Vec<Measured>> {
        self.measure(sides.len(), |side| {
            sides[side].vacuum()?;
            sides[side].run(&self.folder, self.seconds)
        })
    }

    /// The same for anything that can be measured.
    pub fn measure(
        &self,
        sides: usize,
        mut measure: impl FnMut(usize) -> Result<f64>,
    ) -> Result<Vec<Measured>> {
        let mut measured = vec![Measured::default(); sides];
        for round in 0..self.rounds {
            for side in order(round, sides) {
                measured[side].add(measure(side)?);
            }
        }
        Ok(measured)
    }
}

/// Who comes when: the other way round in every second round, as each may profit or suffer from who was
/// there before.
fn order(round: usize, sides: usize) -> Vec<usize> {
    if round.is_multiple_of(2) { (0..sides).collect() } else { (0..sides).rev().collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "pgbench (15.20 (Debian 15.20-0+deb12u1))
transaction type: script.sql
scaling factor: 1
query mode: prepared
number of clients: 8
number of threads: 2
maximum number of tries: 1
duration: 8 s
number of transactions actually processed: 62904
number of failed transactions: 0 (0.000%)
latency average = 1.017 ms
initial connection time = 9.210 ms
tps = 7863.251407 (without initial connection time)
";

    #[test]
    fn reads_what_pgbench_tells() {
        let told = Told::read(OUTPUT).unwrap();
        assert_eq!(told, Told { transactions: 62_904, rate: 7863.251407 });
    }

    #[test]
    fn says_what_pgbench_did_not_tell() {
        let without = |start: &str| -> String {
            let lines = OUTPUT.lines().filter(|line| !line.starts_with(start));
            Told::read(&lines.collect::<Vec<_>>().join("\n")).unwrap_err().to_string()
        };
        assert!(without("tps").starts_with("pgbench told no rate"));
        assert!(without("number of transactions").starts_with("pgbench told no number"));
    }

    #[test]
    fn the_order_alternates_and_each_value_stays_with_its_side() {
        let plan = Plan { folder: PathBuf::new(), seconds: 0, rounds: 3 };
        let mut turns = Vec::new();
        let measured = plan
            .measure(2, |side| {
                turns.push(side);
                Ok(side as f64)
            })
            .unwrap();
        assert_eq!(turns, [0, 1, 1, 0, 0, 1]);
        assert_eq!(measured.iter().map(Measured::median).collect::<Vec<_>>(), [0.0, 1.0]);
    }
}
