//! Which tokens of both sides of a cut meet pair by pair, and which by way of sums.
//!
//! A block of pairs has distances `x + y`. Where a mask is near a polynomial of low degree between its nearest and its
//! farthest pair, alone or beside an exponential `e^{ct}`, it is read off a few distances of either side:
//!
//! ```text
//! f(x_i + y_j) ≈ Σ_kl U_ik f(ξ_k + η_l) V_jl,   U_ik = e^{c (x_i − ξ_k)} L_k(x_i)
//! ```
//!
//! with Lagrange's `L` on whole numbers `ξ` near Chebyshev's nodes, so that no value is needed that is not in the table.
//! A side of few distances has them all for nodes, and nothing is approximated. What is to be changed about the mask,
//! its derivatives, has to be as near a polynomial of the degree as it is.

use super::pairs::{TreePairs, TreePiece, TreeSide};
use crate::simd::Real;
use std::collections::HashMap;
use std::ops::Range;

/// Numbers of nodes that are tried.
const NODES: [usize; 10] = [1, 2, 3, 4, 6, 8, 11, 16, 22, 30];
/// Most distances that are nodes all.
const MOST_LEVELS: usize = 48;
/// Tokens on either side of a block from which on it may be divided.
const DIVISIBLE: usize = 256;
/// Largest exponent of what stands beside a polynomial.
const STEEPEST: f64 = 40.0;

/// Tokens that stand for some of the nodes of their side.
pub(super) struct Segment<T> {
    /// Places in the block's part of the side.
    pub(super) tokens: Range<usize>,
    pub(super) nodes: Range<usize>,
    /// `[tokens, nodes]`; one, of one node, where there are none.
    pub(super) weights: Vec<T>,
}

/// How tokens of one side of a block come to nodes.
pub(super) struct Basis<T> {
    /// Distances of the nodes.
    pub(super) nodes: Vec<u32>,
    pub(super) segments: Vec<Segment<T>>,
}

/// Both sides' nodes.
pub(super) struct Factored<T> {
    pub(super) bases: [Basis<T>; 2],
}

/// Some tokens of one side of a cut with some of the other.
pub(super) struct Block<T> {
    pub(super) cut: usize,
    pub(super) sides: [Range<usize>; 2],
    /// Where pairs are not laid out.
    pub(super) factored: Option<Factored<T>>,
}

/// What is done at once.
pub(super) enum Work<T> {
    /// A piece that is a leaf.
    Leaf(usize),
    Block(Block<T>),
}

/// Work of one mask, and operations of each.
pub(super) struct Plan<T> {
    pub(super) work: Vec<(Work<T>, u64)>,
}

/// Multiplications and additions of pairs laid out.
pub(super) fn laid_out(pairs: usize, [features, width]: [usize; 2]) -> u64 {
    (pairs * (2 * (features + width) + 1)) as u64
}

/// Tables that blocks are read off: that of the mask, and of what it may be changed by.
pub(super) struct Tables<'a> {
    pub(super) mask: &'a [f64],
    pub(super) directions: Vec<&'a [f64]>,
    /// How far from a table, as a part of its largest number, a polynomial may be.
    pub(super) tolerance: f64,
}

impl<T: Real> Plan<T> {
    /// For features of queries and keys, and values with the weights' own sums beside them.
    pub(super) fn new(pairs: &TreePairs, tables: &Tables<'_>, sizes: [usize; 2]) -> Self {
        let mut planner = Planner {
            tables,
            sizes,
            fits: HashMap::new(),
        };
        let mut work = Vec::new();
        for (at, piece) in pairs.pieces().iter().enumerate() {
            match piece {
                TreePiece::Leaf { tokens, .. } => {
                    let operations = laid_out(tokens.len() * tokens.len(), sizes);
                    work.push((Work::Leaf(at), operations));
                }
                TreePiece::Cut(sides) => {
                    let whole = [0, 1].map(|side: usize| 0..sides[side].tokens.len());
                    let parts = planner.divided(sides, whole);
                    for (sides, kinds, operations) in parts {
                        let block = planner.block(at, pairs, sides, kinds);
                        work.push((Work::Block(block), operations));
                    }
                }
            }
        }
        Self { work }
    }

    /// Operations of all.
    pub(super) fn operations(&self) -> u64 {
        self.work.iter().map(|(_, operations)| operations).sum()
    }

    /// The work in `count` shares of about as many operations each, whichever come first in order.
    pub(super) fn shares(&self, count: usize) -> Vec<Vec<&Work<T>>> {
        let mut order: Vec<usize> = (0..self.work.len()).collect();
        order.sort_by_key(|at| std::cmp::Reverse(self.work[*at].1));
        let mut shares = vec![(0, Vec::new()); count.max(1)];
        for at in order {
            let least = (0..shares.len()).min_by_key(|share| shares[*share].0);
            let share = &mut shares[least.unwrap_or(0)];
            share.0 += self.work[at].1;
            share.1.push(at);
        }
        shares
            .into_iter()
            .map(|(_, mut places)| {
                places.sort_unstable();
                places.into_iter().map(|at| &self.work[at].0).collect()
            })
            .collect()
    }
}

/// What the nodes of a side are.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    /// All its distances.
    Levels,
    /// So many, beside `e^{ct}`.
    Nodes(usize, f64),
}

/// Parts of both sides, the kinds of their nodes where they have any, operations.
type Part = ([Range<usize>; 2], Option<[Kind; 2]>, u64);

struct Planner<'a> {
    tables: &'a Tables<'a>,
    /// Features, and values with the weights' own sums.
    sizes: [usize; 2],
    /// By the nearest and farthest distance of a block.
    fits: HashMap<[usize; 2], Fit>,
}

/// Numbers of nodes that are too few, and one that is enough with its exponent.
#[derive(Clone, Copy, Default)]
struct Fit {
    tried: usize,
    found: Option<(usize, f64)>,
}

impl Planner<'_> {
    /// The cheapest way to have all pairs of two sides meet.
    fn divided(&mut self, sides: &[TreeSide; 2], ranges: [Range<usize>; 2]) -> Vec<Part> {
        let [x, y] = [0, 1].map(|side| &sides[side].distances[ranges[side].clone()]);
        let ([Some(x0), Some(y0)], [Some(x1), Some(y1)]) =
            ([x.first(), y.first()], [x.last(), y.last()])
        else {
            return Vec::new();
        };
        let [near, far] = [x0 + y0, x1 + y1].map(|distance| distance as usize);
        let mask = self.tables.mask.get(near..=far).unwrap_or(&[]);
        if mask.iter().all(|value| *value == 0.0) && self.tables.directions.is_empty() {
            return Vec::new();
        }
        let mut best = (None, laid_out(2 * x.len() * y.len(), self.sizes));
        let levels = [x, y].map(levels);
        if levels.iter().all(|levels| *levels <= MOST_LEVELS) {
            let kinds = [Kind::Levels; 2];
            let operations = self.factored([x.len(), y.len()], levels, kinds);
            if operations < best.1 {
                best = (Some(kinds), operations);
            }
        }
        let limit = best.1;
        let worth = |nodes: usize| {
            let kinds = [Kind::Nodes(nodes, 0.0); 2];
            // Neither meeting by way of nodes nor looking whether there are any may take longer.
            let looking = (far - near) as u64 * nodes as u64;
            self.factored([x.len(), y.len()], levels, kinds)
                .max(looking)
                < limit
        };
        let candidates: Vec<usize> = NODES.into_iter().filter(|nodes| worth(*nodes)).collect();
        if let Some((nodes, rate)) = self.fit([near, far], &candidates) {
            let smooth = Kind::Nodes(nodes, rate);
            let enough = |x: &[u32]| (x[x.len() - 1] - x[0]) as usize >= 2 * nodes;
            let (wide, few) = (
                [enough(x), enough(y)],
                [levels[0] <= MOST_LEVELS, levels[1] <= MOST_LEVELS],
            );
            for kinds in [
                [smooth, smooth],
                [smooth, Kind::Levels],
                [Kind::Levels, smooth],
            ] {
                let allowed = (0..2).all(|side| match kinds[side] {
                    Kind::Levels => few[side],
                    Kind::Nodes(..) => wide[side],
                });
                if allowed {
                    let operations = self.factored([x.len(), y.len()], levels, kinds);
                    if operations < best.1 {
                        best = (Some(kinds), operations);
                    }
                }
            }
        }
        let whole = vec![(ranges.clone(), best.0, best.1)];
        if best.0.is_some() || x.len().min(y.len()) < DIVISIBLE {
            return whole;
        }
        let halves = [x, y].map(|distances| {
            let middle = (distances[0] + distances[distances.len() - 1]) / 2;
            distances.partition_point(|distance| *distance <= middle)
        });
        let mut parts = Vec::new();
        for left in [0..halves[0], halves[0]..x.len()] {
            for right in [0..halves[1], halves[1]..y.len()] {
                let moved = |range: &Range<usize>, side: usize| {
                    ranges[side].start + range.start..ranges[side].start + range.end
                };
                if left.len() < x.len() || right.len() < y.len() {
                    parts.extend(self.divided(sides, [moved(&left, 0), moved(&right, 1)]));
                }
            }
        }
        let divided: u64 = parts.iter().map(|part| part.2).sum();
        match divided < best.1 && !parts.is_empty() {
            true => parts,
            false => whole,
        }
    }

    /// Operations of both directions of a block: adding up and reading on each side, and what the sides' nodes
    /// give each other.
    fn factored(&self, tokens: [usize; 2], levels: [usize; 2], kinds: [Kind; 2]) -> u64 {
        let [features, width] = self.sizes;
        let nodes = [0, 1].map(|side| match kinds[side] {
            Kind::Levels => levels[side],
            Kind::Nodes(nodes, _) => nodes,
        });
        let each = [0, 1].map(|side| match kinds[side] {
            Kind::Levels => tokens[side],
            Kind::Nodes(nodes, _) => tokens[side] * nodes,
        });
        let products = 4 * (each[0] + each[1] + nodes[0] * nodes[1]) * features * width;
        (products + 2 * (each[0] + each[1]) * features) as u64
    }

    /// The fewest nodes of the candidates that tables between two distances can be read off.
    fn fit(&mut self, [near, far]: [usize; 2], candidates: &[usize]) -> Option<(usize, f64)> {
        let mut known = self.fits.get(&[near, far]).copied().unwrap_or_default();
        for &nodes in candidates {
            if known.found.is_some() {
                break;
            }
            if nodes > known.tried {
                known.tried = nodes;
                let rates = [0.0, self.rate([near, far])];
                let found = rates
                    .into_iter()
                    .find(|rate| self.reads([near, far], nodes, *rate));
                known.found = found.map(|rate| (nodes, rate));
            }
        }
        self.fits.insert([near, far], known);
        known.found.filter(|(nodes, _)| candidates.contains(nodes))
    }

    /// `c` of the `e^{ct}` that goes as far down or up as the mask does.
    fn rate(&self, [near, far]: [usize; 2]) -> f64 {
        let value = |at: usize| self.tables.mask.get(at).copied().unwrap_or(0.0);
        let (first, last, span) = (value(near), value(far), (far - near) as f64);
        if !(first > 0.0 && last > 0.0) || span == 0.0 {
            return 0.0;
        }
        let exponent = (last.ln() - first.ln()).clamp(-STEEPEST, STEEPEST);
        exponent / span
    }

    /// Whether all tables are near polynomials through so many nodes, beside `e^{ct}`.
    fn reads(&self, [near, far]: [usize; 2], count: usize, rate: f64) -> bool {
        let Some(nodes) = Nodes::new([near, far], count) else {
            return false;
        };
        let tables = std::iter::once(&self.tables.mask).chain(&self.tables.directions);
        let tables: Option<Vec<&[f64]>> = tables.map(|table| table.get(near..=far)).collect();
        let Some(tables) = tables else { return false };
        let flat = |at: usize| (-rate * at as f64).exp();
        let flattened: Vec<Vec<f64>> = tables
            .iter()
            .map(|table| {
                let each = table.iter().enumerate();
                each.map(|(at, value)| value * flat(at)).collect()
            })
            .collect();
        let bounds: Vec<f64> = flattened
            .iter()
            .map(|table| {
                let largest = table
                    .iter()
                    .fold(0.0, |most: f64, value| most.max(value.abs()));
                self.tables.tolerance * largest
            })
            .collect();
        let at_nodes: Vec<Vec<f64>> = flattened
            .iter()
            .map(|table| nodes.at.iter().map(|at| table[at - near]).collect())
            .collect();
        let mut shares = vec![0.0; count];
        (near..=far).all(|distance| {
            nodes.shares(distance, &mut shares);
            let each = flattened.iter().zip(&at_nodes).zip(&bounds);
            each.into_iter().all(|((table, at_nodes), bound)| {
                let read: f64 = at_nodes
                    .iter()
                    .zip(&shares)
                    .map(|(f, share)| f * share)
                    .sum();
                (read - table[distance - near]).abs() <= *bound
            })
        })
    }

    fn block<T: Real>(
        &self,
        cut: usize,
        pairs: &TreePairs,
        ranges: [Range<usize>; 2],
        kinds: Option<[Kind; 2]>,
    ) -> Block<T> {
        let factored = match (kinds, pairs.pieces().get(cut)) {
            (Some(kinds), Some(TreePiece::Cut(sides))) => Some(Factored {
                bases: [0, 1]
                    .map(|side| basis(&sides[side].distances[ranges[side].clone()], kinds[side])),
            }),
            _ => None,
        };
        Block {
            cut,
            sides: ranges,
            factored,
        }
    }
}

/// How many different distances there are.
fn levels(distances: &[u32]) -> usize {
    distances.chunk_by(|a, b| a == b).count()
}

fn basis<T: Real>(distances: &[u32], kind: Kind) -> Basis<T> {
    let ends = [distances.first(), distances.last()];
    let nodes = match (kind, ends) {
        (Kind::Nodes(count, rate), [Some(near), Some(far)]) => {
            Nodes::new([*near as usize, *far as usize], count).map(|nodes| (nodes, rate))
        }
        _ => None,
    };
    let Some((nodes, rate)) = nodes else {
        let (mut start, mut all) = (0, Vec::new());
        let mut segments = Vec::new();
        for level in distances.chunk_by(|a, b| a == b) {
            segments.push(Segment {
                tokens: start..start + level.len(),
                nodes: all.len()..all.len() + 1,
                weights: Vec::new(),
            });
            all.push(level[0]);
            start += level.len();
        }
        return Basis {
            nodes: all,
            segments,
        };
    };
    let count = nodes.at.len();
    let mut weights = Vec::with_capacity(distances.len() * count);
    let mut shares = vec![0.0; count];
    for distance in distances {
        nodes.shares(*distance as usize, &mut shares);
        let each = shares.iter().zip(&nodes.at).map(|(share, at)| {
            let factor = (rate * (f64::from(*distance) - *at as f64)).exp();
            T::of(share * factor)
        });
        weights.extend(each);
    }
    Basis {
        segments: vec![Segment {
            tokens: 0..distances.len(),
            nodes: 0..count,
            weights,
        }],
        nodes: nodes.at.into_iter().map(|at| at as u32).collect(),
    }
}

/// Whole numbers near Chebyshev's nodes of an interval.
struct Nodes {
    at: Vec<usize>,
    /// Of the barycentric formula.
    weights: Vec<f64>,
}

impl Nodes {
    /// `None` where the interval has not as many that differ.
    fn new([near, far]: [usize; 2], count: usize) -> Option<Self> {
        let (middle, half) = ((near + far) as f64 / 2.0, (far - near) as f64 / 2.0);
        let mut at: Vec<usize> = (0..count)
            .map(|k| {
                let angle = std::f64::consts::PI * (k as f64 + 0.5) / count as f64;
                (middle - half * angle.cos()).round() as usize
            })
            .collect();
        at.dedup();
        if at.len() < count {
            return None;
        }
        // Of distances in quarters of the interval, whose products stay near 1.
        let scale = (half / 2.0).max(0.25);
        let weights = at
            .iter()
            .map(|x| {
                let others = at.iter().filter(|other| *other != x);
                let product: f64 = others
                    .map(|other| (*x as f64 - *other as f64) / scale)
                    .product();
                1.0 / product
            })
            .collect();
        Some(Self { at, weights })
    }

    /// `L_k(x)` for each node.
    fn shares(&self, x: usize, shares: &mut [f64]) {
        let mut total = 0.0;
        for ((share, at), weight) in shares.iter_mut().zip(&self.at).zip(&self.weights) {
            if *at == x {
                shares.fill(0.0);
                if let Some(place) = self.at.iter().position(|at| *at == x) {
                    shares[place] = 1.0;
                }
                return;
            }
            *share = weight / (x as f64 - *at as f64);
            total += *share;
        }
        for share in shares {
            *share /= total;
        }
    }
}
