//! The same statistics on the tokens of a model.

use super::particles::Particles;
use crate::error::engine;
use crate::{Error, Question, Result};
use lapidary_kernels::{DType, Tensor};
use lapidary_model::{Input, Model, ModelSpec};
use lapidary_parts::block::{BlockSpec, Wiring};
use lapidary_signal::{Signal, Trace};
use rand::Rng;
use rand::seq::SliceRandom;
use std::sync::{Arc, Mutex, PoisonError};

/// Tokens with a larger cosine count as close.
pub const CLOSE: f64 = 0.95;

/// How the tokens of one text lie before a layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Layer {
    /// The site that was read, after the norm before the layer's mixer.
    pub site: String,
    /// Mean cosine of pairs of tokens.
    pub mean_cosine: f64,
    /// Share of pairs with a cosine above [`CLOSE`].
    pub close_pairs: f64,
    /// Clusters at [`CLOSE`].
    pub clusters: usize,
    /// Exponential of the entropy of the Gram matrix's eigenvalues.
    pub effective_rank: f64,
    /// Cosines of pairs in [`BINS`] equal parts of `[−1, 1]`.
    pub histogram: Vec<usize>,
}

/// Parts of a layer's histogram.
pub const BINS: usize = 20;

/// How the tokens of the question's first sequence lie before every layer, and after the last.
/// Padding does not count.
///
/// # Errors
/// When the model fails, or a token's state is zero.
pub fn layers(question: &Question<'_>) -> Result<Vec<Layer>> {
    crate::error::require_whole_sequences(question.model, "how tokens gather")?;
    let trace = Trace::new()
        .capture("blocks.*.attention.in")?
        .capture("final_norm")?;
    question
        .model
        .forward(question.input, question.pass(&trace))?;
    read(question, &trace)
}

/// As [`layers`], with what attention writes in place of the residual stream rather than beside it:
/// `x ← A(x)`. Feed-forward parts keep their residual.
///
/// # Errors
/// As [`layers`]; blocks with cross-attention are refused.
pub fn layers_without_skip(question: &Question<'_>) -> Result<Vec<Layer>> {
    let spec = question.model.spec();
    if spec.blocks.iter().any(|block| block.shortcuts) {
        return Err(Error::invalid(
            "shortcuts",
            true,
            "false: the residual is taken out by subtracting it as it is",
        ));
    }
    let shared = |block: &BlockSpec| {
        block.cross_attention.is_some()
            || !matches!(block.wiring, Wiring::PreNorm | Wiring::PostNorm)
    };
    if spec.blocks.iter().any(shared) {
        return Err(Error::invalid(
            "wiring",
            "parallel, replacing, reversed, or with cross-attention",
            "pre-norm or post-norm: elsewhere attention shares its residual with another part",
        ));
    }
    let before: Arc<Mutex<Option<Tensor>>> = Arc::default();
    let mut trace = Trace::new();
    for block in 0..spec.expanded_blocks().len() {
        let (keep, take) = (before.clone(), before.clone());
        trace = trace
            .replace(&format!("blocks.{block}.in"), move |_, signal| {
                let mut held = keep.lock().unwrap_or_else(PoisonError::into_inner);
                *held = Some(signal.value().clone());
                Ok(signal)
            })?
            // The residual adds x again: x + (y − x) = y.
            .replace(
                &format!("blocks.{block}.attention.out"),
                move |_, signal| {
                    let held = take.lock().unwrap_or_else(PoisonError::into_inner);
                    match held.as_ref() {
                        Some(x) => {
                            let change = signal.value() - x;
                            Ok(Signal::from(change.map_err(lapidary_kernels::Error::from)?))
                        }
                        None => Ok(signal),
                    }
                },
            )?;
    }
    let trace = trace
        .capture("blocks.*.attention.in")?
        .capture("final_norm")?;
    question
        .model
        .forward(question.input, question.pass(&trace))?;
    read(question, &trace)
}

fn read(question: &Question<'_>, trace: &Trace) -> Result<Vec<Layer>> {
    let blocks = question.model.spec().expanded_blocks().len();
    let sites = (0..blocks).map(|block| format!("blocks.{block}.attention.in"));
    let sites = sites.chain(["final_norm".to_owned()]);
    let records = trace.records();
    sites
        .filter_map(|site| Some((records.get(&site)?.signal.value().clone(), site)))
        .map(|(states, site)| layer(site, &kept(question, &states)?))
        .collect()
}

/// The states of the first sequence that are not padding, `[tokens, width]`.
fn kept(question: &Question<'_>, states: &Tensor) -> Result<Tensor> {
    let states = engine(engine(states.get(0))?.to_dtype(DType::F64))?;
    let Some(padding) = question.padding else {
        return Ok(states);
    };
    let keep = engine(engine(engine(padding.get(0))?.to_dtype(DType::U32))?.to_vec1::<u32>())?;
    let indices: Vec<u32> = (0..)
        .zip(&keep)
        .filter(|(_, k)| **k != 0)
        .map(|(i, _)| i)
        .collect();
    let indices = engine(Tensor::from_slice(&indices, indices.len(), states.device()))?;
    engine(states.index_select(&indices, 0))
}

fn layer(site: String, states: &Tensor) -> Result<Layer> {
    let width = engine(states.dim(1))?;
    let values = engine(engine(states.flatten_all())?.to_vec1::<f64>())?;
    let particles = Particles::new(width, values)?;
    Ok(Layer {
        site,
        mean_cosine: particles.mean_cosine(),
        close_pairs: particles.close_pairs(CLOSE),
        clusters: particles.clusters(CLOSE),
        effective_rank: particles.effective_rank()?,
        histogram: particles.histogram(BINS),
    })
}

/// The same tokens in random order.
///
/// # Errors
/// When the input has no tokens.
pub fn shuffled(input: &Input, generator: &mut impl Rng) -> Result<Input> {
    let Input::Tokens { ids, .. } = input else {
        return Err(Error::invalid(
            "input",
            "an image",
            "tokens, whose order can be drawn",
        ));
    };
    let (rows, length) = engine(ids.dims2())?;
    let mut all = engine(ids.to_vec2::<u32>())?;
    for row in &mut all {
        row.shuffle(generator);
    }
    let shuffled = all.concat();
    Ok(Input::tokens(engine(Tensor::from_vec(
        shuffled,
        (rows, length),
        ids.device(),
    ))?))
}

/// A model that passes its tokens through its blocks `passes` times, as models that share the
/// weights of all layers can be iterated beyond their depth.
///
/// # Errors
/// When there are no passes, or too many blocks.
pub fn iterated(model: &Model, passes: usize) -> Result<Model> {
    if passes == 0 {
        return Err(Error::invalid("passes", passes, "at least 1"));
    }
    let blocks = model.spec().expanded_blocks();
    let spec = ModelSpec {
        blocks: std::iter::repeat_n(blocks.clone(), passes)
            .flatten()
            .collect(),
        low_rank: model
            .spec()
            .low_rank
            .iter()
            .flat_map(|(path, rank)| {
                let rank = *rank;
                copies(path, blocks.len(), passes).map(move |path| (path, rank))
            })
            .collect(),
        quantised: model
            .spec()
            .quantised
            .iter()
            .flat_map(|(name, form)| {
                let form = *form;
                copies(name, blocks.len(), passes).map(move |name| (name, form))
            })
            .collect(),
        ..model.spec().clone()
    };
    let mut parameters = model
        .parameters()
        .iter()
        .flat_map(|(name, tensor)| {
            copies(name, blocks.len(), passes).map(move |name| (name, tensor.clone()))
        })
        .collect::<std::collections::BTreeMap<_, _>>();
    Ok(Model::new(spec, &mut parameters)?)
}

/// A model of `depth` blocks, whose last set of shared weights is passed through as often as that
/// takes: as ALBERT can be iterated beyond the depth that it was trained with.
///
/// # Errors
/// When the last block of the model's spec does not share its weights, or the depth is not above
/// that of the blocks before it.
pub fn deepened(model: &Model, depth: usize) -> Result<Model> {
    let mut spec = model.spec().clone();
    let all = spec.expanded_blocks().len();
    let Some(last) = spec.blocks.last_mut().filter(|block| block.shared) else {
        return Err(Error::invalid(
            "depth",
            depth,
            format!("{all}: the model's last block shares its weights with no other"),
        ));
    };
    let before = all - last.repeat;
    last.repeat = match depth.checked_sub(before) {
        None | Some(0) => {
            let expected = format!("above {before}, the blocks before the shared ones");
            return Err(Error::invalid("depth", depth, expected));
        }
        Some(repeat) => repeat,
    };
    Ok(Model::new(spec, &mut model.parameters().clone())?)
}

/// The names that a parameter of a block has in every pass; any other name, once.
fn copies(name: &str, blocks: usize, passes: usize) -> impl Iterator<Item = String> {
    let parts = name
        .strip_prefix("blocks.")
        .and_then(|rest| rest.split_once('.'));
    let of_block =
        parts.and_then(|(index, rest)| Some((index.parse::<usize>().ok()?, rest.to_owned())));
    let name = name.to_owned();
    let times = if of_block.is_some() { passes } else { 1 };
    (0..times).map(move |pass| match &of_block {
        Some((index, rest)) => format!("blocks.{}.{rest}", pass * blocks + index),
        None => name.clone(),
    })
}
