//! Sums over features that fade with the distance, all of them alike or each by itself.
//!
//! ```text
//! past:    y_i = Σ_{j ≤ i} Σ_f q_if k_jf e^{a_{j+1,f} + … + a_if} v_j
//! future:  y_i = Σ_{j ≥ i} Σ_f q_if k_jf e^{a_{i+1,f} + … + a_jf} v_j
//! ```
//!
//! Both are kernels that carry the state `S = Σ_j e^{…} k_j v_jᵀ`, `[features, value_width]`, from chunk to chunk;
//! a chunk of one position is the recurrence.
//!
//! Cost for each head of `n` positions in chunks of `c`: where features fade alike
//! `2 n (c (features + value_width) + 2 features · value_width)`, where each fades by itself
//! `n (c + 1) (features + value_width) + 4 n features · value_width`. Nothing of the size of positions times state is
//! laid out.

use lapidary_kernels::{
    Direction, Result, Tensor, linear_attention_by_feature, linear_attention_in_chunks,
    operations_by_feature, operations_in_chunks,
};

/// Whether features have decays `[batch, heads, length, features]` of their own.
pub(super) fn by_feature(decay: &Tensor) -> bool {
    decay.dims().last().is_some_and(|features| *features > 1)
}

/// The sums `[batch, heads, length, value_width]` for queries and keys `[batch, heads, length, features]`,
/// values, and the logarithms `a` of decays, `[batch, heads, length, 1 or features]`.
pub(super) fn sums(
    [q, k, v]: [&Tensor; 3],
    decay: &Tensor,
    direction: Direction,
    chunk: usize,
) -> Result<Tensor> {
    match by_feature(decay) {
        true => linear_attention_by_feature(q, k, v, decay, direction, chunk),
        false => {
            let decay = decay.squeeze(3)?;
            linear_attention_in_chunks(q, k, v, Some(&decay), direction, chunk)
        }
    }
}

/// Multiplications and additions of [`sums`] for one head with `[features, value_width]`, those of decays
/// left out.
pub(super) fn operations(by_feature: bool, length: usize, widths: [usize; 2], chunk: usize) -> u64 {
    let [features, width] = widths;
    match by_feature {
        true => operations_by_feature(length, features, width, chunk),
        false => operations_in_chunks(length, features, width, chunk),
    }
}
