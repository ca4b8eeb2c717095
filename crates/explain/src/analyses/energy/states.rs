//! A model's hidden states around those of its training data.

use super::nearest::nearest;
use super::patterns::Patterns;
use crate::error::engine;
use crate::{Error, Result};
use lapidary_kernels::{CrossEntropyOptions, D, DType, Tensor, cross_entropy};
use lapidary_model::{HeadSpec, Input, Model, Pass};
use lapidary_signal::Trace;
use rand::Rng;
use rand::seq::SliceRandom;

/// Windows in a forward pass.
const BATCH: usize = 8;

/// Most numbers of states that are held at once.
const MOST_NUMBERS: usize = 1 << 28;

/// Checks that windows are of one length, at least two tokens.
fn check(model: &Model, windows: &[Vec<u32>]) -> Result<usize> {
    crate::error::require_one_stream(model, "states behind each block")?;
    let length = windows.first().map_or(0, Vec::len);
    if length < 2 || windows.iter().any(|window| window.len() != length) {
        let expected = "at least one, all of one length of at least 2 tokens";
        return Err(Error::invalid(
            "windows",
            format!("{} of {length} tokens", windows.len()),
            expected,
        ));
    }
    if !model.spec().is_causal() || !matches!(model.spec().head, HeadSpec::LanguageModel { .. }) {
        return Err(Error::invalid(
            "model",
            "no causal language model",
            "one that predicts each next token",
        ));
    }
    let width = model.spec().width;
    if windows.len().saturating_mul(length).saturating_mul(width) > MOST_NUMBERS {
        return Err(Error::invalid(
            "numbers of the states",
            format!("{} windows of {length} tokens of {width}", windows.len()),
            format!("at most {MOST_NUMBERS}: fewer windows"),
        ));
    }
    Ok(length)
}

fn batches<'a>(
    model: &'a Model,
    windows: &'a [Vec<u32>],
) -> impl Iterator<Item = Result<Tensor>> + 'a {
    windows.chunks(BATCH).map(|chunk| {
        let shape = (chunk.len(), chunk.first().map_or(0, Vec::len));
        engine(Tensor::from_vec(chunk.concat(), shape, &model.device()))
    })
}

/// What each site of `sites` holds at every position, `[windows · length, width]`.
///
/// # Errors
/// When the windows differ in length, the states are too many, or the model fails.
pub fn states(model: &Model, windows: &[Vec<u32>], sites: &[String]) -> Result<Vec<Tensor>> {
    check(model, windows)?;
    let mut found: Vec<Vec<Tensor>> = vec![Vec::new(); sites.len()];
    for ids in batches(model, windows) {
        let mut trace = Trace::new();
        for site in sites {
            trace = trace.capture(site)?;
        }
        let pass = Pass {
            trace: Some(&trace),
            only_last: true,
            ..Pass::default()
        };
        model.forward(&Input::tokens(ids?), pass)?;
        for (kept, site) in found.iter_mut().zip(sites) {
            kept.push(engine(trace.signal(site)?.value().flatten(0, 1))?);
        }
    }
    found
        .iter()
        .map(|parts| engine(Tensor::cat(parts, 0)))
        .collect()
}

/// The site after the last block: a state for each next-token position.
fn last(model: &Model) -> Vec<String> {
    let blocks = model.spec().expanded_blocks().len();
    vec![match blocks.checked_sub(1) {
        Some(block) => format!("blocks.{block}.out"),
        None => "embeddings".to_owned(),
    }]
}

/// How far held-out states are from the nearest training state.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Radii {
    /// Distance of each held-out state to the nearest training state, ascending.
    pub held_out: Vec<f64>,
    /// The same with each coordinate of the held-out states dealt out anew among them, so that
    /// coordinates no longer go together.
    pub dealt: Vec<f64>,
    /// Distance of each training state to the nearest other one, ascending.
    pub among_training: Vec<f64>,
}

impl Radii {
    /// The `share` quantile of ascending distances.
    pub fn quantile(sorted: &[f64], share: f64) -> f64 {
        let place = (share * sorted.len().saturating_sub(1) as f64).round() as usize;
        sorted.get(place).copied().unwrap_or(f64::NAN)
    }
}

/// Nearest-neighbour distances of a model's last states.
///
/// # Errors
/// As [`states`].
pub fn radii(
    model: &Model,
    training: &[Vec<u32>],
    held_out: &[Vec<u32>],
    generator: &mut impl Rng,
) -> Result<Radii> {
    let only = |windows| -> Result<Tensor> {
        let mut found = states(model, windows, &last(model))?;
        found
            .pop()
            .ok_or_else(|| Error::invalid("states", "none", "one site"))
    };
    let (stored, asked) = (only(training)?, only(held_out)?);
    let (rows, width) = engine(asked.dims2())?;
    let mut columns = engine(engine(asked.t())?.to_dtype(DType::F64))?;
    columns = engine(columns.contiguous())?;
    let mut columns = engine(columns.to_vec2::<f64>())?;
    columns
        .iter_mut()
        .for_each(|column| column.shuffle(generator));
    let dealt = engine(Tensor::from_vec(
        columns.concat(),
        (width, rows),
        asked.device(),
    ))?;
    let distances = |asked: &Tensor, skip: usize| -> Result<Vec<f64>> {
        let found = nearest(&stored, asked, 1 + skip)?;
        let mut found: Vec<f64> = found
            .iter()
            .filter_map(|n| Some(n.get(skip)?.distance))
            .collect();
        found.sort_by(f64::total_cmp);
        Ok(found)
    };
    Ok(Radii {
        held_out: distances(&asked, 0)?,
        dealt: distances(&engine(dealt.t())?, 0)?,
        among_training: match engine(stored.dim(0))? {
            0 | 1 => Vec::new(),
            _ => distances(&stored, 1)?,
        },
    })
}

/// What one block does to the energy.
#[derive(Clone, Debug, PartialEq)]
pub struct Descent {
    /// Index of the block.
    pub block: usize,
    /// Mean energy of what goes in, among the training states that come out.
    pub before: f64,
    /// Mean energy of what comes out, among the same.
    pub after: f64,
    /// Share of held-out positions whose energy does not rise: at which the block acts as a
    /// retrieval, `E_{t+1}(x_{t+1}) ≤ E_{t+1}(x_t)`.
    pub descends: f64,
}

/// The energy before and after each block, with the training states after the block as patterns,
/// over every `every`-th held-out position.
///
/// # Errors
/// As [`states`].
pub fn descent(
    model: &Model,
    training: &[Vec<u32>],
    held_out: &[Vec<u32>],
    every: usize,
) -> Result<Vec<Descent>> {
    let blocks = model.spec().expanded_blocks().len();
    (0..blocks)
        .map(|block| {
            let sites = ["in", "out"].map(|side| format!("blocks.{block}.{side}"));
            let [_, after] = &sites;
            let stored = states(model, training, std::slice::from_ref(after))?;
            let width = model.spec().width;
            let values = |tensor: &Tensor| -> Result<Vec<f64>> {
                engine(engine(engine(tensor.to_dtype(DType::F64))?.flatten_all())?.to_vec1::<f64>())
            };
            let patterns = stored
                .iter()
                .map(values)
                .collect::<Result<Vec<_>>>()?
                .concat();
            let patterns = Patterns::new(width, patterns)?;
            let both = states(model, held_out, &sites)?;
            let both = both.iter().map(values).collect::<Result<Vec<_>>>()?;
            let [before, after] = both.as_slice() else {
                return Err(Error::invalid("sites of a block", both.len(), "2"));
            };
            let pairs = before.chunks_exact(width).zip(after.chunks_exact(width));
            let mut energies = Vec::new();
            for (before, after) in pairs.step_by(every.max(1)) {
                energies.push((patterns.energy(before)?, patterns.energy(after)?));
            }
            let count = energies.len().max(1) as f64;
            let down = energies
                .iter()
                .filter(|(before, after)| after <= before)
                .count();
            Ok(Descent {
                block,
                before: energies.iter().map(|e| e.0).sum::<f64>() / count,
                after: energies.iter().map(|e| e.1).sum::<f64>() / count,
                descends: down as f64 / count,
            })
        })
        .collect()
}

/// Mean loss over next tokens, in nats.
///
/// # Errors
/// As [`states`].
pub fn loss(model: &Model, windows: &[Vec<u32>]) -> Result<f64> {
    let length = check(model, windows)?;
    let (mut sum, mut rows) = (0.0, 0.0);
    for ids in batches(model, windows) {
        let ids = ids?;
        let inputs = engine(engine(ids.narrow(1, 0, length - 1))?.contiguous())?;
        let targets = engine(engine(ids.narrow(1, 1, length - 1))?.flatten_all())?;
        let logits = model.forward(&Input::tokens(inputs), Pass::default())?;
        let logits = engine(logits.into_logits()?.into_value().flatten(0, 1))?;
        let loss = cross_entropy(&logits, &targets, &CrossEntropyOptions::default())?;
        let here = engine(ids.dim(0))? as f64;
        sum += crate::target::number(&loss)? * here;
        rows += here;
    }
    Ok(sum / rows)
}

/// Share of windows whose last `continued` tokens the model says exactly, greedily, given those
/// before.
///
/// # Errors
/// When the windows are not longer than that; as [`states`].
pub fn memorised(model: &Model, windows: &[Vec<u32>], continued: usize) -> Result<f64> {
    let length = check(model, windows)?;
    if continued == 0 || continued >= length {
        return Err(Error::invalid(
            "tokens to continue",
            continued,
            format!("between 1 and {}", length - 1),
        ));
    }
    let mut exact = 0usize;
    for (ids, chunk) in batches(model, windows).zip(windows.chunks(BATCH)) {
        // As long as every token is right, what greedy generation reads is the window itself.
        let logits = model.forward(&Input::tokens(ids?), Pass::default())?;
        let best = engine(logits.into_logits()?.into_value().argmax(D::Minus1))?;
        let best = engine(best.to_vec2::<u32>())?;
        for (window, best) in chunk.iter().zip(best) {
            let start = length - continued;
            let said = best.get(start - 1..length - 1);
            exact += usize::from(said == window.get(start..));
        }
    }
    Ok(exact as f64 / windows.len() as f64)
}
