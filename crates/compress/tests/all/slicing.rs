//! The residual stream in other bases, and made narrower.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;

use crate::common;
use crate::common::{
    DECODER, ENCODER, GATED, altered, close, distance, model, scores, values, windows,
};
use lapidary_compress::slicing::{
    Choice, Coordinates, Directions, Distance, Leading, Principal, Random, Selector, SliceSettings,
    Stream, Trailing, Transport, orthonormal, parameters_after, slice, transport_plan,
};
use lapidary_compress::{
    Budget, CalibrationData, Change, Compressed, Content, Example, Method, Plan, Settings, Target,
    Task,
};
use lapidary_factor::Matrix;
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Input, Model, OpenOptions, Package, Pass};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// As GPT-NeoX: attention and feed-forward part side by side, two layer norms.
const PARALLEL: &str = r#"
width = 16
final_norm = { kind = "layer" }
[input]
kind = "tokens"
vocabulary = 20
length = 12
[[blocks]]
repeat = 2
wiring = "parallel"
attention = { kind = "multi-head", heads = 4, causal = true, position = { kind = "rotary" } }
feedforward = { kind = "dense", hidden = 24 }
[head]
kind = "language-model"
tied = false
"#;

/// Experts behind RMS norms.
const MIXTURE: &str = r#"
width = 16
final_norm = { kind = "rms" }
[input]
kind = "tokens"
vocabulary = 20
length = 12
[[blocks]]
norm = { kind = "rms" }
attention = { kind = "multi-head", heads = 4, causal = true, bias = false, position = { kind = "rotary" } }
feedforward = { kind = "mixture", hidden = 10, experts = 3, active = 2 }
[head]
kind = "language-model"
"#;

/// As Mamba, whose only part is a recurrence.
const RECURRENT: &str = r#"
width = 16
final_norm = { kind = "rms" }
[input]
kind = "tokens"
vocabulary = 20
length = 12
[[blocks]]
repeat = 2
norm = { kind = "rms" }
attention = { kind = "mamba" }
[head]
kind = "language-model"
"#;

/// As the narrow OPT, whose table has another width than the stream.
const PROJECTED: &str = r#"
width = 16
final_norm = { kind = "layer" }
[input]
kind = "tokens"
vocabulary = 20
length = 12
embedding_width = 6
position = { kind = "learned", offset = 2, skip_padding = true }
[[blocks]]
attention = { kind = "multi-head", heads = 4, causal = true }
feedforward = { kind = "dense", hidden = 24, activation = "relu" }
[head]
kind = "language-model"
"#;

/// Layer norms with shifts before layers without biases, and a pooled head.
const POOLED: &str = r#"
width = 16
final_norm = { kind = "layer" }
[input]
kind = "tokens"
vocabulary = 20
length = 12
token_types = 2
[[blocks]]
attention = { kind = "multi-head", heads = 4, bias = false }
feedforward = { kind = "gated", hidden = 10 }
[[blocks]]
attention = { kind = "multi-head", heads = 2, head_width = 6, output_bias = false }
feedforward = { kind = "dense", hidden = 12, bias = false }
[head]
kind = "pooled"
pool = "mean"
labels = 3
bias = false
"#;

const ALL: [(&str, &str); 7] = [
    ("decoder", DECODER),
    ("gated", GATED),
    ("parallel", PARALLEL),
    ("mixture", MIXTURE),
    ("recurrent", RECURRENT),
    ("projected", PROJECTED),
    ("pooled", POOLED),
];

fn cut(model: &Model, data: &CalibrationData, width: usize, by: &dyn Directions) -> Model {
    slice(model, data, width, false, by, 8).unwrap().model
}

fn settings() -> Settings {
    Settings {
        slicing: SliceSettings {
            multiple: 2,
            ..SliceSettings::default()
        },
        ..Settings::default()
    }
}

fn by_method(name: &str, model: &Model, data: &CalibrationData, keep: f64) -> Compressed {
    let settings = settings();
    let task = Task {
        data: Some(data),
        settings: Some(&settings),
        ..Task::new(model)
    };
    let method = Method::find(name).unwrap();
    let plan = method.plan(&task, &Budget::Keep(keep)).unwrap();
    method.apply(&task, &plan).unwrap()
}

const METHODS: [&str; 5] = [
    "slicegpt",
    "slicegpt-shared",
    "dotresize",
    "dotresize-shared",
    "coordinate-magnitude",
];

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

/// The same model, with everything that writes the stream passed through `map` `[16, 16]`.
fn confined(model: &Model, map: &Tensor) -> Model {
    let mut confined = Model::new(model.spec().clone(), &mut model.parameters().clone()).unwrap();
    let names: Vec<String> = model.parameters().keys().cloned().collect();
    for name in names {
        let table = name.starts_with("embeddings.") && !name.starts_with("embeddings.projection");
        let writer = [".output.", ".down.", "embeddings.projection."];
        if table {
            if model.parameters()[&name].dims()[1] == 16 {
                confined = altered(&confined, &name, |w| w.matmul(map).unwrap());
            }
        } else if writer.iter().any(|part| name.contains(part)) && !name.starts_with("head.") {
            confined = altered(&confined, &name, |w| match w.rank() {
                2 => map.t().unwrap().contiguous().unwrap().matmul(w).unwrap(),
                _ => {
                    let row = w.unsqueeze(0).unwrap().matmul(map).unwrap();
                    row.squeeze(0).unwrap()
                }
            });
        }
    }
    confined
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
        let total = |sliced: &lapidary_compress::slicing::Sliced| sliced.kept.iter().sum::<f64>();
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

#[test]
fn parameters_are_known_beforehand() {
    let (model, data) = (model(GATED, 13), windows(6, 13));
    for (shared, narrow) in [(false, 10), (true, 10), (false, 16)] {
        let sliced = slice(&model, &data, narrow, shared, &Principal, 8)
            .unwrap()
            .model;
        // Two blocks of four heads of four, in two groups; a gated part of 24; tables of 20.
        let attention = 2 * 16 * narrow + 2 * 8 * narrow;
        let block = attention + 3 * 24 * narrow + 2 * narrow;
        let shortcuts = if shared { 0 } else { 2 * narrow * narrow };
        let expected = 2 * (block + shortcuts) + 2 * 20 * narrow + narrow;
        assert_eq!(sliced.parameter_count(), expected);
        let counted = parameters_after(model.spec(), narrow, shared).unwrap();
        assert_eq!(counted, expected as u64);
    }
}

#[test]
fn methods_keep_books_and_what_they_make_loads_again() {
    for name in METHODS {
        for spec in [GATED, DECODER, PARALLEL] {
            let (model, data) = (model(spec, 14), windows(8, 14));
            let made = by_method(name, &model, &data, 0.5);
            assert_eq!(made.model.spec().width, 8);
            let sum = |of: fn(&lapidary_compress::ModuleReport) -> usize| -> usize {
                made.report.modules.iter().map(of).sum()
            };
            assert_eq!(sum(|m| m.parameters_before), made.report.before.parameters);
            assert_eq!(sum(|m| m.parameters_after), made.report.after.parameters);
            assert!(made.report.after.parameters < made.report.before.parameters);
            let note = made.report.modules[0].note.as_deref().unwrap();
            assert!(note.contains("is kept"), "{note}");

            let found = scores(&made.model, &data);
            let directory = tempfile(name, spec.len());
            Package::new(made.model, None)
                .save(&directory, None)
                .unwrap();
            let package = Package::open(
                &directory,
                &OpenOptions {
                    dtype: DType::F64,
                    ..OpenOptions::default()
                },
            )
            .unwrap();
            assert_eq!(scores(package.single_model().unwrap(), &data), found);
            std::fs::remove_dir_all(&directory).unwrap();
        }
    }
}

fn tempfile(name: &str, number: usize) -> std::path::PathBuf {
    let process = std::process::id();
    std::env::temp_dir().join(format!("lapidary-slicing-{name}-{number}-{process}"))
}

#[test]
fn keeping_everything_keeps_the_model() {
    let (model, data) = (model(DECODER, 2), windows(6, 4));
    for name in METHODS {
        let made = by_method(name, &model, &data, 1.0);
        assert_eq!(scores(&model, &data), scores(&made.model, &data));
        assert!(matches!(
            made.report.modules[0].change,
            Change::Leave { .. }
        ));
    }
}

#[test]
fn a_cut_that_saves_nothing_is_refused() {
    let (model, data) = (model(DECODER, 2), windows(6, 4));
    let settings = settings();
    let task = Task {
        data: Some(&data),
        settings: Some(&settings),
        ..Task::new(&model)
    };
    let method = Method::find("slicegpt").unwrap();
    let error = method
        .plan(&task, &Budget::Keep(0.9))
        .unwrap_err()
        .to_string();
    assert!(error.contains("two square matrices to a block"), "{error}");
    // What the error says would save does, and the next width does not.
    let after = |width| parameters_after(model.spec(), width, false).unwrap();
    let said: usize = error
        .split("at most ")
        .nth(1)
        .and_then(|rest| rest.split(',').next())
        .and_then(|number| number.parse().ok())
        .unwrap();
    let before = model.parameter_count() as u64;
    assert!(after(said) < before && after(said + 2) >= before);
    // A plan by hand is obeyed all the same.
    let mut plan = method.plan(&task, &Budget::Keep(0.5)).unwrap();
    for module in &mut plan.modules {
        module.change = Change::Slice { width: 14 };
    }
    let made = method.apply(&task, &plan).unwrap();
    assert_eq!(made.model.spec().width, 14);
    plan.modules[1].change = Change::Slice { width: 12 };
    let error = method.apply(&task, &plan).unwrap_err().to_string();
    assert!(error.contains("one width"), "{error}");
    plan.modules.pop();
    assert!(method.apply(&task, &plan).is_err());
    let other = Plan {
        method: "slicegpt".to_owned(),
        modules: vec![],
    };
    assert!(method.apply(&task, &other).is_err());
}

#[test]
fn streams_that_are_bound_to_their_basis_are_refused() {
    let method = Method::find("slicegpt").unwrap();
    let refused = |spec: &str, word: &str| {
        let model = model(spec, 1);
        let found = method.requirements(&model, &Settings::default());
        let error = found.unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    };
    refused(ENCODER, "the norm of the embeddings");
    let bare = ENCODER.replace("norm = { kind = \"layer\" }", "");
    refused(&bare, "head");
    refused(&bare.replace("hidden = \"tanh\"", ""), "post-norm");
    let sines = DECODER.replace("\"learned\"", "\"sinusoidal\"");
    refused(&sines, "sinusoidal");
    refused(&DECODER.replace("\"language-model\"", "\"none\""), "head");
    let mixed = DECODER.replace(
        "final_norm = { kind = \"layer\" }",
        "final_norm = { kind = \"rms\" }",
    );
    refused(&mixed, "layer norms beside others");
    let (decoder, data) = (model(DECODER, 1), windows(4, 1));
    let sliced = cut(&decoder, &data, 8, &Principal);
    let error = method
        .requirements(&sliced, &Settings::default())
        .unwrap_err();
    assert!(error.to_string().contains("sliced before"), "{error}");
    assert!(slice(&decoder, &data, 0, false, &Principal, 8).is_err());
    assert!(slice(&decoder, &data, 17, false, &Principal, 8).is_err());
    assert!(slice(&model(PROJECTED, 1), &data, 6, false, &Principal, 8).is_err());
}

#[test]
fn published_families_are_sliced() {
    let fixtures = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/families");
    for family in [
        "gpt2",
        "opt",
        "llama",
        "llama-tied",
        "mistral",
        "mixtral",
        "olmoe",
        "qwen2",
        "mamba",
        "opt-projected-pre-norm",
        "vit",
    ] {
        let path = std::path::Path::new(fixtures).join(family);
        let package = Package::open(&path, &OpenOptions::default()).unwrap();
        let model = package.single_model().unwrap();
        let width = model.spec().width;
        let data = match model.spec().vocabulary() {
            Some(_) => windows(6, 15),
            None => images(model),
        };
        let logits = |model: &Model| all_scores(model, &data);
        let before = logits(model);
        let same = slice(model, &data, width, false, &Principal, 4).unwrap();
        let apart = distance(&logits(&same.model), &before);
        assert!(apart < 1e-3, "{family}: {apart:e}");
        let half = slice(model, &data, width / 2, false, &Principal, 4).unwrap();
        assert!(
            logits(&half.model).iter().all(|score| score.is_finite()),
            "{family}"
        );
    }
}

fn images(model: &Model) -> CalibrationData {
    let lapidary_model::InputSpec::Patches(patches) = &model.spec().input else {
        panic!("{:?}", model.spec().input);
    };
    let shape = (patches.channels, patches.image[0], patches.image[1]);
    let mut generator = ChaCha8Rng::seed_from_u64(15);
    let mut example = || {
        let count = shape.0 * shape.1 * shape.2;
        let pixels: Vec<f32> = (0..count)
            .map(|_| generator.random_range(-1.0..1.0))
            .collect();
        Example {
            content: Content::Pixels(Tensor::from_vec(pixels, shape, &Device::Cpu).unwrap()),
            target: Target::None,
        }
    };
    CalibrationData::new((0..6).map(|_| example()).collect()).unwrap()
}

fn all_scores(model: &Model, data: &CalibrationData) -> Vec<f64> {
    let mut found = Vec::new();
    for example in data.examples() {
        let input = match &example.content {
            Content::Tokens { ids, .. } => {
                Input::tokens(Tensor::from_slice(ids, (1, ids.len()), &Device::Cpu).unwrap())
            }
            Content::Pixels(pixels) => Input::Pixels(pixels.unsqueeze(0).unwrap()),
        };
        let output = model.forward(&input, Pass::default()).unwrap();
        found.extend(values(output.into_logits().unwrap().value()));
    }
    found
}

#[test]
fn an_independent_program_cuts_to_the_same_scores() {
    let golden: serde_json::Value =
        serde_json::from_str(include_str!("../fixtures/slicing.json")).unwrap();
    let numbers = |value: &serde_json::Value| -> Vec<f64> {
        let entries = value.as_array().unwrap().iter();
        entries
            .flat_map(|entry| match entry.as_array() {
                Some(row) => row.iter().map(|v| v.as_f64().unwrap()).collect(),
                None => vec![entry.as_f64().unwrap()],
            })
            .collect()
    };
    let mut parameters = BTreeMap::new();
    for (name, value) in golden["parameters"].as_object().unwrap() {
        let rows = value.as_array().unwrap().len();
        let flat = numbers(value);
        let shape = match flat.len() / rows {
            1 => vec![rows],
            columns => vec![rows, columns],
        };
        let tensor = Tensor::from_vec(flat, shape, &Device::Cpu).unwrap();
        parameters.insert(name.clone(), tensor);
    }
    let spec = r#"
width = 8
final_norm = { kind = "layer" }
[input]
kind = "tokens"
vocabulary = 11
length = 7
position = { kind = "learned" }
[[blocks]]
repeat = 2
attention = { kind = "multi-head", heads = 2, causal = true }
feedforward = { kind = "dense", hidden = 12, activation = "relu" }
[head]
kind = "language-model"
"#;
    let model = common::with_parameters(spec, parameters);
    let texts = golden["texts"].as_array().unwrap().iter();
    let texts = texts.map(|text| numbers(text).iter().map(|id| *id as u32).collect());
    let data = CalibrationData::windows(texts).unwrap();
    let ways: [(&str, &dyn Directions); 2] = [
        ("slicegpt", &Principal),
        ("dotresize", &Transport::default()),
    ];
    for (name, way) in ways {
        let sliced = cut(&model, &data, 5, way);
        close(&scores(&sliced, &data), &numbers(&golden[name]), 1e-7);
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
