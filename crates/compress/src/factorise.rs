//! Carrying out a plan.

use std::collections::BTreeMap;

use lapidary_factor::{LowRank, WeightedSvd};
use lapidary_kernels::{DType, Tensor};
use lapidary_model::{InputSpec, Model, ModelSpec};

use crate::error::engine;
use crate::fwsvd::{Importance, predicted_loss_rise};
use crate::plan::{Change, LayerPlan};
use crate::report::{LayerErrors, LayerReport, Report, Size};
use crate::requirements::Statistic;
use crate::selection::{Layer, TABLE};
use crate::{Calibration, CalibrationData, Error, Fingerprint, Plan, Result, output_errors};

/// A compressed model and what became of the original.
#[derive(Debug)]
pub struct Compressed {
    /// The model. Its spec names the rank of each factorised layer.
    pub model: Model,
    /// What was done.
    pub report: Report,
}

impl Compressed {
    /// The model with variables for parameters: what fine-tuning after compression starts from.
    pub fn trainable(&self) -> Result<Model> {
        let mut parameters = self.model.parameters().clone();
        Ok(Model::trainable(
            self.model.spec().clone(),
            &mut parameters,
        )?)
    }

    /// Measures how far the outputs of each factorised layer are from those of `original` on
    /// the inputs that `original` gives it, and writes it into the report.
    pub fn measure_outputs(
        &mut self,
        original: &Model,
        data: &CalibrationData,
        batch: usize,
    ) -> Result<()> {
        let errors = output_errors(original, &self.model, data, batch)?;
        for layer in &mut self.report.layers {
            layer.output_error = errors.get(&layer.path).copied();
        }
        Ok(())
    }
}

impl Plan {
    /// Makes the planned model. `calibration` must have what the method needs and belong to
    /// these very weights; plain SVD needs none. The model itself is left as it is.
    pub fn apply(&self, model: &Model, calibration: Option<&Calibration>) -> Result<Compressed> {
        let original = Fingerprint::of(model)?;
        if let Some(calibration) = calibration {
            calibration.check(model)?;
        }
        let mut spec = model.spec().clone();
        let mut parameters = model.parameters().clone();
        let mut layers = Vec::with_capacity(self.layers.len());
        for planned in &self.layers {
            let report = match &planned.change {
                Change::Leave { reason } => left(model, planned, reason)?,
                Change::Factorise { rank } => {
                    let layer = find(model, planned)?;
                    let (factors, report) = self.factorise(model, &layer, *rank, calibration)?;
                    replace(&mut spec, &mut parameters, &layer, factors)?;
                    report
                }
            };
            layers.push(report);
        }
        let compressed = Model::new(spec, &mut parameters)?;
        Ok(Compressed {
            report: Report {
                method: self.method,
                original,
                objective: calibration.and_then(|calibration| calibration.objective),
                examples: calibration.map_or(0, |calibration| calibration.examples),
                tokens: calibration.map_or(0, |calibration| calibration.tokens),
                layers,
                before: Size::of(model),
                after: Size::of(&compressed),
            },
            model: compressed,
        })
    }

    fn factorise(
        &self,
        model: &Model,
        layer: &Layer,
        rank: usize,
        calibration: Option<&Calibration>,
    ) -> Result<(LowRank, LayerReport)> {
        let weight = dense_weight(model, layer)?;
        let mut importance = self.method.importance(layer, calibration)?;
        let mut note = None;
        if importance.is_zero()? {
            note = Some("nothing in the data depends on it: factorised by plain SVD".to_owned());
            importance = Importance::Plain;
        }
        let failed = |source| Error::Layer {
            layer: layer.path.clone(),
            source,
        };
        let factors = WeightedSvd::new(&weight, &importance.metric())
            .and_then(|svd| svd.truncate(rank))
            .map_err(failed)?
            .factors;
        let fisher = Statistic::Fisher {
            layer: layer.path.clone(),
        };
        let fisher = calibration.and_then(|calibration| calibration.tensor(&fisher).ok());
        let errors = |factors: &LowRank| errors(&weight, factors, &importance, fisher);
        let chosen = errors(&factors)?;
        let plain = match importance {
            Importance::Plain => chosen,
            _ => errors(
                &lapidary_factor::plain(&weight, rank)
                    .map_err(failed)?
                    .factors,
            )?,
        };
        let report = LayerReport {
            path: layer.path.clone(),
            input: layer.input,
            output: layer.output,
            rank: Some(rank),
            note,
            parameters_before: layer.weights(),
            parameters_after: lapidary_factor::rank::parameters(layer.input, layer.output, rank),
            chosen: Some(chosen),
            plain: Some(plain),
            output_error: None,
        };
        Ok((factors, report))
    }
}

fn errors(
    weight: &Tensor,
    factors: &LowRank,
    importance: &Importance,
    fisher: Option<&Tensor>,
) -> Result<LayerErrors> {
    let weight = engine(weight.to_dtype(DType::F64))?;
    let difference = engine(&weight - merged(&factors.up, &factors.down, DType::F64)?)?;
    let relative = |importance: &Importance| -> Result<f64> {
        let whole = importance.energy(&weight)?;
        Ok(if whole > 0.0 {
            (importance.energy(&difference)? / whole).sqrt()
        } else {
            0.0
        })
    };
    Ok(LayerErrors {
        weighted: relative(importance)?,
        unweighted: relative(&Importance::Plain)?,
        predicted_loss_rise: match fisher {
            Some(fisher) => Some(predicted_loss_rise(fisher, &difference)?),
            None => None,
        },
    })
}

/// `up · down` in `f64`, rounded once to `dtype`.
pub(crate) fn merged(up: &Tensor, down: &Tensor, dtype: DType) -> Result<Tensor> {
    let wide = |tensor: &Tensor| engine(tensor.to_dtype(DType::F64));
    engine(engine(wide(up)?.matmul(&wide(down)?))?.to_dtype(dtype))
}

fn left(model: &Model, planned: &LayerPlan, reason: &str) -> Result<LayerReport> {
    let layer = find(model, planned)?;
    Ok(LayerReport {
        path: layer.path.clone(),
        input: layer.input,
        output: layer.output,
        rank: None,
        note: Some(reason.to_owned()),
        parameters_before: layer.weights(),
        parameters_after: layer.weights(),
        chosen: None,
        plain: None,
        output_error: None,
    })
}

/// The layer of `model` that a plan speaks of.
fn find(model: &Model, planned: &LayerPlan) -> Result<Layer> {
    let layers = Layer::all(model);
    let layer = layers.into_iter().find(|layer| layer.path == planned.path);
    match layer {
        Some(layer) if (layer.input, layer.output) == (planned.input, planned.output) => Ok(layer),
        _ => Err(Error::invalid(
            "plan",
            format!(
                "for a layer {} of {} inputs and {} outputs",
                planned.path, planned.input, planned.output
            ),
            "one that was made for this model",
        )),
    }
}

/// `[output, input]`.
fn dense_weight(model: &Model, layer: &Layer) -> Result<Tensor> {
    let name = Layer::weight_name(&layer.path);
    let weight = match model.parameters().get(&name) {
        Some(weight) if layer.rank.is_none() => weight.detach(),
        _ => {
            return Err(Error::invalid(
                format!("layer {}", layer.path),
                "factorised already",
                "dense: multiply it out first",
            ));
        }
    };
    if layer.is_table() {
        engine(engine(weight.t())?.contiguous())
    } else {
        Ok(weight)
    }
}

/// Puts two factors in the place of one matrix.
fn replace(
    spec: &mut ModelSpec,
    parameters: &mut BTreeMap<String, Tensor>,
    layer: &Layer,
    factors: LowRank,
) -> Result<()> {
    let path = &layer.path;
    if layer.is_table() {
        if let InputSpec::Tokens(tokens) = &mut spec.input {
            tokens.embedding_width = Some(factors.rank());
        }
        let table = engine(engine(factors.down.t())?.contiguous())?;
        parameters.insert(Layer::weight_name(TABLE), table);
        parameters.insert("embeddings.projection.weight".to_owned(), factors.up);
        return Ok(());
    }
    spec.low_rank.insert(path.clone(), factors.rank());
    parameters.remove(&Layer::weight_name(path));
    parameters.insert(format!("{path}.down"), factors.down);
    parameters.insert(format!("{path}.up"), factors.up);
    Ok(())
}
