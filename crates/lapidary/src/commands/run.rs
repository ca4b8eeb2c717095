//! `lapidary run`: tensors in, tensors out.

use std::collections::BTreeMap;

use crate::cli::{Global, Run};
use crate::{loading, output};
use anyhow::{Context, Result, bail, ensure};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Input, Pass};
use lapidary_signal::Trace;
use serde_json::{Map, Value, json};

/// Largest input file.
const INPUT_BYTES: u64 = 1 << 30;

pub fn run(arguments: &Run, global: &Global) -> Result<()> {
    let package = loading::package(&arguments.model, global)?;
    let path = &arguments.input;
    let text = lapidary_model::files::read_text(path, INPUT_BYTES)?;
    let inputs: BTreeMap<String, Value> = serde_json::from_str(&text)
        .with_context(|| format!("{} is not a JSON object of tensors", path.display()))?;
    let tensors = Tensors::new(&inputs, &loading::device(global)?)?;
    let mut results = Map::new();
    for tower in &package.towers {
        let input = match (tower.model.spec().vocabulary(), &tensors) {
            (
                Some(_),
                Tensors {
                    ids: Some(ids),
                    token_types,
                    ..
                },
            ) => Input::Tokens {
                ids: ids.clone(),
                token_types: token_types.clone(),
            },
            (
                None,
                Tensors {
                    pixels: Some(pixels),
                    ..
                },
            ) => Input::Pixels(pixels.clone()),
            (Some(_), _) if package.towers.len() == 1 => {
                bail!("input_ids is missing from {}", path.display())
            }
            (None, _) if package.towers.len() == 1 => {
                bail!("pixel_values is missing from {}", path.display())
            }
            _ => continue,
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

struct Tensors {
    ids: Option<Tensor>,
    token_types: Option<Tensor>,
    padding: Option<Tensor>,
    pixels: Option<Tensor>,
}

impl Tensors {
    fn new(inputs: &BTreeMap<String, Value>, device: &Device) -> Result<Self> {
        const KNOWN: [&str; 4] = [
            "input_ids",
            "attention_mask",
            "token_type_ids",
            "pixel_values",
        ];
        if let Some(unknown) = inputs.keys().find(|name| !KNOWN.contains(&name.as_str())) {
            bail!(
                "input {unknown:?} is unknown, but must be one of {}",
                KNOWN.join(", ")
            );
        }
        let whole = |name: &str| -> Result<Option<Tensor>> {
            let Some(value) = inputs.get(name) else {
                return Ok(None);
            };
            let tensor = parse(name, value, device)?;
            let (shape, values) = (
                tensor.dims().to_vec(),
                tensor.flatten_all()?.to_vec1::<f64>()?,
            );
            ensure!(
                shape.len() == 2,
                "{name} has shape {shape:?}, but must be [batch, length]"
            );
            let valid = |v: &f64| *v >= 0.0 && v.fract() == 0.0 && *v < f64::from(u32::MAX);
            if let Some(wrong) = values.iter().find(|value| !valid(value)) {
                bail!("{name} holds {wrong}, but must hold whole numbers of at least 0");
            }
            let values: Vec<u32> = values.into_iter().map(|value| value as u32).collect();
            Ok(Some(Tensor::from_vec(values, shape, device)?))
        };
        let ids = whole("input_ids")?;
        let padding = whole("attention_mask")?;
        for (name, other) in [
            ("attention_mask", &padding),
            ("token_type_ids", &whole("token_type_ids")?),
        ] {
            if let (Some(ids), Some(other)) = (&ids, other) {
                ensure!(
                    ids.dims() == other.dims(),
                    "{name} has shape {:?}, but must have that of input_ids, {:?}",
                    other.dims(),
                    ids.dims()
                );
            }
        }
        let pixels = match inputs.get("pixel_values") {
            Some(value) => Some(parse("pixel_values", value, device)?.to_dtype(DType::F32)?),
            None => None,
        };
        Ok(Self {
            ids,
            token_types: whole("token_type_ids")?,
            padding: padding.map(|mask| mask.ne(0u32)).transpose()?,
            pixels,
        })
    }
}

/// A nested list of numbers as a tensor of `f64`.
fn parse(name: &str, value: &Value, device: &Device) -> Result<Tensor> {
    let mut shape = Vec::new();
    let mut level = value;
    while let Value::Array(items) = level {
        ensure!(shape.len() < 8, "{name} is nested deeper than 8 lists");
        shape.push(items.len());
        match items.first() {
            Some(first) => level = first,
            None => bail!("{name} holds an empty list; give at least one number"),
        }
    }
    let mut values = Vec::new();
    flatten(name, value, &shape, &mut values)?;
    Ok(Tensor::from_vec(values, shape, device)?)
}

fn flatten(name: &str, value: &Value, shape: &[usize], values: &mut Vec<f64>) -> Result<()> {
    match (value, shape) {
        (Value::Array(items), [length, rest @ ..]) => {
            ensure!(
                items.len() == *length,
                "{name} is ragged: one list has {} entries and another {length}",
                items.len()
            );
            items
                .iter()
                .try_for_each(|item| flatten(name, item, rest, values))
        }
        (Value::Number(number), []) => {
            values.push(
                number
                    .as_f64()
                    .with_context(|| format!("{name} holds {number}"))?,
            );
            Ok(())
        }
        (other, _) => {
            let found = match other {
                Value::Array(_) => "a list in the place of a number".to_owned(),
                Value::Object(_) => "an object".to_owned(),
                Value::String(_) => "a text".to_owned(),
                short => short.to_string(),
            };
            bail!("{name} holds {found}, but must be a list of numbers, nested evenly")
        }
    }
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
