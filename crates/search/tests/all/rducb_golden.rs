//! Processes, messages and functions beside NumPy's, from `tests/oracles/rducb.py`.
#![allow(clippy::panic, clippy::result_large_err, clippy::unwrap_used)]

use lapidary_search::{
    AdditiveProcess, Costs, Domain, Forest, Hyperparameters, TestFunction, minimise,
};
use serde::Deserialize;
use std::collections::BTreeMap;

#[derive(Deserialize)]
struct Query {
    clique: usize,
    places: Vec<usize>,
    mean: f64,
    variance: f64,
}

#[derive(Deserialize)]
struct Value {
    x: Vec<f64>,
    value: f64,
}

#[derive(Deserialize)]
struct Fixture {
    places: Vec<usize>,
    points: Vec<Vec<usize>>,
    values: Vec<f64>,
    lengths: Vec<f64>,
    amplitudes: Vec<f64>,
    noise: f64,
    cliques: Vec<Vec<usize>>,
    likelihood: f64,
    by_length: Vec<f64>,
    by_amplitude: Vec<f64>,
    queries: Vec<Query>,
    edges: Vec<(usize, usize)>,
    single: Vec<Vec<f64>>,
    pair: Vec<Vec<f64>>,
    choice: Vec<usize>,
    least: f64,
    functions: BTreeMap<String, Vec<Value>>,
}

fn fixture() -> Fixture {
    serde_json::from_str(include_str!("../fixtures/rducb.json")).unwrap()
}

fn close(found: f64, expected: f64) {
    let difference = (found - expected).abs();
    assert!(
        difference < 1e-9 * (1.0 + expected.abs()),
        "{found} {expected}"
    );
}

#[test]
fn terms_likelihood_and_gradient() {
    let fixture = fixture();
    let grids = fixture
        .places
        .iter()
        .map(|places| (0..*places).map(|p| p as f64).collect());
    let domain = Domain::new(grids.collect()).unwrap();
    let scales = Hyperparameters {
        lengths: fixture.lengths,
        amplitudes: fixture.amplitudes,
    };
    let (points, values) = (&fixture.points, &fixture.values);
    let process = AdditiveProcess::new(
        &domain,
        fixture.cliques,
        &scales,
        fixture.noise,
        points,
        values,
    )
    .unwrap();
    close(process.log_likelihood(), fixture.likelihood);
    let gradient = process.gradient();
    for (found, expected) in gradient.lengths.iter().zip(&fixture.by_length) {
        close(*found, *expected);
    }
    for (found, expected) in gradient.amplitudes.iter().zip(&fixture.by_amplitude) {
        close(*found, *expected);
    }
    for query in &fixture.queries {
        let found = process.marginals(&[(query.clique, &query.places)]).unwrap()[0];
        close(found.mean, query.mean);
        close(found.variance, query.variance);
    }
}

#[test]
fn the_least_sum_over_a_forest() {
    let fixture = fixture();
    let forest = Forest::new(fixture.single.len(), fixture.edges).unwrap();
    let costs = Costs {
        single: fixture.single,
        pair: fixture.pair,
    };
    let found = minimise(&forest, &costs).unwrap();
    assert_eq!(found.choice, fixture.choice);
    close(found.value, fixture.least);
}

#[test]
fn functions() {
    for (name, values) in fixture().functions {
        for Value { x, value } in values {
            let dimensions = x.len();
            let function = match name.as_str() {
                "styblinski_tang" => TestFunction::StyblinskiTang { dimensions },
                "rosenbrock" => TestFunction::Rosenbrock { dimensions },
                _ => TestFunction::HiddenHartmann {
                    dimensions,
                    active: [0, 1, 2, 3, 4, 5],
                },
            };
            close(function.value(&x), value);
        }
    }
}
