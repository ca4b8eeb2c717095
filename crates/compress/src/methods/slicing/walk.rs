//! Through the model site by site, each looked at after those before it have been cut.
//!
//! The stream stays in its original basis: a cut site carries `h Q Qᵀ` where the narrower model
//! carries `h Q`, which every reader and every norm over the original width takes for the same.

use std::collections::BTreeMap;

use lapidary_factor::{Matrix, matrix_to_tensor};
use lapidary_kernels::{DType, Tensor, linear};
use lapidary_model::{HeadSpec, Model, ModelSpec, Pass};
use lapidary_parts::Context;
use lapidary_parts::block::{Block, BlockSpec, Wiring};
use lapidary_parts::feedforward::Feedforward;
use lapidary_parts::norm::Norm;
use lapidary_parts::parameters::Parameters;
use lapidary_parts::position::fire;
use lapidary_signal::{Signal, Trace};

use super::fold::Folding;
use crate::data::{Batch, real_rows};
use crate::error::engine;
use crate::{CalibrationData, Result};

/// Hands over the stream at each site, `[tokens, width]` batch by batch and padding left out, and
/// goes on with what the basis that comes back leaves of it: all, when none does.
///
/// Memory holds the stream of all data at one site, and the weights of one block in `dtype`.
pub(super) fn walk(
    folded: &Folding<'_>,
    dtype: DType,
    data: &CalibrationData,
    batch: usize,
    mut choose: impl FnMut(usize, &[Tensor]) -> Result<Option<Matrix>>,
) -> Result<()> {
    let device = lapidary_kernels::Device::Cpu;
    let batches = data.batches(batch, &device).collect::<Result<Vec<_>>>()?;
    let mut source = converted(folded.outside(), dtype)?;
    let mut stream = embedded(folded.spec(), &mut source, &batches)?;
    drop(source);
    let mut site = 0;
    let mut cut = |stream: &mut Vec<Tensor>| -> Result<()> {
        let mut rows = Vec::with_capacity(stream.len());
        for (x, batch) in stream.iter().zip(&batches) {
            rows.push(real_rows(x, batch.real.as_ref())?);
        }
        if let Some(basis) = choose(site, &rows)? {
            let basis = matrix_to_tensor(basis.as_ref(), dtype, &device)?;
            for x in stream.iter_mut() {
                *x = projected(x, &basis)?;
            }
        }
        site += 1;
        Ok(())
    };
    cut(&mut stream)?;
    for (index, block) in folded.spec().blocks.iter().enumerate() {
        let own = folded.block(index)?;
        // A network that several blocks share stands beside them.
        let beside = folded.outside().filter(|(name, _)| is_shared(name));
        let mut source = converted(own.parameters.iter().chain(beside), dtype)?;
        for stage in stages(block, folded.spec().width, index, &mut source)? {
            for (x, batch) in stream.iter_mut().zip(&batches) {
                *x = stage.forward(x, batch)?;
            }
            cut(&mut stream)?;
        }
    }
    Ok(())
}

/// Whether a parameter is one of positions that several blocks share.
fn is_shared(name: &str) -> bool {
    name.strip_prefix(fire::SHARED)
        .is_some_and(|rest| rest.starts_with('.'))
}

/// Parameters in a type.
fn converted<'a>(
    parameters: impl Iterator<Item = (&'a String, &'a Tensor)>,
    dtype: DType,
) -> Result<BTreeMap<String, Tensor>> {
    parameters
        .map(|(name, tensor)| Ok((name.clone(), engine(tensor.detach().to_dtype(dtype))?)))
        .collect()
}

/// `x Q Qᵀ` for `x` `[batch, length, width]`.
fn projected(x: &Tensor, basis: &Tensor) -> Result<Tensor> {
    let narrow = linear(x, &engine(basis.t())?, None)?;
    Ok(linear(&narrow, basis, None)?)
}

/// What the embedding alone writes.
fn embedded(
    spec: &ModelSpec,
    source: &mut BTreeMap<String, Tensor>,
    batches: &[Batch<'_>],
) -> Result<Vec<Tensor>> {
    let spec = ModelSpec {
        blocks: Vec::new(),
        final_norm: None,
        head: HeadSpec::None,
        ..spec.clone()
    };
    let model = Model::new(spec, source)?;
    let run = |batch: &Batch<'_>| -> Result<Tensor> {
        let pass = Pass {
            padding: batch.padding.as_ref(),
            ..Pass::default()
        };
        Ok(model.forward(&batch.input, pass)?.hidden.into_value())
    };
    batches.iter().map(run).collect()
}

/// What happens to the stream between two sites.
enum Stage {
    Block(Box<Block>),
    Feedforward(Norm, Box<Feedforward>),
}

/// A block in stages: mixer and feed-forward part one after the other, or both at once.
fn stages(
    block: &BlockSpec,
    width: usize,
    index: usize,
    source: &mut BTreeMap<String, Tensor>,
) -> Result<Vec<Stage>> {
    let (ranks, mut linears) = (BTreeMap::new(), Vec::new());
    let mut root = Parameters::new(source, &ranks, &mut linears);
    let mut blocks = root.at("blocks");
    let mut here = blocks.at(index);
    if block.wiring == Wiring::Parallel {
        let whole = Block::new(block, width, here)?;
        return Ok(vec![Stage::Block(Box::new(whole))]);
    }
    let mut stages = Vec::new();
    if let Some(feedforward) = &block.feedforward {
        let norm = Norm::new(&block.norm, width, here.at("feedforward_norm"))?;
        let part = Feedforward::new(feedforward, width, here.at("feedforward"))?;
        stages.push(Stage::Feedforward(norm, Box::new(part)));
    }
    let mixer = BlockSpec {
        feedforward: None,
        ..block.clone()
    };
    stages.insert(0, Stage::Block(Box::new(Block::new(&mixer, width, here)?)));
    Ok(stages)
}

impl Stage {
    fn forward(&self, x: &Tensor, batch: &Batch<'_>) -> Result<Tensor> {
        let trace = Trace::new();
        let cx = Context {
            key_padding: batch.padding.as_ref(),
            ..Context::new(&trace)
        };
        let x = Signal::from(x.clone());
        let y = match self {
            Self::Block(block) => block.forward(x, &cx, None)?,
            Self::Feedforward(norm, part) => x.add(&part.forward(&norm.forward(&x)?, &cx)?)?,
        };
        Ok(y.into_value())
    }
}
