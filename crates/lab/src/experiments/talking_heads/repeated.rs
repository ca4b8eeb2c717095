//! Random segments that come again.

use super::super::mean;
use crate::error::engine;
use crate::{Error, Result};
use lapidary_explain::analyses::channels::HeadId;
use lapidary_kernels::{D, DType, Device, Tensor};
use lapidary_model::{Input, Model, Pass};
use lapidary_signal::Trace;
use lapidary_train::data::{Batch, IGNORE, Task};
use lapidary_train::{Generator, generator};
use rand::RngExt;
use rand::seq::SliceRandom;

/// A segment of different symbols in random order, over and over. What follows a symbol that came
/// before is what followed it then; the length of the segment is random, so that positions alone
/// do not tell.
#[derive(Clone, Copy, Debug)]
pub(super) struct Repeated {
    symbols: usize,
}

/// Shortest and longest segments.
const PERIODS: std::ops::RangeInclusive<usize> = 8..=24;

/// One sequence and the length of its segment.
pub(super) struct Sequence {
    pub(super) tokens: Vec<u32>,
    pub(super) period: usize,
}

impl Repeated {
    pub(super) fn new(symbols: usize) -> Result<Self> {
        match symbols > *PERIODS.end() {
            true => Ok(Self { symbols }),
            false => Err(Error::Experiment(format!(
                "symbols is {symbols}, but must be above {}",
                PERIODS.end()
            ))),
        }
    }

    fn sequence(&self, length: usize, generator: &mut Generator) -> Sequence {
        let mut symbols: Vec<u32> = (0..self.symbols as u32).collect();
        symbols.shuffle(generator);
        let period = generator.random_range(PERIODS);
        Sequence {
            tokens: symbols
                .iter()
                .take(period)
                .cycle()
                .take(length)
                .copied()
                .collect(),
            period,
        }
    }

    /// Sequences that training does not draw.
    pub(super) fn sequences(
        &self,
        count: usize,
        length: usize,
        seed: u64,
    ) -> Result<Vec<Sequence>> {
        let mut generator = generator(seed ^ 0x5eed);
        Ok((0..count)
            .map(|_| self.sequence(length, &mut generator))
            .collect())
    }
}

impl Task for Repeated {
    fn vocabulary(&self) -> usize {
        self.symbols
    }

    fn batch(
        &mut self,
        generator: &mut Generator,
        rows: usize,
        length: usize,
    ) -> lapidary_train::Result<Batch> {
        let mut batch = Batch::with_capacity(rows, length);
        for _ in 0..rows {
            let Sequence { tokens, period } = self.sequence(length + 1, generator);
            batch.inputs.extend(tokens.iter().take(length));
            let targets = tokens.iter().skip(1).enumerate();
            batch
                .targets
                .extend(targets.map(|(position, token)| match position >= period {
                    true => *token,
                    false => IGNORE,
                }));
            batch.rows += 1;
        }
        Ok(batch)
    }
}

fn input(sequences: &[Sequence]) -> Result<Input> {
    let tokens: Vec<u32> = sequences
        .iter()
        .flat_map(|s| s.tokens.iter().copied())
        .collect();
    let shape = (sequences.len(), tokens.len() / sequences.len().max(1));
    Ok(Input::tokens(engine(Tensor::from_vec(
        tokens,
        shape,
        &Device::Cpu,
    ))?))
}

/// How often the most probable next symbol is the right one, where the segment has come once.
pub(super) fn accuracy(model: &Model, sequences: &[Sequence]) -> Result<f64> {
    let output = model.forward(&input(sequences)?, Pass::default())?;
    let best = engine(output.into_logits()?.into_value().argmax(D::Minus1))?;
    let best = engine(best.to_vec2::<u32>())?;
    let mut right = Vec::new();
    for (Sequence { tokens, period }, best) in sequences.iter().zip(best) {
        let each = tokens.iter().skip(1).zip(best).enumerate().skip(*period);
        right.extend(each.map(|(_, (token, best))| f64::from(u8::from(*token == best))));
    }
    Ok(mean(right))
}

/// The head of `block` with the highest mean weight on the position that `wanted` names, given the
/// period and the query, over queries whose segment has come once.
pub(super) fn strongest(
    model: &Model,
    sequences: &[Sequence],
    block: usize,
    wanted: fn(usize, usize) -> Option<usize>,
) -> Result<(HeadId, f64)> {
    let site = format!("blocks.{block}.attention.weights");
    let trace = Trace::new().capture(&site)?;
    let pass = Pass {
        trace: Some(&trace),
        ..Pass::default()
    };
    let looked_at = sequences.get(..sequences.len().min(16)).unwrap_or_default();
    model.forward(&input(looked_at)?, pass)?;
    let weights = trace.signal(&site)?.into_value();
    let mut best = (HeadId { block, head: 0 }, f64::NEG_INFINITY);
    for head in 0..engine(weights.dim(1))? {
        let mut found = Vec::new();
        for (row, Sequence { tokens, period }) in looked_at.iter().enumerate() {
            let of_head = engine(engine(weights.get(row))?.get(head))?;
            let of_head = engine(engine(of_head.to_dtype(DType::F64))?.to_vec2::<f64>())?;
            for query in *period..tokens.len() {
                let key = wanted(*period, query);
                let weight = key.and_then(|key| of_head.get(query)?.get(key).copied());
                found.push(weight.unwrap_or(0.0));
            }
        }
        let weight = mean(found);
        if weight > best.1 {
            best = (HeadId { block, head }, weight);
        }
    }
    Ok(best)
}
