//! Blocks that share one set of weights.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use lapidary_kernels::check::difference;
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Initialiser, Input, Model, ModelSpec, OpenOptions, Package, Pass, SavedAs};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

const SPEC: &str = r#"
width = 8
[input]
kind = "tokens"
vocabulary = 11
length = 6
embedding_width = 4
projected = "sum"
position = { kind = "learned" }
norm = { kind = "layer" }
[[blocks]]
attention = { kind = "multi-head", heads = 2 }
[[blocks]]
repeat = 3
shared = true
wiring = "post-norm"
attention = { kind = "multi-head", heads = 2 }
feedforward = { kind = "dense", hidden = 12 }
[head]
kind = "language-model"
transform = { activation = "gelu", norm = { kind = "layer" }, narrows = true }
[low_rank]
"blocks.1.feedforward.up" = 3
"#;

fn spec() -> ModelSpec {
    toml::from_str(SPEC).unwrap()
}

fn logits(model: &Model) -> Tensor {
    let ids = Tensor::new(&[[1u32, 7, 3, 3, 10]], &Device::Cpu).unwrap();
    let output = model.forward(&Input::tokens(ids), Pass::default()).unwrap();
    output.into_logits().unwrap().into_value()
}

#[test]
fn weights_are_stored_once_and_written_out_on_demand() {
    let model = Model::initialised(spec(), 3, DType::F64, &Device::Cpu).unwrap();
    let blocks = |model: &Model| -> BTreeSet<String> {
        let names = model.parameters().keys();
        names
            .filter_map(|name| Some(name.strip_prefix("blocks.")?.split_once('.')?.0.to_owned()))
            .collect()
    };
    assert_eq!(blocks(&model), ["0", "1"].map(str::to_owned).into());
    assert!(model.linears().iter().all(|linear| {
        let index = linear.path.strip_prefix("blocks.");
        index.is_none_or(|rest| rest.starts_with("0.") || rest.starts_with("1."))
    }));
    assert!(model.shares_weights());
    // Of the spec, before anything is made: every layer dense.
    let mut dense = spec();
    dense.low_rank.clear();
    let made = Model::initialised(dense.clone(), 3, DType::F32, &Device::Cpu).unwrap();
    assert_eq!(
        dense.parameter_count().unwrap(),
        made.parameter_count() as u64
    );
    let out = model.written_out().unwrap();
    assert!(!out.shares_weights());
    assert_eq!(blocks(&out).len(), 4);
    assert_eq!(out.spec().low_rank.len(), 3);
    assert_eq!(difference(&logits(&out), &logits(&model)).unwrap(), 0.0);
    // Each pass does something.
    let mut fewer = spec();
    fewer.blocks[1].repeat = 2;
    let fewer = Model::new(fewer, &mut model.parameters().clone()).unwrap();
    assert!(difference(&logits(&fewer), &logits(&model)).unwrap() > 1e-6);
}

#[test]
fn a_shared_variable_gets_the_gradients_of_all_its_uses() {
    let mut source = Initialiser::new(4, DType::F64, Device::Cpu);
    let model = Model::trainable(spec(), &mut source).unwrap();
    let out = model.written_out().unwrap();
    // Copies, as a variable stays the same variable under several names.
    let copied = out.parameters().iter();
    let copied = copied.map(|(name, tensor)| (name.clone(), tensor.detach().copy().unwrap()));
    let mut copied: BTreeMap<String, Tensor> = copied.collect();
    let apart = Model::trainable(out.spec().clone(), &mut copied).unwrap();
    let gradient = |model: &Model, name: &str| {
        let loss = logits(model).sqr().unwrap().sum_all().unwrap();
        let gradients = loss.backward().unwrap();
        gradients
            .get(model.variables()[name].as_tensor())
            .unwrap()
            .clone()
    };
    for name in [
        "attention.query.weight",
        "feedforward.up.down",
        "attention_norm.bias",
    ] {
        let own = gradient(&model, &format!("blocks.1.{name}"));
        let sum = (1..4)
            .map(|block| gradient(&apart, &format!("blocks.{block}.{name}")))
            .reduce(|a, b| (a + b).unwrap())
            .unwrap();
        assert!(difference(&own, &sum).unwrap() < 1e-12, "{name}");
    }
}

#[test]
fn shared_blocks_are_saved_once() {
    let model = Model::initialised(spec(), 5, DType::F32, &Device::Cpu).unwrap();
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
    assert_eq!(difference(&logits(before), &logits(after)).unwrap(), 0.0);
    let bytes = std::fs::metadata(target.join("model.safetensors"))
        .unwrap()
        .len();
    let stored = 4 * before.parameter_count() as u64;
    assert!(
        (stored..stored + 8192).contains(&bytes),
        "{bytes} for {stored}"
    );
}

#[test]
fn an_albert_has_one_set_of_weights_for_each_group() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/families/albert");
    let package = Package::open(&path, &OpenOptions::default()).unwrap();
    let spec = package.single_model().unwrap().spec();
    // Layer i of 5 in 2 groups has group ⌊2 i / 5⌋.
    let repeats: Vec<usize> = spec.blocks.iter().map(|block| block.repeat).collect();
    assert_eq!(repeats, [3, 2]);
    assert!(spec.blocks.iter().all(|block| block.shared));
}

#[test]
fn what_makes_no_sense_is_refused() {
    let refused = |from: &str, to: &str, field: &str| {
        let spec: ModelSpec = toml::from_str(&SPEC.replace(from, to)).unwrap();
        let error = Model::initialised(spec, 1, DType::F32, &Device::Cpu).unwrap_err();
        assert!(error.to_string().starts_with(field), "{error}");
    };
    refused("embedding_width = 4\n", "", "input.projected");
    // A layer of a later pass is that of the first.
    refused(
        "blocks.1.feed",
        "blocks.2.feed",
        "low_rank.blocks.2.feedforward.up",
    );
}

/// A scale goes into whatever linear layer ends a part, and is refused where none does.
#[test]
fn scales_are_written_into_linear_parts_and_not_lost_behind_others() {
    let scaled = |feedforward: &str| {
        let block = format!("shared = true\nlayer_scale = 0.5\nfeedforward = {feedforward}");
        let text = SPEC
            .replace("feedforward = { kind = \"dense\", hidden = 12 }\n", "")
            .replace("shared = true\nwiring = \"post-norm\"", &block)
            .replace("\"blocks.1.feedforward.up\" = 3", "");
        let spec = toml::from_str(&text).unwrap();
        Model::initialised(spec, 6, DType::F64, &Device::Cpu).unwrap()
    };
    let linear = scaled(r#"{ kind = "linear" }"#);
    let out = linear.written_out().unwrap();
    assert!(!out.scales_layers());
    assert!(difference(&logits(&out), &logits(&linear)).unwrap() < 1e-12);
    let unscaled = |name: &str| out.parameters()[name].clone();
    let (after, before) = (
        unscaled("blocks.1.feedforward.map.weight"),
        &linear.parameters()["blocks.1.feedforward.map.weight"],
    );
    assert!(difference(&after, &(before * 0.5).unwrap()).unwrap() < 1e-15);
    let coded = scaled(r#"{ kind = "sparse-code" }"#).written_out();
    let error = coded.unwrap_err().to_string();
    assert!(error.contains("blocks.1.layer_scale"), "{error}");
}

/// What layers share stands once, so that a layer with other fields would have those of the first, or none that fit.
#[test]
fn layers_that_share_what_differs_are_refused() {
    let read = |first: &str, second: &str| -> ModelSpec {
        toml::from_str(&format!(
            "width = 8\ninput = {{ kind = 'tokens', vocabulary = 11, length = 6 }}\nhead = {{ kind = 'none' }}\n\
             blocks = [{{ attention = {{ kind = 'multi-head', {first} }} }}, \
             {{ attention = {{ kind = 'multi-head', {second} }} }}]"
        ))
        .unwrap()
    };
    let fire = |fields: &str| format!("position = {{ kind = 'fire', shared = true, {fields} }}");
    let slots = |fields: &str| {
        format!(
            "mechanism = {{ kind = 'linformer', sharing = 'layerwise', longest = 6, {fields} }}"
        )
    };
    let heads = |heads: usize, rest: &str| format!("heads = {heads}, {rest}");
    let [network, longer] = ["hidden = 8", "hidden = 8, initial_length = 9"].map(fire);
    let [four, five] = ["slots = 4", "slots = 5"].map(slots);
    for (first, second, field) in [
        (heads(2, &network), heads(4, &network), "position.shared"),
        (heads(2, &network), heads(2, &longer), "position.shared"),
        (heads(2, &four), heads(2, &five), "mechanism.sharing"),
    ] {
        let said = read(&first, &second).validate().unwrap_err().to_string();
        let expected = format!("blocks.1.attention.{field} is \"another than that of blocks.0\"");
        assert!(said.starts_with(&expected), "{said}");
    }
    let drawn = fire("hidden = 8, randomised = 20");
    for (first, second) in [
        (heads(2, &network), heads(2, &drawn)),
        (heads(2, &four), heads(4, &four)),
    ] {
        read(&first, &second).validate().unwrap();
    }
}

/// Of another sequence, in a space of wavelets, on some of the keys, or between groups.
#[test]
fn attentions_that_stand_in_others_share_as_well() {
    let sharing = |slots: usize| {
        format!("kind = 'linformer', sharing = 'layerwise', longest = 6, slots = {slots}")
    };
    let plain = |slots: usize| format!("heads = 2, mechanism = {{ {} }}", sharing(slots));
    let own = |slots: usize| format!("attention = {{ kind = 'multi-head', {} }}", plain(slots));
    let read = |second: &str, more: &str| -> ModelSpec {
        toml::from_str(&format!(
            "width = 8\ninput = {{ kind = 'tokens', vocabulary = 11, length = 6 }}\nhead = {{ kind = 'none' }}\n\
             blocks = [{{ {} }}, {{ {second} }}]\n{more}",
            own(4)
        ))
        .unwrap()
    };
    let cross = |slots| format!("{}, cross_attention = {{ {} }}", own(4), plain(slots));
    let wavelet = |slots| {
        let inner = format!("{{ kind = 'multi-head', {} }}", plain(slots));
        format!("attention = {{ kind = 'wavelet', inner = {inner} }}")
    };
    let subsampled = |slots| {
        let inner = format!(
            "{{ kind = 'subsampled', inner = {{ {} }} }}",
            sharing(slots)
        );
        format!("attention = {{ kind = 'multi-head', heads = 2, mechanism = {inner} }}")
    };
    for (second, field) in [
        (
            [4, 5].map(cross),
            "blocks.1.cross_attention.mechanism.sharing",
        ),
        (
            [4, 5].map(wavelet),
            "blocks.1.attention.inner.mechanism.sharing",
        ),
        (
            [4, 5].map(subsampled),
            "blocks.1.attention.mechanism.inner.sharing",
        ),
    ] {
        let [same, other] = second.map(|second| read(&second, ""));
        same.validate().unwrap();
        let said = other.validate().unwrap_err().to_string();
        let expected = format!("{field} is \"another than that of blocks.0\"");
        assert!(said.starts_with(&expected), "{said}");
    }
    let groups = |slots: usize| {
        format!(
            "organisation = {{ kind = 'interleaved', layout = '(2)1(0)', group = 3, groups = 2, latents = 2, \
             block = {{ {} }} }}",
            own(slots)
        )
    };
    read(&own(4), &groups(4)).validate().unwrap();
    let said = read(&own(4), &groups(5))
        .validate()
        .unwrap_err()
        .to_string();
    let expected =
        "organisation.block.attention.mechanism.sharing is \"another than that of blocks.0\"";
    assert!(said.starts_with(expected), "{said}");
}
