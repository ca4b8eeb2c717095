//! Which blocks are seen in full.

use super::VccSpec;
use crate::Context;
use crate::Result;
use crate::block::Block;
use crate::dropout::seed_of_site;
use crate::error::tensor;
use lapidary_kernels::{DType, Tensor};
use lapidary_signal::Signal;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How the blocks that are seen in full are chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Selection {
    /// Those that the VIP tokens attend to, by this block's own norm, queries and keys.
    #[default]
    Attention,
    /// At random, the same ones in every pass that is not told to draw anew. To compare with.
    Random,
}

/// The blocks of a batch in the order of their importance, and how much each has.
#[derive(Debug)]
pub(super) struct Chosen {
    /// `π`, `[batch, blocks]`: 0 for blocks without a real token.
    pub(super) importance: Tensor,
    /// The blocks of each sequence, those to be seen in full first.
    pub(super) ranking: Vec<Vec<usize>>,
}

impl Chosen {
    /// Every block alike, in order.
    pub(super) fn all(keep: &Tensor, dtype: DType) -> Result<Self> {
        let (batch, blocks) = tensor(keep.dims2())?;
        let alike = Tensor::full(1.0 / blocks.max(1) as f64, (batch, blocks), keep.device());
        Ok(Self {
            importance: tensor(tensor(alike)?.to_dtype(dtype))?,
            ranking: vec![(0..blocks).collect(); batch],
        })
    }
}

/// Chooses among blocks with these `means` `[batch, blocks, width]`.
pub(super) fn choose(
    block: &Block,
    spec: &VccSpec,
    (vips, shares): (&Signal, &Tensor),
    (means, keep): (&Signal, &Tensor),
    cx: &Context<'_>,
) -> Result<Chosen> {
    let (vips, means) = (vips.for_selection(), means.for_selection());
    let received = block
        .received(&vips, &means, shares, Some(keep))?
        .into_value();
    let kept = tensor(keep.to_vec2::<u8>())?;
    let scores = tensor(tensor(received.to_dtype(DType::F64))?.to_vec2::<f64>())?;
    let own = seed_of_site(0, block.path());
    let seed = cx.draw.map_or(own, |draw| seed_of_site(draw, block.path()));
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut ranking = Vec::with_capacity(scores.len());
    for (scores, kept) in scores.iter().zip(&kept) {
        let mut blocks: Vec<usize> = (0..scores.len()).collect();
        let explores = cx.draw.is_some() && random.random_bool(spec.exploration);
        if explores || spec.selection == Selection::Random {
            blocks.shuffle(&mut random);
        } else {
            let score = |block: usize| scores.get(block).copied().unwrap_or(0.0);
            blocks.sort_by(|a, b| score(*b).total_cmp(&score(*a)));
        }
        // Stable: blocks of pads alone come last.
        blocks.sort_by_key(|block| kept.get(*block).copied().unwrap_or(0) == 0);
        ranking.push(blocks);
    }
    // π = softmax(ln score) = score / Σ score; nothing where no VIP looks, and no gradient there either, which a quotient by
    // next to nothing would make infinite.
    let total = tensor(received.sum_keepdim(1))?;
    let unseen = tensor(tensor(total.detach().eq(0.0))?.to_dtype(total.dtype()))?;
    let total = tensor(total + unseen)?;
    Ok(Chosen {
        importance: tensor(received.broadcast_div(&total))?,
        ranking,
    })
}
