//! Servers that come of others: copies, standbys, those that recover, are rewound or upgraded.

use std::fs::{self, OpenOptions};
use std::io::Write;

use anyhow::{Context, Result};

use super::{PORT, Server, succeeded};

impl Server {
    /// A server beside this one on a copy of its data folder, which must not be in use. Not started.
    pub fn copy(&self, name: &str) -> Result<Self> {
        let copy = self.beside(name)?;
        let output = self
            .installation
            .user
            .command("cp")
            .arg("-a")
            .arg(self.data())
            .arg(copy.data())
            .output()
            .context("could not run cp")?;
        succeeded(output, "cp")?;
        copy.use_own_socket()?;
        Ok(copy)
    }

    /// A server beside this one on a base backup of it. Not started.
    pub fn base_backup(&self, name: &str) -> Result<Self> {
        self.base_backup_with(name, &[])
    }

    /// A standby of this server, by streaming replication from it.
    pub fn standby(&self, name: &str) -> Result<Self> {
        let standby = self.base_backup_with(name, &["-R"])?;
        standby.start()?;
        Ok(standby)
    }

    fn base_backup_with(&self, name: &str, options: &[&str]) -> Result<Self> {
        let copy = self.beside(name)?;
        let output = self
            .client_program("pg_basebackup", "postgres")
            // It would be one of the connection that the standby makes.
            .env_remove("PGDATABASE")
            .arg("-D")
            .arg(copy.data())
            .args(["--no-sync", "-c", "fast", "-X", "stream"])
            .args(options)
            .output()
            .context("could not run pg_basebackup")?;
        succeeded(output, "pg_basebackup")?;
        copy.use_own_socket()?;
        Ok(copy)
    }

    /// Starts a base backup of `source` and has it recover from there up to a restore point.
    pub fn recover_to(&self, source: &Self, point: &str) -> Result<()> {
        let mut file = OpenOptions::new().append(true).open(self.data().join("postgresql.conf"))?;
        writeln!(file, "restore_command = 'cp {}/pg_wal/%f %p'", source.data().display())?;
        writeln!(file, "recovery_target_name = '{point}'")?;
        writeln!(file, "recovery_target_action = 'promote'")?;
        fs::write(self.data().join("recovery.signal"), "")?;
        self.start()
    }

    /// An empty folder for a server beside this one.
    fn beside(&self, name: &str) -> Result<Self> {
        let other = Self::at(&self.installation, &self.root.with_file_name(name))?;
        other.remove()?;
        self.installation.user.create_own_dir(&other.root)?;
        self.installation.user.create_own_dir(&other.socket_dir)?;
        Ok(other)
    }

    /// In a copied data folder: the last line of a setting counts.
    fn use_own_socket(&self) -> Result<()> {
        let mut file = OpenOptions::new().append(true).open(self.data().join("postgresql.conf"))?;
        writeln!(file, "unix_socket_directories = '{}'", self.socket_dir.display())?;
        Ok(())
    }

    /// Makes a standby accept writes, and waits until it does.
    pub fn promote(&self) -> Result<()> {
        let output = self
            .installation
            .program("pg_ctl")
            .arg("-D")
            .arg(self.data())
            .args(["-w", "-t", "120", "-s", "promote"])
            .output()
            .context("could not run pg_ctl")?;
        succeeded(output, "pg_ctl promote")?;
        Ok(())
    }

    /// Makes this server, which is stopped and has gone on apart from `source`, a standby of that one: rewound to where both
    /// parted. Needs `wal_log_hints`.
    pub fn rewind(&self, source: &Self) -> Result<()> {
        // pg_rewind reads the timeline from the last checkpoint, which may be one from before a promotion.
        source.run("psql", "postgres", &["-X", "-q", "-c", "CHECKPOINT"])?;
        let connection = format!("host={} port={PORT}", source.socket_dir.display());
        let output = self
            .installation
            .program("pg_rewind")
            .arg("-D")
            .arg(self.data())
            .arg(format!("--source-server={connection} dbname=postgres user=postgres"))
            .output()
            .context("could not run pg_rewind")?;
        succeeded(output, "pg_rewind")?;
        // It has taken the settings of the other one, and those that `standby` has written for it.
        self.use_own_socket()?;
        let automatic = self.data().join("postgresql.auto.conf");
        let mut file = OpenOptions::new().append(true).open(automatic)?;
        writeln!(file, "primary_conninfo = '{connection} user=postgres'")?;
        fs::write(self.data().join("standby.signal"), "")?;
        self.start()
    }

    /// Makes this new server, which is stopped and empty, what `old` is, which is stopped as well.
    pub fn upgrade_from(&self, old: &Self) -> Result<()> {
        let programs = |server: &Self| -> Result<String> {
            let output = server.installation.program("pg_config").arg("--bindir").output()?;
            let output = succeeded(output, "pg_config")?;
            Ok(String::from_utf8(output.stdout)?.trim().to_owned())
        };
        let output = self
            .installation
            .program("pg_upgrade")
            .current_dir(&self.root)
            .args(["-b", &programs(old)?, "-B", &programs(self)?, "-U", "postgres"])
            .arg("-d")
            .arg(old.data())
            .arg("-D")
            .arg(self.data())
            .arg("-s")
            .arg(&self.socket_dir)
            .output()
            .context("could not run pg_upgrade")?;
        succeeded(output, "pg_upgrade")?;
        self.start()
    }
}
