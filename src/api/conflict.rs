//! Conflicts: SDs that must not be worked on at once.

use pg_claims_core::refusal::Refusal;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use serde_json::{Value, json};

use super::argument::checked_id;
use super::{answer, running};
use crate::error::{ClaimError, Result};
use crate::jsonb::Jsonb;
use crate::spi::{Db, claim, conflict, directive};

/// The longest kind of a conflict, in characters.
const MAX_TYPE_CHARACTERS: usize = 200;

#[pg_extern(volatile, parallel_unsafe)]
fn declare_conflict(
    p_sd_a: Option<&str>,
    p_sd_b: Option<&str>,
    p_conflict_type: Option<&str>,
    p_conflict_severity: default!(Option<&str>, "'blocking'"),
    fcinfo: pg_sys::FunctionCallInfo,
) -> Result<Jsonb, ErrorReport> {
    let a = checked_id("p_sd_a", p_sd_a)?;
    let b = checked_id("p_sd_b", p_sd_b)?;
    let invalid = |argument, reason: String, hint: &str| ClaimError::InvalidArgument {
        argument,
        reason,
        hint: Some(hint.into()),
    };
    let kind = p_conflict_type
        .filter(|kind| !kind.trim().is_empty() && kind.chars().count() <= MAX_TYPE_CHARACTERS)
        .ok_or_else(|| {
            invalid(
                "p_conflict_type",
                format!("must be 1 to {MAX_TYPE_CHARACTERS} characters, not blank"),
                "Name what the two have in common, such as 'same_files'.",
            )
        })?;
    let severity = p_conflict_severity
        .filter(|severity| ["blocking", "warning"].contains(severity))
        .ok_or_else(|| {
            invalid(
                "p_conflict_severity",
                "must be 'blocking' or 'warning'".into(),
                "Only 'blocking' refuses claims.",
            )
        })?;
    Ok(Db::connect(running(fcinfo), |db| answer(declare(db, a, b, kind, severity)?))?)
}

fn declare(
    db: &Db<'_>,
    a: &str,
    b: &str,
    kind: &str,
    severity: &str,
) -> Result<Result<Value, Refusal>> {
    let pair = match canonical_pair(db, a, b)? {
        Ok(pair) => pair,
        Err(refusal) => return Ok(Err(refusal)),
    };
    let (a, b) = conflict::ordered(&pair.0, &pair.1);
    if a == b {
        return Err(ClaimError::InvalidArgument {
            argument: "p_sd_b",
            reason: "names the same SD as p_sd_a".into(),
            hint: Some("An SD cannot be in conflict with itself.".into()),
        });
    }
    // A claim that is just being made ends first, and one that comes later sees the conflict.
    directive::lock(db, vec![a.to_owned(), b.to_owned()])?;
    conflict::declare(db, (a, b), kind, severity)?;
    Ok(Ok(json!({
        "success": true,
        "sd_id_a": a,
        "sd_id_b": b,
        "conflict_type": kind,
        "conflict_severity": severity,
    })))
}

fn canonical_pair(db: &Db<'_>, a: &str, b: &str) -> Result<Result<(String, String), Refusal>> {
    let canonical = |sd_id: &str| -> Result<Result<String, Refusal>> {
        Ok(match claim::look(db, None, sd_id)?.sd {
            Some(sd) => Ok(sd.sd_id),
            None => Err(Refusal::SdNotFound { sd_id: sd_id.to_owned() }),
        })
    };
    Ok(match (canonical(a)?, canonical(b)?) {
        (Ok(a), Ok(b)) => Ok((a, b)),
        (Err(refusal), _) | (_, Err(refusal)) => Err(refusal),
    })
}

#[pg_extern(volatile, parallel_unsafe)]
fn resolve_conflict(
    p_sd_a: Option<&str>,
    p_sd_b: Option<&str>,
    fcinfo: pg_sys::FunctionCallInfo,
) -> Result<Jsonb, ErrorReport> {
    let a = checked_id("p_sd_a", p_sd_a)?;
    let b = checked_id("p_sd_b", p_sd_b)?;
    Ok(Db::connect(running(fcinfo), |db| answer(resolve(db, a, b)?))?)
}

fn resolve(db: &Db<'_>, a: &str, b: &str) -> Result<Result<Value, Refusal>> {
    // An SD that has been deleted since is known by the name under which it was declared.
    let pair = canonical_pair(db, a, b)?.unwrap_or_else(|_| (a.to_owned(), b.to_owned()));
    let (a, b) = conflict::ordered(&pair.0, &pair.1);
    directive::lock(db, vec![a.to_owned(), b.to_owned()])?;
    if !conflict::resolve(db, (a, b))? {
        return Ok(Err(Refusal::NoConflict { sd_id: a.to_owned(), other: b.to_owned() }));
    }
    Ok(Ok(json!({ "success": true, "sd_id_a": a, "sd_id_b": b })))
}
