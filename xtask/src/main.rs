//! Everything about pg_claims that is not the extension itself: set-up, demo, tests, checks.
//!
//! `cargo xtask demo` and `cargo xtask test` work on a fresh Debian with cargo; they install what
//! is missing, build, and run on throw-away servers that touch nothing outside `target/`.

mod bench;
mod check;
mod demo;
mod interrupt;
mod layout;
mod lock;
mod progress;
mod setup;
mod test;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::layout::Layout;
use crate::setup::Choice;

/// Set-up, demo, tests and checks of pg_claims.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Sets everything up, starts a throw-away server and shows two sessions race for one SD.
    Demo {
        /// The PostgreSQL to use: 15 (Debian's), 16 or 18 (from PyPI).
        #[arg(long, default_value = "15", conflicts_with = "pg_config",
              value_parser = setup::provided_version)]
        pg: u16,
        /// Any other PostgreSQL, by its pg_config; the extension is installed into it.
        #[arg(long, value_name = "PATH")]
        pg_config: Option<PathBuf>,
    },
    /// Opens psql on the demo's server.
    Psql {
        /// Arguments for psql.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Stops the demo's server and removes it.
    Stop,
    /// Sets everything up and runs every test.
    Test {
        /// The PostgreSQL versions to test on, separated by commas.
        /// [default: 15, unless --pg-config names one]
        #[arg(long, value_delimiter = ',', value_parser = setup::provided_version)]
        pg: Vec<u16>,
        /// Another PostgreSQL to test on, by its pg_config; the extension is installed into it.
        #[arg(long, value_name = "PATH")]
        pg_config: Option<PathBuf>,
        /// Arguments for the test runner, such as a part of a test's name.
        #[arg(last = true)]
        arguments: Vec<String>,
    },
    /// Measures what the extension costs, and writes docs/benchmarks.md.
    Bench {
        /// The PostgreSQL to use: 15 (Debian's), 16 or 18 (from PyPI).
        #[arg(long, default_value = "15", conflicts_with = "pg_config",
              value_parser = setup::provided_version)]
        pg: u16,
        /// Any other PostgreSQL, by its pg_config; the extension is installed into it.
        #[arg(long, value_name = "PATH")]
        pg_config: Option<PathBuf>,
        /// A small form that only shows that everything works.
        #[arg(long)]
        quick: bool,
        /// The comparisons to run, by their numbers, separated by commas.
        #[arg(long, value_delimiter = ',')]
        only: Vec<u8>,
    },
    /// Checks formatting, clippy with warnings denied, and the documentation's build.
    Check,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nerror: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    let layout = Layout::of_this_checkout()?;
    match command {
        Command::Demo { pg, pg_config } => {
            let choice = pg_config.map_or(Choice::Version(pg), Choice::PgConfig);
            demo::run(&layout, &choice)
        }
        Command::Psql { arguments } => demo::psql(&layout, &arguments),
        Command::Stop => demo::stop(&layout),
        Command::Test { pg, pg_config, arguments } => {
            let mut choices: Vec<_> = pg.into_iter().map(Choice::Version).collect();
            choices.extend(pg_config.map(Choice::PgConfig));
            if choices.is_empty() {
                choices.push(Choice::Version(setup::DEBIAN_VERSION));
            }
            test::run(&layout, &choices, &arguments)
        }
        Command::Bench { pg, pg_config, quick, only } => {
            let choice = pg_config.map_or(Choice::Version(pg), Choice::PgConfig);
            bench::run(&layout, &choice, &bench::Options { quick, only })
        }
        Command::Check => check::run(&layout),
    }
}
