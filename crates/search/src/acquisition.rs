//! How promising each value of each term is.

use crate::{AdditiveProcess, Costs, Forest};

/// `μ_c − w s_c` of each term of a forest's process at every combination of `candidates`, the
/// places of each variable that are looked at. The process has the forest's cliques.
pub fn lower_confidence_bound(
    process: &AdditiveProcess,
    forest: &Forest,
    candidates: &[Vec<usize>],
    weight: f64,
) -> Costs {
    let edges = forest.edges();
    let alone = forest.isolated();
    let mut places: Vec<(usize, [usize; 2], usize)> = Vec::new();
    for (clique, &(i, j)) in edges.iter().enumerate() {
        for a in &candidates[i] {
            places.extend(candidates[j].iter().map(|b| (clique, [*a, *b], 2)));
        }
    }
    for (number, variable) in alone.iter().enumerate() {
        let clique = edges.len() + number;
        places.extend(candidates[*variable].iter().map(|a| (clique, [*a, 0], 1)));
    }
    let queries: Vec<(usize, &[usize])> = places
        .iter()
        .map(|(clique, places, count)| (*clique, &places[..*count]))
        .collect();
    let marginals = process.marginals(&queries);
    let mut bounds = marginals
        .into_iter()
        .map(|marginal| marginal.mean - weight * marginal.variance.sqrt());
    let pair = edges
        .iter()
        .map(|&(i, j)| {
            let count = candidates[i].len() * candidates[j].len();
            bounds.by_ref().take(count).collect()
        })
        .collect();
    let mut single: Vec<Vec<f64>> = candidates.iter().map(|c| vec![0.0; c.len()]).collect();
    for variable in alone {
        for (cost, bound) in single[variable].iter_mut().zip(bounds.by_ref()) {
            *cost = bound;
        }
    }
    Costs { single, pair }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Domain, Hyperparameters, minimise};
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    #[test]
    fn more_exploration_makes_every_bound_lower() {
        let domain = Domain::uniform(4, 0.0, 1.0, 6).unwrap();
        let mut generator = ChaCha8Rng::seed_from_u64(9);
        let forest = Forest::random(4, 2, &mut generator).unwrap();
        let points: Vec<_> = (0..8).map(|_| domain.random(&mut generator)).collect();
        let values: Vec<f64> = points
            .iter()
            .map(|_| generator.random_range(-1.0..1.0))
            .collect();
        let scales = Hyperparameters::new(4, 0.3, 0.5);
        let process =
            AdditiveProcess::new(&domain, forest.cliques(), &scales, 0.01, &points, &values)
                .unwrap();
        let every: Vec<Vec<usize>> = (0..4).map(|_| (0..6).collect()).collect();
        let mut before: Option<Costs> = None;
        for weight in [0.0, 0.5, 2.0] {
            let costs = lower_confidence_bound(&process, &forest, &every, weight);
            // The bound of a whole point is the sum of its terms' bounds.
            let found = minimise(&forest, &costs).unwrap();
            let mean = process.predict(std::slice::from_ref(&found.choice))[0].mean;
            if weight == 0.0 {
                assert!((found.value - mean).abs() < 1e-9);
            } else {
                assert!(found.value < mean);
            }
            if let Some(before) = &before {
                let cells = before
                    .pair
                    .iter()
                    .flatten()
                    .zip(costs.pair.iter().flatten());
                assert!(cells.clone().count() == 72 && cells.into_iter().all(|(b, a)| a < b));
            }
            before = Some(costs);
        }
    }
}
