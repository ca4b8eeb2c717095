//! Plans written by hand, and settings that mean nothing.

use super::{STRUCTURED, WEIGHTS, settings};
use crate::common::{DECODER, ENCODER, cut_by, labelled, model, values, weights, windows, zeros};
use lapidary_compress::{
    Budget, Calibration, CalibrationOptions, Change, Method, Pattern, PruneSettings, Selection,
    Settings, Task,
};
use lapidary_model::Model;

#[test]
fn a_plan_written_by_hand_is_obeyed_or_refused() {
    let decoder = model(DECODER, 2);
    let data = windows(4, 2);
    let method = Method::find("magnitude").unwrap();
    let task = Task::new(&decoder);
    let mut plan = method.plan(&task, &Budget::Keep(0.5)).unwrap();
    plan.modules[0].change = Change::Prune { share: 1.0 };
    plan.modules[1].change = Change::Leave {
        reason: "because".into(),
    };
    let found = weights(&method.apply(&task, &plan).unwrap().model);
    let at = |index: usize| &found[&plan.modules[index].path];
    assert_eq!(zeros(at(0)), at(0).len());
    assert_eq!(zeros(at(1)), 0);
    for (path, change) in [
        ("blocks.0.attention.query", Change::Prune { share: 1.5 }),
        ("blocks.0.attention.query", Change::Remove),
        ("blocks.7.attention.query", Change::Prune { share: 0.5 }),
    ] {
        plan.modules[0].path = path.into();
        plan.modules[0].change = change;
        assert!(method.apply(&task, &plan).is_err());
    }
    let method = Method::find("prune-heads").unwrap();
    let requirements = method.requirements(&decoder, &Settings::default()).unwrap();
    let options = CalibrationOptions::default();
    let calibration = Calibration::collect(&decoder, &data, &requirements, options).unwrap();
    let task = Task {
        calibration: Some(&calibration),
        ..task
    };
    let mut plan = method.plan(&task, &Budget::Keep(0.5)).unwrap();
    for (heads, right) in [(0, false), (1, true), (4, true), (5, false)] {
        plan.modules[0].change = Change::FewerHeads { heads };
        assert_eq!(method.apply(&task, &plan).is_ok(), right, "{heads}");
    }
}

#[test]
fn settings_that_mean_nothing_are_refused_in_words() {
    let decoder = model(DECODER, 2);
    let usual = PruneSettings::default;
    for (pruning, words) in [
        (
            PruneSettings {
                pattern: Pattern::NOfM { n: 4, m: 4 },
                ..usual()
            },
            "4 of 4",
        ),
        (
            PruneSettings {
                keep_at_least: 1.0,
                ..usual()
            },
            "share that each matrix keeps",
        ),
        (
            PruneSettings {
                damping: 0.0,
                ..usual()
            },
            "damping",
        ),
        (
            PruneSettings {
                block: 0,
                ..usual()
            },
            "columns of a block",
        ),
    ] {
        for method in WEIGHTS.into_iter().chain(STRUCTURED) {
            let method = Method::find(method).unwrap();
            let error = method
                .requirements(&decoder, &settings(pruning.clone()))
                .unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
        }
    }
    let alibi = model(
        &DECODER.replace(
            "causal = true",
            "causal = true, position = { kind = \"alibi\" }",
        ),
        1,
    );
    let error = Method::find("prune-heads")
        .unwrap()
        .requirements(&alibi, &Settings::default());
    assert!(
        error
            .unwrap_err()
            .to_string()
            .contains("how many there are")
    );
    let table = Settings {
        selection: Selection {
            embeddings: true,
            ..Selection::default()
        },
        ..Settings::default()
    };
    let error = Method::find("second-order")
        .unwrap()
        .requirements(&decoder, &table);
    assert!(error.unwrap_err().to_string().contains("vocabulary"));
    // The others take the table.
    for method in ["magnitude", "random-weights", "first-order", "wanda"] {
        let encoder = model(ENCODER, 1);
        let found = cut_by(&encoder, &labelled(6, 3, 1), method, 0.5, &table).unwrap();
        let name = "embeddings.tokens.weight";
        assert!(
            zeros(&values(&found.model.parameters()[name])) > 0,
            "{method}"
        );
        let positions = "embeddings.positions.weight";
        let untouched = |model: &Model| {
            let others = model.parameters().iter();
            let others = others.filter(|(name, _)| {
                name.ends_with("bias") || name.contains("norm") || *name == positions
            });
            others.map(|(_, tensor)| values(tensor)).collect::<Vec<_>>()
        };
        assert_eq!(untouched(&found.model), untouched(&encoder), "{method}");
    }
}
