//! The exact properties of sparse autoencoders: training, splicing, attribution.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod attribution;
mod training;

use crate::common::{DECODER, ENCODER, GATED, generator, model, tokens};
use lapidary_explain::autoencoder::{
    Autoencoder, Edit, Quality, Replacement, edited, load, recovery, save, splice,
};
use lapidary_kernels::check::difference;
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Model, Pass};
use lapidary_signal::Trace;
use rand::RngExt;

const IDS: [u32; 7] = [3, 11, 5, 0, 19, 7, 3];

const SITE: &str = "blocks.1.attention.mixed";

/// An autoencoder of a width of 16 whose every parameter matters, in f64.
fn lively(site: &str, features: usize, seed: u64) -> Autoencoder {
    let mut generator = generator(seed);
    let mut of = |shape: &[usize]| {
        let count: usize = shape.iter().product();
        let values: Vec<f64> = (0..count)
            .map(|_| generator.random_range(-0.5..0.5))
            .collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    };
    Autoencoder::new(
        site,
        of(&[features, 16]),
        of(&[features]),
        of(&[features, 16]),
        of(&[16]),
    )
    .unwrap()
}

fn logits(model: &Model, trace: Option<&Trace>) -> Tensor {
    let pass = Pass {
        trace,
        ..Pass::default()
    };
    let output = model.forward(&tokens(&IDS), pass).unwrap();
    output.into_logits().unwrap().into_value()
}

fn value_at(model: &Model, site: &str) -> Tensor {
    let trace = Trace::new().capture(site).unwrap();
    logits(model, Some(&trace));
    trace.signal(site).unwrap().into_value()
}

fn numbers(tensor: &Tensor) -> Vec<f64> {
    let flat = tensor.flatten_all().unwrap().to_dtype(DType::F64).unwrap();
    flat.to_vec1::<f64>().unwrap()
}

#[test]
fn changing_no_feature_changes_no_bit() {
    for (spec, seed) in [(DECODER, 10), (GATED, 11), (ENCODER, 12)] {
        let model = model(spec, seed);
        let autoencoder = lively(SITE, 24, seed);
        let trace = splice(Trace::new(), &autoencoder, |features| Ok(features.clone())).unwrap();
        let clean = logits(&model, None);
        assert_eq!(
            difference(&logits(&model, Some(&trace)), &clean).unwrap(),
            0.0
        );
        // The reconstruction with its error added is the same number, but for rounding.
        let x = value_at(&model, SITE);
        let reconstruction = autoencoder.reconstruct(&x).unwrap();
        let again = (&reconstruction + (&x - &reconstruction).unwrap()).unwrap();
        assert!(difference(&again, &x).unwrap() < 1e-12);
    }
}

#[test]
fn edits_change_what_they_name_and_nothing_else() {
    let model = model(DECODER, 13);
    let autoencoder = lively(SITE, 24, 13);
    let x = value_at(&model, SITE);
    let features = autoencoder.encode(&x).unwrap();
    let edits = vec![
        Edit::zero(2).at([1, 4]),
        Edit::pin(5, 3.0),
        Edit {
            feature: 6,
            positions: Some(vec![0]),
            value: Replacement::From((&features + 1.0).unwrap()),
        },
    ];
    let wanted = edited(&features, &edits).unwrap();
    let (before, after) = (
        features.get(0).unwrap().to_vec2::<f64>().unwrap(),
        wanted.get(0).unwrap().to_vec2::<f64>().unwrap(),
    );
    for position in 0..7 {
        for feature in 0..24 {
            let expected = match (feature, position) {
                (2, 1 | 4) => 0.0,
                (5, _) => 3.0,
                (6, 0) => before[position][feature] + 1.0,
                _ => before[position][feature],
            };
            assert_eq!(after[position][feature], expected);
        }
    }
    let trace = splice(Trace::new(), &autoencoder, move |f| edited(f, &edits))
        .unwrap()
        .capture(SITE)
        .unwrap();
    logits(&model, Some(&trace));
    let spliced = trace.signal(SITE).unwrap().into_value();
    // x̂(f') + (x − x̂(f))
    let error = (&x - autoencoder.decode(&features).unwrap()).unwrap();
    let expected = (autoencoder.decode(&wanted).unwrap() + error).unwrap();
    assert!(difference(&spliced, &expected).unwrap() < 1e-12);
    for wrong in [Edit::zero(24), Edit::zero(0).at([7])] {
        assert!(edited(&features, &[wrong]).is_err());
    }
    let wrong = splice(Trace::new(), &autoencoder, |f| edited(f, &[Edit::zero(24)])).unwrap();
    let pass = Pass {
        trace: Some(&wrong),
        ..Pass::default()
    };
    assert!(model.forward(&tokens(&IDS), pass).is_err());
}

#[test]
fn zeros_recover_nothing_and_the_value_everything() {
    for (spec, seed) in [(DECODER, 14), (GATED, 15)] {
        let model = model(spec, seed);
        let windows = vec![IDS.to_vec(), vec![1, 2, 3, 4, 5]];
        let zeros = recovery(&model, SITE, &windows, |x| Ok(x.zeros_like()?)).unwrap();
        assert_eq!(zeros.recovered(), 0.0);
        let same = recovery(&model, SITE, &windows, |x| Ok(x.clone())).unwrap();
        assert_eq!(same.recovered(), 1.0);
        assert_eq!(same.increase(), 0.0);
        // Mean over predicted tokens, windows of unequal length included.
        let one = recovery(&model, SITE, &windows[..1], |x| Ok(x.clone())).unwrap();
        let two = recovery(&model, SITE, &windows[1..], |x| Ok(x.clone())).unwrap();
        let together = (6.0 * one.clean + 4.0 * two.clean) / 10.0;
        assert!((same.clean - together).abs() < 1e-12);
        let elsewhere = recovery(&model, "blocks.7.out", &windows, |x| Ok(x.clone()));
        assert!(elsewhere.is_err());
    }
    let encoder = model(ENCODER, 16);
    assert!(recovery(&encoder, SITE, &[IDS.to_vec()], |x| Ok(x.clone())).is_err());
}

#[test]
fn quality_counts_what_is_active() {
    let model = model(DECODER, 17);
    let autoencoder = lively(SITE, 24, 17);
    let quality = Quality::of(&model, &autoencoder, &[IDS.to_vec()]).unwrap();
    let features = autoencoder.encode(&value_at(&model, SITE)).unwrap();
    let active = numbers(&features).iter().filter(|f| **f > 0.0).count();
    assert!((quality.l0 - active as f64 / 7.0).abs() < 1e-12);
    assert_eq!(quality.tokens, 7);
    let dead = quality.frequencies.iter().filter(|f| **f == 0.0).count();
    assert_eq!(quality.dead, dead as f64 / 24.0);
    let in_bins: usize = quality.histogram().iter().map(|(_, count)| count).sum();
    assert_eq!(in_bins, 24 - dead);
}

#[test]
fn no_features_reconstruct_the_bias() {
    let autoencoder = lively(SITE, 24, 18);
    let none = Tensor::zeros((3, 24), DType::F64, &Device::Cpu).unwrap();
    let decoded = autoencoder.decode(&none).unwrap();
    let bias = autoencoder
        .weights()
        .decoder_bias
        .broadcast_as((3, 16))
        .unwrap();
    assert_eq!(difference(&decoded, &bias).unwrap(), 0.0);
}

fn random(rows: usize, width: usize, seed: u64) -> Tensor {
    let mut generator = generator(seed);
    let values: Vec<f32> = (0..rows * width)
        .map(|_| generator.random_range(-1.0..1.0))
        .collect();
    Tensor::from_vec(values, (rows, width), &Device::Cpu).unwrap()
}

#[test]
fn what_is_saved_is_read_again_bit_for_bit() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("sae");
    let autoencoder = Autoencoder::initialised(SITE, 16, 40, &mut generator(23)).unwrap();
    save(&autoencoder, &path).unwrap();
    let again = load(&path, None).unwrap();
    assert_eq!(again.site(), SITE);
    let (a, b) = (autoencoder.weights(), again.weights());
    for (a, b) in [
        (a.encoder, b.encoder),
        (a.encoder_bias, b.encoder_bias),
        (a.decoder, b.decoder),
        (a.decoder_bias, b.decoder_bias),
    ] {
        assert_eq!(difference(a, b).unwrap(), 0.0);
    }
    assert!(
        save(&autoencoder, &path).is_err(),
        "a directory with files is kept"
    );
}
