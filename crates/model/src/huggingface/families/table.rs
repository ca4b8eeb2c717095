//! Which parameters a stored tensor holds, in which layout.

use std::collections::BTreeMap;

use crate::{Checkpoint, Error, Result};
use lapidary_kernels::{DType, Tensor};
use lapidary_parts::parameters::{Init, ParameterSource};

/// How the parameters lie in the stored tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Layout {
    /// One parameter as it is.
    Same,
    /// One matrix, transposed.
    Transposed,
    /// Several parameters of these lengths, one after another along the first dimension.
    Stacked(Vec<usize>),
    /// Several matrices of these output widths, stacked and then transposed.
    StackedTransposed(Vec<usize>),
    /// One parameter in another shape.
    Reshaped(Vec<usize>),
    /// Row `row` of `rows` of one parameter, in another shape.
    Row {
        /// Which row.
        row: usize,
        /// Of how many.
        rows: usize,
        /// Stored shape.
        shape: Vec<usize>,
    },
}

/// One tensor of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredTensor {
    /// Its name, as `transformers` writes it today.
    pub key: String,
    /// The parameters it holds.
    pub parameters: Vec<String>,
    /// How they lie in it.
    pub layout: Layout,
}

/// Every tensor of a checkpoint and what it holds.
#[derive(Clone, Debug, Default)]
pub struct NameTable {
    tensors: Vec<StoredTensor>,
    /// Prefixes that may be there or not (`bert.`).
    prefixes: Vec<&'static str>,
}

impl NameTable {
    pub(super) fn new(prefixes: &[&'static str]) -> Self {
        Self {
            tensors: Vec::new(),
            prefixes: prefixes.to_vec(),
        }
    }

    pub(super) fn add(&mut self, key: impl Into<String>, parameters: &[&str], layout: Layout) {
        let parameters = parameters.iter().map(|name| (*name).to_owned()).collect();
        self.tensors.push(StoredTensor {
            key: key.into(),
            parameters,
            layout,
        });
    }

    /// `key` holds `parameter` as it is.
    pub(super) fn same(&mut self, key: &str, parameter: &str) {
        self.add(key, &[parameter], Layout::Same);
    }

    /// Weight, and bias where there is one, of a linear layer or a norm.
    pub(super) fn layer(&mut self, key: &str, path: &str, bias: bool) {
        self.same(&format!("{key}.weight"), &format!("{path}.weight"));
        if bias {
            self.same(&format!("{key}.bias"), &format!("{path}.bias"));
        }
    }

    /// The stored tensors in order.
    pub fn tensors(&self) -> &[StoredTensor] {
        &self.tensors
    }

    /// The name under which `checkpoint` has `key`, trying the older spellings too.
    fn resolve(&self, key: &str, checkpoint: &Checkpoint) -> Option<String> {
        spellings(key, &self.prefixes)
            .into_iter()
            .find(|name| checkpoint.info(name).is_ok())
    }

    /// Reads the stored tensors, converted to `dtype`, into parameters by name. Names of
    /// `checkpoint` that were read are added to `used`.
    pub fn read(
        &self,
        checkpoint: &Checkpoint,
        dtype: DType,
        used: &mut Vec<String>,
    ) -> Result<BTreeMap<String, Tensor>> {
        let mut parameters = BTreeMap::new();
        let mut rows: BTreeMap<&str, Vec<Option<Tensor>>> = BTreeMap::new();
        let mut missing = Vec::new();
        for stored in &self.tensors {
            let Some(name) = self.resolve(&stored.key, checkpoint) else {
                missing.push(stored.key.clone());
                continue;
            };
            let tensor = checkpoint.tensor(&name, dtype)?;
            used.push(name.clone());
            match &stored.layout {
                Layout::Row {
                    row, rows: count, ..
                } => {
                    let tensor = engine(tensor.flatten_all())?;
                    let Some(parameter) = stored.parameters.first() else {
                        continue;
                    };
                    let all = rows.entry(parameter).or_insert_with(|| vec![None; *count]);
                    if let Some(slot) = all.get_mut(*row) {
                        *slot = Some(tensor);
                    }
                }
                layout => {
                    for (parameter, tensor) in stored
                        .parameters
                        .iter()
                        .zip(take_apart(&name, tensor, layout)?)
                    {
                        parameters.insert(parameter.clone(), tensor);
                    }
                }
            }
        }
        if !missing.is_empty() {
            return Err(missing_tensors(missing, used, checkpoint));
        }
        for (parameter, all) in rows {
            let all: Vec<Tensor> = all.into_iter().flatten().collect();
            parameters.insert(parameter.to_owned(), engine(Tensor::stack(&all, 0))?);
        }
        Ok(parameters)
    }

    /// Lays parameters out as the checkpoint stores them.
    pub fn write(&self, parameters: &BTreeMap<String, Tensor>) -> Result<Vec<(String, Tensor)>> {
        let mut tensors = Vec::with_capacity(self.tensors.len());
        for stored in &self.tensors {
            let mut parts = Vec::with_capacity(stored.parameters.len());
            for name in &stored.parameters {
                let tensor =
                    parameters
                        .get(name)
                        .ok_or_else(|| lapidary_parts::Error::Parameter {
                            name: name.clone(),
                            reason: "is not in the model, but its family stores it".to_owned(),
                        })?;
                parts.push(tensor.clone());
            }
            tensors.push((stored.key.clone(), put_together(&parts, &stored.layout)?));
        }
        Ok(tensors)
    }
}

impl ParameterSource for NameTable {
    /// Never gives anything: a table knows names, not values.
    fn parameter(&mut self, name: &str, _: &[usize], _: Init) -> lapidary_parts::Result<Tensor> {
        Err(lapidary_parts::Error::Parameter {
            name: name.to_owned(),
            reason: "is only named here".to_owned(),
        })
    }
}

fn engine<T, E: Into<lapidary_kernels::Error>>(result: std::result::Result<T, E>) -> Result<T> {
    result.map_err(|error| Error::Kernel(error.into()))
}

/// `key` with and without each prefix, and with the norm's names before 2020.
fn spellings(key: &str, prefixes: &[&'static str]) -> Vec<String> {
    let mut names = vec![key.to_owned()];
    for prefix in prefixes {
        match key.strip_prefix(prefix) {
            Some(rest) => names.push(rest.to_owned()),
            None => names.push(format!("{prefix}{key}")),
        }
    }
    let older: Vec<String> = names
        .iter()
        .filter(|name| name.contains("LayerNorm."))
        .map(|name| {
            name.replace("LayerNorm.weight", "LayerNorm.gamma")
                .replace("LayerNorm.bias", "LayerNorm.beta")
        })
        .collect();
    names.extend(older);
    names
}

fn take_apart(name: &str, tensor: Tensor, layout: &Layout) -> Result<Vec<Tensor>> {
    Ok(match layout {
        Layout::Same | Layout::Row { .. } => vec![tensor],
        Layout::Transposed => vec![engine(engine(tensor.t())?.contiguous())?],
        Layout::Reshaped(shape) => {
            check_shape(name, &tensor, shape)?;
            let rows = shape.first().copied().filter(|rows| *rows != 1);
            let flat = match (rows, shape.as_slice()) {
                (None, [_, rest @ ..]) => tensor.reshape(rest.to_vec()),
                (Some(rows), _) => tensor.reshape((rows, ())),
                (None, []) => Ok(tensor),
            };
            vec![engine(flat)?]
        }
        Layout::Stacked(lengths) => split(name, &tensor, lengths)?,
        Layout::StackedTransposed(widths) => {
            let tensor = engine(engine(tensor.t())?.contiguous())?;
            split(name, &tensor, widths)?
        }
    })
}

fn split(name: &str, tensor: &Tensor, lengths: &[usize]) -> Result<Vec<Tensor>> {
    let rows = tensor.dims().first().copied().unwrap_or(0);
    let needed: usize = lengths.iter().sum();
    if rows != needed {
        return Err(lapidary_parts::Error::Parameter {
            name: name.to_owned(),
            reason: format!("holds {rows} rows, but the config needs {needed}"),
        }
        .into());
    }
    let mut start = 0;
    lengths
        .iter()
        .map(|length| {
            let part = engine(engine(tensor.narrow(0, start, *length))?.contiguous());
            start += length;
            part
        })
        .collect()
}

fn check_shape(name: &str, tensor: &Tensor, shape: &[usize]) -> Result<()> {
    if tensor.dims() != shape {
        return Err(lapidary_parts::Error::Parameter {
            name: name.to_owned(),
            reason: format!(
                "has shape {:?}, but the config needs {shape:?}",
                tensor.dims()
            ),
        }
        .into());
    }
    Ok(())
}

fn put_together(parts: &[Tensor], layout: &Layout) -> Result<Tensor> {
    let first = parts
        .first()
        .ok_or_else(|| lapidary_parts::Error::Parameter {
            name: "of a stored tensor".to_owned(),
            reason: "is not named".to_owned(),
        })?;
    match layout {
        Layout::Same => engine(first.contiguous()),
        Layout::Transposed => engine(engine(first.t())?.contiguous()),
        Layout::Stacked(_) => engine(Tensor::cat(parts, 0)),
        Layout::StackedTransposed(_) => {
            engine(engine(engine(Tensor::cat(parts, 0))?.t())?.contiguous())
        }
        Layout::Reshaped(shape) => engine(first.reshape(shape.clone())),
        Layout::Row { row, shape, .. } => engine(engine(first.get(*row))?.reshape(shape.clone())),
    }
}

/// The report that names what is missing beside the names that are closest to it, of those that were not
/// read.
fn missing_tensors(missing: Vec<String>, used: &[String], checkpoint: &Checkpoint) -> Error {
    let found: Vec<&str> = checkpoint.names().collect();
    let report = crate::checkpoint::KeyReport::new(
        checkpoint.path().to_path_buf(),
        missing.iter().chain(used).map(String::as_str),
        found,
    );
    match report.require_all() {
        Err(error) => Error::Checkpoint(error),
        // A key that only an older spelling lacks.
        Ok(()) => lapidary_parts::Error::Parameter {
            name: missing.join(", "),
            reason: "is missing from the checkpoint".to_owned(),
        }
        .into(),
    }
}
