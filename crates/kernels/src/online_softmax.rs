//! One row of a softmax that is met in parts, one after the other.

use crate::simd::{self, Real};

/// The largest score so far, and the sum of exponentials relative to it.
#[derive(Clone, Copy)]
pub(crate) struct State<T> {
    pub(crate) maximum: T,
    pub(crate) total: T,
}

impl<T: Real> State<T> {
    pub(crate) fn nothing() -> Self {
        Self {
            maximum: T::NEG_INFINITY,
            total: T::zero(),
        }
    }
}

/// Turns scores into weights relative to the running maximum, and says by how much the earlier part of the
/// output shrinks.
#[inline(always)]
pub(crate) fn online<T: Real>(scores: &mut [T], state: &mut State<T>) -> T {
    let maximum = state.maximum.larger(simd::maximum(scores));
    if maximum == T::NEG_INFINITY {
        state.total += simd::without_hidden(scores);
        return T::one();
    }
    let factor = match maximum > state.maximum && state.total > T::zero() {
        true => (state.maximum - maximum).exp(),
        false => T::one(),
    };
    state.maximum = maximum;
    state.total = state.total * factor + simd::exponentiate(scores, maximum);
    factor
}
