//! `lapidary inspect energy`: a model as a memory of its training data.

use crate::cli::Global;
use crate::loading;
use anyhow::{Result, ensure};
use clap::Args;
use lapidary_explain::analyses::energy::report;
use lapidary_explain::report::Report;
use lapidary_train::generator;
use std::path::PathBuf;

#[derive(Args, Debug)]
pub struct Energy {
    /// A model directory, or `embedded`
    pub model: String,
    /// Text that the model was trained on
    #[arg(long, value_name = "FILE")]
    pub text: PathBuf,
    /// Text that it was not trained on
    #[arg(long, value_name = "FILE")]
    pub held_out: PathBuf,
    /// Tokens of a window
    #[arg(long, default_value_t = 64)]
    pub window: usize,
    /// Most windows of each text
    #[arg(long, default_value_t = 64)]
    pub windows: usize,
}

pub fn run(arguments: &Energy, global: &Global) -> Result<Report> {
    let package = loading::written_out(&arguments.model, global)?;
    let model = package.text_model()?;
    let (window, length) = (arguments.window, model.spec().length());
    ensure!(
        (2..=length).contains(&window),
        "window is {window}, but must be between 2 and {length}, the length of the model"
    );
    let windows = |path| -> Result<Vec<Vec<u32>>> {
        let tokens = loading::file_tokens(&package, path)?;
        ensure!(
            tokens.len() >= window,
            "{} has {} tokens, but must have at least one window of {window}",
            path.display(),
            tokens.len()
        );
        let whole = tokens.chunks_exact(window).take(arguments.windows.max(1));
        Ok(whole.map(<[u32]>::to_vec).collect())
    };
    let (training, held_out) = (windows(&arguments.text)?, windows(&arguments.held_out)?);
    Ok(report(
        model,
        &training,
        &held_out,
        &mut generator(global.seed),
    )?)
}
