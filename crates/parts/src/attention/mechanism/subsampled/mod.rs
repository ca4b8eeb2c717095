//! Stochastically subsampled attention (Hussain, Zaki, Subramanian, The Information Pathways
//! Hypothesis: Transformers are Dynamic Self-Ensembles, KDD 2023, arXiv 2306.01705): in a pass that
//! draws, every layer sees a random subset of its keys.
//!
//! ```text
//! S ⊂ {1 … n},  |S| = k = ⌈keep · n⌉
//! y_i = Σ_{j ∈ S} softmax_j(scale · q_i · k_j + b_ij) v_j
//! ```
//!
//! Keys and values of `S` are gathered, the softmax is over them, nothing is rescaled. `S` is drawn anew
//! for every layer, pass and sequence, and for every head where asked; all queries of a sequence share
//! it. A pass that draws nothing is dense: it is the wrapped mechanism itself. So training samples,
//! which regularises and makes attention `1 / keep` times cheaper, a few steps without draws
//! consolidate, and evaluation with several seeds is an ensemble of the sub-networks. A pass may say that
//! it is on the way from `c = 1 / keep` to 1: `c` then is so far between the two.
//!
//! *Local* selection moves each key by at most `2 radius` places, by sorting `j + radius · u_j` for
//! uniform `u_j` in `[−1, 1]`, cuts what results into windows of `k` keys, and gives each window of
//! queries the keys that are now in theirs: mostly near ones, now and then a far one. On an image,
//! windows are rectangles and keys move along rows and then along columns. Under a causal mask windows
//! are half as long and a query reads the one before its own too.
//!
//! Positions are those of the tokens before they were drawn, for masks, windows and biases alike. Under
//! a causal mask or a window a query's own key is always among its keys, so that none is left without
//! any. Only real tokens are drawn from and counted. The paper's program is not public: what it does
//! in local windows is reconstructed from the description.
//!
//! Around a linear attention whose keys may be any set, the keys of `S` are gathered likewise. Where the
//! order of keys matters to the wrapped mechanism (under a causal mask, with projections by position),
//! keys outside `S` are as padding to it: a regulariser that saves nothing; the first token then is in
//! every `S`.
//!
//! Cost: `keep` times that of dense attention in a pass that draws, projections left out, where windows
//! divide the length, and less than twice that where they don't (on an image in either direction); with own keys
//! `2 head_width + 4 value_width + 8` more for each query. No parameters.

mod mixings;
mod windows;

use super::blocks::{Bias, Blocks, Meetings, Rule};
use super::sequences::{At, Sequence, Sequences};
use super::{
    Abilities, Describe, Heads, Mechanism, MechanismPass, MechanismSpec, Memory, Resumed, Scores,
    Subsets, draw_seed,
};
use crate::dropout::seed_of_site;
use crate::error::{bounded, tensor};
use crate::parameters::Parameters;
use crate::state::MixerState;
use crate::{Context, Draws, Error, Result};
use lapidary_kernels::Tensor;
use lapidary_signal::Mixing;
use mixings::{Drawn, Gathered, LaidOut, OwnKeys, pick};
use rand::SeedableRng;
use rand::seq::index::sample;
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use windows::{image_windows, line_windows};

const MAX_COLUMNS: usize = 1 << 16;

/// Attention to a random subset of the keys, in passes that draw.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SubsampledSpec {
    /// What gets the keys that are left.
    #[serde(default, skip_serializing_if = "MechanismSpec::is_softmax")]
    pub inner: Box<MechanismSpec>,
    /// Share of the keys that are kept, above 0 and at most 1.
    #[serde(default = "quarter")]
    pub keep: f64,
    /// How they are chosen.
    #[serde(default)]
    pub selection: Selection,
    /// Whether each head has a subset of its own.
    #[serde(default)]
    pub per_head: bool,
    /// Whether a query's own key is always kept in bidirectional attention too.
    #[serde(default)]
    pub own: bool,
}

fn quarter() -> f64 {
    0.25
}

impl Default for SubsampledSpec {
    fn default() -> Self {
        Self {
            inner: Box::default(),
            keep: quarter(),
            selection: Selection::default(),
            per_head: false,
            own: false,
        }
    }
}

/// How keys are chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Selection {
    /// Each as likely as any other.
    #[default]
    #[serde(deserialize_with = "crate::fields::none")]
    Unbiased,
    /// Near ones more often.
    Local {
        /// How far keys are moved before windows are cut, at most twice: 0 for plain windows.
        radius: f64,
        /// Patches in a row of an image, for windows in two dimensions.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        columns: Option<usize>,
    },
}

impl SubsampledSpec {
    /// Keys of a sequence of `length` real tokens that are kept, in a pass so far on the way to all of
    /// them: `⌈length / c⌉` for `c` from `1 / keep` at 0 to 1 at 1.
    pub fn kept(&self, length: usize, annealing: f64) -> usize {
        let keep = self.keep / (1.0 + (self.keep - 1.0) * annealing.clamp(0.0, 1.0));
        // What is a whole number but for rounding is one.
        let kept = (length as f64 * keep - 1e-9).ceil() as usize;
        kept.clamp(1, length.max(1)).min(length)
    }

    /// What is done with the keys that are not drawn.
    fn subsets(&self, causal: bool) -> Subsets {
        match self.inner.spec() {
            None => Subsets::AnyKeys,
            Some(inner) if causal => match inner.subsets() {
                Subsets::Refused => Subsets::Refused,
                Subsets::AsPadding | Subsets::AnyKeys => Subsets::AsPadding,
            },
            Some(inner) => inner.subsets(),
        }
    }
}

impl Describe for SubsampledSpec {
    fn kind(&self) -> &'static str {
        "subsampled"
    }

    fn abilities(&self) -> Abilities {
        match self.inner.spec() {
            None => Abilities {
                causal: true,
                bidirectional: true,
                cross: false,
                scores: true,
            },
            Some(inner) => Abilities {
                cross: false,
                scores: false,
                ..inner.abilities()
            },
        }
    }

    fn longest(&self) -> Option<(String, usize)> {
        let (field, most) = self.inner.spec()?.longest()?;
        Some((format!("inner.{field}"), most))
    }

    fn draws(&self) -> Draws {
        Draws {
            any: true,
            keys: true,
        }
    }

    fn is_scaled(&self) -> bool {
        self.inner.spec().is_none_or(Describe::is_scaled)
    }

    fn validate(&self, heads: &Heads, field: &str) -> Result<()> {
        let at = |name: &str| format!("{field}.{name}");
        if !(self.keep > 0.0 && self.keep <= 1.0) {
            return Err(Error::spec(at("keep"), self.keep, "above 0 and at most 1"));
        }
        if let Selection::Local { radius, columns } = self.selection {
            if !(radius.is_finite() && radius >= 0.0) {
                let expected = "a number of at least 0";
                return Err(Error::spec(at("selection.radius"), radius, expected));
            }
            if let Some(columns) = columns {
                bounded(at("selection.columns"), columns, 1..=MAX_COLUMNS)?;
                if heads.causal {
                    let expected = "absent in causal attention, which has one order";
                    return Err(Error::spec(at("selection.columns"), columns, expected));
                }
            }
            if !self.inner.is_softmax() {
                let expected = "unbiased: windows are those of softmax";
                return Err(Error::spec(at("selection.kind"), "local", expected));
            }
        }
        let subsets = self.subsets(heads.causal);
        if subsets == Subsets::Refused {
            let expected =
                "softmax, or a mechanism that can leave any of its keys out, such as fastmax";
            return Err(Error::spec(at("inner.kind"), self.inner.kind(), expected));
        }
        if self.per_head && subsets == Subsets::AsPadding {
            let expected =
                "false where keys that are left out are as padding, which all heads share";
            return Err(Error::spec(at("per_head"), true, expected));
        }
        if self.inner.spec().is_some_and(Describe::reads_tokens) {
            let expected = "keys: which of these are drawn is decided once they are there";
            return Err(Error::spec(at("inner.project"), "tokens", expected));
        }
        if self.own && !self.inner.is_softmax() {
            let expected = "false: a key of its own is that of softmax";
            return Err(Error::spec(at("own"), true, expected));
        }
        super::validate(&self.inner, heads, (false, None), &at("inner"))
    }

    fn build(&self, heads: &Heads, mut parameters: Parameters<'_>) -> Result<Box<dyn Mechanism>> {
        let inner = match self.inner.spec() {
            None => None,
            Some(inner) => Some(inner.build(heads, parameters.at("inner"))?),
        };
        Ok(Box::new(Subsampled {
            spec: self.clone(),
            heads: *heads,
            inner,
        }))
    }
}

/// The module.
#[derive(Debug)]
struct Subsampled {
    spec: SubsampledSpec,
    heads: Heads,
    /// Absent where it is softmax.
    inner: Option<Box<dyn Mechanism>>,
}

impl Mechanism for Subsampled {
    fn is_softmax(&self, context: &Context<'_>) -> bool {
        self.inner.is_none() && context.draw.is_none()
    }

    fn mixing(&self, q: &Tensor, k: &Tensor, pass: &MechanismPass<'_>) -> Result<Box<dyn Mixing>> {
        self.mixing_by_scores(q, k, Scores::default(), pass)
    }

    fn mixing_by_scores(
        &self,
        q: &Tensor,
        k: &Tensor,
        scores: Scores,
        pass: &MechanismPass<'_>,
    ) -> Result<Box<dyn Mixing>> {
        let Some(inner) = &self.inner else {
            return self.drawn(q, k, &scores, pass);
        };
        if pass.context.draw.is_none() {
            return inner.mixing(q, k, pass);
        }
        match self.spec.subsets(self.heads.causal) {
            Subsets::AnyKeys => self.gathered(inner.as_ref(), q, k, pass),
            Subsets::AsPadding | Subsets::Refused => {
                let drawn = self.as_padding(q, k, pass)?;
                inner.mixing_of_drawn(q, k, &drawn, pass)
            }
        }
    }

    fn memory(&self) -> Memory {
        match &self.inner {
            None => Memory::KeysAndValues,
            Some(inner) => inner.memory(),
        }
    }

    /// Dense: what is summed up already cannot be drawn from.
    fn resume(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        state: &mut MixerState,
        pass: &MechanismPass<'_>,
    ) -> Result<Resumed> {
        match &self.inner {
            Some(inner) => inner.resume(q, k, v, state, pass),
            None => Err(Error::spec(
                format!("decode state at {}", pass.path),
                "one of its own",
                "keys and values",
            )),
        }
    }
}

impl Subsampled {
    /// The generator of one head of a sequence, or of all of them.
    fn generator(&self, seed: u64, sequence: Sequence<'_>) -> ChaCha8Rng {
        let batch = sequence.index / self.heads.heads.max(1);
        let head = if self.spec.per_head { sequence.head } else { 0 };
        ChaCha8Rng::seed_from_u64(seed_of_site(seed, &format!("{batch}.{head}")))
    }

    /// `kept` tokens that are drawn from `length` real ones, rising.
    fn subset(&self, length: usize, kept: usize, generator: &mut ChaCha8Rng) -> Vec<usize> {
        let mut subset = sample(generator, length, kept).into_vec();
        subset.sort_unstable();
        subset
    }

    /// Which queries meet which keys, in tokens, where so many keys are kept.
    fn windows(
        &self,
        length: usize,
        kept: usize,
        generator: &mut ChaCha8Rng,
    ) -> Vec<[Vec<usize>; 2]> {
        match self.spec.selection {
            Selection::Unbiased => {
                vec![[(0..length).collect(), self.subset(length, kept, generator)]]
            }
            Selection::Local {
                radius,
                columns: Some(columns),
            } => image_windows(kept, length, columns, radius, generator),
            Selection::Local { radius, .. } => {
                line_windows(kept, length, self.heads.causal, radius, generator)
            }
        }
    }

    /// Softmax over the keys that are drawn.
    fn drawn(
        &self,
        q: &Tensor,
        k: &Tensor,
        scores: &Scores,
        pass: &MechanismPass<'_>,
    ) -> Result<Box<dyn Mixing>> {
        let sequences = Sequences::new(q, k, pass)?;
        let seed = draw_seed(pass, 0);
        let own = self.spec.own || self.heads.causal || scores.window.is_some();
        let rule = Rule {
            causal: self.heads.causal,
            window: scores.window,
            own: if own { f64::NEG_INFINITY } else { 0.0 },
        };
        let mut windows: Vec<[Vec<At>; 2]> = Vec::new();
        for sequence in sequences.iter() {
            let mut generator = self.generator(seed, sequence);
            let kept = self.spec.kept(sequence.len(), pass.context.annealing);
            for [queries, keys] in self.windows(sequence.len(), kept, &mut generator) {
                let queries = queries.into_iter().filter(|i| *i >= sequence.first());
                let window = [
                    queries.map(|i| sequence.query(i)).collect::<Vec<_>>(),
                    keys.into_iter().map(|j| sequence.key(j)).collect(),
                ];
                if window.iter().all(|side| !side.is_empty()) {
                    windows.push(window);
                }
            }
        }
        if let Some(bias) = &scores.bias {
            let own = match own {
                true => Some(OwnKeys::new(&sequences, q)?),
                false => None,
            };
            let laid = LaidOut::new(
                &sequences,
                windows,
                rule,
                (q, k),
                self.heads.scale,
                bias,
                own,
            )?;
            return Ok(Box::new(laid));
        }
        let mut blocks = Blocks::default();
        for [queries, keys] in windows {
            blocks.push(queries, keys);
        }
        let mut parts = vec![blocks.listed(rule, Bias::default())];
        let mut own_keys = 0;
        if own {
            let mut blocks = Blocks::default();
            for sequence in sequences.iter() {
                for token in sequence.queries() {
                    blocks.push([sequence.query(token)], [sequence.key(token)]);
                }
            }
            own_keys = blocks.keys().count() as u64;
            parts.push(blocks.listed(Rule::default(), Bias::default()));
        }
        Ok(Box::new(Drawn {
            sizes: sequences.sizes,
            head_width: tensor(q.dim(3))?,
            meetings: Meetings::new(parts, (q, k), self.heads.scale)?,
            own: own.then_some(own_keys),
        }))
    }

    /// The wrapped mechanism over the keys that are drawn.
    fn gathered(
        &self,
        inner: &dyn Mechanism,
        q: &Tensor,
        k: &Tensor,
        pass: &MechanismPass<'_>,
    ) -> Result<Box<dyn Mixing>> {
        let sequences = Sequences::new(q, k, pass)?;
        let [batch, heads, _, keys] = sequences.sizes;
        let seed = draw_seed(pass, 0);
        let lengths = sequences.lengths();
        let kept = |length: usize| self.spec.kept(length, pass.context.annealing);
        let most = lengths.iter().map(|length| kept(*length)).max();
        let most = most.unwrap_or_default();
        let mut picked = Vec::with_capacity(batch * heads * most);
        for sequence in sequences.iter() {
            let generator = &mut self.generator(seed, sequence);
            let subset = self.subset(sequence.len(), kept(sequence.len()), generator);
            picked.extend(subset.iter().map(|&j| sequence.key(j).row as u32));
            picked.resize((sequence.index + 1) * most, (sequence.index * keys) as u32);
        }
        let keep = lengths.iter().flat_map(|length| {
            let kept = kept(*length);
            (0..most).map(move |slot| u8::from(slot < kept))
        });
        let device = k.device();
        let keep = tensor(Tensor::from_vec(
            keep.collect::<Vec<_>>(),
            (batch, most),
            device,
        ))?;
        let picked = tensor(Tensor::from_vec(picked, batch * heads * most, device))?;
        let fewer = pick(k, &picked)?;
        let keep = Some(&keep);
        let inner = inner.mixing(q, &fewer, &MechanismPass { keep, ..*pass })?;
        Ok(Box::new(Gathered {
            sizes: sequences.sizes,
            inner,
            picked,
        }))
    }

    /// The mask of keys `[batch, key]` in which those that are not drawn are pads too.
    fn as_padding(&self, q: &Tensor, k: &Tensor, pass: &MechanismPass<'_>) -> Result<Tensor> {
        let sequences = Sequences::new(q, k, pass)?;
        let [batch, heads, _, keys] = sequences.sizes;
        let seed = draw_seed(pass, 0);
        let mut keep = vec![0u8; batch * keys];
        for sequence in sequences.iter().filter(|sequence| sequence.head == 0) {
            let kept = self.spec.kept(sequence.len(), pass.context.annealing);
            let generator = &mut self.generator(seed, sequence);
            let mut subset = self.subset(sequence.len(), kept, generator);
            // Under a causal mask every query then has a key.
            if let Some(first) = subset.first_mut().filter(|_| self.heads.causal) {
                *first = 0;
            }
            for token in subset {
                let at = sequence.index / heads.max(1) * keys + sequence.lies(token);
                if let Some(keep) = keep.get_mut(at) {
                    *keep = 1;
                }
            }
        }
        tensor(Tensor::from_vec(keep, (batch, keys), k.device()))
    }
}
