//! Where things are: everything below `target/`, unless the server's user cannot get there.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use pg_claims_tests::ServerUser;

use crate::progress;

/// The folders of this checkout.
pub struct Layout {
    root: PathBuf,
    servers: PathBuf,
}

impl Layout {
    /// The checkout that this program was built from.
    pub fn of_this_checkout() -> Result<Self> {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
        let root = manifest.parent().context("xtask lies in no folder")?.to_owned();
        let target = root.join("target");
        fs::create_dir_all(&target)
            .with_context(|| format!("could not create {}", target.display()))?;
        let servers = servers_dir(&root, &target)?;
        Ok(Self { root, servers })
    }

    /// The checkout.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Build output and tools.
    pub fn target(&self) -> PathBuf {
        self.root.join("target")
    }

    /// Relocated servers and throw-away clusters: a folder that the server's user can enter.
    pub fn servers(&self) -> &Path {
        &self.servers
    }
}

fn servers_dir(root: &Path, target: &Path) -> Result<PathBuf> {
    let user = ServerUser::choose()?;
    let below = target.join("pg");
    ServerUser::create_shared_dir(&below)?;
    if user.can_enter(&below)? {
        return Ok(below);
    }
    let mut hasher = DefaultHasher::new();
    root.hash(&mut hasher);
    let elsewhere =
        std::env::temp_dir().join(format!("pg_claims-servers-{:016x}", hasher.finish()));
    ServerUser::create_shared_dir(&elsewhere)?;
    progress::note(format_args!(
        "user {} cannot enter {}; servers go to {}",
        user.name(),
        target.display(),
        elsewhere.display()
    ));
    Ok(elsewhere)
}
