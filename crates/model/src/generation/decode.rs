//! The decoding loop: prompts in, tokens out.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use super::{Sampler, SamplingOptions};
use crate::{Input, Model, Pass, Result};
use lapidary_kernels::{DType, Tensor};

/// How a model continues its prompts.
#[derive(Clone, Debug)]
pub struct GenerationOptions {
    /// Most tokens to add.
    pub new_tokens: usize,
    /// How each is chosen.
    pub sampling: SamplingOptions,
    /// Tokens that end a sequence; they are given out last.
    pub stop_ids: Vec<u32>,
    /// Keep keys, values and states between steps. Without, every step runs the whole sequence
    /// again: slower, and the same tokens. So does a model whose organisation keeps nothing between steps.
    pub cache: bool,
}

impl Default for GenerationOptions {
    fn default() -> Self {
        Self {
            new_tokens: 64,
            sampling: SamplingOptions::greedy(),
            stop_ids: Vec::new(),
            cache: true,
        }
    }
}

/// Continues each of `prompts`. `on_token` hears of every token as it is chosen, with the
/// sequence it belongs to, and may end that sequence by breaking.
///
/// Prompts of the same length are decoded as one batch. A sequence also ends when it reaches the
/// model's length. The draws of a sequence depend on the seed and its place alone.
///
/// # Errors
/// When the model is not causal or gives no scores, when a prompt is empty or too long, or when
/// an option is invalid.
pub fn generate(
    model: &Model,
    prompts: &[Vec<u32>],
    options: &GenerationOptions,
    mut on_token: impl FnMut(usize, u32) -> ControlFlow<()>,
) -> Result<Vec<Vec<u32>>> {
    if !model.spec().is_causal() {
        let expected = "causal in every block, to generate";
        return Err(lapidary_parts::Error::spec("attention", "bidirectional", expected).into());
    }
    let mut groups: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for (index, prompt) in prompts.iter().enumerate() {
        if prompt.is_empty() {
            return Err(
                lapidary_parts::Error::spec("prompt", "empty", "at least one token").into(),
            );
        }
        groups.entry(prompt.len()).or_default().push(index);
    }
    let mut continued = vec![Vec::new(); prompts.len()];
    for members in groups.values() {
        let mut batch = members
            .iter()
            .map(|index| {
                Ok(Sequence {
                    index: *index,
                    tokens: prompts.get(*index).cloned().unwrap_or_default(),
                    sampler: Sampler::for_sequence(options.sampling.clone(), *index as u64)?,
                    ended: false,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        decode(model, &mut batch, options, &mut on_token)?;
        for sequence in batch {
            let prompt = prompts.get(sequence.index).map_or(0, Vec::len);
            if let Some(slot) = continued.get_mut(sequence.index) {
                *slot = sequence.tokens.get(prompt..).unwrap_or_default().to_vec();
            }
        }
    }
    Ok(continued)
}

struct Sequence {
    index: usize,
    tokens: Vec<u32>,
    sampler: Sampler,
    ended: bool,
}

fn decode(
    model: &Model,
    batch: &mut [Sequence],
    options: &GenerationOptions,
    on_token: &mut impl FnMut(usize, u32) -> ControlFlow<()>,
) -> Result<()> {
    // Some organisations keep nothing between steps.
    let (organisation, causal) = (model.spec().organisation.as_ref(), model.spec().is_causal());
    let decodes = organisation.is_none_or(|organisation| organisation.decodes(causal));
    let cache = options.cache && decodes;
    let mut state = model.decode_state();
    // A sequence that has ended keeps its place in the batch and repeats its last token, which
    // nobody hears of.
    let mut fresh: Vec<Vec<u32>> = batch
        .iter()
        .map(|sequence| sequence.tokens.clone())
        .collect();
    let prompt = fresh.first().map_or(0, Vec::len);
    for length in prompt..prompt.saturating_add(options.new_tokens) {
        if length > model.spec().length() {
            break;
        }
        let ids = rows(&fresh, model)?;
        let pass = Pass {
            state: cache.then_some(&mut state),
            only_last: true,
            ..Pass::default()
        };
        let logits = model.forward(&Input::tokens(ids), pass)?.into_logits()?;
        let logits = logits
            .value()
            .squeeze(1)
            .and_then(|logits| logits.to_dtype(DType::F32));
        let logits = logits.map_err(lapidary_kernels::Error::from)?;
        let logits = logits
            .to_vec2::<f32>()
            .map_err(lapidary_kernels::Error::from)?;
        for ((sequence, fresh), logits) in batch.iter_mut().zip(&mut fresh).zip(&logits) {
            let mut next = sequence.tokens.last().copied().unwrap_or(0);
            if !sequence.ended {
                next = sequence.sampler.next(logits, &sequence.tokens)?;
                sequence.tokens.push(next);
                sequence.ended =
                    on_token(sequence.index, next).is_break() || options.stop_ids.contains(&next);
            }
            if cache {
                fresh.clear();
            }
            fresh.push(next);
        }
        if batch.iter().all(|sequence| sequence.ended) {
            break;
        }
    }
    Ok(())
}

fn rows(tokens: &[Vec<u32>], model: &Model) -> Result<Tensor> {
    let width = tokens.first().map_or(0, Vec::len);
    let flat: Vec<u32> = tokens.iter().flatten().copied().collect();
    let ids = Tensor::from_vec(flat, (tokens.len(), width), &model.device());
    Ok(ids.map_err(lapidary_kernels::Error::from)?)
}
