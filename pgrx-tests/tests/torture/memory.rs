//! Memory of the server's processes that nobody else shares.

use std::collections::HashMap;
use std::fs;

use postgres::{Client, Error};

/// A process has read what it keeps of the catalogue after so many samples.
const WARM: usize = 4;

/// By how much a process of that kind may grow from then on, in kB. A client's fills with plans whenever it comes to call
/// what it has not called yet, or the catalogue has changed: that is some 35 MB, in steps, on tables with triggers.
fn may_grow(kind: &str) -> i64 {
    if kind == "client backend" { 64 * 1024 } else { 12 * 1024 }
}

/// Samples in kB by process: its number, start and kind.
#[derive(Default)]
pub struct Memory(HashMap<(i32, String, String), Vec<i64>>);

impl Memory {
    /// One sample of each process.
    pub fn sample(&mut self, client: &mut Client) -> Result<(), Error> {
        let processes = client.query(
            "SELECT pid, backend_start::text, backend_type FROM pg_stat_activity
              WHERE backend_type IN ('client backend', 'pg_claims launcher', 'pg_claims worker')",
            &[],
        )?;
        for row in processes {
            if let Some(private) = private_kilobytes(row.get(0)) {
                self.0.entry((row.get(0), row.get(1), row.get(2))).or_default().push(private);
            }
        }
        Ok(())
    }

    /// Those that grew by more than they may.
    pub fn grown(&self) -> Vec<String> {
        self.0
            .iter()
            .filter(|((_, _, kind), samples)| growth(samples) > may_grow(kind))
            .map(|((pid, start, kind), samples)| {
                format!("the {kind} {pid} of {start} grew: kB {samples:?}")
            })
            .collect()
    }

    /// The most that any did, in the whole run.
    pub fn greatest_growth(&self) -> i64 {
        self.0.values().map(|samples| growth(samples)).max().unwrap_or_default()
    }
}

fn growth(samples: &[i64]) -> i64 {
    match samples.get(WARM) {
        Some(warm) => samples[samples.len() - 1] - warm,
        None => 0,
    }
}

/// Nothing if the process has ended, or where there is no /proc.
fn private_kilobytes(pid: i32) -> Option<i64> {
    let statm = fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
    let mut pages = statm.split_whitespace().skip(1).map(|word| word.parse::<i64>());
    let (resident, shared) = (pages.next()?.ok()?, pages.next()?.ok()?);
    Some((resident - shared) * 4)
}
