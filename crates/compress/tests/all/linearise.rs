//! Blocks that are nearly linear, replaced by maps or left out.
#![allow(clippy::result_large_err, clippy::unwrap_used)]

use crate::common;
use crate::common::{
    DECODER, ENCODER, GATED, close, cut, distance, labelled, model, scores, windows,
};
use lapidary_compress::{Budget, Change, Compressed, Method, Settings, Task, linearity_scores};
use lapidary_parts::attention::MixerSpec;

/// Three blocks, of which the middle one is linear.
fn with_a_linear_block(spec: &str) -> String {
    let block = spec.find("[[blocks]]").unwrap();
    let head = spec.find("[head]").unwrap();
    let whole = spec[block..head].replace("repeat = 2", "repeat = 1");
    let linear = "[[blocks]]\nnorm = { kind = \"none\" }\nattention = { kind = \"absent\" }\nfeedforward = { kind = \"linear\" }\n";
    format!("{}{whole}{linear}{whole}{}", &spec[..block], &spec[head..])
}

#[test]
fn a_linear_block_has_score_one_and_is_replaced_without_loss() {
    for spec in [DECODER, GATED] {
        let model = model(&with_a_linear_block(spec), 3);
        let data = windows(60, 5);
        let found = linearity_scores(&model, &data, 8).unwrap();
        assert!((found[1] - 1.0).abs() < 1e-8, "{found:?}");
        assert!(found[0] < 0.999 && found[2] < 0.999, "{found:?}");
        // Replaced, it is what it was, on other text too.
        let compressed = cut(&model, &data, "linearise", 0.67);
        assert_eq!(
            compressed.report.modules[1].change,
            Change::Linearise { blocks: 1 }
        );
        assert!(compressed.report.modules[1].chosen.unwrap().weighted < 1e-6);
        let other = windows(5, 71);
        close(
            &scores(&compressed.model, &other),
            &scores(&model, &other),
            1e-7,
        );
        // Left out, it is missed.
        let deleted = cut(&model, &data, "delete-linear", 0.67);
        assert_eq!(deleted.model.spec().expanded_blocks().len(), 2);
        let missed = distance(&scores(&deleted.model, &other), &scores(&model, &other));
        assert!(missed > 1e-2, "{missed}");
    }
}

#[test]
fn a_replaced_block_is_a_map_of_its_own_size() {
    for (spec, data) in [(DECODER, windows(60, 5)), (ENCODER, labelled(60, 3, 5))] {
        let model = model(spec, 4);
        let compressed = cut(&model, &data, "linearise", 0.5);
        let modules = &compressed.report.modules;
        let changed = |change: &Change| *change == Change::Linearise { blocks: 1 };
        let module = modules
            .iter()
            .find(|module| changed(&module.change))
            .unwrap();
        assert_eq!(module.parameters_after, 16 * 16 + 16);
        let lost = module.parameters_before - module.parameters_after;
        let (before, after) = (compressed.report.before, compressed.report.after);
        assert_eq!(before.parameters - after.parameters, lost);
        let blocks = compressed.model.spec().expanded_blocks();
        let maps = blocks
            .iter()
            .filter(|block| block.attention == MixerSpec::Absent);
        assert_eq!((blocks.len(), maps.count()), (2, 1));
        // Its map explains what its score says.
        let index = modules.iter().position(|m| changed(&m.change)).unwrap();
        let score = linearity_scores(&model, &data, 8).unwrap()[index];
        let missed = module.chosen.unwrap().weighted;
        assert!((missed * missed - (1.0 - score)).abs() < 1e-9);
    }
}

#[test]
fn the_map_beats_leaving_the_block_out() {
    let data = windows(60, 5);
    let model = model(DECODER, 9);
    let (mapped, deleted) = (
        cut(&model, &data, "linearise", 0.5),
        cut(&model, &data, "delete-linear", 0.5),
    );
    let error = |compressed: &Compressed| {
        distance(&scores(&compressed.model, &data), &scores(&model, &data))
    };
    assert!(error(&mapped) < error(&deleted));
}

#[test]
fn keeping_everything_keeps_the_model_and_few_tokens_are_refused() {
    let (model, data) = (model(DECODER, 2), windows(6, 4));
    for method in ["linearise", "delete-linear"] {
        let compressed = cut(&model, &data, method, 1.0);
        assert_eq!(scores(&model, &data), scores(&compressed.model, &data));
    }
    let error = linearity_scores(&model, &windows(1, 4), 8).unwrap_err();
    assert!(
        error.to_string().contains("every block is linear"),
        "{error}"
    );
    let method = Method::find("delete-linear").unwrap();
    let error = method.requirements(&common::model(ENCODER, 1), &Settings::default());
    assert!(error.unwrap_err().to_string().contains("post-norm"));
}

#[test]
fn a_run_of_linear_blocks_is_one_map() {
    let two = with_a_linear_block(DECODER);
    let linear = "[[blocks]]\nnorm = { kind = \"none\" }";
    let at = two.find(linear).unwrap();
    let end = at + two[at + 2..].find("[[blocks]]").unwrap() + 2;
    let block = two[at..end].to_owned();
    let two = format!("{}{block}{}", &two[..at], &two[at..]);
    let (model, data) = (model(&two, 6), windows(60, 5));
    let method = Method::find("linearise").unwrap();
    let task = Task {
        data: Some(&data),
        ..Task::new(&model)
    };
    let plan = method.plan(&task, &Budget::Keep(1.0)).unwrap();
    assert_eq!(plan.modules.len(), 4);
    let changed = |changes: &[(usize, Change)]| {
        let mut plan = plan.clone();
        for (index, change) in changes {
            plan.modules[*index].change = change.clone();
        }
        method.apply(&task, &plan)
    };
    let map = |blocks| Change::Linearise { blocks };
    let compressed = changed(&[(1, map(2)), (2, Change::Remove)]).unwrap();
    assert_eq!(compressed.model.spec().expanded_blocks().len(), 3);
    let lost = compressed.report.before.parameters - compressed.report.after.parameters;
    assert_eq!(lost, 16 * 16 + 16);
    let other = windows(5, 71);
    close(
        &scores(&compressed.model, &other),
        &scores(&model, &other),
        1e-7,
    );
    for (changes, why) in [
        (vec![(1, map(2))], "it belongs to a run"),
        (vec![(1, Change::Remove)], "blocks that there are"),
        (vec![(2, map(3))], "blocks that there are"),
        (vec![(2, map(0))], "blocks that there are"),
    ] {
        let error = changed(&changes).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    }
    // A plan that says nothing of the blocks is another model's.
    let mut empty = plan.clone();
    empty.modules.clear();
    let error = method.apply(&task, &empty).unwrap_err().to_string();
    assert!(error.contains("for 0 blocks"), "{error}");
}

#[test]
fn what_takes_hidden_features_out_leaves_parts_without_any() {
    let (start, head) = (
        GATED.find("[[blocks]]").unwrap(),
        GATED.find("[head]").unwrap(),
    );
    let block = GATED[start..head].replace("repeat = 2", "repeat = 1");
    let linear = block.replace("{ kind = \"gated\", hidden = 24 }", "{ kind = \"linear\" }");
    assert_ne!(block, linear);
    let spec = format!("{}{block}{linear}{}", &GATED[..start], &GATED[head..]);
    let (model, data) = (model(&spec, 8), windows(12, 6));
    let mut settings = Settings::default();
    settings.modegpt.smoothing = f64::INFINITY;
    for method in ["channel-magnitude", "modegpt", "lorap"] {
        let found = common::cut_by(&model, &data, method, 0.6, &settings).unwrap();
        let blocks = found.model.spec().expanded_blocks();
        let hidden = |index: usize| blocks[index].feedforward.as_ref().unwrap().hidden();
        assert!((1..24).contains(&hidden(0)), "{method}: {}", hidden(0));
        let map = "blocks.1.feedforward.map.weight";
        assert_eq!(
            common::values(&found.model.parameters()[map]),
            common::values(&model.parameters()[map]),
            "{method}"
        );
    }
    let method = Method::find("channel-magnitude").unwrap();
    let maps = format!("{}{linear}{}", &GATED[..start], &GATED[head..]);
    let error = method
        .requirements(&common::model(&maps, 1), &Settings::default())
        .unwrap_err()
        .to_string();
    assert!(error.contains("without hidden features"), "{error}");
}
