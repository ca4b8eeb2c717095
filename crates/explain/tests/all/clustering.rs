//! The exact properties of particles under attention.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod dynamics;
mod models;

use crate::common::generator;
use lapidary_explain::analyses::clustering::{
    Dynamics, Ensemble, Flow, FreeDynamics, Matrices, Particles, Scheme, wendel,
};
use lapidary_factor::{Matrix, qr};
use serde::Deserialize;

const FLOWS: [Flow; 2] = [Flow::SelfAttention, Flow::Unnormalised];

fn random(count: usize, dimension: usize, seed: u64) -> Particles {
    Particles::random(count, dimension, &mut generator(seed)).unwrap()
}

fn largest_difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .fold(0.0, |m: f64, (a, b)| m.max((a - b).abs()))
}

fn rotation(dimension: usize, seed: u64) -> Matrix {
    let noise = random(dimension, dimension, seed);
    let noise = Matrix::from_fn(dimension, dimension, |i, j| {
        noise.points()[i * dimension + j]
    });
    qr(noise.as_ref()).q
}

fn rotated(particles: &Particles, by: &Matrix) -> Particles {
    let dimension = particles.dimension();
    let turn = |x: &[f64]| -> Vec<f64> {
        (0..dimension)
            .map(|j| (0..dimension).map(|i| x[i] * by[(i, j)]).sum())
            .collect()
    };
    Particles::new(dimension, particles.iter().flat_map(turn).collect()).unwrap()
}

#[test]
fn hemispheres_are_as_likely_as_wendel_says() {
    assert_eq!(wendel(5, 5), 1.0);
    assert!((wendel(3, 2) - 0.75).abs() < 1e-12);
    assert!((wendel(4, 2) - 0.5).abs() < 1e-12);
    for (count, dimension) in [(6, 3), (8, 4), (4, 2)] {
        let mut rng = generator(9);
        let trials = 1500;
        let inside = (0..trials)
            .filter(|_| {
                let particles = Particles::random(count, dimension, &mut rng).unwrap();
                particles.in_open_hemisphere(100_000) == Some(true)
            })
            .count();
        let (found, expected) = (inside as f64 / f64::from(trials), wendel(count, dimension));
        // Four standard deviations of the mean.
        let error = 4.0 * (expected * (1.0 - expected) / f64::from(trials)).sqrt();
        assert!((found - expected).abs() < error, "{found} {expected}");
    }
    let square = Particles::new(2, vec![1., 0., 0., 1., -1., 0., 0., -1.]).unwrap();
    assert_eq!(square.in_open_hemisphere(1000), Some(false));
}

#[test]
fn statistics_by_hand() {
    let particles = Particles::new(2, vec![1., 0., 2., 0., 0., 1., 0., -3.]).unwrap();
    assert_eq!(particles.clusters(0.5), 3);
    assert!((particles.close_pairs(0.5) - 1.0 / 6.0).abs() < 1e-12);
    assert_eq!(particles.rank(1e-9).unwrap(), 2);
    assert!((particles.effective_rank().unwrap() - 2.0).abs() < 1e-9);
    // Products 1, 0 four times, −1.
    assert!(particles.mean_cosine().abs() < 1e-12);
    assert_eq!(particles.histogram(3), [1, 4, 1]);
    // A chain is one component though its ends are apart.
    let chain = (0..5).flat_map(|i| [(0.3 * f64::from(i)).cos(), (0.3 * f64::from(i)).sin()]);
    assert_eq!(
        Particles::new(2, chain.collect()).unwrap().clusters(0.95),
        1
    );
    assert!(Particles::new(2, vec![0.0, 0.0]).is_err());
    assert!(Particles::new(2, vec![1.0, 0.0, 1.0]).is_err());
    assert!(Particles::random(usize::MAX, 3, &mut generator(0)).is_err());
}

#[test]
fn an_ensemble_is_its_systems_and_its_seed() {
    let ensemble = Ensemble {
        count: 8,
        dimension: 3,
        systems: 5,
        time: 6.0,
        ..Ensemble::default()
    };
    let dynamics = |beta| Dynamics::new(Flow::SelfAttention, beta);
    let courses = ensemble.phases(dynamics, &[0.0, 2.0]).unwrap();
    assert_eq!(courses, ensemble.phases(dynamics, &[0.0, 2.0]).unwrap());
    assert_eq!(courses[0].times.len(), 61);
    let times: Vec<f64> = courses.iter().filter_map(|c| c.reaches(0.5)).collect();
    assert!(!times.is_empty());
    let alone = ensemble.course(&dynamics(0.0).unwrap(), 3).unwrap();
    let by_hand = dynamics(0.0)
        .unwrap()
        .run(ensemble.start(3).unwrap(), 0.1, 60, Scheme::Euler)
        .unwrap();
    assert_eq!(alone.clusters, by_hand.clusters(0.999));
    let other = Ensemble {
        seed: 1,
        ..ensemble
    };
    assert_ne!(courses[1], other.run(&dynamics(2.0).unwrap()).unwrap());
    for wrong in [
        Ensemble {
            step: 0.0,
            ..ensemble
        },
        Ensemble {
            time: f64::NAN,
            ..ensemble
        },
        Ensemble {
            systems: 0,
            ..ensemble
        },
        Ensemble {
            time: 1e300,
            ..ensemble
        },
    ] {
        assert!(wrong.run(&dynamics(1.0).unwrap()).is_err());
    }
    // The unnormalised flow takes shorter steps where it is fast.
    let fast = Dynamics::new(Flow::Unnormalised, 4.0).unwrap();
    assert!(fast.careful_step(0.1) < 0.1 / 60.0);
}

#[test]
fn drawn_matrices_are_what_they_say() {
    let particles = random(6, 4, 12);
    let of = |kind| {
        Dynamics::new(Flow::SelfAttention, 1.0)
            .unwrap()
            .with_drawn(kind, 4, &mut generator(1))
            .unwrap()
    };
    let velocity = |kind| of(kind).velocity(&particles).unwrap();
    let plain = Dynamics::new(Flow::SelfAttention, 1.0)
        .unwrap()
        .velocity(&particles)
        .unwrap();
    assert_eq!(velocity(Matrices::Identity), plain);
    let opposite: Vec<f64> = plain.iter().map(|v| -v).collect();
    assert!(largest_difference(&velocity(Matrices::Repulsive), &opposite) < 1e-12);
    assert!(largest_difference(&velocity(Matrices::Gaussian), &plain) > 1e-2);
    // Symmetric ones climb.
    let dynamics = of(Matrices::Symmetric);
    let next = dynamics.step(&particles, 0.01, Scheme::RungeKutta).unwrap();
    assert!(dynamics.energy(&next).unwrap() > dynamics.energy(&particles).unwrap());
    let plain = Dynamics::new(Flow::SelfAttention, 1.0).unwrap();
    assert!(
        plain
            .clone()
            .with_drawn(Matrices::Gaussian, 0, &mut generator(1))
            .is_err()
    );
    let wrong = plain
        .with_drawn(Matrices::Gaussian, 5, &mut generator(1))
        .unwrap();
    assert!(wrong.velocity(&particles).is_err());
}

#[derive(Deserialize)]
struct Golden {
    dimension: usize,
    beta: f64,
    points: Vec<f64>,
    query: Vec<f64>,
    key: Vec<f64>,
    value: Vec<f64>,
    self_attention: Vec<f64>,
    unnormalised: Vec<f64>,
    after_euler: Vec<f64>,
    energy: f64,
    log_normalisers: Vec<f64>,
    effective_rank: f64,
    mean_cosine: f64,
    free_time: f64,
    free: Vec<f64>,
}

#[test]
fn the_oracle_agrees() {
    let golden: Golden = serde_json::from_str(include_str!("../fixtures/clustering.json")).unwrap();
    let d = golden.dimension;
    let matrix = |values: &[f64]| Matrix::from_fn(values.len() / d, d, |i, j| values[i * d + j]);
    let [query, key, value] = [&golden.query, &golden.key, &golden.value].map(|v| matrix(v));
    let particles = Particles::new(d, golden.points.clone()).unwrap();
    for (flow, expected) in [
        (Flow::SelfAttention, &golden.self_attention),
        (Flow::Unnormalised, &golden.unnormalised),
    ] {
        let dynamics = Dynamics::new(flow, golden.beta)
            .unwrap()
            .with_matrices(Some(query.transpose() * &key), Some(value.clone()))
            .unwrap();
        let found = dynamics.velocity(&particles).unwrap();
        assert!(largest_difference(&found, expected) < 1e-10);
    }
    let plain = Dynamics::new(Flow::SelfAttention, golden.beta).unwrap();
    assert!((plain.energy(&particles).unwrap() - golden.energy).abs() < 1e-12);
    let normalisers = plain.log_normalisers(&particles).unwrap();
    assert!(largest_difference(&normalisers, &golden.log_normalisers) < 1e-12);
    let end = plain
        .run(particles.clone(), 0.1, 40, Scheme::Euler)
        .unwrap();
    assert!(largest_difference(end.points(), &golden.after_euler) < 1e-10);
    assert!((particles.effective_rank().unwrap() - golden.effective_rank).abs() < 1e-9);
    assert!((particles.mean_cosine() - golden.mean_cosine).abs() < 1e-12);

    let free = FreeDynamics::new(query, key, value).unwrap();
    let (z, weights) = free
        .rescaled(&matrix(&golden.points), golden.free_time / 300.0, 300)
        .unwrap();
    for (i, row) in golden.free.chunks(d).enumerate() {
        for (j, expected) in row.iter().enumerate() {
            assert!(
                (z[(i, j)] - expected).abs() < 1e-7,
                "{} {expected}",
                z[(i, j)]
            );
        }
        assert!((weights.row(i).iter().sum::<f64>() - 1.0).abs() < 1e-12);
    }
}
