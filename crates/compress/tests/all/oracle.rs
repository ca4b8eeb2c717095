//! Statistics, factors and scores against an independent program (`tests/oracles/fwsvd.py`).
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;

use crate::common::{classifier, close, scores, values, with_parameters};
use lapidary_compress::{
    Budget, Calibration, CalibrationData, CalibrationOptions, Example, Factorisation, Requirements,
    Selection, Statistic, export_dense,
};
use lapidary_kernels::{Device, Tensor};
use lapidary_model::Model;
use serde_json::Value;

fn golden() -> Value {
    serde_json::from_str(include_str!("../fixtures/fwsvd.json")).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    match value {
        Value::Array(entries) => entries.iter().flat_map(numbers).collect(),
        other => vec![other.as_f64().unwrap()],
    }
}

fn tensor(value: &Value) -> Tensor {
    let numbers = numbers(value);
    let rows = value.as_array().unwrap().len();
    let shape = match numbers.len() / rows {
        1 => vec![rows],
        columns => vec![rows, columns],
    };
    Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap()
}

fn case(golden: &Value) -> (Model, CalibrationData) {
    let parameters: BTreeMap<String, Tensor> = golden["parameters"]
        .as_object()
        .unwrap()
        .iter()
        .map(|(name, value)| (name.clone(), tensor(value)))
        .collect();
    let examples = golden["examples"].as_array().unwrap().iter().map(|pair| {
        let ids: Vec<u32> = numbers(&pair[0]).iter().map(|id| *id as u32).collect();
        Example::labelled(ids, pair[1].as_u64().unwrap() as u32)
    });
    (
        with_parameters(&classifier(6, 7, 4, true), parameters),
        CalibrationData::new(examples.collect()).unwrap(),
    )
}

/// The hidden layer takes every method; the output layer those that need no site; the table of
/// embeddings those that need no matrix as large as the vocabulary.
fn selections() -> [(&'static str, Selection, Vec<Factorisation>); 3] {
    let mut table = Selection::layers([]);
    table.embeddings = true;
    let diagonal = vec![
        Factorisation::Svd,
        Factorisation::Fwsvd,
        Factorisation::RowColumnFisher,
    ];
    [
        (
            "head.hidden",
            Selection::layers(["head.hidden"]),
            Factorisation::ALL.to_vec(),
        ),
        (
            "head.output",
            Selection::layers(["head.output"]),
            diagonal.clone(),
        ),
        (
            "embeddings.tokens",
            table,
            [diagonal, vec![Factorisation::ActivationWeighted]].concat(),
        ),
    ]
}

fn requirements(model: &Model) -> Requirements {
    let mut all = Requirements::default();
    for (layer, selection, methods) in selections() {
        for method in methods {
            all = all.union(method.requirements(model, &selection).unwrap());
        }
        let layer = layer.to_owned();
        all.statistics.insert(Statistic::Fisher { layer });
    }
    all
}

fn collect(
    model: &Model,
    data: &CalibrationData,
    set: impl Fn(&mut CalibrationOptions),
) -> Calibration {
    let mut options = CalibrationOptions::default();
    set(&mut options);
    Calibration::collect(model, data, &requirements(model), options).unwrap()
}

fn check(calibration: &Calibration, statistic: Statistic, expected: &Value) {
    let found = calibration.tensor(&statistic).unwrap();
    close(&values(&found), &numbers(expected), 1e-9);
}

#[test]
fn statistics_are_those_of_the_oracle() {
    let golden = golden();
    let (model, data) = case(&golden);
    let calibration = collect(&model, &data, |_| {});
    let loss = calibration.mean_loss.unwrap();
    close(&[loss], &[golden["mean_loss"].as_f64().unwrap()], 1e-11);
    for (path, ..) in selections() {
        let expected = &golden["layers"][path];
        let layer = || path.to_owned();
        check(
            &calibration,
            Statistic::FisherInputs { layer: layer() },
            &expected["inputs"],
        );
        check(
            &calibration,
            Statistic::FisherOutputs { layer: layer() },
            &expected["outputs"],
        );
        check(
            &calibration,
            Statistic::Fisher { layer: layer() },
            &expected["fisher"],
        );
    }
    let hidden = &golden["layers"]["head.hidden"];
    let site = || "head.in".to_owned();
    check(
        &calibration,
        Statistic::InputSquares { site: site() },
        &hidden["squares"],
    );
    check(
        &calibration,
        Statistic::Covariance { site: site() },
        &hidden["covariance"],
    );
    check(
        &calibration,
        Statistic::InputSquares {
            site: "input_ids".to_owned(),
        },
        &golden["layers"]["embeddings.tokens"]["squares"],
    );
}

#[test]
fn kronecker_factors_start_at_the_second_moments_and_go_to_the_nearest_product() {
    let golden = golden();
    let (model, data) = case(&golden);
    let hidden = &golden["layers"]["head.hidden"];
    let layer = || "head.hidden".to_owned();
    for (passes, key, tolerance) in [(1, "kronecker", 1e-9), (60, "nearest_kronecker", 1e-6)] {
        let calibration = collect(&model, &data, |options| options.kronecker_passes = passes);
        for (statistic, expected) in [
            (
                Statistic::KroneckerInput { layer: layer() },
                &hidden[key][0],
            ),
            (
                Statistic::KroneckerOutput { layer: layer() },
                &hidden[key][1],
            ),
        ] {
            let found = values(&calibration.tensor(&statistic).unwrap());
            close(&found, &numbers(expected), tolerance);
        }
        // Later passes leave what the first one found.
        check(
            &calibration,
            Statistic::FisherInputs { layer: layer() },
            &hidden["inputs"],
        );
    }
}

#[test]
fn factors_are_those_of_the_oracle() {
    let golden = golden();
    let (model, data) = case(&golden);
    let calibration = collect(&model, &data, |_| {});
    let rank = golden["rank"].as_u64().unwrap() as usize;
    for (path, selection, methods) in selections() {
        for method in methods {
            let ranks = BTreeMap::from([(path.to_owned(), rank)]);
            let plan = method
                .plan(&model, &selection, &Budget::Ranks(ranks))
                .unwrap();
            let compressed = plan.apply(&model, Some(&calibration)).unwrap();
            assert_eq!(compressed.report.modules[0].rank(), Some(rank), "{path}");
            let dense = export_dense(&compressed.model).unwrap();
            let mut product = dense.parameters()[&format!("{path}.weight")].clone();
            if path == "embeddings.tokens" {
                product = product.t().unwrap();
            }
            let expected = &golden["layers"][path]["products"][method.name()];
            assert!(!expected.is_null(), "{path} {method}");
            close(&values(&product), &numbers(expected), 1e-8);
        }
    }
}

#[test]
fn scores_of_the_compressed_model_are_those_of_the_oracle() {
    let golden = golden();
    let (model, data) = case(&golden);
    let calibration = collect(&model, &data, |_| {});
    let selection = Selection::layers(["head.*"]);
    let ranks = ["head.hidden", "head.output"].map(|path| (path.to_owned(), 2));
    let budget = Budget::Ranks(BTreeMap::from(ranks));
    let plan = Factorisation::Fwsvd
        .plan(&model, &selection, &budget)
        .unwrap();
    let compressed = plan.apply(&model, Some(&calibration)).unwrap();
    close(
        &scores(&compressed.model, &data),
        &numbers(&golden["logits"]),
        1e-9,
    );
}

#[test]
fn squared_means_of_pairs_are_those_of_the_oracle() {
    let golden = golden();
    let (model, data) = case(&golden);
    let calibration = collect(&model, &data, |options| options.examples_per_gradient = 2);
    for (path, ..) in selections() {
        check(
            &calibration,
            Statistic::FisherInputs {
                layer: path.to_owned(),
            },
            &golden["layers"][path]["inputs_of_pairs"],
        );
    }
}
