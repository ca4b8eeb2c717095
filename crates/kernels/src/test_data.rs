//! Deterministic test tensors and the comparison of a kernel with its composition.

use crate::check::difference;
use crate::{DType, Device, Tensor};

/// Irregular numbers in `[-2, 2]`, another sequence for each `phase`.
pub(crate) fn arange(dims: &[usize], phase: f64, dtype: DType) -> Tensor {
    let count: usize = dims.iter().product();
    let values: Vec<f64> = (0..count)
        .map(|i| 2.0 * (i as f64 * 1.37 + phase * 0.61 + (i as f64 * 0.11).cos()).sin())
        .collect();
    Tensor::from_vec(values, dims, &Device::Cpu)
        .unwrap()
        .to_dtype(dtype)
        .unwrap()
}

/// Asserts that the two tensors of `pair` agree, in `f32` to `tolerance` (scaled by magnitude)
/// and in `f64` to `1e-11`.
pub(crate) fn compare(tolerance: f64, pair: impl Fn(DType) -> (Tensor, Tensor)) {
    for (dtype, tolerance) in [(DType::F32, tolerance), (DType::F64, 1e-11)] {
        let (fused, plain) = pair(dtype);
        assert_eq!(fused.dtype(), dtype);
        let scale = plain
            .abs()
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_dtype(DType::F64)
            .unwrap()
            .to_vec1::<f64>()
            .unwrap()
            .into_iter()
            .filter(|v| v.is_finite())
            .fold(1.0, f64::max);
        let error = difference(&fused, &plain).unwrap() / scale;
        assert!(error <= tolerance, "{dtype:?}: {error} > {tolerance}");
    }
}
