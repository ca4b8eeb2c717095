//! What pruning can be told.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Among which weights the smallest scores are looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scope {
    /// All chosen layers together, each losing what it can spare.
    Global,
    /// Each layer by itself.
    Layer,
    /// Each row of a layer, which is what one of its outputs reads.
    Row,
}

/// Where zeros may be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pattern {
    /// Anywhere.
    #[default]
    Unstructured,
    /// Of every `m` neighbours of a row, `n` stay; a last, shorter group keeps as many, if it has
    /// them. 2 of 4 is what the sparse units of GPUs multiply (Mishra et al. 2021, arXiv
    /// 2104.08378).
    NOfM {
        /// Weights that stay.
        n: usize,
        /// Weights of a group.
        m: usize,
    },
}

impl Pattern {
    /// Weights of a row of `columns` that it takes away, where it says so.
    pub(super) fn pruned(self, columns: usize) -> Option<usize> {
        match self {
            Self::Unstructured => None,
            Self::NOfM { n, m } => {
                let (groups, rest) = (columns / m.max(1), columns % m.max(1));
                Some(groups * m.saturating_sub(n) + rest.saturating_sub(n))
            }
        }
    }
}

/// What the methods that set weights to zero, or take out whole heads or channels, can be told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PruneSettings {
    /// Among which weights the smallest are looked for; what the method's source does when absent:
    /// `magnitude`, `random-weights`, `second-order` and `movement` in each layer, `first-order`,
    /// `prune-heads` and `channel-gradient` in the whole model, `wanda` in each row.
    pub scope: Option<Scope>,
    /// Whether, in the whole model, the scores of `magnitude` and `wanda` are measured in units of
    /// their layer's root mean square: layers differ in scale, and a layer may be scaled with the
    /// inverse in the next one. The scores of the other methods are losses, which compare.
    pub normalise: bool,
    /// Where zeros may be.
    pub pattern: Pattern,
    /// The share of each matrix that stays whatever the scores say, so that no layer collapses.
    pub keep_at_least: f64,
    /// `λ` of `second-order`, in units of the mean square of a layer's inputs.
    pub damping: f64,
    /// Columns among which `second-order` chooses exactly; what it takes there is made up for in all
    /// columns to the right. As many as a layer has is exact, and costs their cube for each row. With a
    /// pattern, as many more as make its groups whole.
    pub block: usize,
    /// How `movement` trains while it prunes.
    pub movement: MovementSettings,
}

/// How `movement` trains while it prunes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MovementSettings {
    /// Steps of training.
    pub steps: u64,
    /// The share of the steps over which zeros grow to their share, along a cubic ramp; in the rest
    /// the mask is fixed. Above 0 and at most 1.
    pub ramp: f64,
    /// Steps between two masks.
    pub every: u64,
    /// The highest learning rate: it rises over a tenth of the steps and falls to zero as a cosine.
    pub rate: f64,
    /// Decay of the weights that the mask keeps.
    pub weight_decay: f64,
    /// Examples of a step.
    pub batch: usize,
    /// Of so many examples one is not trained on, and from the last mask on the model is measured on those
    /// every [`Self::every`] steps: the best is what comes out. 0 for none and the model of the last step.
    pub held_out: usize,
}

impl Default for MovementSettings {
    fn default() -> Self {
        Self {
            steps: 100,
            ramp: 0.7,
            every: 5,
            rate: 1e-4,
            weight_decay: 0.01,
            batch: 8,
            held_out: 0,
        }
    }
}

impl MovementSettings {
    fn check(&self) -> Result<()> {
        for (what, found) in [
            ("steps of movement", self.steps),
            ("steps between two masks of movement", self.every),
            ("batch of movement", self.batch as u64),
        ] {
            if found == 0 {
                return Err(Error::invalid(what, found, "at least 1"));
            }
        }
        if self.held_out == 1 {
            let expected = "0 for none, or at least 2, so that some are trained on";
            return Err(Error::invalid("pruning.movement.held_out", 1, expected));
        }
        if !(self.ramp > 0.0 && self.ramp <= 1.0) {
            let what = "share of the steps of movement in which zeros grow";
            return Err(Error::invalid(what, self.ramp, "above 0 and at most 1"));
        }
        if !(self.rate > 0.0 && self.rate.is_finite()) {
            return Err(Error::invalid("rate of movement", self.rate, "above 0"));
        }
        if !(self.weight_decay >= 0.0 && self.weight_decay.is_finite()) {
            let what = "decay of the weights that movement keeps";
            return Err(Error::invalid(what, self.weight_decay, "at least 0"));
        }
        Ok(())
    }
}

impl Default for PruneSettings {
    fn default() -> Self {
        Self {
            scope: None,
            normalise: true,
            pattern: Pattern::Unstructured,
            keep_at_least: 0.01,
            damping: 0.01,
            block: 64,
            movement: MovementSettings::default(),
        }
    }
}

impl PruneSettings {
    pub(super) fn check(&self) -> Result<()> {
        if let Pattern::NOfM { n, m } = self.pattern
            && !(n >= 1 && n < m)
        {
            return Err(Error::invalid(
                "pattern",
                format!("{n} of {m}"),
                "at least 1 of more than that",
            ));
        }
        if !(0.0..1.0).contains(&self.keep_at_least) {
            return Err(Error::invalid(
                "share that each matrix keeps",
                self.keep_at_least,
                "at least 0 and below 1",
            ));
        }
        if !(self.damping > 0.0 && self.damping.is_finite()) {
            return Err(Error::invalid("damping", self.damping, "above 0"));
        }
        if self.block == 0 {
            return Err(Error::invalid(
                "columns of a block",
                self.block,
                "at least 1",
            ));
        }
        self.movement.check()
    }
}
