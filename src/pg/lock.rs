//! The server's locks, on relations and on what is none.

use pgrx::pg_sys;

use super::backend;

/// What no relation is: a claim, a sequence's next number, the whole server.
#[derive(Clone, Copy)]
pub struct Tag(pg_sys::LOCKTAG);

/// Sets the extension's locks apart from each other, and from those of `pg_advisory_lock`, which use 1 and 2.
#[derive(Clone, Copy)]
pub enum Class {
    /// Claims that are guarded.
    Guard = 3,
    /// Sequences, and the order of events.
    Numbers = 4,
}

/// How strongly.
#[derive(Clone, Copy)]
pub enum Mode {
    AccessShare = pg_sys::AccessShareLock as isize,
    RowShare = pg_sys::RowShareLock as isize,
    RowExclusive = pg_sys::RowExclusiveLock as isize,
    Share = pg_sys::ShareLock as isize,
    ShareRowExclusive = pg_sys::ShareRowExclusiveLock as isize,
    Exclusive = pg_sys::ExclusiveLock as isize,
    AccessExclusive = pg_sys::AccessExclusiveLock as isize,
}

/// How long a lock is held.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// The end of the transaction, or the rollback of the savepoint.
    TransactionEnds,
    /// Its release, or the end of the process.
    Released,
}

impl Tag {
    /// Something in this database that has a number.
    pub fn of(class: Class, number: u64) -> Self {
        Self::advisory(backend::database(), number, class as u16)
    }

    /// Something of the whole server, as `pg_advisory_lock` would lock it in no database: nobody else can.
    pub fn of_server(number: u64) -> Self {
        Self::advisory(pg_sys::Oid::INVALID, number, 1)
    }

    fn advisory(database: pg_sys::Oid, number: u64, class: u16) -> Self {
        Self(pg_sys::LOCKTAG {
            locktag_field1: database.to_u32(),
            locktag_field2: (number >> 32) as u32,
            locktag_field3: number as u32,
            locktag_field4: class,
            locktag_type: pg_sys::LockTagType::LOCKTAG_ADVISORY as u8,
            locktag_lockmethodid: pg_sys::USER_LOCKMETHOD as u8,
        })
    }

    /// An object of this database's, such as an extension, as the server itself locks it.
    pub fn of_object(catalog: pg_sys::Oid, object: pg_sys::Oid) -> Self {
        Self(pg_sys::LOCKTAG {
            locktag_field1: backend::database().to_u32(),
            locktag_field2: catalog.to_u32(),
            locktag_field3: object.to_u32(),
            locktag_field4: 0,
            locktag_type: pg_sys::LockTagType::LOCKTAG_OBJECT as u8,
            locktag_lockmethodid: pg_sys::DEFAULT_LOCKMETHOD as u8,
        })
    }

    /// Locks it, waiting for whoever has it.
    pub fn acquire(self, mode: Mode, until: Until) {
        self.lock(mode, until, true);
    }

    /// Locks it unless somebody has it. Whether it is locked.
    pub fn try_acquire(self, mode: Mode, until: Until) -> bool {
        self.lock(mode, until, false) != pg_sys::LockAcquireResult::LOCKACQUIRE_NOT_AVAIL
    }

    fn lock(self, mode: Mode, until: Until, waits: bool) -> pg_sys::LockAcquireResult::Type {
        // SAFETY: the server copies the tag. An error unwinds as usual.
        unsafe { pg_sys::LockAcquire(&self.0, mode as i32, until == Until::Released, !waits) }
    }

    /// Gives it back, as often as it was locked so.
    pub fn release(self, mode: Mode, until: Until) {
        // SAFETY: the server looks for it among what this process has locked.
        unsafe { pg_sys::LockRelease(&self.0, mode as i32, until == Until::Released) };
    }

    /// Waits for the other transactions that hold it in a mode that conflicts with this one, without locking it.
    pub fn await_holders(self, mode: Mode) {
        // SAFETY: the server copies the tag. An error unwinds as usual.
        unsafe { pg_sys::WaitForLockers(self.0, mode as i32, false) }
    }
}

/// Locks a relation until the transaction ends, waiting for whoever has it. One that is gone is locked without harm.
pub fn relation(relation: pg_sys::Oid, mode: Mode) {
    // SAFETY: by its number, in a transaction. An error unwinds as usual.
    unsafe { pg_sys::LockRelationOid(relation, mode as i32) }
}

/// The same without waiting. Whether it is locked.
pub fn try_relation(relation: pg_sys::Oid, mode: Mode) -> bool {
    // SAFETY: as above.
    unsafe { pg_sys::ConditionalLockRelationOid(relation, mode as i32) }
}
