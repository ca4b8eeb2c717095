//! LION (Afzal, Abad Rocamora, Candogan, Puigdemont, Tonin, Wu, Shoaran, Cevher, Linear Attention
//! for Efficient Bidirectional Sequence Modeling, 2025, arXiv 2502.16249): linear attention with a
//! decay that looks in both directions.
//!
//! ```text
//! y_i = Σ_j M_ij (φ(q_i) · φ(k_j)) v_j / (Σ_j M_ij φ(q_i) · φ(k_j) + ε)
//! M_ij = Π_{t=j}^{i−1} λ_t  for i > j,   Π_{t=i+1}^{j} λ_t  for i < j,   M_ii = 1
//! ```
//!
//! The decay is that of the key's position and of all positions on the way to the query, which is
//! left out. There is none (LION-LIT), one for each head, `λ = σ(a)` (LION-D), or one for each head
//! and token, `λ_i = 1 − σ(w · x_i + b)` (LION-S). `φ(z) = elu(z) + 1` without a decay, otherwise
//! `φ(z) = (silu(z) + ½) / ‖silu(z) + ½‖₂`, whose entries are positive.
//!
//! Three forms compute the same. *Parallel* lays out `M`. *Chunked* lets each chunk meet itself in both
//! directions at once, reads what lies before and behind it from a sum each, and divides once.
//! *Recurrent* is that with chunks of one position: a state of `features · (value_width + 1)` for
//! each head and direction. Decays are added as logarithms, none of them below −20, and never
//! divided.
//!
//! On an image, `|i − j|` along one order of the patches says little of their distance. There each
//! curve that visits every patch has a decay of its own, and `M` is the mean of theirs. A class
//! token comes first on every curve and does not decay, nor do pads.
//!
//! With a causal mask only the past is summed over, and decoding keeps the state.
//!
//! Any linear recurrence over the past looks in both directions in the same way, one with a diagonal `Λ` too
//! (`per_feature`): each feature of a key then has a decay of its own,
//!
//! ```text
//! S_i = Λ_i S_{i−1} + φ(k_i) v_iᵀ,   weight_ij = Σ_f φ(q_i)_f φ(k_j)_f Π_t λ_tf
//! ```
//!
//! and there is no one mask to lay out: `parallel` is refused. How such sums are taken is said at the kernel
//! [`lapidary_kernels::linear_attention_by_feature`].
//!
//! Cost for each head: parallel `2 n² (features + value_width)`, otherwise
//! `2 n (4 features · value_width + chunk (features + value_width))`, times the number of curves.
//! Parameters for each curve: none, one for each head, or `width + 1` for each head; `per_feature`, for
//! each feature of each head, where a chunk meets itself half by half and costs half as much.

mod directions;
mod image;

pub use image::{Curve, LionImage};

use super::sums::{Features, Normalised, earlier, kept, resume};
use super::{Abilities, Describe, Heads, Mechanism, MechanismPass, Memory, Resumed, Subsets};
use crate::error::{bounded, tensor};
use crate::parameters::{Init, Parameters};
use crate::state::MixerState;
use crate::{Error, Result};
use directions::{Curves, Order};
use lapidary_kernels::{Activation, Tensor, activate, linear, silu_directions};
use lapidary_signal::Mixing;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

const MAX_CHUNK: usize = 1 << 16;
const MAX_COLUMNS: usize = 1 << 16;
/// The least logarithm of a decay.
const LEAST: f64 = -20.0;
/// Added to the sum of weights.
const EPSILON: f64 = 1e-6;
/// The decays that heads start with, from the first to the last.
const FIRST_DECAYS: (f64, f64) = (0.9, 0.999);
/// A selective decay starts near `1 − σ(−4) = 0.982`.
const FIRST_BIAS: f64 = -4.0;

/// Linear attention in both directions.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LionSpec {
    /// How a weight fades with the distance.
    #[serde(default)]
    pub decay: LionDecay,
    /// Whether each feature of a head's keys has a decay of its own.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub per_feature: bool,
    /// How it is computed; parameters and results do not depend on it.
    #[serde(default)]
    pub form: LionForm,
    /// Whether the first token is a class token, which does not decay: `λ = 1`.
    #[serde(default)]
    pub class_token: bool,
    /// Curves over an image, instead of the order of the tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<LionImage>,
}

/// How a weight fades with the distance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum LionDecay {
    /// Not at all: LION-LIT.
    None,
    /// By a learned factor for each head: LION-D.
    Constant,
    /// By a factor that each token decides for each head: LION-S.
    #[default]
    Selective,
}

/// Which of the equal forms is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum LionForm {
    /// All weights are laid out.
    #[serde(deserialize_with = "crate::fields::none")]
    Parallel,
    /// A position at a time.
    #[serde(deserialize_with = "crate::fields::none")]
    Recurrent,
    /// This many positions at a time.
    Chunked {
        /// Positions that meet directly.
        size: usize,
    },
}

impl Default for LionForm {
    fn default() -> Self {
        Self::Chunked { size: 64 }
    }
}

impl LionSpec {
    fn curves(&self) -> usize {
        self.image.as_ref().map_or(1, |image| image.curves.len())
    }

    /// Decays of a token and head on one curve.
    fn decays(&self, heads: &Heads) -> usize {
        match self.per_feature {
            true => heads.head_width,
            false => 1,
        }
    }

    fn validate_per_feature(&self, field: &str) -> Result<()> {
        let at = |name: &str| format!("{field}.{name}");
        if self.decay == LionDecay::None {
            let expected = "false where nothing decays";
            return Err(Error::spec(at("per_feature"), true, expected));
        }
        if self.form == LionForm::Parallel {
            let expected =
                "recurrent or chunked where features decay apart: they have no mask in common";
            return Err(Error::spec(at("form.kind"), "parallel", expected));
        }
        Ok(())
    }

    /// Tokens that no curve passes through first.
    fn class_tokens(&self) -> usize {
        usize::from(self.class_token)
    }
}

impl Describe for LionSpec {
    fn kind(&self) -> &'static str {
        "lion"
    }

    fn abilities(&self) -> Abilities {
        Abilities {
            causal: true,
            bidirectional: true,
            // Positions of another sequence are at no distance.
            cross: self.decay == LionDecay::None,
            scores: false,
        }
    }

    fn subsets(&self) -> Subsets {
        match (self.decay, self.class_token, &self.image) {
            (.., Some(_)) => Subsets::Refused,
            (LionDecay::None, false, None) => Subsets::AnyKeys,
            _ => Subsets::AsPadding,
        }
    }

    fn is_scaled(&self) -> bool {
        false
    }

    fn validate(&self, heads: &Heads, field: &str) -> Result<()> {
        if let LionForm::Chunked { size } = self.form {
            bounded(format!("{field}.form.size"), size, 1..=MAX_CHUNK)?;
        }
        if self.per_feature {
            self.validate_per_feature(field)?;
        }
        if heads.causal && self.class_token {
            let expected = "false in causal attention, where the first token sees itself alone";
            return Err(Error::spec(format!("{field}.class_token"), true, expected));
        }
        let Some(image) = &self.image else {
            return Ok(());
        };
        let at = |name: &str| format!("{field}.image{name}");
        if heads.causal {
            let expected = "absent in causal attention, which has one order";
            return Err(Error::spec(at(""), "given", expected));
        }
        bounded(at(".columns"), image.columns, 1..=MAX_COLUMNS)?;
        let distinct = matches!(image.curves.as_slice(), [_]) || {
            matches!(image.curves.as_slice(), [a, b] if a != b)
        };
        if !distinct {
            let expected = "rows, columns or both, each once";
            let found = image.curves.iter().map(|curve| match curve {
                Curve::Rows => "rows",
                Curve::Columns => "columns",
            });
            let found: Vec<&str> = found.collect();
            return Err(Error::spec(at(".curves"), found, expected));
        }
        Ok(())
    }

    fn build(&self, heads: &Heads, mut parameters: Parameters<'_>) -> Result<Box<dyn Mechanism>> {
        let curves = self.curves();
        let decay = match self.decay {
            LionDecay::None => Decay::None,
            LionDecay::Constant => {
                let logit = |decay: f64| (decay / (1.0 - decay)).ln();
                let start = Init::Spaced {
                    first: logit(FIRST_DECAYS.0),
                    last: logit(FIRST_DECAYS.1),
                };
                let mut shape = vec![curves, heads.heads];
                if self.per_feature {
                    shape.push(heads.head_width);
                }
                Decay::Constant(parameters.tensor("decay", &shape, start)?)
            }
            LionDecay::Selective => {
                let mut parameters = parameters.at("decay");
                let rows = curves * heads.heads * self.decays(heads);
                let start = Init::Normal { deviation: 0.02 };
                Decay::Selective {
                    weight: parameters.tensor("weight", &[rows, heads.width], start)?,
                    bias: parameters.tensor("bias", &[rows], Init::Constant(FIRST_BIAS))?,
                }
            }
        };
        Ok(Box::new(Lion {
            spec: self.clone(),
            heads: *heads,
            decay,
        }))
    }
}

/// The module.
#[derive(Debug)]
struct Lion {
    spec: LionSpec,
    heads: Heads,
    decay: Decay,
}

#[derive(Debug)]
enum Decay {
    None,
    /// `a` `[curves, heads]` or `[curves, heads, features]`.
    Constant(Tensor),
    /// `w` `[curves · heads · (1 or features), width]` and `b`.
    Selective {
        weight: Tensor,
        bias: Tensor,
    },
}

impl Lion {
    /// `φ`.
    fn features(&self, x: &Tensor) -> Result<Tensor> {
        if self.spec.decay == LionDecay::None {
            // elu(z) + 1 = max(z, 0) + e^{min(z, 0)}
            let below = tensor(tensor(x.minimum(0.0))?.exp())?;
            return tensor(tensor(x.relu())? + below);
        }
        Ok(silu_directions(x)?)
    }

    /// Features of queries and keys, those of pads zero.
    fn both(&self, q: &Tensor, k: &Tensor, pass: &MechanismPass<'_>) -> Result<[Tensor; 2]> {
        let (q, mut features) = (self.features(q)?, self.features(k)?);
        if let Some(kept) = kept(pass, tensor(k.dim(2))?, k.dtype())? {
            features = tensor(features.broadcast_mul(&kept))?;
        }
        Ok([q, features])
    }

    /// `log λ` of every position for each curve, `[batch, heads, length, 1 or features]`: zero at
    /// pads and the class token.
    fn log_decays(&self, length: usize, pass: &MechanismPass<'_>) -> Result<Vec<Tensor>> {
        let (batch, _, _) = tensor(pass.tokens.dims3())?;
        let (curves, heads) = (self.spec.curves(), self.heads.heads);
        let each = self.spec.decays(&self.heads);
        let rows = curves * heads * each;
        // log σ(z) = −softplus(−z)
        let all = match &self.decay {
            Decay::None => return Ok(Vec::new()),
            Decay::Constant(logits) => {
                let rates = activate(&tensor(logits.neg())?, Activation::Softplus)?;
                let rates = tensor(rates.reshape((1, rows, 1)))?;
                tensor(rates.broadcast_as((batch, rows, length)))?
            }
            Decay::Selective { weight, bias } => {
                let logits = linear(pass.tokens, weight, Some(bias))?;
                tensor(activate(&logits, Activation::Softplus)?.transpose(1, 2))?
            }
        };
        let mut all = tensor(tensor(all.neg())?.maximum(LEAST))?;
        if let Some(kept) = kept(pass, length, all.dtype())? {
            let kept = tensor(kept.reshape((batch, 1, length)))?;
            all = tensor(all.broadcast_mul(&kept))?;
        }
        if self.spec.class_token {
            let rest = tensor(all.narrow(2, 1, length.saturating_sub(1)))?;
            all = tensor(rest.pad_with_zeros(2, 1, 0))?;
        }
        (0..curves)
            .map(|curve| {
                let own = tensor(all.narrow(1, curve * heads * each, heads * each))?;
                let own = tensor(tensor(own.contiguous())?.reshape((batch, heads, each, length)))?;
                tensor(tensor(own.transpose(2, 3))?.contiguous())
            })
            .collect()
    }

    /// Operations of features and decays.
    fn before(&self, q: &Tensor, k: &Tensor) -> u64 {
        let entries = (q.elem_count() + k.elem_count()) as u64;
        let logits = (self.spec.curves() * self.heads.heads * self.spec.decays(&self.heads)) as u64;
        let tokens = k.dims().first().zip(k.dims().get(2));
        let tokens = tokens.map_or(0, |(batch, length)| (batch * length) as u64);
        match self.spec.decay {
            LionDecay::None => 3 * entries,
            LionDecay::Constant => 5 * entries,
            LionDecay::Selective => {
                5 * entries + tokens * logits * (2 * self.heads.width as u64 + 2)
            }
        }
    }

    fn chunk(&self) -> usize {
        match self.spec.form {
            LionForm::Parallel => usize::MAX,
            LionForm::Recurrent => 1,
            LionForm::Chunked { size } => size,
        }
    }

    /// Sums over the past, where `decay` of the token before the first is given too.
    fn past(
        &self,
        q: &Tensor,
        k: &Tensor,
        before_first: Option<&Tensor>,
        pass: &MechanismPass<'_>,
    ) -> Result<(Normalised<Features>, Option<Tensor>)> {
        let length = tensor(k.dim(2))?;
        let before = self.before(q, k);
        let [q, k] = self.both(q, k, pass)?;
        let decays = self.log_decays(length, pass)?;
        let (mut log_decay, mut last) = (None, None);
        if let Some(decay) = decays.first() {
            let end = tensor(decay.narrow(2, length.saturating_sub(1), 1))?;
            log_decay = Some(shifted(decay, before_first)?);
            last = Some(end);
        }
        let features = Features {
            q,
            k,
            causal: true,
            log_decay,
            chunk: self.chunk(),
        };
        Ok((Normalised::new(features, EPSILON, before), last))
    }
}

/// The decay that stands between a position and the one before it, `a_i = log λ_{i−1}`.
fn shifted(log_decay: &Tensor, before_first: Option<&Tensor>) -> Result<Tensor> {
    let first = match before_first {
        Some(first) => first.clone(),
        None => tensor(tensor(log_decay.narrow(2, 0, 1))?.zeros_like())?,
    };
    let others = tensor(log_decay.dim(2))?.saturating_sub(1);
    let others = tensor(log_decay.narrow(2, 0, others))?;
    tensor(Tensor::cat(&[&first, &others], 2))
}

impl Mechanism for Lion {
    fn mixing(&self, q: &Tensor, k: &Tensor, pass: &MechanismPass<'_>) -> Result<Box<dyn Mixing>> {
        let causal = self.heads.causal;
        if causal && (self.spec.per_feature || self.spec.decay == LionDecay::None) {
            return Ok(Box::new(self.past(q, k, None, pass)?.0));
        }
        let length = tensor(k.dim(2))?;
        let before = self.before(q, k);
        let [q, k] = self.both(q, k, pass)?;
        let log_decays = self.log_decays(length, pass)?;
        if log_decays.is_empty() && self.spec.form != LionForm::Parallel {
            let features = Features {
                q,
                k,
                causal: false,
                log_decay: None,
                chunk: self.chunk(),
            };
            return Ok(Box::new(Normalised::new(features, EPSILON, before)));
        }
        let orders = self.orders(length, &q)?;
        Ok(Box::new(Curves {
            q,
            k,
            curves: log_decays.into_iter().zip(orders).collect(),
            causal,
            form: self.spec.form,
            chunk: self.chunk(),
            before,
        }))
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
        let before_first = earlier(state, pass.path)?.and_then(|(_, decay)| decay);
        let (step, last) = self.past(q, k, before_first.as_ref(), pass)?;
        resume(step, v, state, last, pass)
    }
}

impl Lion {
    /// The order of each curve; nothing where it is that of the tokens.
    fn orders(&self, length: usize, like: &Tensor) -> Result<Vec<Option<Order>>> {
        let Some(image) = &self.spec.image else {
            return Ok(vec![None]);
        };
        let leading = self.spec.class_tokens().min(length);
        let each = image.curves.iter().map(|curve| {
            let patches = curve.order(length - leading, image.columns);
            let along: Vec<u32> = (0..leading)
                .chain(patches.into_iter().map(|patch| patch + leading))
                .map(|position| position as u32)
                .collect();
            let mut placed: Vec<(u32, u32)> = along.iter().copied().zip(0..).collect();
            placed.sort_unstable();
            let back = placed.into_iter().map(|(_, place)| place).collect();
            let indices = |of: Vec<u32>| tensor(Tensor::from_vec(of, length, like.device()));
            Ok(Some(Order {
                along: indices(along)?,
                back: indices(back)?,
            }))
        });
        each.collect()
    }
}
