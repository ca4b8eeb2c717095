//! What contextual decomposition gives exactly.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use crate::common::{DECODER, ENCODER, GATED, model, tokens};
use lapidary_explain::contextual::{
    Ablation, Case, Endpoint, Means, Method, Metric, Node, NodeScore, Outliers, Phrase, Place,
    Scorer, Search, against_closest, decompose, discover, heads, heads_by_position,
};
use lapidary_explain::{Options, Question, Target, Unit, explainer};
use lapidary_kernels::{Tensor, check::difference};
use lapidary_model::{Model, Pass};
use lapidary_signal::contextual::{AttentionSplit, ContextualRules};
use lapidary_signal::{Signal, Trace};
use rand::SeedableRng;
use std::collections::BTreeMap;

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
fn what_is_its_own_mean_contributes_nothing() {
    for model in models() {
        let case = case(&IDS);
        let own = means(&model, std::slice::from_ref(&case));
        for rules in all_rules() {
            let cases = std::slice::from_ref(&case);
            let scorer = Scorer::new(&model, cases, own.clone(), followed(rules)).unwrap();
            let nodes = heads_by_position(&model, IDS.len()).unwrap();
            let ends = [Endpoint::Scores, Endpoint::Head(head(1, 2), Place::Mixed)];
            for row in scorer.scores(&nodes, &ends).unwrap() {
                assert_eq!(row, [0.0, 0.0]);
            }
        }
    }
}

/// In split mode heads are also read at their queries and keys.
#[test]
fn heads_are_read_where_their_parts_flow() {
    for model in models() {
        let cases = cases();
        let means = means(&model, &cases);
        let ends = Place::ALL.map(|place| Endpoint::Head(head(1, 3), place));
        for score in [NodeScore::Share, NodeScore::Dot] {
            let method = Method::Contextual(split(), score);
            let scorer = Scorer::new(&model, &cases, means.clone(), method).unwrap();
            let earlier = scorer.scores(&[head(0, 1)], &ends).unwrap().remove(0);
            assert!(earlier.iter().all(|one| one.abs() > 1e-9), "{earlier:?}");
            if score == NodeScore::Share {
                assert!(earlier.iter().all(|one| *one < 1.0), "{earlier:?}");
            }
            // Nothing of a head reaches its own block.
            let same = scorer.scores(&[head(1, 3)], &ends).unwrap().remove(0);
            assert_eq!(same, [0.0; 4]);
        }
        let method = followed(ContextualRules::default());
        let scorer = Scorer::new(&model, &cases, means, method).unwrap();
        let error = scorer.scores(&[head(0, 1)], &ends).unwrap_err().to_string();
        assert_eq!(
            error,
            "place of a target is query, but must be mixed or value, or attention split"
        );
    }
}

/// A head at all positions is the set of it at each.
#[test]
fn a_head_is_itself_at_every_position() {
    let model = model(DECODER, 43);
    let cases = cases();
    let scorer = Scorer::new(&model, &cases, means(&model, &cases), followed(split())).unwrap();
    let each: Vec<Node> = (0..IDS.len())
        .map(|position| Node {
            position: Some(position),
            ..head(0, 2)
        })
        .collect();
    let sets = [vec![head(0, 2)], each];
    let ends = [Endpoint::Scores, Endpoint::Head(head(1, 0), Place::Key)];
    let found = scorer.scores_of_sets(&sets, &ends).unwrap();
    for (whole, parts) in found[0].iter().zip(&found[1]) {
        assert!((whole - parts).abs() < 1e-12);
    }
}

#[test]
fn the_whole_model_is_faithful_and_none_of_it_is_not() {
    for model in models() {
        let cases = cases();
        let means = means(&model, &cases);
        for metric in [Metric::ScoreDifference, Metric::ProbabilityDifference] {
            let ablation = Ablation::new(&model, &cases, means.clone(), metric).unwrap();
            let all = heads(&model).unwrap();
            let found = ablation.faithfulness(&[all.clone(), Vec::new()]).unwrap();
            assert!((found[0] - 1.0).abs() < 1e-9 && found[1].abs() < 1e-9);
            let plain = |case: &Case| {
                let output = model.forward(&case.input, Pass::default()).unwrap();
                let logits = output.into_logits().unwrap().into_value();
                let logits = logits.flatten_all().unwrap().to_vec1::<f64>().unwrap();
                // Of a language model, those of the last position.
                let last = match logits.len() {
                    3 => &logits[..],
                    all => &logits[all - 20..],
                };
                let total: f64 = last.iter().map(|v| v.exp()).sum();
                match metric {
                    Metric::ScoreDifference => last[1] - last[2],
                    Metric::ProbabilityDifference => (last[1].exp() - last[2].exp()) / total,
                }
            };
            let expected = cases.iter().map(plain).sum::<f64>() / cases.len() as f64;
            assert!((ablation.full() - expected).abs() < 1e-12);
            let mut generator = rand_chacha::ChaCha8Rng::seed_from_u64(1);
            let controls = ablation.controls(2.0, &all, 3, &mut generator).unwrap();
            assert_eq!(controls.len(), 10);
            assert!(
                controls
                    .iter()
                    .all(|control| control.faithfulness.len() == 3)
            );
            // Everything is as faithful as everything.
            let whole = &controls[9].faithfulness;
            assert!(whole.iter().all(|one| (one - 1.0).abs() < 1e-9));
        }
    }
}

/// Beyond the last block there is one path: path patching is ablation.
#[test]
fn patching_the_path_from_the_last_block_is_ablating_the_head() {
    for model in models() {
        let cases = cases();
        let means = means(&model, &cases);
        let scorer = Scorer::new(&model, &cases, means.clone(), Method::PathPatching).unwrap();
        let ablation = Ablation::new(&model, &cases, means, Metric::default()).unwrap();
        for index in 0..4 {
            let node = head(1, index);
            let rest: Vec<Node> = heads(&model).unwrap();
            let rest = rest.into_iter().filter(|one| *one != node).collect();
            let expected = ablation.full() - ablation.values(&[rest]).unwrap()[0];
            let found = scorer.scores(&[node], &[Endpoint::Scores]).unwrap()[0][0];
            assert!(
                (found - expected).abs() < 1e-10,
                "{node}: {found} {expected}"
            );
        }
    }
}

/// A receiver gets what arrives when the sender is at its mean, by two passes by hand.
#[test]
fn patching_a_path_to_a_head_is_two_passes() {
    let model = model(DECODER, 45);
    let cases = [case(&IDS)];
    let inputs = [&cases[0].input];
    let means = Means::over_positions(&model, &inputs).unwrap();
    let scorer = Scorer::new(&model, &cases, means.clone(), Method::PathPatching).unwrap();
    let sender = head(0, 1);
    // By hand: the receiver gets what arrives when the sender is at its mean.
    let run = |trace: &Trace| -> f64 {
        let pass = Pass {
            trace: Some(trace),
            ..Pass::default()
        };
        let logits = model
            .forward(&cases[0].input, pass)
            .unwrap()
            .into_logits()
            .unwrap();
        let logits = logits.value().get(0).unwrap().get(IDS.len() - 1).unwrap();
        let logits = logits.to_vec1::<f64>().unwrap();
        logits[1] - logits[2]
    };
    let ablated = |trace: Trace| {
        trace
            .replace("blocks.0.attention.mixed", |_, z| {
                let z = z.into_value();
                let mean = z.mean_keepdim(1).unwrap().broadcast_as(z.shape()).unwrap();
                let parts = [
                    z.narrow(2, 0, 4).unwrap(),
                    mean.narrow(2, 4, 4).unwrap(),
                    z.narrow(2, 8, 8).unwrap(),
                ];
                Ok(Signal::from(Tensor::cat(&parts, 2).unwrap()))
            })
            .unwrap()
    };
    for (place, features) in [
        (Place::Mixed, 8..12),
        (Place::Query, 8..12),
        (Place::Key, 8..12),
    ] {
        let site = format!("blocks.1.attention.{}", place.name());
        let arriving = ablated(Trace::new()).capture(&site).unwrap();
        run(&arriving);
        let arrived = arriving.signal(&site).unwrap().into_value();
        let patched = Trace::new()
            .replace(&site, move |_, x| {
                let x = x.into_value();
                let (start, end) = (features.start, features.end);
                let parts = [
                    x.narrow(2, 0, start).unwrap(),
                    arrived.narrow(2, start, 4).unwrap(),
                    x.narrow(2, end, 16 - end).unwrap(),
                ];
                Ok(Signal::from(Tensor::cat(&parts, 2).unwrap()))
            })
            .unwrap();
        let expected = run(&Trace::new()) - run(&patched);
        let ends = [Endpoint::Head(head(1, 2), place)];
        let found = scorer.scores(&[sender], &ends).unwrap()[0][0];
        assert!(
            (found - expected).abs() < 1e-10,
            "{place:?}: {found} {expected}"
        );
        assert!(expected != 0.0);
    }
}

/// A model whose other heads write nothing has a circuit of the two that do.
#[test]
fn a_circuit_is_what_there_is() {
    let intact = model(DECODER, 47);
    let mut parameters: BTreeMap<String, Tensor> = intact.parameters().clone();
    for (block, only) in [(0, 1), (1, 2)] {
        let name = format!("blocks.{block}.attention.output.weight");
        let mut keep = vec![0.0; 16];
        keep[only * 4..only * 4 + 4].fill(1.0);
        let keep = Tensor::new(keep.as_slice(), &lapidary_kernels::Device::Cpu).unwrap();
        let kept = parameters[&name].broadcast_mul(&keep).unwrap();
        parameters.insert(name, kept);
    }
    let model = Model::new(intact.spec().clone(), &mut parameters).unwrap();
    let cases = cases();
    let means = means(&model, &cases);
    let search = Search {
        places: vec![Place::Mixed, Place::Key],
        outliers: Outliers::Top(3),
        ..Search::default()
    };
    for method in [followed(split()), Method::PathPatching] {
        let scorer = Scorer::new(&model, &cases, means.clone(), method).unwrap();
        let found = discover(&scorer, &search, &heads(&model).unwrap()).unwrap();
        let mut nodes = found.nodes.clone();
        nodes.sort();
        assert_eq!(nodes, [head(0, 1), head(1, 2)], "{method:?}");
        assert!(found.edges.iter().any(|edge| edge.to == Some(head(1, 2))));
        let ablation = Ablation::new(&model, &cases, means.clone(), Metric::default()).unwrap();
        let faithfulness = ablation.faithfulness(&[nodes.clone()]).unwrap()[0];
        assert!((faithfulness - 1.0).abs() < 1e-10, "{faithfulness}");
        // What does nothing is dropped.
        let padded = [head(0, 0), head(1, 3), head(0, 1), head(1, 2)];
        let pruned = ablation.pruned(&padded).unwrap();
        assert!(!pruned.contains(&head(0, 0)) && !pruned.contains(&head(1, 3)));
    }
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

#[test]
fn the_closest_competitor_is_the_foil() {
    let model = model(ENCODER, 22);
    let input = tokens(&IDS);
    let logits = model
        .forward(&input, Pass::default())
        .unwrap()
        .into_logits()
        .unwrap();
    let logits = logits
        .value()
        .flatten_all()
        .unwrap()
        .to_vec1::<f64>()
        .unwrap();
    let foil = if logits[1] > logits[2] { 1 } else { 2 };
    let expected = Target::Score {
        class: 0,
        foil: Some(foil),
        position: None,
    };
    assert_eq!(against_closest(&model, &input, 0).unwrap(), expected);
    assert!(against_closest(&model, &input, 3).is_err());
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let recurrent = r#"
width = 8
[input]
kind = "tokens"
vocabulary = 20
length = 12
[[blocks]]
attention = { kind = "mamba" }
[head]
kind = "language-model"
"#;
    let mamba = model(recurrent, 1);
    let input = tokens(&IDS);
    let said = |error: lapidary_explain::Error| error.to_string();
    let error = decompose(
        &Question::new(&mamba, &input),
        &[Target::class(1)],
        &[vec![0]],
        split(),
    );
    let text = said(error.unwrap_err());
    assert!(
        text.contains("no rule for selective_scan") && text.contains("decompx"),
        "{text}"
    );
    let text = said(heads(&mamba).unwrap_err());
    assert!(text.starts_with("mixer of block 0 is mamba"), "{text}");

    let decoder = model(DECODER, 1);
    let question = Question::new(&decoder, &input);
    let error = decompose(&question, &[Target::class(1)], &[vec![9]], split());
    assert!(said(error.unwrap_err()).contains("position of a source is 9"));
    let method = followed(split());
    let scorer = Scorer::new(&decoder, &[case(&IDS)], Means::zero(), method).unwrap();
    for (node, expected) in [
        (head(5, 0), "block of a node is 5"),
        (head(0, 7), "head of a node is 7"),
    ] {
        let error = scorer.scores(&[node], &[Endpoint::Scores]).map(drop);
        let ends = [Endpoint::Head(node, Place::Mixed)];
        let at = scorer.scores(&[head(0, 0)], &ends).map(drop);
        let text = said(error.and(at).unwrap_err());
        assert!(
            text.contains(expected) || text.contains("site blocks.5"),
            "{text}"
        );
    }
    let there = Node {
        position: Some(6),
        ..head(0, 0)
    };
    let error = scorer.scores(&[there], &[Endpoint::Scores]).map(drop);
    assert!(said(error.unwrap_err()).contains("position of a node is 0.0@6"));
    assert!(Scorer::new(&decoder, &[], Means::zero(), method).is_err());
    let long = [case(&IDS), case(&[1, 2])];
    let inputs = [&long[0].input, &long[1].input];
    assert!(
        said(Means::by_position(&decoder, &inputs).unwrap_err()).contains("length of an input")
    );
    let search = Search {
        outliers: Outliers::Top(0),
        ..Search::default()
    };
    assert!(discover(&scorer, &search, &heads(&decoder).unwrap()).is_err());
}
