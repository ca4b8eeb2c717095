//! The `lapidary` program: one verb per job.

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
use lapidary_kernels::memory::Counting;

/// Tensors are allocated and freed at a high rate, in which the system's allocator returns pages
/// that are wanted again at once; see [`prepare`] for this one. What it holds is counted.
#[global_allocator]
static ALLOCATOR: Counting<mimalloc::MiMalloc> = Counting(mimalloc::MiMalloc);

/// Number of the option `purge_delay` in `mimalloc.h`.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

/// Settings of the allocator and the tensor engine that have to be made before either is used.
fn prepare() {
    // Each step of training allocates what the step before freed: pages that went back to the
    // system in between would be cleared again by it, which costs a tenth of the step.
    // SAFETY: the option exists, and takes any number.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, -1) };
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
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
