//! Where this transaction has found rows, by their primary keys.
//!
//! A call looks at the same row several times, each time with a newer snapshot. Where nobody has changed
//! it meanwhile it is still where it was: that spares the search, which takes long where an old snapshot
//! of somebody else's keeps many versions of the row. The transaction's lock on the table keeps the place
//! itself from going away; what is there now must be looked at.

use std::cell::{Cell, RefCell};

use pgrx::pg_sys;

use super::Key;
use crate::pg::transaction::{self, End};
use crate::spi::catalog;

/// So many places are remembered at most.
const MOST: usize = 16;

struct Place {
    table: pg_sys::Oid,
    key: Owned,
    at: pg_sys::ItemPointerData,
    /// How often the tables had changed: this transaction itself may empty or rewrite one.
    changes: u64,
}

#[derive(PartialEq)]
enum Owned {
    Text(String),
    Bigint(i64),
}

impl Owned {
    fn is(&self, key: Key<'_>) -> bool {
        match (self, key) {
            (Self::Text(text), Key::Text(asked)) => text == asked,
            (Self::Bigint(number), Key::Bigint(asked)) => *number == asked,
            _ => false,
        }
    }
}

thread_local! {
    static PLACES: RefCell<Vec<Place>> = const { RefCell::new(Vec::new()) };
    static IS_USED: Cell<bool> = const { Cell::new(false) };
}

/// Forgets when a transaction has ended, and when a savepoint was rolled back, which gives its locks on tables back.
pub fn init() {
    transaction::at_end(|end| {
        if end != End::PreCommit {
            forget();
        }
    });
    transaction::at_savepoint_end(|end| {
        if end.is_rolled_back {
            forget();
        }
    });
}

/// Where the row was last.
pub fn recall(table: pg_sys::Oid, key: Key<'_>) -> Option<pg_sys::ItemPointerData> {
    PLACES.with_borrow(|places| {
        let place = places.iter().find(|place| place.table == table && place.key.is(key))?;
        (place.changes == catalog::changes()).then_some(place.at)
    })
}

/// Remembers where the row is.
pub fn remember(table: pg_sys::Oid, key: Key<'_>, at: pg_sys::ItemPointerData) {
    IS_USED.set(true);
    let changes = catalog::changes();
    PLACES.with_borrow_mut(|places| {
        if let Some(place) =
            places.iter_mut().find(|place| place.table == table && place.key.is(key))
        {
            place.at = at;
            place.changes = changes;
            return;
        }
        if places.len() >= MOST {
            places.clear();
        }
        let key = match key {
            Key::Text(text) => Owned::Text(text.to_owned()),
            Key::Bigint(number) => Owned::Bigint(number),
        };
        places.push(Place { table, key, at, changes });
    });
}

/// Neither allocates nor fails.
fn forget() {
    if IS_USED.replace(false) {
        PLACES.with_borrow_mut(Vec::clear);
    }
}
