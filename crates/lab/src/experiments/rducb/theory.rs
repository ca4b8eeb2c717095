//! What can be counted out, and what richer decompositions give and take.

use lapidary_search::{
    AdditiveProcess, Domain, Forest, Hyperparameters, edge_probabilities, missed_pairs,
    random_partition, spanning_trees,
};
use lapidary_train::Generator;
use rand::RngExt;

use crate::experiments::mean;
use crate::{Plot, Result, Series};

/// Variables of the trade-off.
const DIMENSIONS: usize = 12;
const POINTS: usize = 60;
/// Points at which errors are expected.
const TESTS: usize = 50;
const NOISE: f64 = 0.01;
const DRAWS: u64 = 20;

/// The least probability that a pair is an edge, of trees that are as likely as any other, and the
/// largest such of 200 other weightings.
pub(super) fn least_probabilities(dimensions: usize) -> Result<(f64, f64)> {
    let trees = spanning_trees(dimensions)?;
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
    let whole = process.predict(&tests)?;
    let mut largest = 0.0f64;
    for (point, whole) in tests.iter().zip(whole) {
        let mut sum = 0.0;
        for (clique, variables) in process.cliques().iter().enumerate() {
            let places: Vec<usize> = variables.iter().map(|i| point[*i]).collect();
            let found = process.marginals(&[(clique, &places)])?;
            sum += found.iter().map(|term| term.mean).sum::<f64>();
        }
        largest = largest.max((sum - whole.mean).abs());
    }
    Ok(largest)
}

/// Decompositions of one kind, mean over draws.
pub(super) struct Point {
    /// Edges of a forest, or variables of a clique.
    count: usize,
    /// Information gain at random points, for a process of variance 1.
    pub(super) gain: f64,
    /// Probability that a pair which matters is in no clique.
    pub(super) missed: f64,
    /// Expected squared error where the truth is another tree, for a truth of variance 1.
    pub(super) error: f64,
}

/// Both ways to make decompositions richer.
pub(super) struct TradeOff {
    /// Forests, by edges.
    pub(super) edges: Vec<Point>,
    /// Cliques that do not overlap, by their size.
    pub(super) sizes: Vec<Point>,
}

pub(super) fn trade_off(seed: u64) -> Result<TradeOff> {
    let edges = [
        0,
        DIMENSIONS / 4,
        DIMENSIONS / 2,
        3 * DIMENSIONS / 4,
        DIMENSIONS - 1,
    ];
    let edges = edges.map(|edges| {
        point(seed, edges, |generator| {
            Ok(Forest::random(DIMENSIONS, edges, generator)?.cliques())
        })
    });
    let sizes = [1, 2, 3, 4, 6, DIMENSIONS].map(|size| {
        point(seed, size, |generator| {
            Ok(random_partition(DIMENSIONS, size, generator)?)
        })
    });
    Ok(TradeOff {
        edges: edges.into_iter().collect::<Result<_>>()?,
        sizes: sizes.into_iter().collect::<Result<_>>()?,
    })
}

fn point(
    seed: u64,
    count: usize,
    decomposition: impl Fn(&mut Generator) -> Result<Vec<Vec<usize>>>,
) -> Result<Point> {
    let domain = Domain::uniform(DIMENSIONS, 0.0, 1.0, 150)?;
    let (mut gains, mut missed, mut errors) = (Vec::new(), Vec::new(), Vec::new());
    for draw in 0..DRAWS {
        let mut generator = lapidary_train::generator(seed + draw);
        let mut points = |count: usize| -> Vec<Vec<usize>> {
            (0..count).map(|_| domain.random(&mut generator)).collect()
        };
        let (points, tests) = (points(POINTS), points(TESTS));
        let truth = Forest::random(DIMENSIONS, DIMENSIONS - 1, &mut generator)?.cliques();
        let truth = of_variance_one(&domain, truth, &points)?;
        let cliques = decomposition(&mut generator)?;
        missed.push(missed_pairs(DIMENSIONS, &cliques));
        let process = of_variance_one(&domain, cliques, &points)?;
        gains.push(process.information_gain()?);
        errors.push(mean(process.expected_errors(&truth, &tests)?));
    }
    Ok(Point {
        count,
        gain: mean(gains),
        missed: mean(missed),
        error: mean(errors),
    })
}

/// A process whose terms' variances, `√(Σ v²)` each, add up to 1.
fn of_variance_one(
    domain: &Domain,
    cliques: Vec<Vec<usize>>,
    points: &[Vec<usize>],
) -> Result<AdditiveProcess> {
    let roots = cliques.iter().map(|clique| (clique.len() as f64).sqrt());
    let total: f64 = roots.sum();
    let scales = Hyperparameters::new(DIMENSIONS, 0.3, 1.0 / total);
    let zeros = vec![0.0; points.len()];
    Ok(AdditiveProcess::new(
        domain, cliques, &scales, NOISE, points, &zeros,
    )?)
}

pub(super) fn listed(points: &[Point], what: &str) -> String {
    let each = points.iter().map(|point| {
        format!(
            "{} {what}: {:.1} nats, {:.0} % missed, error {:.3}",
            point.count,
            point.gain,
            100.0 * point.missed,
            point.error
        )
    });
    each.collect::<Vec<_>>().join("; ")
}

pub(super) fn plots(trade: &TradeOff) -> Vec<Plot> {
    let plot = |title: &str, y: &str, of: fn(&Point) -> f64| {
        let series = |name: String, points: &[Point]| Series {
            name,
            points: points.iter().map(|point| (point.gain, of(point))).collect(),
        };
        Plot {
            title: title.to_owned(),
            x: "information gain in nats".to_owned(),
            y: y.to_owned(),
            series: vec![
                series(
                    format!("forests over {DIMENSIONS} variables, by edges"),
                    &trade.edges,
                ),
                series(
                    "cliques that do not overlap, by size".to_owned(),
                    &trade.sizes,
                ),
            ],
        }
    };
    vec![
        plot(
            "What a decomposition may learn and what it misses",
            "share of pairs that are missed",
            |point| point.missed,
        ),
        plot(
            "What a decomposition may learn and how it errs",
            "expected squared error where another tree is true",
            |point| point.error,
        ),
    ]
}
