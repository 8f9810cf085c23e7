//! Reading a server's log for faults that no client is told of.

/// Parts of the lines by which the server, or the C library, tells of a fault in its memory, of something that was
/// kept too long or of a process that was lost to a fault.
const FAULTS: [&str; 23] = [
    // A failed assertion, and an error where the server cannot go on.
    "TRAP: ",
    "PANIC:  ",
    // Illegal instruction, abort, bus error, arithmetic, invalid memory.
    "was terminated by signal 4:",
    "was terminated by signal 6:",
    "was terminated by signal 7:",
    "was terminated by signal 8:",
    "was terminated by signal 11:",
    // A transaction ended and kept a pin, relation, plan, file or lock. Servers from 17 on word this differently, so
    // that both wordings are here.
    " leak: ",
    "resource was not closed",
    "is not owned by resource owner",
    "is still referenced (",
    "not closed at end-of-transaction",
    "you don't own a lock of type",
    "left non-empty SPI stack",
    "leaked hash_seq_search scan",
    "Transaction while in ",
    // Memory that was written where it must not be, or freed twice.
    "problem in ",
    "write past chunk end",
    "pfree called with invalid pointer",
    "free(): ",
    "malloc(): ",
    "munmap_chunk(): ",
    "corrupted ",
];

/// A server says this whenever it starts where a standby's recovery had been under way, as pg_rewind leaves it. It tells of
/// no fault, but has a word in it by which the C library tells of one.
const HINT_OF_RECOVERY: &str = "HINT:  If this has occurred more than once some data might be corrupted and you might need to choose an earlier recovery target.";

/// The lines that tell of a fault.
pub fn faults(log: &str) -> Vec<&str> {
    log.lines().filter(|line| is_fault(line)).collect()
}

fn is_fault(line: &str) -> bool {
    // A client's statement may have any words. From its second line on it is indented.
    let is_statement = line.starts_with('\t') || line.contains("STATEMENT:  ");
    !is_statement
        && !line.ends_with(HINT_OF_RECOVERY)
        && FAULTS.iter().any(|part| line.contains(part))
}

#[cfg(test)]
mod tests {
    use super::faults;

    #[test]
    fn lines_that_tell_of_a_fault_are_found() {
        for line in [
            "TRAP: FailedAssertion(\"!(x)\", File: \"mcxt.c\", Line: 12, PID: 7)",
            "2026-01-01 00:00:00 UTC [7] PANIC:  stuck spinlock detected at LockBufHdr",
            "2026-01-01 00:00:00 UTC [7] LOG:  server process (PID 8) was terminated by signal 11: Segmentation fault",
            "2026-01-01 00:00:00 UTC [7] LOG:  background worker \"x\" (PID 8) was terminated by signal 6: Aborted",
            "2026-01-01 00:00:00 UTC [7] WARNING:  buffer refcount leak: [012] (rel=base/5/1, blockNum=1, flags=0x1, refcount=1 1)",
            "2026-01-01 00:00:00 UTC [7] WARNING:  relcache reference leak: relation \"sd_claims\" not closed",
            "2026-01-01 00:00:00 UTC [7] WARNING:  resource was not closed: relation \"sd_claims\"",
            "2026-01-01 00:00:00 UTC [7] WARNING:  problem in alloc set ExprContext: detected write past chunk end in block 0x1, chunk 0x2",
            "2026-01-01 00:00:00 UTC [7] WARNING:  transaction left non-empty SPI stack",
            "2026-01-01 00:00:00 UTC [7] WARNING:  AbortTransaction while in ABORT state",
            "free(): double free detected in tcache 2",
            "corrupted size vs. prev_size",
        ] {
            assert_eq!(faults(&format!("a\n{line}\nb")), [line]);
        }
    }

    #[test]
    fn other_lines_are_not() {
        let log = "2026-01-01 00:00:00 UTC [7] LOG:  server process (PID 8) was terminated by signal 9: Killed
2026-01-01 00:00:00 UTC [7] WARNING:  terminating connection because of crash of another server process
2026-01-01 00:00:00 UTC [7] ERROR:  a trigger released SD \"SD-1\" while it was being claimed
2026-01-01 00:00:00 UTC [7] HINT:  If this has occurred more than once some data might be corrupted and you might need to choose an earlier recovery target.
2026-01-01 00:00:00 UTC [7] STATEMENT:  SELECT 'refcount leak: ',
\t       'TRAP: '";
        assert!(faults(log).is_empty());
    }
}
