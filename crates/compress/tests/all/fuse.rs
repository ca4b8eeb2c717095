//! Blocks that go and are taken in by their neighbours.
#![allow(clippy::panic, clippy::result_large_err, clippy::unwrap_used)]

use crate::common;
use crate::common::{
    DECODER, ENCODER, GATED, close, distance, family, input, model, scores, silenced, task, values,
    windows, with_blocks,
};
use lapidary_compress::{
    Budget, CalibrationData, Change, Compressed, Content, Error, Example, FuseLoss, FuseSettings,
    Gate, Method, Plan, Settings, Task, export_dense, macro_influences,
};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Input, Model, OpenOptions, Package, Pass, SavedAs};
use lapidary_signal::Trace;

fn settings(fuse: FuseSettings) -> Settings {
    Settings {
        fuse,
        ..Settings::default()
    }
}

/// Few steps, large enough to be seen.
fn quick() -> FuseSettings {
    FuseSettings {
        rank: 4,
        epochs: 3,
        gate_rate: 1e-2,
        rate: 1e-3,
        ..FuseSettings::default()
    }
}

fn compress(
    method: &str,
    model: &Model,
    data: &CalibrationData,
    keep: f64,
    fuse: FuseSettings,
) -> Result<(Compressed, Plan), Error> {
    let method = Method::find(method)?;
    let settings = settings(fuse);
    let task = task(model, data, &settings);
    let plan = method.plan(&task, &Budget::Keep(keep))?;
    Ok((method.apply(&task, &plan)?, plan))
}

fn removed(plan: &Plan) -> Vec<&str> {
    let modules = plan.modules.iter();
    modules
        .filter(|module| module.change == Change::Remove)
        .map(|module| module.path.as_str())
        .collect()
}

/// What a model writes at a site, sequence by sequence.
fn written(model: &Model, data: &CalibrationData, site: &str) -> Vec<f64> {
    let mut found = Vec::new();
    for example in data.examples() {
        let Content::Tokens { ids, .. } = &example.content else {
            panic!("{example:?}");
        };
        let ids = Tensor::from_slice(ids, (1, ids.len()), &Device::Cpu).unwrap();
        let trace = Trace::new().capture(site).unwrap();
        let pass = Pass {
            trace: Some(&trace),
            ..Pass::default()
        };
        model.forward(&Input::tokens(ids), pass).unwrap();
        found.extend(values(trace.signal(site).unwrap().value()));
    }
    found
}

/// Relative errors of the groups, as reported.
fn misses(compressed: &Compressed) -> Vec<f64> {
    let modules = compressed.report.modules.iter();
    modules
        .filter_map(|module| Some(module.chosen?.unweighted))
        .collect()
}

#[test]
fn a_block_that_does_nothing_has_no_influence_and_goes_first() {
    let data = windows(12, 4);
    for spec in [DECODER, GATED] {
        for block in [0, 2, 3] {
            let model = silenced(&model(&with_blocks(spec, 4), 2), block);
            let found = macro_influences(&model, &data, 5).unwrap();
            assert_eq!(found[block], 0.0, "{found:?}");
            let others = (0..4).filter(|other| *other != block);
            assert!(others.clone().all(|other| found[other] > 0.0), "{found:?}");
            assert_eq!(found, macro_influences(&model, &data, 5).unwrap());
            for method in ["macro-influence", "fusegpt", "fuse-lora"] {
                let (compressed, plan) = compress(method, &model, &data, 0.75, quick()).unwrap();
                assert_eq!(removed(&plan), [format!("blocks.{block}")], "{method}");
                if method == "macro-influence" {
                    let other = windows(5, 99);
                    let (found, expected) =
                        (scores(&compressed.model, &other), scores(&model, &other));
                    assert_eq!(found, expected);
                }
            }
        }
    }
}

/// `1 − cos` of the last hidden vectors with and without the block, each model run as a whole.
#[test]
fn influence_is_what_two_whole_models_give() {
    let data = windows(7, 5);
    for spec in [
        with_blocks(DECODER, 3),
        with_blocks(GATED, 3),
        with_blocks(ENCODER, 3),
    ] {
        let whole = model(&spec, 6);
        let found = macro_influences(&whole, &data, 3).unwrap();
        let last = |model: &Model| -> Vec<Vec<f64>> {
            let blocks = model.spec().expanded_blocks().len();
            let found = written(model, &data, &format!("blocks.{}.out", blocks - 1));
            found.chunks(16).map(<[f64]>::to_vec).collect()
        };
        let reference = last(&whole);
        for (block, found) in found.iter().enumerate() {
            let method = Method::find("macro-influence").unwrap();
            let mut plan = method.plan(&Task::new(&whole), &Budget::Keep(1.0)).unwrap();
            plan.modules[block].change = Change::Remove;
            let without = plan.apply(&whole, None).unwrap().model;
            let cosines = reference.iter().zip(last(&without)).map(|(a, b)| {
                let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
                dot(a, &b) / (dot(a, a) * dot(&b, &b)).sqrt()
            });
            let expected = 1.0 - cosines.sum::<f64>() / reference.len() as f64;
            assert!((found - expected).abs() < 1e-12, "{found} {expected}");
            assert!(*found >= 0.0);
        }
    }
}

/// Scored anew after each removal: not what one look at the whole model would take out.
#[test]
fn influence_is_measured_anew_after_each_removal() {
    let data = windows(12, 8);
    let mut differs = 0;
    for seed in 0..8 {
        let model = model(&with_blocks(DECODER, 8), seed);
        let (_, plan) = compress("macro-influence", &model, &data, 0.5, quick()).unwrap();
        let mut greedy: Vec<usize> = (0..8).collect();
        let mut gone = Vec::new();
        for _ in 0..4 {
            let mut without = Method::find("macro-influence")
                .unwrap()
                .plan(&Task::new(&model), &Budget::Keep(1.0))
                .unwrap();
            for block in &gone {
                let block: usize = *block;
                without.modules[block].change = Change::Remove;
            }
            let left = without.apply(&model, None).unwrap().model;
            let scores = macro_influences(&left, &data, 8).unwrap();
            let least = (0..scores.len())
                .min_by(|a, b| scores[*a].total_cmp(&scores[*b]))
                .unwrap();
            gone.push(greedy.remove(least));
        }
        gone.sort_unstable();
        let expected: Vec<String> = gone.iter().map(|block| format!("blocks.{block}")).collect();
        assert_eq!(removed(&plan), expected);
        let once = macro_influences(&model, &data, 8).unwrap();
        let mut order: Vec<usize> = (0..8).collect();
        order.sort_by(|a, b| once[*a].total_cmp(&once[*b]));
        order.truncate(4);
        order.sort_unstable();
        differs += usize::from(order != gone);
    }
    assert!(differs > 0);
}

#[test]
fn without_tuning_it_is_deletion() {
    let data = windows(10, 3);
    for spec in [DECODER, GATED, ENCODER] {
        let model = model(&with_blocks(spec, 5), 3);
        let (deleted, _) = compress("macro-influence", &model, &data, 0.6, quick()).unwrap();
        for gate in [Gate::LowRank, Gate::Row, Gate::Full] {
            for method in ["fusegpt", "fuse-lora"] {
                let fuse = FuseSettings {
                    epochs: 0,
                    gate,
                    ..quick()
                };
                let (fused, _) = compress(method, &model, &data, 0.6, fuse).unwrap();
                let names = |compressed: &Compressed| -> Vec<String> {
                    compressed.model.parameters().keys().cloned().collect()
                };
                assert_eq!(names(&fused), names(&deleted));
                for (name, tensor) in fused.model.parameters() {
                    let other = &deleted.model.parameters()[name];
                    assert_eq!(values(tensor), values(other), "{name}");
                }
                assert_eq!(fused.model.spec(), deleted.model.spec());
            }
        }
    }
}

/// With the squared error as its loss, no group is further from what it gave than it was untuned.
#[test]
fn tuning_brings_groups_nearer_to_what_they_gave() {
    let data = windows(16, 11);
    for spec in [DECODER, GATED, ENCODER] {
        let model = model(&with_blocks(spec, 4), 7);
        for gate in [Gate::LowRank, Gate::Row, Gate::Full] {
            let fuse = |epochs| FuseSettings {
                epochs,
                gate,
                loss: FuseLoss::SquaredError,
                rescore_fused: false,
                ..quick()
            };
            let (untuned, _) = compress("fusegpt", &model, &data, 0.75, fuse(0)).unwrap();
            let (tuned, _) = compress("fusegpt", &model, &data, 0.75, fuse(20)).unwrap();
            let (before, after) = (misses(&untuned)[0], misses(&tuned)[0]);
            assert!(after < 0.9 * before, "{gate:?}: {before} -> {after}");
            let note = tuned.report.modules.iter().find_map(|m| m.note.clone());
            assert!(note.unwrap().contains(&format!("untuned by {before:.4}")));
        }
    }
}

/// The divergence falls as well: what is left is nearer to the model in the group's own terms.
#[test]
fn tuning_by_the_divergence_lowers_it() {
    let data = windows(16, 12);
    let model = model(&with_blocks(DECODER, 4), 9);
    let divergence = |other: &Model| -> f64 {
        // All four blocks are one group, so that the last hidden vectors are its output.
        let p = written(&model, &data, "blocks.3.out");
        let q = written(other, &data, "blocks.2.out");
        let log_softmax = |row: &[f64]| -> Vec<f64> {
            let sum: f64 = row.iter().map(|x| x.exp()).sum();
            row.iter().map(|x| x - sum.ln()).collect()
        };
        let rows = p.len() / 16;
        let pairs = p.chunks(16).zip(q.chunks(16));
        let each = pairs.map(|(p, q)| {
            let (p, q) = (log_softmax(p), log_softmax(q));
            p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>()
        });
        each.sum::<f64>() / rows as f64
    };
    for method in ["fusegpt", "fuse-lora"] {
        let fuse = |epochs| FuseSettings { epochs, ..quick() };
        let (untuned, _) = compress(method, &model, &data, 0.75, fuse(0)).unwrap();
        let (tuned, _) = compress(method, &model, &data, 0.75, fuse(20)).unwrap();
        let (before, after) = (divergence(&untuned.model), divergence(&tuned.model));
        assert!(after < 0.9 * before, "{method}: {before} -> {after}");
    }
}

/// The report is of the fused group; the model that comes out, its matrices multiplied out, misses the
/// group's output by as much.
#[test]
fn folded_matrices_give_what_the_fused_ones_gave() {
    let data = windows(10, 20);
    for spec in [DECODER, GATED, ENCODER] {
        let model = model(&with_blocks(spec, 4), 16);
        for gate in [Gate::LowRank, Gate::Row, Gate::Full] {
            let fuse = FuseSettings { gate, ..quick() };
            let (fused, _) = compress("fusegpt", &model, &data, 0.75, fuse).unwrap();
            // All four blocks are one group.
            let entering = written(&model, &data, "blocks.0.in");
            let wanted = written(&model, &data, "blocks.3.out");
            let given = written(&fused.model, &data, "blocks.2.out");
            let squares = |a: &[f64], b: &[f64]| -> f64 {
                a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum()
            };
            let missed = (squares(&given, &wanted) / squares(&entering, &wanted)).sqrt();
            let reported = misses(&fused)[0];
            assert!((missed - reported).abs() < 1e-10, "{missed} {reported}");
            let names = |model: &Model| -> Vec<String> {
                let own = model.parameters().keys();
                own.filter(|name| !name.starts_with("blocks.3."))
                    .cloned()
                    .collect()
            };
            assert!(fused.model.parameters().keys().eq(&names(&model)));
        }
    }
}

/// The control moves the same parameters but takes nothing in: with corrections held still it is
/// deletion, while gates alone already change what is left.
#[test]
fn gates_alone_recycle_and_the_control_has_none() {
    let data = windows(10, 13);
    let model = model(&with_blocks(DECODER, 4), 10);
    let fuse = FuseSettings {
        rate: 0.0,
        ..quick()
    };
    let (deleted, _) = compress("macro-influence", &model, &data, 0.75, fuse).unwrap();
    let (control, _) = compress("fuse-lora", &model, &data, 0.75, fuse).unwrap();
    let (fused, _) = compress("fusegpt", &model, &data, 0.75, fuse).unwrap();
    let of = |compressed: &Compressed| scores(&compressed.model, &windows(4, 50));
    close(&of(&control), &of(&deleted), 1e-12);
    assert!(distance(&of(&fused), &of(&deleted)) > 1e-4);
}

#[test]
fn the_same_seed_gives_the_same_model() {
    let data = windows(8, 14);
    let model = model(&with_blocks(GATED, 4), 11);
    let run = |seed| {
        let method = Method::find("fusegpt").unwrap();
        let settings = Settings {
            seed,
            ..settings(quick())
        };
        let task = task(&model, &data, &settings);
        let plan = method.plan(&task, &Budget::Keep(0.5)).unwrap();
        scores(&method.apply(&task, &plan).unwrap().model, &windows(4, 51))
    };
    assert_eq!(run(1), run(1));
    assert!(distance(&run(1), &run(2)) > 0.0);
}

/// Planned and carried out at one time, each group is tuned once, and the result is that of the plan carried out
/// behind it.
#[test]
fn a_cut_is_its_plan_carried_out() {
    let data = windows(8, 21);
    let model = model(&with_blocks(DECODER, 6), 17);
    for method in ["fusegpt", "fuse-lora"] {
        for rescore_fused in [true, false] {
            let fuse = FuseSettings {
                group: 3,
                rescore_fused,
                ..quick()
            };
            let (planned, plan) = compress(method, &model, &data, 0.5, fuse).unwrap();
            assert_eq!(removed(&plan).len(), 3);
            let settings = settings(fuse);
            let task = task(&model, &data, &settings);
            let found = Method::find(method).unwrap();
            let (same, cut) = found.cut(&task, &Budget::Keep(0.5)).unwrap();
            assert_eq!(same, plan);
            assert_eq!(misses(&cut), misses(&planned));
            assert_eq!(cut.model.spec(), planned.model.spec());
            for (name, tensor) in planned.model.parameters() {
                let other = &cut.model.parameters()[name];
                assert_eq!(values(tensor), values(other), "{method} {name}");
            }
        }
    }
}

/// A plan is carried out in its order, as it says, and refused where it makes no sense.
#[test]
fn plans_are_obeyed() {
    let data = windows(8, 15);
    let model = model(&with_blocks(DECODER, 6), 12);
    let fuse = FuseSettings {
        group: 3,
        ..quick()
    };
    let (_, plan) = compress("fusegpt", &model, &data, 4.0 / 6.0, fuse).unwrap();
    let text = serde_json::to_string(&plan).unwrap();
    assert_eq!(serde_json::from_str::<Plan>(&text).unwrap(), plan);
    assert_eq!(removed(&plan).len(), 2);
    let Change::Fuse { from } = plan.modules[1].change else {
        panic!("{plan:?}");
    };
    assert_eq!(plan.modules[0].path, format!("blocks.{from}"));

    let method = Method::find("fusegpt").unwrap();
    let settings = settings(fuse);
    let task = task(&model, &data, &settings);
    let mut by_hand = plan.clone();
    let module = |block: usize, change: Change| lapidary_compress::ModulePlan {
        path: format!("blocks.{block}"),
        change,
        ..plan.modules[0].clone()
    };
    // Block 2 takes in block 1, then block 3 takes in block 2, which it was fused with.
    by_hand.modules = vec![
        module(1, Change::Remove),
        module(2, Change::Fuse { from: 1 }),
        module(2, Change::Remove),
        module(3, Change::Fuse { from: 2 }),
    ];
    let found = method.apply(&task, &by_hand).unwrap();
    let parameters = |model: &Model, block: usize| -> Vec<f64> {
        let own = model.parameters().iter();
        let own = own.filter(|(name, _)| name.starts_with(&format!("blocks.{block}.")));
        own.flat_map(|(_, tensor)| values(tensor)).collect()
    };
    let blocks = found.model.spec().expanded_blocks().len();
    assert_eq!(blocks, 4);
    for (block, before, same) in [(0, 0, true), (1, 3, false), (2, 4, true), (3, 5, true)] {
        let equal = parameters(&found.model, block) == parameters(&model, before);
        assert_eq!(equal, same, "{block}");
    }
    for wrong in [
        vec![module(1, Change::Fuse { from: 2 })],
        vec![module(1, Change::Remove), module(1, Change::Remove)],
        vec![
            module(1, Change::Remove),
            module(2, Change::Fuse { from: 3 }),
        ],
        vec![module(9, Change::Remove)],
        vec![module(1, Change::Narrow { features: 2 })],
    ] {
        let plan = Plan {
            modules: wrong,
            ..plan.clone()
        };
        assert!(method.apply(&task, &plan).is_err(), "{plan:?}");
    }
}

/// Token by token with a cache, and all at once; blocks are numbered from 0 without a gap.
#[test]
fn what_is_left_decodes_as_it_reads() {
    let data = windows(8, 16);
    for spec in [DECODER, GATED] {
        let model = model(&with_blocks(spec, 4), 13);
        let (fused, _) = compress("fusegpt", &model, &data, 0.5, quick()).unwrap();
        let fused = fused.model;
        let mut numbers: Vec<usize> = fused
            .parameters()
            .keys()
            .filter_map(|name| {
                name.strip_prefix("blocks.")?
                    .split('.')
                    .next()?
                    .parse()
                    .ok()
            })
            .collect();
        numbers.dedup();
        assert_eq!(numbers, [0, 1]);
        let ids = Tensor::new(&[[1u32, 4, 2, 9, 3]], &Device::Cpu).unwrap();
        let logits = |ids: &Tensor, pass: Pass<'_>| -> Vec<f64> {
            let output = fused.forward(&Input::tokens(ids.clone()), pass).unwrap();
            values(&output.into_logits().unwrap().into_value())
        };
        let whole = logits(&ids, Pass::default());
        let mut state = fused.decode_state();
        for (token, expected) in whole.chunks(whole.len() / 5).enumerate() {
            let pass = Pass {
                state: Some(&mut state),
                ..Pass::default()
            };
            let here = ids.narrow(1, token, 1).unwrap();
            close(&logits(&here, pass), expected, 1e-10);
        }
    }
}

#[test]
fn what_cannot_be_fused_is_refused_with_the_reason() {
    let data = windows(6, 17);
    let refused = |spec: &str, fuse: FuseSettings, expected: &str| {
        let model = model(spec, 14);
        let error = compress("fusegpt", &model, &data, 0.5, fuse).err().unwrap();
        assert!(error.to_string().contains(expected), "{error}");
    };
    let wide = r#"
[[blocks]]
attention = { kind = "multi-head", heads = 4, causal = true }
feedforward = { kind = "dense", hidden = 20 }
[head]"#;
    let uneven = DECODER.replace("[head]", wide);
    refused(&uneven, quick(), "blocks.2.feedforward.down");
    let low = "[low_rank]\n\"blocks.0.attention.query\" = 4\n[head]";
    refused(
        &DECODER.replace("[head]", low),
        quick(),
        "multiply factorised layers out",
    );
    for (fuse, expected) in [
        (
            FuseSettings {
                group: 1,
                ..quick()
            },
            "blocks of a group",
        ),
        (FuseSettings { rank: 0, ..quick() }, "rank of gates"),
        (
            FuseSettings {
                rate: f64::NAN,
                ..quick()
            },
            "learning rate",
        ),
        (
            FuseSettings {
                evaluation: 0,
                ..quick()
            },
            "sequences",
        ),
        (
            FuseSettings {
                gate_rate: 1e300,
                ..quick()
            },
            "finite",
        ),
    ] {
        refused(DECODER, fuse, expected);
    }
    // Deletion needs no counterparts.
    let model = model(&uneven, 14);
    assert!(compress("macro-influence", &model, &data, 0.5, quick()).is_ok());
}

fn example(model: &Model, seed: usize) -> Example {
    common::example(model, seed, |at| at * 7 + seed * 13)
}

/// Every family is fused and saved as its own, one block shorter, with equal hidden vectors.
#[test]
fn published_families_stay_what_they_are() {
    let directory = tempfile::tempdir().unwrap();
    for name in [
        "bert-masked-lm",
        "deit",
        "gpt2",
        "llama",
        "llama-tied",
        "mamba",
        "mistral",
        "mixtral",
        "olmoe",
        "opt",
        "opt-projected",
        "qwen2",
        "roberta-classifier",
        "vit",
    ] {
        let options = OpenOptions {
            dtype: DType::F32,
            ..OpenOptions::default()
        };
        let package = Package::open(&family(name), &options).unwrap();
        let model = package.single_model().unwrap();
        let data = (0..4).map(|seed| example(model, seed)).collect();
        let data = CalibrationData::new(data).unwrap();
        for method in ["macro-influence", "fusegpt"] {
            let found = match compress(method, model, &data, 0.5, quick()) {
                Ok((found, _)) => found,
                Err(error) => panic!("{name} {method}: {error}"),
            };
            if method == "fusegpt" {
                assert!(misses(&found)[0].is_finite(), "{name}");
            }
            let input = input(&data.examples()[0]);
            let hidden = |model: &Model| {
                let output = model.forward(&input, Pass::default()).unwrap();
                values(output.hidden.value())
            };
            let expected = hidden(&found.model);
            let out = directory.path().join(format!("{name}-{method}"));
            let package = Package::open(&family(name), &options).unwrap();
            let saved = package.with_model(found.model).save(&out, None).unwrap();
            assert_eq!(saved, SavedAs::HuggingFace, "{name} {method}");
            let again = Package::open(&out, &OpenOptions::default()).unwrap();
            let again = again.single_model().unwrap();
            assert_eq!(again.spec().expanded_blocks().len(), 1, "{name}");
            assert_eq!(hidden(again), expected, "{name} {method}");
        }
    }
    // One set of weights for all blocks has nothing to take in.
    let package = Package::open(&family("albert"), &OpenOptions::default()).unwrap();
    let model = package.single_model().unwrap();
    let data = CalibrationData::new(vec![example(model, 1)]).unwrap();
    let error = compress("fusegpt", model, &data, 0.5, quick())
        .err()
        .unwrap();
    assert!(error.to_string().contains("shared"), "{error}");
}

/// A factorised model is fused once it is multiplied out.
#[test]
fn factorised_models_are_fused_once_multiplied_out() {
    let data = windows(6, 18);
    let low = "[low_rank]\n\"blocks.0.attention.query\" = 4\n[head]";
    let model = model(&DECODER.replace("[head]", low), 15);
    let dense = export_dense(&model).unwrap();
    assert!(compress("fusegpt", &dense, &data, 0.5, quick()).is_ok());
}
