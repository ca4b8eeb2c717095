//! Values whose backward pass is a rule of its own, not a derivative.
//!
//! Relevance propagation sends a quantity backward that is no gradient. The tensor engine carries
//! it all the same when each operation's backward pass is replaced: a factor on what comes back
//! ([`scale_gradient`]), a detour past an operation ([`pass_gradient`]), or shares of a sum
//! ([`balanced_sum`]).

use crate::backward::Apply;
use crate::host::{self, Host, by_dtype, fused};
use crate::simd::Real;
use crate::{Error, Result, Tensor, naive};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Shape, WithDType};

type Candle<T> = candle_core::Result<T>;

/// `x` in value; what comes back is multiplied by `factor`, of the same shape.
///
/// # Errors
/// When the shapes differ.
pub fn scale_gradient(x: &Tensor, factor: &Tensor) -> Result<Tensor> {
    same_shape("scale_gradient", "factor", factor, x)?;
    let factor = factor.detach();
    if !fused(&[x]) {
        return naive::scale_gradient(x, &factor);
    }
    Ok(x.apply1(Ruled {
        value: None,
        rule: move |gradient: &Tensor| gradient * &factor,
    })?)
}

/// `value`, of the shape of `x`; what comes back goes to `x` unchanged.
///
/// # Errors
/// When the shapes differ.
pub fn pass_gradient(x: &Tensor, value: &Tensor) -> Result<Tensor> {
    same_shape("pass_gradient", "value", value, x)?;
    if !fused(&[x, value]) {
        return naive::pass_gradient(x, value);
    }
    Ok(x.apply1(Ruled {
        value: Some(value.detach()),
        rule: |gradient: &Tensor| Ok(gradient.clone()),
    })?)
}

/// `1 / (z + ε sign z)`, and `at_zero` where `z` is zero; no gradient. Denominators too small for
/// `f32` give 0.
///
/// # Errors
/// Those of the tensor engine.
pub fn stabilised_reciprocal(z: &Tensor, epsilon: f64, at_zero: f64) -> Result<Tensor> {
    if !fused(&[z]) {
        return naive::stabilised_reciprocal(z, epsilon, at_zero);
    }
    Ok(reciprocal(z, epsilon, at_zero)?)
}

fn reciprocal(z: &Tensor, epsilon: f64, at_zero: f64) -> Candle<Tensor> {
    let host = Host::new(z);
    by_dtype!(z.dtype(), T => {
        host::tensor(reciprocals::<T>(&host.ordered::<T>()?, epsilon, at_zero), z.dims())
    })
}

fn reciprocals<T: Real>(z: &[T], epsilon: f64, at_zero: f64) -> Vec<T> {
    let (epsilon, at_zero) = (T::of(epsilon), T::of(at_zero));
    let least = T::of(f64::from(f32::MIN_POSITIVE));
    let one = |z: &T| {
        let negative = *z < T::zero();
        let denominator = if negative { *z - epsilon } else { *z + epsilon };
        match *z == T::zero() {
            true => at_zero,
            false if Real::abs(denominator) < least => T::zero(),
            false => T::one() / denominator,
        }
    };
    z.iter().map(one).collect()
}

/// `a + b`, of one shape whose first dimension counts samples. What comes back, `R`, is shared by
/// `a R / (a + b)` and `b R / (a + b)`, and then so that the sums over a sample are in the ratio
/// of their magnitudes and add up to that of `R` (Chefer et al., arXiv 2012.09838, section 3.2):
///
/// `a ← a · |Σa| / (|Σa| + |Σb|) · ΣR / Σa`
///
/// A quotient whose denominator is zero is zero; other denominators are pushed from it by
/// `epsilon`.
///
/// # Errors
/// When the shapes differ or have no dimension.
pub fn balanced_sum(a: &Tensor, b: &Tensor, epsilon: f64) -> Result<Tensor> {
    same_shape("balanced_sum", "b", b, a)?;
    if a.rank() == 0 || !fused(&[a, b]) {
        let expected = "numbers of one type in memory, with a first dimension for samples";
        return Err(Error::argument("balanced_sum", "a", a, expected));
    }
    let value = (a + b)?.detach();
    Ok(a.apply2(b, BalancedSum { value, epsilon })?)
}

fn same_shape(
    kernel: &'static str,
    argument: &'static str,
    found: &Tensor,
    as_in: &Tensor,
) -> Result<()> {
    if found.dims() == as_in.dims() {
        return Ok(());
    }
    let expected = format!("{:?}", as_in.dims());
    Err(Error::argument(kernel, argument, found.dims(), expected))
}

/// A ready value and what its backward pass does.
struct Ruled<F> {
    /// The argument's own when absent.
    value: Option<Tensor>,
    rule: F,
}

impl<F: Fn(&Tensor) -> Candle<Tensor> + Send + Sync> CustomOp1 for Ruled<F> {
    fn name(&self) -> &'static str {
        "relevance rule"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Candle<(CpuStorage, Shape)> {
        match &self.value {
            Some(value) => copied(value),
            None => by_dtype!(host::dtype(x), T => {
                let values = host::ordered::<T>(x, layout)?.into_owned();
                Ok((T::to_cpu_storage_owned(values), layout.shape().clone()))
            }),
        }
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, gradient: &Tensor) -> Candle<Option<Tensor>> {
        (self.rule)(gradient).map(Some)
    }
}

fn copied(value: &Tensor) -> Candle<(CpuStorage, Shape)> {
    let host = Host::new(value);
    by_dtype!(value.dtype(), T => {
        let values = host.ordered::<T>()?.into_owned();
        Ok((T::to_cpu_storage_owned(values), value.shape().clone()))
    })
}

struct BalancedSum {
    value: Tensor,
    epsilon: f64,
}

impl CustomOp2 for BalancedSum {
    fn name(&self) -> &'static str {
        "balanced sum"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        copied(&self.value)
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        relevance: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>)> {
        let quotient = (relevance * reciprocal(&self.value, self.epsilon, 0.0)?)?;
        // `[samples, elements of each]`
        let rows = |t: &Tensor| t.reshape((a.dims()[0], ()));
        let [a_rows, b_rows] = [rows(&(a * &quotient)?)?, rows(&(b * &quotient)?)?];
        let [of_a, of_b] = [a_rows.sum_keepdim(1)?, b_rows.sum_keepdim(1)?];
        let total = rows(relevance)?.sum_keepdim(1)?;
        let magnitude = (of_a.abs()? + of_b.abs()?)?;
        let each = (total * reciprocal(&magnitude, self.epsilon, 0.0)?)?;
        let shared = |rows: &Tensor, sum: &Tensor| {
            let factor = ((sum.abs()? * &each)? * reciprocal(sum, self.epsilon, 0.0)?)?;
            rows.broadcast_mul(&factor)?.reshape(a.shape())
        };
        Ok((Some(shared(&a_rows, &of_a)?), Some(shared(&b_rows, &of_b)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device, Var};

    fn leaf(values: &[f64], shape: &[usize]) -> Var {
        Var::from_tensor(&Tensor::from_slice(values, shape, &Device::Cpu).unwrap()).unwrap()
    }

    fn flat(t: &Tensor) -> Vec<f64> {
        t.flatten_all().unwrap().to_vec1::<f64>().unwrap()
    }

    /// What comes back to the leaves when `seed` is what arrives at `y`.
    fn back(y: &Tensor, seed: &Tensor, leaves: &[&Var]) -> Vec<Vec<f64>> {
        let gradients = (y * seed).unwrap().sum_all().unwrap().backward().unwrap();
        let of = |leaf: &&Var| flat(gradients.get(leaf.as_tensor()).unwrap());
        leaves.iter().map(of).collect()
    }

    #[test]
    fn factors_and_detours_are_those_of_the_naive_twins() {
        let x = leaf(&[0.5, -2.0, 0.0, 3.0], &[2, 2]);
        let factor = leaf(&[2.0, 0.0, -1.0, 0.25], &[2, 2]).as_tensor().detach();
        let seed = leaf(&[1.0, 2.0, 3.0, 4.0], &[2, 2]).as_tensor().detach();
        type Op = fn(&Tensor, &Tensor) -> Result<Tensor>;
        let pairs: [(Op, Op, [f64; 4]); 2] = [
            (scale_gradient, naive::scale_gradient, [2.0, 0.0, -3.0, 1.0]),
            (pass_gradient, naive::pass_gradient, [1.0, 2.0, 3.0, 4.0]),
        ];
        for (fused, naive, expected) in pairs {
            for transposed in [false, true] {
                let lay = |t: &Tensor| match transposed {
                    true => t.t().unwrap(),
                    false => t.clone(),
                };
                let run = |op: Op| {
                    let y = op(&lay(x.as_tensor()), &lay(&factor)).unwrap();
                    (flat(&y), back(&y, &lay(&seed), &[&x]))
                };
                assert_eq!(run(fused), run(naive));
                assert_eq!(run(fused).1, [expected]);
            }
        }
        assert!(scale_gradient(x.as_tensor(), &seed.get(0).unwrap()).is_err());
    }

    #[test]
    fn reciprocals_keep_their_sign_and_their_distance_from_zero() {
        let z = leaf(&[2.0, -2.0, 0.0, 1e-300], &[4]).as_tensor().detach();
        let expected = [1.0 / 2.5, -1.0 / 2.5, 7.0, 2.0];
        for reciprocal in [stabilised_reciprocal, naive::stabilised_reciprocal] {
            let found = flat(&reciprocal(&z, 0.5, 7.0).unwrap());
            for (found, expected) in found.iter().zip(expected) {
                assert!((found - expected).abs() < 1e-12, "{found} {expected}");
            }
            assert_eq!(flat(&reciprocal(&z, 0.0, 0.0).unwrap())[2..], [0.0, 0.0]);
        }
    }

    #[test]
    fn a_balanced_sum_shares_each_sample_by_itself() {
        let a_values = [1.0, -2.0, 0.5, 0.25, 3.0, -1.0];
        let b_values = [0.5, 0.5, -1.5, 2.0, -1.0, 0.5];
        let seed_values = [1.0, 0.5, 2.0, -1.0, 3.0, 0.25];
        let (a, b) = (leaf(&a_values, &[2, 3]), leaf(&b_values, &[2, 3]));
        let y = balanced_sum(a.as_tensor(), b.as_tensor(), 0.0).unwrap();
        let seed = leaf(&seed_values, &[2, 3]).as_tensor().detach();
        let found = back(&y, &seed, &[&a, &b]);
        for sample in [0..3, 3..6] {
            let share = |own: &[f64; 6]| -> Vec<f64> {
                let of = |i| own[i] * seed_values[i] / (a_values[i] + b_values[i]);
                sample.clone().map(of).collect()
            };
            let shares = [share(&a_values), share(&b_values)];
            let sums = shares.clone().map(|share| share.iter().sum::<f64>());
            let total: f64 = seed_values[sample.clone()].iter().sum();
            let magnitude = sums[0].abs() + sums[1].abs();
            let mut kept = 0.0;
            for ((share, sum), found) in shares.iter().zip(sums).zip(&found) {
                let found = &found[sample.clone()];
                for (share, found) in share.iter().zip(found) {
                    let expected = share * sum.abs() / magnitude * total / sum;
                    assert!((found - expected).abs() < 1e-12, "{found} {expected}");
                }
                let sum: f64 = found.iter().sum();
                assert!(sum * total >= 0.0);
                kept += sum;
            }
            assert!((kept - total).abs() < 1e-12);
        }
    }
}
