//! What a mixer remembers between decoding steps.

mod buffers;
mod kept;

pub use buffers::Buffers;
pub use kept::Kept;

use crate::attention::mechanism::{RefinedMemory, SpanMemory};
use crate::organisation::fit::GroupMemory;
use crate::{Error, Result};
use lapidary_kernels::Tensor;

/// The memory of one mixer.
#[derive(Debug, Default)]
pub enum MixerState {
    /// Nothing yet.
    #[default]
    Empty,
    /// Keys and values of every token so far.
    Cache(KeyValueCache),
    /// The state of a recurrence.
    Recurrent {
        /// Last inputs of the short convolution, `[batch, channels, taps − 1]`.
        window: Tensor,
        /// `[batch, channels, state]`; of heads, `[batch, heads, state, head_width]`.
        state: Tensor,
    },
    /// Last inputs of a short convolution without a recurrence, `[batch, channels, taps − 1]`.
    Window(Tensor),
    /// Sums over features of earlier keys.
    Sums {
        /// `[batch, heads, features, value_width + 1]`, the last column that of the weights alone.
        sums: Tensor,
        /// Logarithm of the decay between the last token and the next,
        /// `[batch, heads, 1, 1 or features]`.
        decay: Option<Tensor>,
    },
    /// Keys and values of those tokens that later ones may still see.
    Kept(Kept),
    /// Summaries of spans of earlier tokens.
    Spans(SpanMemory),
    /// The same for blocks, and which of them are refined.
    Refined(RefinedMemory),
    /// Keys and values of every token so far, and where they were hashed to.
    Hashed {
        /// Keys and values.
        cache: KeyValueCache,
        /// The bucket of every token in each round of each head, token by token.
        buckets: Vec<u32>,
    },
}

/// The memory of a whole model.
#[derive(Debug, Default)]
pub struct DecodeState {
    /// One for each block.
    pub mixers: Vec<MixerState>,
    /// What groups of tokens are kept as, where tokens are organised so.
    pub groups: GroupMemory,
    /// Tokens seen so far.
    pub length: usize,
}

impl DecodeState {
    /// An empty memory for a model of `blocks` blocks.
    pub fn new(blocks: usize) -> Self {
        Self {
            mixers: (0..blocks).map(|_| MixerState::Empty).collect(),
            groups: GroupMemory::default(),
            length: 0,
        }
    }
}

/// Keys and values `[batch, length, groups · head_width]`, each appended to.
#[derive(Debug)]
pub struct KeyValueCache(Buffers);

impl KeyValueCache {
    /// A cache that holds `keys` and `values`.
    pub fn new(keys: &Tensor, values: &Tensor) -> Result<Self> {
        Buffers::new(&[keys, values]).map(Self)
    }

    /// Appends and gives all keys and values so far.
    pub fn append(&mut self, keys: &Tensor, values: &Tensor) -> Result<(Tensor, Tensor)> {
        self.0.append(&[keys, values])?;
        Ok((self.0.all(0)?, self.0.all(1)?))
    }
}

impl MixerState {
    /// What is remembered, in words.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Empty => "nothing",
            Self::Cache(_) => "keys and values",
            Self::Recurrent { .. } => "the state of a recurrence",
            Self::Window(_) => "the window of a convolution",
            Self::Sums { .. } => "sums over keys",
            Self::Kept(_) => "keys and values of a pattern",
            Self::Spans(_) => "summaries of spans",
            Self::Refined(_) => "means of blocks",
            Self::Hashed { .. } => "hashed keys and values",
        }
    }

    /// Appends keys and values to the cache, starting it when empty, and gives all so far.
    pub fn cache(&mut self, keys: &Tensor, values: &Tensor) -> Result<(Tensor, Tensor)> {
        match self {
            Self::Empty => {
                *self = Self::Cache(KeyValueCache::new(keys, values)?);
                Ok((keys.clone(), values.clone()))
            }
            Self::Cache(cache) => cache.append(keys, values),
            other => Err(Error::spec("decode state", other.name(), "keys and values")),
        }
    }
}
