//! The explicit form of relevance against the printed rules, number by number, and against the
//! modified gradient.

use super::*;
use crate::Error;
use crate::relevance::{
    ActivationRule, AttentionRule, Form, LinearRule, NormRule, ProductRule, RelevanceRules, Seed,
    SumRule,
};
use lapidary_kernels::{SoftmaxMask, Var};

const EPSILON: f64 = 0.25;

fn cp() -> RelevanceRules {
    RelevanceRules {
        epsilon: EPSILON,
        ..RelevanceRules::value_only().explicit()
    }
}

fn attention_aware() -> RelevanceRules {
    RelevanceRules {
        epsilon: EPSILON,
        ..RelevanceRules::attention_aware().explicit()
    }
}

fn on(x: &Tensor, rules: RelevanceRules) -> (Signal, Var) {
    Signal::from(x.clone()).into_relevance(rules).unwrap()
}

/// What reaches the leaves when `relevance` arrives at `y`.
fn back(y: &Signal, relevance: &Tensor, leaves: &[&Var]) -> Vec<Vec<f64>> {
    let product = (y.value() * relevance).unwrap().sum_all().unwrap();
    let gradients = product.backward().unwrap();
    let of = |leaf: &&Var| values(gradients.get(leaf.as_tensor()).unwrap());
    leaves.iter().map(of).collect()
}

fn through(
    rules: RelevanceRules,
    x: &Tensor,
    relevance: &Tensor,
    operation: impl Fn(&Signal) -> crate::Result<Signal>,
) -> Vec<f64> {
    let (signal, leaf) = on(x, rules);
    back(&operation(&signal).unwrap(), relevance, &[&leaf]).remove(0)
}

fn near(found: &[f64], expected: &[f64], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (found, expected) in found.iter().zip(expected) {
        let error = (found - expected).abs() / (1.0 + expected.abs());
        assert!(error < 1e-11, "{what}: {found} {expected}");
    }
}

fn stabilised(z: f64) -> f64 {
    z + if z < 0.0 { -EPSILON } else { EPSILON }
}

fn matrix(t: &Tensor) -> Vec<Vec<f64>> {
    t.to_vec2::<f64>().unwrap()
}

const IN: usize = 4;
const OUT: usize = 3;

/// `R_i` for one row of inputs, from `share(i, j)` of `R_j`.
fn by_shares(relevance: &[f64], share: impl Fn(usize, usize) -> f64) -> Vec<f64> {
    let of_input = |i| {
        let each = relevance.iter().enumerate();
        each.map(|(j, r)| share(i, j) * r).sum()
    };
    (0..IN).map(of_input).collect()
}

#[test]
fn epsilon_divides_by_each_output() {
    let layer = layer(IN, OUT, true, 1.0);
    let (x, relevance) = (numbers(&[1, IN], 0.0), numbers(&[1, OUT], 5.0));
    let found = through(cp(), &x, &relevance, |x| x.linear(&layer));
    let (w, z) = (
        matrix(&layer.dense_weight().unwrap()),
        values(&layer.apply(&x).unwrap()),
    );
    let (x, relevance) = (values(&x), values(&relevance));
    let expected = by_shares(&relevance, |i, j| x[i] * w[j][i] / stabilised(z[j]));
    near(&found, &expected, "epsilon");
}

#[test]
fn gamma_favours_positive_weights() {
    let layer = layer(IN, OUT, true, 1.0);
    let (x, relevance) = (numbers(&[1, IN], 0.0), numbers(&[1, OUT], 5.0));
    let rules = RelevanceRules {
        linear: LinearRule::Gamma(0.5),
        ..cp()
    };
    let found = through(rules, &x, &relevance, |x| x.linear(&layer));
    let favour = |v: f64| v + 0.5 * v.max(0.0);
    let w: Vec<Vec<f64>> = matrix(&layer.dense_weight().unwrap())
        .iter()
        .map(|row| row.iter().map(|v| favour(*v)).collect())
        .collect();
    let b = values(layer.bias().unwrap());
    let (x, relevance) = (values(&x), values(&relevance));
    let z: Vec<f64> = (0..OUT)
        .map(|j| (0..IN).map(|i| w[j][i] * x[i]).sum::<f64>() + favour(b[j]))
        .collect();
    let expected = by_shares(&relevance, |i, j| x[i] * w[j][i] / stabilised(z[j]));
    near(&found, &expected, "gamma");
}

#[test]
fn alpha_beta_shares_positive_and_negative_products() {
    let layer = layer(IN, OUT, true, 1.0);
    let (x, relevance) = (numbers(&[1, IN], 0.0), numbers(&[1, OUT], 5.0));
    let w = matrix(&layer.dense_weight().unwrap());
    let (x_values, relevance_values) = (values(&x), values(&relevance));
    for alpha in [1.0, 2.0] {
        let rules = RelevanceRules {
            epsilon: 0.0,
            linear: LinearRule::AlphaBeta { alpha },
            ..RelevanceRules::deep_taylor()
        };
        let found = through(rules, &x, &relevance, |x| x.linear(&layer));
        let product = |i: usize, j: usize| x_values[i] * w[j][i];
        let part = |i, j, sign: f64| (sign * product(i, j)).max(0.0);
        let sum = |j, sign| (0..IN).map(|i| part(i, j, sign)).sum::<f64>();
        let share = |i, j, sign| match sum(j, sign) {
            0.0 => 0.0,
            sum => part(i, j, sign) / sum,
        };
        let expected = by_shares(&relevance_values, |i, j| {
            alpha * share(i, j, 1.0) - (alpha - 1.0) * share(i, j, -1.0)
        });
        near(&found, &expected, "alpha-beta");
        // What has a product of the sign keeps all of its relevance.
        let there = |j, sign| f64::from(u8::from(sum(j, sign) > 0.0));
        let each = relevance_values.iter().enumerate();
        let total: f64 = each
            .map(|(j, r)| r * (alpha * there(j, 1.0) - (alpha - 1.0) * there(j, -1.0)))
            .sum();
        let kept: f64 = found.iter().sum();
        assert!((kept - total).abs() < 1e-9, "{alpha}: {kept} {total}");
    }
}

#[test]
fn sums_share_by_ratio() {
    let (a, b) = (numbers(&[6], 1.0), numbers(&[6], 2.0));
    let relevance = numbers(&[6], 3.0);
    let ((left, a_leaf), (right, b_leaf)) = (on(&a, cp()), on(&b, cp()));
    let found = back(&left.add(&right).unwrap(), &relevance, &[&a_leaf, &b_leaf]);
    for (own, found) in [&a, &b].iter().zip(&found) {
        let (own, a, b, r) = (values(own), values(&a), values(&b), values(&relevance));
        let expected: Vec<f64> = (0..6)
            .map(|i| own[i] * r[i] / stabilised(a[i] + b[i]))
            .collect();
        near(found, &expected, "sum");
    }
    // A constant keeps its share.
    let found = through(cp(), &a, &relevance, |a| a.add_constant(&b));
    let (a, b, r) = (values(&a), values(&b), values(&relevance));
    let expected: Vec<f64> = (0..6)
        .map(|i| a[i] * r[i] / stabilised(a[i] + b[i]))
        .collect();
    near(&found, &expected, "constant");
}

#[test]
fn balanced_sums_keep_the_relevance_of_each_sample() {
    let rules = RelevanceRules::deep_taylor();
    let (a, b) = (numbers(&[2, 3, 4], 1.0), numbers(&[2, 3, 4], 2.0));
    let relevance = numbers(&[2, 3, 4], 3.0);
    let ((left, a_leaf), (right, b_leaf)) = (on(&a, rules), on(&b, rules));
    let found = back(&left.add(&right).unwrap(), &relevance, &[&a_leaf, &b_leaf]);
    let relevance = values(&relevance);
    for sample in [0..12, 12..24] {
        let sum = |all: &[f64]| all[sample.clone()].iter().sum::<f64>();
        let (of_a, of_b, total) = (sum(&found[0]), sum(&found[1]), sum(&relevance));
        assert!((of_a + of_b - total).abs() < 1e-6, "{of_a} {of_b} {total}");
        assert!(of_a * total >= 0.0 && of_b * total >= 0.0);
    }
}

#[test]
fn activations_and_rms_norms_pass_relevance_and_layer_norms_are_affine() {
    let (x, relevance) = (numbers(&[1, IN], 0.0), numbers(&[1, IN], 3.0));
    let (gamma, beta) = (numbers(&[IN], 4.0), numbers(&[IN], 5.0));
    let passed = values(&relevance);
    for activation in Activation::ALL {
        let found = through(cp(), &x, &relevance, |x| x.activate(activation));
        near(&found, &passed, "activation");
    }
    let rms = |x: &Signal| x.rms_norm(Some(&gamma), 1e-5);
    near(&through(cp(), &x, &relevance, rms), &passed, "rms norm");
    let norm = |x: &Signal| x.layer_norm(Some(&gamma), Some(&beta), 1e-5);
    let found = through(RelevanceRules::deep_taylor(), &x, &relevance, norm);
    near(&found, &passed, "a norm that passes");

    let found = through(cp(), &x, &relevance, norm);
    let (x, gamma, beta) = (values(&x), values(&gamma), values(&beta));
    let n = IN as f64;
    let mean = x.iter().sum::<f64>() / n;
    let deviation = (x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n + 1e-5).sqrt();
    let y = |j: usize| gamma[j] * (x[j] - mean) / deviation + beta[j];
    let expected = by_shares(&passed, |i, j| {
        let slope = gamma[j] * (f64::from(u8::from(i == j)) - 1.0 / n) / deviation;
        x[i] * slope / stabilised(y(j))
    });
    near(&found, &expected, "layer norm");
}

#[test]
fn products_share_by_their_rule() {
    let (a, b) = (numbers(&[6], 1.0), numbers(&[6], 2.0));
    let relevance = numbers(&[6], 3.0);
    let whole = values(&relevance);
    let half: Vec<f64> = whole.iter().map(|r| r / 2.0).collect();
    for (product, expected) in [
        (ProductRule::Uniform, [Some(&half), Some(&half)]),
        (ProductRule::Detach, [Some(&whole), None]),
        (ProductRule::Gradient, [Some(&whole), Some(&whole)]),
    ] {
        for form in [Form::Explicit, Form::ModifiedGradient] {
            let rules = RelevanceRules {
                form,
                product,
                epsilon: 0.0,
                ..cp()
            };
            let ((content, a_leaf), (gate, b_leaf)) = (on(&a, rules), on(&b, rules));
            let y = content.gate(&gate).unwrap();
            // Under a modified gradient what arrives is `R / y`.
            let arriving = match form {
                Form::Explicit => relevance.clone(),
                Form::ModifiedGradient => (&relevance / y.value().detach()).unwrap(),
            };
            let product = (y.value() * arriving).unwrap().sum_all().unwrap();
            let gradients = product.backward().unwrap();
            for ((leaf, own), expected) in [(&a_leaf, &a), (&b_leaf, &b)].iter().zip(expected) {
                let arrived = gradients.get(leaf.as_tensor());
                match expected {
                    None => assert!(arrived.is_none()),
                    Some(expected) => {
                        let found = rules.relevance(own, arrived.unwrap()).unwrap();
                        near(&values(&found), expected, "product");
                    }
                }
            }
        }
    }
    // A constant takes no part.
    let found = through(cp(), &a, &relevance, |a| a.multiply_constant(&b));
    near(&found, &whole, "constant factor");
    near(
        &through(cp(), &a, &relevance, |a| a.scale(-3.0)),
        &whole,
        "number",
    );
}

const LENGTH: usize = 3;
const HEAD: usize = 2;
const HEADS: usize = 2;

/// Index into `[1, heads, rows, columns]`.
fn at(h: usize, row: usize, column: usize, columns: usize) -> usize {
    (h * LENGTH + row) * columns + column
}

/// Relevance of queries, keys, values and weights under `rules`, and of the output.
fn attention_relevance(rules: RelevanceRules) -> ([Tensor; 3], Vec<Vec<f64>>, Vec<f64>) {
    let tensors = [1.0, 2.0, 3.0].map(|phase| numbers(&[1, HEADS, LENGTH, HEAD], phase));
    let relevance = numbers(&[1, HEADS, LENGTH, HEAD], 5.0);
    let [(q, q_leaf), (k, k_leaf), (v, v_leaf)] = [0, 1, 2].map(|index| on(&tensors[index], rules));
    let mut options = AttentionOptions::new(HEAD);
    options.causal = true;
    let trace = crate::Trace::new().tap("weights").unwrap();
    let weights = q.attention_weights(&k, &options).unwrap();
    let weights = trace.site(format_args!("weights"), weights).unwrap();
    let y = v.mix_by(&weights).unwrap();
    let gradients = (y.value() * &relevance)
        .unwrap()
        .sum_all()
        .unwrap()
        .backward()
        .unwrap();
    let of = |leaf: &Var| match gradients.get(leaf.as_tensor()) {
        Some(found) => values(found),
        None => Vec::new(),
    };
    let of_weights = match trace.record("weights").unwrap().relevance(&gradients) {
        Ok(found) => values(&found),
        Err(_) => Vec::new(),
    };
    let found = vec![of(&q_leaf), of(&k_leaf), of(&v_leaf), of_weights];
    // Without a look at the weights, the same.
    let together = v.attend(&q, &k, &options).unwrap();
    let again = back(&together, &relevance, &[&v_leaf]).remove(0);
    near(&again, &found[2], "attention at once");
    (tensors, found, values(&relevance))
}

#[test]
fn attention_follows_its_rules() {
    for rules in [cp(), attention_aware(), RelevanceRules::deep_taylor()] {
        let (tensors, found, relevance) = attention_relevance(rules);
        let [q, k, v] = tensors.map(|t| values(&t));
        let epsilon = |z: f64| {
            if z < 0.0 {
                -rules.epsilon
            } else {
                rules.epsilon
            }
        };
        let scale = 1.0 / (HEAD as f64).sqrt();
        let weight_count = HEADS * LENGTH * LENGTH;
        let (mut scores, mut weights) = (vec![0.0; weight_count], vec![0.0; weight_count]);
        let mut expected = [vec![0.0; q.len()], vec![0.0; q.len()], vec![0.0; q.len()]];
        let mut of_weights = vec![0.0; weight_count];
        let factors = if rules.attention == AttentionRule::Detach {
            1.0
        } else {
            2.0
        };
        for h in 0..HEADS {
            for i in 0..LENGTH {
                let product = |j: usize| -> f64 {
                    (0..HEAD)
                        .map(|p| q[at(h, i, p, HEAD)] * k[at(h, j, p, HEAD)])
                        .sum()
                };
                let total: f64 = (0..=i).map(|j| (product(j) * scale).exp()).sum();
                for j in 0..=i {
                    scores[at(h, i, j, LENGTH)] = product(j) * scale;
                    weights[at(h, i, j, LENGTH)] = (product(j) * scale).exp() / total;
                }
                for p in 0..HEAD {
                    let term = |j: usize| weights[at(h, i, j, LENGTH)] * v[at(h, j, p, HEAD)];
                    let z = factors * (0..LENGTH).map(term).sum::<f64>();
                    for j in 0..LENGTH {
                        let share = term(j) * relevance[at(h, i, p, HEAD)] / (z + epsilon(z));
                        expected[2][at(h, j, p, HEAD)] += share;
                        of_weights[at(h, i, j, LENGTH)] += share;
                    }
                }
                let arrived: f64 = (0..LENGTH).map(|j| of_weights[at(h, i, j, LENGTH)]).sum();
                for j in 0..=i {
                    let index = at(h, i, j, LENGTH);
                    let of_score = match rules.attention {
                        AttentionRule::PassSoftmax => of_weights[index],
                        _ => scores[index] * (of_weights[index] - weights[index] * arrived),
                    };
                    let z = 2.0 * product(j);
                    for p in 0..HEAD {
                        let term = q[at(h, i, p, HEAD)] * k[at(h, j, p, HEAD)];
                        let share = term * of_score / (z + epsilon(z));
                        expected[0][at(h, i, p, HEAD)] += share;
                        expected[1][at(h, j, p, HEAD)] += share;
                    }
                }
            }
        }
        near(&found[2], &expected[2], "values");
        if rules.attention == AttentionRule::Detach {
            assert!(found[0].is_empty() && found[1].is_empty() && found[3].is_empty());
            continue;
        }
        near(&found[3], &of_weights, "weights");
        near(&found[0], &expected[0], "queries");
        near(&found[1], &expected[1], "keys");
        if rules.attention == AttentionRule::PassSoftmax {
            let sum = |all: &[f64]| all.iter().sum::<f64>();
            let total = sum(&relevance);
            assert!((sum(&found[2]) - total / 2.0).abs() < 1e-6);
            assert!((sum(&found[3]) - total / 2.0).abs() < 1e-6);
            assert!((sum(&found[0]) - total / 4.0).abs() < 1e-6);
        }
    }
}

/// `Σ_j R_S = Σ_j S_ij R_A − (Σ_j S_ij A_ij) Σ_j R_A`: a softmax does not conserve.
#[test]
fn a_softmax_leaks_what_its_identity_says() {
    let (x, relevance) = (numbers(&[2, 4], 1.0), numbers(&[2, 4], 3.0));
    let softmax = |x: &Signal| x.softmax(&SoftmaxMask::default());
    let found = through(attention_aware(), &x, &relevance, softmax);
    let (scores, relevance) = (matrix(&x), matrix(&relevance));
    for (row, found) in found.chunks(4).enumerate() {
        let (s, r) = (&scores[row], &relevance[row]);
        let total: f64 = s.iter().map(|s| s.exp()).sum();
        let a: Vec<f64> = s.iter().map(|s| s.exp() / total).collect();
        let arrived: f64 = r.iter().sum();
        let with = |w: &[f64]| s.iter().zip(w).map(|(s, w)| s * w).sum::<f64>();
        let expected = with(r) - with(&a) * arrived;
        assert!((found.iter().sum::<f64>() - expected).abs() < 1e-12);
        assert!((expected - arrived).abs() > 1e-2, "nothing leaked");
    }
    let found = through(
        RelevanceRules::deep_taylor(),
        &x,
        &numbers(&[2, 4], 3.0),
        softmax,
    );
    near(&found, &relevance.concat(), "a softmax that passes");
}

/// With `ε = 0`, `x ⊙ ∂` of the modified gradient is the explicit relevance, for every operation.
#[test]
fn both_forms_agree() {
    for rules in [
        RelevanceRules::attention_aware(),
        RelevanceRules::value_only(),
        RelevanceRules::gradient_times_input(),
    ] {
        let rules = RelevanceRules {
            epsilon: 0.0,
            ..rules
        };
        let relevance = |rules: RelevanceRules, operation: &Operation| {
            let (x, leaf) = on(&input(), rules);
            let y = operation(&x).unwrap().read_out().unwrap();
            let seed = numbers(y.dims(), 20.0);
            let gradients = (y * seed).unwrap().sum_all().unwrap().backward().unwrap();
            let arrived = gradients.get(leaf.as_tensor()).unwrap();
            values(&rules.relevance(leaf.as_tensor(), arrived).unwrap())
        };
        let check = |name: &str, operation: &Operation| {
            let modified = relevance(rules, operation);
            let explicit = relevance(rules.explicit(), operation);
            for (explicit, modified) in explicit.iter().zip(&modified) {
                let error = (explicit - modified).abs() / (1.0 + modified.abs());
                assert!(error < 1e-9, "{name}: {explicit} {modified}");
            }
        };
        let operations = linear_operations().into_iter().chain(other_operations());
        for (name, operation) in operations.filter(|(name, _)| !name.starts_with("activation")) {
            check(name, &operation);
        }
        for activation in Activation::ALL {
            // Others have no modified gradient that passes everything.
            if activation.passes_origin() || rules.activation == ActivationRule::Gradient {
                let operation: Operation = Box::new(move |x| x.activate(activation));
                check("activation", &operation);
            }
        }
    }
}

#[test]
fn rules_that_a_gradient_cannot_carry_are_refused() {
    let modified = RelevanceRules::value_only();
    let cannot = [
        RelevanceRules {
            linear: LinearRule::Gamma(0.1),
            ..modified
        },
        RelevanceRules {
            sum: SumRule::Balanced,
            ..modified
        },
        RelevanceRules {
            attention: AttentionRule::PassSoftmax,
            ..modified
        },
        RelevanceRules {
            norm: NormRule::Identity,
            ..modified
        },
        RelevanceRules {
            seed: Seed::One,
            ..modified
        },
    ];
    let refusal = |rules: RelevanceRules| -> String {
        let result: Result<_, Error> = Signal::from(input()).into_relevance(rules);
        result.unwrap_err().to_string()
    };
    for rules in cannot {
        assert!(refusal(rules).contains("explicit"));
        assert!(
            Signal::from(input())
                .into_relevance(rules.explicit())
                .is_ok()
        );
    }
    for linear in [
        LinearRule::Gamma(-1.0),
        LinearRule::AlphaBeta { alpha: 0.5 },
        LinearRule::Gamma(f64::NAN),
    ] {
        let rules = RelevanceRules { linear, ..modified };
        assert!(refusal(rules.explicit()).contains("at least"));
    }
}
