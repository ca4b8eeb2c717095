//! Sums over both directions, along one or two orders of the tokens, and over the past.

use super::{EPSILON, LionForm};
use crate::attention::mechanism::decayed::{self, by_feature};
use lapidary_kernels::{
    Direction, Tensor, beside_ones, cumulative_sum, decayed_attention,
    decayed_attention_operations, matmul, quotients,
};
use lapidary_signal::Mixing;

/// An order of positions and the way back.
#[derive(Clone, Debug)]
pub(super) struct Order {
    pub(super) along: Tensor,
    pub(super) back: Tensor,
}

/// Sums over both directions along each of some curves, averaged, or over the past, divided by the sums of the
/// weights.
#[derive(Debug)]
pub(super) struct Curves {
    /// `[batch, heads, length, features]`.
    pub(super) q: Tensor,
    /// As `q`, zero at pads.
    pub(super) k: Tensor,
    /// `log λ` `[batch, heads, length, 1 or features]` by token, and the order of the tokens; no
    /// curve where nothing decays.
    pub(super) curves: Vec<(Tensor, Option<Order>)>,
    /// Whether there is the past alone, of one curve.
    pub(super) causal: bool,
    pub(super) form: LionForm,
    pub(super) chunk: usize,
    /// Operations of what stands before the sums.
    pub(super) before: u64,
}

fn along(x: &Tensor, order: Option<&Order>) -> lapidary_kernels::Result<Tensor> {
    match order {
        None => Ok(x.clone()),
        Some(order) => Ok(x.contiguous()?.index_select(&order.along, 2)?),
    }
}

fn back(x: &Tensor, order: Option<&Order>, dim: usize) -> lapidary_kernels::Result<Tensor> {
    match order {
        None => Ok(x.clone()),
        Some(order) => Ok(x.contiguous()?.index_select(&order.back, dim)?),
    }
}

impl Curves {
    /// `M` of one curve, `[batch, heads, query, key]` in the order of the tokens; one for all
    /// features.
    fn mask(log_decay: &Tensor, order: Option<&Order>) -> lapidary_kernels::Result<Tensor> {
        let log_decay = along(log_decay, order)?.squeeze(3)?;
        let length = log_decay.dim(2)?;
        // e_i = Σ_{t ≤ i} log λ_t and c_i = Σ_{t < i} log λ_t.
        let through = cumulative_sum(&log_decay, 2)?;
        let until = (&through - &log_decay)?;
        let differences = |of: &Tensor| of.unsqueeze(3)?.broadcast_sub(&of.unsqueeze(2)?);
        // exp(c_i − c_j) on and below the diagonal, exp(e_j − e_i) above; the other halves grow.
        let past = differences(&until)?.minimum(0.0)?.exp()?;
        let future = differences(&through)?.neg()?.minimum(0.0)?.exp()?;
        let below = Tensor::tril2(length, log_decay.dtype(), log_decay.device())?;
        let above = below.affine(-1.0, 1.0)?;
        let mask = (past.broadcast_mul(&below)? + future.broadcast_mul(&above)?)?;
        back(&back(&mask, order, 2)?, order, 3)
    }

    /// The sums `[batch, heads, query, width + 1]`, those of the weights last.
    fn laid_out(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        let mut scores = matmul(&self.q, &self.k.transpose(2, 3)?)?;
        let mut masks = None;
        for (log_decay, order) in &self.curves {
            let mask = Self::mask(log_decay, order.as_ref())?;
            masks = Some(match masks {
                None => mask,
                Some(masks) => (masks + mask)?,
            });
        }
        if let Some(masks) = masks {
            scores = (scores * (masks / self.curves.len() as f64)?)?;
        }
        matmul(&scores, &beside_ones(values)?)
    }

    /// The past and the future of one curve, what a position has of itself counted once:
    /// `[batch, heads, query, width + 1]`.
    fn directions(
        &self,
        values: &Tensor,
        log_decay: &Tensor,
        order: Option<&Order>,
    ) -> lapidary_kernels::Result<Tensor> {
        let [q, k, v] = [&self.q, &self.k, values].map(|x| along(x, order));
        let (q, k, v, decay) = (q?, k?, v?, along(log_decay, order)?);
        if !by_feature(&decay) {
            let sums = decayed_attention(&q, &k, &v, &decay.squeeze(3)?, self.causal, self.chunk)?;
            return back(&sums, order, 2);
        }
        let v = beside_ones(&v)?;
        let length = decay.dim(2)?;
        // a_i = log λ_{i−1} on the past, log λ_i on the future.
        let before = decay.narrow(2, 0, length - 1)?.pad_with_zeros(2, 1, 0)?;
        let sums =
            |decay: &Tensor, direction| decayed::sums([&q, &k, &v], decay, direction, self.chunk);
        let both = (sums(&before, Direction::Past)? + sums(&decay, Direction::Future)?)?;
        let own = (&q * &k)?.sum_keepdim(3)?.broadcast_mul(&v)?;
        back(&(both - own)?, order, 2)
    }

    /// The sums `[batch, heads, query, width + 1]` of all curves.
    fn sums(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        if self.form == LionForm::Parallel && !self.causal {
            return self.laid_out(values);
        }
        let mut total: Option<Tensor> = None;
        for (log_decay, order) in &self.curves {
            let sums = self.directions(values, log_decay, order.as_ref())?;
            total = Some(match total {
                None => sums,
                Some(total) => (total + sums)?,
            });
        }
        let total = total.map_or_else(|| beside_ones(&values.zeros_like()?), Ok)?;
        match self.curves.len() {
            0 | 1 => Ok(total),
            curves => Ok((total / curves as f64)?),
        }
    }
}

impl Mixing for Curves {
    fn sizes(&self) -> [usize; 4] {
        match *self.q.dims() {
            [batch, heads, length, _] => [batch, heads, length, length],
            _ => [0; 4],
        }
    }

    fn mix(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        quotients(&self.sums(values)?, EPSILON)
    }

    fn operations(&self, width: usize) -> u64 {
        let [batch, heads, length, _] = self.sizes();
        let features = self.q.dims().last().copied().unwrap_or(0);
        let curves = self.curves.len() as u64;
        // The weights are summed as if there were a value more.
        let (n, summed) = (length as u64, width as u64 + 1);
        let each = features as u64 + summed;
        let sums = match self.form {
            // Both halves of a mask and their sum, with an exponential each.
            LionForm::Parallel if !self.causal => n * n * (2 * each + 8 * curves),
            LionForm::Parallel | LionForm::Recurrent | LionForm::Chunked { .. } => {
                let is_by_feature = self.curves.iter().any(|(decay, _)| by_feature(decay));
                curves
                    * match is_by_feature {
                        false => decayed_attention_operations(
                            length,
                            features,
                            width,
                            self.causal,
                            self.chunk,
                        ),
                        true => {
                            let widths = [features, width + 1];
                            let one = decayed::operations(true, length, widths, self.chunk);
                            2 * one + n * (2 * each + 2 * summed)
                        }
                    }
            }
        };
        // With the division.
        self.before + (batch * heads) as u64 * (sums + n * summed)
    }
}
