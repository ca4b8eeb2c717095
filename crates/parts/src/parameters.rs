//! Where modules get their parameters from while they are built.

use std::collections::BTreeMap;

use crate::{Error, Result};
use lapidary_kernels::{DType, QuantisedMatrix, Tensor};
use lapidary_signal::{DroppedPart, KeptColumns, Linear, Matrix, Weight};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How a parameter starts when it is not read from a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// All zero.
    Zeros,
    /// All one.
    Ones,
    /// All the same number.
    Constant(f64),
    /// Normal with mean zero.
    Normal {
        /// Standard deviation.
        deviation: f64,
    },
    /// Uniform between the bounds.
    Uniform {
        /// The least.
        low: f64,
        /// The most.
        high: f64,
    },
    /// Equally spaced along the last dimension.
    Spaced {
        /// The first number.
        first: f64,
        /// The last one.
        last: f64,
    },
    /// `ln(1), ln(2), …` along the last dimension: the S4D-real start of a state-space decay.
    LogRange,
    /// The value whose softplus is log-uniform between the bounds: the step sizes of Mamba.
    InverseSoftplusLogUniform {
        /// Smallest step.
        low: f64,
        /// Largest step.
        high: f64,
    },
}

impl Init {
    /// How matrices and tables begin unless a part says otherwise.
    pub const USUAL: Self = Self::Normal { deviation: 0.02 };
}

/// Gives parameters by name.
pub trait ParameterSource {
    /// The parameter `name` of exactly `shape`; `init` is how it starts if the source makes it.
    fn parameter(&mut self, name: &str, shape: &[usize], init: Init) -> Result<Tensor>;

    /// A tensor of a quantised matrix, of exactly `shape` and `dtype`: integers, or their scales.
    ///
    /// # Errors
    /// When there is none, as in a source that makes initial values.
    fn packed(&mut self, name: &str, shape: &[usize], dtype: DType) -> Result<Tensor> {
        Err(Error::Parameter {
            name: name.to_owned(),
            reason: format!(
                "is part of a quantised matrix ({dtype:?} {shape:?}), which is made from a dense \
                 one and has no initial value"
            ),
        })
    }

    /// The part with dropout of the linear layer at `path`, whose parameters are those at `stored`; none, but
    /// where a model is made for a step of training.
    ///
    /// # Errors
    /// Those of the tensor engine.
    fn dropped(&mut self, _stored: &str, _path: &str) -> Result<Option<DroppedPart>> {
        Ok(None)
    }

    /// The type of the parameters, which quantised matrices have once they are written out.
    fn dtype(&self) -> DType {
        DType::F32
    }
}

/// How a matrix is stored as small integers, beside its scales.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Quantisation {
    /// Bits of an integer: 4 or 8.
    pub bits: u32,
    /// Weights of a row that share a scale: a multiple of 32 that divides the row.
    pub group: usize,
    /// Whether each group has a minimum beside its scale.
    #[serde(default)]
    pub minima: bool,
    /// Whether the input is multiplied by a vector first.
    #[serde(default)]
    pub input_scale: bool,
    /// Columns that are numbers beside the integers: those whose inputs are too large for the weights
    /// to lose anything.
    #[serde(default, skip_serializing_if = "is_none_kept")]
    pub columns: usize,
}

/// Whether every column is made of integers alone, which a spec need not say.
fn is_none_kept(columns: &usize) -> bool {
    *columns == 0
}

/// Ready tensors, such as those of another model.
impl ParameterSource for BTreeMap<String, Tensor> {
    fn parameter(&mut self, name: &str, _shape: &[usize], _init: Init) -> Result<Tensor> {
        self.get(name).cloned().ok_or_else(|| Error::Parameter {
            name: name.to_owned(),
            reason: "is missing".to_owned(),
        })
    }

    fn packed(&mut self, name: &str, shape: &[usize], _: DType) -> Result<Tensor> {
        self.parameter(name, shape, Init::Zeros)
    }
}

/// A linear layer of a model: where it is, and at which site its input can be seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinearInfo {
    /// Path of the layer; its weight is `{path}.weight`, or `{path}.down` and `{path}.up`.
    pub path: String,
    /// The site that writes what the layer reads.
    pub input_site: String,
    /// Width of the input.
    pub input: usize,
    /// Width of the output.
    pub output: usize,
    /// Rank, where the layer is factorised.
    pub rank: Option<usize>,
    /// Whether it has a bias.
    pub bias: bool,
}

static NONE_QUANTISED: BTreeMap<String, Quantisation> = BTreeMap::new();

fn joined(path: &str, name: &str) -> String {
    if path.is_empty() {
        name.to_owned()
    } else {
        format!("{path}.{name}")
    }
}

/// A source of parameters, seen from one module's path.
pub struct Parameters<'a> {
    source: &'a mut dyn ParameterSource,
    ranks: &'a BTreeMap<String, usize>,
    quantised: &'a BTreeMap<String, Quantisation>,
    linears: &'a mut Vec<LinearInfo>,
    path: String,
    /// Where the parameters are, for a module that shares those of another.
    stored: Option<String>,
}

impl<'a> Parameters<'a> {
    /// At the root of a model. `ranks` names the linear layers that are factorised; each linear
    /// layer that is built is written down in `linears`.
    pub fn new(
        source: &'a mut dyn ParameterSource,
        ranks: &'a BTreeMap<String, usize>,
        linears: &'a mut Vec<LinearInfo>,
    ) -> Self {
        Self {
            source,
            ranks,
            quantised: &NONE_QUANTISED,
            linears,
            path: String::new(),
            stored: None,
        }
    }

    /// `quantised` names the matrices that are stored as small integers, as the parameters that
    /// they stand for: `blocks.0.attention.query.weight`, or a factor `….up`.
    pub fn with_quantised(self, quantised: &'a BTreeMap<String, Quantisation>) -> Self {
        Self { quantised, ..self }
    }

    /// One level down, at `name`.
    pub fn at(&mut self, name: impl std::fmt::Display) -> Parameters<'_> {
        let name = name.to_string();
        let path = self.join(&name);
        let stored = self.stored.as_ref().map(|stored| joined(stored, &name));
        Parameters {
            source: &mut *self.source,
            ranks: self.ranks,
            quantised: self.quantised,
            linears: &mut *self.linears,
            path,
            stored,
        }
    }

    /// The same module with the parameters of the one at `path`, which was built before: its linear
    /// layers are not written down again.
    pub fn shared_with(self, path: impl Into<String>) -> Self {
        Self {
            stored: Some(path.into()),
            ..self
        }
    }

    /// The place `name` beside the blocks of the model, for parameters that several modules share.
    pub fn at_root(self, name: impl Into<String>) -> Self {
        Self {
            path: name.into(),
            stored: None,
            ..self
        }
    }

    /// This module's path, such as `blocks.3.attention`.
    pub fn path(&self) -> &str {
        &self.path
    }

    fn join(&self, name: &str) -> String {
        joined(&self.path, name)
    }

    /// Where the parameter or layer `name` of this module is stored.
    fn join_stored(&self, name: &str) -> String {
        joined(self.stored.as_deref().unwrap_or(&self.path), name)
    }

    /// One parameter of this module.
    pub fn tensor(&mut self, name: &str, shape: &[usize], init: Init) -> Result<Tensor> {
        let full = self.join_stored(name);
        let tensor = self.source.parameter(&full, shape, init)?;
        if tensor.dims() != shape {
            return Err(Error::Parameter {
                name: full,
                reason: format!(
                    "has shape {:?}, but the spec needs {shape:?}",
                    tensor.dims()
                ),
            });
        }
        Ok(tensor)
    }

    /// One matrix of this module, quantised where the spec says so.
    fn matrix(&mut self, name: &str, shape: [usize; 2], init: Init) -> Result<Matrix> {
        let full = self.join_stored(name);
        let Some(form) = self.quantised.get(&full).copied() else {
            return Ok(Matrix::Dense(self.tensor(name, &shape, init)?));
        };
        let [output, input] = shape;
        let wrong = |found: String, expected: &str| {
            Error::spec(format!("quantised.{full}"), found, expected)
        };
        if !matches!(form.bits, 4 | 8) {
            return Err(wrong(form.bits.to_string(), "4 or 8 bits"));
        }
        if form.group == 0 || !form.group.is_multiple_of(32) || !input.is_multiple_of(form.group) {
            return Err(wrong(
                format!("groups of {} in rows of {input}", form.group),
                "groups of a multiple of 32 that divides the row",
            ));
        }
        if form.columns > input {
            return Err(wrong(
                format!("{} columns of {input}", form.columns),
                "at most as many columns as there are",
            ));
        }
        let bytes = input / 8 * form.bits as usize;
        let groups = [output, input / form.group];
        let mut part = |part: &str, shape: &[usize], dtype: DType| -> Result<Tensor> {
            let name = format!("{full}.{part}");
            let tensor = self.source.packed(&name, shape, dtype)?;
            if tensor.dims() != shape || tensor.dtype() != dtype {
                return Err(Error::Parameter {
                    name,
                    reason: format!(
                        "is {:?} {:?}, but the spec needs {dtype:?} {shape:?}",
                        tensor.dtype(),
                        tensor.dims()
                    ),
                });
            }
            Ok(tensor)
        };
        let codes = part("codes", &[output, bytes], DType::U8)?;
        let scales = part("scales", &groups, DType::F16)?;
        let minima = match form.minima {
            true => Some(part("minima", &groups, DType::F16)?),
            false => None,
        };
        let index = match form.columns {
            0 => None,
            columns => Some(part("columns", &[columns], DType::U32)?),
        };
        let kept = match index {
            Some(index) => {
                let weights = [output, form.columns];
                let weights = self.tensor(&format!("{name}.kept"), &weights, Init::Zeros)?;
                Some(KeptColumns::new(index, weights, input)?)
            }
            None => None,
        };
        let input_scale = match form.input_scale {
            true => Some(self.tensor(&format!("{name}.input_scale"), &[input], Init::Ones)?),
            false => None,
        };
        Ok(Matrix::Quantised {
            weight: QuantisedMatrix::new(form.bits, form.group, codes, scales, minima)?,
            input_scale,
            kept,
            dtype: self.source.dtype(),
        })
    }

    /// A linear layer under `name`, factorised where the spec gives it a rank. `input_site` is
    /// the name, within this module, of the site whose value it reads.
    pub fn linear(
        &mut self,
        name: &str,
        input_site: &str,
        input: usize,
        output: usize,
        bias: bool,
    ) -> Result<Linear> {
        let weight = Init::USUAL;
        let bias = bias.then_some(Init::Zeros);
        self.linear_starting(name, input_site, [output, input], weight, bias)
    }

    /// As [`Parameters::linear`], with other initial values: a layer of `[output, input]` whose
    /// `bias` starts as given, or that has none.
    pub fn linear_starting(
        &mut self,
        name: &str,
        input_site: &str,
        [output, input]: [usize; 2],
        weight: Init,
        bias: Option<Init>,
    ) -> Result<Linear> {
        let path = self.join_stored(name);
        let first = self.stored.is_none();
        let input_site = self.join(input_site);
        let rank = self.ranks.get(&path).copied();
        let mut here = self.at(name);
        let matrix = match rank {
            None => Weight::Whole(here.matrix("weight", [output, input], weight)?),
            Some(rank) if rank >= 1 && rank <= input.min(output) => Weight::LowRank {
                down: here.matrix("down", [rank, input], weight)?,
                up: here.matrix("up", [output, rank], weight)?,
            },
            Some(rank) => {
                let expected = format!("between 1 and {}", input.min(output));
                return Err(Error::spec(format!("low_rank.{path}"), rank, expected));
            }
        };
        let offset = match bias {
            Some(init) => Some(here.tensor("bias", &[output], init)?),
            None => None,
        };
        let dropped = self.source.dropped(&path, &self.join(name))?;
        if first {
            self.linears.push(LinearInfo {
                path,
                input_site,
                input,
                output,
                rank,
                bias: bias.is_some(),
            });
        }
        let layer = Linear::from_weight(matrix, offset)?;
        Ok(match dropped {
            Some(part) => layer.with_dropped(part)?,
            None => layer,
        })
    }
}
