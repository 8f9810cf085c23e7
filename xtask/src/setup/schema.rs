//! The installation script, from what pgrx has left in the library.
//!
//! pgrx describes every function and every `extension_sql_file!` in a section of the library. cargo-pgrx makes
//! the script of that by the same crate; doing it here spares five minutes of building cargo-pgrx.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use object::{Object, ObjectSection};
use pgrx_sql_entity_graph::section::{ELF_SECTION_NAME, MACHO_SECTION_NAME, decode_entities};
use pgrx_sql_entity_graph::{ControlFile, PgrxSql, SqlGraphEntity};

/// Writes the installation script of `library` to `script`. The version is that of the package.
pub fn write(library: &Path, control: &Path, version: &str, script: &Path) -> Result<()> {
    let bytes =
        fs::read(library).with_context(|| format!("could not read {}", library.display()))?;
    let file = object::File::parse(bytes.as_slice()).context("the library cannot be parsed")?;
    let section = file
        .sections()
        .find(|section| {
            matches!(section.name(), Ok(name) if [ELF_SECTION_NAME, MACHO_SECTION_NAME].contains(&name))
        })
        .with_context(|| format!("{} has no section of pgrx's", library.display()))?;
    let control_file = ControlFile::from_path_with_cargo_version(control, version)
        .with_context(|| format!("could not read {}", control.display()))?;
    let mut entities = vec![SqlGraphEntity::ExtensionRoot(control_file)];
    entities.extend(decode_entities(section.data()?).map_err(reported)?);
    // The library's name carries no version: the control file has a module_pathname.
    PgrxSql::build(entities.into_iter(), "pg_claims".into(), false)
        .and_then(|sql| sql.to_file(script))
        .map_err(reported)
}

/// pgrx's own kind of error with all that led to it.
fn reported(report: impl std::fmt::Debug) -> anyhow::Error {
    anyhow!("{report:?}")
}
