//! Hidden features merged by optimal transport.
#![allow(clippy::result_large_err, clippy::unwrap_used)]

use crate::common::{DECODER, GATED, altered, close, distance, model, scores, values, windows};
use lapidary_compress::slicing::{Distance, SliceSettings, Transport};
use lapidary_compress::{
    Budget, CalibrationData, Change, Compressed, Method, Plan, Settings, Task,
};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Model, OpenOptions, Package};

const NAME: &str = "dotresize-hidden";
const HIDDEN: usize = 24;

fn at_temperature(temperature: f64) -> Settings {
    Settings {
        slicing: SliceSettings {
            transport: Transport {
                temperature,
                ..Transport::default()
            },
            ..SliceSettings::default()
        },
        ..Settings::default()
    }
}

fn compress(
    name: &str,
    model: &Model,
    data: &CalibrationData,
    settings: &Settings,
    change: impl Fn(&mut Plan),
) -> Compressed {
    let task = Task {
        data: Some(data),
        settings: Some(settings),
        ..Task::new(model)
    };
    let method = Method::find(name).unwrap();
    let mut plan = method.plan(&task, &Budget::Keep(0.5)).unwrap();
    change(&mut plan);
    method.apply(&task, &plan).unwrap()
}

/// The layers that write hidden features.
fn writers(model: &Model) -> Vec<String> {
    let paths = model.linears().iter().map(|linear| linear.path.clone());
    paths
        .filter(|path| path.ends_with("feedforward.up") || path.ends_with("feedforward.gate"))
        .collect()
}

/// The model with every second hidden feature given what the one before it is given.
fn doubled(model: &Model) -> Model {
    let rows: Vec<u32> = (0..HIDDEN as u32).map(|i| i - i % 2).collect();
    let rows = Tensor::from_vec(rows, HIDDEN, &Device::Cpu).unwrap();
    let mut names = writers(model);
    names = names
        .iter()
        .flat_map(|path| [format!("{path}.weight"), format!("{path}.bias")])
        .filter(|name| model.parameters().contains_key(name))
        .collect();
    let start = Model::new(model.spec().clone(), &mut model.parameters().clone()).unwrap();
    names.iter().fold(start, |model, name| {
        altered(&model, name, |tensor| {
            tensor.index_select(&rows, 0).unwrap()
        })
    })
}

#[test]
fn all_features_when_it_is_cold_are_the_same_model() {
    for spec in [DECODER, GATED] {
        let (model, data) = (model(spec, 2), windows(8, 4));
        let same = compress(NAME, &model, &data, &at_temperature(1e-3), |plan| {
            for module in &mut plan.modules {
                module.change = Change::Narrow { features: HIDDEN };
            }
        });
        close(&scores(&same.model, &data), &scores(&model, &data), 1e-9);
        let name = "blocks.0.feedforward.up.weight";
        let [found, own] = [&same.model, &model].map(|model| values(&model.parameters()[name]));
        assert!(distance(&found, &own) > 1e-3, "in another order");
    }
}

#[test]
fn features_that_are_given_the_same_are_merged_without_loss() {
    for spec in [DECODER, GATED] {
        let (model, data) = (doubled(&model(spec, 2)), windows(8, 4));
        let expected = scores(&model, &data);
        for distances in [Distance::Absolute, Distance::Squared, Distance::Cosine] {
            let mut settings = at_temperature(1e-3);
            settings.slicing.transport.distance = distances;
            let merged = compress(NAME, &model, &data, &settings, |_| ());
            let hidden = merged.model.spec().blocks[0]
                .feedforward
                .as_ref()
                .unwrap()
                .hidden();
            assert_eq!(hidden, HIDDEN / 2);
            close(&scores(&merged.model, &data), &expected, 1e-8);
        }
        // Leaving half of them out is another thing.
        let out = compress(
            "channel-magnitude",
            &model,
            &data,
            &Settings::default(),
            |_| (),
        );
        assert!(distance(&scores(&out.model, &data), &expected) > 1e-3);
    }
}

/// Two features that are never active are one to the layer after, whatever they are given.
#[test]
fn features_of_the_same_activations_are_merged_without_loss() {
    let doubled = doubled(&model(DECODER, 2));
    let apart = |bias: &Tensor| {
        let mut biases = values(bias);
        biases[HIDDEN - 2] = -60.0;
        biases[HIDDEN - 1] = -90.0;
        Tensor::from_vec(biases, HIDDEN, &Device::Cpu).unwrap()
    };
    let model = writers(&doubled).iter().fold(doubled, |model, path| {
        altered(&model, &format!("{path}.bias"), apart)
    });
    let data = windows(8, 4);
    for distances in [Distance::Absolute, Distance::Squared] {
        let mut settings = at_temperature(1e-3);
        settings.slicing.transport.distance = distances;
        let merged = compress(NAME, &model, &data, &settings, |_| ());
        close(&scores(&merged.model, &data), &scores(&model, &data), 1e-8);
        let bias = values(&merged.model.parameters()["blocks.0.feedforward.up.bias"]);
        let shut: Vec<&f64> = bias.iter().filter(|bias| **bias < -10.0).collect();
        assert!(
            matches!(shut.as_slice(), [both] if (**both + 75.0).abs() < 1e-6),
            "{bias:?}"
        );
    }
}

/// The order of features is no matter: those that are kept stand longest first, whichever place they had.
#[test]
fn features_in_another_order_are_merged_into_the_same() {
    let places: Vec<u32> = (0..HIDDEN as u32).map(|i| (7 * i + 3) % 24).collect();
    let places = Tensor::from_vec(places, HIDDEN, &Device::Cpu).unwrap();
    for spec in [DECODER, GATED] {
        let (model, data) = (model(spec, 2), windows(8, 4));
        let mut parameters = model.parameters().clone();
        for (name, tensor) in &mut parameters {
            let dimension = match name.as_str() {
                name if name.ends_with("feedforward.down.weight") => 1,
                name if name.contains("feedforward.") && !name.ends_with("down.bias") => 0,
                _ => continue,
            };
            *tensor = tensor.index_select(&places, dimension).unwrap();
        }
        let permuted = Model::new(model.spec().clone(), &mut parameters).unwrap();
        let settings = Settings::default();
        let [own, other] =
            [&model, &permuted].map(|model| compress(NAME, model, &data, &settings, |_| ()).model);
        for (name, tensor) in own.parameters() {
            close(&values(&other.parameters()[name]), &values(tensor), 1e-7);
        }
    }
}

/// What a merged feature is given is an average: of equal biases, the same bias.
#[test]
fn merged_features_are_averages() {
    let plain = model(DECODER, 2);
    let name = "blocks.0.feedforward.up.bias";
    let model = altered(&plain, name, |bias| {
        (bias.zeros_like().unwrap() + 0.7).unwrap()
    });
    let merged = compress(NAME, &model, &windows(8, 4), &Settings::default(), |_| ());
    let found = values(&merged.model.parameters()[name]);
    assert_eq!(found.len(), HIDDEN / 2);
    assert!(
        found.iter().all(|bias| (bias - 0.7).abs() < 1e-5),
        "{found:?}"
    );
}

#[test]
fn books_are_kept_and_what_is_merged_loads_again() {
    for spec in [DECODER, GATED] {
        let (model, data) = (model(spec, 2), windows(8, 4));
        let merged = compress(NAME, &model, &data, &Settings::default(), |_| ());
        let report = &merged.report;
        for module in &report.modules {
            assert_eq!(2 * module.parameters_after, module.parameters_before);
            let note = module.note.as_deref().unwrap();
            assert!(note.contains("map of rank 12 of 12"), "{note}");
        }
        assert!(report.after.parameters < report.before.parameters);
        let expected = scores(&merged.model, &data);
        assert!(distance(&expected, &scores(&model, &data)) > 1e-6);
        let directory = tempfile::tempdir().unwrap();
        let to = directory.path().join("saved");
        Package::new(merged.model, None).save(&to, None).unwrap();
        let options = OpenOptions {
            dtype: DType::F64,
            ..OpenOptions::default()
        };
        let loaded = Package::open(&to, &options).unwrap();
        assert_eq!(expected, scores(loaded.single_model().unwrap(), &data));
    }
}

#[test]
fn other_parts_are_refused_by_name() {
    let method = Method::find(NAME).unwrap();
    let refused = |spec: &str| {
        let found = method.requirements(&model(spec, 1), &Settings::default());
        found.unwrap_err().to_string()
    };
    let gated = "feedforward = { kind = \"gated\", hidden = 24 }";
    let mixture = "feedforward = { kind = \"mixture\", hidden = 10, experts = 3, active = 2 }";
    let error = refused(&GATED.replace(gated, mixture));
    assert!(
        error.contains("mixture") && error.contains("dense or gated"),
        "{error}"
    );
    let error = refused(&GATED.replace(gated, ""));
    assert!(error.contains("without feed-forward parts"), "{error}");
    // Without data nothing is known of features.
    let model = model(GATED, 1);
    let plan = method.plan(&Task::new(&model), &Budget::Keep(0.5)).unwrap();
    let error = method
        .apply(&Task::new(&model), &plan)
        .unwrap_err()
        .to_string();
    assert!(error.contains("data of dotresize-hidden"), "{error}");
}

#[test]
fn a_refusal_names_methods_that_are_defined() {
    for (part, words) in [
        (
            "{ kind = 'sparse-code' }",
            "svd and the other factorisations",
        ),
        (
            "{ kind = 'mixture', hidden = 8, experts = 2, active = 1 }",
            "modegpt and channel-magnitude",
        ),
    ] {
        let dense = "{ kind = \"dense\", hidden = 24, activation = \"gelu-tanh\" }";
        let model = model(&DECODER.replace(dense, part), 3);
        let told = Method::find("dotresize-hidden").unwrap();
        let told = told.requirements(&model, &Settings::default());
        let told = told.unwrap_err().to_string();
        assert!(told.contains(words), "{told}");
    }
}
