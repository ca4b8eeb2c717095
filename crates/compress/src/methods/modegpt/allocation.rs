//! How much each block loses.
//!
//! With influences `s_l = 1 − E[cos(x_l, x_{l+1})]` and a mean loss `φ̄`, the losses `φ_l` that
//! maximise `Σ s_l (1 − φ_l)` and `ε` times their entropy are
//!
//! ```text
//! φ_l = L φ̄ softmax(−s / ε)_l
//! ```
//!
//! `ε → ∞` takes as much from every block. No block loses more than a cap; what it is spared, the
//! others lose in proportion to what they lose already, so that the mean stays `φ̄`.

use crate::plan::readable;
use crate::{Error, Result};

/// The share that each block loses, `φ_l`; their mean is `mean`.
///
/// # Errors
/// When `mean` is above the cap, or `smoothing` or the cap make no sense.
pub(crate) fn losses(influences: &[f64], mean: f64, smoothing: f64, cap: f64) -> Result<Vec<f64>> {
    if smoothing.is_nan() || smoothing <= 0.0 {
        return Err(Error::invalid(
            "smoothing of the allocation",
            smoothing,
            "above 0",
        ));
    }
    if !(cap > 0.0 && cap < 1.0) {
        return Err(Error::invalid(
            "most that a block may lose",
            cap,
            "above 0 and below 1",
        ));
    }
    // The comparison leaves room for the rounding of `1 − 0.2`.
    if mean > cap + 1e-12 {
        return Err(Error::invalid(
            "share of weights to keep",
            rest(mean),
            format!("at least {}, as no block loses more than {cap}", rest(cap)),
        ));
    }
    let total = mean * influences.len() as f64;
    let mut losses = vec![cap; influences.len()];
    let mut open: Vec<usize> = (0..influences.len()).collect();
    // Each round caps one more at least.
    while !open.is_empty() {
        let left = total - cap * (influences.len() - open.len()) as f64;
        // Shares do not change when all influences do; the least has the largest exponential. It is the least of
        // those that are not capped, beside which at a small `ε` the others' may come to nothing.
        let own = open.iter().filter_map(|block| influences.get(*block));
        let least = own.copied().fold(f64::INFINITY, f64::min);
        let exponential = |block: usize| {
            let influence = influences.get(block).copied().unwrap_or(least);
            (-(influence - least) / smoothing).exp()
        };
        let sum: f64 = open.iter().map(|block| exponential(*block)).sum();
        for block in &open {
            losses[*block] = (left * exponential(*block) / sum).clamp(0.0, cap);
        }
        let before = open.len();
        open.retain(|block| losses[*block] < cap);
        if open.len() == before {
            break;
        }
    }
    Ok(losses)
}

/// What is left without a share, as a reader would write it.
fn rest(share: f64) -> f64 {
    readable(1.0 - share)
}

#[cfg(test)]
mod tests {
    use super::*;

    const INFLUENCES: [f64; 5] = [0.4, 0.05, 0.02, 0.1, 0.3];

    #[test]
    fn the_mean_loss_is_kept_with_and_without_the_cap() {
        for (mean, smoothing, cap) in [
            (0.3, 0.1, 0.999),
            (0.3, 0.1, 0.8),
            (0.5, 0.02, 0.8),
            (0.7, 0.01, 0.8),
            (0.8, 0.1, 0.8),
        ] {
            let found = losses(&INFLUENCES, mean, smoothing, cap).unwrap();
            let sum: f64 = found.iter().sum();
            assert!((sum - 5.0 * mean).abs() < 1e-9, "{found:?}");
            assert!(found.iter().all(|loss| *loss <= cap + 1e-12), "{found:?}");
        }
        let tight = losses(&INFLUENCES, 0.5, 0.02, 0.8).unwrap();
        assert!((tight[1] - 0.8).abs() < 1e-12 && (tight[2] - 0.8).abs() < 1e-12);
        assert!(tight[0] < tight[4] && tight[4] < tight[3], "{tight:?}");
    }

    #[test]
    fn what_blocks_at_the_cap_are_spared_is_not_lost_where_exponentials_are_nothing() {
        // e^(−0.3 / 1e-4) is zero in floating point: all but the least would lose nothing.
        let found = losses(&[0.0, 0.3, 0.4, 0.9], 0.5, 1e-4, 0.8).unwrap();
        for (found, expected) in found.iter().zip([0.8, 0.8, 0.4, 0.0]) {
            assert!((found - expected).abs() < 1e-12, "{found}");
        }
    }

    #[test]
    fn without_a_binding_cap_losses_are_the_softmax_of_influences() {
        let found = losses(&INFLUENCES, 0.1, 0.5, 0.8).unwrap();
        for (a, b) in [(0, 1), (2, 3), (4, 0)] {
            let expected = ((INFLUENCES[b] - INFLUENCES[a]) / 0.5).exp();
            assert!((found[a] / found[b] - expected).abs() < 1e-12);
        }
    }

    #[test]
    fn equal_influences_and_no_end_of_smoothing_give_equal_losses() {
        for found in [
            losses(&[0.3; 4], 0.25, 0.05, 0.8).unwrap(),
            losses(&INFLUENCES, 0.25, f64::INFINITY, 0.8).unwrap(),
        ] {
            assert!(found.iter().all(|loss| (loss - 0.25).abs() < 1e-12));
        }
    }

    #[test]
    fn losses_are_where_the_objective_is_largest() {
        // Moving a little from one block to another, the mean unchanged, never gains.
        let (mean, smoothing) = (0.1, 0.3);
        let objective = |losses: &[f64]| -> f64 {
            let gain = |(s, loss): (&f64, &f64)| s * (1.0 - loss) - smoothing * loss * loss.ln();
            INFLUENCES.iter().zip(losses).map(gain).sum()
        };
        let found = losses(&INFLUENCES, mean, smoothing, 0.8).unwrap();
        let best = objective(&found);
        for from in 0..5 {
            for to in 0..5 {
                let mut moved = found.clone();
                moved[from] -= 1e-3;
                moved[to] += 1e-3;
                assert!(from == to || objective(&moved) < best);
            }
        }
    }

    #[test]
    fn what_cannot_be_met_is_refused() {
        let error = losses(&INFLUENCES, 0.9, 0.1, 0.8).unwrap_err().to_string();
        assert!(
            error.contains("0.1") && error.contains("at least 0.2,"),
            "{error}"
        );
        assert!(losses(&INFLUENCES, 0.2, 0.0, 0.8).is_err());
        assert!(losses(&INFLUENCES, 0.2, 0.1, 1.0).is_err());
    }
}
