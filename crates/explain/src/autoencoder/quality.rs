//! How good an autoencoder is, by itself and in its model.

use super::site::{SiteReader, batch, groups};
use super::{Autoencoder, numbers};
use crate::error::engine;
use crate::{Error, Result};
use lapidary_kernels::{CrossEntropyOptions, DType, Tensor, cross_entropy};
use lapidary_model::{Input, Model, Pass};
use lapidary_signal::{Signal, Trace};
use serde::Serialize;
use std::sync::Arc;

/// Tokens in one pass of the model.
const TOKENS_AT_A_TIME: usize = 1024;

/// What becomes of a model's loss when a site's value is replaced.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Recovery {
    /// Mean cross-entropy of the next token in nats, nothing replaced.
    pub clean: f64,
    /// The same with zeros at the site.
    pub zero: f64,
    /// The same with the replacement at the site.
    pub replaced: f64,
}

impl Recovery {
    /// `(zero − replaced) / (zero − clean)`: 0 for zeros, 1 for the value itself.
    pub fn recovered(&self) -> f64 {
        (self.zero - self.replaced) / (self.zero - self.clean)
    }

    /// `replaced − clean`, in nats.
    pub fn increase(&self) -> f64 {
        self.replaced - self.clean
    }
}

/// What a replacement at a site is made of: a function of the value `[batch, length, width]`.
type Replace = Arc<dyn Fn(&Tensor) -> lapidary_kernels::Result<Tensor> + Send + Sync>;

/// The loss of a causal language model on windows of tokens, with a replacement at `site`.
///
/// # Errors
/// When the model is not a causal language model, or has no such site, or there is nothing to
/// predict.
pub fn recovery(
    model: &Model,
    site: &str,
    windows: &[Vec<u32>],
    replacement: impl Fn(&Tensor) -> lapidary_kernels::Result<Tensor> + Send + Sync + 'static,
) -> Result<Recovery> {
    if !model.spec().is_causal() {
        return Err(Error::invalid(
            "model",
            "one that sees later tokens",
            "a causal language model: the loss is that of the next token",
        ));
    }
    Ok(Recovery {
        clean: loss(model, site, windows, None)?,
        zero: loss(model, site, windows, Some(Arc::new(zeros)))?,
        replaced: loss(model, site, windows, Some(Arc::new(replacement)))?,
    })
}

fn zeros(x: &Tensor) -> lapidary_kernels::Result<Tensor> {
    Ok(x.zeros_like()?)
}

fn loss(model: &Model, site: &str, windows: &[Vec<u32>], replace: Option<Replace>) -> Result<f64> {
    let (mut sum, mut counted) = (0.0, 0usize);
    for group in groups(windows, TOKENS_AT_A_TIME) {
        let ids = batch(model, group)?;
        let (rows, length) = engine(ids.dims2())?;
        if length < 2 {
            continue;
        }
        let mut trace = Trace::new();
        if let Some(replace) = replace.clone() {
            trace = trace.replace(site, move |_, signal| {
                let value = signal.value();
                Ok(Signal::from(
                    replace(value)?
                        .to_dtype(value.dtype())
                        .map_err(lapidary_kernels::Error::from)?,
                ))
            })?;
        }
        let pass = Pass {
            trace: Some(&trace),
            ..Pass::default()
        };
        let logits = model
            .forward(&Input::tokens(ids.clone()), pass)?
            .into_logits()?;
        if replace.is_some() {
            trace.check_matched(site)?;
        }
        let logits = engine(logits.value().narrow(1, 0, length - 1))?;
        let classes = logits.dims().last().copied().unwrap_or(0);
        let logits = engine(logits.reshape(((), classes)))?;
        let targets = engine(engine(ids.narrow(1, 1, length - 1))?.flatten_all())?;
        let mean = cross_entropy(&logits, &targets, &CrossEntropyOptions::default())?;
        let mean = engine(engine(mean.to_dtype(DType::F64))?.to_scalar::<f64>())?;
        sum += mean * (rows * (length - 1)) as f64;
        counted += rows * (length - 1);
    }
    match counted {
        0 => Err(Error::invalid(
            "tokens to predict",
            0,
            "at least 1: windows of 2 tokens",
        )),
        counted => Ok(sum / counted as f64),
    }
}

/// How good an autoencoder is on some text.
#[derive(Clone, Debug, Serialize)]
pub struct Quality {
    /// Tokens that were read.
    pub tokens: usize,
    /// Active features, mean over tokens.
    pub l0: f64,
    /// `Σ ‖x̂ − x‖² / Σ ‖x − mean x‖²`.
    pub unexplained: f64,
    /// What of the model's loss survives.
    pub recovery: Recovery,
    /// Share of features that no token makes active.
    pub dead: f64,
    /// For each feature the share of tokens that make it active.
    pub frequencies: Vec<f64>,
}

impl Quality {
    /// Measures `autoencoder` on what `model` writes while it reads `windows`.
    ///
    /// # Errors
    /// As [`recovery`].
    pub fn of(model: &Model, autoencoder: &Autoencoder, windows: &[Vec<u32>]) -> Result<Self> {
        let reader = SiteReader::new(model, autoencoder.site())?;
        let mut active = vec![0f64; autoencoder.features()];
        let (mut tokens, mut error, mut squares) = (0usize, 0.0, 0.0);
        let mut sum = vec![0f64; autoencoder.width()];
        for group in groups(windows, TOKENS_AT_A_TIME) {
            let x = reader.read(group)?;
            let x = engine(x.to_dtype(autoencoder.weights().encoder.dtype()))?;
            let x = engine(x.flatten_to(1))?;
            let features = autoencoder.encode(&x)?;
            let is_active = engine(engine(features.gt(0.0))?.to_dtype(DType::F64))?;
            let counts = numbers(&engine(is_active.sum(0))?)?;
            active
                .iter_mut()
                .zip(counts)
                .for_each(|(a, count)| *a += count);
            let missed = engine(autoencoder.decode(&features)? - &x)?;
            error += total(&engine(missed.sqr())?)?;
            squares += total(&engine(x.sqr())?)?;
            let sums = numbers(&engine(engine(x.to_dtype(DType::F64))?.sum(0))?)?;
            sum.iter_mut().zip(sums).for_each(|(a, more)| *a += more);
            tokens += engine(x.dim(0))?;
        }
        let count = tokens.max(1) as f64;
        let about_mean = squares - sum.iter().map(|s| s * s).sum::<f64>() / count;
        let frequencies: Vec<f64> = active.iter().map(|count_of| count_of / count).collect();
        let dead = active.iter().filter(|count_of| **count_of == 0.0).count();
        let spliced = autoencoder.clone();
        Ok(Self {
            tokens,
            l0: frequencies.iter().sum(),
            unexplained: error / about_mean,
            recovery: recovery(model, autoencoder.site(), windows, move |x| {
                spliced.decoded(&spliced.encoded(x)?)
            })?,
            dead: dead as f64 / active.len().max(1) as f64,
            frequencies,
        })
    }

    /// The features by `log₁₀` of their frequency: lower edge of each half of a decade, and how
    /// many features are in it. Dead ones are left out.
    pub fn histogram(&self) -> Vec<(f64, usize)> {
        let bins = self
            .frequencies
            .iter()
            .filter(|frequency| **frequency > 0.0);
        let mut counts = std::collections::BTreeMap::new();
        for frequency in bins {
            *counts
                .entry((2.0 * frequency.log10()).floor() as i64)
                .or_insert(0) += 1;
        }
        let (Some(first), Some(last)) = (
            counts.keys().next().copied(),
            counts.keys().next_back().copied(),
        ) else {
            return Vec::new();
        };
        (first..=last)
            .map(|bin| (bin as f64 / 2.0, counts.get(&bin).copied().unwrap_or(0)))
            .collect()
    }
}

fn total(tensor: &Tensor) -> Result<f64> {
    let sum = engine(engine(tensor.to_dtype(DType::F64))?.sum_all())?;
    engine(sum.to_scalar::<f64>())
}
