//! The exact properties of channels between heads.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use crate::common;
use crate::common::{DECODER, GATED, model, tokens};
use lapidary_explain::Question;
use lapidary_explain::analyses::channels::{
    ChannelOptions, ComponentEdit, Components, Composition, Head, HeadId, Heads, NamePrompt,
    Reader, Steering, channels, each_reader, fold_norms, inhibition_score, keep_only, report,
    scale_components, sweep,
};
use lapidary_factor::{Matrix, frobenius_norm, qr, thin_svd};
use lapidary_kernels::check::difference;
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Model, ModelSpec, Pass};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;
use std::collections::BTreeMap;

const IDS: [u32; 7] = [3, 11, 5, 0, 19, 7, 3];

/// As GPT-NeoX: both parts read the same stream; layer norms but no biases in attention.
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
attention = { kind = "multi-head", heads = 4, causal = true, bias = false, position = { kind = "rotary" } }
feedforward = { kind = "dense", hidden = 24 }
[head]
kind = "language-model"
"#;

/// Enough components that one of them can stand out.
const WIDE: &str = r#"
width = 64
final_norm = { kind = "layer" }
[input]
kind = "tokens"
vocabulary = 20
length = 12
[[blocks]]
repeat = 2
attention = { kind = "multi-head", heads = 4, causal = true }
[head]
kind = "language-model"
"#;

fn generator() -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(5)
}

fn gaussian(rows: usize, columns: usize, generator: &mut ChaCha8Rng) -> Matrix {
    // The sum of twelve uniform numbers is close enough to normal for what is tested here.
    Matrix::from_fn(rows, columns, |_, _| {
        (0..12).map(|_| generator.random::<f64>()).sum::<f64>() - 6.0
    })
}

fn id(block: usize, head: usize) -> HeadId {
    HeadId { block, head }
}

fn logits(model: &Model) -> Tensor {
    let output = model.forward(&tokens(&IDS), Pass::default()).unwrap();
    output.into_logits().unwrap().into_value()
}

/// `W_OV` and the three matrices read through, `width × width`.
fn dense(head: &Head) -> (Matrix, [Matrix; 3]) {
    let ov = &head.value * &head.output;
    let qk = &head.query * head.key.transpose();
    let kq = qk.transpose().to_owned();
    (ov.clone(), [qk, kq, ov])
}

fn norm(matrix: &Matrix) -> f64 {
    frobenius_norm(matrix.as_ref())
}

#[test]
fn scores_are_those_of_dense_matrices() {
    for spec in [DECODER, GATED, PARALLEL] {
        let model = model(spec, 3);
        let heads = Heads::of(&model).unwrap();
        for (writer, reader) in [(id(0, 1), id(1, 2)), (id(0, 3), id(1, 0))] {
            let (writer, reader) = (heads.head(writer).unwrap(), heads.head(reader).unwrap());
            let components = Components::of(&writer).unwrap();
            let (ov, _) = dense(&writer);
            for (composition, through) in Composition::ALL.into_iter().zip(dense(&reader).1) {
                let found = Reader::of(&reader, composition);
                assert!((found.norm() - norm(&through)).abs() < 1e-10 * norm(&through));
                let scores = found.scores(components.writes.as_ref());
                let mut squares = 0.0;
                for (i, score) in scores.iter().enumerate() {
                    let one = Matrix::from_fn(16, 16, |r, c| {
                        components.strengths[i]
                            * components.reads[(r, i)]
                            * components.writes[(i, c)]
                    });
                    let brute = norm(&(&one * &through)) / norm(&one) / norm(&through);
                    assert!((score - brute).abs() < 1e-8, "{score} {brute}");
                    assert!((0.0..=1.0).contains(score));
                    squares += (components.strengths[i] * score).powi(2);
                }
                let product = norm(&(&ov * &through)) / norm(&through);
                assert!((squares.sqrt() - product).abs() < 1e-9 * product);
                let whole = found.score_of_head(&components);
                assert!((whole - product / norm(&ov)).abs() < 1e-10);
                // Both sides taken apart: squares over the directions read add up.
                let alignments = found.alignments(&components).unwrap();
                for (i, score) in scores.iter().enumerate() {
                    let sum: f64 = alignments.row(i).iter().map(|x| x * x).sum();
                    assert!((sum.sqrt() - score).abs() < 1e-9);
                }
            }
        }
    }
}

#[test]
fn the_factored_svd_is_the_dense_one() {
    let model = model(DECODER, 4);
    let heads = Heads::of(&model).unwrap();
    for head in heads.ids() {
        let head = heads.head(head).unwrap();
        let components = Components::of(&head).unwrap();
        let (ov, _) = dense(&head);
        let svd = thin_svd(ov.as_ref()).unwrap();
        for i in 0..components.count() {
            assert!((components.strengths[i] - svd.s[i]).abs() < 1e-8 * svd.s[0]);
            let aligned: f64 = (0..16)
                .map(|c| components.writes[(i, c)] * svd.vt[(i, c)])
                .sum();
            assert!((aligned.abs() - 1.0).abs() < 1e-8, "{aligned}");
        }
        let scaled = Matrix::from_fn(16, components.count(), |r, i| {
            components.reads[(r, i)] * components.strengths[i]
        });
        assert!(norm(&(scaled * &components.writes - &ov)) < 1e-10 * norm(&ov));
    }
}

#[test]
fn scores_do_not_depend_on_the_basis_or_on_scales() {
    let mut rng = generator();
    let rotation = qr(gaussian(16, 16, &mut rng).as_ref()).q;
    let model = model(GATED, 6);
    let heads = Heads::of(&model).unwrap();
    let [writer, reader] = [id(0, 0), id(1, 3)].map(|id| heads.head(id).unwrap());
    let rotated = |head: &Head| Head {
        query: &rotation * &head.query,
        key: &rotation * &head.key,
        value: &rotation * &head.value,
        output: &head.output * rotation.transpose(),
        ..head.clone()
    };
    let scaled = |head: &Head| Head {
        query: Matrix::from_fn(16, 4, |r, c| 7.0 * head.query[(r, c)]),
        value: Matrix::from_fn(16, 4, |r, c| 0.2 * head.value[(r, c)]),
        ..head.clone()
    };
    let scores = |writer: &Head, reader: &Head, composition| {
        let components = Components::of(writer).unwrap();
        Reader::of(reader, composition).scores(components.writes.as_ref())
    };
    for composition in Composition::ALL {
        let expected = scores(&writer, &reader, composition);
        for (writer, reader) in [
            (rotated(&writer), rotated(&reader)),
            (scaled(&writer), scaled(&reader)),
        ] {
            for (a, b) in scores(&writer, &reader, composition).iter().zip(&expected) {
                assert!((a - b).abs() < 1e-9);
            }
        }
    }
}

#[test]
fn folding_leaves_the_scores_of_the_model() {
    for spec in [DECODER, GATED, PARALLEL] {
        let mut factorised: ModelSpec = toml::from_str(spec).unwrap();
        for name in ["query", "output"] {
            factorised
                .low_rank
                .insert(format!("blocks.1.attention.{name}"), 5);
        }
        let factorised = toml::to_string(&factorised).unwrap();
        for spec in [spec, &factorised] {
            let model = model(spec, 7);
            let folded = fold_norms(&model).unwrap();
            let error = difference(&logits(&folded), &logits(&model)).unwrap();
            assert!(error < 1e-10, "{error}");
            let gamma = &folded.parameters()["blocks.1.attention_norm.weight"];
            assert_eq!(gamma.to_vec1::<f64>().unwrap(), vec![1.0; 16]);
            // The heads are the same, read off either.
            let [a, b] =
                [&model, &folded].map(|model| Heads::of(model).unwrap().head(id(1, 1)).unwrap());
            assert!(norm(&(&a.query - &b.query)) < 1e-10 && norm(&(&a.output - &b.output)) < 1e-10);
            for (a, b) in a.constant.iter().zip(&b.constant) {
                assert!((a - b).abs() < 1e-10);
            }
        }
    }
}

/// What all heads of a block add wherever they look, with the bias of their layer.
fn constant_write(model: &Model, block: usize) -> Matrix {
    let heads = Heads::of(model).unwrap();
    let bias = model
        .parameters()
        .get(&format!("blocks.{block}.attention.output.bias"));
    let mut sum = match bias {
        Some(bias) => {
            let bias = bias.to_vec1::<f64>().unwrap();
            Matrix::from_fn(1, bias.len(), |_, c| bias[c])
        }
        None => Matrix::zeros(1, model.spec().width),
    };
    for id in heads.ids().into_iter().filter(|id| id.block == block) {
        let head = heads.head(id).unwrap();
        let constant = Matrix::from_fn(1, head.constant.len(), |_, c| head.constant[c]);
        sum += constant * &head.output;
    }
    let mean = match heads.is_centred() {
        true => sum.row(0).iter().sum::<f64>() / sum.ncols() as f64,
        false => 0.0,
    };
    Matrix::from_fn(1, sum.ncols(), |_, c| sum[(0, c)] - mean)
}

#[test]
fn editing_changes_one_component_and_nothing_else() {
    for spec in [DECODER, GATED, PARALLEL] {
        let model = model(spec, 8);
        let heads = Heads::of(&model).unwrap();
        let edit = |component, factor| ComponentEdit {
            head: id(0, 1),
            component,
            factor,
        };
        let unchanged = scale_components(&model, &[edit(2, 1.0)]).unwrap();
        assert!(difference(&logits(&unchanged), &logits(&model)).unwrap() < 1e-12);

        let edited = scale_components(&model, &[edit(0, 0.0), edit(2, 3.0)]).unwrap();
        assert!(difference(&logits(&edited), &logits(&model)).unwrap() > 1e-3);
        let after = Heads::of(&edited).unwrap();
        for other in heads.ids() {
            let before = dense(&heads.head(other).unwrap()).0;
            let found = dense(&after.head(other).unwrap()).0;
            let components = Components::of(&heads.head(other).unwrap()).unwrap();
            let expected = match other == id(0, 1) {
                false => before,
                true => Matrix::from_fn(16, 16, |r, c| {
                    let one = |i: usize| {
                        components.strengths[i]
                            * components.reads[(r, i)]
                            * components.writes[(i, c)]
                    };
                    before[(r, c)] - one(0) + 2.0 * one(2)
                }),
            };
            assert!(norm(&(found - &expected)) < 1e-9 * norm(&expected));
        }
        let moved = constant_write(&edited, 0) - constant_write(&model, 0);
        assert!(norm(&moved) < 1e-9, "{spec} {}", norm(&moved));

        let all: Vec<_> = keep_only(&heads, id(0, 1), &[]).unwrap();
        assert_eq!(all.len(), 4);
        let removed = scale_components(&model, &all).unwrap();
        let left = Heads::of(&removed).unwrap().head(id(0, 1)).unwrap();
        assert!(norm(&dense(&left).0) < 1e-10);
        let kept = scale_components(&model, &keep_only(&heads, id(0, 1), &[1]).unwrap()).unwrap();
        let kept = Components::of(&Heads::of(&kept).unwrap().head(id(0, 1)).unwrap()).unwrap();
        let expected = Components::of(&heads.head(id(0, 1)).unwrap())
            .unwrap()
            .strengths[1];
        assert!((kept.strengths[0] - expected).abs() < 1e-9 && kept.strengths[1] < 1e-9);
    }
}

#[test]
fn steering_to_where_the_model_stands_changes_nothing() {
    let model = model(DECODER, 9);
    let input = tokens(&IDS);
    let question = Question::new(&model, &input);
    let heads = Heads::of(&model).unwrap();
    let of = |head| Components::of(&heads.head(id(0, head)).unwrap()).unwrap();
    let directions = [of(0).direction(0).unwrap(), of(2).direction(1).unwrap()];
    let steering = Steering::new(1, 6, &directions).unwrap();
    let here = steering.coordinates(&question).unwrap();
    let run = |coordinates: &[f64]| {
        let trace = steering.trace(coordinates).unwrap();
        let pass = Pass {
            trace: Some(&trace),
            ..Pass::default()
        };
        model
            .forward(&input, pass)
            .unwrap()
            .into_logits()
            .unwrap()
            .into_value()
    };
    assert!(difference(&run(&here), &logits(&model)).unwrap() < 1e-12);
    let there = [here[0] + 4.0, here[1] - 1.0];
    assert!(difference(&run(&there), &logits(&model)).unwrap() > 1e-3);
    // Earlier positions do not see it.
    let earlier = |x: Tensor| x.narrow(1, 0, 6).unwrap();
    assert!(difference(&earlier(run(&there)), &earlier(logits(&model))).unwrap() < 1e-12);

    let points = sweep(&question, &steering, id(1, 3), &[here, there.to_vec()]).unwrap();
    for point in &points {
        assert!((point.attention.iter().sum::<f64>() - 1.0).abs() < 1e-9);
    }
    assert_ne!(points[0].attention, points[1].attention);

    assert!(Steering::new(1, 6, &[directions[0].clone(), directions[0].clone()]).is_err());
    assert!(Steering::new(1, 6, &[]).is_err());
    assert!(steering.trace(&[1.0]).is_err());
    let beyond = Steering::new(1, 7, &directions).unwrap();
    let error = beyond.coordinates(&question).unwrap_err().to_string();
    assert!(error.contains("below 7"), "{error}");
}

#[test]
fn random_heads_score_at_chance() {
    let (width, head_width) = (256, 64);
    let mut rng = generator();
    let heads: Vec<Head> = (0..6)
        .map(|head| Head {
            id: id(head / 3, head % 3),
            query: gaussian(width, head_width, &mut rng),
            key: gaussian(width, head_width, &mut rng),
            value: gaussian(width, head_width, &mut rng),
            output: gaussian(head_width, width, &mut rng),
            constant: vec![0.0; head_width],
        })
        .collect();
    let chance = 1.0 / (width as f64).sqrt();
    for composition in Composition::ALL {
        for reader in &heads[3..] {
            let reader = Reader::of(reader, composition);
            let scores: Vec<f64> = heads[..3]
                .iter()
                .flat_map(|head| reader.scores(Components::of(head).unwrap().writes.as_ref()))
                .collect();
            let count = scores.len() as f64;
            let mean = scores.iter().sum::<f64>() / count;
            let deviation = (scores.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / count).sqrt();
            assert!((mean / chance - 1.0).abs() < 0.03, "{mean} {chance}");
            assert!(scores.iter().all(|s| *s < mean + 6.0 * deviation));
        }
    }
}

/// A model in which head 1.0 looks for what component 3 of head 0.1 writes.
fn planted() -> Model {
    let plain = model(WIDE, 10);
    let heads = Heads::of(&plain).unwrap();
    let direction = Components::of(&heads.head(id(0, 1)).unwrap())
        .unwrap()
        .direction(3)
        .unwrap();
    let mut parameters = plain.parameters().clone();
    let gamma = parameters["blocks.1.attention_norm.weight"]
        .to_vec1::<f64>()
        .unwrap();
    let key = parameters["blocks.1.attention.key.weight"]
        .narrow(0, 0, 16)
        .unwrap();
    let key = key.to_vec2::<f64>().unwrap();
    let size = |row: &[f64]| row.iter().map(|x| x * x).sum::<f64>().sqrt();
    let loudest = (0..16)
        .max_by(|a, b| size(&key[*a]).total_cmp(&size(&key[*b])))
        .unwrap();
    let mut query = parameters["blocks.1.attention.query.weight"]
        .to_vec2::<f64>()
        .unwrap();
    for (entry, (v, gamma)) in query[loudest].iter_mut().zip(direction.iter().zip(&gamma)) {
        *entry += 12.0 * v / gamma;
    }
    let query = Tensor::new(query, &Device::Cpu).unwrap();
    parameters.insert("blocks.1.attention.query.weight".to_owned(), query);
    Model::new(plain.spec().clone(), &mut parameters).unwrap()
}

#[test]
fn a_planted_channel_is_found() {
    let model = planted();
    let heads = Heads::of(&model).unwrap();
    let options = ChannelOptions::default();
    let found = channels(&heads, &options, &mut generator()).unwrap();
    let first = found.first().unwrap();
    assert_eq!((first.writer, first.component), (id(0, 1), 3));
    assert_eq!(
        (first.reader, first.composition),
        (id(1, 0), Composition::Query)
    );
    assert!(first.p < 1e-3 && first.z >= 4.0, "{first:?}");
    // The same seed, the same p-values.
    assert_eq!(found, channels(&heads, &options, &mut generator()).unwrap());

    let report = report(&model, &options, 5, &mut generator()).unwrap();
    assert_eq!(report.tables[0].rows[0][0].to_string(), "0.1");
    assert_eq!(report.maps.len(), 6);
    let map = &report.maps[1]; // query, of the best component
    assert!((map.values[1][4] - first.score).abs() < 1e-12);
    assert_eq!(map.values[4][1], 0.0);
}

#[test]
fn p_values_of_random_writes_are_uniform() {
    // Without a plant every component is a draw from the null, up to what one sample of 192
    // readings says.
    let model = model(WIDE, 11);
    let heads = Heads::of(&model).unwrap();
    let options = ChannelOptions {
        threshold: -1e9,
        draws: 999,
    };
    let found = channels(&heads, &options, &mut generator()).unwrap();
    assert_eq!(found.len(), 4 * 3 * 64);
    let low = found.iter().filter(|channel| channel.p <= 0.5).count() as f64;
    let share = low / found.len() as f64;
    assert!((share - 0.5).abs() < 0.1, "{share}");
}

#[test]
fn an_edit_that_changes_nothing_inhibits_nothing() {
    let model = model(DECODER, 12);
    let heads = Heads::of(&model).unwrap();
    let prompt = NamePrompt {
        tokens: IDS.to_vec(),
        subject_position: 1,
        object_position: 4,
    };
    let prompts = [prompt];
    let none = inhibition_score(&model, &model, id(1, 0), &prompts).unwrap();
    assert_eq!((none.attention, none.logit_difference), (0.0, 0.0));
    let edits = keep_only(&heads, id(0, 0), &[]).unwrap();
    let edited = scale_components(&model, &edits).unwrap();
    let some = inhibition_score(&model, &edited, id(1, 0), &prompts).unwrap();
    assert!(some.attention.abs() > 1e-6 && some.logit_difference.abs() > 1e-4);
    assert!(inhibition_score(&model, &edited, id(1, 9), &prompts).is_err());
    assert!(inhibition_score(&model, &edited, id(1, 0), &[]).is_err());
}

#[test]
fn what_cannot_be_read_off_is_refused() {
    let encoder = model(common::ENCODER, 1);
    let error = Heads::of(&encoder).unwrap_err().to_string();
    assert!(
        error.contains("post-norm") && error.contains("decompx"),
        "{error}"
    );
    let model = model(DECODER, 1);
    let heads = Heads::of(&model).unwrap();
    let error = heads.head(id(1, 4)).unwrap_err().to_string();
    assert!(error.contains("1.4") && error.contains("1.3"), "{error}");
    let edit = ComponentEdit {
        head: id(0, 0),
        component: 4,
        factor: 0.0,
    };
    assert!(scale_components(&model, &[edit]).is_err());
    let edit = ComponentEdit {
        component: 0,
        ..edit
    };
    assert!(scale_components(&model, &[edit, edit]).is_err());
    let options = ChannelOptions {
        draws: 0,
        ..ChannelOptions::default()
    };
    assert!(channels(&heads, &options, &mut generator()).is_err());
}

#[derive(Deserialize)]
struct Stored {
    shape: Vec<usize>,
    values: Vec<f64>,
}

#[derive(Deserialize)]
struct ExpectedReader {
    block: usize,
    head: usize,
    composition: String,
    components: Vec<f64>,
    heads: Vec<f64>,
}

#[derive(Deserialize)]
struct Golden {
    spec: ModelSpec,
    parameters: BTreeMap<String, Stored>,
    readers: Vec<ExpectedReader>,
}

#[test]
fn scores_are_those_of_the_oracle() {
    let fixtures: BTreeMap<String, Golden> =
        serde_json::from_str(include_str!("../fixtures/channels.json")).unwrap();
    assert_eq!(fixtures.len(), 2);
    for golden in fixtures.values() {
        let mut parameters: BTreeMap<String, Tensor> = golden
            .parameters
            .iter()
            .map(|(name, stored)| {
                let values =
                    Tensor::from_slice(&stored.values, stored.shape.as_slice(), &Device::Cpu);
                (name.clone(), values.unwrap())
            })
            .collect();
        let model = Model::new(golden.spec.clone(), &mut parameters).unwrap();
        assert_eq!(model.dtype(), DType::F64);
        let mut expected = golden.readers.iter();
        each_reader(&Heads::of(&model).unwrap(), |found| {
            let expected = expected.next().unwrap();
            assert_eq!(found.reader.head, id(expected.block, expected.head));
            assert_eq!(found.reader.composition.name(), expected.composition);
            assert_eq!(found.scores.len(), expected.components.len());
            for (a, b) in found.scores.iter().zip(&expected.components) {
                assert!((a - b).abs() < 1e-9, "{a} {b}");
            }
            for (writer, b) in found.writers.iter().zip(&expected.heads) {
                assert!((found.reader.score_of_head(writer) - b).abs() < 1e-9);
            }
            Ok(())
        })
        .unwrap();
        assert!(expected.next().is_none());
    }
}
