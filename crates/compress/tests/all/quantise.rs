//! Weights as small integers, through whole models.
#![allow(clippy::panic, clippy::result_large_err, clippy::unwrap_used)]

use crate::common;
use crate::common::{altered, close, distance, model, scores, windows};
use lapidary_compress::{
    Budget, Calibration, CalibrationData, CalibrationOptions, Change, Compressed, Fingerprint,
    HealData, HealSettings, Method, QuantiseSettings, Recipe, Settings, Size, Statistic, Task,
    export_dense, heal,
};
use lapidary_kernels::DType;
use lapidary_model::{Model, OpenOptions, Package};

/// As Llama, with rows of 64 and of 96.
const GATED: &str = r#"
width = 64
final_norm = { kind = "rms" }
[input]
kind = "tokens"
vocabulary = 20
length = 12
[[blocks]]
repeat = 2
norm = { kind = "rms" }
attention = { kind = "multi-head", heads = 4, groups = 2, bias = false, causal = true, position = { kind = "rotary" } }
feedforward = { kind = "gated", hidden = 96 }
[head]
kind = "language-model"
"#;

/// A mixture of experts after attention, and a recurrence.
const MIXED: &str = r#"
width = 32
final_norm = { kind = "rms" }
[input]
kind = "tokens"
vocabulary = 20
length = 12
[[blocks]]
norm = { kind = "rms" }
attention = { kind = "multi-head", heads = 2, bias = false, causal = true }
feedforward = { kind = "mixture", hidden = 32, experts = 3, active = 2 }
[[blocks]]
norm = { kind = "rms" }
attention = { kind = "mamba" }
[head]
kind = "language-model"
"#;

/// Attention that writes by its queries.
const TIED: &str = r#"
width = 64
[input]
kind = "tokens"
vocabulary = 20
length = 12
[[blocks]]
attention = { kind = "multi-head", heads = 4, bias = false, causal = true, sharing = "all", output = "tied" }
feedforward = { kind = "dense", hidden = 96 }
[head]
kind = "language-model"
"#;

fn calibrated(
    model: &Model,
    method: &Method,
    settings: &Settings,
) -> (CalibrationData, Calibration) {
    let data = windows(12, 7);
    let requirements = method.requirements(model, settings).unwrap();
    let options = CalibrationOptions::default();
    let calibration = Calibration::collect(model, &data, &requirements, options).unwrap();
    (data, calibration)
}

fn rounded(model: &Model, name: &str, settings: &Settings) -> Compressed {
    let method = Method::find(name).unwrap();
    let (_, calibration) = calibrated(model, method, settings);
    let task = Task {
        calibration: Some(&calibration),
        settings: Some(settings),
        ..Task::new(model)
    };
    let plan = method.plan(&task, &Budget::Keep(1.0)).unwrap();
    method.apply(&task, &plan).unwrap()
}

/// The mean of what the layers' outputs lost, on the calibration's inputs.
fn output_error(model: &Model, compressed: &Model) -> f64 {
    let errors = lapidary_compress::output_errors(model, compressed, &windows(12, 7), 4).unwrap();
    errors.values().sum::<f64>() / errors.len() as f64
}

#[test]
fn the_model_runs_as_the_one_with_its_numbers_written_out() {
    let data = windows(4, 1);
    for spec in [GATED, MIXED] {
        let model = model(spec, 3);
        for name in ["int8", "int4", "awq", "gptq"] {
            for minima in [false, true] {
                let settings = Settings {
                    quantise: QuantiseSettings {
                        minima,
                        ..QuantiseSettings::default()
                    },
                    ..Settings::default()
                };
                let compressed = rounded(&model, name, &settings).model;
                assert!(!compressed.spec().quantised.is_empty());
                assert_eq!(compressed.parameter_count(), model.parameter_count());
                assert_eq!(compressed.dtype(), DType::F64);
                let dense = export_dense(&compressed).unwrap();
                assert_eq!(dense.spec(), model.spec());
                close(&scores(&compressed, &data), &scores(&dense, &data), 1e-12);
            }
        }
    }
}

#[test]
fn queries_that_the_output_is_tied_to_stay_as_they_are() {
    let model = model(TIED, 4);
    for name in ["int8", "int4", "awq", "gptq"] {
        let compressed = rounded(&model, name, &Settings::default());
        let left: Vec<&str> = compressed
            .report
            .modules
            .iter()
            .filter(|module| matches!(module.change, Change::Leave { .. }))
            .map(|module| module.path.as_str())
            .collect();
        assert_eq!(left, ["blocks.0.attention.query"], "{name}");
        let quantised = compressed.model.spec().quantised.keys();
        let quantised: Vec<&str> = quantised.map(String::as_str).collect();
        let expected = [
            "blocks.0.feedforward.down.weight",
            "blocks.0.feedforward.up.weight",
        ];
        assert_eq!(quantised, expected, "{name}");
    }
}

#[test]
fn more_bits_and_better_guides_lose_less() {
    let model = model(GATED, 5);
    let loss = |name| output_error(&model, &rounded(&model, name, &Settings::default()).model);
    let [int8, int4, awq, gptq] = ["int8", "int4", "awq", "gptq"].map(loss);
    assert!(int8 < 0.02, "{int8}");
    assert!(int8 < 0.2 * int4, "{int8} {int4}");
    assert!(awq <= int4, "{awq} {int4}");
    assert!(gptq < 0.8 * int4, "{gptq} {int4}");
    let far = distance(
        &scores(
            &rounded(&model, "int8", &Settings::default()).model,
            &windows(4, 2),
        ),
        &scores(&model, &windows(4, 2)),
    );
    assert!(far < 0.05, "{far}");
}

#[test]
fn it_is_saved_in_as_many_bytes_as_it_says_and_loads_with_equal_scores() {
    let directory = tempfile::tempdir().unwrap();
    let data = windows(4, 3);
    let (whole, name) = (model(GATED, 8), "gptq");
    let single = |model: &Model| {
        let mut parameters = model.parameters().clone();
        for tensor in parameters.values_mut() {
            *tensor = tensor.to_dtype(DType::F32).unwrap();
        }
        Model::new(model.spec().clone(), &mut parameters).unwrap()
    };
    let compressed = rounded(&single(&whole), name, &Settings::default()).model;
    let out = directory.path().join("out");
    let before = scores(&compressed, &data);
    let (size, count) = (Size::of(&compressed), compressed.parameter_count());
    Package::new(compressed, None).save(&out, None).unwrap();
    let package = Package::open(&out, &OpenOptions::default()).unwrap();
    let loaded = package.single_model().unwrap();
    assert_eq!(scores(loaded, &data), before);
    assert_eq!((Size::of(loaded), loaded.parameter_count()), (size, count));
    // The file is a length of 8 bytes, a header of that length, and the tensors.
    let file = std::fs::read(out.join("model.safetensors")).unwrap();
    let header = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    assert_eq!(file.len() - 8 - header, size.bytes);
    // The same integers: written in another type they are refused.
    let error = package.save(&directory.path().join("half"), Some(DType::F16));
    assert!(error.unwrap_err().to_string().contains("quantised"));
}

#[test]
fn the_same_run_gives_the_same_bytes() {
    let model = model(GATED, 8);
    let data = windows(12, 7);
    let recipe = Recipe::of("whitened+awq", "0.4").unwrap();
    let run = || {
        let done = recipe
            .run(&model, Some(&data), &Settings::default())
            .unwrap();
        Fingerprint::of(&done.last().unwrap().compressed.model).unwrap()
    };
    assert_eq!(run(), run());
}

#[test]
fn factors_are_rounded_each_by_itself() {
    let model = model(GATED, 9);
    let data = windows(12, 7);
    let settings = Settings::default();
    for name in ["int4", "gptq", "awq"] {
        let recipe = Recipe::of(&format!("svd+{name}"), "0.3").unwrap();
        let done = recipe.run(&model, Some(&data), &settings).unwrap();
        let [cut, rounded] = done.as_slice() else {
            panic!("two stages")
        };
        let ranks = &cut.compressed.model.spec().low_rank;
        assert!(!ranks.is_empty());
        let after = rounded.compressed.model.spec();
        assert_eq!(&after.low_rank, ranks);
        for (path, rank) in ranks {
            let up = after.quantised.contains_key(&format!("{path}.up"));
            assert_eq!(up, rank.is_multiple_of(32), "{path} of rank {rank}");
        }
        let dense = export_dense(&rounded.compressed.model).unwrap();
        let close_to = scores(&rounded.compressed.model, &data);
        close(&close_to, &scores(&dense, &data), 1e-10);
    }
}

#[test]
fn a_plan_may_give_each_layer_its_own_bits_and_rows_that_do_not_fit_stay() {
    let odd = GATED.replace("hidden = 96", "hidden = 80");
    let model = model(&odd, 4);
    let settings = Settings::default();
    let method = Method::find("int4").unwrap();
    let task = Task {
        settings: Some(&settings),
        ..Task::new(&model)
    };
    let mut plan = method.plan(&task, &Budget::Keep(1.0)).unwrap();
    for module in &mut plan.modules {
        let down = module.path.ends_with("feedforward.down");
        assert_eq!(
            matches!(module.change, Change::Leave { .. }),
            down,
            "{}",
            module.path
        );
        if module.path.ends_with("query") {
            module.change = Change::Quantise { bits: 8, group: 64 };
        }
    }
    let compressed = method.apply(&task, &plan).unwrap().model;
    let query = compressed.spec().quantised["blocks.1.attention.query.weight"];
    assert_eq!((query.bits, query.group), (8, 64));
    let value = compressed.spec().quantised["blocks.1.attention.value.weight"];
    assert_eq!((value.bits, value.group), (4, 32));
}

#[test]
fn what_is_rounded_is_not_cut_any_more() {
    let model = model(GATED, 4);
    let compressed = rounded(&model, "int8", &Settings::default()).model;
    for method in Method::all() {
        let error = method.requirements(&compressed, &Settings::default());
        let error = error.unwrap_err().to_string();
        assert!(error.contains("quantised"), "{error}");
    }
    for (methods, ratios) in [("int4+svd", "0.2"), ("int4", "0.1+0.2"), ("svd", "1.2")] {
        assert!(
            Recipe::of(methods, ratios).is_err(),
            "{methods} at {ratios}"
        );
    }
    let settings = Settings {
        quantise: QuantiseSettings {
            bits: 5,
            ..QuantiseSettings::default()
        },
        ..Settings::default()
    };
    let gptq = Method::find("gptq").unwrap();
    assert!(gptq.requirements(&model, &settings).is_err());
}

#[test]
fn a_damping_that_takes_away_is_refused_where_it_counts() {
    let model = model(GATED, 4);
    for damping in [-0.5, f64::NAN, f64::INFINITY] {
        let settings = Settings {
            quantise: QuantiseSettings {
                damping,
                ..QuantiseSettings::default()
            },
            ..Settings::default()
        };
        let told = |name: &str| Method::find(name).unwrap().requirements(&model, &settings);
        let error = told("gptq").unwrap_err().to_string();
        let expected = format!("damping of gptq is {damping}, but must be at least 0");
        assert_eq!(error, expected);
        assert!(told("awq").is_ok() && told("int4").is_ok());
    }
}

/// A plan is a file, in which anything may stand.
#[test]
fn plans_that_ask_for_what_cannot_be_stored_are_refused() {
    let model = model(GATED, 4);
    for name in ["int4", "awq", "gptq"] {
        let method = Method::find(name).unwrap();
        let (_, calibration) = calibrated(&model, method, &Settings::default());
        let task = Task {
            calibration: Some(&calibration),
            ..Task::new(&model)
        };
        let plan = method.plan(&task, &Budget::Keep(1.0)).unwrap();
        assert!(method.apply(&task, &plan).is_ok());
        // Some rows are of 96, which is not a multiple of 64.
        for (bits, group) in [(4, 0), (4, 48), (4, 64), (0, 32), (3, 32), (40, 32)] {
            let mut edited = plan.clone();
            for module in &mut edited.modules {
                module.change = Change::Quantise { bits, group };
            }
            let error = method.apply(&task, &edited).unwrap_err().to_string();
            assert!(error.contains("in a plan"), "{error}");
        }
    }
}

#[test]
fn gradients_pass_through_and_integers_stay() {
    let model = model(GATED, 6);
    let compressed = rounded(&model, "int8", &Settings::default());
    let trainable = compressed.trainable().unwrap();
    let names: Vec<&String> = trainable.variables().keys().collect();
    assert!(
        names
            .iter()
            .any(|name| name.ends_with("attention_norm.weight"))
    );
    assert!(
        names
            .iter()
            .all(|name| !name.ends_with(".codes") && !name.ends_with(".scales"))
    );
    let ids = lapidary_kernels::Tensor::new(&[[1u32, 5, 2]], &model.device()).unwrap();
    let input = lapidary_model::Input::tokens(ids);
    let output = trainable.forward(&input, Default::default()).unwrap();
    let loss = output.into_logits().unwrap().into_value().sqr().unwrap();
    let gradients = loss.mean_all().unwrap().backward().unwrap();
    let first = &trainable.variables()["blocks.0.attention_norm.weight"];
    let gradient = gradients.get(first.as_tensor()).unwrap();
    let size = gradient.abs().unwrap().max_all().unwrap();
    assert!(size.to_scalar::<f64>().unwrap() > 0.0);
}

/// What is validated is the model as it is rounded after, and rounding takes nothing from the gradient.
#[test]
fn healing_for_a_rounding_sees_what_it_gives() {
    let (model, data) = (model(GATED, 3), windows(12, 7));
    let learned = HealData {
        training: &data,
        validation: &data,
        teacher: Some(&model),
    };
    let distil = HealSettings {
        steps: 0,
        distil: 1.0,
        weight_decay: 0.0,
        ..HealSettings::default()
    };
    // Eight bits lose so little that larger steps lose more than there is to gain.
    for (name, rate) in [("int4", 3e-3), ("int8", 1e-4)] {
        let settings = Settings::default();
        let heal_for = |steps: u64| {
            let told = HealSettings {
                steps,
                rate,
                rounding: Method::find(name).unwrap().rounding(&settings),
                ..distil.clone()
            };
            heal(&model, &learned, &told, |_, _| ()).unwrap()
        };
        let loss_of_rounded = |model: &Model| {
            let dense = export_dense(&rounded(model, name, &settings).model).unwrap();
            heal(&dense, &learned, &distil, |_, _| ()).unwrap().1.before
        };
        let (healed, report) = heal_for(40);
        close(&[report.before], &[loss_of_rounded(&model)], 1e-9);
        close(&[report.after], &[loss_of_rounded(&healed)], 1e-9);
        assert_eq!(report.bits, Some(if name == "int4" { 4 } else { 8 }));
        assert!(report.after < report.before, "{report:?}");
        // It is still made of numbers, which are not those of the grid.
        assert!(healed.spec().quantised.is_empty());
        let query = "blocks.0.attention.query.weight";
        let [before, after] = [&model, &healed].map(|m| common::values(&m.parameters()[query]));
        assert_ne!(before, after);
        let grid = export_dense(&rounded(&healed, name, &settings).model).unwrap();
        assert_ne!(common::values(&grid.parameters()[query]), after);
    }
}

#[test]
fn sums_before_the_first_change_are_carried_over() {
    let model = model(GATED, 2);
    let gptq = Method::find("gptq").unwrap();
    let (data, calibration) = calibrated(&model, gptq, &Settings::default());
    let changed = altered(&model, "blocks.1.attention.value.weight", |weight| {
        (weight * 2.0).unwrap()
    });
    let requirements = gptq.requirements(&changed, &Settings::default()).unwrap();
    let options = CalibrationOptions::default();
    let carried = calibration
        .carried_over(&model, &changed, &data, &requirements, options)
        .unwrap();
    let anew = Calibration::collect(&changed, &data, &requirements, options).unwrap();
    let (mut kept, mut taken) = (0, 0);
    for statistic in &requirements.statistics {
        let [new, fresh] = [&carried, &anew].map(|c| c.tensor(statistic).unwrap());
        assert_eq!(common::values(&new), common::values(&fresh), "{statistic}");
        match carried.shares(&calibration, statistic) {
            true => kept += 1,
            false => taken += 1,
        }
    }
    // Each block has four sites that linear layers read.
    assert_eq!((kept, taken), (4, 4));
    // Other data, or another model than the one that was calibrated, carry nothing over.
    let other = windows(12, 8);
    let carried = calibration
        .carried_over(&model, &changed, &other, &requirements, options)
        .unwrap();
    let site = "blocks.0.attention.in".to_owned();
    let statistic = Statistic::Covariance { site };
    let found = carried.tensor(&statistic).unwrap();
    assert_ne!(
        common::values(&found),
        common::values(&calibration.tensor(&statistic).unwrap())
    );
    assert!(
        calibration
            .carried_over(&changed, &model, &data, &requirements, options)
            .is_err()
    );
}
