//! Reformer (Kitaev et al., Reformer: The Efficient Transformer, 2020, arXiv 2001.04451): tokens
//! whose queries hash alike meet.
//!
//! Keys are the queries at unit length, `k_j = q_j / ‖q_j‖`, and scores `q_i · k_j` (as the authors'
//! program has it; `extra_scale` multiplies by the attention's scale too, as the paper's formula
//! does). In each of some rounds
//!
//! ```text
//! h(x) = argmax [xR; −xR],  R ~ N(0, 1) of [head_width, buckets / 2]
//! ```
//!
//! gives every token a bucket; tokens are sorted by bucket and then by position, the sorted list is
//! cut into chunks of `c`, and each chunk meets itself and its neighbours. Chunks of all rounds stand
//! in one ring, so that the first of a round looks back at the last of the round before. What a
//! token gets in the rounds is merged by the log-sums; a key that it met several times counts
//! several times, unless `repeats` is `once`: then `ln N_ij` is taken off the score, `N_ij` being how
//! often the two meet. A token's own key is read where nothing else is there: a penalty of `−10⁵`, as published, comes to
//! the same, but rounds what weights are made of again in the backward pass to a hundredth.
//!
//! Several numbers of buckets are hashed one by one and read as the digits of one number. Rotations
//! are those of the pass where it draws anew, as in training, and of `seed` otherwise; of `seed` always
//! where they are `fixed`. All sequences of a batch share them, so that none depends on which others
//! are beside it; where they are `per-example`, each sequence of a pass that draws has its own, as the
//! authors have it. What is recomputed in the backward pass takes the buckets of the forward pass.
//!
//! What a token may see is a matter of its own past, but which of these keys it meets depends on
//! where later tokens push it in the sorted list. While decoding, a step gives what the pass over
//! the tokens so far gives to its last ones.
//!
//! Cost: for each pair that meets and is seen `2 head_width + 2 value_width + 5`, at most
//! `rounds · c (1 + before + after)` pairs for a query; `head_width · rounds · Σ buckets` for each
//! token that is hashed; sorting. No parameters.

mod sorted;

use super::blocks::{Bias, Blocks, Rule, Sparse, apart, side_by_side};
use super::sequences::{At, Sequences};
use super::{
    Abilities, Describe, Heads, Mechanism, MechanismPass, Memory, QueryKeySharing, Resumed,
};
use crate::dropout::seed_of_site;
use crate::error::{bounded, tensor};
use crate::parameters::Parameters;
use crate::state::{KeyValueCache, MixerState};
use crate::{Draws, Error, Result};
use lapidary_kernels::{DType, Tensor, matmul, rms_norm};
use lapidary_signal::Mixing;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sorted::Sorted;
use std::ops::Neg;

const MAX_CHUNK: usize = 1 << 20;
const MAX_ROUNDS: usize = 64;
const MAX_NEIGHBOURS: usize = 64;
const MAX_BUCKETS: usize = 1 << 12;
const MAX_DIGITS: usize = 4;
/// Buckets above which they are hashed as two digits, where they follow from the length.
const ONE_DIGIT: usize = 128;

/// Attention among tokens that hash alike.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ReformerSpec {
    /// Tokens `c` of a chunk of the sorted list.
    pub chunk: usize,
    /// How often tokens are hashed.
    #[serde(default = "one")]
    pub rounds: usize,
    /// How many buckets there are, as an even number or the even numbers of its digits. None: two
    /// for each chunk that a sequence makes, which cannot be decoded since it grows.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub buckets: Vec<usize>,
    /// Chunks before its own that a chunk meets.
    #[serde(default = "one")]
    pub before: usize,
    /// Chunks behind its own that a chunk meets.
    #[serde(default)]
    pub after: usize,
    /// Whether tokens of different buckets don't meet, though their chunks do.
    #[serde(default)]
    pub within_buckets: bool,
    /// How a key counts that is met several times.
    #[serde(default)]
    pub repeats: Repeats,
    /// Whether scores are multiplied by the attention's scale, though keys have unit length.
    #[serde(default)]
    pub extra_scale: bool,
    /// Where rotations come from.
    #[serde(default)]
    pub rotations: Rotations,
    /// Decides the rotations of passes that draw none anew.
    #[serde(default)]
    pub seed: u64,
}

/// Where rotations come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Rotations {
    /// From the draw of each pass that has one: anew in every step of training.
    #[default]
    Drawn,
    /// The same, for each sequence of a batch by itself.
    PerExample,
    /// From the seed alone, in training too.
    Fixed,
}

/// How a key counts that a query meets several times.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Repeats {
    /// As often as it is met.
    #[default]
    Counted,
    /// Once.
    Once,
}

fn one() -> usize {
    1
}

impl ReformerSpec {
    /// Chunks of so many tokens, one round, and the defaults otherwise.
    pub fn new(chunk: usize) -> Self {
        Self {
            chunk,
            rounds: 1,
            buckets: Vec::new(),
            before: 1,
            after: 0,
            within_buckets: false,
            repeats: Repeats::Counted,
            extra_scale: false,
            rotations: Rotations::Drawn,
            seed: 0,
        }
    }
}

impl Describe for ReformerSpec {
    fn kind(&self) -> &'static str {
        "reformer"
    }

    fn abilities(&self) -> Abilities {
        Abilities {
            causal: true,
            bidirectional: true,
            ..Abilities::default()
        }
    }

    fn is_scaled(&self) -> bool {
        self.extra_scale
    }

    fn draws(&self) -> Draws {
        Draws::anything(self.rotations != Rotations::Fixed)
    }

    fn validate(&self, heads: &Heads, field: &str) -> Result<()> {
        let at = |name: &str| format!("{field}.{name}");
        if heads.sharing == QueryKeySharing::None {
            return Err(Error::spec(
                field,
                "reformer with keys of their own",
                "one with sharing = \"query-key\" beside it: tokens are sorted by queries that \
                 are keys too",
            ));
        }
        bounded(at("chunk"), self.chunk, 1..=MAX_CHUNK)?;
        bounded(at("rounds"), self.rounds, 1..=MAX_ROUNDS)?;
        bounded(at("before"), self.before, 0..=MAX_NEIGHBOURS)?;
        bounded(at("after"), self.after, 0..=MAX_NEIGHBOURS)?;
        let digits = format!("number of {}", at("buckets"));
        bounded(digits, self.buckets.len(), 0..=MAX_DIGITS)?;
        for &digit in &self.buckets {
            if !digit.is_multiple_of(2) || !(2..=MAX_BUCKETS).contains(&digit) {
                let expected = format!("even numbers between 2 and {MAX_BUCKETS}");
                return Err(Error::spec(at("buckets"), digit, expected));
            }
        }
        // A bucket is held as one number.
        let mut digits = self.buckets.iter();
        let all = digits.try_fold(1u32, |all, &digit| all.checked_mul(digit as u32));
        if all.is_none() {
            let expected = format!("digits whose product is at most {}", u32::MAX);
            return Err(Error::spec(at("buckets"), &self.buckets, expected));
        }
        Ok(())
    }

    fn build(&self, heads: &Heads, _: Parameters<'_>) -> Result<Box<dyn Mechanism>> {
        Ok(Box::new(Reformer {
            spec: self.clone(),
            causal: heads.causal,
            scale: if self.extra_scale { heads.scale } else { 1.0 },
        }))
    }
}

impl ReformerSpec {
    /// The digits of a bucket's number, for a sequence of `length` tokens.
    fn digits(&self, length: usize) -> Vec<usize> {
        if !self.buckets.is_empty() {
            return self.buckets.clone();
        }
        let all = 2 * length.div_ceil(self.chunk).max(1);
        if all <= ONE_DIGIT {
            return vec![all];
        }
        let first = all.isqrt().next_multiple_of(2);
        vec![first, all.div_ceil(first).next_multiple_of(2)]
    }

    /// The columns of the rotation of one digit: `buckets / 2` of `width` normal numbers. Fewer
    /// buckets have the first of them.
    fn rotation(
        seed: u64,
        [head, round, digit]: [usize; 3],
        columns: usize,
        width: usize,
    ) -> Vec<f64> {
        let place = format!("{head}.{round}.{digit}");
        let mut rng = ChaCha8Rng::seed_from_u64(seed_of_site(seed, &place));
        let mut normal = || {
            let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
            radius * (std::f64::consts::TAU * rng.random::<f64>()).cos()
        };
        (0..columns * width).map(|_| normal()).collect()
    }

    /// The buckets `[batch, heads, key, rounds]` (`u32`) that the attention at `path` hashes keys
    /// `[batch, heads, key, head_width]` to, none of them pads, in a pass with such a draw.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn buckets(&self, keys: &Tensor, path: &str, draw: Option<u64>) -> Result<Tensor> {
        let (batch, heads, length, _) = tensor(keys.dims4())?;
        let seeds = self.seeds_at(path, draw, batch);
        let buckets = self.hash(keys, &vec![length; batch], &seeds)?;
        let shape = (batch, heads, length, self.rounds);
        tensor(Tensor::from_vec(buckets, shape, keys.device()))
    }

    /// The seeds of the rotations of the attention at `path` in a pass with such a draw: one for all sequences of
    /// the batch, or one for each.
    fn seeds_at(&self, path: &str, draw: Option<u64>, batch: usize) -> Vec<u64> {
        let drawn = draw.filter(|_| self.rotations != Rotations::Fixed);
        let seed = seed_of_site(drawn.unwrap_or(self.seed), path);
        match (self.rotations, drawn) {
            (Rotations::PerExample, Some(_)) => (0..batch)
                .map(|example| seed_of_site(seed, &format!("example {example}")))
                .collect(),
            _ => vec![seed],
        }
    }

    /// The buckets of keys `k` `[batch, heads, key, width]`, token by token for each head of each
    /// sequence and within it round by round: `[batch · heads, key, rounds]`. `lengths` are the
    /// numbers of real tokens, `seeds` those of [`ReformerSpec::seeds_at`].
    fn hash(&self, k: &Tensor, lengths: &[usize], seeds: &[u64]) -> Result<Vec<u32>> {
        let (_, heads, keys, width) = tensor(k.dims4())?;
        let digits: Vec<Vec<usize>> = lengths.iter().map(|&length| self.digits(length)).collect();
        let places = digits.iter().map(Vec::len).max().unwrap_or_default();
        let halves: Vec<usize> = (0..places)
            .map(|place| {
                let each = digits.iter().filter_map(|digits| digits.get(place));
                each.max().map_or(0, |most| most / 2)
            })
            .collect();
        let columns = self.rounds * halves.iter().sum::<usize>();
        let mut rotations = Vec::with_capacity(seeds.len() * heads * columns * width);
        for &seed in seeds {
            for head in 0..heads {
                for round in 0..self.rounds {
                    for (digit, &half) in halves.iter().enumerate() {
                        rotations.extend(Self::rotation(seed, [head, round, digit], half, width));
                    }
                }
            }
        }
        let shape = (seeds.len(), heads, columns, width);
        let rotations = tensor(Tensor::from_vec(rotations, shape, k.device()))?;
        let rotations = tensor(tensor(rotations.to_dtype(k.dtype()))?.transpose(2, 3))?;
        let rotated = matmul(&k.detach(), &rotations)?;
        let rotated = tensor(rotated.flatten_all())?;
        let digits = |token: usize| {
            let digits = digits.get(token / (heads * keys));
            digits.map_or(&[][..], Vec::as_slice)
        };
        Ok(match rotated.dtype() {
            DType::F32 => hashed(
                &tensor(rotated.to_vec1::<f32>())?,
                self.rounds,
                &halves,
                digits,
            ),
            _ => {
                let rotated = tensor(tensor(rotated.to_dtype(DType::F64))?.to_vec1::<f64>())?;
                hashed(&rotated, self.rounds, &halves, digits)
            }
        })
    }
}

/// The buckets of rotated keys, token by token and within it round by round: `halves` are how many numbers
/// each digit of a round has at most, `digits` those of a token's sequence.
fn hashed<'a, T: PartialOrd + Neg<Output = T> + Copy + Sync>(
    rotated: &[T],
    rounds: usize,
    halves: &[usize],
    digits: impl Fn(usize) -> &'a [usize] + Sync,
) -> Vec<u32> {
    let columns = rounds * halves.iter().sum::<usize>();
    let mut buckets = vec![0; rotated.len() / columns.max(1) * rounds];
    let rows = rotated.par_chunks_exact(columns.max(1));
    let each = buckets.par_chunks_exact_mut(rounds.max(1)).zip(rows);
    each.enumerate().for_each(|(token, (buckets, mut row))| {
        let digits = digits(token);
        for to in buckets {
            let mut bucket = 0;
            for (half, digit) in halves.iter().zip(digits) {
                bucket = bucket * digit + nearest(&row[..digit / 2]);
                row = &row[*half..];
            }
            // Of digits that other sequences have more of.
            row = &row[halves.iter().skip(digits.len()).sum::<usize>()..];
            *to = bucket as u32;
        }
    });
    buckets
}

/// `argmax [x; −x]`, the first of those that are equal.
fn nearest<T: PartialOrd + Neg<Output = T> + Copy>(x: &[T]) -> usize {
    let Some(&first) = x.first() else {
        return 0;
    };
    let (mut largest, mut least) = ((0, first), (0, first));
    for (index, &value) in x.iter().enumerate() {
        if value > largest.1 {
            largest = (index, value);
        }
        if value < least.1 {
            least = (index, value);
        }
    }
    match -least.1 > largest.1 {
        true => x.len() + least.0,
        false => largest.0,
    }
}

/// The module.
#[derive(Debug)]
struct Reformer {
    spec: ReformerSpec,
    causal: bool,
    scale: f64,
}

impl Reformer {
    /// Attention of `q` over `k`, whose `buckets` are known.
    fn among(
        &self,
        sequences: &Sequences,
        (q, k): (&Tensor, &Tensor),
        buckets: &[u32],
    ) -> Result<Sparse> {
        let [.., keys] = sequences.sizes;
        let spec = &self.spec;
        let sorted: Vec<Sorted> = sequences
            .iter()
            .map(|sequence| {
                let bucket = |token: usize, round: usize| {
                    let at = (sequence.index * keys + sequence.lies(token)) * spec.rounds + round;
                    buckets.get(at).copied().unwrap_or_default()
                };
                let of = |round| {
                    (0..sequence.len())
                        .map(|token| bucket(token, round))
                        .collect()
                };
                Sorted::new((0..spec.rounds).map(of).collect(), spec.chunk)
            })
            .collect();
        // Of length √width; the scale makes up for it.
        let width = tensor(k.dim(3))?.max(1) as f64;
        let unit = rms_norm(k, None, 1e-24 / width)?;
        let scale = self.scale / width.sqrt();
        let rule = Rule {
            causal: self.causal,
            own: f64::NEG_INFINITY,
            ..Rule::default()
        };
        let mut alone = Blocks::default();
        for (sequence, sorted) in sequences.iter().zip(&sorted) {
            let by_itself = |token: &usize| !sorted.meets_another(*token, self.causal, spec);
            for token in sequence.queries().filter(by_itself) {
                alone.push([sequence.query(token)], [sequence.key(token)]);
            }
        }
        let mut parts = Vec::new();
        if !alone.is_empty() {
            parts.push(alone.listed(Rule::default(), Bias::default()));
        }
        for round in 0..spec.rounds {
            let mut blocks = Blocks::default();
            for (sequence, sorted) in sequences.iter().zip(&sorted) {
                for chunk in round * sorted.each..(round + 1) * sorted.each {
                    let queries = sorted.chunks[chunk]
                        .iter()
                        .filter(|&&token| token >= sequence.first())
                        .map(|&token| sequence.query(token));
                    let keys = sorted
                        .meets(chunk, round, spec)
                        .into_iter()
                        .flat_map(|chunk| &sorted.chunks[chunk])
                        .map(|&token| sequence.key(token));
                    blocks.push(queries, keys);
                }
            }
            let bias = |query: At, key: At| {
                let Some(sorted) = sorted.get(key.row / keys) else {
                    return 0.0;
                };
                let (i, j) = (query.position, key.position);
                match spec.repeats {
                    _ if !sorted.shares(round, i, j, spec) => f64::NEG_INFINITY,
                    Repeats::Counted => 0.0,
                    Repeats::Once => -(sorted.meetings(i, j, spec) as f64).ln(),
                }
            };
            let needed = spec.within_buckets || spec.repeats == Repeats::Once;
            let bias = Bias {
                of_pair: needed.then_some(&bias),
                ..Bias::default()
            };
            parts.push(blocks.listed(rule, bias));
        }
        let sparse = Sparse::new(sequences.sizes, (q, &unit), scale, parts)?;
        Ok(sparse.after(self.hashing(k)?))
    }

    /// Operations of hashing keys.
    fn hashing(&self, k: &Tensor) -> Result<u64> {
        let (batch, heads, keys, width) = tensor(k.dims4())?;
        let halves: usize = self.spec.digits(keys).iter().map(|digit| digit / 2).sum();
        Ok((batch * heads * keys * 2 * width * self.spec.rounds * halves) as u64)
    }
}

impl Mechanism for Reformer {
    fn mixing(&self, q: &Tensor, k: &Tensor, pass: &MechanismPass<'_>) -> Result<Box<dyn Mixing>> {
        let sequences = Sequences::new(q, k, pass)?;
        let buckets = pass.context.decided(pass.path, || {
            let seeds = self
                .spec
                .seeds_at(pass.path, pass.context.draw, sequences.sizes[0]);
            self.spec.hash(k, &sequences.lengths(), &seeds)
        })?;
        Ok(Box::new(self.among(&sequences, (q, k), &buckets)?))
    }

    fn memory(&self) -> Memory {
        Memory::Own
    }

    fn resume(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        state: &mut MixerState,
        pass: &MechanismPass<'_>,
    ) -> Result<Resumed> {
        if self.spec.buckets.is_empty() {
            return Err(Error::spec(
                format!("buckets of the mechanism at {}", pass.path),
                "absent",
                "given, since by default they grow with the text and decoding keeps them; generation without a cache \
                 asks for none",
            ));
        }
        let (batch, heads, new, _) = tensor(k.dims4())?;
        let seeds = self.spec.seeds_at(pass.path, pass.context.draw, batch);
        let hashed = self.spec.hash(k, &vec![new; batch], &seeds)?;
        let (keys, values) = (side_by_side(k)?, side_by_side(v)?);
        let (keys, values, buckets) = match state {
            MixerState::Empty => {
                *state = MixerState::Hashed {
                    cache: KeyValueCache::new(&keys, &values)?,
                    buckets: hashed.clone(),
                };
                (keys, values, hashed)
            }
            MixerState::Hashed { cache, buckets } => {
                let (keys, values) = cache.append(&keys, &values)?;
                let each = buckets.len() / (batch * heads).max(1);
                let more = new * self.spec.rounds;
                let joined = buckets.chunks(each).zip(hashed.chunks(more));
                *buckets = joined.flat_map(|(old, new)| [old, new].concat()).collect();
                (keys, values, buckets.clone())
            }
            _ => {
                return Err(Error::spec(
                    format!("decode state at {}", pass.path),
                    "another mixer's",
                    "that of hashed keys",
                ));
            }
        };
        let (keys, values) = (apart(&keys, heads)?, apart(&values, heads)?);
        let sequences = Sequences::new(q, &keys, pass)?;
        let whole = self.among(&sequences, (q, &keys), &buckets)?;
        Ok(Resumed::Kept {
            mixing: Box::new(whole),
            values,
        })
    }
}
