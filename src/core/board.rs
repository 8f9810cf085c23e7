//! The heartbeat board: the last signs of life, in memory that all processes share.
//!
//! An entry holds a session's last heartbeat and, while it is *open*, all that a heartbeat is answered
//! with, so that it needs no table. Whoever changes a session's claim closes its entry first; the next
//! heartbeat then asks the table, and opens the entry again.
//!
//! The memory begins as zeros. Nothing in it refers to an address, so that each process may see it at
//! another one. Whoever calls holds the lock of the shelf: shared to look and to beat, exclusive for the
//! rest. The fields are atomic because those who hold it shared write the heartbeat side by side.

use std::sync::atomic::{AtomicI64, AtomicU32, AtomicU64, Ordering};

/// The longest id that the board takes, in bytes; a session whose id or SD is longer beats in the table.
pub const MAX_ID_BYTES: usize = 200;

/// How far from its place an entry may stand. A shelf so crowded counts as full.
const REACH: usize = 64;

/// The lock orders everything but heartbeats, which depend on nothing else.
const ORDER: Ordering = Ordering::Relaxed;

const FREE: u32 = 0;
const CLOSED: u32 = 1;
const OPEN: u32 = 2;

/// A text of up to [`MAX_ID_BYTES`].
#[repr(C)]
struct Text {
    length: AtomicU32,
    words: [AtomicU64; MAX_ID_BYTES / 8],
}

impl Text {
    fn set(&self, text: &str) {
        self.length.store(text.len() as u32, ORDER);
        for (word, bytes) in self.words.iter().zip(text.as_bytes().chunks(8)) {
            word.store(packed(bytes), ORDER);
        }
    }

    fn is(&self, text: &str) -> bool {
        self.length.load(ORDER) as usize == text.len()
            && self
                .words
                .iter()
                .zip(text.as_bytes().chunks(8))
                .all(|(word, bytes)| word.load(ORDER) == packed(bytes))
    }

    fn get(&self) -> String {
        let length = self.length.load(ORDER) as usize;
        let mut bytes: Vec<u8> =
            self.words.iter().flat_map(|word| word.load(ORDER).to_le_bytes()).collect();
        bytes.truncate(length);
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn copy(&self, other: &Self) {
        self.length.store(other.length.load(ORDER), ORDER);
        for (word, source) in self.words.iter().zip(&other.words) {
            word.store(source.load(ORDER), ORDER);
        }
    }
}

fn packed(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(word)
}

/// An entry, or the place for one.
#[repr(C)]
pub struct Entry {
    state: AtomicU32,
    database: AtomicU32,
    table: AtomicU32,
    owner: AtomicU32,
    hash: AtomicU32,
    session_id: Text,
    sd_id: Text,
    claim_id: AtomicI64,
    beat_at: AtomicI64,
    written_at: AtomicI64,
    most_lag: AtomicI64,
}

/// Whose entry: a session is one of a table of sessions in a database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key<'a> {
    /// The database.
    pub database: u32,
    /// The table of sessions, which is another one after the extension was dropped and created again.
    pub table: u32,
    /// The session.
    pub session_id: &'a str,
}

impl Key<'_> {
    /// Tells where the entry stands (FNV-1a, the same in every build).
    pub fn hash(&self) -> u32 {
        const BASIS: u64 = 0xcbf2_9ce4_8422_2325;
        const PRIME: u64 = 0x0000_0100_0000_01b3;
        let place = self.database.to_le_bytes().into_iter().chain(self.table.to_le_bytes());
        let hash = place
            .chain(self.session_id.bytes())
            .fold(BASIS, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(PRIME));
        (hash ^ (hash >> 32)) as u32
    }
}

/// What a heartbeat is answered with, as the table said when the entry was opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// The role that the session belongs to.
    pub owner: u32,
    /// What it holds: the SD and the acquisition.
    pub claim: Option<(String, i64)>,
}

impl Entry {
    fn is_of(&self, key: &Key<'_>) -> bool {
        self.database.load(ORDER) == key.database
            && self.table.load(ORDER) == key.table
            && self.session_id.is(key.session_id)
    }

    /// The session's database.
    pub fn database(&self) -> u32 {
        self.database.load(ORDER)
    }

    /// The table that its session is in.
    pub fn table(&self) -> u32 {
        self.table.load(ORDER)
    }

    /// Whether heartbeats ask the table.
    pub fn is_closed(&self) -> bool {
        self.state.load(ORDER) == CLOSED
    }

    /// Its session.
    pub fn session_id(&self) -> String {
        self.session_id.get()
    }

    /// The last heartbeat, in the server's microseconds.
    pub fn beat_at(&self) -> i64 {
        self.beat_at.load(ORDER)
    }

    /// The last heartbeat that the table has.
    pub fn written_at(&self) -> i64 {
        self.written_at.load(ORDER)
    }

    /// The acquisition that its session holds, as far as the board knows; 0 for none.
    pub fn claim_id(&self) -> i64 {
        self.claim_id.load(ORDER)
    }

    /// How many microseconds the table may be behind, by the session's own lease.
    pub fn most_lag(&self) -> i64 {
        self.most_lag.load(ORDER)
    }

    /// The table has the heartbeat `at`, unless that lay in the future and does not count any more.
    pub fn set_written(&self, at: i64) {
        self.written_at.fetch_max(at.min(self.beat_at.load(ORDER)), ORDER);
    }

    /// Records a heartbeat, which only moves forward, of a session that is `owner`'s, if that is given, and
    /// holds `named`, if that is. `None` where the entry does not say so; then the table is to be asked.
    pub fn beat(&self, owner: Option<u32>, named: Option<i64>, at: i64) -> Option<(i64, Held)> {
        let owned_by = self.owner.load(ORDER);
        if self.state.load(ORDER) != OPEN || owner.is_some_and(|owner| owner != owned_by) {
            return None;
        }
        let claim_id = self.claim_id.load(ORDER);
        // 0 stands for no claim, which nobody holds.
        if named.is_some_and(|named| named != claim_id || named == 0) {
            return None;
        }
        let at = self.beat_at.fetch_max(at, ORDER).max(at);
        let claim = (claim_id != 0).then(|| (self.sd_id.get(), claim_id));
        Some((at, Held { owner: owned_by, claim }))
    }

    /// Opens the entry with what the table says, and records a heartbeat. False if that is too long to be
    /// kept. `most_lag` is for [`Entry::most_lag`].
    pub fn open(&self, held: &Held, most_lag: i64, at: i64) -> bool {
        let (sd_id, claim_id) =
            held.claim.as_ref().map_or(("", 0), |(sd_id, claim_id)| (sd_id.as_str(), *claim_id));
        if sd_id.len() > MAX_ID_BYTES {
            self.close();
            return false;
        }
        self.sd_id.set(sd_id);
        self.claim_id.store(claim_id, ORDER);
        self.owner.store(held.owner, ORDER);
        self.most_lag.store(most_lag, ORDER);
        self.beat_at.fetch_max(at, ORDER);
        self.state.store(OPEN, ORDER);
        true
    }

    /// The next heartbeat asks the table. The last one is kept.
    pub fn close(&self) {
        if self.state.load(ORDER) != FREE {
            self.state.store(CLOSED, ORDER);
        }
    }

    /// Records a heartbeat without opening the entry.
    pub fn note(&self, at: i64) {
        self.beat_at.fetch_max(at, ORDER);
    }

    /// A heartbeat that lies in the future counts as given at `now`. Closes the entry.
    pub fn pull_back(&self, now: i64) {
        self.beat_at.fetch_min(now, ORDER);
        self.close();
    }

    fn occupy(&self, key: &Key<'_>, hash: u32) {
        self.database.store(key.database, ORDER);
        self.table.store(key.table, ORDER);
        self.session_id.set(key.session_id);
        self.hash.store(hash, ORDER);
        self.beat_at.store(i64::MIN, ORDER);
        self.written_at.store(i64::MIN, ORDER);
        self.most_lag.store(i64::MAX, ORDER);
        self.state.store(CLOSED, ORDER);
    }

    fn copy(&self, other: &Self) {
        self.database.store(other.database.load(ORDER), ORDER);
        self.table.store(other.table.load(ORDER), ORDER);
        self.owner.store(other.owner.load(ORDER), ORDER);
        self.hash.store(other.hash.load(ORDER), ORDER);
        self.session_id.copy(&other.session_id);
        self.sd_id.copy(&other.sd_id);
        self.claim_id.store(other.claim_id.load(ORDER), ORDER);
        self.beat_at.store(other.beat_at.load(ORDER), ORDER);
        self.written_at.store(other.written_at.load(ORDER), ORDER);
        self.most_lag.store(other.most_lag.load(ORDER), ORDER);
        self.state.store(other.state.load(ORDER), ORDER);
    }
}

/// A part of the board that has a lock of its own: a hash table in which an entry stands at its place
/// or at the next free one after it.
#[derive(Clone, Copy)]
pub struct Shelf<'a>(pub &'a [Entry]);

impl<'a> Shelf<'a> {
    /// The entry of `key`, whose hash is `hash`.
    pub fn find(self, key: &Key<'_>, hash: u32) -> Option<&'a Entry> {
        self.position(key, hash).map(|position| &self.0[position])
    }

    fn position(self, key: &Key<'_>, hash: u32) -> Option<usize> {
        for step in 0..REACH.min(self.0.len()) {
            let position = self.place(hash, step);
            let entry = &self.0[position];
            if entry.state.load(ORDER) == FREE {
                return None;
            }
            if entry.hash.load(ORDER) == hash && entry.is_of(key) {
                return Some(position);
            }
        }
        None
    }

    fn place(self, hash: u32, step: usize) -> usize {
        (hash as usize + step) % self.0.len()
    }

    /// The same, made if there is none. `None` where there is no room, or the id is too long.
    pub fn find_or_make(self, key: &Key<'_>, hash: u32) -> Option<&'a Entry> {
        if let Some(entry) = self.find(key, hash) {
            return Some(entry);
        }
        if key.session_id.len() > MAX_ID_BYTES {
            return None;
        }
        let free = (0..REACH.min(self.0.len()))
            .map(|step| &self.0[self.place(hash, step)])
            .find(|entry| entry.state.load(ORDER) == FREE)?;
        free.occupy(key, hash);
        Some(free)
    }

    /// Takes the entry of `key` away. Returns whether there was one.
    pub fn remove(self, key: &Key<'_>, hash: u32) -> bool {
        let Some(mut hole) = self.position(key, hash) else {
            return false;
        };
        // Entries behind it that had to make way move up, so that none is cut off from its place.
        let length = self.0.len();
        let mut next = hole;
        for _ in 1..length {
            next = (next + 1) % length;
            let entry = &self.0[next];
            if entry.state.load(ORDER) == FREE {
                break;
            }
            let home = entry.hash.load(ORDER) as usize % length;
            let from_home = (next + length - home) % length;
            let from_hole = (next + length - hole) % length;
            if from_home >= from_hole {
                self.0[hole].copy(entry);
                hole = next;
            }
        }
        self.0[hole].state.store(FREE, ORDER);
        true
    }

    /// All entries.
    pub fn entries(self) -> impl Iterator<Item = &'a Entry> {
        self.0.iter().filter(|entry| entry.state.load(ORDER) != FREE)
    }
}

/// How full a board is.
#[derive(Debug, Clone, Copy)]
pub struct Fullness {
    /// For how many sessions it was made.
    pub capacity: i64,
    /// How many it holds, of all databases.
    pub entries: i64,
    /// How many times it had no room for one since the server started.
    pub refused: i64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn shelf(length: usize) -> Vec<Entry> {
        (0..length)
            .map(|_| Entry {
                state: AtomicU32::new(FREE),
                database: AtomicU32::new(0),
                table: AtomicU32::new(0),
                owner: AtomicU32::new(0),
                hash: AtomicU32::new(0),
                session_id: text(),
                sd_id: text(),
                claim_id: AtomicI64::new(0),
                beat_at: AtomicI64::new(0),
                written_at: AtomicI64::new(0),
                most_lag: AtomicI64::new(0),
            })
            .collect()
    }

    fn text() -> Text {
        Text { length: AtomicU32::new(0), words: [const { AtomicU64::new(0) }; MAX_ID_BYTES / 8] }
    }

    fn key(session_id: &str) -> Key<'_> {
        Key { database: 5, table: 7, session_id }
    }

    fn idle() -> Held {
        Held { owner: 10, claim: None }
    }

    #[test]
    fn a_heartbeat_is_answered_with_what_the_table_said_and_moves_only_forward() {
        let entries = shelf(8);
        let shelf = Shelf(&entries);
        let entry = shelf.find_or_make(&key("s"), 3).unwrap();
        assert_eq!(entry.beat(Some(10), None, 100), None, "it was never opened");
        let held = Held { owner: 10, claim: Some(("SD-日本-1".into(), 4)) };
        assert!(entry.open(&held, 7, 50));
        assert_eq!(entry.beat(Some(10), None, 100), Some((100, held.clone())));
        assert_eq!(entry.beat(Some(10), Some(4), 90), Some((100, held)));
        assert_eq!(entry.beat(Some(10), Some(5), 110), None, "another claim was named");
        assert_eq!(entry.beat(Some(11), None, 110), None, "another role");
        assert_eq!(entry.beat(None, None, 95), entry.beat(Some(10), None, 95), "for whoever it is");
        assert_eq!((entry.beat_at(), entry.written_at()), (100, i64::MIN));
        assert!(entry.open(&idle(), 7, 50));
        assert_eq!(entry.beat(Some(10), Some(0), 100), None, "nobody holds claim 0");
        entry.close();
        assert_eq!(entry.beat(Some(10), None, 120), None);
        assert_eq!(entry.beat_at(), 100, "closing keeps the last heartbeat");
        entry.set_written(100);
        entry.set_written(60);
        assert_eq!(entry.written_at(), 100);
        entry.set_written(500);
        assert_eq!(entry.written_at(), 100, "or heartbeats up to then would not be written");
    }

    #[test]
    fn sessions_of_other_databases_tables_and_names_are_others() {
        let entries = shelf(8);
        let shelf = Shelf(&entries);
        shelf.find_or_make(&key("s"), 3).unwrap().open(&idle(), 7, 1);
        for other in [
            Key { database: 6, ..key("s") },
            Key { table: 8, ..key("s") },
            key("s\0"),
            key("t"),
            key(""),
        ] {
            assert!(shelf.find(&other, 3).is_none(), "{other:?}");
        }
        assert!(shelf.find(&key("s"), 3).is_some());
    }

    #[test]
    fn what_is_too_long_or_finds_no_room_is_not_taken() {
        let entries = shelf(2);
        let shelf = Shelf(&entries);
        assert!(shelf.find_or_make(&key(&"x".repeat(MAX_ID_BYTES + 1)), 0).is_none());
        let longest = "x".repeat(MAX_ID_BYTES);
        let entry = shelf.find_or_make(&key(&longest), 0).unwrap();
        assert_eq!(entry.session_id(), longest);
        assert!(!entry.open(&Held { claim: Some(("y".repeat(201), 1)), ..idle() }, 7, 1));
        assert_eq!(entry.beat(Some(10), None, 5), None);
        assert!(shelf.find_or_make(&key("b"), 0).is_some());
        assert!(shelf.find_or_make(&key("c"), 0).is_none());
        shelf.remove(&key(&longest), 0);
        assert!(shelf.find_or_make(&key("c"), 0).is_some());
        assert!(shelf.find(&key("b"), 0).is_some());
    }

    /// Against a map, with hashes that collide, through thousands of random steps.
    #[test]
    fn it_finds_exactly_what_was_put_there_and_not_removed() {
        let entries = shelf(97);
        let shelf = Shelf(&entries);
        let mut model: HashMap<String, i64> = HashMap::new();
        let mut random: u64 = 42;
        let mut next = |below: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (random >> 33) % below
        };
        for step in 0..200_000 {
            let name = format!("s{}", next(70));
            // Few different hashes: long runs of entries that made way, also around the end.
            let hash = name.len() as u32 * 90 + name.as_bytes()[name.len() - 1] as u32 % 4;
            match next(3) {
                0 => {
                    shelf.remove(&key(&name), hash);
                    model.remove(&name);
                }
                _ => {
                    if let Some(entry) = shelf.find_or_make(&key(&name), hash) {
                        entry.open(&idle(), 7, step);
                        model.insert(name.clone(), step);
                    } else {
                        assert!(!model.contains_key(&name));
                    }
                }
            }
            if step % 100 == 0 {
                for (name, beat) in &model {
                    let hash = name.len() as u32 * 90 + name.as_bytes()[name.len() - 1] as u32 % 4;
                    let found = shelf.find(&key(name), hash).map(Entry::beat_at);
                    assert_eq!(found, Some(*beat), "{name} at step {step}");
                }
                assert_eq!(shelf.entries().count(), model.len());
            }
        }
    }
}
