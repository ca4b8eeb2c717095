//! Softmax over keys that stand where they are said to stand, and not one behind the other: what a
//! token may see is decided by its place, and several tokens may share one. Tokens of one place see
//! each other, so that a causal attention over places is causal from chunk to chunk.

use crate::error::tensor;
use crate::{Error, Result};
use lapidary_kernels::{
    AttentionOptions, DType, PartOptions, Tensor, attention_part, naive::repeat_groups,
};
use lapidary_signal::Mixing;

/// `softmax(scale · Q Kᵀ)` over the keys that the places leave.
#[derive(Debug)]
pub(super) struct ByPlace {
    sizes: [usize; 4],
    head_width: usize,
    q: Tensor,
    k: Tensor,
    options: PartOptions,
    /// Pairs of a query and a key that it sees, of one head, over the whole batch.
    pairs: u64,
}

impl ByPlace {
    /// Queries `[batch, heads, query, width]` over keys `[batch, groups, key, width]`, which stand at
    /// `places` `[batch, key]`; the queries are the last of them.
    pub(super) fn new(
        q: Tensor,
        k: Tensor,
        attention: AttentionOptions,
        places: &Tensor,
    ) -> Result<Self> {
        let (batch, heads, queries, head_width) = tensor(q.dims4())?;
        let keys = tensor(k.dim(2))?;
        if places.dims() != [batch, keys] || queries > keys {
            let expected = format!("[{batch}, {keys}]");
            return Err(Error::spec("shape of places", places.dims(), expected));
        }
        let asking = tensor(tensor(places.narrow(1, keys - queries, queries))?.contiguous())?;
        let pairs = pairs(&attention, places, queries)?;
        Ok(Self {
            sizes: [batch, heads, queries, keys],
            head_width,
            k: repeat_groups(&k, heads)?,
            q,
            options: PartOptions {
                positions: Some([asking, places.clone()]),
                ..PartOptions::new(attention)
            },
            pairs,
        })
    }
}

fn pairs(options: &AttentionOptions, places: &Tensor, queries: usize) -> Result<u64> {
    let rows = tensor(places.to_vec2::<u32>())?;
    let kept = match &options.key_padding {
        Some(keep) => tensor(tensor(keep.to_dtype(DType::U8))?.to_vec2::<u8>())?,
        None => rows.iter().map(|row| vec![1; row.len()]).collect(),
    };
    let mut pairs = 0;
    for (places, kept) in rows.iter().zip(&kept) {
        for query in places.iter().skip(places.len().saturating_sub(queries)) {
            let sees = |key: &u32| {
                !(options.causal && key > query)
                    && options
                        .window
                        .is_none_or(|window| (query.abs_diff(*key) as usize) < window)
            };
            let keys = places.iter().zip(kept);
            pairs += keys.filter(|(key, kept)| **kept != 0 && sees(key)).count() as u64;
        }
    }
    Ok(pairs)
}

impl Mixing for ByPlace {
    fn sizes(&self) -> [usize; 4] {
        self.sizes
    }

    fn mix(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        Ok(attention_part(&self.q, &self.k, values, &self.options)?.output)
    }

    fn operations(&self, width: usize) -> u64 {
        let [_, heads, ..] = self.sizes;
        self.pairs * heads as u64 * (2 * self.head_width + 2 * width + 5) as u64
    }
}
