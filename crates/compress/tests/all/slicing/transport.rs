//! Features merged by optimal transport.

use super::{PARALLEL, confined, cut};
use crate::common::{DECODER, GATED, close, distance, model, scores, values, windows};
use lapidary_compress::slicing::{
    Choice, Coordinates, Directions, Distance, Principal, Selector, Stream, Transport, orthonormal,
    slice, transport_plan,
};
use lapidary_factor::Matrix;
use lapidary_kernels::{Device, Tensor};

/// A map of which the directions that stay are the span.
struct Map(Matrix);

impl Directions for Map {
    fn choose(&self, stream: &Stream, width: usize) -> lapidary_compress::Result<Choice> {
        let principal = Principal.choose(stream, width)?.basis;
        Ok(orthonormal(&(principal * &self.0)).0.into())
    }
}

#[test]
fn a_map_made_of_principal_directions_is_slicegpt() {
    let (model, data) = (model(GATED, 10), windows(8, 10));
    let pca = cut(&model, &data, 10, &Principal);
    let map = cut(&model, &data, 10, &Map(Matrix::identity(10, 10)));
    assert_eq!(pca.spec(), map.spec());
    for (name, tensor) in pca.parameters() {
        close(&values(&map.parameters()[name]), &values(tensor), 1e-9);
    }
    // Only the span of a map counts, whichever invertible matrix follows it.
    let mixing = Matrix::from_fn(10, 10, |i, j| ((3 * i + 7 * j) % 11) as f64 - 4.5)
        + Matrix::from_fn(10, 10, |i, j| if i == j { 9.0 } else { 0.0 });
    let mixed = cut(&model, &data, 10, &Map(mixing));
    close(&scores(&mixed, &data), &scores(&pca, &data), 1e-9);
}

/// Sends feature `i` to all the features `j` with `group(j) = i`.
fn copying(groups: &[usize]) -> Tensor {
    let entries: Vec<f64> = (0..256)
        .map(|at| f64::from(u8::from(groups[at % 16] == at / 16)))
        .collect();
    Tensor::from_vec(entries, (16, 16), &Device::Cpu).unwrap()
}

#[test]
fn copies_of_features_are_merged_without_loss() {
    let pairs: Vec<usize> = (0..16).map(|i| i / 2).collect();
    let uneven = vec![0, 0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11];
    for (groups, count) in [(pairs, 8), (uneven, 12)] {
        for spec in [GATED, DECODER, PARALLEL] {
            let model = confined(&model(spec, 11), &copying(&groups));
            let data = windows(8, 11);
            let before = scores(&model, &data);
            for shared in [false, true] {
                let merged = slice(&model, &data, count, shared, &Transport::default(), 8);
                let apart = distance(&scores(&merged.unwrap().model, &data), &before);
                assert!(apart < 1e-6, "{count}, shared {shared}: {apart:e}");
            }
            let features = Coordinates {
                selector: Selector::Magnitude,
            };
            let dropped = slice(&model, &data, count, true, &features, 8).unwrap();
            assert!(distance(&scores(&dropped.model, &data), &before) > 1e-3);
        }
    }
}

#[test]
fn each_distance_and_selector_merges_copies() {
    let groups: Vec<usize> = (0..16).map(|i| i / 2).collect();
    let model = confined(&model(GATED, 12), &copying(&groups));
    let data = windows(8, 12);
    for distance_of in [Distance::Absolute, Distance::Squared, Distance::Cosine] {
        for selector in [Selector::Magnitude, Selector::Spread] {
            let way = Transport {
                distance: distance_of,
                selector,
                ..Transport::default()
            };
            let apart = distance(
                &scores(&cut(&model, &data, 8, &way), &data),
                &scores(&model, &data),
            );
            assert!(apart < 1e-6, "{distance_of:?} {selector:?}: {apart:e}");
        }
    }
}

#[test]
fn a_map_that_lacks_rank_is_completed() {
    let map = Matrix::from_fn(6, 4, |i, k| if k < 2 { (i + k) as f64 } else { 1.0 });
    let (basis, rank, condition) = orthonormal(&map);
    assert_eq!((rank, basis.ncols()), (2, 4));
    assert!(condition.is_finite());
    let product = basis.transpose() * &basis;
    assert!((product - Matrix::identity(4, 4)).norm_max() < 1e-12);
    let left = &map - &basis * (basis.transpose() * &map);
    assert!(left.norm_max() < 1e-9);
}

#[test]
fn a_column_after_a_copy_is_not_taken_for_one() {
    // Nothing at all is left of the second column, and Householder's reflection puts the direction of the third in
    // its place. The first columns of the basis are what belongs to the map.
    let columns = [0, 0, 1, 7];
    let map = Matrix::from_fn(9, 4, |i, k| f64::from(u8::from(columns[k] == i)));
    let (basis, rank, condition) = orthonormal(&map);
    assert_eq!((rank, basis.ncols()), (3, 4));
    assert!((condition - 1.0).abs() < 1e-12);
    for feature in [0, 1, 7] {
        let held: f64 = (0..3).map(|k| basis[(feature, k)].powi(2)).sum();
        assert!((held - 1.0).abs() < 1e-12, "{feature}: {held}");
    }
    let product = basis.transpose() * &basis;
    assert!((product - Matrix::identity(4, 4)).norm_max() < 1e-12);
    let nothing = Matrix::from_fn(4, 2, |_, _| 0.0);
    assert_eq!(orthonormal(&nothing).1, 0);
}

/// The permutation of least cost, by trying all.
fn assignment(cost: &Matrix, taken: &mut Vec<usize>) -> (f64, Vec<usize>) {
    let row = taken.len();
    if row == cost.nrows() {
        return (0.0, taken.clone());
    }
    let mut best = (f64::INFINITY, Vec::new());
    for column in 0..cost.ncols() {
        if taken.contains(&column) {
            continue;
        }
        taken.push(column);
        let (rest, order) = assignment(cost, taken);
        taken.pop();
        if rest + cost[(row, column)] < best.0 {
            best = (rest + cost[(row, column)], order);
        }
    }
    best
}

#[test]
fn transport_meets_its_marginals_and_its_limits() {
    let cost = Matrix::from_fn(6, 6, |i, j| ((5 * i + 3 * j + i * j) % 13) as f64 / 6.0);
    let found = transport_plan(&cost, 0.1, 1000).unwrap();
    let wide = Matrix::from_fn(6, 4, |i, j| cost[(i, j)]);
    let narrow = transport_plan(&wide, 0.1, 1000).unwrap();
    for (found, targets) in [(&found, 6), (&narrow, 4)] {
        assert!(found.error < 1e-6 && found.iterations < 1000);
        for i in 0..6 {
            let sum: f64 = (0..targets).map(|j| found.plan[(i, j)]).sum();
            assert!((sum * 6.0 - 1.0).abs() < 2e-6);
        }
        for j in 0..targets {
            let sum: f64 = (0..6).map(|i| found.plan[(i, j)]).sum();
            assert!((sum * targets as f64 - 1.0).abs() < 2e-6);
        }
    }
    // Cold, it is the assignment of least cost; hot, everything goes everywhere.
    let (least, order) = assignment(&cost, &mut Vec::new());
    let cold = transport_plan(&cost, 2e-3, 100_000).unwrap();
    let paid: f64 = (0..36)
        .map(|at| cost[(at / 6, at % 6)] * cold.plan[(at / 6, at % 6)])
        .sum();
    assert!((6.0 * paid - least).abs() < 1e-3, "{} {least}", 6.0 * paid);
    assert!(
        order
            .iter()
            .enumerate()
            .all(|(i, &j)| 6.0 * cold.plan[(i, j)] > 0.4)
    );
    let hot = transport_plan(&wide, 1e6, 1000).unwrap();
    assert!((0..24).all(|at| (hot.plan[(at / 4, at % 4)] * 24.0 - 1.0).abs() < 1e-5));
    // Costs a thousand temperatures apart do not underflow.
    let far = Matrix::from_fn(6, 6, |i, j| if i == j { 0.0 } else { 1e3 });
    let found = transport_plan(&far, 0.1, 1000).unwrap();
    assert!((0..6).all(|i| (found.plan[(i, i)] * 6.0 - 1.0).abs() < 1e-6));
    assert!(transport_plan(&cost, 0.0, 10).is_err());
}
