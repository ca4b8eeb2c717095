//! `lapidary bench mixers`: from which length on a mechanism of attention is faster than softmax.

mod candidates;
mod subject;

use std::time::Instant;

use anyhow::{Result, ensure};
use comfy_table::{Table, presets};
use serde::Serialize;
use serde_json::json;

use crate::cli::{Bench, Global};
use crate::output;
use candidates::{Candidate, candidates};
use lapidary_kernels::backward;
use subject::Sequences;

/// One candidate at one length.
#[derive(Clone, Serialize)]
struct Row {
    mechanism: &'static str,
    causal: bool,
    /// The row of dense attention of the same kind.
    dense: &'static str,
    length: usize,
    /// Median seconds.
    forward: f64,
    forward_and_backward: f64,
}

/// `--batch` sequences with `--heads` heads of `--width / --heads` features, from `--least` tokens to
/// `--length`.
pub(super) fn run(arguments: &Bench, global: &Global) -> Result<()> {
    ensure!(
        arguments.heads >= 1 && arguments.width.is_multiple_of(arguments.heads),
        "heads is {}, but must divide the width {}",
        arguments.heads,
        arguments.width
    );
    let chosen = chosen(arguments.method.as_deref())?;
    let mut rows = Vec::new();
    for (name, tokens) in [("least", arguments.least), ("length", arguments.length)] {
        ensure!(tokens >= 2, "{name} is {tokens}, but must be at least 2");
    }
    let mut length = arguments.least.clamp(1, arguments.length.max(1));
    while length <= arguments.length {
        for candidate in chosen.iter().filter(|one| length <= one.longest) {
            rows.push(measured(arguments, global, candidate, length)?);
            tracing::info!("{} at {length}", candidate.name);
        }
        length *= 2;
    }
    let peak = super::peak_memory();
    if global.json {
        return output::print_json(&json!({
            "work": "mixers",
            "rows": rows,
            "peak_bytes": peak,
            "threads": rayon::current_num_threads(),
        }));
    }
    let table = table(&rows);
    let peak = peak.map_or_else(|| "unknown".to_owned(), output::bytes);
    output::print(&format!("{table}\npeak memory {peak}\n"))
}

/// The candidate of this name, or else those whose names begin so; all without a name.
fn chosen(wanted: Option<&str>) -> Result<Vec<Candidate>> {
    let all = candidates();
    let Some(wanted) = wanted else {
        return Ok(all);
    };
    let names: Vec<&str> = all.iter().map(|one| one.name).collect();
    ensure!(
        names.iter().any(|name| name.starts_with(wanted)),
        "method is {wanted:?}, but must be the beginning of one of {}",
        names.join("; ")
    );
    let exact = names.contains(&wanted);
    let fits = |one: &Candidate| match exact {
        true => one.name == wanted,
        false => one.name.starts_with(wanted),
    };
    Ok(all.into_iter().filter(fits).collect())
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["tokens", "mechanism", "forward", "and backward", "of dense"]);
    for row in rows {
        let dense = rows
            .iter()
            .find(|other| other.mechanism == row.dense && other.length == row.length);
        let ratio = dense.map_or(String::new(), |dense| {
            format!("{:.2}", row.forward / dense.forward)
        });
        table.add_row([
            row.length.to_string(),
            row.mechanism.to_owned(),
            format!("{:.2} ms", row.forward * 1e3),
            format!("{:.2} ms", row.forward_and_backward * 1e3),
            ratio,
        ]);
    }
    table
}

fn measured(
    arguments: &Bench,
    global: &Global,
    candidate: &Candidate,
    length: usize,
) -> Result<Row> {
    let sequences = Sequences {
        batch: arguments.batch,
        length,
        width: arguments.width,
        heads: arguments.heads,
        seed: global.seed,
        differentiated: false,
    };
    let pass = candidate.pass(&sequences)?;
    let forward = median(arguments.repeat, || {
        pass()?;
        Ok(())
    })?;
    // One of the two at a time.
    drop(pass);
    let pass = candidate.pass(&Sequences {
        differentiated: true,
        ..sequences
    })?;
    let forward_and_backward = median(arguments.repeat, || {
        let y = pass()?;
        // In the order that it lies in: the engine sums a view up more slowly than some mechanisms attend.
        let y = match y.is_contiguous() {
            true => y,
            false => y.transpose(1, 2)?,
        };
        backward(&y.sum_all()?)?;
        Ok(())
    })?;
    Ok(Row {
        mechanism: candidate.name,
        causal: candidate.causal,
        dense: candidate.dense,
        length,
        forward,
        forward_and_backward,
    })
}

/// Median seconds of some calls, after one that is not counted.
fn median(times: usize, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    work()?;
    let each: Result<Vec<f64>> = (0..times)
        .map(|_| {
            let started = Instant::now();
            work()?;
            Ok(started.elapsed().as_secs_f64())
        })
        .collect();
    Ok(super::median(each?))
}
