//! A database of its own for each test.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock};

use postgres::{Client, NoTls};

use crate::server::{self, Installation};
use crate::{ENV_PG_CONFIG, ENV_SOCKET_DIR, ENV_WORK_DIR, Server};

/// A database on the shared server, dropped at the end with the roles that were made for it.
pub struct TestDb {
    name: String,
    socket_dir: PathBuf,
    installation: Installation,
    roles: Mutex<Vec<String>>,
}

impl TestDb {
    /// A database with the extension in schema public.
    pub fn new() -> Self {
        /// A database with the extension, of which each test gets a copy: that takes a quarter of the time.
        static MODEL: OnceLock<String> = OnceLock::new();
        let model = MODEL.get_or_init(|| {
            // Not dropped, as the server is given up with all that it has.
            let model = std::mem::ManuallyDrop::new(Self::empty());
            model.connect().batch_execute("CREATE EXTENSION pg_claims").unwrap();
            // Nobody can be there while it is being copied.
            model.administer(&format!("ALTER DATABASE {} ALLOW_CONNECTIONS false", model.name));
            model.name.clone()
        });
        Self::copy_of(model)
    }

    /// A database without the extension.
    pub fn empty() -> Self {
        Self::copy_of("template1")
    }

    fn copy_of(model: &str) -> Self {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let db = Self {
            name: format!("test_{}_{number}", std::process::id()),
            socket_dir: environment(ENV_SOCKET_DIR),
            installation: under_test(),
            roles: Mutex::new(Vec::new()),
        };
        db.administer(&format!("CREATE DATABASE {} TEMPLATE {model}", db.name));
        db
    }

    fn administer(&self, sql: &str) {
        let mut client = server::config(&self.socket_dir, "postgres").connect(NoTls).unwrap();
        client.batch_execute(sql).unwrap();
    }

    /// The database's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A connection of its own, as the superuser.
    pub fn connect(&self) -> Client {
        self.connect_as("postgres")
    }

    /// A connection of its own, as `role`.
    pub fn connect_as(&self, role: &str) -> Client {
        let mut config = server::config(&self.socket_dir, &self.name);
        config.user(role).connect(NoTls).unwrap()
    }

    /// How to connect, for what [`connect_as`](Self::connect_as) does not offer.
    pub fn config(&self) -> postgres::Config {
        server::config(&self.socket_dir, &self.name)
    }

    /// A new login role without any privilege; roles belong to the whole server, so the name is
    /// made unique.
    pub fn role(&self, name: &str) -> String {
        let role = format!("{name}_{}", self.name);
        self.administer(&format!("CREATE ROLE {role} LOGIN"));
        self.roles.lock().unwrap().push(role.clone());
        role
    }

    /// The database as `pg_dump` writes it.
    pub fn dump(&self) -> String {
        self.dump_with(&[])
    }

    /// The same, with further arguments.
    pub fn dump_with(&self, arguments: &[&str]) -> String {
        let output =
            server::client_program(&self.installation, &self.socket_dir, "pg_dump", &self.name)
                .args(arguments)
                .output()
                .unwrap();
        let output = server::succeeded(output, "pg_dump").unwrap();
        String::from_utf8(output.stdout).unwrap()
    }

    /// psql, set to connect to the database, to be started by the test.
    pub fn psql_child(&self, arguments: &[&str]) -> std::process::Command {
        let mut command =
            server::client_program(&self.installation, &self.socket_dir, "psql", &self.name);
        command.args(arguments);
        command
    }

    /// Runs a dump or any other script with psql, which must not meet an error. Returns what psql
    /// printed.
    pub fn psql(&self, script: &str) -> String {
        let mut child =
            server::client_program(&self.installation, &self.socket_dir, "psql", &self.name)
                .args(["-X", "-q", "-v", "ON_ERROR_STOP=1"])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
        // In a thread of its own, or a long script and a long answer would wait for each other.
        let mut stdin = child.stdin.take().unwrap();
        let script = script.to_owned();
        let writer = std::thread::spawn(move || stdin.write_all(script.as_bytes()));
        let output = server::succeeded(child.wait_with_output().unwrap(), "psql").unwrap();
        writer.join().unwrap().unwrap();
        String::from_utf8(output.stdout).unwrap()
    }
}

impl Default for TestDb {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for TestDb {
    fn drop(&mut self) {
        // A second panic while a test fails would hide the first one's message.
        let drop_all = || -> Result<(), postgres::Error> {
            let mut client = server::config(&self.socket_dir, "postgres").connect(NoTls)?;
            client.batch_execute(&format!("DROP DATABASE {} WITH (FORCE)", self.name))?;
            for role in self.roles.lock().into_iter().flat_map(|roles| roles.clone()) {
                client.batch_execute(&format!("DROP ROLE {role}"))?;
            }
            Ok(())
        };
        if let Err(error) = drop_all() {
            eprintln!("could not drop database {}: {error}", self.name);
        }
    }
}

/// Puts a trigger of a user's, which does nothing, on each of the extension's tables that are written all
/// the time.
pub fn watch(client: &mut Client) {
    client
        .batch_execute(
            "CREATE FUNCTION watch() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
             CREATE TRIGGER watch AFTER INSERT OR UPDATE OR DELETE ON claude_sessions
                FOR EACH ROW EXECUTE FUNCTION watch();
             CREATE TRIGGER watch AFTER INSERT OR UPDATE OR DELETE ON sd_claims
                FOR EACH ROW EXECUTE FUNCTION watch();
             CREATE TRIGGER watch AFTER INSERT OR UPDATE OR DELETE ON session_lifecycle_events
                FOR EACH ROW EXECUTE FUNCTION watch();
             CREATE TRIGGER watch AFTER INSERT OR UPDATE OR DELETE ON strategic_directives_v2
                FOR EACH ROW EXECUTE FUNCTION watch()",
        )
        .unwrap();
}

/// A server of the test's own, of the PostgreSQL under test: for what other tests' transactions
/// would disturb. `name` is a folder's name that no other test uses.
pub fn own_server(name: &str, settings: &[&str]) -> Server {
    Server::create(&under_test(), &environment(ENV_WORK_DIR).join(name), settings).unwrap()
}

/// The PostgreSQL under test.
pub fn under_test() -> Installation {
    Installation::new(&environment(ENV_PG_CONFIG)).unwrap().under_test()
}

fn environment(variable: &str) -> PathBuf {
    match std::env::var_os(variable) {
        Some(value) => Path::new(&value).to_owned(),
        None => panic!("{variable} is not set: run these tests through `cargo xtask test`"),
    }
}
