//! What a stage rules out for a later one is told before either is run, and only where it is so.
#![allow(clippy::panic, clippy::unwrap_used)]

use crate::common::{DECODER, GATED, model, windows, with_blocks, zeroed};
use lapidary_compress::{Method, Recipe, Scope, Selection, Settings, Stage};

fn stage(method: &str, ratio: f64) -> Stage {
    let rounds = Method::find(method).unwrap().rounds();
    Stage {
        method: method.to_owned(),
        ratio: (!rounds).then_some(ratio),
        settings: None,
    }
}

fn recipe(stages: [Stage; 2]) -> Recipe {
    Recipe {
        stages: stages.to_vec(),
    }
}

/// The message of a recipe that is refused ahead.
fn refused(stages: [Stage; 2]) -> Option<String> {
    let model = model(&with_blocks(DECODER, 4), 3);
    let checked = recipe(stages).check_model(&model, &Settings::default());
    checked.err().map(|error| error.to_string())
}

/// Each pair that is refused fails where one is run after the other, too.
#[test]
fn what_is_refused_ahead_would_fail_in_its_turn() {
    let data = windows(24, 5);
    let settings = Settings::default();
    for spec in [DECODER, GATED] {
        let model = model(&with_blocks(spec, 4), 3);
        for first in [
            "slicegpt",
            "dotresize",
            "attention-cosine",
            "linearise",
            "svd",
            "lorap",
        ] {
            let first = stage(first, 0.5);
            let alone = Recipe {
                stages: vec![first.clone()],
            };
            let done = alone.run(&model, Some(&data), &settings).unwrap();
            let left = &done.last().unwrap().compressed.model;
            let mut count = 0;
            for method in Method::all() {
                let second = stage(method.name, 0.5);
                let both = recipe([first.clone(), second.clone()]);
                let Err(told) = both.check_model(&model, &settings) else {
                    continue;
                };
                count += 1;
                let then = Recipe {
                    stages: vec![second],
                };
                let ran = then.run(left, Some(&data), &settings);
                assert!(ran.is_err(), "{told}");
                let ran = both.run(&model, Some(&data), &settings).unwrap_err();
                assert_eq!(ran.to_string(), told.to_string());
            }
            assert!(count >= 8, "{count} after {}", first.method);
        }
    }
}

#[test]
fn a_refusal_names_both_and_the_place() {
    let told = refused([stage("slicegpt", 0.5), stage("block-influence", 0.5)]).unwrap();
    assert_eq!(
        told,
        "place of block-influence is after slicegpt, which leaves shortcuts in every block, but must be \
         before it: block-influence takes blocks without"
    );
    let told = refused([stage("whitened", 0.5), stage("wanda", 0.5)]).unwrap();
    assert!(told.contains("on other layers"), "{told}");
    let told = refused([stage("slicegpt", 0.5), stage("slicegpt", 0.5)]).unwrap();
    assert!(told.contains("left out"), "{told}");
}

/// What goes in between may be just the block that has factors, and what stands in for one is a whole matrix.
#[test]
fn factors_of_blocks_that_may_be_gone_refuse_nothing() {
    let model = model(&with_blocks(DECODER, 4), 3);
    let of_a_block = Stage {
        settings: Some(Settings {
            selection: Selection::layers(["blocks.1.*"]),
            ..Settings::default()
        }),
        ..stage("svd", 0.5)
    };
    for (first, between, last) in [
        (of_a_block, "block-influence", "slicegpt"),
        (stage("svd", 0.5), "linearise", "wanda"),
    ] {
        let [between, last] = [between, last].map(|method| stage(method, 0.5));
        let told = |stages: Vec<Stage>| -> Option<String> {
            let checked = Recipe { stages }.check_model(&model, &Settings::default());
            checked.err().map(|error| error.to_string())
        };
        let without = told(vec![first.clone(), last.clone()]).unwrap();
        assert!(without.contains("factors"), "{without}");
        // What goes before leaves factors in all of the rest.
        let before = vec![stage("block-influence", 0.5), first.clone(), last.clone()];
        assert_eq!(told(before).as_ref(), Some(&without));
        assert_eq!(told(vec![first, between, last]), None);
    }
}

#[test]
fn what_depends_on_layers_or_amounts_is_not_refused() {
    let on = |method: &str, layers: &str| Stage {
        settings: Some(Settings {
            selection: Selection::layers([layers]),
            ..Settings::default()
        }),
        ..stage(method, 0.5)
    };
    let (attention, feedforward) = ("blocks.*.attention.*", "blocks.*.feedforward.*");
    for fine in [
        [on("svd", attention), on("wanda", feedforward)],
        [on("svd", attention), stage("channel-magnitude", 0.5)],
        [on("svd", feedforward), stage("prune-heads", 0.5)],
        // Of four blocks nothing goes.
        [stage("attention-cosine", 0.1), stage("modegpt", 0.5)],
        [stage("slicegpt", 0.5), stage("linearise", 0.5)],
        [stage("svd", 0.5), stage("int8", 0.5)],
    ] {
        let names = fine.clone().map(|stage| stage.method);
        assert_eq!(refused(fine), None, "{names:?}");
    }
    let wrong = [on("svd", feedforward), stage("channel-magnitude", 0.5)];
    assert!(refused(wrong).unwrap().contains("factors"));
}

/// Blocks that lose different numbers of heads or features, since what goes is no multiple of the blocks, are
/// not fused; where the data decides, the stage says so in its turn.
#[test]
fn blocks_that_are_sure_to_differ_are_refused_before_they_are_fused() {
    // 4 blocks of 4 heads, and of 24 features.
    for (method, ratio, sure) in [
        ("prune-heads", 0.25, false),
        ("prune-heads", 0.3, true),
        ("channel-gradient", 0.25, false),
        ("channel-gradient", 0.3, true),
        ("channel-magnitude", 0.3, false),
        ("modegpt", 0.3, false),
    ] {
        for fusing in ["fusegpt", "fuse-lora"] {
            let told = refused([stage(method, ratio), stage(fusing, 0.5)]);
            assert_eq!(told.is_some(), sure, "{method} at {ratio}: {told:?}");
            if let Some(told) = told {
                let place = format!("place of {fusing} is after {method}, which leaves blocks");
                assert!(told.starts_with(&place), "{told}");
            }
        }
        // Others take blocks of different shapes, and so does one after it.
        assert_eq!(
            refused([stage(method, ratio), stage("block-influence", 0.5)]),
            None
        );
        assert_eq!(refused([stage("fusegpt", 0.5), stage(method, ratio)]), None);
    }
    // Each block by itself loses as many.
    let mut alike = stage("prune-heads", 0.3);
    let mut settings = Settings::default();
    settings.pruning.scope = Some(Scope::Layer);
    alike.settings = Some(settings);
    assert_eq!(refused([alike, stage("fusegpt", 0.5)]), None);
}

#[test]
fn a_stage_that_is_refused_in_its_turn_says_after_what() {
    let model = model(&with_blocks(DECODER, 4), 3);
    // Features without weights are the first that go, so that this block loses most.
    let model = zeroed(&model, "blocks.1.feedforward.");
    let (data, settings) = (windows(24, 5), Settings::default());
    // A number of features that could be the same in each block.
    let first = stage("channel-gradient", 0.25);
    let both = recipe([first, stage("fusegpt", 0.5)]);
    both.check_model(&model, &settings).unwrap();
    let told = both.run(&model, Some(&data), &settings).unwrap_err();
    let told = told.to_string();
    let start = "fusegpt cannot be run on what channel-gradient left: blocks.";
    assert!(told.starts_with(start), "{told}");
}
