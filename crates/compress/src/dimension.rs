//! What a model of a narrower stream is expected to be worth (Xu, Alazraki & Mandic 2025, arXiv
//! 2503.04377), and how far that is from what it is worth.
//!
//! With the share `s = 1 − d/D` of the width cut, the paper has perplexity and accuracy depend on
//! `s` alone, whichever the directions:
//!
//! ```text
//! ln PPL(s) = ln PPL₀ / (1 − s)          ln(acc(s)/acc₀) = κ s
//! ```
//!
//! The first has no free constant, and says that `1 / ln PPL` falls on a line in `s`; `κ` is fitted.
//! The second is printed as proportional to `1 − s`, which cannot hold at `s = 0`, where the left
//! side is 0; a line with an intercept covers that reading.

use std::collections::BTreeMap;

use lapidary_factor::{matrix_from_tensor, thin_svd};
use lapidary_kernels::{D, DType, SoftmaxMask, Tensor, log_softmax};
use lapidary_model::Model;
use serde::Serialize;

use crate::calibration::forward;
use crate::data::real_rows;
use crate::error::engine;
use crate::{CalibrationData, Error, Result};

/// The perplexity that the law expects of a model of perplexity `whole` when the share `sparsity`
/// of its width is cut.
///
/// # Errors
/// When the share is not in `[0, 1)`, or the perplexity not above 1.
///
/// ```
/// let expected = lapidary_compress::dimension::predicted_perplexity(9.0, 0.5)?;
/// assert!((expected - 81.0).abs() < 1e-9);
/// # Ok::<(), lapidary_compress::Error>(())
/// ```
pub fn predicted_perplexity(whole: f64, sparsity: f64) -> Result<f64> {
    if !(0.0..1.0).contains(&sparsity) {
        let what = "share of the width that is cut";
        return Err(Error::invalid(what, sparsity, "at least 0 and below 1"));
    }
    if !(whole.is_finite() && whole > 1.0) {
        return Err(Error::invalid(
            "perplexity of the whole model",
            whole,
            "above 1",
        ));
    }
    Ok((whole.ln() / (1.0 - sparsity)).exp())
}

/// One width.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Row {
    /// Share of the width that is cut.
    pub sparsity: f64,
    /// Perplexity as measured.
    pub measured: f64,
    /// Perplexity as predicted.
    pub predicted: f64,
    /// `ln predicted / ln measured − 1`.
    pub error: f64,
}

/// A straight line through points.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Line {
    /// At 0.
    pub intercept: f64,
    /// Per unit.
    pub slope: f64,
    /// Share of the variance that the line explains.
    pub r_squared: f64,
}

/// The law beside measurements.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Law {
    /// Perplexity of the whole model.
    pub whole: f64,
    /// Each width.
    pub rows: Vec<Row>,
    /// `ln PPL₀ / ln PPL` over `s`: the law says intercept 1 and slope −1.
    pub line: Line,
}

impl Law {
    /// Compares `measured` pairs of sparsity and perplexity with what is expected of a model of
    /// perplexity `whole`.
    ///
    /// # Errors
    /// When there are fewer than two points, or one that has no prediction.
    pub fn new(whole: f64, measured: &[(f64, f64)]) -> Result<Self> {
        let row = |&(sparsity, measured): &(f64, f64)| -> Result<Row> {
            let predicted = predicted_perplexity(whole, sparsity)?;
            if !(measured.is_finite() && measured > 1.0) {
                return Err(Error::invalid("measured perplexity", measured, "above 1"));
            }
            Ok(Row {
                sparsity,
                measured,
                predicted,
                error: predicted.ln() / measured.ln() - 1.0,
            })
        };
        let points: Vec<(f64, f64)> = measured
            .iter()
            .map(|(sparsity, perplexity)| (*sparsity, whole.ln() / perplexity.ln()))
            .collect();
        Ok(Self {
            whole,
            rows: measured.iter().map(row).collect::<Result<_>>()?,
            line: line(&points)?,
        })
    }

    /// The largest `|error|` among rows of sparsity `from` to `to`, or none when none is there.
    pub fn largest_error(&self, from: f64, to: f64) -> Option<f64> {
        let within = self.rows.iter().filter(|row| {
            // Widths are rounded to whole features, so that shares are.
            (from - 1e-9..=to + 1e-9).contains(&row.sparsity)
        });
        within.map(|row| row.error.abs()).reduce(f64::max)
    }
}

/// The least-squares line through points `(x, y)`.
///
/// # Errors
/// When all `x` are the same.
pub fn line(points: &[(f64, f64)]) -> Result<Line> {
    let count = points.len() as f64;
    let mean = |of: &dyn Fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / count;
    let (x, y) = (mean(&|point| point.0), mean(&|point| point.1));
    let about = |a: &dyn Fn(&(f64, f64)) -> f64| points.iter().map(a).sum::<f64>();
    let spread = about(&|point| (point.0 - x).powi(2));
    if points.len() < 2 || spread <= 0.0 {
        let found = format!("{} at one place", points.len());
        return Err(Error::invalid(
            "points of a line",
            found,
            "at least 2 at different places",
        ));
    }
    let slope = about(&|point| (point.0 - x) * (point.1 - y)) / spread;
    let intercept = y - slope * x;
    let total = about(&|point| (point.1 - y).powi(2));
    let left = about(&|point| (point.1 - intercept - slope * point.0).powi(2));
    Ok(Line {
        intercept,
        slope,
        r_squared: if total > 0.0 { 1.0 - left / total } else { 1.0 },
    })
}

/// Accuracy over sparsity.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct AccuracyLaw {
    /// `κ` of `ln(acc/acc₀) = κ s`, by least squares through the origin.
    pub kappa: f64,
    /// The largest error of that in `ln(acc/acc₀)`.
    pub largest_error: f64,
    /// The line with an intercept, in `1 − s`.
    pub line: Line,
}

impl AccuracyLaw {
    /// Fits pairs of sparsity and accuracy to a model of accuracy `whole`.
    ///
    /// # Errors
    /// When an accuracy is not above 0, or there are no two different widths.
    pub fn new(whole: f64, measured: &[(f64, f64)]) -> Result<Self> {
        let mut points = Vec::with_capacity(measured.len());
        for &(sparsity, accuracy) in measured {
            let ratio = accuracy / whole;
            if !(ratio.is_finite() && ratio > 0.0) {
                let found = format!("{accuracy} beside {whole}");
                return Err(Error::invalid("accuracy", found, "above 0"));
            }
            points.push((sparsity, ratio.ln()));
        }
        let squares: f64 = points.iter().map(|(s, _)| s * s).sum();
        let kappa = match squares > 0.0 {
            true => points.iter().map(|(s, y)| s * y).sum::<f64>() / squares,
            false => 0.0,
        };
        let errors = points.iter().map(|(s, y)| (y - kappa * s).abs());
        let largest_error = errors.fold(0.0, f64::max);
        let kept: Vec<(f64, f64)> = points.iter().map(|(s, y)| (1.0 - s, *y)).collect();
        Ok(Self {
            kappa,
            largest_error,
            line: line(&kept)?,
        })
    }
}

/// What narrowing did to one linear layer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct MapChange {
    /// `‖W'‖₂ / ‖W‖₂`.
    pub spectral: f64,
    /// `‖W'‖_F / ‖W‖_F`.
    pub frobenius: f64,
}

/// Norms of every linear layer that two models share, of the second over the first. Give the whole
/// model in the same gauge: cut to its own width, so that its norms are folded too.
pub fn map_changes(whole: &Model, narrow: &Model) -> Result<BTreeMap<String, MapChange>> {
    let mut changes = BTreeMap::new();
    for layer in whole.linears() {
        let name = format!("{}.weight", layer.path);
        let pair = (
            whole.parameters().get(&name),
            narrow.parameters().get(&name),
        );
        let (Some(before), Some(after)) = pair else {
            continue;
        };
        let norms = |tensor: &Tensor| -> Result<(f64, f64)> {
            let matrix = matrix_from_tensor("weight", &tensor.detach())?;
            let values = thin_svd(matrix.as_ref())?.s;
            let squares: f64 = values.iter().map(|value| value * value).sum();
            Ok((values.first().copied().unwrap_or(0.0), squares.sqrt()))
        };
        let (before, after) = (norms(before)?, norms(after)?);
        changes.insert(
            layer.path.clone(),
            MapChange {
                spectral: after.0 / before.0,
                frobenius: after.1 / before.1,
            },
        );
    }
    Ok(changes)
}

/// How a model's scores look, on average over predictions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Scores {
    /// `E ‖z − mean z‖`: a shift of all scores changes nothing.
    pub length: f64,
    /// `E H(softmax z)`, in nats.
    pub entropy: f64,
    /// The mean cosine with the scores of the whole model, means taken out.
    pub cosine: f64,
    /// `E ln p' / E ln p` for tokens as the whole model predicts them: what the law takes for `1 / (1 − s)`,
    /// and at least 1.
    pub log_ratio: f64,
}

/// The scores of `model` on `data`, beside those of `whole`.
pub fn scores(
    whole: &Model,
    model: &Model,
    data: &CalibrationData,
    batch: usize,
) -> Result<Scores> {
    let mut sums = Scores::default();
    let (mut predictions, mut whole_log, mut log_sum) = (0, 0.0, 0.0);
    for batch in data.batches(batch, &model.device()) {
        let batch = batch?;
        let logits = |model: &Model| -> Result<Tensor> {
            let logits = forward(model, &batch, None)?.into_logits()?;
            let rows = real_rows(&logits.value().detach(), batch.real.as_ref())?;
            engine(rows.to_dtype(DType::F64))
        };
        let (theirs, ours) = (logits(whole)?, logits(model)?);
        let log = log_softmax(&ours, &SoftmaxMask::default())?;
        let entropies = engine(engine(engine(log.exp())? * &log)?.sum(D::Minus1))?;
        sums.entropy -= total(&entropies)?;
        let whole_scores = log_softmax(&theirs, &SoftmaxMask::default())?;
        let expected = |log: &Tensor| total(&engine(engine(whole_scores.exp())? * log)?);
        whole_log += expected(&whole_scores)?;
        log_sum += expected(&log)?;
        let (theirs, ours) = (centred(&theirs)?, centred(&ours)?);
        let length = |x: &Tensor| engine(engine(engine(x.sqr())?.sum(D::Minus1))?.sqrt());
        let (a, b) = (length(&theirs)?, length(&ours)?);
        sums.length += total(&b)?;
        let products = engine(engine(theirs * &ours)?.sum(D::Minus1))?;
        sums.cosine += total(&engine(products / engine(a * &b)?)?)?;
        predictions += engine(ours.dim(0))?;
    }
    let count = predictions.max(1) as f64;
    Ok(Scores {
        length: sums.length / count,
        entropy: sums.entropy / count,
        cosine: sums.cosine / count,
        log_ratio: log_sum / whole_log,
    })
}

fn centred(x: &Tensor) -> Result<Tensor> {
    engine(x.broadcast_sub(&engine(x.mean_keepdim(D::Minus1))?))
}

fn total(x: &Tensor) -> Result<f64> {
    engine(engine(x.sum_all())?.to_scalar::<f64>())
}
