//! Biases that are a function of the distance between query and key.
//!
//! * ALiBi (Press et al., 2021, arXiv 2108.12409): `−m_h |i − j|`. No parameters.
//! * T5's relative buckets (Raffel et al., 2019, arXiv 1910.10683): `table[bucket(j − i), h]`.
//!   `buckets · heads` parameters.
//! * Kerple (Chi et al., 2022, arXiv 2205.09921): `−r₁ ln(1 + r₂ |i − j|)` or `−r₁ |i − j|^r₂` with two
//!   learned numbers a head, both positive.
//! * Sandwich (Chi et al., 2023, arXiv 2212.10356): `Σ_k cos(|i − j| / 10000^(2 k / width))`, `k` from 1
//!   to `width / 2`: the product of two sinusoidal embeddings. No parameters.

use super::Span;
use crate::Result;
use crate::error::tensor;
use lapidary_kernels::{Activation, DType, Device, ScoreBias, Tensor, activate};

/// Slopes of ALiBi: the powers of `2^(−8/n)` for the largest power of two `n ≤ heads`, then
/// every other one of the series for `2 n`.
pub(super) fn alibi_slopes(heads: usize) -> Vec<f64> {
    let n = if heads.is_power_of_two() {
        heads
    } else {
        heads.next_power_of_two() / 2
    };
    let series = |n: usize| (1..=n).map(move |i| 2f64.powf(-8.0 * i as f64 / n as f64));
    series(n)
        .chain(series(2 * n).step_by(2))
        .take(heads)
        .collect()
}

/// T5's bucket of a key at `distance = key − query`: exact for short distances, logarithmic up
/// to `max_distance`. Bidirectional attention spends half of the buckets on each direction.
pub(super) fn bucket(distance: i64, buckets: usize, max_distance: usize, causal: bool) -> usize {
    let (buckets, base, distance) = if causal {
        (buckets, 0, (-distance).max(0) as usize)
    } else {
        let half = buckets / 2;
        (
            half,
            if distance > 0 { half } else { 0 },
            distance.unsigned_abs() as usize,
        )
    };
    let exact = buckets / 2;
    if distance < exact {
        return base + distance;
    }
    // In f32, as the published code does: where the logarithm falls on a whole number, rounding
    // decides the bucket.
    let scale = (max_distance as f64 / exact.max(1) as f64).ln() as f32;
    let log = (distance as f32 / exact.max(1) as f32).ln() / scale;
    base + (exact + (log * (buckets - exact) as f32) as usize).min(buckets - 1)
}

/// Kerple's two forms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kerple {
    Logarithmic,
    Power,
}

/// Kerple's bias of the distances `0..count`, `[count, heads]`, for `coefficients` `[2, heads]` whose
/// softplus is `r₁` and `r₂`.
pub(super) fn kerple(form: Kerple, coefficients: &Tensor, count: usize) -> Result<Tensor> {
    let positive = activate(coefficients, Activation::Softplus)?;
    let row = |index: usize| tensor(positive.narrow(0, index, 1));
    let (scale, inner) = (row(0)?, row(1)?);
    let (dtype, device) = (coefficients.dtype(), coefficients.device());
    let grown = match form {
        Kerple::Logarithmic => {
            let distances = column((0..count).map(|d| d as f64), dtype, device)?;
            let sums = tensor(tensor(distances.broadcast_mul(&inner))? + 1.0)?;
            tensor(sums.log())?
        }
        Kerple::Power => {
            // d^r = e^{r ln d}, and nothing at distance 0, whose logarithm is not a number.
            let logs = column((0..count).map(|d| (d.max(1) as f64).ln()), dtype, device)?;
            let powers = tensor(tensor(logs.broadcast_mul(&inner))?.exp())?;
            let apart = column(
                (0..count).map(|d| f64::from(u8::from(d > 0))),
                dtype,
                device,
            )?;
            tensor(powers.broadcast_mul(&apart))?
        }
    };
    tensor(tensor(grown.broadcast_mul(&scale))?.neg())
}

/// Sandwich's bias of the distances `0..count`.
pub(super) fn sandwich(width: usize, count: usize) -> Vec<f64> {
    let waves = |d: usize| {
        (1..=width / 2).map(move |k| {
            let wavelength = 10_000f64.powf(2.0 * k as f64 / width as f64);
            (d as f64 / wavelength).cos()
        })
    };
    (0..count).map(|d| waves(d).sum()).collect()
}

/// Numbers as `[count, 1]`.
pub(super) fn column(
    values: impl Iterator<Item = f64>,
    dtype: DType,
    device: &Device,
) -> Result<Tensor> {
    let values: Vec<f64> = values.collect();
    let count = values.len();
    tensor(tensor(Tensor::from_vec(values, (count, 1), device))?.to_dtype(dtype))
}

/// The distances `key − query` that a [`ScoreBias::ByDistance`] of `span` has entries for, in their order:
/// from that of the first key from the last query to that of the last key from the first query.
pub(super) fn distances(span: Span) -> impl Iterator<Item = i64> {
    let first = 1 - (span.offset + span.queries) as i64;
    let count = (span.queries + span.keys).saturating_sub(1);
    (first..).take(count)
}

/// The bias that is the same in both directions: that of `|i − j|` is a row of `by_distance`
/// `[count, heads]`.
pub(super) fn both_ways(by_distance: &Tensor, span: Span) -> Result<ScoreBias> {
    let rows = distances(span).map(|distance| distance.unsigned_abs() as u32);
    rows_of(by_distance, rows.collect())
}

/// The bias whose entries are these rows of `table` `[count, heads]`.
pub(super) fn rows_of(table: &Tensor, rows: Vec<u32>) -> Result<ScoreBias> {
    let count = rows.len();
    let rows = tensor(Tensor::from_vec(rows, count, table.device()))?;
    let entries = tensor(tensor(table.contiguous())?.index_select(&rows, 0))?;
    Ok(ScoreBias::ByDistance(tensor(entries.t())?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alibi_slopes_halve_for_eight_heads_and_interleave_otherwise() {
        let slopes = alibi_slopes(8);
        for (i, slope) in slopes.iter().enumerate() {
            assert_eq!(*slope, 0.5f64.powi(i as i32 + 1));
        }
        let six = alibi_slopes(6);
        assert_eq!(&six[..4], &alibi_slopes(4)[..]);
        assert_eq!(six[4], 2f64.powf(-1.0));
        assert_eq!(six[5], 2f64.powf(-3.0));
    }

    #[test]
    fn buckets_are_exact_near_and_saturate_far() {
        assert_eq!(bucket(0, 32, 128, true), 0);
        assert_eq!(bucket(5, 32, 128, true), 0);
        assert_eq!(bucket(-15, 32, 128, true), 15);
        assert_eq!(bucket(-10_000, 32, 128, true), 31);
        assert_eq!(bucket(3, 32, 128, false), 19);
        assert_eq!(bucket(-3, 32, 128, false), 3);
        assert_eq!(bucket(10_000, 32, 128, false), 31);
    }
}
