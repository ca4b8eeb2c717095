//! Empirical Fisher information of linear layers.
//!
//! For a loss `L(d)` of example `d` and a weight `W [output, input]`,
//!
//! ```text
//! Î(W_oi) = (1/|D|) Σ_d G_oi(d)²        G(d) = ∂L(d)/∂W = Σ_t g_t x_tᵀ
//! ```
//!
//! with the layer's input `x_t` and the gradient `g_t` at its output for each token `t`. The
//! sum over tokens stands inside the square, so `Î` is not a sum over tokens: `G(d)` has to be
//! assembled for one example at a time, which a backward pass with a single example does. That
//! is what a calibration uses. Where `x_t` and `g_t` of a whole batch are at hand,
//! [`gram_input_sums`] gives the sums over outputs without assembling `G`:
//!
//! ```text
//! Σ_o G_oi² = Σ_{t,t'} x_ti x_t'i (g_t · g_t')
//! ```
//!
//! at `T² (input + output)` instead of `T · input · output` operations for `T` tokens.
//!
//! Squaring the mean gradient of `B` examples is cheaper still, and biased: for independent
//! examples its expectation is `(1/B) E[G²] + (1 − 1/B) E[G]²`, so it shrinks the information
//! by `B` and mixes in the squared mean gradient, which vanishes at an optimum.

use std::collections::{BTreeMap, BTreeSet};

use lapidary_kernels::{DType, Device, GradStore, Tensor, Var};
use lapidary_model::Model;
use lapidary_parts::parameters::{Init, ParameterSource};

use crate::error::engine;
use crate::requirements::Statistic;
use crate::selection::{Layer, TABLE};
use crate::{Error, Result};

/// `Σ_o G_oi²` `[input]` of `G = gᵀ x`, from the inputs `x` `[tokens, input]` and the output
/// gradients `g` `[tokens, output]` of one example, by the Gram matrix of the gradients.
///
/// ```
/// use lapidary_kernels::{Device, Tensor};
/// let x = Tensor::new(&[[1f64, 2.0], [3.0, 0.0]], &Device::Cpu)?;
/// let g = Tensor::new(&[[1f64], [-1.0]], &Device::Cpu)?;
/// // G = [1 − 3, 2 − 0]
/// let sums = lapidary_compress::fisher::gram_input_sums(&x, &g)?;
/// assert_eq!(sums.to_vec1::<f64>()?, [4.0, 4.0]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn gram_input_sums(x: &Tensor, g: &Tensor) -> Result<Tensor> {
    let gram = engine(g.matmul(&engine(g.t())?))?;
    engine(engine(x * engine(gram.matmul(x))?)?.sum(0))
}

/// Gives the weights of some layers as variables and everything else as constants, so that a
/// backward pass computes the gradients that are asked for and no others.
struct Watched<'a> {
    parameters: &'a BTreeMap<String, Tensor>,
    names: BTreeSet<String>,
    variables: BTreeMap<String, Var>,
}

impl ParameterSource for Watched<'_> {
    fn parameter(
        &mut self,
        name: &str,
        _shape: &[usize],
        _init: Init,
    ) -> lapidary_parts::Result<Tensor> {
        let tensor = self
            .parameters
            .get(name)
            .ok_or_else(|| lapidary_parts::Error::Parameter {
                name: name.to_owned(),
                reason: "is missing".to_owned(),
            })?
            .detach();
        if !self.names.contains(name) {
            return Ok(tensor);
        }
        let variable = Var::from_tensor(&tensor).map_err(lapidary_kernels::Error::from)?;
        let tensor = variable.as_tensor().clone();
        self.variables.insert(name.to_owned(), variable);
        Ok(tensor)
    }

    fn packed(&mut self, name: &str, _: &[usize], _: DType) -> lapidary_parts::Result<Tensor> {
        self.parameters
            .get(name)
            .cloned()
            .ok_or_else(|| lapidary_parts::Error::Parameter {
                name: name.to_owned(),
                reason: "is missing".to_owned(),
            })
    }
}

/// What is summed of one layer's gradients.
#[derive(Debug, Default)]
struct Wants {
    inputs: bool,
    outputs: bool,
    entries: bool,
    kronecker: bool,
}

/// Kronecker factors `A` and `B`, each scaled to a mean diagonal of 1.
#[derive(Debug)]
struct Factors {
    input: Tensor,
    output: Tensor,
}

/// The sums of one layer, in `f64`.
#[derive(Debug, Default)]
struct Sums {
    wants: Wants,
    variable: Option<Var>,
    transposed: bool,
    inputs: Option<Tensor>,
    outputs: Option<Tensor>,
    entries: Option<Tensor>,
    /// `Σ ‖G‖²`.
    energy: f64,
    /// The factors of the pass before; the identity in the first pass.
    factors: Option<Factors>,
    input_factor: Option<Tensor>,
    output_factor: Option<Tensor>,
}

/// A copy of the model that is differentiated by the weights of some layers, and sums over
/// those gradients.
pub(crate) struct FisherSums {
    pub(crate) model: Model,
    layers: BTreeMap<String, Sums>,
    samples: u64,
}

impl FisherSums {
    pub(crate) fn new(model: &Model, statistics: &BTreeSet<Statistic>) -> Result<Self> {
        let mut layers: BTreeMap<String, Sums> = BTreeMap::new();
        for statistic in statistics {
            let Some(path) = statistic.layer() else {
                continue;
            };
            let wants = &mut layers.entry(path.to_owned()).or_default().wants;
            match statistic {
                Statistic::FisherInputs { .. } => wants.inputs = true,
                Statistic::FisherOutputs { .. } => wants.outputs = true,
                Statistic::Fisher { .. } => wants.entries = true,
                Statistic::KroneckerInput { .. } | Statistic::KroneckerOutput { .. } => {
                    wants.kronecker = true;
                }
                Statistic::InputSquares { .. }
                | Statistic::InputMeans { .. }
                | Statistic::InputMagnitudes { .. }
                | Statistic::InputPeaks { .. }
                | Statistic::Covariance { .. }
                | Statistic::Similarity { .. } => {}
            }
        }
        let mut source = Watched {
            parameters: model.parameters(),
            names: layers.keys().map(|path| Layer::weight_name(path)).collect(),
            variables: BTreeMap::new(),
        };
        let watched = Model::new(model.spec().clone(), &mut source)?;
        for (path, sums) in &mut layers {
            sums.transposed = path == TABLE;
            sums.variable = source.variables.remove(&Layer::weight_name(path));
            if sums.variable.is_none() {
                return Err(Error::invalid(
                    format!("layer {path}"),
                    "without a weight of its own",
                    "a dense linear layer of the model",
                ));
            }
        }
        Ok(Self {
            model: watched,
            layers,
            samples: 0,
        })
    }

    /// Whether any layer's Kronecker factors are wanted, which further passes refine.
    pub(crate) fn wants_kronecker(&self) -> bool {
        self.layers.values().any(|sums| sums.wants.kronecker)
    }

    /// Adds the gradients of one loss. A layer that the loss does not depend on has none, and
    /// adds zero.
    pub(crate) fn add(&mut self, gradients: &GradStore) -> Result<()> {
        self.samples += 1;
        for sums in self.layers.values_mut() {
            let gradient = sums
                .variable
                .as_ref()
                .and_then(|variable| gradients.get(variable.as_tensor()));
            if let Some(gradient) = gradient {
                let mut gradient = engine(gradient.detach().to_dtype(DType::F64))?;
                if sums.transposed {
                    gradient = engine(engine(gradient.t())?.contiguous())?;
                }
                sums.add(&gradient)?;
            }
        }
        Ok(())
    }

    /// Ends a pass whose Kronecker factors the next pass improves.
    pub(crate) fn refine(&mut self) -> Result<()> {
        self.samples = 0;
        for sums in self.layers.values_mut() {
            let (input, output) = (sums.input_factor.take(), sums.output_factor.take());
            if let (Some(input), Some(output)) = (input, output) {
                sums.factors = Some(Factors {
                    input: unit_diagonal(&input)?,
                    output: unit_diagonal(&output)?,
                });
            }
            sums.energy = 0.0;
            // The rest was summed in the first pass.
            sums.wants.inputs = false;
            sums.wants.outputs = false;
            sums.wants.entries = false;
        }
        Ok(())
    }

    /// The means, by statistic; `first_samples` is the number of losses in the first pass.
    pub(crate) fn finish(self, first_samples: u64) -> Result<BTreeMap<Statistic, Tensor>> {
        let mut means = BTreeMap::new();
        let scale = 1.0 / first_samples.max(1) as f64;
        for (path, sums) in self.layers {
            let layer = || path.clone();
            let (input, output) = sums.shape()?;
            let zeros =
                |shape: &[usize]| engine(Tensor::zeros(shape, DType::F64, &self.model.device()));
            let mean = |sum: Option<Tensor>, shape: &[usize]| match sum {
                Some(sum) => engine(sum.affine(scale, 0.0)),
                None => zeros(shape),
            };
            if let Some((a, b)) = sums.kronecker(self.samples)? {
                means.insert(Statistic::KroneckerInput { layer: layer() }, a);
                means.insert(Statistic::KroneckerOutput { layer: layer() }, b);
            }
            for (statistic, sum, shape) in [
                (
                    Statistic::FisherInputs { layer: layer() },
                    sums.inputs,
                    vec![input],
                ),
                (
                    Statistic::FisherOutputs { layer: layer() },
                    sums.outputs,
                    vec![output],
                ),
                (
                    Statistic::Fisher { layer: layer() },
                    sums.entries,
                    vec![output, input],
                ),
            ] {
                means.insert(statistic, mean(sum, &shape)?);
            }
        }
        Ok(means)
    }
}

impl Sums {
    /// Adds one gradient `[output, input]`.
    fn add(&mut self, gradient: &Tensor) -> Result<()> {
        let squares = engine(gradient.sqr())?;
        if self.wants.inputs {
            add(&mut self.inputs, engine(squares.sum(0))?)?;
        }
        if self.wants.outputs {
            add(&mut self.outputs, engine(squares.sum(1))?)?;
        }
        if self.wants.kronecker {
            self.energy += engine(engine(squares.sum_all())?.to_scalar::<f64>())?;
            let transposed = engine(gradient.t())?;
            let (right, left) = match &self.factors {
                None => (gradient.clone(), gradient.clone()),
                Some(factors) => (
                    engine(factors.output.matmul(gradient))?,
                    engine(gradient.matmul(&factors.input))?,
                ),
            };
            add(&mut self.input_factor, engine(transposed.matmul(&right))?)?;
            add(&mut self.output_factor, engine(left.matmul(&transposed))?)?;
        }
        if self.wants.entries {
            add(&mut self.entries, squares)?;
        }
        Ok(())
    }

    /// `(input, output)`.
    fn shape(&self) -> Result<(usize, usize)> {
        match self.variable.as_ref().map(|variable| variable.dims()) {
            Some(&[output, input]) if !self.transposed => Ok((input, output)),
            Some(&[input, output]) => Ok((input, output)),
            _ => Err(Error::invalid("weight", "absent", "a matrix")),
        }
    }

    /// `A` and `B`, scaled so that `tr A · tr B` is `E‖G‖²`, the trace of the information; zeros
    /// for a layer without gradients.
    fn kronecker(&self, samples: u64) -> Result<Option<(Tensor, Tensor)>> {
        if !self.wants.kronecker {
            return Ok(None);
        }
        let (input, output) = self.shape()?;
        let (Some(a), Some(b)) = (&self.input_factor, &self.output_factor) else {
            let device = Device::Cpu;
            return Ok(Some((
                engine(Tensor::zeros((input, input), DType::F64, &device))?,
                engine(Tensor::zeros((output, output), DType::F64, &device))?,
            )));
        };
        let mean_energy = self.energy / samples.max(1) as f64;
        let total = (input * output) as f64;
        Ok(Some((
            engine(unit_diagonal(a)?.affine(mean_energy / total, 0.0))?,
            unit_diagonal(b)?,
        )))
    }
}

fn add(total: &mut Option<Tensor>, term: Tensor) -> Result<()> {
    *total = Some(match total.take() {
        Some(total) => engine(total + term)?,
        None => term,
    });
    Ok(())
}

/// A symmetric matrix over its mean diagonal entry; unchanged when that is 0.
fn unit_diagonal(matrix: &Tensor) -> Result<Tensor> {
    let size = engine(matrix.dim(0))?;
    let identity = engine(Tensor::eye(size, DType::F64, matrix.device()))?;
    let trace = engine(engine(matrix * identity)?.sum_all())?;
    let mean = engine(trace.to_scalar::<f64>())? / size.max(1) as f64;
    if mean > 0.0 {
        engine(matrix.affine(1.0 / mean, 0.0))
    } else {
        Ok(matrix.clone())
    }
}
