//! Building the extension and installing it into a server's tree.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use nix::unistd::{AccessFlags, access};
use pg_claims_tests::Installation;

use super::{major_version, run_visibly, schema};
use crate::layout::Layout;
use crate::progress;

/// Has the linker keep the section in which pgrx describes the extension: linkers differ in whether they would.
/// As cargo-pgrx does.
const KEEP_SECTIONS: &str = r#"target.'cfg(all(target_family = "unix", not(target_os = "macos")))'.rustflags = ["-C", "link-arg=-Wl,--no-gc-sections"]"#;

/// The extension's version: that of the workspace, and so this program's.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Builds pg_claims in release and installs it.
pub fn install(layout: &Layout, server: &Installation) -> Result<()> {
    let pg_config = server.pg_config();
    let feature = format!("pg{}", major_version(pg_config)?);
    check_writable(pg_config)?;
    let library = build(layout, &feature, pg_config)?;
    let [libraries, extensions] = install_folders(pg_config)?;
    let control = layout.root().join("pg_claims.control");
    let text = fs::read_to_string(&control)
        .with_context(|| format!("could not read {}", control.display()))?;
    put(&extensions.join("pg_claims.control"), |file| {
        Ok(fs::write(file, text.replace("@CARGO_VERSION@", VERSION))?)
    })?;
    put(&extensions.join(format!("pg_claims--{VERSION}.sql")), |file| {
        schema::write(&library, &control, VERSION, file)
    })?;
    for step in upgrade_steps(layout)? {
        let Some(name) = step.file_name() else { continue };
        put(&extensions.join(name), |file| Ok(fs::copy(&step, file).map(|_| ())?))?;
    }
    put(&libraries.join(format!("pg_claims.{}", library_suffix(pg_config)?)), |file| {
        Ok(fs::copy(&library, file).map(|_| ())?)
    })
}

/// Builds the library for the server of `pg_config`.
fn build(layout: &Layout, feature: &str, pg_config: &Path) -> Result<PathBuf> {
    // A folder of its own for each kind of server: another's headers, and the flags of plain cargo, would build
    // everything anew each time.
    let kind = kind(feature, pg_config)?;
    let folder = layout.target().join("build").join(&kind);
    let first = if folder.exists() { "" } else { " (about a minute the first time)" };
    progress::step(format_args!("building pg_claims for {kind}{first}"));
    run_visibly(
        Command::new(env!("CARGO"))
            .args(["--config", KEEP_SECTIONS, "build", "--quiet", "--lib", "--release"])
            .args(["--package", "pg_claims", "--no-default-features", "--features", feature])
            .env("CARGO_TARGET_DIR", &folder)
            .env("PGRX_PG_CONFIG_PATH", pg_config)
            .current_dir(layout.root()),
        "cargo build",
    )?;
    let name = format!("{}pg_claims{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    Ok(folder.join("release").join(name))
}

/// The kind of server, by which its headers differ: assertions change them.
fn kind(feature: &str, pg_config: &Path) -> Result<String> {
    let output = Command::new(pg_config).arg("--configure").output()?;
    let has_assertions = String::from_utf8_lossy(&output.stdout).contains("--enable-cassert");
    Ok(format!("{feature}{}", if has_assertions { "-assert" } else { "" }))
}

/// The hand-written scripts from one version to the next.
fn upgrade_steps(layout: &Layout) -> Result<Vec<PathBuf>> {
    let mut steps = Vec::new();
    for entry in fs::read_dir(layout.root().join("sql"))? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name.starts_with("pg_claims--") && name.ends_with(".sql") {
            steps.push(path);
        }
    }
    Ok(steps)
}

/// What the server's libraries are called: on macOS they were .so before PostgreSQL 16.
fn library_suffix(pg_config: &Path) -> Result<&'static str> {
    let is_dylib = cfg!(target_os = "macos") && major_version(pg_config)? >= 16;
    Ok(if is_dylib { "dylib" } else { "so" })
}

/// Puts a file in its place when it is whole, readable to everybody: the server runs as another user. A new file
/// and not the old one written over: a server that has loaded the library, such as the demo's, would see its code
/// change and crash.
fn put(file: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let unfinished = file.with_extension("unfinished");
    write(&unfinished)
        .and_then(|()| Ok(fs::set_permissions(&unfinished, Permissions::from_mode(0o644))?))
        .and_then(|()| Ok(fs::rename(&unfinished, file)?))
        .with_context(|| format!("could not write {}", file.display()))
}

/// Where installing writes to.
fn install_folders(pg_config: &Path) -> Result<[PathBuf; 2]> {
    let ask = |option: &str| -> Result<PathBuf> {
        let output = Command::new(pg_config).arg(option).output()?;
        Ok(PathBuf::from(String::from_utf8(output.stdout)?.trim()))
    };
    Ok([ask("--pkglibdir")?, ask("--sharedir")?.join("extension")])
}

fn check_writable(pg_config: &Path) -> Result<()> {
    for folder in install_folders(pg_config)? {
        if access(&folder, AccessFlags::W_OK).is_err() {
            bail!(
                "{} cannot be written, so that the extension cannot be installed into that PostgreSQL; \
                 run as a user who may, such as root",
                folder.display()
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    use pgrx_sql_entity_graph::ControlFile;

    use super::{VERSION, put};

    #[test]
    fn the_control_file_names_this_version() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let text = fs::read_to_string(root.join("pg_claims.control")).unwrap();
        assert!(
            text.replace("@CARGO_VERSION@", VERSION)
                .contains(&format!("default_version = '{VERSION}'"))
        );
        let control =
            ControlFile::from_path_with_cargo_version(root.join("pg_claims.control"), VERSION)
                .unwrap();
        assert_eq!(control.default_version, VERSION);
    }

    #[test]
    fn a_file_is_put_whole_or_not_at_all() {
        let folder = std::env::temp_dir().join(format!("pg_claims-put-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let file = folder.join("a.sql");
        put(&file, |file| Ok(fs::write(file, "old")?)).unwrap();
        let failed = put(&file, |file| {
            fs::write(file, "ha")?;
            anyhow::bail!("the disk is full")
        });
        assert!(format!("{:#}", failed.unwrap_err()).contains("the disk is full"));
        assert_eq!(fs::read_to_string(&file).unwrap(), "old");
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o644);
        fs::remove_dir_all(folder).unwrap();
    }
}
