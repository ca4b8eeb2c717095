//! What every operation promises under every lens.

mod contextual;
mod explicit;
mod integers;
mod meter;
mod mixing;
mod relevance;
mod rounding;
mod streams;
mod trace;

use crate::{Linear, Matrix, Signal, Weight};
use lapidary_kernels::{
    Activation, AttentionOptions, BiasSpan, DType, Device, FunctionalBias, RotaryPairs, RowSums,
    RowTerm, ScoreBias, Tensor, check::difference, naive,
};

/// Irregular numbers, another sequence for each `phase`.
pub(crate) fn numbers(dims: &[usize], phase: f64) -> Tensor {
    let count: usize = dims.iter().product();
    let values: Vec<f64> = (0..count)
        .map(|i| (i as f64 * 1.37 + phase * 0.61 + (i as f64 * 0.11).cos()).sin())
        .collect();
    Tensor::from_vec(values, dims, &Device::Cpu).unwrap()
}

fn values(t: &Tensor) -> Vec<f64> {
    let flat = t.flatten_all().unwrap().to_dtype(DType::F64).unwrap();
    flat.to_vec1::<f64>().unwrap()
}

pub(crate) fn assert_close(a: &Tensor, b: &Tensor, tolerance: f64, what: &str) {
    assert_eq!(a.dims(), b.dims(), "{what}");
    let error = difference(a, b).unwrap();
    assert!(error <= tolerance, "{what}: {error}");
}

fn layer(input: usize, output: usize, bias: bool, phase: f64) -> Linear {
    let bias = bias.then(|| numbers(&[output], phase + 1.0));
    Linear::new(numbers(&[output, input], phase), bias).unwrap()
}

fn low_rank(input: usize, rank: usize, output: usize) -> Linear {
    let weight = Weight::LowRank {
        down: Matrix::Dense(numbers(&[rank, input], 7.0)),
        up: Matrix::Dense(numbers(&[output, rank], 8.0)),
    };
    Linear::from_weight(weight, Some(numbers(&[output], 9.0))).unwrap()
}

type Operation = Box<dyn Fn(&Signal) -> crate::Result<Signal>>;

const BATCH: usize = 2;
const TOKENS: usize = 3;
const WIDTH: usize = 4;

fn input() -> Tensor {
    numbers(&[BATCH, TOKENS, WIDTH], 0.0)
}

fn heads(x: &Signal) -> crate::Result<Signal> {
    x.reshape(&[BATCH, TOKENS, 2, 2])?.transpose(1, 2)
}

fn attention_of(x: &Signal, groups: usize) -> crate::Result<Signal> {
    let width = groups * 2;
    let q = heads(&x.for_scores().linear(&layer(WIDTH, WIDTH, true, 1.0))?)?;
    let split = |x: Signal| x.reshape(&[BATCH, TOKENS, groups, 2])?.transpose(1, 2);
    let k = split(x.for_scores().linear(&layer(WIDTH, width, true, 2.0))?)?;
    let v = split(x.linear_values(&layer(WIDTH, width, true, 3.0))?)?;
    let mut options = AttentionOptions::new(2);
    options.causal = true;
    let mixed = v.attend(&q, &k, &options)?.transpose(1, 2)?;
    mixed
        .reshape(&[BATCH, TOKENS, WIDTH])?
        .linear_output(&layer(WIDTH, WIDTH, true, 4.0))
}

/// [`attention_of`] with the heads left side by side.
fn merged_attention_of(x: &Signal, groups: usize) -> crate::Result<Signal> {
    let width = groups * 2;
    let q = x.for_scores().linear(&layer(WIDTH, WIDTH, true, 1.0))?;
    let k = x.for_scores().linear(&layer(WIDTH, width, true, 2.0))?;
    let v = x.linear_values(&layer(WIDTH, width, true, 3.0))?;
    let mut options = AttentionOptions::new(2);
    options.causal = true;
    v.attend_merged(&q, &k, 2, groups, &options)?
        .linear_output(&layer(WIDTH, WIDTH, true, 4.0))
}

/// A row alone, none, a mean of two, and the same row once more, of so many sources by turns.
fn row_sums(sources: usize) -> RowSums {
    let term = |index: usize, row, weight| RowTerm {
        source: index % sources,
        row,
        weight,
    };
    let mut sums = RowSums::new();
    sums.push([term(0, 4, 1.0)]);
    sums.push([]);
    sums.push([term(1, 0, 0.5), term(0, 3, 0.5), term(1, 2, -1.0)]);
    sums.push([term(1, 4, 2.0)]);
    sums
}

/// Rows of a signal and of a constant are added up.
const CONSTANT_ROWS: &str = "sums of rows and a constant's";

fn token_rows(x: &Signal) -> crate::Result<Signal> {
    x.reshape(&[BATCH * TOKENS, WIDTH])
}

/// Maps that are linear without a constant, so that they act on each stream as on a value.
fn linear_operations() -> Vec<(&'static str, Operation)> {
    let u32s = |v: &[u32]| Tensor::new(v, &Device::Cpu).unwrap();
    let (picked, placed) = (u32s(&[2, 0]), u32s(&[3, 1, 0]));
    let row = numbers(&[WIDTH], 2.0);
    let weights = numbers(&[BATCH, TOKENS, 1], 3.0);
    let column_weights = numbers(&[1, 1, WIDTH], 3.0);
    let taller = numbers(&[2, 1, 1, WIDTH], 2.0);
    let (cos, sin) = (numbers(&[TOKENS, 1], 4.0), numbers(&[TOKENS, 1], 5.0));
    let decay = Signal::from(numbers(&[BATCH, TOKENS, WIDTH], 6.0));
    let mixing = numbers(&[BATCH, 2, TOKENS, TOKENS], 7.0);
    let kernel = numbers(&[TOKENS, 2], 8.0);
    let contracted = Signal::from(numbers(&[BATCH, TOKENS, WIDTH], 9.0));
    let averages = numbers(&[2, 4, WIDTH], 10.0);
    let details = averages.clone();
    let at = |x: &Signal, dim: usize, start: usize, length: usize| x.narrow(dim, start, length);
    vec![
        (
            "linear",
            Box::new(|x| x.linear(&layer(WIDTH, 5, false, 1.0))),
        ),
        ("scale", Box::new(|x| x.scale(-1.5))),
        ("multiply", Box::new(move |x| x.multiply_constant(&row))),
        (
            "multiply by more dimensions",
            Box::new(move |x| x.multiply_constant(&taller)),
        ),
        (
            "rotary",
            Box::new(move |x| x.rotary(2, &cos, &sin, RotaryPairs::Halves)),
        ),
        ("scan", Box::new(move |x| x.scan(&decay))),
        ("mix", Box::new(move |x| heads(x)?.mix(&mixing))),
        (
            "convolution",
            Box::new(move |x| x.depthwise_convolution(&kernel, None)),
        ),
        (
            "wavelet analysis",
            Box::new(move |x| at(x, 1, 0, 2)?.wavelet_analysis(&averages, 1)),
        ),
        (
            "wavelet synthesis",
            Box::new(move |x| {
                let pair = Signal::concatenate(&[x.unsqueeze(0)?, x.unsqueeze(0)?], 0)?;
                pair.wavelet_synthesis(&details, 2 * TOKENS)
            }),
        ),
        ("contract", Box::new(move |x| x.contract(&contracted))),
        ("split heads", Box::new(heads)),
        (
            "merge heads",
            Box::new(|x| heads(x)?.transpose(2, 1)?.reshape(&[BATCH, TOKENS, WIDTH])),
        ),
        (
            "reshape rows",
            Box::new(|x| x.reshape(&[BATCH * TOKENS, WIDTH])),
        ),
        (
            "reshape all",
            Box::new(|x| x.reshape(&[BATCH, TOKENS * WIDTH])),
        ),
        ("transpose", Box::new(|x| x.transpose(1, 2))),
        ("contiguous", Box::new(|x| x.transpose(0, 2)?.contiguous())),
        ("narrow batch", Box::new(move |x| at(x, 0, 1, 1))),
        ("narrow tokens", Box::new(move |x| at(x, 1, 1, 2))),
        ("narrow width", Box::new(move |x| at(x, 2, 1, 2))),
        ("narrow heads", Box::new(move |x| heads(x)?.narrow(1, 1, 1))),
        ("select", Box::new(move |x| x.select(1, &picked))),
        ("place", Box::new(move |x| x.place(1, &placed, 5))),
        (
            "sums of rows",
            Box::new(|x| Signal::summed_rows(&[&token_rows(x)?], row_sums(1))),
        ),
        (
            "sums of rows of two",
            Box::new(|x| {
                let rows = token_rows(x)?;
                Signal::summed_rows(&[&rows, &rows.scale(0.5)?], row_sums(2))
            }),
        ),
        ("unsqueeze", Box::new(|x| x.unsqueeze(1))),
        ("squeeze", Box::new(move |x| at(x, 1, 0, 1)?.squeeze(1))),
        (
            "squeeze and narrow",
            Box::new(move |x| at(x, 1, 2, 1)?.squeeze(1)?.narrow(0, 1, 1)),
        ),
        (
            "broadcast",
            Box::new(move |x| at(x, 0, 0, 1)?.broadcast(&[2, BATCH, TOKENS, WIDTH])),
        ),
        ("mean over tokens", Box::new(|x| x.mean(1))),
        ("mean over width", Box::new(|x| x.mean(2))),
        ("sum", Box::new(|x| x.sum_last())),
        ("pool", Box::new(move |x| x.weighted_sum(&weights, 1))),
        (
            "weighted sum",
            Box::new(move |x| x.weighted_sum(&column_weights, 2)),
        ),
        (
            "concatenate",
            Box::new(move |x| Signal::concatenate(&[at(x, 1, 0, 2)?, x.clone()], 1)),
        ),
    ]
}

/// Everything else.
/// The name of activations with `f(0) ≠ 0`.
const OFF_THE_ORIGIN: &str = "activation off the origin";

fn other_operations() -> Vec<(&'static str, Operation)> {
    let table = numbers(&[TOKENS, WIDTH], 2.0);
    let taller = numbers(&[2, 1, 1, WIDTH], 2.0);
    let kernel = numbers(&[TOKENS, 2], 8.0);
    let gamma = numbers(&[WIDTH], 4.0);
    let beta = numbers(&[WIDTH], 5.0);
    let (norm_gamma, rms_gamma, conv_bias) = (gamma.clone(), gamma, numbers(&[TOKENS], 6.0));
    let constant = numbers(&[BATCH, 1, WIDTH], 3.0);
    let mut all: Vec<(&'static str, Operation)> = vec![
        (
            "linear with bias",
            Box::new(|x| x.linear(&layer(WIDTH, 5, true, 1.0))),
        ),
        ("low rank", Box::new(|x| x.linear(&low_rank(WIDTH, 2, 5)))),
        (
            "scores",
            Box::new(|x| x.linear_scores(&layer(WIDTH, 3, true, 1.0))),
        ),
        ("add a constant", Box::new(move |x| x.add_constant(&table))),
        (
            "add more dimensions",
            Box::new(move |x| x.add_constant(&taller)),
        ),
        (
            "add itself, mapped",
            Box::new(|x| x.add(&x.linear(&layer(WIDTH, WIDTH, true, 1.0))?)),
        ),
        (
            "add a row of itself",
            Box::new(|x| x.add(&x.narrow(1, 0, 1)?)),
        ),
        (
            "gate itself, mapped",
            Box::new(|x| x.gate(&x.linear(&layer(WIDTH, WIDTH, true, 1.0))?)),
        ),
        (
            "layer norm",
            Box::new(move |x| x.layer_norm(Some(&norm_gamma), Some(&beta), 1e-5)),
        ),
        (
            "bare layer norm",
            Box::new(|x| x.layer_norm(None, None, 1e-5)),
        ),
        (
            "rms norm",
            Box::new(move |x| x.rms_norm(Some(&rms_gamma), 1e-5)),
        ),
        ("attention", Box::new(|x| attention_of(x, 2))),
        ("grouped attention", Box::new(|x| attention_of(x, 1))),
        (
            "attention of merged heads",
            Box::new(|x| merged_attention_of(x, 2)),
        ),
        (
            "grouped attention of merged heads",
            Box::new(|x| merged_attention_of(x, 1)),
        ),
        (
            "linear and activation",
            Box::new(|x| x.linear_activate(&layer(WIDTH, 5, true, 1.0), Activation::Gelu)),
        ),
        (
            "residual attention",
            Box::new(|x| x.add(&attention_of(x, 2)?)),
        ),
        (
            "convolution with bias",
            Box::new(move |x| x.depthwise_convolution(&kernel, Some(&conv_bias))),
        ),
        (
            CONSTANT_ROWS,
            Box::new(move |x| {
                let rows = Signal::from(numbers(&[5, WIDTH], 11.0));
                let term = |source, row, weight| RowTerm {
                    source,
                    row,
                    weight,
                };
                // Each beside a row of the signal: a constant where no stream is has no one that it belongs to.
                let mut sums = RowSums::new();
                for row in 0..5 {
                    sums.push([term(0, row, 0.5), term(1, row, -1.0)]);
                }
                Signal::summed_rows(&[&token_rows(x)?, &rows], sums)
            }),
        ),
        (
            "concatenate a constant",
            Box::new(move |x| Signal::concatenate(&[Signal::from(constant.clone()), x.clone()], 1)),
        ),
    ];
    for activation in Activation::ALL {
        let name = match activation.passes_origin() {
            true => "activation",
            false => OFF_THE_ORIGIN,
        };
        all.push((name, Box::new(move |x| x.activate(activation))));
    }
    all
}

#[test]
fn operations_of_one_pass_give_what_their_parts_give() {
    let rows = token_rows(&Signal::from(input())).unwrap();
    let two = [&rows, &rows.scale(0.5).unwrap()];
    let together = Signal::summed_rows(&two, row_sums(2)).unwrap();
    let naive = naive::summed_rows(&two.map(Signal::value), &row_sums(2)).unwrap();
    assert_close(together.value(), &naive, 1e-12, "sums of rows");
    let none = Signal::summed_rows(&two, RowSums::new()).unwrap();
    assert_eq!(none.dims(), [0, WIDTH]);
    for groups in [1, 2] {
        let split = attention_of(&Signal::from(input()), groups).unwrap();
        let merged = merged_attention_of(&Signal::from(input()), groups).unwrap();
        assert_close(merged.value(), split.value(), 1e-12, "attention");
    }
    let up = layer(WIDTH, 5, true, 1.0);
    let x = Signal::from(input());
    for activation in Activation::ALL {
        let apart = x.linear(&up).unwrap().activate(activation).unwrap();
        let together = x.linear_activate(&up, activation).unwrap();
        assert_close(together.value(), apart.value(), 1e-12, "activation");
    }
}
