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
//! The sums over keys are those of [`PolynomialAttention`]: all pairs of positions, in time linear in
//! their number, exactly. A pad's values and its one are zeroed, so that it adds neither to the
//! numerator nor, by the constant term, to the denominator. Dropout acts on the monomials of highest
//! degree, as there are no weights to drop.
//!
//! Cost for each head, with `F = 1 + d + d (d + 1) / 2` monomials of `d` features (`1 + d` in degree
//! one): `2 F (value_width + 2)` for each query and each key, and under a causal mask the products
//! of each chunk of 64 positions with itself. A decode state has `F (value_width + 1)` numbers for
//! each head. No parameters.

use super::sums::{Normalised, Remembered, Sums, kept, resume};
use super::{Abilities, Describe, Heads, Mechanism, MechanismPass, Memory, Resumed, Subsets};
use crate::dropout::seed_of_site;
use crate::error::tensor;
use crate::parameters::Parameters;
use crate::state::MixerState;
use crate::{Error, Result};
use lapidary_kernels::{FactorDropout, PolynomialAttention, Tensor};
use lapidary_signal::Mixing;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Features of a head from which on its pairs are too many.
const MAX_WIDTH: usize = 256;
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
    Token,
    /// Each is divided by the longest of its sequence and head.
    Max {
        /// The length of the longest.
        #[serde(default = "one")]
        limit: f64,
    },
    /// Nothing: scores are `scale · q · k`.
    None,
}

impl FastmaxSpec {
    fn attention(&self, causal: bool) -> PolynomialAttention {
        let mut coefficients = self.coefficients;
        if self.degree < 2 {
            coefficients[2] = 0.0;
        }
        PolynomialAttention::new(coefficients, causal)
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
        if !(0.0..1.0).contains(&self.dropout) {
            let expected = "at least 0 and below 1";
            return Err(Error::spec(at("dropout"), self.dropout, expected));
        }
        Ok(())
    }

    fn build(&self, heads: &Heads, _: Parameters<'_>) -> Result<Box<dyn Mechanism>> {
        Ok(Box::new(Fastmax {
            spec: self.clone(),
            heads: *heads,
        }))
    }
}

/// The module.
#[derive(Debug)]
struct Fastmax {
    spec: FastmaxSpec,
    heads: Heads,
}

impl Fastmax {
    /// `x` `[batch, heads, length, head_width]`, normalised; `kept` is 1 at real tokens.
    fn normalise(&self, x: &Tensor, kept: Option<&Tensor>) -> Result<Tensor> {
        let length = |x: &Tensor| {
            let squares = tensor(tensor(x.sqr())?.sum_keepdim(3))?;
            tensor(tensor(squares + TINY)?.sqrt())
        };
        match self.spec.normalisation {
            Normalisation::None => Ok(x.clone()),
            Normalisation::Token => {
                let centred = tensor(x.broadcast_sub(&tensor(x.mean_keepdim(3))?))?;
                tensor(centred.broadcast_div(&length(&centred)?))
            }
            Normalisation::Max { limit } => {
                let mut lengths = length(x)?;
                if let Some(kept) = kept {
                    lengths = tensor(lengths.broadcast_mul(kept))?;
                }
                let longest = tensor(tensor(lengths.max_keepdim(2))?.maximum(TINY))?;
                tensor(tensor(x * limit)?.broadcast_div(&longest))
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
        // Queries lie where keys lie, unless they are of another sequence.
        let here = kept.as_ref().filter(|_| q.dims() == k.dims());
        let scale = match self.spec.normalisation {
            Normalisation::None => self.heads.scale,
            Normalisation::Token | Normalisation::Max { .. } => 1.0,
        };
        let q = tensor(self.normalise(q, here)? * (scale / self.spec.temperature))?;
        let k = self.normalise(k, kept.as_ref())?;
        let dropout = pass
            .context
            .dropout_seed
            .filter(|_| self.spec.dropout > 0.0);
        let before = match self.spec.normalisation {
            Normalisation::None => q.elem_count(),
            Normalisation::Token => 6 * (q.elem_count() + k.elem_count()),
            Normalisation::Max { .. } => 4 * (q.elem_count() + k.elem_count()),
        };
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
        Ok(Normalised::new(polynomial, 0.0, before as u64))
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
