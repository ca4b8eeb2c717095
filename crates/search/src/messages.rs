//! The least of a sum over the edges and variables of a forest, exactly.

use crate::{Error, Forest, Result};

/// What each choice costs.
#[derive(Clone, Debug, PartialEq)]
pub struct Costs {
    /// Of each variable and each of its values.
    pub single: Vec<Vec<f64>>,
    /// Of each edge `(i, j)` and each pair of values, `[a · |j| + b]` for `a` of `i` and `b` of `j`.
    pub pair: Vec<Vec<f64>>,
}

/// A least sum and where it is.
#[derive(Clone, Debug, PartialEq)]
pub struct Minimum {
    /// Which value of each variable.
    pub choice: Vec<usize>,
    /// The sum there.
    pub value: f64,
}

impl Costs {
    /// The sum at a choice.
    ///
    /// # Errors
    /// When the costs are not those of this forest, or the choice is not one value of each variable.
    pub fn at(&self, forest: &Forest, choice: &[usize]) -> Result<f64> {
        self.check(forest)?;
        if choice.len() != self.single.len() {
            return Err(Error::invalid(
                "number of values of a choice",
                choice.len(),
                format!("{}, one of each variable", self.single.len()),
            ));
        }
        let choices = choice.iter().zip(&self.single).enumerate();
        for (variable, (value, costs)) in choices {
            if *value >= costs.len() {
                return Err(Error::invalid(
                    format!("value of variable {variable}"),
                    value,
                    format!("below {}", costs.len()),
                ));
            }
        }
        Ok(self.sum(forest, choice))
    }

    /// [`Self::at`] of what fits.
    fn sum(&self, forest: &Forest, choice: &[usize]) -> f64 {
        let single = self.single.iter().zip(choice).map(|(costs, a)| costs[*a]);
        let pair = forest
            .edges()
            .iter()
            .zip(&self.pair)
            .map(|(&(i, j), costs)| costs[choice[i] * self.single[j].len() + choice[j]]);
        single.sum::<f64>() + pair.sum::<f64>()
    }

    fn check(&self, forest: &Forest) -> Result<()> {
        let sizes: Vec<usize> = self.single.iter().map(Vec::len).collect();
        let edges = forest.edges();
        for (what, found, expected) in [
            ("variables", sizes.len(), forest.dimensions()),
            ("edges", self.pair.len(), edges.len()),
        ] {
            if found != expected {
                return Err(Error::invalid(
                    format!("number of {what} with costs"),
                    found,
                    format!("{expected}, those of the forest"),
                ));
            }
        }
        if let Some(variable) = sizes.iter().position(|size| *size == 0) {
            let what = format!("number of costs of variable {variable}");
            return Err(Error::invalid(what, 0, "at least 1"));
        }
        for (&(i, j), costs) in edges.iter().zip(&self.pair) {
            if costs.len() != sizes[i] * sizes[j] {
                return Err(Error::invalid(
                    format!("number of costs of edge {i}–{j}"),
                    costs.len(),
                    format!("{}, {} by {}", sizes[i] * sizes[j], sizes[i], sizes[j]),
                ));
            }
        }
        Ok(())
    }
}

/// The least sum over a forest. From the leaves to the root of each tree go
///
/// ```text
/// m_{i→j}(x_j) = min_{x_i} [ A_ij(x_i, x_j) + A_i(x_i) + Σ_k m_{k→i}(x_i) ]
/// ```
///
/// and the choices behind the least are followed back. `d g²` additions for `d` variables of `g`
/// values; of equal values the first.
///
/// # Errors
/// When the costs are not those of this forest.
pub fn minimise(forest: &Forest, costs: &Costs) -> Result<Minimum> {
    costs.check(forest)?;
    let neighbours = forest.neighbours();
    let mut totals = costs.single.clone();
    let mut choice = vec![0; forest.dimensions()];
    let mut seen = vec![false; forest.dimensions()];
    for root in 0..forest.dimensions() {
        if seen[root] {
            continue;
        }
        // Each variable after the one that it hangs on.
        let mut order = vec![(root, None)];
        seen[root] = true;
        let mut next = 0;
        while let Some(&(variable, _)) = order.get(next) {
            for &(edge, other) in &neighbours[variable] {
                if !seen[other] {
                    seen[other] = true;
                    order.push((other, Some((edge, variable))));
                }
            }
            next += 1;
        }
        // Of each variable, its best value for each of the one that it hangs on.
        let mut replies = vec![Vec::new(); order.len()];
        for (place, &(variable, parent)) in order.iter().enumerate().rev() {
            let Some((edge, parent)) = parent else {
                continue;
            };
            let forward = forest.edges()[edge].0 == variable;
            let (own, others) = (totals[variable].clone(), totals[parent].len());
            let pair = &costs.pair[edge];
            for (b, total) in totals[parent].iter_mut().enumerate() {
                let cost = |a: usize| match forward {
                    true => pair[a * others + b],
                    false => pair[b * own.len() + a],
                };
                let (reply, least) = least(own.iter().enumerate().map(|(a, own)| own + cost(a)));
                replies[place].push(reply);
                *total += least;
            }
        }
        for (place, &(variable, parent)) in order.iter().enumerate() {
            choice[variable] = match parent {
                None => least(totals[variable].iter().copied()).0,
                Some((_, parent)) => replies[place][choice[parent]],
            };
        }
    }
    let value = costs.sum(forest, &choice);
    Ok(Minimum { choice, value })
}

/// The least number and its place.
fn least(numbers: impl Iterator<Item = f64>) -> (usize, f64) {
    numbers
        .enumerate()
        .fold((0, f64::INFINITY), |best, here| match here.1 < best.1 {
            true => here,
            false => best,
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    /// Every choice, the last variable fastest.
    fn choices(sizes: &[usize]) -> Vec<Vec<usize>> {
        sizes.iter().fold(vec![Vec::new()], |shorter, size| {
            let longer = shorter.iter().flat_map(|choice| {
                (0..*size).map(move |a| choice.iter().copied().chain([a]).collect())
            });
            longer.collect()
        })
    }

    proptest! {
        #[test]
        fn messages_find_what_trying_everything_finds(
            dimensions in 1usize..=5, edges in 0usize..5, seed: u64
        ) {
            let mut generator = ChaCha8Rng::seed_from_u64(seed);
            let edges = edges.min(dimensions - 1);
            let forest = Forest::random(dimensions, edges, &mut generator).unwrap();
            let sizes: Vec<usize> = (0..dimensions).map(|_| generator.random_range(1..=6)).collect();
            let mut table = |size: usize| -> Vec<f64> {
                (0..size).map(|_| generator.random_range(-1.0..1.0)).collect()
            };
            let costs = Costs {
                single: sizes.iter().map(|size| table(*size)).collect(),
                pair: forest.edges().iter().map(|&(i, j)| table(sizes[i] * sizes[j])).collect(),
            };
            let found = minimise(&forest, &costs).unwrap();
            let least = choices(&sizes)
                .into_iter()
                .map(|choice| costs.at(&forest, &choice).unwrap())
                .fold(f64::INFINITY, f64::min);
            prop_assert!((found.value - least).abs() < 1e-12);
            prop_assert_eq!(costs.at(&forest, &found.choice).unwrap(), found.value);
        }
    }

    #[test]
    fn costs_of_another_forest_are_refused() {
        let forest = Forest::new(2, vec![(0, 1)]).unwrap();
        let costs = |single: &[usize], pair: &[usize]| {
            let tables = |sizes: &[usize]| sizes.iter().map(|size| vec![0.0; *size]).collect();
            Costs {
                single: tables(single),
                pair: tables(pair),
            }
        };
        for (single, pair, expected) in [
            (
                &[2][..],
                &[6][..],
                "number of variables with costs is 1, but must be 2, those of the forest",
            ),
            (
                &[2, 3],
                &[],
                "number of edges with costs is 0, but must be 1, those of the forest",
            ),
            (
                &[2, 0],
                &[0],
                "number of costs of variable 1 is 0, but must be at least 1",
            ),
            (
                &[2, 3],
                &[5],
                "number of costs of edge 0–1 is 5, but must be 6, 2 by 3",
            ),
        ] {
            let costs = costs(single, pair);
            let error = minimise(&forest, &costs).unwrap_err();
            assert_eq!(error.to_string(), expected);
            let error = costs.at(&forest, &[0, 0]).unwrap_err();
            assert_eq!(error.to_string(), expected);
        }
        let costs = costs(&[2, 3], &[6]);
        assert_eq!(costs.at(&forest, &[1, 2]).unwrap(), 0.0);
        for (choice, expected) in [
            (
                &[0][..],
                "number of values of a choice is 1, but must be 2, one of each variable",
            ),
            (&[0, 3], "value of variable 1 is 3, but must be below 3"),
        ] {
            let error = costs.at(&forest, choice).unwrap_err();
            assert_eq!(error.to_string(), expected);
        }
    }
}
