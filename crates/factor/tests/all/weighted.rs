//! The exact properties of low-rank approximation under a metric.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use lapidary_factor::{
    Error, Matrix, Metric, WeightedSvd, covariance_whitened, input_scaled, kronecker_weighted,
    matrix_from_tensor, matrix_to_tensor, plain, row_column_weighted, row_weighted, thin_svd,
};
use lapidary_kernels::{DType, Device, Tensor};
use proptest::prelude::*;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const OUTPUT: usize = 7;
const INPUT: usize = 9;

fn random(rows: usize, columns: usize, rng: &mut ChaCha8Rng) -> Matrix {
    Matrix::from_fn(rows, columns, |_, _| rng.random_range(-1.0..1.0))
}

fn importances(size: usize, rng: &mut ChaCha8Rng) -> Vec<f64> {
    (0..size)
        .map(|_| 10f64.powf(rng.random_range(-3.0..2.0)))
        .collect()
}

fn tensor(matrix: &Matrix) -> Tensor {
    matrix_to_tensor(matrix.as_ref(), DType::F64, &Device::Cpu).unwrap()
}

fn positive(size: usize, rng: &mut ChaCha8Rng) -> Matrix {
    let factor = random(size, size + 4, rng);
    &factor * factor.transpose()
}

fn merged(approximation: &lapidary_factor::Approximation) -> Matrix {
    matrix_from_tensor("merged", &approximation.factors.merged().unwrap()).unwrap()
}

/// Written out weight by weight, independently of how the crate computes it.
fn weighted_error(difference: &Matrix, weight: impl Fn(usize, usize) -> f64) -> f64 {
    let mut sum = 0.0;
    for o in 0..difference.nrows() {
        for i in 0..difference.ncols() {
            sum += weight(o, i) * difference[(o, i)].powi(2);
        }
    }
    sum
}

/// `vec(Δ)ᵀ (A ⊗ B) vec(Δ) = Σ Δ[o,i] Δ[p,j] A[i,j] B[o,p]`, by brute force.
fn kronecker_error(difference: &Matrix, a: &Matrix, b: &Matrix) -> f64 {
    let mut sum = 0.0;
    for o in 0..difference.nrows() {
        for p in 0..difference.nrows() {
            for i in 0..difference.ncols() {
                for j in 0..difference.ncols() {
                    sum += difference[(o, i)] * difference[(p, j)] * a[(i, j)] * b[(o, p)];
                }
            }
        }
    }
    sum
}

fn close(found: f64, expected: f64) -> bool {
    (found - expected).abs() <= 1e-9 * (1.0 + expected.abs())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn full_rank_is_exact_under_every_metric(seed: u64, output in 1usize..9, input in 1usize..9) {
        let rng = &mut ChaCha8Rng::seed_from_u64(seed);
        let w = random(output, input, rng);
        let (rows, columns) = (importances(input, rng), importances(output, rng));
        let (a, b) = (tensor(&positive(input, rng)), tensor(&positive(output, rng)));
        let metrics = [
            Metric::Plain,
            Metric::Rows(&rows),
            Metric::InputSquares(&rows),
            Metric::Covariance(&a),
            Metric::Kronecker { input: &a, output: &b },
            Metric::RowsAndColumns { input: &rows, output: &columns },
        ];
        for metric in metrics {
            let full = WeightedSvd::new(&tensor(&w), &metric).unwrap()
                .truncate(output.min(input)).unwrap();
            prop_assert!((merged(&full) - &w).norm_max() < 1e-9, "{:?}", metric);
            prop_assert!(full.plain_error < 1e-8);
            prop_assert_eq!(full.discarded_energy, 0.0);
        }
    }

    #[test]
    fn uniform_importance_is_plain_svd(seed: u64, rank in 1usize..=OUTPUT) {
        let rng = &mut ChaCha8Rng::seed_from_u64(seed);
        let w = random(OUTPUT, INPUT, rng);
        let expected = thin_svd(w.as_ref()).unwrap().truncated_product(rank);
        let uniform = vec![0.3; INPUT];
        let identity = tensor(&Matrix::identity(INPUT, INPUT));
        let found = [
            plain(&tensor(&w), rank).unwrap(),
            row_weighted(&tensor(&w), &uniform, rank).unwrap(),
            input_scaled(&tensor(&w), &uniform, rank).unwrap(),
            covariance_whitened(&tensor(&w), &identity, rank).unwrap(),
            row_column_weighted(&tensor(&w), &uniform, &[2.0; OUTPUT], rank).unwrap(),
        ];
        for approximation in &found {
            prop_assert!((merged(approximation) - &expected).norm_max() < 1e-10);
        }
    }

    #[test]
    fn scaling_all_importances_changes_nothing(
        seed: u64, rank in 1usize..=OUTPUT, power in -6f64..6.0,
    ) {
        let rng = &mut ChaCha8Rng::seed_from_u64(seed);
        let w = tensor(&random(OUTPUT, INPUT, rng));
        let importance = importances(INPUT, rng);
        let scale = 10f64.powf(power);
        let scaled: Vec<f64> = importance.iter().map(|v| v * scale).collect();
        let one = row_weighted(&w, &importance, rank).unwrap();
        let other = row_weighted(&w, &scaled, rank).unwrap();
        prop_assert!((merged(&one) - merged(&other)).norm_max() < 1e-9);
        prop_assert!(close(other.discarded_energy / scale, one.discarded_energy));
        // The metric's unit does not leak into the factors either.
        let norm = |t: &Tensor| matrix_from_tensor("factor", t).unwrap().norm_l2();
        prop_assert!(close(norm(&one.factors.up), norm(&other.factors.up)));
    }

    #[test]
    fn row_weights_win_in_their_norm_and_lose_in_the_plain_one(
        seed: u64, rank in 1usize..OUTPUT,
    ) {
        let rng = &mut ChaCha8Rng::seed_from_u64(seed);
        let w = random(OUTPUT, INPUT, rng);
        let importance = importances(INPUT, rng);
        let weighted = row_weighted(&tensor(&w), &importance, rank).unwrap();
        let unweighted = plain(&tensor(&w), rank).unwrap();

        let error = |approximation| {
            weighted_error(&(&w - merged(approximation)), |_, i| importance[i])
        };
        prop_assert!(close(error(&weighted), weighted.discarded_energy));
        prop_assert!(close(weighted_error(&w, |_, i| importance[i]), weighted.total_energy));
        prop_assert!(error(&weighted) <= error(&unweighted) * (1.0 + 1e-10));
        prop_assert!(weighted.plain_error >= unweighted.plain_error * (1.0 - 1e-10));
        prop_assert!(close(unweighted.plain_error.powi(2), unweighted.discarded_energy));
        prop_assert!(close(weighted.plain_norm, w.norm_l2()));
    }

    #[test]
    fn the_projection_equals_the_papers_back_substitution(seed: u64, rank in 1usize..=OUTPUT) {
        let rng = &mut ChaCha8Rng::seed_from_u64(seed);
        let w = random(OUTPUT, INPUT, rng);
        let importance = importances(INPUT, rng);
        // D W in the paper's orientation, [input, output], then D⁻¹ U_r S_r V_rᵀ.
        let scaled = Matrix::from_fn(INPUT, OUTPUT, |i, o| importance[i].sqrt() * w[(o, i)]);
        let product = thin_svd(scaled.as_ref()).unwrap().truncated_product(rank);
        let paper = Matrix::from_fn(OUTPUT, INPUT, |o, i| product[(i, o)] / importance[i].sqrt());
        let ours = merged(&row_weighted(&tensor(&w), &importance, rank).unwrap());
        prop_assert!((ours - paper).norm_max() < 1e-9);
    }

    #[test]
    fn no_perturbation_improves_the_optimum(seed: u64, rank in 1usize..OUTPUT) {
        let rng = &mut ChaCha8Rng::seed_from_u64(seed);
        let w = random(OUTPUT, INPUT, rng);
        let (a, b) = (positive(INPUT, rng), positive(OUTPUT, rng));
        let identity = Matrix::identity(OUTPUT, OUTPUT);
        let whitened = covariance_whitened(&tensor(&w), &tensor(&a), rank).unwrap();
        let kronecker = kronecker_weighted(&tensor(&w), &tensor(&a), &tensor(&b), rank).unwrap();
        for (approximation, output_metric) in [(&whitened, &identity), (&kronecker, &b)] {
            let up = matrix_from_tensor("up", &approximation.factors.up).unwrap();
            let down = matrix_from_tensor("down", &approximation.factors.down).unwrap();
            let error = |up: &Matrix, down: &Matrix| {
                kronecker_error(&(&w - up * down), &a, output_metric)
            };
            let best = error(&up, &down);
            prop_assert!(close(best, approximation.discarded_energy));
            for size in [1e-4, 1e-2, 0.3] {
                for _ in 0..8 {
                    let moved_up = &up + random(OUTPUT, rank, rng) * faer::Scale(size);
                    let moved_down = &down + random(rank, INPUT, rng) * faer::Scale(size);
                    prop_assert!(error(&moved_up, &moved_down) >= best * (1.0 - 1e-10));
                }
            }
        }
    }

    #[test]
    fn whitening_is_best_for_the_outputs_of_the_layer(seed: u64, rank in 1usize..OUTPUT) {
        let rng = &mut ChaCha8Rng::seed_from_u64(seed);
        let w = random(OUTPUT, INPUT, rng);
        // Fewer tokens than inputs: a singular covariance is the usual case, not an accident.
        for tokens in [4, 50] {
            let x = random(tokens, INPUT, rng);
            let covariance = x.transpose() * &x;
            let whitened = covariance_whitened(&tensor(&w), &tensor(&covariance), rank).unwrap();
            let output_error = |approximation: &Matrix| {
                (&x * (&w - approximation).transpose()).norm_l2().powi(2)
            };
            let best = output_error(&merged(&whitened));
            prop_assert!((best - whitened.discarded_energy).abs() < 1e-6);
            let outputs = &x * w.transpose();
            let bound = thin_svd(outputs.as_ref()).unwrap().discarded_energy(rank);
            prop_assert!((best - bound).abs() < 1e-6, "{} {}", best, bound);
            let squares: Vec<f64> = (0..INPUT).map(|i| covariance[(i, i)]).collect();
            let others = [
                plain(&tensor(&w), rank).unwrap(),
                input_scaled(&tensor(&w), &squares, rank).unwrap(),
            ];
            for other in &others {
                prop_assert!(best <= output_error(&merged(other)) + 1e-6);
            }
        }
    }

    #[test]
    fn diagonal_metrics_are_special_cases_of_the_kronecker_one(
        seed: u64, rank in 1usize..=OUTPUT,
    ) {
        let rng = &mut ChaCha8Rng::seed_from_u64(seed);
        let w = random(OUTPUT, INPUT, rng);
        let (rows, columns) = (importances(INPUT, rng), importances(OUTPUT, rng));
        let diagonal = |values: &[f64]| Matrix::from_fn(values.len(), values.len(), |i, j| {
            if i == j { values[i] } else { 0.0 }
        });
        let dense = kronecker_weighted(
            &tensor(&w), &tensor(&diagonal(&rows)), &tensor(&diagonal(&columns)), rank,
        ).unwrap();
        let direct = row_column_weighted(&tensor(&w), &rows, &columns, rank).unwrap();
        prop_assert!((merged(&dense) - merged(&direct)).norm_max() < 1e-8);
        let error = weighted_error(&(&w - merged(&direct)), |o, i| rows[i] * columns[o]);
        prop_assert!(close(error, direct.discarded_energy));
    }

    #[test]
    fn inputs_without_importance_take_no_rank_and_do_not_blow_up(
        seed: u64, important in 1usize..OUTPUT,
    ) {
        let rng = &mut ChaCha8Rng::seed_from_u64(seed);
        let w = random(OUTPUT, INPUT, rng);
        let importance: Vec<f64> = (0..INPUT)
            .map(|i| if i < important { rng.random_range(0.5..2.0) } else { 0.0 })
            .collect();
        // The rank of the important columns suffices to keep them exactly.
        let approximation = row_weighted(&tensor(&w), &importance, important).unwrap();
        let rebuilt = merged(&approximation);
        for o in 0..OUTPUT {
            for i in 0..important {
                prop_assert!((rebuilt[(o, i)] - w[(o, i)]).abs() < 1e-7);
            }
        }
        prop_assert!(rebuilt.norm_l2() <= w.norm_l2() * (1.0 + 1e-7));
        let factors = [&approximation.factors.up, &approximation.factors.down];
        for factor in factors {
            let largest = matrix_from_tensor("factor", factor).unwrap().norm_max();
            prop_assert!(largest <= w.norm_l2());
        }
        let full = row_weighted(&tensor(&w), &importance, OUTPUT).unwrap();
        prop_assert!((merged(&full) - &w).norm_max() < 1e-6);
    }
}

#[test]
fn a_layer_of_zeros_stays_zero() {
    let zeros = Tensor::zeros((3, 4), DType::F32, &Device::Cpu).unwrap();
    for importance in [[0.0; 4], [1.0, 0.0, 2.0, 0.0]] {
        let approximation = row_weighted(&zeros, &importance, 2).unwrap();
        assert_eq!(merged(&approximation).norm_max(), 0.0);
    }
}

#[test]
fn factors_have_the_type_and_orientation_of_the_layer() {
    let rng = &mut ChaCha8Rng::seed_from_u64(5);
    let w = tensor(&random(6, 4, rng)).to_dtype(DType::F32).unwrap();
    let x = tensor(&random(3, 4, rng)).to_dtype(DType::F32).unwrap();
    let pair = plain(&w, 4).unwrap().factors;
    assert_eq!(pair.down.dtype(), DType::F32);
    assert_eq!(
        (pair.down.dims(), pair.up.dims()),
        (&[4, 4][..], &[6, 4][..])
    );
    assert_eq!(pair.rank(), 4);
    let dense = x.matmul(&w.t().unwrap()).unwrap();
    let thin = x
        .matmul(&pair.down.t().unwrap())
        .unwrap()
        .matmul(&pair.up.t().unwrap())
        .unwrap();
    let difference = (dense - thin).unwrap().abs().unwrap().max_all().unwrap();
    assert!(difference.to_scalar::<f32>().unwrap() < 1e-5);
}

#[test]
fn wrong_arguments_are_named() {
    let w = Tensor::rand(-1f32, 1f32, (3, 4), &Device::Cpu).unwrap();
    assert!(matches!(
        plain(&w, 0),
        Err(Error::Rank {
            rank: 0,
            largest: 3
        })
    ));
    assert!(matches!(plain(&w, 4), Err(Error::Rank { .. })));
    assert!(matches!(
        row_weighted(&w, &[1.0; 3], 1),
        Err(Error::Shape { .. })
    ));
    match row_weighted(&w, &[1.0, 2.0, -1.0, 0.0], 1) {
        Err(error @ Error::Importance { index: 2, .. }) => {
            assert!(error.to_string().contains("not negative"));
        }
        other => panic!("expected Importance, got {other:?}"),
    }
    assert!(matches!(
        covariance_whitened(&w, &w, 1),
        Err(Error::Shape { .. })
    ));
}
