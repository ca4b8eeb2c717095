//! The image embedding as a sum, and what is done with its entries: properties that hold exactly.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use crate::common;
use lapidary_explain::clip::{
    Component, EditedClassifier, HeadOutputs, ImageTower, StreamingMean, Survey, ZeroShot,
    embed_texts, heat_maps, mean_ablated, nearest, spurious_edit, text_span,
};
use lapidary_factor::{Matrix, matrix_from_tensor, thin_svd};
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
fn chosen_texts_are_orthogonal_and_explain_ever_more() {
    let (outputs, texts) = (random(40, 12, 1), random(30, 12, 2));
    let mut explained = 0.0;
    for count in 1..=8 {
        let span = text_span(outputs.as_ref(), texts.as_ref(), 8, count).unwrap();
        assert_eq!(span.texts.len(), count);
        for one in 0..count {
            for other in 0..one {
                let a = span.directions.row(one);
                let b = span.directions.row(other);
                let product: f64 = a.iter().zip(b.iter()).map(|(a, b)| a * b).sum();
                assert!((product / a.norm_l2() / b.norm_l2()).abs() < 1e-12);
            }
        }
        // The share is what the residual of the reconstruction says.
        let left = (&outputs - span.reconstruct(outputs.as_ref())).squared_norm_l2();
        assert!((1.0 - left / span.deviation - span.explained()).abs() < 1e-10);
        assert!(span.explained() > explained, "the residual falls");
        explained = span.explained();
    }
}

#[test]
fn texts_that_span_everything_rebuild_the_outputs() {
    let (outputs, texts) = (random(40, 6, 3), random(20, 6, 4));
    let span = text_span(outputs.as_ref(), texts.as_ref(), 6, 20).unwrap();
    assert_eq!(span.texts.len(), 6, "after which no text says anything new");
    let rebuilt = span.reconstruct(outputs.as_ref());
    assert!((&rebuilt - &outputs).norm_max() < 1e-10);
    assert!((span.explained() - 1.0).abs() < 1e-10);
}

#[test]
fn outputs_are_compared_after_centring() {
    let (outputs, texts) = (random(40, 6, 5), random(20, 6, 6));
    let shifted = Matrix::from_fn(40, 6, |i, j| outputs[(i, j)] + 3.0 - j as f64);
    let span = text_span(outputs.as_ref(), texts.as_ref(), 6, 6).unwrap();
    let again = text_span(shifted.as_ref(), texts.as_ref(), 6, 6).unwrap();
    assert_eq!(span.texts, again.texts);
    assert!((span.explained() - again.explained()).abs() < 1e-10);
}

/// The algorithm as printed, with the whole products recomputed after each choice.
#[test]
fn the_covariance_chooses_what_the_printed_algorithm_chooses() {
    let (outputs, texts) = (random(50, 16, 7), random(60, 16, 8));
    for rank in [4, 9, 16] {
        let span = text_span(outputs.as_ref(), texts.as_ref(), rank, 6).unwrap();
        let svd = thin_svd(outputs.as_ref()).unwrap();
        let basis = svd.vt.as_ref().subrows(0, rank);
        let mut left = (&texts * basis.transpose()) * basis;
        let mut c = Matrix::from_fn(50, 16, |i, j| {
            outputs[(i, j)] - outputs.col(j).iter().sum::<f64>() / 50.0
        });
        let mut expected = Vec::new();
        for _ in 0..6.min(rank) {
            let products = &c * left.transpose();
            let deviation = |j: usize| {
                let mean = products.col(j).iter().sum::<f64>() / 50.0;
                products
                    .col(j)
                    .iter()
                    .map(|p| (p - mean).powi(2))
                    .sum::<f64>()
            };
            let best = (0..60)
                .max_by(|a, b| deviation(*a).total_cmp(&deviation(*b)))
                .unwrap();
            expected.push(best);
            let t = Matrix::from_fn(16, 1, |i, _| left[(best, i)]);
            let square = t.squared_norm_l2();
            c -= (&c * &t) * t.transpose() * (1.0 / square);
            left -= (&left * &t) * t.transpose() * (1.0 / square);
        }
        assert_eq!(&span.texts[..expected.len()], expected, "rank {rank}");
    }
}

#[test]
fn span_refuses_what_does_not_fit() {
    let outputs = random(4, 3, 1);
    let refused = |texts: &Matrix, rank: usize| {
        text_span(outputs.as_ref(), texts.as_ref(), rank, 2)
            .unwrap_err()
            .to_string()
    };
    assert!(refused(&random(4, 2, 1), 1).contains("texts"));
    assert!(refused(&random(4, 3, 1), 0).contains("rank"));
    let broken = Matrix::from_fn(2, 3, |_, _| f64::NAN);
    assert!(refused(&broken, 1).contains("finite"));
    // Equal outputs have no variance: nothing is chosen.
    let same = Matrix::from_fn(4, 3, |_, j| 1.0 + j as f64);
    let span = text_span(same.as_ref(), random(4, 3, 1).as_ref(), 3, 2).unwrap();
    assert!(span.texts.is_empty());
}

/// A tower, some images, and a classifier of random directions.
fn study(model: &Model) -> (ImageTower<'_>, Tensor, ZeroShot) {
    let tower = ImageTower::new(model).unwrap();
    let text = common::model(TEXT, 4);
    let texts: Vec<Vec<u32>> = (0..6).map(|i| vec![i, 2 * i, i + 3, 19]).collect();
    let vectors = embed_texts(&text, &texts).unwrap();
    let groups: Vec<Tensor> = (0..3)
        .map(|c| vectors.narrow(0, 2 * c, 2).unwrap())
        .collect();
    (
        tower,
        pixels(model, 12, 6),
        ZeroShot::from_groups(&groups).unwrap(),
    )
}

#[test]
fn ablating_nothing_changes_nothing_and_ablating_all_leaves_no_difference() {
    let model = common::model(CLIP, 3);
    let (tower, pixels, classes) = study(&model);
    let decomposition = tower.decompose(&pixels).unwrap();
    let components = decomposition.components().unwrap();
    // The mean does not depend on how the data set is cut.
    let mut means = StreamingMean::default();
    for start in [0, 5, 10] {
        let count = 5.min(12 - start);
        means
            .add(&components.narrow(0, start, count).unwrap())
            .unwrap();
    }
    let means = means.mean().unwrap();
    assert!(difference(&means, &components.mean(0).unwrap()) < 1e-12);

    let plain = classes.classify(decomposition.embeddings()).unwrap();
    assert!(plain.iter().any(|class| *class != plain[0]), "{plain:?}");
    let count = tower.components().len();
    let none = mean_ablated(&components, &means, &vec![false; count]).unwrap();
    assert!(difference(&none, decomposition.embeddings()) < 1e-12);
    let all = mean_ablated(&components, &means, &vec![true; count]).unwrap();
    let first = all.narrow(0, 0, 1).unwrap();
    assert!(difference(&all, &first.broadcast_as(all.dims()).unwrap()) < 1e-12);

    let edited = |ablated: &[Component]| {
        let means = means.clone();
        let edited = EditedClassifier::new(&tower, classes.clone(), means, ablated).unwrap();
        edited.classify(&pixels).unwrap()
    };
    assert_eq!(edited(&[]), plain);
    let constant = edited(tower.components());
    assert!(constant.iter().all(|class| *class == constant[0]));

    // Any entries: those of tokens sum likewise.
    let entries = decomposition.entries(1).unwrap().flatten(1, 2).unwrap();
    let marks = vec![false; entries.dims()[1]];
    let same = mean_ablated(&entries, &entries.mean(0).unwrap(), &marks).unwrap();
    assert!(difference(&same, &entries.sum(1).unwrap()) < 1e-12);
    assert!(mean_ablated(&entries, &means, &marks).is_err());
}

#[test]
fn an_edit_names_the_parts_that_the_paper_ablates() {
    let model = common::model(CLIP, 3);
    let tower = ImageTower::new(&model).unwrap();
    let head = Component::Head { layer: 2, head: 1 };
    let edit = spurious_edit(&tower, 1, &[head]);
    let kept: Vec<String> = tower
        .components()
        .iter()
        .filter(|component| !edit.contains(component))
        .map(ToString::to_string)
        .collect();
    assert_eq!(kept, ["2.0", "2.2", "2.3"]);
    let missing = tower.index_of(Component::Head { layer: 3, head: 0 });
    assert!(missing.unwrap_err().to_string().contains("below 3"));
}

#[test]
fn outputs_on_disk_are_those_in_memory_and_leave_no_file() {
    let model = common::model(CLIP, 3);
    let (tower, pixels, _) = study(&model);
    let heads = [
        Component::Head { layer: 0, head: 3 },
        Component::Feedforward { layer: 1 },
    ];
    let directory = std::env::temp_dir().join(format!("clip-outputs-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let mut disk = HeadOutputs::on_disk(&tower, &heads, &directory).unwrap();
    let mut memory = HeadOutputs::in_memory(&tower, &heads).unwrap();
    let components = tower.decompose(&pixels).unwrap().components().unwrap();
    for start in [0, 7] {
        let batch = components.narrow(0, start, 5).unwrap();
        disk.add(&batch).unwrap();
        memory.add(&batch).unwrap();
    }
    assert_eq!(disk.images(), 10);
    for head in heads {
        let index = tower.index_of(head).unwrap();
        let (one, other) = (disk.of(head).unwrap(), memory.of(head).unwrap());
        assert_eq!(one, other);
        let truth = components.get(7).unwrap().get(index).unwrap();
        let truth = truth.to_vec1::<f64>().unwrap();
        for (found, truth) in one.row(5).iter().zip(truth) {
            assert!((found - truth).abs() < 1e-6);
        }
    }
    assert!(disk.of(Component::Embeddings).is_err());
    drop(disk);
    std::fs::remove_dir(&directory).unwrap();
}

#[test]
fn a_survey_shares_out_the_embedding_and_its_variance() {
    let model = common::model(CLIP, 3);
    let (tower, pixels, classes) = study(&model);
    let heads: Vec<Component> = (0..4)
        .map(|head| Component::Head { layer: 2, head })
        .collect();
    let outputs = HeadOutputs::in_memory(&tower, &heads).unwrap();
    let mut survey = Survey::new(&tower, outputs);
    for start in [0, 6] {
        survey.add(&pixels.narrow(0, start, 6).unwrap()).unwrap();
    }
    let effects = survey.layer_effects().unwrap();
    let parts: Vec<&str> = effects.iter().map(|effect| effect.part.as_str()).collect();
    assert_eq!(parts[..3], ["embeddings", "attention 0", "feedforward 0"]);
    for total in [
        effects.iter().map(|effect| effect.share).sum::<f64>(),
        effects.iter().map(|effect| effect.variance).sum(),
    ] {
        assert!((total - 1.0).abs() < 1e-10);
    }
    let names: Vec<String> = ["a", "b", "c"].map(str::to_owned).into();
    let report = survey.report(&names, classes.vectors(), 2).unwrap();
    assert_eq!(report.tables[1].rows.len(), 4);
    assert_eq!(report.maps[0].values.len(), 3);
    assert!(survey.report(&names[..2], classes.vectors(), 2).is_err());

    // The image of which a head says most of a text is found by looking at all.
    let vectors = matrix_from_tensor("classes", classes.vectors()).unwrap();
    let text: Vec<f64> = vectors.row(1).iter().copied().collect();
    let said = survey.outputs().of(heads[2]).unwrap();
    let found = nearest(said.as_ref(), &text, 12).unwrap();
    assert_eq!(found.len(), 12);
    assert!(found.windows(2).all(|two| two[0].1 >= two[1].1));
}

#[test]
fn heat_is_what_patches_add_to_a_class_beyond_the_mean_class() {
    let model = common::model(REGISTERS, 3);
    let tower = ImageTower::new(&model).unwrap();
    let pixels = pixels(&model, 2, 6);
    let decomposition = tower.decompose(&pixels).unwrap();
    let vectors = Tensor::randn(0.0, 1.0, (3, 7), &Device::Cpu).unwrap();
    let groups: Vec<Tensor> = (0..3).map(|c| vectors.narrow(0, c, 1).unwrap()).collect();
    let classes = ZeroShot::from_groups(&groups).unwrap();
    let heats: Vec<Vec<f64>> = (0..3)
        .map(|class| {
            let maps = heat_maps(&decomposition, &classes, &[0, class]).unwrap();
            maps[1].values.clone()
        })
        .collect();
    assert_eq!(
        heats[0].len(),
        4,
        "patches, without class token and registers"
    );
    for patch in 0..4 {
        let sum: f64 = heats.iter().map(|heat| heat[patch]).sum();
        assert!(sum.abs() < 1e-12, "the classes' heats are relative");
    }
    let alone = ZeroShot::from_groups(&groups[..1]).unwrap();
    let heat = heat_maps(&decomposition, &alone, &[0, 0]).unwrap();
    assert_eq!(heat[0].values, [0.0; 4]);
    assert!(heat_maps(&decomposition, &classes, &[0]).is_err());
    assert!(heat_maps(&decomposition, &classes, &[0, 3]).is_err());
}

#[test]
fn a_zero_shot_classifier_says_the_class_of_the_embedding() {
    for (spec, classes, features) in [(CLIP, 5, 10), (REGISTERS, 3, 7)] {
        let model = common::model(spec, 3);
        let pixels = pixels(&model, 6, 5);
        let groups: Vec<Tensor> = (0..classes)
            .map(|class| {
                let rows = random(2, features, 40 + class);
                let values: Vec<f64> = (0..2)
                    .flat_map(|i| (0..features).map(move |j| (i, j)))
                    .map(|at| rows[at])
                    .collect();
                Tensor::from_vec(values, (2, features), &Device::Cpu).unwrap()
            })
            .collect();
        let zero_shot = ZeroShot::from_groups(&groups).unwrap();
        let expected = zero_shot.classify(&embedding(&model, &pixels)).unwrap();
        let classifier = zero_shot.classifier(&model).unwrap();
        let output = classifier
            .forward(&Input::Pixels(pixels.clone()), Pass::default())
            .unwrap();
        let said = output.into_logits().unwrap().into_value();
        assert_eq!(said.dims(), [6, classes as usize]);
        let said = said.argmax(1).unwrap().to_vec1::<u32>().unwrap();
        let said: Vec<usize> = said.into_iter().map(|class| class as usize).collect();
        assert_eq!(said, expected);
        // Features of another number are refused.
        let error = zero_shot.classifier(&common::model(BARE, 1)).unwrap_err();
        assert!(error.to_string().contains("projection"), "{error}");
    }
}

#[test]
fn the_text_of_one_sequence_does_not_depend_on_its_neighbours() {
    let text = common::model(TEXT, 4);
    let texts = [vec![1, 2, 19], vec![5, 6, 7, 8, 9, 19]];
    let both = embed_texts(&text, &texts).unwrap();
    let alone = embed_texts(&text, &texts[..1]).unwrap();
    assert!(difference(&both.narrow(0, 0, 1).unwrap(), &alone) < 1e-12);
    assert!(embed_texts(&text, &[Vec::<u32>::new()]).is_err());
    assert!(embed_texts::<Vec<u32>>(&text, &[]).is_err());
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
    ] {
        let error = ImageTower::new(&common::model(&spec, 1)).unwrap_err();
        assert!(error.to_string().contains(said), "{error}");
    }
}
