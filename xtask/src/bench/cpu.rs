//! How much processor time a server has used.

use std::fs;
use std::io::ErrorKind;

use anyhow::{Context, Result};
use pg_claims_tests::Server;

/// Ticks a second, of which /proc tells: the same on every Linux that matters.
const TICKS: f64 = 100.0;

/// The system's number for a process that is not there.
const ESRCH: i32 = 3;

/// What /proc tells of a process.
#[derive(Debug, PartialEq)]
struct Stat {
    parent: u32,
    /// Its own, in user and system mode.
    own: u64,
    /// Of its children that have ended and that it has waited for.
    ended_children: u64,
}

impl Stat {
    /// `None` for a process that is not there any more.
    fn of(pid: u32) -> Result<Option<Self>> {
        match fs::read_to_string(format!("/proc/{pid}/stat")) {
            Ok(text) => Self::read(&text).map(Some),
            // The latter where it ends between the opening and the reading.
            Err(error)
                if error.kind() == ErrorKind::NotFound || error.raw_os_error() == Some(ESRCH) =>
            {
                Ok(None)
            }
            Err(error) => Err(error).with_context(|| format!("could not read of process {pid}")),
        }
    }

    fn read(text: &str) -> Result<Self> {
        // Behind the program's name, which may hold anything.
        let (_, numbers) = text.rsplit_once(')').context("a process without a name")?;
        let words: Vec<&str> = numbers.split_whitespace().collect();
        let number = |word: usize| -> Result<u64> {
            let word = words.get(word).with_context(|| format!("too few numbers: {text}"))?;
            word.parse().with_context(|| format!("\"{word}\" is no number: {text}"))
        };
        Ok(Self {
            parent: u32::try_from(number(1)?)?,
            own: number(11)? + number(12)?,
            ended_children: number(13)? + number(14)?,
        })
    }
}

/// Seconds of processor time of all processes of the server since it began, also of those that have
/// ended.
pub fn of_server(server: &Server) -> Result<f64> {
    let file = server.data().join("postmaster.pid");
    let text =
        fs::read_to_string(&file).with_context(|| format!("could not read {}", file.display()))?;
    let pid: u32 = text
        .lines()
        .next()
        .and_then(|line| line.trim().parse().ok())
        .with_context(|| format!("cannot read a process id from {}", file.display()))?;
    let postmaster = || Stat::of(pid)?.context("the server has ended");
    loop {
        let before = postmaster()?;
        let children = of_children(pid)?;
        let after = postmaster()?;
        // Else one has ended meanwhile, and is in both or in neither.
        if after.ended_children == before.ended_children {
            return Ok((after.own + after.ended_children + children) as f64 / TICKS);
        }
    }
}

/// Ticks of all that are there, or that have ended without that anybody has waited for them yet.
fn of_children(parent: u32) -> Result<u64> {
    let mut ticks = 0;
    for entry in fs::read_dir("/proc").context("could not read /proc")? {
        let name = entry?.file_name();
        // What is named otherwise is no process.
        let Some(Ok(pid)) = name.to_str().map(str::parse) else { continue };
        let stat = Stat::of(pid)?.filter(|stat| stat.parent == parent);
        ticks += stat.map_or(0, |stat| stat.own);
    }
    Ok(ticks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_process_whose_name_looks_like_more_of_it() {
        let text = "77 (a) S 5 (b) S 42 77 77 0 -1 4194560 100 200 0 0 3 4 50 60 20 0 1 0 9 8 7";
        let stat = Stat::read(text).unwrap();
        assert_eq!(stat, Stat { parent: 42, own: 7, ended_children: 110 });
    }

    #[test]
    fn what_is_told_otherwise_is_an_error_and_not_a_process_that_has_ended() {
        for text in ["", "77 (a) S", "77 (a) S 5 1 1 1 1 1 1 1 1 1 x 4 50 60"] {
            assert!(Stat::read(text).is_err(), "{text}");
        }
        assert_eq!(Stat::of(u32::MAX).unwrap(), None);
    }

    #[test]
    fn counts_a_child_that_nobody_has_waited_for() {
        let mut child = std::process::Command::new("sh")
            .args(["-c", "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done"])
            .spawn()
            .unwrap();
        let end = std::time::Instant::now() + std::time::Duration::from_secs(60);
        let is_over =
            || fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap().contains(") Z ");
        while !is_over() && std::time::Instant::now() < end {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        let ticks = of_children(std::process::id()).unwrap();
        child.wait().unwrap();
        assert!(ticks > 0);
    }
}
