//! How much each token moves the last vector, and the most it could by the sum over paths.
//!
//! The bound of [`super::paths`] for a real model: values pass through `W_O W_V` of each head and
//! norms through their weights `Γ`, so that with `‖·‖` the operator norm and `C` the centring of
//! a layer norm (the identity for an RMS norm)
//!
//! `M_ij = (1 + f_i) (Σ_h α_ij^h ‖W_O^h W_V^h Γ_1 C‖ / β_1j + δ_ij)`,
//! `f_i = ‖W_down‖ s_i ‖W_up Γ_2 C‖ / β_2i`,
//!
//! where `β` are the deviations of the true rows and `s_i` the largest slope of the activation at
//! row `i`. The last row of `M^{(L−1)} … M^{(0)}` times `‖Γ_3 C‖ / β_3n` bounds the norm of the
//! Jacobian in which `α` and `β` are held fixed.

use super::paths::path_sums;
use crate::error::engine;
use crate::explainers::gradient::Forward;
use crate::{Error, Question, Result};
use lapidary_factor::{Matrix, matrix_from_tensor, thin_svd};
use lapidary_kernels::{Activation, DType, Device, Tensor, activate, activation_tangent};
use lapidary_model::Model;
use lapidary_parts::attention::{MixerSpec, MultiHeadSpec};
use lapidary_parts::block::{BlockSpec, Wiring};
use lapidary_parts::feedforward::FeedforwardSpec;
use lapidary_parts::norm::NormSpec;
use lapidary_signal::Trace;
use lapidary_signal::relevance::{
    ActivationRule, AttentionRule, NormRule, ProductRule, RelevanceRules,
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// What is differentiated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// Everything.
    All,
    /// Attention weights and the deviations of norms are constants.
    Frozen,
}

/// How the norms of Jacobians are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Directions {
    /// One backward pass for each feature.
    Every,
    /// Random directions `u`: the mean of `‖uᵀ J‖²` estimates the squared Frobenius norm.
    Random {
        /// How many.
        count: usize,
        /// The seed.
        seed: u64,
    },
}

/// Norms of `∂y_n / ∂v_i` for each token `i`.
#[derive(Clone, Debug, PartialEq)]
pub struct JacobianNorms {
    /// Operator norms, when every direction was taken.
    pub operator: Option<Vec<f64>>,
    /// Frobenius norms, or estimates of them.
    pub frobenius: Vec<f64>,
}

/// Norms of the Jacobian of the last token's vector `y_n`, after the final norm, with respect to
/// each token's embedding.
///
/// # Errors
/// When the model fails, or no direction is asked for.
pub fn jacobian_norms(
    question: &Question<'_>,
    flow: Flow,
    directions: Directions,
) -> Result<JacobianNorms> {
    let frozen = flow == Flow::Frozen;
    let rules = RelevanceRules {
        epsilon: 0.0,
        activation: ActivationRule::Gradient,
        attention: match frozen {
            true => AttentionRule::Detach,
            false => AttentionRule::Gradient,
        },
        norm: match frozen {
            true => NormRule::Detach,
            false => NormRule::Gradient,
        },
        product: ProductRule::Gradient,
        ..RelevanceRules::gradient_times_input()
    };
    let forward = Forward::new(question, rules, None)?;
    let hidden = engine(forward.output.hidden.value().get(0))?;
    let (length, width) = engine(hidden.dims2())?;
    let last = engine(hidden.get(length.saturating_sub(1)))?;
    let unit = |index: usize| (0..width).map(move |i| f64::from(u8::from(i == index)));
    let all: Vec<Vec<f64>> = match directions {
        Directions::Every => (0..width).map(|index| unit(index).collect()).collect(),
        Directions::Random { count: 0, .. } => {
            return Err(Error::invalid("random directions", 0, "at least 1"));
        }
        Directions::Random { count, seed } => {
            let mut generator = ChaCha8Rng::seed_from_u64(seed);
            let mut draw = || (0..width).map(|_| normal(&mut generator)).collect();
            (0..count).map(|_| draw()).collect()
        }
    };
    // One row of every token's Jacobian for each direction, [directions][length, width].
    let mut rows = Vec::with_capacity(all.len());
    for direction in &all {
        let direction = engine(Tensor::from_slice(direction, width, &Device::Cpu))?;
        let direction = engine(engine(direction.to_dtype(last.dtype()))?.to_device(last.device()))?;
        let along = engine(engine(&last * direction)?.sum_all())?;
        let gradients = engine(along.backward())?;
        let row = match gradients.get(forward.leaf.as_tensor()) {
            Some(gradient) => engine(gradient.get(0))?,
            None => engine(engine(forward.leaf.zeros_like())?.get(0))?,
        };
        rows.push(matrix_from_tensor("gradient", &row)?);
    }
    let token = |i: usize| {
        Matrix::from_fn(rows.len(), width, |direction, feature| {
            rows[direction][(i, feature)]
        })
    };
    let share = match directions {
        Directions::Every => 1.0,
        Directions::Random { count, .. } => 1.0 / (count as f64).sqrt(),
    };
    let frobenius = (0..length).map(|i| share * token(i).norm_l2()).collect();
    let operator = match directions {
        Directions::Random { .. } => None,
        Directions::Every => {
            let each = (0..length).map(|i| operator_norm(&token(i)));
            Some(each.collect::<Result<Vec<f64>>>()?)
        }
    };
    Ok(JacobianNorms {
        operator,
        frobenius,
    })
}

/// A standard normal number (Box & Muller).
fn normal(generator: &mut ChaCha8Rng) -> f64 {
    let radius = (-2.0 * (1.0 - generator.random::<f64>()).ln()).sqrt();
    radius * (std::f64::consts::TAU * generator.random::<f64>()).cos()
}

fn operator_norm(matrix: &Matrix) -> Result<f64> {
    let svd = thin_svd(matrix.as_ref())?;
    Ok(svd.s.first().copied().unwrap_or(0.0))
}

/// The bound on the operator norm of each token's Jacobian with attention and norms held fixed,
/// `[length]`, of the first sequence.
///
/// # Errors
/// For blocks that are not multi-head attention beside or before a dense or gated feed-forward
/// part, with norms before them.
pub fn path_bound(question: &Question<'_>) -> Result<Vec<f64>> {
    let model = question.model;
    let blocks = model.spec().expanded_blocks();
    let mut trace = Trace::new();
    for index in 0..blocks.len() {
        for site in [
            "in",
            "attention.weights",
            "attention.out",
            "feedforward.in",
            "out",
        ] {
            trace = trace.capture(&format!("blocks.{index}.{site}"))?;
        }
    }
    model.forward(question.input, question.pass(&trace))?;
    let mut layers = Vec::with_capacity(blocks.len());
    let mut stream = None;
    for (index, block) in blocks.iter().enumerate() {
        let part = Part {
            model,
            trace: &trace,
            path: format!("blocks.{index}"),
        };
        layers.push(part.layer(block)?);
        stream = Some(part.site("out")?);
    }
    let mut bound = path_sums(&layers);
    if let (Some(norm), Some(stream)) = (model.spec().final_norm, stream) {
        let last = stream.nrows().saturating_sub(1);
        let weight = scaled(model, "final_norm", &norm, &identity(model.spec().width))?;
        let deviation = deviations(&stream, &norm).get(last).copied().unwrap_or(1.0);
        let factor = operator_norm(&weight)? / deviation;
        bound.iter_mut().for_each(|entry| *entry *= factor);
    }
    Ok(bound)
}

/// One block of a traced pass.
struct Part<'a> {
    model: &'a Model,
    trace: &'a Trace,
    path: String,
}

impl Part<'_> {
    /// What was written at a site, `[length, width]`, of the first sequence.
    fn site(&self, name: &str) -> Result<Matrix> {
        let value = self.trace.signal(&format!("{}.{name}", self.path))?;
        Ok(matrix_from_tensor("site", &engine(value.value().get(0))?)?)
    }

    /// A linear layer's matrix `[output, input]`, in `f64`.
    fn weight(&self, name: &str) -> Result<Matrix> {
        let path = format!("{}.{name}", self.path);
        let get = |name: String| self.model.parameters().get(&name);
        if let Some(weight) = get(format!("{path}.weight")) {
            return Ok(matrix_from_tensor("weight", weight)?);
        }
        match (get(format!("{path}.up")), get(format!("{path}.down"))) {
            (Some(up), Some(down)) => {
                Ok(matrix_from_tensor("up", up)? * matrix_from_tensor("down", down)?)
            }
            _ => Err(Error::invalid(
                format!("weight of {path}"),
                "absent",
                "a dense or factorised matrix",
            )),
        }
    }

    /// `M`.
    fn layer(&self, block: &BlockSpec) -> Result<Matrix> {
        let MixerSpec::MultiHead(attention) = &block.attention else {
            return Err(self.refused("another mixer", "multi-head attention"));
        };
        if block.wiring == Wiring::PostNorm {
            return Err(self.refused("post-norm", "pre-norm or parallel wiring"));
        }
        if block.cross_attention.is_some() {
            return Err(self.refused("cross-attention", "no cross-attention"));
        }
        let stream = self.site("in")?;
        let mut layer = self.attention(attention, &block.norm, &stream)?;
        let read = match block.wiring {
            Wiring::Parallel => stream,
            _ => &stream + self.site("attention.out")?,
        };
        let slopes = match &block.feedforward {
            Some(part) => self.feedforward(part, &block.norm, &read)?,
            None => vec![0.0; read.nrows()],
        };
        for (i, slope) in slopes.iter().enumerate() {
            match block.wiring {
                Wiring::Parallel => layer[(i, i)] += slope,
                _ => layer
                    .row_mut(i)
                    .iter_mut()
                    .for_each(|entry| *entry *= 1.0 + slope),
            }
        }
        Ok(layer)
    }

    fn refused(&self, found: &str, expected: &str) -> Error {
        Error::invalid(
            format!("block {} of a bound over paths", self.path),
            found,
            expected,
        )
    }

    /// `Σ_h α_ij^h ‖W_O^h W_V^h Γ C‖ / β_j + δ_ij`.
    fn attention(&self, spec: &MultiHeadSpec, norm: &NormSpec, stream: &Matrix) -> Result<Matrix> {
        let weights = self
            .trace
            .signal(&format!("{}.attention.weights", self.path))?;
        let weights = engine(weights.value().get(0))?;
        let (value, output) = (
            self.weight("attention.value")?,
            self.weight("attention.output")?,
        );
        let value_width = spec.value_width(self.model.spec().width);
        let betas = deviations(stream, norm);
        let length = stream.nrows();
        let mut layer = identity(length);
        for head in 0..spec.heads {
            let group = head / (spec.heads / spec.groups().max(1)).max(1);
            let down = value.as_ref().subrows(group * value_width, value_width);
            let up = output.as_ref().subcols(head * value_width, value_width);
            let path = format!("{}.attention_norm", self.path);
            let circuit = scaled(self.model, &path, norm, &(up * down))?;
            let factor = operator_norm(&circuit)?;
            let alpha = matrix_from_tensor("attention weights", &engine(weights.get(head))?)?;
            for i in 0..length {
                for (j, beta) in betas.iter().enumerate() {
                    layer[(i, j)] += alpha[(i, j)] * factor / beta;
                }
            }
        }
        Ok(layer)
    }

    /// `f_i` of every row that is read, before its norm.
    fn feedforward(
        &self,
        part: &FeedforwardSpec,
        norm: &NormSpec,
        read: &Matrix,
    ) -> Result<Vec<f64>> {
        let betas = deviations(read, norm);
        let path = format!("{}.feedforward_norm", self.path);
        let through = |name: &str| -> Result<f64> {
            let weight = self.weight(&format!("feedforward.{name}"))?;
            operator_norm(&scaled(self.model, &path, norm, &weight)?)
        };
        let down = operator_norm(&self.weight("feedforward.down")?)?;
        let up = through("up")?;
        let slopes: Vec<f64> = match part {
            FeedforwardSpec::Dense(dense) => {
                let before = self.before_activation("up")?;
                let slopes = activation_tangent(&before, dense.activation.into())?;
                row_maxima(&slopes)?.iter().map(|most| most * up).collect()
            }
            FeedforwardSpec::Gated(gated) => {
                let activation: Activation = gated.activation.into();
                let gate = self.before_activation("gate")?;
                let content = self.before_activation("up")?;
                let open = row_maxima(&activate(&gate, activation)?)?;
                let bent = engine(activation_tangent(&gate, activation)? * content)?;
                let through_gate = through("gate")?;
                let both = open.iter().zip(row_maxima(&bent)?);
                both.map(|(open, bent)| open * up + bent * through_gate)
                    .collect()
            }
            _ => return Err(self.refused("a mixture", "a dense or gated feed-forward part")),
        };
        let each = slopes.iter().zip(&betas);
        Ok(each.map(|(slope, beta)| down * slope / beta).collect())
    }

    /// What a layer of the feed-forward part gives before any activation, `[length, hidden]`.
    fn before_activation(&self, name: &str) -> Result<Tensor> {
        let read = self
            .trace
            .signal(&format!("{}.feedforward.in", self.path))?;
        let read = engine(engine(read.value().get(0))?.to_dtype(DType::F64))?;
        let weight = self.weight(&format!("feedforward.{name}"))?;
        let weight = lapidary_factor::matrix_to_tensor(weight.as_ref(), DType::F64, read.device())?;
        let product = engine(read.matmul(&engine(weight.t())?))?;
        let bias = format!("{}.feedforward.{name}.bias", self.path);
        match self.model.parameters().get(&bias) {
            Some(bias) => engine(product.broadcast_add(&engine(bias.to_dtype(DType::F64))?)),
            None => Ok(product),
        }
    }
}

fn identity(size: usize) -> Matrix {
    Matrix::identity(size, size)
}

/// Largest `|x|` of each row.
fn row_maxima(x: &Tensor) -> Result<Vec<f64>> {
    let maxima = engine(engine(x.abs())?.max(1))?;
    engine(engine(maxima.to_dtype(DType::F64))?.to_vec1::<f64>())
}

/// `W Γ C`: a matrix that reads what the norm at `path` writes, before division by the deviation.
fn scaled(model: &Model, path: &str, norm: &NormSpec, weight: &Matrix) -> Result<Matrix> {
    let width = weight.ncols();
    if *norm == NormSpec::None {
        return Ok(weight.clone());
    }
    let gamma = match model.parameters().get(&format!("{path}.weight")) {
        Some(gamma) => engine(engine(gamma.to_dtype(DType::F64))?.to_vec1::<f64>())?,
        None => vec![1.0; width],
    };
    let mut product = Matrix::from_fn(weight.nrows(), width, |i, j| weight[(i, j)] * gamma[j]);
    if let NormSpec::Layer { .. } = norm {
        for i in 0..product.nrows() {
            let mean = product.row(i).iter().sum::<f64>() / width as f64;
            product
                .row_mut(i)
                .iter_mut()
                .for_each(|entry| *entry -= mean);
        }
    }
    Ok(product)
}

/// What the norm divides each row by; 1 where there is none.
fn deviations(rows: &Matrix, norm: &NormSpec) -> Vec<f64> {
    let width = rows.ncols() as f64;
    let of = |row: usize| {
        let row = rows.row(row);
        let mean = row.iter().sum::<f64>() / width;
        let squares: f64 = row.iter().map(|x| x * x).sum::<f64>() / width;
        match norm {
            NormSpec::Layer { epsilon } => (squares - mean * mean + epsilon).max(0.0).sqrt(),
            NormSpec::Rms { epsilon } => (squares + epsilon).sqrt(),
            NormSpec::None => 1.0,
        }
    };
    (0..rows.nrows()).map(of).collect()
}
