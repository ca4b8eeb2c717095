//! The backward pass: weights are computed again, piece by piece. Pieces that have rows in common, which are
//! those of a head as a rule, follow one another, so that each adds to the gradients of its rows where they lie.

use super::super::tiles::weights_and_slopes;
use super::BlockAttention;
use super::groups::groups;
use super::pieces::{Part, Piece};
use super::rows::{Inputs, KEYS, QUERIES, Saved, key_tiles, multiply, tiles};
use crate::host::{self, Shared};
use crate::product::{Into, Matrix, Repeated};
use crate::simd::{self, Real};
use std::ops::Range;

/// Everything a piece reads and writes.
struct Pass<'a, T: Clone> {
    x: &'a Inputs<'a, T>,
    saved: &'a Saved<'a, T>,
    /// `δ` of every query.
    deltas: &'a [T],
    dq: Shared<'a, T>,
    dk: Shared<'a, T>,
    dv: Shared<'a, T>,
}

/// Gradients of queries, keys and values, added to those that are there.
pub(super) fn backward<T: Real>(
    of: &BlockAttention,
    x: &Inputs<T>,
    saved: &Saved<T>,
    [mut dq, mut dk, mut dv]: [Vec<T>; 3],
) -> [Vec<T>; 3] {
    let [queries, _] = of.rows;
    let deltas = deltas(saved, queries);
    let [width, value_width] = x.widths();
    let pass = Pass {
        x,
        saved,
        deltas: &deltas,
        dq: Shared::new(&mut dq),
        dk: Shared::new(&mut dk),
        dv: Shared::new(&mut dv),
    };
    let groups = groups(of);
    let work = |part: &Part| part.pieces().len() * part.work(width + value_width);
    let work = 2 * of.parts.iter().map(work).sum::<usize>();
    host::share(groups.len(), work / groups.len().max(1), |range| {
        let mut room = Room::new();
        for &[part, piece] in groups[range].iter().flatten() {
            let part = &of.parts[part];
            let piece = &part.pieces()[piece];
            match piece.is_small() {
                true => pass.few(part, piece, &mut room.tile.weights),
                false => pass.many(part, piece, &mut room),
            }
        }
    });
    [dq, dk, dv]
}

/// `δ` of every query.
fn deltas<T: Real>(saved: &Saved<T>, queries: usize) -> Vec<T> {
    let mut deltas = vec![T::zero(); queries];
    host::for_rows(
        &mut deltas,
        1,
        saved.width,
        #[inline(always)]
        |query, delta| delta[0] = saved.delta(query),
    );
    deltas
}

/// A piece, and its keys and values as products with all its queries ask for them.
struct Operands<'a, T> {
    part: &'a Part,
    piece: &'a Piece,
    k: Repeated<'a, T>,
    k_across: Repeated<'a, T>,
    v_across: Repeated<'a, T>,
}

/// Memory that pieces use one after the other.
struct Room<T> {
    keys: Vec<T>,
    values: Vec<T>,
    dq: Vec<T>,
    dk: Vec<T>,
    dv: Vec<T>,
    tile: Tile<T>,
}

/// Memory for some queries of a piece.
struct Tile<T> {
    queries: Vec<T>,
    gradients: Vec<T>,
    weights: Vec<T>,
    slopes: Vec<T>,
}

impl<T> Room<T> {
    fn new() -> Self {
        Self {
            keys: Vec::new(),
            values: Vec::new(),
            dq: Vec::new(),
            dk: Vec::new(),
            dv: Vec::new(),
            tile: Tile {
                queries: Vec::new(),
                gradients: Vec::new(),
                weights: Vec::new(),
                slopes: Vec::new(),
            },
        }
    }
}

fn zeroed<T: Real>(room: &mut Vec<T>, length: usize) -> &mut [T] {
    room.clear();
    room.resize(length, T::zero());
    room
}

impl<T: Real> Pass<'_, T> {
    /// A piece with keys and values laid out for all its queries.
    fn many(&self, part: &Part, piece: &Piece, room: &mut Room<T>) {
        let [width, value_width] = self.x.widths();
        let (count, length) = (piece.queries.len(), piece.keys.len());
        let key_rows = part.key_rows(&piece.keys);
        let k = self.x.k.gathered(key_rows, &mut room.keys);
        let v = self.x.v.gathered(key_rows, &mut room.values);
        let operands = Operands {
            part,
            piece,
            k: Repeated::new(k, count),
            k_across: Repeated::new(k.transposed(), count),
            v_across: Repeated::new(v.transposed(), count),
        };
        let dk = zeroed(&mut room.dk, length * width);
        let dv = zeroed(&mut room.dv, length * value_width);
        for queries in tiles(piece.queries.clone(), QUERIES) {
            let rows = part.query_rows(&queries);
            let dq = zeroed(&mut room.dq, rows.len() * width);
            self.tile(
                &operands,
                &queries,
                &mut room.tile,
                [&mut *dq, &mut *dk, &mut *dv],
            );
            self.add(&self.dq, rows, dq, width);
        }
        self.add(&self.dk, key_rows, dk, width);
        self.add(&self.dv, key_rows, dv, value_width);
    }

    /// Adds the gradients of listed rows to where they lie.
    fn add(&self, to: &Shared<T>, rows: &[u32], from: &[T], width: usize) {
        simd::vectorised(
            #[inline(always)]
            || {
                for (&row, from) in rows.iter().zip(from.chunks_exact(width.max(1))) {
                    // SAFETY: the rows of a group are those of one task.
                    let to = unsafe { to.part(row as usize * width, width) };
                    simd::add_scaled(to, from, T::one());
                }
            },
        );
    }

    /// Adds up the gradients that some queries of a piece give: of themselves, keys and values.
    fn tile(
        &self,
        of: &Operands<T>,
        queries: &Range<usize>,
        room: &mut Tile<T>,
        [dq, dk, dv]: [&mut [T]; 3],
    ) {
        let [width, value_width] = self.x.widths();
        let (rows, length) = (of.part.query_rows(queries), of.piece.keys.len());
        let q = self.x.q.gathered(rows, &mut room.queries);
        let d_output = self.saved.gradients(rows, &mut room.gradients);
        let (q_right, d_right) = (Repeated::new(q, length), Repeated::new(d_output, length));
        let [mut log_sums, mut deltas] = [[T::zero(); QUERIES]; 2];
        for (i, &row) in rows.iter().enumerate() {
            log_sums[i] = self.saved.log_sums[row as usize];
            deltas[i] = self.deltas[row as usize];
        }
        room.weights.resize(QUERIES * KEYS, T::zero());
        room.slopes.resize(QUERIES * KEYS, T::zero());
        let (scale, one) = (self.x.scale, T::one());
        for keys in key_tiles(of.part.seen(queries, &of.piece.keys), of.piece.keys.start) {
            let (columns, here) = (keys.len(), of.piece.place(&keys));
            let weights = &mut room.weights[..rows.len() * columns];
            let slopes = &mut room.slopes[..rows.len() * columns];
            let depth = (0..width, here.clone());
            multiply(weights, Into::Replace, scale, q, &of.k_across, depth);
            let depth = (0..value_width, here.clone());
            multiply(slopes, Into::Replace, one, d_output, &of.v_across, depth);
            let by_position = !of.part.all_seen(queries, &keys);
            simd::vectorised(
                #[inline(always)]
                || {
                    let each = weights.chunks_exact_mut(columns).zip(queries.clone());
                    for (scores, query) in each {
                        of.part.adjust(of.piece, query, &keys, by_position, scores);
                    }
                    weights_and_slopes(weights, slopes, columns, &log_sums, &deltas);
                },
            );
            let weights = Matrix::packed(weights, rows.len(), columns);
            let slopes = Matrix::packed(slopes, rows.len(), columns);
            let (depth, all) = (0..rows.len(), here.clone());
            let to = &mut dv[here.start * value_width..here.end * value_width];
            let whole = (depth.clone(), 0..value_width);
            multiply(to, Into::Add, one, weights.transposed(), &d_right, whole);
            let to = &mut dk[here.start * width..here.end * width];
            let whole = (depth, 0..width);
            multiply(to, Into::Add, scale, slopes.transposed(), &q_right, whole);
            multiply(dq, Into::Add, scale, slopes, &of.k, (all, 0..width));
        }
    }

    /// A piece of so few queries that keys and values are read where they lie.
    fn few(&self, part: &Part, piece: &Piece, room: &mut Vec<T>) {
        let (x, [width, value_width]) = (self.x, self.x.widths());
        room.resize(room.len().max(piece.keys.len()), T::zero());
        for query in piece.queries.clone() {
            let here = query..query + 1;
            let seen = part.seen(&here, &piece.keys);
            let weights = &mut room[..seen.len()];
            let by_position = !part.all_seen(&here, &seen);
            let (key_rows, at) = (part.key_rows(&seen), part.query_rows(&here)[0]);
            let (log_sum, delta) = (self.saved.log_sums[at as usize], self.deltas[at as usize]);
            if log_sum == T::NEG_INFINITY {
                continue;
            }
            // SAFETY: the rows of a group are those of one task.
            let dq = unsafe { self.dq.part(at as usize * width, width) };
            let d_output = self.saved.gradient(at);
            simd::vectorised(
                #[inline(always)]
                || {
                    let q = x.q.row(at);
                    for (score, &key) in weights.iter_mut().zip(key_rows) {
                        *score = x.scale * simd::dot(q, x.k.row(key));
                    }
                    part.adjust(piece, query, &seen, by_position, weights);
                    for (&score, &key) in weights.iter().zip(key_rows) {
                        let weight = (score - log_sum).exp();
                        let slope = weight * (simd::dot(d_output, x.v.row(key)) - delta);
                        // SAFETY: as above.
                        let (dk, dv) = unsafe {
                            let dv = self.dv.part(key as usize * value_width, value_width);
                            (self.dk.part(key as usize * width, width), dv)
                        };
                        simd::add_scaled(dq, x.k.row(key), x.scale * slope);
                        simd::add_scaled(dk, q, x.scale * slope);
                        simd::add_scaled(dv, d_output, weight);
                    }
                },
            );
        }
    }
}
