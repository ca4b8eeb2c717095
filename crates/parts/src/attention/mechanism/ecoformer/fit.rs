//! Hash functions learned from an attention map (kernel-based supervised hashing; Liu et al., Supervised
//! Hashing with Kernels, 2012), outside back-propagation.
//!
//! Codes shall have inner products like the signs `S` of a map: `+1` for the tokens that a token is
//! most like, `−1` for those that it is least like, `0` for others. Bit by bit, with `R ← β S` first,
//!
//! ```text
//! a_r = argmin −(1 / n β) yᵀ R y,   y = 2 σ(κ a) − 1;     R ← R − y yᵀ with y = sign(κ a_r)
//! ```
//!
//! by gradient descent with Nesterov's momentum from where `a_r` was, averaged over sequences; what comes of
//! it is taken where the objective of the signs is lower. `R` is never laid out: it is `S`, which has a
//! few entries in a row, less the products of the bits so far.
//!
//! Hashes may start where bits without signs are best ([`Initial::Eigenvectors`]), and all bits may be sought
//! together, from the start or behind the others ([`Search`]).

use super::codes::MAX_BITS;
use super::eigenvectors::leading;
use super::{Bandwidth, EcoformerSpec, joint};
use crate::error::{bounded, tensor};
use crate::{Error, Result};
use lapidary_kernels::{DType, Device, Tensor};
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;

/// Most tokens that each shall be like.
const MAX_TOP: usize = 1 << 24;

/// How hashes are learned.
#[derive(Clone, Debug, PartialEq)]
pub struct Fit {
    /// Tokens that each token shall be like, and unlike.
    pub top: usize,
    /// The rate of gradient descent.
    pub rate: f64,
    /// Its momentum.
    pub momentum: f64,
    /// Its steps for each bit, or for all of them.
    pub iterations: usize,
    /// The order in which bits are sought.
    pub search: Search,
    /// Where they start.
    pub initial: Initial,
    /// Decides anchors, and where hashes start.
    pub seed: u64,
    /// Hashes to start from, `[heads, bits, anchors]`; normal numbers when absent.
    pub start: Option<Vec<f64>>,
}

/// The order in which bits are sought.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Search {
    /// One after the other, each for what the ones before it leave.
    #[default]
    BitByBit,
    /// All together.
    Joint,
    /// One after the other, and then all together from there.
    Refined,
}

/// Where bits start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Initial {
    /// At [`Fit::start`].
    #[default]
    Start,
    /// At the leading eigenvectors of what is to be learned, in the order of eigenvalues where bits are
    /// sought together; at [`Fit::start`] where there are fewer than bits.
    Eigenvectors,
}

impl Default for Fit {
    fn default() -> Self {
        Self {
            top: 10,
            rate: 5e-4,
            momentum: 0.9,
            iterations: 100,
            search: Search::default(),
            initial: Initial::default(),
            seed: 0,
            start: None,
        }
    }
}

impl Fit {
    /// Refuses what no descent comes of: hashes would stay, or become no numbers.
    fn validate(&self) -> Result<()> {
        bounded("top", self.top, 1..=MAX_TOP)?;
        if !(self.rate.is_finite() && self.rate > 0.0) {
            return Err(Error::spec("rate", self.rate, "a positive number"));
        }
        if !(0.0..1.0).contains(&self.momentum) {
            let expected = "at least 0 and below 1";
            return Err(Error::spec("momentum", self.momentum, expected));
        }
        let mut start = self.start.iter().flatten();
        match start.find(|hash| !hash.is_finite()) {
            None => Ok(()),
            Some(hash) => {
                let expected = "finite numbers alone";
                Err(Error::spec("a hash to start from", hash, expected))
            }
        }
    }
}

/// What became of a bit, or of all bits where they are sought together: their objective is then
/// `(½ ‖Yᵀ Y‖² − β tr Yᵀ S Y) / n β`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bit {
    /// The objective of the signs that it started with.
    pub before: f64,
    /// That of the signs that it ended with.
    pub after: f64,
    /// Whether descent found better ones.
    pub accepted: bool,
    /// `‖R‖²` behind it, summed over sequences.
    pub residual: f64,
}

/// Hashes learned from queries.
#[derive(Clone, Debug)]
pub struct Fitted {
    /// What the mechanism has under these names, in double precision.
    pub parameters: BTreeMap<String, Tensor>,
    /// What became of each head, as [`learn`] says it.
    pub bits: Vec<Vec<Bit>>,
}

/// One sequence that hashes are learned from.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sample {
    /// Centred kernel values of each token, `[token, anchor]`.
    pub kernels: Vec<Vec<f64>>,
    /// The entries of each row of `S` that are not zero.
    pub targets: Vec<Vec<(usize, f64)>>,
}

pub(super) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

impl Sample {
    fn tokens(&self) -> usize {
        self.kernels.len()
    }

    pub(super) fn projected(&self, hash: &[f64]) -> Vec<f64> {
        self.kernels.iter().map(|row| dot(row, hash)).collect()
    }

    pub(super) fn signs(&self, hash: &[f64]) -> Vec<f64> {
        let sign = |x: f64| if x < 0.0 { -1.0 } else { 1.0 };
        self.projected(hash).into_iter().map(sign).collect()
    }
}

/// What is left of `β S` behind some bits.
pub(super) struct Residual<'a> {
    sample: &'a Sample,
    bits: f64,
    codes: Vec<Vec<f64>>,
    /// `‖R‖²`.
    squares: f64,
}

impl<'a> Residual<'a> {
    pub(super) fn new(sample: &'a Sample, bits: usize) -> Self {
        let bits = bits as f64;
        let entries = sample.targets.iter().flatten();
        Self {
            sample,
            bits,
            codes: Vec::new(),
            squares: entries.map(|(_, s)| (bits * s).powi(2)).sum(),
        }
    }

    /// What it is left of.
    pub(super) fn sample(&self) -> &'a Sample {
        self.sample
    }

    /// `‖R‖²`.
    pub(super) fn squares(&self) -> f64 {
        self.squares
    }

    /// `(R + Rᵀ) y`.
    pub(super) fn both_sides(&self, y: &[f64]) -> Vec<f64> {
        let mut product = vec![0.0; y.len()];
        for (i, row) in self.sample.targets.iter().enumerate() {
            for &(j, s) in row {
                let (Some(&from), Some(&to)) = (y.get(i), y.get(j)) else {
                    continue;
                };
                if let Some(at) = product.get_mut(i) {
                    *at += self.bits * s * to;
                }
                if let Some(at) = product.get_mut(j) {
                    *at += self.bits * s * from;
                }
            }
        }
        for code in &self.codes {
            let share = 2.0 * dot(code, y);
            for (at, entry) in product.iter_mut().zip(code) {
                *at -= share * entry;
            }
        }
        product
    }

    /// `yᵀ R y`.
    pub(super) fn agreement(&self, y: &[f64]) -> f64 {
        dot(&self.both_sides(y), y) / 2.0
    }

    /// `1 / n β`.
    pub(super) fn scale(&self) -> f64 {
        1.0 / (self.bits * self.sample.tokens().max(1) as f64)
    }

    /// The gradient of the smooth objective.
    fn gradient(&self, hash: &[f64]) -> Vec<f64> {
        let logistic: Vec<f64> = self
            .sample
            .projected(hash)
            .into_iter()
            .map(sigmoid)
            .collect();
        let y: Vec<f64> = logistic.iter().map(|s| 2.0 * s - 1.0).collect();
        let mut gradient = vec![0.0; hash.len()];
        let sides = self.both_sides(&y);
        for ((row, s), side) in self.sample.kernels.iter().zip(&logistic).zip(sides) {
            let slope = -self.scale() * side * 2.0 * s * (1.0 - s);
            for (at, kernel) in gradient.iter_mut().zip(row) {
                *at += slope * kernel;
            }
        }
        gradient
    }

    fn take(&mut self, code: Vec<f64>) {
        let tokens = code.len() as f64;
        self.squares += tokens * tokens - 2.0 * self.agreement(&code);
        self.codes.push(code);
    }
}

pub(super) fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// Learns one head's hashes from `start`, one row of as many numbers as kernel values for each bit; gives them
/// and what became of each bit, of all together, or of each and then of all.
pub fn learn(samples: &[Sample], start: &[Vec<f64>], fit: &Fit) -> (Vec<Vec<f64>>, Vec<Bit>) {
    match fit.search {
        Search::BitByBit => bit_by_bit(samples, start, fit),
        Search::Joint => {
            let mut start = start.to_vec();
            if fit.initial == Initial::Eigenvectors {
                let whole: Vec<Residual<'_>> = samples
                    .iter()
                    .map(|sample| Residual::new(sample, start.len()))
                    .collect();
                let found = leading(&whole, start.len());
                for (hash, found) in start.iter_mut().zip(found) {
                    *hash = found;
                }
            }
            let (hashes, all) = joint::learn(samples, &start, fit);
            (hashes, vec![all])
        }
        Search::Refined => {
            let (hashes, mut bits) = bit_by_bit(samples, start, fit);
            let (hashes, all) = joint::learn(samples, &hashes, fit);
            bits.push(all);
            (hashes, bits)
        }
    }
}

fn bit_by_bit(samples: &[Sample], start: &[Vec<f64>], fit: &Fit) -> (Vec<Vec<f64>>, Vec<Bit>) {
    let each = 1.0 / samples.len().max(1) as f64;
    let mut left: Vec<Residual<'_>> = samples
        .iter()
        .map(|sample| Residual::new(sample, start.len()))
        .collect();
    let (mut hashes, mut bits) = (Vec::new(), Vec::new());
    for first in start {
        let objective = |left: &[Residual<'_>], hash: &[f64]| -> f64 {
            let one =
                |left: &Residual<'_>| -left.scale() * left.agreement(&left.sample.signs(hash));
            each * left.iter().map(one).sum::<f64>()
        };
        let eigenvector = match fit.initial {
            Initial::Start => None,
            Initial::Eigenvectors => leading(&left, 1).pop(),
        };
        let first = eigenvector.as_ref().unwrap_or(first);
        let mut hash = first.clone();
        let mut velocity = vec![0.0; hash.len()];
        for _ in 0..fit.iterations {
            let mut gradient = vec![0.0; hash.len()];
            for left in &left {
                for (sum, one) in gradient.iter_mut().zip(left.gradient(&hash)) {
                    *sum += each * one;
                }
            }
            for ((at, velocity), slope) in hash.iter_mut().zip(&mut velocity).zip(gradient) {
                *velocity = fit.momentum * *velocity + slope;
                *at -= fit.rate * (slope + fit.momentum * *velocity);
            }
        }
        let (before, found) = (objective(&left, first), objective(&left, &hash));
        let accepted = found < before;
        if !accepted {
            hash.clone_from(first);
        }
        for left in &mut left {
            left.take(left.sample.signs(&hash));
        }
        bits.push(Bit {
            before,
            after: if accepted { found } else { before },
            accepted,
            residual: left.iter().map(|left| left.squares).sum(),
        });
        hashes.push(hash);
    }
    (hashes, bits)
}

/// `S` of the unit vectors of a sequence: `+1` for the `top` tokens that each is most like, itself among
/// them, and `−1` for as many that it is least like.
fn signs_of_map(units: &[Vec<f64>], top: usize) -> Vec<Vec<(usize, f64)>> {
    let top = top.min(units.len() / 2);
    let row = |unit: &Vec<f64>| {
        let scores: Vec<f64> = units.iter().map(|other| dot(unit, other)).collect();
        let score = |token: usize| scores.get(token).copied().unwrap_or(f64::NAN);
        let mut order: Vec<usize> = (0..units.len()).collect();
        order.sort_by(|&a, &b| score(b).total_cmp(&score(a)));
        let like = order.iter().take(top).map(|&token| (token, 1.0));
        let unlike = order.iter().rev().take(top).map(|&token| (token, -1.0));
        like.chain(unlike).collect()
    };
    units.iter().map(row).collect()
}

fn squared_distance(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum()
}

impl EcoformerSpec {
    /// Learns hashes for queries `[batch, heads, length, head_width]` as the attention has them (normalised
    /// and rotated where it does so), of which `keep` `[batch, length]` says what is no pad. The parameters
    /// take the place of those at the mechanism.
    ///
    /// Takes `length²` products for each head of each sequence, and memory linear in the length.
    ///
    /// # Errors
    /// When there is no token, a query is no number, bits or anchors are none or too many, a choice of `fit` is
    /// out of range, or `keep` or `start` has another size.
    pub fn fit(&self, queries: &Tensor, keep: Option<&Tensor>, fit: &Fit) -> Result<Fitted> {
        let (batch, heads, length, width) = tensor(queries.dims4())?;
        let (anchors, bits) = (self.anchors, self.bits);
        bounded("bits", bits, 1..=MAX_BITS)?;
        bounded("anchors", anchors, 1..=super::MAX_ANCHORS)?;
        fit.validate()?;
        if let Some(keep) = keep.filter(|keep| keep.dims() != [batch, length]) {
            let expected = format!("{:?}, as the queries", [batch, length]);
            return Err(Error::spec("shape of keep", keep.dims(), expected));
        }
        let mut random = ChaCha8Rng::seed_from_u64(fit.seed);
        let start = self.start(heads, fit, &mut random)?;
        let keep = match keep {
            None => vec![vec![1; length]; batch],
            Some(keep) => tensor(keep.to_vec2::<u8>())?,
        };
        let flat = tensor(tensor(queries.detach().to_dtype(DType::F64))?.flatten_all())?;
        let flat = tensor(flat.to_vec1::<f64>())?;
        let kept = keep
            .iter()
            .flat_map(|kept| std::iter::repeat_n(kept, heads));
        let each = flat.chunks_exact(width.max(1)).zip(kept.flatten());
        let real = each.filter(|(_, keep)| **keep == 1);
        let mut entries = real.flat_map(|(row, _)| row);
        if let Some(query) = entries.find(|query| !query.is_finite()) {
            let name = "a query that hashes are learned from";
            return Err(Error::spec(name, query, "a finite number"));
        }
        let rows: Vec<Vec<f64>> = flat.chunks_exact(width.max(1)).map(unit).collect();
        // Real tokens of each head of each sequence.
        let tokens = |sequence: usize, head: usize| -> Vec<Vec<f64>> {
            let first = (sequence * heads + head) * length;
            let kept = keep.get(sequence).map_or(&[][..], Vec::as_slice);
            let here = rows.iter().skip(first).take(length).zip(kept);
            let real = here.filter(|(_, keep)| **keep == 1);
            real.map(|(row, _)| row.clone()).collect()
        };
        let most = tokens(0, 0).len();
        if most == 0 {
            return Err(Error::spec(
                "first sequence that hashes are learned from",
                "nothing but pads",
                "one with tokens, which become anchors",
            ));
        }
        let mut chosen: Vec<usize> = (0..most).collect();
        chosen.shuffle(&mut random);
        let chosen: Vec<usize> = (0..anchors)
            .filter_map(|anchor| chosen.get(anchor % most).copied())
            .collect();

        let mut all = Parts::default();
        let mut became = Vec::new();
        for (head, start) in start.iter().enumerate() {
            let first = tokens(0, head);
            let anchors: Vec<Vec<f64>> = chosen
                .iter()
                .filter_map(|&token| first.get(token).cloned())
                .collect();
            let sequences: Vec<Vec<Vec<f64>>> = (0..batch)
                .map(|sequence| tokens(sequence, head))
                .filter(|tokens| !tokens.is_empty())
                .collect();
            let (kernels, means, bandwidth) = self.kernels(&sequences, &anchors);
            let samples: Vec<Sample> = sequences
                .iter()
                .zip(kernels)
                .map(|(units, kernels)| Sample {
                    targets: signs_of_map(units, fit.top),
                    kernels,
                })
                .collect();
            let (hashes, bits) = learn(&samples, start, fit);
            all.anchors.extend(anchors.concat());
            all.means.extend(means);
            all.hashes.extend(hashes.concat());
            all.bandwidths.push(bandwidth);
            became.push(bits);
        }
        let made = |values: Vec<f64>, shape: &[usize]| {
            tensor(Tensor::from_vec(values, shape, &Device::Cpu))
        };
        let mut parameters = BTreeMap::from([
            (
                "anchors".to_owned(),
                made(all.anchors, &[heads, anchors, width])?,
            ),
            ("means".to_owned(), made(all.means, &[heads, anchors])?),
            (
                "hashes".to_owned(),
                made(all.hashes, &[heads, bits, anchors])?,
            ),
        ]);
        if self.bandwidth == Bandwidth::Fitted {
            let bandwidths = made(all.bandwidths, &[heads])?;
            parameters.insert("bandwidths".to_owned(), bandwidths);
        }
        Ok(Fitted {
            parameters,
            bits: became,
        })
    }

    /// Where the hashes of each head start, a row for each bit.
    fn start(
        &self,
        heads: usize,
        fit: &Fit,
        random: &mut ChaCha8Rng,
    ) -> Result<Vec<Vec<Vec<f64>>>> {
        let count = heads * self.bits * self.anchors;
        let values = match &fit.start {
            None => (0..count).map(|_| normal(random)).collect(),
            Some(start) if start.len() == count => start.clone(),
            Some(start) => {
                let expected = format!("{count}, for {heads} heads");
                return Err(Error::spec(
                    "number of hashes to start from",
                    start.len(),
                    expected,
                ));
            }
        };
        let rows: Vec<Vec<f64>> = values
            .chunks_exact(self.anchors)
            .map(<[f64]>::to_vec)
            .collect();
        Ok(rows
            .chunks_exact(self.bits)
            .map(<[Vec<f64>]>::to_vec)
            .collect())
    }

    /// Centred kernel values of sequences `[token, anchor]`, their means, and the mean squared distance.
    fn kernels(
        &self,
        sequences: &[Vec<Vec<f64>>],
        anchors: &[Vec<f64>],
    ) -> (Vec<Vec<Vec<f64>>>, Vec<f64>, f64) {
        let distances: Vec<Vec<Vec<f64>>> = sequences
            .iter()
            .map(|tokens| {
                let to = |token: &Vec<f64>| {
                    anchors
                        .iter()
                        .map(|anchor| squared_distance(token, anchor))
                        .collect()
                };
                tokens.iter().map(to).collect()
            })
            .collect();
        let mean = |distances: &[Vec<f64>]| {
            let count = distances.iter().map(Vec::len).sum::<usize>().max(1);
            distances.iter().flatten().sum::<f64>() / count as f64
        };
        let bandwidth = mean(&distances.concat());
        let mut kernels: Vec<Vec<Vec<f64>>> = distances
            .iter()
            .map(|distances| {
                let width = match self.bandwidth {
                    Bandwidth::Sample => mean(distances),
                    Bandwidth::Fitted => bandwidth,
                };
                let kernel = |d: &f64| (-d / (2.0 * width.max(super::LEAST))).exp();
                let row = |row: &Vec<f64>| row.iter().map(kernel).collect();
                distances.iter().map(row).collect()
            })
            .collect();
        let count = kernels.iter().map(Vec::len).sum::<usize>().max(1) as f64;
        let mut means = vec![0.0; anchors.len()];
        for row in kernels.iter().flatten() {
            for (mean, kernel) in means.iter_mut().zip(row) {
                *mean += kernel / count;
            }
        }
        for row in kernels.iter_mut().flatten() {
            for (kernel, mean) in row.iter_mut().zip(&means) {
                *kernel -= mean;
            }
        }
        (kernels, means, bandwidth)
    }
}

/// The numbers of all heads, one after the other.
#[derive(Default)]
struct Parts {
    anchors: Vec<f64>,
    means: Vec<f64>,
    hashes: Vec<f64>,
    bandwidths: Vec<f64>,
}

/// At unit length; nothing stays nothing.
fn unit(row: &[f64]) -> Vec<f64> {
    let length = dot(row, row).sqrt().max(super::LEAST);
    row.iter().map(|x| x / length).collect()
}

fn normal(random: &mut ChaCha8Rng) -> f64 {
    let radius = (-2.0 * (1.0 - random.random::<f64>()).ln()).sqrt();
    radius * (std::f64::consts::TAU * random.random::<f64>()).cos()
}
