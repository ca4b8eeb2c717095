//! How nearly linear blocks are.
#![allow(clippy::unwrap_used)]

use lapidary_explain::analyses::linearity::{linearity, report, two_neighbours};
use lapidary_factor::{Matrix, Regression};
use lapidary_kernels::{DType, Device};
use lapidary_model::{Model, ModelSpec};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn normal(rows: usize, columns: usize, seed: u64) -> Matrix {
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    Matrix::from_fn(rows, columns, |_, _| {
        let (u, v): (f64, f64) = (generator.random_range(1e-12..1.0), generator.random());
        (-2.0 * u.ln()).sqrt() * (2.0 * std::f64::consts::PI * v).cos()
    })
}

/// Share that the best map explains.
fn score(x: &Matrix, y: &Matrix) -> f64 {
    let mut sums = Regression::with_intercept(x.ncols(), y.ncols());
    sums.add(x.as_ref(), y.as_ref()).unwrap();
    sums.explained(&sums.solve(0.0).unwrap()).unwrap()
}

fn scaled(m: &Matrix, by: f64) -> Matrix {
    Matrix::from_fn(m.nrows(), m.ncols(), |i, j| m[(i, j)] * by)
}

fn square(m: &Matrix) -> f64 {
    m.squared_norm_l2()
}

#[test]
fn scores_are_those_of_linear_maps_of_noise_and_of_both() {
    let (n, d) = (4000, 10);
    let (x, a) = (normal(n, d, 1), normal(d, d, 2));
    let y = &x * &a;
    assert!((score(&x, &y) - 1.0).abs() < 1e-8);
    // Noise is explained by chance, a share of d / n of it.
    let noise = normal(n, d, 3);
    let found = score(&x, &noise);
    assert!((found / (d as f64 / n as f64) - 1.0).abs() < 0.3, "{found}");
    for epsilon in [0.1, 0.5, 1.0] {
        let relative = epsilon * (square(&y) / square(&noise)).sqrt();
        let noisy = &y + scaled(&noise, relative);
        let expected = 1.0 / (1.0 + epsilon * epsilon);
        assert!((score(&x, &noisy) - expected).abs() < 0.01);
    }
}

#[test]
fn scores_do_not_see_bases_scales_and_places() {
    let (x, y) = (normal(300, 6, 4), normal(300, 6, 5));
    let y = &y + scaled(&x, 0.5);
    let plain = score(&x, &y);
    let turn = lapidary_factor::qr(normal(6, 6, 6).as_ref()).q;
    let shifted = Matrix::from_fn(300, 6, |i, j| 3.0 * y[(i, j)] + 100.0 * j as f64);
    for (x, y) in [
        (&x * normal(6, 6, 7), y.clone()),
        (x.clone(), shifted),
        (Matrix::from_fn(300, 6, |i, j| x[(i, j)] - 50.0), y.clone()),
        (x.clone(), &y * &turn),
    ] {
        assert!((score(&x, &y) - plain).abs() < 1e-10);
    }
    // The share of variance by residuals laid out, column by column.
    let mut sums = Regression::with_intercept(6, 6);
    sums.add(x.as_ref(), y.as_ref()).unwrap();
    let map = sums.solve(0.0).unwrap();
    let product = &x * &map.weight;
    let (mut missed, mut total) = (0.0, 0.0);
    for j in 0..6 {
        let mean = (0..300).map(|i| y[(i, j)]).sum::<f64>() / 300.0;
        for i in 0..300 {
            missed += (y[(i, j)] - product[(i, j)] - map.bias[j]).powi(2);
            total += (y[(i, j)] - mean).powi(2);
        }
    }
    assert!((plain - (1.0 - missed / total)).abs() < 1e-12);
}

/// Why the raw score overstates: what is added is noise, and the score is high.
#[test]
fn a_small_addition_makes_the_raw_score_high_whatever_it_is() {
    let x = normal(2000, 8, 8);
    let u = scaled(&normal(2000, 8, 9), 0.1);
    let mut sums = Regression::with_intercept(8, 8);
    sums.add(x.as_ref(), u.as_ref()).unwrap();
    let map = sums.solve(0.0).unwrap();
    let free = sums.explained(&map).unwrap();
    let raw = sums.beside_inputs();
    let score = raw.explained(&raw.solve(0.0).unwrap()).unwrap();
    assert!(free < 0.02, "{free}");
    assert!(score >= 1.0 - sums.total() / raw.total() - 1e-12);
    assert!(score > 0.98, "{score}");
}

#[test]
fn manifolds_have_their_dimension_and_round_clouds_no_direction() {
    for (k, seed) in [(2, 10), (5, 11), (10, 12)] {
        let mut generator = ChaCha8Rng::seed_from_u64(seed);
        let flat = Matrix::from_fn(2000, k, |_, _| generator.random::<f64>());
        let points = &flat * normal(k, 50, seed + 10);
        let points: Vec<Vec<f64>> = (0..2000)
            .map(|i| (0..50).map(|j| points[(i, j)]).collect())
            .collect();
        let found = two_neighbours(&points).unwrap().unwrap();
        assert!((found / k as f64 - 1.0).abs() < 0.15, "{found} of {k}");
    }
    assert_eq!(two_neighbours(&vec![vec![1.0, 2.0]; 10]).unwrap(), None);
    let mut sums = Regression::with_intercept(20, 1);
    let x = normal(20_000, 20, 13);
    sums.add(x.as_ref(), Matrix::zeros(20_000, 1).as_ref())
        .unwrap();
    let found = sums.anisotropy().unwrap().unwrap();
    assert!((found * 20.0 - 1.0).abs() < 0.1, "{found}");
}

const SPEC: &str = r#"
width = 16
final_norm = { kind = "layer" }
[input]
kind = "tokens"
vocabulary = 40
length = 16
position = { kind = "learned" }
[[blocks]]
attention = { kind = "multi-head", heads = 4, causal = true }
feedforward = { kind = "dense", hidden = 32 }
[[blocks]]
norm = { kind = "none" }
attention = { kind = "absent" }
feedforward = { kind = "linear" }
[[blocks]]
attention = { kind = "multi-head", heads = 4, causal = true }
feedforward = { kind = "dense", hidden = 32 }
[head]
kind = "language-model"
"#;

fn model() -> Model {
    let spec: ModelSpec = toml::from_str(SPEC).unwrap();
    let model = Model::initialised(spec.clone(), 1, DType::F64, &Device::Cpu).unwrap();
    let mut parameters = model.parameters().clone();
    for (name, tensor) in &mut parameters {
        // Blocks as initialised add next to nothing.
        if name.ends_with("weight") && name.starts_with("blocks") && !name.contains("norm") {
            *tensor = (tensor.clone() * 15.0).unwrap();
        }
        if name.starts_with("blocks.2") && (name.contains("output") || name.contains("down")) {
            *tensor = tensor.zeros_like().unwrap();
        }
    }
    Model::new(spec, &mut parameters).unwrap()
}

fn windows(count: usize) -> Vec<Vec<u32>> {
    let mut generator = ChaCha8Rng::seed_from_u64(3);
    let mut window = |index: usize| {
        let length = 12 + index % 3;
        (0..length).map(|_| generator.random_range(0..40)).collect()
    };
    (0..count).map(&mut window).collect()
}

#[test]
fn blocks_are_scored_by_what_they_are() {
    let model = model();
    let found = linearity(&model, &windows(120), 8).unwrap();
    let [bent, linear, silent] = found.as_slice() else {
        panic!("{found:?}");
    };
    assert!((linear.score - 1.0).abs() < 1e-8 && (linear.held_out - 1.0).abs() < 1e-8);
    assert!((linear.residual_free.unwrap() - 1.0).abs() < 1e-8);
    // A block that writes nothing is the identity, and nothing can be said of what it adds.
    assert!((silent.score - 1.0).abs() < 1e-10 && silent.residual_free.is_none());
    assert!((silent.cosine - 1.0).abs() < 1e-12 && silent.contribution == 0.0);
    assert!((silent.rotation.unwrap() - 1.0).abs() < 1e-10);
    assert!(bent.score < 0.999 && bent.residual_free.unwrap() < bent.score);
    assert!(bent.residual_free_held_out.unwrap() < bent.residual_free.unwrap());
    for block in &found {
        assert!((0.0..=1.0).contains(&block.anisotropy.unwrap()));
        assert!(block.rotation.unwrap() <= block.score + 1e-9);
    }
    // Batches are a matter of speed.
    let alone = linearity(&model, &windows(120), 1).unwrap();
    for (a, b) in alone.iter().zip(&found) {
        assert!((a.score - b.score).abs() < 1e-9 && (a.cosine - b.cosine).abs() < 1e-9);
    }
    assert!(linearity(&model, &windows(1), 1).is_err());
    // One window leaves nothing to score on, however long it is.
    let narrow: ModelSpec = toml::from_str(&SPEC.replace("width = 16", "width = 8")).unwrap();
    let narrow = Model::initialised(narrow, 1, DType::F64, &Device::Cpu).unwrap();
    let error = linearity(&narrow, &windows(1), 1).unwrap_err().to_string();
    assert!(error.contains("at least 2"), "{error}");
    assert!(linearity(&narrow, &windows(2), 1).is_ok());
    let report = report(&model, &windows(120), 8).unwrap();
    assert_eq!(report.tables[0].rows.len(), 3);
}
