//! `lapidary bench sparse`: from which share of zeros on a matrix is smaller, and faster, without them.

use std::time::Instant;

use anyhow::{Result, ensure};
use comfy_table::{Table, presets};
use lapidary_kernels::{
    BitmapMatrix, CsrMatrix, Device, SparseSizes, Tensor, TwoOfFourMatrix, linear,
};
use lapidary_train::generator;
use rand::RngExt;
use serde::Serialize;
use serde_json::json;

use crate::cli::{Bench, Global};
use crate::output;

/// Shares of zeros that are measured.
const SPARSITIES: [f64; 8] = [0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99];

/// One format at one share of zeros.
#[derive(Clone, Serialize)]
struct Row {
    format: &'static str,
    sparsity: f64,
    bytes: usize,
    /// Median seconds of a product with one vector.
    vector: f64,
    /// Median seconds of a product with all tokens.
    tokens: f64,
}

/// A matrix `[4 width, width]`, as a feed-forward part reads, times one vector and times
/// `batch · length` of them.
pub(super) fn run(arguments: &Bench, global: &Global) -> Result<()> {
    ensure!(
        arguments.width >= 4 && arguments.width.is_multiple_of(4),
        "width is {}, but must be a multiple of 4, at least that",
        arguments.width
    );
    let (rows, columns) = (4 * arguments.width, arguments.width);
    let tokens = arguments.batch * arguments.length;
    let inputs = [drawn(1, columns, 0.0, 1)?, drawn(tokens, columns, 0.0, 2)?];
    let whole = drawn(rows, columns, 0.0, global.seed)?;
    let dense = Row {
        format: "dense",
        sparsity: 0.0,
        bytes: SparseSizes::of(rows, columns, rows * columns, 4, false).dense,
        vector: median(arguments.repeat, || Ok(linear(&inputs[0], &whole, None)?))?,
        tokens: median(arguments.repeat, || Ok(linear(&inputs[1], &whole, None)?))?,
    };
    let mut found = vec![dense.clone()];
    for sparsity in SPARSITIES {
        let matrix = drawn(rows, columns, sparsity, global.seed)?;
        let csr = CsrMatrix::from_dense(&matrix)?;
        let bitmap = BitmapMatrix::from_dense(&matrix)?;
        found.push(measured(
            arguments,
            "CSR",
            sparsity,
            csr.bytes(),
            &inputs,
            |x| Ok(csr.multiply(x)?),
        )?);
        found.push(measured(
            arguments,
            "bitmap",
            sparsity,
            bitmap.bytes(),
            &inputs,
            |x| Ok(bitmap.multiply(x)?),
        )?);
    }
    let pairs = TwoOfFourMatrix::from_dense(&halved(&whole)?)?;
    found.push(measured(
        arguments,
        "2 of 4",
        0.5,
        pairs.bytes(),
        &inputs,
        |x| Ok(pairs.multiply(x)?),
    )?);
    let even = |of: fn(&Row) -> f64| break_even(&found, "CSR", of(&dense), of);
    let even = [
        ("bytes", even(|row| row.bytes as f64)),
        ("one vector", even(|row| row.vector)),
        ("all tokens", even(|row| row.tokens)),
    ];
    if global.json {
        return output::print_json(&json!({
            "work": "sparse",
            "rows": rows,
            "columns": columns,
            "tokens": tokens,
            "measured": found,
            "csr_breaks_even": even.iter().copied().collect::<std::collections::BTreeMap<_, _>>(),
            "threads": rayon::current_num_threads(),
        }));
    }
    output::print(&shown(&found, &even, (rows, columns, tokens)))
}

fn shown(found: &[Row], even: &[(&str, Option<f64>)], size: (usize, usize, usize)) -> String {
    let (rows, columns, tokens) = size;
    let mut table = Table::new();
    let header = [
        "format",
        "zeros",
        "bytes",
        "one vector, µs",
        "all tokens, µs",
    ];
    table.load_style(presets::NOTHING).set_header(header);
    for row in found {
        table.add_row([
            row.format.to_owned(),
            format!("{:.0} %", 100.0 * row.sparsity),
            output::grouped(row.bytes),
            format!("{:.1}", 1e6 * row.vector),
            format!("{:.0}", 1e6 * row.tokens),
        ]);
    }
    let mut text = format!("a matrix {rows}×{columns} times 1 and {tokens} vectors\n\n{table}\n\n");
    for (what, sparsity) in even {
        text += &match sparsity {
            Some(sparsity) => format!(
                "CSR breaks even in {what} at {:.0} % zeros\n",
                100.0 * sparsity
            ),
            None => format!("CSR does not break even in {what} at any share of zeros measured\n"),
        };
    }
    text
}

/// The share of zeros from which on a format takes no more than `dense`, between the measured ones
/// by a straight line; none where the last one still takes more.
fn break_even(found: &[Row], format: &str, dense: f64, of: fn(&Row) -> f64) -> Option<f64> {
    let rows: Vec<&Row> = found.iter().filter(|row| row.format == format).collect();
    let first = rows
        .iter()
        .rposition(|row| of(row) > dense)
        .map_or(0, |last| last + 1);
    let after = rows.get(first)?;
    let Some(before) = first.checked_sub(1).and_then(|before| rows.get(before)) else {
        return Some(after.sparsity);
    };
    let share = (of(before) - dense) / (of(before) - of(after)).max(f64::MIN_POSITIVE);
    Some(before.sparsity + share * (after.sparsity - before.sparsity))
}

fn measured(
    arguments: &Bench,
    format: &'static str,
    sparsity: f64,
    bytes: usize,
    inputs: &[Tensor; 2],
    product: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Row> {
    let [vector, tokens] = inputs;
    Ok(Row {
        format,
        sparsity,
        bytes,
        vector: median(arguments.repeat, || product(vector))?,
        tokens: median(arguments.repeat, || product(tokens))?,
    })
}

/// The median time of a product; short ones are repeated until a millisecond has passed.
fn median(repeat: usize, work: impl Fn() -> Result<Tensor>) -> Result<f64> {
    let started = Instant::now();
    work()?;
    let once = started.elapsed().as_secs_f64().max(1e-9);
    let times = (1e-3 / once).clamp(1.0, 1000.0) as usize;
    let mut seconds = (0..repeat.max(1))
        .map(|_| {
            let started = Instant::now();
            for _ in 0..times {
                work()?;
            }
            Ok(started.elapsed().as_secs_f64() / times as f64)
        })
        .collect::<Result<Vec<_>>>()?;
    seconds.sort_by(f64::total_cmp);
    Ok(seconds.get(seconds.len() / 2).copied().unwrap_or(f64::NAN))
}

/// `[rows, columns]` with about this share of zeros.
fn drawn(rows: usize, columns: usize, zeros: f64, seed: u64) -> Result<Tensor> {
    let mut random = generator(seed);
    let values: Vec<f32> = (0..rows * columns)
        .map(|_| match random.random_bool(zeros) {
            true => 0.0,
            false => random.random_range(-1.0..1.0),
        })
        .collect();
    Ok(Tensor::from_vec(values, (rows, columns), &Device::Cpu)?)
}

/// The first two of every four.
fn halved(matrix: &Tensor) -> Result<Tensor> {
    let values = matrix.flatten_all()?.to_vec1::<f32>()?;
    let values = values.into_iter().enumerate();
    let values: Vec<f32> = values
        .map(|(index, value)| if index % 4 < 2 { value } else { 0.0 })
        .collect();
    Ok(Tensor::from_vec(values, matrix.dims(), &Device::Cpu)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_break_even_lies_between_what_was_measured() {
        let row = |sparsity: f64, vector: f64| Row {
            format: "CSR",
            sparsity,
            bytes: 0,
            vector,
            tokens: 0.0,
        };
        let rows = [row(0.5, 3.0), row(0.7, 2.0), row(0.9, 1.0)];
        let at = |dense: f64| break_even(&rows, "CSR", dense, |row| row.vector);
        assert!((at(1.5).unwrap() - 0.8).abs() < 1e-12);
        assert_eq!(at(4.0), Some(0.5));
        assert_eq!(at(0.5), None);
    }
}
