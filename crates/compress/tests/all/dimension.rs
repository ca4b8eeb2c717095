//! What a width is expected to be worth.
#![allow(clippy::unwrap_used)]

use crate::common::{DECODER, model, windows};
use lapidary_compress::dimension::{AccuracyLaw, Law, map_changes, predicted_perplexity, scores};
use lapidary_compress::slicing::{Principal, slice};

#[test]
fn exact_data_has_no_error_and_other_data_has() {
    let whole: f64 = 7.5;
    let exact = |s: f64| (s, (whole.ln() / (1.0 - s)).exp());
    let points: Vec<_> = [0.0, 0.1, 0.2, 0.35].map(exact).to_vec();
    let law = Law::new(whole, &points).unwrap();
    assert!(law.largest_error(0.0, 1.0).unwrap() < 1e-12);
    assert!((law.line.slope + 1.0).abs() < 1e-12 && (law.line.intercept - 1.0).abs() < 1e-12);
    assert!((law.line.r_squared - 1.0).abs() < 1e-12);

    let steep = |s: f64| (s, (whole.ln() / (1.0 - s).powi(3)).exp());
    let points: Vec<_> = [0.0, 0.1, 0.2, 0.35].map(steep).to_vec();
    let law = Law::new(whole, &points).unwrap();
    assert!(law.largest_error(0.1, 0.3).unwrap() > 0.1);
    assert!(law.line.r_squared < 1.0 && law.line.slope < -1.2);
    assert_eq!(law.largest_error(0.5, 0.9), None);
}

#[test]
fn accuracy_falls_by_kappa() {
    let points = [0.1, 0.2, 0.4].map(|s: f64| (s, 0.8 * (-1.5 * s).exp()));
    let law = AccuracyLaw::new(0.8, &points).unwrap();
    assert!((law.kappa + 1.5).abs() < 1e-12 && law.largest_error < 1e-12);
    assert!((law.line.slope - 1.5).abs() < 1e-12 && (law.line.intercept + 1.5).abs() < 1e-12);
    let kinked = [(0.1, 0.8), (0.2, 0.8), (0.4, 0.2)];
    assert!(AccuracyLaw::new(0.8, &kinked).unwrap().largest_error > 0.1);
    assert!(AccuracyLaw::new(0.8, &[(0.1, 0.0), (0.2, 0.1)]).is_err());
}

#[test]
fn what_has_no_prediction_is_refused() {
    assert!(predicted_perplexity(9.0, 1.0).is_err());
    assert!(predicted_perplexity(0.9, 0.1).is_err());
    assert!(Law::new(9.0, &[(0.1, 10.0)]).is_err());
    assert!(Law::new(9.0, &[(0.1, 10.0), (0.2, f64::NAN)]).is_err());
}

#[test]
fn another_basis_keeps_the_norms_of_maps_and_the_scores() {
    let (model, data) = (model(DECODER, 3), windows(8, 3));
    let cut = |width| {
        slice(&model, &data, width, false, &Principal, 8)
            .unwrap()
            .model
    };
    let (same, again, half) = (cut(16), cut(16), cut(8));
    assert!(map_changes(&same, &again).unwrap().values().all(|change| {
        (change.spectral - 1.0).abs() < 1e-9 && (change.frobenius - 1.0).abs() < 1e-9
    }));
    let layer = "blocks.0.attention.query";
    let change = map_changes(&same, &half).unwrap()[layer];
    assert!(change.frobenius < 1.0 && change.spectral <= 1.0 + 1e-12);

    let whole = scores(&model, &model, &data, 8).unwrap();
    let turned = scores(&model, &same, &data, 8).unwrap();
    assert!((whole.cosine - 1.0).abs() < 1e-9 && (turned.cosine - 1.0).abs() < 1e-9);
    assert!((whole.length - turned.length).abs() < 1e-9 * whole.length);
    assert!((whole.entropy - turned.entropy).abs() < 1e-9);
    assert!((whole.log_ratio - 1.0).abs() < 1e-12 && (turned.log_ratio - 1.0).abs() < 1e-9);
    let narrow = scores(&model, &half, &data, 8).unwrap();
    // Tokens as the whole model predicts them are less likely in the eyes of any other.
    assert!(narrow.log_ratio > 1.0 + 1e-6, "{}", narrow.log_ratio);
    assert!(narrow.cosine < 0.999 && narrow.entropy > 0.0 && narrow.entropy < 20f64.ln());
}
