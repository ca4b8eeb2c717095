//! How queries and keys become a mixing of values: softmax, or one of the published ways that do
//! without the `[query, key]` matrix.
//!
//! A mechanism stands between the projections of [`MultiHeadAttention`](super::MultiHeadAttention),
//! so that whatever is said of heads, grouped keys, rotary positions and norms of queries and keys
//! holds for every one of them. It is written as
//!
//! * a spec, plain data that serialises, with what [`Describe`] asks of it;
//! * a module that makes a [`Mixing`] of queries and keys: a map of the values that is linear in
//!   them. Every lens, and whoever wants to see the weights, is served by that map.
//!
//! A new one is a file here, a variant of [`MechanismSpec`] and a line in [`MechanismSpec::spec`];
//! [`linformer`] is a short one.

mod blocks;
pub mod combiner;
mod decayed;
pub mod doubly_stochastic;
pub mod ecoformer;
pub mod fastmax;
pub mod kernelized;
pub mod linformer;
pub mod lion;
mod met;
pub mod mra;
pub mod reformer;
mod sequences;
pub mod soft;
mod spans;
pub mod sparse;
pub mod subsampled;
mod sums;
pub mod topological;

use std::fmt;

use crate::error::tensor;
use crate::parameters::Parameters;
use crate::state::MixerState;
use crate::{Context, Draws, Error, Result};
use combiner::CombinerSpec;
use doubly_stochastic::DoublyStochasticSpec;
use ecoformer::EcoformerSpec;
use fastmax::FastmaxSpec;
use kernelized::KernelizedSpec;
use lapidary_kernels::{DType, ScoreBias, Tensor};
use lapidary_signal::Mixing;
use linformer::LinformerSpec;
use lion::LionSpec;
use mra::MraSpec;
use reformer::ReformerSpec;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use soft::SoftSpec;
use sparse::SparseSpec;
use subsampled::SubsampledSpec;
use topological::TopologicalSpec;

use super::QueryKeySharing;
pub use mra::RefinedMemory;
pub use spans::SpanMemory;

/// Which mechanism, and how it is set up.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum MechanismSpec {
    /// Softmax over all keys that the masks leave (Vaswani et al., arXiv 1706.03762).
    #[default]
    #[serde(deserialize_with = "crate::fields::none")]
    Softmax,
    /// Keys and values projected along the sequence (Wang et al., arXiv 2006.04768).
    Linformer(LinformerSpec),
    /// Linear attention in both directions, with a decay (Afzal et al., arXiv 2502.16249).
    Lion(LionSpec),
    /// A polynomial of the scores, factorised (Gerami et al., arXiv 2402.07901).
    Fastmax(FastmaxSpec),
    /// Random features of a learned kernel (Chowdhury et al., arXiv 2110.08323).
    Kernelized(KernelizedSpec),
    /// A pattern of about `√n` earlier tokens (Child et al., arXiv 1904.10509).
    Sparse(SparseSpec),
    /// Tokens that hash alike (Kitaev et al., arXiv 2001.04451).
    Reformer(ReformerSpec),
    /// Some tokens directly, all others in summaries of spans (Ren et al., arXiv 2107.05768).
    Combiner(CombinerSpec),
    /// Rows and columns of weights sum to one (Born et al., arXiv 2504.16275).
    DoublyStochastic(DoublyStochasticSpec),
    /// Another mechanism over a random subset of the keys (Hussain et al., arXiv 2306.01705).
    Subsampled(SubsampledSpec),
    /// Linear attention under a function of the distance in a tree (Choromanski et al., arXiv 2406.15881).
    Topological(TopologicalSpec),
    /// A Gaussian kernel, factored through landmarks (Lu et al., arXiv 2110.11945).
    Soft(SoftSpec),
    /// What codes of ±1 have in common (Liu et al., arXiv 2209.09004).
    Ecoformer(EcoformerSpec),
    /// Blocks of several sizes, the important ones small (Zeng et al., arXiv 2207.10284).
    Mra(MraSpec),
}

impl MechanismSpec {
    /// What the spec says of itself; nothing for softmax, which is attention's own.
    pub fn spec(&self) -> Option<&dyn Describe> {
        match self {
            Self::Softmax => None,
            Self::Linformer(spec) => Some(spec),
            Self::Lion(spec) => Some(spec),
            Self::Fastmax(spec) => Some(spec),
            Self::Kernelized(spec) => Some(spec),
            Self::Sparse(spec) => Some(spec),
            Self::Reformer(spec) => Some(spec),
            Self::Combiner(spec) => Some(spec),
            Self::DoublyStochastic(spec) => Some(spec),
            Self::Subsampled(spec) => Some(spec),
            Self::Topological(spec) => Some(spec),
            Self::Soft(spec) => Some(spec),
            Self::Ecoformer(spec) => Some(spec),
            Self::Mra(spec) => Some(spec),
        }
    }

    /// Whether this is softmax.
    pub fn is_softmax(&self) -> bool {
        matches!(self, Self::Softmax)
    }

    /// The kind's name in a spec.
    pub fn kind(&self) -> &'static str {
        self.spec().map_or("softmax", Describe::kind)
    }
}

/// The attention that a mechanism works in.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Heads {
    /// Features of a token.
    pub width: usize,
    /// Number of query heads.
    pub heads: usize,
    /// Features of a query and a key of a head.
    pub head_width: usize,
    /// Features of a value of a head.
    pub value_width: usize,
    /// Whether a token sees only itself and earlier ones.
    pub causal: bool,
    /// What scores are multiplied by, where a mechanism has scores.
    pub scale: f64,
    /// Which projections are one and the same.
    pub sharing: QueryKeySharing,
}

/// What a mechanism can be asked for, beyond seeing all tokens of a sequence with pads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Abilities {
    /// Whether it can keep a token from seeing later ones.
    pub causal: bool,
    /// Whether it can leave out that restriction.
    pub bidirectional: bool,
    /// Whether keys may be those of another sequence.
    pub cross: bool,
    /// Whether a window and a bias added to the scores mean something to it.
    pub scores: bool,
}

/// What a mechanism does where only some of the keys are there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subsets {
    /// It would mean something else: queries that are left out too, chunks that move.
    Refused,
    /// It can take the others for padding; where keys stand matters to it.
    AsPadding,
    /// It can do without the others: in bidirectional attention its keys are a set.
    AnyKeys,
}

/// What the spec of a mechanism says of itself.
pub trait Describe {
    /// The kind's name in a spec.
    fn kind(&self) -> &'static str;

    /// What it can be asked for.
    fn abilities(&self) -> Abilities;

    /// What it does where only some of the keys are there.
    fn subsets(&self) -> Subsets {
        Subsets::Refused
    }

    /// Whether it makes fewer rows of tokens before keys and values are made of these: see [`Mechanism::shortening`]. Then
    /// nothing may happen to keys between their layer and their product with queries.
    fn reads_tokens(&self) -> bool {
        false
    }

    /// Whether what scores are multiplied by changes anything.
    fn is_scaled(&self) -> bool {
        true
    }

    /// The most tokens of a sequence that it is made for, where there is such a number, and the field that says so.
    fn longest(&self) -> Option<(String, usize)> {
        None
    }

    /// What it draws anew in training.
    fn draws(&self) -> Draws {
        Draws::default()
    }

    /// Refuses what cannot be built for such heads; `field` is the path of the spec. Abilities are
    /// checked before.
    ///
    /// # Errors
    /// Names the field, what it is and what it could be.
    fn validate(&self, heads: &Heads, field: &str) -> Result<()>;

    /// Builds the module.
    ///
    /// # Errors
    /// When a parameter cannot be had.
    fn build(&self, heads: &Heads, parameters: Parameters<'_>) -> Result<Box<dyn Mechanism>>;
}

/// Refuses attention that asks a mechanism for what it cannot do.
pub(super) fn validate(
    mechanism: &MechanismSpec,
    heads: &Heads,
    (cross, scores): (bool, Option<&str>),
    field: &str,
) -> Result<()> {
    let Some(spec) = mechanism.spec() else {
        return Ok(());
    };
    let abilities = spec.abilities();
    let kind = spec.kind();
    let refuse = |found: String, expected: String| Err(Error::spec(field, found, expected));
    if heads.causal && !abilities.causal {
        return refuse(
            format!("{kind} in causal attention"),
            format!("a causal mechanism: every weight of {kind} depends on later tokens too"),
        );
    }
    if !heads.causal && !abilities.bidirectional {
        return refuse(
            format!("{kind} in bidirectional attention"),
            format!("another mechanism, or causal = true: this {kind} looks back only"),
        );
    }
    if cross && !abilities.cross {
        return refuse(
            format!("{kind} in cross-attention"),
            "one that can read another sequence, such as softmax or linformer".to_owned(),
        );
    }
    if let Some(what) = scores.filter(|_| !abilities.scores) {
        return refuse(
            format!("{kind} with {what}"),
            format!("softmax, or attention without {what}, which this {kind} does not take"),
        );
    }
    spec.validate(heads, field)
}

/// What a mechanism is told about the pass it runs in.
#[derive(Clone, Copy, Debug)]
pub struct MechanismPass<'a> {
    /// Path of the attention.
    pub path: &'a str,
    /// The tokens that queries were projected from, `[batch, query, width]`.
    pub tokens: &'a Tensor,
    /// `[batch, key]` in `u8`, 1 = a real token.
    pub keep: Option<&'a Tensor>,
    /// Position of the first query, where keys start at 0.
    pub offset: usize,
    /// The pass.
    pub context: &'a Context<'a>,
}

impl MechanismPass<'_> {
    /// The mask of keys as numbers of `dtype`, `[batch, 1, key, 1]`.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn kept(&self, dtype: DType) -> Result<Option<Tensor>> {
        let Some(keep) = self.keep else {
            return Ok(None);
        };
        let (batch, keys) = tensor(keep.dims2())?;
        let kept = tensor(keep.reshape((batch, 1, keys, 1)))?;
        Ok(Some(tensor(kept.to_dtype(dtype))?))
    }
}

/// What attention does to scores, for mechanisms that have any.
#[derive(Clone, Debug, Default)]
pub struct Scores {
    /// A token sees keys less than this many positions away.
    pub window: Option<usize>,
    /// Added to the scores; differentiated.
    pub bias: Option<ScoreBias>,
}

/// What a mechanism remembers of earlier tokens while decoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// Every key and value.
    KeysAndValues,
    /// What it needs of them, and no more: see [`Mechanism::resume`].
    Own,
}

/// A step of decoding.
#[derive(Debug)]
pub enum Resumed {
    /// What earlier tokens left was summed.
    Summed {
        /// Mixes the values of the step.
        mixing: Box<dyn Mixing>,
        /// What the queries get from earlier tokens beside that, `[batch, heads, query, width]`.
        past: Tensor,
    },
    /// Values of earlier tokens, or of summaries of them, were kept.
    Kept {
        /// Mixes some of them and those of the step.
        mixing: Box<dyn Mixing>,
        /// What it mixes, the values of the step last: `[batch, heads, key, width]`.
        values: Tensor,
    },
}

/// What makes rows of tokens, `[batch, 1, row, token]`, that keys and values are made of in the place of the tokens.
#[derive(Debug)]
pub struct Shortening {
    /// Rows that keys are made of.
    pub keys: Box<dyn Mixing>,
    /// Rows that values are made of; those of keys when absent.
    pub values: Option<Box<dyn Mixing>>,
    /// Sites below the attention's path that are written without it alone.
    pub sites: &'static [&'static str],
}

/// A mechanism with its parameters.
pub trait Mechanism: fmt::Debug + Send + Sync {
    /// The mixing of values that lie where the keys `k` `[batch, heads, key, head_width]` lie, for
    /// queries `q` `[batch, heads, query, head_width]`.
    ///
    /// # Errors
    /// For lengths that it is not defined for.
    fn mixing(&self, q: &Tensor, k: &Tensor, pass: &MechanismPass<'_>) -> Result<Box<dyn Mixing>>;

    /// As [`Mechanism::mixing`], where of the keys that the pass keeps those alone count that `drawn` `[batch, key]` in `u8`
    /// has; the others are tokens of their sequences all the same. For those that [`Subsets::AsPadding`] is said of.
    ///
    /// # Errors
    /// As there.
    fn mixing_of_drawn(
        &self,
        q: &Tensor,
        k: &Tensor,
        drawn: &Tensor,
        pass: &MechanismPass<'_>,
    ) -> Result<Box<dyn Mixing>> {
        let keep = Some(drawn);
        self.mixing(q, k, &MechanismPass { keep, ..*pass })
    }

    /// As [`Mechanism::mixing`], under a window and with a bias: for those whose [`Abilities::scores`]
    /// say so.
    ///
    /// # Errors
    /// As there.
    fn mixing_by_scores(
        &self,
        q: &Tensor,
        k: &Tensor,
        _: Scores,
        pass: &MechanismPass<'_>,
    ) -> Result<Box<dyn Mixing>> {
        self.mixing(q, k, pass)
    }

    /// Whether weights depend on values too: attention then asks for [`Mechanism::mixing_by_values`].
    fn reads_values(&self) -> bool {
        false
    }

    /// As [`Mechanism::mixing`], with values `v` `[batch, heads, key, value_width]` that the mixing may be made of. It is
    /// linear in what it mixes all the same: where lenses hold queries and keys, they hold these.
    ///
    /// # Errors
    /// As there.
    fn mixing_by_values(
        &self,
        q: &Tensor,
        k: &Tensor,
        _v: &Tensor,
        pass: &MechanismPass<'_>,
    ) -> Result<Box<dyn Mixing>> {
        self.mixing(q, k, pass)
    }

    /// What makes fewer rows of so many tokens, `[batch, token]`, where keys and values of these rows give through
    /// [`Mechanism::mixing_of_rows`] what those of all tokens give through [`Mechanism::mixing`]; nothing otherwise.
    ///
    /// # Errors
    /// For lengths that it is not defined for.
    fn shortening(&self, _tokens: [usize; 2], _: &MechanismPass<'_>) -> Result<Option<Shortening>> {
        Ok(None)
    }

    /// The mixing of values of the rows of [`Mechanism::shortening`], `k` `[batch, heads, row, head_width]` being their keys.
    ///
    /// # Errors
    /// When it makes none.
    fn mixing_of_rows(
        &self,
        _q: &Tensor,
        _k: &Tensor,
        pass: &MechanismPass<'_>,
    ) -> Result<Box<dyn Mixing>> {
        let field = format!("rows of tokens at {}", pass.path);
        Err(Error::spec(
            field,
            "given",
            "absent: keys are of all tokens",
        ))
    }

    /// Whether what this pass asks for is softmax over all keys, which attention does itself.
    fn is_softmax(&self, _: &Context<'_>) -> bool {
        false
    }

    /// What it remembers while decoding.
    fn memory(&self) -> Memory {
        Memory::KeysAndValues
    }

    /// As [`Mechanism::mixing`], where keys and values `v` `[batch, heads, key, value_width]` follow
    /// those that `state` holds, which then holds these too. For mechanisms with a memory of their
    /// own.
    ///
    /// # Errors
    /// When there is no such memory, or the state is another's.
    fn resume(
        &self,
        _q: &Tensor,
        _k: &Tensor,
        _v: &Tensor,
        _state: &mut MixerState,
        pass: &MechanismPass<'_>,
    ) -> Result<Resumed> {
        Err(Error::spec(
            format!("decode state at {}", pass.path),
            "one of its own",
            "keys and values",
        ))
    }
}

/// A seed of its own for each site of a pass that draws anew, or for each module otherwise.
pub(crate) fn draw_seed(pass: &MechanismPass<'_>, own: u64) -> u64 {
    crate::dropout::seed_of_site(pass.context.draw.unwrap_or(own), pass.path)
}
