//! The experiments, one file for each system, and what several of them use.

pub mod agreement;
pub mod attending;
pub mod attributes;
pub mod autoencoder;
pub mod bigram;
pub mod chefer;
pub mod classifier;
pub mod clip;
pub mod clustering;
pub mod combiner;
pub mod compression_survey;
mod compression_vision;
pub mod contextual;
pub mod curvature;
pub mod decoder;
pub mod decompx;
pub mod depth;
pub mod dotresize;
pub mod ecoformer;
pub mod energy;
pub mod entropy_pruning;
pub mod fastmax;
pub mod fire;
pub mod fit;
pub mod fusegpt;
pub mod fwsvd;
pub mod geometry;
pub mod glyphs;
pub mod grammar;
pub mod information_pathways;
pub mod introduction;
mod jobs;
pub mod kernelized;
pub mod linearity;
pub mod linformer;
pub mod lion;
pub mod logit_attribution;
pub mod lorap;
pub mod mamba_shedder;
pub mod masked;
pub mod mini_clip;
pub mod mixers;
pub mod modegpt;
pub mod mra;
pub mod narrow;
pub mod narrowing;
pub mod polarity;
mod probe;
pub mod pruning_study;
pub mod qdsformer;
pub mod rducb;
pub mod reformer;
pub mod replace_me;
pub mod sequences;
pub mod slicegpt;
pub mod soft;
pub mod sparse_transformer;
pub mod squashing;
pub mod talking_heads;
mod texts;
pub mod topics;
pub mod tree_fields;
pub mod vcc;
pub mod wavspa;
pub mod white_box;

use crate::error::engine;
use crate::{Claim, Error, Result, Scale, Setting, Verdict};
use lapidary_kernels::{DType, Tensor};
use lapidary_model::{Model, Package};

impl Claim {
    /// A claim, the published figure, the measured one, and whether the claim holds.
    pub(crate) fn new(
        claim: &str,
        published: &str,
        measured: impl Into<String>,
        verdict: Verdict,
    ) -> Self {
        Self {
            claim: claim.to_owned(),
            published: published.to_owned(),
            measured: measured.into(),
            verdict,
            note: String::new(),
            findings: Vec::new(),
        }
    }

    /// The same with a note.
    pub(crate) fn noted(mut self, note: impl Into<String>) -> Self {
        self.note = note.into();
        self
    }
}

/// Whether a claim about a trained model holds; a smoke run, which hardly trains, cannot tell.
pub(crate) fn after_training(scale: Scale, holds: bool) -> Verdict {
    match scale {
        Scale::Smoke => Verdict::NotMeasured,
        Scale::Small | Scale::Full => Verdict::of(holds),
    }
}

/// As [`after_training`], of models that say nothing when they have not learned their task.
pub(crate) fn after_learning(scale: Scale, learned: bool, holds: bool) -> Verdict {
    match learned {
        true => after_training(scale, holds),
        false => Verdict::NotMeasured,
    }
}

/// Keeps a trained model under `name` when the setting asks for it.
pub(crate) fn keep(setting: &Setting, name: &str, model: &Model, labels: &[&str]) -> Result<()> {
    let Some(directory) = &setting.models else {
        return Ok(());
    };
    std::fs::create_dir_all(directory).map_err(|error| {
        Error::Experiment(format!("{} cannot be made: {error}", directory.display()))
    })?;
    let model = Model::new(model.spec().clone(), &mut model.parameters().clone())?;
    let package = Package {
        labels: labels.iter().map(|&label| label.to_owned()).collect(),
        ..Package::new(model, None)
    };
    package.save(&directory.join(name), None)?;
    Ok(())
}

/// The mean; zero of nothing.
pub(crate) fn mean(values: impl IntoIterator<Item = f64>) -> f64 {
    let (sum, count) = values
        .into_iter()
        .fold((0.0, 0usize), |(sum, count), value| {
            (sum + value, count + 1)
        });
    sum / count.max(1) as f64
}

/// Every element, in order.
pub(crate) fn numbers(tensor: &Tensor) -> Result<Vec<f64>> {
    let flat = engine(engine(tensor.detach().to_dtype(DType::F64))?.flatten_all())?;
    engine(flat.to_vec1::<f64>())
}

/// A tensor of one element as a number.
pub(crate) fn number(tensor: &Tensor) -> Result<f64> {
    Ok(numbers(tensor)?.first().copied().unwrap_or(f64::NAN))
}

/// The largest `|a − b|`, relative to the largest `|b|`; not a number when the lengths differ.
pub(crate) fn difference(a: &Tensor, b: &Tensor) -> Result<f64> {
    let (a, b) = (numbers(a)?, numbers(b)?);
    if a.len() != b.len() {
        return Ok(f64::NAN);
    }
    let scale = b.iter().fold(f64::MIN_POSITIVE, |m, v| m.max(v.abs()));
    let largest = a
        .iter()
        .zip(&b)
        .fold(0.0, |m: f64, (a, b)| m.max((a - b).abs()));
    Ok(largest / scale)
}
