//! Where representations collapse.

use std::collections::BTreeMap;

use super::{alphabet, no_positions, rounding};
use crate::common::{DECODER, ENCODER, GATED, model, tokens};
use lapidary_explain::analyses::squashing::paths::dilution;
use lapidary_explain::analyses::squashing::{
    Distance, Emulated, Family, collapse_length, decline, lengths,
};
use lapidary_kernels::{Device, Tensor};
use lapidary_model::{Model, ModelSpec, Pass};
use lapidary_signal::Trace;
use lapidary_signal::rounding::Format;

/// `y_n = x_n + mean_{j ≤ n} x_j`: one head with uniform attention and no norm. `x` is `one` or
/// `zero`.
fn uniform_model(one: [f64; 4], zero: [f64; 4]) -> Model {
    let spec: ModelSpec = toml::from_str(
        r#"
width = 4
[input]
kind = "tokens"
vocabulary = 2
length = 4096
[[blocks]]
norm = { kind = "none" }
attention = { kind = "multi-head", heads = 1, causal = true, bias = false }
[head]
kind = "none"
"#,
    )
    .unwrap();
    let eye = Tensor::eye(4, lapidary_kernels::DType::F64, &Device::Cpu).unwrap();
    let mut parameters = BTreeMap::new();
    for name in ["query", "key"] {
        let zero = eye.zeros_like().unwrap();
        parameters.insert(format!("blocks.0.attention.{name}.weight"), zero);
    }
    for name in ["value", "output"] {
        parameters.insert(format!("blocks.0.attention.{name}.weight"), eye.clone());
    }
    let table = Tensor::new(&[zero, one], &Device::Cpu).unwrap();
    parameters.insert("embeddings.tokens.weight".to_owned(), table);
    Model::new(spec, &mut parameters).unwrap()
}

/// `‖y − y*‖ = |c| (1/n − 1/(n + 1))` with `c = x_0 − x_1`.
#[test]
fn one_layer_of_uniform_attention_collapses_as_the_formula_says() {
    let (one, zero) = ([0.5, -1.0, 0.25, 2.0], [1.5, 0.5, -0.75, 1.0]);
    let exact = Emulated::new(&uniform_model(one, zero), None).unwrap();
    let lengths = lengths(8, 1000, 20);
    let found = exact
        .distances(Family::OnesThenZero, &alphabet(), &lengths)
        .unwrap();
    let c = 1.5; // the largest of |zero − one|
    for distance in &found {
        let n = distance.n as f64;
        let expected = c * (1.0 / n - 1.0 / (n + 1.0));
        assert!((distance.largest - expected).abs() < 1e-14, "{distance:?}");
    }
    let law = decline(&found[8..]).unwrap();
    assert!(
        (law.exponent + 2.0).abs() < 0.02 && law.r_squared > 0.9999,
        "{law:?}"
    );
}

/// `D < ε ‖y‖` from `n ≈ √(|c| / (ε ‖y‖))` on: `2^{3.5}` times the root of the ratio of norms in
/// bf16, near where the difference is half a spacing.
#[test]
fn formats_collapse_where_the_formula_says() {
    let cases = [
        (Format::Bf16, 1.0),
        (Format::Bf16, 0.25),
        (Format::F16, 1.0),
        (Format::F16, 0.25),
        (Format::F32, 1.0 / 64.0),
    ];
    for (format, ratio) in cases {
        // `y = x_0 + x_1 + c / n`: norm 2, and `c` is `2 · ratio`.
        let model = uniform_model([1.0 - ratio, 0.0, 0.0, 0.0], [1.0 + ratio, 0.0, 0.0, 0.0]);
        let predicted = (ratio / format.epsilon()).sqrt();
        let least = (predicted / 3.0).max(2.0) as usize;
        let lengths = lengths(least, (3.0 * predicted) as usize, 24);
        let emulated = Emulated::new(&model, rounding(format)).unwrap();
        let found = emulated
            .distances(Family::OnesThenZero, &alphabet(), &lengths)
            .unwrap();
        let n = collapse_length(&found, format).unwrap();
        let factor = n as f64 / predicted;
        assert!(
            (0.5..=2.0).contains(&factor),
            "{format:?} {ratio}: {n} {predicted}"
        );
    }
}

#[test]
fn collapse_wants_five_in_a_row() {
    let distance = |n: usize, largest: f64| Distance {
        n,
        largest,
        relative: largest,
        norm: 1.0,
        equal: largest == 0.0,
    };
    let tiny = 1e-3; // below the epsilon of bf16
    let found: Vec<Distance> = [1.0, 0.0, tiny, 1.0, tiny, 0.0, tiny, tiny, 0.0, tiny]
        .iter()
        .enumerate()
        .map(|(n, largest)| distance(n, *largest))
        .collect();
    assert_eq!(collapse_length(&found, Format::Bf16), Some(4));
    assert_eq!(collapse_length(&found, Format::F32), None);
    assert_eq!(collapse_length(&found[..8], Format::Bf16), None);
}

#[test]
fn equal_tokens_without_positions_have_equal_rows() {
    for spec in [
        no_positions(),
        GATED.replace(", position = { kind = \"rotary\" }", ""),
    ] {
        let model = model(&spec, 2);
        let ones = [7; 11];
        for format in Format::ALL {
            let emulated = Emulated::new(&model, rounding(format)).unwrap();
            let spread = emulated.row_spread(&ones).unwrap();
            assert_eq!(spread, [0.0, 0.0], "{format:?}: not equal bit for bit");
            assert_eq!(
                emulated.last_vector(&ones[..5]).unwrap(),
                emulated.last_vector(&ones).unwrap()
            );
        }
        let exact = Emulated::new(&model, None).unwrap();
        assert!(
            exact
                .row_spread(&ones)
                .unwrap()
                .iter()
                .all(|spread| *spread < 1e-13)
        );
    }
    let learned = Emulated::new(&model(DECODER, 2), None).unwrap();
    assert!(learned.row_spread(&[7; 11]).unwrap()[0] > 1e-3);
}

#[test]
fn without_a_mask_and_positions_only_proportions_count() {
    let spec = ENCODER.replace("kind = \"learned\"", "kind = \"none\"");
    let model = model(&spec, 3);
    let hidden = |ids: &[u32]| {
        let output = model.forward(&tokens(ids), Pass::default()).unwrap();
        let rows = output.hidden.value().get(0).unwrap();
        rows.to_vec2::<f64>().unwrap()
    };
    let once = hidden(&[3, 9, 9, 1, 4, 9]);
    let twice = hidden(&[3, 9, 9, 1, 4, 9, 3, 9, 9, 1, 4, 9]);
    for (row, expected) in twice.iter().zip(once.iter().cycle()) {
        for (a, b) in row.iter().zip(expected) {
            assert!((a - b).abs() < 1e-6, "{a} {b}");
        }
    }
}

/// The most that attention with bounded scores can give one token, on a real model.
#[test]
fn attention_is_diluted_as_the_bound_says() {
    let model = model(&no_positions(), 4);
    for length in [3, 30, 300] {
        let ids: Vec<u32> = (0..length).map(|i| (i * i % 20) as u32).collect();
        let trace = Trace::new().capture("blocks.*.attention.weights").unwrap();
        let pass = Pass {
            trace: Some(&trace),
            ..Pass::default()
        };
        model.forward(&tokens(&ids), pass).unwrap();
        for block in 0..2 {
            let weights = trace
                .signal(&format!("blocks.{block}.attention.weights"))
                .unwrap();
            let weights = weights
                .into_value()
                .get(0)
                .unwrap()
                .to_vec3::<f64>()
                .unwrap();
            for head in weights {
                let row = head.last().unwrap();
                let most = row.iter().copied().fold(0.0, f64::max);
                let least = row.iter().copied().fold(1.0, f64::min);
                // Scores are known up to a constant: `b` is half of their range.
                let b = 0.5 * (most / least).ln();
                let (low, high) = dilution(b, length);
                assert!(low <= least * 1.000_001 && most <= high * 1.000_001);
            }
        }
    }
}
