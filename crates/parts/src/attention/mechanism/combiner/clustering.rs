//! Tokens divided by what they say: clusters around centroids, as in the Routing Transformer (Roy, Saffar,
//! Vaswani, Grangier, Efficient Content-Based Sparse Attention with Routing Transformers, 2020, arXiv
//! 2003.05997), which Combiner completes.
//!
//! ```text
//! c(x) = argmax_c x · μ_c / ‖μ_c‖       the same μ for queries and keys of a head
//! Ω⁰_i = { j : c(k_j) = c(q_i) },   Ω^r_i = { j : c(k_j) = r }  for r ≠ c(q_i),   j ≤ i where causal
//! ```
//!
//! A length common to all of its candidates decides nothing, so that `x` is as good as normalised. No gradient of
//! what attention gives reaches the centroids: where tokens lie hangs on themselves alone, so that no token hears of a
//! later one. They start at random and are found by spherical k-means over queries and keys, outside back-propagation
//! ([`CombinerSpec::fit`](super::CombinerSpec)), or in training: with a `pull` `p`, what is differentiated has
//!
//! ```text
//! p Σ_heads mean_x (1 − x̂ · μ_{c(x)} / ‖μ_{c(x)}‖),   x̂ = x / ‖x‖, of queries and keys that are no pads
//! ```
//!
//! added, for the centroids alone: the loss of spherical k-means, whose descent is what the paper's running means do.
//!
//! While decoding, centroids are fixed, and a key's cluster is found once, in the step that brings it.

use super::divisions::Division;
use super::{ALL, CAUSAL, CombinerForm, CombinerSpec};
use crate::attention::mechanism::Heads;
use crate::attention::mechanism::blocks::Blocks;
use crate::attention::mechanism::sequences::{At, Sequence, Sequences};
use crate::attention::mechanism::spans::Making;
use crate::error::tensor;
use crate::parameters::{Init, Parameters};
use crate::{Error, Result};
use lapidary_kernels::{D, DType, Device, Tensor, matmul};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use std::collections::{BTreeMap, BTreeSet};

/// Added to squared lengths, so that a vector without any has a direction.
const TINY: f64 = 1e-12;

/// The clusters of each head.
#[derive(Debug)]
pub(super) struct Clustering {
    /// `μ` `[heads, clusters, head_width]`, of any length.
    centroids: Tensor,
    count: usize,
}

/// The clusters that rows of queries and keys lie in.
#[derive(Debug)]
pub(super) struct Found {
    /// `[batch · heads, query]`.
    pub(super) queries: Vec<u32>,
    /// `[batch · heads, key]`.
    pub(super) keys: Vec<u32>,
    /// How many rows had to be looked at.
    pub(super) rows: usize,
}

/// Rows at unit length.
fn directions(x: &Tensor) -> Result<Tensor> {
    let squares = tensor(tensor(x.sqr())?.sum_keepdim(D::Minus1))?;
    let lengths = tensor(tensor(squares + TINY)?.sqrt())?;
    tensor(x.broadcast_div(&lengths))
}

impl Clustering {
    pub(super) fn new(
        count: usize,
        heads: &Heads,
        parameters: &mut Parameters<'_>,
    ) -> Result<Self> {
        let shape = [heads.heads, count, heads.head_width];
        let start = Init::Normal { deviation: 1.0 };
        Ok(Self {
            centroids: parameters.tensor("centroids", &shape, start)?,
            count,
        })
    }

    /// The cluster of every row of `x` `[batch, heads, length, head_width]`, the first where several are
    /// as near.
    pub(super) fn clusters(&self, x: &Tensor) -> Result<Vec<u32>> {
        let across = tensor(directions(&self.centroids.detach())?.transpose(1, 2))?;
        let scores = matmul(&x.detach(), &across)?;
        let nearest = tensor(tensor(scores.argmax(D::Minus1))?.flatten_all())?;
        tensor(nearest.to_vec1::<u32>())
    }

    /// Whether anything that is done to the centroids is differentiated.
    pub(super) fn is_trained(&self) -> bool {
        self.centroids.track_op()
    }

    /// `Σ_heads mean_x (1 − x̂ · μ_{c(x)} / ‖μ_{c(x)}‖)` over queries and keys `[batch, heads, length, head_width]` that
    /// `keep` `[batch, length]` says are no pads; differentiated in the centroids alone.
    pub(super) fn strayed(
        &self,
        tokens: [&Tensor; 2],
        found: &Found,
        keep: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (batch, heads, length, _) = tensor(tokens[0].dims4())?;
        let keep = match keep {
            None => vec![1; batch * length],
            Some(keep) => tensor(tensor(keep.flatten_all())?.to_vec1::<u8>())?,
        };
        let mut sums: Option<Tensor> = None;
        for (x, clusters) in tokens.into_iter().zip([&found.queries, &found.keys]) {
            let mut members = vec![0f64; clusters.len() * self.count];
            for (row, cluster) in clusters.iter().enumerate() {
                let token = row / (heads * length).max(1) * length + row % length.max(1);
                let at = row * self.count + *cluster as usize;
                if let Some(member) = members.get_mut(at).filter(|_| keep.get(token) == Some(&1)) {
                    *member = 1.0;
                }
            }
            let shape = (batch, heads, length, self.count);
            let members = tensor(Tensor::from_vec(members, shape, x.device()))?;
            let members = tensor(tensor(members.to_dtype(x.dtype()))?.transpose(2, 3))?;
            // Of each cluster of each head, [heads, clusters, head_width].
            let sum = tensor(matmul(&members, &directions(&x.detach())?)?.sum(0))?;
            sums = Some(match sums {
                None => sum,
                Some(others) => tensor(others + sum)?,
            });
        }
        let centroids = directions(&self.centroids)?;
        let likeness = match sums {
            None => tensor(centroids.zeros_like())?,
            Some(sums) => tensor(sums * centroids)?,
        };
        let rows = 2 * keep.iter().filter(|kept| **kept == 1).count().max(1);
        tensor(tensor(likeness.sum_all())?.affine(-1.0 / rows as f64, heads as f64))
    }

    /// Operations of so many rows.
    pub(super) fn operations(&self, rows: usize) -> u64 {
        let width = self.centroids.dims().last().copied().unwrap_or(0);
        (2 * rows * self.count * width) as u64
    }

    /// Who meets whom, and the summaries of clusters that they meet, where rows of queries and of keys
    /// lie in these clusters. Rows of summaries are counted on from those of keys.
    pub(super) fn divide(
        &self,
        sequences: &Sequences<'_>,
        found: &Found,
        causal: bool,
    ) -> (Division, Option<Making>) {
        let [batch, heads, _, keys] = sequences.sizes;
        let cluster = |of: &[u32], at: At| of.get(at.row).copied().unwrap_or(0) as usize;
        let all: Vec<Members<'_>> = sequences
            .iter()
            .map(|sequence| {
                let mut of_cluster = vec![Vec::new(); self.count];
                for token in 0..sequence.len() {
                    let members = of_cluster.get_mut(cluster(&found.keys, sequence.key(token)));
                    members.into_iter().for_each(|members| members.push(token));
                }
                let queries = sequence.queries().map(|token| {
                    let at = sequence.query(token);
                    (at, cluster(&found.queries, at))
                });
                Members {
                    queries: queries.collect(),
                    of_cluster,
                    sequence,
                    causal,
                }
            })
            .collect();
        let mut division = Division::default();
        let (mut own, mut others) = (Blocks::default(), Blocks::default());
        let (mut lists, mut row) = (Vec::new(), batch * heads * keys);
        for members in &all {
            members.direct(&mut own);
            let rows = members.summaries(&mut lists, &mut row);
            members.spans(&rows, &mut others, &mut division);
        }
        division
            .direct
            .push((own, if causal { CAUSAL } else { ALL }));
        division.spans.push((others, ALL));
        let making = (!lists.is_empty()).then(|| Making::beginnings(lists));
        (division, making)
    }
}

/// One head of a sequence in clusters.
struct Members<'a> {
    sequence: Sequence<'a>,
    /// Queries and their clusters.
    queries: Vec<(At, usize)>,
    /// The tokens whose keys are in each cluster, rising.
    of_cluster: Vec<Vec<usize>>,
    causal: bool,
}

impl Members<'_> {
    /// Other clusters than `own`, and how many of their tokens a query at `position` sees.
    fn others(&self, own: usize, position: usize) -> impl Iterator<Item = (usize, usize)> {
        let clusters = self.of_cluster.iter().enumerate();
        let others = clusters.filter(move |(cluster, _)| *cluster != own);
        others
            .map(move |(cluster, tokens)| {
                let seen = match self.causal {
                    true => tokens.partition_point(|token| *token <= position),
                    false => tokens.len(),
                };
                (cluster, seen)
            })
            .filter(|(_, seen)| *seen > 0)
    }

    /// Queries of a cluster with its keys.
    fn direct(&self, blocks: &mut Blocks) {
        for (cluster, tokens) in self.of_cluster.iter().enumerate() {
            let of = self.queries.iter().filter(|(_, own)| *own == cluster);
            let keys = tokens.iter().map(|token| self.sequence.key(*token));
            blocks.push(of.map(|(at, _)| *at), keys);
        }
    }

    /// Adds the lists of the summaries that are met, and says which row each has from `row` on.
    fn summaries(
        &self,
        lists: &mut Vec<(Vec<At>, Vec<usize>)>,
        row: &mut usize,
    ) -> BTreeMap<(usize, usize), usize> {
        let met = self.queries.iter();
        let met: BTreeSet<(usize, usize)> = met
            .flat_map(|(at, own)| self.others(*own, at.position))
            .collect();
        let mut rows = BTreeMap::new();
        for (cluster, tokens) in self.of_cluster.iter().enumerate() {
            let ends = met.range((cluster, 0)..(cluster + 1, 0));
            let ends: Vec<usize> = ends.map(|(_, seen)| seen - 1).collect();
            for end in &ends {
                rows.insert((cluster, end + 1), *row);
                *row += 1;
            }
            // What stands behind the last end is in no summary.
            if let Some(last) = ends.last() {
                let tokens = tokens.iter().take(last + 1);
                let keys = tokens.map(|token| self.sequence.key(*token)).collect();
                lists.push((keys, ends));
            }
        }
        rows
    }

    /// Every query with the summaries of other clusters.
    fn spans(
        &self,
        rows: &BTreeMap<(usize, usize), usize>,
        blocks: &mut Blocks,
        division: &mut Division,
    ) {
        for (query, own) in &self.queries {
            let mut met = Vec::new();
            for (cluster, seen) in self.others(*own, query.position) {
                let Some(&row) = rows.get(&(cluster, seen)) else {
                    continue;
                };
                let at = At { row, position: 0 };
                division.counts.push((at, seen));
                met.push(at);
            }
            blocks.push([*query], met);
        }
    }
}

/// How centroids are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fit {
    /// Most rounds of assigning and averaging.
    pub iterations: usize,
    /// Decides which tokens are centroids first.
    pub seed: u64,
}

impl Default for Fit {
    fn default() -> Self {
        Self {
            iterations: 50,
            seed: 0,
        }
    }
}

/// Centroids found from queries and keys.
#[derive(Clone, Debug)]
pub struct Fitted {
    /// What the mechanism has under these names, in double precision.
    pub parameters: BTreeMap<String, Tensor>,
    /// For each head, the mean cosine of tokens to their centroids in each round; it never falls.
    pub likeness: Vec<Vec<f64>>,
}

impl CombinerSpec {
    /// Finds the centroids of the routed form by spherical k-means over queries and keys
    /// `[batch, heads, length, head_width]` as the attention has them (normalised and rotated where it does
    /// so), of which `keep` `[batch, length]` says what is no pad. The parameters take the place of those at
    /// the mechanism.
    ///
    /// # Errors
    /// In another form, or when a head has fewer tokens than clusters.
    pub fn fit(&self, tokens: [&Tensor; 2], keep: Option<&Tensor>, fit: &Fit) -> Result<Fitted> {
        let CombinerForm::Routed { clusters } = self.form else {
            let expected = "routed, the form that has centroids";
            return Err(Error::spec(
                "form to fit",
                format!("{:?}", self.form),
                expected,
            ));
        };
        let (batch, heads, length, width) = tensor(tokens[0].dims4())?;
        let keep = match keep {
            None => vec![vec![1; length]; batch],
            Some(keep) => tensor(keep.to_vec2::<u8>())?,
        };
        let mut of_heads = vec![Vec::new(); heads];
        for x in tokens {
            let flat = tensor(tensor(x.detach().to_dtype(DType::F64))?.flatten_all())?;
            let flat = tensor(flat.to_vec1::<f64>())?;
            for (at, row) in flat.chunks_exact(width.max(1)).enumerate() {
                let (sequence, token) = (at / (heads * length), at % length);
                let real = keep.get(sequence).and_then(|keep| keep.get(token)) == Some(&1);
                if let Some(head) = of_heads.get_mut(at / length % heads).filter(|_| real) {
                    head.push(unit(row));
                }
            }
        }
        let mut generator = ChaCha8Rng::seed_from_u64(fit.seed);
        let (mut centroids, mut likeness) = (Vec::new(), Vec::new());
        for rows in &of_heads {
            if rows.len() < clusters {
                let expected = format!("at least {clusters}, as many as clusters");
                return Err(Error::spec(
                    "queries and keys of a head",
                    rows.len(),
                    expected,
                ));
            }
            let mut order: Vec<usize> = (0..rows.len()).collect();
            order.shuffle(&mut generator);
            let first = order.into_iter().take(clusters);
            let first = first.filter_map(|row| rows.get(row).cloned()).collect();
            let (found, rounds) = spherical(rows, first, fit.iterations);
            centroids.extend(found.concat());
            likeness.push(rounds);
        }
        let shape = [heads, clusters, width];
        let centroids = tensor(Tensor::from_vec(centroids, &shape, &Device::Cpu))?;
        Ok(Fitted {
            parameters: BTreeMap::from([("centroids".to_owned(), centroids)]),
            likeness,
        })
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// At unit length; nothing stays nothing.
fn unit(row: &[f64]) -> Vec<f64> {
    let length = (dot(row, row) + TINY).sqrt();
    row.iter().map(|x| x / length).collect()
}

/// The centroid that a row is most like, and how much.
fn nearest(row: &[f64], centroids: &[Vec<f64>]) -> (usize, f64) {
    let each = centroids.iter().map(|centroid| dot(row, centroid));
    let better = |best: (usize, f64), (at, like): (usize, f64)| match like > best.1 {
        true => (at, like),
        false => best,
    };
    each.enumerate().fold((0, f64::NEG_INFINITY), better)
}

/// Spherical k-means from some centroids on: these, and the mean cosine of each round. A centroid that
/// nobody is near takes the place of the row that is least like its own.
fn spherical(
    rows: &[Vec<f64>],
    mut centroids: Vec<Vec<f64>>,
    iterations: usize,
) -> (Vec<Vec<f64>>, Vec<f64>) {
    let (mut before, mut rounds) = (Vec::new(), Vec::new());
    for _ in 0..iterations {
        let found: Vec<(usize, f64)> = rows.iter().map(|row| nearest(row, &centroids)).collect();
        rounds.push(found.iter().map(|(_, like)| like).sum::<f64>() / rows.len().max(1) as f64);
        let here: Vec<usize> = found.iter().map(|(cluster, _)| *cluster).collect();
        if here == before {
            break;
        }
        let mut lonely: Vec<usize> = (0..rows.len()).collect();
        let likeness = |row: &usize| found.get(*row).map_or(0.0, |(_, like)| *like);
        lonely.sort_by(|a, b| likeness(a).total_cmp(&likeness(b)));
        let mut lonely = lonely.into_iter();
        for (cluster, centroid) in centroids.iter_mut().enumerate() {
            let members = rows.iter().zip(&here).filter(|(_, own)| **own == cluster);
            let mut sum = vec![0.0; centroid.len()];
            let mut count = 0;
            for (row, _) in members {
                count += 1;
                sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
            }
            *centroid = match count {
                0 => match lonely.next().and_then(|row| rows.get(row)) {
                    Some(row) => row.clone(),
                    None => continue,
                },
                _ => unit(&sum),
            };
        }
        before = here;
    }
    (centroids, rounds)
}
