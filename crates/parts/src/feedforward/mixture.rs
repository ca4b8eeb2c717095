//! Sparse mixtures of gated experts: Mixtral (Jiang et al., 2024, arXiv 2401.04088) and OLMoE
//! (Muennighoff et al., 2024, arXiv 2409.02060).
//!
//! A router scores the experts for each token, and only the `active` best ones run on it:
//!
//! ```text
//! p = softmax(x W_rᵀ)                        over all experts, [batch, length, experts]
//! y = Σ_{e ∈ top(p)} w_e · E_e(x),           E_e(x) = (f(x W_gᵀ) ⊙ x W_uᵀ) W_dᵀ
//! w_e = p_e / Σ_{top} p   (`normalise`, Mixtral),   or   w_e = p_e   (OLMoE)
//! ```
//!
//! Cost per token: `2 width · experts` for the router and `6 width · hidden · active` for the
//! experts' products. Parameters: `experts (width + 3 width · hidden)`.
//!
//! Tokens are gathered per expert, so no expert runs on a token that was not sent to it, and an
//! expert without tokens writes no sites. Equal probabilities go to the expert of lower index.
//! The router learns through the weights `w_e`; the choice itself has no derivative. Under
//! streams the weights are fixed at their true values, under relevance they are detached.
//!
//! Mixtral's paper takes the softmax over the chosen experts' scores; dividing the softmax over
//! all of them by the chosen ones' sum is the same number.

use crate::activation::ActivationSpec;
use crate::error::{bounded, tensor};
use crate::feedforward::{Gated, GatedSpec};
use crate::parameters::Parameters;
use crate::{Context, Result};
use lapidary_kernels::{D, DType, SoftmaxMask, Tensor, top_k};
use lapidary_signal::{Linear, Signal};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

const MAX_EXPERTS: usize = 1 << 12;

/// A sparse mixture of gated experts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MixtureSpec {
    /// Width of gate and content in each expert.
    pub hidden: usize,
    /// Number of experts.
    pub experts: usize,
    /// Experts that run on each token.
    pub active: usize,
    /// `f`, on the gate of each expert.
    #[serde(default = "silu")]
    pub activation: ActivationSpec,
    /// Whether the weights of a token's experts are made to sum to one.
    #[serde(default = "yes")]
    pub normalise: bool,
}

fn silu() -> ActivationSpec {
    ActivationSpec::Silu
}

fn yes() -> bool {
    true
}

impl MixtureSpec {
    /// Refuses what cannot be built.
    pub fn validate(&self, field: &str) -> Result<()> {
        bounded(format!("{field}.experts"), self.experts, 1..=MAX_EXPERTS)?;
        bounded(format!("{field}.active"), self.active, 1..=self.experts)
    }
}

/// The part with its parameters.
#[derive(Debug)]
pub struct Mixture {
    path: String,
    active: usize,
    normalise: bool,
    router: Linear,
    experts: Vec<Gated>,
}

/// Which token goes to which expert, and with what weight.
struct Routing {
    /// For each expert, its places in the list of `tokens · active` choices.
    choices: Vec<Vec<u32>>,
    /// `[tokens · active, 1]`.
    weights: Tensor,
}

impl Mixture {
    /// Builds the part for tokens of `width`.
    pub fn new(spec: &MixtureSpec, width: usize, mut parameters: Parameters<'_>) -> Result<Self> {
        let expert = GatedSpec {
            hidden: spec.hidden,
            activation: spec.activation,
            bias: false,
        };
        let router = parameters.linear("router", "in", width, spec.experts, false)?;
        let mut experts = Vec::with_capacity(spec.experts);
        for index in 0..spec.experts {
            let here = &mut parameters.at("experts");
            experts.push(Gated::new(&expert, width, here.at(index))?);
        }
        Ok(Self {
            path: parameters.path().to_owned(),
            active: spec.active,
            normalise: spec.normalise,
            router,
            experts,
        })
    }

    /// Transforms each token of `x` `[batch, length, width]`.
    pub fn forward(&self, x: &Signal, cx: &Context<'_>) -> Result<Signal> {
        let site = |name: &str, signal: Signal| {
            cx.trace.site(format_args!("{}.{name}", self.path), signal)
        };
        let x = site("in", x.clone())?;
        let (batch, length, width) = tensor(x.value().dims3())?;
        let tokens = batch * length;
        let probabilities = x
            .for_selection()
            .linear(&self.router)?
            .softmax(&SoftmaxMask::default())?;
        let probabilities = site("router", probabilities)?;
        let routing = self.route(probabilities.value())?;

        let flat = x.reshape(&[tokens, width])?;
        let mut outputs = Vec::new();
        let mut places: Vec<u32> = Vec::with_capacity(tokens * self.active);
        for (expert, choices) in self.experts.iter().zip(&routing.choices) {
            if choices.is_empty() {
                continue;
            }
            let rows: Vec<u32> = choices.iter().map(|c| c / self.active as u32).collect();
            let indices = tensor(Tensor::new(rows.as_slice(), x.device()))?;
            let chosen = tensor(Tensor::new(choices.as_slice(), x.device()))?;
            let weights = tensor(routing.weights.index_select(&chosen, 0))?;
            let transformed = expert.forward(&flat.select(0, &indices)?, cx)?;
            outputs.push(transformed.multiply_constant(&weights)?);
            places.extend(rows);
        }
        let places = tensor(Tensor::new(places.as_slice(), x.device()))?;
        let y = Signal::concatenate(&outputs, 0)?
            .place(0, &places, tokens)?
            .reshape(&[batch, length, width])?;
        Ok(site("out", y)?)
    }

    /// Chooses the experts of each token from `probabilities` `[batch, length, experts]`.
    fn route(&self, probabilities: &Tensor) -> Result<Routing> {
        let (mut weights, indices) = top_k(probabilities, self.active)?;
        if self.normalise {
            let total = tensor(weights.sum_keepdim(D::Minus1))?;
            weights = tensor(weights.broadcast_div(&total))?;
        }
        let indices = tensor(tensor(indices.to_dtype(DType::U32))?.flatten_all())?;
        let mut choices = vec![Vec::new(); self.experts.len()];
        for (choice, expert) in tensor(indices.to_vec1::<u32>())?.into_iter().enumerate() {
            if let Some(list) = choices.get_mut(expert as usize) {
                list.push(choice as u32);
            }
        }
        Ok(Routing {
            choices,
            weights: tensor(tensor(weights.flatten_all())?.unsqueeze(1))?,
        })
    }
}
