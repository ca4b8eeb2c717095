//! Pruning by what training moves, zeros that change places, and the work that zeros save.
#![allow(clippy::panic, clippy::result_large_err, clippy::unwrap_used)]

use crate::common::{
    DECODER, ENCODER, all, cut_by, labelled, model, scores, text, values, weights, windows, zeros,
};
use lapidary_compress::quality::{Window, block_errors, perplexity};
use lapidary_compress::{
    CalibrationData, Fingerprint, HealData, HealSettings, Method, MovementSettings, Pattern,
    PruneAndHeal, PruneSettings, Scope, Selection, Settings, Size, Target, Work, heal,
    prune_and_heal,
};
use lapidary_model::Model;

fn told(movement: MovementSettings, scope: Option<Scope>) -> Settings {
    Settings {
        pruning: PruneSettings {
            scope,
            movement,
            ..PruneSettings::default()
        },
        ..Settings::default()
    }
}

fn few_steps() -> MovementSettings {
    MovementSettings {
        steps: 6,
        every: 2,
        rate: 1e-3,
        ..MovementSettings::default()
    }
}

fn all_zeros(model: &Model) -> usize {
    weights(model).values().map(|list| zeros(list)).sum()
}

fn masks(model: &Model) -> Vec<bool> {
    let all = weights(model).into_values().flatten();
    all.map(|weight| weight == 0.0).collect()
}

#[test]
fn movement_reaches_its_share_trains_the_rest_and_repeats_itself() {
    for (kind, model, data) in all() {
        let total: usize = weights(&model).values().map(Vec::len).sum();
        let rows = model.linears().iter();
        let rows = rows.filter(|linear| linear.path.starts_with("blocks."));
        let rows: usize = rows.map(|linear| linear.output).sum();
        for (scope, allowed) in [
            (None, 0.5 * weights(&model).len() as f64),
            (Some(Scope::Global), 0.5),
            (Some(Scope::Row), 0.5 * rows as f64),
        ] {
            let settings = told(few_steps(), scope);
            let found = cut_by(&model, &data, "movement", 0.4, &settings).unwrap();
            let apart = (all_zeros(&found.model) as f64 - 0.6 * total as f64).abs();
            assert!(apart <= allowed + 1e-9, "{kind} {scope:?}: {apart}");
            for (path, after) in weights(&found.model) {
                let before = &weights(&model)[&path];
                let pairs = after.iter().zip(before);
                let moved = pairs.filter(|(after, before)| **after != 0.0 && after != before);
                let left = after.len() - zeros(&after);
                // What was masked from the first mask to the last but one is as it was.
                assert!(2 * moved.count() > left, "{kind} {scope:?} {path}");
            }
            let again = cut_by(&model, &data, "movement", 0.4, &settings).unwrap();
            assert_eq!(
                Fingerprint::of(&found.model).unwrap(),
                Fingerprint::of(&again.model).unwrap()
            );
        }
        let whole = cut_by(&model, &data, "movement", 1.0, &Settings::default()).unwrap();
        assert_eq!(
            Fingerprint::of(&whole.model).unwrap(),
            Fingerprint::of(&model).unwrap()
        );
    }
}

#[test]
fn what_was_zero_stays_zero_when_movement_goes_on() {
    let (original, data) = (model(DECODER, 2), windows(10, 2));
    let half = cut_by(&original, &data, "magnitude", 0.5, &Settings::default()).unwrap();
    let settings = told(few_steps(), None);
    for keep in [0.2, 0.7] {
        let found = cut_by(&half.model, &data, "movement", keep, &settings).unwrap();
        let pairs = masks(&half.model).into_iter().zip(masks(&found.model));
        assert!(pairs.into_iter().all(|(before, after)| !before || after));
        let total = masks(&found.model).len() as f64;
        let wanted = f64::max(0.5, 1.0 - keep);
        assert!((all_zeros(&found.model) as f64 / total - wanted).abs() < 0.01);
    }
}

/// With one step that moves nothing, the score is `−w ∂L/∂w`, here by central differences.
#[test]
fn the_score_is_what_the_loss_loses_towards_zero() {
    let (original, data) = (model(DECODER, 2), text(6, 4));
    let path = "blocks.1.attention.value";
    let mut settings = told(
        MovementSettings {
            steps: 1,
            every: 1,
            ramp: 1.0,
            rate: 1e-13,
            ..MovementSettings::default()
        },
        None,
    );
    settings.selection = Selection::layers([path]);
    let found = cut_by(&original, &data, "movement", 0.5, &settings).unwrap();
    let scored: Vec<Window> = data
        .examples()
        .iter()
        .map(|example| match &example.content {
            lapidary_compress::Content::Tokens { ids, .. } => Window {
                tokens: ids.clone(),
                context: 1,
            },
            lapidary_compress::Content::Pixels(_) => panic!("text"),
        })
        .collect();
    let name = format!("{path}.weight");
    let before = values(&original.parameters()[&name]);
    let shape = original.parameters()[&name].dims().to_vec();
    let loss = |index: usize, by: f64| {
        let mut entries = before.clone();
        entries[index] += by;
        let mut parameters = original.parameters().clone();
        let device = lapidary_kernels::Device::Cpu;
        let moved = lapidary_kernels::Tensor::from_vec(entries, shape.as_slice(), &device).unwrap();
        parameters.insert(name.clone(), moved);
        let moved = Model::new(original.spec().clone(), &mut parameters).unwrap();
        perplexity(&moved, &scored, 8).unwrap().value.ln()
    };
    let after = values(&found.model.parameters()[&name]);
    assert_eq!(zeros(&after), before.len() / 2);
    let (mut gone, mut kept) = (f64::NEG_INFINITY, f64::INFINITY);
    for (index, (weight, after)) in before.iter().zip(&after).enumerate() {
        let slope = (loss(index, 1e-5) - loss(index, -1e-5)) / 2e-5;
        let score = -weight * slope;
        match *after == 0.0 {
            true => gone = gone.max(score),
            false => kept = kept.min(score),
        }
    }
    assert!(gone <= kept + 1e-8, "{gone} {kept}");
}

#[test]
fn movement_keeps_patterns_and_refuses_what_means_nothing() {
    let (original, data) = (model(DECODER, 2), windows(10, 2));
    let mut settings = told(few_steps(), None);
    settings.pruning.pattern = Pattern::NOfM { n: 2, m: 4 };
    let found = cut_by(&original, &data, "movement", 0.5, &settings).unwrap();
    for (path, weights) in weights(&found.model) {
        let fours = weights.chunks(4);
        assert!(fours.into_iter().all(|four| zeros(four) == 2), "{path}");
    }
    let error = cut_by(&original, &data, "movement", 0.4, &settings).err();
    assert!(error.unwrap().to_string().contains("2 of 4"));
    for (movement, words) in [
        (
            MovementSettings {
                steps: 0,
                ..few_steps()
            },
            "steps of movement",
        ),
        (
            MovementSettings {
                every: 0,
                ..few_steps()
            },
            "between two masks",
        ),
        (
            MovementSettings {
                held_out: 1,
                ..few_steps()
            },
            "pruning.movement.held_out is 1",
        ),
        (
            MovementSettings {
                ramp: 0.0,
                ..few_steps()
            },
            "in which zeros grow",
        ),
        (
            MovementSettings {
                rate: f64::NAN,
                ..few_steps()
            },
            "rate of movement",
        ),
        (
            MovementSettings {
                weight_decay: -0.1,
                ..few_steps()
            },
            "decay of the weights that movement keeps is -0.1",
        ),
    ] {
        let error = cut_by(&original, &data, "movement", 0.5, &told(movement, None)).err();
        let error = error.unwrap().to_string();
        assert!(error.contains(words), "{error}");
    }
}

/// Held-out examples that say the opposite of those trained on are best met by what was trained least: the model
/// that has just got its last mask. Its zeros are those of the last step, since both trained alike.
#[test]
fn the_best_on_held_out_examples_comes_out() {
    let original = model(ENCODER, 4);
    let examples = labelled(12, 3, 4).examples().to_vec();
    let contents = (0..12).map(|index| (index, examples[index - index % 3].clone()));
    let (mut training, mut held_out) = (Vec::new(), Vec::new());
    let mut mixed = Vec::new();
    for (index, mut example) in contents {
        let opposite = index % 3 == 1;
        example.target = Target::Label(u32::from(opposite));
        mixed.push(example.clone());
        match opposite {
            true => held_out.push(example),
            false => training.push(example),
        }
    }
    let [mixed, training, held_out] =
        [mixed, training, held_out].map(|examples| CalibrationData::new(examples).unwrap());
    let moved = |data: &CalibrationData, one_of: usize| {
        let settings = MovementSettings {
            steps: 20,
            every: 2,
            ramp: 0.3,
            rate: 1e-2,
            held_out: one_of,
            ..MovementSettings::default()
        };
        cut_by(&original, data, "movement", 0.5, &told(settings, None))
            .unwrap()
            .model
    };
    let (last, best) = (moved(&training, 0), moved(&mixed, 3));
    assert_eq!(masks(&last), masks(&best));
    let loss = |model: &Model, label: usize| -> f64 {
        let scores = scores(model, &held_out);
        let losses = scores.chunks(3).map(|scores| {
            let terms = scores.iter().map(|score| (score - scores[label]).exp());
            terms.sum::<f64>().ln()
        });
        losses.sum()
    };
    let (first, behind) = (loss(&best, 1), loss(&last, 1));
    assert!(first < behind, "{first} {behind}");
    // Where they say the same, training does not make it worse, and the last is among what was measured.
    let same = mixed.examples().iter().cloned().map(|mut example| {
        example.target = Target::Label(0);
        example
    });
    let same = CalibrationData::new(same.collect()).unwrap();
    let best = moved(&same, 3);
    assert_eq!(masks(&last), masks(&best));
    assert!(loss(&best, 0) <= loss(&last, 0) + 1e-12);
    let one = CalibrationData::new(training.examples()[..1].to_vec()).unwrap();
    let settings = told(
        MovementSettings {
            held_out: 3,
            ..few_steps()
        },
        None,
    );
    let error = cut_by(&original, &one, "movement", 0.5, &settings).err();
    let error = error.unwrap().to_string();
    assert!(error.contains("examples of movement is 1"), "{error}");
}

fn healing() -> HealSettings {
    HealSettings {
        steps: 30,
        rate: 1e-2,
        weight_decay: 0.1,
        patience: 0,
        ..HealSettings::default()
    }
}

#[test]
fn zeros_change_places_and_stay_as_many() {
    let (original, training, validation) = (model(DECODER, 3), text(40, 1), text(10, 2));
    let pruned = cut_by(&original, &training, "magnitude", 0.4, &Settings::default()).unwrap();
    let data = HealData {
        training: &training,
        validation: &validation,
        teacher: None,
    };
    let healed = |regrow: f64| {
        let settings = HealSettings {
            regrow,
            regrow_every: 2,
            ..healing()
        };
        heal(&pruned.model, &data, &settings, |_, _| ()).unwrap()
    };
    let (fixed, report) = healed(0.0);
    assert_eq!(report.regrown, 0);
    assert_eq!(masks(&fixed), masks(&pruned.model));
    let (turned, report) = healed(0.5);
    assert!(report.best > 0 && report.regrown > 0, "{report:?}");
    assert_ne!(masks(&turned), masks(&pruned.model));
    for (path, after) in weights(&turned) {
        assert_eq!(
            zeros(&after),
            zeros(&weights(&pruned.model)[&path]),
            "{path}"
        );
    }
    let (again, _) = healed(0.5);
    assert_eq!(
        Fingerprint::of(&turned).unwrap(),
        Fingerprint::of(&again).unwrap()
    );
}

/// What is reported is of the model that comes out, not of the one that training ended with.
#[test]
fn nothing_regrew_where_the_unhealed_model_was_best() {
    let (original, training) = (model(DECODER, 3), text(20, 1));
    let pruned = cut_by(&original, &training, "magnitude", 0.4, &Settings::default()).unwrap();
    let data = HealData {
        training: &training,
        validation: &training,
        teacher: None,
    };
    // Steps many times as large as weights are, behind which nothing is left of what was learned.
    let settings = HealSettings {
        steps: 8,
        rate: 10.0,
        weight_decay: 0.0,
        every: 8,
        regrow: 0.5,
        regrow_every: 2,
        ..healing()
    };
    let (found, report) = heal(&pruned.model, &data, &settings, |_, _| ()).unwrap();
    assert_eq!((report.best, report.regrown), (0, 0), "{report:?}");
    assert_eq!(masks(&found), masks(&pruned.model));
}

#[test]
fn zeros_that_may_not_move_are_not_asked_to() {
    let (original, training) = (model(DECODER, 3), text(10, 1));
    let data = HealData {
        training: &training,
        validation: &training,
        teacher: None,
    };
    for (settings, words) in [
        (
            HealSettings {
                regrow: 1.0,
                ..healing()
            },
            "below 1",
        ),
        (
            HealSettings {
                regrow: 0.5,
                keep_zeros: false,
                ..healing()
            },
            "zeros are not kept",
        ),
    ] {
        let error = heal(&original, &data, &settings, |_, _| ()).err().unwrap();
        assert!(error.to_string().contains(words), "{error}");
    }
    let mut settings = Settings::default();
    settings.pruning.pattern = Pattern::NOfM { n: 2, m: 4 };
    let told = PruneAndHeal {
        method: Method::find("magnitude").unwrap(),
        settings: &settings,
        calibration: &training,
        keep: 0.5,
        rounds: 1,
        rewind: None,
        healing: &HealSettings {
            regrow: 0.5,
            ..healing()
        },
    };
    let error = prune_and_heal(&original, &data, &told).err().unwrap();
    assert!(error.to_string().contains("pattern"), "{error}");
}

/// The term of the streams is the mean over blocks of their squared relative errors.
#[test]
fn streams_are_learned_by_their_squared_relative_errors() {
    let (original, training, validation) = (model(DECODER, 3), text(40, 1), text(10, 2));
    let pruned = cut_by(&original, &training, "magnitude", 0.5, &Settings::default()).unwrap();
    let data = HealData {
        training: &training,
        validation: &validation,
        teacher: Some(&original),
    };
    let healed = |hints: f64| {
        let settings = HealSettings {
            hints,
            // One batch of the validation examples.
            batch: 10,
            ..healing()
        };
        heal(&pruned.model, &data, &settings, |_, _| ()).unwrap()
    };
    let error = |model: &Model| {
        let errors = block_errors(&original, model, &validation, 10).unwrap();
        errors.iter().map(|error| error * error).sum::<f64>() / errors.len() as f64
    };
    let ((plain, without), (taught, with)) = (healed(0.0), healed(200.0));
    let term = with.before - without.before;
    let expected = 200.0 * error(&pruned.model);
    assert!((term / expected - 1.0).abs() < 1e-9, "{term} {expected}");
    assert!(error(&taught) < error(&pruned.model));
    assert!(error(&taught) < error(&plain));
}

#[test]
fn a_zero_saves_a_multiply_add_for_each_row_and_heads_save_theirs() {
    let (original, data) = (model(DECODER, 2), windows(10, 2));
    let length = 7;
    let whole = Work::of(&original, length).unwrap();
    let dense = (Size::of(&original).flops_per_token * length) as u64;
    assert!(whole.operations > dense, "{whole:?} {dense}");
    let mut last = whole;
    for keep in [0.7, 0.4, 0.1] {
        let pruned = cut_by(&original, &data, "magnitude", keep, &Settings::default()).unwrap();
        let found = Work::of(&pruned.model, length).unwrap();
        let saved = 2 * (all_zeros(&pruned.model) * length) as u64;
        assert_eq!(found.operations, whole.operations - saved);
        assert!(found.bytes <= last.bytes);
        last = found;
    }
    assert!(last.bytes < whole.bytes);
    let channels = cut_by(
        &original,
        &data,
        "channel-magnitude",
        0.5,
        &Settings::default(),
    )
    .unwrap();
    let found = Work::of(&channels.model, length).unwrap();
    assert!(found.operations < whole.operations && found.bytes < whole.bytes);
    assert!(Work::of(&original, 13).is_err() && Work::of(&original, 0).is_err());
}
