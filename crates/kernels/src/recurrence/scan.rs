//! The linear recurrence `h_t = a_t h_{t-1} + b_t`.
//!
//! Backward, with `u_t = ∂h_t + a_{t+1} u_{t+1}` from the end:
//! `∂b_t = u_t`, `∂a_t = u_t h_{t-1}`, `∂h_{-1} = a_0 u_0`.

use super::Sequences;
use crate::backward::Apply;
use crate::host::{self, Host, Shared, by_dtype, fused};
use crate::simd::Real;
use crate::{Error, Result, Tensor, naive};
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Shape};

type Candle<T> = candle_core::Result<T>;
type Argument<'a> = (&'a CpuStorage, &'a Layout);

/// Linear recurrence `h_t = a_t h_{t-1} + b_t` along dimension 1 of `[batch, length, ..]`
/// tensors, starting from `initial` `[batch, ..]` (zero when absent). Gives every `h_t`.
///
/// # Errors
/// When the shapes do not fit each other.
pub fn linear_scan(a: &Tensor, b: &Tensor, initial: Option<&Tensor>) -> Result<Tensor> {
    if b.rank() < 2 {
        return Err(Error::argument(
            "linear_scan",
            "b",
            b.dims(),
            "[batch, length, ..]",
        ));
    }
    if a.dims() != b.dims() {
        let expected = format!("{:?}", b.dims());
        return Err(Error::argument("linear_scan", "a", a.dims(), expected));
    }
    match initial {
        Some(initial) => {
            let mut dims = b.dims().to_vec();
            dims.remove(1);
            if initial.dims() != dims {
                let expected = format!("{dims:?}");
                return Err(Error::argument(
                    "linear_scan",
                    "initial",
                    initial.dims(),
                    expected,
                ));
            }
            if fused(&[a, b, initial]) {
                return Ok(a.apply3(b, initial, Scan)?);
            }
        }
        None if fused(&[a, b]) => return Ok(a.apply2(b, Scan)?),
        None => {}
    }
    naive::linear_scan(a, b, initial)
}

struct Scan;

fn forward<T: Real>(
    a: Argument,
    b: Argument,
    initial: Option<Argument>,
) -> Candle<(CpuStorage, Shape)> {
    let sequences = Sequences::new(b.1.dims(), 1);
    let a_values = host::ordered::<T>(a.0, a.1)?;
    let initial = initial
        .map(|(storage, layout)| host::ordered::<T>(storage, layout))
        .transpose()?;
    let mut h = host::ordered::<T>(b.0, b.1)?.into_owned();
    let shared = Shared::new(&mut h);
    sequences.share(|outer, columns| {
        let width = columns.len();
        let at = |t| sequences.at(outer, t, &columns);
        for t in 0..sequences.length {
            // SAFETY: different times never overlap, and columns belong to one task.
            let now = unsafe { shared.part(at(t), width) };
            let before = match (t, &initial) {
                (0, None) => continue,
                (0, Some(initial)) => &initial[outer * sequences.inner + columns.start..][..width],
                // SAFETY: as above.
                _ => unsafe { shared.part(at(t - 1), width) },
            };
            let a = &a_values[at(t)..][..width];
            for ((now, &a), &before) in now.iter_mut().zip(a).zip(before) {
                *now = a.mul_add(before, *now);
            }
        }
    });
    Ok((T::to_cpu_storage_owned(h), b.1.shape().clone()))
}

fn backward<T: Real>(
    a: &Tensor,
    initial: Option<&Tensor>,
    h: &Tensor,
    gradient: &Tensor,
) -> Candle<[Option<Tensor>; 3]> {
    let sequences = Sequences::new(h.dims(), 1);
    let (a_host, h_host) = (Host::new(a), Host::new(h));
    let (a_values, h_values) = (a_host.ordered::<T>()?, h_host.ordered::<T>()?);
    let first = initial
        .map(|initial| Candle::Ok(Host::new(initial).ordered::<T>()?.into_owned()))
        .transpose()?;
    let mut u = Host::new(gradient).ordered::<T>()?.into_owned();
    let mut da = host::unwritten::<T>(u.len());
    let mut d_first = vec![T::zero(); first.as_ref().map_or(0, Vec::len)];
    {
        let (u, da) = (Shared::new(&mut u), Shared::new(&mut da));
        let d_first = Shared::new(&mut d_first);
        sequences.share(|outer, columns| {
            let width = columns.len();
            let at = |t| sequences.at(outer, t, &columns);
            for t in (0..sequences.length).rev() {
                // SAFETY: different times never overlap, and columns belong to one task.
                let (now, da) = unsafe { (u.part(at(t), width), da.part(at(t), width)) };
                if t + 1 < sequences.length {
                    // SAFETY: as above.
                    let after = unsafe { u.part(at(t + 1), width) };
                    let a = &a_values[at(t + 1)..][..width];
                    for ((now, &a), &after) in now.iter_mut().zip(a).zip(&*after) {
                        *now = a.mul_add(after, *now);
                    }
                }
                let start = outer * sequences.inner + columns.start;
                let before = match (t, &first) {
                    (0, None) => {
                        da.fill(T::zero());
                        continue;
                    }
                    (0, Some(first)) => &first[start..][..width],
                    _ => &h_values[at(t - 1)..][..width],
                };
                for ((da, &now), &before) in da.iter_mut().zip(&*now).zip(before) {
                    *da = now * before;
                }
                if t == 0 {
                    let a = &a_values[at(0)..][..width];
                    // SAFETY: as above.
                    let d_first = unsafe { d_first.part(start, width) };
                    for ((d, &now), &a) in d_first.iter_mut().zip(&*now).zip(a) {
                        *d = now * a;
                    }
                }
            }
        });
    }
    let d_initial = initial
        .map(|initial| host::tensor(d_first, initial.dims()))
        .transpose()?;
    Ok([
        Some(host::tensor(da, a.dims())?),
        Some(host::tensor(u, a.dims())?),
        d_initial,
    ])
}

impl CustomOp2 for Scan {
    fn name(&self) -> &'static str {
        "linear_scan"
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        by_dtype!(host::dtype(b), T => forward::<T>((a, a_layout), (b, b_layout), None))
    }

    fn bwd(
        &self,
        a: &Tensor,
        _: &Tensor,
        h: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>)> {
        let [da, db, _] = by_dtype!(a.dtype(), T => backward::<T>(a, None, h, gradient))?;
        Ok((da, db))
    }
}

impl CustomOp3 for Scan {
    fn name(&self) -> &'static str {
        "linear_scan"
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
        initial: &CpuStorage,
        initial_layout: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        by_dtype!(host::dtype(b), T => forward::<T>(
            (a, a_layout),
            (b, b_layout),
            Some((initial, initial_layout)),
        ))
    }

    fn bwd(
        &self,
        a: &Tensor,
        _: &Tensor,
        initial: &Tensor,
        h: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [da, db, di] = by_dtype!(a.dtype(), T => backward::<T>(a, Some(initial), h, gradient))?;
        Ok((da, db, di))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::check::gradient_error;
    use crate::test_data::{arange, compare};

    #[test]
    fn equals_the_composition() {
        for dims in [vec![1, 1], vec![3, 9], vec![2, 5, 300], vec![2, 4, 3, 5]] {
            let mut first = dims.clone();
            first.remove(1);
            compare(1e-5, |dtype| {
                let a = (arange(&dims, 1.0, dtype) * 0.4).unwrap();
                let b = arange(&dims, 2.0, dtype);
                let initial = arange(&first, 3.0, dtype);
                let fused = linear_scan(&a, &b, Some(&initial)).unwrap();
                (fused, naive::linear_scan(&a, &b, Some(&initial)).unwrap())
            });
            compare(1e-5, |dtype| {
                let a = (arange(&dims, 1.0, dtype) * 0.4).unwrap();
                let b = arange(&dims, 2.0, dtype);
                let fused = linear_scan(&a, &b, None).unwrap();
                (fused, naive::linear_scan(&a, &b, None).unwrap())
            });
        }
    }

    #[test]
    fn gradients() {
        let a = arange(&[4, 2, 3], 1.0, DType::F64);
        let b = arange(&[2, 4, 3], 2.0, DType::F64);
        let initial = arange(&[2, 3], 3.0, DType::F64);
        let f = |x: &[Tensor]| linear_scan(&x[0].transpose(0, 1)?, &x[1], Some(&x[2]));
        assert!(gradient_error(f, &[a.clone(), b.clone(), initial]).unwrap() < 1e-8);
        let f = |x: &[Tensor]| linear_scan(&x[0].transpose(0, 1)?, &x[1], None);
        assert!(gradient_error(f, &[a, b]).unwrap() < 1e-8);
    }

    #[test]
    fn wrong_shapes_are_named() {
        let a = arange(&[2, 3], 1.0, DType::F32);
        let b = arange(&[2, 4], 1.0, DType::F32);
        assert!(linear_scan(&a, &b, None).is_err());
        let message = linear_scan(&b, &b, Some(&a)).unwrap_err().to_string();
        assert!(message.contains("initial"), "{message}");
    }
}
