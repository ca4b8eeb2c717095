//! What a loss in chunks holds in memory, counted in allocated bytes: never the scores of all positions.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::alloc::System;

use lapidary_kernels::memory::{Counting, largest_piece, most_held};
use lapidary_kernels::{DType, Device, Recomputation};
use lapidary_model::{Initialiser, Model, Pass};
use lapidary_train::data::Batch;
use lapidary_train::{batch_loss, batch_loss_in_chunks};

#[global_allocator]
static ALLOCATOR: Counting<System> = Counting(System);

#[test]
fn scores_of_all_positions_are_never_held() {
    let (length, vocabulary, chunk) = (1024, 4096, 32);
    let text = format!(
        r#"{{
            "width": 16,
            "input": {{ "kind": "tokens", "vocabulary": {vocabulary}, "length": {length} }},
            "blocks": [{{
                "repeat": 1,
                "attention": {{ "kind": "multi-head", "heads": 2, "causal": true }},
                "feedforward": {{ "kind": "dense", "hidden": 16 }}
            }}],
            "head": {{ "kind": "language-model" }}
        }}"#
    );
    let spec = serde_json::from_str(&text).unwrap();
    let mut source = Initialiser::new(5, DType::F32, Device::Cpu);
    let model = Model::trainable(spec, &mut source).unwrap();
    let ids = |factor: u32| (0..length as u32).map(move |i| i * factor % vocabulary as u32);
    let batch = Batch {
        rows: 1,
        length,
        inputs: ids(7).collect(),
        targets: ids(13).collect(),
    };
    let step = |in_chunks: bool| {
        let recomputation = Recomputation::of(model.variables().values());
        let pass = Pass::default();
        let loss = match in_chunks {
            true => batch_loss_in_chunks(&model, &batch, pass, chunk, &recomputation),
            false => batch_loss(&model, &batch, pass),
        };
        let mut store = loss.unwrap().backward().unwrap();
        recomputation.add_to(&mut store).unwrap();
    };
    // Whatever is made once and kept.
    step(true);
    let scores = 4 * length * vocabulary;
    let measured = |in_chunks| {
        let most = most_held(|| step(in_chunks)).1.unwrap();
        let largest = largest_piece(|| step(in_chunks)).1.unwrap();
        (most, largest)
    };
    let (whole, chunked) = (measured(false), measured(true));
    // The scores, and their gradient.
    assert!(whole.0 >= 2 * scores && whole.1 >= scores, "{whole:?}");
    // Chunks of a 32nd, a table of a 64th and its gradients, and what the block remembers.
    assert!(chunked.1 <= scores / 16, "{chunked:?} of {scores}");
    assert!(chunked.0 < whole.0 / 3, "{chunked:?} of {whole:?}");
}
