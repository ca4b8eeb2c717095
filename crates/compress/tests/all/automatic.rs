//! Mixes of methods: the budget is kept, modules are those of their methods, searches repeat
//! themselves and go on where they stopped.
#![allow(clippy::panic, clippy::result_large_err, clippy::unwrap_used)]

use std::collections::BTreeSet;

use crate::common;
use crate::common::{
    DECODER, ENCODER, GATED, close, family, images, labelled, model, scores, values, windows,
};
use lapidary_compress::automatic::{Automatic, AutomaticSettings, AutomaticState, Mix, Score};
use lapidary_compress::{
    Calibration, CalibrationData, CalibrationOptions, Change, Method, ModulePlan, Plan,
    Requirements, Settings, Task,
};
use lapidary_model::{Model, OpenOptions, Package};
use lapidary_search::Point;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// A wider decoder of four blocks, so that there is something to choose.
fn decoder() -> Model {
    let spec = DECODER.replace("width = 16", "width = 24");
    model(
        &spec
            .replace("hidden = 24", "hidden = 40")
            .replace("repeat = 2", "repeat = 4"),
        5,
    )
}

fn settings(model: &Model, share: f64, methods: &[&str]) -> AutomaticSettings {
    AutomaticSettings {
        methods: methods.iter().map(|name| (*name).to_owned()).collect(),
        evaluations: 14,
        ..AutomaticSettings::new((share * model.parameter_count() as f64) as usize)
    }
}

const ALL: [&str; 5] = [
    "block-influence",
    "channel-magnitude",
    "fwsvd",
    "modegpt",
    "whitened",
];

/// Points of a search's domain, drawn.
fn points(search: &Automatic<'_>, count: usize) -> Vec<Point> {
    let mut generator = ChaCha8Rng::seed_from_u64(3);
    let domain = search.state().search.domain();
    (0..count).map(|_| domain.random(&mut generator)).collect()
}

fn run(search: &mut Automatic<'_>) {
    while !search.is_finished() {
        search.step().unwrap();
    }
}

/// What each method needs, on one calibration.
fn calibrated(model: &Model, data: &CalibrationData) -> Calibration {
    let settings = Settings::default();
    let requirements = ALL.iter().map(|name| {
        let method = Method::find(name).unwrap();
        method.requirements(model, &settings).unwrap()
    });
    let all = requirements.fold(Requirements::default(), Requirements::union);
    Calibration::collect(model, data, &all, CalibrationOptions::default()).unwrap()
}

#[test]
fn every_proposal_fits_the_budget_and_spends_it() {
    let model = decoder();
    let (data, held_out) = (windows(8, 1), windows(3, 2));
    for share in [0.6, 0.75, 0.9] {
        let methods = ["block-influence", "channel-magnitude", "fwsvd", "whitened"];
        let settings = settings(&model, share, &methods);
        let limit = settings.parameters;
        let mut search = Automatic::new(&model, &data, &held_out, settings).unwrap();
        let mut removals = BTreeSet::new();
        for point in points(&search, 25) {
            let mix = search.mix(&point).unwrap();
            let composed = search.compose(&mix).unwrap();
            assert_eq!(composed.parameter_count(), mix.parameters);
            assert!(mix.parameters <= limit, "{} above {limit}", mix.parameters);
            removals.insert(point[0]);
            let cut = mix
                .plans
                .iter()
                .any(|plan| plan.method != "block-influence");
            // One more direction of a feed-forward matrix would be the largest step.
            let step = 2 * (24 + 40) + 24;
            assert!(
                !cut || mix.parameters + step > limit,
                "{} of {limit}",
                mix.parameters
            );
        }
        // 0.6 and 0.75 of this model are less than it has without one block.
        assert_eq!(removals.len() > 1, share < 0.8, "{removals:?}");
    }
}

#[test]
fn only_ratios_of_densities_count() {
    let model = decoder();
    let (data, held_out) = (windows(8, 1), windows(3, 2));
    let settings = settings(&model, 0.7, &["whitened"]);
    let search = Automatic::new(&model, &data, &held_out, settings).unwrap();
    let count = search.state().search.domain().dimensions();
    let at = |levels: &[usize]| {
        let places = (1..count).map(|i| levels[i % levels.len()]);
        search
            .mix(&std::iter::once(0).chain(places).collect::<Vec<_>>())
            .unwrap()
    };
    // Nine levels from a half to two: four further is twice as dense.
    assert_eq!(at(&[0]), at(&[8]));
    assert_eq!(at(&[0, 4]), at(&[4, 8]));
    assert_eq!(at(&[1, 3]), at(&[5, 7]));
    assert_ne!(at(&[0, 1]), at(&[1, 0]));
}

#[test]
fn modules_of_a_mix_are_those_of_their_methods() {
    let model = decoder();
    let (data, held_out) = (windows(8, 1), windows(3, 2));
    let calibration = calibrated(&model, &data);
    let settings = settings(&model, 0.6, &ALL[1..]);
    let mut search = Automatic::new(&model, &data, &held_out, settings).unwrap();
    let mut seen = BTreeSet::new();
    for point in points(&search, 12) {
        let mix = search.mix(&point).unwrap();
        let composed = search.compose(&mix).unwrap();
        for plan in &mix.plans {
            seen.insert(plan.method.clone());
            let task = Task {
                calibration: Some(&calibration),
                data: Some(&data),
                ..Task::new(&model)
            };
            let alone = Method::find(&plan.method)
                .unwrap()
                .apply(&task, plan)
                .unwrap()
                .model;
            for planned in &plan.modules {
                let inside = |name: &str| name.starts_with(&format!("{}.", planned.path));
                let mut compared = 0;
                for (name, expected) in alone.parameters() {
                    if inside(name) {
                        assert_eq!(
                            values(expected),
                            values(&composed.parameters()[name]),
                            "{name}"
                        );
                        compared += 1;
                    }
                }
                let found = composed.parameters().keys().filter(|name| inside(name));
                assert!(
                    compared > 1 && found.count() == compared,
                    "{}",
                    planned.path
                );
            }
        }
    }
    assert_eq!(seen.len(), 4, "{seen:?}");
}

#[test]
fn blocks_go_after_the_rest_is_cut() {
    let model = decoder();
    let (data, held_out) = (windows(8, 1), windows(3, 2));
    let settings = settings(&model, 0.6, &["block-influence", "whitened"]);
    let mut search = Automatic::new(&model, &data, &held_out, settings).unwrap();
    let mut point = points(&search, 1).remove(0);
    point[0] = 1;
    let mix = search.mix(&point).unwrap();
    let composed = search.compose(&mix).unwrap();
    let plan = |method: &str| mix.plans.iter().find(|plan| plan.method == method).unwrap();
    let gone = &plan("block-influence").modules[0];
    assert_eq!(gone.change, Change::Remove);
    assert_eq!(composed.spec().expanded_blocks().len(), 3);
    // By hand: the ranks first, then the block.
    let calibration = calibrated(&model, &data);
    let cut = plan("whitened")
        .apply(&model, Some(&calibration))
        .unwrap()
        .model;
    assert!(
        plan("whitened")
            .modules
            .iter()
            .all(|m| !m.path.starts_with(&format!("{}.", gone.path)))
    );
    let shorter = Plan {
        method: "block-influence".to_owned(),
        modules: plan("block-influence").modules.clone(),
    };
    let shorter = shorter.apply(&cut, None).unwrap().model;
    close(&scores(&composed, &data), &scores(&shorter, &data), 1e-12);
}

#[test]
fn the_best_mix_is_no_worse_than_uniform_ones_and_repeats() {
    let model = decoder();
    let (data, held_out) = (windows(8, 1), windows(4, 2));
    let settings = settings(&model, 0.6, &ALL);
    let mut search = Automatic::new(&model, &data, &held_out, settings.clone()).unwrap();
    run(&mut search);
    let names = search.baselines();
    assert_eq!(
        names,
        [
            "uniform channel-magnitude",
            "uniform fwsvd",
            "uniform modegpt",
            "uniform whitened"
        ]
    );
    let evaluations = &search.state().evaluations;
    assert_eq!(evaluations.len(), 14);
    let best = search.best().unwrap().1.loss;
    assert!(evaluations.iter().all(|one| one.loss >= best));
    // Uniform mixes have one method wherever it can be used.
    let uniform = search.mix(&evaluations[3].point).unwrap();
    assert!(
        uniform.plans.iter().all(|plan| plan.method == "whitened"),
        "{uniform:?}"
    );
    let mut again = Automatic::new(&model, &data, &held_out, settings).unwrap();
    run(&mut again);
    assert_eq!(search.state(), again.state());
    let found = search.best_model().unwrap();
    assert_eq!(found.model.parameter_count(), found.report.after.parameters);
    assert_eq!(found.report.method, "auto");
    let mix = search.best().unwrap().0;
    let planned: usize = mix.plans.iter().map(|plan| plan.modules.len()).sum();
    assert_eq!(found.report.modules.len(), planned);
    let saved = found
        .report
        .modules
        .iter()
        .map(|m| m.parameters_before - m.parameters_after);
    assert_eq!(
        saved.sum::<usize>(),
        model.parameter_count() - mix.parameters
    );
}

#[test]
fn a_search_goes_on_from_its_state() {
    let model = decoder();
    let (data, held_out) = (windows(8, 1), windows(4, 2));
    let settings = settings(&model, 0.6, &ALL);
    let new =
        |settings: AutomaticSettings| Automatic::new(&model, &data, &held_out, settings).unwrap();
    let mut whole = new(settings.clone());
    run(&mut whole);
    let fewer = AutomaticSettings {
        evaluations: 6,
        ..settings.clone()
    };
    let mut first = new(fewer);
    run(&mut first);
    let text = serde_json::to_string(first.state()).unwrap();
    let state: AutomaticState = serde_json::from_str(&text).unwrap();
    let mut resumed = new(settings.clone()).resumed(state.clone()).unwrap();
    run(&mut resumed);
    assert_eq!(resumed.state(), whole.state());

    let refused = |search: Automatic<'_>, state: AutomaticState, word: &str| {
        let error = search.resumed(state).unwrap_err().to_string();
        assert!(error.contains(word), "{word:?} is not in {error}");
    };
    let seeded = AutomaticSettings {
        seed: 1,
        ..settings.clone()
    };
    refused(
        new(seeded),
        state.clone(),
        "seed of the search's state is 0, but must be 1, or it is the state of another search",
    );
    let other = common::altered(&model, "blocks.0.feedforward.up.bias", |t| {
        (t + 1.0).unwrap()
    });
    let search = Automatic::new(&other, &data, &held_out, settings.clone()).unwrap();
    refused(search, state.clone(), "weights");
    let less = windows(7, 1);
    let search = Automatic::new(&model, &less, &held_out, settings.clone()).unwrap();
    refused(search, state.clone(), "calibration data");
    let search = Automatic::new(&model, &data, &less, settings.clone()).unwrap();
    refused(search, state.clone(), "held-out data");
    let mut broken = state;
    broken.evaluations.pop();
    refused(new(settings), broken, "do not fit together");
}

#[test]
fn what_cannot_be_searched_is_refused_with_the_reason() {
    let model = decoder();
    let (data, held_out) = (windows(8, 1), windows(4, 2));
    let refused = |settings: AutomaticSettings, word: &str| {
        let error = Automatic::new(&model, &data, &held_out, settings)
            .unwrap_err()
            .to_string();
        assert!(error.contains(word), "{word:?} is not in {error}");
    };
    refused(settings(&model, 0.01, &["whitened"]), "at least");
    refused(settings(&model, 0.7, &["whitend"]), "one of");
    refused(
        settings(&model, 0.7, &["block-influence", "entropy-blocks"]),
        "at most one",
    );
    refused(settings(&model, 0.7, &[]), "at least one");
    refused(
        settings(&model, 0.7, &["block-influence"]),
        "methods to mix is block-influence alone, which leaves out whole blocks, but must be with at least one",
    );
    for name in ["fusegpt", "fuse-lora", "movement"] {
        refused(settings(&model, 0.7, &[name]), "it trains while it cuts");
    }
    // What is never mixed is told as that, whichever of its plans could be made.
    refused(
        settings(&model, 0.7, &["slicegpt"]),
        "what slicegpt changes is neither the rank",
    );
    let none = AutomaticSettings {
        evaluations: 0,
        ..settings(&model, 0.7, &["svd"])
    };
    refused(none, "at least 1");
}

/// A search for pieces of blocks would come to nothing, and on single tokens, of which none is predicted, it
/// would be told as the reason.
#[test]
fn what_is_never_mixed_is_left_out_before_it_looks_at_the_model() {
    let model = decoder();
    let (held_out, whole) = (windows(4, 2), windows(8, 1));
    let single = CalibrationData::windows([vec![1], vec![2]]).unwrap();
    let names = ["mamba-shedder", "svd", "replaceme", "wanda", "int4"];
    for data in [&single, &whole] {
        let settings = settings(&model, 0.7, &names);
        let search = Automatic::new(&model, data, &held_out, settings).unwrap();
        assert_eq!(search.baselines(), ["uniform svd"]);
        let left_out: Vec<&str> = search
            .left_out()
            .iter()
            .map(|(name, _)| &name[..])
            .collect();
        assert_eq!(left_out, ["mamba-shedder", "replaceme", "wanda", "int4"]);
        for (name, reason) in search.left_out() {
            let found = format!("what {name} changes is neither the rank");
            assert!(reason.starts_with(&found), "{reason}");
        }
    }
}

#[test]
fn features_that_are_searched_for_are_mixed_too() {
    let decoder = model(DECODER, 5);
    let (data, held_out) = (windows(6, 1), windows(3, 2));
    let settings = settings(&decoder, 0.8, &["mamba-shedder-width", "whitened"]);
    let limit = settings.parameters;
    let mut search = Automatic::new(&decoder, &data, &held_out, settings).unwrap();
    assert!(search.left_out().is_empty(), "{:?}", search.left_out());
    assert_eq!(
        search.baselines(),
        ["uniform mamba-shedder-width", "uniform whitened"]
    );
    let mut narrowed = 0;
    for point in points(&search, 12) {
        let mix = search.mix(&point).unwrap();
        let composed = search.compose(&mix).unwrap();
        assert_eq!(composed.parameter_count(), mix.parameters);
        assert!(mix.parameters <= limit);
        let modules = mix.plans.iter().flat_map(|plan| &plan.modules);
        let narrow = |module: &&ModulePlan| matches!(module.change, Change::Narrow { .. });
        narrowed += modules.filter(narrow).count();
    }
    assert!(narrowed > 0);
}

#[test]
fn a_method_that_is_named_twice_is_one() {
    let model = decoder();
    let (data, held_out) = (windows(8, 1), windows(4, 2));
    let twice = [
        "block-influence",
        "activation",
        "block-influence",
        "activation-weighted",
    ];
    let new = |methods: &[&str]| {
        Automatic::new(&model, &data, &held_out, settings(&model, 0.7, methods)).unwrap()
    };
    let (once, twice) = (new(&twice[..2]), new(&twice));
    assert_eq!(once.state().search.domain(), twice.state().search.domain());
    assert_eq!(once.baselines(), twice.baselines());
}

#[test]
fn methods_that_a_model_does_not_allow_are_left_out() {
    let (encoder, data) = (model(ENCODER, 1), labelled(8, 3, 1));
    let held_out = labelled(3, 3, 2);
    let mut settings = settings(&encoder, 0.8, &ALL);
    settings.evaluations = 3;
    let mut search = Automatic::new(&encoder, &data, &held_out, settings).unwrap();
    assert!(matches!(search.score(), Score::Loss(_)));
    let left_out = search.left_out().to_vec();
    assert!(
        left_out
            .iter()
            .any(|(name, why)| name == "block-influence" && why.contains("post-norm"))
    );
    run(&mut search);
    let gated = model(GATED, 1);
    let (data, held_out) = (windows(8, 1), windows(3, 2));
    let mut settings = self::settings(&gated, 0.8, &ALL);
    settings.evaluations = 3;
    let mut search = Automatic::new(&gated, &data, &held_out, settings).unwrap();
    assert!(search.left_out().is_empty(), "{:?}", search.left_out());
    run(&mut search);
}

#[test]
fn published_families_are_searched() {
    for name in [
        "bert",
        "gpt2",
        "llama",
        "llama-tied",
        "mamba",
        "mistral",
        "mixtral",
        "olmoe",
        "opt",
        "qwen2",
        "roberta-classifier",
        "vit",
    ] {
        let package = Package::open(&family(name), &OpenOptions::default()).unwrap();
        let model = package.single_model().unwrap();
        let data = match model.spec().vocabulary() {
            Some(_) => windows(6, 15),
            None => images(model, 4),
        };
        let mut settings = settings(model, 0.9, &["block-influence", "modegpt", "whitened"]);
        settings.evaluations = 3;
        let limit = settings.parameters;
        let mut search = Automatic::new(model, &data, &data, settings)
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        run(&mut search);
        let found = search.best_model().unwrap().model;
        assert!(found.parameter_count() <= limit, "{name}");
        assert!(search.best().unwrap().1.loss.is_finite(), "{name}");
    }
    // ALBERT's blocks share their weights.
    let package = Package::open(&family("albert"), &OpenOptions::default()).unwrap();
    let model = package.single_model().unwrap();
    let data = windows(6, 15);
    let error = Automatic::new(model, &data, &data, settings(model, 0.9, &["whitened"]));
    assert!(
        error
            .unwrap_err()
            .to_string()
            .contains("shared by several blocks")
    );
}

/// The plans of a mix are plans like any other.
#[test]
fn a_mix_of_one_method_is_what_the_method_makes_of_its_plan() {
    let model = decoder();
    let (data, held_out) = (windows(8, 1), windows(3, 2));
    let calibration = calibrated(&model, &data);
    let settings = settings(&model, 0.7, &["fwsvd"]);
    let mut search = Automatic::new(&model, &data, &held_out, settings).unwrap();
    let point = points(&search, 1).remove(0);
    let mix: Mix = search.mix(&point).unwrap();
    let [plan] = mix.plans.as_slice() else {
        panic!("{mix:?}");
    };
    let alone = plan.apply(&model, Some(&calibration)).unwrap().model;
    let composed = search.compose(&mix).unwrap();
    assert_eq!(scores(&alone, &data), scores(&composed, &data));
    assert_eq!(alone.spec(), &{
        let mut spec = composed.spec().clone();
        spec.blocks.clone_from(&model.spec().blocks);
        spec
    });
}
