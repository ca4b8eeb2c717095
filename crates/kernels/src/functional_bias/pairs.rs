//! Pairs of queries and keys on the pieces of a network: along a row, runs of keys that are on one piece.

use super::BiasSpan;
use super::pieces::{Line, Pieces};
use crate::host::{self, Shared};
use crate::simd::{self, Real};
use std::ops::Range;

/// Rows whose gradients are summed for themselves, at least, and parts of all rows, at most: both fixed, for the same
/// sums whatever the number of threads.
const LEAST_ROWS: usize = 16;
const MOST_PARTS: usize = 64;

/// Numbers that are taken at once.
pub(crate) const LANES: usize = 8;

/// All pairs of a [`BiasSpan`], in double precision.
pub(crate) struct Pairs {
    pieces: Pieces,
    /// `u` from the farthest to the nearest, in the order of the keys before a query.
    farthest_first: Vec<f64>,
    /// `u` by distance.
    distances: Vec<f64>,
    /// `w` by position.
    scales: Vec<f64>,
    span: BiasSpan,
}

/// Some keys of one query, one behind the other.
#[derive(Default)]
pub(crate) struct Row {
    position: usize,
    /// The first key.
    first: usize,
    /// Keys that are not later than the query.
    past: usize,
    /// Keys that it sees.
    seen: usize,
    /// What the network is asked for, by key, and room for some more.
    inputs: Vec<f64>,
    /// The gradients of these.
    slopes: Vec<f64>,
    runs: Vec<Run>,
    /// The first piece of each side in the row before, near which those of this one are.
    near: [usize; 2],
}

/// Keys on one piece.
struct Run {
    /// Counted from the first of the row.
    keys: Range<usize>,
    piece: usize,
    /// 1 for keys that come later than the query, which have outputs of their own.
    side: usize,
}

/// The gradients of what [`Pairs`] are made of that some pairs give.
pub(crate) struct Part {
    /// The heads whose pairs they are.
    heads: Range<usize>,
    /// Those of `u`, of keys before a query and of later ones.
    farthest_first: Vec<f64>,
    distances: Vec<f64>,
    scales: Vec<f64>,
    /// `(Σ g t, Σ g)` of the pairs on each piece, `[piece, side, head]`.
    lines: Vec<Line>,
}

impl Pairs {
    pub(super) fn new(
        pieces: Pieces,
        distances: Vec<f64>,
        scales: Vec<f64>,
        span: BiasSpan,
    ) -> Self {
        Self {
            pieces,
            farthest_first: distances.iter().rev().copied().collect(),
            distances,
            scales,
            span,
        }
    }

    pub(crate) fn heads(&self) -> usize {
        self.span.heads(self.pieces.outputs())
    }

    /// Where in `farthest_first` the distances of a row's keys begin.
    #[inline(always)]
    fn start(&self, position: usize) -> usize {
        self.distances.len() - 1 - position
    }

    /// Makes `row` that of a query and these keys.
    #[inline(always)]
    pub(crate) fn lay(&self, query: usize, keys: &Range<usize>, row: &mut Row) {
        let position = self.span.offset + query;
        let later = (position + 1).clamp(keys.start, keys.end);
        row.position = position;
        row.first = keys.start;
        row.past = later - keys.start;
        row.seen = if self.span.causal {
            row.past
        } else {
            keys.len()
        };
        if row.inputs.len() < keys.len() + LANES {
            row.inputs.resize(keys.len() + LANES, 0.0);
        }
        let scale = self.scales[position];
        let distances = self.farthest_first.get(self.start(position) + keys.start..);
        let (past, ahead) = row.inputs[..row.seen].split_at_mut(row.past);
        for (t, u) in past.iter_mut().zip(distances.unwrap_or_default()) {
            *t = u * scale;
        }
        let distances = self.distances.get(later.saturating_sub(position)..);
        let scales = self.scales.get(later..).unwrap_or_default();
        for ((t, u), w) in (ahead.iter_mut())
            .zip(distances.unwrap_or_default())
            .zip(scales)
        {
            *t = u * w;
        }
        row.runs.clear();
        self.add_runs(row, 0..row.past, 0);
        self.add_runs(row, row.past..row.seen, 1);
    }

    #[inline(always)]
    fn add_runs(&self, row: &mut Row, keys: Range<usize>, side: usize) {
        let (mut start, mut near) = (keys.start, row.near[side]);
        while start < keys.end {
            let piece = self.pieces.of_near(row.inputs[start], near);
            if start == keys.start {
                row.near[side] = piece;
            }
            let end = start
                + within(
                    &row.inputs[start..keys.end + LANES],
                    self.pieces.bounds(piece),
                );
            // What is not a number is on no piece, and a run of its own.
            let end = end.clamp(start + 1, keys.end);
            row.runs.push(Run {
                keys: start..end,
                piece,
                side,
            });
            (start, near) = (end, piece);
        }
    }

    /// Writes the bias of one head in a row: quicker where there is room for some numbers behind it.
    #[inline(always)]
    pub(crate) fn write<T: Real>(&self, head: usize, row: &Row, to: &mut [T]) {
        let heads = self.heads();
        for run in &row.runs {
            let line = self.pieces.line(run.piece, run.side * heads + head);
            let mut start = run.keys.start;
            while start < run.keys.end {
                // What is written behind the run is the next one's to be written again.
                let end = start + LANES;
                let inputs = &row.inputs[start..end];
                match to.get_mut(start..end) {
                    Some(to) => line.write(inputs, to),
                    None => line.write(inputs, &mut to[start..]),
                }
                start = end;
            }
        }
        to[row.seen..].fill(T::zero());
    }

    /// The bias `[heads, query, key]`.
    pub(super) fn forward<T: Real>(&self) -> Vec<T> {
        let (heads, queries, keys) = (self.heads(), self.span.queries, self.span.keys);
        let mut bias = host::unwritten::<T>(heads * queries * keys);
        let shared = Shared::new(&mut bias);
        host::share(queries, (heads + 2) * keys, |range| {
            let mut row = Row::default();
            simd::vectorised(
                #[inline(always)]
                || {
                    for query in range.clone() {
                        self.lay(query, &(0..keys), &mut row);
                        for head in 0..heads {
                            // SAFETY: a query belongs to one range.
                            let y = unsafe { shared.part((head * queries + query) * keys, keys) };
                            self.write(head, &row, y);
                        }
                    }
                },
            );
        });
        bias
    }

    /// The gradient of the numbers, as they lie, for that of the bias.
    pub(super) fn backward<T: Real>(&self, gradient: &[T]) -> Vec<f64> {
        let BiasSpan { queries, keys, .. } = self.span;
        let rows = queries.div_ceil(MOST_PARTS).max(LEAST_ROWS);
        let count = queries.div_ceil(rows);
        let mut parts: Vec<Option<Part>> = Vec::new();
        parts.resize_with(count, || None);
        let shared = Shared::new(&mut parts);
        host::share(count, rows * keys * 2 * self.pieces.outputs(), |range| {
            for index in range {
                let of = index * rows..queries.min((index + 1) * rows);
                // SAFETY: a part belongs to one range.
                let part = unsafe { shared.part(index, 1) };
                part.fill_with(|| Some(self.of_rows(of.clone(), gradient)));
            }
        });
        self.joined(parts.iter().flatten())
    }

    /// The gradients that all heads of some rows give.
    fn of_rows<T: Real>(&self, queries: Range<usize>, gradient: &[T]) -> Part {
        let heads = 0..self.heads();
        let mut part = self.part(heads.clone());
        let mut row = Row::default();
        let keys = self.span.keys;
        simd::vectorised(
            #[inline(always)]
            || {
                for query in queries.clone() {
                    self.lay(query, &(0..keys), &mut row);
                    let of_head = |head: usize| {
                        let start = (head * self.span.queries + query) * keys;
                        (head, &gradient[start..start + keys])
                    };
                    self.pull_row(&mut row, heads.clone().map(of_head), &mut part);
                }
            },
        );
        part
    }

    /// No gradients yet.
    pub(crate) fn part(&self, heads: Range<usize>) -> Part {
        let sides = self.pieces.outputs() / self.heads();
        let zeros = || vec![0.0; self.distances.len()];
        Part {
            farthest_first: zeros(),
            distances: zeros(),
            scales: zeros(),
            lines: vec![Line::default(); self.pieces.count() * sides * heads.len()],
            heads,
        }
    }

    /// Adds what the gradients of a row give, those of some heads of a part.
    #[inline(always)]
    pub(crate) fn pull_row<'g, T: Real>(
        &self,
        row: &mut Row,
        gradients: impl Iterator<Item = (usize, &'g [T])>,
        part: &mut Part,
    ) {
        let all = self.heads();
        let (sides, heads) = (self.pieces.outputs() / all, part.heads.len());
        if row.slopes.len() < row.inputs.len() {
            row.slopes.resize(row.inputs.len(), 0.0);
        }
        row.slopes[..row.seen].fill(0.0);
        for (head, gradient) in gradients {
            for run in &row.runs {
                let slope = self.pieces.line(run.piece, run.side * all + head).slope;
                let keys = run.keys.clone();
                let sums = pull(keys, gradient, &row.inputs, slope, &mut row.slopes);
                let of_piece = (run.piece * sides + run.side) * heads;
                part.lines[of_piece + head - part.heads.start].add(sums, 1.0);
            }
        }
        let (past, ahead) = row.slopes[..row.seen].split_at(row.past);
        if !past.is_empty() {
            let (start, scale) = (
                self.start(row.position) + row.first,
                self.scales[row.position],
            );
            let distances = &self.farthest_first[start..][..past.len()];
            part.scales[row.position] += simd::dot(past, distances);
            simd::add_scaled(&mut part.farthest_first[start..], past, scale);
        }
        for (key, slope) in (row.first + row.past..).zip(ahead) {
            let distance = key - row.position;
            part.scales[key] += slope * self.distances[distance];
            part.distances[distance] += slope * self.scales[key];
        }
    }

    /// The gradient of the numbers, as they lie, of all parts together.
    pub(crate) fn joined<'p>(&self, parts: impl Iterator<Item = &'p Part>) -> Vec<f64> {
        let (all, outputs) = (self.heads(), self.pieces.outputs());
        let mut distances = vec![0.0; self.distances.len()];
        let mut scales = vec![0.0; self.scales.len()];
        let mut lines = vec![Line::default(); self.pieces.count() * outputs];
        for part in parts {
            let both = part.farthest_first.iter().rev().zip(&part.distances);
            for (sum, (past, later)) in distances.iter_mut().zip(both) {
                *sum += past + later;
            }
            simd::add_scaled(&mut scales, &part.scales, 1.0);
            let heads = part.heads.len().max(1);
            for (index, slopes) in part.lines.chunks_exact(heads).enumerate() {
                // Pieces and sides in order, here of all heads and there of some.
                for (sum, slope) in (lines[index * all + part.heads.start..].iter_mut()).zip(slopes)
                {
                    sum.add(*slope, 1.0);
                }
            }
        }
        distances.extend(scales);
        distances.extend(self.pieces.backward(&lines));
        distances
    }
}

/// How many numbers, from the first on, lie on a piece, of whole lanes that there are.
#[inline(always)]
fn within(numbers: &[f64], [low, high]: [f64; 2]) -> usize {
    let mut count = 0;
    for chunk in numbers.chunks_exact(LANES) {
        let mut outside = 0u32;
        for (lane, t) in chunk.iter().enumerate() {
            outside |= u32::from(!((low <= *t) & (*t < high))) << lane;
        }
        if outside != 0 {
            return count + outside.trailing_zeros() as usize;
        }
        count += LANES;
    }
    count
}

/// `(Σ g t, Σ g)` over the keys of one run; adds `g · slope` to the gradients of their inputs `t`. Inputs and these
/// have room behind the last key.
#[inline(always)]
fn pull<T: Real>(
    keys: Range<usize>,
    gradient: &[T],
    inputs: &[f64],
    slope: f64,
    of_inputs: &mut [f64],
) -> Line {
    let (mut moments, mut totals) = ([0f64; LANES], [0f64; LANES]);
    let mut start = keys.start;
    while start < keys.end {
        let end = start + LANES;
        let left = keys.end - start;
        let mut g = [0f64; LANES];
        match gradient.get(start..end) {
            Some(gradient) => {
                for (lane, (g, here)) in g.iter_mut().zip(gradient).enumerate() {
                    *g = if lane < left { here.to_f64() } else { 0.0 };
                }
            }
            None => {
                for (g, here) in g.iter_mut().zip(&gradient[start..keys.end]) {
                    *g = here.to_f64();
                }
            }
        }
        let of_inputs = &mut of_inputs[start..end];
        for (lane, (g, t)) in g.iter().zip(&inputs[start..end]).enumerate() {
            let t = if lane < left { *t } else { 0.0 };
            moments[lane] = Real::mul_add(*g, t, moments[lane]);
            totals[lane] += g;
            of_inputs[lane] = Real::mul_add(*g, slope, of_inputs[lane]);
        }
        start = end;
    }
    Line {
        slope: moments.iter().sum(),
        level: totals.iter().sum(),
    }
}
