//! The forward pass: piece by piece with an online softmax, one part after the other.

use super::BlockAttention;
use super::pieces::{Part, Piece};
use super::rows::{Inputs, KEYS, QUERIES, key_tiles, multiply, tiles};
use crate::host::{self, Shared};
use crate::online_softmax::{State, online};
use crate::product::{Into, Matrix, Repeated};
use crate::simd::{self, Real};

/// Outputs so far, not yet divided by their sums.
struct Results<'a, T> {
    rows: Shared<'a, T>,
    states: Shared<'a, State<T>>,
    width: usize,
    /// Numbers of a row.
    step: usize,
}

impl<T: Real> Results<'_, T> {
    /// Joins what a query got to what it has from earlier parts.
    ///
    /// # Safety
    /// Nobody else has the row meanwhile.
    #[inline(always)]
    unsafe fn join(&self, row: u32, output: &[T], got: State<T>) {
        if got.total == T::zero() {
            return;
        }
        let row = row as usize;
        // SAFETY: by contract.
        let (to, state) = unsafe {
            let state = self.states.part(row, 1);
            (self.rows.part(row * self.step, self.width), state)
        };
        let [state] = state else {
            return;
        };
        if state.total == T::zero() {
            to.copy_from_slice(output);
            *state = got;
            return;
        }
        let maximum = state.maximum.larger(got.maximum);
        let old = (state.maximum - maximum).exp();
        let new = (got.maximum - maximum).exp();
        for (to, &from) in to.iter_mut().zip(output) {
            *to = old * *to + new * from;
        }
        *state = State {
            maximum,
            total: old * state.total + new * got.total,
        };
    }
}

/// Outputs `[queries, value_width]`, behind each its log-sum where `sums`; and all log-sums.
pub(super) fn forward<T: Real>(of: &BlockAttention, x: &Inputs<T>, sums: bool) -> (Vec<T>, Vec<T>) {
    let [queries, _] = of.rows;
    let [width, value_width] = x.widths();
    let step = value_width + usize::from(sums);
    let mut rows = vec![T::zero(); queries * step];
    let mut states = vec![State::nothing(); queries];
    let results = Results {
        rows: Shared::new(&mut rows),
        states: Shared::new(&mut states),
        width: value_width,
        step,
    };
    for part in &of.parts {
        let pieces = part.pieces();
        host::share_by_work(&part.work_ends(width + value_width), |range| {
            let mut room = Room::new();
            for run in pieces[range].chunk_by(Piece::shares_keys) {
                match run {
                    [piece] if piece.is_small() => few(part, piece, x, &results, &mut room),
                    run => many(part, run, x, &results, &mut room),
                }
            }
        });
    }
    let log_sums = divided(&mut rows, &states, value_width, step);
    (rows, log_sums)
}

/// Memory that pieces use one after the other.
struct Room<T> {
    queries: Vec<T>,
    keys: Vec<T>,
    values: Vec<T>,
    scores: Vec<T>,
    output: Vec<T>,
}

impl<T> Room<T> {
    fn new() -> Self {
        Self {
            queries: Vec::new(),
            keys: Vec::new(),
            values: Vec::new(),
            scores: Vec::new(),
            output: Vec::new(),
        }
    }
}

/// Pieces of the same keys, which are laid out with their values once.
fn many<T: Real>(
    part: &Part,
    pieces: &[Piece],
    x: &Inputs<T>,
    results: &Results<T>,
    room: &mut Room<T>,
) {
    let Some(first) = pieces.first() else {
        return;
    };
    let [width, value_width] = x.widths();
    // All have enough queries for panels, so that it does not matter how many a thread has.
    let (count, key_rows) = (first.queries.len(), part.key_rows(&first.keys));
    let k = x.k.gathered(key_rows, &mut room.keys);
    let v = x.v.gathered(key_rows, &mut room.values);
    let (k, v) = (
        Repeated::new(k.transposed(), count),
        Repeated::new(v, count),
    );
    room.scores.resize(QUERIES * KEYS, T::zero());
    let each = pieces
        .iter()
        .flat_map(|piece| tiles(piece.queries.clone(), QUERIES).map(move |tile| (piece, tile)));
    for (piece, queries) in each {
        let rows = part.query_rows(&queries);
        let q = x.q.gathered(rows, &mut room.queries);
        room.output.clear();
        room.output.resize(rows.len() * value_width, T::zero());
        let output = &mut room.output;
        let mut states = [State::nothing(); QUERIES];
        for keys in key_tiles(part.seen(&queries, &piece.keys), piece.keys.start) {
            let (columns, here) = (keys.len(), piece.place(&keys));
            let tile = &mut room.scores[..rows.len() * columns];
            multiply(
                tile,
                Into::Replace,
                x.scale,
                q,
                &k,
                (0..width, here.clone()),
            );
            let by_position = !part.all_seen(&queries, &keys);
            simd::vectorised(
                #[inline(always)]
                || {
                    let each = tile.chunks_exact_mut(columns).zip(queries.clone());
                    for (at, (scores, query)) in each.enumerate() {
                        part.adjust(piece, query, &keys, by_position, scores);
                        let factor = online(scores, &mut states[at]);
                        if factor != T::one() {
                            for o in &mut output[at * value_width..][..value_width] {
                                *o *= factor;
                            }
                        }
                    }
                },
            );
            let weights = Matrix::packed(tile, rows.len(), columns);
            multiply(
                output,
                Into::Add,
                T::one(),
                weights,
                &v,
                (here, 0..value_width),
            );
        }
        simd::vectorised(
            #[inline(always)]
            || {
                for (at, (&row, &state)) in rows.iter().zip(&states).enumerate() {
                    let output = &output[at * value_width..][..value_width];
                    // SAFETY: a query is in one piece of a part.
                    unsafe { results.join(row, output, state) };
                }
            },
        );
    }
}

/// A piece of so few queries that keys and values are read where they lie.
fn few<T: Real>(
    part: &Part,
    piece: &Piece,
    x: &Inputs<T>,
    results: &Results<T>,
    room: &mut Room<T>,
) {
    let [_, value_width] = x.widths();
    room.output.resize(value_width, T::zero());
    room.scores
        .resize(room.scores.len().max(piece.keys.len()), T::zero());
    let output = &mut room.output[..value_width];
    for query in piece.queries.clone() {
        let here = query..query + 1;
        let seen = part.seen(&here, &piece.keys);
        let scores = &mut room.scores[..seen.len()];
        let by_position = !part.all_seen(&here, &seen);
        let (key_rows, at) = (part.key_rows(&seen), part.query_rows(&here)[0]);
        simd::vectorised(
            #[inline(always)]
            || {
                let q = x.q.row(at);
                for (score, &key) in scores.iter_mut().zip(key_rows) {
                    *score = x.scale * simd::dot(q, x.k.row(key));
                }
                part.adjust(piece, query, &seen, by_position, scores);
                let mut state = State::nothing();
                online(scores, &mut state);
                output.fill(T::zero());
                for (&weight, &key) in scores.iter().zip(key_rows) {
                    simd::add_scaled(output, x.v.row(key), weight);
                }
                // SAFETY: a query is in one piece of a part.
                unsafe { results.join(at, output, state) };
            },
        );
    }
}

/// Divides outputs by their sums, and gives `L = m + ln l`.
fn divided<T: Real>(rows: &mut [T], states: &[State<T>], width: usize, step: usize) -> Vec<T> {
    let mut log_sums = vec![T::NEG_INFINITY; states.len()];
    let (rows, sums) = (Shared::new(rows), Shared::new(&mut log_sums));
    host::share(states.len(), width, |range| {
        simd::vectorised(
            #[inline(always)]
            || {
                for (query, state) in range.clone().zip(&states[range.clone()]) {
                    // SAFETY: each query has a row and a sum of its own.
                    let (row, sum) =
                        unsafe { (rows.part(query * step, step), sums.part(query, 1)) };
                    if state.total != T::zero() {
                        sum[0] = state.maximum + state.total.ln();
                        let inverse = T::one() / state.total;
                        for o in &mut row[..width] {
                            *o *= inverse;
                        }
                    }
                    row[width..].copy_from_slice(&sum[..step - width]);
                }
            },
        );
    });
    log_sums
}
