//! The image embedding as a sum, and what is done with its entries: properties that hold exactly.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod survey;
mod texts;
mod zero_shot;

use crate::common;
use lapidary_explain::clip::{Component, ImageTower};
use lapidary_factor::Matrix;
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Input, Model, Pass};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A vision tower as CLIP's: a norm of the embeddings, and one before the projection.
const CLIP: &str = r#"
width = 16
[input]
kind = "patches"
image = [8, 12]
patch = 4
bias = false
norm = { kind = "layer" }
[[blocks]]
repeat = 3
attention = { kind = "multi-head", heads = 4 }
feedforward = { kind = "dense", hidden = 24, activation = "quick-gelu" }
[head]
kind = "pooled"
norm = { kind = "layer" }
labels = 10
bias = false
"#;

/// Two register tokens, grouped heads without biases, a last norm of all tokens, and a biased
/// projection.
const REGISTERS: &str = r#"
width = 16
final_norm = { kind = "layer" }
[input]
kind = "patches"
image = [8, 8]
patch = 4
class_tokens = 3
[[blocks]]
repeat = 2
attention = { kind = "multi-head", heads = 4, groups = 2, bias = false }
feedforward = { kind = "gated", hidden = 24 }
[head]
kind = "pooled"
labels = 7
"#;

/// RMS norms, parallel parts, a block of attention alone, heads wider than the width shares out.
const PARALLEL: &str = r#"
width = 16
final_norm = { kind = "rms" }
[input]
kind = "patches"
image = [8, 8]
patch = 4
[[blocks]]
wiring = "parallel"
norm = { kind = "rms" }
attention = { kind = "multi-head", heads = 4, head_width = 6, position = { kind = "rotary" } }
feedforward = { kind = "dense", hidden = 24 }
[[blocks]]
norm = { kind = "rms" }
attention = { kind = "multi-head", heads = 2, bias = false, output_bias = true }
[head]
kind = "pooled"
labels = 7
bias = false
"#;

/// No norm before the embedding, and no projection.
const BARE: &str = r#"
width = 16
[input]
kind = "patches"
image = [8, 8]
patch = 4
[[blocks]]
repeat = 2
attention = { kind = "multi-head", heads = 4 }
feedforward = { kind = "dense", hidden = 24 }
[head]
kind = "pooled"
"#;

/// As CLIP, a layer of it factorised.
const FACTORISED: &str = r#"
width = 16
[low_rank]
"blocks.1.attention.output" = 5
"head.output" = 6
[input]
kind = "patches"
image = [8, 8]
patch = 4
[[blocks]]
repeat = 2
attention = { kind = "multi-head", heads = 4 }
feedforward = { kind = "dense", hidden = 24 }
[head]
kind = "pooled"
norm = { kind = "layer" }
labels = 10
bias = false
"#;

/// What every part writes is scaled by feature, in a factorised layer and a gated one too.
const SCALED: &str = r#"
width = 16
[low_rank]
"blocks.0.attention.output" = 5
[input]
kind = "patches"
image = [8, 8]
patch = 4
class_tokens = 2
[[blocks]]
repeat = 2
layer_scale = 0.1
attention = { kind = "multi-head", heads = 4 }
feedforward = { kind = "gated", hidden = 24 }
[[blocks]]
wiring = "parallel"
layer_scale = 0.1
attention = { kind = "multi-head", heads = 4, groups = 2 }
feedforward = { kind = "dense", hidden = 24 }
[head]
kind = "pooled"
norm = { kind = "layer" }
labels = 10
bias = false
"#;

const TEXT: &str = r#"
width = 12
final_norm = { kind = "layer" }
[input]
kind = "tokens"
vocabulary = 20
length = 8
position = { kind = "learned" }
[[blocks]]
attention = { kind = "multi-head", heads = 3, causal = true }
feedforward = { kind = "dense", hidden = 24 }
[head]
kind = "pooled"
pool = { at-token = 19 }
labels = 10
bias = false
"#;

const ALL: [(&str, &str); 6] = [
    ("clip", CLIP),
    ("registers", REGISTERS),
    ("parallel", PARALLEL),
    ("bare", BARE),
    ("factorised", FACTORISED),
    ("scaled", SCALED),
];

fn pixels(model: &Model, images: usize, seed: u64) -> Tensor {
    let lapidary_model::InputSpec::Patches(patches) = &model.spec().input else {
        unreachable!("an image tower");
    };
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    let [height, width] = patches.image;
    let values = (0..images * 3 * height * width).map(|_| generator.random::<f64>() * 2.0 - 1.0);
    let shape = (images, 3, height, width);
    Tensor::from_vec(values.collect(), shape, &Device::Cpu).unwrap()
}

fn random(rows: usize, columns: usize, seed: u64) -> Matrix {
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    Matrix::from_fn(rows, columns, |_, _| generator.random::<f64>() * 2.0 - 1.0)
}

fn difference(a: &Tensor, b: &Tensor) -> f64 {
    let largest = (a - b).unwrap().abs().unwrap().max_all().unwrap();
    largest.to_scalar::<f64>().unwrap()
}

/// The embedding of a plain forward pass, made one long.
fn embedding(model: &Model, pixels: &Tensor) -> Tensor {
    let input = Input::Pixels(pixels.clone());
    let output = model.forward(&input, Pass::default()).unwrap();
    let vector = output.logits.or(output.pooled).unwrap().into_value();
    let length = vector
        .sqr()
        .unwrap()
        .sum_keepdim(1)
        .unwrap()
        .sqrt()
        .unwrap();
    vector.broadcast_div(&length).unwrap()
}

#[test]
fn all_entries_sum_to_the_embedding_in_every_reduction() {
    for (name, spec) in ALL {
        let model = common::model(spec, 3);
        let tower = ImageTower::new(&model).unwrap();
        let pixels = pixels(&model, 3, 5);
        let decomposition = tower.decompose(&pixels).unwrap();
        let expected = embedding(&model, &pixels);
        let components = decomposition.components().unwrap();
        assert_eq!(components.dims()[1], tower.components().len());
        assert!(
            difference(&components.sum(1).unwrap(), &expected) < 1e-10,
            "{name}"
        );

        // Entries, summed over tokens and over layers and heads.
        let mut of_tokens = decomposition.tokens().unwrap().zeros_like().unwrap();
        for layer in 0..tower.depth() {
            let entries = decomposition.entries(layer).unwrap();
            of_tokens = (of_tokens + entries.sum(1).unwrap()).unwrap();
            let of_heads = entries.sum(2).unwrap();
            for head in 0..of_heads.dims()[1] {
                let index = tower.index_of(Component::Head { layer, head }).unwrap();
                let found = components.narrow(1, index, 1).unwrap();
                let error = difference(&of_heads.narrow(1, head, 1).unwrap(), &found);
                assert!(error < 1e-10, "{name} {layer}.{head}: {error}");
            }
        }
        let tokens = decomposition.tokens().unwrap();
        assert!(difference(&tokens, &of_tokens) < 1e-10, "{name}");

        // Before norm and projection.
        let (written, last) = decomposition.residual().unwrap();
        assert!(
            difference(&written.sum(1).unwrap(), &last) < 1e-10,
            "{name}"
        );
    }
}

/// Entries of a scaled tower are those of the tower whose layers have the scales in them, and each is
/// the unscaled entry times the scale where no norm follows.
#[test]
fn layer_scales_multiply_entries() {
    let scaled = common::model(SCALED, 3);
    assert!(scaled.scales_layers());
    let folded = scaled.written_out().unwrap();
    assert!(!folded.scales_layers());
    let pixels = pixels(&scaled, 2, 5);
    let (own, other) = (
        ImageTower::new(&scaled).unwrap(),
        ImageTower::new(&folded).unwrap(),
    );
    let (own, other) = (
        own.decompose(&pixels).unwrap(),
        other.decompose(&pixels).unwrap(),
    );
    let (a, b) = (own.components().unwrap(), other.components().unwrap());
    assert!(difference(&a, &b) < 1e-10);
    for layer in 0..3 {
        let (a, b) = (own.entries(layer).unwrap(), other.entries(layer).unwrap());
        assert!(difference(&a, &b) < 1e-10, "{layer}");
    }
    // The written vectors by the definition: the feed-forward part's output times its scale.
    let trace = lapidary_signal::Trace::new().capture("blocks.*").unwrap();
    let pass = Pass {
        trace: Some(&trace),
        ..Pass::default()
    };
    scaled.forward(&Input::Pixels(pixels), pass).unwrap();
    let (written, _) = own.residual().unwrap();
    for layer in 0..3 {
        let component = Component::Feedforward { layer };
        let place = own.tower().index_of(component).unwrap();
        let out = trace.signal(&format!("blocks.{layer}.feedforward.out"));
        let out = out.unwrap().into_value().narrow(1, 0, 1).unwrap();
        let scale = &scaled.parameters()[&format!("blocks.{layer}.feedforward_scale.weight")];
        let expected = out.broadcast_mul(scale).unwrap().squeeze(1).unwrap();
        let found = written.narrow(1, place, 1).unwrap().squeeze(1).unwrap();
        assert!(difference(&found, &expected) < 1e-12);
        let said = trace.signal(&format!("blocks.{layer}.feedforward.scaled"));
        let said = said.unwrap().into_value().narrow(1, 0, 1).unwrap();
        assert!(difference(&said.squeeze(1).unwrap(), &expected) < 1e-12);
    }
}

/// The definition, entry by entry, from the sites of a pass: nothing fused, nothing shared.
#[test]
fn an_entry_is_what_the_definition_says() {
    let model = common::model(CLIP, 8);
    let tower = ImageTower::new(&model).unwrap();
    let pixels = pixels(&model, 2, 9);
    let decomposition = tower.decompose(&pixels).unwrap();
    let trace = lapidary_signal::Trace::new()
        .capture("blocks.*")
        .unwrap()
        .capture("embeddings")
        .unwrap();
    let pass = Pass {
        trace: Some(&trace),
        ..Pass::default()
    };
    model.forward(&Input::Pixels(pixels), pass).unwrap();
    let three = |site: &str, image: usize| {
        let value = trace.signal(site).unwrap().into_value();
        value.get(image).unwrap().to_vec2::<f64>().unwrap()
    };
    let parameter = |name: &str| model.parameters()[name].clone();
    let vector = |name: &str| parameter(name).to_vec1::<f64>().unwrap();
    let matrix = |name: &str| parameter(name).to_vec2::<f64>().unwrap();
    let (scale, shift) = (vector("head.norm.weight"), vector("head.norm.bias"));
    let projection = matrix("head.output.weight"); // [features, width]
    let lengths = decomposition.lengths().to_vec2::<f64>().unwrap();
    let (tokens, heads, head_width, terms) = (7, 4, 4, 7.0);
    let components = decomposition
        .components()
        .unwrap()
        .to_vec3::<f64>()
        .unwrap();
    for image in 0..2 {
        let last = &three("blocks.2.out", image)[0];
        let mean = last.iter().sum::<f64>() / 16.0;
        let variance = last.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / 16.0;
        let deviation = (variance + 1e-5).sqrt();
        // A term's vector and its share of what belongs to none, projected.
        let project = |vector: &[f64], share: f64| -> Vec<f64> {
            let normed: Vec<f64> = (0..16)
                .map(|d| (vector[d] - mean * share) * scale[d] / deviation + shift[d] * share)
                .collect();
            let onto = |row: &Vec<f64>| row.iter().zip(&normed).map(|(p, x)| p * x).sum::<f64>();
            projection
                .iter()
                .map(|row| onto(row) / lengths[image][0])
                .collect()
        };
        let close = |found: &[f64], expected: &[f64]| {
            for (found, expected) in found.iter().zip(expected) {
                assert!((found - expected).abs() < 1e-10, "{found} {expected}");
            }
        };
        close(
            &components[image][0],
            &project(&three("embeddings", image)[0], 1.0 / terms),
        );
        for layer in 0..3 {
            let path = |name: &str| format!("blocks.{layer}.attention.{name}");
            let weights = trace.signal(&path("weights")).unwrap().into_value();
            let weights = weights.get(image).unwrap().to_vec3::<f64>().unwrap();
            let values = three(&path("value"), image);
            let output = matrix(&path("output.weight"));
            let bias = vector(&path("output.bias"));
            let entries = decomposition.entries(layer).unwrap().get(image).unwrap();
            let entries = entries.to_vec3::<f64>().unwrap();
            let share = 1.0 / (tokens * heads) as f64;
            for head in 0..heads {
                for token in 0..tokens {
                    let written: Vec<f64> = (0..16)
                        .map(|d| {
                            let carried: f64 = (0..head_width)
                                .map(|j| head * head_width + j)
                                .map(|j| values[token][j] * output[d][j])
                                .sum();
                            weights[head][0][token] * carried + bias[d] * share
                        })
                        .collect();
                    close(&entries[head][token], &project(&written, share / terms));
                }
            }
            let mlp = &three(&format!("blocks.{layer}.feedforward.out"), image)[0];
            let place = tower.index_of(Component::Feedforward { layer }).unwrap();
            close(&components[image][place], &project(mlp, 1.0 / terms));
        }
    }
}

#[test]
fn single_precision_sums_to_a_hundred_thousandth() {
    let double = common::model(CLIP, 3);
    let mut parameters = double
        .parameters()
        .iter()
        .map(|(name, tensor)| (name.clone(), tensor.to_dtype(DType::F32).unwrap()))
        .collect::<std::collections::BTreeMap<_, _>>();
    let model = Model::new(double.spec().clone(), &mut parameters).unwrap();
    let tower = ImageTower::new(&model).unwrap();
    let decomposition = tower.decompose(&pixels(&double, 2, 5)).unwrap();
    let sum = decomposition.components().unwrap().sum(1).unwrap();
    let difference = (sum - decomposition.embeddings()).unwrap().abs().unwrap();
    assert!(difference.max_all().unwrap().to_scalar::<f32>().unwrap() < 1e-5);
}

#[test]
fn models_whose_embedding_is_no_such_sum_are_refused() {
    for (spec, said) in [
        (
            CLIP.replace("repeat = 3", "repeat = 3\nwiring = \"post-norm\""),
            "wiring",
        ),
        (
            CLIP.replace("labels = 10", "labels = 10\npool = \"mean\""),
            "head.pool",
        ),
        (
            CLIP.replace("labels = 10", "labels = 10\nhidden = \"tanh\""),
            "head.hidden",
        ),
        (
            CLIP.replace(
                "width = 16\n",
                "width = 16\nfinal_norm = { kind = \"layer\" }\n",
            ),
            "head.norm",
        ),
        (TEXT.to_owned(), "input"),
        (
            CLIP.replace("heads = 4", "heads = 4, local = { side = 3 }"),
            "a filter beside the heads",
        ),
        (
            CLIP.replace(
                "heads = 4",
                "heads = 1, bias = false, sharing = \"all\", output = \"absent\"",
            ),
            "a matrix of their own",
        ),
    ] {
        let error = ImageTower::new(&common::model(&spec, 1)).unwrap_err();
        assert!(error.to_string().contains(said), "{error}");
    }
}
