//! MoDeGPT on small models in f64: what must hold exactly, through whole models.
#![allow(clippy::panic, clippy::result_large_err, clippy::unwrap_used)]

use crate::common::{
    DECODER, ENCODER, GATED, altered, close, distance, model, scores, values, windows,
};
use lapidary_compress::{
    Budget, Calibration, CalibrationData, CalibrationOptions, Change, Compressed, Method,
    ModegptSettings, Plan, Settings, Statistic, Task,
};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Input, Model, Package, Pass};
use lapidary_parts::attention::{MixerSpec, MultiHeadSpec};
use lapidary_parts::position::PositionSpec;
use lapidary_signal::Trace;

/// As Qwen 2, whose queries, keys and values have biases and whose output has none.
const BIASED: &str = r#"
width = 16
final_norm = { kind = "rms" }
[input]
kind = "tokens"
vocabulary = 20
length = 12
[[blocks]]
repeat = 2
norm = { kind = "rms" }
attention = { kind = "multi-head", heads = 4, groups = 2, head_width = 8, causal = true, output_bias = false, position = { kind = "rotary" } }
feedforward = { kind = "gated", hidden = 24 }
[head]
kind = "language-model"
"#;

/// As GPT-NeoX: parallel, a part of each head rotated.
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
attention = { kind = "multi-head", heads = 2, causal = true, position = { kind = "rotary", width = 4, interleaved = true } }
feedforward = { kind = "dense", hidden = 24 }
[head]
kind = "language-model"
"#;

/// As Mixtral.
const MIXTURE: &str = r#"
width = 16
final_norm = { kind = "rms" }
[input]
kind = "tokens"
vocabulary = 20
length = 12
[[blocks]]
norm = { kind = "rms" }
attention = { kind = "multi-head", heads = 4, causal = true, bias = false, position = { kind = "alibi" } }
feedforward = { kind = "mixture", hidden = 12, experts = 3, active = 2 }
[head]
kind = "language-model"
"#;

fn calibrate(model: &Model, data: &CalibrationData) -> Calibration {
    let method = Method::find("modegpt").unwrap();
    let requirements = method.requirements(model, &Settings::default()).unwrap();
    Calibration::collect(model, data, &requirements, CalibrationOptions::default()).unwrap()
}

/// A plan that takes as much from each block, which heads as narrow as these need.
fn plan(model: &Model, calibration: &Calibration, keep: f64) -> lapidary_compress::Result<Plan> {
    let even = Settings {
        modegpt: ModegptSettings {
            smoothing: f64::INFINITY,
            ..ModegptSettings::default()
        },
        ..Settings::default()
    };
    let task = Task {
        calibration: Some(calibration),
        settings: Some(&even),
        ..Task::new(model)
    };
    Method::find("modegpt")
        .unwrap()
        .plan(&task, &Budget::Keep(keep))
}

/// The plan with every attention and feed-forward part changed so.
fn by_hand(
    model: &Model,
    data: &CalibrationData,
    heads: Option<(usize, usize)>,
    hidden: Option<usize>,
) -> Compressed {
    let calibration = calibrate(model, data);
    let mut plan = plan(model, &calibration, 1.0).unwrap();
    for module in &mut plan.modules {
        let change = match module.path.ends_with("attention") {
            true => heads.map(|(query_key, value)| Change::NarrowHeads { query_key, value }),
            false => hidden.map(|features| Change::Narrow { features }),
        };
        if let Some(change) = change {
            module.change = change;
        }
    }
    plan.apply(model, Some(&calibration)).unwrap()
}

fn heads(model: &Model, block: usize) -> MultiHeadSpec {
    match &model.spec().expanded_blocks()[block].attention {
        MixerSpec::MultiHead(spec) => spec.clone(),
        other => panic!("{other:?}"),
    }
}

/// What a site holds for one sequence.
fn site(model: &Model, ids: &[u32], site: &str) -> Vec<f64> {
    let trace = Trace::new().capture(site).unwrap();
    let ids = Tensor::from_slice(ids, (1, ids.len()), &Device::Cpu).unwrap();
    let pass = Pass {
        trace: Some(&trace),
        ..Pass::default()
    };
    model.forward(&Input::tokens(ids), pass).unwrap();
    values(trace.signal(site).unwrap().value())
}

const ALL: [(&str, &str); 6] = [
    ("encoder", ENCODER),
    ("decoder", DECODER),
    ("gated", GATED),
    ("biased", BIASED),
    ("parallel", PARALLEL),
    ("mixture", MIXTURE),
];

#[test]
fn keeping_everything_keeps_every_kind_of_model() {
    for (name, spec) in ALL {
        let (model, data) = (model(spec, 1), windows(12, 4));
        let calibration = calibrate(&model, &data);
        let plan = plan(&model, &calibration, 1.0).unwrap();
        assert_eq!(plan.changed().count(), 0, "{name}");
        let compressed = plan.apply(&model, Some(&calibration)).unwrap();
        assert_eq!(
            scores(&model, &data),
            scores(&compressed.model, &data),
            "{name}"
        );
    }
}

#[test]
fn each_kind_of_model_narrows_and_stays_causal() {
    for (name, spec) in ALL {
        let (model, data) = (model(spec, 1), windows(12, 4));
        let calibration = calibrate(&model, &data);
        let compressed = plan(&model, &calibration, 0.6).unwrap();
        let text = serde_json::to_string(&compressed).unwrap();
        let compressed = serde_json::from_str::<Plan>(&text).unwrap();
        let compressed = compressed.apply(&model, Some(&calibration)).unwrap();
        let report = &compressed.report;
        let saved: usize = report
            .modules
            .iter()
            .map(|m| m.parameters_before - m.parameters_after)
            .sum();
        assert!(saved > 0, "{name}");
        assert!(report.after.parameters < report.before.parameters, "{name}");
        assert!(distance(&scores(&compressed.model, &data), &scores(&model, &data)) > 1e-6);
        if name != "encoder" {
            let narrow = &compressed.model;
            let before = site(narrow, &[3, 1, 7, 2, 9, 4], "blocks.0.out");
            let other = site(narrow, &[3, 1, 7, 2, 9, 11], "blocks.0.out");
            assert_eq!(before[..5 * 16], other[..5 * 16], "{name}");
            assert!(before[5 * 16..] != other[5 * 16..], "{name}");
        }
    }
}

#[test]
fn a_saved_model_loads_with_equal_logits() {
    for (name, spec) in ALL {
        let (model, data) = (model(spec, 1), windows(12, 4));
        let calibration = calibrate(&model, &data);
        let narrow = plan(&model, &calibration, 0.6)
            .unwrap()
            .apply(&model, Some(&calibration));
        let narrow = narrow.unwrap().model;
        let expected = scores(&narrow, &data);
        let directory = tempfile::tempdir().unwrap();
        let to = directory.path().join("saved");
        Package::new(narrow, None).save(&to, None).unwrap();
        let options = lapidary_model::OpenOptions {
            dtype: DType::F64,
            ..Default::default()
        };
        let loaded = Package::open(&to, &options).unwrap();
        assert_eq!(
            expected,
            scores(loaded.single_model().unwrap(), &data),
            "{name}"
        );
    }
}

/// Whatever the positions, a pruned score is the whole score without what the dropped pairs add,
/// at every pair of positions: the same as with the dropped features set to zero.
#[test]
fn pruned_scores_lack_just_what_the_dropped_features_added() {
    for (name, spec) in [
        ("gated", GATED),
        ("biased", BIASED),
        ("parallel", PARALLEL),
        ("decoder", DECODER),
    ] {
        let (model, data) = (model(spec, 5), windows(12, 4));
        let before = heads(&model, 0);
        let width = before.head_width(16);
        let narrow = by_hand(&model, &data, Some((width / 2, width)), None).model;
        let after = heads(&narrow, 0);
        assert_eq!(
            (after.head_width(16), after.value_width(16)),
            (width / 2, width)
        );
        assert_eq!(after.scale(16), before.scale(16));

        // Which rows of the keys stayed, found by their weights.
        let rows = |model: &Model, name: &str| -> Vec<Vec<f64>> {
            let name = format!("blocks.0.attention.{name}.weight");
            model.parameters()[&name].to_vec2().unwrap()
        };
        let mut zeroed = model.parameters().clone();
        for part in ["query", "key"] {
            let kept = rows(&narrow, part);
            let mask: Vec<f64> = rows(&model, part)
                .iter()
                .map(|row| f64::from(u8::from(kept.contains(row))))
                .collect();
            assert_eq!(mask.iter().sum::<f64>() as usize, kept.len(), "{name}");
            let length = mask.len();
            let mask = Tensor::from_vec(mask, length, &Device::Cpu).unwrap();
            for (kind, mask) in [("weight", mask.unsqueeze(1).unwrap()), ("bias", mask)] {
                let name = format!("blocks.0.attention.{part}.{kind}");
                if let Some(tensor) = zeroed.get(&name) {
                    let masked = tensor.broadcast_mul(&mask).unwrap();
                    zeroed.insert(name, masked);
                }
            }
        }
        let zeroed = Model::new(model.spec().clone(), &mut zeroed).unwrap();
        let weights = "blocks.0.attention.weights";
        for ids in [[3, 1, 7, 2, 9, 4, 4, 15], [5, 5, 0, 19, 2, 8, 1, 6]] {
            let (found, expected) = (site(&narrow, &ids, weights), site(&zeroed, &ids, weights));
            close(&found, &expected, 1e-12);
            assert!(
                distance(&found, &site(&model, &ids, weights)) > 1e-3,
                "{name}"
            );
        }
        // Frequencies of the first model, in pairs of its own for each group.
        if let PositionSpec::Rotary(rotary) = &after.position {
            let kept = rotary.kept.as_ref().unwrap();
            assert_eq!(kept.groups.len(), before.groups());
        }
    }
}

#[test]
fn decoding_token_by_token_equals_one_pass() {
    for spec in [BIASED, PARALLEL] {
        let (model, data) = (model(spec, 5), windows(12, 4));
        let width = heads(&model, 0).head_width(16);
        let narrow = by_hand(&model, &data, Some((width / 2, 3)), Some(10)).model;
        let ids = [3u32, 1, 7, 2, 9, 4];
        let whole = Tensor::from_slice(&ids, (1, 6), &Device::Cpu).unwrap();
        let whole = narrow
            .forward(&Input::tokens(whole), Pass::default())
            .unwrap();
        let whole = values(whole.into_logits().unwrap().value());
        let mut state = narrow.decode_state();
        let mut found = Vec::new();
        for id in ids {
            let one = Tensor::from_slice(&[id], (1, 1), &Device::Cpu).unwrap();
            let pass = Pass {
                state: Some(&mut state),
                ..Pass::default()
            };
            let output = narrow.forward(&Input::tokens(one), pass).unwrap();
            found.extend(values(output.into_logits().unwrap().value()));
        }
        close(&found, &whole, 1e-12);
    }
}

/// With the values' bias moved to the output, only the discarded directions are missing.
#[test]
fn values_that_need_fewer_features_lose_nothing() {
    for (spec, groups) in [(BIASED, 2), (DECODER, 4)] {
        let mut model = model(spec, 6);
        let width = heads(&model, 0).value_width(16);
        // Every group's values are of rank two; their biases are not.
        for block in 0..2 {
            let name = format!("blocks.{block}.attention.value.weight");
            model = altered(&model, &name, |weight| {
                let rows: Vec<Vec<f64>> = weight.to_vec2().unwrap();
                let mixed: Vec<f64> = (0..groups * width)
                    .flat_map(|row| {
                        let (first, i) = (row / width * width, (row % width) as f64);
                        let (a, b) = (&rows[first], &rows[first + 1]);
                        a.iter()
                            .zip(b)
                            .map(move |(a, b)| a * (1.0 + i) - b * i * i / 9.0)
                            .collect::<Vec<f64>>()
                    })
                    .collect();
                Tensor::from_vec(mixed, (groups * width, 16), &Device::Cpu).unwrap()
            });
        }
        let data = windows(12, 4);
        let narrow = by_hand(&model, &data, Some((width, 2)), None);
        close(&scores(&narrow.model, &data), &scores(&model, &data), 1e-9);
        let less = by_hand(&model, &data, Some((width, 1)), None);
        assert!(distance(&scores(&less.model, &data), &scores(&model, &data)) > 1e-4);
        assert!(heads(&narrow.model, 0).output_bias.unwrap_or(true));
    }
}

/// Refitting beats leaving the same features without it, in the output of the part on the data.
#[test]
fn hidden_features_are_refitted_on_the_data() {
    for spec in [DECODER, GATED] {
        let (model, data) = (model(spec, 7), windows(40, 4));
        let narrow = by_hand(&model, &data, None, Some(12)).model;
        let up = |model: &Model| -> Vec<Vec<f64>> {
            model.parameters()["blocks.0.feedforward.up.weight"]
                .to_vec2()
                .unwrap()
        };
        let (all, kept) = (up(&model), up(&narrow));
        let kept: Vec<u32> = kept
            .iter()
            .map(|row| all.iter().position(|other| other == row).unwrap() as u32)
            .collect();
        assert_eq!(kept.len(), 12);
        // C of the hidden features, as the calibration has it.
        let statistic = Statistic::Covariance {
            site: "blocks.0.feedforward.hidden".to_owned(),
        };
        let c = calibrate(&model, &data).tensor(&statistic).unwrap();
        let down = |model: &Model| model.parameters()["blocks.0.feedforward.down.weight"].clone();
        let indices = Tensor::from_slice(&kept, 12, &Device::Cpu).unwrap();
        let error = |fitted: &Tensor| {
            let zero = Tensor::zeros((16, 24), DType::F64, &Device::Cpu).unwrap();
            let wide = zero.index_add(&indices, fitted, 1).unwrap();
            let error = (down(&model) - wide).unwrap();
            // (W_D − S W_D')ᵀ C
            (error.matmul(&c).unwrap(), error)
        };
        let energy = |fitted: &Tensor| {
            let (product, error) = error(fitted);
            (product * error)
                .unwrap()
                .sum_all()
                .unwrap()
                .to_scalar::<f64>()
                .unwrap()
        };
        let (residual, _) = error(&down(&narrow));
        let residual = values(&residual.index_select(&indices, 1).unwrap());
        assert!(residual.iter().all(|entry| entry.abs() < 1e-10));
        let dropped = down(&model).index_select(&indices, 1).unwrap();
        assert!(energy(&down(&narrow)) < 0.9 * energy(&dropped));
    }
}

#[test]
fn the_block_of_less_influence_loses_more() {
    let (model, data) = (model(DECODER, 3), windows(12, 4));
    let calibration = calibrate(&model, &data);
    let influence = |block: usize| {
        let statistic = Statistic::Similarity {
            from: format!("blocks.{block}.in"),
            to: format!("blocks.{block}.out"),
        };
        1.0 - calibration.number(&statistic).unwrap()
    };
    let task = Task {
        calibration: Some(&calibration),
        ..Task::new(&model)
    };
    let method = Method::find("modegpt").unwrap();
    let plan = method.plan(&task, &Budget::Keep(0.75)).unwrap();
    let hidden = |block: usize| match plan.modules[2 * block + 1].change {
        Change::Narrow { features } => features,
        _ => 24,
    };
    // φ_l = 2 · 0.25 · softmax(−s / 0.1)_l
    let first = 0.5 / (1.0 + ((influence(0) - influence(1)) / 0.1).exp());
    assert_eq!(hidden(0), ((1.0 - first) * 24.0).ceil() as usize);
    assert_eq!(hidden(1), ((0.5 + first) * 24.0).ceil() as usize);
    assert_eq!(hidden(0) < hidden(1), influence(0) < influence(1));
    assert!(hidden(0) != hidden(1));
}

#[test]
fn nothing_is_left_of_nothing_and_other_models_are_refused() {
    let (gated, data) = (model(GATED, 1), windows(12, 4));
    let calibration = calibrate(&gated, &data);
    let error = plan(&gated, &calibration, 0.21).unwrap_err().to_string();
    assert!(
        error.contains("queries and keys") && error.contains("at least 1"),
        "{error}"
    );
    let error = plan(&gated, &calibration, 0.1).unwrap_err().to_string();
    assert!(error.contains("no block loses more than 0.8"), "{error}");

    let mut zero = plan(&gated, &calibration, 1.0).unwrap();
    for change in [
        Change::NarrowHeads {
            query_key: 2,
            value: 0,
        },
        Change::NarrowHeads {
            query_key: 0,
            value: 2,
        },
        Change::NarrowHeads {
            query_key: 3,
            value: 2,
        },
        Change::Narrow { features: 3 },
    ] {
        zero.modules[0].change = change.clone();
        assert!(
            zero.apply(&gated, Some(&calibration)).is_err(),
            "{change:?}"
        );
    }
    zero.modules[0].path = "blocks.9.attention".to_owned();
    let error = zero
        .apply(&gated, Some(&calibration))
        .unwrap_err()
        .to_string();
    assert!(error.contains("blocks.9.attention"), "{error}");

    let normed = GATED.replace(
        "bias = false,",
        "bias = false, query_key_norm = { norm = { kind = \"rms\" } },",
    );
    let refused = |spec: &str| {
        let method = Method::find("modegpt").unwrap();
        let error = method
            .requirements(&model(spec, 1), &Settings::default())
            .unwrap_err();
        error.to_string()
    };
    let error = refused(&normed);
    assert!(error.contains("normalises queries and keys"), "{error}");
    let mamba = GATED.replace(
        "attention = { kind = \"multi-head\", heads = 4, groups = 2, causal = true, bias = false, position = { kind = \"rotary\" } }",
        "attention = { kind = \"mamba\" }",
    );
    assert!(refused(&mamba).contains("mamba"));
}

#[test]
fn an_expert_that_no_token_goes_to_is_named() {
    // Of equal probabilities the first two are chosen.
    let router = "blocks.0.feedforward.router.weight";
    let idle = altered(&model(MIXTURE, 1), router, |w| w.zeros_like().unwrap());
    let method = Method::find("modegpt").unwrap();
    let requirements = method.requirements(&idle, &Settings::default()).unwrap();
    let options = CalibrationOptions::default();
    let found = Calibration::collect(&idle, &windows(4, 4), &requirements, options);
    let error = found.err().unwrap().to_string();
    assert!(
        error.contains("experts.2") && error.contains("more text"),
        "{error}"
    );
}

#[test]
fn the_least_features_by_weight_go_and_nothing_else_changes() {
    let method = Method::find("channel-magnitude").unwrap();
    for spec in [DECODER, GATED, MIXTURE] {
        let mut small = model(spec, 2);
        let data = windows(12, 4);
        // The second half of the hidden features does nothing: by magnitude they go first.
        let names: Vec<String> = small.parameters().keys().cloned().collect();
        for name in names.iter().filter(|name| name.contains("feedforward.")) {
            let dimension = if name.contains("down.weight") { 1 } else { 0 };
            if name.ends_with("down.bias") || name.contains("router") {
                continue;
            }
            small = altered(&small, name, |t| {
                let half = t.dims()[dimension] / 2;
                let kept = t.narrow(dimension, 0, half).unwrap();
                Tensor::cat(&[&kept, &kept.zeros_like().unwrap()], dimension).unwrap()
            });
        }
        let plan = method.plan(&Task::new(&small), &Budget::Keep(0.5)).unwrap();
        let half = method.apply(&Task::new(&small), &plan).unwrap();
        let expected = scores(&small, &data);
        close(&scores(&half.model, &data), &expected, 1e-12);
        let plan = method.plan(&Task::new(&small), &Budget::Keep(0.4)).unwrap();
        let less = method.apply(&Task::new(&small), &plan).unwrap();
        assert!(distance(&scores(&less.model, &data), &expected) > 1e-6);
    }
}
