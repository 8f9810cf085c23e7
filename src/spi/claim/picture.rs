//! What a claim looks at before it decides.

use chrono::{DateTime, TimeDelta, Utc};
use pg_claims_core::age;
use pg_claims_core::outcome::{Hold, Owner, Progress};
use pgrx::pg_sys::BuiltinOid::TEXTOID;

use crate::error::Result;
use crate::guc;
use crate::spi::directive;
use crate::spi::guard;
use crate::spi::heartbeat;
use crate::spi::row::Row;
use crate::spi::session::Session;
use crate::spi::statement::{Db, Statement};
use crate::spi::time;

/// The session, the SD and the SD's owner at one moment.
#[derive(Debug)]
pub struct Picture {
    /// The session, if it was ever registered.
    pub session: Option<Session>,
    /// When the session acquired what it holds, and the track it gave with it.
    pub held_since: Option<(DateTime<Utc>, Option<String>)>,
    /// The SD, if the backlog has it.
    pub sd: Option<Sd>,
    /// Who holds the SD, and whether that session's lease has expired.
    pub owner: Option<(Owner, bool)>,
    /// Whether the owner's heartbeat lies in the future.
    pub is_owner_ahead: bool,
    /// When the picture was taken.
    pub at: DateTime<Utc>,
}

/// An SD.
#[derive(Debug)]
pub struct Sd {
    /// Its canonical id.
    pub sd_id: String,
    /// Its status.
    pub status: Option<String>,
    /// Whether it is finished.
    pub is_terminal: bool,
    /// Whether a person has stopped it.
    pub hold: Option<Hold>,
    /// Whether there are SDs that must not be worked on at the same time.
    pub has_conflicts: bool,
}

static PICTURE: Statement = Statement::new(
    |c| {
        format!(
            "SELECT s.session_id, s.status, s.owner_role::oid, s.sd_id, s.claim_id,
                    s.claimed_at, s.track,
                    d.sd_id, d.status, d.is_terminal,
                    o.session_id, {latest}, o.silent_until, o.stale_after, o.claimed_at,
                    o.hostname, o.tty, o.codebase, o.track, o.claim_id, o.progress_at,
                    o.progress_note, h.reason, h.held_by::text, h.held_at,
                    EXISTS (SELECT FROM {x}.sd_conflict_matrix m
                             WHERE m.sd_id_a = d.sd_id AND m.resolved_at IS NULL
                               AND m.conflict_severity = 'blocking')
                    OR EXISTS (SELECT FROM {x}.sd_conflict_matrix m
                                WHERE m.sd_id_b = d.sd_id AND m.resolved_at IS NULL
                                  AND m.conflict_severity = 'blocking')
               FROM (VALUES (1)) AS one
               LEFT JOIN {x}.claude_sessions s ON s.session_id = $1
               LEFT JOIN LATERAL ({resolve}) d ON true
               LEFT JOIN {x}.sd_holds h ON h.sd_id = d.sd_id
               LEFT JOIN {x}.claude_sessions o
                 ON o.sd_id = d.sd_id AND o.sd_id IS NOT NULL AND o.status = 'active'",
            x = c.schema,
            latest = heartbeat::latest(&c.schema, "o."),
            resolve = directive::resolve(c.backlog.as_ref(), "$2"),
        )
    },
    &[TEXTOID, TEXTOID],
);

/// Looks, without waiting for anybody and without writing anything.
pub fn look(db: &Db<'_>, session_id: Option<&str>, sd_id: &str) -> Result<Picture> {
    if let Some(backlog) = &db.catalog()?.backlog {
        backlog.usable()?;
    }
    let row = db.run(&PICTURE, &[session_id.into(), sd_id.into()])?.first();
    let at = time::now();
    let session = match row.text(1)? {
        None => None,
        Some(session_id) => Some(Session {
            session_id,
            status: row.required_text(2, "claude_sessions.status")?,
            owner_role: row.role(3, "claude_sessions.owner_role")?,
            claim: row.text(4)?.zip(row.bigint(5)?),
        }),
    };
    let sd = match row.text(8)? {
        None => None,
        Some(sd_id) => Some(Sd {
            sd_id,
            status: row.text(9)?,
            is_terminal: row.flag(10)?,
            hold: match row.text(23)? {
                None => None,
                Some(reason) => Some(Hold {
                    reason,
                    held_by: row.required_text(24, "sd_holds.held_by")?,
                    held_at: row.required_instant(25, "sd_holds.held_at")?,
                }),
            },
            has_conflicts: row.flag(26)?,
        }),
    };
    let mut is_owner_ahead = false;
    let owner = match row.text(11)? {
        None => None,
        Some(session_id) => {
            let claim_id = row.required_bigint(20, "claude_sessions.claim_id")?;
            let lease = heartbeat::read_lease(&row, 12)?;
            is_owner_ahead = lease.heartbeat_at > at + TimeDelta::seconds(1);
            let rules = guc::lease_rules();
            let is_stale = lease.is_stale(&rules, at);
            let reclaimable_at = lease.reclaimable_at(&rules);
            let owner = Owner {
                session_id,
                heartbeat_age: age::age(lease.heartbeat_at, at),
                hostname: row.text(16)?,
                tty: row.text(17)?,
                codebase: row.text(18)?,
                track: row.text(19)?,
                claimed_at: row.required_instant(15, "claude_sessions.claimed_at")?,
                claim_id,
                silent_until: lease.announced_silence(&rules, at),
                progress: row
                    .instant(21)?
                    .map(|at| row.text(22).map(|note| Progress { at, note }))
                    .transpose()?,
                // Only a stale owner's guard makes a difference.
                guarded: is_stale && guard::is_held(claim_id),
                kept_until: (is_stale && reclaimable_at > at).then_some(reclaimable_at),
            };
            Some((owner, is_stale))
        }
    };
    Ok(Picture {
        held_since: row.instant(6)?.map(|at| row.text(7).map(|track| (at, track))).transpose()?,
        session,
        sd,
        owner,
        is_owner_ahead,
        at,
    })
}
