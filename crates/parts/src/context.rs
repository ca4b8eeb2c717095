//! What a module is told about the pass it runs in.

use std::sync::Arc;

use crate::Result;
use crate::decisions::Decisions;
use crate::position::SharedBiases;
use lapidary_kernels::Tensor;
use lapidary_signal::{Signal, Trace};

/// Everything a forward pass hands to each module beside the signal.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    /// Sites go through here.
    pub trace: &'a Trace,
    /// `[batch, key]` in `u8`, 1 = a real token. Covers cached keys too.
    pub key_padding: Option<&'a Tensor>,
    /// Number of tokens that were decoded before these.
    pub offset: usize,
    /// Seed of this step's dropout, or `None` when evaluating. A mask depends on the seed and
    /// the site alone, so that recomputing a block draws the same one.
    pub dropout_seed: Option<u64>,
    /// Seed of what this pass draws anew: subsets of keys, random features, rotations of hashes.
    /// `None`: each module's own draw, always the same.
    pub draw: Option<u64>,
    /// The step of training that this pass is part of, for draws that last several steps.
    pub step: Option<u64>,
    /// How far a pass that draws is on the way from the subsets of keys that mixers say to all of them: 0
    /// at the start, 1 where nothing is left out.
    pub annealing: f64,
    /// What cross-attention reads: `[batch, length, width]` and its padding.
    pub memory: Option<(&'a Signal, Option<&'a Tensor>)>,
    /// What self-attention adds to every score of a key, `[batch, key]`; differentiated. A token
    /// that stands for `n` others, say, has `ln n`. For softmax, which has scores.
    pub key_bias: Option<&'a Tensor>,
    /// Where tokens stand, `[batch, token]` in `u32`, where that is not one behind the other: what
    /// causality, windows and buckets of distances in self-attention go by. Tokens that stand at
    /// one place see each other. Covers cached keys too.
    pub places: Option<&'a Tensor>,
    /// Biases of scores that layers share, computed once in this pass; by each layer when absent.
    pub biases: Option<&'a SharedBiases>,
    /// Where a part that is recomputed put its tokens when it ran first.
    pub decisions: Option<&'a Decisions>,
}

impl<'a> Context<'a> {
    /// Evaluation without padding, from the first token.
    pub fn new(trace: &'a Trace) -> Self {
        Self {
            trace,
            key_padding: None,
            offset: 0,
            dropout_seed: None,
            draw: None,
            step: None,
            annealing: 0.0,
            memory: None,
            key_bias: None,
            places: None,
            biases: None,
            decisions: None,
        }
    }

    /// What `decide` gives, or gave when this part ran first, under a name.
    pub(crate) fn decided(
        &self,
        name: &str,
        decide: impl FnOnce() -> Result<Vec<u32>>,
    ) -> Result<Arc<Vec<u32>>> {
        match self.decisions {
            Some(decisions) => decisions.once(name, decide),
            None => Ok(Arc::new(decide()?)),
        }
    }
}
