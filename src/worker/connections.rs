//! The connections that the server beats for, and those of them that have ended.

use super::step::{STEP_LIMIT, note, step, try_step};
use crate::error::Result;
use crate::service;
use crate::spi::manager::{Consequence, Due};
use crate::spi::{Db, directive, health, heartbeat, manager, session};

/// The reason recorded for a claim whose connection ended.
const CONNECTION_ENDED: &str = "connection_ended";

/// Forgets connections that have ended, and beats for the others: in this order, so that nobody beats
/// for a connection that is not there any more.
pub(super) fn tend(run: &mut health::Run) -> bool {
    let ended = release_ended_connections(run);
    beat_connections(run) || ended
}

/// Beats for the connections whose heartbeat is due.
fn beat_connections(run: &mut health::Run) -> bool {
    let due = step(run, c"pg_claims: looking for due heartbeats", manager::due);
    // Whoever has locked the sessions, or waits to, keeps nobody from beating.
    let due = due.unwrap_or_else(|| beat_on_board_alone(run));
    let mut any = false;
    for due in &due {
        let outcome =
            try_step(STEP_LIMIT, c"pg_claims: beating for connections", |db| beat(db, due));
        let failure = match outcome {
            Ok(Beaten::Yes) => {
                any = true;
                continue;
            }
            Ok(Beaten::PutOff) => continue,
            Ok(Beaten::No(reason)) => reason.to_owned(),
            Err(error) => {
                note(run, error.clone());
                error
            }
        };
        any = true;
        step(run, c"pg_claims: counting a failed heartbeat", |db| {
            manager::failed(db, due.connection, &failure)
        });
    }
    any
}

/// Beats for all connections of whose sessions the board knows, which takes no look at the table of sessions. None
/// of them is due after that.
fn beat_on_board_alone(run: &mut health::Run) -> Vec<Due> {
    step(run, c"pg_claims: beating on the board alone", |db| {
        for due in manager::all(db)? {
            heartbeat::beat_on_board_for(db, &due.session_id)?;
        }
        Ok(())
    });
    Vec::new()
}

/// What came of a heartbeat.
enum Beaten {
    Yes,
    /// Whoever writes the session keeps everybody else from taking anything from it, so that this is
    /// neither a heartbeat nor a failure: the next visit tries again.
    PutOff,
    /// It cannot be.
    No(&'static str),
}

/// Beats for one connection.
fn beat(db: &Db<'_>, due: &Due) -> Result<Beaten> {
    // Where the board answers for the session, which has not ended then, its heartbeat takes no write.
    if let Some(beat) = heartbeat::beat_on_board_for(db, &due.session_id)? {
        manager::succeeded(db, due.connection, beat.heartbeat_at)?;
        return Ok(Beaten::Yes);
    }
    let session_ids = [due.session_id.clone()];
    let Some((_, found)) = heartbeat::beat_many(db, &session_ids)?.pop() else {
        return Ok(Beaten::PutOff);
    };
    Ok(match found {
        heartbeat::Found::Beaten(beat, _) => {
            manager::succeeded(db, due.connection, beat.heartbeat_at)?;
            Beaten::Yes
        }
        heartbeat::Found::Busy => Beaten::PutOff,
        heartbeat::Found::Unknown => Beaten::No("the session does not exist any more"),
        heartbeat::Found::Released => Beaten::No("the session has ended"),
    })
}

/// Forgets connections that have ended, and releases what they held if a setting says so.
fn release_ended_connections(run: &mut health::Run) -> bool {
    // Just beginning; the next look is soon.
    let Some(server_run) = service::run() else { return false };
    let ended =
        step(run, c"pg_claims: looking for ended connections", manager::ended).unwrap_or_default();
    for ended in &ended {
        step(run, c"pg_claims: forgetting ended connections", |db| {
            match manager::forget(db, ended, server_run)? {
                Consequence::Release => {}
                Consequence::Kept(why) => {
                    pgrx::log!(
                        "pg_claims: a connection of session \"{}\" has ended; its claim is kept, as {why}",
                        ended.session_id
                    );
                    return Ok(());
                }
                Consequence::None => return Ok(()),
            }
            let Some(found) = session::find(db, &ended.session_id)? else { return Ok(()) };
            if let Some((sd_id, claim_id)) = found.sd_id.zip(found.claim_id) {
                directive::lock(db, vec![sd_id])?;
                session::let_go(db, &ended.session_id, claim_id, CONNECTION_ENDED, true)?;
            }
            Ok(())
        });
    }
    !ended.is_empty()
}
