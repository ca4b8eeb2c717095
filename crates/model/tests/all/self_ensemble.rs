//! Models as ensembles of what they draw.
#![allow(clippy::unwrap_used, clippy::panic)]

use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Averaged, Input, Model, ModelSpec, Pass, self_ensemble};

fn model(mechanism: &str) -> Model {
    let json = format!(
        r#"{{
            "width": 16,
            "input": {{ "kind": "tokens", "vocabulary": 9, "length": 32 }},
            "blocks": [{{
                "repeat": 2,
                "attention": {{
                    "kind": "multi-head", "heads": 2, "causal": true, "scale": 40, {mechanism}
                }}
            }}],
            "head": {{ "kind": "language-model" }}
        }}"#
    );
    let spec: ModelSpec = serde_json::from_str(&json).unwrap();
    Model::initialised(spec, 3, DType::F64, &Device::Cpu).unwrap()
}

fn numbers(x: &Tensor) -> Vec<f64> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

fn input() -> Input {
    let ids: Vec<u32> = (0..24).map(|i| i * 5 % 9).collect();
    Input::tokens(Tensor::from_vec(ids, (1, 24), &Device::Cpu).unwrap())
}

const DRAWN: &str = r#""mechanism": { "kind": "subsampled", "keep": 0.25 }"#;

#[test]
fn ensembles_are_means_and_variances_of_their_members() {
    let model = model(DRAWN);
    for averaged in [Averaged::Probabilities, Averaged::Scores] {
        let of = |members, seed| {
            self_ensemble(&model, &input(), (members, seed), averaged, Pass::default).unwrap()
        };
        let together = of(5, 11);
        let members: Vec<Vec<f64>> = (11..16).map(|seed| numbers(&of(1, seed).mean)).collect();
        assert_ne!(members[0], members[1]);
        let (mean, variance) = (numbers(&together.mean), numbers(&together.variance));
        for place in 0..mean.len() {
            let each: Vec<f64> = members.iter().map(|member| member[place]).collect();
            let expected = each.iter().sum::<f64>() / 5.0;
            assert!((mean[place] - expected).abs() < 1e-14);
            let spread = each.iter().map(|x| (x - expected).powi(2)).sum::<f64>() / 5.0;
            assert!((variance[place] - spread).abs() < 1e-14);
        }
        if averaged == Averaged::Probabilities {
            for row in mean.chunks(9) {
                assert!((row.iter().sum::<f64>() - 1.0).abs() < 1e-13);
            }
        }
        assert_eq!(numbers(&of(5, 11).mean), mean);
        assert!(numbers(&of(1, 3).variance).iter().all(|v| *v == 0.0));
    }
}

/// −ln of a mean is at most the mean of −ln.
#[test]
fn an_ensemble_loses_no_more_than_its_members_on_average() {
    let model = model(DRAWN);
    let of = |members, seed| {
        let averaged = Averaged::Probabilities;
        let found = self_ensemble(&model, &input(), (members, seed), averaged, Pass::default);
        numbers(&found.unwrap().mean)
    };
    let together = of(8, 0);
    let members: Vec<Vec<f64>> = (0..8).map(|seed| of(1, seed)).collect();
    for (place, p) in together.iter().enumerate() {
        let mean = members
            .iter()
            .map(|member| -member[place].ln())
            .sum::<f64>()
            / 8.0;
        assert!(-p.ln() <= mean + 1e-12);
    }
}

#[test]
fn what_draws_nothing_agrees_with_itself() {
    let model = model(r#""bias": true"#);
    let found = self_ensemble(&model, &input(), (3, 0), Averaged::Scores, Pass::default).unwrap();
    let scores = model.forward(&input(), Pass::default()).unwrap();
    let scores = numbers(scores.into_logits().unwrap().value());
    for (found, expected) in numbers(&found.mean).iter().zip(&scores) {
        assert!((found - expected).abs() < 1e-14);
    }
    assert!(numbers(&found.variance).iter().all(|v| *v < 1e-28));
    let none = self_ensemble(&model, &input(), (0, 0), Averaged::Scores, Pass::default);
    let message = none.unwrap_err().to_string();
    assert_eq!(
        message,
        "members of an ensemble is 0, but must be at least 1"
    );
}
