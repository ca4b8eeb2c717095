//! One pass over data that finds out what every method asked for needs.

use std::collections::{BTreeMap, BTreeSet};

use lapidary_factor::Matrix;
use lapidary_kernels::{DType, Tensor, backward};
use lapidary_model::{Model, Output, Pass};

use crate::data::Batch;
use crate::edit::block_of;
use crate::error::engine;
use crate::fingerprint::Fingerprint;
use crate::fisher::FisherSums;
use crate::held::Held;
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
    /// Hash of the data.
    data: u128,
    /// Number of examples.
    pub examples: usize,
    /// Number of tokens, without padding.
    pub tokens: usize,
    /// The loss that was differentiated, if any was.
    pub objective: Option<Objective>,
    /// Its mean over the examples.
    pub mean_loss: Option<f64>,
    statistics: BTreeMap<Statistic, Held>,
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
            data: data.hash()?,
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
            let found = fisher.finish(samples)?.into_iter();
            let found = found.map(|(statistic, values)| (statistic, Held::Values(values)));
            calibration.keep(found, requirements)?;
        }
        if !requirements.sites().is_empty() {
            calibration.keep(sites.finish()?, requirements)?;
        }
        Ok(calibration)
    }

    /// A calibration of `model` with everything in `requirements`, which takes from this one, of
    /// the `original`, what holds for both: sums at sites before which the two models are the same,
    /// parameter by parameter. The rest is collected. Gradients depend on every weight and are
    /// always taken anew.
    ///
    /// # Errors
    /// When this calibration is of other weights than `original`'s, or as [`Calibration::collect`].
    pub fn carried_over(
        &self,
        original: &Model,
        model: &Model,
        data: &CalibrationData,
        requirements: &Requirements,
        options: CalibrationOptions,
    ) -> Result<Self> {
        self.check(original)?;
        let same = same_blocks(original, model)?;
        let holds = |statistic: &Statistic| {
            let mut sites = statistic.sites().peekable();
            statistic.layer().is_none()
                && sites.peek().is_some()
                && sites.all(|site| block_of(site).is_some_and(|(block, _)| block < same))
        };
        let known: BTreeMap<Statistic, Held> = match self.data == data.hash()? {
            true => requirements
                .statistics
                .iter()
                .filter(|statistic| holds(statistic))
                .filter_map(|statistic| {
                    Some((statistic.clone(), self.statistics.get(statistic)?.clone()))
                })
                .collect(),
            false => BTreeMap::new(),
        };
        let missing = requirements.statistics.iter();
        let missing = Requirements {
            statistics: missing
                .filter(|statistic| !known.contains_key(statistic))
                .cloned()
                .collect(),
        };
        let mut calibration = Self::collect(model, data, &missing, options)?;
        calibration.statistics.extend(known);
        Ok(calibration)
    }

    fn keep(
        &mut self,
        found: impl IntoIterator<Item = (Statistic, Held)>,
        requirements: &Requirements,
    ) -> Result<()> {
        for (statistic, held) in found {
            if !requirements.statistics.contains(&statistic) {
                continue;
            }
            if !held.is_finite()? {
                return Err(Error::NotFinite {
                    what: statistic.to_string(),
                });
            }
            self.statistics.insert(statistic, held);
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

    /// One statistic in `f64`, with the shape that [`Statistic`] gives it. A second moment, of which
    /// half is held, is made whole anew at each call.
    ///
    /// # Errors
    /// When the statistic was not collected.
    pub fn tensor(&self, statistic: &Statistic) -> Result<Tensor> {
        self.held(statistic)?.tensor()
    }

    /// One statistic of two dimensions, called `name` in errors.
    pub(crate) fn matrix(&self, name: &'static str, statistic: &Statistic) -> Result<Matrix> {
        self.held(statistic)?.matrix(name)
    }

    fn held(&self, statistic: &Statistic) -> Result<&Held> {
        let held = self.statistics.get(statistic);
        held.ok_or_else(|| Error::NotCollected {
            statistic: statistic.to_string(),
        })
    }

    /// Whether a statistic was carried over from `other` and not collected anew.
    pub fn shares(&self, other: &Self, statistic: &Statistic) -> bool {
        let found = [self, other].map(|calibration| calibration.statistics.get(statistic));
        matches!(found, [Some(one), Some(other)] if one.is(other))
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

/// The number of first blocks that two models have alike, with all that comes before them.
fn same_blocks(one: &Model, other: &Model) -> Result<usize> {
    if one.spec().width != other.spec().width || one.spec().input != other.spec().input {
        return Ok(0);
    }
    let specs = [one, other].map(|model| model.spec().expanded_blocks());
    let pairs = specs[0].iter().zip(&specs[1]);
    let mut same = pairs.take_while(|(one, other)| one == other).count();
    let [first, second] = [one.parameters(), other.parameters()];
    let names: BTreeSet<&String> = first.keys().chain(second.keys()).collect();
    for name in names {
        let block = match block_of(name) {
            Some((block, _)) => block,
            None if name.starts_with("embeddings") => 0,
            None => continue,
        };
        if block < same && !equal(first.get(name), second.get(name))? {
            same = block;
        }
    }
    Ok(same)
}

/// Whether two parameters are the same, bit for bit.
pub(crate) fn equal(one: Option<&Tensor>, other: Option<&Tensor>) -> Result<bool> {
    match (one, other) {
        (Some(one), Some(other)) if one.id() == other.id() => Ok(true),
        (Some(one), Some(other)) => Ok(one.dtype() == other.dtype()
            && one.dims() == other.dims()
            && crate::fingerprint::of_values(one)? == crate::fingerprint::of_values(other)?),
        _ => Ok(false),
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
        let gradients = engine(backward(&engine(losses.mean_all())?))?;
        fisher.add(&gradients)?;
    }
    Ok((total / data.len() as f64, samples))
}
