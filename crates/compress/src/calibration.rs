//! One pass over data that finds out what every method asked for needs.

use std::collections::BTreeMap;

use lapidary_kernels::{DType, Tensor};
use lapidary_model::{Model, Output, Pass};

use crate::data::Batch;
use crate::error::engine;
use crate::fingerprint::Fingerprint;
use crate::fisher::FisherSums;
use crate::objective::Objective;
use crate::requirements::{Requirements, Statistic};
use crate::sites::SiteSums;
use crate::{CalibrationData, Error, Result};

/// How a calibration is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CalibrationOptions {
    /// Examples per forward pass where no gradients are needed.
    pub batch: usize,
    /// Examples whose mean gradient is squared. 1 gives the Fisher information that the paper
    /// defines; more is faster and biased, see [`crate::fisher`].
    pub examples_per_gradient: usize,
    /// Passes over the data for Kronecker factors. The first gives `A = E[Gᵀ G]` and
    /// `B = E[G Gᵀ]` up to scale; each further one is a step of the power iteration
    /// `A ← E[Gᵀ B G]`, `B ← E[G A Gᵀ]` towards the nearest Kronecker product.
    pub kronecker_passes: usize,
}

impl Default for CalibrationOptions {
    fn default() -> Self {
        Self {
            batch: 8,
            examples_per_gradient: 1,
            kronecker_passes: 1,
        }
    }
}

/// Statistics of one model on some data, summed in `f64`, and the weights that they belong to.
#[derive(Clone, Debug)]
pub struct Calibration {
    fingerprint: Fingerprint,
    /// Number of examples.
    pub examples: usize,
    /// Number of tokens, without padding.
    pub tokens: usize,
    /// The loss that was differentiated, if any was.
    pub objective: Option<Objective>,
    /// Its mean over the examples.
    pub mean_loss: Option<f64>,
    statistics: BTreeMap<Statistic, Tensor>,
}

impl Calibration {
    /// Collects everything in `requirements` over `data`, without dropout. Memory holds the
    /// sums ([`Requirements::bytes`]) and the activations of one batch.
    pub fn collect(
        model: &Model,
        data: &CalibrationData,
        requirements: &Requirements,
        options: CalibrationOptions,
    ) -> Result<Self> {
        let mut calibration = Self {
            fingerprint: Fingerprint::of(model)?,
            examples: data.len(),
            tokens: data.tokens(),
            objective: None,
            mean_loss: None,
            statistics: BTreeMap::new(),
        };
        let wanted = &requirements.statistics;
        let sites = SiteSums::new(wanted, model.spec().vocabulary().unwrap_or(0));
        if requirements.gradients().is_empty() {
            if !requirements.is_empty() {
                for batch in data.batches(options.batch, &model.device()) {
                    forward(model, &batch?, Some(&sites))?;
                }
            }
        } else {
            let objective = Objective::of(model, data)?;
            let mut fisher = FisherSums::new(model, wanted)?;
            let (loss, samples) =
                differentiate(&mut fisher, data, objective, Some(&sites), options)?;
            if fisher.wants_kronecker() {
                for _ in 1..options.kronecker_passes.max(1) {
                    fisher.refine()?;
                    differentiate(&mut fisher, data, objective, None, options)?;
                }
            }
            calibration.objective = Some(objective);
            calibration.mean_loss = Some(loss);
            calibration.keep(fisher.finish(samples)?, requirements)?;
        }
        if !requirements.sites().is_empty() {
            calibration.keep(sites.finish()?, requirements)?;
        }
        Ok(calibration)
    }

    fn keep(
        &mut self,
        found: BTreeMap<Statistic, Tensor>,
        requirements: &Requirements,
    ) -> Result<()> {
        for (statistic, tensor) in found {
            if !requirements.statistics.contains(&statistic) {
                continue;
            }
            let sum = engine(engine(tensor.abs())?.sum_all())?;
            if !engine(sum.to_scalar::<f64>())?.is_finite() {
                return Err(Error::NotFinite {
                    what: statistic.to_string(),
                });
            }
            self.statistics.insert(statistic, tensor);
        }
        Ok(())
    }

    /// The weights that were calibrated.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// Refuses a model whose weights are not the ones that were calibrated.
    pub fn check(&self, model: &Model) -> Result<()> {
        let found = Fingerprint::of(model)?;
        if found == self.fingerprint {
            return Ok(());
        }
        Err(Error::Stale {
            calibrated: self.fingerprint.to_string(),
            found: found.to_string(),
        })
    }

    /// One statistic in `f64`, with the shape that [`Statistic`] gives it.
    pub fn tensor(&self, statistic: &Statistic) -> Result<&Tensor> {
        self.statistics
            .get(statistic)
            .ok_or_else(|| Error::NotCollected {
                statistic: statistic.to_string(),
            })
    }

    /// One statistic that is a number.
    pub fn number(&self, statistic: &Statistic) -> Result<f64> {
        engine(self.tensor(statistic)?.to_scalar::<f64>())
    }

    /// One statistic that is a vector.
    pub fn vector(&self, statistic: &Statistic) -> Result<Vec<f64>> {
        engine(self.tensor(statistic)?.to_vec1::<f64>())
    }
}

/// Runs one batch, adding to the sums at sites.
pub(crate) fn forward(
    model: &Model,
    batch: &Batch<'_>,
    sites: Option<&SiteSums>,
) -> Result<Output> {
    let trace = match sites {
        Some(sites) => Some(sites.trace(batch)?),
        None => None,
    };
    Ok(model.forward(
        &batch.input,
        Pass {
            padding: batch.padding.as_ref(),
            trace: trace.as_ref(),
            ..Pass::default()
        },
    )?)
}

/// One pass with gradients: the mean loss over the examples, and the number of gradients.
fn differentiate(
    fisher: &mut FisherSums,
    data: &CalibrationData,
    objective: Objective,
    sites: Option<&SiteSums>,
    options: CalibrationOptions,
) -> Result<(f64, u64)> {
    let device = fisher.model.device();
    let mut total = 0.0;
    let mut samples = 0;
    for batch in data.batches(options.examples_per_gradient, &device) {
        let batch = batch?;
        let output = forward(&fisher.model, &batch, sites)?;
        let losses = objective.losses(&output, &batch)?;
        let sum = engine(engine(losses.to_dtype(DType::F64))?.sum_all())?;
        total += engine(sum.to_scalar::<f64>())?;
        samples += 1;
        let gradients = engine(engine(losses.mean_all())?.backward())?;
        fisher.add(&gradients)?;
    }
    Ok((total / data.len() as f64, samples))
}
