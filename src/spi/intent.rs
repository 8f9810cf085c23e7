//! What this backend means by the writes that it is making.
//!
//! The triggers do not trust whoever writes the tables; the extension itself they let pass. They know its writes by what it
//! has announced here, one thing within the other, and by how deep among triggers that was: what a trigger of the user's
//! writes meanwhile, which the extension's own write has set off, lies deeper and is not meant.

use std::cell::RefCell;

use pgrx::pg_sys;

/// What is meant by a write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Intent {
    /// It is a statement or a write of the extension's, whatever it means.
    Own,
    /// To change what a session holds, in the way that the functions do.
    Session,
    /// To open, close or discard an acquisition.
    History,
    /// To give an acquisition to its session.
    Grant { claim_id: i64, is_undone: bool },
    /// To end a claim as the reaper does.
    Reap { claim_id: i64 },
    /// To have the backlog say who works on an SD.
    Mirror { sd_id: String, session_id: Option<String> },
}

struct Announced {
    intent: Intent,
    /// How many triggers were running, one within the other.
    depth: i32,
}

thread_local! {
    static ANNOUNCED: RefCell<Vec<Announced>> = const { RefCell::new(Vec::new()) };
}

unsafe extern "C-unwind" {
    // Declared here, as it raises no error that would have to be caught: it is asked with every write.
    fn pg_trigger_depth(arguments: pg_sys::FunctionCallInfo) -> pg_sys::Datum;
}

/// How many triggers are running, one within the other.
fn depth() -> i32 {
    // SAFETY: the server's function reads a variable and looks at no argument.
    unsafe { pg_trigger_depth(std::ptr::null_mut()).value() as i32 }
}

/// Announces what is meant until it is dropped, on an error as well.
pub struct Meaning {
    /// How many there were before.
    count: usize,
}

impl Meaning {
    /// Begins.
    pub fn to(intent: Intent) -> Self {
        let depth = depth();
        ANNOUNCED.with_borrow_mut(|all| {
            all.push(Announced { intent, depth });
            Self { count: all.len() - 1 }
        })
    }

    /// Whether the acquisition that is being granted was ended meanwhile.
    pub fn is_undone(&self) -> bool {
        ANNOUNCED.with_borrow(|all| {
            let granted = all.get(self.count).map(|announced| &announced.intent);
            matches!(granted, Some(Intent::Grant { is_undone: true, .. }))
        })
    }
}

impl Drop for Meaning {
    fn drop(&mut self) {
        ANNOUNCED.with_borrow_mut(|all| all.truncate(self.count));
    }
}

/// Asked by a trigger: what the write that has set it off is meant to do, if `chosen` finds that among it.
fn find<R>(chosen: impl Fn(&Intent) -> Option<R>) -> Option<R> {
    let depth = depth() - 1;
    ANNOUNCED.with_borrow(|all| {
        let of_this_write = all.iter().rev().filter(|announced| announced.depth == depth);
        of_this_write.map(|announced| &announced.intent).find_map(chosen)
    })
}

/// Whether the write that has set off this trigger is meant so.
pub fn is(intent: &Intent) -> bool {
    find(|announced| (announced == intent).then_some(())).is_some()
}

/// Whether it gives the acquisition to its session.
pub fn is_granting(claim_id: i64) -> bool {
    find(|announced| match announced {
        Intent::Grant { claim_id: granted, .. } if *granted == claim_id => Some(()),
        _ => None,
    })
    .is_some()
}

/// Who is to work on which SD, if the write has the backlog say so.
pub fn mirrored() -> Option<(String, Option<String>)> {
    find(|announced| match announced {
        Intent::Mirror { sd_id, session_id } => Some((sd_id.clone(), session_id.clone())),
        _ => None,
    })
}

/// How many writes of the backlog's mirror are under way, one within the other.
pub fn mirrors_under_way() -> usize {
    let is_mirror = |announced: &&Announced| matches!(announced.intent, Intent::Mirror { .. });
    ANNOUNCED.with_borrow(|all| all.iter().filter(is_mirror).count())
}

/// The acquisition ends: whoever is granting it, however deep, must not tell of a claim.
pub fn undo_grant(ended: i64) {
    ANNOUNCED.with_borrow_mut(|all| {
        for Announced { intent, .. } in all {
            if let Intent::Grant { claim_id, is_undone } = intent {
                *is_undone |= *claim_id == ended;
            }
        }
    });
}
