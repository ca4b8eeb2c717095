//! Bases: what they leave as it is, and what the principal ones keep.

use std::collections::BTreeMap;

use super::{ALL, PARALLEL, PROJECTED, RECURRENT, confined, cut};
use crate::common::{DECODER, GATED, altered, close, distance, model, scores, values, windows};
use lapidary_compress::slicing::{
    Coordinates, Directions, Leading, Principal, Random, Selector, Sliced, Trailing, Transport,
    orthonormal, slice,
};
use lapidary_factor::Matrix;
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::Model;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

#[test]
fn another_basis_of_the_same_width_changes_no_score() {
    let sharp = Transport {
        temperature: 1e-3,
        ..Transport::default()
    };
    for (name, spec) in ALL {
        let (model, data) = (model(spec, 5), windows(6, 5));
        let before = scores(&model, &data);
        let ways: [&dyn Directions; 4] = [&Principal, &Trailing, &Random::new(3), &sharp];
        for way in ways {
            for shared in [false, true] {
                let sliced = slice(&model, &data, 16, shared, way, 8).unwrap();
                let spec = sliced.model.spec();
                assert!(spec.expanded_blocks().iter().all(|b| b.shortcuts != shared));
                let after = scores(&sliced.model, &data);
                let apart = distance(&after, &before);
                assert!(apart < 1e-10, "{name}, shared {shared}: {apart:e}");
            }
        }
    }
}

#[test]
fn single_precision_is_rounded_once() {
    let (exact, data) = (model(DECODER, 5), windows(6, 5));
    let mut parameters: BTreeMap<String, Tensor> = exact.parameters().clone();
    for tensor in parameters.values_mut() {
        *tensor = tensor.to_dtype(DType::F32).unwrap();
    }
    let model = Model::new(exact.spec().clone(), &mut parameters).unwrap();
    let sliced = cut(&model, &data, 16, &Principal);
    assert_eq!(sliced.dtype(), DType::F32);
    close(&scores(&sliced, &data), &scores(&model, &data), 1e-4);
}

/// A projection to `rank` random directions; `through_ones` has the constant vector among them.
fn projection(rank: usize, through_ones: bool) -> Tensor {
    let mut generator = ChaCha8Rng::seed_from_u64(rank as u64);
    let start: Vec<f64> = (0..16 * rank)
        .map(|_| generator.random_range(-1.0..1.0))
        .collect();
    let matrix = Matrix::from_fn(16, rank, |i, k| match through_ones && k == 0 {
        true => 1.0,
        false => start[i * rank + k],
    });
    let (q, found, _) = orthonormal(&matrix);
    assert_eq!(found, rank);
    lapidary_factor::matrix_to_tensor((&q * q.transpose()).as_ref(), DType::F64, &Device::Cpu)
        .unwrap()
}

#[test]
fn a_stream_of_low_rank_is_cut_without_loss_and_only_to_its_rank() {
    for (name, spec) in ALL {
        let centred = spec.contains("kind = \"layer\"");
        // The mean is taken out of it, so that one direction less is left.
        let map = projection(10, centred);
        let (model, data) = (confined(&model(spec, 6), &map), windows(12, 6));
        let before = scores(&model, &data);
        let rank = if centred { 9 } else { 10 };
        for width in [rank, 12] {
            let sliced = slice(&model, &data, width, false, &Principal, 4).unwrap();
            assert_eq!(sliced.model.spec().width, width);
            let apart = distance(&scores(&sliced.model, &data), &before);
            assert!(apart < 1e-8, "{name} at {width}: {apart:e}");
            assert!(sliced.kept.iter().all(|kept| (kept - 1.0).abs() < 1e-9));
            let shared = slice(&model, &data, width, true, &Principal, 4).unwrap();
            let apart = distance(&scores(&shared.model, &data), &before);
            assert!(apart < 1e-8, "{name} at {width}, shared: {apart:e}");
        }
        let narrower = cut(&model, &data, 5, &Principal);
        let apart = distance(&scores(&narrower, &data), &before);
        assert!(apart > 1e-3, "{name}: {apart:e}");
    }
}

#[test]
fn a_norm_over_the_narrow_width_is_noticed() {
    let map = projection(10, false);
    let (model, data) = (confined(&model(GATED, 6), &map), windows(12, 6));
    let sliced = cut(&model, &data, 12, &Principal);
    let gain = values(&sliced.parameters()["blocks.0.attention_norm.weight"]);
    assert!(
        gain.iter()
            .all(|g| (g - (16f64 / 12.0).sqrt()).abs() < 1e-12)
    );
    let wrong = altered(&sliced, "blocks.0.attention_norm.weight", |w| {
        w.ones_like().unwrap()
    });
    let apart = distance(&scores(&wrong, &data), &scores(&model, &data));
    assert!(apart > 1e-3, "{apart:e}");
}

#[test]
fn principal_directions_keep_the_most() {
    let (model, data) = (model(DECODER, 7), windows(12, 7));
    for width in [4, 8, 12] {
        let kept = |by: &dyn Directions| slice(&model, &data, width, true, by, 8).unwrap();
        let best = kept(&Principal);
        let total = |sliced: &Sliced| sliced.kept.iter().sum::<f64>();
        for seed in 0..20 {
            assert!(total(&kept(&Random::new(seed))) < total(&best));
        }
        let features = Coordinates {
            selector: Selector::Magnitude,
        };
        assert!(total(&kept(&features)) < total(&best));
        assert!(total(&kept(&Trailing)) < total(&kept(&features)));
        for sliced in [
            best,
            slice(&model, &data, width, false, &Principal, 8).unwrap(),
        ] {
            for basis in &sliced.bases {
                let product = basis.transpose() * basis;
                assert!((product - Matrix::identity(width, width)).norm_max() < 1e-12);
            }
        }
    }
}

#[test]
fn a_random_orientation_within_the_directions_cancels() {
    for spec in [DECODER, PARALLEL] {
        let (model, data) = (model(spec, 8), windows(8, 8));
        let plain = cut(&model, &data, 10, &Principal);
        let turned = cut(&model, &data, 10, &Leading(Principal, 4));
        let weight = "blocks.0.attention.query.weight";
        let weights = |model: &Model| values(&model.parameters()[weight]);
        assert!(distance(&weights(&turned), &weights(&plain)) > 1e-2);
        close(&scores(&turned, &data), &scores(&plain, &data), 1e-9);
    }
}

#[test]
fn padding_is_not_looked_at() {
    for spec in [DECODER, PROJECTED] {
        let (model, data) = (model(spec, 9), windows(8, 9));
        let with = |batch| {
            let sliced = slice(&model, &data, 10, false, &Principal, batch).unwrap();
            scores(&sliced.model, &data)
        };
        close(&with(8), &with(1), 1e-9);
    }
}

#[test]
fn the_stream_of_a_narrower_model_is_the_projected_stream_of_the_whole_one() {
    for spec in [DECODER, PARALLEL, RECURRENT] {
        let (model, data) = (model(spec, 16), windows(8, 16));
        for shared in [false, true] {
            let same = slice(&model, &data, 16, shared, &Principal, 8).unwrap();
            let drifts = same.drift(&model, &data, 8).unwrap();
            assert_eq!(drifts.len(), same.kept.len());
            for drift in drifts {
                assert!((drift.length - 1.0).abs() < 1e-9, "{drift:?}");
                assert!((drift.cosine - 1.0).abs() < 1e-9, "{drift:?}");
            }
            let half = slice(&model, &data, 8, shared, &Principal, 8).unwrap();
            let drifts = half.drift(&model, &data, 8).unwrap();
            assert_eq!(drifts[0].path, "embeddings");
            // A projection: the embeddings lose length, and turn by as much.
            assert!((drifts[0].length - drifts[0].cosine).abs() < 1e-9);
            assert!(drifts[0].length < 1.0);
        }
    }
}
