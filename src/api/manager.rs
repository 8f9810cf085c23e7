//! The heartbeat manager: the server beats for this connection.

use pg_claims_core::manager::{Activity, NotStarted, Started, Stats, Stopped};
use pg_claims_core::refusal::Refusal;
use pg_claims_core::session::Beat;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use serde_json::Value;

use super::argument::checked_id;
use super::heartbeat::{beat, checked_session};
use super::{answer, running, shared};
use crate::error::Result;
use crate::jsonb::Jsonb;
use crate::pg::time;
use crate::spi::Db;
use crate::spi::manager::{self, Connection};
use crate::worker::wake;
use crate::{beating, guc, service};

#[pg_extern(volatile, parallel_unsafe)]
fn start_heartbeat(
    p_session_id: Option<&str>,
    fcinfo: pg_sys::FunctionCallInfo,
) -> Result<Jsonb, ErrorReport> {
    let session_id = checked_id("p_session_id", p_session_id)?;
    let function = running(fcinfo);
    let begin = |db: &Db<'_>| super::json(&start(db, function, session_id)?);
    // A standby has no worker, and says so.
    Ok(if service::is_in_recovery() {
        Db::look(function, begin)
    } else {
        Db::connect(function, begin)
    }?)
}

fn start(db: &Db<'_>, function: pg_sys::Oid, session_id: &str) -> Result<Value> {
    if let Err(refusal) = checked_session(db, session_id)? {
        return Ok(serde_json::to_value(refusal)?);
    }
    let connection = Connection::own();
    let running = manager::find(db, connection)?.filter(|running| !running.given_up);
    if let Some(running) = running.filter(|running| running.session_id != session_id) {
        return Ok(serde_json::to_value(NotStarted::other_session(&running.session_id))?);
    }
    // Never a promise that nobody would keep.
    if let Err(no_worker) = wake::ensure() {
        return Ok(serde_json::to_value(NotStarted::no_worker(no_worker.reason()))?);
    }
    let first = match beat(db, session_id, None)? {
        Ok(first) => first,
        Err(refusal) => return Ok(serde_json::to_value(refusal)?),
    };
    manager::start(db, connection, session_id, first.heartbeat_at)?;
    shared::bind(Some(session_id));
    beating::begin(function);
    wake::at_commit();
    wake::at_exit();
    Ok(serde_json::to_value(Started {
        success: true,
        session_id: session_id.to_owned(),
        interval_ms: manager::interval_of(db, Some(session_id))?.num_milliseconds(),
    })?)
}

#[pg_extern(volatile, parallel_unsafe)]
fn stop_heartbeat(fcinfo: pg_sys::FunctionCallInfo) -> Result<Jsonb, ErrorReport> {
    let stopped_session = Db::connect(running(fcinfo), |db| manager::stop(db, Connection::own()))?;
    shared::bind(None);
    beating::end();
    Ok(Db::connect(running(fcinfo), |_| answer(Ok(Stopped { success: true, stopped_session })))?)
}

#[pg_extern(volatile, parallel_unsafe)]
fn is_heartbeat_active(fcinfo: pg_sys::FunctionCallInfo) -> Result<Jsonb, ErrorReport> {
    Ok(Db::look(running(fcinfo), |db| {
        answer(Ok(Activity::from(manager::find(db, Connection::own())?)))
    })?)
}

#[pg_extern(volatile, parallel_unsafe)]
fn get_heartbeat_stats(fcinfo: pg_sys::FunctionCallInfo) -> Result<Jsonb, ErrorReport> {
    Ok(Db::look(running(fcinfo), |db| {
        let managed = manager::find(db, Connection::own())?;
        let interval = manager::interval_of(db, managed.as_ref().map(|m| m.session_id.as_str()))?;
        answer(Ok(Stats::new(
            managed,
            interval,
            guc::max_heartbeat_failures(),
            shared::also_used_by(),
            time::now(),
        )))
    })?)
}

#[pg_extern(volatile, parallel_unsafe)]
fn force_heartbeat(
    p_session_id: Option<&str>,
    fcinfo: pg_sys::FunctionCallInfo,
) -> Result<Jsonb, ErrorReport> {
    let session_id = checked_id("p_session_id", p_session_id)?;
    Ok(Db::connect(running(fcinfo), |db| answer(force(db, session_id)?))?)
}

fn force(db: &Db<'_>, session_id: &str) -> Result<Result<Beat, Refusal>> {
    let beat = beat(db, session_id, None)?;
    let connection = Connection::own();
    let is_managed = manager::find(db, connection)?
        .is_some_and(|managed| managed.session_id == session_id && !managed.given_up);
    if let Ok(beat) = &beat
        && is_managed
    {
        manager::succeeded(db, connection, beat.heartbeat_at)?;
    }
    Ok(beat)
}
