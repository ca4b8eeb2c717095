//! Attention whose scores are a polynomial of second degree of inner products, applied exactly in
//! time linear in the length (Gerami et al., "FAST: Factorizable Attention for Speeding up
//! Transformers", arXiv 2402.07901).
//!
//! ```text
//! y_i = Σ_j f(q_i · k_j) v_j,     f(s) = a₀ + a₁ s + a₂ s²
//! f(q · k) = Φ(q) · Ψ(k),         Ψ(k) = (1, k_m …, k_m k_l …) with m ≤ l
//!                                 Φ(q) = (a₀, a₁ q_m …, a₂ (2 − δ_ml) q_m q_l …)
//! ```
//!
//! The monomials of a chunk of positions are written out, met with the sums `Σ_j Ψ(k_j) v_jᵀ`, and
//! forgotten; under a causal mask a chunk meets itself with its scores laid out. Backward, with
//! `g_i = ∂y_i`,
//!
//! ```text
//! ∂v_j = Σ_i f(s_ij) g_i,   ∂q_i = Σ_j f′(s_ij) (g_i · v_j) k_j,   ∂k_j = Σ_i f′(s_ij) (g_i · v_j) q_i
//! ```
//!
//! are sums of the same kind over `Ψ(k) vᵀ` and `Φ(q) gᵀ`. Nothing of the size of positions times
//! monomials is ever stored.

use crate::host::{self, Host, Shared, by_dtype, fused};
use crate::product::{Into, Matrix, Threads, multiply};
use crate::simd::{self, Real};
use crate::{Error, Result, Tensor, naive};
use candle_core::{CpuStorage, CustomOp3, Layout, Shape};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::ops::Range;

type Candle<T> = candle_core::Result<T>;

/// Positions whose monomials are written out at one time.
const CHUNK: usize = 64;

/// The monomials of highest degree of queries and of keys are dropped each with `probability`, and
/// the others divided by `1 − probability`: what stands in for dropping attention weights, which
/// are never laid out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FactorDropout {
    /// In `[0, 1)`.
    pub probability: f64,
    /// The same seed drops the same.
    pub seed: u64,
}

/// `y_i = Σ_j f(q_i · k_j) v_j` with `f(s) = a₀ + a₁ s + a₂ s²`. Nothing is normalised: a column of
/// ones in the values gives the sum of the scores.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PolynomialAttention {
    /// `a₀`, `a₁` and `a₂`; without the last, no pairs are written out.
    pub coefficients: [f64; 3],
    /// Whether a position meets itself and earlier ones alone.
    pub causal: bool,
    /// What is dropped in training.
    pub dropout: Option<FactorDropout>,
    /// Positions at one time; results do not depend on it beyond rounding.
    pub chunk: usize,
}

impl PolynomialAttention {
    /// With these coefficients, over all positions or over the past.
    pub fn new(coefficients: [f64; 3], causal: bool) -> Self {
        Self {
            coefficients,
            causal,
            dropout: None,
            chunk: CHUNK,
        }
    }

    fn has_pairs(&self) -> bool {
        self.coefficients[2] != 0.0
    }

    /// Monomials of a vector of `width` numbers: `1 + d + d (d + 1) / 2`, or `1 + d` in degree one.
    pub fn monomials(&self, width: usize) -> usize {
        let pairs = if self.has_pairs() {
            width * (width + 1) / 2
        } else {
            0
        };
        1 + width + pairs
    }

    /// Multiplications and additions of [`PolynomialAttention::sums`] for one head.
    pub fn operations(&self, queries: usize, keys: usize, width: usize, value_width: usize) -> u64 {
        let monomials = self.monomials(width) as u64;
        let (both, value_width) = ((queries + keys) as u64, value_width as u64);
        let factored = both * monomials * (2 * value_width + 2);
        if !self.causal {
            return factored;
        }
        let chunk = self.chunk.clamp(1, queries.max(1));
        let rest = (queries % chunk) as u64;
        let pairs = (queries / chunk * chunk * chunk) as u64 + rest * rest;
        factored + pairs * (2 * width as u64 + 4 + 2 * value_width)
    }

    /// The sums `[batch, heads, query, value_width]` for `q` `[batch, heads, query, width]`, `k`
    /// `[batch, heads, key, width]` and `v` `[batch, heads, key, value_width]`.
    ///
    /// Time grows with `(queries + keys) · width² · value_width / 2`, memory with what comes in and
    /// `width² · value_width`.
    ///
    /// # Errors
    /// When shapes do not fit; for dropout where there is no kernel.
    pub fn sums(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (batch, heads, queries, width) = q.dims4()?;
        let refuse = |name: &'static str, found: &[usize], expected: String| {
            Err(Error::argument(
                "polynomial attention",
                name,
                found,
                expected,
            ))
        };
        let keys = k.dim(2)?;
        if k.dims() != [batch, heads, keys, width] || (self.causal && queries != keys) {
            let expected = match self.causal {
                true => format!("{:?}", q.dims()),
                false => format!("[{batch}, {heads}, keys, {width}]"),
            };
            return refuse("k", k.dims(), expected);
        }
        let value_width = v.dims4()?.3;
        if v.dims() != [batch, heads, keys, value_width] {
            let expected = format!("[{batch}, {heads}, {keys}, width]");
            return refuse("v", v.dims(), expected);
        }
        if !fused(&[q, k, v]) {
            if self.dropout.is_some() {
                let found = format!("{:?}", q.device());
                let expected = "f32 or f64 on the CPU, for dropout of factors";
                return Err(Error::argument(
                    "polynomial attention",
                    "device",
                    found,
                    expected,
                ));
            }
            return naive::polynomial_attention(q, k, v, self.coefficients, self.causal);
        }
        let operation = Sums {
            attention: *self,
            sizes: Sizes {
                heads: batch * heads,
                queries,
                keys,
                width,
                value_width,
            },
        };
        Ok(q.apply_op3(k, v, operation)?)
    }

    /// What keys and values leave to later queries: `Σ_j Ψ(k_j) v_jᵀ`,
    /// `[batch, heads, monomials, value_width]`. Not differentiated.
    ///
    /// # Errors
    /// As [`PolynomialAttention::sums`].
    pub fn state(&self, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (batch, heads, length, width) = k.dims4()?;
        let value_width = v.dims4()?.3;
        if v.dims() != [batch, heads, length, value_width] {
            let expected = format!("[{batch}, {heads}, {length}, width]");
            return Err(Error::argument(
                "polynomial attention",
                "v",
                v.dims(),
                expected,
            ));
        }
        let monomials = self.monomials(width);
        let shape = [batch, heads, monomials, value_width];
        let sizes = [batch * heads, length, width, value_width];
        let (k, v) = (Host::new(k), Host::new(v));
        Ok(by_dtype!(host::dtype(k.storage()?), T => {
            host::tensor(self.collect::<T>(&k.ordered()?, &v.ordered()?, sizes), &shape)
        })?)
    }

    /// [`PolynomialAttention::state`] for `heads`, `length`, `width` and `value_width`.
    fn collect<T: Real>(
        &self,
        k: &[T],
        v: &[T],
        [heads, length, width, value_width]: [usize; 4],
    ) -> Vec<T> {
        let factors = self.keys(width);
        let each = factors.count * value_width;
        let mut states = vec![T::zero(); heads * each];
        let mut written = Vec::new();
        for (head, state) in states.chunks_exact_mut(each.max(1)).enumerate() {
            for range in chunks(length, self.chunk) {
                let k = rows(k, width, head, length, &range);
                let v = rows(v, value_width, head, length, &range);
                let psi = factors.expand(k, 0, &mut written);
                let v = Matrix::packed(v, range.len(), value_width);
                product(state, Into::Add, psi.transposed(), v);
            }
        }
        states
    }

    /// What queries `[batch, heads, query, width]` read from such a state:
    /// `[batch, heads, query, value_width]`. Not differentiated.
    ///
    /// # Errors
    /// When the state is not one of such queries.
    pub fn read(&self, q: &Tensor, state: &Tensor) -> Result<Tensor> {
        let (batch, heads, length, width) = q.dims4()?;
        let value_width = state.dims4()?.3;
        let monomials = self.monomials(width);
        if state.dims() != [batch, heads, monomials, value_width] {
            let expected = format!("[{batch}, {heads}, {monomials}, width]");
            return Err(Error::argument(
                "polynomial attention",
                "state",
                state.dims(),
                expected,
            ));
        }
        let shape = [batch, heads, length, value_width];
        let sizes = [batch * heads, length, width, value_width];
        let (q, state) = (Host::new(q), Host::new(state));
        Ok(by_dtype!(host::dtype(q.storage()?), T => {
            host::tensor(self.found::<T>(&q.ordered()?, &state.ordered()?, sizes), &shape)
        })?)
    }

    /// [`PolynomialAttention::read`] for `heads`, `length`, `width` and `value_width`.
    fn found<T: Real>(
        &self,
        q: &[T],
        states: &[T],
        [heads, length, width, value_width]: [usize; 4],
    ) -> Vec<T> {
        let factors = self.queries(width);
        let each = factors.count * value_width;
        let mut output = vec![T::zero(); heads * length * value_width];
        let mut written = Vec::new();
        for (head, state) in states.chunks_exact(each.max(1)).enumerate() {
            let state = Matrix::packed(state, factors.count, value_width);
            for range in chunks(length, self.chunk) {
                let phi = factors.expand(rows(q, width, head, length, &range), 0, &mut written);
                let start = (head * length + range.start) * value_width;
                let output = &mut output[start..start + range.len() * value_width];
                product(output, Into::Replace, phi, state);
            }
        }
        output
    }

    /// `Φ`.
    fn queries(&self, width: usize) -> Factors {
        let [constant, linear, square] = self.coefficients;
        Factors {
            weights: [constant, linear, square, 2.0 * square],
            ..self.keys(width)
        }
    }

    /// `Ψ`.
    fn keys(&self, width: usize) -> Factors {
        Factors {
            width,
            count: self.monomials(width),
            has_pairs: self.has_pairs(),
            weights: [1.0; 4],
            dropout: self.dropout,
        }
    }
}

/// The parts of `0..length` that are taken at one time.
fn chunks(length: usize, chunk: usize) -> impl DoubleEndedIterator<Item = Range<usize>> {
    let chunk = chunk.max(1);
    (0..length.div_ceil(chunk)).map(move |index| {
        let start = index * chunk;
        start..length.min(start.saturating_add(chunk))
    })
}

/// Rows of one head, which has `length` of them.
fn rows<'a, T>(
    all: &'a [T],
    width: usize,
    head: usize,
    length: usize,
    range: &Range<usize>,
) -> &'a [T] {
    let start = (head * length + range.start) * width;
    &all[start..start + range.len() * width]
}

/// How a vector becomes weighted monomials: `1`, each entry, and each pair of entries once.
#[derive(Clone, Copy)]
struct Factors {
    width: usize,
    count: usize,
    has_pairs: bool,
    /// Of the constant, of entries, of their squares, and of products of two.
    weights: [f64; 4],
    dropout: Option<FactorDropout>,
}

impl Factors {
    /// The monomials of the rows of `x`, `[rows, count]`, kept in `written`. `stream` tells the
    /// first row's dropout from that of all others.
    fn expand<'a, T: Real>(&self, x: &[T], stream: u64, written: &'a mut Vec<T>) -> Matrix<'a, T> {
        let rows = x.len() / self.width.max(1);
        written.resize(rows * self.count, T::zero());
        simd::vectorised(
            #[inline(always)]
            || {
                let each = written.chunks_exact_mut(self.count);
                for (x, written) in x.chunks_exact(self.width.max(1)).zip(each) {
                    self.expand_row(x, written);
                }
            },
        );
        self.drop_factors(stream, written);
        Matrix::packed(written, rows, self.count)
    }

    #[inline(always)]
    fn expand_row<T: Real>(&self, x: &[T], written: &mut [T]) {
        let [constant, linear, square, product] = self.weights.map(T::of);
        let width = x.len();
        written[0] = constant;
        let (entries, pairs) = written[1..].split_at_mut(width);
        for (to, x) in entries.iter_mut().zip(x) {
            *to = linear * *x;
        }
        if !self.has_pairs {
            return;
        }
        let mut start = 0;
        for (m, own) in x.iter().enumerate() {
            let pairs = &mut pairs[start..start + width - m];
            pairs[0] = square * *own * *own;
            let scale = product * *own;
            for (to, x) in pairs[1..].iter_mut().zip(&x[m + 1..]) {
                *to = scale * *x;
            }
            start += width - m;
        }
    }

    /// Adds to `gradient` `[rows, width]` what `slopes` `[rows, count]`, derivatives with respect to
    /// the monomials of the rows of `x`, say of `x`.
    fn contract<T: Real>(&self, x: &[T], stream: u64, slopes: &mut [T], gradient: &mut [T]) {
        self.drop_factors(stream, slopes);
        let width = self.width.max(1);
        simd::vectorised(
            #[inline(always)]
            || {
                let rows = x.chunks_exact(width).zip(gradient.chunks_exact_mut(width));
                for ((x, gradient), slopes) in rows.zip(slopes.chunks_exact(self.count)) {
                    self.contract_row(x, slopes, gradient);
                }
            },
        );
    }

    #[inline(always)]
    fn contract_row<T: Real>(&self, x: &[T], slopes: &[T], gradient: &mut [T]) {
        let [_, linear, square, product] = self.weights.map(T::of);
        let width = x.len();
        let (entries, pairs) = slopes[1..].split_at(width);
        simd::add_scaled(gradient, entries, linear);
        if !self.has_pairs {
            return;
        }
        let mut start = 0;
        for (m, own) in x.iter().enumerate() {
            let pairs = &pairs[start..start + width - m];
            let others = product * simd::dot(&pairs[1..], &x[m + 1..]);
            gradient[m] += (square + square) * *own * pairs[0] + others;
            simd::add_scaled(&mut gradient[m + 1..], &pairs[1..], product * *own);
            start += width - m;
        }
    }

    /// Applies the dropout of rows from `stream` on, two apart, to monomials or their derivatives.
    fn drop_factors<T: Real>(&self, stream: u64, rows: &mut [T]) {
        let Some(FactorDropout { probability, seed }) = self.dropout else {
            return;
        };
        let keep = T::of(1.0 / (1.0 - probability));
        let dropped = match self.has_pairs {
            true => 1 + self.width..self.count,
            false => 1..self.count,
        };
        for (row, stream) in rows.chunks_exact_mut(self.count).zip((stream..).step_by(2)) {
            let mut generator = ChaCha8Rng::seed_from_u64(seed);
            generator.set_stream(stream);
            for number in &mut row[dropped.clone()] {
                *number *= match generator.random_bool(probability) {
                    true => T::zero(),
                    false => keep,
                };
            }
        }
    }
}

#[derive(Clone, Copy)]
struct Sizes {
    /// Of all sequences.
    heads: usize,
    queries: usize,
    keys: usize,
    width: usize,
    value_width: usize,
}

/// One head's tensors, and what is needed to take them chunk by chunk.
struct Head<'a, T> {
    attention: PolynomialAttention,
    sizes: Sizes,
    index: usize,
    q: &'a [T],
    k: &'a [T],
    v: &'a [T],
}

/// Memory that chunks share.
struct Scratch<T> {
    /// `Σ Ψ(k) vᵀ` or `Σ Φ(q) gᵀ`, `[monomials, value_width]`.
    state: Vec<T>,
    phi: Vec<T>,
    psi: Vec<T>,
    /// Derivatives with respect to either.
    slopes: Vec<T>,
    scores: Vec<T>,
    /// `f′` times the derivative of each score.
    score_slopes: Vec<T>,
}

impl<T: Real> Scratch<T> {
    fn new() -> Self {
        Self {
            state: Vec::new(),
            phi: Vec::new(),
            psi: Vec::new(),
            slopes: Vec::new(),
            scores: Vec::new(),
            score_slopes: Vec::new(),
        }
    }
}

impl<T: Real> Head<'_, T> {
    fn rows<'b>(&self, all: &'b [T], width: usize, range: &Range<usize>) -> Matrix<'b, T> {
        let data = &all[range.start * width..range.end * width];
        Matrix::packed(data, range.len(), width)
    }

    fn q(&self, range: &Range<usize>) -> Matrix<'_, T> {
        self.rows(self.q, self.sizes.width, range)
    }

    fn k(&self, range: &Range<usize>) -> Matrix<'_, T> {
        self.rows(self.k, self.sizes.width, range)
    }

    fn v(&self, range: &Range<usize>) -> Matrix<'_, T> {
        self.rows(self.v, self.sizes.value_width, range)
    }

    fn phi<'b>(&self, range: &Range<usize>, written: &'b mut Vec<T>) -> Matrix<'b, T> {
        let factors = self.attention.queries(self.sizes.width);
        factors.expand(self.q(range).data, self.query_stream(range), written)
    }

    fn psi<'b>(&self, range: &Range<usize>, written: &'b mut Vec<T>) -> Matrix<'b, T> {
        let factors = self.attention.keys(self.sizes.width);
        factors.expand(self.k(range).data, self.key_stream(range), written)
    }

    fn query_stream(&self, range: &Range<usize>) -> u64 {
        2 * (self.index * self.sizes.queries + range.start) as u64
    }

    fn key_stream(&self, range: &Range<usize>) -> u64 {
        2 * (self.index * self.sizes.keys + range.start) as u64 + 1
    }

    fn forget(&self, state: &mut Vec<T>) {
        state.clear();
        let monomials = self.attention.monomials(self.sizes.width);
        state.resize(monomials * self.sizes.value_width, T::zero());
    }

    fn state<'b>(&self, state: &'b [T]) -> Matrix<'b, T> {
        let monomials = self.attention.monomials(self.sizes.width);
        Matrix::packed(state, monomials, self.sizes.value_width)
    }

    /// Adds `Ψ(k) vᵀ` of a chunk to the state.
    fn remember(&self, range: &Range<usize>, scratch: &mut Scratch<T>) {
        let psi = self.psi(range, &mut scratch.psi).transposed();
        let v = self.v(range);
        product(&mut scratch.state, Into::Add, psi, v);
    }

    /// Writes `y` `[query, value_width]`.
    fn run(&self, scratch: &mut Scratch<T>, output: &mut [T]) {
        let Sizes {
            queries,
            keys,
            value_width,
            ..
        } = self.sizes;
        self.forget(&mut scratch.state);
        if !self.attention.causal {
            for range in chunks(keys, self.attention.chunk) {
                self.remember(&range, scratch);
            }
        }
        for range in chunks(queries, self.attention.chunk) {
            let output = &mut output[range.start * value_width..range.end * value_width];
            let phi = self.phi(&range, &mut scratch.phi);
            product(output, Into::Replace, phi, self.state(&scratch.state));
            if self.attention.causal {
                self.lay_out(&range, scratch);
                let scores = Matrix::packed(&scratch.scores, range.len(), range.len());
                product(output, Into::Add, scores, self.v(&range));
                self.remember(&range, scratch);
            }
        }
    }

    /// The scores of a chunk with itself, zero ahead: `f(q kᵀ)`, or what dropout leaves of it.
    fn lay_out(&self, range: &Range<usize>, scratch: &mut Scratch<T>) {
        let count = range.len();
        scratch.scores.resize(count * count, T::zero());
        if self.attention.dropout.is_some() {
            let phi = self.phi(range, &mut scratch.phi);
            let psi = self.psi(range, &mut scratch.psi);
            product(&mut scratch.scores, Into::Replace, phi, psi.transposed());
            past_only(&mut scratch.scores, count);
            return;
        }
        let (q, k) = (self.q(range), self.k(range));
        product(&mut scratch.scores, Into::Replace, q, k.transposed());
        let [constant, linear, square] = self.attention.coefficients.map(T::of);
        for score in &mut scratch.scores {
            *score = constant + *score * (linear + square * *score);
        }
        past_only(&mut scratch.scores, count);
    }

    /// Adds to `∂q`, `∂k` and `∂v` what a chunk's scores with itself say, given `g` of the chunk.
    fn backward_within(
        &self,
        range: &Range<usize>,
        g: Matrix<T>,
        scratch: &mut Scratch<T>,
        gradients: &mut Gradients<'_, T>,
    ) {
        let (count, width) = (range.len(), self.sizes.width);
        self.lay_out(range, scratch);
        let scores = Matrix::packed(&scratch.scores, count, count);
        product(gradients.v(range), Into::Add, scores.transposed(), g);

        scratch.score_slopes.resize(count * count, T::zero());
        let v = self.v(range);
        product(&mut scratch.score_slopes, Into::Replace, g, v.transposed());
        past_only(&mut scratch.score_slopes, count);
        let (q, k) = (self.q(range), self.k(range));
        if self.attention.dropout.is_some() {
            let slopes = Matrix::packed(&scratch.score_slopes, count, count);
            let psi = Matrix::packed(&scratch.psi, count, self.attention.monomials(width));
            let phi = Matrix::packed(&scratch.phi, count, self.attention.monomials(width));
            scratch.slopes.resize(psi.data.len(), T::zero());
            product(&mut scratch.slopes, Into::Replace, slopes, psi);
            let queries = self.attention.queries(width);
            let stream = self.query_stream(range);
            queries.contract(q.data, stream, &mut scratch.slopes, gradients.q(range));
            product(&mut scratch.slopes, Into::Replace, slopes.transposed(), phi);
            let keys = self.attention.keys(width);
            let stream = self.key_stream(range);
            keys.contract(k.data, stream, &mut scratch.slopes, gradients.k(range));
            return;
        }
        // f′(s) = a₁ + 2 a₂ s, from the inner products once more.
        let inner = &mut scratch.scores;
        product(inner, Into::Replace, q, k.transposed());
        let [_, linear, square] = self.attention.coefficients.map(T::of);
        for (slope, inner) in scratch.score_slopes.iter_mut().zip(&scratch.scores) {
            *slope *= linear + (square + square) * *inner;
        }
        let slopes = Matrix::packed(&scratch.score_slopes, count, count);
        product(gradients.q(range), Into::Add, slopes, k);
        product(gradients.k(range), Into::Add, slopes.transposed(), q);
    }

    /// Adds to `∂q` of a chunk what it read from the state.
    fn backward_read(
        &self,
        range: &Range<usize>,
        g: Matrix<T>,
        scratch: &mut Scratch<T>,
        gradients: &mut Gradients<'_, T>,
    ) {
        let state = self.state(&scratch.state).transposed();
        let factors = self.attention.queries(self.sizes.width);
        scratch
            .slopes
            .resize(range.len() * factors.count, T::zero());
        product(&mut scratch.slopes, Into::Replace, g, state);
        let (q, stream) = (self.q(range).data, self.query_stream(range));
        factors.contract(q, stream, &mut scratch.slopes, gradients.q(range));
    }

    /// Adds to `∂k` and `∂v` of a chunk what later queries read of it, from `Σ Φ(q) gᵀ`.
    fn backward_remembered(
        &self,
        range: &Range<usize>,
        scratch: &mut Scratch<T>,
        gradients: &mut Gradients<'_, T>,
    ) {
        let psi = self.psi(range, &mut scratch.psi);
        let state = self.state(&scratch.state);
        product(gradients.v(range), Into::Add, psi, state);
        let factors = self.attention.keys(self.sizes.width);
        scratch
            .slopes
            .resize(range.len() * factors.count, T::zero());
        let v = self.v(range);
        product(&mut scratch.slopes, Into::Replace, v, state.transposed());
        let (k, stream) = (self.k(range).data, self.key_stream(range));
        factors.contract(k, stream, &mut scratch.slopes, gradients.k(range));
    }

    /// Adds `Φ(q) gᵀ` of a chunk to the state.
    fn remember_gradient(&self, range: &Range<usize>, g: Matrix<T>, scratch: &mut Scratch<T>) {
        let phi = self.phi(range, &mut scratch.phi).transposed();
        product(&mut scratch.state, Into::Add, phi, g);
    }

    fn backward(&self, g: &[T], scratch: &mut Scratch<T>, gradients: &mut Gradients<'_, T>) {
        let Sizes {
            queries,
            keys,
            value_width,
            ..
        } = self.sizes;
        let chunk = self.attention.chunk;
        let g = |range: &Range<usize>| self.rows(g, value_width, range);
        self.forget(&mut scratch.state);
        if self.attention.causal {
            for range in chunks(queries, chunk) {
                self.backward_read(&range, g(&range), scratch, gradients);
                self.backward_within(&range, g(&range), scratch, gradients);
                self.remember(&range, scratch);
            }
            self.forget(&mut scratch.state);
            for range in chunks(queries, chunk).rev() {
                self.backward_remembered(&range, scratch, gradients);
                self.remember_gradient(&range, g(&range), scratch);
            }
            return;
        }
        for range in chunks(keys, chunk) {
            self.remember(&range, scratch);
        }
        for range in chunks(queries, chunk) {
            self.backward_read(&range, g(&range), scratch, gradients);
        }
        self.forget(&mut scratch.state);
        for range in chunks(queries, chunk) {
            self.remember_gradient(&range, g(&range), scratch);
        }
        for range in chunks(keys, chunk) {
            self.backward_remembered(&range, scratch, gradients);
        }
    }
}

/// `result (+)= a b`, its rows one after the other.
fn product<T: Real>(result: &mut [T], into: Into, a: Matrix<T>, b: Matrix<T>) {
    multiply(result, b.columns, into, T::one(), a, b, Threads::One);
}

/// Zeroes what lies ahead of each position of a `[count, count]` matrix.
fn past_only<T: Real>(scores: &mut [T], count: usize) {
    for (i, row) in scores.chunks_exact_mut(count).enumerate() {
        row[i + 1..].fill(T::zero());
    }
}

/// Gradients of one head.
struct Gradients<'a, T> {
    sizes: Sizes,
    q: &'a mut [T],
    k: &'a mut [T],
    v: &'a mut [T],
}

impl<T> Gradients<'_, T> {
    fn q(&mut self, range: &Range<usize>) -> &mut [T] {
        &mut self.q[range.start * self.sizes.width..range.end * self.sizes.width]
    }

    fn k(&mut self, range: &Range<usize>) -> &mut [T] {
        &mut self.k[range.start * self.sizes.width..range.end * self.sizes.width]
    }

    fn v(&mut self, range: &Range<usize>) -> &mut [T] {
        &mut self.v[range.start * self.sizes.value_width..range.end * self.sizes.value_width]
    }
}

struct Sums {
    attention: PolynomialAttention,
    sizes: Sizes,
}

impl Sums {
    fn head<'a, T>(&self, index: usize, q: &'a [T], k: &'a [T], v: &'a [T]) -> Head<'a, T> {
        let Sizes {
            queries,
            keys,
            width,
            value_width,
            ..
        } = self.sizes;
        Head {
            attention: self.attention,
            sizes: self.sizes,
            index,
            q: &q[index * queries * width..][..queries * width],
            k: &k[index * keys * width..][..keys * width],
            v: &v[index * keys * value_width..][..keys * value_width],
        }
    }

    fn work(&self) -> usize {
        let Sizes {
            queries,
            keys,
            width,
            value_width,
            ..
        } = self.sizes;
        let operations = self.attention.operations(queries, keys, width, value_width);
        usize::try_from(operations).unwrap_or(usize::MAX)
    }

    fn forward<T: Real>(&self, q: &[T], k: &[T], v: &[T]) -> Vec<T> {
        let each = self.sizes.queries * self.sizes.value_width;
        let mut output = vec![T::zero(); self.sizes.heads * each];
        let shared = Shared::new(&mut output);
        host::share(self.sizes.heads, self.work(), |range| {
            let mut scratch = Scratch::new();
            for index in range {
                // SAFETY: heads are disjoint.
                let output = unsafe { shared.part(index * each, each) };
                self.head(index, q, k, v).run(&mut scratch, output);
            }
        });
        output
    }

    fn backward<T: Real>(
        &self,
        [q, k, v]: [&Tensor; 3],
        gradient: &Tensor,
    ) -> Candle<[Option<Tensor>; 3]> {
        let hosts = [q, k, v, gradient].map(Host::new);
        let [q_all, k_all, v_all, g_all] = &hosts;
        let (q_all, k_all) = (q_all.ordered::<T>()?, k_all.ordered::<T>()?);
        let (v_all, g_all) = (v_all.ordered::<T>()?, g_all.ordered::<T>()?);
        let mut results = [q, k, v].map(|of| vec![T::zero(); of.elem_count()]);
        let [dq, dk, dv] = &mut results;
        let (dq, dk, dv) = (Shared::new(dq), Shared::new(dk), Shared::new(dv));
        let Sizes {
            heads,
            queries,
            keys,
            width,
            value_width,
        } = self.sizes;
        host::share(heads, 3 * self.work(), |range| {
            let mut scratch = Scratch::new();
            for index in range {
                let (of_q, of_k) = (queries * width, keys * width);
                let of_v = keys * value_width;
                // SAFETY: heads are disjoint.
                let mut gradients = unsafe {
                    Gradients {
                        sizes: self.sizes,
                        q: dq.part(index * of_q, of_q),
                        k: dk.part(index * of_k, of_k),
                        v: dv.part(index * of_v, of_v),
                    }
                };
                let each = queries * value_width;
                let g = &g_all[index * each..][..each];
                self.head(index, &q_all, &k_all, &v_all)
                    .backward(g, &mut scratch, &mut gradients);
            }
        });
        let [dq, dk, dv] = results;
        Ok([
            Some(host::tensor(dq, q.dims())?),
            Some(host::tensor(dk, k.dims())?),
            Some(host::tensor(dv, v.dims())?),
        ])
    }
}

impl CustomOp3 for Sums {
    fn name(&self) -> &'static str {
        "polynomial attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        by_dtype!(host::dtype(q), T => {
            let q_all = host::ordered::<T>(q, q_layout)?;
            let k_all = host::ordered::<T>(k, k_layout)?;
            let v_all = host::ordered::<T>(v, v_layout)?;
            let output = self.forward::<T>(&q_all, &k_all, &v_all);
            let (batch, heads, queries, _) = q_layout.shape().dims4()?;
            let shape = Shape::from((batch, heads, queries, self.sizes.value_width));
            Ok((<T as candle_core::WithDType>::to_cpu_storage_owned(output), shape))
        })
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [dq, dk, dv] = by_dtype!(q.dtype(), T => self.backward::<T>([q, k, v], gradient))?;
        Ok((dq, dk, dv))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::check::{difference, gradient_error};
    use crate::test_data::{arange, compare};

    const SECOND: [f64; 3] = [1.0, 1.0, 0.5];
    const FIRST: [f64; 3] = [0.7, 1.3, 0.0];

    fn inputs(queries: usize, keys: usize, dtype: DType) -> [Tensor; 3] {
        [
            arange(&[2, 3, queries, 5], 1.0, dtype),
            arange(&[2, 3, 5, keys], 2.0, dtype)
                .transpose(2, 3)
                .unwrap(),
            arange(&[2, keys, 3, 4], 3.0, dtype)
                .transpose(1, 2)
                .unwrap(),
        ]
    }

    #[test]
    fn equals_scores_laid_out() {
        for coefficients in [FIRST, SECOND] {
            for (queries, keys, causal) in [
                (1, 1, true),
                (64, 64, true),
                (130, 130, true),
                (3, 7, false),
                (70, 65, false),
            ] {
                compare(3e-5, |dtype| {
                    let [q, k, v] = inputs(queries, keys, dtype);
                    let attention = PolynomialAttention::new(coefficients, causal);
                    (
                        attention.sums(&q, &k, &v).unwrap(),
                        naive::polynomial_attention(&q, &k, &v, coefficients, causal).unwrap(),
                    )
                });
            }
        }
    }

    #[test]
    fn gradients_equal_finite_differences_and_those_of_scores_laid_out() {
        for coefficients in [FIRST, SECOND] {
            for causal in [false, true] {
                let keys = if causal { 7 } else { 5 };
                let of = |attention: PolynomialAttention| {
                    let inputs = [
                        arange(&[1, 2, 7, 3], 1.0, DType::F64),
                        arange(&[1, 2, keys, 3], 2.0, DType::F64),
                        arange(&[1, 2, keys, 2], 3.0, DType::F64),
                    ];
                    let sums = |x: &[Tensor]| attention.sums(&x[0], &x[1], &x[2]);
                    gradient_error(sums, &inputs).unwrap()
                };
                for chunk in [3, CHUNK] {
                    let plain = PolynomialAttention {
                        chunk,
                        ..PolynomialAttention::new(coefficients, causal)
                    };
                    assert!(of(plain) < 1e-6);
                    let dropout = Some(FactorDropout {
                        probability: 0.3,
                        seed: 5,
                    });
                    assert!(of(PolynomialAttention { dropout, ..plain }) < 1e-6);
                }

                let attention = PolynomialAttention::new(coefficients, causal);
                let [q, k, v] = inputs(70, 70, DType::F64);
                let vars = [&q, &k, &v].map(|x| crate::Var::from_tensor(x).unwrap());
                let gradients = |y: Tensor| {
                    let weights = arange(y.dims(), 9.0, DType::F64);
                    let loss = (y * weights).unwrap().sum_all().unwrap();
                    let all = loss.backward().unwrap();
                    [&vars[0], &vars[1], &vars[2]].map(|var| all.get(var).unwrap().clone())
                };
                let (q, k, v) = (&*vars[0], &*vars[1], &*vars[2]);
                let fused = gradients(attention.sums(q, k, v).unwrap());
                let plain =
                    gradients(naive::polynomial_attention(q, k, v, coefficients, causal).unwrap());
                for (fused, plain) in fused.iter().zip(&plain) {
                    let scale = plain.abs().unwrap().max_all().unwrap();
                    let scale = scale.to_scalar::<f64>().unwrap();
                    assert!(difference(fused, plain).unwrap() / scale < 1e-12);
                }
            }
        }
    }

    #[test]
    fn the_size_of_chunks_changes_nothing() {
        for dropout in [None, Some((0.4, 3))] {
            let [q, k, v] = inputs(70, 70, DType::F64);
            let of = |chunk| {
                let attention = PolynomialAttention {
                    chunk,
                    dropout: dropout.map(|(probability, seed)| FactorDropout { probability, seed }),
                    ..PolynomialAttention::new(SECOND, true)
                };
                attention.sums(&q, &k, &v).unwrap()
            };
            let laid_out = of(70);
            for chunk in [1, 3, 64, usize::MAX] {
                assert!(difference(&of(chunk), &laid_out).unwrap() < 1e-11);
            }
        }
    }

    /// A prefix read from its state and the rest in one pass are the whole pass.
    #[test]
    fn a_state_stands_for_the_positions_it_was_made_of() {
        for coefficients in [FIRST, SECOND] {
            let attention = PolynomialAttention::new(coefficients, true);
            let [q, k, v] = inputs(90, 90, DType::F64);
            let part = |x: &Tensor, start, count| x.narrow(2, start, count).unwrap();
            let whole = attention.sums(&q, &k, &v).unwrap();
            let state = attention.state(&part(&k, 0, 70), &part(&v, 0, 70)).unwrap();
            assert_eq!(state.dims(), [2, 3, attention.monomials(5), 4]);
            let rest = [&q, &k, &v].map(|x| part(x, 70, 20));
            let within = attention.sums(&rest[0], &rest[1], &rest[2]).unwrap();
            let found = (within + attention.read(&rest[0], &state).unwrap()).unwrap();
            assert!(difference(&found, &part(&whole, 70, 20)).unwrap() < 1e-10);
        }
    }

    #[test]
    fn dropout_keeps_the_expectation_and_the_seed() {
        for coefficients in [FIRST, SECOND] {
            let [q, k, v] = inputs(3, 3, DType::F64);
            let plain = PolynomialAttention::new(coefficients, false);
            let whole = plain.sums(&q, &k, &v).unwrap();
            let with = |seed| {
                let attention = PolynomialAttention {
                    dropout: Some(FactorDropout {
                        probability: 0.2,
                        seed,
                    }),
                    ..plain
                };
                attention.sums(&q, &k, &v).unwrap()
            };
            assert_eq!(difference(&with(1), &with(1)).unwrap(), 0.0);
            assert!(difference(&with(1), &with(2)).unwrap() > 1e-3);
            let runs = 3000;
            let (mut sum, mut squares) = (whole.zeros_like().unwrap(), whole.zeros_like().unwrap());
            for seed in 0..runs {
                let off = (with(seed) - &whole).unwrap();
                squares = (squares + off.sqr().unwrap()).unwrap();
                sum = (sum + off).unwrap();
            }
            let of = |x: Tensor| x.flatten_all().unwrap().to_vec1::<f64>().unwrap();
            let runs = runs as f64;
            for (sum, squares) in of(sum).into_iter().zip(of(squares)) {
                assert!((sum / runs).abs() < 5.0 * (squares / runs / runs).sqrt());
            }
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let x = |dims: &[usize]| arange(dims, 1.0, DType::F32);
        let attention = PolynomialAttention::new(SECOND, true);
        let (q, v) = (x(&[1, 2, 5, 3]), x(&[1, 2, 5, 4]));
        assert!(attention.sums(&q, &q, &v).is_ok());
        assert!(attention.sums(&q, &v, &v).is_err());
        assert!(
            attention
                .sums(&q, &x(&[1, 2, 4, 3]), &x(&[1, 2, 4, 4]))
                .is_err()
        );
        assert!(attention.sums(&q, &q, &x(&[1, 2, 4, 4])).is_err());
        assert!(attention.read(&q, &x(&[1, 2, 9, 4])).is_err());
        assert!(attention.state(&q, &x(&[1, 2, 4, 4])).is_err());
    }
}
