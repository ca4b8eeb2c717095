//! `lapidary evaluate`: perplexity, with what it was measured on, and that of an ensemble of draws.

use std::time::Instant;

use crate::cli::{Evaluate, Global};
use crate::{loading, output};
use anyhow::{Result, ensure};
use lapidary_compress::quality::{ensemble_perplexity, perplexity, sliding_windows};
use serde_json::json;

/// Windows in a forward pass.
const BATCH: usize = 8;
/// Sub-networks of an ensemble.
const MAX_MEMBERS: usize = 1024;

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
    if let Some(count) = arguments.ensemble {
        ensure!(
            (1..=MAX_MEMBERS).contains(&count),
            "ensemble is {count}, but must be between 1 and {MAX_MEMBERS}"
        );
    }
    let tokens = loading::file_tokens(&package, &arguments.text)?;
    let started = Instant::now();
    let mut windows = sliding_windows(&tokens, window, stride)?;
    windows.truncate(arguments.limit.unwrap_or(usize::MAX));
    let measured = perplexity(model, &windows, BATCH)?;
    let members = match arguments.ensemble {
        None => None,
        Some(count) => {
            let draws = (count, global.seed);
            Some(ensemble_perplexity(model, &windows, BATCH, draws)?)
        }
    };
    let seconds = started.elapsed().as_secs_f64();
    if global.json {
        let mut found = json!({
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
        });
        if let (Some(members), Some(found)) = (members, found.as_object_mut()) {
            found.insert("ensemble".to_owned(), json!(members));
        }
        return output::print_json(&found);
    }
    output::print(&format!(
        "perplexity {:.4} over {} scored tokens in {} windows of {window}, stride {stride} ({} tokens of text, {seconds:.1} s)\n",
        measured.value,
        output::grouped(measured.tokens),
        output::grouped(measured.windows),
        output::grouped(tokens.len()),
    ))?;
    let Some(members) = members else {
        return Ok(());
    };
    let together = members.together.last().copied().unwrap_or(f64::NAN);
    output::print(&format!(
        "perplexity {together:.4} of {} draws together, {:.4} of one alone; the probability of a token deviates by \
         {:.4} among them\n",
        members.together.len(),
        members.alone,
        members.deviation,
    ))
}
