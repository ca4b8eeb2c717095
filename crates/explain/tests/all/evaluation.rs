//! Evaluation over a data set, and the difference of two models.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use crate::common::{DECODER, ENCODER, GATED, model, tokens};
use lapidary_explain::evaluation::{Example, evaluate};
use lapidary_explain::{Options, Question, Target, difference, explainer, explainers};
use lapidary_kernels::{D, DType, Device, Tensor};
use lapidary_model::{Model, Pass};
use std::collections::BTreeMap;

/// Scores of the last position, or of the sequence.
fn scores(model: &Model, ids: &[u32], keep: Option<&[u8]>) -> Vec<f64> {
    let padding = keep.map(|keep| Tensor::from_slice(keep, (1, keep.len()), &Device::Cpu).unwrap());
    let pass = Pass {
        padding: padding.as_ref(),
        ..Pass::default()
    };
    let logits = model.forward(&tokens(ids), pass).unwrap().logits.unwrap();
    let logits = logits.into_value().get(0).unwrap();
    let last = match logits.rank() {
        2 => logits.get(ids.len() - 1).unwrap(),
        _ => logits,
    };
    last.to_vec1::<f64>().unwrap()
}

fn best(scores: &[f64]) -> usize {
    (0..scores.len())
        .max_by(|a, b| scores[*a].total_cmp(&scores[*b]))
        .unwrap()
}

fn example(ids: &[u32], target: usize, foil: Option<usize>, special: &[usize]) -> Example {
    Example {
        ids: ids.to_vec(),
        target,
        foil,
        evidence: vec![1],
        position: None,
        special: special.to_vec(),
        words: Vec::new(),
    }
}

#[test]
fn only_what_the_model_gets_right_is_scored_by_every_method_that_is_defined() {
    for spec in [DECODER, ENCODER, GATED] {
        let model = model(spec, 11);
        let ids = [3, 11, 5, 0, 19];
        let right = best(&scores(&model, &ids, None));
        let wrong = (right + 1) % 3;
        let examples = [
            example(&ids, right, None, &[0]),
            example(&ids, wrong, None, &[0]),
            example(&ids, right, Some(wrong), &[0]),
            example(&ids, wrong, Some(right), &[0]),
        ];
        let methods: Vec<_> = explainers().iter().collect();
        let mut told = 0;
        let found = evaluate(&model, &examples, &methods, &Options::default(), |done| {
            told = done;
        })
        .unwrap();
        assert_eq!((found.examples, found.right), (4, 2));
        let used: Vec<_> = found
            .rows
            .iter()
            .filter(|row| row.refused.is_none())
            .collect();
        assert_eq!(told, 2 * used.len());
        assert!(used.len() >= 5);
        for row in used {
            assert_eq!(row.seconds.count, 2, "{}", row.method);
            assert_eq!(row.agreement[0].count, 2);
            assert!((0.0..=1.0).contains(&row.agreement[0].mean));
            assert!(row.masking.aopc.mean.is_finite());
        }
    }
}

/// Measures of no example are no measures.
#[test]
fn where_no_example_is_right_nothing_is_said_to_be_measured() {
    let model = model(DECODER, 11);
    let ids = [3, 11, 5, 0, 19];
    let wrong = (best(&scores(&model, &ids, None)) + 1) % 3;
    let examples = [example(&ids, wrong, None, &[0])];
    let methods = ["decompx", "globenc"].map(|method| explainer(method).unwrap());
    let found = evaluate(&model, &examples, &methods, &Options::default(), |_| {}).unwrap();
    assert_eq!((found.examples, found.right), (1, 0));
    let report = found.report("");
    assert!(report.tables.is_empty(), "{:?}", report.tables);
    let said = "nothing is scored: the model gets no example right";
    assert!(
        report.notes.iter().any(|note| note == said),
        "{:?}",
        report.notes
    );
}

/// Texts are hidden in batches of other texts; alone, with the hidden tokens as padding, the
/// model must say the same.
#[test]
fn the_area_under_masking_is_that_of_one_text_after_the_other() {
    let model = model(DECODER, 12);
    let texts: [&[u32]; 3] = [&[3, 11, 5, 0, 19, 7], &[2, 8, 8], &[1, 17, 4, 9]];
    let examples: Vec<_> = texts
        .iter()
        .map(|ids| example(ids, best(&scores(&model, ids, None)), None, &[0]))
        .collect();
    let method = explainer("gradient-x-input").unwrap();
    let options = Options::default();
    let found = evaluate(&model, &examples, &[method], &options, |_| {}).unwrap();
    let probability = |ids: &[u32], keep: &[u8], class: usize| {
        let scores = scores(&model, ids, Some(keep));
        let total: f64 = scores.iter().map(|score| score.exp()).sum();
        scores[class].exp() / total
    };
    let mut areas = Vec::new();
    for example in &examples {
        let (ids, class) = (&example.ids, example.target);
        let input = tokens(ids);
        let question = Question::new(&model, &input);
        let target = Target::class(class);
        let scores = method.explain(&question, target, &options).unwrap().scores;
        // Neither the special token at 0 nor the position that is explained is hidden.
        let mut order: Vec<usize> = (1..ids.len() - 1).collect();
        order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
        let whole = vec![1; ids.len()];
        let mut area = 0.0;
        for ratio in 0..10 {
            let mut keep = whole.clone();
            let count = (ratio as f64 / 10.0 * order.len() as f64).round() as usize;
            for position in &order[..count] {
                keep[*position] = 0;
            }
            area += probability(ids, &whole, class) - probability(ids, &keep, class);
        }
        areas.push(area / 10.0);
    }
    let expected = areas.iter().sum::<f64>() / areas.len() as f64;
    let measured = found.rows[0].masking.aopc.mean;
    assert!((measured - expected).abs() < 1e-12, "{measured} {expected}");
}

/// With words of one token each nothing changes; with larger ones, a word is judged and hidden
/// whole.
#[test]
fn words_are_scored_and_hidden_as_one() {
    let model = model(DECODER, 15);
    let ids = [3, 11, 5, 0, 19, 7];
    let class = best(&scores(&model, &ids, None));
    let tokens_alone = example(&ids, class, None, &[0]);
    let method = explainer("gradient-x-input").unwrap();
    let measured = |words: &[std::ops::Range<usize>]| {
        let example = Example {
            words: words.to_vec(),
            ..tokens_alone.clone()
        };
        evaluate(&model, &[example], &[method], &Options::default(), |_| {})
    };
    let row = |words: &[std::ops::Range<usize>]| measured(words).unwrap().rows.remove(0);
    let (alone, single) = (row(&[]), row(&[0..1, 1..2, 2..3, 3..4, 4..5, 5..6]));
    assert_eq!(
        (&alone.agreement, &alone.masking),
        (&single.agreement, &single.masking)
    );
    assert_eq!(alone.evidence_f1, single.evidence_f1);

    // The evidence is token 1, of the word 1..3; the last word holds the explained position.
    let words = [0..1, 1..3, 3..4, 4..6];
    let found = row(&words);
    let input = tokens(&ids);
    let question = Question::new(&model, &input);
    let each = method
        .explain(&question, Target::class(class), &Options::default())
        .unwrap();
    let sums: Vec<f64> = words
        .iter()
        .map(|w| each.scores[w.clone()].iter().sum())
        .collect();
    let rank = 1 + sums.iter().filter(|score| **score > sums[1]).count();
    assert_eq!(found.agreement[0].mean, 1.0 / rank as f64);
    // Only the words 1 and 2 may be hidden, one from 30 per cent on and both from 80.
    let probability = |keep: &[u8]| {
        let scores = scores(&model, &ids, Some(keep));
        scores[class].exp() / scores.iter().map(|score| score.exp()).sum::<f64>()
    };
    let first: [u8; 6] = match sums[1] > sums[2] {
        true => [1, 0, 0, 1, 1, 1],
        false => [1, 1, 1, 0, 1, 1],
    };
    let whole = probability(&[1; 6]);
    let (one, both) = (probability(&first), probability(&[1, 0, 0, 0, 1, 1]));
    let expected = (5.0 * (whole - one) + 2.0 * (whole - both)) / 10.0;
    assert!((found.masking.aopc.mean - expected).abs() < 1e-12);

    let gaps = measured(&[0..1, 2..6]).unwrap();
    assert!(gaps.rows[0].refused.is_some());
}

fn compared(before: &Model, after: &Model) -> lapidary_explain::Difference {
    let input = tokens(&[3, 11, 5, 0]);
    let names: Vec<String> = (0..4).map(|i| format!("token {i}")).collect();
    difference(
        &Question::new(before, &input),
        &Question::new(after, &input),
        Target::class(1),
        explainer("decompx").unwrap(),
        &names,
        &Options::default(),
    )
    .unwrap()
}

#[test]
fn a_model_does_not_differ_from_itself() {
    let model = model(DECODER, 13);
    let found = compared(&model, &model);
    assert_eq!(found.explained.0, found.explained.1);
    assert!(found.output.unwrap().divergence.abs() < 1e-12);
    assert!(found.sites.iter().all(|site| site.relative == Some(0.0)));
    let names: Vec<_> = found.sites.iter().map(|site| site.site.as_str()).collect();
    assert_eq!(names, ["embeddings", "blocks.0.out", "blocks.1.out"]);
    assert!(found.components.iter().all(|moved| moved.change() == 0.0));
}

/// A stream of another width has no numbers to subtract: what is compared is how positions lie to each
/// other, and what parts and tokens contribute.
#[test]
fn models_of_different_widths_are_compared() {
    let before = model(DECODER, 13);
    let after = model(&DECODER.replace("width = 16", "width = 8"), 13);
    let found = compared(&before, &after);
    assert_eq!(found.sites.len(), 3);
    for site in &found.sites {
        assert_eq!((site.relative, site.cosine), (None, None), "{}", site.site);
        let alignment = site.alignment.unwrap();
        assert!((0.0..1.0).contains(&alignment), "{} {alignment}", site.site);
    }
    assert!(
        found
            .components
            .iter()
            .all(|moved| moved.before.is_some() && moved.after.is_some())
    );
    let tables = found.report("two widths").tables;
    assert_eq!(tables[2].columns.len(), 4);
    let same = compared(&before, &before);
    let alignments = same.sites.iter().filter_map(|site| site.alignment);
    assert!(alignments.fold(0.0f64, |most, a| most.max((a - 1.0).abs())) < 1e-12);
}

/// With its last feed-forward part's output doubled, a model moves in that part's contribution
/// and, through the final norm, in the scale of all others; earlier sites stand still.
#[test]
fn a_changed_part_is_found() {
    let before = model(DECODER, 14);
    let mut parameters: BTreeMap<String, Tensor> = before.parameters().clone();
    for (name, tensor) in &mut parameters {
        if name.starts_with("blocks.1.feedforward.down") {
            *tensor = (&*tensor * 2.0).unwrap();
        }
    }
    let changed = parameters
        .keys()
        .filter(|name| name.starts_with("blocks.1.feedforward.down"))
        .count();
    assert_eq!(changed, 2);
    let after = Model::new(before.spec().clone(), &mut parameters).unwrap();
    let found = compared(&before, &after);
    let relative = found.sites.iter().filter_map(|site| site.relative);
    let relative: Vec<f64> = relative.collect();
    assert_eq!(&relative[..2], [0.0, 0.0]);
    assert!(relative[2] > 0.01);
    // What each model's parts contribute still sums to what it says.
    let total = |of: fn(&lapidary_explain::Moved) -> Option<f64>| -> f64 {
        found.components.iter().filter_map(of).sum()
    };
    assert!((total(|moved| moved.before) - found.explained.0).abs() < 1e-9);
    assert!((total(|moved| moved.after) - found.explained.1).abs() < 1e-9);
    // The divergence of the probabilities, by its definition.
    let log_probabilities = |model: &Model| -> Vec<f64> {
        let scores = scores(model, &[3, 11, 5, 0], None);
        let scores = Tensor::new(scores, &Device::Cpu).unwrap();
        assert_eq!(scores.dtype(), DType::F64);
        let total = scores.exp().unwrap().sum_all().unwrap().log().unwrap();
        let scores = scores.broadcast_sub(&total).unwrap();
        assert!(scores.dim(D::Minus1).unwrap() > 1);
        scores.to_vec1::<f64>().unwrap()
    };
    let (p, q) = (log_probabilities(&before), log_probabilities(&after));
    let expected: f64 = p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum();
    assert!((found.output.unwrap().divergence - expected).abs() < 1e-10);
}
