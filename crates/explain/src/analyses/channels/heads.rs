//! The matrices of attention heads, with the norm before them folded in.

use crate::error::engine;
use crate::{Error, Result};
use lapidary_factor::{Matrix, matrix_from_tensor};
use lapidary_kernels::{DType, Tensor};
use lapidary_model::{Model, ModelSpec};
use lapidary_parts::attention::{MixerSpec, MultiHeadSpec};
use lapidary_parts::block::BlockSpec;
use lapidary_parts::norm::NormSpec;
use lapidary_parts::organisation::OrganisationSpec;
use lapidary_parts::position::PositionSpec;
use std::fmt;

/// A head of self-attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HeadId {
    /// Index of the block.
    pub block: usize,
    /// Index of the query head.
    pub head: usize,
}

impl fmt::Display for HeadId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.block, self.head)
    }
}

/// One head's matrices for row vectors of the residual stream, `γ` of the norm before the head
/// folded into those that read. Behind a layer norm nothing along the all-ones direction is
/// seen: what reads has it taken out, and so has what writes where every norm is a layer norm.
#[derive(Clone, Debug)]
pub struct Head {
    /// Which head.
    pub id: HeadId,
    /// `W_Q` `[width, head_width]`.
    pub query: Matrix,
    /// `W_K` `[width, head_width]`, of the group that the head reads.
    pub key: Matrix,
    /// `W_V` `[width, value_width]`, of the group that the head reads.
    pub value: Matrix,
    /// `W_O` `[value_width, width]`.
    pub output: Matrix,
    /// `b_V + β W_V` `[value_width]`: what is mixed whatever the head looks at.
    pub constant: Vec<f64>,
}

/// The heads of a pre-norm model.
#[derive(Debug)]
pub struct Heads<'a> {
    model: &'a Model,
    blocks: Vec<BlockSpec>,
    centred: bool,
}

impl<'a> Heads<'a> {
    /// The heads of `model`.
    ///
    /// # Errors
    /// When a block normalises after its parts (there is no norm to fold into the heads), blocks have
    /// two streams, or no block has heads.
    pub fn of(model: &'a Model) -> Result<Self> {
        crate::error::require_written_out(model, "channels")?;
        if let Some(organisation @ OrganisationSpec::Reversible(_)) = &model.spec().organisation {
            return Err(Error::invalid(
                "organisation of the model",
                organisation.kind(),
                "another for channels: no head reads the stream that heads write to",
            ));
        }
        let blocks = model.spec().expanded_blocks();
        for (index, block) in blocks.iter().enumerate() {
            if block.shortcuts {
                return Err(Error::invalid(
                    format!("shortcuts of block {index}"),
                    true,
                    "false: heads are composed as if they read what was written",
                ));
            }
            if let Some(peculiarity) = multi_head(block).and_then(MultiHeadSpec::peculiarity) {
                return Err(Error::invalid(
                    format!("attention of block {index}"),
                    peculiarity,
                    "softmax with projections of its own: channels are products of queries and keys",
                ));
            }
            if !block.wiring.adds() {
                return Err(Error::invalid(
                    format!("wiring of block {index}"),
                    block.wiring.name(),
                    "pre-norm or parallel: channels are read off weights before which a norm \
                     stands; to see what heads tell each other here, use decompx",
                ));
            }
        }
        let heads = Self {
            model,
            centred: is_centred(model.spec()),
            blocks,
        };
        if heads.ids().is_empty() {
            let expected = "at least 1, of multi-head attention over tokens";
            return Err(Error::invalid("heads of the model", 0, expected));
        }
        Ok(heads)
    }

    /// The model.
    pub fn model(&self) -> &'a Model {
        self.model
    }

    /// Whether what heads write has its mean taken out, as every norm is a layer norm.
    pub fn is_centred(&self) -> bool {
        self.centred
    }

    /// Every head, block after block. Blocks without attention have none.
    pub fn ids(&self) -> Vec<HeadId> {
        let of = |(block, spec): (usize, &BlockSpec)| {
            let heads = multi_head(spec).map_or(0, |spec| spec.heads);
            (0..heads).map(move |head| HeadId { block, head })
        };
        self.blocks.iter().enumerate().flat_map(of).collect()
    }

    /// The matrices of one head, in `f64`.
    ///
    /// # Errors
    /// When there is no such head, or a weight is not finite.
    pub fn head(&self, id: HeadId) -> Result<Head> {
        let (block, spec) = self.spec(id)?;
        let width = self.model.spec().width;
        let (head_width, value_width) = (spec.head_width(width), spec.value_width(width));
        let group = id.head / (spec.heads / spec.groups().max(1)).max(1);
        let path = |name: &str| format!("blocks.{}.attention.{name}", id.block);
        let gamma = self.norm_weight(id.block)?;
        // [size, width]
        let raw = |name: &str, index: usize, size: usize| -> Result<Tensor> {
            let weight = dense(self.model, &path(name))?;
            engine(engine(weight.narrow(0, index * size, size))?.to_dtype(DType::F64))
        };
        let reading = |name: &str, index: usize, size: usize| -> Result<Matrix> {
            let mut weight = raw(name, index, size)?;
            if let Some(gamma) = &gamma {
                weight = engine(weight.broadcast_mul(gamma))?;
            }
            if matches!(block.norm, NormSpec::Layer { .. }) {
                weight = engine(weight.broadcast_sub(&engine(weight.mean_keepdim(1))?))?;
            }
            matrix(&engine(weight.t())?)
        };
        let output = dense(self.model, &path("output"))?; // [width, heads · value_width]
        let output = engine(output.narrow(1, id.head * value_width, value_width))?;
        let mut output = engine(engine(output.t())?.to_dtype(DType::F64))?;
        if self.centred {
            output = engine(output.broadcast_sub(&engine(output.mean_keepdim(1))?))?;
        }
        Ok(Head {
            id,
            query: reading("query", id.head, head_width)?,
            key: reading("key", group, head_width)?,
            value: reading("value", group, value_width)?,
            output: matrix(&output)?,
            constant: self.constant(
                id.block,
                &raw("value", group, value_width)?,
                group * value_width,
            )?,
        })
    }

    /// `b_V + β W_V`, for the rows of `W_V` from `start` on.
    fn constant(&self, block: usize, value: &Tensor, start: usize) -> Result<Vec<f64>> {
        let value_width = engine(value.dim(0))?;
        let parameters = self.model.parameters();
        let mut constant = engine(Tensor::zeros(value_width, DType::F64, value.device()))?;
        if let Some(beta) = parameters.get(&format!("blocks.{block}.attention_norm.bias")) {
            let beta = engine(engine(beta.to_dtype(DType::F64))?.unsqueeze(1))?;
            constant = engine(engine(value.matmul(&beta))?.squeeze(1))?;
        }
        if let Some(bias) = parameters.get(&format!("blocks.{block}.attention.value.bias")) {
            let bias = engine(engine(bias.narrow(0, start, value_width))?.to_dtype(DType::F64))?;
            constant = engine(constant + bias)?;
        }
        engine(constant.to_vec1::<f64>())
    }

    fn norm_weight(&self, block: usize) -> Result<Option<Tensor>> {
        let name = format!("blocks.{block}.attention_norm.weight");
        let weight = self.model.parameters().get(&name);
        weight.map(|w| engine(w.to_dtype(DType::F64))).transpose()
    }

    fn spec(&self, id: HeadId) -> Result<(&BlockSpec, &MultiHeadSpec)> {
        let block = self.blocks.get(id.block);
        let found = block.and_then(|block| Some((block, multi_head(block)?)));
        let found = found.filter(|(_, spec)| id.head < spec.heads);
        found.ok_or_else(|| {
            let all = self.ids();
            let ends = all.first().zip(all.last());
            let expected = ends.map_or(String::new(), |(a, b)| format!("from {a} to {b}"));
            Error::invalid("head", id, expected)
        })
    }

    /// What the matrices leave out of the heads' scores.
    pub fn notes(&self) -> Vec<String> {
        let specs = || self.blocks.iter().filter_map(multi_head);
        let mut notes = Vec::new();
        let rotary = |spec: &MultiHeadSpec| matches!(spec.position, PositionSpec::Rotary(_));
        if specs().any(rotary) {
            notes.push(
                "rotary positions: queries and keys meet before they are turned, as at distance 0"
                    .to_owned(),
            );
        }
        if specs().any(|spec| spec.query_key_norm.is_some()) {
            notes.push("queries and keys meet before their own norm".to_owned());
        }
        if !self.centred {
            notes.push("not every norm is a layer norm: writes keep their mean".to_owned());
        }
        notes
    }
}

/// The attention of a block, when it has heads.
pub(super) fn multi_head(block: &BlockSpec) -> Option<&MultiHeadSpec> {
    match &block.attention {
        MixerSpec::MultiHead(spec) => Some(spec),
        MixerSpec::Mamba(_) | MixerSpec::Mamba2(_) | MixerSpec::Wavelet(_) | MixerSpec::Absent => {
            None
        }
    }
}

/// Whether every reader of the residual stream takes its mean out.
pub(super) fn is_centred(spec: &ModelSpec) -> bool {
    let layer = |norm: &NormSpec| matches!(norm, NormSpec::Layer { .. });
    spec.blocks.iter().all(|block| layer(&block.norm))
        && spec.final_norm.as_ref().is_some_and(layer)
}

/// The weight `[output, input]` of a linear layer, its factors multiplied out.
pub(super) fn dense(model: &Model, path: &str) -> Result<Tensor> {
    let get = |name: &str| model.parameters().get(&format!("{path}.{name}"));
    if let Some(weight) = get("weight") {
        return Ok(weight.clone());
    }
    match (get("up"), get("down")) {
        (Some(up), Some(down)) => engine(up.matmul(down)),
        _ => Err(Error::invalid(
            path,
            "no layer",
            "a linear layer of the model",
        )),
    }
}

pub(super) fn matrix(tensor: &Tensor) -> Result<Matrix> {
    Ok(matrix_from_tensor("a head's weight", tensor)?)
}
