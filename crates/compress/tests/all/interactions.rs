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
    assert_eq!(pair.order_effect, Some(0.0));
    assert!(pair.interaction.abs() < 1e-10, "{pair:?}");
    // On one module they do, in the same loss.
    let found = measured([
        stage("magnitude", "blocks.0.*"),
        stage("random-weights", "blocks.0.*"),
    ]);
    let pair = &found.pairs[0];
    assert!(pair.interaction.abs() > 1e-3, "{pair:?}");
    assert!(pair.order_effect.unwrap().abs() > 1e-3, "{pair:?}");
    assert_eq!(pair.refused, None);
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
    let turned_effect = turned.order_effect.map(|effect| -effect);
    assert_eq!(pair.order_effect, turned_effect);
    assert!((pair.interaction - turned.interaction).abs() < 1e-12);
}

/// What can be run in one order is measured in it, and why not in the other is said.
#[test]
fn a_pair_that_goes_in_one_order_only_has_that_one() {
    let model = model(DECODER, 5);
    let settings = Settings::default();
    // Of factors no weights are pruned; a pruned matrix is factorised as any other.
    let stages = [stage("svd", "blocks.*"), stage("magnitude", "blocks.*")];
    let found = interactions(&model, &stages, None, &settings, linear).unwrap();
    assert_eq!((found.pairs.len(), found.left_out.len()), (1, 0));
    let pair = &found.pairs[0];
    assert_eq!((pair.in_order, pair.order_effect), (None, None));
    let back = pair.reversed.unwrap();
    let interaction = back - found.alone[0] - found.alone[1];
    assert!((pair.interaction - interaction).abs() < 1e-12, "{pair:?}");
    let why = pair.refused.as_deref().unwrap();
    assert!(why.contains("place of magnitude is after svd"), "{why}");
    // The same where it is the first that has to come first.
    let stages = [
        stage("channel-magnitude", "blocks.*"),
        stage("svd", "blocks.*"),
    ];
    let found = interactions(&model, &stages, None, &settings, linear).unwrap();
    assert!(found.pairs[0].in_order.is_some() && found.pairs[0].reversed.is_none());
}
