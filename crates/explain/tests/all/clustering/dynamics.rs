//! Flows of particles by their equations.

use std::collections::BTreeMap;

use super::{FLOWS, largest_difference, random, rotated, rotation};
use crate::common::tokens;
use lapidary_explain::analyses::clustering::{
    Dynamics, Flow, FreeDynamics, Particles, Scheme, angle_of_two, circle_velocity, equal_angle,
    line, merging_time,
};
use lapidary_factor::Matrix;
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Model, ModelSpec, Pass};
use lapidary_signal::Trace;
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn particles_stay_on_the_sphere_and_energy_rises(
        seed in 0u64..1000, count in 2usize..9, dimension in 2usize..6, beta in 0.0f64..4.0,
    ) {
        for flow in FLOWS {
            let dynamics = Dynamics::new(flow, beta).unwrap();
            let mut particles = random(count, dimension, seed);
            let mut energy = dynamics.energy(&particles).unwrap();
            let step = dynamics.careful_step(0.05);
            for _ in 0..20 {
                particles = dynamics.step(&particles, step, Scheme::RungeKutta).unwrap();
                for x in particles.iter() {
                    let square: f64 = x.iter().map(|x| x * x).sum();
                    prop_assert!((square - 1.0).abs() < 1e-12);
                }
                let next = dynamics.energy(&particles).unwrap();
                prop_assert!(next >= energy - 1e-10 * energy.abs(), "{energy} {next}");
                energy = next;
            }
        }
    }

    #[test]
    fn rotations_and_permutations_pass_through(
        seed in 0u64..1000, beta in 0.0f64..5.0,
    ) {
        let by = rotation(4, seed + 1);
        for flow in FLOWS {
            let dynamics = Dynamics::new(flow, beta).unwrap();
            let particles = random(7, 4, seed);
            let run = |start: Particles| dynamics.run(start, 0.02, 20, Scheme::Euler).unwrap();
            let expected = rotated(&run(particles.clone()), &by);
            let found = run(rotated(&particles, &by));
            prop_assert!(largest_difference(found.points(), expected.points()) < 1e-10);
            let reversed = |p: &Particles| {
                let rows: Vec<Vec<f64>> = p.iter().map(<[f64]>::to_vec).collect();
                Particles::new(4, rows.into_iter().rev().flatten().collect()).unwrap()
            };
            let expected = reversed(&run(particles.clone()));
            let found = run(reversed(&particles));
            prop_assert!(largest_difference(found.points(), expected.points()) < 1e-10);
        }
    }
}

#[test]
fn energy_changes_as_the_formula_says() {
    let symmetric = {
        let noise = random(4, 4, 8);
        Matrix::from_fn(4, 4, |i, j| {
            noise.points()[4 * i + j] + noise.points()[4 * j + i]
        })
    };
    let minus = Matrix::from_fn(4, 4, |i, j| -symmetric[(i, j)]);
    for flow in FLOWS {
        let plain = Dynamics::new(flow, 1.5).unwrap();
        let aligned = plain
            .clone()
            .with_matrices(Some(symmetric.clone()), Some(symmetric.clone()));
        for dynamics in [plain.clone(), aligned.unwrap()] {
            let particles = random(6, 4, 3);
            let rate = dynamics.energy_rate(&particles).unwrap();
            let ahead = |step| {
                let moved = dynamics.step(&particles, step, Scheme::RungeKutta).unwrap();
                dynamics.energy(&moved).unwrap()
            };
            let found = (ahead(1e-4) - ahead(-1e-4)) / 2e-4;
            assert!(
                rate > 0.0 && (found - rate).abs() < 1e-6 * rate,
                "{found} {rate}"
            );
        }
        // Values of the other sign repel: the energy falls.
        let repelled = plain
            .with_matrices(Some(symmetric.clone()), Some(minus.clone()))
            .unwrap();
        let mut particles = random(6, 4, 4);
        for _ in 0..50 {
            let before = repelled.energy(&particles).unwrap();
            particles = repelled.step(&particles, 0.02, Scheme::RungeKutta).unwrap();
            assert!(repelled.energy(&particles).unwrap() < before);
        }
    }
}

#[test]
fn equal_angles_stay_equal_and_follow_the_scalar_equation() {
    for flow in FLOWS {
        for (count, dimension, beta) in [(4, 4, 1.0), (5, 9, 3.0), (3, 3, 0.0)] {
            let dynamics = Dynamics::new(flow, beta).unwrap();
            let start = Particles::orthonormal(count, dimension).unwrap();
            let (steps, step) = (400, 0.002);
            let end = dynamics
                .run(start, step, steps, Scheme::RungeKutta)
                .unwrap();
            let expected = equal_angle(flow, beta, count, 0.0, step * steps as f64);
            assert!(expected > 0.05, "{expected}");
            for (i, row) in end.gram().iter().enumerate() {
                for (j, product) in row.iter().enumerate().filter(|(j, _)| *j != i) {
                    let first = end.gram()[0][1];
                    assert!((product - first).abs() < 1e-10, "{i} {j}");
                    assert!((product - expected).abs() < 1e-6, "{product} {expected}");
                }
            }
            let time = merging_time(flow, beta, count, [0.0, 0.999], 1e4)
                .unwrap()
                .unwrap();
            let there = equal_angle(flow, beta, count, 0.0, time);
            assert!((there - 0.999).abs() < 1e-6, "{there}");
        }
    }
    assert_eq!(
        merging_time(Flow::SelfAttention, 9.0, 32, [0.0, 0.999], 30.0).unwrap(),
        None
    );
    assert!(merging_time(Flow::SelfAttention, 1.0, 32, [0.5, 0.4], 30.0).is_err());
}

#[test]
fn two_particles_merge_unless_they_are_opposite() {
    let opposite = Particles::new(2, vec![0.6, 0.8, -0.6, -0.8]).unwrap();
    for flow in FLOWS {
        for beta in [0.0, 2.0] {
            let dynamics = Dynamics::new(flow, beta).unwrap();
            let still = dynamics.velocity(&opposite).unwrap();
            assert!(still.iter().all(|v| v.abs() < 1e-12));
            let near = Particles::new(2, vec![0.6, 0.8, -0.6, -0.801]).unwrap();
            let end = dynamics.run(near, 0.1, 4000, Scheme::RungeKutta).unwrap();
            assert!(end.gram()[0][1] > 0.999);
        }
        // At beta 0 the angle is known.
        let dynamics = Dynamics::new(flow, 0.0).unwrap();
        let start = 2.5f64;
        let two = Particles::new(2, vec![1.0, 0.0, start.cos(), start.sin()]).unwrap();
        let end = dynamics.run(two, 0.01, 150, Scheme::RungeKutta).unwrap();
        let expected = angle_of_two(start, 1.5);
        assert!((end.gram()[0][1].acos() - expected).abs() < 1e-8);
    }
}

#[test]
fn without_temperature_every_particle_moves_towards_the_mean() {
    let particles = random(6, 3, 5);
    let mut mean = [0.0; 3];
    for x in particles.iter() {
        mean.iter_mut().zip(x).for_each(|(m, x)| *m += x / 6.0);
    }
    let expected: Vec<f64> = particles
        .iter()
        .flat_map(|x| {
            let along: f64 = x.iter().zip(&mean).map(|(x, m)| x * m).sum();
            x.iter()
                .zip(mean)
                .map(|(x, m)| m - along * x)
                .collect::<Vec<_>>()
        })
        .collect();
    for flow in FLOWS {
        let found = Dynamics::new(flow, 0.0)
            .unwrap()
            .velocity(&particles)
            .unwrap();
        assert!(largest_difference(&found, &expected) < 1e-12);
    }
    // Particles in one place stay in one place.
    let dynamics = Dynamics::new(Flow::SelfAttention, 3.0).unwrap();
    let rows: Vec<Vec<f64>> = particles.iter().map(<[f64]>::to_vec).collect();
    let doubled = Particles::new(3, rows.iter().chain(&rows).flatten().copied().collect()).unwrap();
    let end = dynamics.run(doubled, 0.1, 30, Scheme::Euler).unwrap();
    assert!(largest_difference(&end.points()[..18], &end.points()[18..]) < 1e-12);
}

#[test]
fn on_the_circle_the_unnormalised_flow_couples_oscillators() {
    let angles = [0.3, 1.9, 2.2, -2.0, -0.4];
    let points = angles
        .iter()
        .flat_map(|a: &f64| [a.cos(), a.sin()])
        .collect();
    let particles = Particles::new(2, points).unwrap();
    for beta in [0.0, 1.0, 4.0] {
        let velocity = Dynamics::new(Flow::Unnormalised, beta)
            .unwrap()
            .velocity(&particles)
            .unwrap();
        let turning = circle_velocity(beta, &angles);
        for ((v, angle), turn) in velocity.chunks(2).zip(angles).zip(turning) {
            let along = -angle.sin() * v[0] + angle.cos() * v[1];
            assert!((along - turn).abs() < 1e-12 * (4.0 * beta).exp());
        }
    }
}

#[test]
fn schemes_converge_at_their_order() {
    let dynamics = Dynamics::new(Flow::SelfAttention, 2.0).unwrap();
    let start = random(6, 3, 6);
    let truth = dynamics
        .run(start.clone(), 1.0 / 512.0, 512, Scheme::RungeKutta)
        .unwrap();
    let error = |scheme, steps: usize| {
        let end = dynamics
            .run(start.clone(), 1.0 / steps as f64, steps, scheme)
            .unwrap();
        largest_difference(end.points(), truth.points())
    };
    for (scheme, order) in [
        (Scheme::Euler, 1.0),
        (Scheme::Block, 1.0),
        (Scheme::RungeKutta, 4.0),
    ] {
        let found = (error(scheme, 16) / error(scheme, 32)).log2();
        assert!((found - order).abs() < 0.3, "{scheme:?}: {found}");
    }
}

/// A block of the library with one head, `Q = K = V = 1`, a step folded into its output matrix, and
/// an RMS norm after the residual, moves tokens of length `√d` as the scheme moves particles.
#[test]
fn a_block_of_the_library_is_a_step_of_the_scheme() {
    let (dimension, blocks, beta) = (6, 5, 1.7);
    let scale = beta / dimension as f64;
    let spec: ModelSpec = toml::from_str(&format!(
        r#"
        width = {dimension}
        [input]
        kind = "tokens"
        vocabulary = 9
        length = 9
        [[blocks]]
        repeat = {blocks}
        wiring = "post-norm"
        norm = {{ kind = "rms", epsilon = 0.0 }}
        attention = {{ kind = "multi-head", heads = 1, bias = false, scale = {scale} }}
        "#
    ))
    .unwrap();
    let identity = Tensor::eye(dimension, DType::F64, &Device::Cpu).unwrap();
    let particles = random(9, dimension, 7);
    let table = Tensor::from_slice(particles.points(), (9, dimension), &Device::Cpu).unwrap();
    let table = (table * (dimension as f64).sqrt()).unwrap();
    let mut parameters = BTreeMap::from([("embeddings.tokens.weight".to_owned(), table)]);
    for block in 0..blocks {
        let at = |name: &str| format!("blocks.{block}.{name}");
        for name in ["query", "key", "value"] {
            parameters.insert(at(&format!("attention.{name}.weight")), identity.clone());
        }
        let step = (&identity / blocks as f64).unwrap();
        parameters.insert(at("attention.output.weight"), step);
        let ones = Tensor::ones(dimension, DType::F64, &Device::Cpu).unwrap();
        parameters.insert(at("attention_norm.weight"), ones);
    }
    let model = Model::new(spec, &mut parameters).unwrap();
    let input = tokens(&[0, 1, 2, 3, 4, 5, 6, 7, 8]);
    let trace = Trace::new().capture("blocks.*.out").unwrap();
    let pass = Pass {
        trace: Some(&trace),
        ..Pass::default()
    };
    model.forward(&input, pass).unwrap();
    let dynamics = Dynamics::new(Flow::SelfAttention, beta).unwrap();
    let mut expected = particles;
    for block in 0..blocks {
        expected = dynamics
            .step(&expected, 1.0 / blocks as f64, Scheme::Block)
            .unwrap();
        let found = trace
            .signal(&format!("blocks.{block}.out"))
            .unwrap()
            .into_value();
        let found = (found / (dimension as f64).sqrt()).unwrap();
        let found = found.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        assert!(largest_difference(&found, expected.points()) < 1e-12);
    }
}

#[test]
fn in_a_hemisphere_particles_gather_exponentially() {
    // Fewer points than dimensions: always in a hemisphere.
    let start = random(5, 8, 10);
    for flow in FLOWS {
        let dynamics = Dynamics::new(flow, 1.0).unwrap();
        let mut particles = start.clone();
        let mut spread = Vec::new();
        for index in 0..160 {
            particles = dynamics.step(&particles, 0.1, Scheme::RungeKutta).unwrap();
            let lowest = particles.gram().into_iter().flatten().fold(1.0, f64::min);
            if (1e-11..1e-2).contains(&(1.0 - lowest)) {
                spread.push((f64::from(index) * 0.1, (1.0 - lowest).ln()));
            }
        }
        let (slope, explained) = line(&spread).unwrap();
        assert!(slope < -0.5 && explained > 0.99, "{slope} {explained}");
        assert_eq!(particles.clusters(0.999), 1);
        assert_eq!(particles.rank(1e-3).unwrap(), 1);
    }
}

/// On the line, tokens without a norm end up looking at the outermost ones alone.
#[test]
fn on_the_line_attention_becomes_boolean_of_low_rank() {
    let one = || Matrix::identity(1, 1);
    let free = FreeDynamics::new(one(), one(), one()).unwrap();
    let points = [-1.1, -0.4, 0.3, 0.8, 1.3];
    let start = Matrix::from_fn(5, 1, |i, _| points[i]);
    let (_, weights) = free.rescaled(&start, 0.01, 400).unwrap();
    for (row, point) in points.iter().enumerate() {
        let leader = if *point > 0.0 { 4 } else { 0 };
        assert!(weights[(row, leader)] > 0.999, "{row}");
    }
    assert!(free.rescaled(&Matrix::identity(2, 2), 0.1, 1).is_err());
}
