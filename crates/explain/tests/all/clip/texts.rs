//! Texts that span what heads write.

use super::random;
use lapidary_explain::clip::text_span;
use lapidary_factor::{Matrix, thin_svd};

#[test]
fn chosen_texts_are_orthogonal_and_explain_ever_more() {
    let (outputs, texts) = (random(40, 12, 1), random(30, 12, 2));
    let mut explained = 0.0;
    for count in 1..=8 {
        let span = text_span(outputs.as_ref(), texts.as_ref(), 8, count).unwrap();
        assert_eq!(span.texts.len(), count);
        for one in 0..count {
            for other in 0..one {
                let a = span.directions.row(one);
                let b = span.directions.row(other);
                let product: f64 = a.iter().zip(b.iter()).map(|(a, b)| a * b).sum();
                assert!((product / a.norm_l2() / b.norm_l2()).abs() < 1e-12);
            }
        }
        // The share is what the residual of the reconstruction says.
        let left = (&outputs - span.reconstruct(outputs.as_ref())).squared_norm_l2();
        assert!((1.0 - left / span.deviation - span.explained()).abs() < 1e-10);
        assert!(span.explained() > explained, "the residual falls");
        explained = span.explained();
    }
}

#[test]
fn texts_that_span_everything_rebuild_the_outputs() {
    let (outputs, texts) = (random(40, 6, 3), random(20, 6, 4));
    let span = text_span(outputs.as_ref(), texts.as_ref(), 6, 20).unwrap();
    assert_eq!(span.texts.len(), 6, "after which no text says anything new");
    let rebuilt = span.reconstruct(outputs.as_ref());
    assert!((&rebuilt - &outputs).norm_max() < 1e-10);
    assert!((span.explained() - 1.0).abs() < 1e-10);
}

#[test]
fn outputs_are_compared_after_centring() {
    let (outputs, texts) = (random(40, 6, 5), random(20, 6, 6));
    let shifted = Matrix::from_fn(40, 6, |i, j| outputs[(i, j)] + 3.0 - j as f64);
    let span = text_span(outputs.as_ref(), texts.as_ref(), 6, 6).unwrap();
    let again = text_span(shifted.as_ref(), texts.as_ref(), 6, 6).unwrap();
    assert_eq!(span.texts, again.texts);
    assert!((span.explained() - again.explained()).abs() < 1e-10);
}

/// The algorithm as printed, with the whole products recomputed after each choice.
#[test]
fn the_covariance_chooses_what_the_printed_algorithm_chooses() {
    let (outputs, texts) = (random(50, 16, 7), random(60, 16, 8));
    for rank in [4, 9, 16] {
        let span = text_span(outputs.as_ref(), texts.as_ref(), rank, 6).unwrap();
        let svd = thin_svd(outputs.as_ref()).unwrap();
        let basis = svd.vt.as_ref().subrows(0, rank);
        let mut left = (&texts * basis.transpose()) * basis;
        let mut c = Matrix::from_fn(50, 16, |i, j| {
            outputs[(i, j)] - outputs.col(j).iter().sum::<f64>() / 50.0
        });
        let mut expected = Vec::new();
        for _ in 0..6.min(rank) {
            let products = &c * left.transpose();
            let deviation = |j: usize| {
                let mean = products.col(j).iter().sum::<f64>() / 50.0;
                products
                    .col(j)
                    .iter()
                    .map(|p| (p - mean).powi(2))
                    .sum::<f64>()
            };
            let best = (0..60)
                .max_by(|a, b| deviation(*a).total_cmp(&deviation(*b)))
                .unwrap();
            expected.push(best);
            let t = Matrix::from_fn(16, 1, |i, _| left[(best, i)]);
            let square = t.squared_norm_l2();
            c -= (&c * &t) * t.transpose() * (1.0 / square);
            left -= (&left * &t) * t.transpose() * (1.0 / square);
        }
        assert_eq!(&span.texts[..expected.len()], expected, "rank {rank}");
    }
}

#[test]
fn span_refuses_what_does_not_fit() {
    let outputs = random(4, 3, 1);
    let refused = |texts: &Matrix, rank: usize| {
        text_span(outputs.as_ref(), texts.as_ref(), rank, 2)
            .unwrap_err()
            .to_string()
    };
    assert!(refused(&random(4, 2, 1), 1).contains("texts"));
    assert!(refused(&random(4, 3, 1), 0).contains("rank"));
    let broken = Matrix::from_fn(2, 3, |_, _| f64::NAN);
    assert!(refused(&broken, 1).contains("finite"));
    // Equal outputs have no variance: nothing is chosen.
    let same = Matrix::from_fn(4, 3, |_, j| 1.0 + j as f64);
    let span = text_span(same.as_ref(), random(4, 3, 1).as_ref(), 3, 2).unwrap();
    assert!(span.texts.is_empty());
}
