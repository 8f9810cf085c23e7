//! The form in which PostgreSQL stores jsonb (src/include/utils/jsonb.h): since 9.4 the same, as upgrades keep
//! tables as they are.
//!
//! A container is a head with the number of its elements, then an entry for each, then what they are. An entry
//! says of which kind an element is and how long, or, every so often, where it ends. An object has first all its
//! keys, by length and then by their bytes, and then their values. Numbers and containers begin at a multiple of
//! four bytes.

use serde::ser::Error as _;
use serde_json::{Error, Result};

/// The kinds of an element, in its entry.
pub const IS_STRING: u32 = 0x0000_0000;
pub const IS_NUMERIC: u32 = 0x1000_0000;
pub const IS_FALSE: u32 = 0x2000_0000;
pub const IS_TRUE: u32 = 0x3000_0000;
pub const IS_NULL: u32 = 0x4000_0000;
pub const IS_CONTAINER: u32 = 0x5000_0000;
/// An entry with this says where its element ends instead of how long it is.
const HAS_OFFSET: u32 = 0x8000_0000;
/// The longest that an entry can tell.
const MAX_LENGTH: usize = 0x0FFF_FFFF;
/// Every so many entries one has an offset.
const OFFSET_STRIDE: usize = 32;

/// The kinds of a container, in its head. A scalar alone is in an array that says so.
pub const IS_SCALAR: u32 = 0x1000_0000;
pub const IS_OBJECT: u32 = 0x2000_0000;
pub const IS_ARRAY: u32 = 0x4000_0000;

/// Whether these are an object's.
pub fn is_object(bytes: &[u8]) -> bool {
    head(bytes).is_some_and(|head| head & IS_OBJECT != 0)
}

/// How a container begins.
pub fn head(bytes: &[u8]) -> Option<u32> {
    bytes.first_chunk().map(|head| u32::from_ne_bytes(*head))
}

/// A value whose bytes have been written somewhere, without any padding in front.
#[derive(Debug, Clone, Copy)]
pub struct Node {
    /// Of an element.
    pub kind: u32,
    /// Where its bytes are.
    pub begin: usize,
    /// Where they end.
    pub end: usize,
}

impl Node {
    fn is_aligned(self) -> bool {
        matches!(self.kind, IS_NUMERIC | IS_CONTAINER)
    }
}

/// Puts a container together from `keys`, if it is an object, and `values`, in their order, and in the place of
/// everything from `begin` on.
pub fn assemble<'k>(
    bytes: &mut Vec<u8>,
    begin: usize,
    kind: u32,
    keys: impl ExactSizeIterator<Item = &'k str>,
    values: impl ExactSizeIterator<Item = Node>,
) -> Result<Node> {
    let count = u32::try_from(values.len()).ok().filter(|count| *count < IS_SCALAR);
    let count = count.ok_or_else(too_large)?;
    // Behind what it is made of, which is then dropped.
    let whole = bytes.len();
    bytes.extend_from_slice(&(kind | count).to_ne_bytes());
    let mut entries = Entries { begin: bytes.len(), at: 0 };
    bytes.resize(entries.begin + 4 * (keys.len() + values.len()), 0);
    let elements = bytes.len();
    for key in keys {
        let start = bytes.len() - elements;
        bytes.extend_from_slice(key.as_bytes());
        let end = bytes.len() - elements;
        entries.add(bytes, IS_STRING, start, end)?;
    }
    for value in values {
        let start = bytes.len() - elements;
        if value.is_aligned() {
            bytes.resize(elements + start.next_multiple_of(4), 0);
        }
        bytes.extend_from_within(value.begin..value.end);
        let end = bytes.len() - elements;
        entries.add(bytes, value.kind, start, end)?;
    }
    bytes.drain(begin..whole);
    Ok(Node { kind: IS_CONTAINER, begin, end: bytes.len() })
}

/// A container's entries, for which there is room from `begin` on.
struct Entries {
    begin: usize,
    at: usize,
}

impl Entries {
    /// The next one: of an element from `start` to `end` among all.
    fn add(&mut self, bytes: &mut [u8], kind: u32, start: usize, end: usize) -> Result<()> {
        if end > MAX_LENGTH {
            return Err(too_large());
        }
        let entry = if self.at.is_multiple_of(OFFSET_STRIDE) {
            kind | HAS_OFFSET | end as u32
        } else {
            kind | (end - start) as u32
        };
        bytes[self.begin + 4 * self.at..][..4].copy_from_slice(&entry.to_ne_bytes());
        self.at += 1;
        Ok(())
    }
}

fn too_large() -> Error {
    Error::custom("the answer is too large for jsonb")
}
