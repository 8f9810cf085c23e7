//! What a look sees.

use pgrx::pg_sys;

/// A snapshot as each statement takes one: in READ COMMITTED of this very moment, otherwise that of the
/// transaction. What this transaction has written so far is seen.
pub struct Snapshot {
    pub(super) raw: pg_sys::Snapshot,
}

impl Snapshot {
    /// Takes it.
    pub fn take() -> Self {
        // SAFETY: in a transaction; given back on drop, or by the server when the transaction aborts.
        unsafe {
            pg_sys::CommandCounterIncrement();
            Self { raw: pg_sys::RegisterSnapshot(pg_sys::GetTransactionSnapshot()) }
        }
    }
}

impl Snapshot {
    /// Takes one of this very moment, also in a transaction that keeps its own.
    pub fn take_latest() -> Self {
        // SAFETY: as above.
        unsafe {
            pg_sys::CommandCounterIncrement();
            Self { raw: pg_sys::RegisterSnapshot(pg_sys::GetLatestSnapshot()) }
        }
    }
}

impl Drop for Snapshot {
    fn drop(&mut self) {
        // After an error the abort of the transaction or savepoint does it.
        if !std::thread::panicking() {
            // SAFETY: registered by `take`, and given back once.
            unsafe { pg_sys::UnregisterSnapshot(self.raw) };
        }
    }
}
