//! Rotary position embedding (Su et al., arXiv 2104.09864).
//!
//! Each pair of features turns by an angle that grows with the position:
//! `(a, b) -> (a cos - b sin, b cos + a sin)`. Its backward pass turns back.

use crate::backward::Apply;
use crate::host::{self, Host, by_dtype, fused};
use crate::simd::Real;
use crate::{Error, Result, RotaryPairs, Tensor, naive};
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, WithDType};

type Candle<T> = candle_core::Result<T>;

/// Rotates pairs of features of `x` `[.., length, width]` by the angles whose `cos` and `sin`
/// are `[length, width / 2]`. Where the tables are narrower than half the head, the remaining
/// features pass unrotated. The tables are not differentiated.
///
/// # Errors
/// When the tables fit neither each other nor `x`.
pub fn rotary(x: &Tensor, cos: &Tensor, sin: &Tensor, pairs: RotaryPairs) -> Result<Tensor> {
    let &[.., length, width] = x.dims() else {
        return Err(Error::argument(
            "rotary",
            "x",
            x.dims(),
            "[.., length, width]",
        ));
    };
    turn(x, cos, sin, pairs, length, width, 1)
}

/// [`rotary`] on heads that lie side by side: `x` `[batch, length, heads · width]`. Tables
/// `[length, heads, width / 2]` turn each head by angles of its own.
///
/// # Errors
/// When the tables fit neither each other nor `x`, or the heads do not divide the width.
pub fn merged_rotary(
    x: &Tensor,
    heads: usize,
    cos: &Tensor,
    sin: &Tensor,
    pairs: RotaryPairs,
) -> Result<Tensor> {
    let (batch, length, width) = x.dims3()?;
    if heads == 0 || !width.is_multiple_of(heads) {
        let expected = format!("[batch, length, a multiple of {heads}]");
        return Err(Error::argument("rotary", "x", x.dims(), expected));
    }
    let width = width / heads;
    if let (&[_, tables, half], [_, _, _]) = (cos.dims(), sin.dims()) {
        if tables != heads {
            let expected = format!("[{length}, {heads}, <= {}]", width / 2);
            return Err(Error::argument("rotary", "cos", cos.dims(), expected));
        }
        // A head at a position is then what a position is to heads that turn alike.
        let rows = length * heads;
        let flat = |table: &Tensor| table.reshape((cos.dim(0)? * heads, half));
        let x_rows = x.reshape((batch, rows, width))?;
        let turned = turn(&x_rows, &flat(cos)?, &flat(sin)?, pairs, rows, width, 1)?;
        return Ok(turned.reshape(x.shape())?);
    }
    if !fused(&[x, cos, sin]) {
        let split = x.reshape((batch, length, heads, width))?.transpose(1, 2)?;
        let turned = naive::rotary(&split, cos, sin, pairs)?;
        return Ok(turned.transpose(1, 2)?.reshape(x.shape())?);
    }
    let split = x.reshape((batch, length, heads, width))?;
    Ok(turn(&split, cos, sin, pairs, length, width, heads)?.reshape(x.shape())?)
}

/// `rows_per_position` consecutive rows of `x` share a position.
fn turn(
    x: &Tensor,
    cos: &Tensor,
    sin: &Tensor,
    pairs: RotaryPairs,
    length: usize,
    width: usize,
    rows_per_position: usize,
) -> Result<Tensor> {
    let (positions, half) = cos.dims2()?;
    if positions != length || 2 * half > width {
        let expected = format!("[{length}, <= {}]", width / 2);
        return Err(Error::argument("rotary", "cos", cos.dims(), expected));
    }
    if sin.dims() != cos.dims() {
        let expected = format!("{:?}", cos.dims());
        return Err(Error::argument("rotary", "sin", sin.dims(), expected));
    }
    if !fused(&[x, cos, sin]) {
        return naive::rotary(x, cos, sin, pairs);
    }
    Ok(x.apply1(Rotary {
        cos: cos.detach(),
        sin: sin.detach(),
        pairs,
        rows_per_position,
    })?)
}

struct Rotary {
    /// `[length, half]`.
    cos: Tensor,
    sin: Tensor,
    pairs: RotaryPairs,
    rows_per_position: usize,
}

impl Rotary {
    fn turn<T: Real>(&self, storage: &CpuStorage, layout: &Layout, back: bool) -> Candle<Vec<T>> {
        let (cos_host, sin_host) = (Host::new(&self.cos), Host::new(&self.sin));
        let (cos, sin) = (cos_host.ordered::<T>()?, sin_host.ordered::<T>()?);
        let (length, half) = self.cos.dims2()?;
        let rows = host::Rows::<T>::new(storage, layout)?;
        let width = layout.dims().last().copied().unwrap_or(0);
        let sign = if back { -T::one() } else { T::one() };
        let mut y = host::unwritten::<T>(layout.shape().elem_count());
        host::for_rows(
            &mut y,
            width,
            2,
            #[inline(always)]
            |row, y| {
                let position = row / self.rows_per_position % length;
                let cos = &cos[position * half..][..half];
                let sin = &sin[position * half..][..half];
                let x = rows.row(row);
                let (turning, rest) = y.split_at_mut(2 * half);
                rest.copy_from_slice(&x[2 * half..]);
                match self.pairs {
                    RotaryPairs::Halves => {
                        let (first, second) = turning.split_at_mut(half);
                        let (a, b) = x[..2 * half].split_at(half);
                        for i in 0..half {
                            let s = sign * sin[i];
                            first[i] = a[i] * cos[i] - b[i] * s;
                            second[i] = b[i] * cos[i] + a[i] * s;
                        }
                    }
                    RotaryPairs::Interleaved => {
                        let pairs = turning.chunks_exact_mut(2).zip(x.chunks_exact(2));
                        for ((y, x), (&c, &s)) in pairs.zip(cos.iter().zip(sin)) {
                            let s = sign * s;
                            y[0] = x[0] * c - x[1] * s;
                            y[1] = x[1] * c + x[0] * s;
                        }
                    }
                }
            },
        );
        Ok(y)
    }
}

impl CustomOp1 for Rotary {
    fn name(&self) -> &'static str {
        "rotary"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Candle<(CpuStorage, Shape)> {
        let y = by_dtype!(host::dtype(x), T => {
            Ok(T::to_cpu_storage_owned(self.turn::<T>(x, layout, false)?))
        })?;
        Ok((y, layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, gradient: &Tensor) -> Candle<Option<Tensor>> {
        let g = Host::new(gradient);
        by_dtype!(x.dtype(), T => {
            host::tensor(self.turn::<T>(g.storage()?, g.layout, true)?, x.dims()).map(Some)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::check::{difference, gradient_error};
    use crate::test_data::{arange, compare};
    use proptest::prelude::*;

    const BOTH: [RotaryPairs; 2] = [RotaryPairs::Halves, RotaryPairs::Interleaved];

    fn tables(length: usize, half: usize, dtype: DType) -> (Tensor, Tensor) {
        let angles = arange(&[length, half], 4.0, dtype);
        (angles.cos().unwrap(), angles.sin().unwrap())
    }

    #[test]
    fn equals_the_composition() {
        for pairs in BOTH {
            for (width, half) in [(2, 1), (8, 4), (10, 3), (7, 3)] {
                compare(1e-6, |dtype| {
                    let x = arange(&[2, 5, 3, width], 1.0, dtype)
                        .transpose(1, 2)
                        .unwrap();
                    let (cos, sin) = tables(5, half, dtype);
                    let fused = rotary(&x, &cos, &sin, pairs).unwrap();
                    (fused, naive::rotary(&x, &cos, &sin, pairs).unwrap())
                });
                compare(1e-6, |dtype| {
                    let x = arange(&[2, 5, 3 * width], 1.0, dtype);
                    let (cos, sin) = tables(5, half, dtype);
                    let split = x
                        .reshape((2, 5, 3, width))
                        .unwrap()
                        .transpose(1, 2)
                        .unwrap();
                    let plain = naive::rotary(&split, &cos, &sin, pairs).unwrap();
                    let fused = merged_rotary(&x, 3, &cos, &sin, pairs).unwrap();
                    (
                        fused,
                        plain
                            .transpose(1, 2)
                            .unwrap()
                            .reshape((2, 5, 3 * width))
                            .unwrap(),
                    )
                });
            }
        }
    }

    #[test]
    fn heads_with_tables_of_their_own_turn_as_each_by_itself() {
        let (length, heads, width, half) = (5, 3, 10, 4);
        let angles = arange(&[length, heads, half], 4.0, DType::F64);
        let (cos, sin) = (angles.cos().unwrap(), angles.sin().unwrap());
        let x = arange(&[2, length, heads * width], 1.0, DType::F64);
        for pairs in BOTH {
            let together = merged_rotary(&x, heads, &cos, &sin, pairs).unwrap();
            for head in 0..heads {
                let own = |t: &Tensor| t.narrow(1, head, 1).unwrap().squeeze(1).unwrap();
                let part = |t: &Tensor| t.narrow(2, head * width, width).unwrap();
                let alone = merged_rotary(&part(&x), 1, &own(&cos), &own(&sin), pairs).unwrap();
                assert!(difference(&part(&together), &alone).unwrap() < 1e-15);
            }
            let f = |a: &[Tensor]| merged_rotary(&a[0], heads, &cos, &sin, pairs);
            assert!(gradient_error(f, std::slice::from_ref(&x)).unwrap() < 1e-9);
        }
        let error = merged_rotary(&x, 2, &cos, &sin, RotaryPairs::Halves).unwrap_err();
        assert!(error.to_string().contains("[5, 2, <= 7]"), "{error}");
    }

    #[test]
    fn gradients() {
        for pairs in BOTH {
            let (cos, sin) = tables(3, 2, DType::F64);
            let x = arange(&[1, 3, 2, 5], 1.0, DType::F64);
            let f = |a: &[Tensor]| rotary(&a[0].transpose(1, 2)?, &cos, &sin, pairs);
            assert!(gradient_error(f, &[x]).unwrap() < 1e-9);
            let x = arange(&[2, 3, 10], 1.0, DType::F64);
            let f = |a: &[Tensor]| merged_rotary(&a[0], 2, &cos, &sin, pairs);
            assert!(gradient_error(f, &[x]).unwrap() < 1e-9);
        }
    }

    #[test]
    fn wrong_tables_are_named() {
        let x = arange(&[1, 1, 3, 4], 1.0, DType::F32);
        let (cos, sin) = tables(2, 2, DType::F32);
        assert!(rotary(&x, &cos, &sin, RotaryPairs::Halves).is_err());
        let (cos, sin) = tables(3, 3, DType::F32);
        let message = rotary(&x, &cos, &sin, RotaryPairs::Halves)
            .unwrap_err()
            .to_string();
        assert!(message.contains("cos"), "{message}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn lengths_are_kept(length in 1usize..9, half in 1usize..9) {
            let (cos, sin) = tables(length, half, DType::F64);
            let x = arange(&[length, 2 * half], 1.0, DType::F64);
            let norm = |x: &Tensor| x.sqr().unwrap().sum(1).unwrap();
            for pairs in BOTH {
                let y = rotary(&x, &cos, &sin, pairs).unwrap();
                prop_assert!(difference(&norm(&x), &norm(&y)).unwrap() < 1e-12);
            }
        }
    }
}
