//! The interleaved network as the denoiser of a diffusion: from noisy patches, a time and conditions
//! to what the patches are without noise.
//!
//! ```text
//! x = N(W patches) + positions                    stem
//! z₀ = latents + N₀(MLP(z_prev))                  latents of the step before; N₀ starts at gain 0
//! c = [MLP(waves(1000 · time)); W_c conditions]   read by the latents after each read of their group
//! patches' = W_o N(x)
//! ```
//!
//! A diffusion takes noisy patches and gives patches, which no head of a language model or classifier
//! does, so this is a module by itself and not a part of a model's spec.

use super::network::{Beside, Fit};
use super::{FitOutput, FitSpec, tables};
use crate::block::{Block, BlockSpec};
use crate::error::{bounded, tensor};
use crate::norm::{Norm, NormSpec};
use crate::organisation::Surroundings;
use crate::parameters::{Init, Parameters};
use crate::{Context, Error, Result};
use lapidary_kernels::{Activation, Tensor};
use lapidary_signal::{Linear, Signal};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

const MAX_CHANNELS: usize = 1 << 20;
const EPSILON: f64 = 1e-5;

/// A denoiser.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DenoiserSpec {
    /// Numbers of a patch.
    pub channels: usize,
    /// Features of a data token.
    pub width: usize,
    /// The network.
    pub network: FitSpec,
    /// Its local blocks.
    pub blocks: Vec<BlockSpec>,
    /// Features of a condition, where there are conditions beside the time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub condition_width: Option<usize>,
    /// Whether latents start from those of the step before.
    #[serde(default)]
    pub self_conditioning: bool,
}

impl DenoiserSpec {
    /// The local blocks, repetitions written out.
    fn local(&self) -> Vec<BlockSpec> {
        let one = |block: &BlockSpec| BlockSpec {
            repeat: 1,
            ..block.clone()
        };
        let each = self.blocks.iter();
        each.flat_map(|block| std::iter::repeat_n(one(block), block.repeat))
            .collect()
    }

    /// Refuses what cannot be built.
    ///
    /// # Errors
    /// Names the field, what it is and what it could be.
    pub fn validate(&self) -> Result<()> {
        bounded("channels", self.channels, 1..=MAX_CHANNELS)?;
        bounded("width", self.width, 1..=MAX_CHANNELS)?;
        for (index, block) in self.blocks.iter().enumerate() {
            block.validate(self.width, &format!("blocks.{index}"))?;
            if block.shared {
                let field = format!("blocks.{index}.shared");
                return Err(Error::spec(field, true, "false in a denoiser"));
            }
        }
        if let Some(width) = self.condition_width {
            bounded("condition_width", width, 1..=MAX_CHANNELS)?;
        }
        let blocks = self.local();
        let model = Surroundings {
            blocks: &blocks,
            width: self.width,
            length: self.network.group.saturating_mul(self.network.groups),
        };
        self.network.validate(&model, "network")?;
        let latent_width = self.network.latent_width(self.width);
        if self.network.latents == 0 {
            let expected = "at least 1, and global layers in the layout: they hear of the time";
            return Err(Error::spec("network.latents", 0, expected));
        }
        if latent_width < 16 || !latent_width.is_multiple_of(8) {
            let expected = "a multiple of 8 from 16 on: the time's waves have a quarter of it";
            return Err(Error::spec("network.width", latent_width, expected));
        }
        if self.network.condition > 0 {
            let expected = "0 in a denoiser, whose latents read the conditions";
            let found = self.network.condition;
            return Err(Error::spec("network.condition", found, expected));
        }
        if self.network.output != FitOutput::Tokens {
            let expected = "tokens in a denoiser";
            return Err(Error::spec("network.output", self.network.output, expected));
        }
        if FitSpec::is_causal(&blocks) {
            return Err(Error::spec(
                "blocks",
                "causal",
                "bidirectional in a denoiser",
            ));
        }
        Ok(())
    }
}

/// What a step of denoising is given.
#[derive(Clone, Copy, Debug)]
pub struct Noisy<'a> {
    /// `[batch, groups · n, channels]`.
    pub patches: &'a Signal,
    /// How far the noise has gone, between 0 and 1: `[batch]`.
    pub time: &'a Tensor,
    /// `[batch, conditions, condition_width]`.
    pub conditions: Option<&'a Signal>,
    /// Latents of the step before, `[batch, groups · m, latent_width]`; zeros when absent.
    pub latents: Option<&'a Signal>,
}

/// A denoiser with its parameters.
#[derive(Debug)]
pub struct Denoiser {
    spec: DenoiserSpec,
    latent_width: usize,
    stem: Linear,
    stem_norm: Norm,
    blocks: Vec<Arc<Block>>,
    network: Fit,
    time: [Linear; 2],
    condition: Option<Linear>,
    previous: Option<Previous>,
    norm: Norm,
    output: Linear,
}

/// What latents of the step before go through.
#[derive(Debug)]
struct Previous {
    up: Linear,
    down: Linear,
    norm: Norm,
}

impl Denoiser {
    /// Builds a denoiser.
    ///
    /// # Errors
    /// When the spec is invalid, or a parameter cannot be had.
    pub fn new(spec: &DenoiserSpec, mut root: Parameters<'_>) -> Result<Self> {
        spec.validate()?;
        let local = spec.local();
        let model = Surroundings {
            blocks: &local,
            width: spec.width,
            length: spec.network.group * spec.network.groups,
        };
        let mut blocks = Vec::with_capacity(local.len());
        for (index, block) in local.iter().enumerate() {
            let mut all = root.at("blocks");
            blocks.push(Arc::new(Block::new(block, spec.width, all.at(index))?));
        }
        let (width, latent_width) = (spec.width, spec.network.latent_width(spec.width));
        let quarter = latent_width / 4;
        let layer = NormSpec::default();
        let mut time = root.at("time");
        let time = [
            time.linear("hidden", "in", quarter, 4 * quarter, true)?,
            time.linear("output", "hidden.out", 4 * quarter, latent_width, true)?,
        ];
        let previous = match spec.self_conditioning {
            false => None,
            true => {
                let mut own = root.at("previous");
                let up = own.linear("up", "in", latent_width, 4 * latent_width, true)?;
                let down = own.linear("down", "hidden", 4 * latent_width, latent_width, true)?;
                let mut norm = own.at("norm");
                let mut zeros = |name: &str| norm.tensor(name, &[latent_width], Init::Zeros);
                Some(Previous {
                    up,
                    down,
                    norm: Norm::Layer {
                        weight: zeros("weight")?,
                        bias: zeros("bias")?,
                        epsilon: EPSILON,
                    },
                })
            }
        };
        Ok(Self {
            stem: root.linear("stem", "patches", spec.channels, width, true)?,
            stem_norm: Norm::new(&layer, width, root.at("stem_norm"))?,
            network: Fit::new(&spec.network, &model, true, root.at("organisation"))?,
            condition: match spec.condition_width {
                None => None,
                Some(from) => {
                    Some(root.linear("condition", "conditions", from, latent_width, true)?)
                }
            },
            norm: Norm::new(&layer, width, root.at("norm"))?,
            output: root.linear("output", "denoised", width, spec.channels, true)?,
            spec: spec.clone(),
            latent_width,
            blocks,
            time,
            previous,
        })
    }

    /// Patches without noise `[batch, groups · n, channels]`, and the latents for the next step.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn forward(&self, noisy: Noisy<'_>, cx: &Context<'_>) -> Result<(Signal, Signal)> {
        let (batch, length, channels) = tensor(noisy.patches.value().dims3())?;
        if channels != self.spec.channels {
            let expected = self.spec.channels.to_string();
            return Err(Error::spec("channels of the patches", channels, expected));
        }
        if noisy.time.dims() != [batch] {
            let expected = format!("[{batch}]");
            return Err(Error::spec(
                "shape of the time",
                noisy.time.dims(),
                expected,
            ));
        }
        let patches = cx
            .trace
            .site(format_args!("patches"), noisy.patches.clone())?;
        let x = self.stem_norm.forward(&patches.linear(&self.stem)?)?;
        let context = self.context(noisy, cx)?;
        let count = length.div_ceil(self.spec.network.group) * self.spec.network.latents;
        let shape = [batch, count, self.latent_width];
        let start = match (&self.previous, noisy.latents) {
            (Some(_), Some(latents)) if latents.dims() != shape => {
                let (name, expected) = ("shape of the latents of the step before", shape);
                return Err(Error::spec(name, latents.dims(), format!("{expected:?}")));
            }
            (Some(previous), Some(latents)) => Some(previous.forward(latents, cx)?),
            (None, Some(_)) => {
                let expected = "absent in a denoiser without self_conditioning";
                return Err(Error::spec("latents of the step before", "given", expected));
            }
            // What a first step starts from is what half of the examples were trained with: N₀(MLP(0)) has biases.
            (Some(previous), None) => {
                let (dtype, device) = (noisy.patches.dtype(), noisy.patches.device());
                let zeros = tensor(Tensor::zeros(shape.as_slice(), dtype, device))?;
                Some(previous.forward(&Signal::from(zeros), cx)?)
            }
            (None, None) => None,
        };
        let beside = Beside {
            start: start.as_ref(),
            context: Some(&context),
        };
        let run = |block: &Arc<Block>, x: Signal, cx: &Context<'_>| block.forward(x, cx, None);
        let (x, latents) = self.network.forward(x, &self.blocks, &run, beside, cx)?;
        let x = cx
            .trace
            .site(format_args!("denoised"), self.norm.forward(&x)?)?;
        let Some((latents, _)) = latents else {
            return Err(Error::spec("network.latents", 0, "at least 1"));
        };
        Ok((x.linear(&self.output)?, latents))
    }

    /// The latents to start a training step from: those of a step without any, a constant, and zeros
    /// for half of the examples, by `seed`. None without self-conditioning.
    ///
    /// # Errors
    /// As [`Denoiser::forward`].
    pub fn latents_to_train_with(
        &self,
        noisy: Noisy<'_>,
        seed: u64,
        cx: &Context<'_>,
    ) -> Result<Option<Signal>> {
        if self.previous.is_none() {
            return Ok(None);
        }
        let first = Noisy {
            latents: None,
            ..noisy
        };
        let latents = self.forward(first, cx)?.1.constant();
        let (batch, _, _) = tensor(latents.value().dims3())?;
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let kept: Vec<f64> = (0..batch)
            .map(|_| f64::from(u8::from(random.random_bool(0.5))))
            .collect();
        let kept = tensor(Tensor::from_vec(kept, (batch, 1, 1), latents.device()))?;
        let kept = tensor(kept.to_dtype(latents.dtype()))?;
        Ok(Some(latents.multiply_constant(&kept)?))
    }

    /// Time and conditions as tokens `[batch, 1 + conditions, latent_width]`.
    fn context(&self, noisy: Noisy<'_>, cx: &Context<'_>) -> Result<Signal> {
        let batch = noisy.time.elem_count();
        let quarter = self.latent_width / 4;
        let waves = tables::of_times(noisy.time, quarter, noisy.patches.dtype())?;
        let waves = Signal::from(waves).reshape(&[batch, 1, quarter])?;
        let waves = cx.trace.site(format_args!("time.in"), waves)?;
        let [hidden, output] = &self.time;
        let hidden = waves.linear_activate(hidden, Activation::Silu)?;
        let hidden = cx.trace.site(format_args!("time.hidden.out"), hidden)?;
        let time = hidden.linear_activate(output, Activation::Silu)?;
        match (&self.condition, noisy.conditions) {
            (None, None) => Ok(time),
            (Some(map), Some(conditions)) => {
                let conditions = cx
                    .trace
                    .site(format_args!("conditions"), conditions.clone())?;
                Ok(Signal::concatenate(&[time, conditions.linear(map)?], 1)?)
            }
            (known, _) => {
                let expected = match known {
                    Some(_) => "given: the spec has a condition_width",
                    None => "absent: the spec has no condition_width",
                };
                let found = noisy.conditions.map(Signal::dims);
                Err(Error::spec("conditions", found, expected))
            }
        }
    }
}

impl Previous {
    /// `N₀(MLP(z))`.
    fn forward(&self, latents: &Signal, cx: &Context<'_>) -> Result<Signal> {
        let latents = cx
            .trace
            .site(format_args!("previous.in"), latents.clone())?;
        let hidden = latents.linear_activate(&self.up, Activation::Gelu)?;
        let hidden = cx.trace.site(format_args!("previous.hidden"), hidden)?;
        self.norm.forward(&hidden.linear(&self.down)?)
    }
}
