//! A phase's database: the extension, a backlog, roles, and a guarded table to work in.

use postgres::{Client, Error};

use crate::setting::Setting;
use crate::verbs::{Level, SDS, SESSIONS};

/// Once for the server.
pub fn make_roles(client: &mut Client) -> Result<(), Error> {
    for level in [Level::Operator, Level::Worker] {
        client.batch_execute(&format!("CREATE ROLE {} LOGIN", level.role()))?;
    }
    Ok(())
}

pub fn prepare(client: &mut Client, setting: Setting) -> Result<(), Error> {
    client.batch_execute("CREATE EXTENSION pg_claims")?;
    if setting.watched {
        pg_claims_tests::watch(client);
    }
    let (table, key) = setting.backlog.names();
    client.batch_execute(&setting.backlog.create())?;
    client.batch_execute(&format!(
        "INSERT INTO {table} ({key}, title) SELECT 'SD-' || n, 'Directive ' || n FROM generate_series(0, {}) n",
        SDS - 1
    ))?;
    client.batch_execute(setting.backlog.bind())?;
    client.batch_execute(&format!(
        "CREATE TABLE work (
             id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, sd_id text, session_id text, claim_id bigint,
             written_at timestamptz NOT NULL DEFAULT clock_timestamp());
         SELECT guard_table('work', 'sd_id');
         GRANT INSERT, SELECT ON work TO PUBLIC;
         SELECT register_session('s' || n, 'host-1', NULL) FROM generate_series(0, {}) n;
         UPDATE claude_sessions SET owner_role = '{}' WHERE session_id = 's5';
         SELECT grant_coordination('postgres', 'operator'), grant_coordination('{}', 'operator'), grant_coordination('{}', 'worker')",
        SESSIONS - 1,
        Level::Worker.role(),
        Level::Operator.role(),
        Level::Worker.role()
    ))
}
