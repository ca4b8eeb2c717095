//! Models whose tokens are organised above the blocks.
#![allow(clippy::panic, clippy::unwrap_used)]

use std::ops::ControlFlow;

use lapidary_kernels::{DType, Device, GradStore, Recomputation, Tensor};
use lapidary_model::generation::{GenerationOptions, generate};
use lapidary_model::{Initialiser, Input, Model, ModelSpec, OpenOptions, Package, Pass, SavedAs};
use lapidary_parts::parameters::{Init, ParameterSource};
use lapidary_signal::meter::Meter;
use lapidary_signal::streams::{Partition, StreamRules};
use lapidary_signal::{Signal, Trace};

const DECODER: &str = r#"
width = 8
input = { kind = "tokens", vocabulary = 11, length = 16 }
final_norm = { kind = "layer" }
head = { kind = "language-model", bias = true }

[[blocks]]
repeat = 3
attention = { kind = "multi-head", heads = 2, causal = true }
feedforward = { kind = "dense", hidden = 16 }

[organisation]
kind = "interleaved"
layout = "(1)2(1)1(1)"
group = 4
groups = 4
latents = 2
width = 6

[organisation.block]
attention = { kind = "multi-head", heads = 2, causal = true }
feedforward = { kind = "dense", hidden = 12 }
"#;

const ENCODER: &str = r#"
width = 8
input = { kind = "tokens", vocabulary = 11, length = 64, position = { kind = "learned" }, token_types = 2 }
final_norm = { kind = "layer" }
head = { kind = "pooled", pool = "mean", labels = 3 }

[[blocks]]
repeat = 3
attention = { kind = "multi-head", heads = 2 }
feedforward = { kind = "dense", hidden = 16 }

[organisation]
kind = "vip-centric"
segment_blocks = 1
segment = 8
vips = 3
size = 4
fine = 2
importance = { kind = "token", id = 9 }
"#;

fn spec(text: &str) -> ModelSpec {
    toml::from_str(text).unwrap()
}

/// Wide enough that everything matters.
struct Lively(Initialiser);

impl ParameterSource for Lively {
    fn parameter(
        &mut self,
        name: &str,
        shape: &[usize],
        init: Init,
    ) -> lapidary_parts::Result<Tensor> {
        let init = match init {
            Init::Normal { .. } | Init::Zeros => Init::Normal { deviation: 0.4 },
            other => other,
        };
        self.0.parameter(name, shape, init)
    }
}

fn lively() -> Lively {
    Lively(Initialiser::new(3, DType::F64, Device::Cpu))
}

fn model(text: &str) -> Model {
    Model::new(spec(text), &mut lively()).unwrap()
}

fn ids(rows: usize, length: usize) -> Tensor {
    let flat: Vec<u32> = (0..rows * length).map(|i| (i * 7 % 11) as u32).collect();
    Tensor::from_vec(flat, (rows, length), &Device::Cpu).unwrap()
}

fn logits(model: &Model, ids: &Tensor, pass: Pass<'_>) -> Vec<f64> {
    let output = model.forward(&Input::tokens(ids.clone()), pass).unwrap();
    let logits = output.into_logits().unwrap().into_value();
    logits.flatten_all().unwrap().to_vec1().unwrap()
}

fn largest(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let pairs = a.iter().zip(b);
    pairs.fold(0.0, |most: f64, (a, b)| most.max((a - b).abs()))
}

#[test]
fn specs_say_how_tokens_are_organised() {
    for text in [DECODER, ENCODER] {
        let spec = spec(text);
        let again: ModelSpec = toml::from_str(&toml::to_string(&spec).unwrap()).unwrap();
        assert_eq!(spec, again);
        let model = Model::initialised(spec.clone(), 1, DType::F32, &Device::Cpu).unwrap();
        assert_eq!(
            model.parameter_count() as u64,
            spec.parameter_count().unwrap()
        );
        let paths: Vec<&str> = model
            .linears()
            .iter()
            .map(|layer| layer.path.as_str())
            .collect();
        assert!(paths.contains(&"blocks.2.attention.query"));
        // Every linear layer reads a site that is there.
        let trace = Trace::new().capture("none").unwrap();
        let pass = Pass {
            trace: Some(&trace),
            ..Pass::default()
        };
        model.forward(&Input::tokens(ids(2, 16)), pass).unwrap();
        let names = trace.names();
        for layer in model.linears() {
            assert!(names.contains(&layer.input_site), "{}", layer.input_site);
        }
    }
    let plain = ModelSpec {
        organisation: None,
        ..spec(ENCODER)
    };
    assert!(!toml::to_string(&plain).unwrap().contains("organisation"));
    assert!(spec(DECODER).is_causal() && !spec(ENCODER).is_causal());
    let model = model(DECODER);
    for path in [
        "organisation.read.0.attention.key",
        "organisation.global.2.feedforward.up",
    ] {
        assert!(
            model.linears().iter().any(|layer| layer.path == path),
            "{path}"
        );
    }
    let unknown = DECODER.replace("latents = 2", "latent = 2");
    let said = toml::from_str::<ModelSpec>(&unknown)
        .unwrap_err()
        .to_string();
    assert!(said.contains("latent"), "{said}");
}

#[test]
fn vip_tokens_are_of_ids_and_types_that_the_input_has() {
    let refused = |importance: &str, expected: &str| {
        let text = ENCODER.replace("kind = \"token\", id = 9", importance);
        let said = spec(&text).validate().unwrap_err().to_string();
        assert_eq!(said, format!("organisation.importance.{expected}"));
    };
    refused(
        "kind = \"token\", id = 11",
        "id is 11, but must be below 11, the input's vocabulary",
    );
    refused(
        "kind = \"token-type\", id = 2",
        "id is 2, but must be below 2, the input's token_types",
    );
    let with = |text: &str, from: &str, to: &str| {
        assert!(text.contains(from), "{from}");
        text.replace(from, to)
    };
    let by_type = with(
        ENCODER,
        "kind = \"token\", id = 9",
        "kind = \"token-type\", id = 1",
    );
    spec(&by_type).validate().unwrap();
    let said = |text: &str| spec(text).validate().unwrap_err().to_string();
    assert_eq!(
        said(&with(&by_type, ", token_types = 2", "")),
        "organisation.importance.kind is \"token-type\", but must be first or token in a model without \
         input.token_types"
    );
    let images = with(
        &by_type,
        "kind = \"tokens\", vocabulary = 11, length = 64, position = { kind = \"learned\" }, token_types = 2",
        "kind = \"patches\", image = [8, 8], patch = 2, channels = 1",
    );
    assert_eq!(
        said(&images),
        "organisation.importance.kind is \"token-type\", but must be first in a model of images, whose \
         patches have neither ids nor types"
    );
}

/// What is generated is what the whole sequence says, token by token.
#[test]
fn a_decoder_of_groups_generates() {
    let model = model(DECODER);
    let prompts = vec![vec![1, 2, 3], vec![4, 5, 6, 7, 8]];
    let with = |cache| {
        let options = GenerationOptions {
            new_tokens: 20,
            cache,
            ..GenerationOptions::default()
        };
        generate(&model, &prompts, &options, |_, _| ControlFlow::Continue(())).unwrap()
    };
    let generated = with(true);
    assert_eq!(generated, with(false));
    for (prompt, new) in prompts.iter().zip(&generated) {
        let mut tokens = prompt.clone();
        // It ends one token behind the model's length.
        assert_eq!(prompt.len() + new.len(), 17);
        for next in new {
            let row = Tensor::from_vec(tokens.clone(), (1, tokens.len()), &Device::Cpu).unwrap();
            let scores = logits(&model, &row, Pass::default());
            let last = &scores[scores.len() - 11..];
            let best = (0..11)
                .max_by(|a, b| last[*a].total_cmp(&last[*b]))
                .unwrap();
            assert_eq!(best as u32, *next);
            tokens.push(*next);
        }
    }
}

#[test]
fn a_decoder_of_groups_goes_on_from_what_it_keeps() {
    let model = model(DECODER);
    let x = ids(2, 16);
    let whole = logits(&model, &x, Pass::default());
    let mut state = model.decode_state();
    let mut found = vec![Vec::new(); 2];
    for (start, count) in [(0, 6), (6, 1), (7, 1), (8, 8)] {
        let pass = Pass {
            state: Some(&mut state),
            ..Pass::default()
        };
        let piece = x.narrow(1, start, count).unwrap().contiguous().unwrap();
        let scores = logits(&model, &piece, pass);
        for (row, scores) in found.iter_mut().zip(scores.chunks(count * 11)) {
            row.extend(scores);
        }
    }
    assert_eq!(state.length, 16);
    assert!(largest(&whole, &found.concat()) < 1e-12);
    // One that looks ahead cannot.
    let both = DECODER.replace(", causal = true", "");
    let both =
        self::model(&both.replace("kind = \"language-model\", bias = true", "kind = \"none\""));
    let mut state = both.decode_state();
    let pass = Pass {
        state: Some(&mut state),
        ..Pass::default()
    };
    let said = both.forward(&Input::tokens(ids(1, 8)), pass).unwrap_err();
    let said = said.to_string();
    assert!(said.starts_with("decode state is \"given\""), "{said}");
}

#[test]
fn steps_and_starts_in_the_middle_are_refused() {
    for text in [DECODER, ENCODER] {
        let model = model(text);
        let input = Input::tokens(ids(1, 8));
        if text == ENCODER {
            let mut state = model.decode_state();
            let pass = Pass {
                state: Some(&mut state),
                ..Pass::default()
            };
            let said = model.forward(&input, pass).unwrap_err().to_string();
            assert!(said.starts_with("decode state is \"given\""), "{said}");
        }
        let hidden = Signal::from(Tensor::zeros((1, 8, 8), DType::F64, &Device::Cpu).unwrap());
        let pass = Pass {
            start: Some((1, &hidden)),
            ..Pass::default()
        };
        let said = model.forward(&input, pass).unwrap_err().to_string();
        assert!(said.starts_with("block to start at is 1"), "{said}");
        // At the first block is where any pass begins.
        let trace = Trace::new().capture("embeddings").unwrap();
        let pass = Pass {
            trace: Some(&trace),
            ..Pass::default()
        };
        let whole = logits(&model, &ids(1, 8), pass);
        let embeddings = trace.signal("embeddings").unwrap();
        let pass = Pass {
            start: Some((0, &embeddings)),
            ..Pass::default()
        };
        assert_eq!(whole, logits(&model, &ids(1, 8), pass));
    }
}

#[test]
fn recomputed_blocks_have_the_same_gradients() {
    // Parts that are left out are left out again.
    let dropping = DECODER
        .replace("repeat = 3", "repeat = 3\ndrop_path = 0.3")
        .replace(
            "[organisation.block]",
            "[organisation.block]\ndrop_path = 0.3",
        );
    let model = Model::trainable(spec(&dropping), &mut lively()).unwrap();
    let gradients = |recomputation: Option<&Recomputation>| -> GradStore {
        let pass = Pass {
            recomputation,
            dropout_seed: Some(1),
            draw: Some(1),
            ..Pass::default()
        };
        let output = model.forward(&Input::tokens(ids(2, 14)), pass).unwrap();
        let logits = output.into_logits().unwrap().into_value();
        let mut found = logits.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        if let Some(recomputation) = recomputation {
            recomputation.add_to(&mut found).unwrap();
        }
        found
    };
    let recomputation = Recomputation::of(model.variables().values());
    let (plain, recomputed) = (gradients(None), gradients(Some(&recomputation)));
    // What latents end as is looked at and not read from.
    let trained = model.variables().iter();
    for (name, variable) in trained.filter(|(name, _)| !name.contains("latent_norm")) {
        let of = |store: &GradStore| -> Vec<f64> {
            let gradient = store.get(variable.as_tensor()).unwrap();
            gradient.flatten_all().unwrap().to_vec1().unwrap()
        };
        let (a, b) = (of(&plain), of(&recomputed));
        let scale = a.iter().fold(1.0, |most: f64, x| most.max(x.abs()));
        assert!(largest(&a, &b) < 1e-10 * scale, "{name}");
    }
}

/// The choice of blocks, the blocks themselves and the bias of means: with dropout, exploration and pads.
#[test]
fn recomputed_blocks_of_a_compressed_sequence_have_the_same_gradients() {
    let text = ENCODER
        .replace("repeat = 3", "repeat = 4\ndropout = 0.2\ndrop_path = 0.2")
        .replace(
            "fine = 2",
            "fine = 2\nexploration = 0.5\nwhole_blocks = [2]",
        );
    let model = Model::trainable(spec(&text), &mut lively()).unwrap();
    let keep: Vec<u8> = (0..100).map(|i| u8::from(i < 50 || i % 50 < 31)).collect();
    let keep = Tensor::from_vec(keep, (2, 50), &Device::Cpu).unwrap();
    let run = |recomputation: Option<&Recomputation>| -> (Vec<f64>, GradStore) {
        let pass = Pass {
            padding: Some(&keep),
            recomputation,
            dropout_seed: Some(1),
            draw: Some(1),
            ..Pass::default()
        };
        let output = model.forward(&Input::tokens(ids(2, 50)), pass).unwrap();
        let logits = output.into_logits().unwrap().into_value();
        let mut found = logits.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        if let Some(recomputation) = recomputation {
            recomputation.add_to(&mut found).unwrap();
        }
        (logits.flatten_all().unwrap().to_vec1().unwrap(), found)
    };
    let recomputation = Recomputation::of(model.variables().values());
    let (plain, recomputed) = (run(None), run(Some(&recomputation)));
    assert!(largest(&plain.0, &recomputed.0) < 1e-12);
    let mut compared = 0;
    for (name, variable) in model.variables() {
        let of = |store: &GradStore| -> Option<Vec<f64>> {
            let gradient = store.get(variable.as_tensor())?;
            Some(gradient.flatten_all().unwrap().to_vec1().unwrap())
        };
        let (a, b) = match (of(&plain.1), of(&recomputed.1)) {
            (Some(a), Some(b)) => (a, b),
            (None, None) => continue,
            _ => panic!("{name} has a gradient in one of two passes"),
        };
        compared += 1;
        let scale = a.iter().fold(1.0, |most: f64, x| most.max(x.abs()));
        assert!(largest(&a, &b) < 1e-10 * scale, "{name}");
    }
    assert!(compared > model.variables().len() - 3, "{compared}");
}

#[test]
fn vips_are_tokens_of_the_input() {
    let by_id = model(ENCODER);
    let x = ids(2, 64);
    let scores = logits(&by_id, &x, Pass::default());
    assert!(scores.iter().all(|score| score.is_finite()));
    // Other VIPs are other blocks in full.
    let by_place = ENCODER.replace("{ kind = \"token\", id = 9 }", "{ kind = \"first\" }");
    assert!(largest(&scores, &logits(&model(&by_place), &x, Pass::default())) > 1e-9);
    let by_type = model(&ENCODER.replace("\"token\", id = 9", "\"token-type\", id = 1"));
    let said = by_type
        .forward(&Input::tokens(x.clone()), Pass::default())
        .unwrap_err();
    assert!(
        said.to_string().starts_with("token types is \"absent\""),
        "{said}"
    );
    let types = Tensor::from_vec(
        (0..128u32)
            .map(|i| u32::from(i % 64 < 3))
            .collect::<Vec<_>>(),
        (2, 64),
        &Device::Cpu,
    );
    let input = Input::Tokens {
        ids: x.clone(),
        token_types: Some(types.unwrap()),
    };
    by_type.forward(&input, Pass::default()).unwrap();
    // Exploration is a draw of the pass.
    let exploring = ENCODER.replace("fine = 2", "fine = 2\nexploration = 1.0");
    let exploring = model(&exploring);
    let drawn = |seed| {
        let pass = Pass {
            draw: Some(seed),
            ..Pass::default()
        };
        logits(&exploring, &x, pass)
    };
    assert_eq!(drawn(1), drawn(1));
    assert!((2..8).any(|seed| largest(&drawn(seed), &drawn(1)) > 1e-9));
    assert_eq!(logits(&exploring, &x, Pass::default()), scores);
}

/// With every block of the sequence in full the model is the one without an organisation.
#[test]
fn an_organisation_that_leaves_nothing_out_is_none() {
    let all = ENCODER
        .replace("fine = 2", "fine = 16")
        .replace("segment = 8", "segment = 64");
    let organised = model(&all);
    let plain = ModelSpec {
        organisation: None,
        ..spec(ENCODER)
    };
    let plain = Model::new(plain, &mut organised.parameters().clone()).unwrap();
    let x = ids(2, 50);
    let keep: Vec<u8> = (0..100).map(|i| u8::from(i < 50 || i % 50 < 31)).collect();
    let keep = Tensor::from_vec(keep, (2, 50), &Device::Cpu).unwrap();
    for padding in [None, Some(&keep)] {
        let pass = || Pass {
            padding,
            ..Pass::default()
        };
        let found = largest(&logits(&organised, &x, pass()), &logits(&plain, &x, pass()));
        assert!(found < 1e-10, "{found:e}");
    }
}

#[test]
fn latents_can_be_what_is_pooled() {
    let text = DECODER
        .replace("causal = true", "causal = false")
        .replace("width = 6", "output = \"latents\"")
        .replace(
            "head = { kind = \"language-model\", bias = true }",
            "head = { kind = \"pooled\", pool = \"mean\", labels = 3 }",
        );
    let pooled = model(&text);
    let x = ids(1, 6);
    let scores = logits(&pooled, &x, Pass::default());
    assert_eq!(scores.len(), 3);
    // Latents of groups that are pads alone do not count.
    let padded = Tensor::cat(&[&x, &ids(1, 10)], 1).unwrap();
    let keep = [[1u8; 6].as_slice(), &[0; 10]].concat();
    let keep = Tensor::from_vec(keep, (1, 16), &Device::Cpu).unwrap();
    let pass = Pass {
        padding: Some(&keep),
        ..Pass::default()
    };
    assert!(largest(&logits(&pooled, &padded, pass), &scores) < 1e-12);
    let refused = |text: &str, start: &str| {
        let said = spec(text).validate().unwrap_err().to_string();
        assert!(said.starts_with(start), "{said}");
    };
    refused(
        &text.replace("\"mean\"", "\"highest-id\""),
        "organisation.output is",
    );
    let language = DECODER
        .replace("causal = true", "causal = false")
        .replace("width = 6", "output = \"latents\"");
    refused(&language, "organisation.output is");
    refused(
        &DECODER.replace("group = 4", "group = 3"),
        "organisation.groups is 4",
    );
    refused(
        &DECODER.replace("(1)2(1)1(1)", "(1)2(1)"),
        "organisation.layout is",
    );
    // Tokens that come out would not hear of what latents are last.
    let behind = DECODER.replace("(1)2(1)1(1)", "(1)2(2)1");
    refused(
        &behind,
        "organisation.layout is \"(1)2(2)1\", but must be (1)2(2)1(0) at least",
    );
    assert!(
        spec(&behind.replace("(1)2(2)1", "(1)2(2)1(0)"))
            .validate()
            .is_ok()
    );
    refused(
        &ENCODER.replace("segment_blocks = 1", "segment_blocks = 9"),
        "organisation.segment",
    );
}

#[test]
fn shared_blocks_written_out_are_organised_alike() {
    for text in [DECODER, ENCODER] {
        let shared = model(&text.replace("repeat = 3", "repeat = 3\nshared = true"));
        let out = shared.written_out().unwrap();
        assert_eq!(out.spec().blocks.len(), 3);
        let x = ids(2, 16);
        assert_eq!(
            logits(&shared, &x, Pass::default()),
            logits(&out, &x, Pass::default())
        );
    }
}

#[test]
fn organised_models_are_saved_and_opened() {
    for text in [DECODER, ENCODER] {
        let model = Model::initialised(spec(text), 2, DType::F32, &Device::Cpu).unwrap();
        let package = Package::new(model, None);
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("saved");
        assert_eq!(package.save(&target, None).unwrap(), SavedAs::Lapidary);
        let again = Package::open(&target, &OpenOptions::default()).unwrap();
        let (before, after) = (
            package.single_model().unwrap(),
            again.single_model().unwrap(),
        );
        assert_eq!(before.spec(), after.spec());
        let scores = |model: &Model| {
            let output = model.forward(&Input::tokens(ids(1, 12)), Pass::default());
            let logits = output.unwrap().into_logits().unwrap().into_value();
            logits.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        assert_eq!(scores(before), scores(after));
    }
}

#[test]
fn lenses_and_the_meter_go_through_whole_models() {
    for text in [DECODER, ENCODER] {
        let model = model(text);
        let x = ids(1, 16);
        let plain = logits(&model, &x, Pass::default());
        let trace = Trace::new()
            .replace("embeddings", |_, signal| {
                signal.into_streams(Partition::positions(16), StreamRules::default())
            })
            .unwrap()
            .follow_conservation();
        let pass = Pass {
            trace: Some(&trace),
            ..Pass::default()
        };
        let output = model.forward(&Input::tokens(x.clone()), pass).unwrap();
        let scores = output.into_logits().unwrap();
        let flat: Vec<f64> = scores.value().flatten_all().unwrap().to_vec1().unwrap();
        assert!(largest(&flat, &plain) < 1e-10);
        for (site, error) in trace.conservation() {
            assert!(error < 1e-9, "{site}: {error:e}");
        }
        let meter = Meter::new();
        let start = meter.clone();
        let trace = Trace::new()
            .replace("embeddings", move |_, signal| {
                Ok(signal.into_metered(start.clone()))
            })
            .unwrap();
        let pass = Pass {
            trace: Some(&trace),
            ..Pass::default()
        };
        logits(&model, &x, pass);
        assert!(meter.total().flops > 0);
    }
}
