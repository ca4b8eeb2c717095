//! What a mixer remembers between decoding steps.

use crate::error::tensor;
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
        /// `[batch, channels, state]`.
        state: Tensor,
    },
    /// Last inputs of a short convolution without a recurrence, `[batch, channels, taps − 1]`.
    Window(Tensor),
    /// Sums over features of earlier keys.
    Sums {
        /// `[batch, heads, features, value_width + 1]`, the last column that of the weights alone.
        sums: Tensor,
        /// Logarithm of the decay between the last token and the next, `[batch, heads, 1]`.
        decay: Option<Tensor>,
    },
    /// Keys and values of those tokens that later ones may still see.
    Kept {
        /// `[batch, kept, heads · head_width]`.
        keys: Tensor,
        /// `[batch, kept, heads · value_width]`.
        values: Tensor,
        /// Which tokens they are of, rising.
        places: Vec<usize>,
        /// Tokens so far.
        length: usize,
    },
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
    /// Tokens seen so far.
    pub length: usize,
}

impl DecodeState {
    /// An empty memory for a model of `blocks` blocks.
    pub fn new(blocks: usize) -> Self {
        Self {
            mixers: (0..blocks).map(|_| MixerState::Empty).collect(),
            length: 0,
        }
    }
}

/// Keys and values `[batch, length, groups · head_width]` in buffers that grow by doubling, so that
/// appending a token copies one token.
#[derive(Debug)]
pub struct KeyValueCache {
    keys: Tensor,
    values: Tensor,
    length: usize,
}

impl KeyValueCache {
    /// A cache that holds `keys` and `values`.
    pub fn new(keys: &Tensor, values: &Tensor) -> Result<Self> {
        let (_, length, _) = tensor(keys.dims3())?;
        let capacity = (length + 1).next_power_of_two().max(16);
        Ok(Self {
            keys: grow(keys, capacity)?,
            values: grow(values, capacity)?,
            length,
        })
    }

    /// Appends and gives all keys and values so far.
    pub fn append(&mut self, keys: &Tensor, values: &Tensor) -> Result<(Tensor, Tensor)> {
        let (batch, added, width) = tensor(keys.dims3())?;
        let length = self.length + added;
        let (known_batch, capacity, known_width) = tensor(self.keys.dims3())?;
        if (batch, width) != (known_batch, known_width) {
            return Err(Error::spec(
                "batch and width of the decode state",
                (known_batch, known_width),
                format!("{:?}, as in this pass", (batch, width)),
            ));
        }
        if length > capacity {
            let capacity = length.next_power_of_two();
            self.keys = grow(&tensor(self.keys.narrow(1, 0, self.length))?, capacity)?;
            self.values = grow(&tensor(self.values.narrow(1, 0, self.length))?, capacity)?;
        }
        tensor(
            self.keys
                .slice_set(&tensor(keys.contiguous())?, 1, self.length),
        )?;
        tensor(
            self.values
                .slice_set(&tensor(values.contiguous())?, 1, self.length),
        )?;
        self.length = length;
        Ok((
            tensor(self.keys.narrow(1, 0, length))?,
            tensor(self.values.narrow(1, 0, length))?,
        ))
    }
}

fn grow(x: &Tensor, capacity: usize) -> Result<Tensor> {
    let (batch, length, width) = tensor(x.dims3())?;
    let buffer = tensor(Tensor::zeros(
        (batch, capacity, width),
        x.dtype(),
        x.device(),
    ))?;
    tensor(buffer.slice_set(&tensor(x.detach().contiguous())?, 1, 0))?;
    debug_assert!(length <= capacity);
    Ok(buffer)
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
            Self::Kept { .. } => "keys and values of a pattern",
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
