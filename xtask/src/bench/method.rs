//! How it was measured, for whoever reads the report.

use super::{BEATING, CLIENTS, SETTINGS, SETTINGS_WITHOUT_BOARD, Sizes, load, pgbench};

/// The text below the table; `server` and `extension` are their versions.
pub fn text(sizes: &Sizes, plan: &pgbench::Plan, server: &str, extension: &str) -> String {
    format!(
        "- Machine: {machine}.
- Server: {server}, pg_claims {extension}. Settings: {settings}.
- The server without a board, for the heartbeats on the table (2 and 9), has the same and {without_board}.
- Databases in which nobody holds an SD at the beginning (1 to 3, 8 to 13) have the default lease of 5
  minutes, so that the board is written to the table as in production. Where sessions hold SDs
  and do not go on beating (4 to 7), `pg_claims.stale_after` is one day.
- Each comparison has databases of its own, and drops them; each is vacuumed once it is filled.
- {sessions} sessions and as many SDs, unless said otherwise. In 4, 5 and 6 half of the SDs are
  held, and refusals are for any of these; in 7 all are.
- Claims: {CLIENTS} clients, asynchronous commit; heartbeats: {BEATING} clients, in 9 also {CLIENTS} and
  asynchronous; refusals: as many as heartbeats in 4 and as claims in 5; pgbench with prepared statements.
- 1 to 5, 8 and 11 to 13 (rates): the sides run in turns of {seconds} s, {rounds} each, the other way round in
  every second round. The numbers are medians; a ratio is the median of the ratios of the two
  turns of one round, and their range is told as well. 3, 5, 8, 12 and 13 vacuum before each turn. In 5 the
  worker looks through all held SDs every 10 s, during the turns of both sides.
- After each turn the acquisitions are counted, here and in the tables that are compared with: each
  transaction of claim and release has made one and ended it, each refusal has made none, or the run fails.
- WAL: once; the median of 101 executions of the same statements one after another.
- 6: EXPLAIN ANALYZE says how many scans have no index condition and how many pages are touched. A tree
  of a thousand times as many entries is at most twice as high. The whole view is read {rounds} times, in
  turns with the bare scan; each of its sessions has beaten and is on the board.
- 7: {rounds} times each, in turns; the worker's own reaping is off. Each time all is made stale anew.
- 9: one case after the other, each in a new database, where each session beats once; vacuumed,
  with a checkpoint, before that case and after it; {rounds} turns before, then the
  snapshot is held for {held} s under the same load, then {rounds} turns while it is still held. The
  rounds are the first turn after and the first before, and so on.
- 10: once each; every session beats every 30 s. The size before is that of the vacuumed tables, before
  anybody has beaten. The processor's time is that of all of the server's processes, also of those that
  have ended meanwhile.
- 11: events are announced or not, in turns; the worker begins anew before each. What the delivery of so
  many bytes costs by itself is measured without announcements, with a client that sends as many by bare
  NOTIFY as were heard a second in the last turn with announcements, in messages of 7900 bytes at most, every
  300 ms (the pace of the worker under load).
- 12 and 13: two databases of one server that are filled alike; one of them is left as it is.
- 12: in the other one a user's table of the same columns is the backlog. It has the same SDs and as much room
  on its pages, and binding has made the same indexes.
- 13: in the other one each of the four tables that a claim and a release write has a user's trigger. It runs
  a PL/pgSQL function after each row, which does nothing.
- The bare writes are the rows that a claim and a release write, as two statements with data-modifying
  CTEs on tables of the same columns and indexes, without any check. Their backlog has one index
  more, by which SKIP LOCKED finds the first SD. The PL/pgSQL is in `xtask/src/bench/floor.sql`:
  with few checks it looks for the session, the SD and its owner; with the same checks also for whose
  the session is, stop signs and conflicts, and it takes over from stale owners.
- Rows without a goal show what can be reached or, for sizes and WAL, what it comes to.
- The no-op is `octet_length()` of the same argument.
",
        machine = load::machine(),
        settings = SETTINGS.join(", "),
        without_board = SETTINGS_WITHOUT_BOARD.join(", "),
        sessions = sizes.sessions,
        seconds = plan.seconds,
        rounds = plan.rounds,
        held = sizes.held_seconds,
    )
}
