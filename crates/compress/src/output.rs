//! Errors of layers where they show: at their outputs, on data.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use lapidary_kernels::{DType, Tensor};
use lapidary_model::{Model, Pass};
use lapidary_signal::Trace;

use crate::data::{Batch, real_rows};
use crate::error::engine;
use crate::factorisation::merged;
use crate::{CalibrationData, Result};

/// A layer that differs between two models.
struct Changed {
    path: String,
    /// `[input, output]`.
    weight: Tensor,
    /// `W − Ŵ`, `[input, output]`.
    difference: Tensor,
    squares: f64,
    squared_error: f64,
}

impl Changed {
    fn add(&mut self, x: &Tensor) -> lapidary_kernels::Result<()> {
        self.squares += squared_norm(&x.matmul(&self.weight)?)?;
        self.squared_error += squared_norm(&x.matmul(&self.difference)?)?;
        Ok(())
    }
}

fn squared_norm(x: &Tensor) -> lapidary_kernels::Result<f64> {
    let sum = x.sqr()?.sum_all()?.to_dtype(DType::F64)?;
    Ok(sum.to_scalar::<f64>()?)
}

type Sites = BTreeMap<String, Vec<Changed>>;

/// `√(E‖x (W − Ŵ)ᵀ‖² / E‖x Wᵀ‖²)` for each linear layer that has a weight `W` in `original` and
/// another `Ŵ` of the same shape in `other`, over the inputs `x` that `original` gives it:
/// errors of the layers before it are not in it. Padding is left out, as are layers whose input
/// is no site of the model.
pub fn output_errors(
    original: &Model,
    other: &Model,
    data: &CalibrationData,
    batch: usize,
) -> Result<BTreeMap<String, f64>> {
    let sites = Arc::new(Mutex::new(changed(original, other)?));
    for batch in data.batches(batch, &original.device()) {
        let batch = batch?;
        let trace = trace(&sites, &batch)?;
        original.forward(
            &batch.input,
            Pass {
                padding: batch.padding.as_ref(),
                trace: Some(&trace),
                ..Pass::default()
            },
        )?;
    }
    let sites = sites.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(sites
        .values()
        .flatten()
        .filter(|layer| layer.squares > 0.0)
        .map(|layer| {
            let error = (layer.squared_error / layer.squares).sqrt();
            (layer.path.clone(), error)
        })
        .collect())
}

fn trace(sites: &Arc<Mutex<Sites>>, batch: &Batch<'_>) -> Result<Trace> {
    let names: Vec<String> = sites
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .keys()
        .cloned()
        .collect();
    let mut trace = Trace::new();
    for name in names {
        let (sites, real) = (sites.clone(), batch.real.clone());
        trace = trace.replace(&name, move |site, signal| {
            let x = real_rows(&signal.value().detach(), real.as_ref())?;
            let mut sites = sites.lock().unwrap_or_else(PoisonError::into_inner);
            for layer in sites.get_mut(site).into_iter().flatten() {
                layer.add(&x)?;
            }
            Ok(signal)
        })?;
    }
    Ok(trace)
}

fn changed(original: &Model, other: &Model) -> Result<Sites> {
    let mut sites = Sites::new();
    let numbers = match other.spec().quantised.is_empty() {
        true => None,
        false => Some(other.dequantised()?),
    };
    let other = numbers.as_ref().unwrap_or(other);
    for linear in original.linears() {
        let alike = other.linears().iter().any(|candidate| {
            candidate.path == linear.path
                && (candidate.input, candidate.output) == (linear.input, linear.output)
        });
        if !alike {
            continue;
        }
        let (Some(before), Some(after)) = (
            weight(original, &linear.path)?,
            weight(other, &linear.path)?,
        ) else {
            continue;
        };
        let transposed = |tensor: &Tensor| engine(engine(tensor.t())?.contiguous());
        let difference = engine(&before - &after)?;
        if engine(squared_norm(&difference))? == 0.0 {
            continue;
        }
        sites
            .entry(linear.input_site.clone())
            .or_default()
            .push(Changed {
                path: linear.path.clone(),
                weight: transposed(&before)?,
                difference: transposed(&difference)?,
                squares: 0.0,
                squared_error: 0.0,
            });
    }
    Ok(sites)
}

/// `[output, input]`, factors multiplied out.
fn weight(model: &Model, path: &str) -> Result<Option<Tensor>> {
    let parameters = model.parameters();
    if let Some(weight) = parameters.get(&format!("{path}.weight")) {
        return Ok(Some(weight.detach()));
    }
    match (
        parameters.get(&format!("{path}.down")),
        parameters.get(&format!("{path}.up")),
    ) {
        (Some(down), Some(up)) => Ok(Some(merged(&up.detach(), &down.detach(), up.dtype())?)),
        _ => Ok(None),
    }
}
