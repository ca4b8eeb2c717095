//! Ranks of attention's four matrices, and channels of the feed-forward part.
//!
//! Values and output get `a` times the weights of query and key, because they are less of low
//! rank. For four matrices of `d × d` of which a share `p` goes:
//!
//! ```text
//! k = ⌊(1 − p) d / 2⌋,   k_vo = ⌊2 a / (1 + a) k⌋,   k_qk = ⌊2 / (1 + a) k⌋
//! ```
//!
//! and where `k_vo ≥ d / 2`, which saves nothing, value and output stay whole and `k_qk = ⌊(1 − p) d⌋
//! − ⌊d / 2⌋`; with a ratio below 1 query and key may, and the others get that rank. Matrices of other
//! shapes are given the same by weights: `W_v + W_o` get `a / (1 + a)` of the budget, in proportion to
//! their sizes, and a rank costs `input + output`.

use std::ops::Range;

/// Input and output width of a matrix.
pub(crate) type Shape = (usize, usize);

/// A number that is whole but for rounding counts as whole.
const ROUNDING: f64 = 1e-9;

fn floor(x: f64) -> usize {
    (x + ROUNDING).floor().max(0.0) as usize
}

/// Ranks of query, key, value and output at a share `keep` of their weights and a ratio `a`;
/// nothing for a matrix that stays whole. A rank of zero cannot be met.
pub(crate) fn ranks(shapes: [Shape; 4], keep: f64, a: f64) -> [Option<usize>; 4] {
    if keep >= 1.0 {
        return [None; 4];
    }
    let [(width, _), ..] = shapes;
    let [qk, vo] = match shapes.iter().all(|shape| *shape == (width, width)) {
        true => {
            let (qk, vo) = square(width, keep, a);
            [[qk; 2], [vo; 2]]
        }
        false => by_weights(shapes, keep, a),
    };
    let [query, key, value, output] = shapes;
    let pays = |(input, output): Shape, rank: Option<usize>| {
        rank.filter(|rank| rank * (input + output) < input * output)
    };
    [
        pays(query, qk[0]),
        pays(key, qk[1]),
        pays(value, vo[0]),
        pays(output, vo[1]),
    ]
}

/// `k_qk` and `k_vo`, unless one reaches half of the width: what it cannot use is the other's.
fn square(width: usize, keep: f64, a: f64) -> (Option<usize>, Option<usize>) {
    let whole = width as f64;
    let mean = floor(keep * whole / 2.0) as f64;
    let values = floor(2.0 * a / (1.0 + a) * mean);
    let scores = floor(2.0 / (1.0 + a) * mean);
    let rest = floor(keep * whole).saturating_sub(width / 2);
    if values as f64 >= whole / 2.0 {
        return (Some(rest), None);
    }
    if scores as f64 >= whole / 2.0 {
        return (None, Some(rest));
    }
    (Some(scores), Some(values))
}

fn by_weights(shapes: [Shape; 4], keep: f64, a: f64) -> [[Option<usize>; 2]; 2] {
    let [query, key, value, output] = shapes;
    let weights = |(input, output): Shape| (input * output) as f64;
    let (scores, values) = (
        weights(query) + weights(key),
        weights(value) + weights(output),
    );
    let budget = keep * (scores + values);
    let of_values = a / (1.0 + a) * budget;
    let rank =
        |share: f64, shape: Shape| Some(floor(share * weights(shape) / (shape.0 + shape.1) as f64));
    if of_values >= values {
        let share = (budget - values) / scores;
        return [[rank(share, query), rank(share, key)], [None, None]];
    }
    if budget - of_values >= scores {
        // A ratio below the matrices' own: queries and keys take all they can, values the rest.
        let share = (budget - scores) / values;
        return [[None, None], [rank(share, value), rank(share, output)]];
    }
    let (score_share, value_share) = ((budget - of_values) / scores, of_values / values);
    [
        [rank(score_share, query), rank(score_share, key)],
        [rank(value_share, value), rank(value_share, output)],
    ]
}

/// How many of `hidden` channels go at a share `keep`: `⌊(p + spared) f⌋ − ⌊spared f⌋`.
pub(crate) fn removed(hidden: usize, keep: f64, spared: f64) -> usize {
    let whole = hidden as f64;
    floor((1.0 - keep + spared) * whole).min(hidden) - floor(spared * whole)
}

/// Places in the rising order of importance that `removed` channels leave: those after the
/// spared ones.
pub(crate) fn gap(hidden: usize, removed: usize, spared: f64) -> Range<usize> {
    let start = floor(spared * hidden as f64).min(hidden - removed.min(hidden));
    start..start + removed.min(hidden)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_ranks() {
        // Llama-7B at 20 %: values and output stay whole.
        let square = [(4096, 4096); 4];
        let found = ranks(square, 0.8, 3.0);
        assert_eq!(found, [Some(1228), Some(1228), None, None]);
        let half = ranks(square, 0.5, 3.0);
        assert_eq!(half, [Some(512), Some(512), Some(1536), Some(1536)]);
    }

    #[test]
    fn the_budget_is_met_within_rounding_and_the_cap_is_where_it_should_be() {
        for width in [7, 16, 192, 4096] {
            for percent in (5..100).step_by(5) {
                for a in [0.25, 0.5, 1.0, 2.0, 3.0, 7.0] {
                    let keep = f64::from(percent) / 100.0;
                    let whole = width as f64;
                    let (qk, vo) = super::square(width, keep, a);
                    let mean = floor(keep * whole / 2.0) as f64;
                    let values = floor(2.0 * a / (1.0 + a) * mean);
                    assert_eq!(vo.is_none(), values as f64 >= whole / 2.0);
                    let scores = floor(2.0 / (1.0 + a) * mean);
                    assert_eq!(qk.is_none(), scores as f64 >= whole / 2.0);
                    let weights = |rank: Option<usize>| match rank {
                        Some(rank) => 4 * width * rank,
                        None => 2 * width * width,
                    };
                    let used = (weights(qk) + weights(vo)) as f64;
                    let budget = keep * 4.0 * whole * whole;
                    // Three floors of at most one rank each, and half a rank of an odd width.
                    let odd = if width % 2 == 1 && (vo.is_none() || qk.is_none()) {
                        2.0 * whole
                    } else {
                        0.0
                    };
                    assert!(used <= budget + odd + 1e-6, "{width} {keep} {a}");
                    assert!(used > budget - 4.0 * whole * 4.0, "{width} {keep} {a}");
                }
            }
        }
    }

    #[test]
    fn grouped_heads_divide_the_budget_by_weights() {
        // 32 query heads and 8 key/value heads of 128.
        let shapes = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096)];
        let dense: f64 = shapes.iter().map(|(i, o)| (i * o) as f64).sum();
        for percent in (10..100).step_by(10) {
            for a in [1.0, 3.0] {
                let keep = f64::from(percent) / 100.0;
                let found = ranks(shapes, keep, a);
                let weights: Vec<f64> = shapes
                    .iter()
                    .zip(found)
                    .map(|((i, o), rank)| rank.map_or(i * o, |rank| rank * (i + o)) as f64)
                    .collect();
                let used: f64 = weights.iter().sum();
                assert!(used <= keep * dense, "{keep} {a}: {used} of {dense}");
                assert!(used > keep * dense - 4.0 * 8192.0);
                if found.iter().all(Option::is_some) {
                    let ratio = (weights[2] + weights[3]) / (weights[0] + weights[1]);
                    assert!((ratio - a).abs() < 0.02 * a, "{keep} {a}: {ratio}");
                }
            }
        }
        // What queries and keys cannot take goes to the others: of 0.8 · 12 d² at a ratio of 1 they have room for 2 d².
        let wide_values = [(64, 64), (64, 64), (64, 320), (320, 64)];
        let [qk, vo] = by_weights(wide_values, 0.8, 1.0);
        let rest = 0.8 * 12.0 - 2.0; // of 10 d² in values and output
        let rank = (rest / 10.0 * 64.0 * 320.0 / 384.0) as usize;
        assert_eq!((qk, vo), ([None; 2], [Some(rank); 2]));
        // Equal shapes give what the square formula gives but for its rounding.
        let [qk, vo] = by_weights([(64, 64); 4], 0.5, 3.0);
        assert_eq!((qk, vo), ([Some(8); 2], [Some(24); 2]));
    }

    #[test]
    fn channels_go_after_the_spared_ones() {
        for hidden in [24, 100, 512, 11008] {
            for percent in (5..100).step_by(5) {
                let p = f64::from(percent) / 100.0;
                let count = removed(hidden, 1.0 - p, 0.01);
                let expected = (((p + 0.01) * hidden as f64 + 1e-9) as usize).min(hidden)
                    - (0.01 * hidden as f64 + 1e-9) as usize;
                assert_eq!(count, expected);
                let start = (0.01 * hidden as f64 + 1e-9) as usize;
                assert_eq!(gap(hidden, count, 0.01), start..start + count);
            }
        }
        assert_eq!(removed(100, 0.8, 0.01), 20);
        assert_eq!(gap(100, 20, 0.01), 1..21);
        assert_eq!(gap(100, 20, 0.0), 0..20);
        assert_eq!(removed(100, 1.0, 0.01), 0);
        // A plan by hand may take all but one.
        assert_eq!(gap(10, 9, 0.5), 1..10);
    }
}
