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
//! Three forms compute the same. *Parallel* lays out `M`. *Chunked* sums over the past and over the
//! future, chunk by chunk, takes away what both have of a position itself, and divides once.
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
//! Cost for each head: parallel `2 n² (features + value_width)`, otherwise
//! `4 n (2 features · value_width + chunk (features + value_width))`, times the number of curves.
//! Parameters for each curve: none, one for each head, or `width + 1` for each head.

use super::sums::{Features, Normalised, Sums, earlier, kept, resume};
use super::{Abilities, Describe, Heads, Mechanism, MechanismPass, Memory, Resumed, Subsets};
use crate::error::{bounded, tensor};
use crate::parameters::{Init, Parameters};
use crate::state::MixerState;
use crate::{Error, Result};
use lapidary_kernels::{
    Activation, Direction, Tensor, activate, cumulative_sum, linear, linear_attention_in_chunks,
    matmul, operations_in_chunks,
};
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
    Parallel,
    /// A position at a time.
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

/// Curves over an image whose patches follow each other row by row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LionImage {
    /// Patches in a row.
    pub columns: usize,
    /// The curves, each with a decay of its own.
    #[serde(default = "both")]
    pub curves: Vec<Curve>,
}

fn both() -> Vec<Curve> {
    vec![Curve::Rows, Curve::Columns]
}

/// A way through all patches that steps from neighbour to neighbour.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Curve {
    /// Along the rows, every other one backwards.
    Rows,
    /// Along the columns, every other one upwards.
    Columns,
}

impl Curve {
    /// The patches of an image in the order of the curve, where patch `r · columns + c` stands in
    /// row `r`; the last row may be short.
    pub fn order(self, patches: usize, columns: usize) -> Vec<usize> {
        let columns = columns.max(1);
        let rows = patches.div_ceil(columns);
        let (lines, length) = match self {
            Self::Rows => (rows, columns),
            Self::Columns => (columns, rows),
        };
        let all = (0..lines).flat_map(|line| {
            (0..length).map(move |along| {
                let along = if line % 2 == 0 {
                    along
                } else {
                    length - 1 - along
                };
                match self {
                    Self::Rows => line * columns + along,
                    Self::Columns => along * columns + line,
                }
            })
        });
        all.filter(|patch| *patch < patches).collect()
    }
}

impl LionSpec {
    fn curves(&self) -> usize {
        self.image.as_ref().map_or(1, |image| image.curves.len())
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

    fn validate(&self, heads: &Heads, field: &str) -> Result<()> {
        if let LionForm::Chunked { size } = self.form {
            bounded(format!("{field}.form.size"), size, 1..=MAX_CHUNK)?;
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
            return Err(Error::spec(at(".curves"), &image.curves, expected));
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
                Decay::Constant(parameters.tensor("decay", &[curves, heads.heads], start)?)
            }
            LionDecay::Selective => {
                let mut parameters = parameters.at("decay");
                let rows = curves * heads.heads;
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
    /// `a` `[curves, heads]`.
    Constant(Tensor),
    /// `w` `[curves · heads, width]` and `b`.
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
        let x = tensor(activate(x, Activation::Silu)? + 0.5)?;
        let norm = tensor(tensor(tensor(x.sqr())?.sum_keepdim(3))?.sqrt())?;
        tensor(x.broadcast_div(&norm))
    }

    /// Features of queries and keys, those of pads zero.
    fn both(&self, q: &Tensor, k: &Tensor, pass: &MechanismPass<'_>) -> Result<[Tensor; 2]> {
        let (q, mut features) = (self.features(q)?, self.features(k)?);
        if let Some(kept) = kept(pass, tensor(k.dim(2))?, k.dtype())? {
            features = tensor(features.broadcast_mul(&kept))?;
        }
        Ok([q, features])
    }

    /// `log λ` of every position for each curve, `[batch, heads, length]`: zero at pads and the
    /// class token.
    fn log_decays(&self, length: usize, pass: &MechanismPass<'_>) -> Result<Vec<Tensor>> {
        let (batch, _, _) = tensor(pass.tokens.dims3())?;
        let (curves, heads) = (self.spec.curves(), self.heads.heads);
        // log σ(z) = −softplus(−z)
        let all = match &self.decay {
            Decay::None => return Ok(Vec::new()),
            Decay::Constant(logits) => {
                let rates = activate(&tensor(logits.neg())?, Activation::Softplus)?;
                let rates = tensor(rates.reshape((1, curves * heads, 1)))?;
                tensor(rates.broadcast_as((batch, curves * heads, length)))?
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
            .map(|curve| tensor(tensor(all.narrow(1, curve * heads, heads))?.contiguous()))
            .collect()
    }

    /// Operations of features and decays.
    fn before(&self, q: &Tensor, k: &Tensor) -> u64 {
        let entries = (q.elem_count() + k.elem_count()) as u64;
        let logits = (self.spec.curves() * self.heads.heads) as u64;
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
        if self.heads.causal {
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
        let curves = Curves {
            q,
            k,
            curves: log_decays.into_iter().zip(orders).collect(),
            form: self.spec.form,
            chunk: self.chunk(),
        };
        Ok(Box::new(Normalised::new(curves, EPSILON, before)))
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

/// An order of positions and the way back.
#[derive(Clone, Debug)]
struct Order {
    along: Tensor,
    back: Tensor,
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

/// Sums over both directions along each of some curves, averaged.
#[derive(Debug)]
struct Curves {
    /// `[batch, heads, length, features]`.
    q: Tensor,
    /// As `q`, zero at pads.
    k: Tensor,
    /// `log λ` `[batch, heads, length]` by token, and the order of the tokens; no curve where
    /// nothing decays.
    curves: Vec<(Tensor, Option<Order>)>,
    form: LionForm,
    chunk: usize,
}

fn along(x: &Tensor, order: Option<&Order>) -> lapidary_kernels::Result<Tensor> {
    match order {
        None => Ok(x.clone()),
        Some(order) => Ok(x.contiguous()?.index_select(&order.along, 2)?),
    }
}

fn back(x: &Tensor, order: Option<&Order>, dim: usize) -> lapidary_kernels::Result<Tensor> {
    match order {
        None => Ok(x.clone()),
        Some(order) => Ok(x.contiguous()?.index_select(&order.back, dim)?),
    }
}

impl Curves {
    /// `M` of one curve, `[batch, heads, query, key]` in the order of the tokens.
    fn mask(log_decay: &Tensor, order: Option<&Order>) -> lapidary_kernels::Result<Tensor> {
        let log_decay = along(log_decay, order)?;
        let length = log_decay.dim(2)?;
        // e_i = Σ_{t ≤ i} log λ_t and c_i = Σ_{t < i} log λ_t.
        let through = cumulative_sum(&log_decay, 2)?;
        let until = (&through - &log_decay)?;
        let differences = |of: &Tensor| of.unsqueeze(3)?.broadcast_sub(&of.unsqueeze(2)?);
        // exp(c_i − c_j) on and below the diagonal, exp(e_j − e_i) above; the other halves grow.
        let past = differences(&until)?.minimum(0.0)?.exp()?;
        let future = differences(&through)?.neg()?.minimum(0.0)?.exp()?;
        let below = Tensor::tril2(length, log_decay.dtype(), log_decay.device())?;
        let above = below.affine(-1.0, 1.0)?;
        let mask = (past.broadcast_mul(&below)? + future.broadcast_mul(&above)?)?;
        back(&back(&mask, order, 2)?, order, 3)
    }

    fn laid_out(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        let mut scores = matmul(&self.q, &self.k.transpose(2, 3)?)?;
        let mut masks = None;
        for (log_decay, order) in &self.curves {
            let mask = Self::mask(log_decay, order.as_ref())?;
            masks = Some(match masks {
                None => mask,
                Some(masks) => (masks + mask)?,
            });
        }
        if let Some(masks) = masks {
            scores = (scores * (masks / self.curves.len() as f64)?)?;
        }
        matmul(&scores, values)
    }

    /// The past and the future of one curve, what a position has of itself counted once.
    fn directions(
        &self,
        values: &Tensor,
        log_decay: &Tensor,
        order: Option<&Order>,
    ) -> lapidary_kernels::Result<Tensor> {
        let [q, k, v] = [&self.q, &self.k, values].map(|x| along(x, order));
        let (q, k, v, decay) = (q?, k?, v?, along(log_decay, order)?);
        let length = decay.dim(2)?;
        // a_i = log λ_{i−1} on the past, log λ_i on the future.
        let before = decay.narrow(2, 0, length - 1)?.pad_with_zeros(2, 1, 0)?;
        let sums = |decay: &Tensor, direction| {
            linear_attention_in_chunks(&q, &k, &v, Some(decay), direction, self.chunk)
        };
        let both = (sums(&before, Direction::Past)? + sums(&decay, Direction::Future)?)?;
        let own = (&q * &k)?.sum_keepdim(3)?.broadcast_mul(&v)?;
        back(&(both - own)?, order, 2)
    }
}

impl Sums for Curves {
    fn sizes(&self) -> [usize; 4] {
        match *self.q.dims() {
            [batch, heads, length, _] => [batch, heads, length, length],
            _ => [0; 4],
        }
    }

    fn sums(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        if self.form == LionForm::Parallel {
            return self.laid_out(values);
        }
        let mut total: Option<Tensor> = None;
        for (log_decay, order) in &self.curves {
            let sums = self.directions(values, log_decay, order.as_ref())?;
            total = Some(match total {
                None => sums,
                Some(total) => (total + sums)?,
            });
        }
        let total = total.map_or_else(|| values.zeros_like(), Ok)?;
        Ok((total / self.curves.len().max(1) as f64)?)
    }

    fn operations(&self, width: usize) -> u64 {
        let [batch, heads, length, _] = self.sizes();
        let features = self.q.dims().last().copied().unwrap_or(0);
        let curves = self.curves.len() as u64;
        let (n, each) = (length as u64, (features + width) as u64);
        let one = match self.form {
            // Both halves of a mask and their sum, with an exponential each.
            LionForm::Parallel => n * n * (2 * each + 8 * curves),
            LionForm::Recurrent | LionForm::Chunked { .. } => {
                let direction = operations_in_chunks(length, features, width, self.chunk);
                curves * (2 * direction + n * (2 * each + 2 * width as u64))
            }
        };
        (batch * heads) as u64 * one
    }
}
