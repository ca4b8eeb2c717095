//! A run of blocks replaced by a linear map that the block before it absorbs.
#![allow(clippy::unwrap_used)]

use crate::common::{
    DECODER, ENCODER, GATED, altered, close, distance, model, scores, silenced, task, values,
    windows,
};
use lapidary_compress::{
    Budget, CalibrationData, Change, Compressed, CosineDescent, DescentSolver, MapForm, Method,
    ReplaceMe, RunInput, Settings, Task, angular_distances, run_regression,
};
use lapidary_factor::{AffineMap, Matrix};
use lapidary_kernels::Tensor;
use lapidary_model::Model;

fn compress(
    method: &str,
    model: &Model,
    data: &CalibrationData,
    keep: f64,
    settings: &Settings,
) -> Compressed {
    let method = Method::find(method).unwrap();
    let task = task(model, data, settings);
    let plan = method.plan(&task, &Budget::Keep(keep)).unwrap();
    method.apply(&task, &plan).unwrap()
}

fn blocks(count: usize) -> String {
    DECODER.replace("repeat = 2", &format!("repeat = {count}"))
}

fn gone(compressed: &Compressed) -> Vec<usize> {
    let modules = compressed.report.modules.iter().enumerate();
    modules
        .filter(|(_, module)| !matches!(module.change, Change::Leave { .. }))
        .map(|(index, _)| index)
        .collect()
}

/// Zeros where `zero(row, column)`.
fn masked(tensor: &Tensor, zero: impl Fn(usize, usize) -> bool) -> Tensor {
    let (rows, columns) = tensor.dims2().unwrap();
    let numbers = values(tensor).into_iter().enumerate();
    let numbers: Vec<f64> = numbers
        .map(|(at, value)| {
            if zero(at / columns, at % columns) {
                0.0
            } else {
                value
            }
        })
        .collect();
    Tensor::from_vec(numbers, (rows, columns), tensor.device()).unwrap()
}

#[test]
fn a_run_that_does_nothing_is_chosen_and_not_missed() {
    for block in [1, 2] {
        let data = windows(30, 4);
        let model = silenced(&model(&blocks(4), 2), block);
        let compressed = compress("replaceme", &model, &data, 0.75, &Settings::default());
        assert_eq!(gone(&compressed), [block]);
        assert_eq!(
            compressed.report.modules[block].change,
            Change::Linearise { blocks: 1 }
        );
        assert_eq!(compressed.model.spec().expanded_blocks().len(), 3);
        assert!(compressed.report.modules[block].chosen.unwrap().weighted < 1e-9);
        // The map is the identity: what leaving the block out gives, on other text too.
        let other = windows(5, 99);
        close(
            &scores(&compressed.model, &other),
            &scores(&model, &other),
            1e-8,
        );
    }
}

/// The map is exact on every input where what the run adds is a linear function of what the block
/// before it adds: a linear block that reads only directions in which nothing but that lies.
#[test]
fn a_linear_run_that_reads_what_the_block_adds_is_replaced_exactly() {
    let linear = r#"
[[blocks]]
norm = { kind = "none" }
attention = { kind = "absent" }
feedforward = { kind = "linear", bias = false }
[[blocks]]
attention = { kind = "multi-head", heads = 4, causal = true }
feedforward = { kind = "dense", hidden = 24 }
[head]"#;
    let spec = blocks(1).replace("[head]", linear);
    let mut model = model(&spec, 5);
    for name in ["embeddings.tokens.weight", "embeddings.positions.weight"] {
        model = altered(&model, name, |w| masked(w, |_, column| column >= 8));
    }
    model = altered(&model, "blocks.0.attention.output.weight", |w| {
        masked(w, |row, _| row >= 8)
    });
    model = altered(&model, "blocks.0.attention.output.bias", |b| {
        let column = b.unsqueeze(1).unwrap();
        masked(&column, |row, _| row >= 8).squeeze(1).unwrap()
    });
    // With a map that also reads the stream before the addition, it cannot be.
    let general = Model::new(model.spec().clone(), &mut model.parameters().clone()).unwrap();
    model = altered(&model, "blocks.1.feedforward.map.weight", |w| {
        masked(w, |_, column| column < 8)
    });
    let (data, other) = (windows(30, 6), windows(5, 77));
    for (model, exact) in [(&model, true), (&general, false)] {
        let settings = Settings::default();
        let method = Method::find("replaceme").unwrap();
        let task = task(model, &data, &settings);
        let mut plan = method.plan(&task, &Budget::Keep(1.0)).unwrap();
        plan.modules[1].change = Change::Linearise { blocks: 1 };
        let compressed = method.apply(&task, &plan).unwrap();
        assert_eq!(compressed.model.spec().expanded_blocks().len(), 2);
        let error = distance(&scores(&compressed.model, &other), &scores(model, &other));
        match exact {
            true => assert!(error < 1e-8, "{error}"),
            false => assert!(error > 1e-3, "{error}"),
        }
    }
}

#[test]
fn least_squares_errs_less_than_leaving_out_and_every_form_lies_between() {
    let (data, model) = (windows(30, 4), model(&blocks(4), 3));
    let error = |choice: ReplaceMe| {
        let settings = Settings {
            replace_me: choice,
            ..Settings::default()
        };
        let compressed = compress("replaceme", &model, &data, 0.5, &settings);
        let module = compressed
            .report
            .modules
            .into_iter()
            .find(|module| module.chosen.is_some());
        let module = module.unwrap();
        let note = module.note.unwrap();
        let without: f64 = note.rsplit(' ').next().unwrap().parse().unwrap();
        (module.chosen.unwrap().weighted, without)
    };
    let (full, without) = error(ReplaceMe::default());
    let of = |form| {
        error(ReplaceMe {
            form,
            ..ReplaceMe::default()
        })
    };
    let ((triangle, _), (diagonal, _)) = (of(MapForm::LowerTriangular), of(MapForm::Diagonal));
    assert!(
        full < triangle && triangle < diagonal && diagonal < without,
        "{full} {triangle} {diagonal} {without}"
    );
    let (single, _) = of(MapForm::RankOne);
    assert!(full < single && single < 1.0, "{full} {single}");
    // From the least lasso that leaves nothing, all is missed; below it, more than without.
    let lasso = |lasso| {
        error(ReplaceMe {
            lasso,
            ..ReplaceMe::default()
        })
        .0
    };
    let (some, none) = (lasso(0.2), lasso(1.0));
    assert!(full < some && some < none, "{full} {some} {none}");
    assert!((none - 1.0).abs() < 1e-9, "{none}");
    // A heavy ridge maps everything to nothing, which is all that is missed.
    let (heavy, _) = error(ReplaceMe {
        ridge: 1e9,
        ..ReplaceMe::default()
    });
    assert!((heavy - 1.0).abs() < 1e-3, "{heavy}");
}

/// A block that scales what it adds is cut as the same block with the scale in its weights.
#[test]
fn scaled_layers_are_cut_as_if_the_scale_were_in_their_weights() {
    let scaled = blocks(4).replace("repeat = 4", "repeat = 4\nlayer_scale = 0.5");
    let (data, other, scaled) = (windows(40, 4), windows(5, 99), model(&scaled, 3));
    let folded = scaled.written_out().unwrap();
    close(&scores(&scaled, &other), &scores(&folded, &other), 1e-10);
    let total = |model: &Model| {
        let sums = run_regression(model, &data, 8, (1, 2), RunInput::Added).unwrap();
        sums.total()
    };
    let (found, expected) = (total(&scaled), total(&folded));
    assert!(
        (found - expected).abs() < 1e-9 * expected,
        "{found} {expected}"
    );
    for method in ["replaceme", "replaceme-cosine"] {
        let left = |model| compress(method, model, &data, 0.5, &Settings::default()).model;
        let (found, expected) = (left(&scaled), left(&folded));
        close(&scores(&found, &other), &scores(&expected, &other), 1e-6);
        assert!(distance(&scores(&found, &other), &scores(&scaled, &other)) > 1e-3);
    }
}

#[test]
fn padding_takes_no_part() {
    let (data, model) = (windows(30, 8), model(&blocks(3), 4));
    let fitted = |batch| {
        let settings = Settings {
            batch,
            ..Settings::default()
        };
        compress("replaceme", &model, &data, 0.67, &settings).model
    };
    let (alone, together) = (fitted(1), fitted(16));
    for (name, tensor) in alone.parameters() {
        close(&values(&together.parameters()[name]), &values(tensor), 1e-7);
    }
}

#[test]
fn distances_are_angles_at_last_tokens() {
    let (data, model) = (windows(6, 3), silenced(&model(&blocks(3), 6), 1));
    for batch in [1, 6] {
        let found = angular_distances(&model, &data, batch, 1).unwrap();
        assert_eq!(found.len(), 2);
        assert!(found.iter().all(|d| (0.0..=1.0).contains(d)));
        assert_eq!(found[0], 0.0);
        assert!(found[1] > 0.01);
    }
    assert!(angular_distances(&model, &data, 1, 3).is_err());
}

#[test]
fn several_cuts_do_not_overlap_and_runs_that_meet_become_one() {
    let (data, model) = (windows(40, 5), model(&blocks(8), 7));
    for method in ["replaceme", "replaceme-cosine"] {
        for cuts in 1..=4 {
            let settings = Settings {
                replace_me: ReplaceMe {
                    cuts,
                    ..ReplaceMe::default()
                },
                ..Settings::default()
            };
            let compressed = compress(method, &model, &data, 0.5, &settings);
            let gone = gone(&compressed);
            assert_eq!(gone.len(), 4, "{method} {cuts} {gone:?}");
            assert!(!gone.contains(&0));
            assert_eq!(compressed.model.spec().expanded_blocks().len(), 4);
            let runs = compressed
                .report
                .modules
                .iter()
                .filter(|m| m.chosen.is_some())
                .count();
            let meeting = gone
                .windows(2)
                .filter(|pair| pair[0] + 1 != pair[1])
                .count()
                + 1;
            assert_eq!(runs, meeting, "{method} {cuts} {gone:?}");
            assert!(runs <= cuts);
        }
    }
}

/// The blocks that do nothing are left where two runs of two would find no place beside them.
#[test]
fn as_many_cuts_are_found_as_there_is_room_for() {
    let data = windows(30, 4);
    let model = silenced(&silenced(&model(&blocks(5), 2), 2), 3);
    let removed = |keep, cuts| {
        let settings = Settings {
            replace_me: ReplaceMe {
                cuts,
                ..ReplaceMe::default()
            },
            ..Settings::default()
        };
        gone(&compress("replaceme", &model, &data, keep, &settings))
    };
    assert_eq!(removed(0.6, 1), [2, 3]);
    assert_eq!(removed(0.2, 2), [1, 2, 3, 4]);
}

#[test]
fn descent_by_the_angle_turns_the_map_and_is_repeated_by_its_seed() {
    let (data, model) = (windows(30, 9), model(GATED, 8));
    let with = |rate, accurate| {
        let settings = Settings {
            replace_me: ReplaceMe {
                cosine: CosineDescent {
                    rate,
                    epochs: 20,
                    batch: 64,
                    accurate,
                    ..CosineDescent::default()
                },
                ..ReplaceMe::default()
            },
            ..Settings::default()
        };
        compress("replaceme-cosine", &model, &data, 0.5, &settings)
    };
    for accurate in [false, true] {
        let compressed = with(1e-3, accurate);
        assert_eq!(
            scores(&compressed.model, &data),
            scores(&with(1e-3, accurate).model, &data)
        );
        // Hardly moved, it is the model without the block.
        let still = with(1e-12, accurate).model;
        let task = Task::new(&model);
        let delete = Method::find("delete-linear").unwrap();
        let mut plan = delete.plan(&task, &Budget::Keep(1.0)).unwrap();
        plan.modules[1].change = Change::Remove;
        let deleted = delete.apply(&task, &plan).unwrap();
        close(&scores(&still, &data), &scores(&deleted.model, &data), 1e-8);
        let moved = distance(&scores(&compressed.model, &data), &scores(&still, &data));
        assert!(moved > 1e-4, "{moved}");
    }
}

#[test]
fn keeping_everything_keeps_the_model() {
    let (model, data) = (model(GATED, 2), windows(6, 4));
    for method in ["replaceme", "replaceme-cosine"] {
        let compressed = compress(method, &model, &data, 1.0, &Settings::default());
        assert_eq!(scores(&model, &data), scores(&compressed.model, &data));
    }
}

#[test]
fn what_cannot_be_merged_or_planned_is_refused_with_why() {
    let method = Method::find("replaceme").unwrap();
    let error = method
        .requirements(&model(ENCODER, 1), &Settings::default())
        .unwrap_err();
    assert!(error.to_string().contains("post-norm"), "{error}");

    let (model, data, settings) = (model(&blocks(4), 2), windows(30, 4), Settings::default());
    let task = task(&model, &data, &settings);
    assert!(method.plan(&Task::new(&model), &Budget::Keep(0.5)).is_err());
    let plan = method.plan(&task, &Budget::Keep(1.0)).unwrap();
    let map = |blocks| Change::Linearise { blocks };
    for (changes, why) in [
        (vec![(0, map(1))], "no block before it"),
        (vec![(1, Change::Remove)], "behind the first block of a run"),
        (vec![(1, map(2))], "a run that began earlier"),
        (vec![(1, map(1)), (2, map(1))], "which it meets"),
        (vec![(3, map(2))], "those there are"),
        (vec![(3, map(0))], "those there are"),
        // Numbers that a sum with the block's would wrap around.
        (vec![(3, map(usize::MAX))], "those there are"),
        (vec![(3, map(usize::MAX - 2))], "those there are"),
        (vec![(1, Change::Prune { share: 0.5 })], "remove or leave"),
    ] {
        let mut plan = plan.clone();
        for (index, change) in changes {
            plan.modules[index].change = change;
        }
        let error = method.apply(&task, &plan).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    }
    let many = Settings {
        replace_me: ReplaceMe {
            cuts: 3,
            ..ReplaceMe::default()
        },
        ..Settings::default()
    };
    let task = Task {
        settings: Some(&many),
        ..task
    };
    let error = method
        .plan(&task, &Budget::Keep(0.5))
        .unwrap_err()
        .to_string();
    assert!(error.contains("between 1 and 2"), "{error}");
}

#[test]
fn every_form_is_merged_by_either_objective() {
    let (data, model) = (windows(30, 9), model(GATED, 8));
    let forms = [
        MapForm::Full,
        MapForm::Diagonal,
        MapForm::LowerTriangular,
        MapForm::RankOne,
    ];
    for form in forms {
        let squares = ReplaceMe {
            form,
            ..ReplaceMe::default()
        };
        let angles = ReplaceMe {
            ridge: 0.1,
            cosine: CosineDescent {
                solver: DescentSolver::Lbfgs,
                epochs: 5,
                ..CosineDescent::default()
            },
            ..squares
        };
        for (method, choice) in [("replaceme", squares), ("replaceme-cosine", angles)] {
            let settings = Settings {
                replace_me: choice,
                ..Settings::default()
            };
            let compressed = compress(method, &model, &data, 0.5, &settings);
            let (before, after) = (model.spec(), compressed.model.spec());
            assert_eq!(after.expanded_blocks().len(), 1);
            assert_eq!(after.expanded_blocks()[0], before.expanded_blocks()[0]);
            let down = "blocks.0.feedforward.down.weight";
            let moved = distance(
                &values(&compressed.model.parameters()[down]),
                &values(&model.parameters()[down]),
            );
            assert!(moved > 1e-3, "{method} {form:?} {moved}");
        }
    }
}

#[test]
fn forms_and_penalties_that_contradict_are_refused() {
    let (data, model) = (windows(30, 9), model(GATED, 8));
    let refused = |method: &str, choice: ReplaceMe| {
        let settings = Settings {
            replace_me: choice,
            ..Settings::default()
        };
        let method = Method::find(method).unwrap();
        let task = task(&model, &data, &settings);
        let plan = method.plan(&task, &Budget::Keep(0.5)).unwrap();
        method.apply(&task, &plan).unwrap_err().to_string()
    };
    let cornered = ReplaceMe {
        lasso: 0.1,
        form: MapForm::RankOne,
        cosine: CosineDescent {
            solver: DescentSolver::Lbfgs,
            ..CosineDescent::default()
        },
        ..ReplaceMe::default()
    };
    assert!(refused("replaceme", cornered).contains("rank-one with a lasso"));
    assert!(refused("replaceme-cosine", cornered).contains("lbfgs with a lasso"));
    let negative = ReplaceMe {
        ridge: -1.0,
        ..ReplaceMe::default()
    };
    assert!(refused("replaceme", negative).contains("ridge of a map is -1"));
}

/// Either kind of map is fitted to the same numbers, and as many tokens as features are learned by
/// heart.
#[test]
fn runs_have_regressions_and_few_tokens_are_learned_by_heart() {
    let model = model(&blocks(4), 3);
    let (few, many, other) = (windows(2, 1), windows(60, 2), windows(20, 3));
    let sums =
        |data: &CalibrationData, input| run_regression(&model, data, 8, (1, 2), input).unwrap();
    let (added, stream) = (sums(&many, RunInput::Added), sums(&many, RunInput::Stream));
    assert_eq!(
        (added.rows(), stream.rows()),
        (many.tokens(), many.tokens())
    );
    let nothing = AffineMap {
        weight: Matrix::zeros(16, 16),
        bias: vec![0.0; 16],
    };
    let missed = stream.squared_error(&nothing);
    assert!((missed - added.total()).abs() < 1e-9 * missed);
    // 2 windows hold at most 18 tokens, for 16 features.
    let fitted = |data: &CalibrationData| sums(data, RunInput::Added).solve(0.0).unwrap();
    let error = |map: &AffineMap, data: &CalibrationData| {
        let sums = sums(data, RunInput::Added);
        sums.squared_error(map) / sums.total()
    };
    let (by_few, by_many) = (fitted(&few), fitted(&many));
    assert!(error(&by_few, &few) < error(&by_many, &many));
    assert!(error(&by_few, &other) > error(&by_many, &other));
    for run in [(0, 0), (2, 2), (9, 1)] {
        let refused = run_regression(&model, &many, 8, run, RunInput::Added);
        assert!(refused.is_err(), "{run:?}");
    }
}

#[test]
fn a_model_whose_blocks_take_no_map_in_is_refused_before_the_work() {
    let dense = "{ kind = \"dense\", hidden = 24, activation = \"gelu-tanh\" }";
    let spec = DECODER.replace(dense, "{ kind = \"sparse-code\" }");
    assert_ne!(spec, DECODER);
    let model = model(&spec, 3);
    for name in ["replaceme", "replaceme-cosine"] {
        let told = Method::find(name).unwrap();
        let told = told.requirements(&model, &Settings::default());
        let told = told.unwrap_err().to_string();
        assert!(
            told.contains("is a sparse code") && told.contains("delete-linear"),
            "{told}"
        );
    }
}
