//! `lapidary evaluate`: perplexity, with what it was measured on.

use std::time::Instant;

use crate::cli::{Evaluate, Global};
use crate::{loading, output};
use anyhow::{Result, ensure};
use lapidary_compress::quality::{perplexity, sliding_windows};
use serde_json::json;

/// Windows in a forward pass.
const BATCH: usize = 8;

pub fn run(arguments: &Evaluate, global: &Global) -> Result<()> {
    let package = loading::package(&arguments.model, global)?;
    let model = package.text_model()?;
    let length = model.spec().length();
    let window = arguments.window;
    let stride = arguments.stride.unwrap_or((window / 2).max(1));
    ensure!(
        (2..=length).contains(&window),
        "window is {window}, but must be between 2 and {length}, the length of the model"
    );
    ensure!(
        (1..window).contains(&stride),
        "stride is {stride}, but must be at least 1 and below the window {window}"
    );
    let tokens = loading::file_tokens(&package, &arguments.text)?;
    let started = Instant::now();
    let mut windows = sliding_windows(&tokens, window, stride)?;
    windows.truncate(arguments.limit.unwrap_or(usize::MAX));
    let measured = perplexity(model, &windows, BATCH)?;
    let seconds = started.elapsed().as_secs_f64();
    if global.json {
        return output::print_json(&json!({
            "model": arguments.model,
            "text": arguments.text,
            "perplexity": measured.value,
            "nats_per_token": measured.value.ln(),
            "scored_tokens": measured.tokens,
            "windows": measured.windows,
            "window": window,
            "stride": stride,
            "text_tokens": tokens.len(),
            "seconds": seconds,
            "version": env!("CARGO_PKG_VERSION"),
        }));
    }
    output::print(&format!(
        "perplexity {:.4} over {} scored tokens in {} windows of {window}, stride {stride} ({} tokens of text, {seconds:.1} s)\n",
        measured.value,
        output::grouped(measured.tokens),
        output::grouped(measured.windows),
        output::grouped(tokens.len()),
    ))
}
