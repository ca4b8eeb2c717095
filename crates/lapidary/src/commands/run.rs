//! `lapidary run`: tensors in, tensors out.

use crate::cli::{Global, Run};
use crate::tensors::Tensors;
use crate::{loading, output};
use anyhow::{Result, ensure};
use lapidary_kernels::{DType, Tensor};
use lapidary_model::{Input, Pass};
use lapidary_signal::Trace;
use serde_json::{Map, Value, json};

pub fn run(arguments: &Run, global: &Global) -> Result<()> {
    let package = loading::package(&arguments.model, global)?;
    let path = &arguments.input;
    let tensors = Tensors::read(path, &loading::device(global)?)?;
    let mut results = Map::new();
    for tower in &package.towers {
        let Some(input) = tensors.input(&tower.model) else {
            ensure!(
                package.towers.len() > 1,
                "{} is missing from {}",
                Tensors::wanted(&tower.model),
                path.display()
            );
            continue;
        };
        let mut trace = Trace::new();
        for glob in &arguments.sites {
            trace = trace.capture(glob)?;
        }
        let padding = tensors
            .padding
            .as_ref()
            .filter(|_| matches!(input, Input::Tokens { .. }));
        let pass = Pass {
            padding,
            trace: Some(&trace),
            ..Pass::default()
        };
        let out = tower.model.forward(&input, pass)?;
        let mut result = Map::new();
        result.insert("hidden".to_owned(), tensor_json(out.hidden.value())?);
        if let Some(pooled) = &out.pooled {
            result.insert("pooled".to_owned(), tensor_json(pooled.value())?);
        }
        if let Some(logits) = &out.logits {
            result.insert("logits".to_owned(), tensor_json(logits.value())?);
        }
        let sites: Map<String, Value> = trace
            .records()
            .into_iter()
            .map(|(site, record)| Ok((site, tensor_json(record.signal.value())?)))
            .collect::<Result<_>>()?;
        for glob in &arguments.sites {
            trace.check_matched(glob)?;
        }
        if !arguments.sites.is_empty() {
            result.insert("sites".to_owned(), Value::Object(sites));
        }
        let name = if tower.name.is_empty() {
            "model"
        } else {
            &tower.name
        };
        results.insert(name.to_owned(), Value::Object(result));
    }
    ensure!(
        !results.is_empty(),
        "{} holds neither input_ids nor pixel_values",
        path.display()
    );
    let document = match results.remove("model") {
        Some(only) => only,
        None => Value::Object(results),
    };
    if global.json {
        return output::print_json(&document);
    }
    output::print(&summary(&document, ""))
}

/// A tensor as nested lists, at full precision.
fn tensor_json(tensor: &Tensor) -> Result<Value> {
    // f32 values print as themselves, not as the f64 they widen to.
    let flat = tensor
        .to_dtype(DType::F32)?
        .flatten_all()?
        .to_vec1::<f32>()?;
    let mut values: Vec<Value> = flat.into_iter().map(|value| json!(value)).collect();
    for size in tensor.dims().iter().skip(1).rev() {
        let mut grouped = Vec::with_capacity(values.len() / (*size).max(1));
        let mut items = values.into_iter();
        loop {
            let group: Vec<Value> = items.by_ref().take((*size).max(1)).collect();
            if group.is_empty() {
                break;
            }
            grouped.push(Value::Array(group));
        }
        values = grouped;
    }
    Ok(if tensor.rank() == 0 {
        values.pop().unwrap_or(Value::Null)
    } else {
        Value::Array(values)
    })
}

/// Each tensor's shape and first numbers.
fn summary(document: &Value, prefix: &str) -> String {
    let mut text = String::new();
    let Value::Object(entries) = document else {
        return text;
    };
    for (name, value) in entries {
        match value {
            Value::Object(_) => text += &summary(value, &format!("{prefix}{name} ")),
            tensor => {
                let mut shape = Vec::new();
                let mut level = tensor;
                while let Value::Array(items) = level {
                    shape.push(items.len());
                    level = items.first().unwrap_or(&Value::Null);
                }
                let mut first = tensor;
                while let Value::Array(items) = first
                    && items.first().is_some_and(Value::is_array)
                {
                    first = items.first().unwrap_or(&Value::Null);
                }
                let shown: Vec<String> = match first {
                    Value::Array(items) => items
                        .iter()
                        .take(6)
                        .map(|item| format!("{:.5}", item.as_f64().unwrap_or(f64::NAN)))
                        .collect(),
                    other => vec![other.to_string()],
                };
                text += &format!("{prefix}{name} {shape:?}: {} …\n", shown.join(" "));
            }
        }
    }
    text
}
