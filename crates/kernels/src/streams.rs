//! Operations on a value that is held as a sum of streams, the first dimension.
//!
//! They follow DecompX (Modarressi et al., arXiv 2306.02873): attention weights and norm
//! statistics come from the whole value and are frozen, biases are shared out among the streams.
//! Where an argument is differentiated the plain compositions are used instead.

use crate::host::{self, Host, Shared, by_dtype, fused, rows_and_width};
use crate::product::{Into, Matrix, multiply_at};
use crate::simd::{self, Real};
use crate::{Error, Result, Tensor, naive};

type Candle<T> = candle_core::Result<T>;

/// By what a bias is shared out among streams.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum BiasRule {
    /// `|P · b|`, the default of DecompX.
    #[default]
    AbsoluteDot,
    /// `P · b`, signed.
    Dot,
    /// `|cos(P, b)|`; a stream of zeros gets nothing.
    AbsoluteCosine,
    /// `‖P‖`.
    Norm,
    /// The same for every stream that isn't zero.
    Equal,
}

fn applies(tensors: &[&Tensor]) -> bool {
    fused(tensors) && tensors.iter().all(|t| !t.track_op())
}

fn refuse<T>(
    kernel: &'static str,
    argument: &'static str,
    found: &Tensor,
    expected: String,
) -> Result<T> {
    Err(Error::argument(kernel, argument, found.dims(), expected))
}

/// `y[k, b, i, h] = Σ_j weights[b, h, i, j] streams[k, b, j, h]`, where `h` runs over heads that
/// lie side by side: `weights` `[batch, heads, query, key]`, `streams`
/// `[streams, batch, key, heads · width]`, result `[streams, batch, query, heads · width]`.
///
/// # Errors
/// When the shapes do not fit each other.
pub fn mix_streams(weights: &Tensor, streams: &Tensor) -> Result<Tensor> {
    let (batch, heads, queries, keys) = weights.dims4()?;
    let (count, s_batch, s_keys, width) = streams.dims4()?;
    if (s_batch, s_keys) != (batch, keys) || heads == 0 || !width.is_multiple_of(heads) {
        let expected = format!("[streams, {batch}, {keys}, a multiple of {heads}]");
        return refuse("mix_streams", "streams", streams, expected);
    }
    if !applies(&[weights, streams]) {
        return naive::mix_streams(weights, streams);
    }
    let (w_host, s_host) = (Host::new(weights), Host::new(streams));
    let head_width = width / heads;
    let mixed = by_dtype!(weights.dtype(), T => {
        let (w, s) = (w_host.ordered::<T>()?, s_host.ordered::<T>()?);
        let mut y = host::unwritten::<T>(count * batch * queries * width);
        let shared = Shared::new(&mut y);
        let work = queries * keys.max(1) * head_width.max(1) / 8;
        host::share(batch * heads * count, work.max(1), |range| {
            for item in range {
                let (stream, head) = (item % count, item / count % heads);
                let b = item / count / heads;
                let from = (stream * batch + b) * keys * width + head * head_width;
                let to = (stream * batch + b) * queries * width + head * head_width;
                let weights = Matrix::packed(
                    &w[(b * heads + head) * queries * keys..][..queries * keys],
                    queries,
                    keys,
                );
                let values = Matrix::spaced(&s[from.min(s.len())..], keys, head_width, width);
                let extent = (queries.max(1) - 1) * width + head_width;
                if queries * head_width == 0 {
                    continue;
                }
                // SAFETY: the head's columns of this stream and batch belong to this item.
                unsafe {
                    let y = shared.pointer(to, extent);
                    multiply_at(y, width, Into::Replace, 1.0, weights, values, false);
                }
            }
        });
        host::tensor(y, &[count, batch, queries, width])
    })?;
    Ok(mixed)
}

/// Adds to each stream its share of `bias`: `P_k + w_k b` with `Σ_k w_k = 1`, for `streams`
/// `[streams, .., d]` and `bias` `[d]`. Where the rule gives nothing to any stream, all get the
/// same, so that the sum of the streams always grows by the whole bias.
///
/// # Errors
/// When the shapes do not fit each other.
pub fn split_bias(streams: &Tensor, bias: &Tensor, rule: BiasRule) -> Result<Tensor> {
    let (count, positions, width) = stream_shape("split_bias", streams)?;
    if bias.dims() != [width] {
        return refuse("split_bias", "bias", bias, format!("[{width}]"));
    }
    if !applies(&[streams, bias]) {
        return naive::split_bias(streams, bias, rule);
    }
    let (s_host, b_host) = (Host::new(streams), Host::new(bias));
    let split = by_dtype!(streams.dtype(), T => {
        let (s, b) = (s_host.ordered::<T>()?, b_host.ordered::<T>()?);
        let mut y = host::unwritten::<T>(s.len());
        let shared = Shared::new(&mut y);
        host::share(positions, count * width * 3, |range| {
            simd::vectorised(#[inline(always)] || {
                let mut shares = vec![0.0; count];
                for position in range {
                    let at = |stream: usize| (stream * positions + position) * width;
                    for (stream, share) in shares.iter_mut().enumerate() {
                        *share = score(&s[at(stream)..][..width], &b, rule);
                    }
                    normalise(&mut shares);
                    for (stream, &share) in shares.iter().enumerate() {
                        // SAFETY: each position is handled once.
                        let y = unsafe { shared.part(at(stream), width) };
                        for ((y, &s), &b) in y.iter_mut().zip(&s[at(stream)..]).zip(&*b) {
                            *y = b.mul_add(share, s);
                        }
                    }
                }
            });
        });
        host::tensor(y, streams.dims())
    })?;
    Ok(split)
}

/// The unnormalised share of a stream.
#[inline(always)]
fn score<T: Real>(stream: &[T], bias: &[T], rule: BiasRule) -> T {
    match rule {
        BiasRule::AbsoluteDot => simd::dot(stream, bias).abs(),
        BiasRule::Dot => simd::dot(stream, bias),
        BiasRule::AbsoluteCosine => {
            let square = simd::squares_about(stream, T::zero());
            if square > T::zero() {
                simd::dot(stream, bias).abs() / square.sqrt()
            } else {
                T::zero()
            }
        }
        BiasRule::Norm => simd::squares_about(stream, T::zero()).sqrt(),
        BiasRule::Equal => {
            if simd::squares_about(stream, T::zero()) > T::zero() {
                T::one()
            } else {
                T::zero()
            }
        }
    }
}

#[inline(always)]
fn normalise<T: Real>(shares: &mut [T]) {
    let total = simd::sum(shares);
    if total.abs() <= T::of(1e-12) {
        let equal = T::of(1.0 / shares.len().max(1) as f64);
        shares.fill(equal);
        return;
    }
    for share in shares {
        *share /= total;
    }
}

/// Layer norm of a value held in streams, without its bias: each stream loses its own mean, and
/// all are divided by the deviation of the whole, `γ (S - mean S) / √(variance(value) + ε)`, for
/// `streams` `[streams, .., d]` and `value` `[.., d]`.
///
/// # Errors
/// When the shapes do not fit each other.
pub fn layer_norm_streams(
    streams: &Tensor,
    value: &Tensor,
    weight: Option<&Tensor>,
    epsilon: f64,
) -> Result<Tensor> {
    norm_streams("layer_norm_streams", true, streams, value, weight, epsilon)
}

/// RMS norm of a value held in streams: `γ S / √(mean(value²) + ε)`.
///
/// # Errors
/// When the shapes do not fit each other.
pub fn rms_norm_streams(
    streams: &Tensor,
    value: &Tensor,
    weight: Option<&Tensor>,
    epsilon: f64,
) -> Result<Tensor> {
    norm_streams("rms_norm_streams", false, streams, value, weight, epsilon)
}

fn norm_streams(
    kernel: &'static str,
    centred: bool,
    streams: &Tensor,
    value: &Tensor,
    weight: Option<&Tensor>,
    epsilon: f64,
) -> Result<Tensor> {
    let (_, positions, width) = stream_shape(kernel, streams)?;
    if value.dims() != &streams.dims()[1..] {
        return refuse(
            kernel,
            "value",
            value,
            format!("{:?}", &streams.dims()[1..]),
        );
    }
    let mut all = vec![streams, value];
    if let Some(weight) = weight {
        if weight.dims() != [width] {
            return refuse(kernel, "weight", weight, format!("[{width}]"));
        }
        all.push(weight);
    }
    if !applies(&all) {
        return match centred {
            true => naive::layer_norm_streams(streams, value, weight, epsilon),
            false => naive::rms_norm_streams(streams, value, weight, epsilon),
        };
    }
    let (s_host, v_host) = (Host::new(streams), Host::new(value));
    let normed = by_dtype!(streams.dtype(), T => {
        let weight = weight
            .map(|weight| Candle::Ok(Host::new(weight).ordered::<T>()?.into_owned()))
            .unwrap_or_else(|| Ok(vec![1.0; width]))?;
        let (s, v) = (s_host.ordered::<T>()?, v_host.ordered::<T>()?);
        let scales = reciprocal_roots(&v, width, centred, epsilon as T);
        let mut y = host::unwritten::<T>(s.len());
        host::for_rows(&mut y, width, 2, #[inline(always)] |row, y| {
            let s = &s[row * width..][..width];
            let centre = if centred { simd::sum(s) / width as T } else { 0.0 };
            let scale = scales[row % positions];
            for ((y, &s), &w) in y.iter_mut().zip(s).zip(&weight) {
                *y = (s - centre) * scale * w;
            }
        });
        host::tensor(y, streams.dims())
    })?;
    Ok(normed)
}

/// `1 / √(variance + ε)` of each row, or of its mean square.
fn reciprocal_roots<T: Real>(value: &[T], width: usize, centred: bool, epsilon: T) -> Vec<T> {
    let n = T::of(width as f64);
    let mut scales = vec![T::zero(); value.len() / width.max(1)];
    host::for_rows(
        &mut scales,
        1,
        width * 2,
        #[inline(always)]
        |row, scale| {
            let v = &value[row * width..][..width];
            let centre = if centred { simd::sum(v) / n } else { T::zero() };
            scale[0] = T::one() / (simd::squares_about(v, centre) / n + epsilon).sqrt();
        },
    );
    scales
}

/// Streams, positions and width of `[streams, .., d]`.
fn stream_shape(kernel: &'static str, streams: &Tensor) -> Result<(usize, usize, usize)> {
    let Some((&count, rest)) = streams.dims().split_first() else {
        return refuse(kernel, "streams", streams, "[streams, .., d]".into());
    };
    if rest.is_empty() {
        return refuse(kernel, "streams", streams, "[streams, .., d]".into());
    }
    let (positions, width) = rows_and_width(rest);
    Ok((count, positions, width))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{difference, gradient_error};
    use crate::test_data::{arange, compare};
    use crate::{DType, Device};
    use proptest::prelude::*;

    const RULES: [BiasRule; 5] = [
        BiasRule::AbsoluteDot,
        BiasRule::Dot,
        BiasRule::AbsoluteCosine,
        BiasRule::Norm,
        BiasRule::Equal,
    ];

    #[test]
    fn mixing_equals_the_composition() {
        for (count, batch, heads, queries, keys, width) in [
            (1, 1, 1, 1, 1, 1),
            (3, 2, 4, 5, 7, 6),
            (70, 1, 2, 65, 33, 16),
        ] {
            compare(1e-5, |dtype| {
                let w = arange(&[batch, heads, keys, queries], 1.0, dtype)
                    .transpose(2, 3)
                    .unwrap();
                let s = arange(&[count, batch, keys, heads * width], 2.0, dtype);
                let fused = mix_streams(&w, &s).unwrap();
                (fused, naive::mix_streams(&w, &s).unwrap())
            });
        }
        let w = arange(&[1, 2, 3, 4], 1.0, DType::F64);
        let none = arange(&[0, 1, 4, 6], 2.0, DType::F64);
        assert_eq!(mix_streams(&w, &none).unwrap().dims(), [0, 1, 3, 6]);
        let s = arange(&[2, 1, 4, 6], 2.0, DType::F64);
        let f = |a: &[Tensor]| mix_streams(&a[0], &a[1]);
        assert!(gradient_error(f, &[w.clone(), s]).unwrap() < 1e-8);
        assert!(mix_streams(&w, &arange(&[2, 1, 5, 6], 2.0, DType::F64)).is_err());
    }

    #[test]
    fn splitting_equals_the_composition_and_keeps_the_sum() {
        for rule in RULES {
            for dims in [vec![1, 1], vec![4, 9], vec![5, 2, 3, 17]] {
                compare(2e-5, |dtype| {
                    let mut s = arange(&dims, 1.0, dtype);
                    if dims[0] > 1 {
                        // One stream of zeros.
                        let zeros = s.narrow(0, 0, 1).unwrap().zeros_like().unwrap();
                        s = Tensor::cat(&[zeros, s.narrow(0, 1, dims[0] - 1).unwrap()], 0).unwrap();
                    }
                    let b = arange(&dims[dims.len() - 1..], 2.0, dtype);
                    let fused = split_bias(&s, &b, rule).unwrap();
                    let before = s.sum(0).unwrap().broadcast_add(&b).unwrap();
                    let lost = difference(&fused.sum(0).unwrap(), &before).unwrap();
                    let size = before.abs().unwrap().max_all().unwrap();
                    let size = size
                        .to_dtype(DType::F64)
                        .unwrap()
                        .to_scalar::<f64>()
                        .unwrap();
                    assert!(
                        rule == BiasRule::Dot || lost < 1e-5 * (1.0 + size),
                        "{rule:?} {lost}"
                    );
                    (fused, naive::split_bias(&s, &b, rule).unwrap())
                });
            }
        }
    }

    #[test]
    fn zero_streams_share_equally() {
        let s = Tensor::zeros((4, 2, 3), DType::F32, &Device::Cpu).unwrap();
        let b = Tensor::new(&[4f32, 8.0, -4.0], &Device::Cpu).unwrap();
        for rule in RULES {
            let y = split_bias(&s, &b, rule).unwrap();
            let quarter = (b.broadcast_as((4, 2, 3)).unwrap() * 0.25).unwrap();
            assert_eq!(difference(&y, &quarter).unwrap(), 0.0);
        }
    }

    #[test]
    fn norms_equal_the_compositions() {
        for dims in [vec![1, 4], vec![3, 5, 17], vec![4, 2, 3, 33]] {
            let weight_dims = &dims[dims.len() - 1..];
            compare(1e-5, |dtype| {
                let s = arange(&dims, 1.0, dtype);
                let (v, w) = (s.sum(0).unwrap(), arange(weight_dims, 2.0, dtype));
                let fused = layer_norm_streams(&s, &v, Some(&w), 1e-5).unwrap();
                (
                    fused,
                    naive::layer_norm_streams(&s, &v, Some(&w), 1e-5).unwrap(),
                )
            });
            compare(1e-5, |dtype| {
                let s = arange(&dims, 1.0, dtype);
                let v = s.sum(0).unwrap();
                let fused = rms_norm_streams(&s, &v, None, 1e-5).unwrap();
                (fused, naive::rms_norm_streams(&s, &v, None, 1e-5).unwrap())
            });
        }
        let s = arange(&[3, 4], 1.0, DType::F32);
        assert!(layer_norm_streams(&s, &s, None, 1e-5).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn normed_streams_sum_to_the_norm(count in 1usize..6, rows in 1usize..6, width in 2usize..40) {
            let s = arange(&[count, rows, width], 1.0, DType::F64);
            let v = s.sum(0).unwrap();
            let w = arange(&[width], 2.0, DType::F64);
            let whole = crate::layer_norm(&v, Some(&w), None, 1e-5).unwrap();
            let parts = layer_norm_streams(&s, &v, Some(&w), 1e-5).unwrap().sum(0).unwrap();
            prop_assert!(difference(&whole, &parts).unwrap() < 1e-10);
        }
    }
}
