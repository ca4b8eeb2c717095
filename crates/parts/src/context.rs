//! What a module is told about the pass it runs in.

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
    /// What cross-attention reads: `[batch, length, width]` and its padding.
    pub memory: Option<(&'a Signal, Option<&'a Tensor>)>,
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
            memory: None,
        }
    }
}
