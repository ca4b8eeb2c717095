//! The numbers that a group of weights may become, and rounding to them.
//!
//! With `b` bits and integers `0 ≤ q < 2ᵇ`, a symmetric grid is `s (q − 2ᵇ⁻¹)` with
//! `s = max|w| / (2ᵇ⁻¹ − 1)`; another one is `s q + m` with `m = min(0, min w)` and
//! `s = (max(0, max w) − m) / (2ᵇ − 1)`. Scales and minima are `f16`, and weights are rounded to the
//! grid that these give, not to one that has to be rounded afterwards.

use half::f16;

use crate::{Error, Result};

/// Steps in which a search narrows a grid, each a fiftieth of the full one.
const SEARCH_STEPS: usize = 25;

/// The kind of grid that all groups of a matrix share.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct GridKind {
    /// Bits of an integer, 2 to 16.
    pub(crate) bits: u32,
    /// Whether zero is in the middle, and no minimum is stored.
    pub(crate) symmetric: bool,
    /// Whether a narrower grid is taken where its squared error is smaller: the extremes are cut
    /// off for a finer step.
    pub(crate) search: bool,
}

/// The grid of one group.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Grid {
    kind: GridKind,
    pub(crate) scale: f16,
    pub(crate) minimum: f16,
}

impl GridKind {
    fn top(self) -> f64 {
        f64::from((1u32 << self.bits) - 1)
    }

    /// The grid for these weights.
    ///
    /// # Errors
    /// When they are too large for a scale in `f16`, or not finite.
    pub(crate) fn fit(self, weights: &[f64]) -> Result<Grid> {
        let low = weights.iter().copied().fold(0.0, f64::min);
        let high = weights.iter().copied().fold(0.0, f64::max);
        let whole = self.spanning(low, high, 1.0);
        if !whole.scale.is_finite()
            || !whole.minimum.is_finite()
            || weights.iter().any(|w| !w.is_finite())
        {
            return Err(Error::invalid(
                "weights of a group",
                format!("{low:e} to {high:e}"),
                "finite, and small enough for a scale in f16",
            ));
        }
        if !self.search {
            return Ok(whole);
        }
        let mut best = (whole, whole.squared_error(weights));
        for step in 1..SEARCH_STEPS {
            let grid = self.spanning(low, high, 1.0 - 0.02 * step as f64);
            let error = grid.squared_error(weights);
            if error < best.1 {
                best = (grid, error);
            }
        }
        Ok(best.0)
    }

    /// The grid from `share · low` to `share · high`.
    fn spanning(self, low: f64, high: f64, share: f64) -> Grid {
        let (scale, minimum) = match self.symmetric {
            true => {
                let half = f64::from((1u32 << (self.bits - 1)) - 1);
                (at_least(high.max(-low) * share / half), f16::ZERO)
            }
            false => {
                let minimum = -at_least(-low * share);
                let span = high * share - minimum.to_f64();
                (at_least(span / self.top()), minimum)
            }
        };
        Grid {
            kind: self,
            scale,
            minimum,
        }
    }
}

/// The least `f16` that is not below a number that is not below zero, so that both ends of the
/// weights stay within the grid.
fn at_least(number: f64) -> f16 {
    let nearest = f16::from_f64(number);
    match nearest.to_f64() < number {
        true => f16::from_bits(nearest.to_bits() + 1),
        false => nearest,
    }
}

impl Grid {
    /// Made once where many weights share a grid: what is in `f16` is slow to widen.
    pub(crate) fn places(&self) -> Places {
        Places {
            scale: self.scale.to_f64(),
            minimum: self.minimum.to_f64(),
            offset: match self.kind.symmetric {
                true => f64::from(1u32 << (self.kind.bits - 1)),
                false => 0.0,
            },
            top: self.kind.top(),
        }
    }

    fn squared_error(&self, weights: &[f64]) -> f64 {
        let places = self.places();
        let error = |w: &f64| (w - places.nearest(*w)).powi(2);
        weights.iter().map(error).sum()
    }
}

/// A grid's numbers in `f64`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Places {
    scale: f64,
    minimum: f64,
    offset: f64,
    top: f64,
}

impl Places {
    /// The integer whose number is nearest.
    pub(crate) fn code(self, weight: f64) -> u32 {
        let steps = match self.scale > 0.0 {
            true => (weight - self.minimum) / self.scale,
            false => 0.0,
        };
        // Halves away from zero, as `f64::round` has it, which is a call where no instruction is.
        let place = (steps + self.offset).clamp(0.0, self.top);
        let below = place as u32;
        below + u32::from(place - f64::from(below) >= 0.5)
    }

    /// The number of an integer.
    pub(crate) fn number(self, code: u32) -> f64 {
        self.scale * (f64::from(code) - self.offset) + self.minimum
    }

    /// The nearest number.
    pub(crate) fn nearest(self, weight: f64) -> f64 {
        self.number(self.code(weight))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn kinds() -> impl Strategy<Value = GridKind> {
        (2u32..=16, any::<bool>(), any::<bool>()).prop_map(|(bits, symmetric, search)| GridKind {
            bits,
            symmetric,
            search,
        })
    }

    proptest! {
        #[test]
        fn rounding_moves_a_weight_by_at_most_half_a_step(
            weights in prop::collection::vec(-3.0..3.0f64, 32),
            bits in 2u32..=8,
            symmetric in any::<bool>(),
        ) {
            let kind = GridKind { bits, symmetric, search: false };
            let grid = kind.fit(&weights).unwrap();
            let allowed = 0.5 * grid.scale.to_f64() * (1.0 + 1e-9);
            for w in &weights {
                prop_assert!((w - grid.places().nearest(*w)).abs() <= allowed);
            }
        }

        #[test]
        fn numbers_of_the_grid_stay(
            weights in prop::collection::vec(-3.0..3.0f64, 32),
            kind in kinds(),
        ) {
            let grid = kind.fit(&weights).unwrap();
            for w in &weights {
                let code = grid.places().code(*w);
                prop_assert_eq!(grid.places().code(grid.places().number(code)), code);
            }
        }

        #[test]
        fn a_search_never_makes_the_error_larger(
            weights in prop::collection::vec(-3.0..3.0f64, 32),
            bits in 2u32..=8,
            symmetric in any::<bool>(),
        ) {
            let error = |search| {
                let kind = GridKind { bits, symmetric, search };
                kind.fit(&weights).unwrap().squared_error(&weights)
            };
            prop_assert!(error(true) <= error(false));
        }

        #[test]
        fn zero_stays_zero_on_a_symmetric_grid(
            weights in prop::collection::vec(-3.0..3.0f64, 32),
            bits in 2u32..=16,
        ) {
            let kind = GridKind { bits, symmetric: true, search: true };
            prop_assert_eq!(kind.fit(&weights).unwrap().places().nearest(0.0), 0.0);
        }
    }

    #[test]
    fn places_are_rounded_as_numbers_are() {
        let places = Places {
            scale: 1.0,
            minimum: 0.0,
            offset: 0.0,
            top: 15.0,
        };
        let halves = (-4..40).map(|i| 0.5 * f64::from(i));
        for number in halves.chain([0.5f64.next_down(), 1.5f64.next_down(), 14.5f64.next_up()]) {
            let expected = number.round().clamp(0.0, 15.0) as u32;
            assert_eq!(places.code(number), expected, "{number}");
        }
        assert_eq!(places.code(f64::NAN), 0);
    }

    #[test]
    fn sixteen_bits_lose_next_to_nothing() {
        let weights: Vec<f64> = (0..32).map(|i| (f64::from(i) * 0.7).sin()).collect();
        let kind = GridKind {
            bits: 16,
            symmetric: true,
            search: false,
        };
        let grid = kind.fit(&weights).unwrap();
        let worst = weights
            .iter()
            .map(|w| (w - grid.places().nearest(*w)).abs());
        assert!(worst.fold(0.0, f64::max) < 2e-5);
    }

    #[test]
    fn weights_that_no_scale_reaches_are_refused() {
        let kind = GridKind {
            bits: 4,
            symmetric: true,
            search: true,
        };
        assert!(kind.fit(&[1e9, 0.0]).is_err());
        assert!(kind.fit(&[f64::NAN, 0.0]).is_err());
        assert_eq!(kind.fit(&[0.0; 4]).unwrap().places().nearest(0.0), 0.0);
    }
}
