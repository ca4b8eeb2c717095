//! One layer whose inputs are known, against least squares and another program.

use super::settings;
use crate::common::{classifier, close, cut_by, distance, model, values, with_parameters, zeros};
use lapidary_compress::{
    CalibrationData, Compressed, Example, Pattern, PruneSettings, Scope, Selection, Settings,
};
use lapidary_kernels::{Device, Tensor};
use lapidary_model::Model;
use proptest::prelude::*;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

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
        serde_json::from_str(include_str!("../../fixtures/pruning.json")).unwrap();
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
