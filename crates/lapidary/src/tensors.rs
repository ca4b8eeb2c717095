//! Tensors given as JSON, by their Hugging Face names.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Input, Model};
use serde_json::Value;

/// Largest input file.
const INPUT_BYTES: u64 = 1 << 30;

/// What an input file holds.
pub struct Tensors {
    /// `[batch, length]`
    pub ids: Option<Tensor>,
    /// `[batch, length]`
    pub token_types: Option<Tensor>,
    /// `[batch, length]`, 1 = keep
    pub padding: Option<Tensor>,
    /// `[batch, channels, height, width]`
    pub pixels: Option<Tensor>,
}

impl Tensors {
    /// Reads a JSON object of nested lists.
    pub fn read(path: &Path, device: &Device) -> Result<Self> {
        let text = lapidary_model::files::read_text(path, INPUT_BYTES)?;
        let inputs: BTreeMap<String, Value> = serde_json::from_str(&text)
            .with_context(|| format!("{} is not a JSON object of tensors", path.display()))?;
        Self::new(&inputs, device)
    }

    /// What `model` reads of these, if it is there.
    pub fn input(&self, model: &Model) -> Option<Input> {
        match model.spec().vocabulary() {
            Some(_) => Some(Input::Tokens {
                ids: self.ids.clone()?,
                token_types: self.token_types.clone(),
            }),
            None => Some(Input::Pixels(self.pixels.clone()?)),
        }
    }

    /// The name of what `model` reads.
    pub fn wanted(model: &Model) -> &'static str {
        match model.spec().vocabulary() {
            Some(_) => "input_ids",
            None => "pixel_values",
        }
    }

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
