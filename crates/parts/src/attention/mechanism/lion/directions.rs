//! Sums over both directions, along one or two orders of the tokens.

use super::LionForm;
use crate::attention::mechanism::decayed::{self, by_feature};
use crate::attention::mechanism::sums::Sums;
use lapidary_kernels::{Direction, Tensor, cumulative_sum, matmul};

/// An order of positions and the way back.
#[derive(Clone, Debug)]
pub(super) struct Order {
    pub(super) along: Tensor,
    pub(super) back: Tensor,
}

/// Sums over both directions along each of some curves, averaged.
#[derive(Debug)]
pub(super) struct Curves {
    /// `[batch, heads, length, features]`.
    pub(super) q: Tensor,
    /// As `q`, zero at pads.
    pub(super) k: Tensor,
    /// `log λ` `[batch, heads, length, 1 or features]` by token, and the order of the tokens; no
    /// curve where nothing decays.
    pub(super) curves: Vec<(Tensor, Option<Order>)>,
    pub(super) form: LionForm,
    pub(super) chunk: usize,
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
        matmul(&scores, values)
    }

    /// The past and the future of one curve, what a position has of itself counted once.
    fn directions(
        &self,
        values: &Tensor,
        log_decay: &Tensor,
        order: Option<&Order>,
    ) -> lapidary_kernels::Result<Tensor> {
        let [q, k, v] = [&self.q, &self.k, values].map(|x| along(x, order));
        let (q, k, v, decay) = (q?, k?, v?, along(log_decay, order)?);
        let length = decay.dim(2)?;
        // a_i = log λ_{i−1} on the past, log λ_i on the future.
        let before = decay.narrow(2, 0, length - 1)?.pad_with_zeros(2, 1, 0)?;
        let sums =
            |decay: &Tensor, direction| decayed::sums([&q, &k, &v], decay, direction, self.chunk);
        let both = (sums(&before, Direction::Past)? + sums(&decay, Direction::Future)?)?;
        let own = (&q * &k)?.sum_keepdim(3)?.broadcast_mul(&v)?;
        back(&(both - own)?, order, 2)
    }
}

impl Sums for Curves {
    fn sizes(&self) -> [usize; 4] {
        match *self.q.dims() {
            [batch, heads, length, _] => [batch, heads, length, length],
            _ => [0; 4],
        }
    }

    fn sums(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        if self.form == LionForm::Parallel {
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
        let total = total.map_or_else(|| values.zeros_like(), Ok)?;
        Ok((total / self.curves.len().max(1) as f64)?)
    }

    fn operations(&self, width: usize) -> u64 {
        let [batch, heads, length, _] = self.sizes();
        let features = self.q.dims().last().copied().unwrap_or(0);
        let curves = self.curves.len() as u64;
        let (n, each) = (length as u64, (features + width) as u64);
        let one = match self.form {
            // Both halves of a mask and their sum, with an exponential each.
            LionForm::Parallel => n * n * (2 * each + 8 * curves),
            LionForm::Recurrent | LionForm::Chunked { .. } => {
                let by_feature = self.curves.iter().any(|(decay, _)| by_feature(decay));
                let direction =
                    decayed::operations(by_feature, length, [features, width], self.chunk);
                curves * (2 * direction + n * (2 * each + 2 * width as u64))
            }
        };
        (batch * heads) as u64 * one
    }
}
