//! The comparisons with what users add: a backlog or triggers of their own.

use anyhow::Result;

use super::pgbench::Side;
use super::report::Goal;
use super::{Bench, connect, filled, vacuum};

/// What a claim and a release write.
const WRITTEN: [&str; 4] =
    ["claude_sessions", "sd_claims", "session_lifecycle_events", "strategic_directives_v2"];

/// The table is made like the extension's own, so that nothing but the binding is compared. The indexes of
/// the queue are left out, as binding makes them.
const BINDING: &str = "
    CREATE TABLE work_items (LIKE strategic_directives_v2 INCLUDING ALL EXCLUDING INDEXES, PRIMARY KEY (sd_id))
        WITH (fillfactor = 80);
    INSERT INTO work_items SELECT * FROM strategic_directives_v2;
    SELECT bind_directives('work_items', '{sd_id}', p_is_working_on_column => 'is_working_on',
                           p_active_session_id_column => 'active_session_id')";

impl Bench {
    pub(super) fn bound_backlog(&mut self) -> Result<()> {
        let what = "claim and release on a bound backlog";
        self.addition(12, what, BINDING, "on the extension's own", Goal::AtLeast(0.7))
    }

    pub(super) fn triggers(&mut self) -> Result<()> {
        let what = "claim and release with a user's trigger on each of the tables that they write";
        self.addition(13, what, &triggers(), "without", Goal::AtLeast(0.8))
    }

    /// Claims and releases in a database to which a user has added something, against one as it was made.
    fn addition(
        &mut self,
        number: u8,
        what: &str,
        added: &str,
        against: &str,
        goal: Goal,
    ) -> Result<()> {
        let sessions = self.sizes.sessions;
        let plain = filled(&self.server, "plain", sessions, 0)?;
        let extended = filled(&self.server, "extended", sessions, 0)?;
        let mut client = connect(&self.server, extended)?;
        client.batch_execute(added)?;
        vacuum(&mut client)?;
        let side = |database| Side::cycle(&self.server, database, sessions);
        let rates = self.plan.in_vacuumed_turns(&[side(extended), side(plain)])?;
        self.find(number, what, [&rates[0], &rates[1]], "/s", against, goal);
        Ok(())
    }
}

/// Makes the triggers: one on each table, for whatever is written there.
fn triggers() -> String {
    let function = "CREATE FUNCTION do_nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';";
    let triggers = WRITTEN.map(|table| {
        format!(
            "CREATE TRIGGER do_nothing AFTER INSERT OR UPDATE OR DELETE ON {table}
                FOR EACH ROW EXECUTE FUNCTION do_nothing();"
        )
    });
    function.to_owned() + &triggers.concat()
}
