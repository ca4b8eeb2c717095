//! Runs of blocks that cost least together.

use std::ops::Range;

/// Runs of one length.
pub(super) struct Kind<'a> {
    /// Blocks of each.
    pub(super) length: usize,
    /// How many are wanted.
    pub(super) count: usize,
    /// What the run behind block `l` costs, for every `l` that has so many blocks behind it.
    pub(super) costs: &'a [f64],
}

/// Of all ways to place runs of two lengths behind the first block so that none overlap (they may
/// meet), the one that costs least, from the first run to the last; none where they do not fit.
///
/// With `C(e, i, j)` the least cost of `i` runs of length `m` and `j` of length `n` among the first `e`
/// blocks, and `c(l)` that of a run behind block `l`,
///
/// ```text
/// C(e, i, j) = min { C(e − 1, i, j),
///                    C(e − m, i − 1, j) + c_m(e − m − 1),
///                    C(e − n, i, j − 1) + c_n(e − n − 1) },     C(1, 0, 0) = 0
/// ```
pub(super) fn cheapest(blocks: usize, kinds: &[Kind<'_>; 2]) -> Option<Vec<Range<usize>>> {
    let wanted = kinds.each_ref().map(|kind| kind.count);
    let at = |end: usize, [i, j]: [usize; 2]| (end * (wanted[0] + 1) + i) * (wanted[1] + 1) + j;
    // Each with the kind of the run that ends there, if one does.
    let mut table: Vec<(f64, Option<usize>)> = vec![(f64::INFINITY, None); at(blocks + 1, [0, 0])];
    *table.get_mut(at(1, [0, 0]))? = (0.0, None);
    for end in 2..=blocks {
        for i in 0..=wanted[0] {
            for j in 0..=wanted[1] {
                let placed = [i, j];
                let mut best = (table[at(end - 1, placed)].0, None);
                for (which, kind) in kinds.iter().enumerate() {
                    if placed[which] == 0 || end <= kind.length {
                        continue;
                    }
                    let start = end - kind.length;
                    let mut before = placed;
                    before[which] -= 1;
                    let Some(cost) = kind.costs.get(start - 1) else {
                        continue;
                    };
                    let cost = table[at(start, before)].0 + cost;
                    if cost < best.0 {
                        best = (cost, Some(which));
                    }
                }
                table[at(end, placed)] = best;
            }
        }
    }
    if table[at(blocks, wanted)].0 == f64::INFINITY {
        return None;
    }
    let (mut end, mut placed) = (blocks, wanted);
    let mut runs = Vec::new();
    while end > 1 {
        match table[at(end, placed)].1 {
            None => end -= 1,
            Some(which) => {
                let start = end - kinds[which].length;
                runs.push(start..end);
                placed[which] -= 1;
                end = start;
            }
        }
    }
    runs.reverse();
    Some(runs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// `count` runs of two blocks.
    fn pairs(blocks: usize, count: usize, costs: &[f64]) -> Option<Vec<Range<usize>>> {
        let none = Kind {
            length: 3,
            count: 0,
            costs: &[],
        };
        let some = Kind {
            length: 2,
            count,
            costs,
        };
        cheapest(blocks, &[none, some])
    }

    #[test]
    fn the_cheapest_run_is_left_where_it_stands_in_the_way_of_others() {
        // Blocks 2 and 3 alone cost least, and leave no two in a row of 1 to 4.
        assert_eq!(
            pairs(5, 1, &[0.3, 0.1, 0.4]),
            Some(std::iter::once(2..4).collect())
        );
        assert_eq!(pairs(5, 2, &[0.3, 0.1, 0.4]), Some(vec![1..3, 3..5]));
        // Here they leave two, which cost more than what they save.
        let costs = [0.2, 0.1, 0.2, 0.9, 0.9];
        assert_eq!(pairs(7, 2, &costs), Some(vec![1..3, 3..5]));
    }

    #[test]
    fn the_first_block_stays_and_of_equals_the_first_goes() {
        assert_eq!(
            pairs(4, 1, &[0.5, 0.5]),
            Some(std::iter::once(1..3).collect())
        );
        assert_eq!(pairs(4, 0, &[0.5, 0.5]), Some(vec![]));
        assert_eq!(pairs(4, 2, &[0.5, 0.5]), None);
        assert_eq!(pairs(0, 0, &[]), None);
    }

    /// The least cost of what is left to be placed from a block on, by trying everything.
    fn tried(from: usize, blocks: usize, left: [usize; 2], kinds: &[Kind<'_>; 2]) -> f64 {
        if left == [0, 0] {
            return 0.0;
        }
        if from >= blocks {
            return f64::INFINITY;
        }
        let mut least = tried(from + 1, blocks, left, kinds);
        for (which, kind) in kinds.iter().enumerate() {
            if left[which] > 0 && from + kind.length <= blocks {
                let mut left = left;
                left[which] -= 1;
                let rest = tried(from + kind.length, blocks, left, kinds);
                least = least.min(kind.costs[from - 1] + rest);
            }
        }
        least
    }

    proptest! {
        #[test]
        fn no_other_way_to_place_them_costs_less(
            blocks in 1usize..10,
            short in 1usize..4,
            counts in [0usize..3, 0usize..4],
            costs in prop::collection::vec(0.0..1.0f64, 20),
        ) {
            let (long_costs, short_costs) = costs.split_at(10);
            let long = short + 1;
            let kinds = [
                Kind {
                    length: long,
                    count: counts[0],
                    costs: &long_costs[..blocks.saturating_sub(long)],
                },
                Kind {
                    length: short,
                    count: counts[1],
                    costs: &short_costs[..blocks.saturating_sub(short)],
                },
            ];
            let least = tried(1, blocks, counts, &kinds);
            let Some(runs) = cheapest(blocks, &kinds) else {
                prop_assert_eq!(least, f64::INFINITY);
                return Ok(());
            };
            prop_assert!(runs.iter().all(|run| 1 <= run.start && run.end <= blocks));
            prop_assert!(runs.windows(2).all(|two| two[0].end <= two[1].start));
            let mut sum = 0.0;
            for (kind, count) in kinds.iter().zip(counts) {
                let of_kind = runs.iter().filter(|run| run.len() == kind.length);
                let costs: Vec<f64> = of_kind.map(|run| kind.costs[run.start - 1]).collect();
                prop_assert_eq!(costs.len(), count);
                sum += costs.iter().sum::<f64>();
            }
            prop_assert!((sum - least).abs() < 1e-12, "{} {}", sum, least);
        }
    }
}
