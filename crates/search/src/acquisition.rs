//! How promising each value of each term is.

use crate::{AdditiveProcess, Costs, Error, Forest, Result};

/// `μ_c − w s_c` of each term of a forest's process at every combination of `candidates`, the
/// places of each variable that are looked at.
///
/// # Errors
/// When the cliques of the process are not those of the forest, or there is not a list of places of
/// its grid for each variable.
pub fn lower_confidence_bound(
    process: &AdditiveProcess,
    forest: &Forest,
    candidates: &[Vec<usize>],
    weight: f64,
) -> Result<Costs> {
    check_cliques(process, forest)?;
    if candidates.len() != forest.dimensions() {
        return Err(Error::invalid(
            "number of lists of candidates",
            candidates.len(),
            format!("{}, one for each variable", forest.dimensions()),
        ));
    }
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
    let marginals = process.marginals(&queries)?;
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
    Ok(Costs { single, pair })
}

/// Refuses a process whose terms are not those of a forest.
fn check_cliques(process: &AdditiveProcess, forest: &Forest) -> Result<()> {
    let (found, expected) = (process.cliques(), forest.cliques());
    if found.len() != expected.len() {
        return Err(Error::invalid(
            "number of cliques of the process",
            found.len(),
            format!("{}, that of the forest", expected.len()),
        ));
    }
    let mut pairs = found.iter().zip(&expected).enumerate();
    match pairs.find(|(_, (found, expected))| found != expected) {
        None => Ok(()),
        Some((clique, (found, expected))) => Err(Error::invalid(
            format!("clique {clique} of the process"),
            format!("{found:?}"),
            format!("{expected:?}, that of the forest"),
        )),
    }
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
            let costs = lower_confidence_bound(&process, &forest, &every, weight).unwrap();
            // The bound of a whole point is the sum of its terms' bounds.
            let found = minimise(&forest, &costs).unwrap();
            let there = process.predict(std::slice::from_ref(&found.choice));
            let mean = there.unwrap()[0].mean;
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

    #[test]
    fn a_bound_of_what_does_not_fit_together_is_refused() {
        let domain = Domain::uniform(3, 0.0, 1.0, 4).unwrap();
        let forest = Forest::new(3, vec![(0, 2)]).unwrap();
        let process = AdditiveProcess::new(
            &domain,
            forest.cliques(),
            &Hyperparameters::new(3, 0.3, 0.5),
            0.1,
            &[vec![0, 1, 2]],
            &[1.0],
        )
        .unwrap();
        let bound = |edges: Vec<(usize, usize)>, candidates: &[Vec<usize>]| {
            let forest = Forest::new(3, edges).unwrap();
            lower_confidence_bound(&process, &forest, candidates, 1.0)
        };
        let every = vec![vec![0, 3]; 3];
        let fits = bound(vec![(0, 2)], &every).unwrap();
        assert_eq!((fits.single.len(), fits.pair[0].len()), (3, 4));
        let beyond = [vec![0], vec![4], vec![0]];
        for (found, expected) in [
            (
                bound(vec![], &every),
                "number of cliques of the process is 2, but must be 3, that of the forest",
            ),
            (
                bound(vec![(0, 1)], &every),
                "clique 0 of the process is [0, 2], but must be [0, 1], that of the forest",
            ),
            (
                bound(vec![(0, 2)], &every[..2]),
                "number of lists of candidates is 2, but must be 3, one for each variable",
            ),
            (
                bound(vec![(0, 2)], &beyond),
                "place in coordinate 1 is 4, but must be below 4",
            ),
        ] {
            assert_eq!(found.unwrap_err().to_string(), expected);
        }
    }
}
