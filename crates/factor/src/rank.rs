//! What a rank costs and which rank a budget buys.
//!
//! A dense layer `[output, input]` has `input · output` weights; as a pair of rank `r` it has
//! `r · (input + output)`, and the same number of multiply-adds per token.

/// Weights of a low-rank pair.
pub fn parameters(input: usize, output: usize, rank: usize) -> usize {
    rank * (input + output)
}

/// The largest rank at which a low-rank pair has no more weights than the dense layer,
/// `⌊input · output / (input + output)⌋`.
pub fn break_even(input: usize, output: usize) -> usize {
    (input * output).checked_div(input + output).unwrap_or(0)
}

/// The largest rank whose pair has at most `ratio` times the weights of the dense layer, at
/// least 1 and at most `min(input, output)`.
///
/// ```
/// assert_eq!(lapidary_factor::rank::for_ratio(100, 100, 0.5), 25);
/// ```
pub fn for_ratio(input: usize, output: usize, ratio: f64) -> usize {
    let budget = ratio * (input * output) as f64;
    let rank = (budget / (input + output).max(1) as f64 + 1e-9).floor() as usize;
    rank.clamp(1, input.min(output).max(1))
}

/// The smallest rank that keeps at least `fraction` of `Σ s²`, for singular values `s` largest
/// first; at least 1.
pub fn for_energy(singular_values: &[f64], fraction: f64) -> usize {
    let total: f64 = singular_values.iter().map(|s| s * s).sum();
    let mut kept = 0.0;
    for (index, s) in singular_values.iter().enumerate() {
        kept += s * s;
        if kept >= fraction * total {
            return index + 1;
        }
    }
    singular_values.len().max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn break_even_is_the_last_rank_that_does_not_grow_the_layer() {
        for (input, output) in [(8, 8), (7, 13), (64, 256), (1, 1), (1, 9)] {
            let rank = break_even(input, output);
            assert!(parameters(input, output, rank) <= input * output);
            assert!(parameters(input, output, rank + 1) > input * output);
        }
        assert_eq!(break_even(64, 64), 32);
    }

    #[test]
    fn rank_for_a_ratio_is_the_largest_that_fits() {
        for (input, output) in [(64, 256), (100, 100), (33, 17)] {
            for ratio in [0.2, 0.5, 0.7, 1.0] {
                let rank = for_ratio(input, output, ratio);
                let budget = ratio * (input * output) as f64 + 1e-6;
                assert!(parameters(input, output, rank) as f64 <= budget);
                assert!(parameters(input, output, rank + 1) as f64 > budget);
            }
        }
        assert_eq!(for_ratio(4, 4, 0.0), 1);
        assert_eq!(for_ratio(4, 4, 9.0), 4);
    }

    #[test]
    fn rank_for_energy_keeps_enough_and_no_more() {
        let s = [3.0, 2.0, 1.0];
        assert_eq!(for_energy(&s, 9.0 / 14.0), 1);
        assert_eq!(for_energy(&s, 0.9), 2);
        assert_eq!(for_energy(&s, 1.0), 3);
        assert_eq!(for_energy(&[], 0.5), 1);
    }
}
