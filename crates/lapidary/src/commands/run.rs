//! `lapidary run`: tensors in, tensors out.

use crate::cli::{Global, Run};
use crate::tensors::Tensors;
use crate::{loading, output};
use anyhow::{Context, Result, ensure};
use lapidary_kernels::{DType, SoftmaxMask, Tensor, log_softmax};
use lapidary_model::{Input, Output, Pass};
use lapidary_signal::Trace;
use serde::Serialize;
use serde_json::{Map, Value, json};

pub fn run(arguments: &Run, global: &Global) -> Result<()> {
    let package = loading::package(&arguments.model, global)?;
    let path = &arguments.input;
    let tensors = Tensors::read(path, &loading::device(global)?)?;
    let mut results = Map::new();
    let mut distances = Vec::new();
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
        let mut result = Map::new();
        let out = match &arguments.replace_attention {
            None => tower.model.forward(&input, pass)?,
            Some(mechanism) => {
                let plain = Pass {
                    padding,
                    ..Pass::default()
                };
                let own = tower.model.forward(&input, plain)?;
                let replaced = tower.model.with_mechanism(mechanism, global.seed);
                let replaced = match tower.name.as_str() {
                    "" => replaced?,
                    name => replaced.with_context(|| format!("tower {name}"))?,
                };
                let out = replaced.forward(&input, pass)?;
                let distance = Distance::between(&own, &out, padding, &tower.name)?;
                ensure!(
                    distance.relative_error_of_hidden.is_finite(),
                    "hidden vectors are not all finite with {} in the place of the model's attention: its numbers \
                     are too large or too small for scores such as the model's",
                    mechanism.kind()
                );
                result.insert("distance".to_owned(), serde_json::to_value(&distance)?);
                distances.push(distance.told(&tower.name));
                out
            }
        };
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
    let mut text = summary(&document, "");
    for distance in &distances {
        text.push_str(distance);
    }
    output::print(&text)
}

/// How far the outputs of a changed model are from those of the original, at the tokens that are no padding: what stands
/// at the others means nothing, and mechanisms differ in it.
#[derive(Serialize)]
struct Distance {
    /// `‖h' − h‖ / ‖h‖` of the last hidden vectors.
    relative_error_of_hidden: f64,
    /// Mean over positions of `KL(p ‖ p')`, in nats, where there are scores.
    divergence: Option<f64>,
    /// Share of positions with the same most likely answer.
    same_answer: Option<f64>,
}

impl Distance {
    /// `padding` `[batch, length]` in `u8`, 1 = a real token; `tower` names one of several, whose logits are an embedding
    /// and no scores.
    fn between(
        own: &Output,
        other: &Output,
        padding: Option<&Tensor>,
        tower: &str,
    ) -> Result<Self> {
        let h = real_rows(own.hidden.value(), padding)?;
        let changed = real_rows(other.hidden.value(), padding)?;
        let norm = |x: &Tensor| -> Result<f64> {
            let sum = x.to_dtype(DType::F64)?.sqr()?.sum_all()?;
            Ok(sum.to_scalar::<f64>()?.sqrt())
        };
        let relative = norm(&(changed - &h)?)? / norm(&h)?.max(f64::MIN_POSITIVE);
        let (mut divergence, mut same) = (None, None);
        if let (Some(own), Some(other), true) = (&own.logits, &other.logits, tower.is_empty()) {
            let scores = |x: &Tensor| -> Result<Tensor> {
                let rows = real_rows(x, padding)?.to_dtype(DType::F64)?;
                Ok(log_softmax(&rows, &SoftmaxMask::default())?)
            };
            let (p, q) = (scores(own.value())?, scores(other.value())?);
            let each = (p.exp()? * (&p - &q)?)?.sum(1)?.mean_all()?;
            divergence = Some(each.to_scalar::<f64>()?);
            let agree = p.argmax(1)?.eq(&q.argmax(1)?)?.to_dtype(DType::F64)?;
            same = Some(agree.mean_all()?.to_scalar::<f64>()?);
        }
        Ok(Self {
            relative_error_of_hidden: relative,
            divergence,
            same_answer: same,
        })
    }

    fn told(&self, tower: &str) -> String {
        let whose = match tower {
            "" => String::new(),
            tower => format!("{tower}, "),
        };
        let mut text = format!(
            "{whose}from the model's own outputs: relative error of hidden vectors {:.4}",
            self.relative_error_of_hidden
        );
        if let (Some(divergence), Some(same)) = (self.divergence, self.same_answer) {
            text.push_str(&format!(
                ", KL divergence {divergence:.4} nats, {:.1} % same answers",
                100.0 * same
            ));
        }
        text.push('\n');
        text
    }
}

/// The rows of `x` `[batch, length, features]` that belong to real tokens, `[row, features]`; all of them where rows are
/// not those of tokens, as of a classifier's scores `[batch, features]`.
fn real_rows(x: &Tensor, padding: Option<&Tensor>) -> Result<Tensor> {
    let features = x.dims().last().copied().unwrap_or(1);
    let rows = x.reshape(((), features))?;
    let of_tokens = |keep: &&Tensor| x.rank() == 3 && x.dims().starts_with(keep.dims());
    let Some(keep) = padding.filter(of_tokens) else {
        return Ok(rows);
    };
    let keep = keep.flatten_all()?.to_vec1::<u8>()?;
    let real: Vec<u32> = (0..)
        .zip(&keep)
        .filter_map(|(row, keep)| (*keep != 0).then_some(row))
        .collect();
    if real.is_empty() {
        return Ok(rows);
    }
    let count = real.len();
    Ok(rows.index_select(&Tensor::from_vec(real, count, x.device())?, 0)?)
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
    // The distance is told in a sentence of its own.
    for (name, value) in entries.iter().filter(|(name, _)| *name != "distance") {
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
