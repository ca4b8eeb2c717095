//! Pairs of methods where theory says what they do together.
#![allow(clippy::panic, clippy::result_large_err, clippy::unwrap_used)]

use crate::common::{DECODER, model, values};
use lapidary_compress::{
    Error, Interactions, Selection, Settings, Stage, export_dense, interactions,
};
use lapidary_model::Model;

/// A loss that is linear in the weights: each times a number that is its own.
fn linear(model: &Model) -> Result<f64, Error> {
    let dense = export_dense(model)?;
    let mut sum = 0.0;
    for (number, tensor) in (0..).map(f64::from).zip(dense.parameters().values()) {
        for (place, value) in (0..).map(f64::from).zip(values(tensor)) {
            sum += value * (0.37 * place + 1.7 * number).sin();
        }
    }
    Ok(sum)
}

fn stage(method: &str, layers: &str) -> Stage {
    Stage {
        method: method.to_owned(),
        ratio: Some(0.5),
        settings: Some(Settings {
            selection: Selection::layers([layers]),
            ..Settings::default()
        }),
    }
}

fn measured(stages: [Stage; 2]) -> Interactions {
    let model = model(DECODER, 5);
    let found = interactions(&model, &stages, None, &Settings::default(), linear).unwrap();
    assert_eq!(found.pairs.len(), 1, "{:?}", found.left_out);
    found
}

#[test]
fn methods_that_touch_other_modules_do_not_interact_in_a_linear_loss() {
    let found = measured([stage("svd", "blocks.0.*"), stage("magnitude", "blocks.1.*")]);
    let pair = &found.pairs[0];
    assert!(found.alone.iter().all(|rise| rise.abs() > 1e-3));
    assert_eq!(pair.order_effect, 0.0);
    assert!(pair.interaction.abs() < 1e-10, "{pair:?}");
    // On one module they do, in the same loss.
    let found = measured([
        stage("magnitude", "blocks.0.*"),
        stage("random-weights", "blocks.0.*"),
    ]);
    let pair = &found.pairs[0];
    assert!(pair.interaction.abs() > 1e-3, "{pair:?}");
    assert!(pair.order_effect.abs() > 1e-3, "{pair:?}");
}

#[test]
fn the_table_of_two_methods_is_that_of_both_the_other_way_round() {
    let stages = || {
        [
            stage("magnitude", "blocks.0.*"),
            stage("random-weights", "blocks.*"),
        ]
    };
    let [one, other] = stages();
    let (there, back) = (measured(stages()), measured([other, one]));
    assert_eq!(there.whole, back.whole);
    assert_eq!(there.alone, [back.alone[1], back.alone[0]]);
    let (pair, turned) = (&there.pairs[0], &back.pairs[0]);
    assert_eq!(pair.in_order, turned.reversed);
    assert_eq!(pair.reversed, turned.in_order);
    assert_eq!(pair.order_effect, -turned.order_effect);
    assert!((pair.interaction - turned.interaction).abs() < 1e-12);
}
