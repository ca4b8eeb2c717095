//! Reversible blocks: what they compute, that gradients are those of remembered streams, and that
//! memory does not grow with the number of blocks.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use lapidary_kernels::{DType, Device, Recomputation, Tensor};
use lapidary_model::{Initialiser, Input, Model, ModelSpec, Pass};
use lapidary_parts::state::DecodeState;
use lapidary_signal::Trace;

/// The system's allocator, with what is held and the most that was.
struct Watching;

static HELD: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);
/// One measurement at a time, and nothing beside it.
static ALONE: Mutex<()> = Mutex::new(());

// SAFETY: every call is passed on as it is.
unsafe impl GlobalAlloc for Watching {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let held = HELD.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        MOST.fetch_max(held, Ordering::Relaxed);
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Ordering::Relaxed);
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Watching = Watching;

fn alone() -> std::sync::MutexGuard<'static, ()> {
    ALONE
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn spec(blocks: usize, length: usize, attention: &str) -> ModelSpec {
    let text = format!(
        "width = 16
        organisation = {{ kind = 'reversible' }}
        [input]
        kind = 'tokens'
        vocabulary = 11
        length = {length}
        [[blocks]]
        repeat = {blocks}
        dropout = 0.1
        attention = {{ kind = 'multi-head', heads = 2, causal = true{attention} }}
        feedforward = {{ kind = 'dense', hidden = 32 }}
        [head]
        kind = 'language-model'"
    );
    toml::from_str(&text).unwrap()
}

fn model(spec: ModelSpec, dtype: DType) -> Model {
    Model::trainable(spec, &mut Initialiser::new(3, dtype, Device::Cpu)).unwrap()
}

fn ids(length: usize) -> Tensor {
    let ids: Vec<u32> = (0..2 * length as u32)
        .map(|i| (i * i + 3 * i) % 11)
        .collect();
    Tensor::from_vec(ids, (2, length), &Device::Cpu).unwrap()
}

/// The logits, and the gradient of each parameter of the mean of their squares.
fn gradients(model: &Model, length: usize, recompute: bool) -> (Tensor, BTreeMap<String, Tensor>) {
    let variables = model.variables().values();
    let recomputation = recompute.then(|| Recomputation::of(variables));
    let pass = Pass {
        dropout_seed: Some(4),
        draw: Some(9),
        recomputation: recomputation.as_ref(),
        ..Pass::default()
    };
    let output = model.forward(&Input::tokens(ids(length)), pass).unwrap();
    let logits = output.into_logits().unwrap().into_value();
    let mut store = logits
        .sqr()
        .unwrap()
        .mean_all()
        .unwrap()
        .backward()
        .unwrap();
    if let Some(recomputation) = &recomputation {
        recomputation.add_to(&mut store).unwrap();
    }
    let variables = model.variables().iter();
    let found = variables.map(|(name, variable)| {
        let gradient = store.get(variable.as_tensor()).unwrap();
        (name.clone(), gradient.clone())
    });
    (logits.detach(), found.collect())
}

fn largest(x: &Tensor) -> f64 {
    let all = x.to_dtype(DType::F64).unwrap().abs().unwrap();
    let all = all.flatten_all().unwrap();
    all.max(0).unwrap().to_scalar::<f64>().unwrap()
}

/// The largest difference over the largest entry.
fn difference(a: &Tensor, b: &Tensor) -> f64 {
    largest(&(a - b).unwrap()) / largest(a).max(f64::MIN_POSITIVE)
}

#[test]
fn one_block_is_the_mean_of_two_streams() {
    let _alone = alone();
    let mut spec = spec(1, 8, "");
    spec.blocks[0].dropout = 0.0;
    let reversible = model(spec.clone(), DType::F64);
    spec.organisation = None;
    let plain = model(spec, DType::F64);
    let names = |model: &Model| model.parameters().keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&reversible), names(&plain));
    let sites = [
        "embeddings",
        "blocks.0.attention.out",
        "blocks.0.feedforward.out",
        "final_norm",
    ];
    let seen = |model: &Model| {
        let trace = sites
            .iter()
            .fold(Trace::new(), |trace, site| trace.capture(site).unwrap());
        let pass = Pass {
            trace: Some(&trace),
            ..Pass::default()
        };
        model.forward(&Input::tokens(ids(8)), pass).unwrap();
        sites.map(|site| trace.signal(site).unwrap().value().clone())
    };
    // A first block sees the same twice: F(N(x + A(N x))) in both wirings.
    let [x, attended, transformed, out] = seen(&reversible);
    let [_, usual, fed, _] = seen(&plain);
    assert!(difference(&usual, &attended) < 1e-12);
    assert!(difference(&fed, &transformed) < 1e-12);
    let moved = (((attended + transformed).unwrap() / 2.0).unwrap() + x).unwrap();
    assert!(difference(&out, &moved) < 1e-12);
}

#[test]
fn gradients_are_those_of_remembered_streams() {
    let _alone = alone();
    let reformer = ", sharing = 'query-key', mechanism = { kind = 'reformer', chunk = 4, rounds = 2, \
                    buckets = [6] }";
    for attention in ["", reformer] {
        for (dtype, tolerance) in [(DType::F64, 1e-9), (DType::F32, 1e-4)] {
            let model = model(spec(12, 16, attention), dtype);
            let (stored, expected) = gradients(&model, 16, false);
            let (logits, found) = gradients(&model, 16, true);
            assert!(difference(&stored, &logits) < tolerance, "{attention}");
            assert_eq!(found.len(), model.variables().len());
            // Of a bias that softmax does not see there is no gradient but what rounding leaves.
            let whole = expected.values().map(largest).fold(0.0, f64::max);
            for (name, gradient) in &expected {
                let apart = largest(&(gradient - &found[name]).unwrap()) / whole;
                assert!(apart < tolerance, "{name}{attention}: {apart:e}");
            }
        }
    }
}

/// Most bytes that a step holds beside the parameters.
fn most(blocks: usize, recompute: bool) -> usize {
    let length = 512;
    let model = model(spec(blocks, length, ""), DType::F32);
    // Whatever is made once and kept.
    gradients(&model, length, recompute);
    let before = HELD.load(Ordering::SeqCst);
    MOST.store(before, Ordering::SeqCst);
    gradients(&model, length, recompute);
    MOST.load(Ordering::SeqCst) - before
}

#[test]
fn memory_does_not_grow_with_the_blocks() {
    let _alone = alone();
    let (few, many) = (most(6, true), most(24, true));
    // Each block has its parameters' gradients, 10 KiB here.
    assert!(
        (many as f64) < 1.1 * few as f64 + (18 * 12_000) as f64,
        "{few} {many}"
    );
    let stored = most(24, false);
    assert!((many as f64) <= 0.25 * stored as f64, "{many} of {stored}");
}

#[test]
fn decoding_goes_on_from_states() {
    let _alone = alone();
    let model = model(spec(3, 12, ""), DType::F64);
    let all = ids(12);
    let run = |ids: Tensor, state: Option<&mut DecodeState>| {
        let pass = Pass {
            state,
            ..Pass::default()
        };
        let output = model.forward(&Input::tokens(ids), pass).unwrap();
        output.into_logits().unwrap().into_value()
    };
    let whole = run(all.clone(), None);
    let mut state = model.decode_state();
    for (start, length) in [(0, 5), (5, 1), (6, 6)] {
        let step = run(
            all.narrow(1, start, length).unwrap().contiguous().unwrap(),
            Some(&mut state),
        );
        let expected = whole.narrow(1, start, length).unwrap();
        assert!(difference(&expected, &step) < 1e-12, "from {start}");
    }
}

#[test]
fn what_cannot_be_had_back_is_refused() {
    let _alone = alone();
    type Change = fn(&mut ModelSpec);
    let changes: [(&str, Change); 4] = [
        ("blocks.0.wiring", |spec| {
            spec.blocks[0].wiring = lapidary_parts::block::Wiring::PostNorm;
        }),
        ("blocks.0.feedforward", |spec| {
            spec.blocks[0].feedforward = None
        }),
        ("blocks.0.attention.kind", |spec| {
            spec.blocks[0].attention = lapidary_parts::attention::MixerSpec::Absent;
        }),
        ("blocks.0.shortcuts", |spec| spec.blocks[0].shortcuts = true),
    ];
    for (field, change) in changes {
        let mut spec = spec(2, 8, "");
        change(&mut spec);
        let error = spec.validate().unwrap_err().to_string();
        assert!(error.contains(field), "{error}");
    }
}
