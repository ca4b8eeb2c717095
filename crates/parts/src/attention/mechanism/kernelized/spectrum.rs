//! What frequencies are drawn from: fixed and learned spectral distributions.
//!
//! ```text
//! gaussian    ω = n
//! mixture     ω = Sᵀ n ± μ  (fourier),    ω = e^{s/2} ⊙ n + μ  (positive)
//! fastfood    rows of (1/√d) S H G Π H B
//! generator   ω = tanh(W₃ h₂ + b₃),  h = leaky-relu(batch-norm(W · + b))
//! ```
//!
//! with `n ~ N(0, I)`. A mixture has a component for each head, or several whose attentions are
//! averaged; its `S` is stored as what it differs from the identity by. The generator maps `d / 2`
//! normal numbers through layers of `2 d` and `4 d` to a frequency; its norms use mean and variance
//! of the frequencies of the draw, in training and after it.

use super::super::Heads;
use super::fastfood::Fastfood;
use super::{KernelizedSpec, ReadOut};
use crate::error::{bounded, tensor};
use crate::parameters::{Init, Parameters};
use crate::{Error, Result};
use lapidary_kernels::{SoftmaxMask, Tensor, linear, matmul, softmax};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

const MAX_COMPONENTS: usize = 1 << 10;
const EPSILON: f64 = 1e-5;
const LEAK: f64 = 0.01;

/// What frequencies are drawn from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum SpectrumSpec {
    /// The standard normal distribution, not learned: the kernel `exp(−‖x − y‖²/2)`.
    #[serde(deserialize_with = "crate::fields::none")]
    Gaussian,
    /// Normal distributions with learned means and covariances.
    Mixture {
        /// Components of a head, whose attentions are averaged with learned weights; one without a
        /// weight when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        components: Option<usize>,
    },
    /// A product of diagonal matrices and Hadamard transforms.
    Fastfood {
        /// Which of the diagonal matrices are learned.
        #[serde(default)]
        learned: Learned,
    },
    /// What a small network makes of normal numbers, for all heads.
    #[serde(deserialize_with = "crate::fields::none")]
    Generator,
}

/// Which diagonal matrices of FastFood are learned; others are drawn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Learned {
    /// None.
    None,
    /// `S`.
    #[default]
    Scaling,
    /// `S`, `G` and `B`.
    All,
}

impl Default for SpectrumSpec {
    fn default() -> Self {
        Self::Mixture { components: None }
    }
}

impl SpectrumSpec {
    pub(super) fn validate(&self, spec: &KernelizedSpec, heads: &Heads, field: &str) -> Result<()> {
        let count = spec.frequencies(heads.head_width);
        let fourier = matches!(spec.features, ReadOut::Fourier { .. });
        let refuse = |name: &str, found: usize, expected: &str| {
            Err(Error::spec(format!("{field}.{name}"), found, expected))
        };
        match self {
            Self::Gaussian => Ok(()),
            Self::Mixture { components } => {
                if let Some(components) = components {
                    let name = format!("{field}.spectrum.components");
                    bounded(name, *components, 1..=MAX_COMPONENTS)?;
                }
                match fourier && !count.is_multiple_of(2) {
                    true => refuse("count", count, "even: each draw is taken with ± the mean"),
                    false => Ok(()),
                }
            }
            Self::Fastfood { .. } => {
                if let Some(count) = spec.count {
                    return refuse("count", count, "absent: FastFood has one for each feature");
                }
                match heads.head_width.is_power_of_two() {
                    true => Ok(()),
                    false => {
                        let expected = format!(
                            "another one where heads have {} features: FastFood needs a power of two",
                            heads.head_width
                        );
                        let name = format!("{field}.spectrum.kind");
                        Err(Error::spec(name, "fastfood", expected))
                    }
                }
            }
            Self::Generator => match count < 2 {
                true => refuse(
                    "count",
                    count,
                    "at least 2, for the variance of a batch norm",
                ),
                false => Ok(()),
            },
        }
    }
}

/// A distribution with its parameters.
#[derive(Debug)]
pub(super) enum Spectrum {
    Gaussian,
    Symmetric {
        /// `[heads · components, d]`.
        means: Tensor,
        /// `S − I`, `[heads · components, d, d]`.
        factors: Tensor,
        mixture: Mixture,
    },
    Diagonal {
        /// `[heads · components, d]`.
        means: Tensor,
        /// `s`, as the means.
        log_variances: Tensor,
        mixture: Mixture,
    },
    Fastfood(Fastfood),
    Generator(Generator),
}

/// How components make up heads.
#[derive(Debug)]
pub(super) struct Mixture {
    heads: usize,
    components: usize,
    /// Logits of the weights `[heads, components]`.
    weights: Option<Tensor>,
}

impl Spectrum {
    pub(super) fn new(
        spec: &SpectrumSpec,
        read_out: ReadOut,
        heads: &Heads,
        count: usize,
        mut parameters: Parameters<'_>,
    ) -> Result<Self> {
        let width = heads.head_width;
        match spec {
            SpectrumSpec::Gaussian => Ok(Self::Gaussian),
            SpectrumSpec::Mixture { components } => {
                let each = components.unwrap_or(1);
                let all = heads.heads * each;
                let start = Init::Normal {
                    deviation: 1.0 / (width as f64).sqrt(),
                };
                let means = parameters.tensor("means", &[all, width], start)?;
                let mixture = Mixture {
                    heads: heads.heads,
                    components: each,
                    weights: match components {
                        None => None,
                        Some(_) => {
                            let shape = [heads.heads, each];
                            Some(parameters.tensor("weights", &shape, Init::Zeros)?)
                        }
                    },
                };
                Ok(match read_out {
                    ReadOut::Fourier { .. } => Self::Symmetric {
                        means,
                        factors: parameters.tensor("factors", &[all, width, width], Init::Zeros)?,
                        mixture,
                    },
                    ReadOut::Positive { .. } => Self::Diagonal {
                        means,
                        log_variances: parameters.tensor(
                            "log_variances",
                            &[all, width],
                            Init::Zeros,
                        )?,
                        mixture,
                    },
                })
            }
            SpectrumSpec::Fastfood { learned } => {
                debug_assert_eq!(count, width);
                Fastfood::new(*learned, heads, parameters).map(Self::Fastfood)
            }
            SpectrumSpec::Generator => Generator::new(width, parameters).map(Self::Generator),
        }
    }

    fn mixture(&self) -> Option<&Mixture> {
        match self {
            Self::Symmetric { mixture, .. } | Self::Diagonal { mixture, .. } => Some(mixture),
            Self::Gaussian | Self::Fastfood(_) | Self::Generator(_) => None,
        }
    }

    /// The weights of components, `[heads, components]`, where there are any.
    pub(super) fn shares(&self) -> Result<Option<Tensor>> {
        match self.mixture().and_then(|mixture| mixture.weights.as_ref()) {
            None => Ok(None),
            Some(weights) => Ok(Some(softmax(weights, &SoftmaxMask::default())?)),
        }
    }

    /// `x` `[batch, heads, ..]` once for each component of a head.
    pub(super) fn for_components(&self, x: &Tensor) -> Result<Tensor> {
        match self.mixture() {
            Some(mixture) if mixture.components > 1 => {
                let heads = mixture.heads * mixture.components;
                Ok(lapidary_kernels::naive::repeat_groups(x, heads)?)
            }
            _ => Ok(x.clone()),
        }
    }

    /// `ω` `[heads · components or 1, count, d]` for `x` `[batch, heads, length, d]`; none where they are
    /// never laid out.
    pub(super) fn frequencies(
        &self,
        x: &Tensor,
        count: usize,
        seed: u64,
    ) -> Result<Option<Tensor>> {
        let width = tensor(x.dim(3))?;
        let noise = |count: usize, width: usize| normal(&[count, width], seed, x);
        let frequencies = match self {
            Self::Gaussian => tensor(noise(count, width)?.unsqueeze(0))?,
            Self::Symmetric { means, factors, .. } => {
                let noise = tensor(noise(count / 2, width)?.unsqueeze(0))?;
                // n S for every row n: n + n (S − I).
                let turned = matmul(&noise, factors)?;
                let turned = tensor(turned.broadcast_add(&noise))?;
                let means = tensor(means.unsqueeze(1))?;
                let (above, below) = (turned.broadcast_add(&means), turned.broadcast_sub(&means));
                tensor(Tensor::cat(&[tensor(above)?, tensor(below)?], 1))?
            }
            Self::Diagonal {
                means,
                log_variances,
                ..
            } => {
                let deviations = tensor(tensor(log_variances * 0.5)?.exp())?;
                let noise = tensor(noise(count, width)?.unsqueeze(0))?;
                let scaled = tensor(noise.broadcast_mul(&tensor(deviations.unsqueeze(1))?))?;
                tensor(scaled.broadcast_add(&tensor(means.unsqueeze(1))?))?
            }
            Self::Fastfood(_) => return Ok(None),
            Self::Generator(generator) => {
                let noise = noise(count, generator.input)?;
                tensor(generator.forward(&noise)?.unsqueeze(0))?
            }
        };
        Ok(Some(frequencies))
    }

    /// `ω · x` `[batch, heads · components, length, count]` for `x` `[batch, heads, length, d]`.
    pub(super) fn project(&self, x: &Tensor, count: usize, seed: u64) -> Result<Tensor> {
        if let Self::Fastfood(fastfood) = self {
            return fastfood.project(x, seed);
        }
        match self.frequencies(x, count, seed)? {
            Some(frequencies) => {
                let across = tensor(frequencies.transpose(1, 2))?;
                Ok(matmul(&self.for_components(x)?, &across)?)
            }
            None => Ok(x.clone()),
        }
    }

    /// Operations of the projection of one query or key of all components of a head.
    pub(super) fn operations(&self, width: usize, count: usize) -> u64 {
        let components = self.mixture().map_or(1, |mixture| mixture.components);
        match self {
            Self::Fastfood(_) => (width * (2 * width.max(1).ilog2() as usize + 4)) as u64,
            _ => (components * count * 2 * width) as u64,
        }
    }
}

/// Standard normal numbers of a seed, like `like` in kind.
pub(super) fn normal(shape: &[usize], seed: u64, like: &Tensor) -> Result<Tensor> {
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    let values: Vec<f64> = (0..shape.iter().product())
        .map(|_| {
            let radius = (-2.0 * (1.0 - generator.random::<f64>()).ln()).sqrt();
            radius * (2.0 * std::f64::consts::PI * generator.random::<f64>()).cos()
        })
        .collect();
    let values = tensor(Tensor::from_vec(values, shape, like.device()))?;
    tensor(values.to_dtype(like.dtype()))
}

/// A network from normal numbers to frequencies.
#[derive(Debug)]
pub(super) struct Generator {
    input: usize,
    hidden: [Hidden; 2],
    weight: Tensor,
    bias: Tensor,
}

/// A linear layer with its norm.
#[derive(Debug)]
struct Hidden {
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
}

/// Xavier's deviation.
fn balanced(input: usize, output: usize) -> Init {
    Init::Normal {
        deviation: (2.0 / (input + output).max(1) as f64).sqrt(),
    }
}

impl Generator {
    fn new(width: usize, mut parameters: Parameters<'_>) -> Result<Self> {
        let input = (width / 2).max(1);
        let mut hidden = |name: &str, input: usize, output: usize| -> Result<Hidden> {
            let mut parameters = parameters.at(name);
            Ok(Hidden {
                weight: parameters.tensor("weight", &[output, input], balanced(input, output))?,
                bias: parameters.tensor("bias", &[output], Init::Zeros)?,
                norm_weight: parameters.tensor("norm.weight", &[output], Init::Ones)?,
                norm_bias: parameters.tensor("norm.bias", &[output], Init::Zeros)?,
            })
        };
        let hidden = [
            hidden("first", input, 2 * width)?,
            hidden("second", 2 * width, 4 * width)?,
        ];
        let mut last = parameters.at("last");
        Ok(Self {
            input,
            hidden,
            weight: last.tensor("weight", &[width, 4 * width], balanced(4 * width, width))?,
            bias: last.tensor("bias", &[width], Init::Zeros)?,
        })
    }

    /// Frequencies `[count, d]` of noise `[count, d / 2]`.
    fn forward(&self, noise: &Tensor) -> Result<Tensor> {
        let mut x = noise.clone();
        for layer in &self.hidden {
            x = layer.forward(&x)?;
        }
        tensor(linear(&x, &self.weight, Some(&self.bias))?.tanh())
    }
}

impl Hidden {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = linear(x, &self.weight, Some(&self.bias))?;
        let centred = tensor(x.broadcast_sub(&tensor(x.mean_keepdim(0))?))?;
        let variance = tensor(tensor(centred.sqr())?.mean_keepdim(0))?;
        let deviation = tensor(tensor(variance + EPSILON)?.sqrt())?;
        let normed = tensor(centred.broadcast_div(&deviation))?;
        let normed = tensor(normed.broadcast_mul(&self.norm_weight))?;
        let normed = tensor(normed.broadcast_add(&self.norm_bias))?;
        let below = tensor(tensor(normed.neg())?.relu())?;
        tensor(tensor(normed.relu())? - tensor(below * LEAK)?)
    }
}
