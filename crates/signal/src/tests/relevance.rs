use super::*;
use crate::relevance::{LinearRule, RelevanceRules, relevance_of};

fn all_rules() -> Vec<RelevanceRules> {
    let modified = [
        RelevanceRules::attention_aware(),
        RelevanceRules::value_only(),
        RelevanceRules::gradient_times_input(),
    ];
    let mut all = modified.to_vec();
    all.extend(modified.map(RelevanceRules::explicit));
    all.push(RelevanceRules::deep_taylor());
    all.push(RelevanceRules {
        linear: LinearRule::Gamma(0.25),
        ..RelevanceRules::attention_aware().explicit()
    });
    all
}

/// Gradient at the input of `operation` under `rules`, the result contracted with fixed numbers.
fn gradient(rules: RelevanceRules, x: &Tensor, operation: impl Fn(&Signal) -> Signal) -> Tensor {
    let (x, leaf) = Signal::from(x.clone()).into_relevance(rules).unwrap();
    let y = operation(&x);
    let loss = (y.value() * weights(y.value())).unwrap().sum_all().unwrap();
    let gradients = loss.backward().unwrap();
    gradients.get(leaf.as_tensor()).unwrap().clone()
}

/// What the result is contracted with.
fn weights(y: &Tensor) -> Tensor {
    numbers(y.dims(), 20.0)
}

#[test]
fn the_value_is_that_of_the_plain_signal() {
    for rules in all_rules() {
        let operations = linear_operations().into_iter().chain(other_operations());
        for (name, operation) in operations {
            let plain = operation(&Signal::from(input())).unwrap();
            let (x, _) = Signal::from(input()).into_relevance(rules).unwrap();
            let y = operation(&x).unwrap();
            assert_close(y.value(), plain.value(), 1e-12, name);
            assert_eq!(y.lens().name(), "relevance", "{name}");
        }
    }
}

#[test]
fn gradient_rules_are_the_derivative() {
    for (name, operation) in linear_operations().into_iter().chain(other_operations()) {
        // The decay of a scan is a constant under relevance, and so it is here.
        let found = gradient(RelevanceRules::gradient_times_input(), &input(), |x| {
            operation(x).unwrap()
        });
        let loss = |x: Vec<f64>| {
            let x = Tensor::from_vec(x, (BATCH, TOKENS, WIDTH), &Device::Cpu).unwrap();
            let y = operation(&Signal::from(x)).unwrap();
            values(&(y.value() * weights(y.value())).unwrap())
                .iter()
                .sum::<f64>()
        };
        for (i, found) in values(&found).into_iter().enumerate() {
            let (mut above, mut below) = (values(&input()), values(&input()));
            above[i] += 1e-5;
            below[i] -= 1e-5;
            let expected = (loss(above) - loss(below)) / 2e-5;
            let error = (found - expected).abs() / (1.0 + expected.abs());
            assert!(error < 1e-6, "{name}: {found} {expected}");
        }
    }
}

#[test]
fn an_identity_activation_passes_the_secant() {
    let x = numbers(&[5], 0.0);
    for activation in Activation::ALL {
        if !activation.passes_origin() {
            continue;
        }
        let found = gradient(RelevanceRules::value_only(), &x, |x| {
            x.activate(activation).unwrap()
        });
        let y = Signal::from(x.clone())
            .activate(activation)
            .unwrap()
            .into_value();
        let expected = (weights(&x) * (y / &x).unwrap()).unwrap();
        assert_close(&found, &expected, 1e-10, &format!("{activation:?}"));
    }
}

#[test]
fn epsilon_damps_each_output() {
    let layer = Linear::new(numbers(&[3, 4], 1.0), Some(numbers(&[3], 2.0))).unwrap();
    let rules = RelevanceRules {
        epsilon: 0.5,
        ..RelevanceRules::value_only()
    };
    let x = numbers(&[1, 4], 0.0);
    let found = gradient(rules, &x, |x| x.linear(&layer).unwrap());
    let z = layer.apply(&x).unwrap();
    let damping: Vec<f64> = values(&z)
        .iter()
        .map(|z| z.abs() / (z.abs() + 0.5))
        .collect();
    let damped = (weights(&z) * Tensor::from_vec(damping, (1, 3), &Device::Cpu).unwrap()).unwrap();
    let expected = damped.matmul(&layer.dense_weight().unwrap()).unwrap();
    assert_close(&found, &expected, 1e-12, "epsilon");
}

#[test]
fn a_detached_norm_is_linear_in_its_input() {
    let gamma = numbers(&[4], 4.0);
    let x = numbers(&[1, 4], 0.0);
    let values_of_x = values(&x);
    let mean = values_of_x.iter().sum::<f64>() / 4.0;
    let variance = values_of_x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / 4.0;
    let square = values_of_x.iter().map(|v| v * v).sum::<f64>() / 4.0;
    // ∂_i = Σ_j w_j γ_j (δ_ij − 1/4) / σ
    let scaled: Vec<f64> = values(&(weights(&x) * gamma.unsqueeze(0).unwrap()).unwrap());
    let total = scaled.iter().sum::<f64>() / 4.0;
    let layer: Vec<f64> = scaled
        .iter()
        .map(|v| (v - total) / (variance + 1e-5).sqrt())
        .collect();
    let rms: Vec<f64> = scaled.iter().map(|v| v / (square + 1e-5).sqrt()).collect();
    let rules = RelevanceRules::value_only();
    let found = gradient(rules, &x, |x| {
        x.layer_norm(Some(&gamma), None, 1e-5).unwrap()
    });
    assert_close(
        &found,
        &Tensor::from_vec(layer, (1, 4), &Device::Cpu).unwrap(),
        1e-12,
        "layer",
    );
    let found = gradient(rules, &x, |x| x.rms_norm(Some(&gamma), 1e-5).unwrap());
    assert_close(
        &found,
        &Tensor::from_vec(rms, (1, 4), &Device::Cpu).unwrap(),
        1e-12,
        "rms",
    );
}

#[test]
fn products_share_uniformly_and_attention_by_its_rule() {
    let (a, b) = (numbers(&[6], 1.0), numbers(&[6], 2.0));
    let (gate, _) = Signal::from(b.clone())
        .into_relevance(RelevanceRules::value_only())
        .unwrap();
    let found = gradient(RelevanceRules::value_only(), &a, |a| a.gate(&gate).unwrap());
    let expected = ((weights(&a) * &b).unwrap() * 0.5).unwrap();
    assert_close(&found, &expected, 1e-12, "uniform product");
    // A constant factor takes no share.
    let constant = Signal::from(b.clone());
    let found = gradient(RelevanceRules::value_only(), &a, |a| {
        a.gate(&constant).unwrap()
    });
    assert_close(
        &found,
        &(weights(&a) * &b).unwrap(),
        1e-12,
        "constant factor",
    );

    let tensors = [1.0, 2.0, 3.0].map(|phase| numbers(&[1, 2, 3, 2], phase));
    let at = |rules: RelevanceRules, which: usize| {
        let mut signals = Vec::new();
        let mut leaves = Vec::new();
        for tensor in &tensors {
            let (signal, leaf) = Signal::from(tensor.clone()).into_relevance(rules).unwrap();
            signals.push(signal);
            leaves.push(leaf);
        }
        let options = AttentionOptions::new(2);
        let y = signals[2]
            .attend(&signals[0], &signals[1], &options)
            .unwrap();
        let loss = (y.value() * weights(y.value())).unwrap().sum_all().unwrap();
        let gradients = loss.backward().unwrap();
        gradients.get(leaves[which].as_tensor()).cloned()
    };
    let plain = RelevanceRules::gradient_times_input();
    for (which, share) in [(0, 0.25), (1, 0.25), (2, 0.5)] {
        let expected = (at(plain, which).unwrap() * share).unwrap();
        let found = at(RelevanceRules::attention_aware(), which).unwrap();
        assert_close(&found, &expected, 1e-12, "uniform attention");
    }
    assert!(at(RelevanceRules::value_only(), 0).is_none());
    assert!(at(RelevanceRules::value_only(), 1).is_none());
    let found = at(RelevanceRules::value_only(), 2).unwrap();
    assert_close(
        &found,
        &at(plain, 2).unwrap(),
        1e-12,
        "values of detached attention",
    );
}

#[test]
fn relevance_on_any_operand_of_attention_stays_on() {
    let plain = |phase| Signal::from(numbers(&[1, 2, 3, 2], phase));
    let (q, leaf) = plain(1.0)
        .into_relevance(RelevanceRules::attention_aware())
        .unwrap();
    let y = plain(3.0)
        .attend(&q, &plain(2.0), &AttentionOptions::new(2))
        .unwrap();
    assert_eq!(y.lens().name(), "relevance");
    let gradients = y.value().sum_all().unwrap().backward().unwrap();
    assert!(relevance_of(leaf.as_tensor(), &gradients).is_ok());
    let meter = crate::meter::Meter::new();
    let k = plain(2.0).into_metered(meter);
    let error = plain(3.0)
        .attend(&q, &k, &AttentionOptions::new(2))
        .unwrap_err();
    assert!(error.to_string().contains("attend"), "{error}");
}

#[test]
fn merged_heads_share_relevance_as_split_ones_do() {
    for rules in all_rules() {
        for groups in [1, 2] {
            let split = gradient(rules, &input(), |x| attention_of(x, groups).unwrap());
            let merged = gradient(rules, &input(), |x| merged_attention_of(x, groups).unwrap());
            assert_close(&merged, &split, 1e-12, "relevance of merged heads");
        }
    }
}

#[test]
fn an_impossible_epsilon_is_refused() {
    for epsilon in [-1.0, f64::NAN] {
        let rules = RelevanceRules {
            epsilon,
            ..RelevanceRules::gradient_times_input()
        };
        let error = Signal::from(input())
            .into_relevance(rules)
            .unwrap_err()
            .to_string();
        assert!(error.contains("epsilon"), "{error}");
    }
}
