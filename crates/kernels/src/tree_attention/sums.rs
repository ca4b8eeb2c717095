//! Tokens that meet by way of sums of outer products at the nodes of either side of a cut.
//!
//! ```text
//! Z_l = Σ_j V_jl k_j (v_j, 1)ᵀ,   O_k = Σ_l F_kl Z_l,   y_i = Σ_k U_ik O_kᵀ q_i
//! W_k = Σ_i U_ik q_i (g_i, h_i)ᵀ,   P_l = Σ_k F_kl W_k
//! ∂q_i = Σ_k U_ik O_k (g_i, h_i),   ∂k_j = Σ_l V_jl P_l (v_j, 1),   ∂v_j = Σ_l V_jl P_lᵀ k_j,   ∂F_kl = ⟨W_k, Z_l⟩
//! ```
//!
//! and both ways at once, since `Z`, `W` of a side serve the other whichever asks.

use super::head::{Head, Slopes, add_rows, gathered};
use super::plan::{Basis, Factored, Segment};
use crate::host;
use crate::product::{Into, Matrix, Threads, multiply};
use crate::simd::{self, Real};
use std::ops::Range;

/// Tokens that are looked at together.
const ROWS: usize = 128;

/// Sums of outer products at nodes, and of their left sides alone.
struct State<T> {
    /// `[nodes, features, width]`.
    products: Vec<T>,
    /// `[nodes, features]`.
    totals: Vec<T>,
}

impl<T: Real> State<T> {
    fn zeros(nodes: usize, [features, width]: [usize; 2]) -> Self {
        Self {
            products: vec![T::zero(); nodes * features * width],
            totals: vec![T::zero(); nodes * features],
        }
    }
}

/// Tokens of one side and their nodes.
struct Side<'a, T> {
    tokens: &'a [u32],
    basis: &'a Basis<T>,
}

/// Adds what both sides give each other to `y`.
pub(super) fn forward<T: Real>(
    head: &Head<'_, T>,
    factored: &Factored<T>,
    tokens: [&[u32]; 2],
    y: &mut [T],
) {
    let core = Core::new(head, factored);
    let sides = core.sides(factored, tokens);
    let given = sides
        .each_ref()
        .map(|side| side.collected(&head.k, (&head.v, false)));
    let width = head.v.columns;
    for side in 0..2 {
        let asked = core.passed(side, &given[1 - side], core.sizes);
        sides[side].read(&head.q, &asked, (y, width + 1), true);
    }
}

/// Adds the gradients of what both sides give each other.
pub(super) fn backward<T: Real>(
    head: &Head<'_, T>,
    factored: &Factored<T>,
    tokens: [&[u32]; 2],
    gradient: &Matrix<'_, T>,
    slopes: &mut Slopes<'_, T>,
) {
    let core = Core::new(head, factored);
    let sides = core.sides(factored, tokens);
    let [features, width] = core.sizes;
    let given = sides
        .each_ref()
        .map(|side| side.collected(&head.k, (&head.v, false)));
    let asked = sides
        .each_ref()
        .map(|side| side.collected(&head.q, (gradient, true)));
    for side in 0..2 {
        core.add_slopes(
            side,
            &asked[side],
            &given[1 - side],
            head.centre,
            slopes.mask,
        );
        let o = core.passed(side, &given[1 - side], core.sizes);
        sides[side].turned((gradient, true), &o, (slopes.q, features));
        let p = core.passed(side, &asked[1 - side], core.sizes);
        sides[side].turned((&head.v, false), &p, (slopes.k, features));
        sides[side].read(&head.k, &p, (slopes.v, width), false);
    }
}

/// The mask between the nodes of both sides, `[left, right]`.
struct Core<T> {
    factors: Vec<T>,
    nodes: [Vec<u32>; 2],
    sizes: [usize; 2],
}

impl<T: Real> Core<T> {
    fn new(head: &Head<'_, T>, factored: &Factored<T>) -> Self {
        let [left, right] = factored.bases.each_ref().map(|basis| basis.nodes.clone());
        let pairs = left
            .iter()
            .flat_map(|x| right.iter().map(move |y| (x + y) as usize));
        Self {
            factors: pairs
                .map(|distance| head.mask[head.centre + distance])
                .collect(),
            nodes: [left, right],
            sizes: [head.q.columns, head.v.columns],
        }
    }

    fn sides<'a>(&self, factored: &'a Factored<T>, tokens: [&'a [u32]; 2]) -> [Side<'a, T>; 2] {
        [0, 1].map(|side| Side {
            tokens: tokens[side],
            basis: &factored.bases[side],
        })
    }

    /// The place of a factor between a node of one side and one of the other.
    #[inline(always)]
    fn place(&self, side: usize, own: usize, other: usize) -> usize {
        match side {
            0 => own * self.nodes[1].len() + other,
            _ => other * self.nodes[1].len() + own,
        }
    }

    /// What comes from the other side's nodes to those of a side.
    fn passed(&self, side: usize, other: &State<T>, sizes: [usize; 2]) -> State<T> {
        let [features, width] = sizes;
        let mut state = State::zeros(self.nodes[side].len(), sizes);
        simd::vectorised(
            #[inline(always)]
            || {
                let products = state.products.chunks_exact_mut(features * width);
                let totals = state.totals.chunks_exact_mut(features);
                for (own, (products, totals)) in products.zip(totals).enumerate() {
                    let from = other.products.chunks_exact(features * width);
                    let from = from.zip(other.totals.chunks_exact(features));
                    for (node, (p, t)) in from.enumerate() {
                        let factor = self.factors[self.place(side, own, node)];
                        simd::add_scaled(products, p, factor);
                        simd::add_scaled(totals, t, factor);
                    }
                }
            },
        );
        state
    }

    /// Adds `⟨W_k, Z_l⟩` to the slope of the mask between the two nodes.
    fn add_slopes(
        &self,
        side: usize,
        asked: &State<T>,
        given: &State<T>,
        centre: usize,
        of_mask: &mut [T],
    ) {
        let [features, width] = self.sizes;
        simd::vectorised(
            #[inline(always)]
            || {
                for (own, x) in self.nodes[side].iter().enumerate() {
                    for (other, y) in self.nodes[1 - side].iter().enumerate() {
                        let [own, other] = [(asked, own), (given, other)].map(|(state, at)| {
                            let size = features * width;
                            (
                                &state.products[at * size..(at + 1) * size],
                                &state.totals[at * features..(at + 1) * features],
                            )
                        });
                        let slope = simd::dot(own.0, other.0) + simd::dot(own.1, other.1);
                        of_mask[centre + (x + y) as usize] += slope;
                    }
                }
            },
        );
    }
}

impl<T: Real> Side<'_, T> {
    /// Parts of the side whose rows are looked at together: their tokens, their weights, their nodes.
    fn parts(&self) -> impl Iterator<Item = (&[u32], &[T], Range<usize>)> {
        self.basis
            .segments
            .iter()
            .flat_map(move |segment: &Segment<T>| {
                segment.tokens.clone().step_by(ROWS).map(move |start| {
                    let end = segment.tokens.end.min(start + ROWS);
                    let nodes = segment.nodes.clone();
                    let weights = match segment.weights.is_empty() {
                        true => &[],
                        false => {
                            let first = segment.tokens.start;
                            &segment.weights
                                [(start - first) * nodes.len()..(end - first) * nodes.len()]
                        }
                    };
                    (&self.tokens[start..end], weights, nodes)
                })
            })
    }

    /// `Σ_j U_jl a_j b_jᵀ` and `Σ_j U_jl a_j c_j`, where `c` is one, or the last number of each row of `b`.
    fn collected(&self, a: &Matrix<'_, T>, (b, has_last): (&Matrix<'_, T>, bool)) -> State<T> {
        let (features, width) = (a.columns, b.columns - usize::from(has_last));
        let mut state = State::zeros(self.basis.nodes.len(), [features, width]);
        for (tokens, weights, nodes) in self.parts() {
            let inner = nodes.len() * features;
            let left = spread(gathered(a, tokens), weights, nodes.len(), features);
            let right = gathered(b, tokens);
            let start = nodes.start * features;
            let products = &mut state.products[start * width..(start + inner) * width];
            multiply(
                products,
                width,
                Into::Add,
                T::one(),
                Matrix::packed(&left, tokens.len(), inner).transposed(),
                Matrix::spaced(&right, tokens.len(), width, b.columns),
                Threads::One,
            );
            let totals = &mut state.totals[start..start + inner];
            simd::vectorised(
                #[inline(always)]
                || {
                    let rows = left.chunks_exact(inner).zip(right.chunks_exact(b.columns));
                    for (left, right) in rows {
                        let beside = if has_last { right[width] } else { T::one() };
                        simd::add_scaled(totals, left, beside);
                    }
                },
            );
        }
        state
    }

    /// Adds `Σ_k U_ik S_kᵀ a_i` to rows that are `stride` apart, and behind them what totals come to if asked for.
    fn read(
        &self,
        a: &Matrix<'_, T>,
        state: &State<T>,
        (to, stride): (&mut [T], usize),
        with_totals: bool,
    ) {
        let features = a.columns;
        let width = state.products.len() / state.totals.len().max(1);
        for (tokens, weights, nodes) in self.parts() {
            let inner = nodes.len() * features;
            let left = spread(gathered(a, tokens), weights, nodes.len(), features);
            let start = nodes.start * features;
            let mut rows = host::unwritten::<T>(tokens.len() * width);
            multiply(
                &mut rows,
                width,
                Into::Replace,
                T::one(),
                Matrix::packed(&left, tokens.len(), inner),
                Matrix::packed(
                    &state.products[start * width..(start + inner) * width],
                    inner,
                    width,
                ),
                Threads::One,
            );
            add_rows((to, stride), tokens, &rows, width);
            if with_totals {
                let totals = &state.totals[start..start + inner];
                simd::vectorised(
                    #[inline(always)]
                    || {
                        for (token, left) in tokens.iter().zip(left.chunks_exact(inner)) {
                            to[*token as usize * stride + width] += simd::dot(left, totals);
                        }
                    },
                );
            }
        }
    }

    /// Adds `Σ_k U_ik (S_k b_i + c_i s_k)` to rows that are `stride` apart, `c` as in [`Side::collected`].
    fn turned(
        &self,
        (b, has_last): (&Matrix<'_, T>, bool),
        state: &State<T>,
        (to, features): (&mut [T], usize),
    ) {
        let width = b.columns - usize::from(has_last);
        for (tokens, weights, nodes) in self.parts() {
            let inner = nodes.len() * features;
            let left = gathered(b, tokens);
            let start = nodes.start * features;
            let mut rows = host::unwritten::<T>(tokens.len() * inner);
            multiply(
                &mut rows,
                inner,
                Into::Replace,
                T::one(),
                Matrix::spaced(&left, tokens.len(), width, b.columns),
                Matrix::packed(
                    &state.products[start * width..(start + inner) * width],
                    inner,
                    width,
                )
                .transposed(),
                Threads::One,
            );
            let totals = &state.totals[start..start + inner];
            simd::vectorised(
                #[inline(always)]
                || {
                    let each = tokens.iter().zip(rows.chunks_exact_mut(inner));
                    let each = each.zip(left.chunks_exact(b.columns)).enumerate();
                    for (place, ((token, row), left)) in each {
                        let beside = if has_last { left[width] } else { T::one() };
                        simd::add_scaled(row, totals, beside);
                        let start = *token as usize * features;
                        let to = &mut to[start..start + features];
                        for (node, row) in row.chunks_exact(features).enumerate() {
                            let weight = match weights.is_empty() {
                                true => T::one(),
                                false => weights[place * nodes.len() + node],
                            };
                            simd::add_scaled(to, row, weight);
                        }
                    }
                },
            );
        }
    }
}

/// Rows times each of their weights, `[rows, nodes, features]`.
fn spread<T: Real>(rows: Vec<T>, weights: &[T], nodes: usize, features: usize) -> Vec<T> {
    if weights.is_empty() {
        return rows;
    }
    let mut all = host::unwritten::<T>(rows.len() * nodes);
    simd::vectorised(
        #[inline(always)]
        || {
            let each = rows.chunks_exact(features).zip(weights.chunks_exact(nodes));
            let each = each.zip(all.chunks_exact_mut(nodes * features));
            for ((row, weights), all) in each {
                for (to, weight) in all.chunks_exact_mut(features).zip(weights) {
                    for (to, number) in to.iter_mut().zip(row) {
                        *to = *number * *weight;
                    }
                }
            }
        },
    );
    all
}
