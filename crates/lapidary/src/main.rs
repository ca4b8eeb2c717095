//! The `lapidary` program: one verb per job.

mod cli;
mod commands;
#[cfg(feature = "hub")]
mod hub;
mod loading;
mod output;
mod report;
mod subject;
mod tensors;

use std::process::ExitCode;

use clap::Parser;

/// Tensors are allocated and freed at a high rate, in which the system's allocator returns pages
/// that are wanted again at once.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let arguments = cli::Cli::parse();
    output::start_log(arguments.global.verbose);
    output::clean_up_on_interrupt();
    match commands::execute(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if output::is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
