//! `lapidary inspect entropy`: how much entropy each block adds on a text, and in which order blocks and
//! attention would go by it.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::Args;
use lapidary_compress::CalibrationData;
use lapidary_compress::entropy::{EntropyChoice, EntropyProfile, Estimator, ranks_of_order};
use lapidary_explain::report::{Cell, Plot, Report, Series, Table};

use crate::cli::Global;
use crate::loading;

/// Tokens that are compared at a time, as in the published code.
const SAMPLE: usize = 256;

#[derive(Args, Debug)]
pub struct Entropy {
    /// A model directory, or `embedded`
    pub model: String,
    /// Text whose tokens are looked at
    #[arg(long, value_name = "FILE")]
    pub text: PathBuf,
    /// Tokens of a window
    #[arg(long, default_value_t = 128)]
    pub window: usize,
    /// Most windows
    #[arg(long, default_value_t = 128)]
    pub windows: usize,
    /// Neighbour whose distance is measured
    #[arg(long, default_value_t = 25)]
    pub neighbours: usize,
    /// Bars of each feature's histogram
    #[arg(long, default_value_t = 20)]
    pub bins: usize,
    /// Order of Rényi's entropy
    #[arg(long, default_value_t = 4.0)]
    pub order: f64,
}

pub fn run(arguments: &Entropy, global: &Global) -> Result<Report> {
    let package = loading::package(&arguments.model, global)?;
    let model = package.text_model()?;
    let window = arguments.window.min(model.spec().length());
    ensure!(
        window >= 2,
        "window is {}, but must be at least 2",
        arguments.window
    );
    ensure!(
        arguments.windows >= 1,
        "windows is 0, but must be at least 1"
    );
    let tokens = loading::file_tokens(&package, &arguments.text)?;
    let whole = tokens.chunks_exact(window).take(arguments.windows);
    let windows: Vec<Vec<u32>> = whole.map(<[u32]>::to_vec).collect();
    ensure!(
        !windows.is_empty(),
        "{} has {} tokens, but must have at least {window}, a window",
        arguments.text.display(),
        tokens.len()
    );
    let count = windows.len();
    let data = CalibrationData::windows(windows)?;
    let batch = SAMPLE.div_ceil(window);
    let kept = EntropyChoice::default();
    let mut report = Report {
        title: "Entropy of the residual stream".to_owned(),
        notes: vec![format!(
            "{count} windows of {window} tokens, {} tokens at a time; entropies in nats; rank 0 is what adds \
             least and would go first, but that the methods keep the first {} blocks, the last {} and those before the \
             least entropy unless they are told otherwise",
            batch * window,
            kept.first,
            kept.last
        )],
        ..Report::default()
    };
    let mut streams = Vec::new();
    for (name, estimator) in [
        (
            "neighbours",
            Estimator::Neighbours {
                count: arguments.neighbours,
            },
        ),
        (
            "buckets",
            Estimator::Buckets {
                bins: arguments.bins,
            },
        ),
        (
            "Rényi",
            Estimator::Renyi {
                order: arguments.order,
            },
        ),
    ] {
        let choice = EntropyChoice {
            estimator,
            ..EntropyChoice::default()
        };
        let profile = EntropyProfile::measure(model, &data, batch, &choice)?;
        let (blocks, attention) = (profile.block_order(), profile.attention_order());
        report.notes.push(format!(
            "{name}: entropy is least behind {} of {} blocks; blocks would go in the order {}, attention {}",
            profile.stage(),
            profile.blocks.len(),
            joined(&blocks),
            joined(&attention)
        ));
        report.tables.push(table(name, &profile, &attention)?);
        streams.push(Series {
            name: name.to_owned(),
            points: ranged(&profile.stream),
        });
    }
    report.plots.push(Plot {
        title: "Entropy of the stream above its least".to_owned(),
        x: "blocks behind".to_owned(),
        y: "share of the estimator's range".to_owned(),
        series: streams,
    });
    Ok(report)
}

fn table(name: &str, profile: &EntropyProfile, attention: &[usize]) -> Result<Table> {
    let mut table = Table::new(
        format!("by {name}"),
        &[
            "block",
            "before it",
            "it adds",
            "rank",
            "its attention adds",
            "rank of attention",
        ],
    );
    let ranks = ranks_of_order(&profile.block_order())?;
    let rows = profile.blocks.iter().zip(&profile.stream).zip(ranks);
    for (block, ((adds, before), rank)) in rows.enumerate() {
        let none = || Cell::from("–");
        let adds_attention = profile.attention.get(block).copied().flatten();
        let place = attention.iter().position(|other| *other == block);
        table.push([
            Cell::from(block),
            Cell::from(*before),
            Cell::from(*adds),
            Cell::from(rank),
            adds_attention.map_or_else(none, Cell::from),
            place.map_or_else(none, Cell::from),
        ]);
    }
    Ok(table)
}

fn joined(order: &[usize]) -> String {
    let numbers: Vec<String> = order.iter().map(usize::to_string).collect();
    numbers.join(" ")
}

/// Values over places, from 0 at the least to 1 at the largest.
fn ranged(stream: &[f64]) -> Vec<(f64, f64)> {
    let least = stream.iter().copied().fold(f64::INFINITY, f64::min);
    let most = stream.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let range = (most - least).max(f64::MIN_POSITIVE);
    let points = stream.iter().enumerate();
    points
        .map(|(at, value)| (at as f64, (value - least) / range))
        .collect()
}
