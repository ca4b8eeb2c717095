//! `lapidary inspect linearity`: how nearly linear each block is on a text.

use crate::cli::Global;
use crate::loading;
use anyhow::{Result, ensure};
use clap::Args;
use lapidary_explain::analyses::linearity::report;
use lapidary_explain::report::Report;
use std::path::PathBuf;

#[derive(Args, Debug)]
pub struct Linearity {
    /// A model directory, or `embedded`
    pub model: String,
    /// Text whose tokens are looked at
    #[arg(long, value_name = "FILE")]
    pub text: PathBuf,
    /// Tokens of a window
    #[arg(long, default_value_t = 128)]
    pub window: usize,
    /// Most windows
    #[arg(long, default_value_t = 512)]
    pub windows: usize,
    /// Windows in a forward pass
    #[arg(long, default_value_t = 8)]
    pub batch: usize,
}

pub fn run(arguments: &Linearity, global: &Global) -> Result<Report> {
    let package = loading::package(&arguments.model, global)?;
    let model = package.text_model()?;
    let length = model.spec().length();
    let window = arguments.window.min(length);
    ensure!(
        window >= 2,
        "window is {}, but must be at least 2",
        arguments.window
    );
    ensure!(
        arguments.windows >= 2,
        "windows is {}, but must be at least 2: half of them are held out",
        arguments.windows
    );
    let tokens = loading::file_tokens(&package, &arguments.text)?;
    let whole = tokens.chunks_exact(window).take(arguments.windows);
    let windows: Vec<Vec<u32>> = whole.map(<[u32]>::to_vec).collect();
    ensure!(
        windows.len() >= 2,
        "{} has {} tokens, but must have at least {}, two windows",
        arguments.text.display(),
        tokens.len(),
        2 * window
    );
    Ok(report(model, &windows, arguments.batch)?)
}
