//! How much of a behaviour some heads carry: all others are set to their means.

use super::batch::{Batch, Case, Reading, batches};
use super::means::Means;
use super::node::{Node, Place, masks};
use crate::error::engine;
use crate::{Error, Result};
use lapidary_kernels::Tensor;
use lapidary_model::Model;
use lapidary_signal::{Signal, Trace};
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// What is measured of a model's answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Metric {
    /// The score of the class less that of the foil.
    #[default]
    ScoreDifference,
    /// The same of probabilities.
    ProbabilityDifference,
}

/// Prompts on which circuits are cut out.
///
/// With `F` the mean of the metric, the faithfulness of a circuit is
/// `(F(circuit) − F(empty)) / (F(full) − F(empty))`: one for the whole model, zero for nothing.
pub struct Ablation<'a> {
    model: &'a Model,
    batches: Vec<Batch>,
    means: Means,
    metric: Metric,
    full: f64,
    empty: f64,
}

/// How random circuits of one size do.
#[derive(Clone, Debug, PartialEq)]
pub struct Control {
    /// Share of the nodes in each.
    pub share: f64,
    /// The faithfulness of each.
    pub faithfulness: Vec<f64>,
    /// The share of them that the circuit in question is more faithful than.
    pub beaten: f64,
}

impl<'a> Ablation<'a> {
    /// Measures the whole model and the empty circuit.
    ///
    /// # Errors
    /// When the two don't differ, so that there is nothing to be faithful to; and as
    /// [`Scorer::new`](super::Scorer::new).
    pub fn new(model: &'a Model, cases: &[Case], means: Means, metric: Metric) -> Result<Self> {
        let mut ablation = Self {
            model,
            batches: batches(model, cases)?,
            means,
            metric,
            full: 0.0,
            empty: 0.0,
        };
        let all = super::heads(model)?;
        let values = ablation.values(&[all, Vec::new()])?;
        if let [full, empty] = values.as_slice() {
            (ablation.full, ablation.empty) = (*full, *empty);
        }
        if ablation.full == ablation.empty || !(ablation.full - ablation.empty).is_finite() {
            return Err(Error::invalid(
                "difference between the model with its heads and without",
                ablation.full - ablation.empty,
                "another number; the reference prompts must not be the prompts themselves",
            ));
        }
        Ok(ablation)
    }

    /// The metric of the whole model.
    pub fn full(&self) -> f64 {
        self.full
    }

    /// The metric when every head is set to its mean.
    pub fn empty(&self) -> f64 {
        self.empty
    }

    /// The mean of the metric for each circuit.
    pub fn values(&self, circuits: &[Vec<Node>]) -> Result<Vec<f64>> {
        let mut sums = vec![0.0; circuits.len()];
        let mut cases = 0;
        for batch in &self.batches {
            cases += batch.cases();
            let at_once = batch.copies_at_once();
            for (chunk, sums) in circuits.chunks(at_once).zip(sums.chunks_mut(at_once)) {
                for (sum, numbers) in sums.iter_mut().zip(self.cut_out(batch, chunk)?) {
                    *sum += numbers.iter().sum::<f64>();
                }
            }
        }
        Ok(sums
            .into_iter()
            .map(|sum| sum / cases.max(1) as f64)
            .collect())
    }

    /// The faithfulness of each circuit.
    pub fn faithfulness(&self, circuits: &[Vec<Node>]) -> Result<Vec<f64>> {
        let values = self.values(circuits)?.into_iter();
        let span = self.full - self.empty;
        Ok(values.map(|value| (value - self.empty) / span).collect())
    }

    /// The metric of each case when only a circuit is left, `[circuit][case]`.
    fn cut_out(&self, batch: &Batch, circuits: &[Vec<Node>]) -> Result<Vec<Vec<f64>>> {
        let copies = circuits.len();
        let mut trace = Trace::new();
        for block in 0..self.model.spec().expanded_blocks().len() {
            let found = batch.found(Place::Mixed, block)?;
            let kind = (found.dtype(), found.device());
            let keep = masks(circuits, block, self.model, batch.length(), kind)?;
            // [circuits · cases, length, features]
            let mut shape = vec![copies, batch.cases()];
            shape.extend(keep.dims().iter().skip(2));
            let keep = engine(engine(keep.broadcast_as(shape))?.flatten(0, 1))?;
            let mean = match self.means.at(Place::Mixed, block, batch.length())? {
                Some(mean) => mean,
                None => engine(engine(found.zeros_like())?.narrow(0, 0, 1))?,
            };
            trace = trace.replace(&Place::Mixed.site(block), move |_, signal| {
                kept(&signal.into_value(), &keep, &mean)
            })?;
        }
        let output = batch.run(self.model, 0, copies, &trace)?;
        let logits = batch.logits(&output)?;
        let mut shape = vec![copies, batch.cases()];
        shape.extend(logits.dims().iter().skip(1));
        let reading = match self.metric {
            Metric::ScoreDifference => Reading::Difference,
            Metric::ProbabilityDifference => Reading::ProbabilityDifference,
        };
        batch.read(&engine(logits.reshape(shape))?, reading)
    }

    /// `circuit` without the nodes that it is at least as faithful without, tried in the order
    /// given.
    pub fn pruned(&self, circuit: &[Node]) -> Result<Vec<Node>> {
        let mut kept = circuit.to_vec();
        let mut best = self.one(&kept)?;
        for node in circuit {
            let without: Vec<Node> = kept.iter().copied().filter(|one| one != node).collect();
            let faithfulness = self.one(&without)?;
            if faithfulness >= best {
                (kept, best) = (without, faithfulness);
            }
        }
        Ok(kept)
    }

    fn one(&self, circuit: &[Node]) -> Result<f64> {
        let found = self.faithfulness(&[circuit.to_vec()])?;
        Ok(found.first().copied().unwrap_or(f64::NAN))
    }

    /// Random circuits of 10, 20 to 100 per cent of `nodes`, `draws` of each size, beside a
    /// circuit whose faithfulness is given.
    pub fn controls(
        &self,
        faithfulness: f64,
        nodes: &[Node],
        draws: usize,
        generator: &mut ChaCha8Rng,
    ) -> Result<Vec<Control>> {
        let mut controls = Vec::new();
        for tenth in 1..=10 {
            let share = f64::from(tenth) / 10.0;
            let size = (share * nodes.len() as f64).round() as usize;
            let circuits: Vec<Vec<Node>> = (0..draws)
                .map(|_| {
                    let mut drawn = nodes.to_vec();
                    drawn.shuffle(generator);
                    drawn.truncate(size);
                    drawn
                })
                .collect();
            let found = self.faithfulness(&circuits)?;
            let beaten = found.iter().filter(|one| faithfulness > **one).count();
            controls.push(Control {
                share,
                beaten: beaten as f64 / draws.max(1) as f64,
                faithfulness: found,
            });
        }
        Ok(controls)
    }
}

/// `value` where `keep` is one and `mean` elsewhere.
fn kept(value: &Tensor, keep: &Tensor, mean: &Tensor) -> lapidary_signal::Result<Signal> {
    let kept = value
        .broadcast_sub(mean)
        .and_then(|away| (away * keep)?.broadcast_add(mean))
        .map_err(lapidary_kernels::Error::from)?;
    Ok(Signal::from(kept))
}
