//! `A = U ⊙ U` for the orthogonal factor of `M = U R`.
//!
//! Columns are made orthogonal to those before them one by one (Gram and Schmidt), each twice, which
//! leaves no more than rounding (Giraud et al., 2005). Written in differentiable operations, so that
//! the gradient is that of the factor.

use super::Scored;
use crate::Result;
use crate::error::tensor;
use lapidary_kernels::{DType, Tensor};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Variance of what is added to scores that have not full rank.
const NOISE: f64 = 1e-7;

/// `U ⊙ U` `[batch, heads, T, T]`, zero at pads. `seed` is that of the noise.
pub(super) fn squared(scores: &Tensor, scored: &Scored, seed: u64) -> Result<Tensor> {
    let full = scored.bordered(scores, 1.0)?;
    let (_, deficient) = orthonormal(&full.detach())?;
    let full = match deficient {
        None => full,
        Some(deficient) => {
            let noise = tensor(noise(&full, scored, seed)?.broadcast_as(full.dims()))?;
            let noise = scored.real(&noise)?;
            tensor(full + tensor(noise.broadcast_mul(&deficient))?)?
        }
    };
    let (factor, _) = orthonormal(&full)?;
    scored.real(&tensor(factor.sqr())?)
}

/// The orthogonal factor, and 1 for each matrix `[batch, heads, 1, 1]` that has not full rank, where
/// any has.
fn orthonormal(scores: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
    let (batch, heads, size, _) = tensor(scores.dims4())?;
    let least = size as f64
        * match scores.dtype() {
            DType::F64 => f64::EPSILON,
            _ => f64::from(f32::EPSILON),
        };
    let norm = |x: &Tensor| tensor(tensor(tensor(x.sqr())?.sum_keepdim(2))?.sqrt());
    let mut factor: Option<Tensor> = None;
    let mut deficient = vec![0f64; batch * heads];
    for column in 0..size {
        let given = tensor(tensor(scores.narrow(3, column, 1))?.contiguous())?;
        let mut rest = given.clone();
        if let Some(factor) = &factor {
            let across = tensor(tensor(factor.transpose(2, 3))?.contiguous())?;
            for _ in 0..2 {
                let along = tensor(factor.matmul(&tensor(across.matmul(&rest))?))?;
                rest = tensor(rest - along)?;
            }
        }
        let length = norm(&rest)?;
        let [before, after] = [norm(&given)?, length.clone()].map(|x| flat(&x));
        for (flag, (before, after)) in deficient.iter_mut().zip(before?.into_iter().zip(after?)) {
            if after <= least * before {
                *flag = 1.0;
            }
        }
        // Where nothing is left there is no direction.
        let length = tensor(length.maximum(f64::from(f32::MIN_POSITIVE)))?;
        let next = tensor(rest.broadcast_div(&length))?;
        factor = Some(match factor {
            None => next,
            Some(factor) => tensor(Tensor::cat(&[&factor, &next], 3))?,
        });
    }
    let flags = match deficient.iter().any(|flag| *flag > 0.0) {
        false => None,
        true => {
            let shape = (batch, heads, 1, 1);
            let flags = tensor(Tensor::from_vec(deficient, shape, scores.device()))?;
            Some(tensor(flags.to_dtype(scores.dtype()))?)
        }
    };
    Ok((factor.unwrap_or_else(|| scores.clone()), flags))
}

fn flat(x: &Tensor) -> Result<Vec<f64>> {
    let x = tensor(tensor(x.detach().to_dtype(DType::F64))?.flatten_all())?;
    tensor(x.to_vec1())
}

/// Normal numbers `[batch or 1, 1, T, T]`: those of the first real tokens are the same for every `T`, wherever pads are.
fn noise(like: &Tensor, scored: &Scored, seed: u64) -> Result<Tensor> {
    let size = like.dims().last().copied().unwrap_or(0);
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut normal = || {
        let radius = (-2.0 * NOISE * (1.0 - random.random::<f64>()).ln()).sqrt();
        radius * (std::f64::consts::TAU * random.random::<f64>()).cos()
    };
    let mut all = vec![0f64; size * size];
    for last in 0..size {
        for other in 0..=last {
            all[last * size + other] = normal();
            if other < last {
                all[other * size + last] = normal();
            }
        }
    }
    let places = places(scored, size)?;
    let each = places.iter().flat_map(|places| {
        let row = |row: usize| places.iter().map(move |column| row * size + column);
        places.iter().copied().flat_map(row)
    });
    let each = Vec::from_iter(each.map(|at| all[at]));
    let shape = (places.len(), 1, size, size);
    let noise = tensor(Tensor::from_vec(each, shape, like.device()))?;
    tensor(noise.to_dtype(like.dtype()))
}

/// Which of its real tokens each of a sequence's is, for every sequence or for all of them alike; of pads, whose rows and
/// columns do not count, any.
fn places(scored: &Scored, size: usize) -> Result<Vec<Vec<usize>>> {
    let Some(real) = &scored.real else {
        return Ok(vec![(0..size).collect()]);
    };
    let mut places = Vec::new();
    for sequence in flat(real)?.chunks(size.max(1)) {
        let mut before = 0;
        let place = |real: &f64| {
            let place = before;
            before += usize::from(*real != 0.0);
            place.min(size - 1)
        };
        places.push(sequence.iter().map(place).collect());
    }
    Ok(places)
}
