//! Contributions of heads, their ablation, and paths between them.

use super::{IDS, all_rules, case, cases, followed, head, means, models, split};
use crate::common::{DECODER, model};
use lapidary_explain::contextual::{
    Ablation, Endpoint, Means, Method, Metric, Node, NodeScore, Place, Scorer, heads,
    heads_by_position,
};
use lapidary_kernels::Tensor;
use lapidary_model::Pass;
use lapidary_signal::contextual::ContextualRules;
use lapidary_signal::{Signal, Trace};

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
