//! Type II: queries and keys meet in a product that positions may turn. Whole features of both go
//! (CR decomposition), the same ones of a group of keys and of the query heads that read it.
//!
//! A feature is worth `‖C_Q^{1/2} e_i‖ ‖C_K^{1/2} e_i‖ = √(C_Q[i,i] C_K[i,i])`, with second moments
//! of queries and keys before rotation; only their diagonals are needed. Where a rotation turns
//! features in pairs, a pair goes or stays as one, since either alone would be of both:
//!
//! ```text
//! score² = Σ_heads (C_Q[a,a] C_K[a,a] + C_Q[b,b] C_K[b,b])      of the pair (a, b)
//! ```
//!
//! A pair that stays keeps its frequency, and scores keep their scale.

use lapidary_parts::attention::MultiHeadSpec;
use lapidary_parts::position::{KeptPairs, PositionSpec};

use crate::methods::channels::largest;
use crate::{Error, Result};

/// What stays of queries and keys.
pub(crate) struct Kept {
    /// For each group, the features of a head that stay, in their new order.
    pub(crate) features: Vec<Vec<usize>>,
    /// How scores know positions then.
    pub(crate) position: PositionSpec,
}

/// How many pairs and how many unrotated features `features` of a head are.
struct Shares {
    rotated: usize,
    pairs: usize,
    rest: usize,
}

/// The nearest number of features at `share` of a head that the rotation allows, which may be zero.
pub(crate) fn nearest(spec: &MultiHeadSpec, head_width: usize, share: f64) -> usize {
    let of = |all: usize| (share * all as f64).round() as usize;
    match spec.position.rotary() {
        Some(rotary) => {
            let rotated = rotary.rotated(head_width);
            match of(rotated / 2) {
                0 => 0,
                pairs => 2 * pairs + of(head_width - rotated),
            }
        }
        None => of(head_width),
    }
}

fn shares(spec: &MultiHeadSpec, head_width: usize, features: usize) -> Result<Shares> {
    let refuse = |expected: String| {
        Err(Error::invalid(
            "features of a narrower query and key",
            features,
            expected,
        ))
    };
    if features == 0 || features > head_width {
        return refuse(format!("between 1 and {head_width}"));
    }
    let Some(rotary) = spec.position.rotary() else {
        return Ok(Shares {
            rotated: 0,
            pairs: 0,
            rest: features,
        });
    };
    let rotated = rotary.rotated(head_width);
    let unrotated = head_width - rotated;
    // In proportion, as far as there are enough of either.
    let wanted = (features * rotated / 2 + head_width / 2) / head_width.max(1);
    let least = features.saturating_sub(unrotated).div_ceil(2).max(1);
    let pairs = wanted.clamp(least, (rotated / 2).max(least));
    match features.checked_sub(2 * pairs) {
        Some(rest) if rest <= unrotated && pairs <= rotated / 2 => Ok(Shares {
            rotated,
            pairs,
            rest,
        }),
        _ => refuse(format!(
            "pairs of the {rotated} rotated features, one at least, and some of the {unrotated} others"
        )),
    }
}

/// Chooses `features` of each head. `queries` are the mean squares `[heads · head_width]`, `keys`
/// those `[groups · head_width]`.
pub(crate) fn choose(
    spec: &MultiHeadSpec,
    head_width: usize,
    features: usize,
    queries: &[f64],
    keys: &[f64],
) -> Result<Kept> {
    let shares = shares(spec, head_width, features)?;
    let rotary = spec.position.rotary();
    let interleaved = rotary.is_some_and(|rotary| rotary.interleaved);
    let of_pair = |i: usize| pair(i, shares.rotated, interleaved);
    let mut all_features = Vec::new();
    let mut all_pairs = Vec::new();
    for group in 0..spec.groups() {
        let squares = scores(spec, head_width, group, queries, keys);
        let score = |i: usize| squares.get(i).copied().unwrap_or(0.0);
        let by_pair = by_pair(&squares, shares.rotated, interleaved);
        let pairs = largest(&by_pair, shares.pairs);
        let unrotated: Vec<f64> = (shares.rotated..head_width).map(score).collect();
        let rest = largest(&unrotated, shares.rest);
        let rest = rest.into_iter().map(|i| i + shares.rotated);
        all_features.push(turned(&pairs, of_pair, interleaved).chain(rest).collect());
        all_pairs.push(pairs);
    }
    Ok(Kept {
        features: all_features,
        position: narrowed(&spec.position, head_width, all_pairs),
    })
}

/// Of each rotary pair, what its two features are worth.
pub(crate) fn by_pair(squares: &[f64], rotated: usize, interleaved: bool) -> Vec<f64> {
    let score = |i: usize| squares.get(i).copied().unwrap_or(0.0);
    let of_pair = |i: usize| {
        let (a, b) = pair(i, rotated, interleaved);
        score(a) + score(b)
    };
    (0..rotated / 2).map(of_pair).collect()
}

/// The features of these pairs of a head, laid out as the rotation finds them.
pub(crate) fn features_of(pairs: &[usize], rotated: usize, interleaved: bool) -> Vec<usize> {
    turned(pairs, |i| pair(i, rotated, interleaved), interleaved).collect()
}

/// `Σ_heads C_Q[i,i] C_K[i,i]` over the heads of a group.
pub(crate) fn scores(
    spec: &MultiHeadSpec,
    head_width: usize,
    group: usize,
    queries: &[f64],
    keys: &[f64],
) -> Vec<f64> {
    let each = spec.heads / spec.groups().max(1);
    let own =
        |all: &[f64], head: usize, i: usize| all.get(head * head_width + i).copied().unwrap_or(0.0);
    (0..head_width)
        .map(|i| {
            let heads = group * each..(group + 1) * each;
            let query: f64 = heads.map(|head| own(queries, head, i)).sum();
            query * own(keys, group, i)
        })
        .collect()
}

/// The features that turn together as pair `i` of `rotated` features.
fn pair(i: usize, rotated: usize, interleaved: bool) -> (usize, usize) {
    match interleaved {
        true => (2 * i, 2 * i + 1),
        false => (i, i + rotated / 2),
    }
}

/// Features of the kept pairs, laid out as the rotation finds them.
fn turned(
    pairs: &[usize],
    of_pair: impl Fn(usize) -> (usize, usize),
    interleaved: bool,
) -> impl Iterator<Item = usize> {
    let both: Vec<(usize, usize)> = pairs.iter().map(|i| of_pair(*i)).collect();
    let features: Vec<usize> = match interleaved {
        true => both.iter().flat_map(|(a, b)| [*a, *b]).collect(),
        false => {
            let second = both.iter().map(|(_, b)| *b);
            both.iter().map(|(a, _)| *a).chain(second).collect()
        }
    };
    features.into_iter()
}

/// The positions with only these pairs left, counted in the head as it was first made.
fn narrowed(position: &PositionSpec, head_width: usize, pairs: Vec<Vec<usize>>) -> PositionSpec {
    let mut position = position.clone();
    let Some(rotary) = position.rotary_mut() else {
        return position;
    };
    let earlier = rotary.kept.take();
    let first = |group: usize, i: usize| match &earlier {
        None => i,
        Some(kept) => {
            let known = kept.groups.get(group).and_then(|pairs| pairs.get(i));
            known.copied().unwrap_or(i)
        }
    };
    let of = earlier
        .as_ref()
        .map_or_else(|| rotary.rotated(head_width), |kept| kept.of);
    let groups = pairs.into_iter().enumerate().map(|(group, pairs)| {
        let first = |i: usize| first(group, i);
        pairs.into_iter().map(first).collect()
    });
    let groups = groups.collect();
    rotary.kept = Some(KeptPairs { of, groups });
    rotary.width = None;
    position
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::methods::modegpt::testing::second_moment;
    use lapidary_factor::square_root;
    use lapidary_parts::position::RotarySpec;

    fn rotary(width: Option<usize>, interleaved: bool) -> MultiHeadSpec {
        MultiHeadSpec {
            groups: Some(2),
            position: PositionSpec::Rotary(RotarySpec {
                width,
                interleaved,
                ..RotarySpec::default()
            }),
            ..MultiHeadSpec::new(4)
        }
    }

    #[test]
    fn scores_from_the_square_roots_are_those_from_the_diagonals() {
        let (q, k) = (second_moment(9, 5, 1), second_moment(9, 5, 2));
        let (root_q, root_k) = (
            square_root("q", q.as_ref()).unwrap(),
            square_root("k", k.as_ref()).unwrap(),
        );
        for i in 0..5 {
            let roots = root_q.col(i).squared_norm_l2() * root_k.col(i).squared_norm_l2();
            assert!((roots - q[(i, i)] * k[(i, i)]).abs() < 1e-12 * roots);
        }
    }

    #[test]
    fn heads_of_a_group_decide_together_and_pairs_stay_whole() {
        let spec = rotary(None, false);
        // Pair 0 = (0, 2), pair 1 = (1, 3). Heads 0 and 1 read group 0, heads 2 and 3 group 1.
        #[rustfmt::skip]
        let queries = [
            1.0, 4.0, 1.0, 0.0,   6.0, 0.0, 0.0, 0.0,
            0.0, 0.0, 0.0, 3.0,   1.0, 0.0, 1.0, 0.0,
        ];
        let kept = choose(&spec, 4, 2, &queries, &[1.0; 8]).unwrap();
        assert_eq!(kept.features, [vec![0, 2], vec![1, 3]]);
        let PositionSpec::Rotary(position) = kept.position else {
            unreachable!()
        };
        let expected = KeptPairs {
            of: 4,
            groups: vec![vec![0], vec![1]],
        };
        assert_eq!(position.kept, Some(expected));
        assert_eq!(position.rotated(2), 2);
    }

    #[test]
    fn partly_rotated_and_interleaved_heads_keep_their_layout() {
        let spec = rotary(Some(4), true);
        let queries = [9.0, 0.0, 1.0, 1.0, 5.0, 7.0].repeat(4);
        let kept = choose(&spec, 6, 3, &queries, &[1.0; 12]).unwrap();
        assert_eq!(kept.features[0], [0, 1, 5]);
        let whole = choose(&spec, 6, 6, &queries, &[1.0; 12]).unwrap();
        assert_eq!(whole.features[1], [0, 1, 2, 3, 4, 5]);
        for features in 1..=6 {
            match choose(&spec, 6, features, &queries, &[1.0; 12]) {
                Ok(kept) => assert!(kept.features.iter().all(|f| f.len() == features)),
                Err(error) => assert_eq!(features, 1, "{error}"),
            }
        }
        assert!(choose(&rotary(None, false), 6, 3, &queries, &[1.0; 12]).is_err());
    }

    #[test]
    fn pairs_of_heads_that_were_narrowed_before_keep_their_first_numbers() {
        let mut spec = rotary(None, false);
        let PositionSpec::Rotary(rotary) = &mut spec.position else {
            unreachable!()
        };
        rotary.kept = Some(KeptPairs {
            of: 12,
            groups: vec![vec![1, 4], vec![0, 5]],
        });
        let queries = [0.0, 1.0, 0.0, 1.0].repeat(4);
        let kept = choose(&spec, 4, 2, &queries, &[1.0; 8]).unwrap();
        let PositionSpec::Rotary(position) = kept.position else {
            unreachable!()
        };
        let expected = KeptPairs {
            of: 12,
            groups: vec![vec![4], vec![5]],
        };
        assert_eq!(position.kept, Some(expected));
    }

    #[test]
    fn shares_round_to_what_the_rotation_allows() {
        let whole = rotary(None, false);
        assert_eq!(nearest(&whole, 16, 0.7), 12);
        assert_eq!(nearest(&whole, 4, 0.2), 0);
        assert_eq!(nearest(&rotary(Some(4), false), 16, 0.5), 8);
        assert_eq!(nearest(&MultiHeadSpec::new(2), 5, 0.5), 3);
    }
}
