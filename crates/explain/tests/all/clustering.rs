//! The exact properties of particles under attention.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use crate::common::{DECODER, model, tokens};
use lapidary_explain::Question;
use lapidary_explain::analyses::clustering::{
    Dynamics, Ensemble, Film, Flow, FreeDynamics, Matrices, Particles, Scheme, angle_of_two,
    circle_velocity, deepened, equal_angle, iterated, layers, layers_without_skip, line,
    merging_time, report, shuffled, wendel,
};
use lapidary_factor::{Matrix, qr};
use lapidary_kernels::check::difference;
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Input, Model, ModelSpec, Pass};
use lapidary_signal::{Signal, Trace};
use proptest::prelude::*;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;
use std::collections::BTreeMap;

const FLOWS: [Flow; 2] = [Flow::SelfAttention, Flow::Unnormalised];

fn generator(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

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

const IDS: [u32; 7] = [3, 11, 5, 0, 19, 7, 3];

#[test]
fn layers_of_a_model_are_read_after_its_norms() {
    let model = model(DECODER, 2);
    let input = tokens(&IDS);
    let question = Question::new(&model, &input);
    let found = layers(&question).unwrap();
    let sites: Vec<&str> = found.iter().map(|layer| layer.site.as_str()).collect();
    assert_eq!(
        sites,
        [
            "blocks.0.attention.in",
            "blocks.1.attention.in",
            "final_norm"
        ]
    );
    for layer in &found {
        assert!(layer.mean_cosine > -1.0 && layer.mean_cosine < 1.0);
        assert!(layer.effective_rank >= 1.0 && layer.effective_rank <= 7.0);
        assert_eq!(layer.histogram.iter().sum::<usize>(), 21);
    }
    // Padding does not count.
    let padding = Tensor::new(&[[1u8, 1, 1, 1, 1, 0, 0]], &Device::Cpu).unwrap();
    let padded = Question {
        padding: Some(&padding),
        ..question
    };
    assert_eq!(
        layers(&padded).unwrap()[0].histogram.iter().sum::<usize>(),
        10
    );

    let other = shuffled(&input, &mut generator(3)).unwrap();
    let Input::Tokens { ids, .. } = &other else {
        unreachable!()
    };
    let mut ids = ids.to_vec2::<u32>().unwrap().remove(0);
    assert_ne!(ids, IDS);
    ids.sort_unstable();
    let mut sorted = IDS.to_vec();
    sorted.sort_unstable();
    assert_eq!(ids, sorted);

    let report = report(&question, &mut generator(3)).unwrap();
    assert_eq!(report.tables[0].rows.len(), 3);
    assert_eq!(report.plots[0].series.len(), 3);
}

#[test]
fn without_the_skip_a_block_passes_on_what_attention_writes() {
    let model = model(DECODER, 2);
    let input = tokens(&IDS);
    let question = Question::new(&model, &input);
    let found = layers_without_skip(&question).unwrap();
    let whole = layers(&question).unwrap();
    assert_eq!(found[0], whole[0]);
    assert_ne!(found[1].mean_cosine, whole[1].mean_cosine);
    // The same by another way: the input of the block is zero where the residual reads it, which
    // a zeroed input with the attention's own output put back gives.
    let trace = Trace::new().capture("blocks.0.attention.out").unwrap();
    let pass = |trace| Pass {
        trace: Some(trace),
        ..Pass::default()
    };
    model.forward(&input, pass(&trace)).unwrap();
    let written = trace.signal("blocks.0.attention.out").unwrap().into_value();
    let again = Trace::new()
        .replace("blocks.0.in", |_, x| {
            Ok(Signal::from(x.value().zeros_like().unwrap()))
        })
        .unwrap()
        .replace("blocks.0.attention.out", move |_, _| {
            Ok(Signal::from(written.clone()))
        })
        .unwrap()
        .capture("blocks.1.attention.in")
        .unwrap();
    model.forward(&input, pass(&again)).unwrap();
    let states = again.signal("blocks.1.attention.in").unwrap().into_value();
    let states =
        Particles::new(16, states.flatten_all().unwrap().to_vec1::<f64>().unwrap()).unwrap();
    assert!((states.mean_cosine() - found[1].mean_cosine).abs() < 1e-10);
}

#[test]
fn a_film_shows_where_particles_are_and_which_are_one() {
    let dynamics = Dynamics::new(Flow::SelfAttention, 1.0).unwrap();
    let ensemble = |dimension| Ensemble {
        count: 9,
        dimension,
        systems: 1,
        time: 25.0,
        step: 0.1,
        ..Ensemble::default()
    };
    // Two coordinates are shown as they are.
    let flat = Film::new(&dynamics, &ensemble(2)).unwrap();
    let start = ensemble(2).start(0).unwrap();
    for (seen, point) in flat.points[0].iter().zip(start.iter()) {
        assert_eq!(seen.as_slice(), point);
    }
    assert_eq!(flat.times.len(), 84);
    assert!((flat.times[1] - 0.3).abs() < 1e-12);
    for dimension in [1, 2, 3, 24] {
        let ensemble = ensemble(dimension);
        let film = Film::new(&dynamics, &ensemble).unwrap();
        // At the end of the film a system is where its course would bring it.
        let steps = 3 * (film.times.len() - 1);
        let start = ensemble.start(0).unwrap();
        let end = dynamics.run(start, 0.1, steps, Scheme::Euler).unwrap();
        let clusters = end.components(ensemble.threshold);
        assert_eq!(film.clusters.last().unwrap(), &clusters);
        let mut different = clusters.clone();
        different.sort_unstable();
        different.dedup();
        assert_eq!(different.len(), end.clusters(ensemble.threshold));
        // A projection keeps within the disc, and the one cluster of many dimensions is seen whole.
        for [x, y] in film.points.iter().flatten() {
            assert!(x * x + y * y < 1.0 + 1e-12);
        }
        if dimension > 2 {
            let [x, y] = film.points.last().unwrap()[0];
            assert!(x * x + y * y > 0.9, "{dimension}: {x} {y}");
        }
        let svg = film.to_svg();
        assert_eq!(svg.matches("attributeName=\"cx\"").count(), 9);
        assert_eq!(
            svg.matches("<circle").count(),
            svg.matches("</circle>").count() + 1
        );
        let before = film.clusters[0].iter().zip(&clusters);
        let recoloured = before.filter(|(a, b)| a != b).count();
        assert!(svg.matches("attributeName=\"fill\"").count() >= recoloured);
        assert!(!svg.contains("NaN") && !svg.contains("href") && !svg.contains("<script"));
        assert!(svg.len() < 1 << 18);
    }
    let crowd = Ensemble {
        count: 1 << 16,
        time: 0.2,
        ..ensemble(2)
    };
    assert!(Film::new(&dynamics, &Ensemble { step: 0.0, ..crowd }).is_err());
}

#[test]
fn shared_blocks_go_on_to_any_depth() {
    let spec = DECODER.replace("repeat = 2", "repeat = 2\nshared = true");
    let shared = model(&spec, 2);
    let input = tokens(&IDS);
    let hidden = |model: &Model| {
        let output = model.forward(&input, Pass::default()).unwrap();
        output.hidden.into_value()
    };
    let same = deepened(&shared, 2).unwrap();
    assert!(difference(&hidden(&same), &hidden(&shared)).unwrap() == 0.0);
    // Six blocks are three passes through two, and hold no more.
    let six = deepened(&shared, 6).unwrap();
    let passes = iterated(&shared.written_out().unwrap(), 3).unwrap();
    assert!(difference(&hidden(&six), &hidden(&passes)).unwrap() == 0.0);
    assert!(difference(&hidden(&six), &hidden(&shared)).unwrap() > 1e-3);
    assert_eq!(six.parameter_count(), shared.parameter_count());
    assert_eq!(deepened(&shared, 1).unwrap().spec().blocks[0].repeat, 1);
    for (model, depth) in [(&shared, 0), (&model(DECODER, 2), 4), (&shared, 1 << 20)] {
        assert!(deepened(model, depth).is_err(), "{depth}");
    }
}

#[test]
fn an_iterated_model_goes_on_with_the_same_blocks() {
    let model = model(DECODER, 2);
    let input = tokens(&IDS);
    let twice = iterated(&model, 2).unwrap();
    assert_eq!(twice.spec().expanded_blocks().len(), 4);
    let run = |model: &Model, trace: &Trace| {
        let pass = Pass {
            trace: Some(trace),
            ..Pass::default()
        };
        model.forward(&input, pass).unwrap();
    };
    let trace = Trace::new().capture("blocks.*.out").unwrap();
    run(&twice, &trace);
    let middle = trace.signal("blocks.1.out").unwrap();
    let last = trace.signal("blocks.3.out").unwrap();
    let again = Trace::new()
        .replace("blocks.0.in", move |_, _| Ok(middle.clone()))
        .unwrap()
        .capture("blocks.1.out")
        .unwrap();
    run(&model, &again);
    let found = again.signal("blocks.1.out").unwrap();
    assert!(difference(found.value(), last.value()).unwrap() < 1e-12);
    assert!(iterated(&model, 0).is_err());
}
