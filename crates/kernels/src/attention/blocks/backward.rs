//! The backward pass: weights are computed again, piece by piece.

use super::super::tiles::weights_and_slopes;
use super::BlockAttention;
use super::pieces::{Part, Piece};
use super::rows::{Inputs, KEYS, QUERIES, Saved, key_tiles, multiply, tiles};
use super::uses::{Source, Uses};
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
    uses: &'a Uses,
    dq: Shared<'a, T>,
    dk: Shared<'a, T>,
    dv: Shared<'a, T>,
    /// Gradients of keys and values that are yet to be summed up, those of a key one behind the other.
    slots: Shared<'a, T>,
    /// Weight and slope of each pair of a small piece.
    pairs: Shared<'a, [T; 2]>,
}

/// Gradients of queries, keys and values.
pub(super) fn backward<T: Real>(
    of: &BlockAttention,
    x: &Inputs<T>,
    saved: &Saved<T>,
) -> [Vec<T>; 3] {
    let [queries, keys] = of.rows;
    let uses = Uses::new(of);
    let deltas = deltas(saved, queries);
    let [width, value_width] = x.widths();
    let mut dq = vec![T::zero(); queries * width];
    let mut dk = vec![T::zero(); keys * width];
    let mut dv = vec![T::zero(); keys * value_width];
    let mut slots = host::unwritten::<T>(uses.sizes[0] * (width + value_width));
    let mut pairs = vec![[T::zero(); 2]; uses.sizes[1]];
    let pass = Pass {
        x,
        saved,
        deltas: &deltas,
        uses: &uses,
        dq: Shared::new(&mut dq),
        dk: Shared::new(&mut dk),
        dv: Shared::new(&mut dv),
        slots: Shared::new(&mut slots),
        pairs: Shared::new(&mut pairs),
    };
    for (number, part) in of.parts.iter().enumerate() {
        let pieces = part.pieces();
        let work = 2 * part.work(width + value_width);
        host::share(pieces.len(), work, |range| {
            let mut room = Room::new();
            for (index, piece) in range.clone().zip(&pieces[range]) {
                match piece.is_small() {
                    true => pass.few(part, (piece, [number, index]), &mut room),
                    false => pass.many(part, (piece, [number, index]), &mut room),
                }
            }
        });
    }
    let sums = Sums {
        of,
        x,
        saved,
        uses: &uses,
        slots: &slots,
        pairs: &pairs,
    };
    sums.write(&Shared::new(&mut dk), &Shared::new(&mut dv));
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
    fn many(&self, part: &Part, (piece, at): (&Piece, [usize; 2]), room: &mut Room<T>) {
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
            for (&row, from) in rows.iter().zip(dq.chunks_exact(width.max(1))) {
                // SAFETY: a query is in one piece of a part.
                let to = unsafe { self.dq.part(row as usize * width, width) };
                to.iter_mut().zip(from).for_each(|(to, &from)| *to += from);
            }
        }
        self.hand_over(key_rows, self.uses.slots(at, length), [&*dk, &*dv]);
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

    /// Writes the gradients of the keys of a piece to where they go.
    fn hand_over(&self, rows: &[u32], slots: &[u32], [dk, dv]: [&[T]; 2]) {
        let [width, value_width] = self.x.widths();
        for (key, (&row, &slot)) in rows.iter().zip(slots).enumerate() {
            let (row, both) = (row as usize, slot as usize * (width + value_width));
            // SAFETY: a slot is one key's of one piece, and so is a row without one.
            let (to_k, to_v) = unsafe {
                match slot {
                    Uses::ALONE => (
                        self.dk.part(row * width, width),
                        self.dv.part(row * value_width, value_width),
                    ),
                    _ => self
                        .slots
                        .part(both, width + value_width)
                        .split_at_mut(width),
                }
            };
            to_k.copy_from_slice(&dk[key * width..][..width]);
            to_v.copy_from_slice(&dv[key * value_width..][..value_width]);
        }
    }

    /// A piece of so few queries that keys and values are read where they lie.
    fn few(&self, part: &Part, (piece, at): (&Piece, [usize; 2]), room: &mut Room<T>) {
        let (x, length) = (self.x, piece.keys.len());
        let first = self.uses.first_pair(at);
        let room = &mut room.tile.weights;
        room.resize(room.len().max(length), T::zero());
        for (number, query) in piece.queries.clone().enumerate() {
            let here = query..query + 1;
            let seen = part.seen(&here, &piece.keys);
            let weights = &mut room[..seen.len()];
            let by_position = !part.all_seen(&here, &seen);
            let (key_rows, at) = (part.key_rows(&seen), part.query_rows(&here)[0]);
            let place = first + number * length + piece.place(&seen).start;
            // SAFETY: pairs are those of one piece, and a query is in one piece of a part.
            let (pairs, dq) = unsafe {
                let dq = self.dq.part(at as usize * x.q.width, x.q.width);
                (self.pairs.part(place, seen.len()), dq)
            };
            let (log_sum, delta) = (self.saved.log_sums[at as usize], self.deltas[at as usize]);
            if log_sum == T::NEG_INFINITY {
                continue;
            }
            let d_output = self.saved.gradient(at);
            simd::vectorised(
                #[inline(always)]
                || {
                    let q = x.q.row(at);
                    for (score, &key) in weights.iter_mut().zip(key_rows) {
                        *score = x.scale * simd::dot(q, x.k.row(key));
                    }
                    part.adjust(piece, query, &seen, by_position, weights);
                    for ((pair, &score), &key) in pairs.iter_mut().zip(weights.iter()).zip(key_rows)
                    {
                        let weight = (score - log_sum).exp();
                        let value = x.v.row(key);
                        let slope = weight * (simd::dot(d_output, value) - delta);
                        *pair = [weight, slope];
                        simd::add_scaled(dq, x.k.row(key), x.scale * slope);
                    }
                },
            );
        }
    }
}

/// What is summed up for the rows of keys that several queries' blocks meet.
struct Sums<'a, T: Clone> {
    of: &'a BlockAttention,
    x: &'a Inputs<'a, T>,
    saved: &'a Saved<'a, T>,
    uses: &'a Uses,
    slots: &'a [T],
    pairs: &'a [[T; 2]],
}

impl<T: Real> Sums<'_, T> {
    fn write(&self, dk: &Shared<T>, dv: &Shared<T>) {
        let [width, value_width] = self.x.widths();
        let [_, keys] = self.of.rows;
        let [slots, pairs] = self.uses.sizes;
        let work = (slots + pairs) * (width + value_width) / keys.max(1);
        host::share(keys, work.max(1), |range| {
            simd::vectorised(
                #[inline(always)]
                || {
                    for key in range.clone() {
                        for source in self.uses.of(key, self.of) {
                            // SAFETY: a row is in one range.
                            let (dk, dv) = unsafe {
                                let dv = dv.part(key * value_width, value_width);
                                (dk.part(key * width, width), dv)
                            };
                            match source {
                                Source::Slot(slot) => {
                                    let from = &self.slots[slot * (width + value_width)..];
                                    let (from_k, from_v) = from.split_at(width);
                                    simd::add_scaled(dk, from_k, T::one());
                                    simd::add_scaled(dv, from_v, T::one());
                                }
                                Source::Pairs(place) => self.add_pairs(place, dk, dv),
                            }
                        }
                    }
                },
            );
        });
    }

    /// What a key gets in a small piece.
    #[inline(always)]
    fn add_pairs(&self, [part, piece, at, first]: [usize; 4], dk: &mut [T], dv: &mut [T]) {
        let part = &self.of.parts[part];
        let piece = &part.pieces()[piece];
        let queries = part.query_rows(&piece.queries).iter().enumerate();
        for (number, &query) in queries {
            let [weight, slope] = self.pairs[first + number * piece.keys.len() + at];
            let q = self.x.q.row(query);
            simd::add_scaled(dk, q, self.x.scale * slope);
            let d_output = self.saved.gradient(query);
            simd::add_scaled(dv, d_output, weight);
        }
    }
}
