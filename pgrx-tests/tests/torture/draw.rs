//! Where all that is random comes from: one number for the run, split by phase, client and transaction.

use fastrand::Rng;

/// The generator for step `step` of `stream` in `phase`. A step that was cut short changes nothing for the next one.
pub fn generator(seed: u64, phase: u64, stream: u64, step: u64) -> Rng {
    Rng::with_seed(
        [phase, stream, step]
            .into_iter()
            .fold(mixed(seed), |state, part| mixed(state ^ mixed(part))),
    )
}

/// Streams beside those of the clients, which have the small numbers.
pub const PHASE: u64 = 1000;
pub const FAULTS: u64 = 1001;
pub const PSQL: u64 = 1002;
pub const FOLLOWER: u64 = 1003;

/// SplitMix64: neighbouring numbers give unlike ones.
fn mixed(number: u64) -> u64 {
    let number = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

/// One of `all`.
pub fn one_of<'a, T: ?Sized>(rng: &mut Rng, all: &[&'a T]) -> &'a T {
    all[rng.usize(..all.len())]
}

/// Whether it happens, on average `percent` times of a hundred.
pub fn chance(rng: &mut Rng, percent: u32) -> bool {
    rng.u32(..100) < percent
}
