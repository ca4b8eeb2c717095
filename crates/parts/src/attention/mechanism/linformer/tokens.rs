//! Tokens that are projected along the sequence before keys and values are made of them.
//!
//! ```text
//! E (X W_K + 1 bᵀ) = (E X) W_K + (E 1) bᵀ
//! ```
//!
//! Keys of `k` slots then take `2 k n width` for the projection and `2 k width · inner` for the layer, in the place of
//! `2 n width · inner` and `2 k n · inner`.

use super::side::{Counted, Side};
use super::{Linformer, Met, Projection, Run, Sharing, side_by_side};
use crate::Result;
use crate::attention::mechanism::Shortening;
use crate::error::tensor;
use lapidary_kernels::Tensor;
use lapidary_signal::Mixing;

/// `E X`, all features of a token by the same weights.
#[derive(Debug)]
struct Projected {
    side: Side,
    batch: usize,
    tokens: usize,
    counted: Counted,
}

impl Mixing for Projected {
    fn sizes(&self) -> [usize; 4] {
        [self.batch, 1, self.side.slots, self.tokens]
    }

    fn mix(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        self.side.project(values, &self.counted)
    }

    fn operations(&self, width: usize) -> u64 {
        (2 * self.batch * self.side.meets() * self.tokens * width) as u64
    }
}

impl Linformer {
    /// What makes slots of `tokens` in each of `batch` sequences.
    pub(super) fn projections(
        &self,
        [batch, tokens]: [usize; 2],
        keep: Option<&Tensor>,
    ) -> Option<Shortening> {
        // Heads with fewer slots have the first of them.
        let widest = self.runs.iter().max_by_key(|run| run.keys.slots)?;
        let of = |side: &Side| -> Box<dyn Mixing> {
            Box::new(Projected {
                side: side.clone(),
                batch,
                tokens,
                counted: Counted::real(keep),
            })
        };
        let same = matches!(self.spec.sharing, Sharing::KeyValue | Sharing::Layerwise)
            || self.spec.projection == Projection::Mean;
        Some(Shortening {
            keys: of(&widest.keys),
            values: (!same).then(|| of(&widest.values)),
            sites: &["slot_weights", "key_weights"],
        })
    }

    /// Attention of `q` `[batch, heads, query, head_width]` over the keys `k` of slots.
    pub(super) fn over_slots(&self, q: &Tensor, k: &Tensor) -> Result<OverSlots> {
        let (batch, heads, queries, head_width) = tensor(q.dims4())?;
        let slots = tensor(k.dim(2))?;
        let met = self.runs.iter().map(|run| {
            Ok(Met {
                run: run.clone(),
                q: run.of(q)?,
                keys: first_slots(run, k)?,
            })
        });
        Ok(OverSlots {
            sizes: [batch, heads, queries, slots],
            head_width,
            scale: self.scale,
            met: met.collect::<Result<_>>()?,
        })
    }
}

/// Those of `x` `[batch, heads, slot, ..]` that a run of heads has.
fn first_slots(run: &Run, x: &Tensor) -> lapidary_kernels::Result<Tensor> {
    Ok(run.of(x)?.narrow(2, 0, run.keys.slots)?.contiguous()?)
}

/// `softmax(scale · Q Kᵀ)` of values of slots.
#[derive(Debug)]
pub(super) struct OverSlots {
    /// `[batch, heads, query, slot]`.
    sizes: [usize; 4],
    head_width: usize,
    scale: f64,
    met: Vec<Met>,
}

impl Mixing for OverSlots {
    fn sizes(&self) -> [usize; 4] {
        self.sizes
    }

    fn mix(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        side_by_side(&self.met, self.head_width, self.scale, |run| {
            first_slots(run, values)
        })
    }

    fn operations(&self, width: usize) -> u64 {
        let [batch, _, queries, _] = self.sizes;
        let each = self.met.iter().map(|Met { run, .. }| {
            run.heads * queries * run.keys.slots * (2 * (self.head_width + width) + 5)
        });
        (batch * each.sum::<usize>()) as u64
    }
}
