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
//! consolidate, and evaluation with several seeds is an ensemble of the sub-networks.
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
//! Cost: `keep` times that of dense attention in a pass that draws, projections left out; with own keys
//! `2 head_width + 4 value_width + 8` more for each query. No parameters.

use super::blocks::{self, Blocks, Part, Rule, rows};
use super::sequences::{At, Sequence, Sequences};
use super::{
    Abilities, Describe, Heads, Mechanism, MechanismPass, MechanismSpec, Memory, Resumed, Scores,
    Subsets, draw_seed,
};
use crate::dropout::seed_of_site;
use crate::error::{bounded, tensor};
use crate::parameters::Parameters;
use crate::state::MixerState;
use crate::{Context, Error, Result};
use lapidary_kernels::{AttentionPart, SoftmaxMask, Tensor, embedding, softmax};
use lapidary_signal::Mixing;
use rand::seq::index::sample;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

const MAX_COLUMNS: usize = 1 << 16;
/// A score that is as good as none, and yet a number.
const HIDDEN: f64 = -1e30;

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
    /// Keys of a sequence of `length` real tokens that are kept.
    pub fn kept(&self, length: usize) -> usize {
        // What is a whole number but for rounding is one.
        let kept = (length as f64 * self.keep - 1e-9).ceil() as usize;
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
                let keep = self.as_padding(q, k, pass)?;
                let keep = Some(&keep);
                inner.mixing(q, k, &MechanismPass { keep, ..*pass })
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

    /// The tokens that are drawn from `length` real ones, rising.
    fn subset(&self, length: usize, generator: &mut ChaCha8Rng) -> Vec<usize> {
        let mut subset = sample(generator, length, self.spec.kept(length)).into_vec();
        subset.sort_unstable();
        subset
    }

    /// Which queries meet which keys, in tokens.
    fn windows(&self, length: usize, generator: &mut ChaCha8Rng) -> Vec<[Vec<usize>; 2]> {
        match self.spec.selection {
            Selection::Unbiased => vec![[(0..length).collect(), self.subset(length, generator)]],
            Selection::Local {
                radius,
                columns: Some(columns),
            } => image_windows(self.spec.kept(length), length, columns, radius, generator),
            Selection::Local { radius, .. } => {
                let kept = self.spec.kept(length);
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
            for [queries, keys] in self.windows(sequence.len(), &mut generator) {
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
        let own = match own {
            true => Some(OwnKeys::new(&sequences, q)?),
            false => None,
        };
        if let Some(bias) = &scores.bias {
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
        let (q_rows, k_rows) = (rows(q)?, rows(k)?);
        let part = Part::new(blocks, rule, (&q_rows, &k_rows), self.heads.scale, None)?;
        let own = match own {
            None => None,
            Some(own) => {
                let scores = own.scores(&q_rows, &k_rows, self.heads.scale)?;
                Some((own, scores))
            }
        };
        Ok(Box::new(Drawn {
            sizes: sequences.sizes,
            head_width: tensor(q.dim(3))?,
            part,
            own,
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
        let kept = |length: &usize| self.spec.kept(*length);
        let most = lengths.iter().map(kept).max().unwrap_or_default();
        let mut picked = Vec::with_capacity(batch * heads * most);
        for sequence in sequences.iter() {
            let subset = self.subset(sequence.len(), &mut self.generator(seed, sequence));
            picked.extend(subset.iter().map(|&j| sequence.key(j).row as u32));
            picked.resize((sequence.index + 1) * most, (sequence.index * keys) as u32);
        }
        let keep = lengths.iter().flat_map(|length| {
            let kept = self.spec.kept(*length);
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
            let mut subset = self.subset(sequence.len(), &mut self.generator(seed, sequence));
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

/// `0 … length − 1`, each moved by at most `2 radius` places: sorted by `j + radius · u_j`.
fn shuffled(length: usize, radius: f64, generator: &mut ChaCha8Rng) -> Vec<usize> {
    let mut keys: Vec<(f64, usize)> = (0..length)
        .map(|j| (j as f64 + radius * generator.random_range(-1.0..=1.0), j))
        .collect();
    keys.sort_by(|a, b| a.0.total_cmp(&b.0));
    keys.into_iter().map(|(_, j)| j).collect()
}

/// `length` places cut into windows of `size` or slightly more.
fn cut(length: usize, size: usize) -> Vec<std::ops::Range<usize>> {
    let count = (length / size.max(1)).max(1);
    let bound = |window: usize| window * length / count;
    (0..count)
        .map(|window| bound(window)..bound(window + 1))
        .collect()
}

fn line_windows(
    kept: usize,
    length: usize,
    causal: bool,
    radius: f64,
    generator: &mut ChaCha8Rng,
) -> Vec<[Vec<usize>; 2]> {
    let order = shuffled(length, radius, generator);
    // Where all keys are kept nobody may miss one.
    let size = match causal && kept < length {
        true => kept.div_ceil(2),
        false => kept,
    };
    let windows = cut(length, size);
    let first = |window: usize| {
        let window = if causal {
            window.saturating_sub(1)
        } else {
            window
        };
        windows.get(window).map_or(0, |range| range.start)
    };
    let each = windows.iter().enumerate().map(|(window, range)| {
        let keys = order.get(first(window)..range.end).unwrap_or_default();
        [range.clone().collect(), keys.to_vec()]
    });
    each.collect()
}

fn image_windows(
    kept: usize,
    length: usize,
    columns: usize,
    radius: f64,
    generator: &mut ChaCha8Rng,
) -> Vec<[Vec<usize>; 2]> {
    let lines = length.div_ceil(columns);
    let mut order: Vec<usize> = (0..length).collect();
    let rows = (0..lines).map(|row| {
        let cells = row * columns..((row + 1) * columns).min(length);
        cells.collect::<Vec<_>>()
    });
    let along = (0..columns).map(|column| (column..length).step_by(columns).collect());
    for line in rows.chain(along) {
        let before: Vec<usize> = line.iter().map(|&cell| order[cell]).collect();
        let moved = shuffled(line.len(), radius, generator);
        for (&cell, from) in line.iter().zip(moved) {
            order[cell] = before[from];
        }
    }
    let high = ((kept as f64).sqrt().round() as usize).clamp(1, lines.max(1));
    let wide = kept.div_ceil(high);
    let mut windows = Vec::new();
    for down in cut(lines, high) {
        for across in cut(columns, wide) {
            let cells = down.clone().flat_map(|row| {
                let cells = across.clone().map(move |column| row * columns + column);
                cells.filter(|cell| *cell < length)
            });
            let queries: Vec<usize> = cells.collect();
            let keys = queries.iter().map(|&cell| order[cell]).collect();
            windows.push([queries, keys]);
        }
    }
    windows
}

/// Rows `[batch, heads, key, width]` that were picked, by head: `[batch, heads, picked, width]`.
fn pick(x: &Tensor, picked: &Tensor) -> lapidary_kernels::Result<Tensor> {
    let (batch, heads, _, width) = x.dims4()?;
    let x = embedding(&rows(x)?, picked)?;
    Ok(x.reshape((batch, heads, (), width))?)
}

/// Each query's own key.
#[derive(Debug)]
struct OwnKeys {
    /// The row of the key of each query, `[queries]`.
    rows: Tensor,
    /// 1 where the query is a real token, `[queries, 1]`.
    real: Tensor,
}

impl OwnKeys {
    fn new(sequences: &Sequences, q: &Tensor) -> Result<Self> {
        let all = sequences.sizes[..3].iter().product();
        let (mut rows, mut real) = (vec![0u32; all], vec![0f32; all]);
        for sequence in sequences.iter() {
            for token in sequence.queries() {
                let at = sequence.query(token).row;
                if let (Some(row), Some(real)) = (rows.get_mut(at), real.get_mut(at)) {
                    *row = sequence.key(token).row as u32;
                    *real = 1.0;
                }
            }
        }
        let real = tensor(Tensor::from_vec(real, (all, 1), q.device()))?;
        Ok(Self {
            rows: tensor(Tensor::from_vec(rows, all, q.device()))?,
            real: tensor(real.to_dtype(q.dtype()))?,
        })
    }

    /// `scale · q_i · k_i`, `[queries]`.
    fn scores(&self, q: &Tensor, k: &Tensor, scale: f64) -> Result<Tensor> {
        let products = tensor(q.mul(&embedding(k, &self.rows)?))?;
        tensor(tensor(products.sum(1))? * scale)
    }

    /// The values at them, `[queries, width]`; zeros where the query is a pad.
    fn values(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        Ok(embedding(values, &self.rows)?.broadcast_mul(&self.real)?)
    }
}

/// Softmax over the keys of windows and each query's own.
#[derive(Debug)]
struct Drawn {
    sizes: [usize; 4],
    head_width: usize,
    /// Absent where there is no real token.
    part: Option<Part>,
    /// With their scores.
    own: Option<(OwnKeys, Tensor)>,
}

impl Mixing for Drawn {
    fn sizes(&self) -> [usize; 4] {
        self.sizes
    }

    fn mix(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        let [batch, heads, queries, _] = self.sizes;
        let all = batch * heads * queries;
        let values = rows(values)?;
        let mut parts = Vec::new();
        if let Some(part) = &self.part {
            parts.push(part.attend(&values)?);
        }
        if let Some((own, scores)) = &self.own {
            parts.push(AttentionPart {
                output: own.values(&values)?.reshape((1, 1, all, ()))?,
                log_sums: scores.reshape((1, 1, all))?,
            });
        }
        let merged = blocks::merge(&parts, all, &values)?;
        Ok(merged.reshape((batch, heads, queries, ()))?)
    }

    fn operations(&self, width: usize) -> u64 {
        let queries = self.sizes[..3].iter().product::<usize>();
        let own = match &self.own {
            None => 0,
            Some(_) => queries * (2 * self.head_width + 2 * (2 * width + 4)),
        };
        blocks::operations(&self.part, queries, [self.head_width, width]) + own as u64
    }
}

/// As [`Drawn`], with weights laid out for each window, as large as what is gathered of a bias that
/// is differentiated.
#[derive(Debug)]
struct LaidOut {
    sizes: [usize; 4],
    head_width: usize,
    /// `[windows, query, key]`, those of own keys in a last column.
    weights: Tensor,
    /// Rows of the keys, `[windows · key]`.
    keys: Tensor,
    /// Rows of the queries' own keys, `[windows · query]`.
    own: Option<Tensor>,
    /// Where each query lies among those of the windows, pads behind all.
    back: Tensor,
    pairs: u64,
}

impl LaidOut {
    fn new(
        sequences: &Sequences,
        windows: Vec<[Vec<At>; 2]>,
        rule: Rule,
        (q, k): (&Tensor, &Tensor),
        scale: f64,
        bias: &Tensor,
        own: Option<OwnKeys>,
    ) -> Result<Self> {
        let [_, heads, queries, keys] = sequences.sizes;
        let [most_queries, most_keys] = [0, 1].map(|side| {
            let lengths = windows.iter().map(|window| window[side].len());
            lengths.max().unwrap_or_default()
        });
        let count = windows.len();
        let (bias_batch, bias_heads, ..) = tensor(bias.dims4())?;
        // Where the bias of a query and a key stands.
        let place = |query: At, key: At| {
            let (batch, head) = (query.row / queries / heads, query.row / queries % heads);
            let index = batch % bias_batch * bias_heads + head % bias_heads;
            ((index * queries + query.row % queries) * keys + key.row % keys) as u32
        };
        let all: usize = sequences.sizes[..3].iter().product();
        let (mut query_rows, mut key_rows) = (Vec::new(), Vec::new());
        let (mut places, mut own_places, mut hidden) = (Vec::new(), Vec::new(), Vec::new());
        let mut back = vec![(count * most_queries) as u32; all];
        let mut pairs = 0;
        for (window, [of, over]) in windows.iter().enumerate() {
            for (slot, query) in of.iter().enumerate() {
                back[query.row] = (window * most_queries + slot) as u32;
                query_rows.push(query.row as u32);
                for key in over {
                    let sees = rule.sees(*query, *key);
                    pairs += u64::from(sees);
                    places.push(place(*query, *key));
                    hidden.push(if sees { 0.0 } else { HIDDEN });
                }
                places.resize(places.len() + most_keys - over.len(), 0);
                hidden.resize(hidden.len() + most_keys - over.len(), HIDDEN);
                // Its own key is where it is, counted from the end of the keys.
                let behind = keys - queries + query.row % queries;
                let own = At {
                    row: query.row / queries * keys + behind,
                    position: query.position,
                };
                own_places.push(place(*query, own));
            }
            let missing = most_queries - of.len();
            query_rows.resize(query_rows.len() + missing, 0);
            own_places.resize(own_places.len() + missing, 0);
            places.resize(places.len() + missing * most_keys, 0);
            hidden.resize(hidden.len() + missing * most_keys, 0.0);
            key_rows.extend(over.iter().map(|key| key.row as u32));
            key_rows.resize(key_rows.len() + most_keys - over.len(), 0);
        }
        let device = q.device();
        let ids = |ids: Vec<u32>| {
            let length = ids.len();
            tensor(Tensor::from_vec(ids, length, device))
        };
        let (query_rows, key_rows) = (ids(query_rows)?, ids(key_rows)?);
        let (q_rows, k_rows) = (rows(q)?, rows(k)?);
        let width = tensor(q_rows.dim(1))?;
        let q = tensor(embedding(&q_rows, &query_rows)?.reshape((count, most_queries, width)))?;
        let k = tensor(embedding(&k_rows, &key_rows)?.reshape((count, most_keys, width)))?;
        let products = tensor(q.matmul(&tensor(tensor(k.t())?.contiguous())?))?;
        let table = tensor(tensor(bias.contiguous())?.reshape(((), 1)))?;
        let shape = (count, most_queries, most_keys);
        let bias = tensor(embedding(&table, &ids(places)?)?.reshape(shape))?;
        let hidden = tensor(tensor(Tensor::from_vec(hidden, shape, device))?.to_dtype(q.dtype()))?;
        let mut scores = tensor(tensor(products * scale)? + tensor(bias + hidden)?)?;
        let own = match own {
            None => None,
            Some(own) => {
                let shape = (count, most_queries, 1);
                let each = tensor(own.scores(&q_rows, &k_rows, scale)?.reshape(((), 1)))?;
                let each = tensor(embedding(&each, &query_rows)?.reshape(shape))?;
                let bias = tensor(embedding(&table, &ids(own_places)?)?.reshape(shape))?;
                scores = tensor(Tensor::cat(&[&scores, &tensor(each + bias)?], 2))?;
                let rows = tensor(own.rows.reshape(((), 1)))?;
                let flat = tensor(tensor(rows.index_select(&query_rows, 0))?.flatten_all())?;
                Some(flat)
            }
        };
        Ok(Self {
            sizes: sequences.sizes,
            head_width: width,
            weights: softmax(&scores, &SoftmaxMask::default())?,
            keys: key_rows,
            own,
            back: ids(back)?,
            pairs,
        })
    }
}

impl Mixing for LaidOut {
    fn sizes(&self) -> [usize; 4] {
        self.sizes
    }

    fn mix(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        let [batch, heads, queries, _] = self.sizes;
        let (count, each, columns) = self.weights.dims3()?;
        let keys = columns - usize::from(self.own.is_some());
        let values = rows(values)?;
        let width = values.dim(1)?;
        let v = embedding(&values, &self.keys)?.reshape((count, keys, width))?;
        let mut mixed = self.weights.narrow(2, 0, keys)?.contiguous()?.matmul(&v)?;
        if let Some(own) = &self.own {
            let v = embedding(&values, own)?.reshape((count, each, width))?;
            mixed = (mixed + v.broadcast_mul(&self.weights.narrow(2, keys, 1)?)?)?;
        }
        let nothing = Tensor::zeros((1, width), values.dtype(), values.device())?;
        let mixed = Tensor::cat(&[&mixed.reshape((count * each, width))?, &nothing], 0)?;
        Ok(embedding(&mixed, &self.back)?.reshape((batch, heads, queries, width))?)
    }

    fn operations(&self, width: usize) -> u64 {
        let queries = self.sizes[..3].iter().product::<usize>() as u64;
        let own = if self.own.is_some() { queries } else { 0 };
        (self.pairs + own) * (2 * self.head_width + 2 * width + 5) as u64
    }
}

/// A mechanism over some of the keys.
#[derive(Debug)]
struct Gathered {
    sizes: [usize; 4],
    inner: Box<dyn Mixing>,
    /// Rows of the keys, `[batch · heads · picked]`.
    picked: Tensor,
}

impl Mixing for Gathered {
    fn sizes(&self) -> [usize; 4] {
        self.sizes
    }

    fn mix(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        self.inner.mix(&pick(values, &self.picked)?)
    }

    fn operations(&self, width: usize) -> u64 {
        self.inner.operations(width)
    }
}
