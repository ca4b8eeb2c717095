//! The tiled forward and backward passes of attention.

use super::bias::{BiasGradient, BiasRows, Form, SharedGradient};
use crate::host::{self, Shared};
use crate::product::{Into, Matrix, Repeated};
use crate::simd::{self, Real};
use candle_core::{CpuStorage, Layout};
use std::borrow::Cow;
use std::ops::Range;

type Candle<T> = candle_core::Result<T>;

/// Queries of a tile.
pub(super) const QUERIES: usize = 64;
/// Keys of a tile.
pub(super) const KEYS: usize = 3 * Repeated::<f32>::COLUMNS;

/// Sizes and masks of one attention.
pub(super) struct Problem {
    pub(super) batch: usize,
    pub(super) heads: usize,
    pub(super) groups: usize,
    pub(super) queries: usize,
    pub(super) keys: usize,
    pub(super) width: usize,
    pub(super) value_width: usize,
    pub(super) scale: f64,
    pub(super) causal: bool,
    pub(super) window: Option<usize>,
    pub(super) offset: usize,
    /// `[batch, key]`, 1 = keep.
    pub(super) key_padding: Option<Vec<u8>>,
    /// Whether queries, keys and values came with heads side by side.
    pub(super) merged: bool,
    /// Where queries and keys stand, where that is not the order they lie in.
    pub(super) positions: Option<Positions>,
    /// What is added to scores.
    pub(super) bias: Option<Form>,
}

/// Positions of queries and keys that were gathered from somewhere.
pub(super) struct Positions {
    /// `[batch, query]`.
    pub(super) queries: Vec<u32>,
    /// `[batch, key]`.
    pub(super) keys: Vec<u32>,
}

impl Positions {
    /// Masks what a query may not see in a row of scores for `keys`.
    fn mask<T: Real>(
        &self,
        p: &Problem,
        (batch, query): (usize, usize),
        keys: &Range<usize>,
        scores: &mut [T],
    ) {
        let position = self.queries[batch * p.queries + query];
        let reaches = |away: u32| p.window.is_none_or(|window| (away as usize) < window);
        let keys = &self.keys[batch * p.keys..][keys.clone()];
        for (score, &key) in scores.iter_mut().zip(keys) {
            if (p.causal && key > position) || !reaches(key.abs_diff(position)) {
                *score = T::NEG_INFINITY;
            }
        }
    }
}

impl Problem {
    pub(super) fn output_dims(&self) -> [usize; 3] {
        [self.batch, self.queries, self.heads * self.value_width]
    }

    pub(super) fn query_dims(&self) -> [usize; 3] {
        [self.batch, self.heads, self.queries]
    }

    /// The keys that query `i` may see, padding aside.
    fn visible(&self, i: usize) -> Range<usize> {
        if self.positions.is_some() {
            return 0..self.keys;
        }
        let position = i + self.offset;
        let mut end = self.keys;
        let mut start = 0;
        if self.causal {
            end = end.min(position + 1);
        }
        if let Some(window) = self.window {
            end = end.min(position.saturating_add(window));
            start = (position + 1).saturating_sub(window);
        }
        start.min(end)..end
    }

    /// The keys that any of `queries` may see. Both ends of [`Self::visible`] grow with `i`.
    fn visible_to_any(&self, queries: &Range<usize>) -> Range<usize> {
        if queries.is_empty() {
            return 0..0;
        }
        let start = self.visible(queries.start).start;
        start..self.visible(queries.end - 1).end.max(start)
    }

    fn keeps(&self, batch: usize) -> Option<&[u8]> {
        self.key_padding
            .as_ref()
            .map(|keep| &keep[batch * self.keys..(batch + 1) * self.keys])
    }
}

/// A `[batch, heads, length, width]` view with adjacent features.
pub(super) struct Heads<'a, T: Clone> {
    data: Cow<'a, [T]>,
    /// Steps of batch, head and row.
    strides: [usize; 3],
    offset: usize,
}

impl<'a, T: Real> Heads<'a, T> {
    /// A view of a `[batch, heads, length, width]` tensor or of a merged
    /// `[batch, length, heads · width]` one.
    pub(super) fn new(storage: &'a CpuStorage, layout: &Layout, heads: usize) -> Candle<Self> {
        let dims = layout.dims();
        let last = dims.len() - 1;
        let adjacent = layout.stride()[last] == 1 || dims[last] <= 1;
        let packed;
        let (data, layout) = if adjacent {
            (Cow::Borrowed(T::cpu_storage_as_slice(storage)?), layout)
        } else {
            packed = Layout::contiguous(layout.shape());
            (host::ordered(storage, layout)?, &packed)
        };
        let stride = layout.stride();
        let strides = match *stride {
            [batch, head, row, _] => [batch, head, row],
            [batch, row, _] => [batch, dims[2] / heads.max(1), row],
            _ => candle_core::bail!("attention: rank {}", dims.len()),
        };
        Ok(Self {
            data,
            strides,
            offset: layout.start_offset(),
        })
    }

    pub(super) fn rows(
        &self,
        batch: usize,
        head: usize,
        rows: &Range<usize>,
        width: usize,
    ) -> Matrix<'_, T> {
        let start = self.offset
            + batch * self.strides[0]
            + head * self.strides[1]
            + rows.start * self.strides[2];
        let data = if rows.is_empty() || width == 0 {
            &[]
        } else {
            &self.data[start..]
        };
        Matrix::spaced(data, rows.len(), width, self.strides[2])
    }
}

/// Steps of batch, head and row in a packed tensor.
fn packed_strides(heads: usize, length: usize, width: usize, merged: bool) -> [usize; 3] {
    if merged {
        [length * heads * width, width, heads * width]
    } else {
        [heads * length * width, length * width, width]
    }
}

fn blocks(range: Range<usize>, size: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range
        .step_by(size)
        .map(move |start| start..end.min(start + size))
}

/// The first key of the tile that `key` is in.
fn tile_start(key: usize) -> usize {
    key / KEYS * KEYS
}

/// Tiles of the keys that any of `queries` may see.
fn tiles(p: &Problem, queries: &Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let seen = p.visible_to_any(queries);
    blocks(tile_start(seen.start)..seen.end, KEYS)
}

/// Keys and values of one head, to be multiplied with many queries.
struct Operands<'a, T> {
    /// Batch and group.
    of: usize,
    keys: Range<usize>,
    /// `Kᵀ`.
    k: Repeated<'a, T>,
    v: Repeated<'a, T>,
}

impl<'a, T: Real> Operands<'a, T> {
    /// Those that `queries` of `heads` heads of the group may see.
    fn new(
        p: &Problem,
        (k, v): (&'a Heads<'a, T>, &'a Heads<'a, T>),
        (batch, group): (usize, usize),
        queries: &Range<usize>,
        heads: usize,
    ) -> Self {
        let seen = p.visible_to_any(queries);
        let keys = tile_start(seen.start)..seen.end;
        // Which queries come together here depends on the threads, what all of them see does not.
        let rows = p.queries * heads;
        let across = k.rows(batch, group, &keys, p.width).transposed();
        Self {
            of: batch * p.groups + group,
            k: Repeated::part(across, rows, p.keys),
            v: Repeated::new(v.rows(batch, group, &keys, p.value_width), rows),
            keys,
        }
    }

    /// Where keys stand among those here.
    fn place(&self, keys: &Range<usize>) -> Range<usize> {
        keys.start - self.keys.start..keys.end - self.keys.start
    }
}

/// `tile = scale · a b` for the given rows and columns of `b`.
fn replace<T: Real>(
    tile: &mut [T],
    columns: usize,
    scale: T,
    a: Matrix<T>,
    b: &Repeated<T>,
    part: (Range<usize>, Range<usize>),
) {
    assert!(a.rows * columns <= tile.len() && part.1.len() == columns);
    let to = (tile.as_mut_ptr(), columns);
    // SAFETY: the tile is borrowed exclusively and large enough.
    unsafe { b.multiply_at(to, Into::Replace, scale, a, part) }
}

/// A tile of scores, `[queries, keys]`, with everything masked at `-∞`.
fn score_tile<T: Real>(
    p: &Problem,
    tile: &mut [T],
    (batch, head): (usize, usize),
    (queries, keys): (&Range<usize>, &Range<usize>),
    q: Matrix<T>,
    operands: &Operands<T>,
    bias: Option<&BiasRows<T>>,
) {
    let columns = keys.len();
    let part = (0..p.width, operands.place(keys));
    replace(tile, columns, T::of(p.scale), q, &operands.k, part);
    if let Some(bias) = bias {
        bias.add_to(tile, (batch, head), (queries, keys));
    }
    let keep = p.keeps(batch);
    for (row, i) in tile.chunks_exact_mut(columns).zip(queries.clone()) {
        let visible = p.visible(i);
        let first = visible.start.clamp(keys.start, keys.end) - keys.start;
        let end = visible.end.clamp(keys.start, keys.end) - keys.start;
        row[..first].fill(T::NEG_INFINITY);
        row[end.max(first)..].fill(T::NEG_INFINITY);
        if let Some(positions) = &p.positions {
            positions.mask(p, (batch, i), keys, row);
        }
        if let Some(keep) = keep {
            for (score, &keep) in row.iter_mut().zip(&keep[keys.clone()]) {
                if keep == 0 {
                    *score = T::NEG_INFINITY;
                }
            }
        }
    }
}

/// The merged output `[batch, query, heads · value_width]` and `L` `[batch, heads, query]`.
pub(super) fn forward<T: Real>(
    p: &Problem,
    q: &Heads<T>,
    k: &Heads<T>,
    v: &Heads<T>,
    bias: Option<&BiasRows<T>>,
) -> (Vec<T>, Vec<T>) {
    let mut output = vec![T::zero(); p.output_dims().iter().product()];
    let mut log_sums = vec![T::NEG_INFINITY; p.query_dims().iter().product()];
    let query_blocks = p.queries.div_ceil(QUERIES);
    let step = p.heads * p.value_width;
    let shared = SharedRows::new(&mut output);
    let shared_sums = Shared::new(&mut log_sums);
    let items = p.batch * p.heads * query_blocks;
    let work = QUERIES * p.keys.max(1) * (p.width + p.value_width) / 8;
    let heads_per_group = p.heads / p.groups;
    host::share(items, work, |range| {
        let mut tile = host::unwritten::<T>(QUERIES * KEYS);
        let mut operands: Option<Operands<T>> = None;
        for item in range.clone() {
            let (block, head) = (item % query_blocks, item / query_blocks % p.heads);
            let batch = item / query_blocks / p.heads;
            let group = head / heads_per_group;
            if operands
                .as_ref()
                .is_none_or(|known| known.of != batch * p.groups + group)
            {
                let rest = (query_blocks - block).min(range.end - item);
                let queries = match heads_per_group {
                    1 => block * QUERIES..p.queries.min((block + rest) * QUERIES),
                    _ => 0..p.queries,
                };
                let new = Operands::new(p, (k, v), (batch, group), &queries, heads_per_group);
                operands = Some(new);
            }
            let Some(operands) = &operands else {
                continue;
            };
            let start = block * QUERIES;
            let queries = start..p.queries.min(start + QUERIES);
            // SAFETY: each (batch, head, query block) owns its rows and sums.
            let out = unsafe {
                shared.rows(
                    (batch * p.queries + start) * step + head * p.value_width,
                    queries.len(),
                    step,
                    p.value_width,
                )
            };
            let sums = unsafe {
                shared_sums.part((batch * p.heads + head) * p.queries + start, queries.len())
            };
            let q_tile = q.rows(batch, head, &queries, p.width);
            let mut maxima = [T::NEG_INFINITY; QUERIES];
            let mut totals = [T::zero(); QUERIES];
            for keys in tiles(p, &queries) {
                let columns = keys.len();
                let tile = &mut tile[..queries.len() * columns];
                let place = ((batch, head), (&queries, &keys));
                score_tile(p, tile, place.0, place.1, q_tile, operands, bias);
                simd::vectorised(
                    #[inline(always)]
                    || {
                        online_softmax(tile, columns, &mut maxima, &mut totals, |row, factor| {
                            for o in out.row(row) {
                                *o *= factor;
                            }
                        });
                    },
                );
                out.add_product(
                    T::one(),
                    Matrix::packed(tile, queries.len(), columns),
                    &operands.v,
                    operands.place(&keys),
                );
            }
            simd::vectorised(
                #[inline(always)]
                || {
                    for (row, sum) in sums.iter_mut().enumerate() {
                        if totals[row] != T::zero() {
                            *sum = maxima[row] + totals[row].ln();
                            let inverse = T::one() / totals[row];
                            for o in out.row(row) {
                                *o *= inverse;
                            }
                        }
                    }
                },
            );
        }
    });
    (output, log_sums)
}

/// Turns a tile of scores into weights relative to the running maximum of each row, and tells
/// `rescale` by how much the earlier part of a row shrinks.
#[inline(always)]
fn online_softmax<T: Real>(
    tile: &mut [T],
    columns: usize,
    maxima: &mut [T; QUERIES],
    totals: &mut [T; QUERIES],
    rescale: impl Fn(usize, T),
) {
    for (row, scores) in tile.chunks_exact_mut(columns).enumerate() {
        let maximum = maxima[row].larger(simd::maximum(scores));
        if maximum == T::NEG_INFINITY {
            totals[row] += simd::without_hidden(scores);
            continue;
        }
        if maximum > maxima[row] && totals[row] > T::zero() {
            let factor = (maxima[row] - maximum).exp();
            totals[row] *= factor;
            rescale(row, factor);
        }
        maxima[row] = maximum;
        totals[row] += simd::exponentiate(scores, maximum);
    }
}

/// What the backward pass takes over from the forward one.
pub(super) struct Saved<'a, T: Clone> {
    pub(super) log_sums: Cow<'a, [T]>,
    /// Merged, like the gradient with respect to it.
    pub(super) output: Cow<'a, [T]>,
    pub(super) gradient: Cow<'a, [T]>,
    /// Gradient with respect to `L`, `[batch, heads, query]`; empty where nothing reads it.
    pub(super) log_sums_gradient: Cow<'a, [T]>,
}

/// Gradients, packed in the order of the arguments.
pub(super) struct Gradients<T> {
    pub(super) q: Vec<T>,
    pub(super) k: Vec<T>,
    pub(super) v: Vec<T>,
    /// Where it is asked for.
    pub(super) bias: Option<BiasGradient<T>>,
}

pub(super) fn backward<T: Real>(
    p: &Problem,
    q: &Heads<T>,
    k: &Heads<T>,
    v: &Heads<T>,
    bias: Option<&BiasRows<T>>,
    saved: &Saved<T>,
    bias_gradient: bool,
) -> Gradients<T> {
    let learned = bias.filter(|_| bias_gradient);
    let zeros = |heads, length, width| vec![T::zero(); p.batch * heads * length * width];
    let mut gradients = Gradients {
        q: zeros(p.heads, p.queries, p.width),
        k: zeros(p.groups, p.keys, p.width),
        v: zeros(p.groups, p.keys, p.value_width),
        bias: learned.map(|bias| bias.no_gradient(p)),
    };
    let q_strides = packed_strides(p.heads, p.queries, p.width, p.merged);
    let k_strides = packed_strides(p.groups, p.keys, p.width, p.merged);
    let v_strides = packed_strides(p.groups, p.keys, p.value_width, p.merged);
    let dq = SharedRows::new(&mut gradients.q);
    let dk = SharedRows::new(&mut gradients.k);
    let dv = SharedRows::new(&mut gradients.v);
    let d_bias = (learned.zip(gradients.bias.as_mut()))
        .map(|(bias, gradient)| SharedGradient::new(bias, gradient));
    let step = p.heads * p.value_width;
    let heads_per_group = p.heads / p.groups;
    let work = heads_per_group * p.queries * p.keys.max(1) * (p.width + p.value_width) / 4;
    host::share(p.batch * p.groups, work.max(1), |range| {
        let mut weights = host::unwritten::<T>(QUERIES * KEYS);
        let mut slopes = host::unwritten::<T>(QUERIES * KEYS);
        for item in range {
            let (batch, group) = (item / p.groups, item % p.groups);
            let operands =
                Operands::new(p, (k, v), (batch, group), &(0..p.queries), heads_per_group);
            let rows = p.queries * heads_per_group;
            let among = &operands.keys;
            let v_across = v.rows(batch, group, among, p.value_width).transposed();
            let v_across = Repeated::new(v_across, rows);
            let k_rows = Repeated::new(k.rows(batch, group, among, p.width), rows);
            for head in group * heads_per_group..(group + 1) * heads_per_group {
                for queries in blocks(0..p.queries, QUERIES) {
                    let first = (batch * p.queries + queries.start) * step + head * p.value_width;
                    let output_row = |row: usize| first + row * step;
                    let log_sums = &saved.log_sums
                        [(batch * p.heads + head) * p.queries + queries.start..][..queries.len()];
                    let first_sum = (batch * p.heads + head) * p.queries + queries.start;
                    let d_log_sums = saved.log_sums_gradient.get(first_sum..);
                    let mut deltas = [T::zero(); QUERIES];
                    simd::vectorised(
                        #[inline(always)]
                        || {
                            for (row, delta) in deltas[..queries.len()].iter_mut().enumerate() {
                                let at = output_row(row)..output_row(row) + p.value_width;
                                *delta = simd::dot(&saved.output[at.clone()], &saved.gradient[at]);
                            }
                            // ∂L/∂S = P, so that a gradient of L counts against δ.
                            for (delta, d) in deltas.iter_mut().zip(d_log_sums.unwrap_or(&[])) {
                                *delta -= *d;
                            }
                        },
                    );
                    let q_tile = q.rows(batch, head, &queries, p.width);
                    let d_output = Matrix::spaced(
                        &saved.gradient[first.min(saved.gradient.len())..],
                        queries.len(),
                        p.value_width,
                        step,
                    );
                    let q_right = Repeated::new(q_tile, p.keys);
                    let d_output_right = Repeated::new(d_output, p.keys);
                    // SAFETY: a task owns all heads of its (batch, group), and with them these rows
                    // of every gradient.
                    let dq_tile = unsafe {
                        let at = batch * q_strides[0] + head * q_strides[1];
                        let start = at + queries.start * q_strides[2];
                        dq.rows(start, queries.len(), q_strides[2], p.width)
                    };
                    for keys in tiles(p, &queries) {
                        let columns = keys.len();
                        let weights = &mut weights[..queries.len() * columns];
                        let slopes = &mut slopes[..queries.len() * columns];
                        let place = ((batch, head), (&queries, &keys));
                        score_tile(p, weights, place.0, place.1, q_tile, &operands, bias);
                        let here = operands.place(&keys);
                        let part = (0..p.value_width, here.clone());
                        replace(slopes, columns, T::one(), d_output, &v_across, part);
                        simd::vectorised(
                            #[inline(always)]
                            || weights_and_slopes(weights, slopes, columns, log_sums, &deltas),
                        );
                        if let Some(d_bias) = &d_bias {
                            // SAFETY: as above.
                            unsafe { d_bias.add(p, place.0, slopes, place.1) };
                        }
                        let weights = Matrix::packed(weights, queries.len(), columns);
                        let slopes = Matrix::packed(slopes, queries.len(), columns);
                        // SAFETY: as above.
                        let dk_tile = unsafe {
                            let at = batch * k_strides[0] + group * k_strides[1];
                            dk.rows(
                                at + keys.start * k_strides[2],
                                columns,
                                k_strides[2],
                                p.width,
                            )
                        };
                        // SAFETY: as above.
                        let dv_tile = unsafe {
                            let at = batch * v_strides[0] + group * v_strides[1];
                            let start = at + keys.start * v_strides[2];
                            dv.rows(start, columns, v_strides[2], p.value_width)
                        };
                        let scale = T::of(p.scale);
                        let all = 0..queries.len();
                        dv_tile.add_product(
                            T::one(),
                            weights.transposed(),
                            &d_output_right,
                            all.clone(),
                        );
                        dq_tile.add_product(scale, slopes, &k_rows, here);
                        dk_tile.add_product(scale, slopes.transposed(), &q_right, all);
                    }
                }
            }
        }
    });
    gradients
}

/// Scores become weights `P = e^{S-L}`, and `∂P` becomes `∂S = P ∘ (∂P - δ)`.
#[inline(always)]
pub(crate) fn weights_and_slopes<T: Real>(
    weights: &mut [T],
    slopes: &mut [T],
    columns: usize,
    log_sums: &[T],
    deltas: &[T],
) {
    let rows = weights
        .chunks_exact_mut(columns)
        .zip(slopes.chunks_exact_mut(columns));
    for ((weights, slopes), (&log_sum, &delta)) in rows.zip(log_sums.iter().zip(deltas)) {
        if log_sum == T::NEG_INFINITY {
            weights.fill(T::zero());
            slopes.fill(T::zero());
            continue;
        }
        for (weight, slope) in weights.iter_mut().zip(slopes) {
            *weight = (*weight - log_sum).exp();
            *slope = *weight * (*slope - delta);
        }
    }
}

/// A buffer in which several threads write rows of their own, `step` apart.
struct SharedRows<'a, T> {
    buffer: Shared<'a, T>,
}

/// Some rows of a [`SharedRows`].
struct Rows<'a, T> {
    start: *mut T,
    count: usize,
    step: usize,
    width: usize,
    owner: std::marker::PhantomData<&'a mut [T]>,
}

impl<'a, T: Real> SharedRows<'a, T> {
    fn new(slice: &'a mut [T]) -> Self {
        Self {
            buffer: Shared::new(slice),
        }
    }

    /// # Safety
    /// No two live sets of rows may have an element in common.
    unsafe fn rows(&self, start: usize, count: usize, step: usize, width: usize) -> Rows<'_, T> {
        let extent = if count == 0 || width == 0 {
            0
        } else {
            (count - 1) * step + width
        };
        Rows {
            start: self.buffer.pointer(start, extent),
            count,
            step,
            width,
            owner: std::marker::PhantomData,
        }
    }
}

impl<T: Real> Rows<'_, T> {
    /// One row. The caller holds no other reference into the same row.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)]
    fn row(&self, row: usize) -> &mut [T] {
        assert!(row < self.count);
        // SAFETY: in bounds by construction; rows of one set are only used one at a time.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(row * self.step), self.width) }
    }

    /// Adds the product with some rows of `b`.
    fn add_product(&self, scale: T, a: Matrix<T>, b: &Repeated<T>, rows: Range<usize>) {
        assert!(a.rows == self.count);
        let to = (self.start, self.step);
        // SAFETY: the rows are in bounds and belong to this task alone.
        unsafe { b.multiply_at(to, Into::Add, scale, a, (rows, 0..self.width)) }
    }
}
