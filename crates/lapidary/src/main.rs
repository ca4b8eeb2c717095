//! The `lapidary` program: one verb per job.

mod allocator;
mod cli;
mod commands;
mod datasets;
#[cfg(feature = "hub")]
mod hub;
mod images;
mod loading;
mod output;
mod report;
mod subject;
mod tensors;

use std::process::ExitCode;

use clap::Parser;

/// Settings of the tensor engine that have to be made before it is used.
fn prepare() {
    // The engine's own threads spin while they wait, on the processors that the kernels' threads
    // want, and what is left to the engine is too little to share.
    if std::env::var_os("CANDLE_NUM_THREADS").is_none() {
        // SAFETY: no other thread is running yet.
        unsafe { std::env::set_var("CANDLE_NUM_THREADS", "1") };
    }
}

fn main() -> ExitCode {
    prepare();
    let arguments = cli::Cli::parse();
    output::start_log(arguments.global.verbose);
    output::clean_up_on_interrupt();
    match commands::execute(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if output::is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            // What is said of TOML ends its own line.
            eprintln!("error: {}", format!("{error:#}").trim_end());
            ExitCode::FAILURE
        }
    }
}
