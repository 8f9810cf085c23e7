//! How full the heartbeat board is.

use pgrx::prelude::*;

use crate::board;

#[pg_extern(volatile, parallel_restricted)]
pub fn heartbeat_board()
-> TableIterator<'static, (name!(capacity, i64), name!(entries, i64), name!(refused, i64))> {
    let fullness = board::fullness();
    TableIterator::new(fullness.into_iter().map(|f| (f.capacity, f.entries, f.refused)))
}
