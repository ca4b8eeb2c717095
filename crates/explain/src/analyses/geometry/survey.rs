//! Running a model over windows of tokens, summing every layer in the same pass.

use super::decomposition::{Decomposition, Sums};
use crate::error::engine;
use crate::{Error, Result};
use lapidary_kernels::Tensor;
use lapidary_model::{HeadSpec, Input, Model, Pass};
use lapidary_signal::Trace;
use rand::{Rng, RngExt};

/// Where hidden states are read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sites {
    /// The residual stream: the embeddings and what every block writes.
    #[default]
    Stream,
    /// What every attention reads, after its norm where that stands before, and what the final
    /// norm writes.
    Normalised,
}

impl Sites {
    /// Names of the sites in a model with so many blocks.
    pub fn names(self, blocks: usize) -> Vec<String> {
        match self {
            Self::Stream => std::iter::once("embeddings".to_owned())
                .chain((0..blocks).map(|block| format!("blocks.{block}.out")))
                .collect(),
            Self::Normalised => (0..blocks)
                .map(|block| format!("blocks.{block}.attention.in"))
                .chain(["final_norm".to_owned()])
                .collect(),
        }
    }
}

/// How hidden states are read.
#[derive(Clone, Copy, Debug)]
pub struct Reading {
    /// Where.
    pub sites: Sites,
    /// Positions at the start of a window that do not count: the first token is an outlier in
    /// many models.
    pub skip: usize,
    /// Windows that run at one time.
    pub batch: usize,
    /// Windows whose states are kept whole, for residuals and scores.
    pub keep: usize,
}

impl Default for Reading {
    fn default() -> Self {
        Self {
            sites: Sites::Stream,
            skip: 1,
            batch: 8,
            keep: 2,
        }
    }
}

/// Sums over the hidden states of every site; what was read in two places can be merged.
#[derive(Clone, Debug)]
pub struct Survey {
    reading: Reading,
    sites: Vec<(String, Sums)>,
}

impl Survey {
    /// Nothing read yet from a model like this one.
    pub fn new(model: &Model, reading: Reading) -> Self {
        let blocks = model.spec().expanded_blocks().len();
        let each = |name| (name, Sums::new(reading.keep));
        Self {
            reading,
            sites: reading.sites.names(blocks).into_iter().map(each).collect(),
        }
    }

    /// Runs `model` over windows of the same length, each a context.
    ///
    /// # Errors
    /// When windows differ in length or are too short, or the model does not read tokens.
    pub fn read(&mut self, model: &Model, windows: &[Vec<u32>]) -> Result<()> {
        crate::error::require_one_stream(model, "hidden states by position")?;
        let length = windows.first().map_or(0, Vec::len);
        let counted = length.saturating_sub(self.reading.skip);
        if !windows.is_empty() && counted < 2 {
            return Err(Error::invalid(
                "length of a window",
                length,
                format!("at least {}, to have two positions", self.reading.skip + 2),
            ));
        }
        if let Some(other) = windows.iter().find(|window| window.len() != length) {
            return Err(Error::invalid(
                "length of a window",
                other.len(),
                format!("{length}, as that of the first"),
            ));
        }
        for batch in windows.chunks(self.reading.batch.max(1)) {
            let ids: Vec<u32> = batch.iter().flatten().copied().collect();
            let ids = engine(Tensor::from_vec(
                ids,
                (batch.len(), length),
                &model.device(),
            ))?;
            let mut trace = Trace::new();
            for (name, _) in &self.sites {
                trace = trace.capture(name)?;
            }
            let pass = Pass {
                trace: Some(&trace),
                only_last: scores_each_position(model),
                ..Pass::default()
            };
            model.forward(&Input::tokens(ids), pass)?;
            for (name, sums) in &mut self.sites {
                let hidden = trace.signal(name)?.into_value();
                sums.add(&engine(hidden.narrow(1, self.reading.skip, counted))?)?;
            }
        }
        Ok(())
    }

    /// Adds what another shard read.
    ///
    /// # Errors
    /// When the two have read different sites, positions or widths.
    pub fn merge(&mut self, later: Self) -> Result<()> {
        let names = |survey: &Self| -> Vec<String> {
            survey.sites.iter().map(|(name, _)| name.clone()).collect()
        };
        if names(self) != names(&later) || self.reading.skip != later.reading.skip {
            return Err(Error::invalid(
                "sites of the shard",
                format!("{:?} without {}", names(&later), later.reading.skip),
                format!("{:?} without {}", names(self), self.reading.skip),
            ));
        }
        for ((_, sums), (_, more)) in self.sites.iter_mut().zip(later.sites) {
            sums.merge(more)?;
        }
        Ok(())
    }

    /// The decomposition of every site, in order.
    pub fn finish(&self) -> Result<Vec<(String, Decomposition)>> {
        let each = self.sites.iter();
        each.map(|(name, sums)| Ok((name.clone(), sums.finish()?)))
            .collect()
    }
}

/// Whether the scores of one position can be had alone; a head that pools needs all.
fn scores_each_position(model: &Model) -> bool {
    matches!(model.spec().head, HeadSpec::LanguageModel { .. })
}

/// What replaces tokens in a control.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    /// Every token is drawn uniformly.
    All,
    /// Those of the second half of each window are.
    SecondHalf,
}

/// The windows with tokens replaced by uniform ones below `vocabulary`.
pub fn randomised(
    windows: &[Vec<u32>],
    vocabulary: usize,
    control: Control,
    generator: &mut impl Rng,
) -> Vec<Vec<u32>> {
    let mut windows = windows.to_vec();
    for window in &mut windows {
        let start = match control {
            Control::All => 0,
            Control::SecondHalf => window.len() / 2,
        };
        for token in window.iter_mut().skip(start) {
            *token = generator.random_range(0..vocabulary.max(1) as u32);
        }
    }
    windows
}
