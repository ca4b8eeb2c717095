//! Pruning on small models in f64: what must hold exactly.
#![allow(clippy::panic, clippy::result_large_err, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::Path;

use crate::common::{
    DECODER, ENCODER, GATED, all, altered, classifier, close, distance, labelled, model, scores,
    values, windows, with_parameters,
};
use lapidary_compress::{
    Budget, Calibration, CalibrationData, CalibrationOptions, Change, Compressed, Content, Example,
    Fingerprint, Method, Pattern, PruneSettings, Scope, Selection, Settings, Target, Task,
};
use lapidary_kernels::{CsrMatrix, DType, Device, Tensor, TwoOfFourMatrix};
use lapidary_model::{InputSpec, Model, OpenOptions, Package, Pass};
use lapidary_parts::attention::MixerSpec;
use lapidary_signal::Trace;
use proptest::prelude::*;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const WEIGHTS: [&str; 5] = [
    "first-order",
    "magnitude",
    "random-weights",
    "second-order",
    "wanda",
];
const STRUCTURED: [&str; 2] = ["channel-gradient", "prune-heads"];

fn settings(pruning: PruneSettings) -> Settings {
    Settings {
        pruning,
        ..Settings::default()
    }
}

fn scoped(scope: Scope) -> Settings {
    settings(PruneSettings {
        scope: Some(scope),
        ..PruneSettings::default()
    })
}

fn cut_by(
    model: &Model,
    data: &CalibrationData,
    method: &str,
    keep: f64,
    settings: &Settings,
) -> lapidary_compress::Result<Compressed> {
    let method = Method::find(method)?;
    let requirements = method.requirements(model, settings)?;
    let options = CalibrationOptions::default();
    let calibration = match requirements.is_empty() {
        true => None,
        false => Some(Calibration::collect(model, data, &requirements, options)?),
    };
    let task = Task {
        calibration: calibration.as_ref(),
        data: Some(data),
        settings: Some(settings),
        ..Task::new(model)
    };
    let plan = method.plan(&task, &Budget::Keep(keep))?;
    method.apply(&task, &plan)
}

fn cut(model: &Model, data: &CalibrationData, method: &str, keep: f64) -> Compressed {
    cut_by(model, data, method, keep, &Settings::default()).unwrap()
}

/// The weights of every linear layer of the blocks, by path.
fn weights(model: &Model) -> BTreeMap<String, Vec<f64>> {
    let linears = model.linears().iter();
    let linears = linears.filter(|linear| linear.path.starts_with("blocks."));
    linears
        .map(|linear| {
            let weight = &model.parameters()[&format!("{}.weight", linear.path)];
            (linear.path.clone(), values(weight))
        })
        .collect()
}

fn zeros(values: &[f64]) -> usize {
    values.iter().filter(|value| **value == 0.0).count()
}

/// Share of zeros over all layers of the blocks.
fn sparsity(model: &Model) -> f64 {
    let all: Vec<f64> = weights(model).into_values().flatten().collect();
    zeros(&all) as f64 / all.len() as f64
}

/// Whether what is zero in `less` is so in `more`.
fn nested(less: &Model, more: &Model) -> bool {
    let (less, more) = (weights(less), weights(more));
    less.iter().all(|(path, less)| {
        let pairs = less.iter().zip(&more[path]);
        pairs.into_iter().all(|(a, b)| *a != 0.0 || *b == 0.0)
    })
}

#[test]
fn nothing_to_prune_is_the_model_itself() {
    for (kind, model, data) in all() {
        for method in WEIGHTS.into_iter().chain(STRUCTURED) {
            let whole = cut(&model, &data, method, 1.0);
            let (before, after) = (Fingerprint::of(&model), Fingerprint::of(&whole.model));
            assert_eq!(before.unwrap(), after.unwrap(), "{kind} {method}");
            assert_eq!(whole.report.notes, [] as [String; 0]);
        }
    }
}

#[test]
fn the_sparsity_is_the_one_that_was_asked_for() {
    for (kind, model, data) in all() {
        for method in WEIGHTS {
            for share in [0.25, 0.5, 0.9] {
                let total: usize = weights(&model).values().map(Vec::len).sum();
                for scope in [Scope::Global, Scope::Layer, Scope::Row] {
                    let found = cut_by(&model, &data, method, 1.0 - share, &scoped(scope));
                    if (method, scope) == ("second-order", Scope::Global) {
                        let error = found.err().unwrap().to_string();
                        assert!(error.contains("a layer or a row"), "{error}");
                        continue;
                    }
                    let found = found.unwrap();
                    let pruned = zeros(
                        &weights(&found.model)
                            .into_values()
                            .flatten()
                            .collect::<Vec<_>>(),
                    );
                    let apart = (pruned as f64 - share * total as f64).abs();
                    let layers = weights(&model).len() as f64;
                    let rows: usize = model
                        .linears()
                        .iter()
                        .filter(|linear| linear.path.starts_with("blocks."))
                        .map(|linear| linear.output)
                        .sum();
                    let allowed = match scope {
                        Scope::Global => 0.5,
                        Scope::Layer => 0.5 * layers,
                        Scope::Row => 0.5 * rows as f64,
                    };
                    assert!(
                        apart <= allowed + 1e-9,
                        "{kind} {method} {scope:?} {share}: {apart}"
                    );
                    for module in &found.report.modules {
                        let found = &weights(&found.model)[&module.path];
                        assert_eq!(module.parameters_before, found.len());
                        assert_eq!(module.parameters_after, found.len() - zeros(found));
                    }
                }
            }
        }
    }
}

#[test]
fn masks_are_nested_and_seeds_reproduce() {
    for (kind, model, data) in all() {
        for method in ["first-order", "magnitude", "random-weights", "wanda"] {
            for scope in [Scope::Global, Scope::Layer, Scope::Row] {
                let at = |share: f64| {
                    cut_by(&model, &data, method, 1.0 - share, &scoped(scope))
                        .unwrap()
                        .model
                };
                let models = [0.2, 0.45, 0.8].map(at);
                for pair in models.windows(2) {
                    assert!(nested(&pair[0], &pair[1]), "{kind} {method} {scope:?}");
                }
            }
        }
        let drawn = |seed: u64| {
            let settings = Settings {
                seed,
                ..Settings::default()
            };
            let found = cut_by(&model, &data, "random-weights", 0.5, &settings).unwrap();
            Fingerprint::of(&found.model).unwrap()
        };
        assert_eq!(drawn(1), drawn(1));
        assert_ne!(drawn(1), drawn(2));
    }
}

/// Pruning what was pruned goes on from there, whatever makes up for what went.
#[test]
fn zeros_stay_zero_when_more_goes() {
    for (kind, model, data) in all() {
        for method in WEIGHTS {
            let half = cut(&model, &data, method, 0.5).model;
            let more = cut(&half, &data, method, 0.2).model;
            assert!(nested(&half, &more), "{kind} {method}");
            assert!((sparsity(&more) - 0.8).abs() < 0.02, "{kind} {method}");
        }
    }
}

#[test]
fn a_layer_keeps_its_mask_in_any_scale_but_not_among_others() {
    let gated = model(GATED, 3);
    let data = windows(4, 3);
    // Values by `c` and the output by `1 / c` are the same function.
    let c = 8.0;
    let scaled = altered(&gated, "blocks.0.attention.value.weight", |w| {
        (w * c).unwrap()
    });
    let scaled = altered(&scaled, "blocks.0.attention.output.weight", |w| {
        (w / c).unwrap()
    });
    close(&scores(&scaled, &data), &scores(&gated, &data), 1e-12);
    let masks = |model: &Model, scope: Scope, normalise: bool| -> Vec<bool> {
        let settings = settings(PruneSettings {
            scope: Some(scope),
            normalise,
            ..PruneSettings::default()
        });
        let found = cut_by(model, &data, "magnitude", 0.5, &settings).unwrap();
        let weights = weights(&found.model).into_values().flatten();
        weights.map(|weight| weight == 0.0).collect()
    };
    for scope in [Scope::Layer, Scope::Row] {
        assert_eq!(masks(&gated, scope, false), masks(&scaled, scope, false));
    }
    assert_eq!(
        masks(&gated, Scope::Global, true),
        masks(&scaled, Scope::Global, true)
    );
    assert_ne!(
        masks(&gated, Scope::Global, false),
        masks(&scaled, Scope::Global, false)
    );
}

/// A layer of tiny weights would be gone first, and keeps its hundredth.
#[test]
fn no_layer_collapses() {
    let decoder = model(DECODER, 2);
    let tiny = altered(&decoder, "blocks.1.attention.key.weight", |w| {
        (w * 1e-6).unwrap()
    });
    for (keep_at_least, left) in [(0.01, 3), (0.25, 64)] {
        let settings = settings(PruneSettings {
            scope: Some(Scope::Global),
            normalise: false,
            keep_at_least,
            ..PruneSettings::default()
        });
        let found = cut_by(&tiny, &windows(2, 1), "magnitude", 0.5, &settings).unwrap();
        let key = &weights(&found.model)["blocks.1.attention.key"];
        assert_eq!(key.len() - zeros(key), left);
        assert!((sparsity(&found.model) - 0.5).abs() < 1e-3);
    }
    for share in [0.9999, 0.999] {
        let found = cut(&decoder, &windows(2, 1), "magnitude", 1.0 - share);
        for (path, weights) in weights(&found.model) {
            let least = (0.01 * weights.len() as f64).ceil() as usize;
            assert_eq!(weights.len() - zeros(&weights), least, "{path}");
        }
    }
}

/// One layer whose inputs are the rows of the table, one token at a time.
fn one_layer(table: Vec<Vec<f64>>, weight: Vec<Vec<f64>>) -> Model {
    let spec = classifier(table[0].len(), table.len(), 3, true);
    let whole = model(&spec, 4);
    let matrix = |rows: Vec<Vec<f64>>| {
        let shape = (rows.len(), rows[0].len());
        Tensor::from_vec(rows.concat(), shape, &Device::Cpu).unwrap()
    };
    let mut parameters = whole.parameters().clone();
    parameters.insert("embeddings.tokens.weight".into(), matrix(table));
    parameters.insert("head.hidden.weight".into(), matrix(weight));
    with_parameters(&spec, parameters)
}

fn of_hidden(pruning: PruneSettings) -> Settings {
    Settings {
        selection: Selection::layers(["head.hidden"]),
        ..settings(pruning)
    }
}

fn hidden(compressed: &Compressed) -> Vec<f64> {
    values(&compressed.model.parameters()["head.hidden.weight"])
}

fn words(tokens: impl IntoIterator<Item = u32>) -> CalibrationData {
    let words = tokens
        .into_iter()
        .map(|token| Example::labelled([token], token % 3));
    CalibrationData::new(words.collect()).unwrap()
}

#[test]
fn activation_aware_with_isotropic_inputs_is_magnitude_by_row() {
    let mut random = ChaCha8Rng::seed_from_u64(5);
    let mut draw = |rows: usize, of: &dyn Fn(f64) -> f64| -> Vec<Vec<f64>> {
        (0..rows)
            .map(|_| (0..8).map(|_| of(random.random_range(-1.0..1.0))).collect())
            .collect()
    };
    let weight = draw(8, &|x| x);
    let isotropic = one_layer(draw(12, &f64::signum), weight.clone());
    let other = one_layer(draw(12, &|x| x), weight);
    let data = words(0..12);
    let by = |model: &Model, method: &str| {
        let settings = of_hidden(PruneSettings {
            scope: Some(Scope::Row),
            ..PruneSettings::default()
        });
        hidden(&cut_by(model, &data, method, 0.5, &settings).unwrap())
    };
    assert_eq!(by(&isotropic, "wanda"), by(&isotropic, "magnitude"));
    assert_ne!(by(&other, "wanda"), by(&other, "magnitude"));
}

#[test]
fn an_independent_program_prunes_to_the_same_weights() {
    let golden: serde_json::Value =
        serde_json::from_str(include_str!("../fixtures/pruning.json")).unwrap();
    let matrix = |value: &serde_json::Value| -> Vec<Vec<f64>> {
        serde_json::from_value(value.clone()).unwrap()
    };
    let model = one_layer(matrix(&golden["table"]), matrix(&golden["weight"]));
    let tokens: Vec<u32> = serde_json::from_value(golden["tokens"].clone()).unwrap();
    let data = words(tokens);
    let check = |method: &str, pruning: PruneSettings, expected: &serde_json::Value| {
        let found = cut_by(&model, &data, method, 0.5, &of_hidden(pruning)).unwrap();
        let expected = matrix(expected).concat();
        let found = hidden(&found);
        assert_eq!(zeros(&found), zeros(&expected), "{method}");
        close(&found, &expected, 1e-9);
    };
    let usual = PruneSettings::default;
    check("magnitude", usual(), &golden["magnitude"]);
    check("wanda", usual(), &golden["wanda"]);
    let second = &golden["second-order"];
    for (name, scope, block, pattern) in [
        ("layer", Scope::Layer, 8, Pattern::Unstructured),
        ("row", Scope::Row, 8, Pattern::Unstructured),
        ("layer-blocks", Scope::Layer, 4, Pattern::Unstructured),
        ("row-blocks", Scope::Row, 4, Pattern::Unstructured),
        ("two-of-four", Scope::Layer, 4, Pattern::NOfM { n: 2, m: 4 }),
    ] {
        let pruning = PruneSettings {
            scope: Some(scope),
            block,
            pattern,
            ..usual()
        };
        check("second-order", pruning, &second[name]);
    }
}

/// What `W x` loses over data, relative to what it is.
fn output_error(model: &Model, compressed: &Compressed, data: &CalibrationData) -> f64 {
    let errors = lapidary_compress::output_errors(model, &compressed.model, data, 4).unwrap();
    errors.values().sum::<f64>() / errors.len() as f64
}

#[test]
fn making_up_for_what_goes_loses_less() {
    for (kind, model, data) in all() {
        // The first layers alone, whose inputs are the same before and after.
        let selection = Selection::layers(["blocks.0.attention.{query,key,value}"]);
        let error = |method: &str, block: usize| {
            let settings = Settings {
                selection: selection.clone(),
                ..settings(PruneSettings {
                    scope: Some(Scope::Row),
                    block,
                    damping: 1e-4,
                    ..PruneSettings::default()
                })
            };
            let found = cut_by(&model, &data, method, 0.5, &settings).unwrap();
            output_error(&model, &found, &data)
        };
        let (exact, blocks) = (error("second-order", 16), error("second-order", 4));
        let (aware, magnitude) = (error("wanda", 16), error("magnitude", 16));
        // Blocks of four that lose two each choose among few.
        assert!(
            exact < blocks && exact < aware,
            "{kind}: {exact} {blocks} {aware}"
        );
        assert!(exact < 0.7 * magnitude, "{kind}: {exact} {magnitude}");
    }
}

#[test]
fn n_of_m_holds_in_every_row_and_is_stored_so() {
    for (kind, model, data) in all() {
        for method in WEIGHTS {
            let pruning = settings(PruneSettings {
                pattern: Pattern::NOfM { n: 2, m: 4 },
                ..PruneSettings::default()
            });
            let found = cut_by(&model, &data, method, 0.5, &pruning).unwrap();
            for linear in found.model.linears() {
                if !linear.path.starts_with("blocks.") {
                    continue;
                }
                let weight = &found.model.parameters()[&format!("{}.weight", linear.path)];
                for four in values(weight).chunks(4) {
                    assert_eq!(zeros(four), 2, "{kind} {method} {}", linear.path);
                }
                let single = weight.to_dtype(DType::F32).unwrap();
                let x = single.narrow(0, 0, 3).unwrap();
                let dense = x.matmul(&single.t().unwrap()).unwrap();
                let pairs = TwoOfFourMatrix::from_dense(&single).unwrap();
                let csr = CsrMatrix::from_dense(&single).unwrap();
                close(&values(&pairs.multiply(&x).unwrap()), &values(&dense), 1e-5);
                close(&values(&csr.multiply(&x).unwrap()), &values(&dense), 1e-5);
            }
            let note = &found.report.notes[0];
            assert!(note.contains("as 2 of 4"), "{note}");
            let error = cut_by(&model, &data, method, 0.4, &pruning).err().unwrap();
            assert!(error.to_string().contains("2 of 4"), "{error}");
        }
    }
}

/// Of a decoder with four hidden features that nothing reads, first order takes just those.
#[test]
fn planted_useless_features_go_and_nothing_else_does() {
    let useless = [3usize, 7, 8, 20];
    let decoder = model(DECODER, 6);
    let mut planted = decoder;
    for block in 0..2 {
        let name = format!("blocks.{block}.feedforward.down.weight");
        planted = altered(&planted, &name, |down| {
            let mask: Vec<f64> = (0..24)
                .map(|feature| f64::from(u8::from(!useless.contains(&feature))))
                .collect();
            let mask = Tensor::from_vec(mask, (1, 24), &Device::Cpu).unwrap();
            down.broadcast_mul(&mask).unwrap()
        });
    }
    let data = windows(6, 6);
    let selection = Selection::layers(["blocks.*.feedforward.*"]);
    let share = useless.len() as f64 / 24.0;
    let by = |method: &str| {
        let settings = Settings {
            selection: selection.clone(),
            ..Settings::default()
        };
        cut_by(&planted, &data, method, 1.0 - share, &settings).unwrap()
    };
    let found = by("first-order");
    close(
        &scores(&found.model, &data),
        &scores(&planted, &data),
        1e-12,
    );
    for block in 0..2 {
        let up = &weights(&found.model)[&format!("blocks.{block}.feedforward.up")];
        for (feature, row) in up.chunks(16).enumerate() {
            let expected = if useless.contains(&feature) { 16 } else { 0 };
            assert_eq!(zeros(row), expected, "block {block}, feature {feature}");
        }
    }
    // Whole features by the same score.
    let narrow = cut(&planted, &data, "channel-gradient", 1.0 - share);
    assert!(
        narrow
            .report
            .modules
            .iter()
            .all(|module| module.change == Change::Narrow { features: 20 })
    );
    close(
        &scores(&narrow.model, &data),
        &scores(&planted, &data),
        1e-12,
    );
}

/// Two inputs that are always equal, read with opposite weights, add nothing; so does one that
/// nothing reads.
#[test]
fn second_order_finds_what_adds_up_to_nothing() {
    let mut random = ChaCha8Rng::seed_from_u64(8);
    let mut draw = |_| -> Vec<f64> { (0..8).map(|_| random.random_range(0.2..1.0)).collect() };
    let mut table: Vec<Vec<f64>> = (0..12).map(&mut draw).collect();
    let mut weight: Vec<Vec<f64>> = (0..8).map(&mut draw).collect();
    for row in &mut table {
        row[5] = row[2];
    }
    for row in &mut weight {
        row[5] = -row[2];
        row[6] = 0.0;
    }
    let planted = one_layer(table, weight.clone());
    let settings = of_hidden(PruneSettings {
        scope: Some(Scope::Row),
        damping: 1e-10,
        ..PruneSettings::default()
    });
    let found = cut_by(
        &planted,
        &words(0..12),
        "second-order",
        5.0 / 8.0,
        &settings,
    )
    .unwrap();
    for (before, after) in weight.iter().zip(hidden(&found).chunks(8)) {
        for (column, value) in after.iter().enumerate() {
            match column {
                2 | 5 | 6 => assert_eq!(*value, 0.0, "{column}"),
                _ => assert!((value - before[column]).abs() < 1e-6, "{column}"),
            }
        }
    }
}

/// What each block's attention writes.
fn written(model: &Model, data: &CalibrationData) -> Vec<f64> {
    let mut all = Vec::new();
    for example in data.examples() {
        let Content::Tokens { ids, .. } = &example.content else {
            continue;
        };
        let trace = Trace::new().capture("blocks.*.attention.out").unwrap();
        let ids = Tensor::from_slice(ids, (1, ids.len()), &Device::Cpu).unwrap();
        let pass = Pass {
            trace: Some(&trace),
            ..Pass::default()
        };
        model
            .forward(&lapidary_model::Input::tokens(ids), pass)
            .unwrap();
        for record in trace.records().into_values() {
            all.extend(values(record.signal.value()));
        }
    }
    all
}

const BUCKETS: &str = r#"
width = 16
[input]
kind = "tokens"
vocabulary = 20
length = 12
[[blocks]]
repeat = 2
attention = { kind = "multi-head", heads = 4, causal = true, position = { kind = "relative-buckets", buckets = 4 }, query_key_norm = { norm = { kind = "rms" }, per_head = true } }
feedforward = { kind = "dense", hidden = 24 }
[head]
kind = "language-model"
"#;

/// A model without some heads writes what it does with their columns of the output zero.
#[test]
fn a_head_taken_out_is_a_head_that_nothing_reads() {
    for (spec, heads, groups) in [(DECODER, 4, 4), (GATED, 4, 2), (BUCKETS, 4, 4)] {
        let whole = model(spec, 7);
        let data = windows(5, 7);
        let found = cut(&whole, &data, "prune-heads", 0.5);
        let mut masked = whole.parameters().clone();
        let each = heads / groups;
        let mut left = 0;
        for (block, spec) in found.model.spec().expanded_blocks().iter().enumerate() {
            let MixerSpec::MultiHead(attention) = &spec.attention else {
                panic!("{spec:?}");
            };
            left += attention.groups();
            assert!(attention.groups() >= 1 && attention.heads == each * attention.groups());
            // Which groups stay is found again by their values, which differ.
            let path = format!("blocks.{block}.attention");
            let rows = |model: &Model| -> Vec<Vec<f64>> {
                let value = values(&model.parameters()[&format!("{path}.value.weight")]);
                value.chunks(4 * 16).map(<[f64]>::to_vec).collect()
            };
            let kept = rows(&found.model);
            let mask: Vec<f64> = rows(&whole)
                .iter()
                .flat_map(|group| {
                    let stays = f64::from(u8::from(kept.contains(group)));
                    std::iter::repeat_n(stays, 4 * each)
                })
                .collect();
            assert_eq!(mask.iter().sum::<f64>() as usize, 4 * attention.heads);
            let name = format!("{path}.output.weight");
            let mask = Tensor::from_vec(mask, (1, 16), &Device::Cpu).unwrap();
            let output = masked[&name].broadcast_mul(&mask).unwrap();
            masked.insert(name, output);
        }
        assert_eq!(left, groups, "half of the groups of two blocks");
        let masked = Model::new(whole.spec().clone(), &mut masked).unwrap();
        close(&scores(&found.model, &data), &scores(&masked, &data), 1e-12);
        close(
            &written(&found.model, &data),
            &written(&masked, &data),
            1e-12,
        );
        assert!(found.report.after.parameters < found.report.before.parameters);
        assert!(found.report.after.flops_per_token < found.report.before.flops_per_token);
    }
}

/// A head whose output is nothing has no gradient and goes first, whatever block it is in.
#[test]
fn planted_useless_heads_go() {
    let whole = model(DECODER, 9);
    let planted = altered(&whole, "blocks.1.attention.output.weight", |output| {
        let mask: Vec<f64> = (0..16)
            .map(|i| f64::from(u8::from(i / 4 == 2 || i / 4 == 3)))
            .collect();
        let mask = Tensor::from_vec(mask, (1, 16), &Device::Cpu).unwrap();
        output.broadcast_mul(&mask).unwrap()
    });
    let data = windows(5, 9);
    let found = cut(&planted, &data, "prune-heads", 0.75);
    let changes: Vec<&Change> = found
        .report
        .modules
        .iter()
        .map(|module| &module.change)
        .collect();
    assert!(matches!(changes[0], Change::Leave { .. }));
    assert_eq!(changes[1], &Change::FewerHeads { heads: 2 });
    close(
        &scores(&found.model, &data),
        &scores(&planted, &data),
        1e-12,
    );
}

#[test]
fn what_is_pruned_loads_again() {
    for (kind, model, data) in all() {
        for method in WEIGHTS.into_iter().chain(STRUCTURED) {
            let found = cut(&model, &data, method, 0.5);
            let expected = scores(&found.model, &data);
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("model");
            Package::new(found.model, None).save(&path, None).unwrap();
            let options = OpenOptions {
                dtype: DType::F64,
                ..OpenOptions::default()
            };
            let package = Package::open(&path, &options).unwrap();
            let again = package.single_model().unwrap();
            assert_eq!(scores(again, &data), expected, "{kind} {method}");
        }
    }
}

#[test]
fn a_plan_written_by_hand_is_obeyed_or_refused() {
    let decoder = model(DECODER, 2);
    let data = windows(4, 2);
    let method = Method::find("magnitude").unwrap();
    let task = Task::new(&decoder);
    let mut plan = method.plan(&task, &Budget::Keep(0.5)).unwrap();
    plan.modules[0].change = Change::Prune { share: 1.0 };
    plan.modules[1].change = Change::Leave {
        reason: "because".into(),
    };
    let found = weights(&method.apply(&task, &plan).unwrap().model);
    let at = |index: usize| &found[&plan.modules[index].path];
    assert_eq!(zeros(at(0)), at(0).len());
    assert_eq!(zeros(at(1)), 0);
    for (path, change) in [
        ("blocks.0.attention.query", Change::Prune { share: 1.5 }),
        ("blocks.0.attention.query", Change::Remove),
        ("blocks.7.attention.query", Change::Prune { share: 0.5 }),
    ] {
        plan.modules[0].path = path.into();
        plan.modules[0].change = change;
        assert!(method.apply(&task, &plan).is_err());
    }
    let method = Method::find("prune-heads").unwrap();
    let requirements = method.requirements(&decoder, &Settings::default()).unwrap();
    let options = CalibrationOptions::default();
    let calibration = Calibration::collect(&decoder, &data, &requirements, options).unwrap();
    let task = Task {
        calibration: Some(&calibration),
        ..task
    };
    let mut plan = method.plan(&task, &Budget::Keep(0.5)).unwrap();
    for (heads, right) in [(0, false), (1, true), (4, true), (5, false)] {
        plan.modules[0].change = Change::FewerHeads { heads };
        assert_eq!(method.apply(&task, &plan).is_ok(), right, "{heads}");
    }
}

#[test]
fn settings_that_mean_nothing_are_refused_in_words() {
    let decoder = model(DECODER, 2);
    let usual = PruneSettings::default;
    for (pruning, words) in [
        (
            PruneSettings {
                pattern: Pattern::NOfM { n: 4, m: 4 },
                ..usual()
            },
            "4 of 4",
        ),
        (
            PruneSettings {
                keep_at_least: 1.0,
                ..usual()
            },
            "share that each matrix keeps",
        ),
        (
            PruneSettings {
                damping: 0.0,
                ..usual()
            },
            "damping",
        ),
        (
            PruneSettings {
                block: 0,
                ..usual()
            },
            "columns of a block",
        ),
    ] {
        for method in WEIGHTS.into_iter().chain(STRUCTURED) {
            let method = Method::find(method).unwrap();
            let error = method
                .requirements(&decoder, &settings(pruning.clone()))
                .unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
        }
    }
    let alibi = model(
        &DECODER.replace(
            "causal = true",
            "causal = true, position = { kind = \"alibi\" }",
        ),
        1,
    );
    let error = Method::find("prune-heads")
        .unwrap()
        .requirements(&alibi, &Settings::default());
    assert!(
        error
            .unwrap_err()
            .to_string()
            .contains("how many there are")
    );
    let table = Settings {
        selection: Selection {
            embeddings: true,
            ..Selection::default()
        },
        ..Settings::default()
    };
    let error = Method::find("second-order")
        .unwrap()
        .requirements(&decoder, &table);
    assert!(error.unwrap_err().to_string().contains("vocabulary"));
    // The others take the table.
    for method in ["magnitude", "random-weights", "first-order", "wanda"] {
        let encoder = model(ENCODER, 1);
        let found = cut_by(&encoder, &labelled(6, 3, 1), method, 0.5, &table).unwrap();
        let name = "embeddings.tokens.weight";
        assert!(
            zeros(&values(&found.model.parameters()[name])) > 0,
            "{method}"
        );
        let positions = "embeddings.positions.weight";
        let untouched = |model: &Model| {
            let others = model.parameters().iter();
            let others = others.filter(|(name, _)| {
                name.ends_with("bias") || name.contains("norm") || *name == positions
            });
            others.map(|(_, tensor)| values(tensor)).collect::<Vec<_>>()
        };
        assert_eq!(untouched(&found.model), untouched(&encoder), "{method}");
    }
}

fn family(name: &str) -> Package {
    let families = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/families");
    Package::open(&families.join(name), &OpenOptions::default()).unwrap()
}

fn data_of(model: &Model) -> CalibrationData {
    let mut random = ChaCha8Rng::seed_from_u64(3);
    let labels = match &model.spec().head {
        lapidary_model::HeadSpec::Pooled { labels, .. } => *labels,
        _ => None,
    };
    let sees_both = matches!(
        model.spec().head,
        lapidary_model::HeadSpec::LanguageModel { .. }
    ) && !model.spec().is_causal();
    let examples = (0..6).map(|index| {
        let content = match &model.spec().input {
            InputSpec::Patches(patches) => {
                let shape = (patches.channels, patches.image[0], patches.image[1]);
                let count = shape.0 * shape.1 * shape.2;
                let pixels: Vec<f32> = (0..count).map(|_| random.random_range(-1.0..1.0)).collect();
                Content::Pixels(Tensor::from_vec(pixels, shape, &Device::Cpu).unwrap())
            }
            InputSpec::Tokens(tokens) => Content::Tokens {
                ids: (0..8)
                    .map(|_| random.random_range(2..tokens.vocabulary as u32))
                    .collect(),
                types: None,
            },
        };
        Example {
            content,
            target: match labels {
                Some(labels) => Target::Label(index % labels as u32),
                None if sees_both => {
                    Target::Tokens((0..8).map(|i| (i % 3 == 0).then_some(5)).collect())
                }
                None => Target::None,
            },
        }
    });
    CalibrationData::new(examples.collect()).unwrap()
}

#[test]
fn every_family_is_pruned_or_says_why_not() {
    for name in [
        "gpt2",
        "opt",
        "llama",
        "mistral",
        "qwen2",
        "bert-classifier",
        "bert-masked-lm",
        "roberta-classifier",
        "vit",
        "mamba",
        "mixtral",
    ] {
        let package = family(name);
        let model = package.single_model().unwrap();
        let data = data_of(model);
        for method in WEIGHTS.into_iter().chain(STRUCTURED) {
            let found = cut_by(model, &data, method, 0.5, &Settings::default());
            match (name, method) {
                ("mamba", "prune-heads") => {
                    let error = found.err().unwrap().to_string();
                    assert!(
                        error.contains("multi-head attention for prune-heads"),
                        "{error}"
                    );
                }
                ("mamba", "channel-gradient") => {
                    let error = found.err().unwrap().to_string();
                    assert!(error.contains("without hidden features"), "{error}");
                }
                (_, method) if STRUCTURED.contains(&method) => {
                    let report = found.unwrap().report;
                    assert!(
                        report.after.parameters < report.before.parameters,
                        "{name} {method}"
                    );
                }
                _ => {
                    let pruned = sparsity(&found.unwrap().model);
                    assert!((pruned - 0.5).abs() < 0.03, "{name} {method}: {pruned}");
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Any share, any rows that lose as much each: the compensated rows are the least-squares
    /// optimum with their zeros, which no other values of what is left do better than.
    #[test]
    fn compensated_rows_are_optimal(share in 0.1f64..0.9, seed in 0u64..200) {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut draw = |rows: usize| -> Vec<Vec<f64>> {
            (0..rows)
                .map(|_| (0..8).map(|_| random.random_range(-1.0..1.0)).collect())
                .collect()
        };
        let (table, weight) = (draw(12), draw(8));
        let planted = one_layer(table.clone(), weight.clone());
        let damping = 0.02;
        let settings = of_hidden(PruneSettings { block: 8, damping, ..PruneSettings::default() });
        let found = cut_by(&planted, &words(0..12), "second-order", 1.0 - share, &settings).unwrap();
        let mut hessian = [[0.0; 8]; 8];
        for x in &table {
            for i in 0..8 {
                for j in 0..8 {
                    hessian[i][j] += x[i] * x[j] / 12.0;
                }
            }
        }
        let mean = (0..8).map(|i| hessian[i][i]).sum::<f64>() / 8.0;
        for (i, row) in hessian.iter_mut().enumerate() {
            row[i] += damping * mean;
        }
        for (before, after) in weight.iter().zip(hidden(&found).chunks(8)) {
            // The gradient H (v − w) is zero in every weight that is left.
            for (i, value) in after.iter().enumerate().filter(|(_, value)| **value != 0.0) {
                let gradient: f64 = (0..8).map(|j| hessian[i][j] * (after[j] - before[j])).sum();
                prop_assert!(gradient.abs() < 1e-9, "{gradient} at {i}, {value}");
            }
        }
        prop_assert!(distance(&hidden(&found), &weight.concat()) > 0.0);
    }
}
