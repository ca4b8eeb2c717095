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
