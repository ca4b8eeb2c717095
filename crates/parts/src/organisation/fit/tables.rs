//! Tables of positions: sines and cosines along a line and on a grid.

use crate::Result;
use crate::error::tensor;
use lapidary_kernels::{DType, Device, Tensor};
use std::ops::Range;

/// `sin(t θ_i), cos(t θ_i)` side by side for each of `places`, `θ_i = 10000^(−2i / width)`:
/// `[places, width]`, the sines first.
fn waves(places: &[f64], width: usize) -> Vec<Vec<f64>> {
    let half = width / 2;
    let rate = |i: usize| 10_000f64.powf(-(i as f64) / half.max(1) as f64);
    places
        .iter()
        .map(|place| {
            let sines = (0..half).map(|i| (place * rate(i)).sin());
            let cosines = (0..half).map(|i| (place * rate(i)).cos());
            sines.chain(cosines).collect()
        })
        .collect()
}

fn table(rows: Vec<Vec<f64>>, width: usize, dtype: DType, device: &Device) -> Result<Tensor> {
    let count = rows.len();
    let flat: Vec<f64> = rows.into_iter().flatten().collect();
    tensor(tensor(Tensor::from_vec(flat, (count, width), device))?.to_dtype(dtype))
}

/// Waves of some `places` along a line, `[places, width]`.
pub(super) fn line(
    places: Range<usize>,
    width: usize,
    dtype: DType,
    device: &Device,
) -> Result<Tensor> {
    let places: Vec<f64> = places.map(|place| place as f64).collect();
    table(waves(&places, width), width, dtype, device)
}

/// Waves of `rows · columns` places of a grid: those of the row, then those of the column, half the
/// features each.
pub(super) fn grid(
    [rows, columns]: [usize; 2],
    width: usize,
    dtype: DType,
    device: &Device,
) -> Result<Tensor> {
    let along = |count: usize| {
        let places: Vec<f64> = (0..count).map(|place| place as f64).collect();
        waves(&places, width / 2)
    };
    let (down, across) = (along(rows), along(columns));
    let mut all = Vec::with_capacity(rows * columns);
    for row in &down {
        for column in &across {
            all.push(row.iter().chain(column).copied().collect());
        }
    }
    table(all, width, dtype, device)
}

/// Waves of times, standardised: each row with mean 0 and deviation 1, `[times, width]`.
pub(super) fn of_times(times: &Tensor, width: usize, dtype: DType) -> Result<Tensor> {
    // Times are between 0 and 1; a thousandth is about a radian of the quickest wave.
    const SCALE: f64 = 1000.0;
    let seconds = tensor(tensor(times.to_dtype(DType::F64))?.to_vec1::<f64>())?;
    let places: Vec<f64> = seconds.iter().map(|time| time * SCALE).collect();
    let mut rows = waves(&places, width);
    for row in &mut rows {
        let mean = row.iter().sum::<f64>() / width as f64;
        let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width as f64;
        let deviation = variance.sqrt().max(f64::MIN_POSITIVE);
        for x in row.iter_mut() {
            *x = (*x - mean) / deviation;
        }
    }
    table(rows, width, dtype, times.device())
}
