//! LoRAP with factors by the variance of outputs, beside those by inputs and by weights alone.
#![allow(clippy::result_large_err, clippy::unwrap_used)]

use crate::common::{DECODER, GATED, altered, close, distance, model, scores, values, windows};
use crate::lorap::{compress, settings};
use lapidary_compress::{
    CalibrationData, Change, Content, LorapDecomposition, LorapSettings, Plan, Settings,
};
use lapidary_factor::{Matrix, symmetric_eigen};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Input, Model, OpenOptions, Package, Pass};
use lapidary_parts::attention::MixerSpec;
use lapidary_signal::Trace;

fn one_shot(decomposition: LorapDecomposition) -> Settings {
    settings(LorapSettings {
        decomposition,
        one_shot: true,
        ..LorapSettings::default()
    })
}

/// Factorises one layer alone.
fn only(path: &str, rank: usize) -> impl Fn(&mut Plan) {
    move |plan: &mut Plan| {
        for module in &mut plan.modules {
            module.change = match module.path == path {
                true => Change::Factorise { rank },
                false => Change::Leave {
                    reason: "another layer is looked at".to_owned(),
                },
            };
        }
    }
}

/// What a site holds over all data, `[tokens, width]`.
fn rows(model: &Model, data: &CalibrationData, site: &str) -> Vec<Vec<f64>> {
    let mut found = Vec::new();
    for example in data.examples() {
        let Content::Tokens { ids, .. } = &example.content else {
            continue;
        };
        let trace = Trace::new().capture(site).unwrap();
        let ids = Tensor::from_slice(ids, (1, ids.len()), &Device::Cpu).unwrap();
        let pass = Pass {
            trace: Some(&trace),
            ..Pass::default()
        };
        model.forward(&Input::tokens(ids), pass).unwrap();
        let signal = trace.signal(site).unwrap();
        found.extend(signal.value().squeeze(0).unwrap().to_vec2::<f64>().unwrap());
    }
    found
}

/// `y = x Wᵀ + b` of a layer, its factors multiplied out.
fn outputs(model: &Model, path: &str, inputs: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let parameter = |name: &str| model.parameters().get(&format!("{path}.{name}"));
    let weight = match parameter("weight") {
        Some(weight) => weight.clone(),
        None => {
            let (up, down) = (parameter("up").unwrap(), parameter("down").unwrap());
            up.matmul(down).unwrap()
        }
    };
    let weight = weight.to_vec2::<f64>().unwrap();
    let bias = parameter("bias").map_or_else(|| vec![0.0; weight.len()], values);
    let of = |x: &Vec<f64>| -> Vec<f64> {
        let rows = weight.iter().zip(&bias);
        rows.map(|(row, b)| b + row.iter().zip(x).map(|(w, x)| w * x).sum::<f64>())
            .collect()
    };
    inputs.iter().map(of).collect()
}

/// The mean squared distance of outputs, over tokens.
fn error(found: &[Vec<f64>], wanted: &[Vec<f64>]) -> f64 {
    let squares = found.iter().zip(wanted).map(|(a, b)| -> f64 {
        let pairs = a.iter().zip(b);
        pairs.map(|(a, b)| (a - b).powi(2)).sum()
    });
    squares.sum::<f64>() / wanted.len() as f64
}

/// Eigenvalues of `E[y yᵀ] − ȳ ȳᵀ`, largest first.
fn variances(outputs: &[Vec<f64>]) -> Vec<f64> {
    let (count, width) = (outputs.len() as f64, outputs[0].len());
    let mean: Vec<f64> = (0..width)
        .map(|i| outputs.iter().map(|y| y[i]).sum::<f64>() / count)
        .collect();
    let covariance = Matrix::from_fn(width, width, |i, j| {
        let products = outputs.iter().map(|y| (y[i] - mean[i]) * (y[j] - mean[j]));
        products.sum::<f64>() / count
    });
    let mut found = symmetric_eigen("covariance", covariance.as_ref())
        .unwrap()
        .values;
    found.reverse();
    found
}

#[test]
fn the_error_is_the_variance_that_is_left_and_the_least() {
    for spec in [DECODER, GATED] {
        let (model, data) = (model(spec, 3), windows(30, 4));
        for (matrix, site) in [("query", "in"), ("value", "in"), ("output", "mixed")] {
            let path = format!("blocks.1.attention.{matrix}");
            let inputs = rows(&model, &data, &format!("blocks.1.attention.{site}"));
            let wanted = outputs(&model, &path, &inputs);
            let rank = 3;
            let lost = |decomposition: LorapDecomposition| {
                let settings = one_shot(decomposition);
                let cut = compress(&model, &data, &settings, 0.5, only(&path, rank)).unwrap();
                error(&outputs(&cut.model, &path, &inputs), &wanted)
            };
            let tail: f64 = variances(&wanted).iter().skip(rank).sum();
            let least = lost(LorapDecomposition::Features);
            assert!((least / tail - 1.0).abs() < 1e-6, "{path}: {least} {tail}");
            for other in [LorapDecomposition::Weighted, LorapDecomposition::Plain] {
                assert!(lost(other) > least, "{path} {other:?}");
            }
        }
    }
}

#[test]
fn all_directions_of_outputs_lose_nothing() {
    for spec in [DECODER, GATED] {
        for decomposition in [LorapDecomposition::Features, LorapDecomposition::Plain] {
            let (model, data) = (model(spec, 2), windows(20, 4));
            let whole = compress(&model, &data, &one_shot(decomposition), 1.0, |plan| {
                for module in &mut plan.modules {
                    if module.path.contains(".attention.") {
                        let rank = module.input.min(module.output);
                        module.change = Change::Factorise { rank };
                    }
                }
            });
            let whole = whole.unwrap();
            close(&scores(&whole.model, &data), &scores(&model, &data), 1e-9);
            let noted = whole.report.modules.iter();
            let noted = noted.filter(|module| module.rank().is_some());
            for module in noted {
                let note = module.note.as_deref().unwrap();
                assert!(note.contains("hold 100.00 % of the squared"), "{note}");
            }
        }
    }
}

#[test]
fn inputs_that_hardly_vary_beside_their_mean_are_factorised_all_the_same() {
    let data = windows(20, 4);
    let path = "blocks.1.attention";
    let scaled = |model: &Model, name: &str, by: f64| {
        // The first half of the features of values, `[features, width]` and `[features]`.
        altered(model, &format!("{path}.value.{name}"), |whole| {
            let (first, second) = (
                whole.narrow(0, 0, 8).unwrap(),
                whole.narrow(0, 8, 8).unwrap(),
            );
            Tensor::cat(&[&first.affine(by, 0.0).unwrap(), &second], 0).unwrap()
        })
    };
    let whole = model(DECODER, 3);
    // What is mixed is the bias alone, for all tokens.
    let constant = altered(&whole, &format!("{path}.value.weight"), |weight| {
        weight.zeros_like().unwrap()
    });
    // Half of it is, and so large that rounding of its square is beside the other half's variance.
    let large = scaled(&scaled(&whole, "weight", 0.0), "bias", 3e6);
    for (model, rank) in [(constant, 1), (large, 12)] {
        let settings = one_shot(LorapDecomposition::Features);
        let output = format!("{path}.output");
        let cut = compress(&model, &data, &settings, 0.5, only(&output, rank)).unwrap();
        close(&scores(&cut.model, &data), &scores(&model, &data), 1e-5);
    }
}

/// Means go into biases, which the queries, keys and values of a block have together.
#[test]
fn biases_are_made_where_there_are_none_and_load_again() {
    let (model, data) = (model(GATED, 3), windows(30, 4));
    let settings = settings(LorapSettings {
        decomposition: LorapDecomposition::Features,
        ..LorapSettings::default()
    });
    let query = "blocks.0.attention.query";
    let cut = compress(&model, &data, &settings, 0.5, only(query, 3)).unwrap();
    let bias =
        |name: &str| values(&cut.model.parameters()[&format!("blocks.0.attention.{name}.bias")]);
    assert!(bias("query").iter().any(|value| value.abs() > 1e-6));
    for (name, width) in [("key", 8), ("value", 8)] {
        assert_eq!(bias(name), vec![0.0; width]);
    }
    let blocks = cut.model.spec().expanded_blocks();
    for (block, expected) in blocks.iter().zip([(true, Some(false)), (false, None)]) {
        let MixerSpec::MultiHead(attention) = &block.attention else {
            unreachable!("{:?}", block.attention);
        };
        assert_eq!((attention.bias, attention.output_bias), expected);
    }
    // Layer by layer, of everything, and through a file.
    let cut = compress(&model, &data, &settings, 0.5, |_| ()).unwrap();
    let expected = scores(&cut.model, &data);
    assert!(distance(&expected, &scores(&model, &data)) > 1e-6);
    let directory = tempfile::tempdir().unwrap();
    let to = directory.path().join("saved");
    Package::new(cut.model, None).save(&to, None).unwrap();
    let options = OpenOptions {
        dtype: DType::F64,
        ..OpenOptions::default()
    };
    let loaded = Package::open(&to, &options).unwrap();
    assert_eq!(expected, scores(loaded.single_model().unwrap(), &data));
}
