//! Fastmax (Gerami, Hoover, Dulepet, Duraiswami, FAST: Factorizable Attention for Speeding up
//! Transformers, 2024, arXiv 2402.07901): the exponential of softmax replaced by its Taylor
//! polynomial, which factorises exactly.
//!
//! ```text
//! y_i = Σ_j f(s_ij) v_j / Σ_j f(s_ij),   s_ij = q̂_i · k̂_j / t,   f(s) = a₀ + a₁ s (+ a₂ s²)
//! ```
//!
//! By default `f(s) = 1 + s` in degree one and `1 + s + s²/2 ≥ ½` in degree two. Queries and keys
//! are normalised so that `f` stays near the exponential: `token` takes from each its mean over the
//! features and divides by what is left of its length, so that `|s| ≤ 1 / t`; `max` divides by the
//! longest of the sequence and head, times a limit, which under a causal mask would tell of later
//! tokens; `none` leaves the score `scale · q · k`.
//!
//! Heads may learn their coefficients. Division takes a common factor away, and what is left of a
//! polynomial that is positive everywhere is
//!
//! ```text
//! f(s) / c = 1 + (w + u s)²,   c = a₀ − a₁² / 4 a₂,   u = √(a₂ / c),   w = a₁ / 2 √(a₂ c)
//! ```
//!
//! so that `w` and `u` stand for all of `a₀`, `a₁` and `a₂`, and every weight stays positive whatever they
//! become; Taylor's polynomial is `w = u = 1`. It is one pass over queries `(u q, w)` and keys `(k, 1)`. In
//! degree one `f(s) / a₀ = 1 + r tanh(θ) s`, with `r` the most that leaves it positive for normalised
//! queries and keys: `t` by token, `t / limit²` by the longest; it starts within 99 % of it.
//!
//! The sums over keys are those of [`PolynomialAttention`]: all pairs of positions, in time linear in
//! their number, exactly. A pad's values and its one are zeroed, so that it adds neither to the
//! numerator nor, by the constant term, to the denominator. Dropout acts on the monomials of highest
//! degree, as there are no weights to drop.
//!
//! Cost for each head, with `F = 1 + d + d (d + 1) / 2` monomials of `d` features (`1 + d` in degree
//! one): `2 F (value_width + 2)` for each query and each key, and under a causal mask the products
//! of each chunk of 64 positions with itself. A decode state has `F (value_width + 1)` numbers for
//! each head; with learned coefficients `d` is one more in degree two. Parameters: none, or two or one for
//! each head.

use super::sums::{Normalised, Remembered, Sums, kept, resume};
use super::{Abilities, Describe, Heads, Mechanism, MechanismPass, Memory, Resumed, Subsets};
use crate::dropout::seed_of_site;
use crate::error::tensor;
use crate::parameters::{Init, Parameters};
use crate::state::MixerState;
use crate::{Error, Result};
use lapidary_kernels::{FactorDropout, PolynomialAttention, Tensor, layer_norm};
use lapidary_signal::Mixing;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Features of a head from which on its pairs are too many.
const MAX_WIDTH: usize = 256;
/// The part of its bound that a learned coefficient of degree one starts with at most.
const WITHIN: f64 = 0.99;
/// Added to squared lengths, so that a vector without any has a direction.
const TINY: f64 = 1e-12;

/// Attention by a polynomial of the scores.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FastmaxSpec {
    /// 1 or 2.
    #[serde(default = "two")]
    pub degree: usize,
    /// What is done to queries and keys first.
    #[serde(default)]
    pub normalisation: Normalisation,
    /// What scores are divided by.
    #[serde(default = "one")]
    pub temperature: f64,
    /// `a₀`, `a₁` and, used in degree two alone, `a₂`.
    #[serde(default = "taylor")]
    pub coefficients: [f64; 3],
    /// Whether each head learns its own, from these on, up to a common factor.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub learned: bool,
    /// Probability with which a monomial of highest degree is dropped in training.
    #[serde(default)]
    pub dropout: f64,
}

fn two() -> usize {
    2
}

fn one() -> f64 {
    1.0
}

fn taylor() -> [f64; 3] {
    [1.0, 1.0, 0.5]
}

impl Default for FastmaxSpec {
    fn default() -> Self {
        Self {
            degree: two(),
            normalisation: Normalisation::default(),
            temperature: one(),
            coefficients: taylor(),
            learned: false,
            dropout: 0.0,
        }
    }
}

/// What is done to queries and keys before they meet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Normalisation {
    /// Each is centred and made as long as one.
    #[default]
    #[serde(deserialize_with = "crate::fields::none")]
    Token,
    /// Each is divided by the longest of its sequence and head.
    Max {
        /// The length of the longest.
        #[serde(default = "one")]
        limit: f64,
    },
    /// Nothing: scores are `scale · q · k`.
    #[serde(deserialize_with = "crate::fields::none")]
    None,
}

impl FastmaxSpec {
    fn attention(&self, causal: bool) -> PolynomialAttention {
        let [constant, linear, square] = self.coefficients;
        let coefficients = match (self.learned, self.degree) {
            (false, 1) => [constant, linear, 0.0],
            (false, _) => [constant, linear, square],
            // What is learned is in queries and keys.
            (true, 1) => [1.0, 1.0, 0.0],
            (true, _) => [1.0, 0.0, 1.0],
        };
        PolynomialAttention::new(coefficients, causal)
    }

    /// `c`, which is positive where the polynomial of second degree is.
    fn least(&self) -> f64 {
        let [constant, linear, square] = self.coefficients;
        constant - linear * linear / (4.0 * square)
    }

    /// `r`: the slope of degree one that leaves weights positive; nothing where scores are not bounded.
    fn steepest(&self) -> Option<f64> {
        match self.normalisation {
            Normalisation::Token => Some(self.temperature),
            Normalisation::Max { limit } => Some(self.temperature / (limit * limit)),
            Normalisation::None => None,
        }
    }

    fn validate_learned(&self, field: &str) -> Result<()> {
        let at = |name: &str| format!("{field}.{name}");
        let [constant, _, square] = self.coefficients;
        if self.degree == 1 {
            return match self.steepest() {
                Some(_) if constant > 0.0 => Ok(()),
                Some(_) => {
                    let expected = "three numbers, the first positive, where they are learned";
                    Err(Error::spec(at("coefficients"), self.coefficients, expected))
                }
                None => {
                    let expected = "2 where coefficients are learned and nothing bounds the scores";
                    Err(Error::spec(at("degree"), 1, expected))
                }
            };
        }
        if !(square > 0.0 && self.least() > 0.0) {
            let expected = "those of a polynomial that is positive everywhere, as only such are learned: \
                            a2 > 0 and a1² < 4 a0 a2";
            return Err(Error::spec(at("coefficients"), self.coefficients, expected));
        }
        if self.dropout > 0.0 {
            let expected = "0 where coefficients of degree two are learned: what would be dropped then has \
                            the lower degrees in it";
            return Err(Error::spec(at("dropout"), self.dropout, expected));
        }
        Ok(())
    }

    /// `[heads, 2]`: `w` and `u`; in degree one `[heads, 1]`: `θ`.
    fn learned(&self, heads: &Heads, mut parameters: Parameters<'_>) -> Result<Tensor> {
        let [constant, linear, square] = self.coefficients;
        let (count, start) = match self.degree {
            1 => {
                let part = linear / constant / self.steepest().unwrap_or(1.0);
                let start = part.clamp(-WITHIN, WITHIN).atanh();
                (1, Init::Constant(start))
            }
            _ => {
                let least = self.least();
                let start = Init::Spaced {
                    first: linear / (2.0 * (square * least).sqrt()),
                    last: (square / least).sqrt(),
                };
                (2, start)
            }
        };
        parameters.tensor("coefficients", &[heads.heads, count], start)
    }
}

impl Describe for FastmaxSpec {
    fn kind(&self) -> &'static str {
        "fastmax"
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

    fn is_scaled(&self) -> bool {
        self.normalisation == Normalisation::None
    }

    fn validate(&self, heads: &Heads, field: &str) -> Result<()> {
        let at = |name: &str| format!("{field}.{name}");
        if !(1..=2).contains(&self.degree) {
            return Err(Error::spec(at("degree"), self.degree, "1 or 2"));
        }
        if self.degree == 2 && heads.head_width > MAX_WIDTH {
            let expected = format!(
                "1, or heads of at most {MAX_WIDTH} features, where these have {}",
                heads.head_width
            );
            return Err(Error::spec(at("degree"), self.degree, expected));
        }
        let positive = |name: &str, number: f64| match number > 0.0 && number.is_finite() {
            true => Ok(()),
            false => Err(Error::spec(at(name), number, "a positive number")),
        };
        positive("temperature", self.temperature)?;
        match self.normalisation {
            Normalisation::Token if heads.head_width < 2 => {
                let expected = "max or none where a head has one feature, which is its mean";
                return Err(Error::spec(at("normalisation.kind"), "token", expected));
            }
            Normalisation::Max { .. } if heads.causal => {
                let expected = "token or none in causal attention: the longest may come later";
                return Err(Error::spec(at("normalisation.kind"), "max", expected));
            }
            Normalisation::Max { limit } => positive("normalisation.limit", limit)?,
            Normalisation::Token | Normalisation::None => {}
        }
        if !self.coefficients.iter().all(|a| a.is_finite()) {
            let expected = "three finite numbers";
            return Err(Error::spec(at("coefficients"), self.coefficients, expected));
        }
        if self
            .coefficients
            .iter()
            .take(self.degree + 1)
            .all(|a| *a == 0.0)
        {
            let expected =
                "three numbers, not all 0 up to the degree: weights would be nothing over nothing";
            return Err(Error::spec(at("coefficients"), self.coefficients, expected));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            let expected = "at least 0 and below 1";
            return Err(Error::spec(at("dropout"), self.dropout, expected));
        }
        match self.learned {
            true => self.validate_learned(field),
            false => Ok(()),
        }
    }

    fn build(&self, heads: &Heads, parameters: Parameters<'_>) -> Result<Box<dyn Mechanism>> {
        Ok(Box::new(Fastmax {
            spec: self.clone(),
            heads: *heads,
            learned: match self.learned {
                true => Some(self.learned(heads, parameters)?),
                false => None,
            },
        }))
    }
}

/// The module.
#[derive(Debug)]
struct Fastmax {
    spec: FastmaxSpec,
    heads: Heads,
    /// See [`FastmaxSpec::learned`].
    learned: Option<Tensor>,
}

impl Fastmax {
    /// Queries and keys whose products have learned coefficients in them: `(u q, w)` and `(k, 1)`, or
    /// `r tanh(θ) q` in degree one.
    fn with_learned(&self, q: Tensor, k: Tensor) -> Result<(Tensor, Tensor)> {
        let Some(learned) = &self.learned else {
            return Ok((q, k));
        };
        let of_heads = |at: usize| tensor(tensor(learned.narrow(1, at, 1))?.reshape((1, (), 1, 1)));
        if self.spec.degree == 1 {
            let steepest = self.spec.steepest().unwrap_or(1.0);
            let slope = tensor(tensor(of_heads(0)?.tanh())? * steepest)?;
            return Ok((tensor(q.broadcast_mul(&slope))?, k));
        }
        let column = |x: &Tensor, of: &Tensor| {
            let (batch, heads, length, _) = tensor(x.dims4())?;
            tensor(of.broadcast_as((batch, heads, length, 1)))
        };
        let one = tensor(Tensor::ones((1, 1, 1, 1), k.dtype(), k.device()))?;
        let constant = column(&q, &of_heads(0)?)?;
        let scaled = tensor(q.broadcast_mul(&of_heads(1)?))?;
        let ones = column(&k, &one)?;
        Ok((
            tensor(Tensor::cat(&[&scaled, &constant], 3))?,
            tensor(Tensor::cat(&[&k, &ones], 3))?,
        ))
    }

    /// `x` `[batch, heads, length, head_width]`, normalised and multiplied by `factor`; `kept` is 1 at real
    /// tokens.
    fn normalise(&self, x: &Tensor, kept: Option<&Tensor>, factor: f64) -> Result<Tensor> {
        match self.spec.normalisation {
            Normalisation::None => multiplied(x.clone(), factor),
            // What a layer norm makes `√width` long.
            Normalisation::Token => {
                let width = tensor(x.dim(3))?;
                let length = vec![factor / (width as f64).sqrt(); width];
                let length = tensor(Tensor::from_vec(length, width, x.device()))?;
                let length = tensor(length.to_dtype(x.dtype()))?;
                Ok(layer_norm(x, Some(&length), None, TINY / width as f64)?)
            }
            Normalisation::Max { limit } => {
                let squares = tensor(tensor(x.sqr())?.sum_keepdim(3))?;
                let mut lengths = tensor(tensor(squares + TINY)?.sqrt())?;
                if let Some(kept) = kept {
                    lengths = tensor(lengths.broadcast_mul(kept))?;
                }
                let longest = tensor(tensor(lengths.max_keepdim(2))?.maximum(TINY))?;
                let x = tensor(tensor(x * limit)?.broadcast_div(&longest))?;
                multiplied(x, factor)
            }
        }
    }

    fn sums(
        &self,
        q: &Tensor,
        k: &Tensor,
        pass: &MechanismPass<'_>,
    ) -> Result<Normalised<Polynomial>> {
        let kept = kept(pass, tensor(k.dim(2))?, k.dtype())?;
        let own = match self.spec.normalisation {
            Normalisation::Max { .. } => real_queries([q, k], kept.as_ref(), pass)?,
            Normalisation::Token | Normalisation::None => None,
        };
        let scale = match self.spec.normalisation {
            Normalisation::None => self.heads.scale,
            Normalisation::Token | Normalisation::Max { .. } => 1.0,
        };
        let q = self.normalise(q, own.as_ref(), scale / self.spec.temperature)?;
        let k = self.normalise(k, kept.as_ref(), 1.0)?;
        let before = match self.spec.normalisation {
            Normalisation::None => q.elem_count(),
            Normalisation::Token => 6 * (q.elem_count() + k.elem_count()),
            Normalisation::Max { .. } => 4 * (q.elem_count() + k.elem_count()),
        };
        let learned = match self.learned {
            None => 0,
            Some(_) => q.elem_count(),
        };
        let (q, k) = self.with_learned(q, k)?;
        let dropout = pass
            .context
            .dropout_seed
            .filter(|_| self.spec.dropout > 0.0);
        let polynomial = Polynomial {
            attention: PolynomialAttention {
                dropout: dropout.map(|seed| FactorDropout {
                    probability: self.spec.dropout,
                    seed: seed_of_site(seed, pass.path),
                }),
                ..self.spec.attention(self.heads.causal)
            },
            q,
            k,
            kept,
        };
        Ok(Normalised::new(polynomial, 0.0, (before + learned) as u64))
    }
}

/// Which queries are real, `[batch, 1, query, 1]`: by the mask of the tokens of the pass, which is not that of the
/// keys where these are a memory's, or by that of keys of the same tokens.
fn real_queries(
    [q, k]: [&Tensor; 2],
    kept: Option<&Tensor>,
    pass: &MechanismPass<'_>,
) -> Result<Option<Tensor>> {
    let (batch, _, queries, _) = tensor(q.dims4())?;
    let own = pass.context.key_padding;
    if let Some(own) = own.filter(|own| own.dims() == [batch, queries]) {
        let own = tensor(own.reshape((batch, 1, queries, 1)))?;
        return Ok(Some(tensor(own.to_dtype(q.dtype()))?));
    }
    let of_memory = pass.context.memory.and_then(|(_, padding)| padding);
    let is_memory = of_memory
        .zip(pass.keep)
        .is_some_and(|(memory, keep)| memory.id() == keep.id());
    Ok(kept.filter(|_| !is_memory && q.dims() == k.dims()).cloned())
}

fn multiplied(x: Tensor, factor: f64) -> Result<Tensor> {
    match factor == 1.0 {
        true => Ok(x),
        false => tensor(x * factor),
    }
}

impl Mechanism for Fastmax {
    fn mixing(&self, q: &Tensor, k: &Tensor, pass: &MechanismPass<'_>) -> Result<Box<dyn Mixing>> {
        Ok(Box::new(self.sums(q, k, pass)?))
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
        resume(self.sums(q, k, pass)?, v, state, None, pass)
    }
}

/// `Σ_j f(q_i · k_j) v_j`.
#[derive(Debug)]
struct Polynomial {
    attention: PolynomialAttention,
    q: Tensor,
    k: Tensor,
    /// `[batch, 1, key, 1]`.
    kept: Option<Tensor>,
}

impl Polynomial {
    /// Values and their ones, zero at pads: `f` of a pad's score is not.
    fn real(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        match &self.kept {
            None => Ok(values.clone()),
            Some(kept) => Ok(values.broadcast_mul(kept)?),
        }
    }
}

impl Sums for Polynomial {
    fn sizes(&self) -> [usize; 4] {
        match (self.q.dims(), self.k.dims()) {
            ([batch, heads, queries, _], [_, _, keys, _]) => [*batch, *heads, *queries, *keys],
            _ => [0; 4],
        }
    }

    fn sums(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        self.attention.sums(&self.q, &self.k, &self.real(values)?)
    }

    fn operations(&self, width: usize) -> u64 {
        let [batch, heads, queries, keys] = self.sizes();
        let features = self.q.dims().last().copied().unwrap_or(0);
        let each = self.attention.operations(queries, keys, features, width);
        (batch * heads) as u64 * each
    }
}

impl Remembered for Polynomial {
    fn read(&self, state: &Tensor) -> lapidary_kernels::Result<Tensor> {
        self.attention.read(&self.q, state)
    }

    fn remember(
        &self,
        values: &Tensor,
        earlier: Option<&Tensor>,
    ) -> lapidary_kernels::Result<Tensor> {
        let here = self.attention.state(&self.k, &self.real(values)?)?;
        Ok(match earlier {
            None => here,
            Some(earlier) => (here + earlier)?,
        })
    }
}
