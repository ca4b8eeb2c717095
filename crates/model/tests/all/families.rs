//! Every family against `transformers`: small random checkpoints made by
//! `tests/oracles/families.py`, with the outputs that library computes.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests fail by panicking"
)]

use std::path::{Path, PathBuf};

use lapidary_kernels::{D, DType, Device, Tensor};
use lapidary_model::{
    Checkpoint, HeadSpec, Input, Limits, Model, ModelSpec, OpenOptions, Package, Pass, SavedAs,
};
use lapidary_parts::attention::{MixerSpec, MultiHeadSpec};
use lapidary_parts::block::BlockSpec;
use lapidary_parts::feedforward::FeedforwardSpec;
use lapidary_parts::norm::NormSpec;
use lapidary_signal::Trace;

const FAMILIES: [&str; 24] = [
    "albert",
    "albert-masked-lm",
    "bert",
    "bert-classifier",
    "bert-masked-lm",
    "bert-masked-lm-old-names",
    "clip",
    "deit",
    "gpt2",
    "gpt2-old-names",
    "llama",
    "llama-tied",
    "mamba",
    "mamba2",
    "mistral",
    "mixtral",
    "olmoe",
    "opt",
    "opt-projected",
    "opt-projected-pre-norm",
    "qwen2",
    "roberta-classifier",
    "roberta-masked-lm",
    "vit",
];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/fixtures/families")
        .join(name)
}

struct Case(Checkpoint);

impl Case {
    fn open(name: &str) -> Self {
        let path = fixture(name).join("case.safetensors");
        Self(Checkpoint::open_file(&path, &Limits::default()).unwrap())
    }

    fn get(&self, name: &str) -> Option<Tensor> {
        self.0
            .contains(name)
            .then(|| self.0.tensor(name, DType::F32).unwrap())
    }

    fn integers(&self, name: &str) -> Option<Tensor> {
        self.get(name)
            .map(|tensor| tensor.to_dtype(DType::U32).unwrap())
    }
}

/// Largest difference at real tokens, relative to the largest expected value.
fn difference(found: &Tensor, expected: &Tensor, padding: Option<&Tensor>) -> f64 {
    assert_eq!(found.dims(), expected.dims());
    let mut gap = (found - expected).unwrap().abs().unwrap();
    if let (Some(padding), 3) = (padding, gap.rank()) {
        let keep = padding
            .to_dtype(DType::F32)
            .unwrap()
            .unsqueeze(D::Minus1)
            .unwrap();
        gap = gap.broadcast_mul(&keep).unwrap();
    }
    let max = |t: &Tensor| {
        t.flatten_all()
            .unwrap()
            .max(0)
            .unwrap()
            .to_scalar::<f32>()
            .unwrap()
    };
    f64::from(max(&gap) / max(&expected.abs().unwrap()))
}

fn check(name: &str, model: &Model, case: &Case, input: &Input, prefix: &str) {
    let padding = case
        .integers("attention_mask")
        .map(|mask| mask.to_dtype(DType::U8).unwrap());
    let padding = padding.filter(|_| matches!(input, Input::Tokens { .. }));
    let trace = Trace::new().capture("*").unwrap();
    let pass = Pass {
        padding: padding.as_ref(),
        trace: Some(&trace),
        ..Pass::default()
    };
    let output = model.forward(input, pass).unwrap();
    let mut compared = 0;
    let mut compare = |what: &str, found: &Tensor| {
        if let Some(expected) = case.get(&format!("{prefix}{what}")) {
            let gap = difference(found, &expected, padding.as_ref());
            assert!(gap < 1e-4, "{name}: {what} differs by {gap}");
            compared += 1;
        }
    };
    let blocks = model.spec().expanded_blocks().len();
    for block in 0..blocks {
        // Of a Mamba the library lists what blocks give, of everything else what they get.
        let site = format!(
            "blocks.{block}.{}",
            if name.starts_with("mamba") {
                "out"
            } else {
                "in"
            }
        );
        compare(
            &format!("hidden_states.{block}"),
            trace.signal(&site).unwrap().value(),
        );
        let site = format!("blocks.{block}.attention.weights");
        if let Ok(weights) = trace.signal(&site) {
            let keep = padding
                .as_ref()
                .map(|p| p.unsqueeze(1).unwrap().unsqueeze(3).unwrap());
            let expected = case.get(&format!("{prefix}attentions.{block}"));
            if let Some(expected) = expected {
                let mut gap = (weights.value() - expected).unwrap().abs().unwrap();
                if let Some(keep) = keep {
                    gap = gap
                        .broadcast_mul(&keep.to_dtype(DType::F32).unwrap())
                        .unwrap();
                }
                let gap = gap
                    .flatten_all()
                    .unwrap()
                    .max(0)
                    .unwrap()
                    .to_scalar::<f32>()
                    .unwrap();
                assert!(
                    gap < 1e-4,
                    "{name}: attention weights of block {block} differ by {gap}"
                );
            }
        }
    }
    // The library's last hidden states are those after the final norm, but for vision models; and
    // those of a projected OPT are projected.
    if matches!(input, Input::Pixels(_)) {
        let last = format!("blocks.{}.out", blocks - 1);
        compare(
            &format!("hidden_states.{blocks}"),
            trace.signal(&last).unwrap().value(),
        );
    } else if !name.starts_with("opt-projected") && prefix == "expected." {
        compare(&format!("hidden_states.{blocks}"), output.hidden.value());
    }
    compare("last_hidden_state", output.hidden.value());
    if let Some(pooled) = &output.pooled {
        compare("pooler_output", pooled.value());
    }
    if let Some(logits) = &output.logits {
        compare("logits", logits.value());
    }
    assert!(
        compared >= 3,
        "{name}: only {compared} outputs were compared"
    );
}

/// What the case gives a model to read.
fn input_of(case: &Case, model: &Model) -> Input {
    match model.spec().vocabulary() {
        Some(_) => Input::Tokens {
            ids: case.integers("input_ids").unwrap(),
            token_types: case.integers("token_type_ids"),
        },
        None => Input::Pixels(case.get("pixel_values").unwrap()),
    }
}

fn check_package(name: &str, package: &Package) {
    let case = Case::open(name);
    for tower in &package.towers {
        let input = input_of(&case, &tower.model);
        let prefix = match tower.name.as_str() {
            "" => "expected.".to_owned(),
            tower => format!("expected.{tower}_model_output."),
        };
        check(name, &tower.model, &case, &input, &prefix);
    }
}

#[test]
fn every_family_gives_what_transformers_gives() {
    for name in FAMILIES {
        let package = Package::open(&fixture(name), &OpenOptions::default())
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        check_package(name, &package);
    }
}

#[test]
fn clip_embeddings_agree_after_projection() {
    let package = Package::open(&fixture("clip"), &OpenOptions::default()).unwrap();
    let case = Case::open("clip");
    let embed = |tower: usize, input: &Input| {
        let output = package.towers[tower]
            .model
            .forward(input, Pass::default())
            .unwrap();
        let embedding = output.into_logits().unwrap().into_value();
        let norm = embedding
            .sqr()
            .unwrap()
            .sum_keepdim(1)
            .unwrap()
            .sqrt()
            .unwrap();
        embedding.broadcast_div(&norm).unwrap()
    };
    let text = embed(0, &Input::tokens(case.integers("input_ids").unwrap()));
    let image = embed(1, &Input::Pixels(case.get("pixel_values").unwrap()));
    assert!(difference(&text, &case.get("expected.text_embeds").unwrap(), None) < 1e-4);
    assert!(difference(&image, &case.get("expected.image_embeds").unwrap(), None) < 1e-4);
}

#[test]
fn what_is_saved_loads_again_bit_for_bit() {
    for name in FAMILIES {
        let package = Package::open(&fixture(name), &OpenOptions::default()).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("saved");
        assert_eq!(
            package.save(&target, None).unwrap(),
            SavedAs::HuggingFace,
            "{name}"
        );
        // What other programs make tokens by.
        let companion =
            |directory: &Path| std::fs::read(directory.join("tokenizer_config.json")).ok();
        assert_eq!(companion(&target), companion(&fixture(name)), "{name}");
        let again = Package::open(&target, &OpenOptions::default()).unwrap();
        assert_eq!(again.towers.len(), package.towers.len());
        for (before, after) in package.towers.iter().zip(&again.towers) {
            assert_eq!(before.model.spec(), after.model.spec(), "{name}");
            for (parameter, tensor) in before.model.parameters() {
                let other = &after.model.parameters()[parameter];
                let same = tensor.eq(other).unwrap().to_dtype(DType::F32).unwrap();
                let same = same
                    .flatten_all()
                    .unwrap()
                    .min(0)
                    .unwrap()
                    .to_scalar::<f32>()
                    .unwrap();
                assert_eq!(same, 1.0, "{name}: {parameter}");
            }
        }
        check_package(name, &again);
    }
}

/// Readers take the type from the config: it says what was written, which is half the bytes where nothing is
/// lost by it.
#[test]
fn what_was_stored_in_half_precision_is_so_again_where_it_holds_every_number() {
    for (name, half, other) in [
        ("llama-tied", "bfloat16", "BF16"),
        ("opt-projected", "float16", "F16"),
    ] {
        for (change, named, stored) in [(1.0, half, other), (1.0 + 1e-5, "float32", "F32")] {
            let package = Package::open(&fixture(name), &OpenOptions::default()).unwrap();
            let model = package.single_model().unwrap();
            let mut parameters = model.parameters().clone();
            for tensor in parameters.values_mut() {
                *tensor = (&*tensor * change).unwrap();
            }
            let expected = parameters.clone();
            let model = Model::new(model.spec().clone(), &mut parameters).unwrap();
            let directory = tempfile::tempdir().unwrap();
            let out = directory.path().join("out");
            let saved = package.with_model(model).save(&out, None).unwrap();
            assert_eq!(saved, SavedAs::HuggingFace, "{name}");
            let config = std::fs::read_to_string(out.join("config.json")).unwrap();
            assert!(
                config.contains(&format!("dtype\": \"{named}\"")),
                "{config}"
            );
            let checkpoint = Checkpoint::open(&out, &Limits::default()).unwrap();
            for tensor in checkpoint.names() {
                let found = checkpoint.info(tensor).unwrap().dtype.to_string();
                assert_eq!(found, stored, "{name}: {tensor}");
            }
            let again = Package::open(&out, &OpenOptions::default()).unwrap();
            for (parameter, tensor) in again.single_model().unwrap().parameters() {
                let gap = difference(tensor, &expected[parameter], None);
                assert_eq!(gap, 0.0, "{name}: {parameter}");
            }
        }
    }
}

#[test]
fn a_changed_model_saves_as_a_spec_and_loads_again() {
    let package = Package::open(&fixture("bert-classifier"), &OpenOptions::default()).unwrap();
    let model = package.single_model().unwrap();
    let mut spec = model.spec().clone();
    spec.low_rank
        .insert("blocks.0.feedforward.up".to_owned(), 3);
    let mut parameters = model.parameters().clone();
    parameters.remove("blocks.0.feedforward.up.weight");
    let device = Device::Cpu;
    let factor = |shape: (usize, usize)| Tensor::rand(-1f32, 1f32, shape, &device).unwrap();
    parameters.insert("blocks.0.feedforward.up.down".to_owned(), factor((3, 32)));
    parameters.insert("blocks.0.feedforward.up.up".to_owned(), factor((48, 3)));
    let changed = Model::new(spec, &mut parameters).unwrap();
    let package = package.with_model(changed);
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("saved");
    assert_eq!(package.save(&target, None).unwrap(), SavedAs::Lapidary);
    let again = Package::open(&target, &OpenOptions::default()).unwrap();
    assert_eq!(
        again.single_model().unwrap().spec(),
        package.single_model().unwrap().spec()
    );
}

/// The site that holds what a linear layer gives, where there is one: most layers are followed by
/// an activation, a norm or a sum before the next site.
fn output_site(path: &str) -> Option<String> {
    let (module, layer) = path.rsplit_once('.')?;
    match (module, layer) {
        ("head", "output") => Some("logits".to_owned()),
        ("head", "projection") => Some("head.projected".to_owned()),
        (_, "query" | "key" | "value") => Some(path.to_owned()),
        (_, "output" | "down") => Some(format!("{module}.out")),
        _ => None,
    }
}

#[test]
fn every_linear_reads_what_its_site_shows() {
    let (mut shown, mut reproduced) = (0, 0);
    for name in FAMILIES {
        let package = Package::open(&fixture(name), &OpenOptions::default()).unwrap();
        for tower in &package.towers {
            let model = &tower.model;
            let trace = Trace::new().capture("*").unwrap();
            let pass = Pass {
                trace: Some(&trace),
                ..Pass::default()
            };
            model
                .forward(&input_of(&Case::open(name), model), pass)
                .unwrap();
            let sites = trace.records();
            let averaged = model.linears().iter().any(|l| l.path.contains("second"));
            for linear in model.linears() {
                let Some(site) = sites.get(&linear.input_site) else {
                    // An expert that no token was sent to writes nothing.
                    assert!(linear.path.contains(".experts."), "{name}: {linear:?}");
                    continue;
                };
                let x = site.signal.value();
                assert_eq!(x.dims().last(), Some(&linear.input), "{name}: {linear:?}");
                shown += 1;
                let output = output_site(&linear.path).and_then(|site| sites.get(&site));
                let Some(output) = output.filter(|_| !averaged || !linear.path.contains("head"))
                else {
                    continue;
                };
                let parameter =
                    |kind| model.parameters()[&format!("{}.{kind}", linear.path)].clone();
                let weight = parameter("weight").t().unwrap();
                let mut y = x.broadcast_matmul(&weight).unwrap();
                if linear.bias {
                    y = y.broadcast_add(&parameter("bias")).unwrap();
                }
                let gap = difference(&y, output.signal.value(), None);
                assert!(gap < 1e-5, "{name}: {} differs by {gap}", linear.path);
                reproduced += 1;
            }
        }
    }
    assert!(
        shown > 300 && reproduced > 200,
        "{shown} shown, {reproduced} reproduced"
    );
}

/// A model without its first block is still of its family: saved as such, it loads, and its
/// config says one layer less.
#[test]
fn fewer_blocks_are_still_of_the_family() {
    for family in [
        "gpt2",
        "llama",
        "mistral",
        "qwen2",
        "mixtral",
        "opt",
        "mamba",
        "mamba2",
        "vit",
        "bert-classifier",
    ] {
        let package = Package::open(&fixture(family), &OpenOptions::default()).unwrap();
        let model = package.single_model().unwrap();
        let shorter = without_first_block(model);
        let blocks = shorter.spec().expanded_blocks().len();
        let parameters = shorter.parameters().clone();
        let directory = tempfile::tempdir().unwrap();
        let out = directory.path().join("out");
        let saved = package.with_model(shorter).save(&out, None).unwrap();
        assert_eq!(saved, SavedAs::HuggingFace, "{family}");
        let again = Package::open(&out, &OpenOptions::default()).unwrap();
        let again = again.single_model().unwrap();
        assert_eq!(again.spec().expanded_blocks().len(), blocks, "{family}");
        assert!(parameters.keys().eq(again.parameters().keys()), "{family}");
        for (name, tensor) in again.parameters() {
            let gap = (tensor - &parameters[name]).unwrap().abs().unwrap();
            let gap = gap.sum_all().unwrap().to_scalar::<f32>().unwrap();
            assert_eq!(gap, 0.0, "{family}: {name}");
        }
    }
}

/// Where the config computes a block's setting from its place, what the blocks left over do has no
/// config.
#[test]
fn fewer_blocks_that_no_config_describes_are_saved_with_their_spec() {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("source");
    std::fs::create_dir(&source).unwrap();
    for file in std::fs::read_dir(fixture("gpt2")).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), source.join(file.file_name())).unwrap();
    }
    let path = source.join("config.json");
    let config = std::fs::read_to_string(&path).unwrap();
    let config = config.replacen('{', "{\"scale_attn_by_inverse_layer_idx\": true,", 1);
    let config = config.replace("\"scale_attn_by_inverse_layer_idx\": false,", "");
    std::fs::write(&path, config).unwrap();
    let package = Package::open(&source, &OpenOptions::default()).unwrap();
    let shorter = without_first_block(package.single_model().unwrap());
    let out = directory.path().join("out");
    let saved = package.with_model(shorter).save(&out, None).unwrap();
    assert_eq!(saved, SavedAs::Lapidary);
    Package::open(&out, &OpenOptions::default()).unwrap();
}

/// A model of a changed spec with some parameters, in place of the one at hand.
fn remade(package: Package, change: impl Fn(&mut ModelSpec)) -> Package {
    let mut spec = package.single_model().unwrap().spec().clone();
    spec.blocks = spec.expanded_blocks();
    change(&mut spec);
    let model = Model::initialised(spec, 7, DType::F32, &Device::Cpu).unwrap();
    package.with_model(model)
}

fn attention(block: &mut BlockSpec) -> &mut MultiHeadSpec {
    match &mut block.attention {
        MixerSpec::MultiHead(attention) => attention,
        other => panic!("{other:?}"),
    }
}

/// As many hidden features in every block.
fn hidden(spec: &mut ModelSpec, features: usize) {
    for block in &mut spec.blocks {
        match &mut block.feedforward {
            Some(FeedforwardSpec::Dense(dense)) => dense.hidden = features,
            Some(FeedforwardSpec::Gated(gated)) => gated.hidden = features,
            Some(FeedforwardSpec::Mixture(mixture)) => mixture.hidden = features,
            other => panic!("{other:?}"),
        }
    }
}

/// A stream of 24 features, heads as before.
fn narrow_stream(spec: &mut ModelSpec) {
    spec.width = 24;
    for block in &mut spec.blocks {
        let attention = attention(block);
        attention.head_width = Some(attention.head_width(32));
        block.norm = NormSpec::Rms {
            epsilon: 1e-5 / 3.0,
        };
    }
    spec.final_norm = Some(NormSpec::Rms {
        epsilon: 1e-5 / 3.0,
    });
    if let HeadSpec::LanguageModel { tied, .. } = &mut spec.head {
        *tied = false;
    }
}

/// A stream of 24 features and heads of 6.
fn narrow_everything(spec: &mut ModelSpec) {
    spec.width = 24;
    hidden(spec, 40);
    for block in &mut spec.blocks {
        attention(block).head_width = None;
    }
}

type Change = fn(&mut ModelSpec);

/// A narrower model is of its family when a config says its shape: what is read back from it is the
/// same, to the last bit of what it gives.
#[test]
fn narrower_models_are_still_of_the_family() {
    let forty: Change = |spec| hidden(spec, 40);
    let cases: [(&str, Change); 24] = [
        ("albert-masked-lm", forty),
        ("bert", forty),
        ("bert-classifier", forty),
        ("bert-classifier", narrow_everything),
        ("bert-masked-lm", narrow_everything),
        ("deit", forty),
        ("deit", narrow_everything),
        ("gpt2", forty),
        ("gpt2", narrow_everything),
        ("llama", forty),
        ("llama", narrow_everything),
        ("llama", narrow_stream),
        ("llama-tied", narrow_stream),
        ("mistral", narrow_stream),
        ("mixtral", forty),
        ("mixtral", narrow_stream),
        ("olmoe", forty),
        ("opt", forty),
        ("opt", narrow_everything),
        ("opt-projected", forty),
        ("qwen2", narrow_stream),
        ("roberta-classifier", narrow_everything),
        ("roberta-masked-lm", forty),
        ("vit", narrow_everything),
    ];
    for (family, change) in cases {
        let package = Package::open(&fixture(family), &OpenOptions::default()).unwrap();
        // One set of weights for all layers stays one.
        let package = match family {
            "albert-masked-lm" => {
                let mut spec = package.single_model().unwrap().spec().clone();
                change(&mut spec);
                let model = Model::initialised(spec, 7, DType::F32, &Device::Cpu).unwrap();
                package.with_model(model)
            }
            _ => remade(package, change),
        };
        saves(family, package, SavedAs::HuggingFace);
    }
}

/// What no config says is saved with its spec.
#[test]
fn other_narrower_models_are_saved_with_their_spec() {
    let cases: [(&str, Change); 8] = [
        // Blocks of different widths.
        ("gpt2", |spec| {
            hidden(spec, 40);
            spec.blocks.truncate(1);
            let mut other = spec.clone();
            hidden(&mut other, 44);
            spec.blocks.extend(other.blocks);
        }),
        // Heads whose widths do not add up to the stream's.
        ("gpt2", |spec| {
            spec.width = 24;
            for block in &mut spec.blocks {
                attention(block).head_width = Some(8);
            }
        }),
        ("bert-classifier", |spec| {
            for block in &mut spec.blocks {
                attention(block).head_width = Some(6);
            }
        }),
        // Values of another width than keys.
        ("llama", |spec| {
            for block in &mut spec.blocks {
                attention(block).value_width = Some(6);
            }
        }),
        // Scores that are divided by something else.
        ("llama", |spec| {
            for block in &mut spec.blocks {
                attention(block).scale = Some(0.5);
            }
        }),
        // Norms of another kind.
        ("opt", |spec| {
            for block in &mut spec.blocks {
                block.norm = NormSpec::Rms { epsilon: 1e-5 };
            }
        }),
        // Biases that the family does not have.
        ("qwen2", |spec| {
            for block in &mut spec.blocks {
                attention(block).output_bias = Some(true);
            }
        }),
        // Norms of queries and keys that are not as wide as the stream.
        ("olmoe", narrow_stream),
    ];
    for (family, change) in cases {
        let package = Package::open(&fixture(family), &OpenOptions::default()).unwrap();
        saves(family, remade(package, change), SavedAs::Lapidary);
    }
}

/// Saves and loads again: the same scores, bit for bit.
fn saves(family: &str, package: Package, expected: SavedAs) {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("out");
    assert_eq!(package.save(&out, None).unwrap(), expected, "{family}");
    let again = Package::open(&out, &OpenOptions::default()).unwrap();
    let (before, after) = (
        package.single_model().unwrap(),
        again.single_model().unwrap(),
    );
    assert_eq!(
        before.parameter_count(),
        after.parameter_count(),
        "{family}"
    );
    let input = input_of(&Case::open(family), before);
    let given = |model: &Model| -> Vec<Vec<f32>> {
        let output = model.forward(&input, Pass::default()).unwrap();
        let found = [Some(output.hidden), output.pooled, output.logits];
        let found = found.into_iter().flatten();
        found
            .map(|signal| {
                signal
                    .into_value()
                    .flatten_all()
                    .unwrap()
                    .to_vec1()
                    .unwrap()
            })
            .collect()
    };
    assert_eq!(given(before), given(after), "{family}");
}

fn without_first_block(model: &Model) -> Model {
    let mut spec = model.spec().clone();
    spec.blocks = spec.expanded_blocks().split_off(1);
    let mut parameters = model
        .parameters()
        .iter()
        .filter_map(|(name, tensor)| {
            let renamed = match name.strip_prefix("blocks.") {
                None => name.clone(),
                Some(rest) => {
                    let (index, rest) = rest.split_once('.').unwrap();
                    let index: usize = index.parse().unwrap();
                    format!("blocks.{}.{rest}", index.checked_sub(1)?)
                }
            };
            Some((renamed, tensor.clone()))
        })
        .collect::<std::collections::BTreeMap<_, _>>();
    Model::new(spec, &mut parameters).unwrap()
}
