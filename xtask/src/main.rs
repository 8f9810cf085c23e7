//! Everything about pg_claims that is not the extension itself: set-up, demo, tests, checks.
//!
//! `cargo xtask demo` and `cargo xtask test` work on a fresh Debian with cargo; they install what
//! is missing, build, and run on throw-away servers that touch nothing outside `target/`.

mod bench;
mod check;
mod demo;
mod fuzz;
mod interrupt;
mod layout;
mod lock;
mod progress;
mod setup;
mod test;
mod torture;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::layout::Layout;
use crate::setup::Choice;

/// Set-up, demo, tests and checks of pg_claims.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// Which server a command uses.
#[derive(Args)]
struct OneServer {
    /// The PostgreSQL to use: 15 (Debian's), 15-assert (the same with assertions), 16 or 18 (from PyPI).
    #[arg(long, default_value = "15", conflicts_with = "pg_config", value_parser = setup::provided)]
    pg: Choice,
    /// Any other PostgreSQL, by its pg_config; the extension is installed into it.
    #[arg(long, value_name = "PATH")]
    pg_config: Option<PathBuf>,
}

impl OneServer {
    fn choice(self) -> Choice {
        self.pg_config.map_or(self.pg, Choice::PgConfig)
    }
}

/// For how long a command does things at random.
#[derive(Args)]
struct Random {
    #[command(flatten)]
    server: OneServer,
    /// For how long, in seconds.
    #[arg(long, default_value_t = 600)]
    seconds: u64,
    /// Draws the same again as the run that told of this seed.
    #[arg(long)]
    seed: Option<u64>,
}

#[derive(Subcommand)]
enum Command {
    /// Sets everything up, starts a throw-away server and shows two sessions race for one SD.
    Demo {
        #[command(flatten)]
        server: OneServer,
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
        /// The PostgreSQL servers to test on, separated by commas: 15 (Debian's), 15-assert (built from its sources
        /// with assertions), 16 and 18 (from PyPI). [default: 15, unless --pg-config names one]
        #[arg(long, value_delimiter = ',', value_parser = setup::provided)]
        pg: Vec<Choice>,
        /// Another PostgreSQL to test on, by its pg_config; the extension is installed into it.
        #[arg(long, value_name = "PATH")]
        pg_config: Option<PathBuf>,
        /// Arguments for the test runner, such as a part of a test's name.
        #[arg(last = true)]
        arguments: Vec<String>,
    },
    /// Calls every function with arguments that nobody would give, and lets sqlsmith ask, for so long.
    Fuzz(Random),
    /// Lets many clients write at random while connections, workers and the server die, and checks every promise.
    Torture(Random),
    /// Builds the extension in release and installs it into a PostgreSQL of yours.
    Install {
        /// The PostgreSQL, by its pg_config.
        #[arg(long, value_name = "PATH", default_value = "pg_config")]
        pg_config: PathBuf,
    },
    /// Measures what the extension costs, and writes docs/benchmarks.md.
    Bench {
        #[command(flatten)]
        server: OneServer,
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
        Command::Demo { server } => demo::run(&layout, &server.choice()),
        Command::Psql { arguments } => demo::psql(&layout, &arguments),
        Command::Stop => demo::stop(&layout),
        Command::Test { pg, pg_config, arguments } => {
            let mut choices = pg;
            choices.extend(pg_config.map(Choice::PgConfig));
            if choices.is_empty() {
                choices.push(Choice::DEFAULT);
            }
            test::run(&layout, &choices, &arguments)
        }
        Command::Fuzz(Random { server, seconds, seed }) => {
            fuzz::run(&layout, &server.choice(), seconds, seed)
        }
        Command::Torture(Random { server, seconds, seed }) => {
            torture::run(&layout, &server.choice(), seconds, seed)
        }
        Command::Install { pg_config } => setup::install(&layout, &pg_config),
        Command::Bench { server, quick, only } => {
            if !bench::IS_OPTIMISED {
                return bench::run_optimised(&layout);
            }
            bench::run(&layout, &server.choice(), &bench::Options { quick, only })
        }
        Command::Check => check::run(&layout),
    }
}
