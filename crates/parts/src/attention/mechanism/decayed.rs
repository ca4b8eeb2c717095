//! Sums over features that fade with the distance, all of them alike or each by itself.
//!
//! ```text
//! past:    y_i = Σ_{j ≤ i} Σ_f q_if k_jf e^{a_{j+1,f} + … + a_if} v_j
//! future:  y_i = Σ_{j ≥ i} Σ_f q_if k_jf e^{a_{i+1,f} + … + a_jf} v_j
//! ```
//!
//! Where all features of a head fade alike this is a kernel. Where they do not (Yang et al., Gated Linear
//! Attention Transformers with Hardware-Efficient Training, 2023, arXiv 2312.06635, for the past), no factor
//! stands before the whole product, and `e^{a_1 + …} k / e^{a_1 + …}` would leave the range of numbers. So a
//! chunk is cut in half, and the halves again: between two halves that meet in the middle `m`,
//!
//! ```text
//! Σ_f (q_if e^{a_mf + … + a_if}) (k_jf e^{a_{j+1,f} + … + a_{m−1,f}}),   j < m ≤ i,
//! ```
//!
//! in which both exponents are sums of logarithms of decays, none of them positive. What lies before the chunk is
//! read from the state `S = Σ_j e^{…} k_j v_jᵀ`, `[features, value_width]`, which is carried from chunk to
//! chunk; a chunk of one position is the recurrence.
//!
//! Cost for each head of `n` positions in chunks of `c`, a power of two: `n (c + 1) (features + value_width)`
//! and `4 n features · value_width`. Nothing of the size of positions times state is laid out.

use lapidary_kernels::{
    Direction, Result, Tensor, cumulative_sum, linear_attention_in_chunks, matmul,
    operations_in_chunks,
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
    if !by_feature(decay) {
        let decay = decay.squeeze(3)?;
        return linear_attention_in_chunks(q, k, v, Some(&decay), direction, chunk);
    }
    let given = Given {
        q: q.clone(),
        k: k.clone(),
        v: v.clone(),
        decay: decay.clone(),
    };
    match direction {
        Direction::Past => given.past(chunk),
        // Read backwards it is the past, where `a_i` stands between a position and the one before it.
        Direction::Future => {
            let turned = given.each(backwards)?;
            let between = turned.decay.dim(2)?.saturating_sub(1);
            let decay = turned.decay.narrow(2, 0, between)?;
            let turned = Given {
                decay: decay.pad_with_zeros(2, 1, 0)?,
                ..turned
            };
            backwards(&turned.past(chunk)?)
        }
    }
}

/// Multiplications and additions of [`sums`] for one head with `[features, value_width]`, those of decays
/// left out.
pub(super) fn operations(by_feature: bool, length: usize, widths: [usize; 2], chunk: usize) -> u64 {
    let [features, width] = widths;
    if !by_feature {
        return operations_in_chunks(length, features, width, chunk);
    }
    let [length, chunk] = cut(length, chunk).map(|size| size as u64);
    let [features, width] = widths.map(|width| width as u64);
    // A position with itself, and half of them with as many others on each level.
    let pairs = length * (chunk + 1) / 2;
    2 * pairs * (features + width) + 4 * length * features * width
}

/// Positions, filled up to whole chunks, and those of a chunk.
fn cut(length: usize, chunk: usize) -> [usize; 2] {
    let chunk = chunk.clamp(1, length.max(1)).next_power_of_two();
    [length.next_multiple_of(chunk), chunk]
}

/// The positions of `x` `[batch, heads, length, ..]` from the last to the first.
fn backwards(x: &Tensor) -> Result<Tensor> {
    let length = x.dim(2)?;
    let order: Vec<u32> = (0..length as u32).rev().collect();
    let order = Tensor::from_vec(order, length, x.device())?;
    Ok(x.contiguous()?.index_select(&order, 2)?)
}

/// What is summed over, `[batch, heads, length, ..]` each.
struct Given {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
}

impl Given {
    fn each(&self, of: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self {
            q: of(&self.q)?,
            k: of(&self.k)?,
            v: of(&self.v)?,
            decay: of(&self.decay)?,
        })
    }

    fn past(&self, chunk: usize) -> Result<Tensor> {
        let length = self.q.dim(2)?;
        if length == 0 {
            return Ok(self.v.clone());
        }
        let [padded, chunk] = cut(length, chunk);
        // Queries and keys of zero behind the last position, which give and get nothing.
        let filled = self.each(|x| Ok(x.pad_with_zeros(2, 0, padded - length)?))?;
        let within = filled.within(chunk)?;
        let all = match chunk < padded {
            true => (within + filled.across(padded, chunk)?)?,
            false => within,
        };
        Ok(all.narrow(2, 0, length)?)
    }

    /// What positions of a chunk get from each other.
    fn within(&self, chunk: usize) -> Result<Tensor> {
        let own = (&self.q * &self.k)?.sum_keepdim(3)?;
        let mut sums = own.broadcast_mul(&self.v)?;
        let mut half = 1;
        while half < chunk {
            sums = (sums + self.between_halves(half)?)?;
            half *= 2;
        }
        Ok(sums)
    }

    /// What later halves of blocks of two times `half` positions get from the earlier ones.
    fn between_halves(&self, half: usize) -> Result<Tensor> {
        let [q, decay] = [&self.q, &self.decay].map(|x| part(x, half, 1));
        let [k, v, before] = [&self.k, &self.v, &self.decay].map(|x| part(x, half, 0));
        let read = (q? * cumulative_sum(&decay?, 1)?.exp()?)?;
        let kept = (k? * fading(&before?, 1)?)?;
        let met = matmul(&matmul(&read, &kept.transpose(1, 2)?)?, &v?)?;
        // Earlier halves get nothing.
        let both = met.unsqueeze(1)?.pad_with_zeros(1, 1, 0)?;
        Ok(both.reshape(self.v.shape())?)
    }

    /// What positions get from the chunks before their own.
    fn across(&self, length: usize, chunk: usize) -> Result<Tensor> {
        let mut state: Option<Tensor> = None;
        let mut found = Vec::with_capacity(length / chunk);
        for start in (0..length).step_by(chunk) {
            let here = self.each(|x| Ok(x.narrow(2, start, chunk)?.contiguous()?))?;
            let reach = cumulative_sum(&here.decay, 2)?;
            found.push(match &state {
                None => here.v.zeros_like()?,
                Some(state) => matmul(&(&here.q * reach.exp()?)?, state)?,
            });
            let kept = (&here.k * fading(&here.decay, 2)?)?;
            let added = matmul(&kept.transpose(2, 3)?, &here.v)?;
            state = Some(match state {
                None => added,
                Some(state) => {
                    let through = reach.narrow(2, chunk - 1, 1)?.exp()?.transpose(2, 3)?;
                    (state.broadcast_mul(&through)? + added)?
                }
            });
        }
        Ok(Tensor::cat(&found, 2)?)
    }
}

/// The earlier (0) or later (1) halves of blocks of positions, `[blocks, half, width]`.
fn part(x: &Tensor, half: usize, which: usize) -> Result<Tensor> {
    let (batch, heads, length, width) = x.dims4()?;
    let blocks = batch * heads * length / (2 * half);
    let blocks = x.contiguous()?.reshape((blocks, 2, half, width))?;
    Ok(blocks.narrow(1, which, 1)?.squeeze(1)?.contiguous()?)
}

/// `e^{a_{j+1} + … + a_n}` of each of `n` positions along a dimension.
fn fading(decay: &Tensor, dim: usize) -> Result<Tensor> {
    let sums = cumulative_sum(decay, dim)?;
    let last = sums.narrow(dim, sums.dim(dim)?.saturating_sub(1), 1)?;
    Ok(last.broadcast_sub(&sums)?.exp()?)
}
