//! Telling whether a connection whose heartbeat the server gives is one session's alone.
//!
//! Behind a transaction pooler a connection is nobody's: it lives on when its session is long dead.
//! What can be seen of that from here is that the connection acts for another session as well.

use std::cell::RefCell;

#[derive(Default)]
struct Use {
    bound_to: Option<String>,
    also_used_by: Option<String>,
}

thread_local! {
    static USE: RefCell<Use> = RefCell::new(Use::default());
}

/// The server beats for this connection on behalf of that session, or (`None`) not any more.
pub fn bind(session_id: Option<&str>) {
    USE.with_borrow_mut(|used| {
        *used = Use { bound_to: session_id.map(str::to_owned), also_used_by: None };
    });
}

/// This connection acts for that session.
pub fn note_acting_for(session_id: &str) {
    USE.with_borrow_mut(|used| {
        if used.bound_to.as_deref().is_some_and(|bound_to| bound_to != session_id) {
            used.also_used_by = Some(session_id.to_owned());
        }
    });
}

/// Another session that this connection has acted for while it was bound.
pub fn also_used_by() -> Option<String> {
    USE.with_borrow(|used| used.also_used_by.clone())
}
