//! Matrices `[f(x_u + y_w)]` of rational functions, which are like Cauchy's, in blocks of low rank.
//!
//! Let `f(s) = e^{λs} R(s)` with `R` rational, and `δ` how far the sums of a block, `x_u + y_w` for some
//! runs of `x` and `y`, are from the nearest pole. `e^{λ(x + y)}` comes apart, and over an interval of half
//! the length `h` of `x` the function `R(x + y)` is near the polynomial through Chebyshev's nodes `t_k`,
//!
//! ```text
//! |R(x + y) − Σ_k L_k(x) R(t_k + y)| ≤ 4 M ρ^{−n} / (ρ − 1),   k = 0 … n,   ρ = r + √(1 + r²),   r = δ / 2h
//! ```
//!
//! for every `y`, where `M` bounds `|R|` on the ellipse around the interval whose axes add up to `ρ h`, which
//! lies no farther than `δ / 2` from it (Bernstein; Trefethen, Approximation Theory and Approximation Practice,
//! theorem 8.2). The axes of poles are known, so that `M` is: `Σ |a_k| S^k / |b_m| Π (δ_k − δ/2)` for sums no
//! larger than `S`. A block is taken by so many nodes that the bound is at most [`TOLERANCE`] of the
//! larger `|R|` at its ends, cut in two where that takes too many, and laid out where it is small.
//!
//! Cost: `O(n)` products for each row and column of each block; a row is in `O(ln²)` blocks of the length of the
//! interval over the distance of the nearest pole, in `O(ln)` where poles lie on one side of it.

use std::ops::Range;

use super::Function;
use crate::polynomial::{Complex, roots};

/// How far an entry may be off, relative to the larger entry at the ends of its block, rounding aside.
pub const TOLERANCE: f64 = 1e-13;
/// Most nodes of a block.
const MOST: usize = 48;
/// Entries of a block that is not cut further.
const SMALL: usize = 1024;

/// `e^{λs} (a₀ + a₁ s + …) / (b₀ + b₁ s + …)`.
#[derive(Clone, Debug)]
struct Parts {
    rate: f64,
    numerator: Vec<f64>,
    denominator: Vec<f64>,
    poles: Vec<Complex<f64>>,
}

impl Parts {
    fn of(function: &Function) -> Option<Self> {
        let (rate, numerator, denominator) = match function {
            Function::Rational {
                numerator,
                denominator,
            } => (0.0, numerator.clone(), denominator.clone()),
            Function::Quotient { rate, shift } => (*rate, vec![1.0], vec![*shift, 1.0]),
            Function::Polynomial(_)
            | Function::Exponential { .. }
            | Function::Wave { .. }
            | Function::Gaussian(_)
            | Function::Any(_) => return None,
        };
        let poles = roots(&denominator);
        let known = denominator.iter().any(|b| *b != 0.0)
            && poles
                .iter()
                .all(|pole| pole.re.is_finite() && pole.im.is_finite());
        known.then_some(Self {
            rate,
            numerator,
            denominator,
            poles,
        })
    }

    /// `R(s)`.
    fn value(&self, s: f64) -> f64 {
        let horner = |c: &[f64]| c.iter().rev().fold(0.0, |sum, c| sum * s + c);
        horner(&self.numerator) / horner(&self.denominator)
    }

    /// How many nodes an interval of `half` a length takes for sums from `low` to `high`; none where no
    /// number is enough.
    fn nodes(&self, half: f64, [low, high]: [f64; 2]) -> Option<usize> {
        if half == 0.0 {
            return Some(1);
        }
        let away = |pole: &Complex<f64>| {
            let beside = (low - pole.re).max(pole.re - high).max(0.0);
            beside.hypot(pole.im)
        };
        // Farther away nothing is won.
        let nearest = self.poles.iter().map(away).fold(8.0 * half, f64::min);
        let r = nearest / (2.0 * half);
        let rho = r + r.hypot(1.0);
        let largest = low.abs().max(high.abs()) + nearest / 2.0;
        let above = self.numerator.iter().rev();
        let above = above.fold(0.0, |sum, a| sum * largest + a.abs());
        let lead = self.denominator.iter().rev().find(|b| **b != 0.0)?;
        let below: f64 = self.poles.iter().map(|p| away(p) - nearest / 2.0).product();
        let bound = above / (lead.abs() * below);
        let size = self.value(low).abs().max(self.value(high).abs());
        let degree = (4.0 * bound / ((rho - 1.0) * TOLERANCE * size)).ln() / rho.ln();
        (degree < MOST as f64).then(|| degree.max(0.0).ceil() as usize + 1)
    }
}

/// A run of rows by a run of columns.
#[derive(Clone, Debug)]
struct Block {
    rows: Range<usize>,
    columns: Range<usize>,
    /// How many nodes; none where it is laid out.
    nodes: Option<usize>,
}

/// The matrix `[f(x_u + y_w)]` in blocks.
#[derive(Clone, Debug)]
pub struct Blocked<'a> {
    parts: Parts,
    x: &'a [f64],
    y: &'a [f64],
    blocks: Vec<Block>,
}

/// The least and the most of what rises.
fn ends(rising: &[f64]) -> [f64; 2] {
    let end = |number: Option<&f64>| number.copied().unwrap_or(0.0);
    [end(rising.first()), end(rising.last())]
}

impl<'a> Blocked<'a> {
    /// The matrix of a rational function, or an exponential over a shifted distance, for `x` and `y` that
    /// rise; none of another function.
    pub fn new(function: &Function, x: &'a [f64], y: &'a [f64]) -> Option<Self> {
        let mut found = Self {
            parts: Parts::of(function)?,
            x,
            y,
            blocks: Vec::new(),
        };
        let mut open = vec![(0..x.len(), 0..y.len())];
        while let Some((rows, columns)) = open.pop() {
            if rows.is_empty() || columns.is_empty() {
                continue;
            }
            let entries = rows.len() * columns.len();
            let [x, y] = [ends(&x[rows.clone()]), ends(&y[columns.clone()])];
            let half = [x, y].map(|[low, high]| (high - low) / 2.0);
            let sums = [x[0] + y[0], x[1] + y[1]];
            let nodes = found.parts.nodes(half[0].min(half[1]), sums);
            let nodes = nodes.filter(|nodes| nodes * (rows.len() + columns.len()) < entries);
            if nodes.is_some() || entries <= SMALL {
                found.blocks.push(Block {
                    rows,
                    columns,
                    nodes,
                });
                continue;
            }
            // The longer side in two, at its middle.
            let cut = |run: &Range<usize>, all: &[f64], [low, high]: [f64; 2]| {
                let middle = (low + high) / 2.0;
                let below = all[run.clone()].partition_point(|at| *at <= middle);
                // What does not come apart by its numbers does by its count.
                let below = match below == run.len() {
                    true => run.len() / 2,
                    false => below,
                };
                [run.start..run.start + below, run.start + below..run.end]
            };
            match half[0] >= half[1] && rows.len() > 1 || columns.len() == 1 {
                true => open.extend(cut(&rows, found.x, x).map(|part| (part, columns.clone()))),
                false => open.extend(cut(&columns, found.y, y).map(|part| (rows.clone(), part))),
            }
        }
        Some(found)
    }

    /// Products that a field of one column takes, values of the function among them.
    pub fn products(&self) -> usize {
        let each = self.blocks.iter().map(|block| match block.nodes {
            Some(nodes) => nodes * (block.rows.len() + block.columns.len()),
            None => block.rows.len() * block.columns.len(),
        });
        each.sum()
    }

    /// `C_u = Σ_w f(x_u + y_w) X_w`, `[x, width]`, for a field `[y, width]`.
    pub fn multiply(&self, field: &[f64], width: usize) -> Vec<f64> {
        let scaled = |rows: &[f64], by: &[f64]| -> Vec<f64> {
            let rows = rows.chunks(width.max(1)).zip(by);
            rows.flat_map(|(row, at)| {
                let factor = (self.parts.rate * at).exp();
                row.iter().map(move |entry| factor * entry)
            })
            .collect()
        };
        let field = scaled(field, self.y);
        let mut found = vec![0.0; self.x.len() * width];
        for block in &self.blocks {
            let (x, y) = (&self.x[block.rows.clone()], &self.y[block.columns.clone()]);
            let from = &field[block.columns.start * width..block.columns.end * width];
            let to = &mut found[block.rows.start * width..block.rows.end * width];
            match block.nodes {
                None => self.lay_out(x, y, from, to, width),
                Some(nodes) => {
                    let length = |[low, high]: [f64; 2]| high - low;
                    // The nodes stand in for the shorter side: rows are read off them, or columns put there.
                    if length(ends(x)) <= length(ends(y)) {
                        let nodes = Nodes::new(ends(x), nodes);
                        let mut at_nodes = vec![0.0; nodes.at.len() * width];
                        self.lay_out(&nodes.at, y, from, &mut at_nodes, width);
                        for (x, to) in x.iter().zip(to.chunks_mut(width)) {
                            for (share, row) in nodes.shares(*x).zip(at_nodes.chunks(width)) {
                                add(to, share, row);
                            }
                        }
                    } else {
                        let nodes = Nodes::new(ends(y), nodes);
                        let mut at_nodes = vec![0.0; nodes.at.len() * width];
                        for (y, from) in y.iter().zip(from.chunks(width)) {
                            for (share, row) in nodes.shares(*y).zip(at_nodes.chunks_mut(width)) {
                                add(row, share, from);
                            }
                        }
                        self.lay_out(x, &nodes.at, &at_nodes, to, width);
                    }
                }
            }
        }
        scaled(&found, self.x)
    }

    /// Adds `Σ_w R(x_u + y_w) X_w`, entry by entry.
    fn lay_out(&self, x: &[f64], y: &[f64], from: &[f64], to: &mut [f64], width: usize) {
        for (x, to) in x.iter().zip(to.chunks_mut(width)) {
            for (y, from) in y.iter().zip(from.chunks(width)) {
                add(to, self.parts.value(x + y), from);
            }
        }
    }
}

/// Adds so many times a row.
fn add(to: &mut [f64], times: f64, row: &[f64]) {
    for (to, entry) in to.iter_mut().zip(row) {
        *to += times * entry;
    }
}

/// Chebyshev's nodes of the first kind on an interval.
struct Nodes {
    at: Vec<f64>,
    /// Of the barycentric formula.
    weights: Vec<f64>,
}

impl Nodes {
    fn new([low, high]: [f64; 2], count: usize) -> Self {
        let (middle, half) = ((low + high) / 2.0, (high - low) / 2.0);
        let angle = |k: usize| std::f64::consts::PI * (k as f64 + 0.5) / count as f64;
        Self {
            at: (0..count).map(|k| middle + half * angle(k).cos()).collect(),
            weights: (0..count)
                .map(|k| if k % 2 == 0 { 1.0 } else { -1.0 } * angle(k).sin())
                .collect(),
        }
    }

    /// `L_k(x)` for each node.
    fn shares(&self, x: f64) -> impl Iterator<Item = f64> + '_ {
        let met = self.at.iter().position(|at| *at == x);
        let each = move |(at, weight): (&f64, &f64)| weight / (x - at);
        let total: f64 = self.at.iter().zip(&self.weights).map(each).sum();
        self.at
            .iter()
            .zip(&self.weights)
            .enumerate()
            .map(move |(k, pair)| match met {
                Some(met) => f64::from(u8::from(k == met)),
                None => each(pair) / total,
            })
    }
}
