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

use crate::backward::Apply;
use crate::host::{self, Host, Shared, by_dtype, fused};
use crate::product::{Into, Matrix, Threads, multiply};
use crate::simd::Real;
use crate::{Error, Result, Tensor, naive};
use candle_core::{CpuStorage, CustomOp3, Layout, Shape};
use std::ops::Range;

mod factors;
mod operation;

use factors::Factors;
use operation::Sums;

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
        Ok(q.apply3(k, v, operation)?)
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

#[cfg(test)]
mod tests;
