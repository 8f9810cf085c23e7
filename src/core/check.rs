//! What an operator should look at: the judgement of facts that were gathered elsewhere.

use chrono::{DateTime, TimeDelta, Utc};

use crate::age;
use crate::board::Fullness;

/// A transaction of that age has kept a version of each session's row for each heartbeat in the table: ten,
/// at the usual interval of 30 s.
const LONG_TRANSACTION: TimeDelta = TimeDelta::minutes(5);

/// An error of the worker's is told for so long.
const RECENT: TimeDelta = TimeDelta::hours(1);

/// What is known of a database.
#[derive(Debug, Clone)]
pub struct Facts {
    /// When they were gathered.
    pub at: DateTime<Utc>,
    /// A trigger of an ordinary role's on one of the extension's tables, described.
    pub foreign_code: Option<String>,
    /// Why the backlog cannot be used. What depends on it is not known then.
    pub unusable_backlog: Option<String>,
    /// Whether `pg_claims.worker` is on.
    pub is_worker_on: bool,
    /// How often stale claims are looked for.
    pub reap_interval: TimeDelta,
    /// How many claims could be ended, and for how long the first of them has been due; `None` where that
    /// cannot be told.
    pub due: Option<(i64, TimeDelta)>,
    /// What went wrong last, and when.
    pub last_error: Option<(DateTime<Utc>, String)>,
    /// The heartbeat board, if there is one.
    pub board: Option<Fullness>,
    /// Tables of the extension's that lack an index or a column without which nothing works.
    pub broken_tables: Vec<&'static str>,
    /// Tables of the extension's that are read by statements, as they lack an index or belong to another role.
    pub changed_tables: Vec<&'static str>,
    /// What somebody has added to the tables of which pg_dump writes the rows alone, such as
    /// `column "cost" of sd_claims`.
    pub additions: Vec<String>,
    /// The oldest transaction that keeps old versions of rows, and its age.
    pub oldest: Option<(String, TimeDelta)>,
    /// How many SDs of which the backlog says something else than the sessions; `None` where that cannot be
    /// told.
    pub out_of_step: Option<i64>,
    /// How many claims about which sessions, history and backlog disagree; `None` where that cannot be told.
    pub contradictions: Option<usize>,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// What.
    pub name: &'static str,
    /// What is the matter and what to do about it; `None` where all is well.
    pub trouble: Option<(String, &'static str)>,
}

const SECURITY: &str = "security";

impl Check {
    /// `ok`, `warning` or `critical`.
    pub fn status(&self) -> &'static str {
        match &self.trouble {
            None => "ok",
            Some(_) if self.name == SECURITY => "critical",
            Some(_) => "warning",
        }
    }
}

/// Judges the facts, in the same order always; leaves out what could not be looked at.
pub fn checks(facts: &Facts) -> Vec<Check> {
    let checks = [
        (SECURITY, Some(security(facts))),
        ("backlog", Some(backlog(facts))),
        ("tables", Some(tables(facts))),
        ("worker", Some(worker(facts))),
        ("stale_claims", facts.due.map(|due| stale_claims(facts, due))),
        ("worker_errors", Some(worker_errors(facts))),
        ("heartbeat_board", Some(heartbeat_board(facts))),
        ("direct_access", Some(direct_access(facts))),
        ("old_transactions", Some(old_transactions(facts))),
        ("is_working_on", facts.out_of_step.map(is_working_on)),
        ("contradictions", facts.contradictions.map(contradictions)),
    ];
    let check =
        |(name, looked): (_, Option<Trouble>)| looked.map(|trouble| Check { name, trouble });
    checks.into_iter().filter_map(check).chain(additions(facts)).collect()
}

/// One for each thing, or one that tells that there is none.
fn additions(facts: &Facts) -> Vec<Check> {
    let check = |trouble| Check { name: "dump_and_restore", trouble };
    if facts.additions.is_empty() {
        return vec![check(None)];
    }
    let told = facts.additions.iter().map(|what| {
        (
            format!("would not survive a restore: {what}"),
            "pg_dump writes only the rows of an extension's tables. A trigger, an index or a constraint is to be made again after a restore; a column must not be there, as its table's rows could not be restored: keep such data in a table of your own.",
        )
    });
    told.map(|trouble| check(Some(trouble))).collect()
}

type Trouble = Option<(String, &'static str)>;

fn security(facts: &Facts) -> Trouble {
    let code = facts.foreign_code.as_ref()?;
    Some((
        format!("a security fault: until it is mended the functions refuse to write: {code}"),
        "It would run with the rights of the extension's owner. Drop it, and take the privileges TRIGGER and REFERENCES on the extension's tables from whoever made it.",
    ))
}

fn backlog(facts: &Facts) -> Trouble {
    let error = facts.unusable_backlog.clone()?;
    Some((error, "Claims fail until it is mended: any call of claim_sd() tells more."))
}

fn tables(facts: &Facts) -> Trouble {
    (!facts.broken_tables.is_empty()).then(|| {
        (
            format!("lacking an index or a column, so that claims fail: {}", facts.broken_tables.join(", ")),
            "Make what is missing again as the extension's installation script has it; an index that could not be built is invalid.",
        )
    })
}

fn worker(facts: &Facts) -> Trouble {
    (!facts.is_worker_on).then(|| {
        (
            "pg_claims.worker is off: nothing ends stale claims by itself".into(),
            "Have pg_cron call cleanup_stale_sessions() and prune_history(), or turn it on.",
        )
    })
}

fn stale_claims(facts: &Facts, (count, lag): (i64, TimeDelta)) -> Trouble {
    // One run may be under way, and another one may have passed a locked row by.
    (count > 0 && lag > facts.reap_interval * 3).then(|| {
        (
            format!("stale claims that wait for the reaper: {count}, the first one for {}", long(lag)),
            "See pg_stat_activity for who has locked their sessions or SDs, and whether a pg_claims worker runs; cleanup_stale_sessions() ends what is not locked.",
        )
    })
}

fn worker_errors(facts: &Facts) -> Trouble {
    let (at, error) = facts.last_error.as_ref()?;
    let age = age::age(*at, facts.at);
    (age < RECENT).then(|| {
        (
            format!("{} ago: {error}", long(age)),
            "What failed is tried again with every run; the server's log tells all of it.",
        )
    })
}

fn heartbeat_board(facts: &Facts) -> Trouble {
    let Some(Fullness { capacity, refused, .. }) = facts.board else {
        return Some((
            "there is no heartbeat board: each heartbeat is a write to claude_sessions".into(),
            "Add pg_claims to shared_preload_libraries, leave pg_claims.max_sessions above 0, and restart the server.",
        ));
    };
    (refused > 0).then(|| {
        (
            format!("the heartbeat board, made for {capacity} sessions, had no room for {refused} heartbeats, which went to claude_sessions"),
            "Raise pg_claims.max_sessions and restart the server; ids of over 200 bytes never find room.",
        )
    })
}

fn direct_access(facts: &Facts) -> Trouble {
    (!facts.changed_tables.is_empty()).then(|| {
        (
            format!(
                "read by statements, so that claims take longer: {}",
                facts.changed_tables.join(", ")
            ),
            "These tables lack an index that the extension made, or belong to another role.",
        )
    })
}

fn old_transactions(facts: &Facts) -> Trouble {
    let (what, age) = facts.oldest.as_ref()?;
    (*age > LONG_TRANSACTION).then(|| {
        (
            format!("{what} has been open for {}: what claims and heartbeats leave behind cannot be removed", long(*age)),
            "End it; idle_in_transaction_session_timeout ends those that were forgotten.",
        )
    })
}

fn contradictions(count: usize) -> Trouble {
    (count > 0).then(|| {
        (
            format!("claims about which sessions, history and backlog disagree: {count}"),
            "Somebody has written past the triggers. The worker settles it; coordination_repair(false) does so at once.",
        )
    })
}

fn is_working_on(out_of_step: i64) -> Trouble {
    (out_of_step > 0).then(|| {
        (
            format!("SDs of which the backlog says something else than the sessions: {out_of_step}"),
            "Somebody has written past the triggers. A claim and a release set an SD right; sessions are the truth.",
        )
    })
}

/// An age as people say it.
fn long(age: TimeDelta) -> String {
    match age.num_seconds() {
        seconds @ ..120 => format!("{seconds} s"),
        seconds @ 120..7200 => format!("{} min", seconds / 60),
        seconds => format!("{} h", seconds / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn well() -> Facts {
        Facts {
            at: DateTime::from_timestamp(1_000_000, 0).unwrap(),
            foreign_code: None,
            unusable_backlog: None,
            is_worker_on: true,
            reap_interval: TimeDelta::seconds(10),
            due: Some((0, TimeDelta::zero())),
            broken_tables: Vec::new(),
            last_error: None,
            board: Some(Fullness { capacity: 16, entries: 1, refused: 0 }),
            changed_tables: Vec::new(),
            additions: Vec::new(),
            oldest: Some(("process 7".into(), LONG_TRANSACTION)),
            out_of_step: Some(0),
            contradictions: Some(0),
        }
    }

    fn troubles(facts: &Facts) -> Vec<&'static str> {
        let checks = checks(facts);
        checks.iter().filter(|check| check.trouble.is_some()).map(|check| check.name).collect()
    }

    #[test]
    fn all_is_well() {
        assert!(troubles(&well()).is_empty());
        assert_eq!(checks(&well()).len(), 12);
        let blind = Facts { due: None, out_of_step: None, contradictions: None, ..well() };
        assert_eq!(checks(&blind).len(), 9);
    }

    #[test]
    fn each_trouble_is_told_by_itself() {
        let at = well().at;
        let second = TimeDelta::seconds(1);
        let cases = [
            ("security", Facts { foreign_code: Some("x".into()), ..well() }),
            ("backlog", Facts { unusable_backlog: Some("no".into()), ..well() }),
            ("tables", Facts { broken_tables: vec!["sd_holds"], ..well() }),
            ("worker", Facts { is_worker_on: false, ..well() }),
            ("stale_claims", Facts { due: Some((1, TimeDelta::seconds(31))), ..well() }),
            ("worker_errors", Facts { last_error: Some((at - second, "no".into())), ..well() }),
            ("heartbeat_board", Facts { board: None, ..well() }),
            (
                "heartbeat_board",
                Facts { board: Some(Fullness { capacity: 1, entries: 1, refused: 1 }), ..well() },
            ),
            ("direct_access", Facts { changed_tables: vec!["sd_claims"], ..well() }),
            (
                "old_transactions",
                Facts { oldest: Some(("x".into(), LONG_TRANSACTION + second)), ..well() },
            ),
            ("is_working_on", Facts { out_of_step: Some(1), ..well() }),
            ("contradictions", Facts { contradictions: Some(1), ..well() }),
            ("dump_and_restore", Facts { additions: vec!["x".into()], ..well() }),
        ];
        for (name, facts) in cases {
            assert_eq!(troubles(&facts), [name]);
        }
        let two = Facts { additions: vec!["x".into(), "y".into()], ..well() };
        assert_eq!(troubles(&two), ["dump_and_restore"; 2], "each by itself");
        let patient = [
            Facts { due: Some((1, TimeDelta::seconds(30))), ..well() },
            Facts { last_error: Some((at - RECENT, "no".into())), ..well() },
        ];
        for facts in patient {
            assert!(troubles(&facts).is_empty(), "{facts:?}");
        }
    }

    #[test]
    fn an_age_is_told_in_the_largest_unit_that_says_enough() {
        let told = [(0, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "119 min"), (7200, "2 h")];
        for (seconds, text) in told {
            assert_eq!(long(TimeDelta::seconds(seconds)), text);
        }
    }
}
