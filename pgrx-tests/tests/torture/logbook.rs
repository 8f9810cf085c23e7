//! What every client did and was answered: all of it in a file, the last of it for whoever reads of a failure.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// How many operations a failure tells.
const LAST: usize = 30;
/// How much of each; the file has all.
const SHOWN: usize = 400;

pub struct Logbook {
    begin: Instant,
    path: PathBuf,
    has_violations: AtomicBool,
    inner: Mutex<Inner>,
}

struct Inner {
    file: BufWriter<File>,
    last: VecDeque<String>,
    violations: Vec<String>,
}

impl Logbook {
    pub fn new(path: &Path) -> Self {
        let file = File::create(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Self {
            begin: Instant::now(),
            path: path.to_owned(),
            has_violations: AtomicBool::new(false),
            inner: Mutex::new(Inner {
                file: BufWriter::new(file),
                last: VecDeque::new(),
                violations: Vec::new(),
            }),
        }
    }

    fn now(&self) -> f64 {
        self.begin.elapsed().as_secs_f64()
    }

    /// When something begins, to be handed to [`note`](Self::note).
    pub fn begin(&self) -> f64 {
        self.now()
    }

    /// One operation, from when on, by whom, and what it came to.
    pub fn note(&self, from: f64, who: &str, what: &str, answer: &dyn std::fmt::Display) {
        let what = what.split_whitespace().collect::<Vec<_>>().join(" ");
        let line = format!("{from:9.3}-{:.3} {who}: {what} -> {answer}", self.now());
        let mut inner = self.inner.lock().unwrap();
        writeln!(inner.file, "{line}").unwrap();
        if inner.violations.is_empty() {
            inner.last.push_back(line);
            if inner.last.len() > LAST {
                inner.last.pop_front();
            }
        }
    }

    /// A promise is broken. All stop, and the run fails.
    pub fn violation(&self, what: String) {
        let mut inner = self.inner.lock().unwrap();
        writeln!(inner.file, "{:9.3} VIOLATION: {what}", self.now()).unwrap();
        inner.violations.push(what);
        self.has_violations.store(true, Ordering::Release);
    }

    pub fn has_violations(&self) -> bool {
        self.has_violations.load(Ordering::Acquire)
    }

    /// Fails the test if a promise was broken.
    pub fn judge(&self, seed: u64) {
        let mut inner = self.inner.lock().unwrap();
        inner.file.flush().unwrap();
        if inner.violations.is_empty() {
            return;
        }
        let last: Vec<String> =
            inner.last.iter().map(|line| line.chars().take(SHOWN).collect()).collect();
        let told = format!(
            "torture: seed {seed}\nThe last operations before the first of it:\n{}\nBroken:\n{}\nAll that was done: {}",
            last.join("\n"),
            inner.violations.join("\n"),
            self.path.display()
        );
        // Not while the lock is held, or whoever still writes would fail as well.
        drop(inner);
        panic!("{told}");
    }
}
