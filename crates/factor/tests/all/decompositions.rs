//! The classical decompositions keep their promises on matrices of every shape.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use lapidary_factor::{
    Error, Matrix, MatrixView, cholesky, inverse_square_root, matrix_from_tensor, matrix_to_tensor,
    qr, square_root, symmetric_eigen, thin_svd,
};
use lapidary_kernels::{DType, Device, Tensor};
use proptest::prelude::*;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn random(rows: usize, columns: usize, seed: u64) -> Matrix {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    Matrix::from_fn(rows, columns, |_, _| rng.random_range(-1.0..1.0))
}

fn distance(a: MatrixView<'_>, b: MatrixView<'_>) -> f64 {
    (a - b).norm_l2()
}

fn is_orthonormal(columns: MatrixView<'_>) -> bool {
    let size = columns.ncols();
    let gram = columns.transpose() * columns;
    distance(gram.as_ref(), Matrix::identity(size, size).as_ref()) < 1e-12 * size as f64
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn svd_rebuilds_the_matrix_and_reports_what_it_discards(
        rows in 1usize..24, columns in 1usize..24, rank in 0usize..24, seed: u64,
    ) {
        let a = random(rows, columns, seed);
        let svd = thin_svd(a.as_ref()).unwrap();
        let size = rows.min(columns);
        prop_assert_eq!(svd.s.len(), size);
        prop_assert!(svd.s.windows(2).all(|pair| pair[0] >= pair[1]));
        prop_assert!(is_orthonormal(svd.u.as_ref()));
        prop_assert!(is_orthonormal(svd.vt.transpose()));
        let error = distance(a.as_ref(), svd.truncated_product(rank).as_ref());
        prop_assert!((error * error - svd.discarded_energy(rank)).abs() < 1e-10);
        prop_assert!(distance(a.as_ref(), svd.truncated_product(size).as_ref()) < 1e-12 * 24.0);
    }

    #[test]
    fn qr_rebuilds_the_matrix(rows in 1usize..24, columns in 1usize..24, seed: u64) {
        let a = random(rows, columns, seed);
        let qr = qr(a.as_ref());
        prop_assert!(is_orthonormal(qr.q.as_ref()));
        prop_assert!(distance((&qr.q * &qr.r).as_ref(), a.as_ref()) < 1e-11);
        for i in 0..qr.r.nrows() {
            for j in 0..i.min(qr.r.ncols()) {
                prop_assert_eq!(qr.r[(i, j)], 0.0);
            }
        }
    }

    #[test]
    fn roots_of_a_positive_matrix(size in 1usize..20, seed: u64) {
        let factor = random(size, size + 3, seed);
        let a = &factor * factor.transpose() + Matrix::identity(size, size);
        let root = square_root("a", a.as_ref()).unwrap();
        prop_assert!(distance((&root * &root).as_ref(), a.as_ref()) < 1e-10);
        prop_assert!(distance(root.as_ref(), root.transpose()) < 1e-12);
        let inverse = inverse_square_root("a", a.as_ref(), 0.0).unwrap();
        let identity = Matrix::identity(size, size);
        prop_assert!(distance((&inverse * &root).as_ref(), identity.as_ref()) < 1e-10);
        let lower = cholesky("a", a.as_ref()).unwrap();
        prop_assert_eq!(lower.jitter, 0.0);
        let product = &lower.lower * lower.lower.transpose();
        prop_assert!(distance(product.as_ref(), a.as_ref()) < 1e-10);
        let eigen = symmetric_eigen("a", a.as_ref()).unwrap();
        prop_assert!(eigen.values.windows(2).all(|pair| pair[0] <= pair[1]));
        prop_assert!(distance(eigen.map(|v| v).as_ref(), a.as_ref()) < 1e-10);
    }
}

#[test]
fn cholesky_says_how_much_it_added_to_a_singular_matrix() {
    let column = random(6, 2, 1);
    let singular = &column * column.transpose();
    let decomposition = cholesky("gram", singular.as_ref()).unwrap();
    let mean = (0..6).map(|i| singular[(i, i)]).sum::<f64>() / 6.0;
    assert!(decomposition.jitter <= 1.1e-12 * mean);
    let product = &decomposition.lower * decomposition.lower.transpose();
    let shifted = Matrix::from_fn(6, 6, |i, j| {
        singular[(i, j)] + if i == j { decomposition.jitter } else { 0.0 }
    });
    assert!(distance(product.as_ref(), shifted.as_ref()) < 1e-12);
}

#[test]
fn what_is_not_positive_or_not_symmetric_is_refused_by_name() {
    let mut indefinite = Matrix::identity(3, 3);
    indefinite[(1, 1)] = -1.0;
    let error = cholesky("curvature", indefinite.as_ref()).unwrap_err();
    assert!(error.to_string().starts_with("curvature is not positive"));
    assert!(matches!(
        square_root("curvature", indefinite.as_ref()),
        Err(Error::NotPositive { .. })
    ));
    let lopsided = random(3, 3, 4);
    assert!(matches!(
        symmetric_eigen("a", lopsided.as_ref()),
        Err(Error::NotSymmetric { .. })
    ));
    assert!(matches!(
        symmetric_eigen("a", random(3, 2, 4).as_ref()),
        Err(Error::Shape { .. })
    ));
    assert!(matches!(
        inverse_square_root("a", Matrix::zeros(2, 2).as_ref(), 0.0),
        Err(Error::NotPositive { .. })
    ));
}

#[test]
fn tensors_go_in_and_out_unchanged() {
    let tensor = Tensor::rand(-1f32, 1f32, (3, 5), &Device::Cpu).unwrap();
    let strided = tensor.t().unwrap();
    let matrix = matrix_from_tensor("strided", &strided).unwrap();
    assert_eq!((matrix.nrows(), matrix.ncols()), (5, 3));
    let back = matrix_to_tensor(matrix.as_ref(), DType::F32, &Device::Cpu).unwrap();
    assert_eq!(
        back.to_vec2::<f32>().unwrap(),
        strided.to_vec2::<f32>().unwrap()
    );
}

#[test]
fn tensors_that_are_no_finite_matrix_are_refused() {
    let vector = Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap();
    assert!(matches!(
        matrix_from_tensor("v", &vector),
        Err(Error::NotMatrix { .. })
    ));
    let empty = Tensor::zeros((0, 3), DType::F32, &Device::Cpu).unwrap();
    assert!(matches!(
        matrix_from_tensor("e", &empty),
        Err(Error::NotMatrix { .. })
    ));
    let broken = Tensor::new(&[[0f32, 1.], [f32::NAN, 2.]], &Device::Cpu).unwrap();
    match matrix_from_tensor("weight", &broken) {
        Err(Error::NotFinite { name, position, .. }) => {
            assert_eq!((name, position), ("weight", (1, 0)));
        }
        other => panic!("expected NotFinite, got {other:?}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20))]

    #[test]
    fn a_cholesky_decomposition_solves_and_knows_the_inverse_diagonal(
        size in 1usize..12,
        columns in 1usize..5,
        seed in 0u64..1000,
    ) {
        let factor = random(size, size + 3, seed);
        let matrix = &factor * factor.transpose();
        let right = random(size, columns, seed + 1);
        let decomposition = cholesky("a", matrix.as_ref()).unwrap();
        prop_assert_eq!(decomposition.jitter, 0.0);
        let solution = decomposition.solve(right.as_ref()).unwrap();
        let scale = 1.0 + solution.norm_l2() * matrix.norm_l2();
        prop_assert!(distance((&matrix * &solution).as_ref(), right.as_ref()) < 1e-12 * scale);
        let inverse = decomposition.solve(Matrix::identity(size, size).as_ref()).unwrap();
        for (i, entry) in decomposition.inverse_diagonal().into_iter().enumerate() {
            prop_assert!((entry - inverse[(i, i)]).abs() < 1e-9 * inverse[(i, i)]);
        }
        let wrong = random(size + 1, 1, seed);
        let refused = matches!(
            decomposition.solve(wrong.as_ref()),
            Err(Error::Shape { name: "right-hand side", .. })
        );
        prop_assert!(refused);
    }
}
