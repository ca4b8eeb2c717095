//! Which weights have the smallest scores. Of equal ones the first goes first, so that a larger
//! share always takes what a smaller one took.

use super::settings::Pattern;

/// The rule by which one matrix loses weights.
#[derive(Clone, Copy, Debug)]
pub(super) enum Rule {
    /// So many of all.
    Together(usize),
    /// So many of each row.
    EachRow(usize),
    /// All but so many of each group.
    Groups { n: usize, m: usize },
}

impl Rule {
    /// What a share of a matrix `[rows, columns]` comes to, where its rows are compared by
    /// themselves or together.
    pub(super) fn of(
        share: f64,
        pattern: Pattern,
        by_row: bool,
        rows: usize,
        columns: usize,
    ) -> Self {
        let of = |count: usize| ((share * count as f64).round() as usize).min(count);
        match (pattern, by_row) {
            (Pattern::NOfM { n, m }, _) => Self::Groups { n, m },
            (Pattern::Unstructured, true) => Self::EachRow(of(columns)),
            (Pattern::Unstructured, false) => Self::Together(of(rows * columns)),
        }
    }

    /// The weights that go, of a matrix with these scores and so many columns.
    pub(super) fn pruned(self, scores: &[f64], columns: usize) -> Vec<bool> {
        let mut pruned = vec![false; scores.len()];
        let rows = scores
            .chunks(columns.max(1))
            .zip(pruned.chunks_mut(columns.max(1)));
        match self {
            Self::Together(count) => mark(scores, count, &mut pruned),
            Self::EachRow(count) => rows.for_each(|(scores, pruned)| mark(scores, count, pruned)),
            Self::Groups { n, m } => rows.for_each(|(scores, pruned)| {
                for (scores, pruned) in scores.chunks(m).zip(pruned.chunks_mut(m)) {
                    mark(scores, scores.len().saturating_sub(n), pruned);
                }
            }),
        }
        pruned
    }
}

/// Marks the `count` smallest.
fn mark(scores: &[f64], count: usize, pruned: &mut [bool]) {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    let score = |index: &usize| scores.get(*index).copied().unwrap_or(f64::INFINITY);
    let compare = |a: &usize, b: &usize| score(a).total_cmp(&score(b)).then(a.cmp(b));
    if count < order.len() {
        order.select_nth_unstable_by(count, compare);
        order.truncate(count);
    }
    for index in order {
        if let Some(mark) = pruned.get_mut(index) {
            *mark = true;
        }
    }
}

/// How many each list loses when the `count` smallest of all scores go, of equal ones those of the
/// first list first, and no list loses more than its cap; fewer in all where the caps allow no
/// more. Scores are finite and not negative.
pub(super) fn shares(lists: &[Vec<f64>], caps: &[usize], count: usize) -> Vec<usize> {
    let sorted: Vec<Vec<f64>> = lists
        .iter()
        .map(|scores| {
            let mut scores = scores.clone();
            scores.sort_unstable_by(f64::total_cmp);
            scores
        })
        .collect();
    let taken = |keep: &dyn Fn(f64) -> bool| -> Vec<usize> {
        let each = sorted.iter().zip(caps);
        each.map(|(scores, cap)| scores.partition_point(|score| keep(*score)).min(*cap))
            .collect()
    };
    // The bits of numbers that are not negative are in the order of the numbers.
    let (mut low, mut high) = (0u64, f64::INFINITY.to_bits());
    while low < high {
        let middle = low + (high - low) / 2;
        let threshold = f64::from_bits(middle);
        match taken(&|score| score <= threshold).iter().sum::<usize>() >= count {
            true => high = middle,
            false => low = middle + 1,
        }
    }
    let threshold = f64::from_bits(low);
    let mut counts = taken(&|score| score < threshold);
    let most = taken(&|score| score <= threshold);
    let mut left = count.saturating_sub(counts.iter().sum());
    for (count, most) in counts.iter_mut().zip(most) {
        let more = (most - *count).min(left);
        *count += more;
        left -= more;
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn marked(rule: Rule, scores: &[f64], columns: usize) -> Vec<usize> {
        let pruned = rule.pruned(scores, columns);
        (0..pruned.len()).filter(|index| pruned[*index]).collect()
    }

    #[test]
    fn ties_go_in_order_and_groups_keep_what_they_must() {
        let scores = [3.0, 1.0, 1.0, 2.0, 0.5, 1.0];
        assert_eq!(marked(Rule::Together(3), &scores, 3), [1, 2, 4]);
        assert_eq!(marked(Rule::EachRow(1), &scores, 3), [1, 4]);
        assert_eq!(marked(Rule::Groups { n: 1, m: 2 }, &scores, 3), [1, 4]);
        assert_eq!(
            marked(Rule::Groups { n: 1, m: 3 }, &scores, 6),
            [1, 2, 4, 5]
        );
    }

    #[test]
    fn a_pattern_counts_its_shorter_group() {
        let pattern = Pattern::NOfM { n: 2, m: 4 };
        assert_eq!(
            [8, 9, 11, 3].map(|columns| pattern.pruned(columns)),
            [4, 4, 5, 1].map(Some)
        );
        assert_eq!(Pattern::Unstructured.pruned(8), None);
    }

    proptest! {
        #[test]
        fn a_global_threshold_takes_the_smallest_of_all_within_caps(
            lists in prop::collection::vec(prop::collection::vec(0u8..20, 1..30), 1..5),
            share in 0.0f64..1.0,
            cap in 0.3f64..1.0,
        ) {
            let lists: Vec<Vec<f64>> = lists
                .iter()
                .map(|list| list.iter().map(|v| f64::from(*v)).collect())
                .collect();
            let caps: Vec<usize> = lists.iter().map(|l| (cap * l.len() as f64) as usize).collect();
            let total: usize = lists.iter().map(Vec::len).sum();
            let count = (share * total as f64) as usize;
            let found = shares(&lists, &caps, count);
            // One after another, the smallest of what no cap forbids.
            let mut all: Vec<(f64, usize)> = Vec::new();
            for (index, list) in lists.iter().enumerate() {
                all.extend(list.iter().map(|score| (*score, index)));
            }
            all.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
            let mut expected = vec![0; lists.len()];
            let mut left = count;
            for (_, index) in all {
                if left > 0 && expected[index] < caps[index] {
                    expected[index] += 1;
                    left -= 1;
                }
            }
            prop_assert_eq!(found, expected);
        }

        #[test]
        fn a_larger_share_takes_what_a_smaller_one_took(
            scores in prop::collection::vec(0u8..9, 24),
            small in 0.0f64..1.0,
            more in 0.0f64..1.0,
            by_row in any::<bool>(),
        ) {
            let scores: Vec<f64> = scores.into_iter().map(f64::from).collect();
            let pruned = |share: f64| {
                Rule::of(share, Pattern::Unstructured, by_row, 4, 6).pruned(&scores, 6)
            };
            let (less, most) = (pruned(small), pruned(small + more * (1.0 - small)));
            prop_assert!(less.iter().zip(&most).all(|(less, most)| !less || *most));
        }
    }
}
