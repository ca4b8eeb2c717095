//! The map that turns what a block adds towards what it should add.

use lapidary_factor::{AffineMap, matrix_from_tensor};
use lapidary_kernels::{D, DType, Tensor};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::Rows;
use crate::error::engine;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// How the angle is made small: `T` starts as the identity and follows Adam (Kingma & Ba, arXiv
/// 1412.6980) on
///
/// ```text
/// E[1 − cos(M_t T, X_t − Y_t)]        or, when accurate,  E[1 − cos(M_t T + Y_t, X_t)]
/// ```
///
/// The first does not change when `T` is scaled: its length is what the descent from the identity
/// leaves of it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CosineDescent {
    /// Step size.
    pub rate: f64,
    /// Passes over the tokens.
    pub epochs: usize,
    /// Tokens of a step.
    pub batch: usize,
    /// Whether the whole stream's angle counts and not only that of what is added.
    pub accurate: bool,
}

impl Default for CosineDescent {
    fn default() -> Self {
        Self {
            rate: 1e-4,
            epochs: 10,
            batch: 1024,
            accurate: false,
        }
    }
}

const DECAYS: [f64; 2] = [0.9, 0.999];
const EPSILON: f64 = 1e-8;

/// Below this length a vector has no direction.
const SHORTEST: f64 = 1e-12;

pub(super) fn descend(rows: &Rows, choice: &CosineDescent, seed: u64) -> Result<AffineMap> {
    if !(choice.rate.is_finite() && choice.rate > 0.0) {
        return Err(Error::invalid(
            "rate of the descent",
            choice.rate,
            "above 0",
        ));
    }
    let exact = |tensor: &Tensor| engine(tensor.to_dtype(DType::F64));
    let (added, wanted, stream) = (
        exact(&rows.added)?,
        exact(&rows.wanted)?,
        exact(&rows.stream)?,
    );
    let (tokens, width) = engine(added.dims2())?;
    let mut map = engine(Tensor::eye(width, DType::F64, added.device()))?;
    let mut moments = [engine(map.zeros_like())?, engine(map.zeros_like())?];
    let mut order: Vec<u32> = (0..tokens as u32).collect();
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    let mut step = 0;
    for _ in 0..choice.epochs {
        order.shuffle(&mut generator);
        for chosen in order.chunks(choice.batch.max(1)) {
            let chosen = engine(Tensor::new(chosen, added.device()))?;
            let pick = |tensor: &Tensor| engine(tensor.index_select(&chosen, 0));
            let (m, r, y) = (pick(&added)?, pick(&wanted)?, pick(&stream)?);
            let offset = choice.accurate.then_some(&y);
            let (_, gradient) = loss_and_gradient(&map, &m, offset, &r)?;
            step += 1;
            map = adam(&map, &gradient, &mut moments, step, choice.rate)?;
        }
    }
    Ok(AffineMap {
        weight: matrix_from_tensor("map of a run of blocks", &map)?,
        bias: vec![0.0; width],
    })
}

/// `mean (1 − cos(m T [+ y], r [+ y]))` and its gradient by `T`.
fn loss_and_gradient(
    map: &Tensor,
    m: &Tensor,
    offset: Option<&Tensor>,
    r: &Tensor,
) -> Result<(f64, Tensor)> {
    let (mut a, mut b) = (engine(m.matmul(map))?, r.clone());
    if let Some(y) = offset {
        a = engine(&a + y)?;
        b = engine(&b + y)?;
    }
    let length = |x: &Tensor| -> Result<Tensor> {
        let squares = engine(engine(x.sqr())?.sum_keepdim(D::Minus1))?;
        engine(engine(squares.sqrt())?.maximum(SHORTEST))
    };
    let length_a = length(&a)?;
    let unit_a = engine(a.broadcast_div(&length_a))?;
    let unit_b = engine(b.broadcast_div(&length(&b)?))?;
    let cosine = engine(engine(&unit_a * &unit_b)?.sum_keepdim(D::Minus1))?;
    // ∂(1 − cos)/∂a = −(b̂ − cos â) / ‖a‖
    let along = engine(unit_a.broadcast_mul(&cosine))?;
    let by_a = engine(engine(&along - &unit_b)?.broadcast_div(&length_a))?;
    let tokens = engine(m.dim(0))?.max(1) as f64;
    let gradient = engine(engine(engine(m.t())?.matmul(&by_a))?.affine(1.0 / tokens, 0.0))?;
    let mean = engine(engine(cosine.mean_all())?.to_scalar::<f64>())?;
    Ok((1.0 - mean, gradient))
}

fn adam(
    map: &Tensor,
    gradient: &Tensor,
    moments: &mut [Tensor; 2],
    step: i32,
    rate: f64,
) -> Result<Tensor> {
    let [first, second] = moments;
    let mixed = |old: &Tensor, new: &Tensor, decay: f64| {
        engine(engine(old.affine(decay, 0.0))? + engine(new.affine(1.0 - decay, 0.0))?)
    };
    let [beta1, beta2] = DECAYS;
    *first = mixed(first, gradient, beta1)?;
    *second = mixed(second, &engine(gradient.sqr())?, beta2)?;
    let unbiased =
        |moment: &Tensor, decay: f64| engine(moment.affine(1.0 / (1.0 - decay.powi(step)), 0.0));
    let scale = engine(engine(unbiased(second, beta2)?.sqrt())?.affine(1.0, EPSILON))?;
    let change = engine(unbiased(first, beta1)? / scale)?;
    engine(map - engine(change.affine(rate, 0.0))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use lapidary_factor::Matrix;
    use lapidary_kernels::Device;
    use rand::RngExt;

    fn drawn(rows: usize, columns: usize, seed: u64) -> Tensor {
        let mut generator = ChaCha8Rng::seed_from_u64(seed);
        let numbers: Vec<f64> = (0..rows * columns)
            .map(|_| generator.random_range(-1.0..1.0))
            .collect();
        Tensor::from_vec(numbers, (rows, columns), &Device::Cpu).unwrap()
    }

    #[test]
    fn gradients_equal_central_differences() {
        let (m, r, y) = (drawn(7, 3, 1), drawn(7, 3, 2), drawn(7, 3, 3));
        let map = drawn(3, 3, 4);
        for offset in [None, Some(&y)] {
            let (_, gradient) = loss_and_gradient(&map, &m, offset, &r).unwrap();
            let gradient = gradient.flatten_all().unwrap().to_vec1::<f64>().unwrap();
            for (at, expected) in gradient.iter().enumerate() {
                let moved = |by: f64| {
                    let mut entries = map.flatten_all().unwrap().to_vec1::<f64>().unwrap();
                    entries[at] += by;
                    let map = Tensor::from_vec(entries, (3, 3), &Device::Cpu).unwrap();
                    loss_and_gradient(&map, &m, offset, &r).unwrap().0
                };
                let found = (moved(1e-6) - moved(-1e-6)) / 2e-6;
                assert!((found - expected).abs() < 1e-8, "{found} {expected}");
            }
        }
    }

    #[test]
    fn scale_counts_in_the_accurate_form_alone() {
        let (m, r, y) = (drawn(9, 3, 5), drawn(9, 3, 6), drawn(9, 3, 7));
        let map = drawn(3, 3, 8);
        let larger = (&map * 3.0).unwrap();
        let loss = |map: &Tensor, offset| loss_and_gradient(map, &m, offset, &r).unwrap().0;
        assert!((loss(&map, None) - loss(&larger, None)).abs() < 1e-12);
        assert!((loss(&map, Some(&y)) - loss(&larger, Some(&y))).abs() > 1e-3);
    }

    #[test]
    fn descent_finds_a_rotation_and_keeps_its_length_near_one() {
        let added = drawn(512, 4, 9);
        let turn = Tensor::new(
            &[
                [0.8f64, 0.6, 0.0, 0.0],
                [-0.6, 0.8, 0.0, 0.0],
                [0.0, 0.0, 1.0, 0.0],
                [0.0, 0.0, 0.0, 1.0],
            ],
            &Device::Cpu,
        )
        .unwrap();
        let wanted = added.matmul(&turn).unwrap();
        let rows = Rows {
            stream: added.zeros_like().unwrap(),
            added,
            wanted,
        };
        let choice = CosineDescent {
            rate: 1e-2,
            epochs: 60,
            batch: 128,
            accurate: false,
        };
        let map = descend(&rows, &choice, 1).unwrap();
        let again = descend(&rows, &choice, 1).unwrap();
        let turn = matrix_from_tensor("turn", &turn).unwrap();
        assert!((&map.weight - &again.weight).norm_max() == 0.0);
        // The objective sees the direction alone; its length is where the descent left it.
        let length = map.weight.norm_l2() / turn.norm_l2();
        let direction = Matrix::from_fn(4, 4, |i, j| map.weight[(i, j)] / length);
        assert!((&direction - &turn).norm_max() < 0.05, "{direction:?}");
        assert!((0.7..1.3).contains(&length), "{length}");
    }
}
