use super::*;
use crate::contextual::{AttentionSplit, ContextualRules};

const SOURCES: usize = 3;

fn all_rules() -> Vec<ContextualRules> {
    let mut all = Vec::new();
    for attention in [AttentionSplit::Frozen, AttentionSplit::Split] {
        for stabilise in [false, true] {
            all.push(ContextualRules {
                attention,
                stabilise,
            });
        }
    }
    all
}

fn frozen() -> ContextualRules {
    ContextualRules::default()
}

fn split() -> ContextualRules {
    ContextualRules {
        attention: AttentionSplit::Split,
        stabilise: false,
    }
}

fn stable() -> ContextualRules {
    ContextualRules {
        stabilise: true,
        ..frozen()
    }
}

fn operations() -> Vec<(&'static str, Operation)> {
    let all = linear_operations().into_iter().chain(other_operations());
    // Recurrences have no rule.
    all.filter(|(name, _)| *name != "scan").collect()
}

/// Irregular relevant parts of some sources.
fn parts() -> Tensor {
    numbers(&[SOURCES, BATCH, TOKENS, WIDTH], 30.0)
}

fn start(relevant: Tensor, rules: ContextualRules) -> Signal {
    Signal::from(input())
        .into_contextual(relevant, rules)
        .unwrap()
}

fn is_ready_mix(name: &str, rules: ContextualRules) -> bool {
    name == "mix" && rules.attention == AttentionSplit::Split
}

/// `operation` on the features of one token, as pairs of relevant and irrelevant numbers.
fn each_token(
    x: &Tensor,
    relevant: &Tensor,
    pairs: impl Fn(&[f64], &[f64]) -> (Vec<f64>, Vec<f64>),
) -> (Vec<f64>, Vec<f64>) {
    let (x, relevant) = (values(x), values(relevant));
    let (mut kept, mut rest) = (Vec::new(), Vec::new());
    for (index, r) in relevant.chunks(WIDTH).enumerate() {
        let tokens = x.len() / WIDTH;
        let x = &x[index % tokens * WIDTH..][..WIDTH];
        let g: Vec<f64> = x.iter().zip(r).map(|(x, r)| x - r).collect();
        let (r, g) = pairs(r, &g);
        kept.extend(r);
        rest.extend(g);
    }
    (kept, rest)
}

/// Holds both parts of `found` to those that loops give.
fn assert_pair(found: &Signal, (relevant, irrelevant): (Vec<f64>, Vec<f64>), what: &str) {
    let both = [
        (found.relevant().unwrap(), relevant),
        (found.irrelevant().unwrap(), irrelevant),
    ];
    for (found, expected) in both {
        let found = values(&found);
        assert_eq!(found.len(), expected.len(), "{what}");
        for (found, expected) in found.iter().zip(&expected) {
            assert!(
                (found - expected).abs() < 1e-12,
                "{what}: {found} {expected}"
            );
        }
    }
}

fn shared(bias: f64, r: f64, g: f64) -> (f64, f64) {
    let total = r.abs() + g.abs();
    (bias * r.abs() / total, bias * g.abs() / total)
}

#[test]
fn the_value_is_that_of_the_plain_signal() {
    for rules in all_rules() {
        for (name, operation) in operations() {
            if is_ready_mix(name, rules) {
                continue;
            }
            let plain = operation(&Signal::from(input())).unwrap();
            let found = operation(&start(parts(), rules)).unwrap();
            assert_close(found.value(), plain.value(), 1e-12, name);
            let relevant = found.relevant().unwrap();
            assert_eq!(relevant.dims()[0], SOURCES, "{name}");
            assert_eq!(&relevant.dims()[1..], plain.dims(), "{name}");
            let sum = relevant
                .broadcast_add(&found.irrelevant().unwrap())
                .unwrap();
            let whole = plain.value().broadcast_as(sum.shape()).unwrap();
            assert_close(&sum, &whole, 1e-12, name);
        }
    }
}

#[test]
fn everything_relevant_gives_everything_and_nothing_gives_nothing() {
    let whole = input().unsqueeze(0).unwrap();
    let nothing = whole.zeros_like().unwrap();
    for rules in all_rules() {
        for (name, operation) in operations() {
            if is_ready_mix(name, rules) {
                continue;
            }
            let none = operation(&start(nothing.clone(), rules)).unwrap();
            let none = values(&none.relevant().unwrap());
            assert!(none.iter().all(|r| *r == 0.0), "{name}: {none:?}");
            // A constant that is joined on or added is never relevant, nor is f(0).
            if ["concatenate a constant", CONSTANT_ROWS, OFF_THE_ORIGIN].contains(&name) {
                continue;
            }
            let all = operation(&start(whole.clone(), rules)).unwrap();
            let relevant = all.relevant().unwrap().squeeze(0).unwrap();
            assert_close(&relevant, all.value(), 1e-10, name);
        }
    }
}

/// Activations whose rest does not vanish keep `f(0)` irrelevant.
#[test]
fn what_an_activation_gives_for_nothing_is_irrelevant() {
    let whole = input().unsqueeze(0).unwrap();
    for (activation, of_zero) in [
        (Activation::Sigmoid, 0.5),
        (Activation::Exp, 1.0),
        (Activation::Softplus, 2f64.ln()),
    ] {
        let y = start(whole.clone(), frozen()).activate(activation).unwrap();
        for rest in values(&y.irrelevant().unwrap()) {
            assert!((rest - of_zero).abs() < 1e-12, "{activation:?}: {rest}");
        }
    }
}

#[test]
fn linear_maps_act_on_the_relevant_part_alone() {
    for (name, operation) in linear_operations() {
        if name == "scan" {
            continue;
        }
        let found = operation(&start(parts(), frozen())).unwrap();
        for source in 0..SOURCES {
            let alone = operation(&Signal::from(parts().get(source).unwrap())).unwrap();
            let relevant = found.relevant().unwrap().get(source).unwrap();
            assert_close(&relevant, alone.value(), 1e-12, name);
        }
    }
}

#[test]
fn sources_together_are_sources_one_by_one() {
    for rules in all_rules() {
        for (name, operation) in operations() {
            if is_ready_mix(name, rules) {
                continue;
            }
            let together = operation(&start(parts(), rules)).unwrap();
            for source in 0..SOURCES {
                let one = parts().narrow(0, source, 1).unwrap();
                let alone = operation(&start(one, rules)).unwrap().relevant().unwrap();
                let found = together.relevant().unwrap();
                assert_close(&found.narrow(0, source, 1).unwrap(), &alone, 1e-12, name);
            }
        }
    }
}

#[test]
fn biases_are_shared_by_magnitude() {
    let layer = layer(WIDTH, WIDTH, true, 1.0);
    let weight: Vec<Vec<f64>> = layer.dense_weight().unwrap().to_vec2().unwrap();
    let bias = values(layer.bias().unwrap());
    let dot = |row: &[f64], x: &[f64]| row.iter().zip(x).map(|(a, b)| a * b).sum::<f64>();
    let expected = each_token(&input(), &parts(), |r, g| {
        let pairs = weight.iter().zip(&bias).map(|(row, bias)| {
            let (r, g) = (dot(row, r), dot(row, g));
            let (of_r, of_g) = shared(*bias, r, g);
            (r + of_r, g + of_g)
        });
        pairs.unzip()
    });
    let found = start(parts(), frozen()).linear(&layer).unwrap();
    assert_pair(&found, expected, "linear");

    let table = numbers(&[TOKENS, WIDTH], 2.0);
    let found = start(parts(), frozen()).add_constant(&table).unwrap();
    let table = table.broadcast_as((SOURCES, BATCH, TOKENS, WIDTH)).unwrap();
    let (table, x) = (values(&table), values(&input()));
    let pairs = values(&parts()).into_iter().enumerate().map(|(i, r)| {
        let g = x[i % x.len()] - r;
        let (of_r, of_g) = shared(table[i], r, g);
        (r + of_r, g + of_g)
    });
    assert_pair(&found, pairs.unzip(), "constant");
}

/// Without a trace of either part a bias is nobody's, so that it is irrelevant.
#[test]
fn the_bias_of_nothing_is_irrelevant() {
    let zero = Tensor::zeros((1, WIDTH), DType::F64, &Device::Cpu).unwrap();
    let relevant = zero.unsqueeze(0).unwrap();
    let x = Signal::from(zero).into_contextual(relevant, frozen());
    let layer = layer(WIDTH, 5, true, 1.0);
    let y = x.unwrap().linear(&layer).unwrap();
    assert_eq!(values(&y.relevant().unwrap()), [0.0; 5]);
    assert_eq!(
        values(&y.irrelevant().unwrap()),
        values(layer.bias().unwrap())
    );
}

#[test]
fn norms_divide_both_parts_by_the_true_deviation() {
    const EPSILON: f64 = 1e-5;
    let (gamma, beta) = (numbers(&[WIDTH], 4.0), numbers(&[WIDTH], 5.0));
    let (gammas, betas) = (values(&gamma), values(&beta));
    let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
    for centred in [true, false] {
        let expected = each_token(&input(), &parts(), |r, g| {
            let centre = |x: &[f64]| if centred { mean(x) } else { 0.0 };
            let x: Vec<f64> = r.iter().zip(g).map(|(r, g)| r + g).collect();
            let squares: Vec<f64> = x.iter().map(|v| (v - centre(&x)).powi(2)).collect();
            let deviation = (mean(&squares) + EPSILON).sqrt();
            let (centre_r, centre_g) = (centre(r), centre(g));
            let pairs = (0..WIDTH).map(|i| {
                let bias = if centred { betas[i] } else { 0.0 };
                let (of_r, of_g) = shared(bias, r[i], g[i]);
                (
                    gammas[i] * (r[i] - centre_r) / deviation + of_r,
                    gammas[i] * (g[i] - centre_g) / deviation + of_g,
                )
            });
            pairs.unzip()
        });
        let x = start(parts(), frozen());
        let found = match centred {
            true => x.layer_norm(Some(&gamma), Some(&beta), EPSILON).unwrap(),
            false => x.rms_norm(Some(&gamma), EPSILON).unwrap(),
        };
        assert_pair(&found, expected, "norm");
    }
}

#[test]
fn activations_and_products_keep_what_is_left_without_the_relevant() {
    let tanh = |r: &[f64], g: &[f64]| {
        let pairs = r.iter().zip(g);
        pairs
            .map(|(r, g)| ((r + g).tanh() - g.tanh(), g.tanh()))
            .unzip()
    };
    let expected = each_token(&input(), &parts(), tanh);
    let found = start(parts(), frozen()).activate(Activation::Tanh).unwrap();
    assert_pair(&found, expected, "tanh");

    let expected = each_token(&input(), &parts(), |r, g| {
        let pairs = r.iter().zip(g);
        // (r + g)(2 r + 2 g) less g · 2 g
        pairs
            .map(|(r, g)| (2.0 * r * r + 4.0 * r * g, 2.0 * g * g))
            .unzip()
    });
    let x = start(parts(), frozen());
    let found = x.gate(&x.scale(2.0).unwrap()).unwrap();
    assert_pair(&found, expected, "product");

    let other = numbers(&[BATCH, TOKENS, WIDTH], 3.0);
    for swapped in [false, true] {
        let other = Signal::from(other.clone());
        let found = match swapped {
            false => x.gate(&other).unwrap(),
            true => other.gate(&x).unwrap(),
        };
        let expected = parts().broadcast_mul(other.value()).unwrap();
        assert_close(&found.relevant().unwrap(), &expected, 1e-12, "plain factor");
    }
}

#[test]
fn residual_sums_add_pair_by_pair() {
    let x = start(parts(), frozen());
    let twice = x.add(&x.scale(3.0).unwrap()).unwrap();
    let expected = (parts() * 4.0).unwrap();
    assert_close(&twice.relevant().unwrap(), &expected, 1e-12, "both");
    let plain = Signal::from(numbers(&[BATCH, TOKENS, WIDTH], 3.0));
    for sum in [x.add(&plain).unwrap(), plain.add(&x).unwrap()] {
        assert_close(&sum.relevant().unwrap(), &parts(), 0.0, "one plain");
    }
}

#[test]
fn the_stabiliser_gives_all_to_the_larger_of_two_opposed_parts() {
    let x = Tensor::new(&[1.0, 1.0, -3.0, 2.0, 0.5], &Device::Cpu).unwrap();
    let relevant = Tensor::new(&[[3.0, -1.0, 1.0, 1.5, 0.0]], &Device::Cpu).unwrap();
    let layer = Linear::new(Tensor::eye(5, DType::F64, &Device::Cpu).unwrap(), None);
    let x = Signal::from(x.unsqueeze(0).unwrap());
    let relevant = relevant.unsqueeze(0).unwrap();
    let x = x.into_contextual(relevant, stable()).unwrap();
    let y = x.linear(&layer.unwrap()).unwrap();
    // 3 − 2, −1 + 2, 1 − 4, 1.5 + 0.5, 0 + 0.5
    assert_eq!(values(&y.relevant().unwrap()), [1.0, 0.0, 0.0, 1.5, 0.0]);
    assert_eq!(values(&y.irrelevant().unwrap()), [0.0, 1.0, -3.0, 0.5, 0.5]);
}

/// Weights of one head by loops: `[query][key]`, causal.
fn weights(q: &[[f64; 2]; TOKENS], k: &[[f64; 2]; TOKENS]) -> [[f64; TOKENS]; TOKENS] {
    let mut weights = [[0.0; TOKENS]; TOKENS];
    for i in 0..TOKENS {
        let score = |j: usize| (q[i][0] * k[j][0] + q[i][1] * k[j][1]) / 2f64.sqrt();
        let total: f64 = (0..=i).map(|j| score(j).exp()).sum();
        for (j, weight) in weights[i].iter_mut().enumerate().take(i + 1) {
            *weight = score(j).exp() / total;
        }
    }
    weights
}

#[test]
fn attention_is_frozen_or_split() {
    let shape = [BATCH, TOKENS, WIDTH];
    let all = [10.0, 11.0, 12.0].map(|phase| numbers(&shape, phase));
    let of_sources =
        [13.0, 14.0, 15.0].map(|phase| numbers(&[SOURCES, BATCH, TOKENS, WIDTH], phase));
    let mut options = AttentionOptions::new(2);
    options.causal = true;
    // One head of one batch: [token][feature].
    let head = |t: &Tensor, batch: usize, h: usize| -> [[f64; 2]; TOKENS] {
        let t = t.get(batch).unwrap().narrow(1, 2 * h, 2).unwrap();
        let rows: Vec<Vec<f64>> = t.to_vec2().unwrap();
        std::array::from_fn(|token| [rows[token][0], rows[token][1]])
    };
    for rules in [frozen(), split()] {
        let [q, k, v] = [0, 1, 2].map(|i| {
            Signal::from(all[i].clone())
                .into_contextual(of_sources[i].clone(), rules)
                .unwrap()
        });
        let merged = v.attend_merged(&q, &k, 2, 2, &options).unwrap();
        let apart = [&q, &k, &v].map(|x| x.split_heads(2).unwrap());
        let mixed = apart[2].attend(&apart[0], &apart[1], &options).unwrap();
        let mixed = mixed.merge_heads().unwrap();
        for found in [merged, mixed] {
            for (source, batch, h) in (0..SOURCES)
                .flat_map(|s| (0..BATCH).flat_map(move |b| (0..2).map(move |h| (s, b, h))))
            {
                let part = |i: usize| head(&of_sources[i].get(source).unwrap(), batch, h);
                let whole = |i: usize| head(&all[i], batch, h);
                let by = match rules.attention {
                    AttentionSplit::Frozen => weights(&whole(0), &whole(1)),
                    AttentionSplit::Split => weights(&part(0), &part(1)),
                };
                let of_values = part(2);
                let relevant = found.relevant().unwrap().get(source).unwrap();
                let relevant = head(&relevant, batch, h);
                for (i, found) in relevant.iter().enumerate() {
                    for d in 0..2 {
                        let expected: f64 = (0..TOKENS).map(|j| by[i][j] * of_values[j][d]).sum();
                        assert!((found[d] - expected).abs() < 1e-12, "{rules:?}");
                    }
                }
            }
        }
    }
}

/// Masks and biases of a batch hold for every source.
#[test]
fn split_attention_masks_each_source_as_the_batch_is_masked() {
    let mut options = AttentionOptions::new(2);
    let keep = Tensor::new(&[[1u8, 1, 0], [1, 1, 1]], &Device::Cpu).unwrap();
    options.key_padding = Some(keep);
    let x = start(parts(), split());
    let network = [
        (numbers(&[5, 1], 18.0), numbers(&[5], 19.0)),
        (numbers(&[4, 5], 20.0), numbers(&[4], 21.0)),
    ];
    let span = BiasSpan {
        queries: TOKENS,
        keys: TOKENS,
        offset: 0,
        causal: false,
    };
    let [distances, scales] = [22.0, 23.0].map(|phase| numbers(&[TOKENS], phase));
    let function = FunctionalBias::new(&distances, &scales, &network, span);
    for bias in [
        ScoreBias::Pairs(numbers(&[BATCH, 2, TOKENS, TOKENS], 17.0)),
        ScoreBias::ByDistance(numbers(&[2, 2 * TOKENS - 1], 17.0)),
        ScoreBias::Functional(function.unwrap()),
    ] {
        options.bias = Some(bias);
        let found = x.attend_merged(&x, &x, 2, 2, &options).unwrap();
        for source in 0..SOURCES {
            let alone = Signal::from(parts().get(source).unwrap());
            let alone = alone.attend_merged(&alone, &alone, 2, 2, &options).unwrap();
            let relevant = found.relevant().unwrap().get(source).unwrap();
            assert_close(&relevant, alone.value(), 1e-12, "masked");
        }
    }
}

#[test]
fn scores_are_followed_only_when_attention_is_split() {
    assert!(start(parts(), frozen()).for_scores().contextual().is_none());
    let followed = start(parts(), split()).for_scores();
    assert_close(&followed.relevant().unwrap(), &parts(), 0.0, "followed");
    assert!(
        start(parts(), split())
            .for_selection()
            .contextual()
            .is_none()
    );
}

#[test]
fn what_has_no_rule_is_refused_by_name() {
    let x = start(parts(), split());
    let decay = Signal::from(input());
    let scan = crate::SelectiveScan {
        step: input(),
        rate: numbers(&[WIDTH, 2], 1.0),
        entry: numbers(&[BATCH, TOKENS, 2], 2.0),
        exit: numbers(&[BATCH, TOKENS, 2], 3.0),
        initial: None,
    };
    let mixing = numbers(&[BATCH, 2, TOKENS, TOKENS], 7.0);
    let errors = [
        (x.scan(&decay).unwrap_err(), "scan"),
        (decay.scan(&x).unwrap_err(), "scan"),
        (x.selective_scan(&scan).unwrap_err(), "selective_scan"),
        (x.softmax(&Default::default()).unwrap_err(), "softmax"),
        (
            heads(&x).unwrap().mix(&mixing).unwrap_err(),
            "ready weights",
        ),
    ];
    for (error, operation) in errors {
        let said = error.to_string();
        assert!(
            said.starts_with(&format!("the contextual lens has no rule for {operation}")),
            "{said}"
        );
    }
    let error = Signal::from(input())
        .into_contextual(numbers(&[0, BATCH, TOKENS, WIDTH], 0.0), frozen())
        .unwrap_err();
    assert!(error.to_string().contains("shape of the relevant parts"));
    let error = Signal::from(input()).relevant().unwrap_err();
    assert_eq!(
        error.to_string(),
        "lens is \"plain\", but must be contextual"
    );
}
