//! The user that the server runs as: PostgreSQL refuses to run as root.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use nix::unistd::{Uid, User, geteuid};

/// The user that server programs run as: oneself or, for root, an unprivileged user.
#[derive(Debug, Clone)]
pub struct ServerUser {
    /// Whom to become; `None` to stay oneself.
    become_user: Option<User>,
}

impl ServerUser {
    /// Oneself; for root the user `postgres`, or else `nobody`.
    pub fn choose() -> Result<Self> {
        if !geteuid().is_root() {
            return Ok(Self { become_user: None });
        }
        for name in ["postgres", "nobody"] {
            if let Some(user) = User::from_name(name)? {
                return Ok(Self { become_user: Some(user) });
            }
        }
        bail!("PostgreSQL does not run as root, and there is neither a user postgres nor nobody")
    }

    /// The user's name, for messages.
    pub fn name(&self) -> String {
        match &self.become_user {
            Some(user) => user.name.clone(),
            None => User::from_uid(geteuid())
                .ok()
                .flatten()
                .map_or_else(|| geteuid().to_string(), |user| user.name),
        }
    }

    /// A command that runs as this user.
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new(program.as_ref());
        if let Some(user) = &self.become_user {
            // Without a list of groups the standard library clears root's own ones.
            command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
            command.env("HOME", "/").env_remove("XDG_RUNTIME_DIR");
        }
        // The caller's folder may be closed to this user.
        command.current_dir("/");
        without_libpq_variables(&mut command);
        command
    }

    /// Whether this user can enter `path`.
    pub fn can_enter(&self, path: &Path) -> Result<bool> {
        let status = self
            .command("/usr/bin/test")
            .arg("-x")
            .arg(path)
            .status()
            .context("could not run /usr/bin/test")?;
        Ok(status.success())
    }

    /// Makes a folder that only this user can enter and write.
    pub fn create_own_dir(&self, path: &Path) -> Result<()> {
        fs::DirBuilder::new()
            .mode(0o700)
            .create(path)
            .with_context(|| format!("could not create {}", path.display()))?;
        if let Some(user) = &self.become_user {
            chown(path, Some(user.uid.as_raw()), Some(user.gid.as_raw()))?;
        }
        Ok(())
    }

    /// Makes a folder whose content everybody can read, owned by whoever runs this program.
    /// Refuses a folder of that name that belongs to somebody else.
    pub fn create_shared_dir(path: &Path) -> Result<()> {
        match fs::DirBuilder::new().mode(0o755).create(path) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                let found = fs::symlink_metadata(path)?;
                let owner = Uid::from_raw(std::os::unix::fs::MetadataExt::uid(&found));
                if !found.is_dir() || owner != geteuid() {
                    bail!("{} exists and is not a folder of ours; remove it", path.display());
                }
            }
            Err(error) => {
                return Err(error).with_context(|| format!("could not create {}", path.display()));
            }
        }
        // A strict umask must not keep the server's user out.
        fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
        Ok(())
    }
}

/// Takes PGHOST, PGSERVICE, PGDATA and so on away, which point to some other server.
pub fn without_libpq_variables(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        // Not the tests' own ones, which go on with an underscore.
        let rest = name.as_encoded_bytes().strip_prefix(b"PG");
        if rest.is_some_and(|rest| rest.first().is_some_and(u8::is_ascii_uppercase)) {
            command.env_remove(name);
        }
    }
}
