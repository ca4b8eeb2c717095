//! Circuits: how they are found and whether they are faithful.

use std::collections::BTreeMap;

use super::{IDS, cases, followed, head, means, models, split};
use crate::common::{DECODER, ENCODER, model, tokens};
use lapidary_explain::Target;
use lapidary_explain::contextual::{
    Ablation, Case, Method, Metric, Outliers, Place, Scorer, Search, against_closest, discover,
    heads,
};
use lapidary_kernels::Tensor;
use lapidary_model::{Model, Pass};
use rand::SeedableRng;

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
