//! Leaving out whole blocks by their influence.
#![allow(clippy::unwrap_used)]

use crate::common::{DECODER, ENCODER, GATED, model, scores, silenced, windows};
use lapidary_compress::{
    Budget, Calibration, CalibrationData, CalibrationOptions, Change, Compressed, Method, Settings,
    Task,
};
use lapidary_model::Model;

fn compress(model: &Model, data: &CalibrationData, keep: f64) -> Compressed {
    let method = Method::find("block-influence").unwrap();
    let requirements = method.requirements(model, &Settings::default()).unwrap();
    let calibration =
        Calibration::collect(model, data, &requirements, CalibrationOptions::default()).unwrap();
    let task = Task {
        calibration: Some(&calibration),
        ..Task::new(model)
    };
    let plan = method.plan(&task, &Budget::Keep(keep)).unwrap();
    let text = serde_json::to_string(&plan).unwrap();
    assert_eq!(plan, serde_json::from_str(&text).unwrap());
    method.apply(&task, &plan).unwrap()
}

#[test]
fn a_block_that_writes_nothing_goes_first_and_is_not_missed() {
    for spec in [DECODER, GATED] {
        let data = windows(6, 4);
        let model = silenced(&model(spec, 2), 0);
        let compressed = compress(&model, &data, 0.5);
        let changes: Vec<&Change> = compressed
            .report
            .modules
            .iter()
            .map(|m| &m.change)
            .collect();
        assert_eq!(changes[0], &Change::Remove);
        assert_eq!(compressed.model.spec().expanded_blocks().len(), 1);
        let (before, after) = (scores(&model, &data), scores(&compressed.model, &data));
        let largest = before
            .iter()
            .zip(&after)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f64::max);
        assert!(largest < 1e-12, "{largest}");
        let lost: usize = compressed
            .report
            .modules
            .iter()
            .map(|m| m.parameters_before - m.parameters_after)
            .sum();
        assert_eq!(
            compressed.report.before.parameters - compressed.report.after.parameters,
            lost
        );
    }
}

#[test]
fn keeping_everything_keeps_the_model() {
    let (model, data) = (model(DECODER, 2), windows(6, 4));
    let compressed = compress(&model, &data, 1.0);
    assert_eq!(scores(&model, &data), scores(&compressed.model, &data));
}

#[test]
fn post_norm_and_plans_for_other_models_are_refused() {
    let method = Method::find("block-influence").unwrap();
    let encoder = model(ENCODER, 1);
    let error = method
        .requirements(&encoder, &Settings::default())
        .unwrap_err();
    assert!(error.to_string().contains("post-norm"), "{error}");

    let (model, data) = (model(DECODER, 2), windows(6, 4));
    let requirements = method.requirements(&model, &Settings::default()).unwrap();
    let calibration =
        Calibration::collect(&model, &data, &requirements, CalibrationOptions::default()).unwrap();
    let task = Task {
        calibration: Some(&calibration),
        ..Task::new(&model)
    };
    let mut plan = method.plan(&task, &Budget::Keep(0.5)).unwrap();
    plan.modules[0].path = "blocks.7".to_owned();
    assert!(
        method
            .apply(&task, &plan)
            .unwrap_err()
            .to_string()
            .contains("blocks.7")
    );
    let error = method.plan(&task, &Budget::Keep(0.1)).unwrap_err();
    assert!(error.to_string().contains("all there are"), "{error}");
    assert!(method.plan(&Task::new(&model), &Budget::Keep(0.5)).is_err());
}
