//! Carrying out a plan.

use std::collections::BTreeMap;

use lapidary_factor::{LowRank, WeightedSvd};
use lapidary_kernels::{DType, Tensor};
use lapidary_model::{InputSpec, Model, ModelSpec};

use crate::error::engine;
use crate::factorisation::{Importance, predicted_loss_rise};
use crate::method::Task;
use crate::plan::{Change, ModulePlan, Plan};
use crate::report::{Compressed, LayerErrors, ModuleReport};
use crate::requirements::Statistic;
use crate::selection::{Layer, TABLE};
use crate::{Calibration, Error, Factorisation, Result};

impl Factorisation {
    /// Makes the planned model; plain SVD needs no calibration.
    pub(crate) fn apply(self, task: &Task<'_>, plan: &Plan) -> Result<Compressed> {
        let model = task.model;
        let mut spec = model.spec().clone();
        let mut parameters = model.parameters().clone();
        let mut modules = Vec::with_capacity(plan.modules.len());
        for planned in &plan.modules {
            let layer = find(model, planned)?;
            modules.push(match planned.change {
                Change::Leave { .. } => {
                    ModuleReport::new(planned, layer.weights(), layer.weights())
                }
                Change::Factorise { rank } => {
                    let (factors, report) =
                        self.factorise(model, &layer, rank, planned, task.calibration)?;
                    replace(&mut spec, &mut parameters, &layer, factors)?;
                    report
                }
                ref other => {
                    return Err(Error::invalid(
                        format!("change of {} in a plan of {self}", planned.path),
                        format!("{other:?}"),
                        "factorise or leave",
                    ));
                }
            });
        }
        let compressed = Model::new(spec, &mut parameters)?;
        Compressed::new(self.name(), task, compressed, modules)
    }

    fn factorise(
        self,
        model: &Model,
        layer: &Layer,
        rank: usize,
        planned: &ModulePlan,
        calibration: Option<&Calibration>,
    ) -> Result<(LowRank, ModuleReport)> {
        let weight = dense_weight(model, layer)?;
        let mut importance = self.importance(layer, calibration)?;
        let mut note = None;
        if importance.is_zero()? {
            note = Some("nothing in the data depends on it: factorised by plain SVD".to_owned());
            importance = Importance::Plain;
        }
        let failed = |reason| Error::Layer {
            layer: layer.path.clone(),
            reason,
        };
        let factors = WeightedSvd::new(&weight, &importance.metric())
            .and_then(|svd| svd.truncate(rank))
            .map_err(failed)?
            .factors;
        let fisher = Statistic::Fisher {
            layer: layer.path.clone(),
        };
        let fisher = calibration.and_then(|calibration| calibration.tensor(&fisher).ok());
        let errors = |factors: &LowRank| errors(&weight, factors, &importance, fisher.as_ref());
        let chosen = errors(&factors)?;
        let plain = match importance {
            Importance::Plain => chosen,
            _ => errors(
                &lapidary_factor::plain(&weight, rank)
                    .map_err(failed)?
                    .factors,
            )?,
        };
        let after = lapidary_factor::rank::parameters(layer.input, layer.output, rank);
        let report = ModuleReport {
            note,
            chosen: Some(chosen),
            plain: Some(plain),
            ..ModuleReport::new(planned, layer.weights(), after)
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

/// The layer of `model` that a plan speaks of.
fn find(model: &Model, planned: &ModulePlan) -> Result<Layer> {
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
