//! What contextual decomposition gives exactly.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod circuits;
mod contributions;
mod refusals;

use std::collections::BTreeMap;

use crate::common::{DECODER, ENCODER, GATED, model, tokens};
use lapidary_explain::contextual::{
    Case, Endpoint, Means, Method, Node, NodeScore, Phrase, Scorer, decompose, heads,
};
use lapidary_explain::{Options, Question, Target, Unit, explainer};
use lapidary_kernels::Tensor;
use lapidary_kernels::check::difference;
use lapidary_model::{Model, Pass};
use lapidary_signal::Trace;
use lapidary_signal::contextual::{AttentionSplit, ContextualRules};

const IDS: [u32; 6] = [3, 11, 0, 19, 7, 5];

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

fn split() -> ContextualRules {
    ContextualRules {
        attention: AttentionSplit::Split,
        stabilise: false,
    }
}

fn followed(rules: ContextualRules) -> Method {
    Method::Contextual(rules, NodeScore::Share)
}

fn models() -> Vec<Model> {
    [ENCODER, DECODER, GATED]
        .iter()
        .zip(41..)
        .map(|(spec, seed)| model(spec, seed))
        .collect()
}

fn head(block: usize, head: usize) -> Node {
    Node {
        block,
        head,
        position: None,
    }
}

fn case(ids: &[u32]) -> Case {
    Case {
        input: tokens(ids),
        target: Target::Score {
            class: 1,
            foil: Some(2),
            position: None,
        },
        contrast: None,
    }
}

fn cases() -> Vec<Case> {
    [
        [3, 11, 0, 19, 7, 5],
        [1, 4, 9, 2, 8, 6],
        [7, 7, 12, 3, 0, 1],
    ]
    .iter()
    .map(|ids| case(ids))
    .collect()
}

fn means(model: &Model, cases: &[Case]) -> Means {
    let inputs: Vec<_> = cases.iter().map(|case| &case.input).collect();
    Means::by_position(model, &inputs).unwrap()
}

/// `model` with some of its parameters set to zero.
fn without(model: &Model, is_zero: impl Fn(&str) -> bool) -> Model {
    let mut parameters: BTreeMap<String, Tensor> = model.parameters().clone();
    for (name, value) in &mut parameters {
        if is_zero(name) {
            *value = value.zeros_like().unwrap();
        }
    }
    Model::new(model.spec().clone(), &mut parameters).unwrap()
}

fn scores_of(model: &Model, sources: &[Vec<usize>], rules: ContextualRules) -> (Vec<f64>, f64) {
    let input = tokens(&IDS);
    let question = Question::new(model, &input);
    let (mut scores, numbers) = decompose(&question, &[Target::class(1)], sources, rules).unwrap();
    (scores.remove(0), numbers[0])
}

/// The value at every site is that of the plain pass, whatever is relevant; what the rules give
/// to both parts is held to loops and to PyTorch elsewhere.
#[test]
fn values_are_those_of_the_plain_pass_at_every_site() {
    for model in models() {
        let input = tokens(&IDS);
        let plain = Trace::new().capture("*").unwrap();
        let run = |trace: &Trace| {
            let pass = Pass {
                trace: Some(trace),
                ..Pass::default()
            };
            model.forward(&input, pass).unwrap();
        };
        run(&plain);
        for rules in all_rules() {
            let trace = Trace::new()
                .replace("embeddings", move |_, x| {
                    let half = (x.value() * 0.3).unwrap().unsqueeze(0).unwrap();
                    x.into_contextual(half, rules)
                })
                .unwrap()
                .capture("{embeddings,final_norm,logits,pooled,head.in}")
                .unwrap()
                .capture("blocks.?.{in,out}")
                .unwrap()
                .capture("blocks.?.{attention,feedforward}.{in,query,key,value,mixed,hidden,out}")
                .unwrap();
            run(&trace);
            let mut seen = 0;
            for (site, record) in trace.records() {
                let expected = plain.signal(&site).unwrap();
                let error = difference(record.signal.value(), expected.value()).unwrap();
                assert!(error < 1e-10, "{site} {rules:?}: {error}");
                if let Some(parts) = record.signal.contextual() {
                    assert_eq!(&parts.relevant().dims()[1..], expected.dims(), "{site}");
                    seen += 1;
                }
            }
            assert!(seen > 15, "{seen} sites were followed");
        }
    }
}

#[test]
fn everything_is_the_score_and_nothing_is_zero() {
    for model in models() {
        for rules in all_rules() {
            let sources = [(0..IDS.len()).collect(), Vec::new()];
            let (scores, number) = scores_of(&model, &sources, rules);
            assert!((scores[0] - number).abs() < 1e-10, "{rules:?}: {scores:?}");
            assert_eq!(scores[1], 0.0, "{rules:?}");
        }
    }
}

#[test]
fn tokens_together_are_tokens_one_by_one() {
    // More than run at one time.
    let sources: Vec<Vec<usize>> = (0..70).map(|i| vec![i % 6, (i * 5 + 1) % 6]).collect();
    for model in models() {
        for rules in all_rules() {
            let (together, _) = scores_of(&model, &sources, rules);
            for (source, found) in sources.iter().zip(together).skip(60) {
                let (alone, _) = scores_of(&model, std::slice::from_ref(source), rules);
                assert!((found - alone[0]).abs() < 1e-10, "{rules:?}");
            }
        }
    }
}

/// Heads scored in one pass that starts in the middle, against a pass for each from the
/// embeddings on.
#[test]
fn heads_together_from_the_middle_are_heads_one_by_one_from_the_start() {
    for model in models() {
        let cases = cases();
        let means = means(&model, &cases);
        for rules in all_rules() {
            let scorer = Scorer::new(&model, &cases, means.clone(), followed(rules)).unwrap();
            let nodes = heads(&model).unwrap();
            let found = scorer.scores(&nodes, &[Endpoint::Scores]).unwrap();
            for (node, found) in nodes.iter().zip(found) {
                let each = cases
                    .iter()
                    .map(|one| by_hand(&model, &cases, one, node, rules));
                let expected = each.sum::<f64>() / cases.len() as f64;
                assert!((found[0] - expected).abs() < 1e-10, "{node} {rules:?}");
                let alone = scorer.scores(&[*node], &[Endpoint::Scores]).unwrap();
                assert!((alone[0][0] - found[0]).abs() < 1e-10, "{node} {rules:?}");
            }
        }
    }
}

/// What a head contributes to a case's score by a pass from the embeddings on.
fn by_hand(model: &Model, cases: &[Case], one: &Case, node: &Node, rules: ContextualRules) -> f64 {
    let site = format!("blocks.{}.attention.mixed", node.block);
    let run = |case: &Case, trace: &Trace| {
        let pass = Pass {
            trace: Some(trace),
            ..Pass::default()
        };
        model
            .forward(&case.input, pass)
            .unwrap()
            .into_logits()
            .unwrap()
    };
    let mut sum: Option<Tensor> = None;
    for case in cases {
        let trace = Trace::new().capture(&site).unwrap();
        run(case, &trace);
        let value = trace.signal(&site).unwrap().into_value();
        sum = Some(match sum {
            Some(sum) => (sum + value).unwrap(),
            None => value,
        });
    }
    let mean = (sum.unwrap() / cases.len() as f64).unwrap();
    let own = node.head * 4..node.head * 4 + 4;
    let trace = Trace::new()
        .replace(&site, move |_, z| {
            let mut keep = vec![0.0; 16];
            keep[own.clone()].fill(1.0);
            let keep = Tensor::new(keep.as_slice(), z.device()).unwrap();
            let relevant = (z.value() - &mean).unwrap().broadcast_mul(&keep).unwrap();
            z.into_contextual(relevant.unsqueeze(0).unwrap(), rules)
        })
        .unwrap();
    let logits = run(one, &trace).relevant().unwrap();
    let last = match logits.dims() {
        [_, _, length, _] => logits.narrow(2, length - 1, 1).unwrap(),
        _ => logits,
    };
    let values = last.flatten_all().unwrap().to_vec1::<f64>().unwrap();
    values[1] - values[2]
}

#[test]
fn a_pass_from_the_middle_is_the_whole_pass() {
    for model in models() {
        let input = tokens(&IDS);
        let trace = Trace::new().capture("blocks.1.in").unwrap();
        let pass = Pass {
            trace: Some(&trace),
            ..Pass::default()
        };
        let whole = model.forward(&input, pass).unwrap().into_logits().unwrap();
        let hidden = trace.signal("blocks.1.in").unwrap();
        let from = |start| {
            let pass = Pass {
                start,
                ..Pass::default()
            };
            model.forward(&input, pass)
        };
        let half = from(Some((1, &hidden))).unwrap().into_logits().unwrap();
        assert_eq!(difference(half.value(), whole.value()).unwrap(), 0.0);
        let said = from(Some((3, &hidden))).unwrap_err().to_string();
        assert!(said.contains("block to start at"), "{said}");
        let narrow = hidden.narrow(2, 0, 3).unwrap();
        let said = from(Some((1, &narrow))).unwrap_err().to_string();
        assert!(said.contains("what flows into the block"), "{said}");
    }
}

/// With nothing above it, a head's part goes straight through the final norm, whose deviation is
/// that of the true value, to the scores.
#[test]
fn below_an_empty_network_a_part_is_the_direct_attribution() {
    let model = without(&model(DECODER, 51), |name| {
        name.contains("feedforward.down")
            || name.starts_with("blocks.1.attention.output")
            || name == "blocks.0.attention.output.bias"
            || name == "final_norm.bias"
    });
    let cases = cases();
    let means = means(&model, &cases);
    let nodes: Vec<Node> = (0..4).map(|index| head(0, index)).collect();
    for rules in all_rules() {
        // The stabiliser gives up linearity.
        if rules.stabilise {
            continue;
        }
        let scorer = Scorer::new(&model, &cases, means.clone(), followed(rules)).unwrap();
        let found = scorer.scores(&nodes, &[Endpoint::Scores]).unwrap();
        for (node, found) in nodes.iter().zip(found) {
            let each = cases
                .iter()
                .map(|one| direct(&model, &cases, one, node.head));
            let expected = each.sum::<f64>() / cases.len() as f64;
            assert!((found[0] - expected).abs() < 1e-10, "{node} {rules:?}");
            assert!(expected.abs() > 1e-4, "{expected}");
        }
    }
}

/// `(z − m) W_O` of one head at the last position, through the final norm, along the scores.
fn direct(model: &Model, cases: &[Case], one: &Case, head: usize) -> f64 {
    let last_of = |case: &Case, site: &str| -> Vec<f64> {
        let trace = Trace::new().capture(site).unwrap();
        let pass = Pass {
            trace: Some(&trace),
            ..Pass::default()
        };
        model.forward(&case.input, pass).unwrap();
        let value = trace.signal(site).unwrap().into_value();
        value
            .get(0)
            .unwrap()
            .get(IDS.len() - 1)
            .unwrap()
            .to_vec1()
            .unwrap()
    };
    let site = "blocks.0.attention.mixed";
    let z = last_of(one, site);
    let all: Vec<Vec<f64>> = cases.iter().map(|case| last_of(case, site)).collect();
    let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
    let away: Vec<f64> = (0..16)
        .map(|i| z[i] - all.iter().map(|z| z[i]).sum::<f64>() / all.len() as f64)
        .collect();
    let output = &model.parameters()["blocks.0.attention.output.weight"];
    let output: Vec<Vec<f64>> = output.to_vec2().unwrap();
    let written: Vec<f64> = output
        .iter()
        .map(|row| (head * 4..head * 4 + 4).map(|i| row[i] * away[i]).sum())
        .collect();
    let x = last_of(one, "blocks.1.out");
    let squares: Vec<f64> = x.iter().map(|v| (v - mean(&x)).powi(2)).collect();
    let deviation = (mean(&squares) + 1e-5).sqrt();
    let gamma: Vec<f64> = model.parameters()["final_norm.weight"].to_vec1().unwrap();
    let table: Vec<Vec<f64>> = model.parameters()["embeddings.tokens.weight"]
        .to_vec2()
        .unwrap();
    (0..16)
        .map(|i| {
            let normed = gamma[i] * (written[i] - mean(&written)) / deviation;
            normed * (table[1][i] - table[2][i])
        })
        .sum()
}

/// A network without norms, biases and activations.
const LINEAR: &str = r#"
width = 16
[input]
kind = "tokens"
vocabulary = 20
length = 12
position = { kind = "learned" }
[[blocks]]
repeat = 2
norm = { kind = "none" }
attention = { kind = "multi-head", heads = 4, causal = true, bias = false }
[head]
kind = "language-model"
"#;

#[test]
fn in_a_linear_network_disjoint_sources_add_up_and_in_others_they_do_not() {
    let sources = [vec![0, 2], vec![3], vec![1, 4, 5], vec![0, 2, 3]];
    let sums = |model: &Model, rules| {
        let (scores, number) = scores_of(model, &sources, rules);
        let apart = scores[0] + scores[1] - scores[3];
        let complement = scores[2] + scores[3] - number;
        (apart.abs(), complement.abs())
    };
    let (apart, complement) = sums(&model(LINEAR, 61), ContextualRules::default());
    assert!(apart < 1e-10 && complement < 1e-10, "{apart} {complement}");
    let (apart, complement) = sums(&model(DECODER, 61), ContextualRules::default());
    assert!(apart > 1e-6 && complement > 1e-6, "{apart} {complement}");
}

#[test]
fn a_phrase_is_scored_as_one() {
    let model = model(ENCODER, 21);
    let input = tokens(&IDS);
    let question = Question::new(&model, &input);
    let method = explainer("contextual-decomposition").unwrap();
    let target = Target::class(2);
    let by_token = method
        .explain(&question, target, &Options::default())
        .unwrap();
    assert_eq!((by_token.unit, by_token.scores.len()), (Unit::Token, 6));
    let options = Options {
        phrase: Some(Phrase { first: 2, last: 4 }),
        ..Options::default()
    };
    let by_phrase = method.explain(&question, target, &options).unwrap();
    assert_eq!(by_phrase.unit, Unit::Phrase);
    assert_eq!(by_phrase.labels, ["0", "1", "2-4", "5"]);
    let (scores, number) = decompose(
        &question,
        &[target],
        &[vec![2, 3, 4]],
        ContextualRules::default(),
    )
    .unwrap();
    for (found, expected) in [
        (by_phrase.scores[2], scores[0][0]),
        (by_phrase.account.explained, number[0]),
        (by_phrase.scores[0], by_token.scores[0]),
        (by_phrase.scores[3], by_token.scores[5]),
    ] {
        assert!((found - expected).abs() < 1e-12, "{found} {expected}");
    }
}
