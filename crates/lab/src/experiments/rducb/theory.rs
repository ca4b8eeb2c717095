//! What can be counted out, and what more edges give and take.

use lapidary_search::{
    AdditiveProcess, Domain, Forest, Hyperparameters, edge_probabilities, spanning_trees,
};
use rand::RngExt;

use crate::experiments::mean;
use crate::{Plot, Result, Series};

/// Variables of the trade-off.
const DIMENSIONS: usize = 12;
const POINTS: usize = 60;
const NOISE: f64 = 0.01;
const FORESTS: u64 = 20;

/// The least probability that a pair is an edge, of trees that are as likely as any other, and the
/// largest such of 200 other weightings.
pub(super) fn least_probabilities(dimensions: usize) -> Result<(f64, f64)> {
    let trees = spanning_trees(dimensions);
    let least = |weights: &[f64]| {
        let probabilities = edge_probabilities(&trees, weights);
        probabilities.into_values().fold(f64::INFINITY, f64::min)
    };
    let uniform = least(&vec![1.0; trees.len()]);
    let mut generator = lapidary_train::generator(0);
    let others = (0..200).map(|_| {
        let weights: Vec<f64> = trees.iter().map(|_| generator.random()).collect();
        least(&weights)
    });
    Ok((uniform, others.fold(0.0, f64::max)))
}

/// The largest difference between the sum of the terms' means and the mean of the sum.
pub(super) fn means_add_up() -> Result<f64> {
    let domain = Domain::uniform(8, 0.0, 1.0, 20)?;
    let mut generator = lapidary_train::generator(1);
    let forest = Forest::random(8, 3, &mut generator)?;
    let mut draw = |count: usize| -> Vec<Vec<usize>> {
        (0..count).map(|_| domain.random(&mut generator)).collect()
    };
    let (points, tests) = (draw(30), draw(20));
    let values: Vec<f64> = points.iter().map(|point| point[0] as f64 / 20.0).collect();
    let scales = Hyperparameters::new(8, 0.3, 0.5);
    let process =
        AdditiveProcess::new(&domain, forest.cliques(), &scales, NOISE, &points, &values)?;
    let whole = process.predict(&tests);
    let differences = tests.iter().zip(whole).map(|(point, whole)| {
        let terms = process
            .cliques()
            .iter()
            .enumerate()
            .map(|(clique, variables)| {
                let places: Vec<usize> = variables.iter().map(|i| point[*i]).collect();
                let found = process.marginals(&[(clique, &places)]);
                found.iter().map(|term| term.mean).sum::<f64>()
            });
        (terms.sum::<f64>() - whole.mean).abs()
    });
    Ok(differences.fold(0.0, f64::max))
}

/// Forests of one number of edges.
pub(super) struct Point {
    edges: usize,
    /// `½ log |I + K / σ²|` at random points, for a process of variance 1.
    pub(super) gain: f64,
    /// Probability that a pair which matters is no edge.
    pub(super) missed: f64,
}

pub(super) fn trade_off(seed: u64) -> Result<Vec<Point>> {
    let domain = Domain::uniform(DIMENSIONS, 0.0, 1.0, 150)?;
    let all_pairs = (DIMENSIONS * (DIMENSIONS - 1) / 2) as f64;
    [
        0,
        DIMENSIONS / 4,
        DIMENSIONS / 2,
        3 * DIMENSIONS / 4,
        DIMENSIONS - 1,
    ]
    .into_iter()
    .map(|edges| {
        let gains = (0..FORESTS).map(|draw| {
            let mut generator = lapidary_train::generator(seed + draw);
            let points: Vec<_> = (0..POINTS).map(|_| domain.random(&mut generator)).collect();
            let forest = Forest::random(DIMENSIONS, edges, &mut generator)?;
            gain(&domain, &forest, &points)
        });
        let gains = gains.collect::<Result<Vec<_>>>()?;
        Ok(Point {
            edges,
            gain: mean(gains),
            missed: 1.0 - edges as f64 / all_pairs,
        })
    })
    .collect()
}

fn gain(domain: &Domain, forest: &Forest, points: &[Vec<usize>]) -> Result<f64> {
    let cliques = forest.cliques();
    let total: f64 = cliques
        .iter()
        .map(|clique| (clique.len() as f64).sqrt())
        .sum();
    let scales = Hyperparameters::new(DIMENSIONS, 0.3, 1.0 / total);
    let zeros = vec![0.0; points.len()];
    let process = AdditiveProcess::new(domain, cliques, &scales, NOISE, points, &zeros)?;
    // Of zeros the log-likelihood is −½ log |K + σ² I| − n/2 log 2π.
    let constant = 0.5 * points.len() as f64 * (std::f64::consts::TAU * NOISE).ln();
    Ok(-process.log_likelihood() - constant)
}

pub(super) fn listed(points: &[Point]) -> String {
    let each = points.iter().map(|point| {
        format!(
            "{} edges: {:.1} nats, {:.0} % missed",
            point.edges,
            point.gain,
            100.0 * point.missed
        )
    });
    each.collect::<Vec<_>>().join("; ")
}

pub(super) fn plot(points: &[Point]) -> Plot {
    Plot {
        title: "What edges give and take".to_owned(),
        x: "information gain in nats".to_owned(),
        y: "share of pairs that are missed".to_owned(),
        series: vec![Series {
            name: format!("forests over {DIMENSIONS} variables"),
            points: points
                .iter()
                .map(|point| (point.gain, point.missed))
                .collect(),
        }],
    }
}
