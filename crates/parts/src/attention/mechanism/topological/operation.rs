//! Masked linear attention on a tree that is cut: the pieces directly, cuts by the levels of their sides.

use lapidary_factor::trees::{IntegratorTree, Side, hankel, hankel_gradient};
use lapidary_kernels::ByHand;
use rayon::prelude::*;
use std::sync::Arc;

/// The number of different distances between vertices one or more whole steps apart, 0 among them.
pub(super) fn distances(cut: &IntegratorTree) -> usize {
    let within = cut.leaves().iter().flat_map(|leaf| &leaf.distances);
    let across = cut.splits().iter().map(|split| farthest(&split.sides));
    let within = within.fold(0, |most, distance| most.max(*distance as usize));
    across.fold(within, usize::max) + 1
}

/// The distance between the outermost levels of two sides.
fn farthest(sides: &[Side; 2]) -> usize {
    let last = |side: &Side| {
        side.distances
            .last()
            .map_or(0, |distance| *distance as usize)
    };
    last(&sides[0]) + last(&sides[1])
}

/// Multiplications and additions of one head: products of levels as if each were laid out or
/// transformed, whichever is less.
pub(super) fn operations(cut: &IntegratorTree, features: usize, width: usize) -> u64 {
    let mut all = 0;
    for leaf in cut.leaves() {
        let pairs = leaf.vertices.len() * leaf.vertices.len();
        all += pairs * (2 * (features + width) + 1);
    }
    for split in cut.splits() {
        let vertices: usize = split.sides.iter().map(|side| side.vertices.len()).sum();
        let [left, right] = [0, 1].map(|side| split.sides[side].distances.len());
        let size = (farthest(&split.sides) + 1).next_power_of_two();
        let transforms = 2 * (5 * size * size.ilog2().max(1) as usize + 3 * size);
        // Collecting and reading, then both products; the pivot's own once.
        all += vertices * 4 * features * width;
        all += features * width * transforms.min(2 * 2 * left * right);
        all += 2 * (features + width) + 1;
    }
    all as u64
}

/// `Σ_j M_ij (q_i · k_j) v_j` for every head of a batch, where `M_ij` is the number of the distance.
///
/// Inputs: `q` and `k` `[batch, heads, length, features]`, `v` `[batch, heads, length, width]`, `M` by distance
/// `[heads, distances]`.
pub(super) struct Masked {
    pub cut: Arc<IntegratorTree>,
    pub heads: usize,
    pub features: usize,
    pub width: usize,
    pub distances: usize,
}

/// Rows of numbers, `[length, width]`.
#[derive(Clone, Copy)]
struct Rows<'a> {
    all: &'a [f64],
    width: usize,
}

impl Rows<'_> {
    fn row(&self, at: usize) -> &[f64] {
        &self.all[at * self.width..][..self.width]
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(sum: &mut [f64], factor: f64, row: &[f64]) {
    for (sum, entry) in sum.iter_mut().zip(row) {
        *sum += factor * entry;
    }
}

/// `Σ_{j in level} a_j ⊗ b_j`, `[levels, a.width · b.width]`.
fn collected(side: &Side, a: Rows<'_>, b: Rows<'_>) -> Vec<f64> {
    let size = a.width * b.width;
    let mut sums = vec![0.0; side.distances.len() * size];
    for (&vertex, level) in side.vertices.iter().zip(&side.levels) {
        let sums = &mut sums[level * size..][..size];
        for (sums, factor) in sums.chunks_mut(b.width).zip(a.row(vertex)) {
            add(sums, *factor, b.row(vertex));
        }
    }
    sums
}

fn places(side: &Side) -> Vec<usize> {
    side.distances
        .iter()
        .map(|distance| *distance as usize)
        .collect()
}

/// `Σ_j M_ij (a_i · b_j) c_j`, `[length, c.width]`.
fn product(cut: &IntegratorTree, mask: &[f64], a: Rows<'_>, b: Rows<'_>, c: Rows<'_>) -> Vec<f64> {
    let mut sum = vec![0.0; cut.vertices() * c.width];
    for leaf in cut.leaves() {
        let count = leaf.vertices.len();
        for (&i, distances) in leaf.vertices.iter().zip(leaf.distances.chunks(count)) {
            let sum = &mut sum[i * c.width..][..c.width];
            for (&j, distance) in leaf.vertices.iter().zip(distances) {
                add(
                    sum,
                    mask[*distance as usize] * dot(a.row(i), b.row(j)),
                    c.row(j),
                );
            }
        }
    }
    let size = b.width * c.width;
    for split in cut.splits() {
        for [to, from] in [[0, 1], [1, 0]].map(|sides| sides.map(|side| &split.sides[side])) {
            let given = collected(from, b, c);
            let given = hankel(mask, &places(to), &places(from), &given, size);
            for (&vertex, level) in to.vertices.iter().zip(&to.levels) {
                let sum = &mut sum[vertex * c.width..][..c.width];
                let given = &given[level * size..][..size];
                for (row, factor) in given.chunks(c.width).zip(a.row(vertex)) {
                    add(sum, *factor, row);
                }
            }
        }
        // Its own is in both sides' pieces.
        let p = split.pivot;
        let own = mask[0] * dot(a.row(p), b.row(p));
        add(&mut sum[p * c.width..][..c.width], -own, c.row(p));
    }
    sum
}

/// `Σ_{ij: dist(i, j) = s} (a_i · b_j) (g_i · c_j)` for every distance `s`.
fn by_distance(cut: &IntegratorTree, distances: usize, [a, b, c, g]: [Rows<'_>; 4]) -> Vec<f64> {
    let mut found = vec![0.0; distances];
    for leaf in cut.leaves() {
        let count = leaf.vertices.len();
        for (&i, distances) in leaf.vertices.iter().zip(leaf.distances.chunks(count)) {
            for (&j, distance) in leaf.vertices.iter().zip(distances) {
                found[*distance as usize] += dot(a.row(i), b.row(j)) * dot(g.row(i), c.row(j));
            }
        }
    }
    let size = b.width * c.width;
    for split in cut.splits() {
        for [to, from] in [[0, 1], [1, 0]].map(|sides| sides.map(|side| &split.sides[side])) {
            let (asked, given) = (collected(to, a, g), collected(from, b, c));
            let (rows, columns) = (places(to), places(from));
            hankel_gradient(&mut found, (&rows, &asked), (&columns, &given), size);
        }
        let p = split.pivot;
        found[0] -= dot(a.row(p), b.row(p)) * dot(g.row(p), c.row(p));
    }
    found
}

impl Masked {
    /// The rows of one head in a tensor of all.
    fn of<'a>(&self, all: &'a [f64], head: usize, width: usize) -> Rows<'a> {
        let size = self.cut.vertices() * width;
        Rows {
            all: &all[head * size..][..size],
            width,
        }
    }

    fn mask<'a>(&self, all: &'a [f64], head: usize) -> &'a [f64] {
        &all[head % self.heads * self.distances..][..self.distances]
    }

    /// Heads of all sequences.
    fn count(&self, q: &[f64]) -> usize {
        q.len() / (self.cut.vertices() * self.features).max(1)
    }
}

impl ByHand for Masked {
    fn name(&self) -> &'static str {
        "attention on a tree"
    }

    fn forward(&self, inputs: &[&[f64]]) -> Vec<f64> {
        let [q, k, v, mask] = [0, 1, 2, 3].map(|input| inputs[input]);
        let each = (0..self.count(q)).into_par_iter().map(|head| {
            let [q, k] = [q, k].map(|x| self.of(x, head, self.features));
            product(
                &self.cut,
                self.mask(mask, head),
                q,
                k,
                self.of(v, head, self.width),
            )
        });
        each.collect::<Vec<_>>().concat()
    }

    fn backward(&self, inputs: &[&[f64]], gradient: &[f64]) -> Vec<Vec<f64>> {
        let [q, k, v, mask] = [0, 1, 2, 3].map(|input| inputs[input]);
        let each = (0..self.count(q)).into_par_iter().map(|head| {
            let [q, k] = [q, k].map(|x| self.of(x, head, self.features));
            let [v, g] = [v, gradient].map(|x| self.of(x, head, self.width));
            let mask = self.mask(mask, head);
            // M is symmetric, so that all three are products of the same kind.
            [
                product(&self.cut, mask, g, v, k),
                product(&self.cut, mask, v, g, q),
                product(&self.cut, mask, k, q, g),
                by_distance(&self.cut, self.distances, [q, k, v, g]),
            ]
        });
        let each: Vec<[Vec<f64>; 4]> = each.collect();
        let joined = |part: usize| -> Vec<f64> {
            each.iter()
                .flat_map(|parts| parts[part].iter().copied())
                .collect()
        };
        let mut of_mask = vec![0.0; mask.len()];
        for (head, parts) in each.iter().enumerate() {
            let start = head % self.heads * self.distances;
            add(&mut of_mask[start..start + self.distances], 1.0, &parts[3]);
        }
        vec![joined(0), joined(1), joined(2), of_mask]
    }
}
