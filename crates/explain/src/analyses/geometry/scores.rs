//! Attention scores between the parts of hidden states: which part of a score is positional.
//!
//! *Exactly*: with the deviation of the norm held at that of the true state, queries and keys are
//! linear in `h = μ + pos + ctx + resid`, so that `q = q_μ + q_pos + q_ctx + q_resid` (biases and
//! the norm's shift go with `μ`) and the score is the sum of sixteen blocks.
//!
//! *Renormalised*, as the authors compute it: `q` and `k` of `N(pos_t)` and `N(ctx_c + resid)`, each
//! normalised by itself, which gives four blocks that do not add up. (Their second part still has
//! the mean in it; here it has not.)

use super::decomposition::Decomposition;
use crate::error::engine;
use crate::{Error, Result};
use lapidary_factor::{Matrix, matrix_from_tensor, matrix_to_tensor};
use lapidary_kernels::{D, DType, Device, Tensor};
use lapidary_model::Model;
use lapidary_parts::attention::{MixerSpec, MultiHeadSpec};
use lapidary_parts::block::{BlockSpec, Wiring};
use lapidary_parts::norm::Norm;
use lapidary_parts::parameters::Parameters;
use lapidary_parts::position::Position;
use lapidary_parts::position::fire::SHARED;
use lapidary_signal::{Linear, Signal};
use std::collections::BTreeMap;

/// Names of the four parts, in the order of the blocks.
pub const PARTS: [&str; 4] = ["mean", "position", "context", "residual"];

/// The scores of one head on one context, before masks and additive biases, each
/// `[query, key]`.
#[derive(Clone, Debug)]
pub struct ScoreBlocks {
    /// `[part of the query][part of the key]`, which add up to `total`.
    pub exact: [[Matrix; 4]; 4],
    /// The true scores.
    pub total: Matrix,
    /// Position and everything else but the mean, each normalised by itself.
    pub renormalised: [[Matrix; 2]; 2],
}

/// What turns hidden states into one block's queries and keys.
struct Projections {
    spec: MultiHeadSpec,
    head_width: usize,
    scale: f64,
    /// `None` where no norm stands before attention.
    norm: Option<Norm>,
    query: Linear,
    key: Linear,
    position: Position,
}

impl Projections {
    fn new(model: &Model, block: usize) -> Result<Self> {
        let blocks = model.spec().expanded_blocks();
        let Some(BlockSpec {
            wiring,
            norm,
            attention: MixerSpec::MultiHead(spec),
            ..
        }) = blocks.get(block)
        else {
            return Err(Error::invalid(
                "block for attention scores",
                block,
                format!("one of {} with multi-head attention", blocks.len()),
            ));
        };
        if let Some(peculiarity) = spec.peculiarity() {
            return Err(Error::invalid(
                format!("attention of block {block}"),
                peculiarity,
                "softmax with projections of its own",
            ));
        }
        if spec.query_key_norm.is_some() {
            return Err(Error::invalid(
                "blocks of attention scores",
                "asked for in a model that normalises queries and keys",
                "asked for where queries and keys are linear in the normed states",
            ));
        }
        let mut source: BTreeMap<String, Tensor> = BTreeMap::new();
        let here = format!("blocks.{block}.attention");
        let shared = format!("{SHARED}.");
        for (name, tensor) in model.parameters() {
            if name.starts_with(&here) || name.starts_with(&shared) {
                let tensor = engine(tensor.to_device(&Device::Cpu))?;
                source.insert(name.clone(), engine(tensor.to_dtype(DType::F64))?);
            }
        }
        let (width, head_width) = (model.spec().width, spec.head_width(model.spec().width));
        let ranks = model.spec().low_rank.clone();
        let mut linears = Vec::new();
        let mut root = Parameters::new(&mut source, &ranks, &mut linears)
            .with_quantised(&model.spec().quantised);
        let mut blocks = root.at("blocks");
        let mut block = blocks.at(block);
        let norm = match wiring {
            Wiring::PreNorm | Wiring::Parallel | Wiring::Replacing | Wiring::Reversed => {
                Some(Norm::new(norm, width, block.at("attention_norm"))?)
            }
            Wiring::PostNorm => None,
        };
        let mut attention = block.at("attention");
        Ok(Self {
            head_width,
            scale: spec.scale(width),
            norm,
            query: attention.linear("query", "in", width, spec.heads * head_width, spec.bias)?,
            key: attention.linear("key", "in", width, spec.groups() * head_width, spec.bias)?,
            position: Position::new(
                &spec.position,
                (spec.heads, spec.groups()),
                head_width,
                spec.causal,
                attention.at("position"),
            )?,
            spec: spec.clone(),
        })
    }

    /// `parts` `[4, positions, width]` of the states `hidden` `[positions, width]`, through the
    /// norm whose deviation is that of the whole; the shift goes with the first part.
    fn normed_parts(&self, parts: &Tensor, hidden: &Tensor) -> Result<Tensor> {
        let (centre, weight, bias, epsilon) = match &self.norm {
            None | Some(Norm::None) => return Ok(parts.clone()),
            Some(Norm::Layer {
                weight,
                bias,
                epsilon,
            }) => (true, weight, Some(bias), *epsilon),
            Some(Norm::Rms { weight, epsilon }) => (false, weight, None, *epsilon),
        };
        let centred = |x: &Tensor| -> Result<Tensor> {
            if !centre {
                return Ok(x.clone());
            }
            engine(x.broadcast_sub(&engine(x.mean_keepdim(D::Minus1))?))
        };
        let squares = engine(engine(centred(hidden)?.sqr())?.mean_keepdim(D::Minus1))?;
        let deviation = engine(engine(squares + epsilon)?.sqrt())?;
        let scaled = engine(centred(parts)?.broadcast_div(&deviation))?;
        let scaled = engine(scaled.broadcast_mul(weight))?;
        match bias {
            Some(bias) => with_first(&scaled, bias),
            None => Ok(scaled),
        }
    }

    /// Queries and keys `[parts, positions, head_width]` of one head, rotated as at positions
    /// from `skip` on, without the layers' biases.
    fn head(&self, parts: &Tensor, layer: &Linear, heads: usize, head: usize) -> Result<Tensor> {
        let all = layer.apply_without_bias(parts)?;
        let group = head / (self.spec.heads / heads.max(1)).max(1);
        engine(all.narrow(D::Minus1, group * self.head_width, self.head_width))
    }

    fn bias(&self, layer: &Linear, heads: usize, head: usize) -> Result<Option<Tensor>> {
        let group = head / (self.spec.heads / heads.max(1)).max(1);
        let part = |bias: &Tensor| engine(bias.narrow(0, group * self.head_width, self.head_width));
        layer.bias().map(part).transpose()
    }

    fn rotate(&self, x: Tensor, head: usize, skip: usize) -> Result<Tensor> {
        let Position::Rotary(rotary) = &self.position else {
            return Ok(x);
        };
        let length = engine(x.dim(1))?;
        let (cos, sin) = rotary.tables_of_head(head, skip, length, x.dtype(), x.device())?;
        let x = Signal::from(engine(x.contiguous())?);
        Ok(x.rotary(1, &cos, &sin, rotary.pairs())?.into_value())
    }

    /// `scale · q_a k_bᵀ` for each pair of parts.
    fn products(&self, q: &Tensor, k: &Tensor, a: usize, b: usize) -> Result<Matrix> {
        let part = |x: &Tensor, index: usize| -> Result<Matrix> {
            Ok(matrix_from_tensor(
                "queries and keys",
                &engine(x.get(index))?,
            )?)
        };
        let scale = self.scale;
        let product = part(q, a)? * part(k, b)?.transpose();
        Ok(Matrix::from_fn(product.nrows(), product.ncols(), |i, j| {
            scale * product[(i, j)]
        }))
    }
}

/// `x` `[parts, ..]` with `bias` added to its first part.
fn with_first(x: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let first = engine(engine(x.narrow(0, 0, 1))?.broadcast_add(bias))?;
    let rest = engine(x.narrow(0, 1, engine(x.dim(0))?.saturating_sub(1)))?;
    engine(Tensor::cat(&[first, rest], 0))
}

/// The blocks of scores of `head` in `block` on a kept context of `decomposition`, which must be
/// of what flows into that block; its first position is `skip`.
///
/// # Errors
/// When the block has no multi-head attention or normalises queries and keys, or the head or
/// context does not exist.
pub fn score_blocks(
    model: &Model,
    decomposition: &Decomposition,
    block: usize,
    head: usize,
    context: usize,
    skip: usize,
) -> Result<ScoreBlocks> {
    let projections = Projections::new(model, block)?;
    let heads = projections.spec.heads;
    if head >= heads {
        return Err(Error::invalid("head", head, format!("below {heads}")));
    }
    let hidden = decomposition.kept(context)?;
    let rest = decomposition.without_position(context)?;
    let residual = decomposition.residual(context)?;
    let (length, width) = (hidden.nrows(), hidden.ncols());
    let mean = Matrix::from_fn(length, width, |_, i| decomposition.mean[i]);
    let own = Matrix::from_fn(length, width, |_, i| decomposition.contexts[(context, i)]);
    let stack = |matrices: &[&Matrix]| -> Result<Tensor> {
        let mut tensors = Vec::with_capacity(matrices.len());
        for matrix in matrices {
            tensors.push(matrix_to_tensor(matrix.as_ref(), DType::F64, &Device::Cpu)?);
        }
        engine(Tensor::stack(&tensors, 0))
    };
    let parts = stack(&[&mean, &decomposition.positions, &own, &residual])?;
    let whole = engine(stack(&[hidden])?.squeeze(0))?;
    let parts = projections.normed_parts(&parts, &whole)?;

    // The bias goes with the first part, or with every one of several states.
    let of = |x: &Tensor, layer: &Linear, count: usize, first_only: bool| -> Result<Tensor> {
        let projected = projections.head(x, layer, count, head)?;
        let projected = match projections.bias(layer, count, head)? {
            Some(bias) if first_only => with_first(&projected, &bias)?,
            Some(bias) => engine(projected.broadcast_add(&bias))?,
            None => projected,
        };
        projections.rotate(projected, head, skip)
    };
    let groups = projections.spec.groups();
    let q = of(&parts, &projections.query, heads, true)?;
    let k = of(&parts, &projections.key, groups, true)?;
    let alone = stack(&[&decomposition.positions, &rest, hidden])?;
    let alone = match &projections.norm {
        Some(norm) => norm.forward(&Signal::from(alone))?.into_value(),
        None => alone,
    };
    let q_alone = of(&alone, &projections.query, heads, false)?;
    let k_alone = of(&alone, &projections.key, groups, false)?;
    Ok(ScoreBlocks {
        exact: blocks(|a, b| projections.products(&q, &k, a, b))?,
        total: projections.products(&q_alone, &k_alone, 2, 2)?,
        renormalised: blocks(|a, b| projections.products(&q_alone, &k_alone, a, b))?,
    })
}

/// A square of blocks.
fn blocks<const N: usize>(of: impl Fn(usize, usize) -> Result<Matrix>) -> Result<[[Matrix; N]; N]> {
    let mut all = [(); N].map(|()| [(); N].map(|()| Matrix::zeros(0, 0)));
    for (a, row) in all.iter_mut().enumerate() {
        for (b, block) in row.iter_mut().enumerate() {
            *block = of(a, b)?;
        }
    }
    Ok(all)
}
