//! The exact properties of energies around stored patterns.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use crate::common;
use crate::common::{DECODER, ENCODER, generator, model};
use lapidary_explain::analyses::energy::{
    Patterns, descent, log_gamma, log_lower_gamma, log_partition, log_sphere_area, loss,
    loss_bound, memorised, nearest, radii, report, unit_ball_radius,
};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Input, Pass};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;

fn point(dimension: usize, scale: f64, rng: &mut ChaCha8Rng) -> Vec<f64> {
    (0..dimension)
        .map(|_| scale * (2.0 * rng.random::<f64>() - 1.0))
        .collect()
}

fn patterns(count: usize, dimension: usize, scale: f64, rng: &mut ChaCha8Rng) -> Patterns {
    Patterns::new(
        dimension,
        (0..count)
            .flat_map(|_| point(dimension, scale, rng))
            .collect(),
    )
    .unwrap()
}

fn norm(x: &[f64]) -> f64 {
    x.iter().map(|x| x * x).sum::<f64>().sqrt()
}

#[test]
fn the_energy_is_a_soft_minimum_of_distances() {
    let mut rng = generator(1);
    for count in [1, 3, 50] {
        let patterns = patterns(count, 5, 2.0, &mut rng);
        for _ in 0..50 {
            let x = point(5, 3.0, &mut rng);
            let least = patterns
                .distances(&x)
                .unwrap()
                .into_iter()
                .fold(f64::INFINITY, f64::min);
            let energy = patterns.energy(&x).unwrap();
            assert!(energy <= least + 1e-12);
            assert!(energy >= least - (count as f64).ln() - 1e-12);
            if count == 1 {
                assert!((energy - least).abs() < 1e-12);
            }
            let gradient = patterns.gradient(&x).unwrap();
            for axis in 0..5 {
                let ahead = |step: f64| {
                    let mut moved = x.clone();
                    moved[axis] += step;
                    patterns.energy(&moved).unwrap()
                };
                let found = (ahead(1e-5) - ahead(-1e-5)) / 2e-5;
                assert!((found - gradient[axis]).abs() < 1e-7);
            }
        }
    }
}

#[test]
fn steps_never_raise_their_energies_and_the_majoriser_lies_above() {
    let mut rng = generator(2);
    let patterns = patterns(12, 4, 2.0, &mut rng);
    for _ in 0..1000 {
        let (x, other) = (point(4, 3.0, &mut rng), point(4, 3.0, &mut rng));
        let energy = patterns.energy(&x).unwrap();
        let next = patterns.descend(&x).unwrap();
        assert!(patterns.energy(&next).unwrap() <= energy + 1e-12);
        assert!(
            patterns.majoriser(&other, &x).unwrap() >= patterns.energy(&other).unwrap() - 1e-12
        );
        assert!((patterns.majoriser(&x, &x).unwrap() - energy).abs() < 1e-12);
        // The step goes down the majoriser, not the energy by chance.
        assert!(patterns.majoriser(&next, &x).unwrap() <= energy + 1e-12);
        for beta in [0.3, 2.0] {
            let before = patterns.hopfield_energy(&x, beta).unwrap();
            let next = patterns.hopfield_step(&x, beta).unwrap();
            assert!(patterns.hopfield_energy(&next, beta).unwrap() <= before + 1e-10);
            let before = patterns.squared_energy(&x, beta).unwrap();
            let next = patterns.squared_step(&x, beta).unwrap();
            assert!(patterns.squared_energy(&next, beta).unwrap() <= before + 1e-10);
        }
    }
    // On a pattern there is nothing to step to.
    let first = patterns.iter().next().unwrap().to_vec();
    assert_eq!(patterns.descend(&first).unwrap(), first);
}

#[test]
fn for_patterns_of_one_length_distances_and_products_agree() {
    let mut rng = generator(3);
    let values = (0..20).flat_map(|_| {
        let x = point(6, 1.0, &mut rng);
        let length = norm(&x);
        x.into_iter().map(move |x| 2.5 * x / length)
    });
    let patterns = Patterns::new(6, values.collect()).unwrap();
    for beta in [0.2, 1.0, 7.0] {
        let x = point(6, 4.0, &mut rng);
        let expected = patterns.hopfield_energy(&x, beta).unwrap() - 20f64.ln() / beta;
        let found = patterns.squared_energy(&x, beta).unwrap();
        assert!((found - expected).abs() < 1e-10, "{found} {expected}");
        let (a, b) = (
            patterns.hopfield_step(&x, beta).unwrap(),
            patterns.squared_step(&x, beta).unwrap(),
        );
        assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-10));
    }
}

#[test]
fn patterns_far_apart_are_retrieved_in_one_step() {
    let mut rng = generator(4);
    let patterns = patterns(10, 8, 200.0, &mut rng);
    for pattern in patterns.iter() {
        let near: Vec<f64> = pattern
            .iter()
            .map(|x| x + rng.random::<f64>() - 0.5)
            .collect();
        for found in [
            patterns.descend(&near).unwrap(),
            patterns.squared_step(&near, 1.0).unwrap(),
        ] {
            let error: Vec<f64> = found.iter().zip(pattern).map(|(a, b)| a - b).collect();
            assert!(norm(&error) < 1e-6, "{}", norm(&error));
        }
    }
}

#[test]
fn gamma_functions() {
    // Γ(5) = 24, Γ(1/2) = √π, Γ(0.1).
    for (x, expected) in [
        (5.0, 24f64.ln()),
        (0.5, std::f64::consts::PI.sqrt().ln()),
        (0.1, 9.513_507_698_668_732_f64.ln()),
    ] {
        assert!((log_gamma(x) - expected).abs() < 1e-12);
    }
    // γ(1, x) = 1 − e^{−x}, on both sides of where the method changes.
    for x in [1e-3f64, 0.5, 1.9, 2.1, 30.0] {
        let expected = (-(-x).exp_m1()).ln();
        assert!(
            (log_lower_gamma(1.0, x).unwrap() - expected).abs() < 1e-12,
            "{x}"
        );
    }
    // γ(s + 1, x) = s γ(s, x) − x^s e^{−x}, at the dimension of a large model.
    for (s, x) in [(1024f64, 900f64), (1024.0, 1024.5), (1024.0, 1200.0)] {
        let [next, own] = [s + 1.0, s].map(|s| log_lower_gamma(s, x).unwrap());
        let lost = s * f64::ln(x) - x;
        let expected = s.ln() + own + (-(lost - own - s.ln()).exp()).ln_1p();
        assert!((next - expected).abs() < 1e-9, "{next} {expected}");
    }
    assert!((log_sphere_area(3) - (4.0 * std::f64::consts::PI).ln()).abs() < 1e-12);
    let (exact, limit) = unit_ball_radius(3);
    assert!((4.0 / 3.0 * std::f64::consts::PI * exact.powi(3) - 1.0).abs() < 1e-12);
    assert!(exact > limit);
    assert!((unit_ball_radius(1024).1 - 7.743).abs() < 1e-3);
    assert!(log_lower_gamma(0.0, 1.0).is_err());
}

#[test]
fn the_mass_of_disjoint_balls_is_what_sampling_gives() {
    let mut rng = generator(5);
    for (dimension, radius) in [(2, 2.0), (3, 3.0)] {
        // So far apart that no pattern counts in another's ball.
        let values = (0..4).flat_map(|i| {
            let mut centre = vec![0.0; dimension];
            centre[0] = 40.0 * f64::from(i);
            centre
        });
        let patterns = Patterns::new(dimension, values.collect()).unwrap();
        let samples = 40_000;
        let mut sum = 0.0;
        for _ in 0..samples {
            let x = point(dimension, radius, &mut rng);
            if norm(&x) <= radius {
                let centre = patterns.iter().nth(2).unwrap();
                let x: Vec<f64> = x.iter().zip(centre).map(|(x, c)| x + c).collect();
                sum += (-patterns.energy(&x).unwrap()).exp();
            }
        }
        let found = 4.0 * sum / f64::from(samples) * (2.0 * radius).powi(dimension as i32);
        let expected = log_partition(4, dimension, radius).unwrap().exp();
        assert!((found / expected - 1.0).abs() < 0.02, "{found} {expected}");
    }
    let large = log_partition(1_000_000, 1024, 10.0).unwrap();
    let larger = log_partition(1_000_000, 1024, 11.0).unwrap();
    assert!(large.is_finite() && larger > large);
    let doubled = log_partition(2_000_000, 1024, 10.0).unwrap();
    assert!((doubled - large - 2f64.ln()).abs() < 1e-9);
    assert!(log_partition(0, 3, 1.0).is_err());
}

#[test]
fn the_loss_is_least_where_the_mass_is_one() {
    assert_eq!(loss_bound(0.0), 1.0);
    for step in -40..=40 {
        assert!(loss_bound(f64::from(step) * 0.1) >= 1.0);
    }
    assert!(loss_bound(1.0) > 1.3 && loss_bound(-1.0) > 1.7);
}

#[test]
fn neighbours_are_those_of_a_full_search() {
    let mut rng = generator(6);
    // More than one block of the stored and of the asked.
    let (stored, asked, width) = (3000, 300, 7);
    let tensor = |rows: usize, rng: &mut ChaCha8Rng| {
        let values: Vec<f64> = (0..rows).flat_map(|_| point(width, 1.0, rng)).collect();
        Tensor::from_vec(values, (rows, width), &Device::Cpu).unwrap()
    };
    let (stored, asked) = (tensor(stored, &mut rng), tensor(asked, &mut rng));
    let found = nearest(&stored, &asked, 5).unwrap();
    assert_eq!(found.len(), 300);
    let rows = stored.to_vec2::<f64>().unwrap();
    for (x, found) in asked.to_vec2::<f64>().unwrap().iter().zip(&found) {
        let mut all: Vec<(f64, usize)> = rows
            .iter()
            .enumerate()
            .map(|(index, row)| {
                let difference: Vec<f64> = row.iter().zip(x).map(|(a, b)| a - b).collect();
                (norm(&difference), index)
            })
            .collect();
        all.sort_by(|a, b| a.0.total_cmp(&b.0));
        for (neighbour, (distance, index)) in found.iter().zip(&all) {
            assert_eq!(neighbour.index, *index);
            assert!((neighbour.distance - distance).abs() < 1e-12);
        }
    }
    assert!(nearest(&stored, &asked, 0).is_err());
    assert!(nearest(&asked, &stored, 301).is_err());
}

fn windows(count: usize, length: usize, seed: u64) -> Vec<Vec<u32>> {
    let mut rng = generator(seed);
    (0..count)
        .map(|_| (0..length).map(|_| rng.random_range(0..20)).collect())
        .collect()
}

#[test]
fn a_model_against_its_data() {
    let model = model(DECODER, 3);
    let (training, held_out) = (windows(12, 9, 1), windows(5, 9, 2));
    let found = radii(&model, &training, &held_out, &mut generator(1)).unwrap();
    assert_eq!(found.held_out.len(), 45);
    assert!(found.held_out.windows(2).all(|two| two[0] <= two[1]));
    // Training states are among themselves.
    let own = radii(&model, &training, &training, &mut generator(1)).unwrap();
    assert!(own.held_out.iter().all(|distance| *distance < 1e-9));
    assert!(own.dealt.iter().sum::<f64>() > 1.0);

    let blocks = descent(&model, &training, &held_out, 1).unwrap();
    assert_eq!(blocks.len(), 2);
    let same = descent(&model, &training, &training, 1).unwrap();
    // What comes out lies on a pattern, what goes in does not.
    assert!(
        same.iter()
            .all(|block| block.descends == 1.0 && block.after < block.before)
    );

    // The loss by hand, on one window.
    let one = &training[..1];
    let ids = Tensor::from_slice(&one[0][..8], (1, 8), &Device::Cpu).unwrap();
    let logits = model.forward(&Input::tokens(ids), Pass::default()).unwrap();
    let logits = logits.into_logits().unwrap().into_value().get(0).unwrap();
    let logits = logits
        .to_dtype(DType::F64)
        .unwrap()
        .to_vec2::<f64>()
        .unwrap();
    let by_hand: f64 = logits
        .iter()
        .zip(&one[0][1..])
        .map(|(row, token)| {
            let sum: f64 = row.iter().map(|x| x.exp()).sum();
            sum.ln() - row[*token as usize]
        })
        .sum();
    assert!((loss(&model, one).unwrap() - by_hand / 8.0).abs() < 1e-9);

    // A window that ends as the model goes on is known by heart.
    let mut known = training[0][..4].to_vec();
    while known.len() < 9 {
        let ids = Tensor::from_slice(&known, (1, known.len()), &Device::Cpu).unwrap();
        let pass = Pass {
            only_last: true,
            ..Pass::default()
        };
        let logits = model
            .forward(&Input::tokens(ids), pass)
            .unwrap()
            .into_logits()
            .unwrap();
        let best = logits
            .into_value()
            .flatten_all()
            .unwrap()
            .argmax(0)
            .unwrap();
        known.push(best.to_scalar::<u32>().unwrap());
    }
    let mut unknown = known.clone();
    unknown[6] = (unknown[6] + 1) % 20;
    assert_eq!(memorised(&model, &[known.clone()], 5).unwrap(), 1.0);
    assert_eq!(memorised(&model, &[known, unknown], 5).unwrap(), 0.5);

    let report = report(&model, &training, &held_out, &mut generator(1)).unwrap();
    assert_eq!(report.tables.len(), 3);
    assert_eq!(report.tables[1].rows.len(), 2);

    let encoder = common::model(ENCODER, 1);
    assert!(loss(&encoder, &training).is_err());
    assert!(loss(&model, &[vec![1]]).is_err());
    assert!(loss(&model, &[vec![1, 2], vec![1, 2, 3]]).is_err());
    assert!(memorised(&model, &training, 9).is_err());
}

#[derive(Deserialize)]
struct Golden {
    dimension: usize,
    patterns: Vec<f64>,
    x: Vec<f64>,
    beta: f64,
    energy: f64,
    gradient: Vec<f64>,
    descended: Vec<f64>,
    hopfield_energy: f64,
    hopfield_step: Vec<f64>,
    stored: Vec<f64>,
    asked: Vec<f64>,
    nearest: Vec<Vec<usize>>,
    gamma: Vec<[f64; 3]>,
}

#[test]
fn the_oracle_agrees() {
    let golden: Golden = serde_json::from_str(include_str!("../fixtures/energy.json")).unwrap();
    let patterns = Patterns::new(golden.dimension, golden.patterns).unwrap();
    let (x, beta) = (&golden.x, golden.beta);
    let close = |found: &[f64], expected: &[f64], tolerance: f64| {
        assert_eq!(found.len(), expected.len());
        assert!(
            found
                .iter()
                .zip(expected)
                .all(|(a, b)| (a - b).abs() < tolerance),
            "{found:?} {expected:?}"
        );
    };
    close(&[patterns.energy(x).unwrap()], &[golden.energy], 1e-12);
    close(&patterns.gradient(x).unwrap(), &golden.gradient, 1e-8);
    close(&patterns.descend(x).unwrap(), &golden.descended, 1e-12);
    close(
        &[patterns.hopfield_energy(x, beta).unwrap()],
        &[golden.hopfield_energy],
        1e-12,
    );
    close(
        &patterns.hopfield_step(x, beta).unwrap(),
        &golden.hopfield_step,
        1e-12,
    );
    let rows =
        |values: &[f64]| Tensor::from_slice(values, (values.len() / 5, 5), &Device::Cpu).unwrap();
    let found = nearest(&rows(&golden.stored), &rows(&golden.asked), 3).unwrap();
    let found: Vec<Vec<usize>> = found
        .iter()
        .map(|n| n.iter().map(|n| n.index).collect())
        .collect();
    assert_eq!(found, golden.nearest);
    for [s, x, expected] in golden.gamma {
        let found = log_lower_gamma(s, x).unwrap();
        assert!(
            (found - expected).abs() < 1e-6 * expected.abs().max(1.0),
            "{s} {x}: {found} {expected}"
        );
    }
}
