//! Dropout of embeddings: what training zeroes before the first block.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Input, Model, ModelSpec, Pass};
use lapidary_signal::Trace;

const WIDTH: usize = 16;

fn model(more: &str) -> Model {
    let spec = format!(
        "width = {WIDTH}
        [input]
        kind = 'tokens'
        vocabulary = 11
        length = 64
        position = {{ kind = 'learned' }}
        {more}
        [[blocks]]
        attention = {{ kind = 'multi-head', heads = 2 }}
        [head]
        kind = 'language-model'"
    );
    let spec: ModelSpec = toml::from_str(&spec).unwrap();
    Model::initialised(spec, 7, DType::F64, &Device::Cpu).unwrap()
}

/// What flows into the first block, of two sequences of 64 tokens.
fn embeddings(model: &Model, dropout_seed: Option<u64>) -> Vec<f64> {
    let ids: Vec<u32> = (0..128u32).map(|i| (i * i + 3) % 11).collect();
    let ids = Tensor::from_vec(ids, (2, 64), &Device::Cpu).unwrap();
    let trace = Trace::new().capture("embeddings").unwrap();
    let pass = Pass {
        trace: Some(&trace),
        dropout_seed,
        ..Pass::default()
    };
    model.forward(&Input::tokens(ids), pass).unwrap();
    let seen = trace.signal("embeddings").unwrap();
    let flat = seen.value().flatten_all().unwrap();
    flat.to_vec1().unwrap()
}

#[test]
fn training_drops_entries_of_embeddings_and_scales_the_rest() {
    const DROPPED: f64 = 0.25;
    for more in ["", "embedding_width = 6", "norm = { kind = 'layer' }"] {
        let dropping = model(&format!("dropout = {DROPPED}\n{more}"));
        let whole = embeddings(&dropping, None);
        assert_eq!(whole, embeddings(&model(more), None), "{more}");
        let found = embeddings(&dropping, Some(5));
        let mut zeros = 0;
        for (found, whole) in found.iter().zip(&whole) {
            match *found == 0.0 {
                true => zeros += 1,
                false => assert!((found - whole / (1.0 - DROPPED)).abs() < 1e-9, "{more}"),
            }
        }
        // Five standard deviations.
        let count = whole.len() as f64;
        let apart = (f64::from(zeros) - DROPPED * count).abs();
        let most = 5.0 * (count * DROPPED * (1.0 - DROPPED)).sqrt();
        assert!(apart < most, "{zeros} of {count}");
        assert_eq!(found, embeddings(&dropping, Some(5)), "{more}");
        assert_ne!(found, embeddings(&dropping, Some(6)), "{more}");
    }
}

#[test]
fn without_a_rate_training_sees_what_evaluation_does() {
    let model = model("");
    assert_eq!(embeddings(&model, None), embeddings(&model, Some(5)));
}

#[test]
fn features_of_embeddings_are_dropped_in_all_tokens_of_a_sequence_alike() {
    const DROPPED: f64 = 0.25;
    const SEEDS: u64 = 50;
    let dropping = model(&format!("dropout = {DROPPED}\ndropout_by_feature = true"));
    let whole = embeddings(&dropping, None);
    assert_eq!(whole, embeddings(&model(""), None));
    assert!(whole.iter().all(|entry| *entry != 0.0));
    let (mut left_out, mut alike) = (0, 0);
    for seed in 0..SEEDS {
        let found = embeddings(&dropping, Some(seed));
        assert_eq!(found, embeddings(&dropping, Some(seed)));
        let mut masks = Vec::new();
        for (found, whole) in found.chunks(64 * WIDTH).zip(whole.chunks(64 * WIDTH)) {
            let zeros: Vec<bool> = found[..WIDTH].iter().map(|entry| *entry == 0.0).collect();
            for (at, (found, whole)) in found.iter().zip(whole).enumerate() {
                let expected = match zeros[at % WIDTH] {
                    true => 0.0,
                    false => whole / (1.0 - DROPPED),
                };
                assert!((found - expected).abs() < 1e-9, "{found} {expected}");
            }
            left_out += zeros.iter().filter(|zero| **zero).count();
            masks.push(zeros);
        }
        alike += usize::from(masks[0] == masks[1]);
    }
    // Five standard deviations; sequences are independent of each other.
    let count = (SEEDS as usize * 2 * WIDTH) as f64;
    let apart = (left_out as f64 - DROPPED * count).abs();
    assert!(
        apart < 5.0 * (count * DROPPED * (1.0 - DROPPED)).sqrt(),
        "{left_out} of {count}"
    );
    assert!(alike < SEEDS as usize / 10, "{alike}");
    let spec = toml::to_string(model("").spec()).unwrap();
    assert!(!spec.contains("dropout_by_feature"), "{spec}");
}
