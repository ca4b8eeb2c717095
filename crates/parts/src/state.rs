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

/// Keys and values `[batch, length, groups · head_width]`, each appended to. Held once for as long as values are their
/// keys, as where one projection gives both.
#[derive(Debug)]
pub struct KeyValueCache(Buffers);

impl KeyValueCache {
    /// A cache that holds `keys` and `values`: once where they are one tensor.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn new(keys: &Tensor, values: &Tensor) -> Result<Self> {
        let buffers = match keys.id() == values.id() {
            true => Buffers::new(&[keys])?,
            false => Buffers::new(&[keys, values])?,
        };
        Ok(Self(buffers))
    }

    /// Appends and gives all keys and values so far.
    ///
    /// # Errors
    /// When they are of other sequences or widths than those held.
    pub fn append(&mut self, keys: &Tensor, values: &Tensor) -> Result<(Tensor, Tensor)> {
        if self.is_single() {
            if keys.id() == values.id() {
                self.0.append(&[keys])?;
                let all = self.0.all(0)?;
                return Ok((all.clone(), all));
            }
            // Values that somebody changed: from here on they are others than keys.
            let earlier = self.0.all(0)?;
            self.0 = Buffers::new(&[&earlier, &earlier])?;
        }
        self.0.append(&[keys, values])?;
        Ok((self.0.all(0)?, self.0.all(1)?))
    }

    /// Whether one tensor is both.
    pub fn is_single(&self) -> bool {
        self.0.sorts() == 1
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

#[cfg(test)]
mod tests {
    use super::*;
    use lapidary_kernels::{DType, Device};

    /// `[2, length, 3]`, numbers that rise from `first`.
    fn rows(first: f64, length: usize) -> Tensor {
        let numbers = (0..6 * length).map(|at| first + at as f64).collect();
        Tensor::from_vec::<_, f64>(numbers, (2, length, 3), &Device::Cpu).unwrap()
    }

    fn same(a: &Tensor, b: &Tensor) -> bool {
        let numbers = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        a.dims() == b.dims() && numbers(a) == numbers(b)
    }

    #[test]
    fn values_that_are_keys_are_held_once() {
        let (first, second) = (rows(0.0, 20), rows(200.0, 1));
        let mut cache = KeyValueCache::new(&first, &first.clone()).unwrap();
        assert!(cache.is_single());
        let (keys, values) = cache.append(&second, &second).unwrap();
        assert!(cache.is_single());
        let expected = Tensor::cat(&[&first, &second], 1).unwrap();
        assert!(same(&keys, &expected) && same(&values, &expected));
        // The same numbers in another tensor are values of their own.
        let copy = first.copy().unwrap();
        assert!(!KeyValueCache::new(&first, &copy).unwrap().is_single());
    }

    #[test]
    fn values_that_differ_later_are_held_from_then_on() {
        let (first, key, value) = (rows(0.0, 3), rows(50.0, 1), rows(90.0, 1));
        let mut cache = KeyValueCache::new(&first, &first).unwrap();
        cache.append(&key, &value).unwrap();
        assert!(!cache.is_single());
        let last = Tensor::zeros((2, 1, 3), DType::F64, &Device::Cpu).unwrap();
        let (keys, values) = cache.append(&last, &last).unwrap();
        assert!(same(
            &keys,
            &Tensor::cat(&[&first, &key, &last], 1).unwrap()
        ));
        assert!(same(
            &values,
            &Tensor::cat(&[&first, &value, &last], 1).unwrap()
        ));
        let wider = Tensor::zeros((2, 1, 4), DType::F64, &Device::Cpu).unwrap();
        assert!(cache.append(&wider, &wider).is_err());
    }
}
