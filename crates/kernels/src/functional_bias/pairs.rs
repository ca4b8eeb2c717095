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

/// Accumulators of a sum.
const LANES: usize = 8;

/// All pairs of a [`BiasSpan`], in double precision.
pub(super) struct Pairs<'a> {
    pieces: &'a Pieces,
    /// `u` from the farthest to the nearest, in the order of the keys before a query.
    farthest_first: Vec<f64>,
    /// `u` by distance.
    distances: Vec<f64>,
    /// `w` by position.
    scales: Vec<f64>,
    span: BiasSpan,
}

/// The keys of one query.
struct Row {
    position: usize,
    /// Keys that are not later than the query.
    past: usize,
    /// Keys that it sees.
    seen: usize,
    /// What the network is asked for, by key.
    inputs: Vec<f64>,
    runs: Vec<Run>,
}

/// Keys on one piece.
struct Run {
    keys: Range<usize>,
    piece: usize,
    /// The output of the first head.
    output: usize,
}

/// Gradients of what [`Pairs`] are made of.
#[derive(Default)]
pub(super) struct Slopes {
    pub(super) distances: Vec<f64>,
    pub(super) scales: Vec<f64>,
    /// `(Σ g t, Σ g)` of the pairs on each piece, for each output, `[piece, output]`.
    pub(super) lines: Vec<Line>,
}

/// Those of some rows.
#[derive(Default)]
struct Part {
    farthest_first: Vec<f64>,
    slopes: Slopes,
}

impl<'a> Pairs<'a> {
    pub(super) fn new(
        pieces: &'a Pieces,
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

    pub(super) fn heads(&self) -> usize {
        self.span.heads(self.pieces.outputs())
    }

    fn row(&self) -> Row {
        Row {
            position: 0,
            past: 0,
            seen: 0,
            inputs: vec![0.0; self.span.keys],
            runs: Vec::new(),
        }
    }

    /// Where in `farthest_first` the distances of a row's keys begin.
    #[inline(always)]
    fn start(&self, position: usize) -> usize {
        self.distances.len() - 1 - position
    }

    /// Makes `row` that of a query.
    #[inline(always)]
    fn lay(&self, query: usize, row: &mut Row) {
        let keys = self.span.keys;
        let position = self.span.offset + query;
        row.position = position;
        row.past = keys.min(position + 1);
        row.seen = if self.span.causal { row.past } else { keys };
        let scale = self.scales[position];
        let distances = &self.farthest_first[self.start(position)..];
        let (past, later) = row.inputs[..row.seen].split_at_mut(row.past);
        for (t, u) in past.iter_mut().zip(distances) {
            *t = u * scale;
        }
        let scales = self.scales.get(row.past..).unwrap_or_default();
        let distances = self.distances.get(1..).unwrap_or_default();
        for ((t, u), w) in later.iter_mut().zip(distances).zip(scales) {
            *t = u * w;
        }
        row.runs.clear();
        self.add_runs(row, 0..row.past, 0);
        self.add_runs(row, row.past..row.seen, self.heads());
    }

    #[inline(always)]
    fn add_runs(&self, row: &mut Row, keys: Range<usize>, output: usize) {
        let mut start = keys.start;
        while start < keys.end {
            let piece = self.pieces.of(row.inputs[start]);
            let [low, high] = self.pieces.bounds(piece);
            let rest = &row.inputs[start + 1..keys.end];
            // Not a number ends a run too.
            let left = rest.iter().position(|t| !(low <= *t && *t < high));
            let end = start + 1 + left.unwrap_or(rest.len());
            row.runs.push(Run {
                keys: start..end,
                piece,
                output,
            });
            start = end;
        }
    }

    /// The bias `[heads, query, key]`.
    pub(super) fn forward<T: Real>(&self) -> Vec<T> {
        let (heads, queries, keys) = (self.heads(), self.span.queries, self.span.keys);
        let mut bias = host::unwritten::<T>(heads * queries * keys);
        let shared = Shared::new(&mut bias);
        host::share(queries, (heads + 2) * keys, |range| {
            let mut row = self.row();
            simd::vectorised(
                #[inline(always)]
                || {
                    for query in range.clone() {
                        self.lay(query, &mut row);
                        for head in 0..heads {
                            // SAFETY: a query belongs to one range.
                            let y = unsafe { shared.part((head * queries + query) * keys, keys) };
                            for run in &row.runs {
                                let line = self.pieces.line(run.piece, run.output + head);
                                let inputs = &row.inputs[run.keys.clone()];
                                for (y, t) in y[run.keys.clone()].iter_mut().zip(inputs) {
                                    *y = T::of(Real::mul_add(line.slope, *t, line.level));
                                }
                            }
                            y[row.seen..].fill(T::zero());
                        }
                    }
                },
            );
        });
        bias
    }

    /// The gradients, for that of the bias.
    pub(super) fn backward<T: Real>(&self, gradient: &[T]) -> Slopes {
        let BiasSpan { queries, keys, .. } = self.span;
        let rows = queries.div_ceil(MOST_PARTS).max(LEAST_ROWS);
        let count = queries.div_ceil(rows);
        let mut parts: Vec<Part> = Vec::new();
        parts.resize_with(count, Part::default);
        let shared = Shared::new(&mut parts);
        host::share(count, rows * keys * 2 * self.pieces.outputs(), |range| {
            for index in range {
                let of = index * rows..queries.min((index + 1) * rows);
                // SAFETY: a part belongs to one range.
                let part = unsafe { shared.part(index, 1) };
                part.fill_with(|| self.part(of.clone(), gradient));
            }
        });
        let mut sums = self.nothing();
        for part in &parts {
            let farthest_last = part.farthest_first.iter().rev();
            for (sum, (past, later)) in
                (sums.distances.iter_mut()).zip(farthest_last.zip(&part.slopes.distances))
            {
                *sum += past + later;
            }
            simd::add_scaled(&mut sums.scales, &part.slopes.scales, 1.0);
            for (sum, slope) in sums.lines.iter_mut().zip(&part.slopes.lines) {
                sum.add(*slope, 1.0);
            }
        }
        sums
    }

    fn nothing(&self) -> Slopes {
        Slopes {
            distances: vec![0.0; self.distances.len()],
            scales: vec![0.0; self.scales.len()],
            lines: vec![Line::default(); self.pieces.count() * self.pieces.outputs()],
        }
    }

    /// The gradients that some rows give.
    fn part<T: Real>(&self, queries: Range<usize>, gradient: &[T]) -> Part {
        let mut part = Part {
            farthest_first: vec![0.0; self.distances.len()],
            slopes: self.nothing(),
        };
        let mut row = self.row();
        let mut of_inputs = vec![0.0; self.span.keys];
        simd::vectorised(
            #[inline(always)]
            || {
                for query in queries.clone() {
                    self.lay(query, &mut row);
                    self.pull_row(query, &row, gradient, &mut of_inputs, &mut part);
                }
            },
        );
        part
    }

    #[inline(always)]
    fn pull_row<T: Real>(
        &self,
        query: usize,
        row: &Row,
        gradient: &[T],
        of_inputs: &mut [f64],
        part: &mut Part,
    ) {
        let (queries, keys) = (self.span.queries, self.span.keys);
        let outputs = self.pieces.outputs();
        of_inputs[..row.seen].fill(0.0);
        for head in 0..self.heads() {
            let gradient = &gradient[(head * queries + query) * keys..][..keys];
            for run in &row.runs {
                let output = run.output + head;
                let keys = run.keys.clone();
                let sums = pull(
                    &gradient[keys.clone()],
                    &row.inputs[keys.clone()],
                    self.pieces.line(run.piece, output).slope,
                    &mut of_inputs[keys],
                );
                part.slopes.lines[run.piece * outputs + output].add(sums, 1.0);
            }
        }
        let (past, later) = of_inputs[..row.seen].split_at(row.past);
        let (start, scale) = (self.start(row.position), self.scales[row.position]);
        let distances = &self.farthest_first[start..][..past.len()];
        part.slopes.scales[row.position] += simd::dot(past, distances);
        simd::add_scaled(&mut part.farthest_first[start..], past, scale);
        for (ahead, slope) in later.iter().enumerate() {
            let (key, distance) = (row.past + ahead, ahead + 1);
            part.slopes.scales[key] += slope * self.distances[distance];
            part.slopes.distances[distance] += slope * self.scales[key];
        }
    }
}

/// `(Σ g t, Σ g)` over one run; adds `g · slope` to the gradients of its inputs `t`.
#[inline(always)]
fn pull<T: Real>(gradient: &[T], inputs: &[f64], slope: f64, of_inputs: &mut [f64]) -> Line {
    let count = inputs.len();
    let (gradient, of_inputs) = (&gradient[..count], &mut of_inputs[..count]);
    let (mut moments, mut totals) = ([0f64; LANES], [0f64; LANES]);
    let whole = count - count % LANES;
    let mut start = 0;
    while start < whole {
        for lane in 0..LANES {
            let g = gradient[start + lane].to_f64();
            moments[lane] = Real::mul_add(g, inputs[start + lane], moments[lane]);
            totals[lane] += g;
            of_inputs[start + lane] = Real::mul_add(g, slope, of_inputs[start + lane]);
        }
        start += LANES;
    }
    let mut sums = Line {
        slope: moments.iter().sum(),
        level: totals.iter().sum(),
    };
    for index in whole..count {
        let g = gradient[index].to_f64();
        sums.slope = Real::mul_add(g, inputs[index], sums.slope);
        sums.level += g;
        of_inputs[index] = Real::mul_add(g, slope, of_inputs[index]);
    }
    sums
}
