//! Kernelized Transformer (Chowdhury, Solomou, Dubey, Sachan, On Learning the Transformer Kernel,
//! 2021, arXiv 2110.08323): linear attention whose kernel is learned, as the distribution of the
//! frequencies that its random features are drawn with.
//!
//! ```text
//! y_i = Σ_j φ(q_i) · φ(k_j) v_j / (Σ_j φ(q_i) · φ(k_j) + ε),     q, k ← √scale · q, √scale · k
//! fourier:   φ(x) = √(1/m) [cos ω_1·x … cos ω_m·x, sin ω_1·x … sin ω_m·x], s
//! positive:  φ(x) = √(1/m) [exp(ω_1·x − ‖x‖²) … exp(ω_m·x − ‖x‖²)]
//! ```
//!
//! The first gives a kernel of `x − y` alone, `E cos(ω · (x − y)) + s²` (Bochner; Rahimi & Recht,
//! 2007), where the smoothing `s` keeps the denominator from zero; the second is positive, and for
//! standard normal frequencies `exp(−‖x − y‖²/2)`. What the frequencies `ω` are drawn from is a
//! [`SpectrumSpec`]; its parameters get their gradients through `ω`.
//!
//! Frequencies are drawn anew by passes that have a seed for that (those of training), as often as the
//! spec's [`Redraw`] says, and otherwise from the spec's own seed, always the same; decoding keeps to the
//! latter, since its state was made with them. A draw is a function of seeds, the step of training and
//! the module's path, so that a block that is recomputed sees the one it saw.
//!
//! Cost for each head and component: `2 m head_width` for each query and key, by FastFood
//! `head_width (2 log₂ head_width + 4)`, then `2 features · value_width` for either, with `features` `m`, or
//! `2 m + 1` for cosines and sines; under a causal mask also the products of each chunk of 64 positions with
//! itself. There positive features, but FastFood's, are made a chunk at a time, again in the backward pass, and
//! never held.

mod fastfood;
mod spectrum;

pub use fastfood::hadamard;
pub use spectrum::{Learned, SpectrumSpec};

use super::decayed;
use super::sums::{Components, Features, Normalised, kept, resume};
use super::{Abilities, Describe, Heads, Mechanism, MechanismPass, Memory, Resumed, Subsets};
use crate::dropout::seed_of_site;
use crate::error::{bounded, tensor};
use crate::parameters::Parameters;
use crate::state::MixerState;
use crate::{Draws, Error, Result};
use lapidary_kernels::{
    D, ExponentialMeans, Tensor, causal_exponential_means, exponential_features,
};
use lapidary_signal::Mixing;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use spectrum::Spectrum;

const MAX_COUNT: usize = 1 << 16;
/// Added to the sum of weights.
const EPSILON: f64 = 1e-6;
/// How far the exponents of pads are moved away from those of real keys.
const AWAY: f64 = 1e30;
/// Positions that meet directly under a causal mask.
const CHUNK: usize = 64;

/// Linear attention with a learned kernel.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct KernelizedSpec {
    /// What frequencies are drawn from.
    #[serde(default)]
    pub spectrum: SpectrumSpec,
    /// How frequencies become features.
    #[serde(default)]
    pub features: ReadOut,
    /// Number of frequencies `m` of a head; when absent the power of two from `d ln d` on, for heads
    /// of `d` features. FastFood has as many as features.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub count: Option<usize>,
    /// Seed of the frequencies of passes without one, and of those that last several steps.
    #[serde(default)]
    pub seed: u64,
    /// When frequencies are drawn anew.
    #[serde(default, skip_serializing_if = "Redraw::is_each_pass")]
    pub redraw: Redraw,
}

/// When frequencies are drawn anew in training.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Redraw {
    /// In each pass.
    #[default]
    #[serde(deserialize_with = "crate::fields::none")]
    Pass,
    /// Every so many steps; all passes in between have the same. Passes that draw outside of
    /// training, where there are no steps, each have their own.
    Steps {
        /// Steps that a draw lasts.
        every: u64,
    },
    /// Never: those of evaluation are trained with.
    #[serde(deserialize_with = "crate::fields::none")]
    Never,
}

impl Redraw {
    #[allow(
        clippy::trivially_copy_pass_by_ref,
        reason = "serde asks for a reference"
    )]
    fn is_each_pass(&self) -> bool {
        *self == Self::Pass
    }

    /// The seed of the frequencies of a pass, where `own` is the spec's.
    fn seed(self, own: u64, pass: &MechanismPass<'_>) -> u64 {
        match (self, pass.context.draw, pass.context.step) {
            (Self::Never, ..) | (_, None, _) => seed_of_site(own, pass.path),
            (Self::Steps { every }, Some(_), Some(step)) => {
                let period = step / every.max(1);
                seed_of_site(own, &format!("{} from period {period}", pass.path))
            }
            (Self::Pass | Self::Steps { .. }, Some(draw), _) => seed_of_site(draw, pass.path),
        }
    }
}

/// How frequencies become features.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum ReadOut {
    /// Cosines and sines, and one constant feature.
    Fourier {
        /// The constant feature `s`.
        #[serde(default = "one")]
        smoothing: f64,
    },
    /// Exponentials.
    Positive {
        /// Whether the largest exponent of a query, and of all keys of a sequence, is taken away
        /// from the others, which changes nothing but what overflows, or is so small that `ε` counts.
        #[serde(default)]
        stabilise: bool,
    },
}

fn one() -> f64 {
    1.0
}

impl Default for ReadOut {
    fn default() -> Self {
        Self::Positive { stabilise: false }
    }
}

impl KernelizedSpec {
    /// Frequencies of a head of `width` features.
    pub fn frequencies(&self, width: usize) -> usize {
        let default = || {
            let width = width as f64;
            ((width * width.ln()).max(2.0).ceil() as usize).next_power_of_two()
        };
        match self.spectrum {
            SpectrumSpec::Fastfood { .. } => width,
            _ => self.count.unwrap_or_else(default),
        }
    }

    /// The map from queries and keys of a head to features.
    ///
    /// # Errors
    /// When a parameter cannot be had.
    pub fn feature_map(&self, heads: &Heads, parameters: Parameters<'_>) -> Result<FeatureMap> {
        let count = self.frequencies(heads.head_width);
        Ok(FeatureMap {
            spectrum: Spectrum::new(&self.spectrum, self.features, heads, count, parameters)?,
            read_out: self.features,
            count,
        })
    }
}

impl Describe for KernelizedSpec {
    fn kind(&self) -> &'static str {
        "kernelized"
    }

    fn abilities(&self) -> Abilities {
        Abilities {
            causal: true,
            bidirectional: true,
            cross: true,
            scores: false,
        }
    }

    fn subsets(&self) -> Subsets {
        Subsets::AnyKeys
    }

    fn draws(&self) -> Draws {
        Draws::anything(self.redraw != Redraw::Never)
    }

    fn validate(&self, heads: &Heads, field: &str) -> Result<()> {
        let at = |name: &str| format!("{field}.{name}");
        if heads.scale.is_nan() || heads.scale <= 0.0 {
            let expected = "softmax where the scale is not positive: its root multiplies queries \
                            and keys";
            return Err(Error::spec(at("kind"), "kernelized", expected));
        }
        if let Some(count) = self.count {
            bounded(at("count"), count, 1..=MAX_COUNT)?;
        }
        if self.redraw == (Redraw::Steps { every: 0 }) {
            return Err(Error::spec(at("redraw.every"), 0, "at least 1"));
        }
        match self.features {
            ReadOut::Fourier { smoothing } if !(smoothing >= 0.0 && smoothing.is_finite()) => {
                let expected = "a number of at least 0";
                return Err(Error::spec(at("features.smoothing"), smoothing, expected));
            }
            ReadOut::Positive { stabilise: true } if heads.causal => {
                let expected = "false in causal attention: the largest exponent may come later";
                return Err(Error::spec(at("features.stabilise"), true, expected));
            }
            ReadOut::Fourier { .. } | ReadOut::Positive { .. } => {}
        }
        self.spectrum.validate(self, heads, field)
    }

    fn build(&self, heads: &Heads, parameters: Parameters<'_>) -> Result<Box<dyn Mechanism>> {
        Ok(Box::new(Kernelized {
            map: self.feature_map(heads, parameters)?,
            seed: self.seed,
            redraw: self.redraw,
            heads: *heads,
        }))
    }
}

/// The map from queries and keys of heads to features.
#[derive(Debug)]
pub struct FeatureMap {
    spectrum: Spectrum,
    read_out: ReadOut,
    count: usize,
}

impl FeatureMap {
    /// `φ(x)` `[batch, heads · components, length, features]` for `x` `[batch, heads, length,
    /// width]`, with the frequencies of a seed. Positive features as they are, not stabilised.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn features(&self, x: &Tensor, seed: u64) -> Result<Tensor> {
        if let ReadOut::Fourier { smoothing } = self.read_out {
            return self.waves(&self.project(x, seed)?, smoothing);
        }
        match self.spectrum.frequencies(x, self.count, seed)? {
            Some(frequencies) => {
                let x = self.spectrum.for_components(x)?;
                Ok(exponential_features(&x, &frequencies, 1.0)?)
            }
            None => self.exponentials(&self.exponents(x, &self.project(x, seed)?)?),
        }
    }

    /// `ω · x` `[batch, heads · components, length, count]`, for the frequencies of a seed.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn project(&self, x: &Tensor, seed: u64) -> Result<Tensor> {
        self.spectrum.project(x, self.count, seed)
    }

    /// As [`FeatureMap::features`], of queries and of keys, which `kept` `[batch, 1, key, 1]` leaves.
    fn both(
        &self,
        q: &Tensor,
        k: &Tensor,
        kept: Option<&Tensor>,
        seed: u64,
    ) -> Result<[Tensor; 2]> {
        let [q, mut k] = match self.read_out {
            ReadOut::Positive { stabilise: true } => {
                let exponents =
                    |x: &Tensor| -> Result<Tensor> { self.exponents(x, &self.project(x, seed)?) };
                let (q, mut k) = (exponents(q)?, exponents(k)?);
                if let Some(kept) = kept {
                    // Far below any exponent, however long keys are, and finite.
                    let away = tensor(tensor(kept - 1.0)? * AWAY)?;
                    k = tensor(k.broadcast_add(&away))?;
                }
                let of_each = tensor(q.max_keepdim(3))?;
                let of_all = tensor(tensor(k.max_keepdim(3))?.max_keepdim(2))?;
                [
                    self.exponentials(&tensor(q.broadcast_sub(&of_each))?)?,
                    self.exponentials(&tensor(k.broadcast_sub(&of_all))?)?,
                ]
            }
            _ => [self.features(q, seed)?, self.features(k, seed)?],
        };
        if let Some(kept) = kept {
            k = tensor(k.broadcast_mul(kept))?;
        }
        Ok([q, k])
    }

    fn waves(&self, projected: &Tensor, smoothing: f64) -> Result<Tensor> {
        let (cosines, sines) = (tensor(projected.cos())?, tensor(projected.sin())?);
        let waves = tensor(Tensor::cat(&[cosines, sines], D::Minus1))?;
        let waves = tensor(waves * (1.0 / self.count as f64).sqrt())?;
        let (batch, heads, length, _) = tensor(waves.dims4())?;
        let constant = tensor(Tensor::full(
            smoothing,
            (batch, heads, length, 1),
            waves.device(),
        ))?;
        let constant = tensor(constant.to_dtype(waves.dtype()))?;
        tensor(Tensor::cat(&[waves, constant], 3))
    }

    /// `ω · x − ‖x‖²`.
    fn exponents(&self, x: &Tensor, projected: &Tensor) -> Result<Tensor> {
        let squares = tensor(tensor(x.sqr())?.sum_keepdim(3))?;
        let squares = self.spectrum.for_components(&squares)?;
        tensor(projected.broadcast_sub(&squares))
    }

    fn exponentials(&self, exponents: &Tensor) -> Result<Tensor> {
        tensor(tensor(exponents.exp())? * (1.0 / self.count as f64).sqrt())
    }

    /// Features of a head and component.
    fn width(&self) -> usize {
        match self.read_out {
            ReadOut::Fourier { .. } => 2 * self.count + 1,
            ReadOut::Positive { .. } => self.count,
        }
    }
}

/// The module.
#[derive(Debug)]
struct Kernelized {
    map: FeatureMap,
    seed: u64,
    redraw: Redraw,
    heads: Heads,
}

impl Kernelized {
    fn sums(
        &self,
        q: &Tensor,
        k: &Tensor,
        seed: u64,
        pass: &MechanismPass<'_>,
    ) -> Result<Normalised<Features>> {
        let kept = kept(pass, tensor(k.dim(2))?, k.dtype())?;
        let root = self.heads.scale.sqrt();
        let before = self.making(q, k);
        let (q, k) = (tensor(q * root)?, tensor(k * root)?);
        let [q, k] = self.map.both(&q, &k, kept.as_ref(), seed)?;
        let features = Features {
            q,
            k,
            causal: self.heads.causal,
            log_decay: None,
            chunk: CHUNK,
        };
        Ok(Normalised {
            components: Components(self.map.spectrum.shares()?),
            ..Normalised::new(features, EPSILON, before)
        })
    }
}

impl Kernelized {
    /// Operations of making features.
    fn making(&self, q: &Tensor, k: &Tensor) -> u64 {
        let width = self.heads.head_width;
        let rows = |x: &Tensor| x.elem_count().checked_div(width).unwrap_or(0);
        let spectrum = &self.map.spectrum;
        let each = spectrum.operations(width, self.map.count) + 2 * self.map.width() as u64;
        (rows(q) + rows(k)) as u64 * each
    }

    /// Causal means whose features are never laid out; nothing where features are no plain exponentials.
    fn in_chunks(
        &self,
        q: &Tensor,
        k: &Tensor,
        seed: u64,
        pass: &MechanismPass<'_>,
    ) -> Result<Option<InChunks>> {
        let plain = self.map.read_out == ReadOut::Positive { stabilise: false };
        if !self.heads.causal || !plain {
            return Ok(None);
        }
        let (map, scale) = (&self.map, self.heads.scale);
        let Some(frequencies) = map.spectrum.frequencies(q, map.count, seed)? else {
            return Ok(None);
        };
        let keep = match pass.keep {
            None => None,
            Some(keep) => Some(tensor(tensor(keep.flatten_all())?.to_vec1::<u8>())?),
        };
        Ok(Some(InChunks {
            q: map.spectrum.for_components(q)?,
            k: map.spectrum.for_components(k)?,
            // The root of the scale multiplies queries and keys.
            frequencies: tensor(frequencies * scale.sqrt())?,
            options: ExponentialMeans {
                decay: scale,
                epsilon: EPSILON,
                chunk: CHUNK,
                keep,
            },
            components: Components(map.spectrum.shares()?),
            before: self.making(q, k),
        }))
    }
}

/// Causal means weighted by inner products of exponentials.
#[derive(Debug)]
struct InChunks {
    /// `[batch, heads · components, length, head_width]`.
    q: Tensor,
    k: Tensor,
    /// `[heads · components or 1, count, head_width]`.
    frequencies: Tensor,
    options: ExponentialMeans,
    components: Components,
    /// Operations of making features.
    before: u64,
}

impl InChunks {
    /// `[batch, heads · components, queries, keys]`.
    fn component_sizes(&self) -> [usize; 4] {
        match *self.q.dims() {
            [batch, heads, length, _] => [batch, heads, length, length],
            _ => [0; 4],
        }
    }
}

impl Mixing for InChunks {
    fn sizes(&self) -> [usize; 4] {
        self.components.averaged_sizes(self.component_sizes())
    }

    fn mix(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        let values = self.components.spread(values)?;
        let given = [&self.q, &self.k, &values];
        let y = causal_exponential_means(given, &self.frequencies, &self.options)?;
        self.components.averaged(y)
    }

    fn operations(&self, width: usize) -> u64 {
        let sizes = self.component_sizes();
        let [batch, heads, length, _] = sizes;
        let features = self.frequencies.dims().iter().rev().nth(1);
        let widths = [features.copied().unwrap_or(0), width + 1];
        let sums = decayed::operations(false, length, widths, CHUNK);
        let after = self.components.operations(sizes, width);
        self.before + (batch * heads) as u64 * sums + after
    }
}

impl Mechanism for Kernelized {
    fn mixing(&self, q: &Tensor, k: &Tensor, pass: &MechanismPass<'_>) -> Result<Box<dyn Mixing>> {
        let seed = self.redraw.seed(self.seed, pass);
        if let Some(means) = self.in_chunks(q, k, seed, pass)? {
            return Ok(Box::new(means));
        }
        Ok(Box::new(self.sums(q, k, seed, pass)?))
    }

    fn memory(&self) -> Memory {
        match self.heads.causal {
            true => Memory::Own,
            false => Memory::KeysAndValues,
        }
    }

    fn resume(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        state: &mut MixerState,
        pass: &MechanismPass<'_>,
    ) -> Result<Resumed> {
        let frozen = seed_of_site(self.seed, pass.path);
        resume(self.sums(q, k, frozen, pass)?, v, state, None, pass)
    }
}
