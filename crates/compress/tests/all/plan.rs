//! Ranks from ratios and budgets, and the ranks that do not pay.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;

use crate::common::{DECODER, all, cut_by, model, windows};
use lapidary_compress::factorisation::parameters_after;
use lapidary_compress::{
    Budget, Change, Factorisation, Method, Pattern, Recipe, Selection, Settings, Task,
};

fn rank(change: &Change) -> Option<usize> {
    match change {
        Change::Factorise { rank } => Some(*rank),
        _ => None,
    }
}

#[test]
fn one_ratio_gives_each_layer_the_largest_rank_that_fits() {
    let model = model(DECODER, 1);
    let plan = Factorisation::Svd
        .plan(&model, &Selection::default(), &Budget::Keep(0.6))
        .unwrap();
    assert_eq!(plan.modules.len(), 12);
    for layer in &plan.modules {
        let rank = rank(&layer.change).unwrap();
        let whole = (layer.input * layer.output) as f64;
        assert!((rank * (layer.input + layer.output)) as f64 <= 0.6 * whole);
        assert!(((rank + 1) * (layer.input + layer.output)) as f64 > 0.6 * whole);
    }
}

#[test]
fn ranks_that_do_not_pay_leave_the_layer_whole_and_say_so() {
    let model = model(DECODER, 1);
    // 16 by 16: rank 8 has 256 weights, as many as before.
    let path = "blocks.0.attention.query";
    for (asked, planned) in [(7, Some(7)), (8, None), (16, None)] {
        let budget = Budget::Ranks(BTreeMap::from([(path.to_owned(), asked)]));
        let plan = Factorisation::Svd
            .plan(&model, &Selection::layers([path]), &budget)
            .unwrap();
        assert_eq!(rank(&plan.modules[0].change), planned);
        if planned.is_none() {
            let compressed = plan.apply(&model, None).unwrap();
            let layer = &compressed.report.modules[0];
            assert!(
                layer
                    .note
                    .as_ref()
                    .unwrap()
                    .contains("no fewer than the 256")
            );
            assert_eq!(layer.parameters_after, layer.parameters_before);
            assert!(compressed.model.spec().low_rank.is_empty());
            assert_eq!(compressed.report.after, compressed.report.before);
        }
    }
    let all = Factorisation::Svd
        .plan(&model, &Selection::default(), &Budget::Keep(1.0))
        .unwrap();
    for layer in &all.modules {
        match &layer.change {
            Change::Leave { reason } => assert!(reason.contains("weights")),
            // 16 by 24: 16 · 24 / 40 = 9.6.
            Change::Factorise { rank } => assert_eq!((*rank, layer.input + layer.output), (9, 40)),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_budget_of_parameters_is_kept_and_used_up() {
    for (name, model, _) in all() {
        let before = model.parameter_count();
        for share in [0.55, 0.7, 0.85, 0.95, 1.0] {
            let limit = (share * before as f64) as usize;
            let budget = Budget::Parameters(limit);
            let plan = Factorisation::Svd
                .plan(&model, &Selection::default(), &budget)
                .unwrap();
            let after = parameters_after(&plan, &model);
            let compressed = plan.apply(&model, None).unwrap();
            assert_eq!(compressed.model.parameter_count(), after);
            assert!(after <= limit, "{name} {share}: {after} > {limit}");
            // One more rank for the layers of each shape would be too much.
            let step: usize = plan
                .modules
                .iter()
                .map(|layer| layer.input + layer.output)
                .sum();
            assert!(after + step > limit, "{name} {share}");
        }
        let tight = Budget::Parameters(before / 10);
        let error = Factorisation::Svd
            .plan(&model, &Selection::default(), &tight)
            .unwrap_err();
        assert!(error.to_string().contains("at least"), "{error}");
    }
}

#[test]
fn wrong_plans_are_refused_in_words() {
    let model = model(DECODER, 1);
    let selection = Selection::default();
    let refuse = |selection: &Selection, budget: Budget| {
        Factorisation::Svd
            .plan(&model, selection, &budget)
            .unwrap_err()
            .to_string()
    };
    for share in [0.0, -1.0, 1.5, f64::NAN] {
        assert!(refuse(&selection, Budget::Keep(share)).contains("above 0 and at most 1"));
    }
    let rank = |path: &str, rank| Budget::Ranks(BTreeMap::from([(path.to_owned(), rank)]));
    assert!(refuse(&selection, rank("blocks.9.attention.query", 2)).contains("not a chosen layer"));
    let query = "blocks.0.attention.query";
    assert!(refuse(&selection, rank(query, 0)).contains("between 1 and 16"));
    assert!(refuse(&selection, rank(query, 17)).contains("between 1 and 16"));
    let nothing = Selection::layers(["layers.*"]);
    assert!(refuse(&nothing, Budget::Keep(0.5)).contains("blocks.0.attention.query"));
    let broken = Selection::layers(["blocks.[*"]);
    assert!(refuse(&broken, Budget::Keep(0.5)).contains("glob"));

    let mut plan = Factorisation::Svd
        .plan(&model, &selection, &Budget::Keep(0.5))
        .unwrap();
    plan.modules[0].output += 1;
    let error = plan.apply(&model, None).unwrap_err();
    assert!(error.to_string().contains("made for this model"));
}

#[test]
fn a_plan_is_data() {
    let model = model(DECODER, 1);
    let selection = Selection::layers(["*.feedforward.*"]);
    let plan = Factorisation::Whitened
        .plan(&model, &selection, &Budget::Keep(0.5))
        .unwrap();
    assert_eq!(plan.modules.len(), 4);
    let text = serde_json::to_string(&plan).unwrap();
    assert!(text.contains("\"whitened\""));
    assert_eq!(
        serde_json::from_str::<lapidary_compress::Plan>(&text).unwrap(),
        plan
    );
    for method in Factorisation::ALL {
        assert_eq!(method.name().parse::<Factorisation>().unwrap(), method);
        let name = serde_json::to_string(&method).unwrap();
        assert_eq!(name, format!("\"{}\"", method.name()));
    }
}

/// Two words on one module contradict each other, or are counted twice.
#[test]
fn a_module_that_is_named_twice_is_refused_by_every_method() {
    let model = model(DECODER, 1);
    let task = Task::new(&model);
    for name in ["svd", "channel-magnitude", "magnitude", "int4"] {
        let method = Method::find(name).unwrap();
        let keep = if method.rounds() { 1.0 } else { 0.7 };
        let mut plan = method.plan(&task, &Budget::Keep(keep)).unwrap();
        assert!(method.apply(&task, &plan).is_ok(), "{name}");
        let first = plan.modules[0].clone();
        let expected = format!("plan is {} more than once", first.path);
        plan.modules.push(first);
        let error = method.apply(&task, &plan).unwrap_err().to_string();
        assert!(error.starts_with(&expected), "{error}");
    }
}

/// What keeps a method from what it was asked for is in the report, and only then.
#[test]
fn a_ratio_that_is_not_reached_is_told() {
    let (model, data) = (model(DECODER, 1), windows(10, 2));
    for (method, ratio, taken) in [
        ("svd", "0.5", None),
        // 208 of the 1792 weights of a block are left at rank 1.
        ("svd", "0.99", Some(1584.0 / 1792.0)),
        ("whitened", "0.99", Some(1584.0 / 1792.0)),
        // Attention is at rank 1, which is too much, and the other layers, with less, make up for it.
        ("svd", "0.88", None),
        ("magnitude", "0.9", None),
        // 3 of 256 weights stay, or 4 of 384.
        ("magnitude", "0.995", Some(1772.0 / 1792.0)),
        ("prune-heads", "0.75", None),
        // One of four heads stays in each block.
        ("prune-heads", "0.9", Some(0.75)),
        ("block-influence", "0.5", None),
        ("channel-magnitude", "0.3", None),
    ] {
        let recipe = Recipe::of(method, ratio).unwrap();
        let done = recipe
            .run(&model, Some(&data), &Settings::default())
            .unwrap();
        let found = &done[0].compressed.report.shortfall;
        match (found, taken) {
            (None, None) => {}
            (Some(found), Some(taken)) => {
                assert!((found.taken - taken).abs() < 1e-12, "{method}: {found}");
                let asked: f64 = ratio.parse().unwrap();
                assert!((found.asked - asked).abs() < 1e-12, "{method}: {found}");
            }
            (found, taken) => panic!("{method} at {ratio}: {found:?}, expected {taken:?}"),
        }
    }
    let done = Recipe::of("svd", "0.99").unwrap();
    let done = done.run(&model, None, &Settings::default()).unwrap();
    assert_eq!(
        done[0]
            .compressed
            .report
            .shortfall
            .as_ref()
            .unwrap()
            .to_string(),
        "of the weights of its layers 99.0 % were to go, and 88.4 % went: 12 of 12 layers are at rank 1, \
         the least there is"
    );
}

/// What a section of the settings says is heard by some method, but for what is about measuring.
#[test]
fn every_section_of_the_settings_is_read_by_a_method() {
    let sections = serde_json::to_value(Settings::default()).unwrap();
    for section in sections.as_object().unwrap().keys() {
        let read = Method::all().iter().any(|method| method.reads(section));
        assert_eq!(read, section != "activations", "{section}");
    }
    let reads = |name: &str, section: &str| Method::find(name).unwrap().reads(section);
    assert!(reads("gptq", "quantise") && !reads("svd", "quantise"));
    assert!(reads("svd", "selection") && !reads("lorap", "selection"));
}

/// Shares in messages are as a reader would write them, and not as `1 - 0.7` is computed.
#[test]
fn shares_are_told_in_few_digits() {
    let (model, data) = (model(DECODER, 1), windows(10, 2));
    let mut pattern = Settings::default();
    pattern.pruning.pattern = Pattern::NOfM { n: 2, m: 4 };
    for (method, ratio, settings, words) in [
        (
            "magnitude",
            0.7,
            pattern,
            "share of weights that magnitude keeps is 0.3, but must be 0.5, which 2 of 4 are",
        ),
        (
            "lorap",
            0.95,
            Settings::default(),
            "at least 1: 0.05 of its weights is too little",
        ),
    ] {
        let error = cut_by(&model, &data, method, 1.0 - ratio, &settings).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
    }
}
