//! What linear attentions share: weighted sums over keys, divided by the sum of the weights.
//!
//! ```text
//! y_i = Σ_j w_ij v_j / (Σ_j w_ij + ε)
//! ```
//!
//! Where nothing fuses both, numerator and denominator are the same [`Sums`], of values and of a column of
//! ones beside them.
//! A decoding step adds to both what a state of fixed size kept of earlier keys.

use std::fmt;

use super::decayed::{self, by_feature};
use super::{MechanismPass, Resumed};
use crate::error::tensor;
use crate::state::MixerState;
use crate::{Error, Result};
use lapidary_kernels::{
    DType, Direction, Tensor, beside_ones, causal_linear_means, cumulative_sum,
    linear_attention_in_chunks, linear_means, matmul, quotients,
};
use lapidary_signal::Mixing;

/// `Σ_j w_ij v_j`.
pub(super) trait Sums: fmt::Debug {
    /// `[batch, heads, queries, keys]`.
    fn sizes(&self) -> [usize; 4];

    /// `[batch, heads, query, width]`, for values `[batch, heads, key, width]`.
    fn sums(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor>;

    /// [`Sums::sums`] of values, divided by the sum of the weights and `epsilon`, or by 1 where that is 0.
    fn means(&self, values: &Tensor, epsilon: f64) -> lapidary_kernels::Result<Tensor> {
        quotients(&self.sums(&beside_ones(values)?)?, epsilon)
    }

    /// Multiplications and additions of [`Sums::sums`] for values of `width`.
    fn operations(&self, width: usize) -> u64;
}

/// Sums whose keys can be forgotten once they are in a state `[batch, heads, features, width]`.
pub(super) trait Remembered: Sums {
    /// What the queries find in the state of earlier keys, `[batch, heads, query, width]`.
    fn read(&self, state: &Tensor) -> lapidary_kernels::Result<Tensor>;

    /// The state behind these keys and `values`, after that of earlier ones.
    fn remember(
        &self,
        values: &Tensor,
        earlier: Option<&Tensor>,
    ) -> lapidary_kernels::Result<Tensor>;
}

/// `[heads, components]`: attentions of components of heads, which are averaged with these weights. Every head is
/// one where there are none.
#[derive(Debug)]
pub(super) struct Components(pub(super) Option<Tensor>);

impl Components {
    /// Values `[batch, heads, key, width]` for every component.
    pub(super) fn spread(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        let Some(weights) = &self.0 else {
            return Ok(values.clone());
        };
        let (batch, heads, keys, width) = values.dims4()?;
        let components = weights.dim(1)?;
        let each = values.unsqueeze(2)?;
        let each = each.broadcast_as((batch, heads, components, keys, width))?;
        Ok(each.reshape((batch, heads * components, keys, width))?)
    }

    /// `[batch, heads, queries, keys]`, where heads are components.
    pub(super) fn averaged_sizes(&self, [batch, heads, queries, keys]: [usize; 4]) -> [usize; 4] {
        let heads = match &self.0 {
            None => heads,
            Some(weights) => weights.dims().first().copied().unwrap_or(heads),
        };
        [batch, heads, queries, keys]
    }

    /// Operations of dividing sums of `width` whose heads are components, and of averaging these.
    pub(super) fn operations(&self, sizes: [usize; 4], width: usize) -> u64 {
        let [batch, heads, queries, _] = sizes.map(|size| size as u64);
        let each = if self.0.is_some() { 3 } else { 1 };
        batch * heads * queries * (each * width as u64 + 1)
    }

    /// `y` `[batch, heads · components, query, width]`, components averaged.
    pub(super) fn averaged(&self, y: Tensor) -> lapidary_kernels::Result<Tensor> {
        let Some(weights) = &self.0 else {
            return Ok(y);
        };
        let (batch, all, queries, width) = y.dims4()?;
        let (heads, components) = weights.dims2()?;
        let y = y.reshape((batch, heads, components, queries * width))?;
        debug_assert_eq!(all, heads * components);
        let y = y.broadcast_mul(&weights.reshape((1, heads, components, 1))?)?;
        Ok(y.sum(2)?.reshape((batch, heads, queries, width))?)
    }
}

/// Sums divided by the sum of their weights.
#[derive(Debug)]
pub(super) struct Normalised<S> {
    pub sums: S,
    /// Added to the denominator.
    pub epsilon: f64,
    /// What the heads of the sums are components of.
    pub components: Components,
    /// Operations of what stands before the sums.
    pub before: u64,
    /// What earlier keys add to the denominator, `[batch, heads, query, 1]`.
    pub past: Option<Tensor>,
}

impl<S> Normalised<S> {
    pub(super) fn new(sums: S, epsilon: f64, before: u64) -> Self {
        Self {
            sums,
            epsilon,
            components: Components(None),
            before,
            past: None,
        }
    }

    /// The denominator of sums whose last column is that of the ones. Where no weight is left, the
    /// numerator is zero and the denominator one.
    fn denominator(&self, sums: &Tensor) -> lapidary_kernels::Result<Tensor> {
        let last = sums.dim(3)?.saturating_sub(1);
        let mut total = sums.narrow(3, last, 1)?;
        if let Some(past) = &self.past {
            total = (total + past)?;
        }
        let total = (total + self.epsilon)?;
        let vanishes = total.eq(0.0)?.to_dtype(total.dtype())?;
        Ok((total + vanishes)?)
    }

    /// All but the last column of `sums`, divided, components averaged.
    fn divide(&self, sums: &Tensor, by: &Tensor) -> lapidary_kernels::Result<Tensor> {
        let width = sums.dim(3)?.saturating_sub(1);
        let y = sums.narrow(3, 0, width)?.broadcast_div(by)?;
        self.components.averaged(y)
    }
}

/// A column of ones for every row of `x`, `[.., 1]`.
fn ones(x: &Tensor) -> lapidary_kernels::Result<Tensor> {
    let (batch, heads, rows, _) = x.dims4()?;
    Ok(Tensor::ones(
        (batch, heads, rows, 1),
        x.dtype(),
        x.device(),
    )?)
}

impl<S: Sums> Mixing for Normalised<S> {
    fn sizes(&self) -> [usize; 4] {
        self.components.averaged_sizes(self.sums.sizes())
    }

    fn mix(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        if self.past.is_none() {
            let values = self.components.spread(values)?;
            let y = self.sums.means(&values, self.epsilon)?;
            return self.components.averaged(y);
        }
        let values = self.components.spread(&beside_ones(values)?)?;
        let sums = self.sums.sums(&values)?;
        self.divide(&sums, &self.denominator(&sums)?)
    }

    fn operations(&self, width: usize) -> u64 {
        let after = self.components.operations(self.sums.sizes(), width);
        self.before + self.sums.operations(width + 1) + after
    }
}

/// The sums of earlier tokens in a decode state, and the logarithm of the decay that follows them.
pub(super) fn earlier(state: &MixerState, path: &str) -> Result<Option<(Tensor, Option<Tensor>)>> {
    match state {
        MixerState::Empty => Ok(None),
        MixerState::Sums { sums, decay } => Ok(Some((sums.clone(), decay.clone()))),
        _ => Err(Error::spec(
            format!("decode state at {path}"),
            "that of another mixer",
            "sums over earlier keys",
        )),
    }
}

/// The mixing of a step after the tokens in `state`, which then holds those of the step too.
/// `decay` is what stands between them and the next, as [`MixerState::Sums`] keeps it.
pub(super) fn resume<S: Remembered + 'static>(
    step: Normalised<S>,
    v: &Tensor,
    state: &mut MixerState,
    decay: Option<Tensor>,
    pass: &MechanismPass<'_>,
) -> Result<Resumed> {
    let before = earlier(state, pass.path)?.map(|(sums, _)| sums);
    let values = step.components.spread(&beside_ones(v)?)?;
    let after = step.sums.remember(&values, before.as_ref())?;
    if let Some(before) = before.as_ref().filter(|sums| sums.dims() != after.dims()) {
        return Err(Error::spec(
            format!("shape of the decode state at {}", pass.path),
            before.dims(),
            format!("{:?}", after.dims()),
        ));
    }
    let (step, past) = match &before {
        None => {
            let (batch, heads, _, width) = tensor(v.dims4())?;
            let [.., queries, _] = step.sums.sizes();
            let shape = (batch, heads, queries, width);
            let nothing = tensor(Tensor::zeros(shape, v.dtype(), v.device()))?;
            (step, nothing)
        }
        Some(before) => {
            let read = step.sums.read(before)?;
            let last = tensor(read.dim(3))?.saturating_sub(1);
            let step = Normalised {
                past: Some(tensor(read.narrow(3, last, 1))?),
                ..step
            };
            let within = step.sums.sums(&ones(&values)?)?;
            let past = step.divide(&read, &step.denominator(&within)?)?;
            (step, past)
        }
    };
    *state = MixerState::Sums {
        sums: after.detach(),
        decay: decay.map(|decay| decay.detach()),
    };
    Ok(Resumed::Summed {
        mixing: Box::new(step),
        past,
    })
}

/// The mask of the last `keys` keys as numbers of `dtype`, `[batch, 1, key, 1]`: those that a pass
/// itself brings.
pub(super) fn kept(pass: &MechanismPass<'_>, keys: usize, dtype: DType) -> Result<Option<Tensor>> {
    let Some(kept) = pass.kept(dtype)? else {
        return Ok(None);
    };
    let earlier = tensor(kept.dim(2))?.saturating_sub(keys);
    Ok(Some(tensor(kept.narrow(2, earlier, keys))?))
}

/// `w_ij = φ(q_i) · φ(k_j)`, under a causal mask with a decay between `j` and `i`.
#[derive(Debug)]
pub(super) struct Features {
    /// `[batch, heads, query, features]`.
    pub q: Tensor,
    /// `[batch, heads, key, features]`, zero at pads.
    pub k: Tensor,
    pub causal: bool,
    /// `a` `[batch, heads, length, 1 or features]`, where `w_ij`, or each feature's part of it, has
    /// the factor `e^{a_{j+1} + … + a_i}`; under a causal mask alone.
    pub log_decay: Option<Tensor>,
    /// Positions that meet directly under a causal mask.
    pub chunk: usize,
}

impl Features {
    fn width(&self) -> usize {
        self.q.dims().last().copied().unwrap_or(0)
    }
}

/// `kᵀ v`, `[batch, heads, features, width]`.
fn collected(k: &Tensor, v: &Tensor) -> lapidary_kernels::Result<Tensor> {
    matmul(&k.transpose(2, 3)?, v)
}

impl Sums for Features {
    fn sizes(&self) -> [usize; 4] {
        match (self.q.dims(), self.k.dims()) {
            ([batch, heads, queries, _], [_, _, keys, _]) => [*batch, *heads, *queries, *keys],
            _ => [0; 4],
        }
    }

    fn sums(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        let given = [&self.q, &self.k, values];
        match (self.causal, &self.log_decay) {
            (false, _) => {}
            (true, None) => {
                let [q, k, v] = given;
                return linear_attention_in_chunks(q, k, v, None, Direction::Past, self.chunk);
            }
            (true, Some(decay)) => {
                return decayed::sums(given, decay, Direction::Past, self.chunk);
            }
        }
        matmul(&self.q, &collected(&self.k, values)?)
    }

    /// Without a column of ones, where no decay asks for one.
    fn means(&self, values: &Tensor, epsilon: f64) -> lapidary_kernels::Result<Tensor> {
        let (q, k) = (&self.q, &self.k);
        match (self.causal, &self.log_decay) {
            (false, _) => linear_means(q, k, values, epsilon),
            (true, None) => causal_linear_means(q, k, values, epsilon, self.chunk),
            (true, Some(_)) => quotients(&self.sums(&beside_ones(values)?)?, epsilon),
        }
    }

    fn operations(&self, width: usize) -> u64 {
        let [batch, heads, queries, keys] = self.sizes();
        let by_feature = self.log_decay.as_ref().is_some_and(by_feature);
        let widths = [self.width(), width];
        let each = match self.causal {
            true => decayed::operations(by_feature, queries, widths, self.chunk),
            false => 2 * ((queries + keys) * self.width() * width) as u64,
        };
        (batch * heads) as u64 * each
    }
}

impl Remembered for Features {
    fn read(&self, state: &Tensor) -> lapidary_kernels::Result<Tensor> {
        match &self.log_decay {
            None => matmul(&self.q, state),
            Some(decay) => {
                // e^{a_0 + … + a_i}
                let reach = cumulative_sum(decay, 2)?.exp()?;
                matmul(&self.q.broadcast_mul(&reach)?, state)
            }
        }
    }

    fn remember(
        &self,
        values: &Tensor,
        earlier: Option<&Tensor>,
    ) -> lapidary_kernels::Result<Tensor> {
        let Some(decay) = &self.log_decay else {
            let here = collected(&self.k, values)?;
            return Ok(match earlier {
                None => here,
                Some(earlier) => (here + earlier)?,
            });
        };
        let sums = cumulative_sum(decay, 2)?;
        let last = sums.narrow(2, sums.dim(2)?.saturating_sub(1), 1)?;
        // e^{a_{j+1} + … + a_n}
        let fades = last.broadcast_sub(&sums)?.exp()?;
        let here = collected(&self.k.broadcast_mul(&fades)?, values)?;
        match earlier {
            None => Ok(here),
            Some(earlier) => {
                let faded = earlier.broadcast_mul(&last.exp()?.transpose(2, 3)?)?;
                Ok((here + faded)?)
            }
        }
    }
}
