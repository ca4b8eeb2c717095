//! `lapidary inspect channels`: which head talks to which.

use crate::cli::Global;
use crate::loading;
use anyhow::Result;
use clap::Args;
use lapidary_explain::analyses::channels::{ChannelOptions, report};
use lapidary_explain::report::Report;
use lapidary_train::generator;

#[derive(Args, Debug)]
pub struct Channels {
    /// A model directory, or `embedded`
    pub model: String,
    /// Standard deviations above a reader's mean score from which on a component stands out
    #[arg(long, default_value_t = 4.0)]
    pub threshold: f64,
    /// Rows of the table
    #[arg(long, default_value_t = 30)]
    pub top: usize,
    /// Random rotations that p-values are counted from
    #[arg(long, default_value_t = 9999)]
    pub draws: usize,
}

pub fn run(arguments: &Channels, global: &Global) -> Result<Report> {
    let package = loading::written_out(&arguments.model, global)?;
    let options = ChannelOptions {
        threshold: arguments.threshold,
        draws: arguments.draws,
    };
    Ok(report(
        package.text_model()?,
        &options,
        arguments.top,
        &mut generator(global.seed),
    )?)
}
