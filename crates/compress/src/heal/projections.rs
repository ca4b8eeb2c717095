//! Maps from a stream of another width to the original's, trained beside the model and left behind.
//!
//! ```text
//! 1/n Σ_i ‖h_i P_i − h'_π(i)‖² / ‖h'_π(i)‖²        P_i [own width, width]
//! ```
//!
//! (the regressors of FitNets: Romero et al. 2014, arXiv 1412.6550; `W_h` of TinyBERT: Jiao et al. 2019, arXiv
//! 1909.10351). Each map begins as the ridge regression of the original's stream on the student's over the
//! first batches, so that what is learned is not first of all where the features went.

use lapidary_factor::{Regression, matrix_from_tensor, matrix_to_tensor};
use lapidary_kernels::{AdamW, AdamWOptions, DType, Tensor, Var};
use lapidary_model::Model;

use super::hints::seen;
use crate::error::engine;
use crate::{CalibrationData, Result};

/// Batches that the first maps are fitted to.
const BATCHES: usize = 16;
/// Ridge of that fit, in units of the mean square of a feature.
const RIDGE: f64 = 1e-4;

/// One map for each block that learns by hints.
#[derive(Clone, Debug)]
pub(super) struct Projections {
    /// `[own width, width]` each.
    maps: Vec<Var>,
}

impl Projections {
    /// Maps between the streams of two models behind `pairs` of blocks, by the first batches of `data`.
    pub(super) fn fitted(
        pairs: &[(usize, usize)],
        student: &Model,
        teacher: &Model,
        data: &CalibrationData,
        batch: usize,
    ) -> Result<Self> {
        let [own, wanted] = [student, teacher].map(|model| model.spec().width);
        let mut sums: Vec<Regression> = pairs
            .iter()
            .map(|_| Regression::through_origin(own, wanted))
            .collect();
        for batch in data.batches(batch, &student.device()).take(BATCHES) {
            let batch = batch?;
            let (_, streams) = seen(student, &batch, pairs.iter().map(|(own, _)| *own))?;
            let (_, targets) = seen(teacher, &batch, pairs.iter().map(|(_, whole)| *whole))?;
            for (sums, (stream, target)) in sums.iter_mut().zip(streams.iter().zip(&targets)) {
                let stream = matrix_from_tensor("residual stream", stream)?;
                let target = matrix_from_tensor("residual stream", target)?;
                sums.add(stream.as_ref(), target.as_ref())?;
            }
        }
        // What is trained is in no half precision.
        let dtype = match student.dtype() {
            DType::F16 | DType::BF16 => DType::F32,
            other => other,
        };
        let maps = sums.iter().map(|sums| {
            let map = sums.solve(RIDGE * sums.mean_square())?;
            let map = matrix_to_tensor(map.weight.as_ref(), dtype, &student.device())?;
            engine(Var::from_tensor(&map))
        });
        Ok(Self {
            maps: maps.collect::<Result<_>>()?,
        })
    }

    /// Each stream `[tokens, own width]` as the original's would be, `[tokens, width]`.
    pub(super) fn applied(&self, streams: &[Tensor]) -> Result<Vec<Tensor>> {
        let pairs = streams.iter().zip(&self.maps);
        pairs
            .map(|(stream, map)| engine(stream.matmul(map.as_tensor())))
            .collect()
    }

    /// What trains the maps, without decay.
    pub(super) fn optimiser(&self, rate: f64) -> Result<AdamW> {
        let options = AdamWOptions {
            learning_rate: rate,
            beta1: 0.9,
            beta2: 0.99,
            epsilon: 1e-8,
            weight_decay: 0.0,
        };
        Ok(AdamW::new(self.maps.clone(), options)?)
    }
}

#[cfg(test)]
mod tests {
    use super::super::hints::{Hints, distance, tests::model};
    use super::*;
    use crate::data::Batch;
    use lapidary_kernels::Device;

    fn data() -> CalibrationData {
        let window = |seed: u32| (0..4).map(|at| (at * at + 3 * seed + at) % 8).collect();
        CalibrationData::windows((0..12).map(window)).unwrap()
    }

    /// A ridge of `λ = 10⁻⁴ Σs / width` leaves at most `λ/4` of each direction's energy `s`, that is
    /// `10⁻⁴ / 4` of them all.
    #[test]
    fn a_model_is_mapped_to_itself() {
        let (whole, data) = (model(3, 8, 1), data());
        let hints = Hints::new(&whole, &whole, &data, 12).unwrap();
        let pairs = [(0, 0), (1, 1), (2, 2)];
        let maps = Projections::fitted(&pairs, &whole, &whole, &data, 12).unwrap();
        let batch = Batch::new(data.examples(), &Device::Cpu).unwrap();
        let (_, streams) = hints.student(&whole, &batch).unwrap();
        let (_, wanted) = hints.teacher(&whole, &batch).unwrap();
        let apart = |found: &[Tensor]| {
            let found = distance(found, &wanted).unwrap();
            found.to_scalar::<f64>().unwrap()
        };
        assert_eq!(apart(&streams), 0.0);
        let mapped = apart(&maps.applied(&streams).unwrap());
        assert!(mapped > 0.0 && mapped <= 0.25 * RIDGE, "{mapped}");
    }

    /// On the batch that they were fitted to, maps do better than none, which are 1 away; and steps along
    /// the gradient make them better still where the ridge kept them short.
    #[test]
    fn maps_of_a_narrower_stream_are_better_than_none_and_train() {
        let (narrow, whole, data) = (model(3, 4, 2), model(3, 8, 1), data());
        let hints = Hints::new(&narrow, &whole, &data, 12).unwrap();
        let batch = Batch::new(data.examples(), &Device::Cpu).unwrap();
        let (_, wanted) = hints.teacher(&whole, &batch).unwrap();
        let apart = || {
            let (_, streams) = hints.student(&narrow, &batch).unwrap();
            distance(&streams, &wanted).unwrap()
        };
        let before = apart().to_scalar::<f64>().unwrap();
        assert!(before > 0.0 && before < 1.0, "{before}");
        let mut optimiser = hints.optimiser(1e-7).unwrap().unwrap();
        let gradients = apart().backward().unwrap();
        optimiser.step(&gradients, 1e-7, 1.0).unwrap();
        let after = apart().to_scalar::<f64>().unwrap();
        assert!(after < before, "{after} {before}");
    }
}
