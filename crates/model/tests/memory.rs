//! What passes hold in memory: that what is recomputed, taken in chunks or shared is not held, counted in
//! allocated bytes.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::alloc::System;
use std::sync::Mutex;

use lapidary_kernels::memory::{Counting, most_held};
use lapidary_kernels::{DType, Device, Recomputation, Tensor};
use lapidary_model::gguf::{GgufFloat, write_gguf};
use lapidary_model::{Initialiser, Input, Model, ModelSpec, Package, Pass};

#[global_allocator]
static ALLOCATOR: Counting<System> = Counting(System);

/// One measurement at a time, and nothing beside it.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> std::sync::MutexGuard<'static, ()> {
    ALONE
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// A decoder of width 16 with `blocks` blocks, of which the attention and the feed-forward part are told
/// more.
fn model(blocks: usize, length: usize, [organisation, attention, feedforward]: [&str; 3]) -> Model {
    let text = format!(
        "width = 16
        {organisation}
        [input]
        kind = 'tokens'
        vocabulary = 11
        length = {length}
        [[blocks]]
        repeat = {blocks}
        dropout = 0.1
        attention = {{ kind = 'multi-head', heads = 2{attention} }}
        feedforward = {{ kind = 'dense', {feedforward} }}
        [head]
        kind = 'pooled'
        pool = 'mean'
        labels = 3"
    );
    let spec: ModelSpec = toml::from_str(&text).unwrap();
    Model::trainable(spec, &mut Initialiser::new(3, DType::F32, Device::Cpu)).unwrap()
}

fn input(length: usize) -> Input {
    let ids: Vec<u32> = (0..2 * length as u32)
        .map(|i| (i * i + 3 * i) % 11)
        .collect();
    Input::tokens(Tensor::from_vec(ids, (2, length), &Device::Cpu).unwrap())
}

/// One step of training: a pass, and its gradients.
fn step(model: &Model, length: usize, recompute: bool) {
    let recomputation = recompute.then(|| Recomputation::of(model.variables().values()));
    let pass = Pass {
        dropout_seed: Some(4),
        draw: Some(9),
        recomputation: recomputation.as_ref(),
        ..Pass::default()
    };
    let output = model.forward(&input(length), pass).unwrap();
    let logits = output.into_logits().unwrap().into_value();
    let loss = logits.sqr().unwrap().mean_all().unwrap();
    let mut store = loss.backward().unwrap();
    if let Some(recomputation) = &recomputation {
        recomputation.add_to(&mut store).unwrap();
    }
}

/// Most bytes that `run` holds beside what was there before.
fn most(run: impl Fn()) -> usize {
    // Whatever is made once and kept.
    run();
    most_held(run).1.unwrap()
}

const REVERSIBLE: &str = "organisation = { kind = 'reversible' }";
const CAUSAL: &str = ", causal = true";

#[test]
fn memory_of_reversible_blocks_does_not_grow_with_their_number() {
    let _alone = alone();
    let length = 512;
    let of = |blocks, recompute| {
        let model = model(blocks, length, [REVERSIBLE, CAUSAL, "hidden = 32"]);
        most(|| step(&model, length, recompute))
    };
    let (few, many) = (of(6, true), of(24, true));
    // Each block has its parameters' gradients, 10 KiB here.
    assert!(
        (many as f64) < 1.1 * few as f64 + (18 * 12_000) as f64,
        "{few} {many}"
    );
    let stored = of(24, false);
    assert!((many as f64) <= 0.25 * stored as f64, "{many} of {stored}");
}

#[test]
fn chunks_hold_the_inside_of_feed_forward_parts_one_at_a_time() {
    let _alone = alone();
    let (length, hidden) = (1024, 1024);
    let inside = 4 * 2 * length * hidden;
    let feedforward = format!("hidden = {hidden}");
    let of = |chunk: &str| {
        let organisation = format!("organisation = {{ kind = 'reversible'{chunk} }}");
        let model = model(2, length, [&organisation, CAUSAL, &feedforward]);
        // Of a model that is trained a pass remembers everything for its gradients.
        let fixed = Model::initialised(model.spec().clone(), 3, DType::F32, &Device::Cpu).unwrap();
        let evaluated = most(|| {
            fixed.forward(&input(length), Pass::default()).unwrap();
        });
        [evaluated, most(|| step(&model, length, true))]
    };
    let (whole, chunked) = (of(""), of(", chunk = 64"));
    // A step of training holds the inside of a part several times: with its activation, their gradients,
    // and what is dropped.
    for (whole, chunked, bound) in [
        (whole[0], chunked[0], inside / 2),
        (whole[1], chunked[1], inside),
    ] {
        assert!(whole > 2 * inside, "{whole} with {inside} inside");
        assert!(chunked < bound, "{chunked} with {inside} inside");
    }
}

/// Of cosine units, which have no straight pieces and are laid out: other biases hold next to nothing.
#[test]
fn a_shared_bias_is_held_once() {
    let _alone = alone();
    let length = 256;
    let bias = 4 * 2 * length * length;
    let of = |blocks, shared: bool| {
        let attention = format!(
            "{CAUSAL}, position = {{ kind = 'fire', hidden = 4, layers = 1, initial_length = 16, \
             activation = 'cosine', shared = {shared} }}"
        );
        let model = model(blocks, length, ["", &attention, "hidden = 16"]);
        most(|| step(&model, length, false))
    };
    let grown = |shared| of(7, shared) - of(2, shared);
    let (own, shared) = (grown(false), grown(true));
    // Five more layers have five more biases, or none.
    assert!(own - shared > 4 * bias, "{own} {shared}, a bias has {bias}");
}

/// Beyond the length up to which it is a function of the distance.
#[test]
fn a_bias_of_a_network_lays_out_no_hidden_units() {
    let _alone = alone();
    let length = 256;
    let of = |hidden| {
        let attention = format!(
            "{CAUSAL}, position = {{ kind = 'fire', hidden = {hidden}, initial_length = 16 }}"
        );
        let model = model(2, length, ["", &attention, "hidden = 16"]);
        most(|| step(&model, length, false))
    };
    // Sixteen times as many do not take what two of them would for each query and key.
    let (narrow, wide) = (of(4), of(64));
    let two = 2 * 4 * length * length;
    assert!(wide < narrow + two, "{wide} {narrow}, two units have {two}");
}

#[test]
fn compressed_blocks_that_are_recomputed_are_not_held() {
    let _alone = alone();
    let (length, hidden) = (1024, 512);
    let feedforward = format!("hidden = {hidden}");
    let vcc = "organisation = { kind = 'vip-centric', segment_blocks = 0, vips = 16, size = 16, fine = 16 }";
    let of = |recompute| {
        let model = model(8, length, [vcc, "", &feedforward]);
        most(|| step(&model, length, recompute))
    };
    // 16 blocks in full, 47 means and the VIPs of both sequences, in each of 8 blocks.
    let inside = 8 * 4 * 2 * (16 * 16 + 47 + 16) * hidden;
    let (stored, recomputed) = (of(false), of(true));
    assert!(stored > inside, "{stored} with {inside} inside");
    assert!(recomputed < stored / 2, "{recomputed} of {stored}");
}

/// Of many blocks a pass that recomputes them holds the inputs, and the inside of one at a time.
#[test]
fn recomputed_sparse_blocks_are_not_held() {
    let _alone = alone();
    let (length, blocks) = (512, 24);
    let pattern = "{ kind = 'strided', stride = 16 }";
    let sparse = format!("{CAUSAL}, mechanism = {{ kind = 'sparse', pattern = {pattern} }}");
    let of = |recompute| {
        let model = model(blocks, length, ["", &sparse, "hidden = 512"]);
        most(|| step(&model, length, recompute))
    };
    let (stored, recomputed) = (of(false), of(true));
    assert!(3 * recomputed <= stored, "{recomputed} of {stored}");
}

#[test]
fn a_gguf_file_is_written_a_tensor_at_a_time() {
    let _alone = alone();
    // A matrix takes a mebibyte, as the buffer before the file does.
    let (width, hidden) = (256, 1024);
    let text = format!(
        "width = {width}
        final_norm = {{ kind = 'rms' }}
        [input]
        kind = 'tokens'
        vocabulary = 11
        length = 8
        [[blocks]]
        repeat = 8
        norm = {{ kind = 'rms' }}
        attention = {{ kind = 'multi-head', heads = 4, bias = false, causal = true, position = {{ kind = 'rotary' }} }}
        feedforward = {{ kind = 'gated', hidden = {hidden} }}
        [head]
        kind = 'language-model'"
    );
    let spec: ModelSpec = toml::from_str(&text).unwrap();
    let model = Model::initialised(spec, 3, DType::F32, &Device::Cpu).unwrap();
    let package = Package::new(model, None);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    let held = most(|| {
        write_gguf(&package, &path, GgufFloat::F32).unwrap();
    });
    let tensor = 4 * width * hidden;
    let file = std::fs::metadata(&path).unwrap().len() as usize;
    assert!(file > 24 * tensor, "{file} with tensors of {tensor}");
    assert!(held < 4 * tensor, "{held} with tensors of {tensor}");
}
