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
//! Jacobian in which `α` and `β` are held fixed. Parts side by side add up instead,
//! `M_ij = Σ_h … / β_1j + (1 + f_i) δ_ij`.
//!
//! Norms after the residual sums, `y = N_1(x + A x)` and `z = N_2(y + F y)`, are maps `Γ C / β` of
//! the sum: they scale what passes by as well as what a part writes, and the deviation is that of
//! the row that is written, not of the row that is read:
//!
//! `M_ij = g_i (Σ_h α_ij^h ‖Γ_1 C W_O^h W_V^h‖ + ‖Γ_1 C‖ δ_ij) / β_1i`,
//! `g_i = (‖Γ_2 C‖ + ‖Γ_2 C W_down‖ s_i ‖W_up‖) / β_2i`.

use super::paths::path_sums;
use crate::error::engine;
use crate::explainers::gradient::Forward;
use crate::{Error, Question, Result};
use lapidary_factor::{Matrix, matrix_from_tensor, thin_svd};
use lapidary_kernels::{Activation, DType, Device, Tensor, activate, activation_tangent, backward};
use lapidary_model::Model;
use lapidary_parts::attention::{MixerSpec, MultiHeadSpec, QueryKeySharing};
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
    let (outputs, width) = engine(hidden.dims2())?;
    let last = engine(hidden.get(outputs.saturating_sub(1)))?;
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
        let gradients = engine(backward(&along))?;
        let row = match gradients.get(forward.leaf.as_tensor()) {
            Some(gradient) => engine(gradient.get(0))?,
            None => engine(engine(forward.leaf.zeros_like())?.get(0))?,
        };
        rows.push(matrix_from_tensor("gradient", &row)?);
    }
    // Of the tokens that went in, which need be neither as many nor as wide as what comes out.
    let first = rows.first();
    let (length, features) = first.map_or((0, 0), |row| (row.nrows(), row.ncols()));
    let token = |i: usize| {
        Matrix::from_fn(rows.len(), features, |direction, feature| {
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
/// part.
pub fn path_bound(question: &Question<'_>) -> Result<Vec<f64>> {
    let model = question.model;
    crate::error::require_written_out(model, "a bound over paths")?;
    crate::error::require_one_stream(model, "a bound over paths")?;
    let blocks = model.spec().expanded_blocks();
    let mut trace = Trace::new();
    for index in 0..blocks.len() {
        for site in [
            "in",
            "attention.weights",
            "attention.out",
            "feedforward.in",
            "feedforward.out",
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
        let scales = Scales::of(model, "final_norm", &norm, model.spec().width)?;
        let deviation = deviations(&stream, &norm).get(last).copied().unwrap_or(1.0);
        let factor = scales.passes()? / deviation;
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
        if attention.local.is_some() {
            return Err(self.refused(
                "a filter beside the heads",
                "heads whose weights say all that they mix",
            ));
        }
        if !attention.output.is_own() || attention.sharing == QueryKeySharing::All {
            return Err(self.refused(
                "values or an output tied to the queries",
                "matrices of their own for values and output",
            ));
        }
        if block.shortcuts {
            return Err(self.refused("shortcuts", "a residual that is added as it is"));
        }
        if block.cross_attention.is_some() {
            return Err(self.refused("cross-attention", "no cross-attention"));
        }
        if matches!(block.wiring, Wiring::Replacing | Wiring::Reversed) {
            return Err(self.refused(
                "replacing or reversed wiring",
                "a residual around each part",
            ));
        }
        if block.wiring == Wiring::PostNorm {
            return self.after_sums(block, attention);
        }
        let stream = self.site("in")?;
        let reads = self.norm("attention_norm", &block.norm)?;
        let mut layer =
            self.attention(attention, |circuit| operator_norm(&reads.before(circuit)))?;
        let betas = deviations(&stream, &block.norm);
        for (j, beta) in betas.iter().enumerate() {
            layer.col_mut(j).iter_mut().for_each(|entry| *entry /= beta);
            layer[(j, j)] += 1.0;
        }
        let read = match block.wiring {
            Wiring::Parallel => stream,
            _ => &stream + self.site("attention.out")?,
        };
        let slopes = match &block.feedforward {
            Some(part) => {
                let reads = self.norm("feedforward_norm", &block.norm)?;
                let down = operator_norm(&self.weight("feedforward.down")?)?;
                let inner = self.slopes(part, |weight| operator_norm(&reads.before(weight)))?;
                let betas = deviations(&read, &block.norm);
                let each = inner.iter().zip(&betas);
                each.map(|(slope, beta)| down * slope / beta).collect()
            }
            None => vec![0.0; read.nrows()],
        };
        for (i, slope) in slopes.iter().enumerate() {
            match block.wiring {
                Wiring::Parallel => layer[(i, i)] += slope,
                _ => scale_row(&mut layer, i, 1.0 + slope),
            }
        }
        Ok(layer)
    }

    /// `M` of a block whose norms stand after the residual sums.
    fn after_sums(&self, block: &BlockSpec, attention: &MultiHeadSpec) -> Result<Matrix> {
        let norm = self.norm("attention_norm", &block.norm)?;
        let mut layer = self.attention(attention, |circuit| operator_norm(&norm.after(circuit)))?;
        let passes = norm.passes()?;
        let sum = self.site("in")? + self.site("attention.out")?;
        for (i, beta) in deviations(&sum, &block.norm).iter().enumerate() {
            layer[(i, i)] += passes;
            scale_row(&mut layer, i, 1.0 / beta);
        }
        if let Some(part) = &block.feedforward {
            let norm = self.norm("feedforward_norm", &block.norm)?;
            let down = operator_norm(&norm.after(&self.weight("feedforward.down")?))?;
            let passes = norm.passes()?;
            let sum = self.site("feedforward.in")? + self.site("feedforward.out")?;
            let betas = deviations(&sum, &block.norm);
            let slopes = self.slopes(part, operator_norm)?;
            for (i, (slope, beta)) in slopes.iter().zip(&betas).enumerate() {
                scale_row(&mut layer, i, (passes + down * slope) / beta);
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

    fn norm(&self, name: &str, spec: &NormSpec) -> Result<Scales> {
        let path = format!("{}.{name}", self.path);
        Scales::of(self.model, &path, spec, self.model.spec().width)
    }

    /// `Σ_h |α_ij^h| size(W_O^h W_V^h)`: weights that are not a softmax may be negative.
    fn attention(
        &self,
        spec: &MultiHeadSpec,
        size: impl Fn(&Matrix) -> Result<f64>,
    ) -> Result<Matrix> {
        let weights = self
            .trace
            .signal(&format!("{}.attention.weights", self.path))?;
        let weights = engine(weights.value().get(0))?;
        let (value, output) = (
            self.weight("attention.value")?,
            self.weight("attention.output")?,
        );
        let value_width = spec.value_width(self.model.spec().width);
        let mut sum: Option<Matrix> = None;
        for head in 0..spec.heads {
            let group = head / (spec.heads / spec.groups().max(1)).max(1);
            let down = value.as_ref().subrows(group * value_width, value_width);
            let up = output.as_ref().subcols(head * value_width, value_width);
            let factor = size(&(up * down))?;
            let alpha = matrix_from_tensor("attention weights", &engine(weights.get(head))?)?;
            let own = Matrix::from_fn(alpha.nrows(), alpha.ncols(), |i, j| {
                alpha[(i, j)].abs() * factor
            });
            sum = Some(match sum {
                Some(sum) => sum + own,
                None => own,
            });
        }
        sum.ok_or_else(|| self.refused("no heads", "at least one head"))
    }

    /// The most that each row of the feed-forward part's hidden features can move for a step of
    /// what is read: `s_i size(W_up)`, and of a gated part the sum over its two factors.
    fn slopes(
        &self,
        part: &FeedforwardSpec,
        size: impl Fn(&Matrix) -> Result<f64>,
    ) -> Result<Vec<f64>> {
        let through = |name: &str| size(&self.weight(&format!("feedforward.{name}"))?);
        let up = through("up")?;
        match part {
            FeedforwardSpec::Dense(dense) => {
                let before = self.before_activation("up")?;
                let slopes = activation_tangent(&before, dense.activation.into())?;
                Ok(row_maxima(&slopes)?.iter().map(|most| most * up).collect())
            }
            FeedforwardSpec::Gated(gated) => {
                let activation: Activation = gated.activation.into();
                let gate = self.before_activation("gate")?;
                let content = self.before_activation("up")?;
                let open = row_maxima(&activate(&gate, activation)?)?;
                let bent = engine(activation_tangent(&gate, activation)? * content)?;
                let through_gate = through("gate")?;
                let both = open.iter().zip(row_maxima(&bent)?);
                Ok(both
                    .map(|(open, bent)| open * up + bent * through_gate)
                    .collect())
            }
            other => Err(self.refused(other.kind(), "a dense or gated feed-forward part")),
        }
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

fn scale_row(matrix: &mut Matrix, row: usize, factor: f64) {
    let entries = matrix.row_mut(row).iter_mut();
    entries.for_each(|entry| *entry *= factor);
}

/// Largest `|x|` of each row.
fn row_maxima(x: &Tensor) -> Result<Vec<f64>> {
    let maxima = engine(engine(x.abs())?.max(1))?;
    engine(engine(maxima.to_dtype(DType::F64))?.to_vec1::<f64>())
}

/// `Γ C`: what a norm does before it divides by the deviation.
struct Scales {
    gamma: Vec<f64>,
    centres: bool,
}

impl Scales {
    /// Those of the norm at `path`, all one where it has no weights.
    fn of(model: &Model, path: &str, spec: &NormSpec, width: usize) -> Result<Self> {
        let gamma = match model.parameters().get(&format!("{path}.weight")) {
            Some(gamma) => engine(engine(gamma.to_dtype(DType::F64))?.to_vec1::<f64>())?,
            None => vec![1.0; width],
        };
        let centres = matches!(spec, NormSpec::Layer { .. });
        Ok(Self { gamma, centres })
    }

    /// `W Γ C`: a matrix that reads what the norm writes.
    fn before(&self, weight: &Matrix) -> Matrix {
        let mut product = Matrix::from_fn(weight.nrows(), weight.ncols(), |i, j| {
            weight[(i, j)] * self.gamma[j]
        });
        if self.centres {
            for i in 0..product.nrows() {
                let mean = product.row(i).iter().sum::<f64>() / product.ncols() as f64;
                let entries = product.row_mut(i).iter_mut();
                entries.for_each(|entry| *entry -= mean);
            }
        }
        product
    }

    /// `Γ C W`: a matrix whose outputs the norm reads.
    fn after(&self, weight: &Matrix) -> Matrix {
        let rows = weight.nrows() as f64;
        let means: Vec<f64> = (0..weight.ncols())
            .map(|j| match self.centres {
                true => weight.col(j).iter().sum::<f64>() / rows,
                false => 0.0,
            })
            .collect();
        Matrix::from_fn(weight.nrows(), weight.ncols(), |i, j| {
            self.gamma[i] * (weight[(i, j)] - means[j])
        })
    }

    /// `‖Γ C‖`: of what passes by.
    fn passes(&self) -> Result<f64> {
        let width = self.gamma.len();
        operator_norm(&self.before(&Matrix::identity(width, width)))
    }
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
